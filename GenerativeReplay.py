"""Deep Generative Replay: the experiment, for a scholar of solver and generator.

Class-incremental Split MNIST by default: one head, no task identity, and past data is never seen
again, only generated. Out come table, figures and files of results.
"""

import json
import math
import os
import sys
from pathlib import Path
from statistics import mean
from typing import Annotated, Literal

from joblib import Parallel, delayed, parallel_config
from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt

import Generator
from figures import results
from figures.results import UserError
from Generator import Distinct, Images

Strategy = Literal["replay", "naive", "joint", "er"]

# ------------------------------------------------------------------------------------------------
# Constants of the experiment. Those of data, stream, training and generator (DATASET, SEEDS,
# ITERATIONS, GENERATOR, ...) stand at the top of Generator.py and are options here too.
STRATEGIES: Distinct[Strategy] = ("replay",)  # naive: fine-tuning; joint: all data; er: stored data
REPLAY_SIZE: NonNegativeInt | None = None  # replayed images in a minibatch; none: as many as real
INCREASING_REPLAY_SIZE: bool = False  # double that number at each experience after the second
RATIO: Annotated[float, Field(ge=0, le=1)] | None = None  # r, weight of current data; none: 1/k
TEMPERATURE: PositiveFloat | None = 2.0  # T of the old solver's soft targets; none: hard labels
REPLAY_LABELS: Literal["solver", "generator"] = "solver"  # source of the labels of replayed images
INPUT_SHIFT: NonNegativeInt | None = None  # random shift of images; none: 1 if they have a margin
INPUT_DROPOUT: Annotated[float, Field(ge=0, lt=1)] = 0.2  # share of pixels hidden in training
N_JOBS: PositiveInt = 1  # runs at the same time, each a process with its share of the cores
SCHEDULER: str | None = None  # tcp://host:8786: a Dask scheduler whose workers run them instead
TENSORBOARD: bool = False  # log curves for TensorBoard, in the run's folder
# ------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the experiment for each strategy and seed, then draw table and figures."""
    constants = Generator.read_constants(Generator, sys.modules[__name__])
    images, constants = Generator.prepare(constants)
    planned = [(strategy, constants, strategy) for strategy in constants.STRATEGIES]
    runs = run_all(planned, images, constants)
    from figures import draw

    draw.summarize(runs, Path(constants.RESULTS_DIR))


def run_all(
    planned: list[tuple[str, BaseModel, str]], images: Images, constants: BaseModel
) -> list[dict]:
    """Run each plan with each seed, N_JOBS at the same time.

    :param planned: strategy, constants, and name in tables and figures.
    :return: the records of the runs.
    """
    benchmark = Generator.make_benchmark(images, constants)
    for strategy, changed, _ in planned:  # end before any run if one can't be built
        try:
            make_scholar(benchmark, changed, strategy)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"the scholar can't be built: {error}") from error
    images = images._replace(train=(), test=())  # each process loads them itself
    with backend(constants):
        return Parallel()(
            delayed(run)(strategy, changed, seed, name, images)
            for strategy, changed, name in planned
            for seed in constants.SEEDS
        )


def backend(constants: BaseModel):
    """Choose where joblib runs: in processes of this machine, or on the workers of SCHEDULER."""
    if constants.SCHEDULER is None:
        # joblib cleans up what an interruption leaves behind, and need not say so.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
        return parallel_config("loky", n_jobs=constants.N_JOBS)
    try:
        from dask.distributed import Client

        client = Client(constants.SCHEDULER, timeout=10)
        for ask in client.run_on_scheduler, client.run:  # else joblib would wait for ever
            ask(lambda: bool(__import__("GenerativeReplay")))
    except (OSError, ValueError):
        raise UserError(f"no Dask scheduler answers at {constants.SCHEDULER}") from None
    except ImportError as error:
        raise UserError(
            f"SCHEDULER needs `pip install distributed` here, and the scripts' folder in the "
            f"PYTHONPATH of scheduler and workers ({error})"
        ) from None
    return parallel_config("dask", client=client)


def run(strategy: str, constants: BaseModel, seed: int, name: str, images: Images) -> dict:
    """Train a scholar along the stream, evaluate it after each experience, and record the results.

    A finished run is not run again; an interrupted one goes on after its last experience.

    :param strategy: one of `STRATEGIES`.
    :param name: its name in tables and figures.
    :param images: the data set, without its tensors.
    :return: the record, with the `folder` it lies in.
    """
    import torch

    title, folder = f"{name}, seed {seed}", results.run_folder(constants, images, strategy, seed)
    with results.run_lock(folder, title):
        if (folder / "results.json").exists():
            print(f"{title}: finished already, in {folder}", flush=True)
            record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            return record | {"name": name, "notice": images.notice, "folder": folder}
        constants = Generator.seeded(constants, seed)
        benchmark = Generator.make_benchmark(Generator.load_images(constants), constants)
        scholar = make_scholar(benchmark, constants, strategy, folder)
        record = results.new_record(constants, images, name, seed) | {"accuracy_matrix": []}
        record["experiences"], names = Generator.stream_names(images, constants)
        record |= {"classes": [names[y] for y in sorted(names)], "label_order": list(names)}
        state = {"record": record, "samples": [], "losses": []}

        for experience in results.resumable(benchmark.train_stream, scholar, folder, state):
            scholar.train(experience)  # the solver, then the generator
            metrics = scholar.eval(benchmark.test_stream)
            record["accuracy_matrix"].append(Generator.metric_row(metrics, "Top1_Acc_Exp"))
            state["losses"].append(losses(scholar))
            if scholar.replay:
                state["samples"].append(samples_per_class(scholar, list(names)))
            so_far = record["accuracy_matrix"][-1][: experience.current_experience + 1]
            state["progress"] = f"accuracy so far {mean(so_far):.2%}"

        matrix = record["accuracy_matrix"]
        record |= {"final_accuracy": mean(matrix[-1]), "forgetting": forgetting(matrix)}
        record["confusion_matrix"] = confusions(scholar, benchmark.test_stream)
        if samples := state["samples"]:
            results.save_arrays(folder / "samples.npz", samples=torch.stack(samples).numpy())
        of_all = {key: [part[key] for part in state["losses"]] for key in state["losses"][0]}
        results.save_arrays(folder / "losses.npz", **of_all)
        results.save_record(folder / "results.json", record)  # last: the run is finished
    return record | {"folder": folder}


# --- The scholar ----------------------------------------------------------------------------------


def make_scholar(
    benchmark, constants: BaseModel, strategy: str = "replay", folder: Path | None = None
):
    """Make the scholar: a new solver, a new generator, and the strategy that trains both.

    :param benchmark: from `Generator.make_benchmark`, `in_memory_benchmark` or `load_in_memory`.
    :param constants: from `Generator.prepare`; for another benchmark from `read_constants`,
        with ITERATIONS and DEVICE set (README, Make it yours).
    :param strategy: one of `STRATEGIES`; without replay there is no generator.
    :param folder: folder for the logs of TensorBoard.
    :return: a `GenerativeReplay` strategy, or a `ReplayTemplate`; its `model` is the solver.
    """
    import TrainingInstances as instances

    solver = make_solver(benchmark, constants)
    arguments = Generator.training_arguments(
        "solver", solver, constants, constants.ITERATIONS, lr=constants.LEARNING_RATE
    )
    arguments["evaluator"] = make_evaluator(folder if constants.TENSORBOARD else None)
    if strategy in ("naive", "joint"):
        arguments["plugins"] += [JointPlugin()] if strategy == "joint" else []
        return instances.ReplayTemplate(**arguments)
    replay = {
        "replay_size": constants.REPLAY_SIZE,
        "increasing_replay_size": constants.INCREASING_REPLAY_SIZE,
        "ratio": constants.RATIO,
    }
    generator_strategy = Generator.make_generator_strategy(benchmark, constants, **replay)
    if strategy == "er":
        # As many images as fit into the bytes of the generator, with its mixtures of the whole
        # stream, if a pixel takes one byte.
        generator = generator_strategy.model
        size = sum(part.numel() * part.element_size() for part in generator.state_dict().values())
        if getattr(generator, "density", None):
            mixtures = sum(len(e.classes_in_this_experience) for e in benchmark.train_stream)
            size += mixtures * generator.density.bytes_per_mixture
        shape, *_ = Generator.properties(benchmark, constants)
        arguments["plugins"].append(ExperienceReplayPlugin(size // math.prod(shape)))
        return instances.ReplayTemplate(**arguments)
    plugin = instances.DeepGenerativeReplayPlugin(
        generator_strategy,
        temperature=constants.TEMPERATURE,
        replay_labels=constants.REPLAY_LABELS,
        **replay,
    )
    return instances.GenerativeReplay(replay=plugin, **arguments)


def make_solver(benchmark, constants: BaseModel):
    """Make the solver: fully connected, with a logit for each class. Edit it here."""
    from torch import nn
    from torchvision.transforms import v2

    from TrainingInstances import TrainOnly

    shape, n_classes, normalize = Generator.properties(benchmark, constants)
    units = constants.HIDDEN_UNITS
    shift = constants.INPUT_SHIFT
    if shift is None:
        shift = int(has_margin(benchmark))
    return nn.Sequential(
        normalize,
        # Generated images are a little blurred and a little too typical: shift and dropout are to
        # keep the solver from telling old classes by that. All images of a minibatch, real and
        # replayed, get the same shift.
        TrainOnly(v2.RandomCrop(shape[1:], shift, padding_mode="edge")),
        nn.Dropout(constants.INPUT_DROPOUT),
        nn.Flatten(),
        nn.Linear(math.prod(shape), units), nn.ReLU(),
        nn.Linear(units, units), nn.ReLU(),
        nn.Linear(units, n_classes),
    )  # fmt: skip


def has_margin(benchmark) -> bool:
    """Tell whether the outermost pixels hardly vary, so that a shift pushes nothing out of view.

    Digits of MNIST have a margin; clothes of Fashion-MNIST fill the image, as permuted pixels do.
    The training images of the whole stream decide, before the first experience is learned;
    INPUT_SHIFT sets the shift whatever they are.
    """
    import torch

    for experience in benchmark.train_stream:
        x, *_ = experience.dataset.tensors
        outermost = torch.cat([x[..., (0, -1), :].flatten(), x[..., (0, -1)].flatten()])
        if outermost.std() > x.std() / 5:
            return False
    return True


def make_evaluator(logs: Path | None):
    """Make the evaluator: accuracy on each experience of the test stream.

    :param logs: folder for the logs of TensorBoard, which get the training loss too; None: no logs.
    """
    from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
    from avalanche.logging import TensorboardLogger
    from avalanche.training.plugins import EvaluationPlugin

    from TrainingInstances import EvaluationOnly

    accuracy = accuracy_metrics(experience=True)
    if logs is None:
        return EvaluationOnly(accuracy)
    loggers = [TensorboardLogger(logs)]
    return EvaluationPlugin(accuracy, loss_metrics(minibatch=True), loggers=loggers)


# --- To compare with ------------------------------------------------------------------------------

# Avalanche calls the hooks of a plugin by their names; its base class would import Avalanche early.


class JointPlugin:
    """Train on all experiences so far, as a reference."""

    def after_train_dataset_adaptation(self, strategy, **kwargs):
        """Join the data of the experience and of all before it."""
        import torch

        current = strategy.experience
        so_far = current.origin_stream[: current.current_experience + 1]
        tensors = zip(*(experience.dataset.tensors for experience in so_far))
        strategy.adapted_dataset = torch.utils.data.TensorDataset(*map(torch.cat, tensors))


class ExperienceReplayPlugin:
    """Extend each minibatch by as many stored real images (er), all weighted alike: r = 1/2.

    A reservoir (Vitter 1985): every image gets a random key, and those with the largest are stored.
    Unlike the datasets in Avalanche's `ReplayPlugin` they are plain tensors, which the saved state
    of a run can hold.

    :param mem_size: number of images to store.
    """

    saved = ("stored",)

    def __init__(self, mem_size: int):
        self.mem_size = mem_size
        self.stored = []  # images, class labels, task labels, keys

    def before_training_iteration(self, strategy, **kwargs):
        """Concatenate stored images, their labels and task labels to the minibatch."""
        import torch

        if self.stored:
            rows = torch.randint(len(self.stored[0]), (len(strategy.mb_x),))
            pairs = zip(strategy.mbatch, self.stored)
            strategy.mbatch = [torch.cat([new, old[rows].to(new.device)]) for new, old in pairs]

    def after_training_exp(self, strategy, **kwargs):
        """Choose among the stored images and those of the experience."""
        import torch

        new = [*strategy.experience.dataset.tensors, torch.rand(len(strategy.experience.dataset))]
        if self.stored:
            new = [torch.cat(pair) for pair in zip(new, self.stored, strict=True)]
        chosen = new[-1].argsort(descending=True)[: self.mem_size]
        self.stored = [part[chosen] for part in new]


# --- Measurements ---------------------------------------------------------------------------------


def samples_per_class(scholar, labels: list[int]):
    """Sort 1,000 generated images by the class that the solver sees in them, and choose two each.

    :return: images, shape (2 * classes, C, H, W): for each label the one of which the solver is
        surest, and the first; NaN where a class isn't among the images.
    """
    import torch

    x, seen = scholar.replay.generator.generate(1000), torch.tensor(scholar.replay.seen_classes)
    x, seen = x.to(scholar.device), seen.to(scholar.device)
    with torch.no_grad():
        certainty, index = scholar.model.eval()(x)[:, seen].softmax(1).max(1)
    pictures = torch.full((len(labels), 2, *x.shape[1:]), torch.nan)
    for pair, label in zip(pictures, labels):
        rows = (seen[index] == label).nonzero().flatten()
        if len(rows):
            pair[0] = x[rows[certainty[rows].argmax()]]
            pair[1] = x[rows[0]]
    return pictures.flatten(0, 1).cpu()


def forgetting(matrix: list[list[float]]) -> float:
    """Average over the earlier experiences the best accuracy before the last one minus the final.

    Chaudhry et al. 2018 (arXiv 1801.10112), section 3.1. Zero for a single experience, negative
    where the last one has helped.

    :param matrix: row i: accuracy on every experience after training on experience i.
    """
    *earlier, last = matrix
    drops = [max(row[j] for row in earlier[j:]) - last[j] for j in range(len(earlier))]
    return mean(drops) if drops else 0.0


def confusions(scholar, stream) -> list[list[int]]:
    """Count the labels that the solver sees (columns) in the images of each label (rows).

    Avalanche's metric counts image by image, which takes as long as the rest of an evaluation.
    """
    import torch
    from sklearn.metrics import confusion_matrix

    solver, pairs = scholar.model.eval(), []
    with torch.no_grad():
        for x, y, _ in (experience.dataset.tensors for experience in stream):
            pairs.append((y, solver(x.to(scholar.device)).argmax(1).cpu()))
    return confusion_matrix(*map(torch.cat, zip(*pairs))).tolist()


def losses(scholar) -> dict:
    """Return the latest experience's losses of solver and generator, shape (iterations,)."""
    from TrainingInstances import LossRecorder

    plugins = list(scholar.plugins)
    if scholar.replay:  # that of a user's generator may have no plugins
        plugins += getattr(scholar.replay.generator_strategy, "plugins", [])
    recorders = [plugin for plugin in plugins if isinstance(plugin, LossRecorder)]
    return {recorder.name: recorder.losses.cpu() for recorder in recorders}


if __name__ == "__main__":
    results.run_command(main)
