"""Deep Generative Replay: the experiment, for a scholar of solver and generator.

In:  the constants below and those of Generator.py.  Out: accuracy on every experience after every
experience, as results.json, table and figures, for class-incremental Split MNIST.
One head, no task identity, and past data is never seen again: only generated.
Run: `python GenerativeReplay.py`, or with `--help`.  This is the last of the four.
"""

import math
import os
import sys
import time
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import Generator

# ------------------------------------------------------------------------------------------------
# Constants of the experiment. All others, from DATASET to RESULTS_DIR, stand at the top of
# Generator.py and are options here too: `python GenerativeReplay.py --seeds 0 1 2`.
STRATEGIES = ("replay",)  # replay; naive: fine-tuning; joint: all data; buffer: stored images
INPUT_SHIFT = 1  # pixels by which the solver's images are moved at random while it trains
INPUT_DROPOUT = 0.2  # share of pixels hidden from the solver while it trains
REPLAY_LABELS = "solver"  # who labels replayed images: the old solver; or the generator
TEMPERATURE = 2.0  # T of the old solver's soft targets; none: hard labels
ABLATION = False  # instead of STRATEGIES, all from plain replay to this recipe, with both bounds
COMPARE_GENERATORS = False  # instead of STRATEGIES, replay with each generator, and how it paints
N_JOBS = 1  # runs at the same time, each in a process of its own with its share of the cores
BACKEND = "loky"  # loky: processes on this machine; dask: the workers of SCHEDULER, see README
SCHEDULER = "tcp://127.0.0.1:8786"  # address of a Dask scheduler
TENSORBOARD = False  # log curves, samples and confusions for TensorBoard, in the run's folder
SUMMARIZE = None  # folder of results to draw table and figures from, without running anything
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
    "STRATEGIES": Generator.several(Generator.one_of("replay", "naive", "joint", "buffer")),
    "INPUT_SHIFT": Generator.whole(0, 27),
    "INPUT_DROPOUT": Generator.number(lambda v: 0 <= v < 1, "a number from 0 to below 1"),
    "REPLAY_LABELS": Generator.one_of("solver", "generator"),
    "TEMPERATURE": Generator.none_or(Generator.POSITIVE),
    "ABLATION": Generator.BOOLEAN,
    "COMPARE_GENERATORS": Generator.BOOLEAN,
    "N_JOBS": Generator.whole(1),
    "BACKEND": Generator.one_of("loky", "dask"),
    "SCHEDULER": Generator.rule(
        lambda v: type(v) is str and "://" in v, "an address such as tcp://host:8786"
    ),
    "TENSORBOARD": Generator.BOOLEAN,
    "SUMMARIZE": Generator.none_or(Generator.FOLDER),
}


def main() -> None:
    """Run the experiment for each strategy and seed, then summarize."""
    constants = Generator.read_constants(Generator, sys.modules[__name__])
    if constants.LOAD is not None:
        return Generator.look(Path(constants.LOAD), constants)
    if constants.SUMMARIZE is not None:
        folder = Path(constants.SUMMARIZE)  # of runs, or with a folder of runs from each machine
        files = sorted(folder.glob("*/results.json")) or sorted(folder.rglob("results.json"))
        runs = {file.parent.name: file.parent for file in files}  # a copy of a run is no other
        return summarize([(None, run) for run in runs.values()], folder)
    images, planned = Generator.prepare(constants), variants(constants)
    for _, strategy, own in planned:  # ends the program here if one can't be made
        make_scholar(images.train[0].shape[1:], own, strategy)
    from joblib import Parallel, delayed

    with processes(constants):
        finished = Parallel()(
            delayed(run)(*variant, seed, images.notice)
            for variant in planned
            for seed in constants.SEEDS
        )
    summarize(finished, Path(constants.RESULTS_DIR), images.notice)


def processes(constants: SimpleNamespace):
    """Where joblib's `Parallel` computes: processes of this machine, or workers of a Dask cluster.

    :raises SystemExit: if Dask is not installed, or nobody answers.
    """
    from joblib import parallel_config

    if constants.BACKEND == "loky":  # which divides the threads among the processes
        # What an interruption leaves behind is cleaned up by joblib, which need not say so.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
        return parallel_config("loky", n_jobs=constants.N_JOBS)
    try:
        from dask.distributed import Client

        client = Client(constants.SCHEDULER, timeout=10)
        for ask in client.run_on_scheduler, client.run:  # else it would wait for them for ever
            ask(lambda: bool(__import__("GenerativeReplay")))
    except OSError:
        Generator.fail(f"no Dask scheduler answers at {constants.SCHEDULER}; set SCHEDULER")
    except ImportError as error:
        Generator.fail(
            "BACKEND 'dask' needs `pip install distributed` here, and a scheduler and workers "
            f"that were started with PYTHONPATH set to the scripts' folder ({error})"
        )
    return parallel_config("dask", client=client)


def variants(constants: SimpleNamespace) -> list[tuple[str, str, SimpleNamespace]]:
    """What is to be run for each seed: its name in tables, its strategy, its constants."""

    def changed(**changes) -> SimpleNamespace:
        return SimpleNamespace(**vars(constants) | changes)

    if constants.COMPARE_GENERATORS:
        return [(name, "replay", changed(GENERATOR=name)) for name in Generator.GENERATORS]
    if not constants.ABLATION:
        return [(strategy, strategy, constants) for strategy in constants.STRATEGIES]
    if constants.GENERATOR != "vae":
        Generator.fail("ABLATION takes the VAE apart; set GENERATOR to 'vae'")
    steps, plain = [], PLAIN
    for name in ("plain replay", *INGREDIENTS):
        plain = {k: v for k, v in plain.items() if k not in INGREDIENTS.get(name, ())}
        steps.append((f"+ {name}" if steps else name, "replay", changed(**plain)))
    return [*steps, ("naive", "naive", constants), ("joint", "joint", constants)]


def run(
    name: str, strategy: str, constants: SimpleNamespace, seed: int, notice: str
) -> tuple[str, Path]:
    """One run, unless it is finished already; return its name and the folder with its results.

    :param name: what tables call it.
    :param strategy: one of `STRATEGIES`.
    :param notice: what has to be said of the images, see `Generator.load_images`.
    """
    folder = Generator.run_folder(constants, constants.DATASET, strategy, seed)
    title = f"{name}, seed {seed}"
    with Generator.only_process(folder, title, constants.FORCE):
        if (folder / "results.json").exists():
            Generator.report(constants, f"{title}: finished already, in {folder}")
        else:
            constants = Generator.for_seed(constants, seed)
            record = Generator.run_record(constants, name, strategy, seed, notice)
            learn(record, constants, folder, title)
    return name, folder


def learn(record: dict, constants: SimpleNamespace, folder: Path, title: str) -> None:
    """Train a scholar along the stream, and write what came out into the run's folder.

    If the run was interrupted, it goes on after the last experience that was finished.

    :param record: what results.json is to say, but for the results.
    """
    import torch

    from figures import tables

    strategy = record["strategy"]
    images = Generator.load_images(constants.DATASET, constants.DATA_DIR, constants.CHECKSUMS)
    benchmark = Generator.make_benchmark(images, constants, cumulative=strategy == "joint")
    logs = folder / "tensorboard" if constants.TENSORBOARD else None
    scholar = make_scholar(images.train[0].shape[1:], constants, strategy, logs)
    memories = []
    if state := Generator.restore(folder, scholar):
        record, memories = state["record"], state["memories"]
        learned = len(record["accuracy_matrix"])
        Generator.report(constants, f"{title}: goes on after experience {learned}")
    matrix = record.setdefault("accuracy_matrix", [])
    started = time.perf_counter() - record["seconds"]

    for experience in benchmark.train_stream[len(matrix) :]:
        scholar.train(experience)
        metrics = scholar.eval(benchmark.test_stream)
        matrix.append(Generator.metric_row(metrics, "Top1_Acc_Exp", constants.N_EXPERIENCES))
        record["seconds"] = round(time.perf_counter() - started, 1)
        if strategy == "replay":
            memories.append(remember(scholar, constants.CLASS_ORDER))
        log_more(scholar, benchmark.test_stream, record, memories)
        Generator.save_state(folder, constants, scholar, record=record, memories=memories)
        so_far = mean(matrix[-1][: len(matrix)])
        text = f"{title}: experience {len(matrix)}/{constants.N_EXPERIENCES}, "
        text += f"accuracy so far {so_far:.2%}, {record['seconds']:.0f} s"
        Generator.report(constants, text)

    record |= {
        "final_accuracy": mean(matrix[-1]),
        "forgetting": forgetting(matrix),
        "confusion_matrix": confusions(scholar, benchmark.test_stream),
    }
    Generator.report(constants, f"{title}: {matrix_in_words(matrix)}")
    if constants.COMPARE_GENERATORS:
        held_out = Generator.hold_out(images, constants.VALIDATION_SIZE)
        record["sample_quality"] = quality(scholar, held_out)
    if memories:
        Generator.write(folder / "samples.npz", {"samples": torch.stack(memories).numpy()})
    Generator.write(folder / "losses.npz", losses(scholar))
    Generator.write(folder / "metrics.csv", tables.tidy([record]))
    Generator.write(folder / "results.json", record)  # last: it says that the run is finished


def make_scholar(
    shape: tuple[int, int, int],
    constants: SimpleNamespace,
    strategy: str = "replay",
    logs: Path | None = None,
):
    """The scholar: a new solver, a new generator, and the strategy that trains both.

    :param shape: shape of one image, (channels, height, width).
    :param strategy: one of `STRATEGIES`; without replay there is no generator.
    :param logs: folder for those of TensorBoard; None: no logs.
    :return: a `GenerativeReplay` strategy (without replay a `ScholarTemplate`); `model` is the
        solver, its logits are one per class.
    """
    from TrainingInstances import GenerativeReplay, ScholarTemplate, StoredImages, knows_classes

    solver = make_solver(shape, constants)
    common = Generator.strategy_arguments("solver", solver, constants)
    common["evaluator"] = make_evaluator(logs)
    if strategy in ("naive", "joint"):
        return ScholarTemplate(**common)
    generator_strategy = Generator.make_generator_strategy(shape, constants)
    if strategy == "buffer":
        # As many images as fit into the generator's bytes, with one byte for a pixel.
        state = generator_strategy.model.state_dict().values()
        size = sum(part.numel() * part.element_size() for part in state)
        common["plugins"].append(StoredImages(size // math.prod(shape)))
        return ScholarTemplate(**common)
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


def make_solver(shape: tuple[int, int, int], constants: SimpleNamespace):
    """The solver: fully connected, with as many logits as there are classes. Edit it here.

    :param shape: shape of one image, (channels, height, width).
    """
    from torch import nn
    from torchvision.transforms import v2

    from TrainingInstances import WhileTraining

    units = constants.HIDDEN_UNITS
    return nn.Sequential(
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


def make_evaluator(logs: Path | None):
    """What is measured: accuracy on each experience of the test stream.

    :param logs: folder for the logs of TensorBoard, which get the losses of training too; None: no
        logs.
    """
    from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
    from avalanche.logging import TensorboardLogger
    from avalanche.training.plugins import EvaluationPlugin

    from TrainingInstances import EvaluationOnly

    accuracy = accuracy_metrics(experience=True)
    if logs is None:
        return EvaluationOnly(accuracy)
    loggers = [TensorboardLogger(str(logs))]
    return EvaluationPlugin(accuracy, loss_metrics(minibatch=True), loggers=loggers)


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
    return pictures.flatten(0, 1).cpu()


def forgetting(matrix: list[list[float]]) -> float:
    """Mean over the earlier experiences of best accuracy ever minus final accuracy.

    Chaudhry et al. 2018 (arXiv 1801.10112), section 3.1: the best is over all experiences but the
    last. Zero for a single experience.

    :param matrix: row i: accuracy on every experience after training on experience i.
    """
    *earlier, last = matrix
    drops = [max(row[j] for row in earlier[j:]) - last[j] for j in range(len(earlier))]
    return mean(drops) if drops else 0.0


def confusions(scholar, stream) -> list[list[int]]:
    """How often the solver sees which class (columns) in the images of which class (rows).

    Avalanche's metric counts image by image, which takes as long as all the rest of an evaluation.
    """
    import torch
    from sklearn.metrics import confusion_matrix

    solver, pairs = scholar.model.eval(), []
    with torch.no_grad():
        for x, y, _ in (experience.dataset.tensors for experience in stream):
            pairs.append((y, solver(x.to(scholar.device)).argmax(1).cpu()))
    return confusion_matrix(*map(torch.cat, zip(*pairs))).tolist()


def log_more(scholar, stream, record: dict, memories: list) -> None:
    """Log for TensorBoard, if it is wanted, what Avalanche's evaluation of the solver doesn't."""
    from figures import draw

    for logger in scholar.evaluator.loggers:
        if not hasattr(logger, "writer"):  # of one's own
            continue
        step = len(record["accuracy_matrix"])
        run = record | {"confusion_matrix": confusions(scholar, stream)}
        logger.writer.add_figure("confusions", draw.confusion_matrix([run]), step)
        if memories:
            logger.writer.add_images("samples", memories[-1].nan_to_num(), step)
        for curve in losses(scholar).get("generator", [])[-1:]:
            for iteration, loss in enumerate(curve, (step - 1) * len(curve)):
                logger.writer.add_scalar("Loss_MB/generator", loss, iteration)


def quality(scholar, images: SimpleNamespace) -> dict:
    """How well the scholar paints at the end, and how many parameters its generator has."""
    import torch

    replay = scholar.replay
    with torch.no_grad():
        x, y = replay.paint(2000, replay.generator, scholar.model.eval())
    parameters = sum(part.numel() for part in replay.generator.parameters())
    return Generator.sample_quality(images, x, y) | {"parameters": parameters}


def matrix_in_words(matrix: list[list[float]]) -> str:
    """The accuracy matrix in percent, a line for each experience learned."""
    title = "accuracy matrix (%): rows after, columns on each experience"
    rows = ("".join(f"{100 * accuracy:7.2f}" for accuracy in row) for row in matrix)
    return "\n".join([title, *(f"{number:4} {row}" for number, row in enumerate(rows, 1))])


def losses(scholar) -> dict:
    """Losses of solver and generator, arrays of shape (experiences, iterations)."""
    import torch

    from TrainingInstances import Progress

    strategies = {"solver": scholar}
    if scholar.replay is not None:
        strategies["generator"] = scholar.replay.generator_strategy
    return {
        name: torch.stack(plugin.losses).numpy()
        for name, strategy in strategies.items()
        for plugin in getattr(strategy, "plugins", [])  # one's own may have none
        if isinstance(plugin, Progress)
    }


def summarize(
    finished: list[tuple[str | None, Path]], folder: Path, notice: str | None = None
) -> None:
    """Table, summary.json, metrics.csv and figures of several runs, from their files alone.

    :param finished: names of runs in the table (None: those in their files), and their folders.
    :param folder: where to write.
    :param notice: what has to be said of the images; None: what the files say.
    :raises SystemExit: if there are none, or one can't be read.
    """
    from figures import draw, tables

    try:
        steps = "plain replay", *(f"+ {name}" for name in INGREDIENTS)
        names = [*steps, "replay", "naive", "joint", "buffer", *Generator.GENERATORS]
        runs = tables.read_runs(finished, names, notice)
    except (OSError, ValueError, KeyError) as error:
        Generator.fail(f"results can't be read ({error}); move damaged folders away")
    if not runs:
        Generator.fail(f"there is no results.json in or below {str(folder)!r}")
    print("\n" + tables.table(runs))
    for text in {run["notice"] for run in runs} - {""}:
        print(f"These are numbers of {text}.")
    Generator.write(folder / "summary.json", {"results": tables.statistics(runs)})
    Generator.write(folder / "metrics.csv", tables.tidy(runs))
    Generator.write_figures(folder / "figures", draw.all_figures(runs))
    print(f"Results are in {folder}, figures in {folder / 'figures'}")


if __name__ == "__main__":
    Generator.interruptible(main)
