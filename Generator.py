"""The generator of the scholar: a VAE wrapped into a trainable strategy, and its visualizer.

In:  the constants below and a stream of experiences.  Out: a generator strategy for
GenerativeReplay.py; run as a script, a picture of what the generator remembers after each one.
The constants, the data and the stream stand here for both scripts.
Run: `python Generator.py`, or with `--help`.  Next to read: TrainingInstances.py.
"""

import argparse
import ast
import atexit
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from functools import partial
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from types import ModuleType, SimpleNamespace
from typing import NoReturn

# ------------------------------------------------------------------------------------------------
# Constants of both scripts. Edit them here, or give them on the command line: BATCH_SIZE = 64 is
# `--batch-size 64`, SEEDS = (0, 1, 2) is `--seeds 0 1 2`, None is `none`.
DATASET = "auto"  # mnist; fashion; kmnist; digits (in scikit-learn); auto: mnist, else digits
DATA_DIR = os.environ.get("DATA_DIR") or "data"  # where the images lie, or are downloaded to
CHECKSUMS = True  # the files there have to be the published ones; false: your own, in their format
VALIDATION_SIZE = 0  # training images to test on instead of the test set, for choosing constants
GENERATOR = "vae"  # vae; cvae: it is told the class; wgan-gp; or one of your own: see GENERATORS
N_EXPERIENCES = 5  # experiences that the classes are divided among
CLASS_ORDER = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)  # order in which the classes arrive
SHUFFLE_CLASSES = False  # another order of the classes for each seed instead
SEEDS = (0,)  # one run each
ITERATIONS = None  # minibatches per experience; none: 2000, or 300 for digits
BATCH_SIZE = 64  # real images in a minibatch
LEARNING_RATE = 0.002  # of Adam
ANNEAL = True  # let it fall to 0 over each experience, along a cosine (Loshchilov & Hutter 2017)
GENERATOR_ITERATIONS = None  # minibatches per experience of the generator; none: what suits it
GENERATOR_BATCH_SIZE = None  # real images in a minibatch of the generator; none: as the solver
GENERATOR_LEARNING_RATE = None  # of the generator's Adam; none: what suits it
REPLAY_SIZE = None  # replayed images added to each minibatch; none: as many as it has; 0: no replay
INCREASING_REPLAY_SIZE = False  # double that at every further experience
RATIO = None  # importance r of the current data, 0 to 1; none: 1/k at the k-th experience
HIDDEN_UNITS = 400  # in each of the two hidden layers of solver, encoder and decoder
LATENT_SIZE = None  # dimensions of the generator's latent variable z; none: 32, or 8 for cvae
KL_WEIGHT = None  # β, weight of a VAE's KL term; 1: the lower bound itself; none: 0.1, 1 for cvae
MIXTURE_COMPONENTS = 10  # of vae: Gaussians per class to draw z from, fitted after; 0: from N(0, I)
DEVICE = "auto"  # cpu, cuda, cuda:1, mps; auto: the first that is there of cuda, mps, cpu
RESULTS_DIR = "results"  # where results and figures go
FORCE = False  # run anew what is finished already
QUIET = False  # print nothing but the end
LOAD = None  # folder of an earlier run: show its generator instead of training
# ------------------------------------------------------------------------------------------------

# torch and avalanche are imported where they are used: they take ten seconds, and `--help` and
# errors in the constants shouldn't wait for them.


# ------------------------------------------------------------------------------------------------
# The generator, and what it remembers
# ------------------------------------------------------------------------------------------------


def make_generator_strategy(shape: tuple[int, int, int], constants: SimpleNamespace):
    """The generator as a trainable strategy, to be passed on as `generator_strategy`.

    It learns with the solver's optimizer, batch size, learning rate and iterations unless another
    suits it better or the GENERATOR_... constants say otherwise.

    :param shape: shape of one image, (channels, height, width).
    :return: a strategy with a new generator as `model`, the one that GENERATOR names. Its training
        loop stands in the next script; here it is enough that it has `train(experience)`.
    """
    return GENERATORS[constants.GENERATOR](shape, constants)


def make_vae(shape: tuple[int, int, int], constants: SimpleNamespace):
    """A `VAE`, with mixtures if there are MIXTURE_COMPONENTS."""
    from GenerativeModel import VAE, LatentMixtures, negative_elbo
    from TrainingInstances import VAETraining

    mixtures, latent_size = None, constants.LATENT_SIZE or 32
    if constants.MIXTURE_COMPONENTS:
        classes = len(constants.CLASS_ORDER)
        mixtures = LatentMixtures(classes, constants.MIXTURE_COMPONENTS, latent_size)
    vae = VAE(shape, constants.HIDDEN_UNITS, latent_size, mixtures)
    criterion = partial(negative_elbo, kl_weight=constants.KL_WEIGHT or 0.1)
    return VAETraining(criterion=criterion, **generator_arguments(vae, constants))


def make_cvae(shape: tuple[int, int, int], constants: SimpleNamespace):
    """A `ConditionalVAE`. Its z comes from N(0, I), so its encodings have to keep to that."""
    from GenerativeModel import ConditionalVAE, negative_elbo
    from TrainingInstances import VAETraining

    classes, latent_size = len(constants.CLASS_ORDER), constants.LATENT_SIZE or 8
    cvae = ConditionalVAE(shape, classes, constants.HIDDEN_UNITS, latent_size)
    criterion = partial(negative_elbo, kl_weight=constants.KL_WEIGHT or 1)
    return VAETraining(criterion=criterion, **generator_arguments(cvae, constants))


def make_wgan(shape: tuple[int, int, int], constants: SimpleNamespace):
    """A `WGAN` with gradient penalty, and Adam's betas from Gulrajani et al.'s code for MNIST.

    Its iterations are the critic's: five times the solver's, so that its painter has as many. That
    code has a hundred times more, at a thirtieth of the learning rate.
    """
    from GenerativeModel import WGAN
    from TrainingInstances import WGANTraining

    wgan = WGAN(shape, constants.HIDDEN_UNITS, constants.LATENT_SIZE or 32)
    own = {"learning_rate": 3e-3, "iterations": 5 * constants.ITERATIONS, "betas": (0.5, 0.9)}
    return WGANTraining(**generator_arguments(wgan, constants, **own))


# What GENERATOR may be: a function from the shape of an image and the constants to a strategy. For
# a generator of your own, add a line.
GENERATORS = {
    "vae": make_vae,
    "cvae": make_cvae,
    "wgan-gp": make_wgan,
}


def generator_arguments(
    model,
    constants: SimpleNamespace,
    learning_rate: float | None = None,
    iterations: int | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
) -> dict:
    """Arguments of a generator's strategy.

    :param learning_rate: where GENERATOR_LEARNING_RATE is None; None: as the solver.
    :param iterations: where GENERATOR_ITERATIONS is None; None: as the solver.
    :param betas: of Adam.
    """
    from avalanche.evaluation.metrics import loss_metrics

    from TrainingInstances import EvaluationOnly

    learning_rate = constants.GENERATOR_LEARNING_RATE or learning_rate or constants.LEARNING_RATE
    own = {
        "LEARNING_RATE": learning_rate,
        "ITERATIONS": constants.GENERATOR_ITERATIONS or iterations or constants.ITERATIONS,
        "BATCH_SIZE": constants.GENERATOR_BATCH_SIZE or constants.BATCH_SIZE,
    }
    return {
        **strategy_arguments("generator", model, SimpleNamespace(**vars(constants) | own), betas),
        "replay_size": constants.REPLAY_SIZE,
        "increasing_replay_size": constants.INCREASING_REPLAY_SIZE,
        "ratio": constants.RATIO,
        "evaluator": EvaluationOnly(loss_metrics(experience=True)),
    }


def strategy_arguments(
    name: str, model, constants: SimpleNamespace, betas: tuple[float, float] = (0.9, 0.999)
) -> dict:
    """Arguments of any strategy: what is trained, by which optimizer, for how long.

    :param name: what is trained, as the progress bar names it.
    :param betas: of Adam.
    """
    from torch.optim import Adam

    from TrainingInstances import Annealing, Progress

    optimizer = Adam(model.parameters(), lr=constants.LEARNING_RATE, betas=betas, fused=True)
    # A bar on a terminal, if this is not one of several processes that would write over each other.
    visible = sys.stderr.isatty() and multiprocessing.parent_process() is None
    plugins = [Progress(name, visible)]
    if constants.ANNEAL:
        plugins.append(Annealing(optimizer, constants.ITERATIONS))
    return {
        "model": model,
        "optimizer": optimizer,
        "iterations": constants.ITERATIONS,
        "train_mb_size": constants.BATCH_SIZE,
        "eval_mb_size": 1000,
        "plugins": plugins,
        "device": constants.DEVICE,
    }


def main() -> None:
    """Train the generator alone along the stream and show what it remembers."""
    constants = read_constants(sys.modules[__name__])
    if constants.LOAD is not None:
        return look(Path(constants.LOAD), constants)
    images = prepare(constants)
    for seed in constants.SEEDS:
        run(images, constants, seed)


def run(images, constants: SimpleNamespace, seed: int) -> None:
    """One run, unless it is finished already, and its picture."""
    import numpy as np

    from figures import draw

    name, folder = f"generator, seed {seed}", run_folder(constants, images.name, "generator", seed)
    with only_process(folder, name, constants.FORCE):
        if (folder / "generator.json").exists():
            report(constants, f"{name}: finished already, in {folder}")
        else:
            learn(images, for_seed(constants, seed), seed, folder, name)
    record = json.loads((folder / "generator.json").read_text(encoding="utf-8"))
    figures = Path(constants.RESULTS_DIR) / "figures"
    with np.load(folder / "samples.npz") as arrays:
        write_figures(figures, {f"generator-seed{seed}": draw.generator(record, arrays)})
    print(f"{name}: {figures / f'generator-seed{seed}.png'}")


def learn(images, constants: SimpleNamespace, seed: int, folder: Path, name: str) -> None:
    """Train on each experience, then sample, reconstruct and evaluate; write what came out."""
    import torch

    benchmark = make_benchmark(images, constants)
    strategy = make_generator_strategy(images.train[0].shape[1:], constants)
    record = run_record(constants, "generator", "generator", seed, images.notice)
    generator, pictures = strategy.model, []
    if state := restore(folder, strategy):
        record, pictures = state["record"], state["pictures"]
        report(constants, f"{name}: goes on after experience {len(pictures)}")
    matrix = record.setdefault("loss_matrix", [])
    started = time.perf_counter() - record["seconds"]
    # The same test images each time, of all classes: also of those yet to come.
    originals, labels = one_of_each(images, constants)

    for experience in benchmark.train_stream[len(matrix) :]:
        strategy.train(experience)
        metrics = strategy.eval(benchmark.test_stream)
        matrix.append(metric_row(metrics, "Loss_Exp", constants.N_EXPERIENCES))
        pictures.append([generator.generate(20).cpu()])
        if hasattr(generator, "reconstruct"):
            pictures[-1].append(generator.reconstruct(originals, labels).cpu())
        record["seconds"] = round(time.perf_counter() - started, 1)
        save_state(folder, constants, strategy, record=record, pictures=pictures)
        text = f"{name}: experience {len(matrix)}/{constants.N_EXPERIENCES}, loss on its images"
        text += f" {matrix[-1][len(matrix) - 1]:.1f}, {record['seconds']:.0f} s"
        report(constants, text)

    kinds = (torch.stack(kind).numpy() for kind in zip(*pictures))
    arrays = {"originals": originals.cpu().numpy()}
    arrays |= zip(("samples", "reconstructions"), kinds)
    write(folder / "samples.npz", arrays)
    write(folder / "generator.json", record)  # last: it says that the run is finished


def one_of_each(images: SimpleNamespace, constants: SimpleNamespace) -> tuple:
    """The first test image of each class, in the order of the stream, and their labels.

    :return: images, shape (10, C, H, W), and labels, shape (10,), on the device.
    """
    import torch

    x, y = images.test
    pictures = torch.cat([x[y == label][:1] for label in constants.CLASS_ORDER])
    labels = torch.tensor(constants.CLASS_ORDER)
    return pictures.to(constants.DEVICE), labels.to(constants.DEVICE)


def look(folder: Path, constants: SimpleNamespace) -> None:
    """Show a saved generator: samples, reconstructions, and walks from one digit to another.

    :param folder: what a run of either script has left.
    :raises SystemExit: if there is no state in it.
    """
    import torch

    from figures import draw

    if not (folder / "state.pt").is_file():
        fail(f"LOAD is {str(folder)!r}, but has to be a run's folder, with a state.pt in it")
    device = choose_device(constants.DEVICE)
    state = read_state(folder / "state.pt")
    if state["generator"] is None:
        fail(f"LOAD is {str(folder)!r}, a run without generator; choose one with replay")
    own = SimpleNamespace(**state["constants"] | {"DEVICE": device})
    if own.GENERATOR not in GENERATORS:
        fail(
            f"LOAD is {str(folder)!r}, whose generator {own.GENERATOR!r} is not in GENERATORS here"
        )
    images = load_images(own.DATASET, constants.DATA_DIR, own.CHECKSUMS)
    generator = make_generator_strategy(images.train[0].shape[1:], own).model.to(device)
    generator.load_state_dict(state["generator"])
    arrays = {"samples": generator.generate(80).unflatten(0, (-1, 20))}
    if hasattr(generator, "reconstruct"):
        originals, labels = one_of_each(images, own)
        with torch.no_grad():
            # Each row goes from one class to the next, in twenty steps.
            codes = generator.code(generator.encode(originals)[0], labels)[:, None]
            share = torch.linspace(0, 1, 20, device=device)[:, None]
            walk = generator.decode(torch.lerp(codes[:-1:2], codes[1::2], share).flatten(0, 1))
        arrays["reconstructions"] = torch.stack(
            [originals, generator.reconstruct(originals, labels)]
        )
        arrays["walk"] = walk.sigmoid().unflatten(0, (-1, 20))
    figure = draw.look(state["record"], {name: x.cpu().numpy() for name, x in arrays.items()})
    write_figures(folder, {"look": figure})
    print(f"samples, reconstructions and walks: {folder / 'look.png'}")


# ------------------------------------------------------------------------------------------------
# What follows is not the method but what both scripts need around it.
# 1: data and stream
# ------------------------------------------------------------------------------------------------


# The files of a data set like MNIST, where torchvision keeps them, and the MD5 of each as published
# (unpacked). Of KMNIST only those of the packed files are known, to torchvision.
FILES = (
    "train-images-idx3-ubyte", "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte",
)  # fmt: skip
PUBLISHED = {
    "mnist": ("MNIST", (
        "6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637",
    )),
    "fashion": ("FashionMNIST", (
        "f4a8712d7a061bf5bd6d2ca38dc4d50a", "9018921c3c673c538a1fc5bad174d6f9",
        "8181f5470baa50b63fa0f6fddb340f0a", "15d484375f8d13e6eb1aabb0c3f46965",
    )),
    "kmnist": ("KMNIST", (None, None, None, None)),
}  # fmt: skip


def load_images(name: str, data_dir: str, checksums: bool = True) -> SimpleNamespace:
    """Images and labels of a data set, in memory.

    :param name: "mnist", "fashion", "kmnist", "digits", or "auto" (MNIST, and the digits where it
        can't be had).
    :param data_dir: folder where torchvision keeps its data, and to which it downloads it.
    :param checksums: whether the files have to be the published ones. Those of one's own are never
        downloaded, and `name` gets a checksum of theirs, so that results tell them apart.
    :return: `name`, resolved; `train` and `test`, pairs of images (float32 in [0, 1], shape
        (n, 1, 28, 28)) and labels (int64, shape (n,)); `iterations`, how many minibatches per
        experience suit it; `notice`, a text that belongs wherever results are shown, or "".
    :raises SystemExit: if a data set was asked for by name and can't be had, and if a file is there
        but not as it has to be, with one line that names it.
    """
    name = name.partition("-")[0]  # without the checksum that an earlier call has appended
    if name == "digits":
        return load_digits()
    wanted = "mnist" if name == "auto" else name
    data_dir = os.path.expanduser(data_dir)
    folder = Path(data_dir, PUBLISHED[wanted][0], "raw")
    absent = [file for file in FILES if not os.path.exists(folder / file)]
    try:
        if absent and checksums:
            download(wanted, data_dir)
    except Exception as error:  # torchvision has no error of its own
        reason = str(error).split("\n")[0].rstrip(":") or type(error).__name__
        if name != "auto":
            fail(
                f"{folder / absent[0]} is missing and can't be downloaded ({reason}); set DATA_DIR "
                f"to the folder that holds {PUBLISHED[wanted][0]}, or DATASET to 'digits'"
            )
        images = load_digits()
        images.notice = "scikit-learn's 8x8 digits, NOT MNIST"
        text = f"MNIST can't be had ({reason}). This run uses {images.notice}."
        print(f"\n{'!' * len(text)}\n{text}\n{'!' * len(text)}\n", flush=True)
        return images
    return load_files(wanted, folder, checksums)


def download(name: str, data_dir: str) -> None:
    """Let torchvision download a data set and unpack it.

    :raises Exception: of whatever kind, if that fails.
    """
    import socket

    from filelock import FileLock
    from torchvision import datasets

    print(f"{name} is not in {data_dir!r}: downloading it", flush=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # else an unreachable server takes minutes to give up on
    try:
        with FileLock(Path(data_dir, "lock")):  # who waited for another's download has it then
            getattr(datasets, PUBLISHED[name][0])(data_dir, download=True)
    finally:
        socket.setdefaulttimeout(timeout)


def load_files(name: str, folder: Path, checksums: bool) -> SimpleNamespace:
    """MNIST (LeCun et al. 1998), Fashion-MNIST (Xiao et al. 2017) or Kuzushiji-MNIST (Clanuwat et
    al. 2018), from its four files; see `load_images`.
    """
    parts = []
    for file, md5 in zip(FILES, PUBLISHED[name][1]):
        item = (28, 28) if "images" in file else ()
        count = 60000 if "train" in file else 10000
        if checksums:
            parts.append(read_idx(folder / file, item, count, md5 or unpacked_md5(folder / file)))
        else:
            parts.append(read_idx(folder / file, item))
    if not checksums:
        digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
        name = f"{name}-{digest[:8]}"
    for i in (0, 2):
        if len(parts[i]) != len(parts[i + 1]):
            counts = f"{len(parts[i])} images, but {FILES[i + 1]} {len(parts[i + 1])} labels"
            fail(f"{folder / FILES[i]} holds {counts}; they don't belong together")
    train, test = ((x.unsqueeze(1).float() / 255, y.long()) for x, y in (parts[:2], parts[2:]))
    return SimpleNamespace(name=name, train=train, test=test, iterations=2000, notice="")


def read_idx(path: Path, item: tuple[int, ...], count: int | None = None, md5: str | None = None):
    """Images or labels in MNIST's format: a header of big-endian integers, a byte for each value.

    :param item: shape of one of them: (28, 28) for images, () for labels.
    :param count: how many there have to be; None: any number, in a file of one's own.
    :param md5: what the checksum of the file has to be; None: anything.
    :return: uint8 tensor, shape (count, *item).
    :raises SystemExit: with code 2 and one line, if the file is not like that.
    """
    import numpy as np
    import torch

    kind, header = "images" if item else "labels", 8 + 4 * len(item)
    try:
        content = path.read_bytes()
    except OSError as error:
        fail(f"{path} can't be read ({error.strerror}); set DATA_DIR to another folder")
    magic, found, *size = (int.from_bytes(content[i : i + 4], "big") for i in range(0, header, 4))
    expected = header + found * math.prod(item)
    wrong = ""
    if magic != 2049 + len(item):
        wrong = f"is no file of {kind} (it begins with {content[:16]!r})"
    elif tuple(size) != item:
        wrong = f"holds images of {size[0]}x{size[1]} pixels, not {item[0]}x{item[1]}"
    elif len(content) != expected:
        wrong = f"has {len(content)} bytes, not the {expected} of {found} {kind}"
    elif count not in (None, found):
        wrong = f"holds {found} {kind}, not {count}"
    elif not item and max(content[header:], default=0) > 9:
        wrong = f"holds the label {max(content[header:])}, but the classes are 0 to 9"
    elif md5 not in (None, hashlib.md5(content, usedforsecurity=False).hexdigest()):
        wrong = "is not the published file (its checksum is another)"
    if wrong:
        remedy = "delete it, and it is downloaded again; if it is your own, set CHECKSUMS to False"
        fail(f"{path} {wrong}; {remedy if count else 'replace it'}")
    return torch.tensor(np.frombuffer(content, np.uint8, offset=header)).view(found, *item)


def unpacked_md5(path: Path) -> str | None:
    """MD5 of a file of KMNIST as it lies packed beside it, or None if it doesn't."""
    import gzip

    from torchvision.datasets import KMNIST
    from torchvision.datasets.utils import check_integrity

    packed = Path(f"{path}.gz")
    if not packed.exists():
        return None
    if not check_integrity(packed, dict(KMNIST.resources)[packed.name]):
        fail(f"{packed} is not the published file (its checksum is another); delete it")
    return hashlib.md5(gzip.decompress(packed.read_bytes()), usedforsecurity=False).hexdigest()


def load_digits() -> SimpleNamespace:
    """The handwritten digits inside scikit-learn (UCI, test part), brought from 8x8 to 28x28.

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
    train, test = ((x[part], y[part]) for part in rows)
    return SimpleNamespace(name="digits", train=train, test=test, iterations=300, notice="")


def hold_out(images: SimpleNamespace, size: int) -> SimpleNamespace:
    """The images with `size` training images, taken out, as test set; with size 0 as they are."""
    import torch

    if not size:
        return images
    # The same images in every run, whatever the seed: they must never be trained on.
    order = torch.randperm(len(images.train[1]), generator=torch.Generator().manual_seed(0))
    train, test = (
        tuple(part[rows] for part in images.train) for rows in (order[size:], order[:size])
    )
    return SimpleNamespace(**vars(images) | {"train": train, "test": test})


def make_benchmark(images: SimpleNamespace, constants: SimpleNamespace, cumulative: bool = False):
    """Class-incremental stream: each experience brings the next classes, and no task identity.

    :param images: from `load_images`.
    :param constants: CLASS_ORDER, N_EXPERIENCES and VALIDATION_SIZE are used.
    :param cumulative: whether each experience also brings all earlier images once more.
    :return: an Avalanche benchmark with `train_stream` and `test_stream`, equally long. Its test
        stream holds validation images if VALIDATION_SIZE says so.
    """
    import torch

    from TrainingInstances import in_memory_benchmark

    images = hold_out(images, constants.VALIDATION_SIZE)
    classes = torch.tensor(constants.CLASS_ORDER).chunk(constants.N_EXPERIENCES)

    def split(x, y):
        absent = sorted(set(constants.CLASS_ORDER) - set(y.tolist()))
        if absent:
            fail(
                f"class {absent[0]} is left without images to train or to test on: VALIDATION_SIZE "
                f"is {constants.VALIDATION_SIZE}; choose another"
            )
        masks = [torch.isin(y, some) for some in classes]
        return [(x[mask], y[mask]) for mask in masks]

    train, test = split(*images.train), split(*images.test)
    if cumulative:
        train = [tuple(map(torch.cat, zip(*train[: i + 1]))) for i in range(len(train))]
    return in_memory_benchmark(train, test)


# ------------------------------------------------------------------------------------------------
# 2: constants and what they may be
# ------------------------------------------------------------------------------------------------


def fail(message: str) -> NoReturn:
    """End the program with one line that says what is wrong and what to do, and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def closest(word: str, known: Iterable[str]) -> str:
    """The end of a complaint: which of the known words may have been meant, or nothing."""
    near = get_close_matches(word.lower(), known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


# A rule says in words what a value has to be, or "" if it is.
Rule = Callable[[object], str]


def rule(allowed: Callable[[object], bool], words: str) -> Rule:
    """Rule: what `allowed` says."""
    return lambda value: "" if allowed(value) else words


def whole(minimum: int, maximum: int = 2**63 - 1) -> Rule:
    """Rule: an integer in this range, by default up to the largest that torch takes."""
    words = f"{minimum} or more" if maximum == 2**63 - 1 else f"from {minimum} to {maximum}"
    return rule(lambda v: type(v) is int and minimum <= v <= maximum, f"an integer, {words}")


def number(allowed: Callable[[float], bool], words: str) -> Rule:
    """Rule: a number, neither NaN nor infinite, of which `allowed` holds."""
    largest = sys.float_info.max
    return rule(lambda v: type(v) in (int, float) and abs(v) <= largest and allowed(v), words)


def one_of(*words: str) -> Rule:
    """Rule: one of these texts."""
    listed = f"one of {', '.join(words)}"
    return lambda v: "" if type(v) is str and v in words else listed + closest(str(v), words)


def none_or(other: Rule) -> Rule:
    """Rule: None, or what another rule says."""
    return lambda v: "" if v is None or not other(v) else f"{other(v)}, or none"


def several(each: Rule) -> Rule:
    """Rule: one or more different values, each as another rule says."""

    def demand(value: object) -> str:
        values = value if type(value) in (tuple, list) else ()
        wrong = [each(v) for v in values or [None] if each(v)]
        if wrong:
            return f"one or more, each {wrong[0]}"
        repeated = [str(v) for v in values if values.count(v) > 1]
        return f"without repetition (of {repeated[0]})" if repeated else ""

    return demand


def class_order(value: object) -> str:
    """Rule: the classes 0 to 9, in any order."""
    wrong = several(whole(0, 9))(value)
    if not wrong and len(value) < 10:
        wrong = f"complete ({', '.join(str(c) for c in range(10) if c not in value)} missing)"
    return wrong and f"each of the classes 0 to 9 once: {wrong}"


BOOLEAN = rule(lambda v: type(v) is bool, "true or false")
POSITIVE = number(lambda v: v > 0, "a positive number")
FOLDER = rule(
    lambda v: (
        type(v) is str and v.isprintable() and v and (os.path.isdir(v) or not os.path.exists(v))
    ),
    "the name of a folder",
)

# What is allowed. The scripts check their constants before anything else.
RULES = {
    "DATASET": one_of("auto", "mnist", "fashion", "kmnist", "digits"),
    "DATA_DIR": FOLDER,
    "CHECKSUMS": BOOLEAN,
    "VALIDATION_SIZE": whole(0),
    "GENERATOR": lambda v: one_of(*GENERATORS)(v),
    "N_EXPERIENCES": rule(
        lambda v: type(v) is int and v in (1, 2, 5, 10), "1, 2, 5 or 10, to divide 10 classes"
    ),
    "CLASS_ORDER": class_order,
    "SHUFFLE_CLASSES": BOOLEAN,
    "SEEDS": several(whole(0)),
    "ITERATIONS": none_or(whole(1)),
    "BATCH_SIZE": whole(1),
    "LEARNING_RATE": POSITIVE,
    "ANNEAL": BOOLEAN,
    "GENERATOR_ITERATIONS": none_or(whole(1)),
    "GENERATOR_BATCH_SIZE": none_or(whole(1)),
    "GENERATOR_LEARNING_RATE": none_or(POSITIVE),
    "REPLAY_SIZE": none_or(whole(0)),
    "INCREASING_REPLAY_SIZE": BOOLEAN,
    "RATIO": none_or(number(lambda v: 0 <= v <= 1, "a number from 0 to 1")),
    "HIDDEN_UNITS": whole(1),
    "LATENT_SIZE": none_or(whole(1)),
    "KL_WEIGHT": none_or(POSITIVE),
    "MIXTURE_COMPONENTS": whole(0),
    # Whether it is there, torch knows (`choose_device`).
    "DEVICE": lambda v: one_of("auto", "cpu", "cuda", "cuda:1", "mps")(
        re.sub(r"^cuda:\d+$", "cuda", v) if type(v) is str else v
    ),
    "RESULTS_DIR": FOLDER,
    "FORCE": BOOLEAN,
    "QUIET": BOOLEAN,
    "LOAD": none_or(FOLDER),
}


def read_constants(*scripts: ModuleType) -> SimpleNamespace:
    """Constants of the scripts with what the command line changes, checked.

    :param scripts: modules with constants (NAME = value  # comment) and `RULES` for them.
    :return: the constants as attributes, by their own names.
    :raises SystemExit: with code 2 and one line, if one of them is not allowed.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--option value ...]",
        description=scripts[-1].__doc__.split("\n")[0],
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=100),
        allow_abbrev=False,
    )
    parser.error = lambda message: fail(f"{message}; --help lists the options")
    constants, rules = {}, {}
    for script in scripts:
        source = Path(script.__file__).read_text(encoding="utf-8")
        comments = dict(re.findall(r"^([A-Z_]+) = .+?# (.+)$", source, re.MULTILINE))
        for name, demand in script.RULES.items():
            if name not in vars(script):
                fail(f"{name} is missing at the top of {Path(script.__file__).name}; put it back")
            constants[name], rules[name] = vars(script)[name], demand
            shown = f"{comments.get(name, '')} ({constants[name]})".replace("%", "%%")
            option = "--" + name.lower().replace("_", "-")
            parser.add_argument(option, dest=name, nargs="*", metavar="", help=shown)
    changes, unknown = parser.parse_known_args()
    if unknown:
        word = unknown[0].split("=")[0]
        options = ["--" + name.lower().replace("_", "-") for name in constants]
        meant = closest("--" + word.lstrip("-").replace("_", "-"), options)
        fail(f"{word} is unknown{meant or '; --help lists the options'}")
    for name, words in vars(changes).items():
        if words is not None:
            is_text = isinstance(constants[name], str)  # a folder may be called 2024
            is_text |= name in ("LOAD", "SUMMARIZE") and words != ["none"]
            values = words if is_text else [literal(word) for word in words]
            values = values or [True]
            sequence = isinstance(constants[name], (tuple, list)) or len(values) > 1
            constants[name] = tuple(values) if sequence else values[0]
    for name, demand in rules.items():
        if wrong := demand(constants[name]):
            fail(f"{name} is {constants[name]!r}, but has to be {wrong}")
    return SimpleNamespace(**constants)


def literal(word: str) -> object:
    """A word of the command line as Python value: number, None, True, False, else the word."""
    try:
        return ast.literal_eval(word.title() if word.lower() in ("none", "true", "false") else word)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return word


def choose_device(name: str) -> str:
    """Device that "auto" stands for, or `name` itself if it is there; ends the program if not."""
    import torch

    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *there]
    if name != "auto" and name not in there:
        fail(f"DEVICE is {name!r}, but this machine has only: {', '.join(there)}")
    return there[0] if name == "auto" else name


# ------------------------------------------------------------------------------------------------
# 3: runs, and the files that they leave
# ------------------------------------------------------------------------------------------------


def run_folder(constants: SimpleNamespace, dataset: str, strategy: str, seed: int) -> Path:
    """Folder of one run's results. Its name tells apart whatever changes the numbers.

    That is the constants and the code of the four scripts (but for comments, docstrings and the
    values of the constants there). Device, threads and versions of packages are left out: they
    change the last digits.
    """
    others = (
        "SEEDS", "DATA_DIR", "RESULTS_DIR", "DEVICE", "FORCE", "QUIET", "LOAD", "STRATEGIES",
        "ABLATION", "N_JOBS", "BACKEND", "SCHEDULER", "TENSORBOARD", "SUMMARIZE",
    )  # fmt: skip
    deciding = {name: value for name, value in vars(constants).items() if name not in others}
    source = []
    for script in ("GenerativeModel", "TrainingInstances", "Generator", "GenerativeReplay"):
        tree = ast.parse(Path(__file__).with_name(f"{script}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                node.body[0] = ast.Pass()
        source += [
            ast.dump(node) for node in tree.body if not isinstance(node, ast.Assign | ast.Expr)
        ]
    text = json.dumps([deciding, source], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Path(constants.RESULTS_DIR) / f"{dataset}-{strategy}-{digest}-seed{seed}"


@contextmanager
def only_process(folder: Path, name: str, anew: bool = False) -> Iterator[None]:
    """Make a run's folder, and wait until no other process works in it.

    :param anew: whether to forget what an earlier run has left there.
    :raises SystemExit: if a loss in there is infinite or not a number.
    """
    from filelock import FileLock, Timeout

    make_folder(folder)
    lock = FileLock(folder / "lock")  # the system takes it back from a process that was killed
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{name}: another process is at it, waiting for that", flush=True)
        lock.acquire()
    try:
        if anew:
            for file in ("results.json", "generator.json", "state.pt"):
                (folder / file).unlink(missing_ok=True)
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        yield
    except FloatingPointError as error:
        state = folder / "state.pt"
        last = f"its last good state is {state}" if state.exists() else "it has no good state yet"
        fail(f"{name}: {error} ({last}); change what makes it diverge, such as LEARNING_RATE")
    finally:
        lock.release()


def save_state(folder: Path, constants: SimpleNamespace, strategy, **results) -> None:
    """Write what a run needs to go on after an experience: tensors and plain values.

    The scripts draw all their random numbers from torch, so that its state is enough.
    """
    import torch

    generator = strategy.replay and strategy.replay.generator
    state = {
        "run": folder.name,
        "constants": vars(constants),
        "strategy": strategy.state_dict(),
        "generator": generator and generator.state_dict(),  # for `look`; it is stored once
        "random": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
    }
    write(folder / "state.pt", state | results)


def read_state(path: Path) -> dict:
    """What `save_state` has written, with all tensors on the CPU.

    :raises SystemExit: if the file is not what it should be.
    """
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True)
        if state["run"] == path.resolve().parent.name:
            return state
        reason = f"but of {state['run']}"
    except Exception as error:  # a damaged file can raise anything
        reason = type(error).__name__
    fail(f"{path} is no checkpoint of this run ({reason}); move it away to start anew")


def restore(folder: Path, strategy) -> dict | None:
    """Bring a new strategy, and torch's random numbers, to where an interrupted run has left off.

    :return: the state that was saved, or None if there is none.
    """
    import torch

    path = folder / "state.pt"
    if not path.exists():
        return None
    state = read_state(path)
    strategy.load_state_dict(state["strategy"])
    torch.set_rng_state(state["random"]["cpu"])
    for number, random in enumerate(state["random"]["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(random, number)
    return state


def run_record(
    constants: SimpleNamespace, name: str, strategy: str, seed: int, notice: str
) -> dict:
    """What a file of results says of how its numbers came about, at the start of a run."""
    return {
        "name": name,
        "dataset": constants.DATASET,
        "notice": notice,
        "strategy": strategy,
        "seed": seed,
        "constants": vars(constants),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "torchvision", "avalanche-lib")},
        "seconds": 0.0,
    }


def write(path: Path, content) -> None:
    """Write a file whole or not at all: a dict as JSON, arrays, a state, a text or a figure."""
    import numpy as np
    import torch

    buffer = BytesIO()
    if path.suffix == ".json":
        buffer.write(json.dumps(content, indent=1).encode())
    elif path.suffix == ".npz":
        np.savez_compressed(buffer, **content)
    elif path.suffix == ".pt":
        torch.save(content, buffer)
    elif path.suffix == ".csv":
        buffer.write(content.encode())
    else:
        kind = path.suffix[1:]
        content.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        make_folder(path.parent)
        unfinished.write_bytes(buffer.getvalue())
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        fail(f"{path} can't be written ({error.strerror}); make room, or set RESULTS_DIR elsewhere")


def write_figures(folder: Path, figures: dict) -> None:
    """Write figures, by name, as pictures (PNG) and as drawings (SVG); show them on a display."""
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "the same file for the same figure"
    for name, figure in figures.items():
        for ending in ("png", "svg"):
            write(folder / f"{name}.{ending}", figure)
            figure.set_layout_engine("none")  # the first has arranged it, which takes a while
    if plt.get_backend().lower() != "agg":
        plt.show()
    plt.close("all")


def make_folder(folder: Path) -> None:
    """Make a folder unless it is there.

    :raises SystemExit: if that can't be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"folder {str(folder)!r} can't be made ({error.strerror}); set RESULTS_DIR elsewhere")


def prepare(constants: SimpleNamespace) -> SimpleNamespace:
    """Settle what depends on the machine, instead of "auto" or None, and echo the constants.

    :return: the images, see `load_images`.
    :raises SystemExit: with code 2 and one line, if anything is not as it has to be.
    """
    folder = Path(constants.RESULTS_DIR)
    try:  # to write, but without leaving anything behind: what follows may still end in an error
        while not folder.exists():
            folder = folder.parent
        TemporaryFile(dir=folder).close()
    except OSError as error:
        fail(f"RESULTS_DIR {constants.RESULTS_DIR!r} can't be written ({error.strerror})")
    constants.DEVICE = choose_device(constants.DEVICE)
    images = load_images(constants.DATASET, constants.DATA_DIR, constants.CHECKSUMS)
    constants.DATASET = images.name
    constants.ITERATIONS = constants.ITERATIONS or images.iterations
    make_benchmark(images, constants)  # ends the program here if it can't be made
    make_folder(Path(constants.RESULTS_DIR))
    if not constants.QUIET:
        lines = (f"{name} = {value!r}" for name, value in vars(constants).items())
        print("\n".join(lines), flush=True)
    return images


def for_seed(constants: SimpleNamespace, seed: int) -> SimpleNamespace:
    """Seed torch, and return the constants of this run: with an own order of classes if wanted."""
    import torch

    torch.manual_seed(seed)
    order = constants.CLASS_ORDER
    if constants.SHUFFLE_CLASSES:
        order = tuple(order[i] for i in torch.randperm(len(order)))
    return SimpleNamespace(**vars(constants) | {"CLASS_ORDER": order})


def metric_row(metrics: dict, name: str, experiences: int) -> list[float]:
    """One of Avalanche's metrics on each experience of the test stream, as a list."""
    return [
        float(metrics[f"{name}/eval_phase/test_stream/Task000/Exp{i:03d}"])
        for i in range(experiences)
    ]


def report(constants: SimpleNamespace, text: str) -> None:
    """Print a line at once, unless nothing but the end is wanted."""
    if not constants.QUIET:
        print(text, flush=True)


def interruptible(main: Callable[[], None]) -> None:
    """Run a script; when it is interrupted, end it with one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        text = "\ninterrupted; the same command, without --force, goes on after the last experience"
        print(text, file=sys.stderr, flush=True)
        atexit._run_exitfuncs()  # joblib's, which end its processes
        os._exit(130)  # what else Python does at its end takes seconds


# ------------------------------------------------------------------------------------------------
# 4: how good painted images are
# ------------------------------------------------------------------------------------------------


def sample_quality(images: SimpleNamespace, x, y) -> dict[str, float]:
    """How good painted images are, as an independent classifier sees them.

    The classifier is a measuring instrument alone. It is trained on the real images of all classes,
    once in each process, and no scholar ever sees it.

    :param images: real ones, from `load_images` or `hold_out`: it learns from the training set and
        compares with the test set.
    :param x: painted images, shape (n, C, H, W); a few thousand, in random order.
    :param y: the class labels (int64) that the scholar gives them, shape (n,).
    :return: "label_accuracy", the share of painted images in which the classifier sees their label;
        "precision" and "recall", see `precision_and_recall`, in its last hidden layer.
    """
    import torch

    key = images.name, len(images.train[1])
    if key not in CLASSIFIERS:
        CLASSIFIERS[key] = train_classifier(*images.train)
    classifier, (real, _), x, y = CLASSIFIERS[key], images.test, x.cpu(), y.cpu()
    count = min(len(x), len(real))
    rows = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:count]
    with torch.no_grad():
        painted, real = classifier[:-1](x), classifier[:-1](real[rows])
        right = classifier[-1](painted).argmax(1) == y
    precision, recall = precision_and_recall(real, painted[:count])
    return {
        "label_accuracy": right.float().mean().item(), "precision": precision, "recall": recall
    }  # fmt: skip


# Those of `sample_quality`, by data set and number of training images.
CLASSIFIERS = {}


def train_classifier(x, y):
    """A small convolutional network, trained on 1,000 minibatches of 128 real images.

    It leaves torch's random state as it is. Its last layer is the output.
    """
    import torch
    from torch import nn

    from TrainingInstances import FixedIterations, TensorLoader

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, channels, height, width = x.shape
        classifier = nn.Sequential(
            nn.Conv2d(channels, 8, 5, stride=2, padding=2), nn.ReLU(),
            nn.Conv2d(8, 16, 5, stride=2, padding=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * -(-height // 4) * -(-width // 4), 128), nn.ReLU(),
            nn.Linear(128, int(y.max()) + 1),
        )  # fmt: skip
        optimizer = torch.optim.Adam(classifier.parameters(), fused=True)
        for images, labels in FixedIterations(TensorLoader((x, y), 128, shuffle=True), 1000):
            optimizer.zero_grad()
            nn.functional.cross_entropy(classifier(images), labels).backward()
            optimizer.step()
    return classifier


def precision_and_recall(real, painted, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2).

    Around each image of one kind lies a ball that reaches to its k-th nearest neighbour of that
    kind. Precision is the share of painted images that lie in a ball of the real ones: are they
    realistic? Recall is the share of real ones that lie in a ball of the painted: is all painted?
    In the features of a classifier precision is lenient: blur and contrast mean little to one.

    :param real: features of real images, shape (n, features).
    :param painted: features of as many painted ones, same shape.
    """
    import torch

    def share(features, others):
        radii = torch.cdist(others, others).kthvalue(k + 1).values  # the nearest is itself
        return (torch.cdist(features, others) <= radii).any(1).float().mean().item()

    return share(painted, real), share(real, painted)


if __name__ == "__main__":
    interruptible(main)
