"""Bad constants and bad data files: one line that says what is wrong, exit code 2, no traces."""

import gzip
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import GenerativeReplay
import Generator

ROOT = Path(__file__).parent.parent
TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = Generator.FILES


def complaint(capsys, run, *arguments):
    """The one line with which `run` ends the program."""
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    return err[len("error: ") : -1]


@pytest.fixture
def read(monkeypatch, tmp_path):
    """`read_constants` of both scripts, as for a command line in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def read(*words):
        monkeypatch.setattr(sys, "argv", ["GenerativeReplay.py", *words])
        return Generator.read_constants(Generator, GenerativeReplay)

    return read


COMMAND_LINES = [
    # names that there are not
    ("--lerning-rate 0.1", "--lerning-rate is unknown; did you mean --learning-rate?"),
    ("--lerning-rate=0.1", "--lerning-rate is unknown; did you mean --learning-rate?"),
    ("--learning_rate 0.1", "--learning_rate is unknown; did you mean --learning-rate?"),
    ("LEARNING_RATE=0.1", "LEARNING_RATE is unknown; did you mean --learning-rate?"),
    ("--batch-size 8 --seed 1", "--seed is unknown; did you mean --seeds?"),
    ("--batchsize 3", "--batchsize is unknown; did you mean --batch-size?"),
    ("--batch 3", "--batch is unknown; did you mean --batch-size?"),
    ("replay", "replay is unknown"),
    ("-x", "-x is unknown; --help lists the options"),
    # choices
    ("--dataset mnits", "DATASET is 'mnits', but has to be one of .*; did you mean mnist?"),
    ("--dataset MNIST", "DATASET is 'MNIST', but .*; did you mean mnist?"),
    ("--dataset cifar", "DATASET is 'cifar', but has to be one of auto, mnist, .*, digits"),
    ("--dataset", "DATASET is True"),
    ("--dataset mnist digits", "DATASET is ('mnist', 'digits')"),
    ("--strategies replay both", "STRATEGIES is ('replay', 'both'), but .* replay, naive, joint"),
    ("--strategies nave", "STRATEGIES is ('nave',), but .*; did you mean naive?"),
    ("--strategies joint joint", "STRATEGIES .* without repetition (of joint)"),
    ("--strategies [0]", "STRATEGIES is ([0],)"),
    ("--device gpu", "DEVICE is 'gpu', but has to be one of auto, cpu, cuda, cuda:1, mps"),
    ("--device cdua", "DEVICE is 'cdua', but .*; did you mean cuda?"),
    ("--device cuda:x", "DEVICE is 'cuda:x'"),
    ("--checksums no", "CHECKSUMS is 'no', but has to be true or false"),
    ("--anneal 1", "ANNEAL is 1, but has to be true or false"),
    ("--increasing-replay-size 1", "INCREASING_REPLAY_SIZE is 1"),
    ("--ablation yes", "ABLATION is 'yes'"),
    ("--force 0", "FORCE is 0"),
    # counts
    ("--batch-size 0", "BATCH_SIZE is 0, but has to be an integer, 1 or more"),
    ("--batch-size many", "BATCH_SIZE is 'many'"),
    ("--batch-size 1 2", "BATCH_SIZE is (1, 2)"),
    ("--batch-size", "BATCH_SIZE is True"),
    ("--batch-size none", "BATCH_SIZE is None"),
    (f"--batch-size {2**63}", "BATCH_SIZE is 9223372036854775808"),
    ("--iterations -5", "ITERATIONS is -5, but has to be an integer, 1 or more, or none"),
    ("--iterations 2.5", "ITERATIONS is 2.5"),
    ("--generator-iterations 0", "GENERATOR_ITERATIONS is 0"),
    ("--generator-batch-size 0", "GENERATOR_BATCH_SIZE is 0"),
    ("--replay-size -1", "REPLAY_SIZE is -1, but has to be an integer, 0 or more, or none"),
    ("--validation-size -1", "VALIDATION_SIZE is -1"),
    ("--hidden-units 0", "HIDDEN_UNITS is 0"),
    ("--latent-size 0", "LATENT_SIZE is 0"),
    ("--mixture-components none", "MIXTURE_COMPONENTS is None"),
    ("--input-shift 0.5", "INPUT_SHIFT is 0.5"),
    ("--input-shift 28", "INPUT_SHIFT is 28, but has to be an integer, from 0 to 27"),
    ("--n-jobs 0", "N_JOBS is 0"),
    ("--backend das", "BACKEND is 'das', but .*; did you mean dask?"),
    ("--scheduler localhost", "SCHEDULER is 'localhost'"),
    # numbers
    ("--learning-rate 0", "LEARNING_RATE is 0, but has to be a positive number"),
    ("--learning-rate nan", "LEARNING_RATE is 'nan'"),
    ("--learning-rate inf", "LEARNING_RATE is 'inf'"),
    ("--learning-rate 1e999", "LEARNING_RATE is inf"),
    ("--learning-rate 1" + 400 * "0", "LEARNING_RATE is 1000"),
    ("--learning-rate -0.1", "LEARNING_RATE is -0.1"),
    ("--learning-rate 0,002", "LEARNING_RATE is"),
    ("--learning-rate " + 5000 * "(", "LEARNING_RATE is '((("),
    ("--generator-learning-rate true", "GENERATOR_LEARNING_RATE is True"),
    ("--ratio 1.5", "RATIO is 1.5, but has to be a number from 0 to 1, or none"),
    ("--input-dropout 1", "INPUT_DROPOUT is 1"),
    ("--temperature 0", "TEMPERATURE is 0"),
    ("--kl-weight 0", "KL_WEIGHT is 0"),
    # the stream
    ("--n-experiences 3", "N_EXPERIENCES is 3, but has to be 1, 2, 5 or 10, to divide 10 classes"),
    ("--n-experiences 20", "N_EXPERIENCES is 20"),
    ("--n-experiences 0", "N_EXPERIENCES is 0"),
    ("--class-order 0 1 2 3 4 5 6 7 8 8", "CLASS_ORDER .* once: without repetition (of 8)"),
    ("--class-order 0 1 2 3 4 5 6 7", "CLASS_ORDER .* once: complete (8, 9 missing)"),
    ("--class-order 1 2 3 4 5 6 7 8 9 10", "CLASS_ORDER .* each an integer, from 0 to 9"),
    ("--class-order 0123456789", "CLASS_ORDER is ('0123456789',)"),
    ("--seeds 1 1", "SEEDS is (1, 1), but has to be without repetition (of 1)"),
    ("--seeds -1", "SEEDS is (-1,), but has to be one or more, each an integer, 0 or more"),
    ("--seeds [0]", "SEEDS is ([0],)"),
    (f"--seeds {2**64}", "SEEDS is (18446744073709551616,)"),
    # folders
    ("--data-dir file", "DATA_DIR is 'file', but has to be the name of a folder"),
    ("--results-dir file", "RESULTS_DIR is 'file', but has to be the name of a folder"),
    ("--results-dir=", "RESULTS_DIR is ''"),
    ("--data-dir a b", "DATA_DIR is ('a', 'b')"),
]


def matches(expected, line):
    """Whether a line begins as expected, where .* stands for anything."""
    return re.match(re.escape(expected).replace(r"\.\*", ".*"), line)


@pytest.mark.parametrize(("words", "expected"), COMMAND_LINES)
def test_a_bad_command_line_gets_one_line(words, expected, read, capsys, tmp_path):
    (tmp_path / "file").touch()
    line = complaint(capsys, read, *words.split())
    assert matches(expected, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("script", "name", "value"),
    [
        (Generator, "ITERATIONS", -1),
        (Generator, "LEARNING_RATE", float("nan")),
        (Generator, "LEARNING_RATE", float("inf")),
        (Generator, "LEARNING_RATE", (0, 2)),  # 0,002
        (Generator, "SEEDS", 0),
        (Generator, "SEEDS", ()),
        (Generator, "CLASS_ORDER", [*range(9), 8]),
        (Generator, "CLASS_ORDER", "0123456789"),
        (Generator, "DATA_DIR", None),
        (Generator, "RESULTS_DIR", "results\n"),
        (Generator, "RESULTS_DIR", "\0"),
        (Generator, "DEVICE", None),
        (Generator, "ANNEAL", "False"),
        (GenerativeReplay, "STRATEGIES", "replay"),
        (GenerativeReplay, "STRATEGIES", ["replay", None]),
        (GenerativeReplay, "N_JOBS", -1),
    ],
)
def test_a_bad_constant_in_a_script_gets_one_line(script, name, value, read, capsys, monkeypatch):
    monkeypatch.setattr(script, name, value)
    assert complaint(capsys, read).startswith(f"{name} is {value!r}, but has to be ")


def test_a_constant_that_is_gone_gets_one_line(read, capsys, monkeypatch):
    monkeypatch.delattr(Generator, "BATCH_SIZE")
    expected = "BATCH_SIZE is missing at the top of Generator.py; put it back"
    assert complaint(capsys, read) == expected


def test_what_is_allowed_is_taken(read, monkeypatch):
    monkeypatch.setattr(Generator, "SEEDS", [5])  # a list is as good as a tuple
    words = "--seeds 3 --device cuda:12 --ratio 0 --replay-size 0 --temperature none --n-jobs 3"
    constants = read(*words.split(), "--results-dir", "not/there/yet", "--strategies", "naive")
    assert constants.SEEDS == (3,) and constants.DEVICE == "cuda:12" and constants.RATIO == 0
    assert constants.REPLAY_SIZE == 0 and constants.TEMPERATURE is None
    assert constants.STRATEGIES == ("naive",) and constants.RESULTS_DIR == "not/there/yet"


@pytest.mark.parametrize("script", ["Generator.py", "GenerativeReplay.py"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--lerning-rate 0.1", "--lerning-rate is unknown; did you mean --learning-rate?"),
        ("--replay-size -1", "REPLAY_SIZE is -1"),
        ("--results-dir file/inside", "RESULTS_DIR 'file/inside' can't be written"),
    ],
)
def test_it_comes_before_anything_slow_and_leaves_no_trace(script, words, expected, tmp_path):
    (tmp_path / "file").touch()
    started = time.perf_counter()
    command = [sys.executable, str(ROOT / script), *words.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert time.perf_counter() - started < 1.5
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {expected}") and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def prepare(*scripts):
    return Generator.prepare(Generator.read_constants(*scripts))


def test_a_device_that_is_not_there_leaves_no_trace(read, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "--device", "cuda", "--dataset", "digits"])
    line = complaint(capsys, prepare, Generator)
    assert line.startswith("DEVICE is 'cuda', but this machine has only: ")
    assert list(tmp_path.iterdir()) == []


def test_a_results_folder_that_cannot_be_written(read, capsys, monkeypatch, tmp_path):
    def no_space(dir):
        raise PermissionError(13, "Permission denied", dir)

    monkeypatch.setattr(Generator, "TemporaryFile", no_space)  # root may write everywhere
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "--dataset", "digits"])
    line = complaint(capsys, prepare, Generator)
    assert line.startswith("RESULTS_DIR 'results' can't be written (Permission denied)")
    assert list(tmp_path.iterdir()) == []


def write_images(path, count, size=(28, 28)):
    pixels = np.random.default_rng(count).integers(0, 256, (count, *size), dtype=np.uint8)
    path.write_bytes(struct.pack(">4i", 2051, count, *size) + pixels.tobytes())


def write_labels(path, count, classes=10):
    labels = bytes(i % classes for i in range(count))
    path.write_bytes(struct.pack(">2i", 2049, count) + labels)


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """A folder with four small files in MNIST's format; there is no network to replace them."""
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        write_images(raw / f"{part}-images-idx3-ubyte", count)
        write_labels(raw / f"{part}-labels-idx1-ubyte", count)
    return raw


@pytest.fixture
def published(raw, monkeypatch):
    """The folder with files of the published sizes, as if they were MNIST itself.

    The images are black, and take no space on the disk.
    """
    for part, count in (("train", 60000), ("t10k", 10000)):
        with open(raw / f"{part}-images-idx3-ubyte", "wb") as file:
            file.write(struct.pack(">4i", 2051, count, 28, 28))
            file.truncate(16 + count * 28 * 28)
        write_labels(raw / f"{part}-labels-idx1-ubyte", count)
    digests = [hashlib.md5((raw / file).read_bytes()).hexdigest() for file in Generator.FILES]
    monkeypatch.setitem(Generator.PUBLISHED, "mnist", ("MNIST", digests))
    return raw


def load(raw, name="mnist", checksums=False):
    return Generator.load_images(name, str(raw.parent.parent), checksums)


def cut(path, length):
    os.truncate(path, length)


def web_page(path):
    path.write_text("<!DOCTYPE html><html><body>503 Service Unavailable</body></html>")


def become_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = [
    (TRAIN_IMAGES, Path.unlink, "can't be read (No such file or directory)"),
    (TEST_LABELS, become_folder, "can't be read (Is a directory)"),
    (TEST_IMAGES, lambda path: cut(path, 0), "is no file of images (it begins with b'')"),
    (TRAIN_IMAGES, lambda path: cut(path, 10), "holds images of 0x0 pixels"),
    (TRAIN_IMAGES, lambda path: cut(path, 1000), "has 1000 bytes, not the 31376 of 40 images"),
    (TRAIN_LABELS, lambda path: cut(path, 47), "has 47 bytes, not the 48 of 40 labels"),
    (TEST_LABELS, lambda path: path.write_bytes(path.read_bytes() + b"0"), "has 29 bytes, not"),
    (TRAIN_IMAGES, web_page, "is no file of images (it begins with b'<!DOCTYPE html>"),
    (TEST_LABELS, web_page, "is no file of labels (it begins with b'<!DOCTYPE html>"),
    (TEST_IMAGES, lambda path: write_labels(path, 20), "is no file of images"),
    (TEST_LABELS, lambda path: write_images(path, 20), "is no file of labels"),
    (TRAIN_IMAGES, lambda path: write_images(path, 40, (32, 32)), "holds images of 32x32 pixels"),
    (TEST_LABELS, lambda path: write_labels(path, 20, 11), "holds the label 10, but the classes"),
    (TEST_IMAGES, lambda path: write_images(path, 40), f"holds 40 images, but {TEST_LABELS} 20"),
]


@pytest.mark.parametrize(("file", "damage", "expected"), DAMAGES)
def test_a_damaged_file_is_named(file, damage, expected, raw, capsys):
    damage(raw / file)
    assert complaint(capsys, load, raw).startswith(f"{raw / file} {expected}")


def one_bit(path):
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read()[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))  # a pixel a little lighter, or another digit


@pytest.mark.parametrize(
    ("file", "damage", "expected"),
    [
        (TRAIN_IMAGES, web_page, "is no file of images"),
        (TRAIN_IMAGES, lambda path: cut(path, 10**6), "has 1000000 bytes, not the 47040016"),
        (TEST_IMAGES, lambda path: shutil.copy(path.with_name(TRAIN_IMAGES), path), "holds 60000"),
        (TEST_LABELS, lambda path: write_labels(path, 9999), "holds 9999 labels, not 10000"),
        *((file, one_bit, "is not the published file") for file in Generator.FILES),
    ],
)
def test_what_is_not_the_published_data_is_never_trained_on(
    file, damage, expected, published, capsys
):
    damage(published / file)
    line = complaint(capsys, load, published, "auto", True)
    assert line.startswith(f"{published / file} {expected}")
    assert "delete it" in line and "CHECKSUMS" in line


def test_the_published_data_is_taken(published):
    images = load(published, "auto", True)
    assert images.name == "mnist" and images.notice == ""
    assert images.train[0].shape == (60000, 1, 28, 28) and images.test[1].shape == (10000,)


def test_kmnist_is_compared_with_the_packed_file_beside_it(published, capsys, monkeypatch):
    raw = published.parent.rename(published.parent.with_name("KMNIST")) / "raw"
    assert load(raw, "kmnist", True).name == "kmnist"  # there is nothing to compare with
    packed = raw / f"{TEST_LABELS}.gz"
    packed.write_bytes(gzip.compress((raw / TEST_LABELS).read_bytes()))
    line = complaint(capsys, load, raw, "kmnist", True)
    assert line.startswith(f"{packed} is not the published file")
    resources = [(packed.name, hashlib.md5(packed.read_bytes()).hexdigest())]
    monkeypatch.setattr("torchvision.datasets.KMNIST.resources", resources)
    assert load(raw, "kmnist", True).name == "kmnist"
    one_bit(raw / TEST_LABELS)
    line = complaint(capsys, load, raw, "kmnist", True)
    assert line.startswith(f"{raw / TEST_LABELS} is not the published file")


@pytest.mark.parametrize("name", ["mnist", "fashion", "kmnist"])
def test_a_missing_file_that_cannot_be_downloaded(name, raw, capsys):
    folder = Generator.PUBLISHED[name][0]
    raw = raw.parent.rename(raw.parent.with_name(folder)) / "raw"
    (raw / TEST_IMAGES).unlink()
    with pytest.raises(SystemExit):
        load(raw, name, True)
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and "downloading" in out and err.count("\n") == 1
    assert err.startswith(f"error: {raw / TEST_IMAGES} is missing and can't be downloaded")
    assert "DATA_DIR" in err


def test_two_downloads_at_once_come_one_after_the_other(tmp_path, monkeypatch):
    at_work, together = [], []

    def slow(folder, download):
        at_work.append(folder)
        together.append(len(at_work))
        time.sleep(0.2)
        at_work.pop()

    monkeypatch.setattr("torchvision.datasets.MNIST", slow)
    with ThreadPoolExecutor() as pool:
        for _ in range(2):
            pool.submit(Generator.download, "mnist", tmp_path)
    assert together == [1, 1]


def test_auto_takes_the_digits_only_where_mnist_is_missing(raw, capsys):
    (raw / TEST_IMAGES).unlink()
    assert load(raw, "auto", True).name == "digits"
    assert "NOT MNIST" in capsys.readouterr().out


def test_images_of_ones_own(raw):
    images, same = load(raw), load(raw)
    assert images.name == same.name and images.name.startswith("mnist-")
    assert images.train[0].shape == (40, 1, 28, 28) and images.test[1].tolist() == [*range(10)] * 2
    assert images.train[0].max() <= 1 and str(images.train[0].dtype) == "torch.float32"
    pixels = np.frombuffer((raw / TRAIN_IMAGES).read_bytes(), np.uint8, offset=16)
    np.testing.assert_allclose(images.train[0].flatten() * 255, pixels, atol=1e-4)
    write_images(raw / TRAIN_IMAGES, 41)
    write_labels(raw / TRAIN_LABELS, 41)
    assert load(raw).name != images.name  # so that their results don't share a folder


def test_a_class_without_images_is_named(raw, capsys):
    write_labels(raw / TEST_LABELS, 20, 9)
    constants = Generator.SimpleNamespace(
        CLASS_ORDER=tuple(range(10)), N_EXPERIENCES=5, VALIDATION_SIZE=0
    )
    line = complaint(capsys, Generator.make_benchmark, load(raw), constants)
    assert line.startswith("class 9 is left without images")
