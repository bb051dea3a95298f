"""Every generator: those of GENERATOR, one that a user adds, and how good their samples are."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import all_constants
from torch import nn
from torch.nn.functional import one_hot

import GenerativeReplay
import Generator
import TrainingInstances as instances
from figures import generators, results
from GenerativeModel import WGAN, ConditionalVAE, critic_loss
from TrainingInstances import DeepGenerativeReplayPlugin, in_memory_benchmark

SHAPE, CLASSES = (1, 4, 4), 4


def bright_pixels(labels):
    """Make images in which one bright pixel tells the class."""
    y = torch.tensor(labels).repeat(40 // len(labels))
    return (0.1 * torch.rand(40, 16) + 0.9 * one_hot(y, 16)).view(-1, *SHAPE), y


def tiny_benchmark():
    torch.manual_seed(0)
    return in_memory_benchmark(*[[bright_pixels(labels) for labels in ((1, 3), (0, 2))]] * 2)


def train(strategy, model, stream, rate=0.001, **settings):
    optimizer = torch.optim.Adam(model.parameters(), rate)
    strategy(model=model, optimizer=optimizer, train_mb_size=10, **settings).train(stream)


def digits(**changes):
    constants = all_constants(CLASS_ORDER=tuple(range(10)), **changes)
    return Generator.make_benchmark(Generator.load_digits(), constants), constants


BY_GENERATOR = {"REPLAY_LABELS": "generator", "TEMPERATURE": None}


@pytest.mark.parametrize(
    ("name", "labels"),
    [("vae", {}), ("vae", BY_GENERATOR), ("cvae", {}), ("cvae", BY_GENERATOR), ("wgan-gp", {})],
)
def test_every_generator_through_the_whole_stream(name, labels):
    torch.manual_seed(0)
    stream, constants = digits(ITERATIONS=3, GENERATOR=name, **labels)
    scholar = GenerativeReplay.make_scholar(stream, constants)
    model, strategy = scholar.replay.generator, scholar.replay.generator_strategy
    for number, experience in enumerate(stream.train_stream, 1):
        before = copy.deepcopy(list(model.parameters()))
        scholar.train(experience)
        assert all(p.isfinite().all() for p in model.parameters())
        assert not all(map(torch.equal, model.parameters(), before))
        if name != "wgan-gp":
            assert model.learned_classes().tolist() == list(range(2 * number))
    assert strategy.eval(stream.test_stream)  # the mean loss of its images
    samples = model.generate(7)
    assert samples.shape == (7, 1, 28, 28) and model.generate().shape == (1, 28, 28)
    assert samples.min() >= 0 and samples.max() <= 1 and not samples.requires_grad
    other = GenerativeReplay.make_scholar(stream, constants).replay.generator
    other.load_state_dict(model.state_dict())  # all that it has learned
    torch.manual_seed(1)
    samples = model.generate(5)
    torch.manual_seed(1)
    assert samples.equal(other.generate(5))


def test_what_suits_each_generator_unless_told_otherwise():
    def settings(**changes):
        constants = all_constants(ITERATIONS=10, **changes)
        strategy = Generator.make_generator_strategy(tiny_benchmark(), constants)
        adam = strategy.optimizer.defaults
        return adam["lr"], adam["betas"], strategy.iterations, strategy.train_mb_size

    assert settings(GENERATOR="vae") == settings(GENERATOR="cvae") == (0.003, (0.9, 0.999), 10, 64)
    assert settings(GENERATOR="wgan-gp") == (0.003, (0.5, 0.9), 50, 64)
    told = {"GENERATOR_LEARNING_RATE": 0.1, "GENERATOR_ITERATIONS": 3, "BATCH_SIZE": 5}
    assert settings(GENERATOR="wgan-gp", **told) == (0.1, (0.5, 0.9), 3, 5)


def test_the_memory_does_not_grow_with_the_iterations():
    stream, constants = digits(ITERATIONS=120, GENERATOR="wgan-gp")
    strategy = Generator.make_generator_strategy(stream, constants)
    pages = []

    class Watch:
        def after_training_iteration(self, strategy, **kwargs):
            pages.append(int(Path("/proc/self/statm").read_text().split()[1]))

    strategy.plugins.append(Watch())
    strategy.train(stream.train_stream[0])
    assert len(pages) == 600 and (pages[-1] - pages[100]) * 4096 < 50e6


@pytest.mark.parametrize("generator", ["vae", "cvae", "wgan-gp"])
def test_generators_train_where_the_processor_has_bfloat16(generator):
    constants = all_constants(GENERATOR=generator, BFLOAT16=True, ITERATIONS=6)
    stream = tiny_benchmark()
    scholar = GenerativeReplay.make_scholar(stream, constants)
    for experience in stream.train_stream:
        scholar.train(experience)
    parameters = [*scholar.model.parameters(), *scholar.replay.generator.parameters()]
    assert all(part.isfinite().all() and part.dtype == torch.float32 for part in parameters)


def untrained(model):
    return SimpleNamespace(model=model, train=lambda experience, **kwargs: None)


def test_a_generator_labels_what_it_generates_each_class_equally_often():
    grey = generators.Gaussians(SHAPE, CLASSES)
    grey.means[[1, 3]] = torch.tensor([0.2, 0.4])[:, None, None, None]
    replay = DeepGenerativeReplayPlugin(untrained(grey), replay_labels="generator")
    x, y, *_ = replay.sample(2000, grey, solver=None)
    torch.testing.assert_close(x[:, 0, 0, 0], (y + 1) / 10)
    assert y.bincount().tolist() == pytest.approx([0, 1000, 0, 1000], abs=100)
    with pytest.raises(ValueError, match="TEMPERATURE"):
        DeepGenerativeReplayPlugin(untrained(grey), temperature=2.0, replay_labels="generator")


def test_a_generator_that_does_not_fit():
    with pytest.raises(TypeError, match="Identity has to be a subclass of GenerativeModel"):
        DeepGenerativeReplayPlugin(untrained(nn.Identity()))
    with pytest.raises(TypeError, match="WGAN is unconditional"):
        DeepGenerativeReplayPlugin(untrained(WGAN(SHAPE)), replay_labels="generator")


def test_the_worked_example_trains_a_scholar_and_survives_an_interruption(monkeypatch):
    strategies = [generators.GaussiansTraining((1, 28, 28), 10) for _ in range(2)]
    monkeypatch.setattr(Generator, "make_generator_strategy", lambda *_, **__: strategies.pop())
    benchmark, constants = digits(ITERATIONS=120)
    torch.manual_seed(0)
    scholar, resumed = (GenerativeReplay.make_scholar(benchmark, constants) for _ in range(2))
    for experience in benchmark.train_stream[:4]:
        scholar.train(experience)
    for old, new in zip(*map(results.with_generator, (scholar, resumed))):
        results.load_strategy_state(new, copy.deepcopy(results.strategy_state(old)))
    rows = []
    for each in (scholar, resumed):
        torch.manual_seed(0)
        each.train(benchmark.train_stream[4])
        rows.append(Generator.metric_row(each.eval(benchmark.test_stream), "Top1_Acc_Exp"))
    assert rows[0] == rows[1] and sum(rows[0]) / 5 > 0.8


def test_a_conditional_vae_generates_the_class_that_it_is_asked_for():
    torch.manual_seed(0)
    cvae = ConditionalVAE(SHAPE, CLASSES, hidden_units=32, latent_size=2)
    train(instances.VAETraining, cvae, tiny_benchmark().train_stream, rate=0.01, iterations=200)
    y = torch.arange(CLASSES).repeat(100)  # those of the first experience too
    assert (cvae.generate(len(y), y).flatten(1).argmax(1) == y).float().mean() > 0.95
    assert cvae.generate(4000).flatten(1).argmax(1).bincount(minlength=CLASSES).min() > 900
    x, y = bright_pixels((0, 1, 2, 3))
    assert cvae.reconstruct(x, y).flatten(1).argmax(1).equal(y)


def test_the_loss_of_the_critic_by_hand():
    torch.manual_seed(0)
    wgan, x, scale = WGAN(SHAPE, 8, 2), torch.rand(6, *SHAPE), nn.Parameter(torch.tensor(0.7))
    wgan.critic.forward = lambda x: scale * x.flatten(1).square().sum(1) / 2  # gradient: scale · x
    torch.manual_seed(1)
    output = wgan(x)
    torch.manual_seed(1)
    generated = wgan.generate(6)
    between = x.lerp(generated, torch.rand(6, 1, 1, 1))
    real, fake, norm = (images.flatten(1).norm(dim=1) for images in (x, generated, between))
    torch.testing.assert_close(output, (0.35 * real**2, 0.35 * fake**2, 0.7 * norm))
    loss = critic_loss(x, output, penalty=3.0)
    torch.testing.assert_close(loss, 0.35 * (fake**2 - real**2) + 3 * (0.7 * norm - 1) ** 2)
    loss.mean().backward()
    gradient = (fake**2 - real**2) / 2 + 6 * (0.7 * norm - 1) * norm
    torch.testing.assert_close(scale.grad, gradient.mean())
    assert all(parameter.grad is None for parameter in wgan.generator.parameters())


def test_critic_and_generator_alternate_as_with_two_optimizers_by_hand():
    x, ours = torch.rand(1, *SHAPE).expand(10, -1, -1, -1), WGAN(SHAPE, 8, 2)
    wgan, data = copy.deepcopy(ours), [(x, torch.arange(10))]
    torch.manual_seed(1)
    stream = in_memory_benchmark(data, data).train_stream
    train(instances.WGANTraining, ours, stream, n_critic=3, iterations=8)
    torch.manual_seed(1)
    torch.empty(2, dtype=torch.int64).random_()  # seeds of the data loader and of its sampler
    critic, generator = (torch.optim.Adam(p.parameters()) for p in (wgan.critic, wgan.generator))
    for i in range(1, 9):
        critic.zero_grad()
        critic_loss(x, wgan(x)).mean().backward()
        critic.step()
        if i in (3, 6):
            generator.zero_grad()
            (-wgan.critic(wgan.sample(10)).mean()).backward()
            generator.step()
    torch.testing.assert_close(list(ours.parameters()), list(wgan.parameters()))


def test_precision_and_recall_by_hand():
    # Balls of the real ones reach to the neighbour of the neighbour: -2 to 2, 0 to 2, 0 to 4.
    real = torch.tensor([[0.0], [1.0], [2.0]])
    generated = torch.tensor([[2.9], [3.1], [4.2]])  # its balls: ±1.3, ±1.1, ±1.3
    measured = generators.precision_and_recall(real, generated, k=2)
    assert measured == pytest.approx((2 / 3, 1 / 3))


def test_quality_of_obvious_samples():
    (x, y), (real, _) = Generator.load_digits()[1:3]
    classifier = generators.train_classifier(x, y)

    def quality(x, y):
        samples = instances.Samples(x[:360], y[:360])
        replay = SimpleNamespace(generator=None, sample=lambda *_: samples)
        scholar = SimpleNamespace(replay=replay, model=nn.Identity())
        values = generators.sample_quality(scholar, classifier, real)
        return [values[kind] for kind in ("label_accuracy", "precision", "recall")]

    right, precision, recall = quality(x, y)
    assert right > 0.99 and precision > 0.8 and recall > 0.8
    assert quality(x, (y + 1) % 10) == [pytest.approx(0, abs=0.01), precision, recall]
    zeros = (y == 0).nonzero().flatten().repeat(3)  # as real as before, but most is missing
    right, precision, recall = quality(x[zeros], y[zeros])
    assert right > 0.99 and precision > 0.8 and recall < 0.3
