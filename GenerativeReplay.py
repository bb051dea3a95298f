"""Deep Generative Replay: the experiment, for a scholar of solver and generator.

In:  the constants below and those of Generator.py.  Out: accuracy on every experience after every
experience, as results.json, table and figures, for class-incremental Split MNIST.
One head, no task identity, and past data is never seen again: only generated.
Run: `python GenerativeReplay.py`, or with `--help`.  This is the last of the four.
"""

import math
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import Generator

# ------------------------------------------------------------------------------------------------
# Constants of the solver. All others, from DATASET to RESULTS_DIR, stand at the top of Generator.py
# and are options here too: `python GenerativeReplay.py --seeds 0 1 2 --replay-size 64`.
INPUT_DROPOUT = 0.3  # share of pixels hidden from the solver while it trains; 0: plain replay
# ------------------------------------------------------------------------------------------------

RULES = {
    "INPUT_DROPOUT": (
        lambda v: Generator.number(v) and 0 <= v < 1,
        "a number from 0 to below 1",
    ),
}


def main() -> None:
    """Run the experiment for each seed, then summarize."""
    constants, images, benchmark = Generator.prepare(Generator, sys.modules[__name__])
    runs = [run(benchmark, images, constants, seed) for seed in constants.SEEDS]
    summarize(runs, constants)


def run(benchmark, images, constants: SimpleNamespace, seed: int) -> dict:
    """Train a new scholar along the stream; return and write what came out (results.json)."""
    import torch

    from figures import draw

    started = time.perf_counter()
    torch.manual_seed(seed)
    scholar = make_scholar(images.train[0].shape[1:], constants)
    matrix, memories = [], []

    for experience in benchmark.train_stream:
        scholar.train(experience, iterations=constants.ITERATIONS)
        metrics = scholar.eval(benchmark.test_stream)
        matrix.append(Generator.metric_row(metrics, "Top1_Acc_Exp", constants.N_EXPERIENCES))
        memories.append(remember(scholar, constants.CLASS_ORDER))
        so_far = mean(matrix[-1][: len(matrix)])
        Generator.report(experience, constants, f"accuracy so far {so_far:.2%}", started)

    print_matrix(matrix)
    strategy = "naive" if constants.REPLAY_SIZE == 0 else "replay"
    record = Generator.run_record(constants, images, strategy, seed, started)
    record["accuracy_matrix"] = matrix
    record["final_accuracy"] = mean(matrix[-1])
    record["forgetting"] = forgetting(matrix)
    folder = Generator.run_folder(constants, images.name, strategy, seed)
    arrays = {"samples": torch.stack(memories).cpu().numpy()}
    Generator.write(folder / "results.json", record)
    Generator.write(folder / "samples.npz", arrays)
    Generator.write(folder / "samples.png", draw.memories(record, arrays))
    Generator.write(folder / "accuracy_matrix.png", draw.accuracy_matrix(record))
    return record


def make_scholar(shape: tuple[int, int, int], constants: SimpleNamespace):
    """The scholar: a new solver, a new generator, and the strategy that trains both.

    :param shape: shape of one image, (channels, height, width).
    :return: a `GenerativeReplay` strategy; `model` is the solver, its logits are one per class.
    """
    from avalanche.evaluation.metrics import accuracy_metrics
    from torch import nn, optim

    from TrainingInstances import EvaluationOnly, GenerativeReplay

    units = constants.HIDDEN_UNITS
    solver = nn.Sequential(
        nn.Flatten(),
        # The past comes as the generator paints it, a little blurred. Without this the solver
        # learns that blurred means old, and takes sharp test images for the newest classes.
        nn.Dropout(constants.INPUT_DROPOUT),
        nn.Linear(math.prod(shape), units), nn.ReLU(),
        nn.Linear(units, units), nn.ReLU(),
        nn.Linear(units, len(constants.CLASS_ORDER)),
    )  # fmt: skip
    return GenerativeReplay(
        model=solver,
        optimizer=optim.Adam(solver.parameters(), lr=constants.LEARNING_RATE, fused=True),
        generator_strategy=Generator.make_generator_strategy(shape, constants),
        replay_size=constants.REPLAY_SIZE,
        increasing_replay_size=constants.INCREASING_REPLAY_SIZE,
        ratio=constants.RATIO,
        train_mb_size=constants.BATCH_SIZE,
        eval_mb_size=1000,
        evaluator=EvaluationOnly(accuracy_metrics(experience=True)),
        device=constants.DEVICE,
    )


def remember(scholar, class_order: tuple[int, ...]):
    """What the scholar remembers: 1,000 generated images, sorted by the class its solver sees.

    :return: images, shape (2 * len(class_order), C, H, W): for each class in the order of the
        stream the one that the solver is surest of and the first, so an ordinary one; NaN where
        a class is not (or no longer) among the images.
    """
    import torch

    x, seen = scholar.replay.generator.generate(1000), scholar.replay.seen_classes
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
    """Mean and standard error over the seeds: a printed table, summary.json and a figure."""
    from figures import draw

    shared = ("dataset", "notice", "strategy", "constants", "versions")
    summary = {key: runs[0][key] for key in shared} | {"seeds": [run["seed"] for run in runs]}
    for key in ("final_accuracy", "forgetting", "seconds"):
        values = [run[key] for run in runs]
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        summary[key] = {"mean": mean(values), "standard_error": error, "values": values}
    folder = Path(constants.RESULTS_DIR)
    Generator.write(folder / "summary.json", summary)
    Generator.write(folder / "accuracy.png", draw.accuracy_so_far(runs))

    print("\nseed  final accuracy  forgetting  seconds")
    for run in runs:
        accuracy, lost = run["final_accuracy"], run["forgetting"]
        print(f"{run['seed']:4}  {accuracy:14.2%}  {lost:10.2%}  {run['seconds']:7.0f}")
    if len(runs) > 1:
        accuracy, lost = summary["final_accuracy"], summary["forgetting"]
        print(
            f"mean ± standard error: final accuracy {accuracy['mean']:.2%} ± "
            f"{accuracy['standard_error']:.2%}, forgetting {lost['mean']:.2%} ± "
            f"{lost['standard_error']:.2%}"
        )
    if runs[0]["notice"]:
        print(f"These are numbers of {runs[0]['notice']}.")
    print(f"Results and figures are in {folder}")
    Generator.show_windows()


if __name__ == "__main__":
    main()
