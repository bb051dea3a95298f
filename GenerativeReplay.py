"""Deep Generative Replay: the experiment, for a scholar of solver and generator.

In:  the constants below and those of Generator.py.  Out: accuracy on every experience after every
experience, as results.json, table and figures, for class-incremental Split MNIST.
One head, no task identity, and past data is never seen again: only generated.
Run: `python GenerativeReplay.py`, or with `--help`.  This is the last of the four.
"""

import json
import math
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import Generator

# ------------------------------------------------------------------------------------------------
# Constants of the experiment. All others, from DATASET to RESULTS_DIR, stand at the top of
# Generator.py and are options here too: `python GenerativeReplay.py --seeds 0 1 2`.
STRATEGIES = ("replay",)  # replay; naive: no replay, only fine-tuning; joint: all data so far
INPUT_SHIFT = 1  # pixels by which the solver's images are moved at random while it trains
INPUT_DROPOUT = 0.2  # share of pixels hidden from the solver while it trains
REPLAY_LABELS = "solver"  # who labels replayed images: the old solver; or the generator
TEMPERATURE = 2.0  # T of the old solver's soft targets; none: hard labels
ABLATION = False  # instead of STRATEGIES, all from plain replay to this recipe, with both bounds
N_JOBS = 1  # runs at the same time, each in a process of its own
FORCE = False  # run anew what is finished already
# ------------------------------------------------------------------------------------------------

# The ingredients, in the order in which the ablation adds them to plain replay, and how each is
# turned off.
INGREDIENTS = {
    "input dropout": {"INPUT_DROPOUT": 0},
    "input shift": {"INPUT_SHIFT": 0},
    "annealing": {"ANNEAL": False, "LEARNING_RATE": 0.001},
    "soft targets": {"TEMPERATURE": None},
    "latent mixtures": {"MIXTURE_COMPONENTS": 0, "LATENT_SIZE": 100},
    "KL weight": {"KL_WEIGHT": 1},
}
PLAIN = {name: off for step in INGREDIENTS.values() for name, off in step.items()}

RULES = {
    "STRATEGIES": (
        lambda v: (
            type(v) in (tuple, list)
            and all(word in ("replay", "naive", "joint") for word in v)
            and len(v) == len(set(v)) > 0
        ),
        "one or more of replay, naive, joint",
    ),
    "INPUT_SHIFT": (Generator.whole(0), "an integer, 0 or more"),
    "INPUT_DROPOUT": (
        lambda v: Generator.number(v) and 0 <= v < 1,
        "a number from 0 to below 1",
    ),
    "REPLAY_LABELS": (lambda v: v in ("solver", "generator"), "solver or generator"),
    "TEMPERATURE": (lambda v: v is None or Generator.positive(v), "a positive number, or none"),
    "ABLATION": (lambda v: type(v) is bool, "true or false"),
    "N_JOBS": (Generator.whole(1), "a positive integer"),
    "FORCE": (lambda v: type(v) is bool, "true or false"),
}


def main() -> None:
    """Run the experiment for each strategy and seed, then summarize."""
    from joblib import Parallel, delayed

    constants, images = Generator.prepare(Generator, sys.modules[__name__])
    for _, strategy, variant in variants(constants):  # ends the program here if one can't be made
        make_scholar(images.train[0].shape[1:], variant, replay=strategy == "replay")
    runs = Parallel(constants.N_JOBS)(  # which divides the threads among the processes
        delayed(run)(*variant, seed, images)
        for variant in variants(constants)
        for seed in constants.SEEDS
    )
    summarize(runs, constants)


def variants(constants: SimpleNamespace) -> list[tuple[str, str, SimpleNamespace]]:
    """What is to be run for each seed: its name in tables, its strategy, its constants."""
    if not constants.ABLATION:
        return [(strategy, strategy, constants) for strategy in constants.STRATEGIES]
    if constants.GENERATOR != "vae":
        Generator.fail("ABLATION takes the VAE apart; set GENERATOR to 'vae'")
    steps, plain = [], PLAIN
    for name in ("plain replay", *INGREDIENTS):
        plain = {k: v for k, v in plain.items() if k not in INGREDIENTS.get(name, ())}
        step = SimpleNamespace(**vars(constants) | plain)
        steps.append((f"+ {name}" if steps else name, "replay", step))
    return [*steps, ("naive", "naive", constants), ("joint", "joint", constants)]


def run(name: str, strategy: str, constants: SimpleNamespace, seed: int, images) -> dict:
    """Train a new scholar along the stream; return and write what came out (results.json)."""
    import torch

    from figures import draw

    started = time.perf_counter()
    folder = Generator.run_folder(constants, images.name, strategy, seed)
    if (folder / "results.json").exists() and not constants.FORCE:
        print(f"{name}, seed {seed}: finished already, in {folder}", flush=True)
        finished = json.loads((folder / "results.json").read_text())
        return finished | {"name": name, "notice": images.notice}
    constants = Generator.for_seed(constants, seed)
    benchmark = Generator.make_benchmark(images, constants, cumulative=strategy == "joint")
    scholar = make_scholar(images.train[0].shape[1:], constants, replay=strategy == "replay")
    matrix, memories = [], []

    for experience in benchmark.train_stream:
        scholar.train(experience)
        metrics = scholar.eval(benchmark.test_stream)
        matrix.append(Generator.metric_row(metrics, "Top1_Acc_Exp", constants.N_EXPERIENCES))
        if strategy == "replay":
            memories.append(remember(scholar, constants.CLASS_ORDER))
        so_far = mean(matrix[-1][: len(matrix)])
        text = f"accuracy so far {so_far:.2%}"
        Generator.report(f"{name}, seed {seed}", experience, constants, text, started)

    print_matrix(matrix)
    record = Generator.run_record(constants, images, strategy, seed, started)
    record["accuracy_matrix"] = matrix
    record["final_accuracy"] = mean(matrix[-1])
    record["forgetting"] = forgetting(matrix)
    if memories:
        arrays = {"samples": torch.stack(memories).cpu().numpy()}
        Generator.write(folder / "samples.npz", arrays)
        Generator.write(folder / "samples.png", draw.memories(record, arrays))
    Generator.write(folder / "accuracy_matrix.png", draw.accuracy_matrix(record))
    Generator.write(folder / "results.json", record)  # last: it says that the run is finished
    return record | {"name": name}


def make_scholar(shape: tuple[int, int, int], constants: SimpleNamespace, replay: bool = True):
    """The scholar: a new solver, a new generator, and the strategy that trains both.

    :param shape: shape of one image, (channels, height, width).
    :param replay: whether there is a generator at all; else it is plain fine-tuning.
    :return: a `GenerativeReplay` strategy (without replay a `ScholarTemplate`); `model` is the
        solver, its logits are one per class.
    """
    from avalanche.evaluation.metrics import accuracy_metrics
    from torch import nn
    from torch.nn.functional import cross_entropy
    from torchvision.transforms import v2

    from TrainingInstances import (
        EvaluationOnly,
        GenerativeReplay,
        ScholarTemplate,
        WhileTraining,
        knows_classes,
    )

    units = constants.HIDDEN_UNITS
    solver = nn.Sequential(
        # The past comes as the generator paints it, a little blurred and a little too typical.
        # Without the next two the solver learns that blurred means old, and takes sharp test
        # images for the newest classes. A shift is that of a whole minibatch, real and painted.
        WhileTraining(v2.RandomCrop(shape[1:], padding=constants.INPUT_SHIFT)),
        nn.Dropout(constants.INPUT_DROPOUT),
        nn.Flatten(),
        nn.Linear(math.prod(shape), units), nn.ReLU(),
        nn.Linear(units, units), nn.ReLU(),
        nn.Linear(units, len(constants.CLASS_ORDER)),
    )  # fmt: skip
    common = {
        "model": solver,
        **Generator.training(
            solver, constants.LEARNING_RATE, constants.ITERATIONS, constants.ANNEAL
        ),
        "train_mb_size": constants.BATCH_SIZE,
        "eval_mb_size": 1000,
        "evaluator": EvaluationOnly(accuracy_metrics(experience=True)),
        "device": constants.DEVICE,
    }
    if not replay:
        return ScholarTemplate(criterion=cross_entropy, **common)
    generator_strategy = Generator.make_generator_strategy(shape, constants)
    if constants.REPLAY_LABELS == "generator":
        if not knows_classes(generator_strategy.model):
            which = f"{constants.GENERATOR!r} (as it is here) doesn't know the class it paints"
            Generator.fail(f"REPLAY_LABELS is 'generator', but {which}; set it to 'solver'")
        if constants.TEMPERATURE is not None:
            Generator.fail("REPLAY_LABELS 'generator' gives hard labels; set TEMPERATURE to none")
    return GenerativeReplay(
        generator_strategy=generator_strategy,
        replay_size=constants.REPLAY_SIZE,
        increasing_replay_size=constants.INCREASING_REPLAY_SIZE,
        ratio=constants.RATIO,
        temperature=constants.TEMPERATURE,
        labels=constants.REPLAY_LABELS,
        **common,
    )


def remember(scholar, class_order: tuple[int, ...]):
    """What the scholar remembers: 1,000 generated images, sorted by the class its solver sees.

    :return: images, shape (2 * len(class_order), C, H, W): for each class in the order of the
        stream the one that the solver is surest of and the first, so an ordinary one; NaN where
        a class is not (or no longer) among the images.
    """
    import torch

    x, seen = scholar.replay.generator.generate(1000), scholar.replay.seen_classes
    x = x.to(scholar.device)
    with torch.no_grad():
        certainty, index = scholar.model.eval()(x)[:, seen].softmax(1).max(1)
    pictures = torch.full((len(class_order), 2, *x.shape[1:]), torch.nan)
    for pair, label in zip(pictures, class_order):
        rows = (seen[index] == label).nonzero().flatten()
        if len(rows):
            pair[0] = x[rows[certainty[rows].argmax()]]
            pair[1] = x[rows[0]]
    return pictures.flatten(0, 1)


def forgetting(matrix: list[list[float]]) -> float:
    """Mean over the earlier experiences of best accuracy ever minus final accuracy.

    Chaudhry et al. 2018 (arXiv 1801.10112), section 3.1: the best is over all experiences but the
    last. Zero for a single experience.

    :param matrix: row i: accuracy on every experience after training on experience i.
    """
    *earlier, last = matrix
    drops = [max(row[j] for row in earlier[j:]) - last[j] for j in range(len(earlier))]
    return mean(drops) if drops else 0.0


def print_matrix(matrix: list[list[float]]) -> None:
    """Print the accuracy matrix in percent, a line for each experience learned."""
    print("accuracy matrix (%): after each experience (rows) on each experience (columns)")
    for number, row in enumerate(matrix, 1):
        print(f"{number:4} " + "".join(f"{100 * accuracy:7.2f}" for accuracy in row))


def summarize(runs: list[dict], constants: SimpleNamespace) -> None:
    """Mean and standard error over the seeds: a printed table, summary.json and figures."""
    from figures import draw

    shared = ("dataset", "notice", "versions")
    summary = {key: runs[0][key] for key in shared} | {
        "constants": vars(constants), "seeds": constants.SEEDS, "results": {}
    }  # fmt: skip
    keys = ("final_accuracy", "forgetting", "seconds")
    print(f"\n{'':34}final accuracy     forgetting  seconds")
    for name in dict.fromkeys(run["name"] for run in runs):
        own = [run for run in runs if run["name"] == name]
        results = {key: over_seeds([run[key] for run in own]) for key in keys}
        summary["results"][name] = results
        for run in own:
            values = f"{run['final_accuracy']:14.2%} {run['forgetting']:14.2%}"
            print(f"{name + ', seed ' + str(run['seed']):34}{values} {run['seconds']:8.0f}")
        if len(own) > 1:
            accuracy, lost, seconds = results.values()
            values = (f"{r['mean']:.2%} ± {r['standard_error']:.2%}" for r in (accuracy, lost))
            print(f"{name + ', mean ± std. error':34}", end="")
            print(*(f"{value:>14}" for value in values), f"{seconds['mean']:8.0f}")
    folder = Path(constants.RESULTS_DIR)
    Generator.write(folder / "summary.json", summary)
    Generator.write(folder / "accuracy.png", draw.accuracy_so_far(runs))
    if constants.ABLATION:
        Generator.write(folder / "ablation.png", draw.ablation(summary))
    if runs[0]["notice"]:
        print(f"These are numbers of {runs[0]['notice']}.")
    print(f"Results and figures are in {folder}")
    Generator.show_windows()


def over_seeds(values: list[float]) -> dict:
    """Mean and standard error (of the mean; None for a single value), and the values."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": mean(values), "standard_error": error, "values": values}


if __name__ == "__main__":
    main()
