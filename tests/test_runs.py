"""What happens to a run: it is killed, goes on, meets damaged files, a full disk, a second copy."""

import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
import torch
from test_scripts import OFFLINE, ROOT, begin, run

import Generator

SMALL = ("--dataset", "digits", "--hidden-units", "40", "--latent-size", "4")


def start(script, *arguments, cwd, **more):
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env={**os.environ, **OFFLINE}, **pipes, **more)


def numbers(folder):
    """All results below a folder, without the seconds: records and arrays by folder and file."""
    found = {}
    for path in sorted(folder.rglob("*.json")):
        if path.name != "summary.json":
            record = json.loads(path.read_text())
            record.pop("seconds")
            record["constants"].pop("RESULTS_DIR")
            found[path.parent.name, path.name] = record
    for path in sorted(folder.rglob("*.npz")):
        with np.load(path) as arrays:
            found[path.parent.name, path.name] = {k: arrays[k].tobytes() for k in arrays.files}
    return found


def wait_for_line(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize(
    "arguments",
    [
        ("GenerativeReplay.py",),
        ("GenerativeReplay.py", "--anneal", "false", "--mixture-components", "0"),
        ("GenerativeReplay.py", "--strategies", "buffer"),
        ("Generator.py",),
    ],
    ids=["replay", "plain", "buffer", "generator"],
)
def test_a_run_killed_in_an_experience_ends_with_the_same_numbers(arguments, tmp_path):
    more = *SMALL, "--iterations", 100
    whole = begin(*arguments, *more, "--results-dir", "whole", cwd=tmp_path)
    whole.join()
    assert whole.exitcode == 0
    killed = begin(*arguments, *more, "--results-dir", "killed", cwd=tmp_path)
    while not (states := list((tmp_path / "killed").glob("*/state.pt"))):
        time.sleep(0.01)
    time.sleep(0.1)
    killed.kill()
    killed.join()
    (state,) = states
    assert not list(state.parent.glob("*.json"))
    assert len(torch.load(state, weights_only=True)["strategy"]["plugins"][0]["losses"]) < 5
    before = state.stat().st_mtime_ns
    again = begin(*arguments, *more, "--results-dir", "killed", cwd=tmp_path)
    again.join()
    assert again.exitcode == 0 and state.stat().st_mtime_ns > before
    found = numbers(tmp_path / "killed")
    assert len(found) >= 2 and found == numbers(tmp_path / "whole")


def test_twenty_kills_at_random_moments(tmp_path):
    arguments = "GenerativeReplay.py", *SMALL, "--iterations", 40, "--seeds", 0, 1, 2, "--quiet"
    begin(*arguments, "--results-dir", "warm", cwd=tmp_path).join()  # caches are warm
    began = time.perf_counter()
    whole = begin(*arguments, "--results-dir", "whole", cwd=tmp_path)
    whole.join()
    needed, moments, survived = time.perf_counter() - began, random.Random(0), 0
    assert whole.exitcode == 0
    while survived < 20:
        child = begin(*arguments, "--results-dir", "killed", cwd=tmp_path)
        child.join(moments.uniform(0, needed / 3))
        if child.is_alive():
            child.kill()
            child.join()
            survived += 1
        assert child.exitcode in (0, -signal.SIGKILL)
        for path in (tmp_path / "killed").rglob("*.json"):
            json.loads(path.read_text())
        for path in (tmp_path / "killed").rglob("*.pt"):
            torch.load(path, weights_only=True)
    last = begin(*arguments, "--results-dir", "killed", cwd=tmp_path)
    last.join()
    assert last.exitcode == 0
    found = numbers(tmp_path / "killed")
    assert len(found) == 9 and found == numbers(tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "jobs"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 2)]
)
def test_an_interruption_ends_at_once_with_a_line(number, jobs, tmp_path):
    arguments = *SMALL, "--iterations", 500, "--seeds", 0, 1, "--n-jobs", jobs
    process = start("GenerativeReplay.py", *arguments, cwd=tmp_path, start_new_session=True)
    wait_for_line(process, "experience 1/5")
    began = time.perf_counter()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does it
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert time.perf_counter() - began < 1
    assert process.returncode == 130
    assert errors.strip().count("\n") == 0 and "goes on after the last experience" in errors


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_a_bad_state_is_neither_loaded_nor_overwritten(tmp_path):
    arguments = *SMALL, "--iterations", 5
    assert run("GenerativeReplay.py", *arguments, cwd=tmp_path).returncode == 0
    (state,) = (tmp_path / "results").glob("*/state.pt")
    (state.parent / "results.json").unlink()  # as if it had been stopped before its end
    good = state.read_bytes()
    foreign = torch.load(state, weights_only=True)
    foreign["run"] = foreign["run"].replace("seed0", "seed1")
    torch.save(foreign, tmp_path / "foreign")
    bad = {
        "truncated": good[: len(good) // 2],
        "empty": b"",
        "code": pickle.dumps(Trap()),
        "text": b"<!DOCTYPE html>",
        "other": (tmp_path / "foreign").read_bytes(),
    }
    for content in bad.values():
        state.write_bytes(content)
        for script in ("GenerativeReplay.py", "Generator.py"):
            load = ("--load", state.parent) if script == "Generator.py" else ()
            done = run(script, *arguments, *load, cwd=tmp_path)
            assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
            assert "state.pt is no checkpoint of this run" in done.stderr
        assert state.read_bytes() == content and not (tmp_path / "trapped").exists()
    state.write_bytes(good)
    assert run("GenerativeReplay.py", *arguments, cwd=tmp_path).returncode == 0
    results = json.loads((state.parent / "results.json").read_text())
    assert len(results["accuracy_matrix"]) == 5


def test_a_full_disk_loses_nothing(tmp_path):
    arguments = *SMALL, "--iterations", 5, "--seeds", 0, 1

    def small_files_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    full = start(
        "GenerativeReplay.py", *arguments, "--n-jobs", 2,
        cwd=tmp_path, preexec_fn=small_files_only,
    )  # fmt: skip
    _, errors = full.communicate()
    assert full.returncode == 2 and "state.pt can't be written" in errors, errors
    assert "Traceback" not in errors
    assert not list(tmp_path.rglob("*.unfinished")) and not list(tmp_path.rglob("*.pt"))
    done = run("GenerativeReplay.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0 and len(list(tmp_path.rglob("results.json"))) == 2


def test_two_copies_at_once(tmp_path):
    arguments = *SMALL, "--iterations", 60, "--seeds", 0, 1
    alone = run("GenerativeReplay.py", *arguments, "--results-dir", "alone", cwd=tmp_path)
    assert alone.returncode == 0
    files = [tmp_path / "first", tmp_path / "second"]
    both = *arguments, "--results-dir", "both"
    copies = [begin("GenerativeReplay.py", *both, cwd=tmp_path, outputs=(f, f)) for f in files]
    for copy in copies:
        copy.join()
    outputs = [file.read_text() for file in files]
    assert [copy.exitcode for copy in copies] == [0, 0], outputs
    text = "".join(outputs)
    for seed in (0, 1):  # each run was made once
        assert text.count(f"seed {seed}: experience 5/5") == 1
    assert numbers(tmp_path / "both") == numbers(tmp_path / "alone")
    first, second = (output.split("forgetting")[-1].split("\n")[:4] for output in outputs)
    assert first == second


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    arguments = *SMALL, "--iterations", 120, "--learning-rate", "1e30"
    done = run("GenerativeReplay.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    found = re.search(
        r"the loss of the solver is (nan|inf) at experience 1, iteration (\d+)", done.stderr
    )
    assert found and 1 < int(found[2]) <= 120
    assert not list(tmp_path.rglob("state.pt")) and "it has no good state yet" in done.stderr


def test_a_run_that_diverges_names_its_last_good_state(tmp_path, capsys):
    (tmp_path / "state.pt").touch()
    with pytest.raises(SystemExit) as ended, Generator.only_process(tmp_path, "replay, seed 3"):
        raise FloatingPointError("the loss of the solver is nan at experience 2, iteration 7")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: replay, seed 3: the loss of the solver is nan at experience 2")
    assert f"its last good state is {tmp_path / 'state.pt'}" in error


def test_seeds_and_repetitions(tmp_path):
    arguments = *SMALL, "--iterations", 20, "--seeds", 0, 1
    for name in ("first", "second"):
        assert (
            run("GenerativeReplay.py", *arguments, "--results-dir", name, cwd=tmp_path).returncode
            == 0
        )
    first = numbers(tmp_path / "first")
    assert first == numbers(tmp_path / "second")
    matrices = [v["accuracy_matrix"] for k, v in first.items() if k[1] == "results.json"]
    assert len(matrices) == 2 and matrices[0] != matrices[1]


def test_look_and_summarize_without_training(tmp_path):
    arguments = *SMALL, "--iterations", 20, "--strategies", "replay", "naive"
    done = run("GenerativeReplay.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    figures = tmp_path / "results" / "figures"
    pictures = {path.name: path.read_bytes() for path in figures.iterdir()}
    names = {"accuracy", "samples-replay"} | {
        f"{figure}-{strategy}"
        for figure in ("accuracy_matrix", "confusion_matrix", "forgetting", "losses")
        for strategy in ("replay", "naive")
    }
    assert set(pictures) == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    (tmp_path / "results").rename(tmp_path / "elsewhere")
    again = run("GenerativeReplay.py", "--summarize", "elsewhere", cwd=tmp_path)
    assert again.returncode == 0 and again.stderr == ""
    table = done.stdout[done.stdout.index("final accuracy") :].split("\n\n")[0]
    for line in table.splitlines()[1:3]:
        assert line in again.stdout
    drawn = {p.name: p.read_bytes() for p in (tmp_path / "elsewhere" / "figures").iterdir()}
    assert drawn == pictures
    # Runs of several machines, each in its folder, and a copy; but runs beside other folders stand
    # alone.
    (tmp_path / "both").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "both" / "elsewhere")
    shutil.copytree(tmp_path / "both" / "elsewhere", tmp_path / "both" / "copy")
    both = run("GenerativeReplay.py", "--summarize", "both", cwd=tmp_path)
    assert both.returncode == 0 and all(line in both.stdout for line in table.splitlines()[1:3])
    assert both.stdout.count("naive, seed 0") == 1
    (tmp_path / "both" / "elsewhere").rename(tmp_path / "elsewhere")
    (naive,) = (tmp_path / "elsewhere").glob("*naive*")
    shutil.copytree(naive, tmp_path / "elsewhere" / "ablation" / naive.name)
    alone = run("GenerativeReplay.py", "--summarize", "elsewhere", cwd=tmp_path)
    assert alone.stdout.count("naive, seed 0") == 1
    rows = (tmp_path / "elsewhere" / "metrics.csv").read_text().splitlines()
    assert rows[0] == "strategy,seed,experience_trained,experience_tested,accuracy"
    assert len(rows) == 1 + 2 * 25
    (folder,) = (tmp_path / "elsewhere").glob("*replay*")
    own = (folder / "metrics.csv").read_text().splitlines()
    matrix = json.loads((folder / "results.json").read_text())["accuracy_matrix"]
    assert own[1:] == [r for r in rows if r.startswith("replay,")]
    assert float(own[1 + 5 * 3 + 1].split(",")[-1]) == matrix[3][1]

    for script in ("Generator.py", "GenerativeReplay.py"):
        looked = run(script, "--load", folder, cwd=tmp_path)
        assert looked.returncode == 0 and looked.stderr == ""
        assert (folder / "look.png").stat().st_size > 10_000
    for bad, complaint in [("nowhere", "has to be a run's folder"), (naive, "without generator")]:
        looked = run("Generator.py", "--load", bad, cwd=tmp_path)
        assert looked.returncode == 2 and complaint in looked.stderr
    nothing = run("GenerativeReplay.py", "--summarize", "nowhere", cwd=tmp_path)
    assert nothing.returncode == 2 and "no results.json" in nothing.stderr
    (folder / "results.json").write_text("{")
    damaged = run("GenerativeReplay.py", "--summarize", "elsewhere", cwd=tmp_path)
    assert damaged.returncode == 2 and damaged.stderr.count("\n") == 1


def test_quiet_and_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = *SMALL, "--iterations", 20, "--quiet", "--tensorboard"
    done = run("GenerativeReplay.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.split()[:2] == ["final", "accuracy"] and done.stdout.count("\n") == 4
    (folder,) = tmp_path.rglob("tensorboard")
    log = EventAccumulator(str(folder))
    log.Reload()
    tags = log.Tags()
    assert len(log.Scalars("Loss_MB/generator")) == 5 * 20
    assert run("GenerativeReplay.py", *arguments, "--force", cwd=tmp_path).returncode == 0
    assert len(list(folder.iterdir())) == 1
    assert any("Loss_MB/train" in tag for tag in tags["scalars"])
    assert any("Top1_Acc_Exp" in tag for tag in tags["scalars"])
    assert "confusions" in tags["images"] and any("samples" in tag for tag in tags["images"])


def test_a_terminal_gets_a_bar_and_a_file_does_not(tmp_path):
    import pty

    arguments = *SMALL, "--iterations", 150, "--n-experiences", 2
    redirected = run("GenerativeReplay.py", *arguments, cwd=tmp_path)
    assert redirected.stderr == "" and not re.search(r"[\r\x1b]", redirected.stdout)
    main, terminal = pty.openpty()
    termios.tcsetwinsize(main, (24, 80))
    command = [sys.executable, str(ROOT / "GenerativeReplay.py"), *map(str, arguments), "--force"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, **OFFLINE, "COLUMNS": "80"},
        stdout=terminal, stderr=terminal,
    )  # fmt: skip
    os.close(terminal)
    output = b""
    while True:
        try:
            part = os.read(main, 10_000)
        except OSError:  # the other end is closed
            break
        output += part
    assert process.wait() == 0
    text = output.decode()
    for what in ("solver", "generator"):
        assert re.search(rf"experience 2, {what} .*%\|.*left, loss", text)
    assert all(len(line) < 80 for line in re.split(r"[\r\n]", text) if "|" in line)
