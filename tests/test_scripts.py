"""Both scripts as their users run them, on the digits that ship with scikit-learn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import GenerativeReplay
import Generator
from figures import draw

ROOT = Path(__file__).parent.parent
# No display, no network (a proxy that nobody listens on), and no MNIST from outside.
NOWHERE = dict.fromkeys(["http_proxy", "https_proxy", "HTTP_PROXY"], "http://127.0.0.1:9")
OFFLINE = {"MPLBACKEND": "agg", "DATA_DIR": "nowhere", "no_proxy": "", **NOWHERE}
QUICK = ("--dataset", "digits", "--iterations", "20")


def run(script, *arguments, cwd):
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    environment = {**os.environ, **OFFLINE}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def mnist_folder():
    folder = Path(os.environ.get("DATA_DIR", "data"))
    return folder if folder.is_absolute() else ROOT / folder


needs_mnist = pytest.mark.skipif(
    not (mnist_folder() / "MNIST" / "raw" / "train-images-idx3-ubyte").exists(),
    reason=f"MNIST is not in {mnist_folder()}; set DATA_DIR to where it is",
)


@pytest.mark.parametrize("script", ["Generator.py", "GenerativeReplay.py"])
def test_help_lists_every_constant_with_its_comment(script, tmp_path):
    done = run(script, "--help", cwd=tmp_path)
    text = " ".join(done.stdout.split())
    assert done.returncode == 0 and done.stderr == ""
    for name in Generator.RULES:
        assert "--" + name.lower().replace("_", "-") in text
    for line in (ROOT / "Generator.py").read_text().splitlines():
        if line[:1].isupper() and "  # " in line:
            assert line.split("  # ")[1] in text
    assert ("--input-dropout" in text) == (script == "GenerativeReplay.py")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--batch-size", "0"], "BATCH_SIZE is 0"),
        (["--batch-size", "many"], "BATCH_SIZE is 'many'"),
        (["--batch-size", "1", "2"], "BATCH_SIZE is (1, 2)"),
        (["--batch-size"], "BATCH_SIZE is True"),
        (["--iterations", "2.5"], "ITERATIONS is 2.5"),
        (["--replay-size", "-1"], "REPLAY_SIZE is -1"),
        (["--learning-rate", "nan"], "LEARNING_RATE is 'nan'"),
        (["--increasing-replay-size", "1"], "INCREASING_REPLAY_SIZE is 1"),
        (["--ratio", "1.5"], "RATIO is 1.5"),
        (["--dataset", "cifar"], "DATASET is 'cifar'"),
        (["--n-experiences", "3"], "N_EXPERIENCES is 3"),
        (["--class-order", "0", "1"], "CLASS_ORDER is (0, 1)"),
        (["--seeds", "1", "1"], "SEEDS is (1, 1)"),
        (["--seeds", "[0]"], "SEEDS is ([0],)"),
        (["--seeds", str(2**64)], "SEEDS is"),
        (["--device", "gpu"], "DEVICE is 'gpu'"),
        (["--input-dropout", "1"], "INPUT_DROPOUT is 1"),
        (["--batchsize", "3"], "unrecognized arguments: --batchsize 3"),
        (["--batch", "3"], "unrecognized arguments: --batch 3"),
    ],
)
def test_a_bad_constant_gets_one_line(arguments, complaint, tmp_path):
    done = run("GenerativeReplay.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1 and complaint in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_constants_from_the_command_line(monkeypatch):
    words = "x --batch-size 64 --seeds 3 1 --replay-size None --increasing-replay-size --ratio .5"
    words += " --results-dir 2024"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--class-order", *"9876543210"])
    constants = Generator.read_constants(Generator, GenerativeReplay)
    assert constants.BATCH_SIZE == 64 and constants.SEEDS == (3, 1) and constants.RATIO == 0.5
    assert constants.REPLAY_SIZE is None and constants.INCREASING_REPLAY_SIZE is True
    assert constants.CLASS_ORDER == tuple(range(9, -1, -1))
    assert constants.LEARNING_RATE == Generator.LEARNING_RATE
    assert set(vars(constants)) == {*Generator.RULES, *GenerativeReplay.RULES}
    assert constants.RESULTS_DIR == "2024"


def test_the_experiment_and_its_results(tmp_path):
    done = run("GenerativeReplay.py", *QUICK, "--seeds", 1, 0, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "BATCH_SIZE = 128\n" in done.stdout and "DATASET = 'digits'\n" in done.stdout
    assert done.stdout.count("accuracy matrix") == 2 and done.stdout.count("accuracy so far") == 10
    files = sorted((tmp_path / "results").glob("*/results.json"))
    first, second = (json.loads(file.read_text()) for file in files)
    assert (first["seed"], second["seed"]) == (0, 1)
    assert first["accuracy_matrix"] != second["accuracy_matrix"]
    for result in first, second:
        matrix = np.array(result["accuracy_matrix"])
        assert matrix.shape == (5, 5) and matrix.min() >= 0 and matrix.max() <= 1
        assert result["final_accuracy"] == pytest.approx(matrix[-1].mean())
        drops = [matrix[j:4, j].max() - matrix[4, j] for j in range(4)]
        assert result["forgetting"] == pytest.approx(np.mean(drops))
        assert result["dataset"] == "digits" and result["strategy"] == "replay"
        assert result["constants"]["ITERATIONS"] == 20 and result["seconds"] > 0
        assert set(result["versions"]) == {"python", "torch", "avalanche"}
    assert first["constants"]["DEVICE"] != "auto"
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    values = [first["final_accuracy"], second["final_accuracy"]]
    assert summary["final_accuracy"]["mean"] == pytest.approx(np.mean(values))
    error = np.std(values, ddof=1) / np.sqrt(2)
    assert summary["final_accuracy"]["standard_error"] == pytest.approx(error)
    pictures = {path.name for path in (tmp_path / "results").rglob("*.png")}
    assert pictures == {"accuracy.png", "accuracy_matrix.png", "samples.png"}
    assert list(tmp_path.rglob("*.unfinished")) == []

    # A seed gives the same numbers alone as after another one; a file is no results folder.
    (tmp_path / "file").touch()
    again = run("GenerativeReplay.py", *QUICK, "--results-dir", "again", cwd=tmp_path)
    assert again.returncode == 0
    (file,) = (tmp_path / "again").glob("*/results.json")
    assert json.loads(file.read_text())["accuracy_matrix"] == first["accuracy_matrix"]
    blocked = run("GenerativeReplay.py", *QUICK, "--results-dir", "file", cwd=tmp_path)
    assert blocked.returncode == 2 and blocked.stderr.count("\n") == 1
    assert "RESULTS_DIR" in blocked.stderr


def test_the_generator_script_falls_back_on_the_digits_and_says_so(tmp_path):
    done = run("Generator.py", "--iterations", 10, "--n-experiences", 2, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "MNIST can't be had" in done.stdout and "NOT MNIST" in done.stdout
    (folder,) = (tmp_path / "results").iterdir()
    result = json.loads((folder / "generator.json").read_text())
    assert "NOT MNIST" in draw.title(result, "")
    assert "NOT MNIST" in result["notice"] and result["dataset"] == "digits"
    assert np.shape(result["negative_elbo_matrix"]) == (2, 2)
    arrays = np.load(folder / "samples.npz")
    assert arrays["samples"].shape == (2, 20, 1, 28, 28)
    assert arrays["reconstructions"].shape == (2, 10, 1, 28, 28)
    assert (folder / "generator.png").stat().st_size > 10_000


def test_a_dataset_asked_for_by_name_is_never_replaced(tmp_path):
    done = run("Generator.py", "--dataset", "mnist", "--data-dir", "empty", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "'empty'" in done.stderr and "DATA_DIR" in done.stderr
    assert not (tmp_path / "results").exists()


def test_replay_beats_fine_tuning_on_the_digits(tmp_path):
    def final_accuracy(replay_size):
        arguments = "--dataset", "digits", "--iterations", 250, "--replay-size", replay_size
        folder = tmp_path / replay_size
        done = run("GenerativeReplay.py", *arguments, "--results-dir", folder, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return json.loads((folder / "summary.json").read_text())["final_accuracy"]["mean"]

    assert final_accuracy("none") > final_accuracy("0") + 0.3


def test_validation_images_are_never_trained_on():
    images = Generator.load_digits()
    order = tuple(range(10))
    constants = Generator.SimpleNamespace(CLASS_ORDER=order, N_EXPERIENCES=5, VALIDATION_SIZE=300)
    benchmark = Generator.make_benchmark(images, constants)

    def rows(stream):
        return [tuple(x.flatten().tolist()) for e in stream for x in e.dataset.tensors[0]]

    train, validation = rows(benchmark.train_stream), rows(benchmark.test_stream)
    assert len(validation) == 300 and len(train) + 300 == len(images.train[1])
    assert not set(train) & set(validation)
    assert set(train) | set(validation) == {tuple(x.flatten().tolist()) for x in images.train[0]}


def test_a_validation_set_that_leaves_nothing_to_learn(tmp_path):
    done = run("Generator.py", *QUICK, "--validation-size", 1435, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "VALIDATION_SIZE" in done.stderr and list(tmp_path.iterdir()) == []


def test_the_generator_learns_like_the_solver_unless_told_otherwise():
    constants = Generator.SimpleNamespace(
        **{name: vars(Generator)[name] for name in Generator.RULES}, INPUT_DROPOUT=0.0
    )
    constants.DEVICE = "cpu"

    def settings():
        scholar = GenerativeReplay.make_scholar((1, 28, 28), constants)
        both = scholar, scholar.replay.generator_strategy
        return [(type(s.optimizer), s.optimizer.defaults["lr"], s.train_mb_size) for s in both]

    constants.LEARNING_RATE, constants.BATCH_SIZE = 0.01, 32
    assert settings() == [(torch.optim.Adam, 0.01, 32)] * 2
    constants.GENERATOR_LEARNING_RATE, constants.GENERATOR_BATCH_SIZE = 0.02, 64
    assert settings() == [(torch.optim.Adam, 0.01, 32), (torch.optim.Adam, 0.02, 64)]


def test_the_stream_brings_the_classes_in_order():
    order = (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)
    constants = Generator.SimpleNamespace(CLASS_ORDER=order, N_EXPERIENCES=5, VALIDATION_SIZE=0)
    benchmark = Generator.make_benchmark(Generator.load_digits(), constants)
    for stream in benchmark.train_stream, benchmark.test_stream:
        classes = [set(e.dataset.tensors[1].tolist()) for e in stream]
        assert classes == [{3, 1}, {4, 0}, {5, 9}, {2, 6}, {8, 7}]


def test_the_digits_are_real_images_in_range():
    images = Generator.load_digits()
    (x, y), (test_x, test_y) = images.train, images.test
    assert x.shape == (1437, 1, 28, 28) and test_x.shape == (360, 1, 28, 28)
    assert x.min() == 0 and x.max() <= 1 and x.max() > 0.9
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert sorted(set(test_y.tolist())) == list(range(10))
    assert torch.equal(x, Generator.load_digits().train[0])


def test_forgetting():
    matrix = [[0.9, 0.0, 0.0], [0.95, 0.8, 0.0], [0.6, 0.85, 0.99]]
    # 0.95 was the best of the first; the second has even improved since it was learned.
    assert GenerativeReplay.forgetting(matrix) == pytest.approx(((0.95 - 0.6) + (0.8 - 0.85)) / 2)
    assert GenerativeReplay.forgetting([[0.9]]) == 0


@needs_mnist
def test_mnist():
    images = Generator.load_mnist(str(mnist_folder()))
    (x, y), (test_x, _) = images.train, images.test
    assert x.shape == (60000, 1, 28, 28) and test_x.shape == (10000, 1, 28, 28)
    assert x.dtype == torch.float32 and x.min() == 0 and x.max() == 1
    assert x.mean() == pytest.approx(0.1307, abs=1e-4) and y[:5].tolist() == [5, 0, 4, 1, 9]


@needs_mnist
def test_two_experiences_of_mnist(tmp_path):
    arguments = ["--data-dir", mnist_folder().absolute()]
    done = run(
        "GenerativeReplay.py", *arguments, "--iterations", 200, "--n-experiences", 2, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(next((tmp_path / "results").glob("*/results.json")).read_text())
    assert result["constants"]["DATASET"] == "mnist"  # which "auto" has found
    assert result["dataset"] == "mnist" and result["notice"] == ""
    assert result["final_accuracy"] > 0.6 and result["accuracy_matrix"][1][0] > 0.2
