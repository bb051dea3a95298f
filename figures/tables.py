"""The numbers of several runs, from their results alone: statistics, a table, tidy rows.

A run is what results.json holds, with its `name` in tables and the `folder` it lies in.
"""

import csv
import json
import math
from io import StringIO
from pathlib import Path
from statistics import mean, stdev

KEYS = ("final_accuracy", "forgetting", "seconds")
QUALITY = ("label_accuracy", "precision", "recall")


def read_runs(
    named_folders: list[tuple[str | None, Path]], order: list[str], notice: str | None = None
) -> list[dict]:
    """Runs from the folders that they left, those of one name together.

    :param named_folders: pairs of a name, or None for the one in the file, and a folder.
    :param order: the names that are known, in the order in which they are to come.
    :param notice: replaces that in the files unless it is None.
    """
    runs = []
    for name, folder in named_folders:
        run = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        run |= {"name": name or run["name"], "folder": folder}
        runs.append(run if notice is None else run | {"notice": notice})
    known = {name: place for place, name in enumerate(order)}
    runs.sort(key=lambda run: known.get(run["name"], len(known)))
    datasets = {run["dataset"] for run in runs}
    kinds = {(run["dataset"], run["name"], kind(run)) for run in runs}
    names = [names for *names, _ in kinds]
    for run in runs:  # what was run with several constants or data sets gets them into its name
        if names.count([run["dataset"], run["name"]]) > 1:
            run["name"] += f" ({kind(run).rpartition('-')[2]})"
        if len(datasets) > 1:
            run["name"] = f"{run['dataset']}, {run['name']}"
    order = list(dict.fromkeys(run["name"] for run in runs))
    return sorted(runs, key=lambda run: order.index(run["name"]))


def kind(run: dict) -> str:
    """What a run has in common with those of other seeds: its folder's name without the seed."""
    return run["folder"].name.rpartition("-seed")[0]


def by_name(runs: list[dict]) -> dict[str, list[dict]]:
    """Runs of the same name together."""
    names = dict.fromkeys(run["name"] for run in runs)
    return {name: [run for run in runs if run["name"] == name] for name in names}


def over_seeds(values: list[float]) -> dict:
    """Mean and standard error (of the mean; None for a single value), and the values."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": mean(values), "standard_error": error, "values": values}


def statistics(runs: list[dict]) -> dict:
    """For each name its seeds, its constants, and each of `KEYS` over the seeds (summary.json)."""
    return {
        name: {
            "dataset": own[0]["dataset"],
            "notice": own[0]["notice"],
            "constants": own[0]["constants"],
            "versions": own[0]["versions"],
            "seeds": [run["seed"] for run in own],
            **{key: over_seeds([run[key] for run in own]) for key in KEYS},
            **{
                key: over_seeds([run["sample_quality"][key] for run in own])
                for key in own[0].get("sample_quality", ())
            },
        }
        for name, own in by_name(runs).items()
    }


def table(runs: list[dict]) -> str:
    """Final accuracy, forgetting and seconds: a line for each run, and for each name its mean."""
    width = max(len(run["name"]) for run in runs) + 19
    lines = [f"{'':{width}}{'final accuracy':>17}{'forgetting':>17}{'seconds':>9}"]
    for name, row in statistics(runs).items():
        values = zip(row["seeds"], *(row[key]["values"] for key in KEYS))
        for seed, accuracy, lost, seconds in values:
            label = f"{name}, seed {seed}"
            lines.append(f"{label:{width}}{accuracy:17.2%}{lost:17.2%}{seconds:9.0f}")
        if len(row["seeds"]) > 1:
            label, (accuracy, lost, seconds) = f"{name}, mean ± s.e.", (row[key] for key in KEYS)
            both = (f"{k['mean']:.2%} ± {k['standard_error']:.2%}" for k in (accuracy, lost))
            lines.append(f"{label:{width}}" + "".join(f"{text:>17}" for text in both)
                         + f"{seconds['mean']:9.0f}")  # fmt: skip
        if "precision" in row:
            painted = (f"{key.replace('_', ' ')} {row[key]['mean']:.1%}" for key in QUALITY)
            count = f"{row['parameters']['mean']:,.0f} parameters"
            lines.append(f"  {count}; samples: {', '.join(painted)}")
    return "\n".join(lines)


def tidy(runs: list[dict]) -> str:
    """The accuracy matrices as CSV, one row for each number; experiences count from 1."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["strategy", "seed", "experience_trained", "experience_tested", "accuracy"])
    for run in runs:
        for trained, row in enumerate(run["accuracy_matrix"], 1):
            for tested, accuracy in enumerate(row, 1):
                writer.writerow([run["name"], run["seed"], trained, tested, accuracy])
    return text.getvalue()
