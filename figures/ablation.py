"""The ablation: components added to plain DGR one by one, and left out of the whole one by one.

`python -m figures.ablation --n-jobs 2 --seeds 0 1 2 --results-dir results/ablation`, with other
options of GenerativeReplay.py. Edit the components here.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

import GenerativeReplay
from figures import draw
from figures.generators import make_aligned_strategy, make_unaligned_strategy
from figures.lab import data, report
from figures.lab.constants import UserError, read_constants, run_command
from figures.lab.runs import setup, side_by_side

# The components in the order in which they are added, and what turns each off: constants, or
# another way to make the generator's strategy.
COMPONENTS = {
    "normalized input": {"NORMALIZE": False},
    "input shift": {"INPUT_SHIFT": 0},
    "input dropout": {"INPUT_DROPOUT": 0.0},
    "one cycle": {"ONE_CYCLE": False, "LEARNING_RATE": 0.001},
    "bfloat16": {"BFLOAT16": False},
    "soft targets": {"TEMPERATURE": None},
    "growing replay": {"REPLAY_SIZE": 64},
    "latent size 32": {"LATENT_SIZE": 100},
    "class-conditional density": {"MIXTURE_COMPONENTS": 0},
    "replay alignment": {"make_generator": make_unaligned_strategy},
    "KL weight": {"KL_WEIGHT": 1.0},
}
EVERYTHING = {name: of for off in COMPONENTS.values() for name, of in off.items()}
PLAIN_DGR = {name: of for name, of in EVERYTHING.items() if name.isupper()}


def main() -> None:
    """Run plain DGR, each step to the default recipe and back from it, naive and joint; draw."""
    constants = setup(read_constants(GenerativeReplay, sys.argv[1:]))
    if constants.STRATEGIES != ("replay",):
        raise UserError("the ablation chooses its strategies: leave STRATEGIES at replay")
    images = data.load_images(constants)
    constants = data.fill_in(constants, images)
    plans, off = {"plain DGR": EVERYTHING}, EVERYTHING
    for component, component_off in COMPONENTS.items():
        off = {name: value for name, value in off.items() if name not in component_off}
        plans[f"+ {component}"] = off
    for component, off in list(COMPONENTS.items())[:-1]:  # without the last: the step before
        plans[f"without {component}"] = off
    plans = [
        {
            "strategy": "replay",
            "name": name,
            "constants": constants.changed(**{key: of for key, of in off.items() if key.isupper()}),
            "make_generator": off.get("make_generator", make_aligned_strategy),
        }
        for name, off in plans.items()
    ]
    plans += [{"strategy": name, "constants": constants} for name in ("naive", "joint")]
    runs = side_by_side(GenerativeReplay.experiment, plans, images, constants)
    folder = Path(constants.RESULTS_DIR)
    print("\n" + report.table(runs))
    draw.save(ablation, runs, folder / "figures" / "ablation.png")


def ablation(runs: list[dict]) -> plt.Figure:
    """Draw the final accuracy with each component added, and with each left out.

    The lower bound is left to the table: drawn here, it would push all others into a corner.
    """
    rows = {name: row["final_accuracy"] for name, row in report.statistics(runs).items()}
    steps = ["plain DGR", *(f"+ {component}" for component in COMPONENTS), "joint"]
    left_out = [f"without {component}" for component in COMPONENTS]
    left_out[-1] = steps[-3]  # without the last: the step before
    series = (
        ("on top of those above it", steps, range(len(steps)), "o", 7),
        ("left out, all others kept", left_out, range(1, len(steps) - 1), "s", -14),
    )
    figure, axes = plt.subplots(figsize=(0.85 * draw.WIDTH, 0.12 * draw.WIDTH + 0.45 * len(steps)))
    for colour, (label, names, y, marker, offset) in zip(draw.COLOURS, series):
        means = [100 * rows[name]["mean"] for name in names]
        errors = [100 * (rows[name]["standard_error"] or 0) for name in names]
        axes.errorbar(means, y, xerr=errors, fmt=marker, color=colour, capsize=3, label=label)
        for value, position in zip(means, y):
            axes.annotate(f"{value:.1f}", (value, position), (0, offset), color=colour,
                          textcoords="offset points", ha="center", fontsize="small")  # fmt: skip
    axes.set_yticks(range(len(steps)), steps)
    axes.set(xlabel="final accuracy (%)", ylim=(len(steps) - 0.4, -0.8))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower left")
    iterations = runs[0]["constants"]["ITERATIONS"]
    axes.set_title(draw.title(f"What each component brings at {iterations} iterations", runs))
    return figure


if __name__ == "__main__":
    run_command(main)
