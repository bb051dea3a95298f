"""Bad constants and bad data files: one line that says what is wrong, exit code 2, no traces."""

import os
import re
import shutil
import signal
import sys

import pytest
from conftest import CONSTANTS, DATA_DIR, answer, command, needs_mnist, run

import GenerativeReplay
import Generator
from figures.lab.constants import UserError, read_constants
from figures.lab.data import load_images


@pytest.fixture
def complaint(monkeypatch, tmp_path, capsys):
    """The one line with which a command ends, in an empty folder, where nothing is left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # keep those of pytest
    monkeypatch.setattr(sys, "argv", [])

    def complaint(*words, module="GenerativeReplay.py"):
        before = set(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as end:
            command(module, words)
        line = capsys.readouterr().err
        assert end.value.code == 2 and line.count("\n") == 1 and line.startswith("error: ")
        assert len(line) < 300 and set(tmp_path.rglob("*")) == before
        return line.removeprefix("error: ")

    return complaint


BAD_COMMAND_LINES = [
    ("--lerning-rate=0.1", "--lerning-rate is unknown; did you mean --learning-rate.$"),
    ("--learning_rate 0.1", "--learning_rate is unknown; did you mean --learning-rate.$"),
    ("--batch-size 8 --seed 1", "--seed is unknown; did you mean --seeds.$"),
    ("--force", "--force is unknown; see --help$"),
    ("--dataset mnits", "DATASET is 'mnits'.* auto, mnist, fashion, kmnist or digits"),
    ("--strategies replay both", "STRATEGIES is 'both': .* 'replay', 'naive', 'joint' or 'er'"),
    ("--strategies", "STRATEGIES is "),
    ("--device gpu", "DEVICE is 'gpu': Input should be 'auto', 'cpu', 'mps' or 'cuda'; see --help"),
    ("--device cuda:99", "DEVICE is 'cuda:99', which can't be used"),
    ("--one-cycle maybe", "ONE_CYCLE is 'maybe': .*boolean"),
    ("--replay-size 99999999999999999999", "REPLAY_SIZE is 9+: no machine can do that"),
    ("--threads 9999999", "THREADS is '9999999': .*less than or equal to 4096"),
    ("--batch-size 0", "BATCH_SIZE is '0': .*greater than 0"),
    ("--iterations 2.5", "ITERATIONS is '2.5': .*integer"),
    ("--learning-rate nan", "LEARNING_RATE is 'nan': .*finite"),
    ("--learning-rate 1e999", "LEARNING_RATE is '1e999': .*finite"),
    ("--learning-rate 1" + 400 * "0", "LEARNING_RATE is '1000.*finite"),
    ("--learning-rate 0,002", "LEARNING_RATE is '0,002': .*number"),
    ("--input-dropout 1", "INPUT_DROPOUT is '1': .*less than 1"),
    ("--n-experiences 20", "N_EXPERIENCES is 20, .*10 classes"),
    ("--class-order 0 1 2 3 4 5 6 7 8 8", "CLASS_ORDER is .* has to hold each label"),
    ("--class-order 0 1 2 3 4 5 6 7", r"CLASS_ORDER is \(0, .* each label of .* 7, 8, 9\]"),
    ("--class-order 1 2 3 4 5 6 7 8 9 10", r"CLASS_ORDER is \(1, .* each label of .* 7, 8, 9\]"),
    ("--seeds -1", "SEEDS is '-1': .*greater than or equal to 0"),
    (f"--seeds {2**64}", "SEEDS is '18446744073709551616': .*less than"),
    ("--validation-size 5", "VALIDATION_SIZE is 5.*10"),
    ("--validation-size 1435", "VALIDATION_SIZE is 1435.*10"),
    ("--results-dir file", "RESULTS_DIR.*'file'"),
    ("--load nowhere", "--load is unknown"),
    ("--results-dir", r"RESULTS_DIR is \[\]: .*string"),
    ("--image-size 9", "IMAGE_SIZE is for folders of images, and DATASET is 'digits'"),
    ("--scenario domain --n-experiences 10", "N_EXPERIENCES is 10: a domain would have one class"),
    ("--scenario permuted --shuffle-classes", "SCENARIO 'permuted' has all classes in each"),
    ("--scheduler localhost", ".*(SCHEDULER|scheduler)"),
]


@pytest.mark.parametrize(("words", "expected"), BAD_COMMAND_LINES)
def test_a_bad_command_line_gets_one_line(words, expected, complaint, tmp_path):
    (tmp_path / "file").touch()
    line = complaint("--dataset", "digits", *words.split())
    assert re.match(expected, line), line


def test_a_comparison_refuses_what_it_does_not_compare(complaint):
    module, words = "figures.generators", ["vae", "--scenario", "domain"]
    assert complaint(*words, module=module) == (
        "samples are measured by their class: leave SCENARIO at class\n"
    )
    for each in module, "figures.ablation":
        assert complaint("--strategies", "er", module=each).endswith("STRATEGIES at replay\n")
    names = complaint("vae", "gan", module=module)
    assert names == "'gan' isn't one of vae, cvae, wgan-gp, gaussians\n"
    assert complaint("mnsit", module="figures.reproduce").endswith("did you mean mnist?\n")
    line = complaint("--help", module="figures.reproduce")
    assert line == "--help is unknown; see figures/reproduce.py\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--ratio", "0.3"), "RATIO has no effect"),
        (("--shuffle-classes",), "SHUFFLE_CLASSES has no effect"),
        (("--seeds", "0", "1"), "this loop runs once"),
        (("--temperature", "none"), "this loop has soft targets and a density"),
        (("--mixture-components", "0"), "this loop has soft targets and a density"),
    ],
)
def test_the_plain_loop_refuses_what_it_does_not_use(words, expected, complaint):
    assert complaint(*words, module="figures.plain_dgr").startswith(expected)


@pytest.mark.parametrize(
    ("script", "name", "value"),
    [
        (Generator, "ITERATIONS", -1),
        (Generator, "LEARNING_RATE", (0, 2)),  # 0,002
        (GenerativeReplay, "LEARNING_RATE", float("nan")),
        (GenerativeReplay, "SEEDS", 0),
        (GenerativeReplay, "SEEDS", ()),
        (GenerativeReplay, "STRATEGIES", "replay"),
    ],
)
def test_a_bad_constant_in_a_script_gets_one_line(script, name, value, complaint, monkeypatch):
    monkeypatch.setattr(script, name, value)
    line = complaint(module=f"{script.__name__}.py")
    assert line.startswith(f"{name} is {value!r}: ")


@pytest.mark.parametrize("script", ["Generator.py", "GenerativeReplay.py"])
def test_a_misspelt_option_is_found_before_anything_slow(script, tmp_path):
    done, seconds = answer(script, "--lerning-rate", "0.1", cwd=tmp_path)
    assert seconds < 1.5
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert done.stderr == "error: --lerning-rate is unknown; did you mean --learning-rate?\n"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"LERNING_RATE": 0.1}, "LERNING_RATE is unknown; did you mean LEARNING_RATE?"),
        ({"learning_rate": 0.1}, "learning_rate is unknown; did you mean LEARNING_RATE?"),
        ({"FORCE": True}, "FORCE is unknown; see --help"),
        ({"LEARNING_RATE": "fast"}, "LEARNING_RATE is 'fast': .*number"),
        ({"ITERATIONS": 2.5}, "ITERATIONS is 2.5: .*integer"),
        ({"STRATEGIES": "replay"}, "STRATEGIES is 'replay': .*tuple"),
    ],
)
def test_a_bad_change_of_constants_is_refused(changes, expected):
    with pytest.raises(UserError, match=f"^{expected}"):
        CONSTANTS.changed(**changes)


def test_changes_are_made_in_a_copy_and_options_come_from_a_list():
    constants = read_constants(GenerativeReplay, ["--seeds", "0", "1", "--one-cycle", "false"])
    as_code = read_constants(GenerativeReplay).changed(SEEDS=(0, 1), ONE_CYCLE=False)
    assert dict(constants) == dict(as_code)
    again = constants.changed(SEEDS=(5, 5), BATCH_SIZE=3)  # a seed is run once
    assert (again.SEEDS, again.BATCH_SIZE, again.ONE_CYCLE) == ((5,), 3, False)
    assert (constants.SEEDS, constants.BATCH_SIZE) == ((0, 1), GenerativeReplay.BATCH_SIZE)
    assert constants.changed(RESULTS_DIR="~/r").RESULTS_DIR == os.path.expanduser("~/r")
    with pytest.raises(UserError, match="--seed is unknown; did you mean --seeds?"):
        read_constants(GenerativeReplay, ["--seed", "1"])


@pytest.mark.parametrize("name", ["mnist", "fashion", "kmnist"])
def test_a_data_set_asked_for_by_name_is_never_replaced(name, tmp_path):
    done = run("Generator.py", "--dataset", name, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""
    assert "can't be downloaded" in done.stderr and "set DATA_DIR" in done.stderr
    assert not (tmp_path / "results").exists()


@needs_mnist
@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("train-images-idx3-ubyte", lambda content: content[:-1]),
        ("t10k-images-idx3-ubyte", lambda content: b"<!DOCTYPE html>"),
        ("t10k-labels-idx1-ubyte", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    ],
    ids=["truncated", "web page", "flipped bit"],
)
def test_a_damaged_file_of_mnist_is_refused(file, damage, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(DATA_DIR / "MNIST" / "raw", raw, copy_function=os.symlink)
    content = (raw / file).read_bytes()
    (raw / file).unlink()
    (raw / file).write_bytes(damage(content))
    with pytest.raises(UserError, match=f"{raw / file} isn't the published file"):
        load_images(CONSTANTS.changed(DATASET="auto", DATA_DIR=str(tmp_path)))
