"""Images that people bring, and tensors: what is learned is what a viewer shows, or is refused."""

import re
import struct
import zlib

import numpy as np
import pytest
import torch
from avalanche.benchmarks import CLScenario, benchmark_with_validation_stream
from PIL import ExifTags, Image, ImageOps

import GenerativeReplay
from figures import generators
from figures.lab import data, folders, report
from figures.lab.constants import UserError, read_constants, run_command

# An image of 6 x 8 pixels without any symmetry: black, with a white line and a grey one.
GREY = np.zeros((6, 8))
GREY[1:4, 2], GREY[5, 1:7] = 1, 0.2
BYTES = np.uint8(255 * GREY)  # 0.2 is 51


def constants(**changes):
    words = ["--device", "cpu", "--bfloat16", "false", "--iterations", "3", "--hidden-units", "9"]
    return read_constants(GenerativeReplay, words).changed(**changes)


def load(folder, **changes):
    return data.load_images(constants(DATASET=str(folder), **changes))


def make(folder, save=None, names="ab", count=1):
    """Save an image `count` times per part and class; `save` gets the path without its ending."""
    save = save or (lambda path: Image.fromarray(BYTES).save(f"{path}.png"))
    for part in "train", "test":
        for name in names:
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                save(folder / part / name / str(number))
    return folder


def make_classes(folder, counts):
    """Save class folders, without train/ and test/, of so many images, all different."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(BYTES + np.uint8(number)).save(folder / name / f"{number}.png")
    return folder


# --- What a viewer shows --------------------------------------------------------------------------


def grey(path):
    Image.fromarray(BYTES).save(f"{path}.png")


def chunk(kind, content):
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(bits, colour, rows, *chunks):
    height, width = rows.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    pieces = chunk(b"IHDR", header), *chunks, chunk(b"IDAT", packed), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


def sixteen(path):
    Image.fromarray(np.uint16(65535 * GREY)).save(f"{path}.png")


def sixteen_pgm(path):  # Pillow's mode I
    Image.fromarray(np.uint16(65535 * GREY)).save(f"{path}.pgm")


def sixteen_big_endian(path):  # Pillow's mode I;16B
    Image.fromarray(np.uint16(65535 * GREY).astype(">u2")).save(f"{path}.tiff")


def sixteen_white_is_zero(path):
    Image.fromarray(np.uint16(65535 * (1 - GREY))).save(f"{path}.tif")
    content = path.with_suffix(".tif").read_bytes()
    tag = struct.pack("<HHIH", 262, 3, 1, 1)  # PhotometricInterpretation: black is zero
    assert content.count(tag) == 1
    content = content.replace(tag, struct.pack("<HHIH", 262, 3, 1, 0))
    path.with_suffix(".tif").write_bytes(content)


def sixteen_with_a_transparent_level(path):
    rows = np.uint16(65535 * (1 - GREY)).astype(">u2")
    rows[0, 0] = 7  # black all over, but 0,0 shows the white behind it
    path.with_suffix(".png").write_bytes(png(16, 0, rows, chunk(b"tRNS", struct.pack(">H", 7))))


def floats(path):
    Image.fromarray(np.float32(GREY)).save(f"{path}.tif")


def floats_of_another_range(path):
    Image.fromarray(np.float32(3000 * GREY - 1000)).save(f"{path}.tif")


def faint_floats(path):
    Image.fromarray(np.float32(0.001 * GREY)).save(f"{path}.tif")


def integers(path):
    Image.fromarray(np.int32(100000 * GREY) - 50000).save(f"{path}.tif")


def integers_without_sign(path):
    Image.fromarray(np.uint32(GREY * (2**32 - 1)).view(np.int32)).save(f"{path}.tif")
    content = path.with_suffix(".tif").read_bytes()
    tag = struct.pack("<HHIH", 339, 3, 1, 2)  # SampleFormat: with signs
    assert content.count(tag) == 1
    content = content.replace(tag, struct.pack("<HHIH", 339, 3, 1, 1))
    path.with_suffix(".tif").write_bytes(content)


def drawing(path, ink=0, mode="LA", ending=".png", **options):
    alpha = Image.fromarray(BYTES)
    image = Image.merge("LA", (Image.new("L", alpha.size, ink), alpha)).convert(mode)
    image.save(f"{path}{ending}", **options)


def transparent_palette(path):
    image = Image.fromarray(BYTES // 51, "P")  # 0, 1, 5
    image.putpalette([9] * 3 + [204] * 3 + [0] * 12)
    image.save(f"{path}.png", transparency=0)


def transparent_gif(path):
    image = Image.fromarray(BYTES // 51, "P")
    image.putpalette([9] * 3 + [204] * 3 + [0] * 12)
    image.save(f"{path}.gif", transparency=0)


def transparent_grey(path):  # black ink; level 9 is transparent
    levels = np.where(GREY == 0, 9, BYTES * np.uint8(0) + np.uint8(204 * (GREY == 0.2)))
    Image.fromarray(np.uint8(levels)).save(f"{path}.png", transparency=9)


def opaque(path):
    Image.fromarray(BYTES).convert("RGBA").save(f"{path}.png")


def cmyk(path):
    black = Image.fromarray(255 - BYTES)
    none = Image.new("L", black.size)
    Image.merge("CMYK", (none, none, none, black)).save(f"{path}.tif")


def palette(path):
    image = Image.fromarray(BYTES // 51, "P")
    image.putpalette([0] * 3 + [51] * 3 + [99] * 9 + [255] * 3)
    image.save(f"{path}.png")


def frames(path):
    image, other = Image.fromarray(BYTES), Image.new("L", (8, 6), 77)
    image.save(f"{path}.gif", save_all=True, append_images=[other])


def pages(path):
    image, other = Image.fromarray(BYTES), Image.new("L", (3, 3), 77)
    image.save(f"{path}.tif", save_all=True, append_images=[other])


@pytest.mark.parametrize(
    ("save", "notice"),
    [
        (grey, ""), (sixteen, ""), (sixteen_pgm, ""), (sixteen_big_endian, ""),
        (sixteen_white_is_zero, ""), (opaque, ""), (cmyk, ""), (palette, ""),
        (floats, "scaled by the range of each file: 4 files, such as train/a/0.tif"),
        (floats_of_another_range, "scaled by the range of each file: 4 files"),
        (faint_floats, "scaled by the range of each file: 4 files"),
        (integers, "scaled by the range of each file: 4 files"),
        (integers_without_sign, "scaled by the range of each file: 4 files"),
        (frames, "the first of several frames: 4 files, such as train/a/0.gif"),
        (pages, "the first of several frames: 4 files, such as train/a/0.tif"),
    ],
)  # fmt: skip
def test_every_kind_of_image_is_learned_as_it_is_shown(save, notice, tmp_path, capsys):
    images = load(make(tmp_path, save))
    for x, y in images.train, images.test:
        assert x.shape == (2, 1, 6, 8) and x.dtype == torch.float32 and y.tolist() == [0, 1]
        for image in x.numpy():
            np.testing.assert_allclose(image[0], GREY, atol=2e-5)
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == bool(notice) and notice in out


@pytest.mark.parametrize(
    "save",
    [
        drawing, transparent_palette, transparent_gif, transparent_grey,
        lambda path: drawing(path, mode="RGBA"),
        lambda path: drawing(path, mode="RGBA", ending=".webp", lossless=True),
        lambda path: drawing(path, mode="RGBA", ending=".tif"),
    ],
    ids=["LA", "palette", "gif", "grey", "RGBA", "webp", "tif"],
)  # fmt: skip
def test_black_ink_is_laid_on_white(save, tmp_path, capsys):
    x, _ = load(make(tmp_path, save)).train
    np.testing.assert_allclose(x[0, 0], 1 - GREY, atol=1e-6)
    assert "transparent, laid on white: 4 files, such as train/a/0" in capsys.readouterr().out


def test_a_transparent_level_of_16_bits_is_transparent(tmp_path, capsys):
    x, _ = load(make(tmp_path, sixteen_with_a_transparent_level)).train
    np.testing.assert_allclose(x[0, 0], 1 - GREY, atol=0.005)
    assert "transparent, laid on white: 4 files" in capsys.readouterr().out


@pytest.mark.parametrize("ink", [255, 240])
def test_white_ink_is_laid_on_black_and_all_of_a_folder_alike(ink, tmp_path, capsys):
    make(tmp_path, lambda path: drawing(path, ink, "RGBA"))
    drawing(tmp_path / "train" / "a" / "0", 100, "RGBA")  # visible on both
    x, _ = load(tmp_path).train
    np.testing.assert_allclose(x[1, 0], GREY * ink / 255, atol=1e-6)
    np.testing.assert_allclose(x[0, 0], GREY * 100 / 255, atol=1e-6)
    assert "transparent, laid on black: 4 files" in capsys.readouterr().out


def test_black_and_white_ink_together_are_laid_on_grey(tmp_path, capsys):
    make(tmp_path, drawing)
    drawing(tmp_path / "train" / "a" / "0", 255)
    x, _ = load(tmp_path).train
    np.testing.assert_allclose(x[0, 0], 0.5 + GREY / 2, atol=1e-6)
    np.testing.assert_allclose(x[1, 0], 0.5 - GREY / 2, atol=1e-6)
    assert "transparent, laid on grey: 4 files" in capsys.readouterr().out


def test_colours_behind_transparent_pixels_and_resizing_leave_no_fringe(tmp_path):
    def save(path):
        pixels = np.zeros((64, 64, 4), np.uint8)
        pixels[..., 0] = 255  # red that nobody sees
        pixels[16:48, 16:48] = 0, 0, 0, 255
        Image.fromarray(pixels).save(f"{path}.png")

    x, _ = load(make(tmp_path, save), IMAGE_SIZE=24).train
    assert x.shape == (2, 1, 24, 24)
    assert x[0, 0, 12, 12] == 0 and x[0, 0, 0, 0] == 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
def test_the_orientation_of_exif_is_applied(orientation, ending, tmp_path, capsys):
    back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}

    def save(path):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        image = Image.fromarray(BYTES)
        if orientation in back:
            image = image.transpose(back[orientation])
        else:  # the other six are their own inverses
            other = Image.fromarray(BYTES)
            other.getexif()[ExifTags.Base.Orientation] = orientation
            image = ImageOps.exif_transpose(other)
        options = {"lossless": True} if ending == "webp" else {}
        image.save(f"{path}.{ending}", exif=exif, **options)

    make(tmp_path, save)
    Image.fromarray(BYTES).save(tmp_path / "train" / "a" / "upright.png")
    x, _ = load(tmp_path).train
    np.testing.assert_allclose(x[0, 0], GREY, atol=1e-6)  # of one size when turned: not resized
    assert capsys.readouterr().out == ""


def test_one_image_in_colour_makes_three_channels(tmp_path):
    make(tmp_path)
    Image.new("RGB", (8, 6), (51, 102, 204)).save(tmp_path / "test" / "b" / "0.png")
    images = load(tmp_path)
    assert images.train[0].shape == (2, 3, 6, 8)
    np.testing.assert_allclose(images.train[0][0], np.broadcast_to(GREY, (3, 6, 8)), atol=1e-6)
    np.testing.assert_allclose(images.test[0][1][:, 0, 0], [0.2, 0.4, 0.8], atol=1e-6)


def test_images_that_show_hardly_anything_are_counted(tmp_path, capsys):
    make(tmp_path)
    Image.fromarray(np.uint8(GREY > 0)).save(tmp_path / "train" / "b" / "0.png")  # 0 and 1 of 255
    load(tmp_path)
    assert capsys.readouterr().out.endswith("hardly any contrast: 1 file, train/b/0.png\n")


# --- Files ----------------------------------------------------------------------------------------


def test_every_file_is_accounted_for(tmp_path, capsys):
    make(tmp_path)
    image = tmp_path / "train" / "a" / "0.png"
    for ending in "PNG", "JfIf", "Jpe", "WEBP", "tiff", "bmp", "mpo":
        kind = Image.registered_extensions()[f".{ending.lower()}"]
        Image.open(image).convert("RGB").save(image.with_name(f"more.{ending}"), kind)
    (tmp_path / "train" / "a" / "deeper").mkdir()
    grey(tmp_path / "train" / "a" / "deeper" / "1")
    others = [
        "train/.ipynb_checkpoints/a.png", "train/a/._0.png", "train/a/.hidden/b.png",
        "train/a/notes.txt", "train/a/no_ending", "train/a/film.mpg", "train/readme.md",
        "train/loose.png", "valid/a/0.png", ".DS_Store", "train/b/Thumbs.db", "train/b/data.h5",
        "train/__MACOSX/._a.png", "train/a/scan.pdf",
    ]  # fmt: skip
    for name in others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(image.read_bytes())
    images = load(tmp_path)
    assert images.classes == ["a", "b"] and images.train[1].tolist() == 9 * [0] + [1]
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{tmp_path}: not loaded: 14 files, such as .DS_Store"]


def test_links_are_followed_once(tmp_path, capsys):
    elsewhere = make(tmp_path / "elsewhere")
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "train").symlink_to(elsewhere / "train")
    (folder / "test").mkdir()
    for name in "ab":
        (folder / "test" / name).symlink_to(elsewhere / "test" / name)
    (elsewhere / "train" / "a" / "again").symlink_to(elsewhere / "train" / "a")
    (elsewhere / "train" / "a" / "link.png").symlink_to(elsewhere / "train" / "a" / "0.png")
    images = load(folder)
    assert images.train[1].tolist() == [0, 0, 1] and images.test[1].tolist() == [0, 1]
    assert "not loaded: 1 file, train/a/again\n" in capsys.readouterr().out


def broken_chunk(path):
    content = zlib.compress(b"\0" * 90)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 0, 0, 0, 0))
    pieces = chunk(b"IDAT", content[:5]), chunk(b"\x8d\x03\x98\xa6", content[5:])
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + b"".join(pieces))


def truncated(path):
    noise = np.random.default_rng(0).integers(0, 255, (99, 99), dtype=np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:3000])


def infinite(path):
    Image.fromarray(np.float32([[0, np.nan], [1, 0]])).save(path, "TIFF")


def constant(path):
    Image.new("F", (8, 6), 0.5).save(path, "TIFF")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (broken_chunk, r"broken PNG file"),
        (truncated, "truncated"),
        (lambda path: path.write_bytes(b""), "damaged, or of a kind"),
        (lambda path: path.write_text("<html>"), "damaged, or of a kind"),
        (lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), ""),
        (infinite, "finite"),
        (constant, "all its values are 0.5"),
        (lambda path: Image.new("1", (14000, 14000)).save(path), "bomb"),
        (lambda path: Image.new("1", (9500, 9500)).save(path), "bomb"),  # a warning of Pillow's
        (lambda path: path.symlink_to("nowhere"), "No such file"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named(damage, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path / "images") / "train" / "b" / "0.png"
    path.unlink()
    damage(path)
    with pytest.raises(SystemExit) as end:
        run_command(lambda: load("images"))
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and len(line) < 250
    assert line.startswith("error: images/train/b/0.png can't be read as an image: ")
    assert re.search(reason, line)


@pytest.mark.parametrize("kind", [SyntaxError, struct.error, OverflowError, KeyError, MemoryError])
def test_whatever_pillow_raises_the_file_is_named(kind, tmp_path, monkeypatch):
    def fail(image):
        raise kind("first\nsecond")

    monkeypatch.setattr(folders.ImageOps, "exif_transpose", fail)
    with pytest.raises(UserError, match="^.*train/a/0.png can't be read as an image: .+$"):
        load(make(tmp_path))


# --- Classes and parts ----------------------------------------------------------------------------


def test_classes_come_in_natural_order_and_are_listed_once(tmp_path, capsys):
    names = "x10", "x9", "10", "2", "B", "a", "x09", "ż 1", "$x_{2}$"
    images = load(make(tmp_path, names=names))
    expected = ["2", "10", "$x_{2}$", "a", "B", "x09", "x9", "x10", "ż 1"]
    assert images.classes == expected and images.train[1].tolist() == list(range(9))
    data.fill_in(constants(DATASET=str(tmp_path)), images)
    lines = capsys.readouterr().out.splitlines()
    table = "classes: " + ", ".join(f"{label} {name}" for label, name in enumerate(expected))
    assert lines.count(table) == 1 and sum("ż" in line for line in lines) == 1


def test_the_list_of_many_classes_is_broken_between_names():
    lines = data.table_of_classes([f"letter {i}-th" for i in range(242)]).splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) < 60
    assert " ".join(lines) == "classes: " + ", ".join(f"{i} letter {i}-th" for i in range(242))
    assert all(line.endswith(",") for line in lines[:-1])


def test_names_of_classes_are_text(tmp_path, capsys):
    make(tmp_path, names=["line\nend", "caf\udce9", "e\u0301te\u0301"])
    (tmp_path / "test" / "e\u0301te\u0301").rename(tmp_path / "test" / "\u00e9t\u00e9")  # the same
    images = load(tmp_path)
    assert images.classes == ["caf\\udce9", "line\\nend", "\u00e9t\u00e9"]
    data.fill_in(constants(DATASET=str(tmp_path), N_EXPERIENCES=3), images)
    assert "classes: 0 caf\\udce9, 1 line\\nend, 2 \u00e9t\u00e9\n" in capsys.readouterr().out


def test_the_name_depends_on_images_labels_and_names(tmp_path):
    def name():
        return load(folder).name

    folder = make_classes(tmp_path / "set", {"a": 5, "b": 5})
    first = name()
    assert first == name() and re.fullmatch("set-[0-9a-f]{8}", first)
    (folder / "a").rename(folder / "aa")
    renamed = name()
    (folder / "aa").rename(folder / "a")
    assert name() == first != renamed
    (folder / "a" / "0.png").rename(folder / "b" / "5.png")
    moved = name()
    Image.new("L", (8, 6), 1).save(folder / "b" / "5.png")
    assert len({first, renamed, moved, name()}) == 4


def test_class_folders_are_split(tmp_path, capsys):
    folder = make_classes(tmp_path, {"train": 2, "b": 10, "c": 23})
    images, again = load(folder), load(folder)
    assert images.classes == ["b", "c", "train"]
    assert images.train[1].bincount().tolist() == [8, 18, 1]
    assert images.test[1].bincount().tolist() == [2, 5, 1]
    corners = [x[y == 1, 0, 0, 0] for x, y in (images.train, images.test)]
    levels = torch.cat(corners).mul(255).round().int()
    assert sorted(levels.tolist()) == list(range(23))  # each image is in one of both
    assert all(torch.equal(*pair) for pair in zip(images.test, again.test))
    line = "no train/ and test/, so a fifth of each class, always the same, is the test set"
    assert capsys.readouterr().out == 2 * f"{folder}: {line}\n"


def test_a_folder_of_results_is_no_class(tmp_path, monkeypatch):
    monkeypatch.chdir(make_classes(tmp_path, {"a": 2, "b": 2}))
    before = load(".").name
    make_classes(tmp_path, {"results/trial": 2})
    assert load(".", RESULTS_DIR="results/trial").name == load(".").name == before


def only_train(folder):
    (folder / "test").rename(folder / "tests")


def other_names(folder):
    (folder / "train").rename(folder / "Training")
    (folder / "test").rename(folder / "Testing")


def class_in_one(folder):
    (folder / "test" / "b").rename(folder / "test" / "c")


def empty_class(folder):
    (folder / "train" / "b" / "0.png").rename(folder / "train" / "b" / "0.txt")


def no_class(folder):
    for name in "ab":
        (folder / "train" / name / "0.png").rename(folder / f"{name}.png")
        (folder / "train" / name).rmdir()


def single_image(folder):
    for part in "train", "test":
        (folder / part / "a").rename(folder / f"class {part}")
        (folder / part / "b" / "0.png").unlink()
        (folder / part / "b").rmdir()
        (folder / part).rmdir()


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (only_train, "/test is missing"),
        (other_names, "has folders of folders in it; name them train/ and test/"),
        (class_in_one, "class 'b' is missing in "),
        (empty_class, "class 'b' has no image that Pillow can read"),
        (no_class, "has no folder of a class in it"),
        (single_image, "class 'class test' has a single image, so none for the test"),
    ],
)
def test_what_cannot_be_split_or_read_is_said(spoil, complaint, tmp_path):
    spoil(make(tmp_path))
    with pytest.raises(UserError, match=f"^.*{re.escape(complaint)}.*$"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "~nobody/images", "file", "empty"])
def test_what_is_no_folder_of_images_is_said(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither auto, mnist.*nor a folder with train/ and test/"):
        load(name)


def test_names_of_parts_may_have_capitals(tmp_path):
    make(tmp_path)
    (tmp_path / "train").rename(tmp_path / "Train")
    (tmp_path / "test").rename(tmp_path / "TEST")
    assert load(tmp_path).classes == ["a", "b"]


# --- Sizes ----------------------------------------------------------------------------------------


def test_images_of_several_sizes_become_one(tmp_path, capsys):
    make(tmp_path)
    half = np.zeros((64, 96), np.uint8)
    half[:, 48:] = 255
    for name, pixels in ("0.png", half), ("1.tif", half.astype(np.uint16) * 257):
        Image.fromarray(pixels).save(tmp_path / "test" / "b" / name)
    x, y = load(tmp_path).test
    assert x.shape == (3, 1, 32, 32) and y.tolist() == [0, 1, 1]
    for image in x[1:, 0]:  # squashed, as its two halves show
        assert (image[:, :15] == 0).all() and (image[:, 17:] == 1).all()
    line = "images of several sizes are resized to 32 x 32; see IMAGE_SIZE"
    assert capsys.readouterr().out == f"{tmp_path}: {line}\n"
    assert load(tmp_path, IMAGE_SIZE=5).test[0].shape == (3, 1, 5, 5)
    assert capsys.readouterr().out == ""


def test_photos_that_exceed_the_memory_are_refused(tmp_path, monkeypatch):
    make(tmp_path)
    monkeypatch.setattr(folders.psutil, "virtual_memory", lambda: type("", (), {"total": 100}))
    with pytest.raises(UserError, match="4 images of 8 x 6 pixels .* set IMAGE_SIZE"):
        load(tmp_path)


def test_a_bar_is_shown_on_a_terminal_only(tmp_path, monkeypatch, capsys):
    bars = []

    def bar(files, what, **options):
        bars.append((what, options["disable"]))
        return files

    monkeypatch.setattr(folders, "tqdm", bar)
    load(make(tmp_path))
    data.load_images(constants(DATASET=str(tmp_path)), quiet=True)
    kinds = "sizes of images", "reading images"
    assert bars == [(what, disable) for disable in (None, True) for what in kinds]
    assert capsys.readouterr() == ("", "")


# --- Tensors --------------------------------------------------------------------------------------

Y = torch.arange(4).repeat_interleave(10)
X = torch.rand(40, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 0.9
X[torch.arange(40), 0, Y] += 0.1
PARTS = [(X[:20], Y[:20]), (X[20:], Y[20:])]


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: (x.double(), y.int()),
        lambda x, y: (x.numpy(), y.numpy()),
        lambda x, y: [x.clone().requires_grad_(), y[:, None]],
        lambda x, y: (x.tolist(), y.tolist()),
        lambda x, y: (list(x), list(y)),
        lambda x, y: (x.flip(0).numpy()[::-1], y.numpy().astype(">i2")),
        lambda x, y: (x, y.float()),
        lambda x, y: (x, y.to(torch.uint8)[:, None]),
        lambda x, y: (x, y.numpy().astype(np.uint16)),
    ],
)
def test_what_changes_no_value_is_converted(change):
    benchmark = data.in_memory_benchmark([change(*part) for part in PARTS], PARTS)
    for experience, (x, y) in zip(benchmark.train_stream, PARTS):
        images, labels, tasks = experience.dataset.tensors
        assert torch.equal(images, x) and torch.equal(labels, y) and not tasks.any()
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert not images.requires_grad


def test_half_precision_and_truth_values_are_converted():
    pairs = [(X.half(), Y > 1), (X > 0.5, (Y > 1)[:, None])]
    benchmark = data.in_memory_benchmark(train=pairs, test=pairs)
    (x, y, _), (black, _, _) = (e.dataset.tensors for e in benchmark.train_stream)
    assert torch.equal(x, X.half().float()) and torch.equal(y, (Y > 1).long())
    assert torch.equal(black, (X > 0.5).float())


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ((X.where(X < 0.8, torch.nan), Y), "pixels are infinite or not a number"),
        ((X.where(X < 0.8, torch.inf), Y), "pixels are infinite or not a number"),
        ((X + 0.5, Y), "pixels lie in [0.5"),
        ((X - 0.5, Y), "leave Normalize out"),
        (((255 * X).to(torch.uint8), Y), "images are torch.uint8, not floats in [0, 1]: divide"),
        ((X[:, 0], Y), "images have shape (40, 6, 6), not (n, channels, height, width)"),
        ((X.flatten(1), Y), "images have shape (40, 36)"),
        ((X[:, :, :5], Y), "images are (1, 5, 6), those before (1, 6, 6)"),
        ((X.expand(-1, 3, -1, -1), Y), "images are (3, 6, 6), those before (1, 6, 6)"),
        ((X[:0], Y[:0]), "there are no images, or they are empty: shape (0, 1, 6, 6)"),
        ((X.expand(-1, 3, -1, -1).permute(0, 2, 3, 1), Y), "put channels first"),
        ((X + 0j, Y), "images are torch.complex64"),
        ((X, Y[:-1]), "labels have shape (39,), but there are 40 images"),
        ((X, torch.eye(4)[Y]), "labels have shape (40, 4), but there are 40 images"),
        ((X, Y - 1), "labels go down to -1, and have to count from 0"),
        ((X, Y + 20261127), "labels go up to 20261130, and have to count the classes from 0"),
        ((X, Y + 0.5), "labels are torch.float32, and not all of them whole numbers"),
        ((X, Y * torch.nan), "labels are torch.float32, and not all of them whole numbers"),
        ((X, list("abcd") * 10), ""),
        ((X, None), ""),
        ((X.to_sparse(), Y), ""),
        ((X, Y, Y), "a pair of images and labels is needed, not a tuple"),
        (X, "a pair of images and labels is needed, not a Tensor"),
    ],
)
def test_what_cannot_be_learned_names_stream_and_experience(bad, complaint):
    message = re.escape(complaint)
    with pytest.raises(ValueError, match=f"^train stream, experience 2: .*{message}.*"):
        data.in_memory_benchmark(train=[(X, Y), bad], test=PARTS)
    with pytest.raises(ValueError, match=f"^valid stream, experience 1: .*{message}.*"):
        data.in_memory_benchmark(PARTS, PARTS, valid=[bad])


def test_a_stream_needs_experiences_and_both_streams_are_needed():
    with pytest.raises(ValueError, match="the test stream has no experience"):
        data.in_memory_benchmark(train=PARTS, test=[])
    with pytest.raises(TypeError, match="test"):
        data.in_memory_benchmark(train=PARTS, tset=PARTS)
    benchmark = data.in_memory_benchmark(PARTS, PARTS)
    with pytest.raises(ValueError, match="^the benchmark has no test stream$"):
        data.load_in_memory(CLScenario([benchmark.train_stream]))


def test_further_streams_stay_and_a_subset_works():
    subset = benchmark_with_validation_stream(data.in_memory_benchmark(PARTS, PARTS), 0.2)
    loaded = data.load_in_memory(subset)
    assert set(loaded.streams) == set(subset.streams) == {"train", "valid", "test"}
    for slow, fast in zip(subset.train_stream, loaded.train_stream):
        assert len(slow.dataset) == 16 and not hasattr(slow.dataset, "tensors")
        assert all(map(torch.equal, data.tensors_of(slow), fast.dataset.tensors))
    solvers = []
    for benchmark in subset, loaded:
        torch.manual_seed(0)
        solvers.append(GenerativeReplay.make_solver(benchmark, constants(INPUT_DROPOUT=0)))
    assert all(map(torch.equal, *(solver.state_dict().values() for solver in solvers)))
    x = torch.rand(5, 1, 6, 6)
    assert torch.equal(*(solver.eval()(x) for solver in solvers))  # normalized alike
    originals = [data.first_of_each_class(b, [0, 1, 2, 3]) for b in (subset, loaded)]
    assert torch.equal(*originals) and len(originals[0]) == 4


@pytest.mark.parametrize("strategy", ["replay", "joint", "er"])
def test_all_strategies_learn_a_subset(strategy):
    x, y = X.repeat(5, 1, 1, 1), Y.repeat(5)  # 50 of each class
    parts = [(x[y < 2], y[y < 2]), (x[y >= 2], y[y >= 2])]
    subset = benchmark_with_validation_stream(data.in_memory_benchmark(parts, PARTS), 0.2, True)
    scholar = GenerativeReplay.make_scholar(
        subset, constants(), strategy, generators.make_gaussians_strategy
    )
    for experience in subset.train_stream:
        scholar.train(experience)
        scholar.eval(subset.streams["valid"])
    counts = torch.tensor(report.confusions(scholar.model, subset.test_stream))
    assert counts.sum(1).tolist() == 4 * [10]


def test_a_class_that_only_the_test_brings_has_a_logit():
    benchmark = data.in_memory_benchmark(PARTS[:1], PARTS)
    assert data.shape_and_classes(benchmark) == ((1, 6, 6), 4)


@pytest.mark.parametrize("level", [0, 0.1, 1])
def test_a_constant_first_experience_is_refused_in_one_line(level):
    x = torch.full_like(X, level)
    benchmark = data.in_memory_benchmark([(x, Y), (X, Y)], PARTS)
    with pytest.raises(UserError, match=f"all pixels of the first experience are {level:.2f}: .*"):
        GenerativeReplay.make_scholar(benchmark, constants())
