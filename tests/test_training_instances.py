"""Every promise about replay, seen from inside real strategies on a tiny stream."""

import copy
import inspect

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.training.plugins import EvaluationPlugin
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from GenerativeModel import VAE, LatentMixtures, negative_elbo
from TrainingInstances import (
    FixedIterations,
    GenerativeReplay,
    ScholarTemplate,
    TensorLoader,
    VAETraining,
    WhileTraining,
    in_memory_benchmark,
    in_memory_dataset,
)

SHAPE, CLASSES, SAMPLES, BATCH = (1, 4, 4), 8, 20, 8  # minibatches of 8, 8 and 4
EXPERIENCES = [(6, 1), (0, 3), (7, 2), (4, 5)]


def images_of(classes, seed=0):
    generator = torch.Generator().manual_seed(seed + classes[0])
    y = torch.tensor(classes).repeat(SAMPLES // 2)
    x = 0.1 * torch.rand(SAMPLES, *SHAPE, generator=generator)
    x.flatten(1)[torch.arange(SAMPLES), y] = 1  # one bright pixel tells the class
    return x, y


@pytest.fixture
def stream():
    experiences = [images_of(classes) for classes in EXPERIENCES]
    return in_memory_benchmark(experiences, experiences).train_stream


class Spy(SupervisedPlugin):
    """Notes what a strategy is about to learn from, and what its metrics will count."""

    def __init__(self):
        super().__init__()
        self.seen, self.counted, self.old_solver = [], [], None

    def before_forward(self, strategy, **kwargs):
        note = {
            "experience": strategy.experience.current_experience,
            "current": strategy.replay.current_size,
            "minibatch": [part.clone() for part in strategy.mbatch],
            "grad": strategy.mb_x.requires_grad,
        }
        if self.old_solver is not None:
            note["old_logits"] = self.old_solver(strategy.mb_x).detach()
            note["old_modes"] = {m.training for m in strategy.replay.old_model.modules()}
        self.seen.append(note)

    def before_backward(self, strategy, **kwargs):
        self.seen[-1]["loss"] = strategy.loss.item()
        output = strategy.mb_output
        output = [output] if isinstance(output, torch.Tensor) else output
        self.seen[-1]["output"] = [part.detach() for part in output]

    def after_training_iteration(self, strategy, **kwargs):
        self.counted.append((strategy.mbatch, strategy.mb_output, strategy.loss.item()))

    def amounts(self):
        """Replayed samples per minibatch, a list per experience."""
        numbers = [[] for _ in EXPERIENCES]
        for note in self.seen:
            numbers[note["experience"]].append(len(note["minibatch"][0]) - note["current"])
        return numbers


def scholar(seed=0, evaluator=None, temperature=None, components=0, **replay):
    torch.manual_seed(seed)
    spies = Spy(), Spy()
    solver = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    mixtures = LatentMixtures(CLASSES, components, latent_size=4) if components else None
    vae = VAE(SHAPE, hidden_units=16, latent_size=4, mixtures=mixtures)
    generator_strategy = VAETraining(
        model=vae,
        optimizer=torch.optim.Adam(vae.parameters()),
        train_mb_size=BATCH,
        plugins=[spies[1]],
        **replay,
    )
    strategy = GenerativeReplay(
        model=solver,
        optimizer=torch.optim.Adam(solver.parameters()),
        generator_strategy=generator_strategy,
        train_mb_size=BATCH,
        eval_mb_size=SAMPLES,
        plugins=[spies[0]],
        evaluator=evaluator or EvaluationPlugin(),
        temperature=temperature,
        **replay,
    )
    return strategy, *spies


@pytest.mark.parametrize(
    ("replay", "expected"),
    [
        ({}, [[0, 0, 0], [8, 8, 4], [8, 8, 4], [8, 8, 4]]),
        ({"replay_size": 5}, [[0, 0, 0], [5, 5, 5], [5, 5, 5], [5, 5, 5]]),
        ({"replay_size": 0}, [[0, 0, 0]] * 4),
        (
            {"replay_size": 3, "increasing_replay_size": True},
            [[0, 0, 0], [3, 3, 3], [6, 6, 6], [12, 12, 12]],
        ),
        (
            {"increasing_replay_size": True},
            [[0, 0, 0], [8, 8, 4], [16, 16, 8], [32, 32, 16]],
        ),
        ({"replay_size": 0, "increasing_replay_size": True}, [[0, 0, 0]] * 4),
    ],
)
def test_amount_of_replay(stream, replay, expected):
    strategy, solver_spy, generator_spy = scholar(**replay)
    strategy.train(stream)
    assert solver_spy.amounts() == expected
    assert generator_spy.amounts() == expected


def test_the_old_solver_labels_with_classes_that_it_has_seen(stream):
    strategy, spy, _ = scholar()
    strategy.model[-1].bias.data[5] = 9  # preferred from the start, but first seen in the last one
    for experience in stream:
        strategy.train(experience)
        spy.old_solver = copy.deepcopy(strategy.model).eval()
    replayed = [note for note in spy.seen if note["experience"] > 0]
    assert len(replayed) == 9
    for note in replayed:
        seen = sorted(c for classes in EXPERIENCES[: note["experience"]] for c in classes)
        labels = note["minibatch"][1][note["current"] :]
        logits = note["old_logits"][note["current"] :]
        assert set(labels.tolist()) <= set(seen)
        assert set(logits.argmax(1).tolist()) == {5}
        assert labels.tolist() == [max(seen, key=lambda c: row[c].item()) for row in logits]
        assert note["old_modes"] == {False}


def test_the_current_samples_come_first_and_are_not_changed(stream):
    strategy, spy, generator_spy = scholar()
    strategy.train(stream)
    for note in spy.seen + generator_spy.seen:
        x, y, _ = (part[: note["current"]] for part in note["minibatch"])
        images, labels = images_of(EXPERIENCES[note["experience"]])
        rows = [(images == image).flatten(1).all(1).nonzero().item() for image in x]
        assert len(set(rows)) == len(x)
        assert y.tolist() == labels[rows].tolist()


def test_types_and_task_labels_stay_what_they_were(stream):
    for experience in stream:  # any label but 0, which a plugin could have made up
        images, labels, _ = experience.dataset.tensors
        experience.dataset.tensors = images, labels, torch.full_like(labels, 3)
    strategy, *spies = scholar()
    strategy.train(stream)
    for note in spies[0].seen + spies[1].seen:
        x, y, task = note["minibatch"]
        assert (x.dtype, y.dtype, task.dtype) == (torch.float32, torch.int64, torch.int64)
        assert len(x) == len(y) == len(task)
        assert task.unique().tolist() == [3]
        assert x.min() >= 0 and x.max() <= 1


def test_replay_comes_from_the_generator_as_it_was_before_the_experience(stream):
    strategy, spy, generator_spy = scholar()
    generator = strategy.replay.generator
    for experience in stream:
        before = {name: value.clone() for name, value in generator.state_dict().items()}
        painted, painters = [], []

        def generate(model, *args, painted=painted, painters=painters):
            images = VAE.generate(model, *args)
            painted.append(images)
            painters.append(model)
            return images

        # On the instance, so that the frozen deep copies carry it too, each with itself as model.
        generator.__class__ = type("SpiedVAE", (VAE,), {"generate": generate})
        start = len(spy.seen), len(generator_spy.seen)
        strategy.train(experience)
        used = [n["minibatch"][0][n["current"] :] for n in spy.seen[start[0] :]]
        used += [n["minibatch"][0][n["current"] :] for n in generator_spy.seen[start[1] :]]
        if experience.current_experience == 0:
            assert painted == []
            continue
        torch.testing.assert_close(torch.cat(painted), torch.cat(used))
        for model in painters:
            assert model is not generator and not model.training
            for name, value in model.state_dict().items():
                assert torch.equal(value, before[name])
            assert all(parameter.grad is None for parameter in model.parameters())


def test_no_gradient_flows_into_the_replayed_images(stream):
    strategy, *spies = scholar()
    strategy.train(stream)
    assert not any(note["grad"] for note in spies[0].seen + spies[1].seen)


def test_the_generator_trains_on_every_experience(stream):
    strategy, _, spy = scholar()
    weight = strategy.replay.generator.decoder[0].weight
    for number, experience in enumerate(stream, 1):
        before = weight.detach().clone()
        strategy.train(experience)
        assert len(spy.seen) == 3 * number
        assert not torch.equal(weight, before)


@pytest.mark.parametrize("ratio", [None, 0.0, 0.25, 1.0])
@pytest.mark.parametrize("replay_size", [None, 3, 20])
def test_importance_of_present_and_past(stream, ratio, replay_size):
    strategy, spy, generator_spy = scholar(ratio=ratio, replay_size=replay_size)
    strategy.train(stream)
    for is_solver, notes in ((True, spy.seen), (False, generator_spy.seen)):
        for note in notes:
            x, y, _ = note["minibatch"]
            if is_solver:
                losses = cross_entropy(note["output"][0], y, reduction="none")
            else:
                losses = negative_elbo(x, note["output"])
            k, n = note["experience"] + 1, note["current"]
            expected = losses[:n].mean()
            if k > 1:
                r = 1 / k if ratio is None else ratio
                expected = r * losses[:n].mean() + (1 - r) * losses[n:].mean()
            assert note["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_training_metrics_count_real_samples_only(stream):
    evaluator = EvaluationPlugin(
        accuracy_metrics(epoch=True), loss_metrics(epoch=True), collect_all=True
    )
    strategy, spy, generator_spy = scholar(evaluator=evaluator)
    strategy.train(stream)
    for spied in (spy, generator_spy):
        for note, (minibatch, output, loss) in zip(spied.seen, spied.counted, strict=True):
            n = note["current"]
            for part, whole in zip(minibatch, note["minibatch"], strict=True):
                assert torch.equal(part, whole[:n])
            if isinstance(output, torch.Tensor):
                assert torch.equal(output, note["output"][0][:n])
                expected = cross_entropy(output, minibatch[1])
            else:
                expected = negative_elbo(minibatch[0], output).mean()
            assert loss == pytest.approx(expected.item(), rel=1e-4)
    curves = evaluator.get_all_metrics()
    accuracies = curves["Top1_Acc_Epoch/train_phase/train_stream/Task000"][1]
    losses = curves["Loss_Epoch/train_phase/train_stream/Task000"][1]
    assert len(accuracies) == len(losses) == 4
    for k, (reported, reported_loss) in enumerate(zip(accuracies, losses, strict=True)):
        notes = [note for note in spy.seen if note["experience"] == k]
        output, y = (
            torch.cat([part[: n["current"]] for part, n in zip(parts, notes, strict=True)])
            for parts in ([n["output"][0] for n in notes], [n["minibatch"][1] for n in notes])
        )
        assert reported_loss == pytest.approx(cross_entropy(output, y).item(), rel=1e-4)
        right = [
            (n["output"][0].argmax(1) == n["minibatch"][1])[: n["current"]].float() for n in notes
        ]
        assert reported == pytest.approx(torch.cat(right).mean().item())


def test_the_old_scholar_is_let_go(stream):
    strategy, *_ = scholar()
    strategy.train(stream)
    for replay in (strategy.replay, strategy.replay.generator_strategy.replay):
        assert replay.old_generator is None and replay.old_model is None


def test_same_seed_same_numbers(stream):
    def weights(seed):
        strategy, *_ = scholar(seed)
        strategy.train(stream)
        models = strategy.model, strategy.replay.generator
        return torch.cat([p.detach().flatten() for m in models for p in m.parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_a_generator_can_learn_a_stream_alone(stream):
    torch.manual_seed(0)
    vae, spy = VAE(SHAPE, hidden_units=16, latent_size=4), Spy()
    optimizer = torch.optim.Adam(vae.parameters())
    strategy = VAETraining(model=vae, optimizer=optimizer, train_mb_size=BATCH, plugins=[spy])
    strategy.train(stream)
    assert spy.amounts() == [[0, 0, 0], [8, 8, 4], [8, 8, 4], [8, 8, 4]]


@pytest.mark.parametrize("strategy", [VAETraining, GenerativeReplay])
def test_strategies_are_keyword_only(strategy):
    _, *parameters = inspect.signature(strategy.__init__).parameters.values()
    assert {p.kind for p in parameters} == {
        inspect.Parameter.KEYWORD_ONLY,
        inspect.Parameter.VAR_KEYWORD,
    }


def test_epochs_and_iterations(stream):
    for iterations, count in ((None, 3), (7, 7), (2, 2)):
        strategy, spy, generator_spy = scholar(iterations=iterations)
        strategy.train(stream[0])
        assert len(spy.seen) == len(generator_spy.seen) == count
    strategy, spy, _ = scholar()
    strategy.train_epochs = 2
    strategy.train(stream[0])
    assert len(spy.seen) == 6


def test_a_stream_without_task_labels_through_avalanches_own_loader():
    def dataset(classes):
        x, y = images_of(classes)
        return AvalancheDataset(
            [TensorDataset(x, y)], data_attributes=[DataAttribute(y, "targets")]
        )

    datasets = [dataset(classes) for classes in EXPERIENCES]
    benchmark = benchmark_from_datasets(train=datasets, test=datasets)
    strategy, spy, generator_spy = scholar(iterations=4)
    strategy.train(benchmark.train_stream)
    assert spy.amounts() == [[0] * 4, [8, 8, 4, 8], [8, 8, 4, 8], [8, 8, 4, 8]]
    assert all(len(note["minibatch"]) == 2 for note in spy.seen + generator_spy.seen)
    strategy.eval(benchmark.test_stream)


def test_an_adapted_dataset_is_not_fed_from_the_old_tensors():
    dataset = in_memory_dataset(*images_of((0, 1)))
    assert hasattr(dataset.train(), "tensors") and hasattr(dataset.eval(), "tensors")
    assert not hasattr(dataset.subset([0, 1]), "tensors")
    assert not hasattr(dataset.concat(dataset), "tensors")


def test_tensor_loader():
    x, y = torch.arange(20.0), torch.arange(20)
    loader = TensorLoader([x, y], batch_size=8, shuffle=False)
    assert len(loader) == 3
    assert [len(batch[0]) for batch in loader] == [8, 8, 4]
    assert torch.equal(torch.cat([batch[0] for batch in loader]), x)
    shuffled = TensorLoader([x, y], batch_size=8, shuffle=True)
    torch.manual_seed(0)
    first, second = (torch.cat([b[1] for b in shuffled]).tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second != list(range(20))
    assert all(torch.equal(batch[0].long(), batch[1]) for batch in shuffled)


def test_fixed_iterations_go_over_new_passes():
    loader = FixedIterations(TensorLoader([torch.arange(20)], 8, shuffle=False), 7)
    assert len(loader) == 7
    assert [len(batch[0]) for batch in loader] == [8, 8, 4, 8, 8, 4, 8]


def test_soft_targets_by_hand(stream):
    strategy, spy, _ = scholar(temperature=2.0)
    strategy.train(stream[:2])
    spy.seen.clear()
    spy.old_solver = copy.deepcopy(strategy.model).eval()
    strategy.train(stream[2])
    for note in spy.seen:
        n, seen = note["current"], [0, 1, 3, 6]
        targets = torch.zeros(len(note["minibatch"][0]) - n, CLASSES)
        targets[:, seen] = (note["old_logits"][n:, seen] / 2).exp()
        targets /= targets.sum(1, keepdim=True)
        logits = note["output"][0]
        soft = -(targets * (logits[n:] / 2).log_softmax(1)).sum(1).mean()
        hard = cross_entropy(logits[:n], note["minibatch"][1][:n])
        assert note["loss"] == pytest.approx((hard / 3 + 2 * soft / 3).item(), rel=1e-5)
        # What the metrics see of a replayed sample is still a label: the most likely class.
        assert torch.equal(note["minibatch"][1][n:], targets.argmax(1))


def test_latent_replay_aligns_the_new_decoder_with_the_old(stream):
    strategy, _, spy = scholar(components=2)
    strategy.train(stream[0])
    spy.seen.clear()
    vae = strategy.replay.generator
    old_vae, latents = copy.deepcopy(vae), []

    class Latents(SupervisedPlugin):
        def before_forward(self, strategy, **kwargs):
            latents.append(strategy.replay.codes)

    strategy.replay.generator_strategy.plugins.append(Latents())
    strategy.train(stream[1])
    assert len(spy.seen) == len(latents) == 3
    for note, z in zip(spy.seen, latents):
        n, images = note["current"], note["minibatch"][0]
        torch.testing.assert_close(images[n:], torch.sigmoid(old_vae.decode(z)))
        pixels = nn.functional.binary_cross_entropy_with_logits
        replayed = pixels(note["output"][0][n:], images[n:], reduction="none").sum((1, 2, 3))
        current = negative_elbo(images[:n], [part[:n] for part in note["output"]])
        assert note["loss"] == pytest.approx((current.mean() + replayed.mean()).item() / 2, 1e-5)


def test_a_mixture_is_fitted_to_its_own_experience_and_then_kept(stream):
    strategy, _, _ = scholar(components=2)
    strategy.train(stream[0])
    mixtures = strategy.replay.generator.mixtures
    assert mixtures.fitted.nonzero().flatten().tolist() == [1, 6]
    x, y = images_of(EXPERIENCES[0])
    codes = strategy.replay.generator.encode(x[y == 6])[0]
    torch.testing.assert_close(mixtures.means[6, 0], codes.mean(0), atol=1e-5, rtol=1e-4)
    before = mixtures.means[[1, 6]].clone()
    strategy.train(stream[1])
    assert mixtures.fitted.nonzero().flatten().tolist() == [0, 1, 3, 6]
    assert torch.equal(mixtures.means[[1, 6]], before)


def test_what_acts_while_training_is_off_in_evaluation():
    both, x = WhileTraining(nn.Dropout(0.5), nn.Threshold(9, 7)), torch.rand(10, 4)
    assert torch.equal(both(x), torch.full_like(x, 7))
    assert torch.equal(both.eval()(x), x)


def test_without_replay_it_is_fine_tuning(stream):
    def weights(train):
        torch.manual_seed(0)
        solver = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))
        optimizer = torch.optim.SGD(solver.parameters(), lr=0.1)
        train(solver, optimizer)
        return solver[1].weight.detach()

    def ours(model, optimizer):
        strategy = ScholarTemplate(
            model=model, optimizer=optimizer, criterion=cross_entropy, train_mb_size=SAMPLES
        )
        strategy.train(stream)
        strategy.eval(stream)

    def by_hand(model, optimizer):
        for classes in EXPERIENCES:
            x, y = images_of(classes)
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()

    torch.testing.assert_close(weights(ours), weights(by_hand))
