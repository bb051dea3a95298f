"""Both scripts as their users run them, on the digits that ship with scikit-learn."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import joblib
import numpy as np
import pytest
import torch
from conftest import CONSTANTS, DATA_DIR, ROOT, answer, needs_mnist, run
from torch import nn

import GenerativeReplay
from figures import draw, saved_generator
from figures.ablation import COMPONENTS, PLAIN_DGR
from figures.lab import data, report
from figures.lab.constants import as_option
from figures.lab.runs import backend, setup

SMALL = ("--dataset", "digits", "--hidden-units", 40, "--latent-size", 4)
EXPERIMENT = (*SMALL, "--iterations", 30, "--strategies", "replay", "naive", "joint", "er")


def records(folder):
    """The records of all runs in a folder, by strategy and seed."""
    paths = folder.glob("*/results.json")
    return {(r["name"], r["seed"]): r for r in (json.loads(p.read_text()) for p in paths)}


def shapes(folder):
    """The shapes of the arrays of a run."""
    with np.load(folder / "arrays.npz") as arrays:
        return {name: array.shape for name, array in arrays.items()}


def table(text):
    """The table of accuracies that a command has printed."""
    return (
        text[text.index("final accuracy") :].split("\nThese")[0].split("\nResults")[0].splitlines()
    )


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Four strategies with two seeds, in two processes."""
    cwd = tmp_path_factory.mktemp("experiment")
    done = run("GenerativeReplay.py", *EXPERIMENT, "--seeds", 0, 1, "--n-jobs", 2, cwd=cwd)
    assert done.returncode == 0 and done.stderr == ""
    folder = cwd / "results"
    return SimpleNamespace(folder=folder, out=done.stdout, records=records(folder))


@pytest.fixture
def copied(experiment, tmp_path):
    """A copy of the experiment's results, that a test can change."""
    return shutil.copytree(experiment.folder, tmp_path / "results")


@pytest.mark.parametrize("script", ["Generator.py", "GenerativeReplay.py"])
def test_help_lists_every_constant_with_its_comment_at_once(script, tmp_path):
    done, seconds = answer(script, "--help", cwd=tmp_path)
    assert seconds < 1.5
    assert done.returncode == 0 and done.stderr == "" and not list(tmp_path.iterdir())
    text, code = " ".join(done.stdout.split()), (ROOT / script).read_text(encoding="utf-8")
    constants = re.findall("^([A-Z0-9_]+): .* = .*?  # (.+)$", code, re.MULTILINE)
    assert len(constants) > 20 and text.count("[ ...]") == len(constants)
    for name, comment in constants:
        assert f"{as_option(name)} [ ...] {comment}" in text


def test_results_and_statistics(experiment):
    assert "BATCH_SIZE = 64\n" in experiment.out and len(experiment.records) == 8
    for record in experiment.records.values():
        matrix, confusions = map(np.array, (record["accuracy_matrix"], record["confusion_matrix"]))
        assert matrix.shape == (5, 5) and matrix.min() >= 0 and matrix.max() <= 1
        assert record["final_accuracy"] == pytest.approx(matrix[-1].mean())
        assert confusions.shape == (10, 10) and confusions.sum() == 360
        right, of_all = (x.reshape(5, 2).sum(1) for x in (confusions.diagonal(), confusions.sum(1)))
        assert matrix[-1] == pytest.approx(right / of_all)
        known = np.array(record["task_accuracy_matrix"])
        assert known.shape == (5, 5) and (known > matrix - 1e-6).all() and known.max() <= 1
        assert record["final_task_accuracy"] == pytest.approx(known[-1].mean())
        assert record["dataset"] == "digits" and record["notice"] == "" and record["seconds"] > 0
        assert record["constants"]["ITERATIONS"] == 30 and record["constants"]["DEVICE"] != "auto"
        assert record["constants"]["KL_WEIGHT"] == 0.07
        assert set(record["versions"]) == {"python", "torch", "torchvision", "avalanche-lib"}
    summary = json.loads((experiment.folder / "summary.json").read_text())
    assert list(summary) == ["replay", "naive", "joint", "er"]
    for name, row in summary.items():
        values = [experiment.records[name, seed]["final_accuracy"] for seed in (0, 1)]
        error, accuracy = np.std(values, ddof=1) / np.sqrt(2), row["final_accuracy"]
        assert row["seeds"] == [0, 1] and accuracy["values"] == values
        assert accuracy["mean"] == pytest.approx(np.mean(values))
        assert accuracy["standard_error"] == pytest.approx(error)
        means = f"{name}, mean ± s.e. {np.mean(values):.2%} ± {error:.2%}"
        assert any(" ".join(line.split()).startswith(means) for line in table(experiment.out))
    rows = [row.split(",") for row in (experiment.folder / "metrics.csv").read_text().splitlines()]
    columns = "strategy", "seed", "experience_trained", "experience_tested"
    assert rows[0] == [*columns, "accuracy", "task_accuracy"] and len(rows) == 1 + 8 * 25
    for name, seed, trained, tested, *accuracies in rows[1:]:
        for kind, accuracy in zip(("accuracy_matrix", "task_accuracy_matrix"), accuracies):
            matrix = experiment.records[name, int(seed)][kind]
            assert float(accuracy) == matrix[int(trained) - 1][int(tested) - 1]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_the_surest_sample_is_found_and_another_one(order):
    class Solver(nn.Module):
        def forward(self, x):
            return torch.cat([x.flatten(1), torch.zeros(len(x), 1)], 1)

    x = torch.tensor([30.0, 20.0, 33.0])[order].view(3, 1, 1, 1)  # nearly certain, all of them
    plugin = SimpleNamespace(
        generator=SimpleNamespace(generate=lambda count: x), seen_classes=[0, 1]
    )
    scholar = SimpleNamespace(replay_plugin=plugin, model=Solver(), device=torch.device("cpu"))
    pictures = GenerativeReplay.samples_per_class(scholar, [0, 1]).flatten()
    assert pictures[:2].tolist() == [33, 30] and pictures[2:].isnan().all()


def test_a_seed_gives_the_same_numbers_alone_and_others_give_others(experiment, tmp_path):
    words = *EXPERIMENT[:-4], "replay", "er", "--seeds", 1
    assert run("GenerativeReplay.py", *words, cwd=tmp_path, figures=False).returncode == 0
    alone = records(tmp_path / "results")
    assert len(alone) == 2
    for (name, seed), record in alone.items():
        for key in ("accuracy_matrix", "confusion_matrix"):
            assert record[key] == experiment.records[name, seed][key]
            assert record[key] != experiment.records[name, 0][key]


def test_finished_runs_are_skipped(experiment, copied):
    times = {path: path.stat().st_mtime_ns for path in copied.glob("digits-*/*.*")}
    done = run("GenerativeReplay.py", *EXPERIMENT, "--seeds", 1, cwd=copied.parent, figures=False)
    assert done.returncode == 0 and done.stdout.count("finished already") == 4
    assert len(times) == 8 * 3  # record, arrays and state of each
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert set(table(done.stdout)[1:]) < set(table(experiment.out))


def test_drawing_needs_the_results_alone(experiment, copied):
    pictures = {p.name: p.read_bytes() for p in (copied / "figures").iterdir()}
    shutil.rmtree(copied / "figures")
    done = run("figures.draw", "results", cwd=copied.parent)
    assert done.returncode == 0 and done.stderr == ""
    assert table(done.stdout) == table(experiment.out)
    assert {p.name: p.read_bytes() for p in (copied / "figures").iterdir()} == pictures
    # Runs from several machines, each in a folder; and a copy, which is no other run.
    machines = copied.parent / "machines"
    shutil.copytree(copied, machines / "second")
    copied.rename(machines / "first")
    for path in (machines / "second").glob("*naive*"):
        shutil.rmtree(path)
    done = run("figures.draw", "machines", cwd=machines.parent)
    assert done.returncode == 0 and table(done.stdout) == table(experiment.out)
    assert (machines / "figures" / "accuracy.png").exists()


def test_a_folder_is_shown_or_it_is_said_why_not(copied):
    replay, naive = next(copied.glob("*replay*")), next(copied.glob("*naive*"))
    done = run("figures.saved_generator", replay, cwd=copied.parent)
    assert done.returncode == 0 and done.stderr == "" and "saved_generator.png" in done.stdout
    assert (replay / "saved_generator.png").stat().st_size > 10_000
    (naive / "results.json").write_text("{")
    for words, expected in [
        (["figures.saved_generator", naive], "a run without generator"),
        (["figures.saved_generator", "nowhere"], "is no folder of a run"),
        (["figures.draw", "results"], "results.json can't be read"),
        (["figures.draw", "results/figures"], "no results.json in or below 'results/figures'"),
        (["figures.draw"], "python -m figures.draw results"),
    ]:
        done = run(*words, cwd=copied.parent)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and expected in done.stderr


def test_a_saved_generator_sees_what_it_has_learned(tmp_path, monkeypatch):
    words = *SMALL, "--shuffle-classes", "--seeds", 1, "--iterations", 5, "--n-experiences", 2
    assert run("Generator.py", *words, cwd=tmp_path, figures=False).returncode == 0
    (folder,) = tmp_path.glob("results/*")
    drawn = []
    monkeypatch.setattr(draw, "save", lambda function, *_: drawn.append(function.keywords))
    saved_generator.show_saved_generator(folder)
    with np.load(folder / "arrays.npz") as arrays:
        pictures = arrays["originals"], arrays["reconstructions"][-1]
    np.testing.assert_array_equal(drawn[0]["arrays"]["reconstructions"], pictures)


def test_auto_falls_back_on_the_digits_and_says_so(tmp_path):
    notice = "scikit-learn's 8x8 digits, NOT MNIST"
    words = "--iterations", 5, "--n-experiences", 2
    for script, file in ("Generator.py", "generator.json"), ("GenerativeReplay.py", "results.json"):
        done = run(script, *words, cwd=tmp_path)
        assert done.returncode == 0 and done.stderr == "" and notice in done.stdout
        assert "DATASET = 'digits'" in done.stdout and "can't be downloaded" in done.stdout
        (path,) = tmp_path.glob(f"results/digits-*/{file}")
        record = json.loads(path.read_text())
        assert record["notice"] == notice and notice in draw.title("Samples", [record])
    assert f"These are numbers of {notice}" in done.stdout
    folder = next(tmp_path.glob("results/digits-generator-*"))
    assert (folder / "generator.png").stat().st_size > 10_000
    assert shapes(folder) == {
        "samples": (2, 20, 1, 28, 28),
        "reconstructions": (2, 10, 1, 28, 28),
        "originals": (10, 1, 28, 28),
    }


def test_the_ablation_adds_components_one_by_one_and_leaves_each_out(tmp_path):
    words = *SMALL[:4], "--iterations", 3, "--n-experiences", 2, "--bfloat16", "true"
    done = run("figures.ablation", *words, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "results" / "figures" / "ablation.png").exists()
    names = ["plain DGR", *(f"+ {name}" for name in COMPONENTS)]
    rows = [line.split(", seed 0")[0] for line in table(done.stdout)[1:]]
    without = [f"without {name}" for name in list(COMPONENTS)[:-1]]
    assert rows == [*names, *without, "naive", "joint"]
    replay = list((tmp_path / "results").glob("digits-replay-*"))
    assert len(replay) == len(names + without)  # all of them differ
    found = {name: r["constants"] for (name, _), r in records(tmp_path / "results").items()}
    assert found["plain DGR"].items() >= PLAIN_DGR.items() and found[names[-1]] == found["joint"]
    steps = list(zip(names, names[1:])) + [("joint", name) for name in without]
    for before, after in steps:
        changed = {key for key, value in found[after].items() if found[before][key] != value}
        component = COMPONENTS[after.removeprefix("+ ").removeprefix("without ")]
        assert changed == component.keys() & found[after].keys()


def test_replay_beats_fine_tuning_on_the_digits(tmp_path):
    strategies = "--strategies", "replay", "naive"
    words = "--dataset", "digits", "--iterations", 60, "--hidden-units", 200, *strategies
    run("GenerativeReplay.py", *words, cwd=tmp_path, figures=False)
    final = {name: r["final_accuracy"] for (name, _), r in records(tmp_path / "results").items()}
    assert final["replay"] > final["naive"] + 0.4


def test_no_thread_is_slowed_down_by_denormal_numbers():
    program = """if True:
        import numpy, torch, Generator
        from figures.lab.constants import read_constants
        from figures.lab.runs import setup
        setup(read_constants(Generator, ["--threads", "2"]))
        product = torch.full((1_000_000,), 1e-30) * 1e-10  # each thread computes a half
        torch.set_flush_denormal(False)  # or they would be counted as zeros anyway
        print(torch.get_num_threads(), numpy.count_nonzero(product))
    """
    environment = {name: os.environ[name] for name in os.environ.keys() - {"OMP_NUM_THREADS"}}
    call = [sys.executable, "-c", program]
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, check=True)
    assert done.stdout == b"2 0\n"


def test_forgetting():
    matrix = [[0.9, 0.0, 0.0], [0.95, 0.8, 0.0], [0.6, 0.85, 0.99]]
    # 0.95 was the best of the first; the second has even improved since it was learned.
    assert report.forgetting(matrix) == pytest.approx(((0.95 - 0.6) + (0.8 - 0.85)) / 2)
    assert report.forgetting([[0.9]]) == 0


@pytest.mark.parametrize(("experiences", "tasks"), [(4, 2), (1002, 1)])
def test_metrics_come_in_the_order_of_the_experiences(experiences, tasks):
    beginning = "Top1_Acc_Exp/eval_phase/test_stream/Task"
    metrics = {f"{beginning}{i % tasks:03d}/Exp{i:03d}": i for i in range(experiences)}
    assert report.by_experience(metrics, "Top1_Acc_Exp") == list(range(experiences))


def test_task_accuracies_choose_among_the_classes_of_the_experience():
    # These images are their own logits; the third is taken for 1, but for 2 if 1 can't be.
    x = torch.tensor([[9, 2, 3, 1], [5, 4, 3, 0], [0, 9, 8, 2], [0, 0, 6, 7]]) / 10
    parts = [(part.view(-1, 1, 1, 4), y) for part, y in zip(x.split(2), torch.arange(4).split(2))]
    stream = data.in_memory_benchmark(parts, parts).test_stream
    solver = nn.Sequential(nn.Flatten(), nn.Linear(4, 4, bias=False))
    nn.init.eye_(solver[1].weight)
    assert report.task_accuracies(solver, stream) == [0.5, 1]
    confusions = [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    assert report.confusions(solver, stream) == confusions


@pytest.mark.parametrize(
    "variable, constant, threads", [(None, None, 1), ("2", None, 2), ("2", 3, 3), (None, 3, 3)]
)
def test_one_thread_unless_told_otherwise(variable, constant, threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    torch.set_num_threads(2)  # as many as torch has read from the variable, or chosen
    constants = setup(CONSTANTS.changed(THREADS=constant, N_JOBS=2))
    assert torch.get_num_threads() == threads
    if threads == 3:  # which isn't the share of a process either
        with backend(constants):
            asked = [joblib.delayed(os.getenv)("OMP_NUM_THREADS")] * 2
            assert joblib.Parallel()(asked) == ["3", "3"]
    torch.set_num_threads(1)


def test_the_digits_and_validation_images_among_them():
    images, again = data.load_digits(), data.load_images(CONSTANTS)
    (x, y), (test_x, test_y) = images.train, images.test
    assert x.shape == (1437, 1, 28, 28) and test_x.shape == (360, 1, 28, 28)
    assert x.min() == 0 and 0.9 < x.max() <= 1 and torch.equal(x, again.train[0])
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert test_y.bincount().min() > 30 and len(test_y.bincount()) == 10
    held_out = data.load_images(CONSTANTS.changed(VALIDATION_SIZE=300))
    parts = x, held_out.train[0], held_out.test[0], test_x
    rows, train, validation, test = ({tuple(row) for row in p.flatten(1).tolist()} for p in parts)
    assert len(held_out.test[0]) == 300 and train | validation == rows
    assert not train & validation and not validation & test


@needs_mnist
def test_two_experiences_of_mnist(tmp_path):
    images = data.load_images(CONSTANTS.changed(DATASET="auto", DATA_DIR=str(DATA_DIR)))
    (x, y), (test_x, _) = images.train, images.test
    assert x.shape == (60000, 1, 28, 28) and test_x.shape == (10000, 1, 28, 28)
    assert x.dtype == torch.float32 and x.min() == 0 and x.max() == 1 and images.notice == ""
    assert x.mean() == pytest.approx(0.1307, abs=1e-4) and y[:5].tolist() == [5, 0, 4, 1, 9]
    words = "--iterations", 100, "--n-experiences", 2, "--mixture-components", 1
    run("GenerativeReplay.py", "--data-dir", DATA_DIR, *words, cwd=tmp_path, figures=False)
    record = records(tmp_path / "results")["replay", 0]
    assert record["dataset"] == record["constants"]["DATASET"] == "mnist"  # found by "auto"
    assert record["final_accuracy"] > 0.6 and record["accuracy_matrix"][1][0] > 0.2
