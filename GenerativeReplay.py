"""Deep Generative Replay: the experiment, for a scholar of solver and generator.

Class-incremental Split MNIST by default: one head, no task identity, and past data is never seen
again, only generated. It leaves a table, figures and files of results.
"""

import os
import sys
from typing import Annotated, Literal, get_args

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from figures.lab.constants import (
    Constants,
    Cores,
    Device,
    Distinct,
    Folder,
    Seed,
    Share,
    UserError,
    read_options,
    run_command,
    unknown,
)

Strategy = Literal["replay", "naive", "joint", "er"]

# --------------------------------------------------------------------------------------------------
# Constants of this script. Edit them here, or give them on the command line: BATCH_SIZE = 64 is
# `--batch-size 64`, SEEDS = (0, 1, 2) is `--seeds 0 1 2`, None is `none`.
DATASET: str = "auto"  # mnist, fashion, kmnist, digits, a folder of images; auto: mnist or digits
DATA_DIR: Folder = os.environ.get("DATA_DIR") or "data"  # of mnist etc., downloaded if missing
IMAGE_SIZE: PositiveInt | None = None  # pixels to resize a folder's images to; none: 32 if needed
VALIDATION_SIZE: NonNegativeInt = 0  # training images to test on instead, for choosing constants
SCENARIO: Literal["class", "domain", "permuted"] = "class"  # new classes, domains or pixel orders
N_EXPERIENCES: PositiveInt = 5  # experiences that the classes are divided among
CLASS_ORDER: tuple[NonNegativeInt, ...] = ()  # labels in the order of arrival; empty: 0 1 2 ...
SHUFFLE_CLASSES: bool = False  # another order of the classes for each seed instead
SEEDS: Distinct[Seed] = (0,)  # one run each
STRATEGIES: Distinct[Strategy] = ("replay",)  # or naive (fine-tuning), joint, er (stored images)

ITERATIONS: PositiveInt | None = None  # minibatches per experience; none: 1600, 300 for digits
BATCH_SIZE: PositiveInt = 64  # current images in a minibatch
REPLAY_SIZE: NonNegativeInt | None = None  # replayed; none: BATCH_SIZE, times k-1 for the solver
INCREASING_REPLAY_SIZE: bool = False  # double it (or BATCH_SIZE) at each experience after the 2nd
RATIO: Share | None = None  # r, weight of current images in the loss; none: 1/k at experience k
TEMPERATURE: PositiveFloat | None = 2.0  # T of the old solver's soft targets; none: hard labels
LEARNING_RATE: PositiveFloat = 0.003  # of Adam; 0.001 suits layers of 1000 units better
ONE_CYCLE: bool = True  # the rate rises and is annealed to 0 in each experience (Smith & Topin)
HIDDEN_UNITS: PositiveInt = 400  # in each of the two hidden layers of solver, encoder, decoder

NORMALIZE: bool = True  # solver and encoder see (x - mean) / std of the first experience's pixels
INPUT_SHIFT: NonNegativeInt | None = None  # solver's random shift, pixels; none: 1 if a margin
INPUT_DROPOUT: Annotated[float, Field(ge=0, lt=1)] = 0.2  # share of its pixels hidden in training
LATENT_SIZE: PositiveInt = 32  # dimensions of the latent variable z
KL_WEIGHT: PositiveFloat = 0.07  # β, weight of the divergence; 1: the ELBO itself
MIXTURE_COMPONENTS: NonNegativeInt = 100  # Gaussians per class, at most; 0: z from N(0, I)

BFLOAT16: bool | None = None  # mixed precision; none: where an x86 CPU has it
DEVICE: Device = "auto"  # cpu, cuda, cuda:1, mps; auto: an accelerator if there is one
THREADS: Cores | None = None  # of a run; none: OMP_NUM_THREADS, or 1
N_JOBS: Cores = 1  # runs at the same time, each in a process
SCHEDULER: str | None = None  # tcp://host:8786: a Dask scheduler whose workers run them instead
TENSORBOARD: bool = False  # log curves for TensorBoard, in the run's folder
RESULTS_DIR: Folder = "results"  # where results and figures go
# --------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    options = read_options(sys.modules[__name__])  # --help and mistakes end here, before imports

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch
from avalanche.benchmarks import CLScenario
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.logging import TensorboardLogger
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor, nn
from torchvision.transforms import v2

from figures import draw
from figures.lab import data, report
from figures.lab.baselines import ExperienceReplayPlugin, JointPlugin, images_in_memory_of
from figures.lab.runs import Run, setup, side_by_side, with_generator
from Generator import make_generator_strategy, training_arguments
from TrainingInstances import (
    DeepGenerativeReplayPlugin,
    GenerativeReplay,
    LossRecorder,
    ReplayTemplate,
)

# --- The experiment -------------------------------------------------------------------------------


def main(constants: Constants) -> None:
    """Run the experiment for each strategy and seed, then draw table and figures."""
    constants = setup(constants)
    images = data.load_images(constants)
    constants = data.fill_in(constants, images)
    plans = [{"strategy": strategy, "constants": constants} for strategy in constants.STRATEGIES]
    runs = side_by_side(experiment, plans, images, constants)
    draw.summarize(runs, Path(constants.RESULTS_DIR))


def experiment(
    strategy: Strategy, constants: Constants, seed: int, images: data.Images,
    name: str = "", make_generator: Callable = make_generator_strategy,
) -> dict:  # fmt: skip
    """Train a scholar along the stream, evaluate it after each experience, and record the results.

    A finished run is not run again; an interrupted one goes on after its last experience.

    :param images: the data set; without its tensors it is loaded here.
    :param name: name in tables and figures; empty: that of the strategy.
    :param make_generator: see `make_scholar`; the folder's name depends on its name.
    :return: the record, with the `folder` it lies in.
    """
    with Run(constants, images, strategy, seed, name, make_generator.__name__) as run:
        if run.finished:
            return run.result
        setup(constants)  # again: this may be another process
        torch.manual_seed(seed)
        constants = data.shuffle_classes(constants)
        images = images if images.train else data.load_images(constants, quiet=True)
        benchmark = data.make_benchmark(images, constants)
        logs = run.folder if constants.TENSORBOARD else None
        scholar = make_scholar(benchmark, constants, strategy, make_generator, logs)
        run.record |= data.stream_names(images, constants)
        run.record |= {"accuracy_matrix": [], "task_accuracy_matrix": []}

        for experience in run.remaining(benchmark, scholar):
            scholar.train(experience)  # the solver, then the generator
            metrics = scholar.eval(benchmark.test_stream)
            accuracies = report.by_experience(metrics, "Top1_Acc_Exp")
            run.record["accuracy_matrix"].append(accuracies)
            task_accuracies = report.task_accuracies(scholar.model, benchmark.test_stream)
            run.record["task_accuracy_matrix"].append(task_accuracies)
            for what, losses in loss_curves(scholar).items():
                run.arrays[f"{what}_loss"].append(losses)
            if isinstance(scholar, GenerativeReplay):
                with torch.random.fork_rng():  # pictures must not change the training
                    samples = samples_per_class(scholar, run.record["label_order"])
                run.arrays["samples"].append(samples)
            so_far = mean(accuracies[: experience.current_experience + 1])
            run.save(scholar, f"accuracy so far {so_far:.2%}")

        matrix = run.record["accuracy_matrix"]
        run.record |= {
            "final_accuracy": mean(matrix[-1]),
            "final_task_accuracy": mean(run.record["task_accuracy_matrix"][-1]),
            "forgetting": report.forgetting(matrix),
            "confusion_matrix": report.confusions(scholar.model, benchmark.test_stream),
        }
        run.finish()
        return run.result


# --- The scholar ----------------------------------------------------------------------------------


def make_scholar(
    benchmark: CLScenario, constants: Constants, strategy: Strategy = "replay",
    make_generator: Callable = make_generator_strategy, logs: Path | None = None,
) -> ReplayTemplate:  # fmt: skip
    """Make the scholar: a new solver, a new generator, and the strategy that trains both.

    :param benchmark: the stream that it will learn.
    :param strategy: only `replay` trains the generator; `er` stores images in as many bytes.
    :param make_generator: makes the strategy that trains the generator, with the arguments of
        `make_generator_strategy`; figures/generators.py has others.
    :param logs: folder for the logs of TensorBoard.
    :return: a `GenerativeReplay` strategy, or a `ReplayTemplate`; its `model` is the solver.
    :raises UserError: if the name of the strategy is unknown.
    """
    if strategy not in get_args(Strategy):
        raise UserError(unknown(strategy, get_args(Strategy)))
    solver = make_solver(benchmark, constants)
    arguments = training_arguments("solver", solver, constants)
    arguments["evaluator"] = make_evaluator(logs)
    if strategy == "naive":
        return ReplayTemplate(**arguments)
    replay = {
        "replay_size": constants.REPLAY_SIZE,
        "increasing_replay_size": constants.INCREASING_REPLAY_SIZE,
        "ratio": constants.RATIO,
    }
    generator_strategy = make_generator(benchmark, constants, **replay)  # er takes its size
    plugin = DeepGenerativeReplayPlugin(
        generator_strategy, temperature=constants.TEMPERATURE, **replay
    )
    if strategy == "joint":
        arguments["plugins"].append(JointPlugin(plugin.amount))
        return ReplayTemplate(**arguments)
    if strategy == "er":
        count = images_in_memory_of(generator_strategy.model, benchmark)
        plugin = ExperienceReplayPlugin(count, plugin.amount, plugin.ratio)
        return ReplayTemplate(replay_plugin=plugin, **arguments)
    return GenerativeReplay(replay_plugin=plugin, **arguments)


def make_solver(benchmark: CLScenario, constants: Constants) -> nn.Module:
    """Make the solver: fully connected, with a logit for each class. Edit it here.

    Avalanche's head masks the logits of classes that haven't come yet, as van de Ven et al. do.
    Else each experience would push them down further, and a late class would be hard to learn.
    """
    shape, n_classes = data.shape_and_classes(benchmark)
    units, shift = constants.HIDDEN_UNITS, constants.INPUT_SHIFT
    if shift is None:
        shift = int(constants.SCENARIO != "permuted" and has_margin(benchmark))
    return nn.Sequential(
        data.normalization(benchmark) if constants.NORMALIZE else nn.Identity(),
        # Generated images are a little blurred and a little too typical: shift and dropout keep
        # the solver from recognizing old classes by that. All images of a minibatch, real and
        # replayed, get the same shift.
        TrainOnly(v2.RandomCrop(shape[1:], shift, padding_mode="edge")),
        nn.Dropout(constants.INPUT_DROPOUT),
        nn.Flatten(),
        nn.Linear(math.prod(shape), units), nn.ReLU(),
        nn.Linear(units, units), nn.ReLU(),
        IncrementalClassifier(units, n_classes),
    )  # fmt: skip


class TrainOnly(nn.Sequential):
    """Apply modules, such as random transforms, to the input in training mode only."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the modules' output; in evaluation mode the input unchanged."""
        return super().forward(x) if self.training else x


def has_margin(benchmark: CLScenario) -> bool:
    """Tell whether the outermost pixels hardly vary, so that a shift pushes nothing out of view.

    Digits of MNIST have a margin; clothes of Fashion-MNIST fill the image. The training images of
    the first experience decide, as no later one is known yet.
    """
    x, *_ = data.tensors_of(benchmark.train_stream[0])
    outermost = torch.cat([x[..., (0, -1), :].flatten(), x[..., (0, -1)].flatten()])
    return bool(outermost.std(correction=0) <= x.std(correction=0) / 5)


def make_evaluator(logs: Path | None) -> EvaluationPlugin:
    """Make the evaluator: accuracy on each experience of the test stream.

    :param logs: folder for the logs of TensorBoard, which get the training loss too; None: no logs.
    """
    accuracy = accuracy_metrics(experience=True)
    if logs is None:
        return report.EvaluationOnly(accuracy)
    return EvaluationPlugin(accuracy, loss_metrics(minibatch=True), loggers=TensorboardLogger(logs))


# --- What a run records ---------------------------------------------------------------------------


@torch.no_grad()
def samples_per_class(scholar: GenerativeReplay, labels: list[int]) -> Tensor:
    """Sort 1,000 generated images by the class that the solver sees in them; choose two of each.

    :return: images, shape (2 * classes, C, H, W): for each label the one of which the solver is
        surest, and the first of the others; NaN where there is none.
    """
    plugin = scholar.replay_plugin
    x, seen = plugin.generator.generate(1000), torch.tensor(plugin.seen_classes)
    logits = scholar.model.eval()(x.to(scholar.device))[:, seen].cpu()
    certainty, index = logits.double().softmax(1).max(1)  # as float, many would be equally sure
    pictures = torch.full((len(labels), 2, *x.shape[1:]), torch.nan)
    for pair, label in zip(pictures, labels):
        rows = (seen[index] == label).nonzero().flatten()
        if len(rows):
            surest = rows[certainty[rows].argmax()]
            two = torch.cat([surest[None], rows[rows != surest][:1]])
            pair[: len(two)] = x[two]
    return pictures.flatten(0, 1)


def loss_curves(scholar: ReplayTemplate) -> dict[str, Tensor]:
    """Return the latest experience's losses of solver and generator, shape (iterations,)."""
    strategies = with_generator(scholar)  # that of another generator may have no plugins
    plugins = [plugin for each in strategies for plugin in getattr(each, "plugins", [])]
    return {p.name: torch.tensor(p.losses) for p in plugins if isinstance(p, LossRecorder)}


if __name__ == "__main__":
    run_command(lambda: main(options))
