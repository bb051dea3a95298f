"""The comparison of generators: what replay retains with each, and how good its samples are.

`python -m figures.generators --n-jobs 2 --seeds 0 1 2 --results-dir results/generators`, with any
option of GenerativeReplay.py. `Gaussians` is a worked example of a generator of one's own.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import GenerativeReplay
import Generator
from figures import draw, results
from GenerativeModel import GenerativeModel

KINDS = {
    "label_accuracy": "images whose label\nthe classifier confirms (%)",
    "precision": "precision of the samples (%)",
    "recall": "recall of the samples (%)",
}


def main() -> None:
    """Run replay with each generator, measure its samples, and print and draw both."""
    constants = Generator.read_constants(Generator, GenerativeReplay)
    if constants.SCENARIO != "class":
        raise results.UserError("samples are measured by their class: leave SCENARIO at class")
    images, constants = Generator.prepare(constants)
    planned = [
        ("replay", constants.model_copy(update={"GENERATOR": name}), name)
        for name in ("vae", "cvae", "wgan-gp")
    ]
    runs = GenerativeReplay.run_all(planned, images, constants)
    classifier = train_classifier(*images.train)
    for run in runs:
        own = constants.model_copy(update=run["constants"])
        scholar = GenerativeReplay.make_scholar(Generator.make_benchmark(images, own), own)
        results.load_state(run["folder"], scholar)
        run["sample_quality"] = sample_quality(scholar, classifier, images.test[0])
    print("\n" + results.table(runs))
    for name, group in results.by_name(runs).items():
        for kind in KINDS:
            row = results.over_seeds([run["sample_quality"][kind] for run in group])
            error = f" ± {row['standard_error']:.1%}" if row["standard_error"] else ""
            print(f"{name}: {kind} {row['mean']:.1%}{error}")
    folder = Path(constants.RESULTS_DIR) / "figures"
    draw.save(generators(runs), folder / "generators.png")
    for name, group in results.by_name(runs).items():
        draw.save(draw.samples(group), folder / f"samples-{name}.png")


@plt.rc_context(draw.STYLE)
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


# ------------------------------------------------------------------------------------------------
# Sample quality, as an independent classifier sees it
# ------------------------------------------------------------------------------------------------


def sample_quality(scholar, classifier: nn.Sequential, real: Tensor) -> dict[str, float]:
    """Measure the quality of the samples that a scholar would replay next.

    :param classifier: see `train_classifier`.
    :param real: test images, shape (n, C, H, W); 2,000 of them are compared, if there are as many.
    :return: "label_accuracy", the share of samples in which the classifier sees the scholar's
        label; "precision" and "recall" in the features of its last hidden layer.
    """
    count = min(2000, len(real))
    with torch.no_grad():
        samples = scholar.replay.sample(count, scholar.replay.generator, scholar.model.eval())
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
        cross_entropy(classifier(x[rows]), y[rows]).backward()
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


# ------------------------------------------------------------------------------------------------
# A generator of one's own
# ------------------------------------------------------------------------------------------------


class Gaussians(GenerativeModel):
    """Generate each class from a Gaussian on its principal components, without any network."""

    def __init__(self, shape: tuple[int, int, int], classes: int, components: int = 30):
        super().__init__()
        self.register_buffer("means", torch.zeros(classes, *shape))
        self.register_buffer("axes", torch.zeros(classes, components, *shape))  # one σ long

    def generate(self, batch_size: int | None = None, condition: Tensor | None = None) -> Tensor:
        """Add random multiples of the axes to the mean of each image's class."""
        y = self.sample_labels(batch_size or 1) if condition is None else condition
        noise = torch.randn(*self.axes[y].shape[:2], 1, 1, 1, device=y.device)
        images = (self.means[y] + (noise * self.axes[y]).sum(1)).clamp(0, 1)
        return images[0] if batch_size is None else images

    def learned_classes(self) -> Tensor:
        """Return the classes whose mean is known."""
        return self.means.flatten(1).any(1).nonzero().flatten()


class GaussiansTraining:
    """Fit `Gaussians`, without replay: a class keeps its Gaussian until it returns."""

    def __init__(self, shape: tuple[int, int, int], classes: int):
        self.model = Gaussians(shape, classes)

    def train(self, experience, **kwargs) -> None:
        """Fit the principal components of each class of an experience."""
        x, y, _ = experience.dataset.tensors
        for label in y.unique():
            pca = PCA(self.model.axes.shape[1], random_state=0).fit(x[y == label].flatten(1))
            axes = pca.explained_variance_[:, None] ** 0.5 * pca.components_
            self.model.means[label] = torch.tensor(pca.mean_).view_as(x[0])
            self.model.axes[label] = torch.tensor(axes).view_as(self.model.axes[label])


if __name__ == "__main__":
    results.run_command(main)
