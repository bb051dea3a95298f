"""The generator of the scholar as a trainable strategy, and a visualizer of its samples.

`make_generator_strategy` wraps the generator into a strategy, to be passed to
`DeepGenerativeReplayPlugin`. Run as a script it trains the generator alone along the stream, and
draws its samples and reconstructions after each experience. The constants, the data and the stream
serve both scripts.
"""

import argparse
import json
import os
import re
import socket
import sys
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal, NamedTuple, TypeVar

import joblib
import numpy as np
import pydantic
from filelock import FileLock
from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt

from figures import results
from figures.results import UserError

T = TypeVar("T")
without_repetition = pydantic.AfterValidator(lambda values: tuple(dict.fromkeys(values)))
Distinct = Annotated[tuple[T, ...], Field(min_length=1), without_repetition]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]

# ------------------------------------------------------------------------------------------------
# Constants of both scripts. Edit them here, or give them on the command line: BATCH_SIZE = 64 is
# `--batch-size 64`, SEEDS = (0, 1, 2) is `--seeds 0 1 2`, None is `none`.
# Those of replay (REPLAY_SIZE, RATIO, ...) stand at the top of GenerativeReplay.py.
DATASET: str = "auto"  # mnist, fashion, kmnist, digits, a folder of images; auto: mnist or digits
DATA_DIR: str = os.environ.get("DATA_DIR") or "data"  # where mnist etc. lie, or are downloaded to
IMAGE_SIZE: PositiveInt | None = None  # pixels to resize a folder's images to; none: as they are
VALIDATION_SIZE: NonNegativeInt = 0  # training images to test on instead, for choosing constants
SCENARIO: Literal["class", "domain", "permuted"] = "class"  # new classes, domains or pixel orders
N_EXPERIENCES: PositiveInt = 5  # experiences that the classes are divided among
CLASS_ORDER: tuple[NonNegativeInt, ...] = ()  # labels in the order of arrival; empty: 0 1 2 ...
SHUFFLE_CLASSES: bool = False  # another order of the classes for each seed instead
SEEDS: Distinct[Seed] = (0,)  # one run each
ITERATIONS: PositiveInt | None = None  # minibatches per experience; none: 1600, 300 for digits
BATCH_SIZE: PositiveInt = 64  # real images in a minibatch
NORMALIZE: bool = True  # solver and encoder see (x - mean) / std of the first experience's pixels
LEARNING_RATE: PositiveFloat = 0.003  # of Adam; 0.001 suits layers of 1000 units better
ONE_CYCLE: bool = True  # the rate rises and is annealed to 0 in each experience (Smith & Topin)
HIDDEN_UNITS: PositiveInt = 400  # in each of the two hidden layers of solver, encoder, decoder
GENERATOR: Literal["vae", "cvae", "wgan-gp"] = "vae"  # vae; conditional vae; Wasserstein GAN
GENERATOR_ITERATIONS: PositiveInt | None = None  # none: as the solver; 5 times that for wgan-gp
GENERATOR_LEARNING_RATE: PositiveFloat | None = None  # none: as the solver
LATENT_SIZE: PositiveInt | None = None  # dimensions of the latent variable z; none: 32, 8 for cvae
KL_WEIGHT: PositiveFloat | None = None  # β of a VAE; 1: the ELBO itself; none: 0.07, 1 for cvae
MIXTURE_COMPONENTS: NonNegativeInt = 10  # of vae: Gaussians per class; 0: z from the prior N(0, I)
BFLOAT16: bool | None = None  # mixed precision; none: where an x86 CPU has it; not for wgan-gp
DEVICE: Device = "auto"  # cpu, cuda, cuda:1, mps; auto: an accelerator if there is one
RESULTS_DIR: str = "results"  # where results and figures go
# ------------------------------------------------------------------------------------------------

# torch and Avalanche are imported where they are used: they take ten seconds, and `--help` and
# errors in the constants shouldn't wait for them.


# --- The generator as a strategy ------------------------------------------------------------------


def make_generator_strategy(benchmark, constants: BaseModel, **replay):
    """Wrap a new generator into its training strategy.

    It is trained with the solver's optimizer, batch size, learning rate and iterations unless
    another choice suits it better or the GENERATOR_... constants say so. For a generator of your
    design, add a branch here and its name to GENERATOR.

    :param benchmark: from `make_benchmark`.
    :param replay: replay_size, increasing_replay_size, ratio; see `DeepGenerativeReplayPlugin`.
    :return: a strategy with the generator as `model`, and `train(experience, **kwargs)`.
    """
    from GenerativeModel import VAE, WGAN, ClassConditionalGMM, ConditionalVAE, negative_elbo
    from TrainingInstances import VAETraining, WGANTraining

    constants = settled(constants)
    shape, n_classes, normalize = properties(benchmark, constants)
    units, latent_size = constants.HIDDEN_UNITS, constants.LATENT_SIZE
    adam = {"lr": constants.GENERATOR_LEARNING_RATE}
    loss = partial(negative_elbo, kl_weight=constants.KL_WEIGHT)
    strategy = partial(VAETraining, criterion=loss)
    if constants.GENERATOR == "vae":
        components = constants.MIXTURE_COMPONENTS
        density = ClassConditionalGMM(components, latent_size) if components else None
        model = VAE(shape, units, latent_size, density, normalize)
    elif constants.GENERATOR == "cvae":
        model = ConditionalVAE(shape, n_classes, units, latent_size, normalize)
    else:
        model, strategy = WGAN(shape, units, latent_size), WGANTraining
        adam["betas"] = 0.5, 0.9  # as in Gulrajani et al.'s code for MNIST
    iterations = constants.GENERATOR_ITERATIONS
    arguments = training_arguments("generator", model, constants, iterations, **adam)
    return strategy(**replay, **arguments)


def settled(constants: BaseModel) -> BaseModel:
    """Return the constants with what `none` stands for in those of the generator."""
    kind, iterations = constants.GENERATOR, constants.ITERATIONS
    suitable = {
        "LATENT_SIZE": 8 if kind == "cvae" else 32,
        # A cvae samples z from N(0, I), so its encodings have to keep to that.
        "KL_WEIGHT": 0.07 if kind == "vae" else 1.0,
        # Of the critic's steps every fifth is followed by one of the generator.
        "GENERATOR_ITERATIONS": 5 * iterations if kind == "wgan-gp" else iterations,
        "GENERATOR_LEARNING_RATE": constants.LEARNING_RATE,
    }
    left_open = {name: of for name, of in suitable.items() if getattr(constants, name) is None}
    return constants.model_copy(update=left_open)


def training_arguments(name: str, model, constants: BaseModel, iterations: int, **adam) -> dict:
    """Collect the arguments of any strategy: model, Adam, length of training, plugins.

    :param name: name of the model in messages.
    :param adam: learning rate `lr` and the like.
    """
    from torch.optim import Adam

    from TrainingInstances import LossRecorder, OneCyclePlugin

    optimizer = Adam(model.parameters(), fused=True, **adam)
    schedule = [OneCyclePlugin(optimizer, iterations)] if constants.ONE_CYCLE else []
    return {
        "model": model,
        "optimizer": optimizer,
        "iterations": iterations,
        "train_mb_size": constants.BATCH_SIZE,
        "eval_mb_size": 1000,
        "plugins": [LossRecorder(name), *schedule],
        "bfloat16": constants.BFLOAT16,
        "device": constants.DEVICE,
    }


# --- The visualizer -------------------------------------------------------------------------------


def main() -> None:
    """Train the generator along the stream, once for each seed, and draw its samples."""
    constants = read_constants(sys.modules[__name__])
    images, constants = prepare(constants)
    for seed in constants.SEEDS:
        run(images, constants, seed)


def run(images: "Images", constants: BaseModel, seed: int) -> None:
    """Train on each experience, then sample, reconstruct and evaluate; draw the picture."""
    import torch

    from figures import draw

    title = f"generator, seed {seed}"
    folder = results.run_folder(constants, images, "generator", seed)
    with results.run_lock(folder, title):
        if not (folder / "generator.json").exists():
            constants = seeded(constants, seed)
            benchmark = make_benchmark(images, constants)
            strategy = make_generator_strategy(benchmark, constants)
            generator = strategy.model
            record = results.new_record(constants, images, "generator", seed) | {"loss_matrix": []}
            record["experiences"], names = stream_names(images, constants)
            originals, labels = first_of_each_class(benchmark, list(names), constants.DEVICE)
            state = {"record": record, "samples": [], "reconstructions": []}

            for experience in results.resumable(benchmark.train_stream, strategy, folder, state):
                strategy.train(experience)
                metrics = strategy.eval(benchmark.test_stream)
                record["loss_matrix"].append(metric_row(metrics, "Loss_Exp"))
                state["samples"].append(generator.generate(20).cpu())
                if hasattr(generator, "reconstruct"):
                    state["reconstructions"].append(generator.reconstruct(originals, labels).cpu())
                loss = record["loss_matrix"][-1][experience.current_experience]
                state["progress"] = f"loss on its images {loss:.1f}"

            kinds = [kind for kind in ("samples", "reconstructions") if state[kind]]
            arrays = {kind: torch.stack(state[kind]).numpy() for kind in kinds}
            results.save_arrays(folder / "samples.npz", originals=originals.cpu().numpy(), **arrays)
            results.save_record(folder / "generator.json", record)  # last: the run is finished
        record = json.loads((folder / "generator.json").read_text())
        with np.load(folder / "samples.npz") as arrays:
            draw.save(draw.generator(record, arrays), folder / "generator.png")
    print(f"{title}: {folder / 'generator.png'}")


def first_of_each_class(benchmark, labels: list[int], device: str) -> tuple:
    """Return the first test image of each label, in this order, and the labels."""
    import torch

    tensors = (experience.dataset.tensors for experience in benchmark.test_stream)
    x, y, _ = map(torch.cat, zip(*tensors))
    originals = torch.cat([x[y == label][:1] for label in labels])
    return originals.to(device), torch.tensor(labels).to(device)


# --- Data and stream ------------------------------------------------------------------------------


class Images(NamedTuple):
    """Hold a data set in memory."""

    name: str
    train: tuple  # images (float32 in [0, 1], shape (n, C, H, W)), class labels (int64, shape (n,))
    test: tuple
    classes: list[str]  # names of the class labels
    iterations: int = 1600  # minibatches per experience that suit it
    notice: str = ""  # shown with all results


# torchvision checks the packed files that it downloads, not the unpacked ones that lie in DATA_DIR.
CHECKSUMS = {
    "MNIST": (
        "6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637",
    ),
    "FashionMNIST": (
        "f4a8712d7a061bf5bd6d2ca38dc4d50a", "9018921c3c673c538a1fc5bad174d6f9",
        "8181f5470baa50b63fa0f6fddb340f0a", "15d484375f8d13e6eb1aabb0c3f46965",
    ),
}  # fmt: skip


def load_images(constants: BaseModel) -> Images:
    """Load the data set, and take validation images out of the training set if any are wanted.

    "auto" is MNIST, and where it can't be had scikit-learn's digits, with a notice.

    :raises UserError: if a data set is damaged, or isn't one.
    :raises ConnectionError: if a data set that was asked for by name can't be downloaded.
    """
    import torch
    from sklearn.model_selection import train_test_split

    # Adam's moments of units without gradient decay into denormal numbers, which take an x86 CPU
    # nine times as long. Set here, before torch starts its threads, which take it over.
    torch.set_flush_denormal(True)
    name, size = constants.DATASET, constants.VALIDATION_SIZE
    published = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST"}
    if name == "digits":
        images = load_digits()
    elif name in published:
        images = load_published(published[name], constants.DATA_DIR)._replace(name=name)
    elif name == "auto":
        try:
            images = load_published("MNIST", constants.DATA_DIR)._replace(name="mnist")
        except ConnectionError as error:
            images = load_digits()._replace(notice="scikit-learn's 8x8 digits, NOT MNIST")
            text = f"{error}. This run uses {images.notice}."
            print(f"\n{'!' * len(text)}\n{text}\n{'!' * len(text)}\n", flush=True)
    else:
        images = load_folder(Path(name).expanduser(), constants.IMAGE_SIZE)
    if size:
        x, y = images.train
        try:
            parts = train_test_split(x, y, test_size=size, stratify=y, random_state=0)
        except ValueError as error:
            raise UserError(f"VALIDATION_SIZE is {size}: {error}") from None
        images = images._replace(train=tuple(parts[::2]), test=tuple(parts[1::2]))
    return images


def load_published(name: str, data_dir: str) -> Images:
    """Load a data set of torchvision, which downloads it if it is missing.

    :param name: "MNIST", "FashionMNIST" or "KMNIST".
    :raises ConnectionError: if it can't be downloaded.
    :raises UserError: if a file of (Fashion-)MNIST is there, but isn't the published one.
    """
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    kind, data_dir = getattr(datasets, name), os.path.expanduser(data_dir)
    files = [Path(data_dir, name, "raw", Path(packed).stem) for packed, _ in kind.resources]
    for file, checksum in zip(files, CHECKSUMS.get(name, ())):
        if file.exists() and not check_integrity(file, checksum):
            raise UserError(f"{file} isn't the published file; delete it, or set DATA_DIR")
    try:
        if not all(file.exists() for file in files):
            socket.setdefaulttimeout(10)  # else an unreachable server takes minutes to give up on
            with FileLock(Path(data_dir, "lock")):  # two copies of a command
                kind(data_dir, download=True)
        train, test = (kind(data_dir, train=train) for train in (True, False))
    except (RuntimeError, OSError, AssertionError) as error:
        reason = str(error).split("\n")[0].rstrip(":") or type(error).__name__
        text = f"{files[0]} can't be read and can't be downloaded ({reason}); set DATA_DIR to the "
        text += f"folder with {name}/ in it, or DATASET to 'digits'"
        raise ConnectionError(text) from error
    pairs = ((part.data.unsqueeze(1).float() / 255, part.targets.long()) for part in (train, test))
    classes = [name.split(" - ")[0] for name in train.classes]  # of "0 - zero" the digit is enough
    return Images(name, *pairs, classes)


def load_digits() -> Images:
    """Load scikit-learn's handwritten digits (UCI, test part), enlarged from 8x8 to 28x28 pixels.

    A fifth is the test set, the same in every run. The pixels come as counts from 0 to 16.
    """
    import torch
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    x, y = datasets.load_digits(return_X_y=True)
    x = torch.tensor(x / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    x = torch.nn.functional.interpolate(x, size=(28, 28), mode="bilinear")
    y = torch.tensor(y, dtype=torch.int64)
    rows = train_test_split(torch.arange(len(y)), test_size=0.2, stratify=y, random_state=0)
    parts = ((x[part], y[part]) for part in rows)
    return Images("digits", *parts, [str(label) for label in range(10)], iterations=300)


def load_folder(folder: Path, size: int | None) -> Images:
    """Load a folder of images: `train/` and `test/`, with a subfolder for each class.

    Images without colour get one channel. The name of the data set gets a checksum, so that results
    of other images or labels have other names.

    :param size: height and width to resize the images to; None: as they are, all the same.
    :raises UserError: if the folder isn't like that.
    """
    import torch
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise UserError(
                f"DATASET is {str(folder)!r}: neither auto, mnist, fashion, kmnist or digits nor a "
                f"folder with train/ and test/ in it ({folder / part} is missing)"
            )
    resize = v2.Resize((size, size)) if size else v2.Identity()
    transform = v2.Compose([resize, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    train, test = (ImageFolder(folder / part, transform) for part in ("train", "test"))
    if different := set(train.classes) ^ set(test.classes):
        raise UserError(f"{folder}: class {min(different)!r} is in only one of train/ and test/")
    images = [[image for image, _ in data] for data in (train, test)]
    if len({image.shape for part in images for image in part}) > 1:
        raise UserError(f"{folder} has images of several sizes; set IMAGE_SIZE to one for all")
    labels = (torch.tensor(data.targets) for data in (train, test))
    parts = list(zip(map(torch.stack, images), labels))
    if all(torch.equal(x, x[:, :1].expand_as(x)) for x, _ in parts):
        parts = [(x[:, :1].contiguous(), y) for x, y in parts]
    digest = joblib.hash([part.numpy() for pair in parts for part in pair])[:8]
    return Images(f"{folder.resolve().name}-{digest}", *parts, train.classes)


def make_benchmark(images: Images, constants: BaseModel):
    """Make the stream of experiences that SCENARIO names, without task identity.

    :return: an Avalanche benchmark with `train_stream` and `test_stream`, equally long.
    """
    import torch

    from TrainingInstances import in_memory_benchmark

    def split(x, y):
        """Divide images and labels among the experiences."""
        if constants.SCENARIO == "permuted":  # Shin et al. 2017, section 4.1
            return [(x.flatten(1)[:, order].view_as(x), y) for order in permutations]
        experiences = []
        for group in torch.tensor(constants.CLASS_ORDER).tensor_split(constants.N_EXPERIENCES):
            rows = torch.isin(y, group)
            labels = y[rows]
            if constants.SCENARIO == "domain":  # the place of a class in its experience
                labels = (labels[:, None] == group).int().argmax(1)
            experiences.append((x[rows], labels))
        return experiences

    permutations = [torch.arange(images.train[0][0].numel())]  # the first leaves images as they are
    if constants.SCENARIO == "permuted":
        others = range(1, constants.N_EXPERIENCES)
        permutations += [torch.randperm(len(permutations[0])) for _ in others]
    return in_memory_benchmark(split(*images.train), split(*images.test))


def stream_names(images: Images, constants: BaseModel) -> tuple[list[str], dict[int, str]]:
    """Name the experiences of the stream, and its labels in the order of their arrival."""
    if constants.SCENARIO == "permuted":
        experiences = [f"permutation {i}" for i in range(1, constants.N_EXPERIENCES + 1)]
        return experiences, dict(enumerate(images.classes))
    names = {label: images.classes[label] for label in constants.CLASS_ORDER}
    groups = np.array_split(list(names.values()), constants.N_EXPERIENCES)
    if constants.SCENARIO == "domain":
        names = {label: str(label) for label in range(len(groups[0]))}
    return [" ".join(group) for group in groups], names


def properties(benchmark, constants: BaseModel) -> tuple:
    """Return what solver and generator have to know of the stream before they meet it.

    :return: shape of one image, (channels, height, width); number of classes; and the module that
        normalizes images by mean and standard deviation of the first experience's pixels.
    """
    from torch import nn
    from torchvision.transforms import v2

    x, *_ = benchmark.train_stream[0].dataset.tensors
    classes = [experience.classes_in_this_experience for experience in benchmark.train_stream]
    normalize = v2.Normalize([x.mean()], [x.std()]) if constants.NORMALIZE else nn.Identity()
    return tuple(x.shape[1:]), 1 + max(map(max, classes)), normalize


def metric_row(metrics: dict, name: str) -> list[float]:
    """Return one of Avalanche's metrics on each experience of the test stream, in its order."""
    return [float(value) for key, value in sorted(metrics.items()) if key.startswith(f"{name}/")]


# --- Constants from file and command line ---------------------------------------------------------


def read_constants(*scripts: ModuleType) -> BaseModel:
    """Read the constants of scripts, changed by the command line and checked by pydantic.

    :param scripts: modules with lines `NAME: type = value  # comment`.
    :return: the constants as attributes, by their names.
    :raises UserError: if one is unknown or not allowed.
    """
    fields, comments = {}, {}
    for script in scripts:
        types = script.__annotations__
        fields |= {name: (types[name], getattr(script, name)) for name in types}
        source = Path(script.__file__).read_text(encoding="utf-8")
        comments |= dict(re.findall(r"^([A-Z_]+): .+ = .+?  # (.+)$", source, re.MULTILINE))
    options = {"--" + name.lower().replace("_", "-"): name for name in fields}
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--option value ...]",
        description=scripts[-1].__doc__.split("\n")[0],
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=100),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for option, name in options.items():
        text = f"{comments.get(name, '')} ({fields[name][1]})".replace("%", "%%")
        parser.add_argument(option, dest=name, nargs="*", metavar="", help=text)
    given, unknown = parser.parse_known_args()
    if unknown:
        word = unknown[0].split("=")[0]
        near = get_close_matches("--" + word.strip("-").lower().replace("_", "-"), options, n=1)
        hint = f"did you mean {near[0]}?" if near else "see --help"
        raise UserError(f"{word} is unknown; {hint}")
    changes = vars(given)
    for name, words in changes.items():
        words = words or ["true"]  # an option alone switches on
        if len(words) == 1 and not isinstance(fields[name][1], tuple):
            changes[name] = None if words[0].lower() == "none" else words[0]
    config = pydantic.ConfigDict(frozen=True, validate_default=True, allow_inf_nan=False)
    try:
        return pydantic.create_model("Constants", __config__=config, **fields)(**changes)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name, value = first["loc"][0], repr(first["input"])
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{name} is {value[:80]}: {message}; see --help") from None


def prepare(constants: BaseModel) -> tuple[Images, BaseModel]:
    """Load the images, settle what depends on them and on the machine, and print the constants.

    :raises UserError: if data and constants don't go together.
    """
    images = load_images(constants)
    labels = range(len(images.classes))
    order = constants.CLASS_ORDER or tuple(labels)
    if len(labels) < 2:
        raise UserError(f"DATASET has a single class, {images.classes[0]!r}; it needs two or more")
    if sorted(order) != list(labels):
        raise UserError(f"CLASS_ORDER is {order}, but has to hold each label of {[*labels]} once")
    if len(order) < constants.N_EXPERIENCES and constants.SCENARIO != "permuted":
        count = constants.N_EXPERIENCES
        raise UserError(f"N_EXPERIENCES is {count}, but there are only {len(order)} classes")
    device, bfloat16 = choose_device(constants.DEVICE), constants.BFLOAT16
    constants = constants.model_copy(update={
        "DATASET": images.name if constants.DATASET == "auto" else constants.DATASET,
        "CLASS_ORDER": order,
        "DEVICE": device,
        "BFLOAT16": multiplies_bfloat16(device) if bfloat16 is None else bfloat16,
        "ITERATIONS": constants.ITERATIONS or images.iterations,
    })  # fmt: skip
    folder = Path(constants.RESULTS_DIR)
    if any(path.is_file() for path in (folder, *folder.parents)):
        raise UserError(f"RESULTS_DIR is {str(folder)!r}, but has to be the name of a folder")
    print("\n".join(f"{name} = {value!r}" for name, value in constants), flush=True)
    return images, constants


def choose_device(name: str) -> str:
    """Return the device that "auto" stands for, or `name` if torch can use it."""
    import torch

    if name == "auto":
        return str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(".")[0].split("\n")[0]
        raise UserError(f"DEVICE is {name!r}, which can't be used: {reason}") from None
    return name


def multiplies_bfloat16(device: str) -> bool:
    """Tell whether the device is an x86 CPU with instructions for products in bfloat16."""
    import torch

    cpu = torch.cpu.get_capabilities()
    return device == "cpu" and bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))


def seeded(constants: BaseModel, seed: int) -> BaseModel:
    """Seed torch, and return the constants of this run: settled, classes shuffled if wanted."""
    import torch

    torch.manual_seed(seed)
    order = constants.CLASS_ORDER
    if constants.SHUFFLE_CLASSES:
        order = tuple(order[i] for i in torch.randperm(len(order)))
    return settled(constants.model_copy(update={"CLASS_ORDER": order}))


if __name__ == "__main__":
    results.run_command(main)
