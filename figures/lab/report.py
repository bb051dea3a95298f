"""The numbers of a run, and the statistics of several runs."""

import csv
import math
from io import StringIO
from pathlib import Path
from statistics import mean, stdev

import torch
from avalanche.benchmarks import CLStream
from avalanche.evaluation.metric_results import MetricValue
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.templates import SupervisedTemplate
from sklearn.metrics import confusion_matrix
from torch.nn import Module

from figures.lab.constants import UserError
from figures.lab.data import tensors_of
from figures.lab.runs import read_record

# --- One run --------------------------------------------------------------------------------------


class EvaluationOnly(EvaluationPlugin):
    """Evaluate, and skip the hooks of a training iteration.

    Avalanche's plugin copies the experience at each of them, a third of a millisecond per iteration
    even if no metric listens.
    """

    def publish_metric_value(self, mval: MetricValue):
        """Publish a metric of evaluation.

        :raises ValueError: if it is one of training, whose hooks are skipped.
        """
        if "/train_phase/" in mval.name:
            raise ValueError(f"{mval.name} needs Avalanche's EvaluationPlugin as evaluator")
        super().publish_metric_value(mval)

    def skip(self, strategy: SupervisedTemplate, **kwargs):
        """Do nothing."""

    before_training_iteration = before_forward = after_forward = before_backward = skip
    after_backward = before_update = after_update = after_training_iteration = skip


def by_experience(metrics: dict, name: str, stream: str = "test_stream") -> list[float]:
    """Return one of Avalanche's metrics on each experience of a stream, in its order.

    Avalanche's `eval` returns what it has last measured on other streams too.
    """
    beginning = f"{name}/eval_phase/{stream}/"
    values = {key: float(of) for key, of in metrics.items() if key.startswith(beginning)}
    return [values[key] for key in sorted(values, key=lambda key: int(key.split("/Exp")[-1]))]


def forgetting(matrix: list[list[float]]) -> float:
    """Average over the earlier experiences the best accuracy before the last one minus the final.

    Chaudhry et al. 2018 (arXiv 1801.10112), section 3.1. Zero for a single experience, negative
    where the last one has helped.

    :param matrix: row i: accuracy on every experience after training on experience i.
    """
    *earlier, last = matrix
    drops = [max(row[j] for row in earlier[j:]) - last[j] for j in range(len(earlier))]
    return mean(drops) if drops else 0.0


@torch.no_grad()
def task_accuracies(solver: Module, stream: CLStream) -> list[float]:
    """Compute the accuracy on each experience if the solver is told which one it is.

    It chooses among the classes of the experience alone: the task-incremental accuracy of a solver
    with one head, trained without task identity.
    """
    solver, accuracies, device = solver.eval(), [], next(solver.parameters()).device
    for x, y, _ in map(tensors_of, stream):
        classes = y.unique()
        chosen = classes[solver(x.to(device)).cpu()[:, classes].argmax(1)]
        accuracies.append((chosen == y).float().mean().item())
    return accuracies


@torch.no_grad()
def confusions(solver: Module, stream: CLStream) -> list[list[int]]:
    """Count the labels that the solver sees (columns) in the images of each label (rows).

    Avalanche's metric counts image by image, which takes as long as the rest of an evaluation.
    """
    solver, pairs, device = solver.eval(), [], next(solver.parameters()).device
    for x, y, _ in map(tensors_of, stream):
        pairs.append((y, solver(x.to(device)).argmax(1).cpu()))
    return confusion_matrix(*map(torch.cat, zip(*pairs))).tolist()


# --- Several runs ---------------------------------------------------------------------------------

KEYS = ("final_accuracy", "final_task_accuracy", "forgetting", "seconds")


def read_runs(folder: Path) -> list[dict]:
    """Read the records of the runs in a folder or, if it has none, in its subfolders.

    Each also gets the `folder` it lies in. Folders of the same name hold the same run: it counts
    once.
    """
    files = sorted(folder.glob("*/results.json")) or sorted(folder.rglob("results.json"))
    files = {file.parent.name: file for file in files}.values()
    runs = [read_record(path) | {"folder": path.parent} for path in files]
    if not runs:
        raise UserError(f"there is no results.json in or below {str(folder)!r}")
    return named_apart(runs)


def named_apart(runs: list[dict]) -> list[dict]:
    """Tell runs of one name apart: by data set, and by hash if their constants differ."""
    datasets = {run["dataset"] for run in runs}
    kinds = {(run["dataset"], run["name"], kind(run)) for run in runs}
    names = [names for *names, _ in kinds]
    named = []
    for run in runs:
        name = run["name"]
        if names.count([run["dataset"], name]) > 1:
            name += f" ({kind(run).rpartition('-')[2]})"
        if len(datasets) > 1:
            name = f"{run['dataset']}, {name}"
        named.append(run | {"name": name})
    return named


def kind(run: dict) -> str:
    """Return what a run has in common with those of other seeds: its folder without the seed."""
    return run["folder"].name.rpartition("-seed")[0]


def by_name(runs: list[dict]) -> dict[str, list[dict]]:
    """Group runs of the same name."""
    names = dict.fromkeys(run["name"] for run in runs)
    return {name: [run for run in runs if run["name"] == name] for name in names}


def over_seeds(values: list[float]) -> dict:
    """Compute mean and standard error (None for a single value); keep the values."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": mean(values), "standard_error": error, "values": values}


def statistics(runs: list[dict]) -> dict:
    """Summarize runs: for each name its seeds, its constants, and `KEYS` over the seeds."""
    return {
        name: {key: group[0][key] for key in ("dataset", "notice", "constants", "versions")}
        | {"seeds": [run["seed"] for run in group]}
        | {key: over_seeds([run[key] for run in group]) for key in KEYS}
        for name, group in by_name(runs).items()
    }


def table(runs: list[dict]) -> str:
    """Format accuracies, forgetting, seconds: a line for each run, and for each name its mean."""
    width = max(len(run["name"]) for run in runs) + 19
    titles = "final accuracy", "if task is known", "forgetting"
    lines = [f"{'':{width}}" + "".join(f"{title:>17}" for title in titles) + f"{'seconds':>9}"]
    for name, row in statistics(runs).items():
        for seed, *numbers in zip(row["seeds"], *(row[key]["values"] for key in KEYS)):
            label = f"{name}, seed {seed}"
            lines.append("{:{}}{:17.2%}{:17.2%}{:17.2%}{:9.0f}".format(label, width, *numbers))
        if len(row["seeds"]) > 1:
            pairs = (f"{row[k]['mean']:.2%} ± {row[k]['standard_error']:.2%}" for k in KEYS[:3])
            label, seconds = f"{name}, mean ± s.e.", row["seconds"]["mean"]
            lines.append("{:{}}{:>17}{:>17}{:>17}{:9.0f}".format(label, width, *pairs, seconds))
    return "\n".join(lines)


def tidy(runs: list[dict]) -> str:
    """Format the accuracy matrices as CSV, a row for each number; experiences count from 1."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["strategy", "seed", "experience_trained", "experience_tested"]
    writer.writerow([*columns, "accuracy", "task_accuracy"])
    for run in runs:
        matrices = zip(run["accuracy_matrix"], run["task_accuracy_matrix"], strict=True)
        for trained, rows in enumerate(matrices, 1):
            for tested, accuracies in enumerate(zip(*rows, strict=True), 1):
                writer.writerow([run["name"], run["seed"], trained, tested, *accuracies])
    return text.getvalue()
