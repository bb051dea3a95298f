"""The figures of runs, drawn from their results alone: `python -m figures.draw results`.

A run is the record in its results.json, with the `folder` it lies in. Each function returns a
matplotlib figure. One visual language: images dark on light as on paper, one row per experience,
titles that name the data set, and strategy or seed of a single one. Names are text, whatever is in
them. What can't be read where there are many classes or experiences is left out: numbers, labels,
classes.
"""

import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import cycle
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.ticker import MaxNLocator, NullFormatter

from figures.lab import report
from figures.lab.console import say
from figures.lab.constants import UserError, run_command
from figures.lab.runs import atomic, save_record

WIDTH = 8  # inches: a column of the README
LONGEST = 24  # characters of a name
READABLE = 20  # rows of images, columns of classes, lines, numbers side by side
STYLE = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "figure.max_open_warning": 0,  # many strategies have many figures
    "font.size": 9,
    "text.parse_math": False,
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
    save(accuracy_so_far, runs, folder / "figures" / "accuracy.png")
    for name, group in report.by_name(runs).items():
        ending = re.sub(r"\W+", "-", name).strip("-")
        for function in accuracy_matrix, confusion_matrix, forgetting, losses, samples:
            save(function, group, folder / "figures" / f"{function.__name__}-{ending}.png")
    print(f"Results are in {folder}, figures in {folder / 'figures'}")


def arrays_of(run: dict) -> dict[str, np.ndarray]:
    """Read the arrays of a run."""
    with np.load(run["folder"] / "arrays.npz") as arrays:
        return dict(arrays)


def in_order(runs: list[dict]) -> list[dict]:
    """Sort runs by strategy, as in `ORDER`."""
    return sorted(runs, key=lambda run: (*ORDER, run["name"]).index(run["name"]))


def save(function: Callable, runs: list[dict], path: Path) -> bool:
    """Draw a figure of runs and save it, or say in one line why not: the numbers are worth more.

    :param function: returns the figure, or None if the runs have nothing to draw.
    :return: whether the file is there.
    """
    others = plt.get_fignums()
    try:
        style = STYLE | {"font.family": fonts(other_characters(runs))}
        with plt.rc_context(style), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # `fonts` has said so
            figure = function(runs)
            if figure is not None:
                with atomic(path) as temporary:
                    figure.savefig(temporary)
        return figure is not None
    except Exception as error:  # drawing can raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        say(f"{path} can't be drawn: {reason}", sys.stderr)
        return False
    finally:
        for number in set(plt.get_fignums()).difference(others):
            plt.close(number)


# --- Names ----------------------------------------------------------------------------------------


def shown(name: str, longest: int = LONGEST) -> str:
    """Return a name as one line of text; of a long one the beginning and the end."""
    name = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+", " ", name)
    half = longest // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[half + 1 - longest :]}"


def other_characters(runs: list[dict]) -> frozenset[str]:
    """Collect the characters in the names of runs that aren't ASCII."""
    names = [name for run in runs for name in (run["dataset"], *run["classes"])]
    return frozenset(c for c in "".join(map(shown, names)) if not c.isascii())


@cache
def fonts(characters: frozenset[str]) -> list[str]:
    """Choose the usual font and, for what it lacks, others that are installed.

    What none of them has is said once.
    """
    families = list(plt.rcParams["font.family"])
    usual = font_manager.findfont(font_manager.FontProperties(family=families))
    usual = font_manager.get_font(usual).get_charmap()
    missing = {c for c in characters if ord(c) not in usual}
    for font in font_manager.fontManager.ttflist:
        if missing and not font.name.startswith("Last Resort"):  # its glyphs are boxes
            charmap = font_manager.get_font(font.fname).get_charmap()
            if found := {c for c in missing if ord(c) in charmap}:
                families.append(font.name)
                missing -= found
    if missing:
        say(f"No font has {''.join(sorted(missing)[:10])}: install one, such as Noto Sans")
    return families


def title(what: str, runs: list[dict], longest: int = 66) -> str:
    """Compose the title of a figure: what it shows, of which runs, and their notice.

    :param longest: characters in a line.
    """
    groups = report.by_name(runs)
    parts = ["/".join(sorted({shown(run["dataset"]) for run in runs}))]
    if len(groups) == 1:
        parts += map(shown_run, groups)
    counts = sorted({len(group) for group in groups.values()})
    seeds = " to ".join(map(str, counts)) + " seeds"
    parts.append(seeds if counts[-1] > 1 else f"seed {runs[0]['seed']}")
    if any(run["constants"]["VALIDATION_SIZE"] for run in runs):
        parts.append("validation images")
    of_runs = f"({', '.join(parts)})"
    lines = [f"{what} {of_runs}"] if len(what + of_runs) < longest else [what, of_runs]
    lines += sorted({run["notice"] for run in runs} - {""})
    return "\n".join(fill(line, longest) for line in lines)


def shown_run(name: str) -> str:
    """Return the name of a run, which may begin with that of a data set, as a line of text."""
    return shown(name, 2 * LONGEST)


def experience_names(runs: list[dict]) -> list[str]:
    """Name the experiences by their classes, or by numbers where the runs differ in them.

    Of many classes the first and the last are named.
    """
    names = {tuple(run["experiences"]) for run in runs}
    if len(names) > 1:
        return [str(i) for i in range(1, len(names.pop()) + 1)]
    experiences, classes = runs[0]["experiences"], runs[0]["classes"]
    shortened = []
    for name, group in zip(experiences, np.array_split(runs[0]["label_order"], len(experiences))):
        if len(name) > LONGEST and name == " ".join(classes[label] for label in group):
            first, last = (shown(classes[label], 14) for label in group[[0, -1]])
            name = f"{first} … {last}"
        shortened.append(shown(name, 31))
    return shortened


# --- Drawing --------------------------------------------------------------------------------------


def evenly(count: int, most: int) -> np.ndarray:
    """Choose indices out of `count`, at most so many: all, or the first, the last and between."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


def room(labels: Sequence[str]) -> float:
    """Return the inches that labels take, beyond the three characters that any figure has."""
    return 0.085 * max(0, max(map(len, labels)) - 3)


def label_axis(axis, positions: np.ndarray, labels: Sequence[str], inches: float, **style) -> None:
    """Put labels on an axis of so many inches, where they are too many only every n-th."""
    step = math.ceil(0.145 * len(labels) / inches)
    axis.set_ticks(positions[::step], labels[::step], **style)


def count_experiences(axes, count: int) -> None:
    """Number the experiences on the x-axis, if they are many only some of them."""
    step = 1 if count <= READABLE else 5 * math.ceil(count / 50)
    axes.set_xticks(range(step, count + 1, step))


def styled(runs: list[dict]) -> Iterator[tuple[list[dict], dict]]:
    """Group runs of the same name, each with the style of its line."""
    styles = zip(cycle(COLOURS), cycle(MARKERS))
    for (name, group), (colour, marker) in zip(report.by_name(runs).items(), styles):
        yield group, {"label": shown_run(name), "color": colour, "marker": marker}


def band(axes, x: np.ndarray, curves: np.ndarray, **style) -> None:
    """Draw the mean of curves, shape (seeds, points), within a band of its standard error."""
    middle = curves.mean(0)
    axes.plot(x, middle, markevery=math.ceil(len(x) / 30), **style)
    if len(curves) > 1:
        error = curves.std(0, ddof=1) / np.sqrt(len(curves))
        low, high = middle - error, middle + error
        axes.fill_between(x, low, high, color=style["color"], alpha=0.3, linewidth=0)


def mosaic(images: np.ndarray, columns: int) -> np.ndarray:
    """Put images, shape (n, C, H, W), side by side in one, shape (rows, columns, C)."""
    images = np.moveaxis(images, 1, -1)
    padded = np.pad(images, ((0, 0), (2, 0), (2, 0), (0, 0)), constant_values=np.nan)
    n, height, width, channels = padded.shape
    grid = padded.reshape(n // columns, columns, height, width, channels).swapaxes(1, 2)
    return grid.reshape(n // columns * height, columns * width, channels)


def image_width(images: np.ndarray, height: float) -> float:
    """Choose how many inches wide each image is drawn, so that rows fit into width and height."""
    rows, columns, _, h, w = images.shape
    return min(0.93 * WIDTH / columns, height / rows * w / h, 0.8)


def show_rows(axes, images: np.ndarray, labels: list[str], width: float) -> None:
    """Draw images, shape (rows, n, C, H, W), row by row, labelled; NaN stays empty.

    Grey ones are drawn dark on light, coloured ones as they are.
    """
    rows, columns, _, h, w = images.shape
    picture = mosaic(images.reshape(-1, *images.shape[2:]), columns)
    if picture.shape[2] == 1:
        colours = "gray_r" if np.ma.masked_invalid(picture).mean() < 0.5 else "gray"
        axes.imshow(picture[..., 0], cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    else:
        axes.imshow(np.nan_to_num(picture, nan=1), interpolation="nearest")
    middles, inches = (np.arange(rows) + 0.5) * picture.shape[0] / rows, rows * width * h / w
    label_axis(axes.yaxis, middles, labels, inches)
    if any(labels):
        long = "after experience (its classes)"
        axes.set_ylabel(long if inches > 1.8 else "experience" if inches > 0.7 else "")
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def separate_pairs(axes, pairs: int) -> None:
    """Draw lines between pairs of columns."""
    for x in np.linspace(*axes.get_xlim(), pairs + 1)[1:-1]:
        axes.axvline(x + 0.5, color="gray", linewidth=0.8)


def laid_out(figure: plt.Figure) -> plt.Figure:
    """Lay out a figure once before it is drawn, or labels beside images have too little room."""
    figure.draw_without_rendering()
    return figure


def some(chosen: np.ndarray, count: int, what: str) -> str:
    """Say how many of all are shown, if some are left out."""
    return f", {len(chosen)} of {count} {what}" if len(chosen) < count else ""


def samples(runs: list[dict]) -> plt.Figure | None:
    """Draw generated images after each experience of the first run, two for each class."""
    run, images = runs[0], arrays_of(runs[0]).get("samples")
    if images is None:  # no replay
        return None
    classes, experiences = (len(run[key]) for key in ("label_order", "experiences"))
    rows, pairs = evenly(experiences, READABLE), evenly(classes, READABLE)
    images = images.reshape(experiences, classes, 2, *images.shape[2:])[np.ix_(rows, pairs)]
    images = images.reshape(len(rows), -1, *images.shape[3:])
    labels = [experience_names([run])[row] for row in rows]
    names = [shown(run["classes"][run["label_order"][pair]]) for pair in pairs]
    width, (h, w) = image_width(images, 10), images.shape[-2:]
    upright = 0.08 * max(map(len, names)) > 2 * width
    height = 0.9 + len(rows) * width * h / w + upright * 0.08 * max(map(len, names))
    figure, axes = plt.subplots(figsize=(WIDTH + room(labels), height))
    show_rows(axes, images, labels, width)
    separate_pairs(axes, len(pairs))
    middles = (np.arange(len(names)) + 0.5) * axes.get_xlim()[1] / len(names)
    axes.set_xticks(middles, names, rotation=90 * upright)
    axes.set_xlabel(
        "by the class that the solver sees in them, of 1,000 samples: the surest and another"
    )
    left_out = some(pairs, classes, "classes") + some(rows, experiences, "experiences")
    axes.set_title(title(f"Samples of the generator{left_out}", runs[:1], 95))
    return laid_out(figure)


def generator(runs: list[dict]) -> plt.Figure:
    """Draw a run's samples after each experience, and reconstructions beside test images."""
    (run,) = runs
    arrays = arrays_of(run)
    experiences, classes = arrays["reconstructions"].shape[:2]
    rows, pairs = evenly(experiences, READABLE), evenly(classes, 10)
    labels = [experience_names([run])[row] for row in rows]
    images, reconstructions = arrays["samples"][rows], arrays["reconstructions"][rows][:, pairs]
    width, (h, w) = image_width(images, 7), images.shape[-2:]
    height = 2 * (0.5 + len(rows) * width * h / w)
    figure, (upper, lower) = plt.subplots(2, figsize=(WIDTH + room(labels), height))
    show_rows(upper, images, labels, width)
    upper.set_title(title(f"Samples{some(rows, experiences, 'experiences')}", [run]))
    both = np.broadcast_to(arrays["originals"][pairs], reconstructions.shape), reconstructions
    both = np.stack(both, axis=2).reshape(len(rows), -1, *images.shape[2:])
    show_rows(lower, both, labels, width)
    separate_pairs(lower, len(pairs))
    which = "each class" if len(pairs) == classes else f"{len(pairs)} of {classes} classes"
    lower.set_title(f"Test images of {which}, each with its reconstruction to the right")
    return laid_out(figure)


def saved_generator(runs: list[dict], arrays: dict) -> plt.Figure:
    """Draw samples, reconstructions, and walks through latent space, by a saved generator."""
    rows, columns = evenly(len(arrays["walks"]), 10), arrays["reconstructions"].shape[1]
    arrays = arrays | {
        "reconstructions": arrays["reconstructions"][:, evenly(columns, READABLE)],
        "walks": arrays["walks"][rows],
    }
    titles = {
        "samples": title("Samples", runs),
        "reconstructions": "Test images (above), and their reconstructions",
        "walks": "From one class to another, along a straight line in latent space",
    }
    widths = {name: image_width(images, 10) for name, images in arrays.items()}
    h, w = arrays["samples"].shape[-2:]
    heights = [len(images) * widths[name] * h / w for name, images in arrays.items()]
    figure, axes = plt.subplots(
        len(arrays), figsize=(WIDTH, sum(0.35 + 0.95 / 0.93 * height for height in heights)),
        height_ratios=heights, squeeze=False,
    )  # fmt: skip
    for one, (name, images) in zip(axes[:, 0], arrays.items()):
        show_rows(one, images, [""] * len(images), widths[name])
        one.set_title(titles[name])
    return figure


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


def confusion_matrix(runs: list[dict]) -> plt.Figure:
    """Draw the classes that the solver sees in test images after the last experience."""
    counts = np.sum([run["confusion_matrix"] for run in runs], axis=0)
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    norm = PowerNorm(0.4, 0, 100)  # errors are few, and what matters here
    unit = "share of the class's images (%); empty: none"
    axes, figure = heat_map(share, [*map(shown, runs[0]["classes"])], unit, norm)
    axes.set(xlabel="class that the solver sees", ylabel="class")
    figure.suptitle(title("Confusions after the last experience", runs))
    return figure


def heat_map(matrix: np.ndarray, labels: list, unit: str, norm: Normalize) -> tuple:
    """Draw a heat map of percentages; NaN stays empty. Return axes and figure.

    It grows with its rows, and as long as they are few the numbers stand in it.
    """
    count = len(matrix)
    side = max(0.36 * count, 3.6) if count <= READABLE else np.clip(0.15 * count, 6, 10)
    more = side - 3.6 + room(labels)
    figure, axes = plt.subplots(figsize=(0.7 * WIDTH + 1.1 * more, 0.58 * WIDTH + more))
    image = axes.imshow(matrix, cmap="cividis", norm=norm)
    for (i, j), value in np.ndenumerate(matrix):
        # zeros would fill a large one
        if count <= READABLE and (value > 0 or (value == 0 and count <= 5)):
            colour = "black" if norm(value) > 0.6 else "white"
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color=colour,
                      fontsize="small" if count > 5 else None)  # fmt: skip
    upright = max(map(len, labels)) > 5 or count > READABLE
    label_axis(axes.xaxis, np.arange(count), labels, side, rotation=90 * upright)
    label_axis(axes.yaxis, np.arange(count), labels, side)
    figure.colorbar(image, label=unit)
    return axes, figure


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
    sizes = {(len(run["experiences"]), len(run["label_order"])) for run in runs}
    if len(sizes) == 1 and {run["constants"]["SCENARIO"] for run in runs} == {"class"}:
        groups = np.array_split(runs[0]["label_order"], len(x))
        chance = 100 / np.cumsum([len(group) for group in groups])
        axes.plot(x, chance, ":", color="gray", label=f"chance: {chance[-1]:.2g}")
    if len(close) > 1:
        top = min(curves.mean(0).min() for _, curves, _ in close) / 102 - 0.08
        larger = axes.inset_axes((0.47, 0.4, 0.5, top - 0.4))
        for curve in close:
            band(larger, *curve[:2], **curve[2])
        count_experiences(larger, max(counts))
        larger.tick_params(labelsize="small")
        larger.grid(alpha=0.3)
        axes.indicate_inset_zoom(larger)
    axes.set(xlabel="experiences learned", ylabel="accuracy so far (%)", ylim=(0, 102))
    count_experiences(axes, max(counts))
    axes.grid(alpha=0.3)
    lines, labels = axes.get_lines(), [line.get_label() for line in axes.get_lines()]
    columns = np.clip(75 // (8 + max(map(len, labels))), 1, 3)
    figure.legend(
        lines, labels, loc="outside lower center", ncols=columns, title="at the end (%)",
        fontsize="small",
    )  # fmt: skip
    axes.set_title(title("Accuracy on all experiences so far", runs))
    return figure


def forgetting(runs: list[dict]) -> plt.Figure:
    """Draw the accuracy on each experience from when it was learned to the end."""
    names, count = experience_names(runs), len(runs[0]["experiences"])
    many = count > READABLE
    more = 0 if many else room(names)
    figure, axes = plt.subplots(figsize=(0.75 * WIDTH + more, 0.5 * WIDTH))
    matrices = 100 * np.array([run["accuracy_matrix"] for run in runs])
    x, colours = np.arange(1, count + 1), plt.get_cmap("viridis", count)
    for j in range(count):
        style = {"marker": MARKERS[j % 9], "color": COLOURS[j % 8]}
        if many:
            style = {"color": colours(j), "linewidth": 0.8}
        band(axes, x[j:], matrices[:, j:, j], **style)
    axes.set(xlabel="experiences learned", ylabel="accuracy (%)")
    count_experiences(axes, count)
    axes.set_ylim(min(axes.get_ylim()[0], 89), 100.5)
    axes.grid(alpha=0.3)
    if many:
        scale = ScalarMappable(Normalize(0.5, count + 0.5), colours)
        figure.colorbar(scale, ax=axes, label="experience", ticks=MaxNLocator(integer=True))
    else:
        heading = "experience\n(its classes)"
        figure.legend(
            axes.get_lines(), names, loc="outside right center", title=heading, fontsize="small"
        )
    axes.set_title(title("Accuracy of each experience over time", runs))
    return figure


def losses(runs: list[dict]) -> plt.Figure:
    """Draw the losses of solver and generator over the iterations of all experiences.

    Where an experience has had fewer iterations than others there is a gap.
    """
    arrays = [arrays_of(run) for run in runs]
    names = [name for name in arrays[0] if name.endswith("_loss")]
    figure, all_axes = plt.subplots(
        len(names), figsize=(WIDTH, 0.1 * WIDTH + 0.22 * WIDTH * len(names)), squeeze=False
    )
    for axes, name, colour in zip(all_axes[:, 0], names, COLOURS):
        experiences = len(arrays[0][name])
        iterations = max(1, *(array[name].shape[1] for array in arrays))
        width = max(1, iterations // 100)  # iterations that a point is the mean of
        points = iterations // width
        curves = np.full((len(runs), experiences, points * width), np.nan)
        for curve, array in zip(curves, arrays):
            part = array[name][:, : points * width]
            curve[:, : part.shape[1]] = part
        curves = np.ma.masked_invalid(curves).reshape(len(runs), -1, width).mean(2)
        x = np.add.outer(np.arange(experiences) * iterations, (np.arange(points) + 0.5) * width)
        # A single point between gaps needs a marker to be seen.
        gaps = {"marker": ".", "markersize": 3} if np.ma.is_masked(curves) else {}
        band(axes, x.ravel(), curves, color=colour, linewidth=1, **gaps)
        for start in range(1, experiences if experiences <= READABLE else 1):
            axes.axvline(start * iterations, color="gray", linewidth=0.6)
        axes.set(ylabel=f"{name.removesuffix('_loss')}'s loss", xlim=(0, experiences * iterations))
        found = curves.compressed()
        if len(found) and found.min() > 0 and found.max() > 30 * found.min():
            axes.set_yscale("log")
            axes.yaxis.set(major_formatter="{x:g}", minor_formatter=NullFormatter())  # no TeX
        axes.grid(alpha=0.3, axis="y")
    line = "; a line where an experience ends" if 1 < experiences <= READABLE else ""
    axes.set_xlabel(f"iterations{line}")
    all_axes[0, 0].set_title(title("Losses, of current and replayed data", runs))
    return figure


if __name__ == "__main__":
    run_command(main)
