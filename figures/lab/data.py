"""Data sets, folders of images, the streams made of them, and any benchmark in memory."""

import os
import socket
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import torch
from avalanche.benchmarks import (
    CLScenario,
    DatasetExperience,
    benchmark_from_datasets,
    with_classes_timeline,
)
from avalanche.benchmarks.scenarios.task_aware import with_task_labels
from avalanche.benchmarks.utils import ConstantSequence, DataAttribute, TaskLabels
from avalanche.benchmarks.utils.classification_dataset import (
    TaskAwareSupervisedClassificationDataset,
)
from filelock import FileLock
from sklearn.datasets import load_digits as load_sklearn_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import v2

from figures.lab.constants import Constants, UserError
from figures.lab.folders import printable, read_folder

# --- Data sets ------------------------------------------------------------------------------------


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


def load_images(constants: Constants, quiet: bool = False) -> Images:
    """Load the data set, and take validation images out of the training set if any are wanted.

    "auto" is MNIST, and where it can't be had scikit-learn's digits, with a notice.

    :param quiet: print nothing about a folder of images: another process has done so.
    :raises UserError: if a data set is damaged, or isn't one.
    :raises ConnectionError: if a data set that was asked for by name can't be downloaded.
    """
    name, size = constants.DATASET, constants.VALIDATION_SIZE
    published = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST"}
    if constants.IMAGE_SIZE and name in ("auto", "digits", *published):
        raise UserError(f"IMAGE_SIZE is for folders of images, and DATASET is {name!r}")
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
        images = load_folder(name, constants, quiet)
    if size:
        x, y = images.train
        try:
            parts = train_test_split(x, y, test_size=size, stratify=y, random_state=0)
        except ValueError as error:
            raise UserError(f"VALIDATION_SIZE is {size}: {error}") from None
        if any(len(y.unique()) < len(images.classes) for y in parts[2:]):
            text = "a class would have no image to learn from, or none to test on"
            raise UserError(f"VALIDATION_SIZE is {size}: {text}")
        images = images._replace(train=tuple(parts[::2]), test=tuple(parts[1::2]))
    return images


def load_published(name: str, data_dir: str) -> Images:
    """Load a data set of torchvision, which downloads it if it is missing.

    :param name: "MNIST", "FashionMNIST" or "KMNIST".
    :raises ConnectionError: if it can't be downloaded.
    :raises UserError: if a file of (Fashion-)MNIST is there, but isn't the published one.
    """
    kind = getattr(datasets, name)
    files = [Path(data_dir, name, "raw", Path(packed).stem) for packed, _ in kind.resources]
    for file, checksum in zip(files, CHECKSUMS.get(name, ())):
        if file.exists() and not check_integrity(file, checksum):
            raise UserError(f"{file} isn't the published file; delete it, or set DATA_DIR")
    try:
        if not all(file.exists() for file in files):
            before = socket.getdefaulttimeout()
            socket.setdefaulttimeout(10)  # else an unreachable server takes minutes to give up on
            try:
                with FileLock(Path(data_dir, "lock")):  # two copies of a command
                    kind(data_dir, download=True)
            finally:
                socket.setdefaulttimeout(before)
        train, test = (kind(data_dir, train=train) for train in (True, False))
    except (RuntimeError, OSError, AssertionError, ValueError, KeyError) as error:
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
    x, y = load_sklearn_digits(return_X_y=True)
    x = torch.tensor(x / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    x = torch.nn.functional.interpolate(x, size=(28, 28), mode="bilinear")
    y = torch.tensor(y, dtype=torch.int64)
    rows = train_test_split(torch.arange(len(y)), test_size=0.2, stratify=y, random_state=0)
    parts = ((x[part], y[part]) for part in rows)
    return Images("digits", *parts, [str(label) for label in range(10)], iterations=300)


def load_folder(folder: str, constants: Constants, quiet: bool) -> Images:
    """Load a folder of images (see `read_folder`), and print what has been decided about it.

    The name of the data set gets a checksum, so that results of other images, labels or names of
    classes have other names.

    :raises UserError: if the folder can't be read.
    """
    path, results = Path(os.path.expanduser(folder)), Path(constants.RESULTS_DIR)
    train, test, classes, notices = read_folder(path, constants.IMAGE_SIZE, results, quiet)
    if not quiet:
        for notice in notices:
            print(f"{printable(path)}: {notice}", flush=True)
    digest = joblib.hash([[part.numpy() for part in (*train, *test)], classes])[:8]
    return Images(f"{printable(path.resolve().name)}-{digest}", train, test, classes)


def fill_in(constants: Constants, images: Images) -> Constants:
    """Fill in what depends on the data set: DATASET, CLASS_ORDER, ITERATIONS.

    The constants are printed, and the names of the classes unless they are their labels.

    :raises UserError: if data and constants don't go together.
    """
    labels = range(len(images.classes))
    order = constants.CLASS_ORDER or tuple(labels)
    if len(labels) < 2:
        raise UserError(f"DATASET has a single class, {images.classes[0]!r}; it needs two or more")
    if sorted(order) != list(labels):
        raise UserError(f"CLASS_ORDER is {order}, but has to hold each label of {[*labels]} once")
    count, scenario = constants.N_EXPERIENCES, constants.SCENARIO
    if scenario == "permuted":
        if constants.SHUFFLE_CLASSES or order != tuple(labels):
            raise UserError("SCENARIO 'permuted' has all classes in each experience, in no order")
    elif len(order) < count:
        raise UserError(f"N_EXPERIENCES is {count}, but there are only {len(order)} classes")
    elif len(order) == count and scenario == "domain":
        raise UserError(f"N_EXPERIENCES is {count}: a domain would have one class, and no choice")
    folder = Path(constants.RESULTS_DIR)
    if any(path.is_file() for path in (folder, *folder.parents)):
        raise UserError(f"RESULTS_DIR is {str(folder)!r}, but has to be the name of a folder")
    constants = constants.changed(
        DATASET=images.name if constants.DATASET == "auto" else constants.DATASET,
        CLASS_ORDER=order,
        ITERATIONS=constants.ITERATIONS or images.iterations,
    )
    print("\n".join(f"{name} = {value!r}" for name, value in constants), flush=True)
    if images.classes != list(map(str, labels)):
        print(table_of_classes(images.classes), flush=True)
    return constants


def table_of_classes(classes: list[str]) -> str:
    """List labels and names of the classes in lines of up to 100 characters."""
    entries = [f"{label} {name}".replace(" ", "\0") for label, name in enumerate(classes)]
    text = textwrap.fill(
        "classes: " + ", ".join(entries), 100, break_long_words=False, break_on_hyphens=False
    )
    return text.replace("\0", " ")  # lines are broken between entries only


def shuffle_classes(constants: Constants) -> Constants:
    """Return the constants with another CLASS_ORDER, if SHUFFLE_CLASSES says so."""
    if not constants.SHUFFLE_CLASSES:
        return constants
    order = constants.CLASS_ORDER
    return constants.changed(CLASS_ORDER=tuple(order[i] for i in torch.randperm(len(order))))


# --- Streams --------------------------------------------------------------------------------------


def make_benchmark(images: Images, constants: Constants):
    """Make the stream of experiences that SCENARIO names, without task identity.

    :return: an Avalanche benchmark with `train_stream` and `test_stream`, equally long.
    """

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


def stream_names(images: Images, constants: Constants) -> dict[str, list]:
    """Name the `experiences`, and the `classes` by label; `label_order` is that of arrival."""
    order, classes = list(constants.CLASS_ORDER), images.classes
    if constants.SCENARIO == "permuted":
        experiences = [f"permutation {i}" for i in range(1, constants.N_EXPERIENCES + 1)]
    else:
        groups = np.array_split([classes[label] for label in order], constants.N_EXPERIENCES)
        experiences = [" ".join(group) for group in groups]
    if constants.SCENARIO == "domain":
        order = list(range(len(groups[0])))
        classes = list(map(str, order))
    return {"experiences": experiences, "classes": classes, "label_order": order}


def shape_and_classes(benchmark: CLScenario) -> tuple[tuple[int, int, int], int]:
    """Return the shape of an image, (channels, height, width), and the number of classes."""
    experiences = [experience for stream in benchmark.streams.values() for experience in stream]
    classes = [experience.classes_in_this_experience for experience in experiences]
    image, *_ = benchmark.train_stream[0].dataset[0]
    return tuple(image.shape), 1 + max(map(max, classes))


def normalization(benchmark: CLScenario) -> nn.Module:
    """Make a module that normalizes images by mean and std of the first experience's pixels.

    :raises UserError: if they are all the same.
    """
    x, *_ = tensors_of(benchmark.train_stream[0])
    if x.min() == x.max():
        raise UserError(
            f"all pixels of the first experience are {x.min():.2f}: there is nothing to learn in it"
        )
    return v2.Normalize([x.mean()], [x.std()])


def first_of_each_class(benchmark: CLScenario, labels: list[int]) -> Tensor:
    """Return the first test image of each label, in this order."""
    tensors = map(tensors_of, benchmark.test_stream)
    x, y, _ = map(torch.cat, zip(*tensors))
    return torch.cat([x[y == label][:1] for label in labels])


# --- Benchmarks in memory -------------------------------------------------------------------------


def in_memory_benchmark(train: Iterable, test: Iterable, **further: Iterable) -> CLScenario:
    """Make an Avalanche benchmark from tensors, without task identity (every task label is 0).

    Our strategies feed from the `tensors` of its datasets: a transform that is set later has no
    effect. A subset of one, or one that a plugin has extended, doesn't have them any more and is
    loaded sample by sample.

    :param train: for each experience a pair of images and class labels, tensors or arrays. Images
        are floats in [0, 1], shape (n, C, H, W), and become float32; labels are whole numbers from
        0 on, shape (n,) or (n, 1), and become int64.
    :param test: the same for its test set.
    :param further: the same for further streams, by their names.
    :return: a benchmark with `train_stream`, `test_stream` and those of the further names.
    :raises ValueError: if images or labels aren't like that; it names stream and experience.
    """
    streams, shape = {"train": train, "test": test} | further, None
    for name, pairs in streams.items():
        parts = []
        for number, pair in enumerate(pairs, 1):
            try:
                x, y = checked_pair(pair)
                shape = shape or x.shape[1:]
                if x.shape[1:] != shape:
                    raise ValueError(f"images are {(*x.shape[1:],)}, those before {(*shape,)}")
            except (TypeError, ValueError, RuntimeError) as error:
                line = str(error).split("\n")[0]
                raise ValueError(f"{name} stream, experience {number}: {line}") from error
            attributes = [DataAttribute(y, "targets"), TaskLabels(ConstantSequence(0, len(y)))]
            dataset = TaskAwareSupervisedClassificationDataset(
                [TensorDataset(x, y)], data_attributes=attributes
            )
            dataset.tensors = (x, y, torch.zeros_like(y))
            parts.append(dataset)
        if not parts:
            raise ValueError(f"the {name} stream has no experience")
        streams[name] = parts
    return with_task_labels(with_classes_timeline(benchmark_from_datasets(**streams)))


def checked_pair(pair: tuple) -> tuple[Tensor, Tensor]:
    """Convert images and labels of an experience where that changes no value, and check them.

    :return: float32, shape (n, C, H, W), and int64, shape (n,).
    :raises ValueError: if they aren't images and their labels.
    """
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ValueError(f"a pair of images and labels is needed, not a {type(pair).__name__}")
    x, y = map(as_tensor, pair)
    return checked_images(x), checked_labels(y, len(x))


def as_tensor(values) -> Tensor:
    """Return a tensor as it is, and an array or nested lists as a new tensor, on the CPU."""
    if isinstance(values, Tensor):
        return values.detach().cpu()
    values = np.asarray(values)
    # torch takes neither reversed axes nor numbers of another byte order.
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("=")))


def checked_images(x: Tensor) -> Tensor:
    """Check images, and return them as float32.

    :raises ValueError: if they aren't floats in [0, 1], shape (n, C, H, W).
    """
    shape = (*x.shape,)
    if x.ndim != 4:
        raise ValueError(f"images have shape {shape}, not (n, channels, height, width)")
    if 0 in shape:
        raise ValueError(f"there are no images, or they are empty: shape {shape}")
    if shape[3] in (1, 3, 4) and min(shape[1:3]) > 4:
        raise ValueError(f"images have shape {shape}: put channels first, .permute(0, 3, 1, 2)")
    if not (x.is_floating_point() or x.dtype == torch.bool):
        raise ValueError(f"images are {x.dtype}, not floats in [0, 1]: divide 8 bits by 255")
    x = x.float()
    if not x.isfinite().all():
        raise ValueError("pixels are infinite or not a number (NaN)")
    if x.min() < 0 or x.max() > 1:
        raise ValueError(
            f"pixels lie in [{x.min():.2f}, {x.max():.2f}] and have to lie in [0, 1]: "
            "divide by 255, leave Normalize out of the transforms (solver and generator normalize)"
        )
    return x


def checked_labels(y: Tensor, count: int) -> Tensor:
    """Check the labels of so many images, and return them as int64, shape (n,).

    :raises ValueError: if they aren't whole numbers from 0 on, one for each image.
    """
    if y.shape not in [(count,), (count, 1)]:
        raise ValueError(f"labels have shape {(*y.shape,)}, but there are {count} images")
    whole = y.flatten().long()
    if not torch.equal(whole.to(y.dtype), y.flatten()):  # fractions, NaN
        raise ValueError(f"labels are {y.dtype}, and not all of them whole numbers")
    if whole.min() < 0:
        raise ValueError(f"labels go down to {whole.min()}, and have to count from 0")
    if whole.max() >= 100_000:  # the solver has a logit for each number
        raise ValueError(f"labels go up to {whole.max()}, and have to count the classes from 0")
    return whole


def load_in_memory(benchmark: CLScenario) -> CLScenario:
    """Load any Avalanche benchmark, such as `SplitFMNIST`, into memory, where it trains faster.

    The transforms are applied once: a random one gives each image one variant for the whole run.
    All streams stay, and so do class labels; task labels become 0, because there is one head.
    """
    streams = {
        name: [tensors_of(experience)[:2] for experience in stream]
        for name, stream in benchmark.streams.items()
    }
    for name in {"train", "test"} - streams.keys():
        raise ValueError(f"the benchmark has no {name} stream")
    return in_memory_benchmark(**streams)


def tensors_of(experience: DatasetExperience) -> tuple[Tensor, Tensor, Tensor]:
    """Return the images of an experience, their class labels and their task labels.

    What isn't from `in_memory_benchmark`, or is a subset, is loaded sample by sample.

    :raises ValueError: if there are no images, or other objects than tensors.
    """
    dataset = experience.dataset
    if hasattr(dataset, "tensors"):
        return dataset.tensors
    stream, number = experience.origin_stream.name, experience.current_experience + 1
    place = f"{stream} stream, experience {number}"
    if len(dataset) == 0:
        raise ValueError(f"{place}: there are no images")
    # A generator of its own, or loading would draw a number from the one that training uses.
    loader = DataLoader(
        dataset, len(dataset), collate_fn=dataset.collate_fn, generator=torch.Generator()
    )
    try:
        x, y, *task_labels = next(iter(loader))
    except TypeError as error:
        raise ValueError(f"{place}: {error}; is ToTensor among the transforms?") from error
    return x, y, task_labels[0] if task_labels else torch.zeros_like(y)
