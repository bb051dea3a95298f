"""Every generator: the worked examples, one that a user adds, and how good their samples are."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CONSTANTS
from torch import nn
from torch.nn.functional import one_hot

import GenerativeReplay
import TrainingInstances as instances
from figures import generators
from figures.generators import GENERATORS, WGAN, ConditionalVAE, critic_loss
from figures.lab import data, report, runs
from GenerativeModel import VAE, GenerativeModel
from TrainingInstances import DeepGenerativeReplayPlugin

SHAPE, CLASSES = (1, 4, 4), 4


def bright_pixels(labels):
    """Make images in which one bright pixel tells the class."""
    y = torch.tensor(labels).repeat(40 // len(labels))
    return (0.1 * torch.rand(40, 16) + 0.9 * one_hot(y, 16)).view(-1, *SHAPE), y


def tiny_benchmark():
    torch.manual_seed(0)
    return data.in_memory_benchmark(*[[bright_pixels(labels) for labels in ((1, 3), (0, 2))]] * 2)


def train(strategy, model, stream, rate=0.001, **settings):
    optimizer = torch.optim.Adam(model.parameters(), rate)
    strategy(model=model, optimizer=optimizer, train_mb_size=10, **settings).train(stream)


def digits(**changes):
    constants = CONSTANTS.changed(**changes)
    return data.make_benchmark(data.load_digits(), constants), constants


def make_scholar(name, stream, constants):
    return GenerativeReplay.make_scholar(stream, constants, make_generator=GENERATORS[name])


@pytest.mark.parametrize("name", ["vae", "cvae", "wgan-gp"])
def test_every_generator_through_the_whole_stream(name):
    torch.manual_seed(0)
    stream, constants = digits(ITERATIONS=3)
    scholar = make_scholar(name, stream, constants)
    strategy, model = scholar.replay_plugin.generator_strategy, scholar.replay_plugin.generator
    for number, experience in enumerate(stream.train_stream, 1):
        before = copy.deepcopy(list(model.parameters()))
        scholar.train(experience)
        assert all(p.isfinite().all() for p in model.parameters())
        assert not all(map(torch.equal, model.parameters(), before))
        learned = {"vae": lambda: model.density.labels, "cvae": lambda: model.learned.nonzero()}
        if name in learned:
            assert learned[name]().flatten().tolist() == list(range(2 * number))
    assert strategy.eval(stream.test_stream)  # the mean loss of its images
    samples = model.generate(7)
    assert samples.shape == (7, 1, 28, 28) and model.generate().shape == (1, 28, 28)
    assert samples.min() >= 0 and samples.max() <= 1 and not samples.requires_grad
    other = make_scholar(name, stream, constants).replay_plugin.generator
    other.load_state_dict(model.state_dict())  # all that it has learned
    torch.manual_seed(1)
    samples = model.generate(5)
    torch.manual_seed(1)
    assert samples.equal(other.generate(5))


def test_what_suits_each_generator():
    def settings(name, **changes):
        strategy = GENERATORS[name](tiny_benchmark(), CONSTANTS.changed(**changes))
        (adam,) = strategy.optimizer.param_groups
        return adam["lr"], adam["betas"], strategy.iterations, strategy.train_mb_size

    told = {"ITERATIONS": 10, "LEARNING_RATE": 0.1, "BATCH_SIZE": 5}
    for name in ("vae", "cvae"):
        assert settings(name, **told) == (0.1, (0.9, 0.999), 10, 5)
    assert settings("wgan-gp", **told) == (0.1, (0.5, 0.9), 50, 5)


def test_the_memory_does_not_grow_with_the_iterations():
    stream, constants = digits(ITERATIONS=50)
    strategy = generators.make_wgan_strategy(stream, constants)
    pages = []

    class Watch:
        def after_training_iteration(self, strategy, **kwargs):
            pages.append(int(Path("/proc/self/statm").read_text().split()[1]))

    strategy.plugins.append(Watch())
    strategy.train(stream.train_stream[0])
    assert len(pages) == 250 and (pages[-1] - pages[50]) * 4096 < 20e6


@pytest.mark.parametrize("name", ["vae", "cvae", "wgan-gp"])
def test_generators_train_where_the_processor_has_bfloat16(name):
    stream = tiny_benchmark()
    scholar = make_scholar(name, stream, CONSTANTS.changed(BFLOAT16=True, ITERATIONS=6))
    for experience in stream.train_stream:
        scholar.train(experience)
    parameters = [*scholar.model.parameters(), *scholar.replay_plugin.generator.parameters()]
    assert all(part.isfinite().all() and part.dtype == torch.float32 for part in parameters)


class Unreliable(GenerativeModel):
    """Generate grey images, darker ones for class 1; a 3 becomes a 1 half of the time."""

    def learned_classes(self):
        return torch.tensor([1, 3])

    def generate(self, batch_size=None, condition=None):
        wrong = torch.rand(batch_size) < 0.5
        return (
            (condition.masked_fill(wrong, 1) / 10)[:, None, None, None].expand(-1, *SHAPE).clone()
        )


def test_what_the_old_solver_sees_as_another_class_is_drawn_again():
    def solver(x):
        return -(10 * x[:, :, 0, 0] - torch.arange(CLASSES)).abs()

    strategy = SimpleNamespace(model=Unreliable(), train=lambda experience, **kwargs: None)
    plugin = DeepGenerativeReplayPlugin(strategy, temperature=2.0)
    plugin.seen_classes = [1, 3]
    torch.manual_seed(0)
    samples = plugin.sample(4000, strategy.model, solver)
    assert samples.y.equal((10 * samples.x[:, 0, 0, 0]).round().long())  # of the image replayed
    expected = (solver(samples.x)[:, [1, 3]] / 2).softmax(1)
    torch.testing.assert_close(samples.targets[:, [1, 3]], expected)
    wrong = 2000 / 2 ** (plugin.REDRAWS + 1)
    assert (samples.y == 1).sum() == pytest.approx(2000 + wrong, abs=120)


def test_with_and_without_replay_alignment():
    stream, constants = tiny_benchmark(), CONSTANTS.changed(ITERATIONS=3)
    kinds = {}
    for make in (generators.make_aligned_strategy, generators.make_unaligned_strategy):
        for components in (0, 1):
            strategy = make(stream, constants.changed(MIXTURE_COMPONENTS=components))
            strategy.train(stream.train_stream)
            density = strategy.model.density
            assert density is None or density.labels.tolist() == [1, 3, 0, 2]
            samples = strategy.replay_plugin.sample(5, strategy.model, None)
            kinds[make, components] = samples.z is not None
    assert list(kinds.values()) == [True, True, False, False]


def test_gaussians_generate_each_learned_class_equally_often():
    grey = generators.Gaussians(SHAPE, CLASSES)
    grey.means[[1, 3]] = torch.tensor([0.2, 0.4])[:, None, None, None]
    y = (10 * grey.generate(2000)[:, 0, 0, 0] - 1).round().long()
    assert y.bincount().tolist() == pytest.approx([0, 1000, 0, 1000], abs=100)


def test_gaussians_of_few_images_stay_gaussians():
    x, y = torch.rand(9, *SHAPE), torch.tensor([0] * 8 + [1])
    benchmark = data.in_memory_benchmark(*[[(x, y)]] * 2)
    strategy = generators.make_gaussians_strategy(benchmark, CONSTANTS)
    strategy.train(benchmark.train_stream[0])
    assert strategy.model.learned_classes().tolist() == [0]  # that of 1 would be its only image
    samples = strategy.model.axes[0, :, None] * torch.randn(30, 5000, 1, 1, 1)
    torch.testing.assert_close(samples.sum(0).var(0), x[:8].var(0), atol=0.02, rtol=0)


def test_a_generator_that_does_not_fit():
    strategy = SimpleNamespace(model=nn.Identity(), train=lambda experience, **kwargs: None)
    with pytest.raises(TypeError, match="Identity has to be a subclass of GenerativeModel"):
        DeepGenerativeReplayPlugin(strategy)
    with pytest.raises(ValueError, match="WGAN is unconditional"):
        WGAN(SHAPE).generate(2, torch.tensor([0, 1]))


@pytest.mark.parametrize("spoil", [lambda x: 2 * x - 1, lambda x: 255 * x, lambda x: x[1:]])
def test_images_that_cannot_be_replayed_are_refused(spoil):
    generator = VAE(SHAPE)
    images = generator.generate(6)
    generator.generate = lambda count, condition: spoil(images)
    with pytest.raises(ValueError, match=r"VAE has generated [56] images .* instead of 6 in"):
        DeepGenerativeReplayPlugin().sample(6, generator, None)


def test_a_scholar_with_another_generator_learns_and_survives_an_interruption():
    benchmark, constants = digits(ITERATIONS=120, N_EXPERIENCES=3)
    torch.manual_seed(0)
    scholar, resumed = (make_scholar("gaussians", benchmark, constants) for _ in range(2))
    assert isinstance(scholar.replay_plugin.generator, generators.Gaussians)
    for experience in benchmark.train_stream[:2]:
        scholar.train(experience)
    states = [runs.strategy_state(part) for part in runs.with_generator(scholar)]
    random = [torch.get_rng_state()]
    runs.load_state(resumed, copy.deepcopy({"strategies": states, "random": random}))
    rows = []
    for each in (scholar, resumed):
        torch.set_rng_state(*random)
        each.train(benchmark.train_stream[2])
        rows.append(report.by_experience(each.eval(benchmark.test_stream), "Top1_Acc_Exp"))
    assert rows[0] == rows[1] and sum(rows[0]) / 3 > 0.8


def test_a_conditional_vae_generates_the_class_that_it_is_asked_for():
    torch.manual_seed(0)
    cvae = ConditionalVAE(SHAPE, CLASSES, hidden_units=32, latent_size=2)
    settings = {"replay_plugin": instances.ReplayAlignmentPlugin(), "iterations": 200}
    stream = tiny_benchmark().train_stream
    train(generators.ConditionalVAETraining, cvae, stream, rate=0.01, kl_weight=1.0, **settings)
    y = torch.arange(CLASSES).repeat(100)  # those of the first experience too
    assert (cvae.generate(len(y), y).flatten(1).argmax(1) == y).float().mean() > 0.95
    assert cvae.generate(4000).flatten(1).argmax(1).bincount(minlength=CLASSES).min() > 900
    x, y = bright_pixels((0, 1, 2, 3))
    z = cvae.with_class(cvae.encode(x)[0], y)
    assert cvae.decode(z).flatten(1).argmax(1).equal(y)


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
    loss = critic_loss(output)
    torch.testing.assert_close(loss, 0.35 * (fake**2 - real**2) + 10 * (0.7 * norm - 1) ** 2)
    loss.mean().backward()
    gradient = (fake**2 - real**2) / 2 + 20 * (0.7 * norm - 1) * norm
    torch.testing.assert_close(scale.grad, gradient.mean())
    assert all(parameter.grad is None for parameter in wgan.generator.parameters())


def test_critic_and_generator_alternate_as_with_two_optimizers_by_hand():
    x, ours = torch.rand(1, *SHAPE).expand(10, -1, -1, -1), WGAN(SHAPE, 8, 2)
    wgan, experiences = copy.deepcopy(ours), [(x, torch.arange(10))]
    torch.manual_seed(1)
    stream = data.in_memory_benchmark(experiences, experiences).train_stream
    train(generators.WGANTraining, ours, stream, n_critic=3, iterations=8)
    torch.manual_seed(1)
    torch.empty((), dtype=torch.int64).random_()  # the seed of the sampler
    critic, generator = (torch.optim.Adam(p.parameters()) for p in (wgan.critic, wgan.generator))
    for i in range(1, 9):
        critic.zero_grad()
        critic_loss(wgan(x)).mean().backward()
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
    (x, y), (real, _) = data.load_digits()[1:3]
    classifier = generators.train_classifier(x, y)

    def quality(x, y):
        samples = instances.Samples(x[:360], y[:360])
        plugin = SimpleNamespace(generator=None, sample=lambda *_: samples)
        scholar = SimpleNamespace(replay_plugin=plugin, model=nn.Identity())
        values = generators.sample_quality(scholar, classifier, real)
        return [values[kind] for kind in ("label_accuracy", "precision", "recall")]

    right, precision, recall = quality(x, y)
    assert right > 0.99 and precision > 0.8 and recall > 0.8
    assert quality(x, (y + 1) % 10) == [pytest.approx(0, abs=0.01), precision, recall]
    zeros = (y == 0).nonzero().flatten().repeat(3)  # as real as before, but most is missing
    right, precision, recall = quality(x[zeros], y[zeros])
    assert right > 0.99 and precision > 0.8 and recall < 0.3
