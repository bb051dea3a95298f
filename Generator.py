"""The generator of the scholar as a trainable strategy, and a visualizer of its samples.

`make_generator_strategy` wraps the generator in a strategy, to be passed to
`DeepGenerativeReplayPlugin`. Run as a script it trains the generator alone along the stream, and
draws its samples and reconstructions after each experience.
"""

import os
import sys
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from figures.lab.constants import (
    Constants,
    Cores,
    Device,
    Distinct,
    Folder,
    Seed,
    read_options,
    run_command,
)

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
ITERATIONS: PositiveInt | None = None  # minibatches per experience; none: 1600, 300 for digits
BATCH_SIZE: PositiveInt = 64  # current images in a minibatch
NORMALIZE: bool = True  # solver and encoder see (x - mean) / std of the first experience's pixels
LEARNING_RATE: PositiveFloat = 0.003  # of Adam; 0.001 suits layers of 1000 units better
ONE_CYCLE: bool = True  # the rate rises and is annealed to 0 in each experience (Smith & Topin)
HIDDEN_UNITS: PositiveInt = 400  # in each of the two hidden layers of solver, encoder, decoder
LATENT_SIZE: PositiveInt = 32  # dimensions of the latent variable z
KL_WEIGHT: PositiveFloat = 0.07  # β, weight of the divergence; 1: the ELBO itself
MIXTURE_COMPONENTS: NonNegativeInt = 100  # Gaussians per class, at most; 0: z from N(0, I)
BFLOAT16: bool | None = None  # mixed precision; none: where an x86 CPU has it
DEVICE: Device = "auto"  # cpu, cuda, cuda:1, mps; auto: an accelerator if there is one
THREADS: Cores | None = None  # of a run; none: OMP_NUM_THREADS, or 1
RESULTS_DIR: Folder = "results"  # where results and figures go
# --------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    options = read_options(sys.modules[__name__])  # --help and mistakes end here, before imports

import torch
from avalanche.benchmarks import CLScenario
from torch import nn
from torch.optim import Adam

from figures import draw
from figures.lab import data, report
from figures.lab.progress import ProgressBar
from figures.lab.runs import Run, setup
from GenerativeModel import VAE, ClassConditionalGMM
from TrainingInstances import (
    DeepGenerativeReplayPlugin,
    LossRecorder,
    OneCyclePlugin,
    ReplayAlignmentPlugin,
    VAETraining,
)

# --- The generator as a strategy ------------------------------------------------------------------


def make_generator_strategy(
    benchmark: CLScenario, constants: Constants,
    plugin: type[DeepGenerativeReplayPlugin] | None = None, **replay,
) -> VAETraining:  # fmt: skip
    """Wrap a new generator in its training strategy.

    :param benchmark: the stream that it will learn.
    :param plugin: class of its replay plugin; None: with alignment, if there is a density.
    :param replay: replay_size, increasing_replay_size, ratio; see `DeepGenerativeReplayPlugin`.
    :return: a strategy with the generator as `model`, and `train(experience, **kwargs)`.
    """
    shape, _ = data.shape_and_classes(benchmark)
    normalize = data.normalization(benchmark) if constants.NORMALIZE else None
    components, latent_size = constants.MIXTURE_COMPONENTS, constants.LATENT_SIZE
    density = ClassConditionalGMM(components, latent_size) if components else None
    vae = VAE(shape, constants.HIDDEN_UNITS, latent_size, density, normalize)
    plugin = plugin or (ReplayAlignmentPlugin if density else DeepGenerativeReplayPlugin)
    return VAETraining(
        replay_plugin=plugin(**replay),
        kl_weight=constants.KL_WEIGHT,
        **training_arguments("generator", vae, constants),
    )


def training_arguments(name: str, model: nn.Module, constants: Constants) -> dict:
    """Collect the arguments of any strategy: model, Adam, length of training, plugins.

    :param name: name of the model in messages.
    """
    optimizer = Adam(model.parameters(), lr=constants.LEARNING_RATE, fused=True)
    schedule = [OneCyclePlugin(optimizer)] if constants.ONE_CYCLE else []
    return {
        "model": model,
        "optimizer": optimizer,
        "iterations": constants.ITERATIONS or 1600,
        "train_mb_size": constants.BATCH_SIZE,
        "eval_mb_size": 1000,
        "plugins": [ProgressBar(name), LossRecorder(name), *schedule],
        "bfloat16": constants.BFLOAT16,
        "device": constants.DEVICE,
    }


# --- The visualizer -------------------------------------------------------------------------------


def main(constants: Constants) -> None:
    """Train the generator along the stream, once for each seed, and draw its samples."""
    constants = setup(constants)
    images = data.load_images(constants)
    constants = data.fill_in(constants, images)
    for seed in constants.SEEDS:
        experiment(images, constants, seed)


def experiment(images: data.Images, constants: Constants, seed: int) -> None:
    """Train on each experience, then evaluate, sample and reconstruct; draw the picture."""
    with Run(constants, images, "generator", seed) as run:
        if not run.finished:
            torch.manual_seed(seed)
            constants = data.shuffle_classes(constants)
            benchmark = data.make_benchmark(images, constants)
            strategy = make_generator_strategy(benchmark, constants)
            generator = strategy.model
            run.record |= data.stream_names(images, constants) | {"loss_matrix": []}
            originals = data.first_of_each_class(benchmark, run.record["label_order"])
            originals = originals.to(constants.DEVICE)

            for experience in run.remaining(benchmark, strategy):
                strategy.train(experience)
                metrics = strategy.eval(benchmark.test_stream)
                losses = report.by_experience(metrics, "Loss_Exp")
                run.record["loss_matrix"].append(losses)
                with torch.random.fork_rng():  # pictures must not change the training
                    run.arrays["samples"].append(generator.generate(20).cpu())
                run.arrays["reconstructions"].append(generator.reconstruct(originals).cpu())
                loss = losses[experience.current_experience]
                run.save(strategy, f"loss on its images {loss:.1f}")

            run.arrays["originals"] = originals.cpu()
            run.finish()
        picture = run.folder / "generator.png"
        if draw.save(draw.generator, [run.result], picture):
            print(f"{run.title}: {picture}")


if __name__ == "__main__":
    run_command(lambda: main(options))
