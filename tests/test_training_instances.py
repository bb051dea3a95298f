"""What the README promises of replay, checked inside the strategies on a tiny stream."""

import copy
import inspect
import io
import math
from types import SimpleNamespace

import pytest
import torch
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.distributions import Bernoulli
from torch.nn.functional import cross_entropy

import TrainingInstances as instances
from figures.lab import runs
from figures.lab.baselines import ExperienceReplayPlugin, JointPlugin
from figures.lab.data import in_memory_benchmark
from figures.lab.progress import ProgressBar
from figures.lab.report import EvaluationOnly
from GenerativeModel import VAE, ClassConditionalGMM, negative_elbo, reconstruction_error
from GenerativeReplay import TrainOnly
from TrainingInstances import (
    DeepGenerativeReplayPlugin,
    GenerativeReplay,
    ReplayAlignmentPlugin,
    ReplayTemplate,
    Samples,
    VAETraining,
)

SHAPE, CLASSES, SAMPLES, BATCH = (1, 4, 4), 8, 20, 8  # minibatches of 8, 8 and 4
EXPERIENCES = [(6, 1), (0, 3), (7, 2), (4, 5)]


def images_of(classes):
    generator = torch.Generator().manual_seed(classes[0])
    y = torch.tensor(classes).repeat(SAMPLES // 2)
    x = 0.1 * torch.rand(SAMPLES, *SHAPE, generator=generator)
    x.flatten(1)[torch.arange(SAMPLES), y] = 1  # one bright pixel tells the class
    return x, y


@pytest.fixture
def stream():
    torch.manual_seed(0)
    return in_memory_benchmark(*[[images_of(c) for c in EXPERIENCES]] * 2).train_stream


class Spy(SupervisedPlugin):
    """Note each minibatch with n real images, its output and its loss."""

    def __init__(self):
        super().__init__()
        self.notes = []

    def before_backward(self, strategy, **kwargs):
        output = strategy.mb_output
        self.notes.append(SimpleNamespace(
            experience=strategy.experience.current_experience, n=strategy.n_current,
            x=strategy.mb_x, y=strategy.mb_y, task_labels=strategy.mbatch[2:],
            replayed=strategy.replay_plugin and strategy.replay_plugin.replayed,
            loss=strategy.loss.item(), rate=strategy.optimizer.param_groups[0]["lr"],
            output=output.detach() if isinstance(output, torch.Tensor) else output,
        ))  # fmt: skip


class SizeSpy(SupervisedPlugin):
    """Note the size of each minibatch."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def before_backward(self, strategy, **kwargs):
        self.sizes.append(len(strategy.mb_x))


def rows(notes):
    """Return where in their experience the real images of some minibatches come from."""
    images, _ = images_of(EXPERIENCES[notes[0].experience])
    x = torch.cat([note.x[: note.n] for note in notes])
    return [(images == image).flatten(1).all(1).nonzero().item() for image in x]


def make_solver(strategy=GenerativeReplay, plugins=(), **settings):
    solver, spy = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES)), Spy()
    settings = {"train_mb_size": BATCH, "evaluator": EvaluationOnly()} | settings
    settings["plugins"] = [spy, instances.LossRecorder("solver"), *plugins]
    optimizer = torch.optim.Adam(solver.parameters())
    return strategy(model=solver, optimizer=optimizer, **settings), spy


def make_scholar(seed=0, components=0, only_solver=None, **both):
    torch.manual_seed(seed)
    names = inspect.signature(DeepGenerativeReplayPlugin).parameters.keys()
    replay = {name: both.pop(name) for name in names & both.keys()}
    density = ClassConditionalGMM(components, latent_size=4) if components else None
    vae, spy = VAE(SHAPE, hidden_units=16, latent_size=4, density=density), Spy()
    plugin = ReplayAlignmentPlugin if components else DeepGenerativeReplayPlugin
    generator_strategy = VAETraining(
        model=vae, optimizer=torch.optim.Adam(vae.parameters()), train_mb_size=BATCH,
        replay_plugin=plugin(**replay), kl_weight=1.0, plugins=[spy], **both,
    )  # fmt: skip
    both |= only_solver or {}
    replay |= {name: both.pop(name) for name in names & both.keys()}
    plugin = DeepGenerativeReplayPlugin(generator_strategy, **replay)
    return *make_solver(replay_plugin=plugin, **both), spy


def parameters(scholar):
    models = scholar.model, scholar.replay_plugin.generator
    return torch.cat([p.detach().flatten() for model in models for p in model.parameters()])


GROWING = [[0, 0, 0], [8, 8, 4], [16, 16, 8], [24, 24, 12]]
DOUBLED = [[0, 0, 0], [8, 8, 4], [16, 16, 8], [32, 32, 16]]


@pytest.mark.parametrize(
    ("replay", "solver", "generator"),
    [
        ({}, GROWING, [[0, 0, 0], [8, 8, 4], [8, 8, 4], [8, 8, 4]]),
        ({"replay_size": 5}, *[[[0] * 3, [5] * 3, [5] * 3, [5] * 3]] * 2),
        ({"increasing_replay_size": True}, DOUBLED, DOUBLED),
        (
            {"replay_size": 3, "increasing_replay_size": True},
            *[[[0] * 3, [3] * 3, [6] * 3, [12] * 3]] * 2,
        ),
        ({"replay_size": 0, "increasing_replay_size": True}, *[[[0, 0, 0]] * 4] * 2),
    ],
)
def test_amount_of_replay_for_solver_and_generator(stream, replay, solver, generator):
    scholar, *spies = make_scholar(**replay)
    for experience in stream:
        before = scholar.replay_plugin.generator.decoder[0].weight.detach().clone()
        scholar.train(experience)  # the generator learns each experience too
        assert not torch.equal(scholar.replay_plugin.generator.decoder[0].weight, before)
    for spy, expected in zip(spies, (solver, generator)):
        assert [len(note.x) - note.n for note in spy.notes] == sum(expected, [])


def test_very_many_replayed_images_are_warned_of(stream):
    scholar, *_ = make_scholar(replay_size=5000, iterations=1)
    scholar.train(stream[0])
    with pytest.warns(UserWarning, match="minibatch of experience 2 replays 5000 images"):
        scholar.train(stream[1])


@pytest.mark.parametrize("temperature", [None, 2.0])
def test_the_old_solver_labels_with_classes_that_it_has_seen(stream, temperature):
    scholar, spy, _ = make_scholar(only_solver={"temperature": temperature})
    scholar.model[-1].bias.data[5] = 9  # preferred from the start, but first seen in the last one
    seen = []
    for k, (experience, classes) in enumerate(zip(stream, EXPERIENCES), 1):
        old_solver = copy.deepcopy(scholar.model)
        spy.notes.clear()
        scholar.train(experience)
        for note in spy.notes if seen else []:
            (x, labels), logits = (note.x[note.n :], note.y[note.n :]), note.output[note.n :]
            old_logits = old_solver(x).detach()
            assert set(old_logits.argmax(1).tolist()) == {5}
            assert labels.tolist() == [max(seen, key=row.__getitem__) for row in old_logits]
            if temperature:  # soft targets, by hand
                targets = (old_logits[:, seen] / 2).softmax(1)
                soft = -(targets * (logits / 2).log_softmax(1)[:, seen]).sum(1).mean()
                hard = cross_entropy(note.output[: note.n], note.y[: note.n])
                assert note.loss == pytest.approx((hard / k + (1 - 1 / k) * soft).item(), rel=1e-5)
        seen += classes
    assert scholar.replay_plugin.seen_classes == sorted(seen)


@pytest.mark.parametrize("components", [0, 2])
def test_real_images_come_first_unchanged_and_types_stay(stream, components):
    for experience in stream:  # any task label but 0, which a plugin could have made up
        images, labels, _ = experience.dataset.tensors
        experience.dataset.tensors = images, labels, torch.full_like(labels, 3)
    scholar, *spies = make_scholar(components=components)
    scholar.train(stream)
    for note in spies[0].notes + spies[1].notes:
        assert note.y[: note.n].equal(images_of(EXPERIENCES[note.experience])[1][rows([note])])
        assert (note.x.dtype, note.y.dtype) == (torch.float32, torch.int64)
        assert note.task_labels[0].equal(torch.full_like(note.y, 3))
        assert note.x.min() >= 0 and note.x.max() <= 1 and not note.x.requires_grad


@pytest.mark.parametrize("ahead", [1, 16, 2048])
def test_replay_comes_from_copies_frozen_before_the_experience(stream, ahead, monkeypatch):
    monkeypatch.setattr(instances.DeepGenerativeReplayPlugin, "AHEAD", ahead)
    scholar, *spies = make_scholar(replay_size=8)
    generator, generated = scholar.replay_plugin.generator, []

    class SpiedVAE(VAE):
        def generate(self, *arguments):
            generated.append((self, VAE.generate(self, *arguments)))
            return generated[-1][1]

    generator.__class__ = SpiedVAE  # and that of its copies
    scholar.train(stream[0])
    for experience in stream[1:]:
        before = copy.deepcopy(generator.state_dict())
        for notes in (generated, spies[0].notes, spies[1].notes):
            notes.clear()
        scholar.train(experience)
        for model, _ in generated:
            assert model is not generator and not any(m.training for m in model.modules())
            assert all(value.equal(before[name]) for name, value in model.state_dict().items())
            assert all(parameter.grad is None for parameter in model.parameters())
        sizes = {1: [8, 8, 8], 16: [16, 16], 2048: [2048]}[ahead]
        assert [len(images) for _, images in generated] == sizes * 2
        for spy, part in zip(spies, (generated[: len(sizes)], generated[len(sizes) :])):
            samples = torch.cat([images for _, images in part])  # each is replayed once, in order
            assert torch.cat([note.x[note.n :] for note in spy.notes]).equal(samples[:24])
        for strategy in runs.with_generator(scholar):
            plugin = strategy.replay_plugin
            assert plugin.old_generator is plugin.old_model is plugin.ahead is None


@pytest.mark.parametrize("ratio", [None, 0.0, 0.25, 1.0])
@pytest.mark.parametrize("replay_size", [None, 3, 20])
def test_weights_of_current_and_replayed_data_by_hand(stream, ratio, replay_size):
    scholar, *spies = make_scholar(ratio=ratio, replay_size=replay_size)
    scholar.train(stream)
    for solver, note in [(spy is spies[0], note) for spy in spies for note in spy.notes]:
        losses = negative_elbo(note.x, note.output) if not solver else (
            cross_entropy(note.output, note.y, reduction="none")
        )  # fmt: skip
        expected = losses[: note.n].mean()
        if note.experience > 0:
            r = 1 / (note.experience + 1) if ratio is None else ratio
            expected = r * expected + (1 - r) * losses[note.n :].mean()
        assert note.loss == pytest.approx(expected.item(), rel=1e-4)


def test_replay_aligns_the_new_decoder_with_the_old_one_on_a_fitted_density(stream):
    scholar, _, spy = make_scholar(components=1)
    scholar.train(stream[0])
    vae, (x, y) = scholar.replay_plugin.generator, images_of(EXPERIENCES[0])
    old_vae = copy.deepcopy(vae)
    encodings = vae.encode(x[y == 6])[0]  # real ones of this experience
    (mean,) = vae.density.means[vae.density.labels == 6]
    torch.testing.assert_close(mean, encodings.mean(0))
    assert vae.density.labels.tolist() == [1, 6]
    scholar.train(stream[1])
    assert vae.density.labels.tolist() == [1, 6, 0, 3]
    assert vae.density.means[:2].equal(old_vae.density.means)
    for note in spy.notes[3:]:
        n, z = note.n, note.replayed.z
        torch.testing.assert_close(note.x[n:], torch.sigmoid(old_vae.decode(z)).detach())
        old = reconstruction_error(note.x[n:], note.output[0][n:]).mean()
        current = negative_elbo(note.x[:n], [part[:n] for part in note.output]).mean()
        assert note.loss == pytest.approx((current + old).item() / 2, 1e-5)


def test_replayed_latents_are_decoded_as_they_are_and_cost_no_divergence():
    vae, plugin, x = VAE(SHAPE, 16, 4), ReplayAlignmentPlugin(), torch.rand(8, *SHAPE)
    optimizer = torch.optim.Adam(vae.parameters())
    strategy = VAETraining(model=vae, optimizer=optimizer, replay_plugin=plugin, kl_weight=0.25)
    y, z = torch.zeros(8, dtype=torch.int64), torch.randn(3, 4)
    strategy.is_training, strategy.mbatch = True, [x, y, y]
    plugin.replayed = Samples(x[5:], y[5:], z=z)
    logits, z_mean, z_log_var = strategy.mb_output = strategy.forward()
    torch.testing.assert_close(logits[5:], vae.decode(z))
    torch.testing.assert_close((z_mean, z_log_var), vae.encode(x[:5]))
    log_likelihood = Bernoulli(logits=logits[5:], validate_args=False).log_prob(x[5:])
    losses = strategy.loss_per_image()
    torch.testing.assert_close(losses[5:], -log_likelihood.sum((1, 2, 3)))
    real = negative_elbo(x[:5], (logits[:5], z_mean, z_log_var), 0.25)
    torch.testing.assert_close(losses[:5], real)


def test_training_accuracy_counts_real_images_only_and_the_loss_is_the_minimised_one(stream):
    evaluator = EvaluationPlugin(accuracy_metrics(epoch=True), loss_metrics(epoch=True))
    scholar, spy, _ = make_scholar(only_solver={"evaluator": evaluator})
    scholar.train(stream)
    for experience in range(4):
        notes = [note for note in spy.notes if note.experience == experience]
        right = sum((n.output.argmax(1) == n.y)[: n.n].sum().item() for n in notes)
        loss = sum(note.loss * note.n for note in notes)
        for name, total in (("Top1_Acc", right), ("Loss", loss)):
            key = f"{name}_Epoch/train_phase/train_stream/Task000"
            logged = evaluator.get_all_metrics()[key][1][experience]
            assert logged == pytest.approx(total / SAMPLES, rel=1e-5)


def test_epochs_go_through_the_data_and_iterations_are_full_minibatches(stream):
    scholar, *spies = make_scholar(train_epochs=2)
    scholar.train(stream[0])
    for spy in spies:
        assert [note.n for note in spy.notes] == [8, 8, 4, 8, 8, 4]
    scholar, *spies = make_scholar(iterations=7)
    scholar.train(stream[:2])
    for spy in spies:
        assert [note.n for note in spy.notes] == [8] * 14
    for seen in (rows(spies[0].notes[:7]), rows(spies[1].notes[7:])):
        assert sorted(seen[:20]) == sorted(seen[20:40]) == list(range(20)) != seen[:20]


def test_options_of_the_data_loader(stream):
    scholar, *spies = make_scholar()
    scholar.train(stream[0], shuffle=False, drop_last=True, num_workers=1)
    for spy in spies:
        assert rows(spy.notes) == list(range(16))
    scholar, *spies = make_scholar(iterations=7)
    scholar.train(stream[0], shuffle=False)  # again from the beginning
    for spy in spies:
        assert rows(spy.notes) == [row % 20 for row in range(56)]
    with pytest.raises(TypeError, match="pin_memroy"):
        scholar.train(stream[1], pin_memroy=True)


def test_another_loss_is_a_method_to_override(stream):
    class Half(ReplayTemplate):
        def loss_per_image(self):
            return super().loss_per_image() / 2

    strategy, spy = make_solver(Half)
    strategy.train(stream[0])
    for note in spy.notes:
        assert note.loss == pytest.approx(cross_entropy(note.output, note.y).item() / 2)
    with pytest.raises(TypeError, match="override loss_per_image"):
        make_solver(criterion=nn.CrossEntropyLoss())


def test_without_replay_it_is_fine_tuning(stream):
    strategy, _ = make_solver(ReplayTemplate, train_mb_size=SAMPLES)
    solver = copy.deepcopy(strategy.model)
    strategy.train(stream)
    strategy.eval(stream)
    optimizer = torch.optim.Adam(solver.parameters())
    for x, y in map(images_of, EXPERIENCES):
        optimizer.zero_grad()
        cross_entropy(solver(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(list(strategy.model.parameters()), list(solver.parameters()))


def amount(**replay):
    generator = SimpleNamespace(model=VAE(SHAPE))
    return DeepGenerativeReplayPlugin(generator, **replay).amount


@pytest.mark.parametrize(
    ("replay", "sizes"),
    [({}, [8, 16, 24, 32]), ({"replay_size": 3, "increasing_replay_size": True}, [8, 11, 14, 20])],
)
def test_joint_training_learns_all_experiences_so_far(stream, replay, sizes):
    strategy, spy = make_solver(ReplayTemplate, plugins=[JointPlugin(amount(**replay))])
    for k, (experience, size) in enumerate(zip(stream, sizes), 1):
        spy.notes.clear()
        strategy.train(experience)
        x = torch.cat([images_of(classes)[0] for classes in EXPERIENCES[:k]])
        assert [len(note.x) for note in spy.notes] == [len(part) for part in x.split(size)]
        learned, labels = (torch.cat([getattr(n, part) for n in spy.notes]) for part in "xy")
        assert len(learned) == len(x) == len(torch.cat([x, learned]).unique(dim=0))
        assert labels.equal(learned.flatten(1).argmax(1))


def carry_over(old, new):
    """Bring a new scholar to what is saved of an old one."""
    states = [runs.strategy_state(part) for part in runs.with_generator(old)]
    torch.save({"strategies": states, "random": [torch.get_rng_state()]}, saved := io.BytesIO())
    saved.seek(0)
    runs.load_state(new, torch.load(saved, weights_only=True))


@pytest.mark.parametrize("settings", [{}, {"components": 2, "only_solver": {"temperature": 2.0}}])
def test_same_seed_same_numbers_also_after_an_interruption(stream, settings):
    whole, interrupted, resumed = (make_scholar(seed, **settings)[0] for seed in (3, 3, 4))
    for scholar in (whole, interrupted):
        torch.manual_seed(0)
        scholar.train(stream[:2])
    assert parameters(whole).equal(parameters(interrupted))
    carry_over(interrupted, resumed)
    for scholar in (whole, resumed):
        torch.manual_seed(1)
        scholar.train(stream[2:])
    assert parameters(whole).equal(parameters(resumed))
    assert whole.plugins[1].losses == resumed.plugins[1].losses


HOOKS = ["before_training_exp", "before_training_iteration", "after_forward", "after_backward",
         "after_update", "after_training_epoch", "after_training_exp", "at the end"]  # fmt: skip


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("interrupted", [0, 1], ids=["solver", "generator"])
def test_an_interrupted_experience_counts_as_not_learned(stream, interrupted, hook):
    scholars = [make_scholar(3, iterations=4, components=2) for _ in range(2)]
    recorders = [scholar.plugins[1] for scholar, *_ in scholars]
    for scholar, *_ in scholars:
        for strategy in runs.with_generator(scholar):
            strategy.plugins.append(instances.OneCyclePlugin(strategy.optimizer))
        torch.manual_seed(0)
        scholar.train(stream[0])
    (scholar, *spies), (fresh, *_) = scholars
    spy, before = spies[interrupted], parameters(scholar)
    if hook == "at the end":
        hook, plugins = "after_training_exp", runs.with_generator(scholar)[interrupted].plugins
        plugins.append(plugins.pop(plugins.index(spy)))  # behind replay and clock

    def interrupt(strategy, **kwargs):
        if hook != "after_update" or len(spy.notes) == 7:  # the third iteration of the second
            raise KeyboardInterrupt

    setattr(spy, hook, interrupt)
    with pytest.raises(KeyboardInterrupt):
        scholar.train(stream[1])
    delattr(spy, hook)
    assert parameters(scholar).equal(before)
    for each in (scholar, fresh):
        torch.manual_seed(1)
        each.eval(stream[:2])
        each.train(stream[1:])
    assert parameters(scholar).equal(parameters(fresh))
    assert recorders[0].losses == recorders[1].losses


def test_a_head_that_has_grown_shrinks_after_an_interruption(stream):
    scholar, spy, _ = make_scholar(iterations=2)
    scholar.model = nn.Sequential(nn.Flatten(), IncrementalClassifier(16, masking=False))
    scholar.train(stream[0])
    sizes = [scholar.model[1].classifier.out_features]
    spy.after_update = lambda strategy, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        scholar.train(stream[2])
    del spy.after_update
    scholar.train(stream[1])
    assert [*sizes, scholar.model[1].classifier.out_features] == [7, 7]


def test_what_solver_and_generator_share_is_still_shared_after_an_interruption(stream):
    scholar, spy, _ = make_scholar(iterations=2)
    shared = scholar.replay_plugin.generator.encoder
    scholar.model = nn.Sequential(shared, nn.Linear(16, CLASSES))
    spy.after_update = lambda strategy, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        scholar.train(stream[0])
    assert scholar.model[0][2].weight is scholar.replay_plugin.generator.encoder[2].weight


@pytest.mark.parametrize("several", [iter, list, lambda stream: stream])
def test_any_iterable_of_experiences_is_learned_to_its_end(stream, several):
    scholar, *_ = make_scholar(iterations=2)
    scholar.train(several(stream))
    assert scholar.replay_plugin.seen_classes == list(range(CLASSES))


def test_an_online_stream_is_learned(stream):
    scholar, spy, _ = make_scholar(iterations=2)
    scholar.plugins.append(ProgressBar("solver"))
    scholar.train(split_online_stream(stream, experience_size=SAMPLES // 2))
    assert [note.experience for note in spy.notes] == [i for i in range(8) for _ in range(2)]


def test_the_replay_plugin_in_a_strategy_of_avalanche(stream):
    scholar, *_ = make_scholar()
    naive = Naive(
        model=scholar.model, optimizer=scholar.optimizer, train_mb_size=BATCH,
        plugins=[scholar.replay_plugin, spy := SizeSpy()], evaluator=None,
    )  # fmt: skip
    naive.train(stream)
    assert [spy.sizes[i] for i in (0, 3, 6, 9)] == [BATCH, 2 * BATCH, 3 * BATCH, 4 * BATCH]


@pytest.mark.parametrize("strategy", ["replay", "er"])
def test_a_plugin_goes_on_in_a_new_strategy(stream, strategy):
    scholar, *_ = make_scholar(iterations=2)
    plugin = scholar.replay_plugin
    if strategy == "er":
        plugin = ExperienceReplayPlugin(30, plugin.amount)
    kind = {"replay": GenerativeReplay, "er": ReplayTemplate}[strategy]
    settings = {"replay_plugin": plugin, "iterations": 2}
    first, _ = make_solver(kind, **settings)
    first.train(stream[:2])
    again, spy = make_solver(kind, **settings)
    again.train(stream[2])
    output, y, n = spy.notes[0].output, spy.notes[0].y, BATCH
    assert len(y) == 3 * BATCH
    losses = cross_entropy(output, y, reduction="none")
    expected = losses[:n].mean() / 3 + losses[n:].mean() * 2 / 3
    assert spy.notes[0].loss == pytest.approx(expected.item())


def test_pixels_outside_of_0_to_1_are_refused():
    pair = [images_of(EXPERIENCES[0])]
    (experience,) = in_memory_benchmark(pair, pair).train_stream
    experience.dataset.tensors[0].mul_(255)
    scholar, *_ = make_scholar()
    with pytest.raises(ValueError, match="have to lie in"):
        scholar.train(experience)


def test_evaluation_draws_no_random_numbers(stream):
    scholar, *_ = make_scholar(components=2)
    scholar.train(stream[0])
    before = torch.get_rng_state()
    scholar.eval(stream)
    assert torch.get_rng_state().equal(before)


def test_the_learning_rate_makes_a_cycle_in_each_experience(stream):
    strategy, spy = make_solver(ReplayTemplate, iterations=99)
    strategy.plugins.append(instances.OneCyclePlugin(strategy.optimizer))
    strategy.train(stream[:3])
    up = [0.001 - 0.0009 * (1 + math.cos(math.pi * i / 14)) / 2 for i in range(14)]
    down = [0.001 * (1 + math.cos(math.pi * i / 85)) / 2 for i in range(85)]
    assert [note.rate for note in spy.notes] == pytest.approx((up + down) * 3, rel=1e-3, abs=1e-8)
    assert not strategy.optimizer.state


def test_at_the_end_of_the_cycle_the_learning_rate_stays_at_nothing(stream):
    class Twice(SupervisedPlugin):
        def before_training_exp(self, strategy, **kwargs):
            strategy.dataloader = [*strategy.dataloader] * 2

    strategy, spy = make_solver(ReplayTemplate, iterations=20)
    strategy.plugins += [instances.OneCyclePlugin(strategy.optimizer), Twice()]
    strategy.train(stream[0])
    rates = [note.rate for note in spy.notes]
    assert len(rates) == 40 and rates[3] == max(rates) == pytest.approx(0.001, rel=0.02)
    assert max(rates[20:]) < 1e-7 and len(strategy.plugins[1].losses) == 40


def test_the_loss_is_recorded_and_has_to_be_finite(stream):
    scholar, spy, _ = make_scholar()
    scholar.train(stream[:2])
    losses = scholar.plugins[1].losses  # of the second experience
    assert len(losses) == 3 and losses == [note.loss for note in spy.notes[3:]]
    spy.after_update = lambda strategy, **kwargs: strategy.model[1].weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="solver is nan at experience 3, iteration 2"):
        scholar.train(stream[2])


def test_experience_replay_stores_a_uniform_sample_of_all_images(stream):
    counts = torch.zeros(CLASSES)
    for _ in range(200):
        plugin = ExperienceReplayPlugin(6, amount())
        for experience in stream:
            plugin.after_training_exp(SimpleNamespace(experience=experience))
        x, y, *_ = plugin.stored
        assert x.flatten(1).argmax(1).equal(y) and len(y) == len(x.unique(dim=0)) == 6
        counts += y.bincount(minlength=CLASSES)
    assert counts.min() > 110 and counts.max() < 190  # 150 on average, standard deviation 11


@pytest.mark.parametrize("ratio", [None, 0.2])
def test_experience_replay_adds_as_many_stored_images_weighted_as_replay(stream, ratio):
    plugin = ExperienceReplayPlugin(6, amount(replay_size=5, increasing_replay_size=True), ratio)
    strategy, spy = make_solver(ReplayTemplate, replay_plugin=plugin)
    strategy.train(stream[:2])
    stored = plugin.stored[0].clone()
    strategy.train(stream[2])
    assert [note.n for note in spy.notes] == [8, 8, 4] * 3
    assert [len(note.x) - note.n for note in spy.notes] == [0] * 3 + [5] * 3 + [10] * 3
    for note in spy.notes[6:]:
        labels, r = note.x.flatten(1).argmax(1), 1 / 3 if ratio is None else ratio
        assert note.y.equal(labels) and set(labels[: note.n].tolist()) <= {7, 2}
        old = note.x[note.n :]
        assert 1 < len(old.unique(dim=0)) and len(torch.cat([stored, old]).unique(dim=0)) == 6
        losses = cross_entropy(note.output, labels, reduction="none")
        expected = r * losses[: note.n].mean() + (1 - r) * losses[note.n :].mean()
        assert note.loss == pytest.approx(expected.item())


def test_modules_that_act_in_training_only():
    module, x = TrainOnly(nn.Threshold(9, 7)), torch.rand(10, 4)
    assert module(x).equal(torch.full_like(x, 7)) and module.eval()(x).equal(x)
