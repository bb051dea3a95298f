"""Folders of images, with one rule: what is learned is what a viewer shows.

`read_folder` finds the images, reads them with Pillow, and says in a line each what it has decided:
files that are left out, other sizes, the first of several frames, what lies behind transparency.
"""

import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm import tqdm

from figures.lab.constants import UserError

SIZE = 32  # pixels: height and width of images that come in several sizes
CONTRAST = 0.1  # of 1: an image that varies less shows hardly anything
BACKGROUNDS = {1: "white", 0: "black", 0.5: "grey"}  # behind transparent pixels
# Pillow registers endings of kinds that it only writes, or passes on to other libraries.
NO_IMAGES = {"BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF"}
ENDINGS = {end for end, kind in Image.registered_extensions().items() if kind not in NO_IMAGES}

Classes = dict[str, list[Path]]  # image files by the name of their class


class ImageFolder(NamedTuple):
    """Hold what has been read from a folder."""

    train: tuple[Tensor, Tensor]  # images (float32 in [0, 1], shape (n, C, H, W)), labels (n,)
    test: tuple[Tensor, Tensor]
    classes: list[str]  # names of the class labels
    notices: list[str]  # what the user has to know, a line each


class Picture(NamedTuple):
    """Hold an image while it isn't decided yet what lies behind its transparent pixels."""

    path: Path
    pixels: np.ndarray  # uint8, or float32 in [0, 1]; shape (H, W, channels), with alpha if 2 or 4
    animated: bool  # the first of several frames
    ranged: bool  # scaled by the range of its values

    @property
    def transparent(self) -> bool:
        """Tell whether some pixels are transparent."""
        return self.pixels.shape[2] in (2, 4)

    def on(self, background: float) -> np.ndarray:
        """Lay the image on black (0) to white (1): float32 in [0, 1], shape (H, W, 1 or 3)."""
        pixels = self.pixels
        if pixels.dtype == np.uint8:
            pixels = pixels / np.float32(255)
        if not self.transparent:
            return pixels
        colours, alpha = pixels[..., :-1], pixels[..., -1:]
        return colours * alpha + np.float32(background) * (1 - alpha)


def read_folder(folder: Path, size: int | None, results: Path, quiet: bool = False) -> ImageFolder:
    """Read a folder with `train/` and `test/`, or one of class folders, which is split.

    Grey levels of 16 bits are divided by 65,535. Floating point and integers of 32 bits, which have
    no white of their own, are scaled by the range of each file. EXIF orientation is applied; of
    several frames the first is taken. Transparent images are laid on white, all of a folder alike;
    on black if fewer of them vanish there (white drawings), or on grey (drawings in both). If no
    image has colour they get one channel, else three.

    Images are kept as bytes until the last is read; those of 16 bits or more as float32.

    :param size: height and width to resize the images to; None: SIZE if they come in several sizes,
        else as they are.
    :param results: folder of results, which isn't read if it lies inside.
    :param quiet: show no bars.
    :raises UserError: if the folder isn't like that, or one of its images can't be read.
    """
    parts, notices = find_images(folder, results.resolve())
    files = [file for part in parts for paths in part.values() for file in paths]
    pictures, resized = read_pictures(files, size, quiet)
    background = choose_background(pictures)
    images = to_tensor(pictures, background)
    notices += resized + account_for_pictures(pictures, images, background, folder)
    labels = [
        torch.tensor([label for label, paths in enumerate(part.values()) for _ in paths])
        for part in parts
    ]
    train, test = zip(images.split([*map(len, labels)]), labels)
    return ImageFolder(train, test, list(parts[0]), notices)


# --- Which files ----------------------------------------------------------------------------------


def find_images(folder: Path, results: Path) -> tuple[list[Classes], list[str]]:
    """Find the images for training and those of the test, and account for all other files.

    :return: both parts, with the same classes in natural order; and notices.
    :raises UserError: if the folder isn't like that.
    """
    below = visible_folders(folder)
    subfolders = [path for path in below if not results.is_relative_to(path.resolve())]
    named = {path.name.lower(): path for path in subfolders}
    parts = [named[part] for part in ("train", "test") if part in named]
    if len(parts) == 1 and len(subfolders) > 2 and not visible_folders(parts[0]):
        parts = []  # a class of trains, say
    if not subfolders or len(parts) == 1:
        missing = folder / ("test" if "train" in named else "train")
        raise UserError(
            f"DATASET is {str(folder)!r}: neither auto, mnist, fashion, kmnist or digits nor a "
            f"folder with train/ and test/ or a folder for each class in it "
            f"({printable(missing)} is missing)"
        )
    notices = []
    if parts:
        found = [images_by_class(visible_folders(part), part) for part in parts]
        if different := found[0].keys() ^ found[1].keys():
            name = min(different, key=natural)
            part = "test" if name in found[0] else "train"
            raise UserError(
                f"{printable(folder)}: class {name!r} is missing in {part}/; add it, or take it out"
            )
    else:
        found = split(images_by_class(subfolders, folder), folder)
        notices.append(
            "no train/ and test/, so a fifth of each class, always the same, is the test set"
        )
    loaded = {file for part in found for files in part.values() for file in files}
    others = [file for file in files_below(folder, results) if file not in loaded]
    return found, notices + account("not loaded", others, folder)


def visible_folders(folder: Path) -> list[Path]:
    """Return the subfolders of a folder, but those that are hidden."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)]


def is_hidden(name: str) -> bool:
    """Tell whether a name begins with a dot, or is that of the folder that a Mac adds to a zip."""
    return name.startswith(".") or name == "__MACOSX"


def images_by_class(folders: list[Path], parent: Path) -> Classes:
    """Find the images in the folders of classes, and below, in natural order of the classes.

    :raises UserError: if there is no class, or no image in one.
    """
    classes: Classes = {}
    for folder in sorted(folders):
        # macOS may write the same letter otherwise than Linux: é, or e and an accent.
        name = printable(unicodedata.normalize("NFC", folder.name))
        files = [file for file in files_below(folder) if is_image(file, folder)]
        if not files:
            raise UserError(
                f"{printable(parent)}: class {name!r} has no image that Pillow can read; take the "
                "folder away"
            )
        classes.setdefault(name, []).extend(files)
    if not classes:
        raise UserError(f"{printable(parent)} has no folder of a class in it")
    return dict(sorted(classes.items(), key=lambda item: natural(item[0])))


def files_below(folder: Path, results: Path | None = None, above: tuple = ()) -> Iterator[Path]:
    """Yield all files in a folder and below, in the order of their names; links are followed.

    What can't be entered counts as a file: a folder without permission, and a link to a folder
    above it, which has no end.

    :param results: folder that is passed over.
    :param above: the folders on the way here.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError:
        yield folder
        return
    above = *above, folder.resolve()
    for entry in entries:
        path = Path(entry.path)
        target = path.resolve() if entry.is_dir() else None
        if target is None or target in above:
            yield path
        elif target != results:
            yield from files_below(path, results, above)


def is_image(file: Path, folder: Path) -> bool:
    """Tell by its name whether a file in a folder is an image; hidden ones aren't."""
    if any(map(is_hidden, file.relative_to(folder).parts)) or file.suffix.lower() not in ENDINGS:
        return False
    return file.is_file() or not file.exists()  # a link that leads nowhere is an error later


def split(classes: Classes, folder: Path) -> list[Classes]:
    """Take a fifth of each class, at least one image, for the test; the same in every run.

    :raises UserError: if a class has a single image, or if these aren't the folders of classes.
    """
    if not any(file.parent.parent == folder for files in classes.values() for file in files):
        raise UserError(
            f"{printable(folder)} has folders of folders in it; name them train/ and test/, with "
            "the same folders of classes in both"
        )
    train, test = {}, {}
    for name, files in classes.items():
        if len(files) == 1:
            raise UserError(
                f"{printable(folder)}: class {name!r} has a single image, so none for the test"
            )
        count = max(1, round(len(files) / 5))
        train[name], test[name] = train_test_split(files, test_size=count, random_state=0)
    return [train, test]


def natural(name: str) -> tuple:
    """Return a key that sorts 2 before 10."""
    words = re.split(r"(\d+)", name.casefold())
    return [int(word) if i % 2 else word for i, word in enumerate(words)], name


def printable(text: str | Path) -> str:
    """Return a name in one line: escape controls, line ends, and bytes that are no text."""
    odd = r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(odd, lambda match: match[0].encode("unicode_escape").decode(), str(text))


def account(what: str, files: list[Path], folder: Path) -> list[str]:
    """Count files in one line, with an example, or in none if there are none."""
    if not files:
        return []
    example = printable(files[0].relative_to(folder))
    number = "1 file," if len(files) == 1 else f"{len(files)} files, such as"
    return [f"{what}: {number} {example}"]


# --- Reading --------------------------------------------------------------------------------------


def read_pictures(
    files: list[Path], size: int | None, quiet: bool
) -> tuple[list[Picture], list[str]]:
    """Read images, with a bar on a terminal, if it takes longer than a second.

    :param size: height and width to resize them to; None: SIZE if they differ, else as they are.
    :return: the images, and a notice if they differ.
    :raises UserError: if one can't be read, or all don't fit into memory.
    """
    bar = {"delay": 1, "disable": True if quiet else None, "leave": False}  # None: on a terminal
    notices = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        shapes = {(size, size)} if size else first_shapes(tqdm(files, "sizes of images", **bar))
        if len(shapes) > 1:
            size, shapes = SIZE, {(SIZE, SIZE)}
            text = f"images of several sizes are resized to {SIZE} x {SIZE}; see IMAGE_SIZE"
            notices.append(text)
        check_memory(len(files), 1, *min(shapes))
        pictures = [read_picture(file, size) for file in tqdm(files, "reading images", **bar)]
    return pictures, notices


@contextmanager
def opened(file: Path) -> Iterator[Image.Image]:
    """Open an image; turn any exception, and Pillow raises many kinds, into one line with its name.

    Pillow gets a stream: of a path it maps some TIFFs into memory, and scrambles those that it has
    to turn by a right angle.

    :raises UserError: if anything goes wrong with the image.
    """
    try:
        with file.open("rb") as stream, Image.open(stream) as image:
            yield image
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "damaged, or of a kind that Pillow doesn't know"
        line = printable(reason.split("\n")[0])
        raise UserError(
            f"{printable(file)} can't be read as an image: {line}; take it away"
        ) from error


def first_shapes(files: Iterable[Path]) -> set[tuple[int, int]]:
    """Return the height and width of all images, or two of them if they differ.

    Only headers are read: photos that are resized later need not fit into memory as they are.
    """
    shapes = set()
    for file in files:
        with opened(file) as image:
            width, height = image.size
            # The size of a TIFF is that of the turned image already.
            turned = width != height and image.format != "TIFF"
            if turned and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
                width, height = height, width
        shapes.add((height, width))
        if len(shapes) == 2:
            break
    return shapes


def check_memory(count: int, channels: int, height: int, width: int) -> None:
    """Refuse images that can't fit into memory, before it is full.

    :raises UserError: if they can't.
    """
    size = 4 * count * channels * height * width
    if size > psutil.virtual_memory().total:
        raise UserError(
            f"{count} images of {width} x {height} pixels take {size / 2**30:.0f} GiB of memory; "
            "set IMAGE_SIZE to fewer pixels"
        )


def read_picture(file: Path, size: int | None) -> Picture:
    """Read an image as a viewer shows it.

    :param size: height and width to resize it to; None: as it is.
    :raises UserError: if it can't be read.
    """
    with opened(file) as source:
        animated = getattr(source, "is_animated", False)
        image, ranged = ImageOps.exif_transpose(source), False
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image, ranged = scale(image, source)
        elif image.has_transparency_data:
            image = image.convert("RGBA")
        else:
            image = image.convert("L" if image.mode in ("1", "L") else "RGB")
        if size:
            image = image.resize((size, size), Image.Resampling.BILINEAR)  # averages, if smaller
        pixels = np.asarray(image)
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        return Picture(file, without_needless_channels(pixels), animated, ranged)


def scale(image: Image.Image, source: Image.Image) -> tuple[Image.Image, bool]:
    """Scale grey levels of more than 8 bits to [0, 1]: by their depth or, if it is none, by range.

    :param source: the image as it was opened, with its format and tags.
    :return: an image of float32 (mode F, or LA with 8 bits if a grey level means transparency),
        and whether it is scaled by its range.
    :raises ValueError: if the values have no range.
    """
    levels, tags = np.asarray(image), getattr(source, "tag_v2", {})
    if source.format == "TIFF" and image.mode == "I" and tags.get(SAMPLEFORMAT, (1,))[0] == 1:
        levels = levels.view(np.uint32)  # Pillow reads them as if they had signs
    values, ranged = levels.astype(np.float64), False
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16"):
        values /= 2 ** tags.get(BITSPERSAMPLE, (16,))[0] - 1
    elif image.mode == "I" and source.format in ("PNG", "PPM"):
        values /= 65535
    elif not np.isfinite(high - low):
        raise ValueError("some of its values aren't finite numbers")
    elif low == high:
        raise ValueError(f"all its values are {low:g}, which says nothing of black and white")
    else:
        values, ranged = (values - low) / (high - low), True
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:  # 0 is white
        values = 1 - values
    if "transparency" in image.info:
        alpha = Image.fromarray(levels != image.info["transparency"]).convert("L")
        return Image.merge("LA", (Image.fromarray(np.uint8(255 * values)), alpha)), ranged
    return Image.fromarray(values.astype(np.float32)), ranged


def without_needless_channels(pixels: np.ndarray) -> np.ndarray:
    """Drop an alpha channel without transparency, and colours that are all the same.

    :param pixels: shape (H, W, channels).
    """
    channels = list(range(pixels.shape[2]))
    if len(channels) in (2, 4):
        alpha = pixels[..., -1:]
        if alpha.min() == 255:
            channels.pop()
        else:
            pixels = np.where(alpha > 0, pixels, 0)  # colours that nobody sees
    if len(channels) > 2 and (pixels[..., :3] == pixels[..., :1]).all():
        del channels[1:3]
    return pixels[..., channels]


# --- All of them ----------------------------------------------------------------------------------


def choose_background(pictures: list[Picture]) -> float:
    """Choose white (1) for all transparent images, or black (0) or grey if fewer vanish on it."""
    transparent = [picture for picture in pictures if picture.transparent]

    def vanished(background: float) -> int:
        """Count the images that show hardly anything on a background."""
        ranges = (np.ptp(picture.on(background), axis=(0, 1)).max() for picture in transparent)
        return sum(contrast < CONTRAST for contrast in ranges)

    return min(BACKGROUNDS, key=vanished)  # the first of the best


def to_tensor(pictures: list[Picture], background: float) -> Tensor:
    """Lay transparent images on a background, and all in one tensor of float32, (n, C, H, W).

    :raises UserError: if the images differ in size, or don't fit into memory.
    """
    height, width, _ = pictures[0].pixels.shape
    for picture in pictures:
        if picture.pixels.shape[:2] != (height, width):  # unlike what its header says
            raise UserError(f"{printable(picture.path)} has another size; set IMAGE_SIZE")
    channels = 3 if any(picture.pixels.shape[2] > 2 for picture in pictures) else 1
    check_memory(len(pictures), channels, height, width)
    images = torch.empty(len(pictures), channels, height, width)
    for image, picture in zip(images.numpy(), pictures):
        image[:] = picture.on(background).transpose(2, 0, 1)
    return images


def account_for_pictures(
    pictures: list[Picture], images: Tensor, background: float, folder: Path
) -> list[str]:
    """Say which images are shown otherwise than they are stored, and which show hardly anything."""
    contrast = (images.amax((2, 3)) - images.amin((2, 3))).amax(1)
    marks = {
        "the first of several frames": [picture.animated for picture in pictures],
        "scaled by the range of each file": [picture.ranged for picture in pictures],
        f"transparent, laid on {BACKGROUNDS[background]}": [
            picture.transparent for picture in pictures
        ],
        "hardly any contrast": (contrast < CONTRAST).tolist(),
    }
    lines = []
    for what, marked in marks.items():
        files = [picture.path for picture, is_marked in zip(pictures, marked) if is_marked]
        lines += account(what, files, folder)
    return lines
