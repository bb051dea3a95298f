"""The generator of the scholar: a VAE wrapped into a trainable strategy, and its visualizer.

In:  the constants below and a stream of experiences.  Out: a generator strategy for
GenerativeReplay.py; run as a script, a picture of what the generator remembers after each one.
The constants, the data and the stream stand here for both scripts.
Run: `python Generator.py`, or with `--help`.  Next to read: TrainingInstances.py.
"""

import argparse
import ast
import hashlib
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NoReturn

# ------------------------------------------------------------------------------------------------
# Constants of both scripts. Edit them here, or give them on the command line: BATCH_SIZE = 64 is
# `--batch-size 64`, SEEDS = (0, 1, 2) is `--seeds 0 1 2`, None is `none`.
DATASET = "auto"  # mnist; fashion; kmnist; digits (in scikit-learn); auto: mnist, else digits
DATA_DIR = os.environ.get("DATA_DIR") or "data"  # where the images lie, or are downloaded to
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
# ------------------------------------------------------------------------------------------------

# torch and avalanche are imported where they are used: they take ten seconds, and `--help` and
# errors in the constants shouldn't wait for them.


def fail(message: str) -> NoReturn:
    """End the program with one line that says what is wrong and what to do, and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def whole(minimum: int) -> Callable[[object], bool]:
    """Rule: an integer that is at least `minimum`."""
    return lambda value: type(value) is int and value >= minimum


def number(value: object) -> bool:
    """Rule: a number, neither NaN nor infinite."""
    return type(value) in (int, float) and math.isfinite(value)


def positive(value: object) -> bool:
    """Rule: a number above 0."""
    return number(value) and value > 0


def distinct(value: object) -> bool:
    """Rule: a sequence of different integers from 0 to 2**63 - 1 (what torch takes as a seed)."""
    return (
        type(value) in (tuple, list)
        and all(whole(0)(v) and v < 2**63 for v in value)
        and len(value) == len(set(value)) > 0
    )


# What is allowed, in code and in words. The scripts check their constants before anything else.
RULES = {
    "DATASET": (
        lambda v: v in ("auto", "mnist", "fashion", "kmnist", "digits"),
        "one of auto, mnist, fashion, kmnist, digits",
    ),
    "DATA_DIR": (lambda v: isinstance(v, str) and v != "", "the name of a folder"),
    "VALIDATION_SIZE": (whole(0), "a number of images, 0 or more"),
    "GENERATOR": (
        lambda v: isinstance(v, str) and v in GENERATORS,
        "one of GENERATORS: vae, cvae, wgan-gp, or your own",
    ),
    "N_EXPERIENCES": (lambda v: whole(1)(v) and 10 % v == 0, "1, 2, 5 or 10, to divide 10 classes"),
    "CLASS_ORDER": (
        lambda v: distinct(v) and sorted(v) == list(range(10)),
        "each of the classes 0 to 9 once",
    ),
    "SHUFFLE_CLASSES": (lambda v: type(v) is bool, "true or false"),
    "SEEDS": (distinct, "one or more different integers, 0 or more"),
    "ITERATIONS": (lambda v: v is None or whole(1)(v), "a positive integer, or none"),
    "BATCH_SIZE": (whole(1), "a positive integer"),
    "LEARNING_RATE": (positive, "a positive number"),
    "ANNEAL": (lambda v: type(v) is bool, "true or false"),
    "GENERATOR_ITERATIONS": (lambda v: v is None or whole(1)(v), "a positive integer, or none"),
    "GENERATOR_BATCH_SIZE": (lambda v: v is None or whole(1)(v), "a positive integer, or none"),
    "GENERATOR_LEARNING_RATE": (lambda v: v is None or positive(v), "a positive number, or none"),
    "REPLAY_SIZE": (lambda v: v is None or whole(0)(v), "an integer, 0 or more, or none"),
    "INCREASING_REPLAY_SIZE": (lambda v: type(v) is bool, "true or false"),
    "RATIO": (
        lambda v: v is None or (number(v) and 0 <= v <= 1),
        "a number from 0 to 1, or none",
    ),
    "HIDDEN_UNITS": (whole(1), "a positive integer"),
    "LATENT_SIZE": (lambda v: v is None or whole(1)(v), "a positive integer, or none"),
    "KL_WEIGHT": (lambda v: v is None or positive(v), "a positive number, or none"),
    "MIXTURE_COMPONENTS": (whole(0), "an integer, 0 or more"),
    "DEVICE": (
        lambda v: isinstance(v, str) and re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", v),
        "one of auto, cpu, cuda, cuda:0, mps",
    ),
    "RESULTS_DIR": (lambda v: isinstance(v, str) and v != "", "the name of a folder"),
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
        for name, rule in script.RULES.items():
            constants[name], rules[name] = vars(script)[name], rule
            shown = f"{comments.get(name, '')} ({constants[name]})".replace("%", "%%")
            option = "--" + name.lower().replace("_", "-")
            parser.add_argument(option, dest=name, nargs="*", metavar="", help=shown)
    for name, words in vars(parser.parse_args()).items():
        if words is not None:
            is_text = isinstance(constants[name], str)  # a folder may be called 2024
            values = words if is_text else [literal(word) for word in words]
            values = values or [True]
            sequence = isinstance(constants[name], tuple) or len(values) > 1
            constants[name] = tuple(values) if sequence else values[0]
    for name, (allowed, description) in rules.items():
        if not allowed(constants[name]):
            fail(f"{name} is {constants[name]!r}, but has to be {description}")
    return SimpleNamespace(**constants)


def literal(word: str) -> object:
    """A word of the command line as Python value: number, None, True, False, else the word."""
    try:
        return ast.literal_eval(word.title() if word.lower() in ("none", "true", "false") else word)
    except (ValueError, SyntaxError, TypeError):
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


def load_images(name: str, data_dir: str) -> SimpleNamespace:
    """Images and labels of a data set, in memory.

    :param name: "mnist", "fashion", "kmnist", "digits", or "auto" (MNIST, and the digits where it
        can't be had).
    :param data_dir: folder where torchvision looks for the data, and to which it downloads it.
    :return: `name`, resolved; `train` and `test`, pairs of images (float32 in [0, 1], shape
        (n, 1, 28, 28)) and labels (int64, shape (n,)); `iterations`, how many minibatches per
        experience suit it; `notice`, a text that belongs wherever results are shown, or "".
    :raises SystemExit: if a data set was asked for by name and can't be had.
    """
    if name == "digits":
        return load_digits()
    wanted = "mnist" if name == "auto" else name
    try:
        return load_torchvision(wanted, data_dir)
    except Exception as error:  # torchvision has no error of its own for damaged files
        reason = str(error).split("\n")[0] or type(error).__name__
    if name != "auto":
        fail(
            f"{name} can be neither read from {data_dir!r} nor downloaded ({reason}); set DATA_DIR "
            "to the folder that holds its files, delete damaged ones, or set DATASET to 'digits'"
        )
    images = load_digits()
    images.notice = "scikit-learn's 8x8 digits, NOT MNIST"
    text = f"MNIST can't be had ({reason}). This run uses {images.notice}."
    print(f"\n{'!' * len(text)}\n{text}\n{'!' * len(text)}\n", flush=True)
    return images


def load_torchvision(name: str, data_dir: str) -> SimpleNamespace:
    """MNIST (LeCun et al. 1998), Fashion-MNIST (Xiao et al. 2017) or Kuzushiji-MNIST (Clanuwat et
    al. 2018), from `data_dir`, downloaded if it is not there.

    :raises Exception: of whatever kind, if it can't be had or read.
    """
    import socket

    from torchvision import datasets

    dataset = {
        "mnist": datasets.MNIST, "fashion": datasets.FashionMNIST, "kmnist": datasets.KMNIST
    }[name]  # fmt: skip
    try:
        sets = [dataset(data_dir, train=train) for train in (True, False)]
    except RuntimeError:  # torchvision's word for "not there"
        print(f"{dataset.__name__} is not in {data_dir!r}: downloading it", flush=True)
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(10)  # else an unreachable server takes minutes to give up on
        try:
            dataset(data_dir, download=True)
        finally:
            socket.setdefaulttimeout(timeout)
        sets = [dataset(data_dir, train=train) for train in (True, False)]
    train, test = ((s.data.unsqueeze(1).float() / 255, s.targets) for s in sets)
    return SimpleNamespace(name=name, train=train, test=test, iterations=2000, notice="")


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
        masks = [torch.isin(y, some) for some in classes]
        if not all(map(torch.any, masks)):
            size = constants.VALIDATION_SIZE
            fail(f"VALIDATION_SIZE {size} leaves an experience without images; change it")
        return [(x[mask], y[mask]) for mask in masks]

    train, test = split(*images.train), split(*images.test)
    if cumulative:
        train = [tuple(map(torch.cat, zip(*train[: i + 1]))) for i in range(len(train))]
    return in_memory_benchmark(train, test)


def make_generator_strategy(shape: tuple[int, int, int], constants: SimpleNamespace):
    """The generator as a trainable strategy, to be passed on as `generator_strategy`.

    It learns with the solver's optimizer, batch size, learning rate and iterations unless another
    suits it better or the GENERATOR_... constants say otherwise.

    :param shape: shape of one image, (channels, height, width).
    :return: a strategy with a new generator as `model`, the one that GENERATOR names.
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
    return VAETraining(model=vae, criterion=criterion, **generator_training(vae, constants))


def make_cvae(shape: tuple[int, int, int], constants: SimpleNamespace):
    """A `ConditionalVAE`. Its z comes from N(0, I), so its encodings have to keep to that."""
    from GenerativeModel import ConditionalVAE, negative_elbo
    from TrainingInstances import VAETraining

    classes, latent_size = len(constants.CLASS_ORDER), constants.LATENT_SIZE or 8
    cvae = ConditionalVAE(shape, classes, constants.HIDDEN_UNITS, latent_size)
    criterion = partial(negative_elbo, kl_weight=constants.KL_WEIGHT or 1)
    return VAETraining(model=cvae, criterion=criterion, **generator_training(cvae, constants))


def make_wgan(shape: tuple[int, int, int], constants: SimpleNamespace):
    """A `WGAN` with gradient penalty, and Adam's betas from Gulrajani et al.'s code for MNIST.

    Its iterations are the critic's: five times the solver's, so that its painter has as many. That
    code has a hundred times more, at a tenth of the learning rate.
    """
    from GenerativeModel import WGAN
    from TrainingInstances import WGANTraining

    wgan = WGAN(shape, constants.HIDDEN_UNITS, constants.LATENT_SIZE or 32)
    own = {"learning_rate": 1e-3, "iterations": 5 * constants.ITERATIONS, "betas": (0.5, 0.9)}
    return WGANTraining(model=wgan, **generator_training(wgan, constants, **own))


# What GENERATOR may be: a function from the shape of an image and the constants to a strategy. For
# a generator of your own, add a line.
GENERATORS = {
    "vae": make_vae,
    "cvae": make_cvae,
    "wgan-gp": make_wgan,
}


def generator_training(
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

    return {
        **training(
            model,
            constants.GENERATOR_LEARNING_RATE or learning_rate or constants.LEARNING_RATE,
            constants.GENERATOR_ITERATIONS or iterations or constants.ITERATIONS,
            constants.ANNEAL,
            betas,
        ),
        "train_mb_size": constants.GENERATOR_BATCH_SIZE or constants.BATCH_SIZE,
        "eval_mb_size": 1000,
        "replay_size": constants.REPLAY_SIZE,
        "increasing_replay_size": constants.INCREASING_REPLAY_SIZE,
        "ratio": constants.RATIO,
        "evaluator": EvaluationOnly(loss_metrics(experience=True)),
        "device": constants.DEVICE,
    }


def training(
    model,
    learning_rate: float,
    iterations: int,
    anneal: bool,
    betas: tuple[float, float] = (0.9, 0.999),
) -> dict:
    """Arguments of a strategy that say how it optimises: Adam, for so many iterations.

    :param anneal: whether the learning rate falls to 0 over each experience.
    """
    from torch.optim import Adam

    from TrainingInstances import Annealing

    optimizer = Adam(model.parameters(), lr=learning_rate, betas=betas, fused=True)
    plugins = [Annealing(optimizer, iterations)] if anneal else []
    return {"optimizer": optimizer, "iterations": iterations, "plugins": plugins}


def run_folder(constants: SimpleNamespace, dataset: str, strategy: str, seed: int) -> Path:
    """Folder of one run's results. Its name tells apart whatever changes the numbers.

    That is the constants and the code of the four scripts (but for comments, and the values of the
    constants there). Device, threads and versions are left out: they change the last digits.
    """
    places = (
        "SEEDS", "DATA_DIR", "RESULTS_DIR", "DEVICE", "STRATEGIES", "ABLATION", "N_JOBS", "FORCE"
    )  # fmt: skip
    deciding = {name: value for name, value in vars(constants).items() if name not in places}
    code = []
    for script in ("GenerativeModel", "TrainingInstances", "Generator", "GenerativeReplay"):
        tree = ast.parse(Path(__file__).with_name(f"{script}.py").read_text(encoding="utf-8"))
        code += [ast.dump(node) for node in tree.body if not isinstance(node, ast.Assign)]
    text = json.dumps([deciding, code], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Path(constants.RESULTS_DIR) / f"{dataset}-{strategy}-{digest}-seed{seed}"


def run_record(
    constants: SimpleNamespace, images: SimpleNamespace, strategy: str, seed: int, started: float
) -> dict:
    """What a file of results says of how its numbers came about.

    :param started: `time.perf_counter()` at the start of the run.
    """
    import avalanche
    import torch

    return {
        "dataset": images.name,
        "notice": images.notice,
        "strategy": strategy,
        "seed": seed,
        "constants": vars(constants),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "avalanche": avalanche.__version__,
        },
        "seconds": round(time.perf_counter() - started, 1),
    }


def write(path: Path, content) -> None:
    """Write a file whole or not at all: a dict as JSON, a figure as picture, arrays as .npz."""
    import numpy as np

    buffer = BytesIO()
    if path.suffix == ".json":
        buffer.write(json.dumps(content, indent=1).encode())
    elif path.suffix == ".npz":
        np.savez_compressed(buffer, **content)
    else:
        content.savefig(buffer, format=path.suffix[1:])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_bytes(buffer.getvalue())
        unfinished.replace(path)
    except OSError as error:
        fail(f"{path} can't be written ({error.strerror}); set RESULTS_DIR to another folder")


def prepare(*scripts: ModuleType) -> tuple:
    """What a script starts with: the constants and the images.

    The constants are those used, without "auto" or None for what depends on the machine, and are
    echoed.

    :param scripts: see `read_constants`.
    :raises SystemExit: with code 2 and one line, if anything is not as it has to be.
    """
    constants = read_constants(*scripts)
    constants.DEVICE = choose_device(constants.DEVICE)
    images = load_images(constants.DATASET, constants.DATA_DIR)
    constants.DATASET = images.name
    constants.ITERATIONS = constants.ITERATIONS or images.iterations
    make_benchmark(images, constants)  # ends the program here if it can't be made
    try:
        Path(constants.RESULTS_DIR).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"RESULTS_DIR {constants.RESULTS_DIR!r} can't be made ({error.strerror})")
    print("\n".join(f"{name} = {value!r}" for name, value in vars(constants).items()), flush=True)
    return constants, images


def for_seed(constants: SimpleNamespace, seed: int) -> SimpleNamespace:
    """Seed torch, and return the constants of this run: with an own order of classes if wanted."""
    import torch

    torch.manual_seed(seed)
    order = constants.CLASS_ORDER
    if constants.SHUFFLE_CLASSES:
        order = tuple(order[i] for i in torch.randperm(len(order)))
    return SimpleNamespace(**vars(constants) | {"CLASS_ORDER": order})


def main() -> None:
    """Train the generator alone along the stream and show what it remembers."""
    constants, images = prepare(sys.modules[__name__])
    for seed in constants.SEEDS:
        train_along_stream(images, constants, seed)
    show_windows()


def train_along_stream(images, constants: SimpleNamespace, seed: int) -> None:
    """One run: train on each experience, then sample, reconstruct and evaluate."""
    import torch

    from figures import draw

    started = time.perf_counter()
    folder = run_folder(constants, images.name, "generator", seed)
    constants = for_seed(constants, seed)
    benchmark = make_benchmark(images, constants)
    strategy = make_generator_strategy(images.train[0].shape[1:], constants)
    generator, matrix, pictures = strategy.model, [], []
    # The same test images after each experience, of all classes: also of those yet to come.
    originals = torch.cat([images.test[0][images.test[1] == c][:1] for c in constants.CLASS_ORDER])

    for experience in benchmark.train_stream:
        strategy.train(experience)
        metrics = strategy.eval(benchmark.test_stream)
        matrix.append(metric_row(metrics, "Loss_Exp", constants.N_EXPERIENCES))
        reconstructions = torch.full_like(originals, torch.nan)
        if hasattr(generator, "reconstruct"):
            labels = torch.tensor(constants.CLASS_ORDER, device=constants.DEVICE)
            reconstructions = generator.reconstruct(originals.to(constants.DEVICE), labels)
        pictures.append((generator.generate(20), reconstructions))
        text = f"loss on its images {matrix[-1][len(matrix) - 1]:.1f}"
        report(f"generator, seed {seed}", experience, constants, text, started)

    samples, reconstructions = (torch.stack(kind).cpu().numpy() for kind in zip(*pictures))
    arrays = {
        "samples": samples, "originals": originals.numpy(), "reconstructions": reconstructions
    }  # fmt: skip
    record = run_record(constants, images, "generator", seed, started)
    record["loss_matrix"] = matrix
    write(folder / "generator.json", record)
    write(folder / "samples.npz", arrays)
    write(folder / "generator.png", draw.generator(record, arrays))
    print(f"seed {seed}: {folder / 'generator.png'}")


def metric_row(metrics: dict, name: str, experiences: int) -> list[float]:
    """One of Avalanche's metrics on each experience of the test stream, as a list."""
    return [
        float(metrics[f"{name}/eval_phase/test_stream/Task000/Exp{i:03d}"])
        for i in range(experiences)
    ]


def report(run: str, experience, constants: SimpleNamespace, text: str, started: float) -> None:
    """Print a line after an experience; `started` is the `time.perf_counter()` of the run."""
    number = f"{experience.current_experience + 1}/{constants.N_EXPERIENCES}"
    seconds = time.perf_counter() - started
    print(f"{run}: experience {number}, {text}, {seconds:.0f} s", flush=True)


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


CLASSIFIERS = {}  # those of `sample_quality`, by data set and number of training images


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


def show_windows() -> None:
    """Show the figures in windows if matplotlib has found a display."""
    from matplotlib import pyplot as plt

    if plt.get_backend().lower() != "agg":
        plt.show()


if __name__ == "__main__":
    main()
