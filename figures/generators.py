"""Other generators as worked examples, and the comparison of what replay retains with each.

`python -m figures.generators vae cvae wgan-gp --n-jobs 2 --seeds 0 1 2 --results-dir
results/generators`: names of `GENERATORS` (all, if none is given), then options of
GenerativeReplay.py. Shin et al. 2017 used a Wasserstein GAN like ours; `Gaussians` is a generator
without any network.
"""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from avalanche.benchmarks import CLScenario
from avalanche.evaluation.metrics import loss_metrics
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.nn import functional as F

import GenerativeReplay
from figures import draw
from figures.lab import data, report
from figures.lab.constants import Constants, UserError, read_constants, run_command
from figures.lab.runs import load_state, read_state, setup, side_by_side
from GenerativeModel import VAE, GenerativeModel
from Generator import make_generator_strategy, training_arguments
from TrainingInstances import (
    DeepGenerativeReplayPlugin,
    ReplayAlignmentPlugin,
    ReplayTemplate,
    VAETraining,
)

# --- A conditional VAE ----------------------------------------------------------------------------


class ConditionalVAE(VAE):
    """Give the decoder of a VAE the class: p(x|z, y), with z ~ N(0, I) and y as a one-hot vector.

    Kingma et al. 2014 (arXiv 1406.5298, model M2), but the encoder isn't given the class: it sees
    the image. What the decoder decodes, z and y, has the shape (batch, latent_size + classes).

    :param classes: number of classes in the whole stream; for the others see `VAE`.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        hidden_units: int = 400,
        latent_size: int = 8,
        normalize: nn.Module | None = None,
    ):
        super().__init__(shape, hidden_units, latent_size, normalize=normalize)
        self.decoder[0] = nn.Linear(latent_size + classes, hidden_units)
        self.register_buffer("learned", torch.zeros(classes, dtype=torch.bool))

    def with_class(self, z: Tensor, y: Tensor) -> Tensor:
        """Return z and the one-hot class."""
        return torch.cat([z, F.one_hot(y, len(self.learned)).to(z)], 1)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pass images and their classes through the graph, as in a `VAE`."""
        z_mean, z_log_var = self.encode(x)
        z = self.with_class(self.reparametrize(z_mean, z_log_var), y)
        return self.decode(z), z_mean, z_log_var

    def learned_classes(self) -> Tensor:
        """Return the classes trained on (int64), shape (n,)."""
        return self.learned.nonzero().flatten()

    def sample_latents(self, count: int, condition: Tensor | None = None) -> Tensor:
        """Sample z from the prior, and a learned class unless it is given."""
        if condition is None:
            classes = self.learned_classes()
            condition = classes[torch.randint(len(classes), (count,), device=classes.device)]
        z = torch.randn(count, self.latent_size, device=condition.device)
        return self.with_class(z, condition)


class ConditionalVAETraining(VAETraining):
    """Train a `ConditionalVAE`, and note the classes that it is trained on."""

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Encode and decode real images with their class; only decode replayed latents."""
        n, model = self.n_current, self.model
        if self.is_training:
            model.learned[self.mb_y[:n]] = True
        if n == len(self.mb_x):
            return model(self.mb_x, self.mb_y)
        z_mean, z_log_var = model.encode(self.mb_x[:n])
        z = model.with_class(model.reparametrize(z_mean, z_log_var), self.mb_y[:n])
        return model.decode(torch.cat([z, self.replay_plugin.replayed.z])), z_mean, z_log_var


def make_cvae_strategy(benchmark: CLScenario, constants: Constants, **replay) -> VAETraining:
    """Wrap a conditional VAE; its encodings have to keep to N(0, I), so β is 1."""
    shape, n_classes = data.shape_and_classes(benchmark)
    normalize = data.normalization(benchmark) if constants.NORMALIZE else None
    cvae = ConditionalVAE(shape, n_classes, constants.HIDDEN_UNITS, normalize=normalize)
    arguments = training_arguments("generator", cvae, constants)
    plugin = ReplayAlignmentPlugin(**replay)
    return ConditionalVAETraining(replay_plugin=plugin, kl_weight=1.0, **arguments)


# --- A Wasserstein GAN ----------------------------------------------------------------------------


class WGAN(GenerativeModel):
    """Learn images with a fully connected Wasserstein GAN, as used by Shin et al. 2017.

    The critic learns to score real images higher than generated ones, the generator to be scored
    high (Arjovsky et al. 2017, arXiv 1701.07875). Both have two hidden layers, like the halves of
    the VAE, and are carried on from one experience to the next.

    :param shape: shape of one image, (channels, height, width).
    :param hidden_units: units in each hidden layer.
    :param latent_size: dimensions of the noise z ~ N(0, I).
    """

    def __init__(self, shape: tuple, hidden_units: int = 400, latent_size: int = 32):
        super().__init__()
        self.latent_size, pixels = latent_size, math.prod(shape)
        self.generator = nn.Sequential(
            nn.Linear(latent_size, hidden_units), nn.ReLU(),
            nn.Linear(hidden_units, hidden_units), nn.ReLU(),
            nn.Linear(hidden_units, pixels), nn.Sigmoid(),
            nn.Unflatten(1, shape),
        )  # fmt: skip
        self.critic = nn.Sequential(
            nn.Flatten(),
            nn.Linear(pixels, hidden_units), nn.LeakyReLU(0.2),
            nn.Linear(hidden_units, hidden_units), nn.LeakyReLU(0.2),
            nn.Linear(hidden_units, 1), nn.Flatten(0),
        )  # fmt: skip

    def sample(self, count: int) -> Tensor:
        """Generate images with gradients, shape (count, C, H, W)."""
        z = torch.randn(count, self.latent_size, device=self.critic[1].weight.device)
        return self.generator(z)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score real images, as many generated ones, and points between them.

        :param x: images in [0, 1], shape (batch, C, H, W).
        :return: scores of the real and of the generated images, and the norm of the score's
            gradient at a random point between the two, shape (batch,) each: see `critic_loss`.
        """
        with torch.no_grad():
            generated = self.sample(len(x))
            between = x.lerp(generated, torch.rand(len(x), 1, 1, 1, device=x.device))
        with torch.enable_grad():  # in evaluation too
            score = self.critic(between.requires_grad_()).sum()
            (gradient,) = torch.autograd.grad(score, between, create_graph=True)
        return self.critic(x), self.critic(generated), gradient.flatten(1).norm(dim=1)

    @torch.no_grad()
    def generate(self, batch_size: int | None = None, condition: Tensor | None = None) -> Tensor:
        """Generate images; see `GenerativeModel.generate`.

        :raises ValueError: if a condition is given.
        """
        if condition is not None:
            raise ValueError("a WGAN is unconditional: leave condition at None")
        images = self.sample(1 if batch_size is None else batch_size)
        return images[0] if batch_size is None else images


def critic_loss(output: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Compute the loss of the critic of a `WGAN` for each image (Gulrajani et al. 2017, eq. 3).

    It is the score of a generated image minus that of a real one, plus 10·(‖gradient‖ - 1)², which
    keeps the score from changing faster than the image (arXiv 1704.00028).

    :param output: what `WGAN.forward` returned for real images.
    :return: one loss for each image, shape (batch,).
    """
    real, generated, slope = output
    return generated - real + 10 * (slope - 1).square()


class WGANTraining(ReplayTemplate):
    """Train a `WGAN`: two alternating objectives in Avalanche's loop of one loss and one step.

    An iteration is a step of the critic; every n-th is followed by a step of the generator. One
    optimizer serves both: Adam doesn't touch parameters without gradient, nor their moments.
    Replayed images count as real ones, weighted (Shin et al. 2017, section 3).

    :param n_critic: steps of the critic for each of the generator (Gulrajani et al., algorithm 1).
    :param base_kwargs: as for `ReplayTemplate`.
    """

    def __init__(self, *, n_critic: int = 5, **base_kwargs):
        self.n_critic = n_critic
        base_kwargs["bfloat16"] = False  # too coarse for differences of the critic's large scores
        base_kwargs.setdefault("evaluator", report.EvaluationOnly(loss_metrics(experience=True)))
        super().__init__(**base_kwargs)

    def loss_per_image(self) -> Tensor:
        """Compute the loss of the critic for each image, shape (batch,)."""
        return critic_loss(self.mb_output)

    def optimizer_step(self):
        """Step the critic and, after every `n_critic` of its steps, the generator."""
        super().optimizer_step()
        if (self.clock.train_exp_iterations + 1) % self.n_critic == 0:
            self.optimizer.zero_grad()
            loss = -self.model.critic(self.model.sample(len(self.mb_x))).mean()
            loss.backward(inputs=list(self.model.generator.parameters()))
            super().optimizer_step()


def make_wgan_strategy(benchmark: CLScenario, constants: Constants, **replay) -> WGANTraining:
    """Wrap a WGAN, with five times the iterations: only every fifth steps the generator."""
    shape, _ = data.shape_and_classes(benchmark)
    wgan = WGAN(shape, constants.HIDDEN_UNITS, constants.LATENT_SIZE)
    arguments = training_arguments("generator", wgan, constants)
    for group in arguments["optimizer"].param_groups:
        group["betas"] = 0.5, 0.9  # as in Gulrajani et al.'s code for MNIST
    arguments["iterations"] *= 5
    return WGANTraining(replay_plugin=DeepGenerativeReplayPlugin(**replay), **arguments)


# --- A generator without any network --------------------------------------------------------------

COMPONENTS = 30  # principal components of a class, at most


class Gaussians(GenerativeModel):
    """Generate each class from a Gaussian on its principal components, without any network."""

    def __init__(self, shape: tuple[int, int, int], classes: int):
        super().__init__()
        self.register_buffer("means", torch.zeros(classes, *shape))
        self.register_buffer("axes", torch.zeros(classes, COMPONENTS, *shape))  # one σ long

    def learned_classes(self) -> Tensor:
        """Return the classes whose mean is known (int64), shape (n,)."""
        return self.means.flatten(1).any(1).nonzero().flatten()

    def generate(self, batch_size: int | None = None, condition: Tensor | None = None) -> Tensor:
        """Add random multiples of the axes to the mean of each image's class."""
        classes, count = self.learned_classes(), batch_size or 1
        y = classes[torch.randint(len(classes), (count,))] if condition is None else condition
        noise = torch.randn(*self.axes[y].shape[:2], 1, 1, 1, device=y.device)
        images = (self.means[y] + (noise * self.axes[y]).sum(1)).clamp(0, 1)
        return images[0] if batch_size is None else images


class GaussiansTraining:
    """Fit `Gaussians`, without replay: a class keeps its Gaussian until it returns."""

    def __init__(self, model: Gaussians):
        self.model = model

    def train(self, experience, **kwargs) -> None:
        """Fit the principal components of each class of an experience."""
        x, y, _ = data.tensors_of(experience)
        for label in y.unique():
            images = x[y == label].flatten(1)
            if len(images) < 2:
                continue  # the mean of a single image would be that image
            pca = PCA(min(COMPONENTS, *images.shape), random_state=0).fit(images)
            axes = pca.explained_variance_[:, None] ** 0.5 * pca.components_
            self.model.means[label] = torch.tensor(pca.mean_).view_as(x[0])
            self.model.axes[label] = 0
            self.model.axes[label, : len(axes)] = torch.tensor(axes).view(-1, *x.shape[1:])


def make_gaussians_strategy(benchmark: CLScenario, constants: Constants, **replay):
    """Wrap Gaussians; they need no replay."""
    return GaussiansTraining(Gaussians(*data.shape_and_classes(benchmark)).to(constants.DEVICE))


# --- The VAE with and without replay alignment, for the ablation ----------------------------------


class UnalignedPlugin(ReplayAlignmentPlugin):
    """Fit the density, but learn replayed images like any other image."""

    sample = DeepGenerativeReplayPlugin.sample


def make_aligned_strategy(benchmark: CLScenario, constants: Constants, **replay) -> VAETraining:
    """Wrap the VAE with replay alignment, whether there is a density or not."""
    return make_generator_strategy(benchmark, constants, ReplayAlignmentPlugin, **replay)


def make_unaligned_strategy(benchmark: CLScenario, constants: Constants, **replay) -> VAETraining:
    """Wrap the VAE without replay alignment."""
    return make_generator_strategy(benchmark, constants, UnalignedPlugin, **replay)


# --- The comparison -------------------------------------------------------------------------------

GENERATORS = {
    "vae": make_generator_strategy,
    "cvae": make_cvae_strategy,
    "wgan-gp": make_wgan_strategy,
    "gaussians": make_gaussians_strategy,
}

KINDS = {
    "label_accuracy": "images whose label\nthe classifier confirms (%)",
    "precision": "precision of the samples (%)",
    "recall": "recall of the samples (%)",
}


def main() -> None:
    """Run replay with each generator, measure its samples, and print and draw both."""
    words = sys.argv[1:]
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    names = list(dict.fromkeys(words[:count])) or list(GENERATORS)
    for name in names:
        if name not in GENERATORS:
            raise UserError(f"{name!r} isn't one of {', '.join(GENERATORS)}")
    constants = setup(read_constants(GenerativeReplay, words[count:]))
    if constants.SCENARIO != "class":
        raise UserError("samples are measured by their class: leave SCENARIO at class")
    if constants.STRATEGIES != ("replay",):
        raise UserError("generators are compared by replay: leave STRATEGIES at replay")
    images = data.load_images(constants)
    constants = data.fill_in(constants, images)
    same = {"strategy": "replay", "constants": constants}
    plans = [same | {"name": name, "make_generator": GENERATORS[name]} for name in names]
    runs = side_by_side(GenerativeReplay.experiment, plans, images, constants)
    classifier = train_classifier(*images.train)
    for run in runs:
        scholar = saved_scholar(run, images, constants)
        run["sample_quality"] = sample_quality(scholar, classifier, images.test[0])
    print("\n" + report.table(runs))
    for name, group in report.by_name(runs).items():
        for kind in KINDS:
            row = report.over_seeds([run["sample_quality"][kind] for run in group])
            error = f" ± {row['standard_error']:.1%}" if row["standard_error"] else ""
            print(f"{name}: {kind} {row['mean']:.1%}{error}")
    folder = Path(constants.RESULTS_DIR) / "figures"
    draw.save(generators, runs, folder / "generators.png")
    for name, group in report.by_name(runs).items():
        draw.save(draw.samples, group, folder / f"samples-{name}.png")


def saved_scholar(run: dict, images: data.Images, constants: Constants):
    """Build the scholar of a finished run from its state."""
    torch.manual_seed(run["seed"])  # of the order of the classes
    benchmark = data.make_benchmark(images, data.shuffle_classes(constants))
    make_generator = GENERATORS[run["name"]]
    scholar = GenerativeReplay.make_scholar(benchmark, constants, make_generator=make_generator)
    load_state(scholar, read_state(run["folder"] / "state.pt"))
    return scholar


def generators(runs: list[dict]) -> plt.Figure:
    """Draw the accuracy retained on earlier experiences against the quality of the samples."""
    figure, all_axes = plt.subplots(1, 3, sharey=True, figsize=(draw.WIDTH, 0.42 * draw.WIDTH))
    for axes, (kind, label) in zip(all_axes, KINDS.items()):
        for group, style in draw.styled(runs):
            x = [100 * run["sample_quality"][kind] for run in group]
            y = [100 * np.mean(run["accuracy_matrix"][-1][:-1]) for run in group]
            axes.plot(x, y, linestyle="", alpha=0.8, **style)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("final accuracy on the\nexperiences before the last (%)")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(draw.title("Retention against sample quality", runs), fontsize="large")
    return figure


def sample_quality(scholar, classifier: nn.Sequential, real: Tensor) -> dict[str, float]:
    """Measure the quality of the samples that a scholar would replay next.

    :param classifier: see `train_classifier`.
    :param real: test images, shape (n, C, H, W); 2,000 of them are compared, if there are as many.
    :return: "label_accuracy", the share of samples in which the classifier sees the scholar's
        label; "precision" and "recall" in the features of its last hidden layer.
    """
    count, plugin = min(2000, len(real)), scholar.replay_plugin
    with torch.no_grad():
        samples = plugin.sample(count, plugin.generator, scholar.model.eval())
        real = classifier[:-1](real[torch.randperm(len(real))[:count]])
        features = classifier[:-1](samples.x.cpu())
        right = classifier[-1](features).argmax(1) == samples.y.cpu()
    precision, recall = precision_and_recall(real, features)
    label_accuracy = right.float().mean().item()
    return {"label_accuracy": label_accuracy, "precision": precision, "recall": recall}


def train_classifier(x: Tensor, y: Tensor) -> nn.Sequential:
    """Train a small convolutional network on real images of all classes.

    It is a measuring instrument: no scholar ever sees it. Its last layer is the output.
    """
    torch.manual_seed(0)
    _, channels, height, width = x.shape
    classifier = nn.Sequential(
        nn.Conv2d(channels, 8, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(8, 16, 5, stride=2, padding=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * -(-height // 4) * -(-width // 4), 128), nn.ReLU(),
        nn.Linear(128, int(y.max()) + 1),
    )  # fmt: skip
    optimizer = torch.optim.Adam(classifier.parameters(), fused=True)
    for rows in torch.randint(len(x), (1000, 128)):
        optimizer.zero_grad()
        F.cross_entropy(classifier(x[rows]), y[rows]).backward()
        optimizer.step()
    return classifier


def precision_and_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Compute improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 1, 2).

    Around each image of one kind lies a ball that reaches to its k-th nearest neighbour of that
    kind. Precision is the share of generated images in a ball of a real one: are they realistic?
    Recall is the share of real images in a ball of a generated one: is everything generated?
    In the features of a classifier precision is lenient: blur and contrast mean little to it.

    :param real: features of real images, shape (n, features).
    :param generated: features of as many generated ones, same shape.
    """

    def share(features: Tensor, others: Tensor) -> float:
        """Compute the share of features within the k-nearest-neighbour balls of others."""
        radii = torch.cdist(others, others).kthvalue(k + 1).values  # the nearest is itself
        return (torch.cdist(features, others) <= radii).any(1).float().mean().item()

    return share(generated, real), share(real, generated)


if __name__ == "__main__":
    run_command(main)
