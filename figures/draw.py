"""The figures of runs, drawn from their results alone: `python -m figures.draw results`.

A run is the record in its results.json, with the `folder` it lies in. Each function returns a
matplotlib figure. One visual language: images dark on light as on paper, one row per experience,
titles that name data set, strategy and seeds.
"""

import re
import sys
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import Normalize, PowerNorm

from figures.lab import report
from figures.lab.constants import UserError, run_command
from figures.lab.runs import atomic, save_record

WIDTH = 8  # inches: a column of the README
STYLE = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "figure.max_open_warning": 0,  # many strategies have many figures
    "font.size": 9,
}
# Okabe and Ito's palette, which the colour-blind can tell apart, and markers; one more of those, so
# that they meet in other pairs when both begin again.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
MARKERS = "osD^vP*X<"
# Strategies in tables and figures, so that each keeps its colour; others follow.
ORDER = ("replay", "naive", "joint", "er")


def main() -> None:
    """Summarize the runs in the folder that the command line names."""
    if len(sys.argv) != 2:
        raise UserError("name one folder of results: python -m figures.draw results")
    folder = Path(sys.argv[1])
    summarize(report.read_runs(folder), folder)


def summarize(runs: list[dict], folder: Path) -> None:
    """Print the table of runs, and write it, tidy rows and all figures into a folder."""
    runs = in_order(runs)
    print("\n" + report.table(runs))
    for text in {run["notice"] for run in runs} - {""}:
        print(f"These are numbers of {text}.")
    save_record(folder / "summary.json", report.statistics(runs))
    with atomic(folder / "metrics.csv") as path:
        path.write_text(report.tidy(runs), encoding="utf-8")
    save(accuracy_so_far(runs), folder / "figures" / "accuracy.png")
    for name, group in report.by_name(runs).items():
        functions = [accuracy_matrix, confusion_matrix, forgetting, losses]
        if "samples" in arrays_of(group[0]):
            functions.append(samples)
        ending = re.sub(r"\W+", "-", name).strip("-")
        for function in functions:
            save(function(group), folder / "figures" / f"{function.__name__}-{ending}.png")
    print(f"Results are in {folder}, figures in {folder / 'figures'}")


def arrays_of(run: dict) -> dict[str, np.ndarray]:
    """Read the arrays of a run."""
    with np.load(run["folder"] / "arrays.npz") as arrays:
        return dict(arrays)


def in_order(runs: list[dict]) -> list[dict]:
    """Sort runs by strategy, as in `ORDER`."""
    return sorted(runs, key=lambda run: (*ORDER, run["name"]).index(run["name"]))


def save(figure: plt.Figure, path: Path) -> None:
    """Save a figure and close it."""
    with atomic(path) as temporary:
        figure.savefig(temporary)
    plt.close(figure)


def title(what: str, runs: list[dict]) -> str:
    """Compose the title of a figure: what it shows, of which runs, and their notice."""
    groups = report.by_name(runs)
    parts = ["/".join(sorted({run["dataset"] for run in runs}))]
    if len(groups) == 1:
        parts += groups
    counts = sorted({len(group) for group in groups.values()})
    seeds = " to ".join(map(str, counts)) + " seeds"
    parts.append(seeds if counts[-1] > 1 else f"seed {runs[0]['seed']}")
    if any(run["constants"]["VALIDATION_SIZE"] for run in runs):
        parts.append("validation images")
    return "\n".join([f"{what} ({', '.join(parts)})", *sorted({r["notice"] for r in runs} - {""})])


def experience_names(runs: list[dict]) -> list[str]:
    """Name the experiences by their classes, or by numbers where the runs differ in them."""
    names = {tuple(run["experiences"]) for run in runs}
    first = names.pop()
    return [str(i) if names else name for i, name in enumerate(first, 1)]


def styled(runs: list[dict]) -> Iterator[tuple[list[dict], dict]]:
    """Group runs of the same name, each with the style of its line."""
    styles = zip(cycle(COLOURS), cycle(MARKERS))
    for (name, group), (colour, marker) in zip(report.by_name(runs).items(), styles):
        yield group, {"label": name, "color": colour, "marker": marker}


def band(axes, x: np.ndarray, curves: np.ndarray, **style) -> None:
    """Draw the mean of curves, shape (seeds, points), within a band of its standard error."""
    middle = curves.mean(0)
    axes.plot(x, middle, **style)
    if len(curves) > 1:
        error = curves.std(0, ddof=1) / np.sqrt(len(curves))
        low, high = middle - error, middle + error
        axes.fill_between(x, low, high, color=style["color"], alpha=0.3, linewidth=0)


def mosaic(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """Put images, shape (n, C, H, W), side by side in one, shape (rows, columns, C)."""
    images = np.moveaxis(images, 1, -1)
    padded = np.pad(images, ((0, 0), (gap, 0), (gap, 0), (0, 0)), constant_values=np.nan)
    n, height, width, channels = padded.shape
    grid = padded.reshape(n // columns, columns, height, width, channels).swapaxes(1, 2)
    return grid.reshape(n // columns * height, columns * width, channels)


def show_rows(axes, images: np.ndarray, labels: list[str]) -> None:
    """Draw images, shape (rows, n, C, H, W), row by row, labelled; NaN stays empty.

    Grey ones are drawn dark on light, coloured ones as they are.
    """
    rows, columns = images.shape[:2]
    picture = mosaic(images.reshape(-1, *images.shape[2:]), columns)
    if picture.shape[2] == 1:
        colours = "gray_r" if np.nanmean(picture) < 0.5 else "gray"
        axes.imshow(picture[..., 0], cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    else:
        axes.imshow(np.nan_to_num(picture, nan=1), interpolation="nearest")
    axes.set_yticks((np.arange(rows) + 0.5) * picture.shape[0] / rows, labels)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def separate_pairs(axes, pairs: int) -> None:
    """Draw lines between pairs of columns."""
    for x in np.linspace(*axes.get_xlim(), pairs + 1)[1:-1]:
        axes.axvline(x + 0.5, color="gray", linewidth=0.8)


@plt.rc_context(STYLE)
def samples(runs: list[dict]) -> plt.Figure:
    """Draw generated images after each experience of the first run, two for each class."""
    run = runs[0]
    images = arrays_of(run)["samples"]
    experiences, columns = images.shape[:2]
    figure, axes = plt.subplots(figsize=(WIDTH, 0.9 + WIDTH * 0.93 * experiences / columns))
    names = [run["classes"][label] for label in run["label_order"]]
    show_rows(axes, images, experience_names([run]))
    separate_pairs(axes, columns // 2)
    axes.set_xticks((np.arange(len(names)) + 0.5) * axes.get_xlim()[1] / len(names), names)
    axes.set_ylabel("after experience (its classes)")
    axes.set_xlabel(
        "by the class that the solver sees in them, of 1,000 samples: the surest and the first"
    )
    axes.set_title(title("Samples of the generator", runs[:1]))
    return figure


@plt.rc_context(STYLE)
def generator(run: dict) -> plt.Figure:
    """Draw samples after each experience, and test images beside their reconstructions."""
    arrays, labels = arrays_of(run), experience_names([run])
    images, reconstructions = arrays["samples"], arrays["reconstructions"]
    height = 2 * (0.5 + WIDTH * 0.93 * len(images) / images.shape[1])
    figure, (upper, lower) = plt.subplots(2, figsize=(WIDTH, height))
    show_rows(upper, images, labels)
    upper.set_title(title("Samples", [run]))
    pairs = np.broadcast_to(arrays["originals"], reconstructions.shape), reconstructions
    pairs = np.stack(pairs, axis=2).reshape(len(images), -1, *images.shape[2:])
    show_rows(lower, pairs, labels)
    separate_pairs(lower, len(arrays["originals"]))
    lower.set_title("Test images of each class, each with its reconstruction to the right")
    for one in upper, lower:
        one.set_ylabel("after experience (its classes)")
    return figure


@plt.rc_context(STYLE)
def saved_generator(run: dict, arrays: dict) -> plt.Figure:
    """Draw samples, reconstructions, and walks through latent space, by a saved generator."""
    titles = {
        "samples": title("Samples", [run]),
        "reconstructions": "Test images (above), and their reconstructions",
        "walks": "From one class to another, along a straight line in latent space",
    }
    heights = [len(images) / images.shape[1] for images in arrays.values()]
    figure, axes = plt.subplots(
        len(arrays), figsize=(WIDTH, sum(0.35 + WIDTH * 0.95 * height for height in heights)),
        height_ratios=heights, squeeze=False,
    )  # fmt: skip
    for one, (name, images) in zip(axes[:, 0], arrays.items()):
        show_rows(one, images, [""] * len(images))
        one.set_title(titles[name])
    return figure


@plt.rc_context(STYLE)
def accuracy_matrix(runs: list[dict]) -> plt.Figure:
    """Draw the mean accuracy matrix in percent, without experiences yet to come."""
    matrix = 100 * np.mean([run["accuracy_matrix"] for run in runs], axis=0)
    matrix[np.triu_indices(len(matrix), 1)] = np.nan
    lowest = 10 * np.floor(np.nanmin(matrix) / 10)  # or all that is good would look the same
    norm = Normalize(min(lowest, 90), 100)
    axes, figure = heat_map(matrix, experience_names(runs), "accuracy (%)", norm)
    axes.set(xlabel="tested on (classes)", ylabel="after experience (its classes)")
    figure.suptitle(title(f"Accuracy: {np.mean(matrix[-1]):.2f} % at the end", runs))
    return figure


@plt.rc_context(STYLE)
def confusion_matrix(runs: list[dict]) -> plt.Figure:
    """Draw the classes that the solver sees in test images after the last experience."""
    counts = np.sum([run["confusion_matrix"] for run in runs], axis=0)
    share = 100 * counts / counts.sum(1, keepdims=True)
    norm = PowerNorm(0.4, 0, 100)  # errors are few, and what matters here
    unit = "share of the class's images (%); empty: none"
    axes, figure = heat_map(share, runs[0]["classes"], unit, norm)
    axes.set(xlabel="class that the solver sees", ylabel="class")
    figure.suptitle(title("Confusions after the last experience", runs))
    return figure


def heat_map(matrix: np.ndarray, labels: list, unit: str, norm: Normalize) -> tuple:
    """Draw an annotated heat map of percentages; NaN stays empty. Return axes and figure."""
    figure, axes = plt.subplots(figsize=(0.7 * WIDTH, 0.58 * WIDTH))
    image = axes.imshow(matrix, cmap="cividis", norm=norm)
    for (i, j), value in np.ndenumerate(matrix):
        if value > 0 or (value == 0 and len(matrix) <= 5):  # zeros would fill a large one
            colour = "black" if norm(value) > 0.6 else "white"
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color=colour,
                      fontsize="small" if len(matrix) > 5 else None)  # fmt: skip
    axes.set_xticks(range(len(matrix)), labels, rotation=90 if max(map(len, labels)) > 5 else 0)
    axes.set_yticks(range(len(matrix)), labels)
    figure.colorbar(image, label=unit)
    return axes, figure


@plt.rc_context(STYLE)
def accuracy_so_far(runs: list[dict]) -> plt.Figure:
    """Draw the accuracy on the experiences so far: mean and standard error for each name.

    The best are shown once more, larger, where they would lie on each other.
    """
    figure, axes = plt.subplots(figsize=(0.75 * WIDTH, 0.55 * WIDTH))
    close = []
    for number, (group, style) in enumerate(styled(runs)):
        style["zorder"] = 3 - number / 10  # the first lies on top
        curves = 100 * np.array([run["accuracy_matrix"] for run in group])
        curves = np.stack([curves[:, i, : i + 1].mean(1) for i in range(curves.shape[1])], 1)
        x = np.arange(1, curves.shape[1] + 1)
        style["label"] += f": {curves[:, -1].mean():.2f}"
        band(axes, x, curves, **style)
        if curves.mean(0).min() > 80:
            close.append((x, curves, style))
    counts = {len(run["experiences"]) for run in runs}
    ticks = np.arange(1, max(counts) + 1)
    if len(counts) == 1 and {run["constants"]["SCENARIO"] for run in runs} == {"class"}:
        groups = np.array_split(runs[0]["label_order"], len(x))
        chance = 100 / np.cumsum([len(group) for group in groups])
        axes.plot(x, chance, ":", color="gray", label=f"chance: {chance[-1]:.0f}")
    if len(close) > 1:
        top = min(curves.mean(0).min() for _, curves, _ in close) / 102 - 0.08
        larger = axes.inset_axes((0.47, 0.4, 0.5, top - 0.4))
        for curve in close:
            band(larger, *curve[:2], **curve[2])
        larger.set_xticks(ticks)
        larger.tick_params(labelsize="small")
        larger.grid(alpha=0.3)
        axes.indicate_inset_zoom(larger)
    axes.set(
        xlabel="experiences learned", ylabel="accuracy so far (%)", ylim=(0, 102), xticks=ticks
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, title="at the end (%)", fontsize="small")
    axes.set_title(title("Accuracy on all experiences so far", runs))
    return figure


@plt.rc_context(STYLE)
def forgetting(runs: list[dict]) -> plt.Figure:
    """Draw the accuracy on each experience from when it was learned to the end."""
    figure, axes = plt.subplots(figsize=(0.75 * WIDTH, 0.5 * WIDTH))
    matrices = 100 * np.array([run["accuracy_matrix"] for run in runs])
    x = np.arange(1, matrices.shape[1] + 1)
    for j, label in enumerate(experience_names(runs)):
        style = {"marker": MARKERS[j % 9], "color": COLOURS[j % 8], "label": label}
        band(axes, x[j:], matrices[:, j:, j], **style)
    axes.set(xlabel="experiences learned", ylabel="accuracy (%)", xticks=x)
    axes.set_ylim(min(axes.get_ylim()[0], 89), 100.5)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", title="experience\n(its classes)", fontsize="small")
    axes.set_title(title("Accuracy of each experience over time", runs))
    return figure


@plt.rc_context(STYLE)
def losses(runs: list[dict]) -> plt.Figure:
    """Draw the losses of solver and generator over the iterations of all experiences."""
    arrays = [arrays_of(run) for run in runs]
    names = [name for name in arrays[0] if name.endswith("_loss")]
    figure, all_axes = plt.subplots(
        len(names), figsize=(WIDTH, 0.1 * WIDTH + 0.22 * WIDTH * len(names)), squeeze=False
    )
    for axes, name, colour in zip(all_axes[:, 0], names, COLOURS):
        experiences, iterations = arrays[0][name].shape
        width = max(1, iterations // 100)  # iterations that a point is the mean of
        curves = np.stack([array[name][:, : iterations // width * width] for array in arrays])
        curves = curves.reshape(len(runs), -1, width).mean(2)
        within = (np.arange(iterations // width) + 0.5) * width
        x = np.add.outer(np.arange(experiences) * iterations, within).ravel()
        band(axes, x, curves, color=colour, linewidth=1)
        for start in range(1, experiences):
            axes.axvline(start * iterations, color="gray", linewidth=0.6)
        axes.set(ylabel=f"{name.removesuffix('_loss')}'s loss", xlim=(0, experiences * iterations))
        if curves.min() > 0 and curves.max() > 30 * curves.min():
            axes.set_yscale("log")
        axes.grid(alpha=0.3, axis="y")
    axes.set_xlabel("iterations; a line where an experience ends")
    all_axes[0, 0].set_title(title("Losses, of current and replayed data", runs))
    return figure


if __name__ == "__main__":
    run_command(main)
