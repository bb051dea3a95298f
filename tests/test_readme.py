"""The README: its links lead somewhere, and its commands and its code run."""

import ast
import re
import runpy

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
ELSEWHERE = ("--load", "--summarize", "--device cuda", "--help")


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


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if not any(words in c for words in ELSEWHERE)]
)
def test_a_command(command, tmp_path):
    script, *words = command.split()[1:]
    small = ["--dataset", "digits", "--iterations", 2, "--hidden-units", 20, "--latent-size", 2]
    small += ["--seeds", 0, "--results-dir", "results"]
    small += ["--n-jobs", 1] if script == "GenerativeReplay.py" else []
    small += ["--validation-size", 300] if "--validation-size" in words else []
    done = run(script, *words, *small, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert list((tmp_path / "results" / "figures").glob("*.png"))


def test_a_folder_of_images_becomes_a_stream(tmp_path, monkeypatch):
    (code,) = (block for block in re.findall(r"```python\n(.+?)```", TEXT, re.DOTALL)
               if "ImageFolder" in block)  # fmt: skip
    for label in range(4):
        for number in range(3):
            path = tmp_path / "my_images" / f"class{label}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), (60 * label,) * 3).save(path)
    (tmp_path / "example.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    benchmark = runpy.run_path("example.py")["benchmark"]
    sizes = [len(experience.dataset) for experience in benchmark.train_stream]
    assert sizes == [6, 6] and len(benchmark.test_stream) == 2
    x, y, _ = benchmark.train_stream[1].dataset.tensors
    assert x.shape == (6, 1, 28, 28) and sorted(set(y.tolist())) == [2, 3]
    assert x.dtype == torch.float32 and x.max() == pytest.approx(180 / 255, abs=0.01)
