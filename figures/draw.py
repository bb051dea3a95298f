"""The figures of a run, drawn from its results alone (results.json and samples.npz).

Each function returns a matplotlib figure; the scripts save it. One visual language: images dark on
light as on paper, one row per experience, titles that name data set, strategy and seed.
"""

import matplotlib.pyplot as plt
import numpy as np

WIDTH = 8  # inches: a column of the README
STYLE = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "figure.max_open_warning": 0,  # many seeds have many figures
    "font.size": 9,
}
# Okabe and Ito's palette, which the colour-blind can tell apart, and two more; as many as markers.
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00",
    "#56b4e9", "#000000", "#999999", "#b8860b",
)  # fmt: skip
# Class-incremental Split MNIST, no stored data, fully connected, 2,000 iterations of 128 + 128 (van
# de Ven et al. 2018, 2022). Shown beside runs of this data set, experiences and validation images.
PROTOCOL = ("mnist", 5, 0)
PUBLISHED = {"DGR, published": 91.24, "brain-inspired replay, published": 94.41}


def title(results: dict, what: str) -> str:
    """Title of a figure: what it shows, of which run, and the notice that goes with it."""
    held_out = ", validation images" if results["constants"]["VALIDATION_SIZE"] else ""
    run = f"{results['dataset']}, {results['strategy']}, seed {results['seed']}{held_out}"
    run = f"{what} ({run})"
    return f"{run}\n{results['notice']}" if results["notice"] else run


def class_groups(results: dict) -> list[str]:
    """Names of the experiences on the axes: their classes."""
    constants = results["constants"]
    groups = np.array_split(constants["CLASS_ORDER"], constants["N_EXPERIENCES"])
    return [" ".join(map(str, group)) for group in groups]


def mosaic(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """Images of shape (n, C, H, W) side by side, first channel, as one array; NaN stays empty."""
    padded = np.pad(images[:, 0], ((0, 0), (gap, 0), (gap, 0)), constant_values=np.nan)
    n, height, width = padded.shape
    grid = padded.reshape(n // columns, columns, height, width).swapaxes(1, 2)
    return grid.reshape(n // columns * height, columns * width)


def show_rows(axes, images: np.ndarray, results: dict) -> None:
    """Images of shape (experiences, n, C, H, W), one row per experience, labelled."""
    experiences, columns = images.shape[:2]
    picture = mosaic(images.reshape(-1, *images.shape[2:]), columns)
    axes.imshow(picture, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    height = picture.shape[0] / experiences
    labels = class_groups(results)
    axes.set_yticks((np.arange(experiences) + 0.5) * height, labels)
    axes.set_ylabel("after experience (its classes)")
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def separate_pairs(axes, pairs: int) -> None:
    """Draw lines between pairs of columns."""
    for x in np.linspace(*axes.get_xlim(), pairs + 1)[1:-1]:
        axes.axvline(x + 0.5, color="gray", linewidth=0.8)


@plt.rc_context(STYLE)
def memories(results: dict, arrays: dict) -> plt.Figure:
    """Generated images after each experience, two for each class: the surest and any other."""
    samples = arrays["samples"]
    experiences, columns = samples.shape[:2]
    figure, axes = plt.subplots(figsize=(WIDTH, 0.9 + WIDTH * 0.93 * experiences / columns))
    show_rows(axes, samples, results)
    separate_pairs(axes, columns // 2)
    order = results["constants"]["CLASS_ORDER"]
    axes.set_xticks((np.arange(len(order)) + 0.5) * axes.get_xlim()[1] / len(order), order)
    axes.set_xlabel(
        "by the class that the solver sees in them, of 1,000 samples: the surest and the first"
    )
    axes.set_title(title(results, "What the generator remembers"))
    return figure


@plt.rc_context(STYLE)
def generator(results: dict, arrays: dict) -> plt.Figure:
    """Samples after each experience (left), and test images beside their reconstructions."""
    samples, originals = arrays["samples"], arrays["originals"]
    reconstructions = arrays["reconstructions"]
    pairs = np.stack([np.broadcast_to(originals, reconstructions.shape), reconstructions], axis=2)
    pairs = pairs.reshape(len(samples), -1, *samples.shape[2:])
    height = 2 * (0.5 + WIDTH * 0.93 * len(samples) / samples.shape[1])
    figure, (upper, lower) = plt.subplots(2, figsize=(WIDTH, height))
    show_rows(upper, samples, results)
    upper.set_title(title(results, "Samples"))
    show_rows(lower, pairs, results)
    separate_pairs(lower, len(originals))
    lower.set_title("Test images of each class, each with its reconstruction to the right")
    return figure


@plt.rc_context(STYLE)
def accuracy_matrix(results: dict) -> plt.Figure:
    """Heat map of the accuracy matrix, in percent; experiences yet to come are left out."""
    matrix = 100 * np.array(results["accuracy_matrix"], dtype=float)
    matrix[np.triu_indices(len(matrix), 1)] = np.nan
    figure, axes = plt.subplots(figsize=(0.6 * WIDTH, 0.5 * WIDTH))
    image = axes.imshow(matrix, cmap="cividis", vmin=0, vmax=100)
    for (i, j), value in np.ndenumerate(matrix):
        if not np.isnan(value):
            colour = "black" if value > 60 else "white"
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color=colour)
    labels = class_groups(results)
    axes.set_xticks(range(len(matrix)), labels)
    axes.set_yticks(range(len(matrix)), labels)
    axes.set_xlabel("tested on (classes)")
    axes.set_ylabel("after experience (its classes)")
    axes.set_title(title(results, f"Accuracy: {100 * results['final_accuracy']:.2f} % at the end"))
    figure.colorbar(image, label="accuracy (%)")
    return figure


def caption(what: str, dataset: str, seeds: list[int], constants: dict, notice: str) -> str:
    """Title of a figure of several runs."""
    held_out = ", validation images" if constants["VALIDATION_SIZE"] else ""
    count = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"
    text = f"{what} ({dataset}, {count}{held_out})"
    return f"{text}\n{notice}" if notice else text


@plt.rc_context(STYLE)
def accuracy_so_far(runs: list[dict]) -> plt.Figure:
    """Accuracy over the experiences seen so far, a line per name, mean and standard error."""
    names = list(dict.fromkeys(run["name"] for run in runs))
    figure, axes = plt.subplots(figsize=(0.75 * WIDTH, 0.5 * WIDTH))
    for name, colour, marker in zip(names, COLOURS, "osD^vP*X<"):
        matrices = [run["accuracy_matrix"] for run in runs if run["name"] == name]
        curves = np.array(
            [[100 * np.mean(row[: i + 1]) for i, row in enumerate(m)] for m in matrices]
        )
        middle, x = curves.mean(0), np.arange(1, curves.shape[1] + 1)
        axes.plot(x, middle, marker=marker, color=colour, label=name)
        if len(curves) > 1:
            error = curves.std(0, ddof=1) / np.sqrt(len(curves))
            low, high = middle - error, middle + error
            axes.fill_between(x, low, high, color=colour, alpha=0.3, linewidth=0)
    classes = np.array([len(group.split()) for group in class_groups(runs[0])]).cumsum()
    axes.plot(x, 100 / classes, ":", color="gray", label="chance")
    axes.set(xlabel="experiences learned", ylabel="accuracy so far (%)", ylim=(0, 102), xticks=x)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    first, seeds = runs[0], sorted({run["seed"] for run in runs})
    what = "Accuracy on all experiences so far"
    axes.set_title(caption(what, first["dataset"], seeds, first["constants"], first["notice"]))
    return figure


@plt.rc_context(STYLE)
def ablation(summary: dict) -> plt.Figure:
    """Final accuracy of each step of the ablation, with its standard error, beside published ones.

    The lower bound is left to the table: drawn here, it would push all others into a corner.
    """
    rows = {name: r["final_accuracy"] for name, r in summary["results"].items() if name != "naive"}
    middle = [100 * row["mean"] for row in rows.values()]
    error = [100 * (row["standard_error"] or 0) for row in rows.values()]
    figure, axes = plt.subplots(figsize=(0.85 * WIDTH, 0.1 * WIDTH + 0.3 * len(rows)))
    y = np.arange(len(rows))
    axes.errorbar(middle, y, xerr=error, fmt="o", color=COLOURS[0], capsize=3)
    for position, value in zip(y, middle):
        axes.annotate(f"{value:.1f}", (value, position), (0, 5), textcoords="offset points",
                      ha="center", fontsize="small")  # fmt: skip
    axes.set_yticks(y, rows)
    axes.set(xlabel="final accuracy (%)", ylim=(len(rows) - 0.5, -0.8))
    constants, seeds = summary["constants"], summary["seeds"]
    if (summary["dataset"], constants["N_EXPERIENCES"], constants["VALIDATION_SIZE"]) == PROTOCOL:
        for (text, value), style in zip(PUBLISHED.items(), (":", "--")):
            axes.axvline(value, color="gray", linestyle=style, label=f"{text}: {value}")
        axes.legend(fontsize="small", loc="lower left")
    axes.grid(axis="x", alpha=0.3)
    what = f"What each ingredient brings at {constants['ITERATIONS']} iterations"
    axes.set_title(caption(what, summary["dataset"], seeds, constants, summary["notice"]))
    return figure
