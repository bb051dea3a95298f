"""The README: its links lead somewhere, and its commands and its code run."""

import ast
import itertools
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
import torch
from PIL import Image
from test_scripts import ROOT, run

import GenerativeReplay
import Generator

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(
    {
        command.split("#")[0].strip(" `")
        for command in re.findall(r"^python Gen.*$|`python Gen[^`]*`", TEXT, re.MULTILINE)
    }
)
# Shown with something to fill in, or for machines that not everybody has.
ELSEWHERE = ("--load", "--summarize", "--device cuda", "--help", "--backend dask")


def definitions(path):
    """Lines of a script's functions, classes and methods, by name."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node.lineno
            for inner in getattr(node, "body", ()):
                if isinstance(node, ast.ClassDef) and isinstance(inner, ast.FunctionDef):
                    found[f"{node.name}.{inner.name}"] = inner.lineno
    return found


def test_links_and_pictures_lead_somewhere():
    titles = re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    targets = re.findall(r"\]\(([^)\s]+)\)", TEXT)
    assert len(targets) > 50
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("https://"):
            assert (ROOT / target.split("#")[0]).exists(), target
    for picture in (ROOT / "figures").glob("scheme_*.svg"):
        assert f"figures/{picture.name}" in targets


def test_links_to_lines_lead_to_what_they_name():
    links = re.findall(r"\[`([\w.]+)`\]\((\w+\.py)#L(\d+)\)", TEXT)
    assert len(links) > 15 and TEXT.count("#L") == len(links)
    for name, file, line in links:
        assert definitions(ROOT / file)[name] == int(line), name


def test_constants_and_options_that_are_named_exist():
    rules = {**Generator.RULES, **GenerativeReplay.RULES}
    options = {"--" + name.lower().replace("_", "-") for name in rules}
    named = set(re.findall(r"--[a-z][a-z-]+", "\n".join(COMMANDS)))
    assert named <= options | {"--help"} and len(named) > 10
    for line in re.findall(r"^Constants: (.+?)\n\n", TEXT, re.MULTILINE | re.DOTALL):
        for name in re.findall(r"`(\w+)`", line):
            assert name in rules or any(rule.startswith(name) for rule in rules), name


# Options that the test below replaces; what differs in nothing else is run once.
REPLACED = r" --(seeds|n-jobs|iterations|results-dir|dataset|validation-size)( (?!--)\S+)+"
KINDS = {re.sub(REPLACED, "", c) for c in COMMANDS if not any(words in c for words in ELSEWHERE)}


@pytest.mark.parametrize("command", sorted(KINDS))
def test_a_command(command, tmp_path):
    script, *words = command.split()[1:]
    small = ["--dataset", "digits", "--iterations", 2, "--hidden-units", 20, "--latent-size", 2]
    done = run(script, *words, *small, "--validation-size", 300, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert list((tmp_path / "results" / "figures").glob("*.png"))


def test_a_cluster_gives_the_numbers_of_one_machine(tmp_path):
    """The README's commands for a cluster, on a port that is free and with little to compute."""
    (commands,) = (b for b in re.findall(r"```bash\n(.+?)```", TEXT, re.DOTALL) if "dask" in b)
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
    done = run("GenerativeReplay.py", *small, "--seeds", 0, 1, 2, cwd=tmp_path)
    assert done.returncode == 0
    files = sorted((tmp_path / "cluster").glob("*/results.json"))
    assert len(files) == 3
    for file in files:
        other = json.loads((tmp_path / "results" / file.parent.name / file.name).read_text())
        result = json.loads(file.read_text())
        for key in "accuracy_matrix", "confusion_matrix":
            assert result[key] == other[key]


def test_a_scholar_learns_folders_of_images(tmp_path, monkeypatch, capsys):
    (code,) = (block for block in re.findall(r"```python\n(.+?)```", TEXT, re.DOTALL)
               if "ImageFolder" in block)  # fmt: skip
    for part, count in ("train", 3), ("test", 2):
        for label, number in itertools.product(range(4), range(count)):
            path = tmp_path / "my_images" / part / f"class{label}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), (60 * label,) * 3).save(path)
    (tmp_path / "example.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example.py", "--iterations", "3", "--batch-size", "6"])
    found = runpy.run_path("example.py")
    benchmark = found["benchmark"]
    sizes = [
        [len(experience.dataset) for experience in stream]
        for stream in (benchmark.train_stream, benchmark.test_stream)
    ]
    assert sizes == [[6, 6], [4, 4]]
    x, y, _ = benchmark.train_stream[1].dataset.tensors
    assert x.shape == (6, 1, 28, 28) and sorted(set(y.tolist())) == [2, 3]
    assert x.dtype == torch.float32 and x.max() == pytest.approx(180 / 255, abs=0.01)
    assert found["scholar"].replay.seen_classes.tolist() == [0, 1, 2, 3]
    rows = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(row) for row in rows] == [2, 2]


def test_the_drawings_of_the_method_are_what_their_script_draws(tmp_path):
    shutil.copy(ROOT / "figures" / "schematics.py", tmp_path)
    runpy.run_path(str(tmp_path / "schematics.py"), run_name="__main__")
    drawn = {path.name for path in tmp_path.glob("scheme_*")}
    assert len(drawn) == 10
    assert drawn == {path.name for path in (ROOT / "figures").glob("scheme_*")}
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as new, Image.open(ROOT / "figures" / path.name) as old:
            assert new.size == old.size
