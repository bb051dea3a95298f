"""Names, figures, consoles and bars of progress."""

import io
import json
import os
import pty
import random
import re
import struct
import subprocess
import sys
import termios
import warnings
from fcntl import ioctl
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import run
from matplotlib import font_manager
from matplotlib.text import Text
from PIL import Image

from figures import draw
from figures.lab import runs as lab_runs
from figures.lab.console import say, suit_any_console
from figures.lab.progress import ProgressBar, bar_of_runs

ROOT = Path(__file__).parent.parent
ODD = ["$x_{2", "10 $", "$y$", "_a", "__", "^_^", "b\\c", "{d}", "e  f", "\\frac{1}{0}", "кот", "é"]
# Classes and experiences; where there are more experiences than classes they are permutations.
LONG = "a class of a long name, number {}"
SIZES = [(2, 1, LONG), (2, 100, "{}"), (20, 20, "{}"), (62, 5, LONG), (300, 100, "{}")]


def make_runs(folder, names, experiences, seeds=(0,), **arrays):
    """Runs with made-up results, as `report.read_runs` reads them."""
    rng, count, permuted = np.random.default_rng(0), len(names), experiences > len(names)
    groups = [" ".join(group) for group in np.array_split(np.array(names, object), experiences)]
    images = rng.random((experiences, 2 * count, 1, 4, 4), dtype=np.float32)
    originals = images[0, ::2]
    made = []
    for seed in seeds:
        matrix = np.tril(rng.uniform(0.6, 1, (experiences, experiences)))
        path = folder / f"made-up-replay-0-seed{seed}"
        path.mkdir(parents=True, exist_ok=True)
        record = {
            "name": "replay", "dataset": "made-up", "notice": "", "seed": seed, "versions": {},
            "constants": {"VALIDATION_SIZE": 0, "SCENARIO": "permuted" if permuted else "class"},
            "experiences": [f"permutation {i}" for i in range(experiences)] if permuted else groups,
            "classes": names, "label_order": list(range(count)), "seconds": 1.0,
            "accuracy_matrix": matrix.tolist(), "final_accuracy": matrix[-1].mean(),
            "task_accuracy_matrix": matrix.tolist(), "final_task_accuracy": matrix[-1].mean(),
            "forgetting": 0.1, "confusion_matrix": (9 * np.eye(count, dtype=int) + 1).tolist(),
        }  # fmt: skip
        (path / "results.json").write_text(json.dumps(record))
        all_arrays = {
            "samples": images, "originals": originals,
            "reconstructions": np.stack([originals] * experiences),
            "solver_loss": rng.random((experiences, 150)), **arrays,
        }  # fmt: skip
        np.savez(path / "arrays.npz", **all_arrays)
        made.append(record | {"folder": path})
    return made


def generator(made):
    """The visualizer's picture of a run, whose samples are twenty after each experience."""
    path = made[0]["folder"].parent / "generator"
    path.mkdir(exist_ok=True)
    arrays = draw.arrays_of(made[0])
    samples = np.resize(arrays["originals"], (len(arrays["samples"]), 20, 1, 4, 4))
    np.savez(path / "arrays.npz", **arrays | {"samples": samples})
    return draw.generator([made[0] | {"folder": path}])


def saved_generator(made):
    """The picture of a saved generator."""
    x = draw.arrays_of(made[0])["originals"]
    walks, samples = np.resize(x, (len(x) // 2, 20, 1, 4, 4)), np.resize(x, (4, 20, 1, 4, 4))
    arrays = {"samples": samples, "reconstructions": np.stack([x, x]), "walks": walks}
    return draw.saved_generator(made, arrays)


FUNCTIONS = (
    draw.accuracy_so_far, draw.accuracy_matrix, draw.confusion_matrix, draw.forgetting, draw.losses,
    draw.samples, generator, saved_generator,
)  # fmt: skip


@pytest.fixture
def drawn():
    """Draw a figure, whose warnings are errors."""

    def draw_figure(function, made):
        with warnings.catch_warnings(action="error"), plt.rc_context(draw.STYLE):
            figure = function(made)
            figure.canvas.draw()
        return figure

    yield draw_figure
    plt.close("all")


def labels(ticks):
    """The texts of tick labels."""
    return [tick.get_text() for tick in ticks if tick.get_text()]


# --- Names ----------------------------------------------------------------------------------------


def test_every_name_is_shown_as_it_is(tmp_path, drawn):
    made = make_runs(tmp_path, ODD, len(ODD))  # an experience for each
    for function in (draw.confusion_matrix, draw.accuracy_matrix):
        axes = drawn(function, made).axes[0]
        assert labels(axes.get_xticklabels()) == labels(axes.get_yticklabels()) == ODD
    assert labels(drawn(draw.samples, made).axes[0].get_xticklabels()) == ODD
    (legend,) = drawn(draw.forgetting, made).legends
    assert [text.get_text() for text in legend.get_texts()] == ODD
    for function in FUNCTIONS:
        texts = [t for t in drawn(function, made).findobj(Text) if t.get_text()]
        assert texts and not any(text.get_parse_math() for text in texts)


def test_names_of_runs_are_text_too(tmp_path, drawn):
    made = [run | {"name": "_a$b$", "dataset": "$x_{2"} for run in make_runs(tmp_path, ODD, 2)]
    figure = drawn(draw.accuracy_so_far, made)
    assert figure.legends[0].get_texts()[0].get_text().startswith("_a$b$: ")
    assert figure.axes[0].get_title().endswith("($x_{2, _a$b$, seed 0)")


def test_long_names_and_line_breaks(tmp_path, drawn):
    names = [f"{'a' * 30}{i}{'b' * 29}{i}" for i in range(3)] + ["two\nlines\t\x1b", "\udcff"]
    made = make_runs(tmp_path, names, 2)
    axes = drawn(draw.confusion_matrix, made).axes[0]
    shown = labels(axes.get_yticklabels())
    assert shown[:3] == [f"{'a' * 12}…{'b' * 10}{i}" for i in range(3)]
    assert shown[3] == "two lines " and len(shown[0]) == 24
    assert made[0]["classes"] == names  # whole in the record
    species = make_runs(tmp_path, [f"species_{i:03}" for i in range(40)], 2)
    assert draw.experience_names(species) == [
        "species_000 … species_019", "species_020 … species_039"
    ]  # fmt: skip


def test_a_font_is_found_or_its_lack_is_said_once(tmp_path, capsys):
    usual, other = (
        set(font_manager.get_font(font_manager.findfont(name)).get_charmap())
        for name in ("DejaVu Sans", "STIXNonUnicode")
    )
    draw.fonts.cache_clear()
    families = draw.fonts(frozenset([chr(max(other - usual))]))
    assert len(families) == 2 and capsys.readouterr().out == ""
    assert draw.fonts(frozenset("é")) == ["sans-serif"]
    made = make_runs(tmp_path, ["a", "\U0001fffe"], 2)  # never to be assigned
    with warnings.catch_warnings(action="error"):
        draw.summarize(made, tmp_path / "out")
    out, err = capsys.readouterr()
    assert out.count("No font has") == 1 and err == ""
    assert len(list((tmp_path / "out" / "figures").iterdir())) == 6


# --- Few and many ---------------------------------------------------------------------------------


def overlap(ticks):
    """Whether two neighbours of tick labels lie on each other."""
    boxes = [tick.get_window_extent() for tick in ticks if tick.get_text() and tick.get_visible()]
    return any(a.overlaps(b) for a, b in zip(boxes, boxes[1:]))


@pytest.mark.parametrize("classes, experiences, name", SIZES)
def test_any_number_of_classes_and_experiences(classes, experiences, name, tmp_path, drawn):
    made = make_runs(tmp_path, [name.format(i) for i in range(classes)], experiences)
    for function in FUNCTIONS:
        figure = drawn(function, made)
        width, height = figure.get_size_inches() * figure.dpi
        assert 800 <= width <= 2400 and 200 <= height <= 2400, function
        box = figure.bbox.padded(1)
        for axes in figure.axes:
            assert not overlap(axes.get_xticklabels()), function
            assert not overlap(axes.get_yticklabels()), function
            for text in axes.xaxis.label, axes.yaxis.label, axes.title:
                extent = text.get_window_extent()
                inside = box.contains(*extent.min) and box.contains(*extent.max)
                assert inside or not text.get_text(), (function, text)
        plt.close(figure)


def test_numbers_and_labels_where_they_can_be_read(tmp_path, drawn):
    for classes, numbers, ticks in (10, 10, 10), (20, 20, 20), (62, 0, 62), (200, 0, 67):
        made = make_runs(tmp_path, [str(i) for i in range(classes)], 2)
        axes = drawn(draw.confusion_matrix, made).axes[0]
        assert len([text for text in axes.texts if float(text.get_text()) > 20]) == numbers
        assert labels(axes.get_yticklabels())[:2] == ["0", "3" if classes == 200 else "1"]
        assert len(labels(axes.get_yticklabels())) == ticks
    assert "20 of 200 classes" in drawn(draw.samples, made).axes[0].get_title()
    assert "10 of 200 classes" in drawn(generator, made).axes[1].get_title()


def test_chosen_samples_are_those_of_their_labels(tmp_path, drawn):
    made = make_runs(tmp_path, [str(i) for i in range(200)], 40)
    samples = np.zeros((40, 400, 1, 4, 4), np.float32)
    samples += (np.arange(40)[:, None] * 400 + np.arange(400))[..., None, None, None] / 20_000
    np.savez(made[0]["folder"] / "arrays.npz", samples=samples)
    axes = drawn(draw.samples, made).axes[0]
    picture = np.asarray(axes.images[0].get_array()).reshape(20, 6, 40, 6)[:, 3, :, 3] * 20_000
    rows, columns = np.divmod(picture.round(), 400)
    names = [int(name) for name in labels(axes.get_xticklabels())]
    assert columns[0].tolist() == [x for name in names for x in (2 * name, 2 * name + 1)]
    experiences = [made[0]["experiences"].index(t) for t in labels(axes.get_yticklabels())]
    assert rows[:, 0].tolist() == experiences and experiences[-1] == 39


# --- Figures that can't be drawn, losses of unequal length ----------------------------------------


def test_a_figure_that_fails_hides_no_numbers(tmp_path, monkeypatch, capsys):
    def forgetting(runs):
        raise RuntimeError("no\nway")

    made, out = make_runs(tmp_path, ["a", "b"], 2), tmp_path / "out"
    monkeypatch.setattr(draw, "forgetting", forgetting)
    own = plt.figure()
    draw.summarize(made, out)
    assert plt.get_fignums() == [own.number]  # that of a notebook stays
    plt.close(own)
    stdout, stderr = capsys.readouterr()
    assert stderr == f"{out / 'figures' / 'forgetting-replay.png'} can't be drawn: no way\n"
    assert "replay, seed 0" in stdout
    assert json.loads((out / "summary.json").read_text())["replay"]["seeds"] == [0]
    assert len((out / "metrics.csv").read_text().splitlines()) == 5
    drawn = {path.name.split("-")[0].split(".")[0] for path in (out / "figures").iterdir()}
    assert drawn == {"accuracy", "accuracy_matrix", "confusion_matrix", "losses", "samples"}


def test_damaged_arrays_cost_their_figures_alone(tmp_path):
    made = make_runs(tmp_path, ["a", "b"], 2)
    (made[0]["folder"] / "arrays.npz").write_bytes(b"no arrays")
    done = run("figures.draw", tmp_path, cwd=tmp_path)
    assert done.returncode == 0 and "replay, seed 0" in done.stdout
    failed = re.findall(r"(\w+)-replay.png can't be drawn: .+", done.stderr)
    assert failed == ["losses", "samples"] and done.stderr.count("\n") == 2
    assert len(list((tmp_path / "figures").iterdir())) == 4


def test_losses_of_unequal_length(tmp_path, drawn):
    nan = np.nan
    made = make_runs(tmp_path, ["a", "b"], 2, (0, 1), solver_loss=[[1.0, 2, 3], [4, nan, nan]])
    np.savez(made[1]["folder"] / "arrays.npz", solver_loss=[[3.0, nan], [8, 10]])
    axes = drawn(draw.losses, made).axes[0]
    x, y = axes.lines[0].get_data()
    assert np.ma.filled(y, nan) == pytest.approx([2, 2, 3, 6, 10, nan], nan_ok=True)
    assert x.tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    for loss in np.full((2, 0), nan), np.full((2, 3), nan), np.ones((2, 1)):  # stopped at once
        made = make_runs(tmp_path, ["a", "b"], 2, solver_loss=loss)
        y = np.ma.filled(drawn(draw.losses, made).axes[0].lines[0].get_ydata(), nan)
        assert len(y) == 2 * max(1, loss.shape[1]) and np.isnan(y).all() == np.isnan(loss).all()


def test_means_of_several_iterations(tmp_path, drawn):
    loss = np.arange(600.0).reshape(2, 300) + 1
    loss[1, 200:] = np.nan
    made = make_runs(tmp_path, ["a", "b"], 2, solver_loss=loss)
    axes = drawn(draw.losses, made).axes[0]
    y = np.ma.filled(axes.lines[0].get_ydata(), np.nan)
    assert y[:2].tolist() == [2, 5] and y[100] == 302 and y[166] == 499.5
    assert np.isnan(y[167:]).all() and axes.get_yscale() == "log"
    assert {"10", "100"} <= set(labels(axes.get_yticklabels()))


# --- Consoles -------------------------------------------------------------------------------------

ENCODINGS = [
    {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "cp1252"}, {"PYTHONIOENCODING": "latin-1"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]  # fmt: skip


@pytest.mark.parametrize("environment", ENCODINGS)
def test_help_on_any_console(environment):
    command = [sys.executable, ROOT / "GenerativeReplay.py", "--help"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True)
    assert done.returncode == 0 and done.stderr == b""
    text = b" ".join(done.stdout.split())
    assert b"--kl-weight [ ...] beta, weight of the divergence" in text
    assert b"--bfloat16 [ ...] mixed precision; none: where" in text


DRAW = """if True:
    import sys
    from figures import draw
    from figures.lab.constants import run_command
    for folder in sys.argv[1:]:
        sys.argv[1:] = [folder]
        run_command(draw.main)
"""


@pytest.mark.parametrize("environment", [ENCODINGS[1], ENCODINGS[3]])
def test_tables_and_errors_on_any_console(environment, tmp_path):
    made = make_runs(tmp_path, ["猫", "b"], 2, (0, 1))
    for each in made:
        record = {key: value for key, value in each.items() if key != "folder"}
        (each["folder"] / "results.json").write_text(json.dumps(record | {"name": "кот"}))
    command = [sys.executable, "-c", DRAW, tmp_path, "ß → 猫"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True)
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    sign = b"+-" if environment.get("PYTHONIOENCODING", "ascii") == "ascii" else b"\xb1"
    assert rb"\u043a\u043e\u0442, mean " + sign + b" s.e. " in done.stdout
    assert re.search(rb"(?:\A|\n)error: [^\n]+\n\Z", done.stderr)


def test_a_process_beside_others_suits_any_console_too(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(ProgressBar, "disable", None)
    assert lab_runs.one_of_many(3, lambda a: say(f"± {a}"), a="β") == (3, None)
    assert stream.buffer.getvalue().split() == [b"+-", b"beta"] and ProgressBar.disable
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as in a notebook: no encoding
    suit_any_console()


# --- Progress -------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A terminal that keeps all that is written."""

    encoding = "utf-8"

    def isatty(self):
        return True


def strategy(iterations, number=1, count=5):
    """What the bar reads of a strategy."""
    experience = SimpleNamespace(current_experience=number, origin_stream=range(count))
    return SimpleNamespace(train_epochs=1, dataloader=range(iterations), experience=experience)


def train(plugin, iterations, until=None):
    """Train up to the end, or to an exception."""
    plugin.before_training_exp(strategy(iterations))
    for _ in range(until or iterations):
        plugin.after_training_iteration(None)
    if until is None:
        plugin.after_training_exp(None)


def states():
    """All random numbers to come."""
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def test_a_bar_on_a_terminal_and_nothing_in_a_file(monkeypatch):
    before, plugin = states(), ProgressBar("solver")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(sys, "stdout", terminal)
    train(plugin, 300)
    say("a line")
    text = terminal.getvalue()
    assert "experience 2/5, solver:   0%" in text and "/300 [" in text and "\n" not in text[:-1]
    *_, cleared, line = text.split("\r")
    assert cleared.strip() == ""
    assert line.rstrip() == "a line" and states() == before
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    train(plugin, 300)
    assert file.getvalue() == ""
    monkeypatch.setattr(sys, "stdout", file)
    say("a line")
    assert file.getvalue() == "a line\n"


def test_an_exception_in_training_leaves_no_bar_behind(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    plugin = ProgressBar("generator")
    train(plugin, 300, until=7)
    left = plugin.bar
    train(plugin, 20)
    assert left.disable and plugin.bar is None  # closed
    assert terminal.getvalue().count("\n") == 0  # on the same line


def test_the_bar_of_runs_counts_them(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert list(bar_of_runs(iter("abc"), 3)) == ["a", "b", "c"]
    assert re.match(r"\rruns:   0%.* 0/3 \[", terminal.getvalue())
    with pytest.raises(ValueError, match="of a run"):
        list(bar_of_runs((int("of a run") for _ in range(1)), 1))


def test_several_runs_at_a_time_come_back_in_order():
    def experiment(number, seed, images):
        __import__("time").sleep(0.5 * (number == 0 and seed == 0))
        return number, seed, images.train

    constants = SimpleNamespace(N_JOBS=2, SCHEDULER=None, SEEDS=(0, 1))
    images = lab_runs.Images("made up", (1,), (2,), [])
    call = partial(lab_runs.side_by_side, experiment, [{"number": 0}, {"number": 1}], images)
    assert call(constants) == [(0, 0, ()), (0, 1, ()), (1, 0, ()), (1, 1, ())]
    constants.N_JOBS = 1
    assert call(constants) == [(0, 0, (1,)), (0, 1, (1,)), (1, 0, (1,)), (1, 1, (1,))]


def lines_on_a_terminal(*words, cwd):
    """Run a command on a terminal 100 columns wide; return its code and all it has written."""
    ours, its = pty.openpty()
    ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    env = os.environ | {"COLUMNS": "100", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    process = subprocess.Popen(words, stdin=its, stdout=its, stderr=its, cwd=cwd, env=env)
    os.close(its)
    text = b""
    while True:
        try:
            text += os.read(ours, 10_000)
        except OSError:  # the other end is closed
            return process.wait(), text.decode("ascii")


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_experiment_on_a_terminal(jobs, tmp_path):
    words = "--dataset", "digits", "--iterations", 20, "--hidden-units", 10, "--n-experiences", 2
    words = *words, "--latent-size", 2, "--mixture-components", 1, "--n-jobs", jobs, "--seeds", 0, 1
    command = sys.executable, ROOT / "GenerativeReplay.py", *map(str, words)
    code, text = lines_on_a_terminal(*command, cwd=tmp_path)
    assert code == 0 and "UnicodeEncodeError" not in text
    assert ("experience 1/2, solver:   0%" in text) == (jobs == 1)
    assert ("experience 2/2, generator:   0%" in text) == (jobs == 1)
    assert ("runs:   0%" in text) == (jobs == 2)
    lines = [line.rpartition("\r")[2].rstrip() for line in text.split("\r\n")]
    for seed in 0, 1:  # whole lines, whatever bar has stood there
        pattern = rf"replay, seed {seed}: experience [12]/2, accuracy so far \S+%, \d+ s"
        assert len([line for line in lines if re.fullmatch(pattern, line)]) == 2
    assert any(line.startswith("replay, mean +- s.e.") for line in lines)
    assert not any("it/s]" in line for line in lines)
    (picture,) = tmp_path.glob("results/figures/samples-*.png")
    assert 1200 <= Image.open(picture).width <= 1300  # labels such as "0 1 2 3 4" take room
