"""Every generator that plugs in: the contract, the three of GENERATORS, and the README's own."""

import copy
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from avalanche.core import SupervisedPlugin
from test_scripts import OFFLINE, ROOT, all_constants, os, run
from torch import nn

import GenerativeReplay
import Generator
from GenerativeModel import (
    VAE,
    WGAN,
    ConditionalVAE,
    GenerativeModel,
    LatentMixtures,
    critic_loss,
    negative_elbo,
)
from TrainingInstances import (
    GenerativeReplay as Strategy,
)
from TrainingInstances import (
    GeneratorTraining,
    ReplayedData,
    ScholarTemplate,
    VAETraining,
    WGANTraining,
    in_memory_benchmark,
)

SHAPE, CLASSES = (1, 4, 4), 4


def bright_pixels(labels, count=40):
    """Images in which one bright pixel tells the class."""
    y = torch.tensor(labels).repeat(count // len(labels))
    x = 0.1 * torch.rand(len(y), *SHAPE)
    x.flatten(1)[torch.arange(len(y)), y] = 1
    return x, y


def tiny_stream():
    torch.manual_seed(0)
    experiences = [bright_pixels(labels) for labels in ((1, 3), (0, 2))]
    return in_memory_benchmark(experiences, experiences).train_stream


def adam(model, **settings):
    return torch.optim.Adam(model.parameters(), **settings)


def solver_settings(**settings):
    solver = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))
    return {"model": solver, "optimizer": adam(solver), "train_mb_size": 10, **settings}


class Flat(GenerativeModel):
    """Paints the class in grey: 0.1, 0.2, ..."""

    known = torch.tensor([1, 3])

    def generate(self, batch_size=None, condition=None):
        y = self.draw_labels(batch_size) if condition is None else condition
        return ((y + 1) / 10).reshape(-1, 1, 1, 1).expand(-1, *SHAPE)

    def classes(self):
        return self.known


class Idle:
    """A strategy that has nothing to learn."""

    def __init__(self, model):
        self.model = model

    def train(self, experience, **kwargs):
        pass


@pytest.mark.parametrize(
    ("generator", "labels"),
    [
        ("vae", "solver"),
        ("vae", "generator"),
        ("cvae", "solver"),
        ("cvae", "generator"),
        ("wgan-gp", "solver"),
    ],
)
def test_every_generator_through_the_whole_stream(generator, labels):
    constants = all_constants(
        DEVICE="cpu", ITERATIONS=10, GENERATOR=generator, REPLAY_LABELS=labels
    )
    constants.TEMPERATURE = None if labels == "generator" else 2.0
    images = Generator.load_digits()
    benchmark = Generator.make_benchmark(images, constants)
    torch.manual_seed(0)
    scholar = GenerativeReplay.make_scholar((1, 28, 28), constants)
    model, strategy = scholar.replay.generator, scholar.replay.generator_strategy
    for experience in benchmark.train_stream:
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        scholar.train(experience)
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert after.isfinite().all() and (after != before).any()
        known = model.classes()
        if generator == "wgan-gp":
            assert known is None
        else:
            learned = (experience.current_experience + 1) * 2
            assert sorted(known.tolist()) == list(range(learned))
    for evaluated in scholar, strategy:
        evaluated.eval(benchmark.test_stream)
    assert strategy.loss.isfinite()
    for count, shape in ((7, (7, 1, 28, 28)), (None, (1, 28, 28))):
        painted = model.generate(count)
        assert painted.shape == shape and not painted.requires_grad
        assert painted.min() >= 0 and painted.max() <= 1
    other = copy.deepcopy(GenerativeReplay.make_scholar((1, 28, 28), constants).replay.generator)
    other.load_state_dict(model.state_dict())  # all that it knows
    images = []
    for painter in (model, other):
        torch.manual_seed(1)
        images.append(painter.generate(5))
    assert torch.equal(*images)


@pytest.mark.parametrize("generator", ["cvae", "wgan-gp"])
def test_the_generator_script_takes_every_generator(generator, tmp_path):
    arguments = "--dataset", "digits", "--iterations", 2, "--n-experiences", 2
    done = run("Generator.py", "--generator", generator, *arguments, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert len(list((tmp_path / "results").rglob("generator-seed0.png"))) == 1
    (state,) = (tmp_path / "results").rglob("state.pt")
    shown = run("Generator.py", "--load", state.parent, cwd=tmp_path)
    assert shown.returncode == 0 and len(list(tmp_path.rglob("look.png"))) == 1


def test_what_suits_each_generator_unless_told_otherwise():
    constants = all_constants(DEVICE="cpu", ITERATIONS=10)

    def settings(generator):
        constants.GENERATOR = generator
        strategy = Generator.make_generator_strategy((1, 28, 28), constants)
        adam = strategy.optimizer.defaults
        return adam["lr"], adam["betas"], strategy.iterations

    assert settings("vae") == settings("cvae") == (0.002, (0.9, 0.999), 10)
    assert settings("wgan-gp") == (3e-3, (0.5, 0.9), 50)
    constants.GENERATOR_LEARNING_RATE, constants.GENERATOR_ITERATIONS = 0.1, 3
    assert settings("wgan-gp") == (0.1, (0.5, 0.9), 3)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"GENERATOR": "wgan-gp", "REPLAY_LABELS": "generator"}, "set it to 'solver'"),
        ({"MIXTURE_COMPONENTS": 0, "REPLAY_LABELS": "generator"}, "set it to 'solver'"),
        ({"REPLAY_LABELS": "generator"}, "set TEMPERATURE to none"),
        ({"GENERATOR": "cvae", "ABLATION": True}, "set GENERATOR to 'vae'"),
    ],
)
def test_constants_that_contradict_each_other(changes, complaint, capsys):
    constants = all_constants(DEVICE="cpu", ITERATIONS=1, **changes)
    with pytest.raises(SystemExit) as ended:
        for _, _, variant in GenerativeReplay.variants(constants):
            GenerativeReplay.make_scholar((1, 28, 28), variant)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and complaint in error


def test_a_contradiction_ends_the_program_before_the_first_run(tmp_path):
    arguments = "--dataset", "digits", "--generator", "cvae", "--replay-labels", "generator"
    done = run("GenerativeReplay.py", *arguments, "--n-jobs", 2, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "TEMPERATURE" in done.stderr
    assert "experience" not in done.stdout.lower().split("results_dir")[1]
    done = run("GenerativeReplay.py", "--generator", "gan", cwd=tmp_path)
    assert done.returncode == 2 and "GENERATOR is 'gan'" in done.stderr


class Mute(nn.Module):
    pass


class Duck(nn.Module):
    """Not a `GenerativeModel`, but it has what is asked."""

    def generate(self, batch_size=None, condition=None):
        return torch.rand(batch_size, *SHAPE)


@pytest.mark.parametrize(
    ("strategy", "settings", "complaint"),
    [
        (object(), {}, "generator_strategy is a object without model"),
        (
            SimpleNamespace(model=Flat()),
            {},
            r"is a SimpleNamespace without train\(experience\)",
        ),
        (
            Idle(Mute()),
            {},
            r"model is a Mute without generate\(batch_size, condition\)",
        ),
        (Idle("me"), {}, "generator_strategy.model is a str, not a torch.nn.Module"),
        (Idle(Duck()), {"labels": "generator"}, "is a Duck that knows no classes"),
        (Idle(WGAN(SHAPE)), {"labels": "generator"}, "is a WGAN that knows no classes"),
    ],
)
def test_an_error_names_what_a_generator_lacks(strategy, settings, complaint):
    with pytest.raises(TypeError, match=complaint):
        Strategy(generator_strategy=strategy, **solver_settings(**settings))


@pytest.mark.parametrize("training", [VAETraining, WGANTraining])
def test_an_error_names_what_a_model_lacks_that_is_to_replay_itself(training):
    model = Mute()
    model.weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(TypeError, match="model is a Mute without generate"):
        training(model=model, optimizer=adam(model))
    with pytest.raises(TypeError, match="model is a Mute without generate"):
        ScholarTemplate(model=model, optimizer=adam(model), replay=ReplayedData())


def test_a_generator_that_labels_leaves_no_use_for_a_temperature():
    with pytest.raises(ValueError, match="temperature"):
        Strategy(
            generator_strategy=Idle(Flat()), **solver_settings(labels="generator", temperature=2.0)
        )


class Minibatches(SupervisedPlugin):
    """Notes the replayed part of each minibatch."""

    def __init__(self):
        super().__init__()
        self.replayed = []

    def before_forward(self, strategy, **kwargs):
        part = slice(strategy.replay.current_size, None)
        self.replayed.append((strategy.mb_x[part].clone(), strategy.mb_y[part].clone()))


def replayed_to_solver(generator, **settings):
    spy = Minibatches()
    strategy = Strategy(
        generator_strategy=Idle(generator), **solver_settings(plugins=[spy], **settings)
    )
    strategy.train(tiny_stream())
    assert len(spy.replayed[0][0]) == 0
    return strategy, *map(torch.cat, zip(*spy.replayed[4:]))


def test_a_generator_labels_what_it_paints_each_class_equally_often():
    _, x, y = replayed_to_solver(Flat(), labels="generator", replay_size=500)
    torch.testing.assert_close(x[:, 0, 0, 0], (y + 1) / 10)
    assert set(y.tolist()) == {1, 3}
    assert (y == 1).float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_the_solver_labels_what_a_generator_paints_that_keeps_to_the_contract_by_chance():
    strategy, x, y = replayed_to_solver(Duck())
    assert len(x) == 4 * 10 and set(y.tolist()) <= {1, 3}
    # The same from outside: what the scholar would replay now.
    x, y = strategy.replay.paint(50, strategy.replay.generator, strategy.model.eval())
    assert torch.equal(y, strategy.model(x).argmax(1))


@pytest.mark.parametrize(
    "make", [lambda: WGAN(SHAPE, 8, 2), lambda: ConditionalVAE(SHAPE, CLASSES, 8, 2)]
)
def test_a_saved_scholar_goes_on_with_a_generator_whose_strategy_saves_nothing(make):
    def scholar():
        return Strategy(generator_strategy=Idle(make()), **solver_settings(iterations=3))

    first, second = scholar(), scholar()
    first.train(tiny_stream()[0])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    models = first.replay.generator, second.replay.generator
    for saved, loaded in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(saved, loaded)


def test_a_conditional_generator_learns_from_its_own_labels():
    torch.manual_seed(0)
    cvae, spy = ConditionalVAE(SHAPE, CLASSES, 32, 2), Minibatches()
    strategy = GeneratorTraining(
        model=cvae,
        optimizer=adam(cvae, lr=0.01),
        criterion=negative_elbo,
        train_mb_size=10,
        iterations=200,
        plugins=[spy],
    )
    strategy.train(tiny_stream())
    x, y = map(torch.cat, zip(*spy.replayed[200:]))
    assert set(y.tolist()) == {1, 3}
    assert (x.flatten(1).argmax(1) == y).float().mean() > 0.95


def test_a_conditional_vae_paints_the_class_that_it_is_asked_for():
    torch.manual_seed(0)
    cvae = ConditionalVAE(SHAPE, CLASSES, hidden_units=32, latent_size=2)
    strategy = VAETraining(
        model=cvae, optimizer=adam(cvae, lr=0.01), train_mb_size=10, iterations=200
    )
    first, second = tiny_stream()
    strategy.train(first)
    assert cvae.classes().tolist() == [1, 3]
    strategy.train(second)
    assert cvae.classes().tolist() == [0, 1, 2, 3]
    y = torch.arange(CLASSES).repeat(100)  # the old ones as well
    assert (cvae.generate(len(y), y).flatten(1).argmax(1) == y).float().mean() > 0.95
    assert cvae.generate(condition=torch.tensor([2])).flatten().argmax() == 2
    counts = cvae.generate(4000).flatten(1).argmax(1).bincount(minlength=CLASSES)
    assert counts.min() > 900
    x, labels = bright_pixels((0, 1, 2, 3))
    assert (cvae.reconstruct(x, labels).flatten(1).argmax(1) == labels).all()


def test_a_vae_with_mixtures_knows_the_classes_that_are_fitted():
    assert VAE(SHAPE).classes() is None
    vae = VAE(SHAPE, 8, 2, LatentMixtures(CLASSES, 1, 2))
    assert vae.classes().tolist() == []
    vae.mixtures.fit(torch.randn(100, 2), torch.tensor([1, 3]).repeat(50))
    assert vae.classes().tolist() == [1, 3]
    assert vae.draw_labels(1000).bincount(minlength=4)[[1, 3]].min() > 400


def linear_critic(wgan, weight):
    """Score = weight · image: its gradient is `weight` wherever it is taken."""
    wgan.critic = nn.Sequential(nn.Flatten(), nn.Linear(16, 1, bias=False), nn.Flatten(0))
    wgan.critic[1].weight.data[0] = weight


def test_the_gradient_penalty_by_hand():
    torch.manual_seed(0)
    wgan, x, weight = WGAN(SHAPE, 8, 2), torch.rand(6, *SHAPE), torch.randn(16)
    linear_critic(wgan, weight)
    torch.manual_seed(1)
    output = wgan(x)
    torch.manual_seed(1)
    painted = wgan.generate(6)
    norm, scores = weight.norm(), [images.flatten(1) @ weight for images in (x, painted)]
    torch.testing.assert_close(output, (*scores, norm.expand(6)))
    loss = critic_loss(x, output, penalty=3.0)
    torch.testing.assert_close(loss, scores[1] - scores[0] + 3 * (norm - 1) ** 2)
    loss.mean().backward()
    expected = (painted - x).flatten(1).mean(0) + 3 * 2 * (norm - 1) * weight / norm
    torch.testing.assert_close(wgan.critic[1].weight.grad[0], expected)
    assert all(parameter.grad is None for parameter in wgan.painter.parameters())


def test_the_gradient_is_taken_between_real_and_painted():
    class HalfSquare(nn.Module):  # its gradient is the image itself
        def forward(self, x):
            return x.flatten(1).square().sum(1) / 2

    wgan = WGAN(SHAPE, 8, 2)
    wgan.critic = nn.Sequential(HalfSquare(), nn.Linear(1, 1))
    wgan.critic.forward = wgan.critic[0].forward
    wgan.painter = nn.Sequential(nn.Linear(2, 16), nn.Threshold(1e9, 0.25), nn.Unflatten(1, SHAPE))
    slope = wgan(torch.ones(4000, *SHAPE))[2]  # from 4 · 0.25 to 4 · 1
    assert slope.min() >= 1 and slope.max() <= 4
    assert slope.mean().item() == pytest.approx(2.5, abs=0.05)
    assert slope.std().item() == pytest.approx(3 / 12**0.5, abs=0.05)


def test_critic_and_painter_alternate_as_with_two_optimizers_by_hand():
    settings, (x, y) = {"lr": 0.01, "betas": (0.5, 0.9)}, bright_pixels((0, 1), count=8)
    stream = in_memory_benchmark([(x, y)], [(x, y)]).train_stream
    torch.manual_seed(0)
    wgans = [WGAN(SHAPE, 8, 2)]
    wgans.append(copy.deepcopy(wgans[0]))
    torch.manual_seed(1)
    strategy = WGANTraining(
        model=wgans[0],
        optimizer=adam(wgans[0], **settings),
        n_critic=3,
        iterations=8,
        train_mb_size=8,
    )
    strategy.train(stream)

    torch.manual_seed(1)
    wgan, painter_steps = wgans[1], 0
    critic, painter = adam(wgan.critic, **settings), adam(wgan.painter, **settings)
    for i in range(1, 9):
        rows = torch.randperm(8)
        critic.zero_grad()
        critic_loss(x, wgan(x[rows])).mean().backward()
        critic.step()
        if i in (3, 6):
            painter.zero_grad()
            (-wgan.critic(wgan.paint(8)).mean()).backward()
            painter.step()
            painter_steps += 1
    for ours, by_hand in zip(wgans[0].parameters(), wgan.parameters(), strict=True):
        torch.testing.assert_close(ours, by_hand)
    steps = [
        {int(strategy.optimizer.state[p]["step"]) for p in part.parameters()}
        for part in (wgans[0].critic, wgans[0].painter)
    ]
    assert steps == [{8}, {2}]


def test_a_gan_counts_replayed_images_as_real_ones_by_their_importance():
    notes = []

    class Spy(SupervisedPlugin):
        def before_backward(self, strategy, **kwargs):
            losses = critic_loss(strategy.mb_x, strategy.mb_output)
            notes.append((strategy.loss.item(), losses.detach(), strategy.replay.current_size))

    torch.manual_seed(0)
    wgan = WGAN(SHAPE, 8, 2)
    strategy = WGANTraining(
        model=wgan, optimizer=adam(wgan), train_mb_size=10, ratio=0.2, plugins=[Spy()]
    )
    strategy.train(tiny_stream())
    for loss, losses, n in notes[4:]:
        assert (n, len(losses)) == (10, 20)
        expected = 0.2 * losses[:n].mean() + 0.8 * losses[n:].mean()
        assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_precision_and_recall_by_hand():
    # Balls of the real ones reach to the neighbour of the neighbour: -1 to 3.
    real = torch.tensor([[0.0], [1.0], [2.0]])
    painted = torch.tensor([[2.9], [3.1], [4.2]])  # its balls: ±1.3, ±1.1, ±1.3
    precision, recall = Generator.precision_and_recall(real, painted, k=2)
    assert precision == pytest.approx(2 / 3)  # 2.9 and 3.1 lie in the ball of 2 (±2) or 1 (±1)
    assert recall == pytest.approx(1 / 3)
    assert Generator.precision_and_recall(real, real, k=1) == (1, 1)


def test_sample_quality_of_obvious_samples():
    images = Generator.load_digits()
    state = torch.get_rng_state()
    x, y = images.train
    good = Generator.sample_quality(images, x[:720], y[:720])
    assert torch.equal(torch.get_rng_state(), state)
    assert good["label_accuracy"] > 0.99 and good["precision"] > 0.8 and good["recall"] > 0.8
    wrong = Generator.sample_quality(images, x[:720], (y[:720] + 1) % 10)
    assert wrong["label_accuracy"] < 0.01
    noise = Generator.sample_quality(images, torch.rand(400, 1, 28, 28), y[:400])
    assert noise["recall"] < 0.02 and noise["label_accuracy"] < 0.3
    assert Generator.sample_quality(images, 1 - x[:400], y[:400])["precision"] < 0.05
    same = Generator.sample_quality(images, x[:1].expand(400, -1, -1, -1), y[:1].expand(400))
    assert same["recall"] < 0.02
    # Only one class: as real as before, but most is missing.
    zeros = Generator.sample_quality(images, x[y == 0], y[y == 0])
    assert zeros["precision"] > 0.8 and zeros["recall"] < 0.3
    held_out = Generator.hold_out(images, 400)
    assert len(held_out.train[1]) == 1037 and len(held_out.test[1]) == 400
    assert Generator.hold_out(images, 0) is images


def readme_example():
    section = (ROOT / "README.md").read_text().split("## Your own generator\n")[1].split("\n## ")[0]
    return re.search(r"```python\n(.+?)```", section, re.DOTALL)[1]


def test_the_example_of_the_readme(tmp_path):
    code = readme_example()
    assert len([line for line in code.splitlines() if line]) <= 30
    (tmp_path / "gaussians.py").write_text(code)
    arguments = "--generator", "gaussians", "--dataset", "digits", "--iterations", "100"
    done = subprocess.run(
        [sys.executable, "gaussians.py", *arguments],
        cwd=tmp_path,
        env={**os.environ, **OFFLINE, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert "GENERATOR = 'gaussians'" in done.stdout
    final = float(re.search(r"replay, seed 0 +([\d.]+)%", done.stdout)[1])
    assert final > 80
    assert len(list(Path(tmp_path).rglob("samples-replay.png"))) == 1
