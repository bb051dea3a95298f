"""The README: its links lead somewhere, and its commands and its code run."""

import ast
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CONSTANTS, DATA_DIR, ROOT, needs_mnist, run

from figures import reproduce
from figures.lab.constants import as_option

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
NOTES = (ROOT / "figures" / "README.md").read_text(encoding="utf-8")
COMMAND = r"^python .*$|`python\s+(?:Gen|-m\s+fig)[^`]*`"
COMMANDS = {
    " ".join(command.split("#")[0].strip("`").split())
    for command in re.findall(COMMAND, TEXT + NOTES, re.MULTILINE)
}


@pytest.mark.parametrize("path", ["README.md", "figures/README.md"])
def test_links_and_pictures_lead_somewhere(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("https://"):
            assert (ROOT / path).parent.joinpath(target.split("#")[0]).exists(), target


def test_every_picture_is_shown():
    for picture in (ROOT / "figures").glob("*.[ps][nv]g"):
        assert f"{picture.name})" in TEXT + NOTES, picture


def test_the_readme_stays_short_and_its_numbers_are_filled_in():
    assert len(TEXT.split()) <= 1600
    prose = [line for line in NOTES.splitlines() if not line.startswith("|")]
    assert [line for line in TEXT.splitlines() + prose if len(line) > 120] == []


def test_constants_and_options_that_are_named_exist():
    fields = type(CONSTANTS).model_fields
    options = set(map(as_option, fields)) | {"--help"}
    named = set(re.findall(r"--[a-z][a-z-]+", "\n".join(COMMANDS)))
    assert named <= options and len(named) > 10
    for name in re.findall(r"`([A-Z][A-Z0-9_]+)(?: = [^`]+)?`", TEXT + NOTES):
        assert name in fields or name in ("VAE", "OMP_NUM_THREADS"), name


# Options that the test below replaces; what differs in nothing else is run once.
REPLACED = r" --(seeds|n-jobs|iterations|results-dir|validation-size|dataset)( (?!--)\S+)+"
KINDS = {
    re.sub(REPLACED, "", command)
    for command in COMMANDS
    if not re.search(r"--help|--scheduler|figures\.(draw|saved|schem|repro)|tests/", command)
}


@pytest.mark.parametrize("command", sorted(KINDS))
def test_a_command(command, tmp_path):
    module, *words = command.removeprefix("python ").removeprefix("-m ").split()
    small = ["--dataset", "digits", "--iterations", 2, "--hidden-units", 20, "--latent-size", 2]
    done = run(module, *words, *small, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert list((tmp_path / "results").rglob("*.png"))


MEASURES = {"task known": "final_task_accuracy", "forgetting": "forgetting"}


def test_numbers_are_those_of_the_results():
    """Each mean ± standard error that isn't published is that of its stream, strategy, measure."""
    results = json.loads((ROOT / "figures" / "results.json").read_text())
    checked, streams = set(), NOTES.split("## Streams")[1].split("\n## ")[0]
    for table in re.findall(r"(?:^\|.+\n)+", TEXT + streams, re.MULTILINE):
        titles, _, *rows = ([cell.strip() for cell in row.split("|")] for row in table.splitlines())
        for row in rows:
            for title, cell in zip(titles, row):
                about = title.replace("NAME", row[2].strip("`")) + "".join(row)
                if " ± " not in cell or "published" in about:
                    continue
                named = re.findall(r"`([a-z-]+)`", about)
                stream = next((name for name in named if name in results), "mnist")
                (strategy,) = {*named} & {"replay", "joint", "er", "naive"} or {"replay"}
                key = MEASURES.get(title.removesuffix(" %"), "final_accuracy")
                of = results[stream][strategy][key]
                mean, error = (f"{100 * of[part]:.2f}" for part in ("mean", "standard_error"))
                assert cell.strip("*") == f"{mean} ± {error}", (stream, strategy, key)
                checked.add((stream, strategy, key))
    assert {stream for stream, *_ in checked} == results.keys() - {"ablation", "generators"}
    assert results.keys() <= reproduce.RUNS.keys()


CODE = re.findall(r"```python\n(.+?)```", TEXT, re.DOTALL)


@needs_mnist
def test_the_stock_benchmark():
    if not (DATA_DIR / "FashionMNIST").exists():
        pytest.skip(f"Fashion-MNIST is not in {DATA_DIR}")
    names = {}
    exec(CODE[1].replace('"data"', repr(str(DATA_DIR))), names)
    stream = names["benchmark"].train_stream
    tensors = [experience.dataset.tensors for experience in stream]
    assert len(tensors) == 5 and sum(len(x) for x, *_ in tensors) == 60000
    assert all(0 <= x.min() and x.max() <= 1 and len(y.unique()) == 2 for x, y, _ in tensors)


def test_the_stream_of_ones_own(tmp_path):
    code = CODE[0]
    (tmp_path / "own.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "own.py"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    rows = [ast.literal_eval(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and [len(row) for row in rows] == [2, 2], done.stderr
    assert min(rows[1]) > 0.8  # the first experience is not forgotten


@pytest.mark.soak
def test_a_cluster_gives_the_numbers_of_one_machine(tmp_path):
    """The README's commands for a cluster, on a port that is free and with little to compute."""
    (commands,) = (b for b in re.findall(r"```bash\n(.+?)```", NOTES, re.DOTALL) if "dask" in b)
    small = ["--dataset", "digits", "--iterations", "20"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    commands = commands.replace("8786", port).replace("scheduler &", f"scheduler --port {port} &")
    words = *small, "--results-dir", str(tmp_path / "cluster")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with open(tmp_path / "log", "w") as log:
        cluster = subprocess.Popen(
            ["bash", "-c", f"{commands.strip()} {' '.join(words)}"],
            cwd=ROOT, env=os.environ | {"PATH": path}, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = cluster.wait(timeout=300)
        finally:
            os.killpg(cluster.pid, signal.SIGKILL)
    assert code == 0, (tmp_path / "log").read_text()
    assert run("GenerativeReplay.py", *small, "--seeds", 0, 1, 2, cwd=tmp_path).returncode == 0
    files = sorted((tmp_path / "cluster").glob("*/results.json"))
    assert len(files) == 3
    for file in files:
        other = json.loads((tmp_path / "results" / file.parent.name / file.name).read_text())
        result = json.loads(file.read_text())
        for key in "accuracy_matrix", "confusion_matrix":
            assert result[key] == other[key]


def test_the_drawings_of_the_method_are_what_their_script_draws(tmp_path):
    shutil.copy(ROOT / "figures" / "schematics.py", tmp_path)
    runpy.run_path(str(tmp_path / "schematics.py"), run_name="__main__")
    drawn = {path.name: path.read_bytes() for path in tmp_path.glob("scheme_*.svg")}
    there = {path.name: path.read_bytes() for path in (ROOT / "figures").glob("scheme_*.svg")}
    assert len(drawn) == 5 and drawn == there
