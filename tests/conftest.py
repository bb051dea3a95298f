"""What the tests share: constants, the scripts as their users run them, MNIST if it is there."""

import importlib
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch

import GenerativeReplay
import Generator
from figures import draw
from figures.lab.constants import read_constants, read_options, run_command

ROOT = Path(__file__).parent.parent
# No display, no network (a proxy that nobody listens on), and no MNIST from outside.
OFFLINE = {
    "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1", "DATA_DIR": "nowhere", "no_proxy": "",
    **dict.fromkeys(["http_proxy", "https_proxy", "HTTP_PROXY"], "http://127.0.0.1:9"),
}  # fmt: skip
DATA_DIR = ROOT / os.environ.get("DATA_DIR", "data")
needs_mnist = pytest.mark.skipif(
    not (DATA_DIR / "MNIST" / "raw" / "train-images-idx3-ubyte").exists(),
    reason=f"MNIST is not in {DATA_DIR}; set DATA_DIR to where it is",
)
# The constants of the experiment, but for what depends on the machine, or on the data set.
CONSTANTS = read_constants(GenerativeReplay).changed(
    DEVICE="cpu", BFLOAT16=False, DATASET="digits", CLASS_ORDER=tuple(range(10))
)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """As `setup` does it: with two processes of two threads each, all wait for each other."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


# A server that has made the ten seconds of imports forks a process for each run.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["GenerativeReplay", "figures.generators", "figures.ablation"])


def command(module, arguments):
    """What a script ("GenerativeReplay.py") or a command ("figures.draw") does when started."""
    sys.argv = [module, *map(str, arguments)]
    script = importlib.import_module(module.removesuffix(".py"))
    if not module.endswith(".py"):
        return run_command(script.main)
    options = read_options(script)
    return run_command(lambda: script.main(options))


def in_child(module, arguments, cwd, outputs, figures):
    """A command as its own process runs it, but for the imports and, if unwanted, the figures."""
    os.chdir(cwd)
    os.environ.update(OFFLINE)
    for number, output in enumerate(outputs, 1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    Generator.DATA_DIR = GenerativeReplay.DATA_DIR = OFFLINE["DATA_DIR"]
    torch.set_num_threads(1)
    if not figures:
        draw.save = lambda *_: False
    try:
        command(module, arguments)
    finally:
        threading._shutdown()  # as at the end of Python; else joblib's processes are waited for


def begin(module, *arguments, cwd, outputs=(os.devnull, os.devnull), figures=True):
    """Start a command in a process."""
    process = SERVER.Process(target=in_child, args=(module, arguments, cwd, outputs, figures))
    process.start()
    return process


def run(module, *arguments, cwd, figures=True):
    """Run a command to its end; return its code and what it printed."""
    with TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        process = begin(module, *arguments, cwd=cwd, outputs=outputs, figures=figures)
        process.join()
        stdout, stderr = (output.read_text() for output in outputs)
    return SimpleNamespace(returncode=process.exitcode, stdout=stdout, stderr=stderr)


def answer(script, *words, cwd):
    """What a script that is really started answers, and after how many seconds of computing."""
    before = os.times()
    call = [sys.executable, ROOT / script, *words]
    done = subprocess.run(call, cwd=cwd, capture_output=True, text=True)
    after = os.times()
    children = "children_user", "children_system"
    return done, sum(getattr(after, part) - getattr(before, part) for part in children)
