"""What happens to a run: it is killed, goes on, meets damaged files, a full disk, a second copy."""

import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from avalanche.models import IncrementalClassifier
from conftest import CONSTANTS, OFFLINE, ROOT, begin, run

import GenerativeReplay
from figures.ablation import PLAIN_DGR
from figures.lab import runs
from figures.lab.constants import UserError, as_option
from figures.lab.data import load_digits

SMALL = {"DATASET": "digits", "HIDDEN_UNITS": 40, "LATENT_SIZE": 4, "ITERATIONS": 40}


def options(**changes):
    """A command line that makes these changes to the constants."""
    words = []
    for name, value in (SMALL | changes).items():
        values = value if isinstance(value, tuple) else (value,)
        words += [as_option(name), *values]
    return words


def start(script, *arguments, **more):
    """Start a script in a new process of Python, as the leader of a process group."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    # A shell lets what it starts with & ignore SIGINT, and that is inherited.
    more["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, env=os.environ | OFFLINE, start_new_session=True, **more)


def numbers(folder):
    """All results below a folder but the seconds: records and arrays by folder and file."""
    found = {}
    for path in folder.glob("*/*.json"):
        found[path.parent.name, path.name] = record = json.loads(path.read_text())
        del record["seconds"], record["constants"]["RESULTS_DIR"]
    for path in folder.glob("*/*.npz"):
        with np.load(path) as arrays:
            found[path.parent.name, path.name] = {k: arrays[k].tobytes() for k in arrays.files}
    return found


def wait_for_state(folder):
    """Wait until the first experience of a run below a folder is saved."""
    while not (states := list(folder.glob("**/state.pt"))):
        time.sleep(0.01)
    return states[0]


def one_line(text):
    assert text.startswith("error: ") and text.count("\n") == 1, text
    return text


@pytest.mark.parametrize(
    ("script", "changes"),
    [
        ("GenerativeReplay.py", {}),
        ("GenerativeReplay.py", PLAIN_DGR),
        ("GenerativeReplay.py", {"STRATEGIES": "er"}),
        ("Generator.py", {}),
    ],
    ids=["replay", "plain DGR", "er", "generator"],
)
def test_a_run_killed_in_an_experience_ends_with_the_same_numbers(script, changes, tmp_path):
    words = options(**changes)
    whole = run(script, *words, "--results-dir", "whole", cwd=tmp_path, figures=False)
    killed = begin(script, *words, "--results-dir", "killed", cwd=tmp_path, figures=False)
    state = wait_for_state(tmp_path / "killed")
    time.sleep(0.05)
    killed.kill()
    killed.join()
    assert not list(state.parent.glob("*.json"))  # it wasn't finished
    (state.parent / ".1-arrays.npz").write_bytes(b"half")  # as if killed while it wrote this
    again = run(script, *words, "--results-dir", "killed", cwd=tmp_path, figures=False)
    assert whole.returncode == again.returncode == 0 and whole.stderr == again.stderr == ""
    assert "experience 1/5" in whole.stdout
    assert "experience 1/5" not in again.stdout  # it went on
    found = numbers(tmp_path / "killed")
    assert len(found) >= 2 and found == numbers(tmp_path / "whole")
    assert not list(state.parent.glob(".*"))


@pytest.mark.soak
def test_twenty_kills_at_random_moments(tmp_path):
    words = options(SEEDS=(0, 1, 2))
    begin("GenerativeReplay.py", *words, "--results-dir", "warm", cwd=tmp_path).join()
    began = time.perf_counter()
    whole = begin("GenerativeReplay.py", *words, "--results-dir", "whole", cwd=tmp_path)
    whole.join()
    needed, moments, survived = time.perf_counter() - began, random.Random(0), 0
    assert whole.exitcode == 0
    while survived < 20:
        child = begin("GenerativeReplay.py", *words, "--results-dir", "killed", cwd=tmp_path)
        child.join(moments.uniform(0, needed / 3))
        if child.is_alive():
            child.kill()
            child.join()
            survived += 1
        assert child.exitcode in (0, -signal.SIGKILL)
        for path in (tmp_path / "killed").rglob("[!.]*.json"):
            json.loads(path.read_text())
        for path in (tmp_path / "killed").rglob("state.pt"):
            runs.read_state(path)
    done = run("GenerativeReplay.py", *words, "--results-dir", "killed", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    found = numbers(tmp_path / "killed")
    assert len(found) == 6 and found == numbers(tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "jobs", "moment"),
    [
        (signal.SIGINT, 1, "BATCH_SIZE"),
        (signal.SIGTERM, 1, "experience 1/5"),
        (signal.SIGINT, 2, "experience 1/5"),
        (signal.SIGTERM, 2, "BATCH_SIZE"),
    ],
)
def test_an_interruption_ends_soon_with_one_line(number, jobs, moment, tmp_path):
    words = options(ITERATIONS=500, SEEDS=(0, 1), N_JOBS=jobs)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with start("GenerativeReplay.py", *words, cwd=tmp_path, **pipes) as process:
        assert any(moment in line for line in process.stdout), process.stderr.read()
        began = time.perf_counter()
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does it
        else:
            process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert time.perf_counter() - began < 10  # about two seconds
    assert process.returncode == 130
    assert errors.strip().count("\n") == 0 and "interrupted; the same command goes on" in errors


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_a_bad_state_is_neither_loaded_nor_overwritten(tmp_path):
    words = options(ITERATIONS=5)
    assert run("GenerativeReplay.py", *words, cwd=tmp_path, figures=False).returncode == 0
    state = wait_for_state(tmp_path)
    record = state.with_name("results.json")
    for content in "{}", "[1]", "":
        record.write_text(content)
        with pytest.raises(UserError, match="results.json can't be read"):
            runs.read_record(record)
    done = run("GenerativeReplay.py", *words, cwd=tmp_path)
    assert done.returncode == 2 and "results.json can't be read" in one_line(done.stderr)
    record.unlink()  # as if it had been killed before its end
    good, saved, foreign = state.read_bytes(), runs.read_state(state), tmp_path / "foreign"
    torch.save(saved | {"run": saved["run"][:-1] + "1"}, foreign)
    bad = [good[: len(good) // 2], b"", pickle.dumps(Trap()), b"<!DOCTYPE html>"]
    for content in [*bad, foreign.read_bytes()]:
        state.write_bytes(content)
        with pytest.raises(UserError, match="state.pt is no state of this run .* move it away"):
            runs.read_state(state)
        assert state.read_bytes() == content and not Path("trapped").exists()
    for command in ["GenerativeReplay.py", *words], ["figures.saved_generator", state.parent]:
        done = run(*command, cwd=tmp_path)
        assert done.returncode == 2 and "state.pt is no state" in one_line(done.stderr)
    assert state.read_bytes() == content
    saved["record"]["name"] = "+ KL weight"  # the same run, begun by the ablation
    torch.save(saved, state)
    done = run("GenerativeReplay.py", *words, cwd=tmp_path, figures=False)
    assert done.returncode == 0 and "experience 5/5" not in done.stdout
    assert "replay, seed 0" in done.stdout and "KL weight" not in done.stdout


def test_a_full_disk_loses_nothing(tmp_path):
    files = tmp_path / "stdout", tmp_path / "stderr"
    full = begin("GenerativeReplay.py", *options(), cwd=tmp_path, outputs=files)
    state = wait_for_state(tmp_path)
    resource.prlimit(full.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    full.join()
    assert full.exitcode == 2 and "state.pt" in one_line(files[1].read_text())
    assert not list(tmp_path.rglob(".*"))  # temporary files
    assert runs.read_state(state)["record"]["accuracy_matrix"]
    done = run("GenerativeReplay.py", *options(), cwd=tmp_path, figures=False)
    assert done.returncode == 0 and "experience 1/5" not in done.stdout
    assert "experience 5/5" in done.stdout


def test_two_copies_at_once_run_each_run_once(tmp_path):
    words, files = options(SEEDS=(0, 1)), (tmp_path / "first", tmp_path / "second")
    copies = [begin("GenerativeReplay.py", *words, cwd=tmp_path, outputs=(f, f)) for f in files]
    for copy in copies:
        copy.join()
    outputs = [file.read_text() for file in files]
    assert [copy.exitcode for copy in copies] == [0, 0], outputs
    for seed in (0, 1):
        assert "".join(outputs).count(f"seed {seed}: experience 5/5") == 1
    first, second = (output[output.index("final accuracy") :] for output in outputs)
    assert first == second


def test_an_edit_of_any_script_makes_a_new_folder(tmp_path, monkeypatch):
    def folder(seed=0, generator="", **changes):
        images, constants = SimpleNamespace(name="digits", notice=""), CONSTANTS.changed(**changes)
        return runs.Run(constants, images, "replay", seed, generator=generator).folder

    files = [*ROOT.glob("*.py"), *ROOT.glob("figures/lab/*.py"), ROOT / "figures/generators.py"]
    imported = [path.read_bytes() for path in files]
    assert sorted(runs.CODE) == sorted(imported)
    before = folder()
    assert before == folder(DEVICE="cuda", SEEDS=(5,), N_JOBS=3, THREADS=2)
    assert before not in (folder(BATCH_SIZE=65), folder(seed=1), folder(generator="make_mine"))
    with pytest.raises(UserError, match="make_generator has to have a name"):
        folder(generator=(lambda: None).__name__)
    with monkeypatch.context() as patch:  # an edit while it runs: what was imported goes on
        patch.setattr(Path, "read_bytes", lambda path: b"edited")
        assert folder() == before
    for number, text in enumerate(imported):
        edited = [*imported[:number], text + b"\n", *imported[number + 1 :]]
        monkeypatch.setattr(runs, "CODE", edited)
        assert folder() != before


@pytest.mark.parametrize(
    ("script", "change", "what"),
    [
        ("GenerativeReplay.py", {"LEARNING_RATE": 1e30}, "solver is nan at {}, iteration 2"),
        ("GenerativeReplay.py", {"KL_WEIGHT": 1e39}, "generator is inf at {}, iteration 1"),
        ("Generator.py", {"LEARNING_RATE": 1e30}, "generator is nan at {}, iteration 2"),
    ],
    ids=["solver", "generator of a scholar", "generator"],
)
def test_a_loss_that_is_no_number_ends_the_run(script, change, what, tmp_path):
    done = run(script, *options(**change), cwd=tmp_path)
    assert done.returncode == 2 and not list(tmp_path.rglob("state.pt"))
    name = "replay" if script == "GenerativeReplay.py" else "generator"
    reason = f"the loss of the {what.format('experience 1')}; try a lower LEARNING_RATE"
    assert done.stderr == f"error: {name}, seed 0: {reason}\n"


def test_layers_that_do_not_fit_into_the_memory_end_the_run(tmp_path):
    done = run("GenerativeReplay.py", *options(HIDDEN_UNITS=10**9), cwd=tmp_path)
    assert done.returncode == 2 and "allocate memory" in one_line(done.stderr)
    assert done.stderr.endswith("; make the layers smaller\n")


def experiment(folder, save=runs.Run.save, strategy="naive"):
    """An experiment within this process; return its accuracies."""
    small = CONSTANTS.changed(**SMALL | {"RESULTS_DIR": str(folder), "ITERATIONS": 20})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Run, "save", save)
        done = GenerativeReplay.experiment(strategy, small, seed=0, images=load_digits())
    return done["accuracy_matrix"]


def test_to_look_at_samples_changes_no_number(tmp_path, monkeypatch):
    looked = experiment(tmp_path / "looked", strategy="replay")
    monkeypatch.setattr(GenerativeReplay, "samples_per_class", lambda *_: torch.rand(20, 1, 28, 28))
    assert experiment(tmp_path / "other", strategy="replay") == looked


def test_a_head_that_grows_goes_on(tmp_path, monkeypatch):
    make_solver = GenerativeReplay.make_solver

    def growing(benchmark, constants):
        solver = make_solver(benchmark, constants)
        solver[-1] = IncrementalClassifier(constants.HIDDEN_UNITS)
        return solver

    def save_and_stop(run, *arguments):
        save(run, *arguments)
        if len(run.record["accuracy_matrix"]) == 3:
            raise KeyboardInterrupt

    save = runs.Run.save
    monkeypatch.setattr(GenerativeReplay, "make_solver", growing)
    whole = experiment(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        experiment(tmp_path / "stopped", save_and_stop)
    assert experiment(tmp_path / "stopped") == whole


def test_tensorboard_leaves_curves(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run("GenerativeReplay.py", *options(ITERATIONS=5), "--tensorboard", cwd=tmp_path, figures=False)
    folder = wait_for_state(tmp_path).parent
    log = EventAccumulator(str(folder))
    log.Reload()
    curves = {tag.split("/")[0]: len(log.Scalars(tag)) for tag in log.Tags()["scalars"]}
    assert curves["Loss_MB"] == 5 * 5 and curves["Top1_Acc_Exp"] == 5
