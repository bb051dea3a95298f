"""The means ± standard errors of the READMEs: `python -m figures.reproduce [name of RUNS ...]`.

The commands run one after the other, two runs at a time with one thread each, and leave their
results in `results/NAME`. Finished runs are not run again: an interrupted list goes on. Their means
go to `figures/results.json`, with which a test compares README.md and the streams of
figures/README.md.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from shlex import quote, split

from PIL import ImageOps
from torchvision.datasets import MNIST

from figures import draw
from figures.ablation import PLAIN_DGR
from figures.lab import data, report
from figures.lab.constants import UserError, as_option, run_command, unknown
from figures.lab.runs import save_record
from Generator import DATA_DIR

INVERTED = Path("results", "images", "inverted-mnist")
STREAMS = {
    "orders": "--shuffle-classes",
    "single": "--n-experiences 10",
    "domain": "--scenario domain",
    "inverted": f"--dataset {INVERTED}",
    "fashion": "--dataset fashion",
    "fashion-single": "--dataset fashion --n-experiences 10",
    "permuted": "--scenario permuted --n-experiences 10",
}
FOLDERS = {  # of images, in DATA_DIR; see figures/README.md
    "letters": f"--dataset {quote(f'{DATA_DIR}/arabic-letters')} --n-experiences 7",
    "omniglot": f"--dataset {quote(f'{DATA_DIR}/omniglot')} --n-experiences 11",
}
# As published: 2,000 iterations of 128 + 128 images.
PUBLISHED = PLAIN_DGR | {"ITERATIONS": 2000, "BATCH_SIZE": 128, "REPLAY_SIZE": 128}


def as_options(constants: dict) -> str:
    """Write constants as they are given on the command line."""
    return " ".join(f"{as_option(name)} {value}" for name, value in constants.items())


SEEDS = "--seeds 0 1 2"
# As many units as published; Adam's rate is 0.0001 there.
WIDE = f"{STREAMS['permuted']} --hidden-units 1000 --learning-rate 0.001"
ALL = "GenerativeReplay.py --strategies replay joint er naive"
PLAIN = f"GenerativeReplay.py {as_options(PLAIN_DGR)}"


def commands(streams: dict) -> dict:
    """Write the commands for some streams: all strategies, and plain DGR."""
    return {
        key: f"{command} {SEEDS} {stream}"
        for name, stream in streams.items()
        for key, command in ((name, ALL), (f"{name}-plain", PLAIN))
    }


RUNS = {
    "mnist": f"{ALL} {SEEDS}",
    "plain": f"GenerativeReplay.py {as_options(PUBLISHED)} {SEEDS}",
    "ablation": f"-m figures.ablation {SEEDS} --iterations 400",  # of 24 rows
    **commands(STREAMS),
    "permuted-wide": f"GenerativeReplay.py --strategies replay joint {SEEDS} {WIDE}",
    "generators": f"-m figures.generators {SEEDS}",
    **commands(FOLDERS),
}


def main() -> None:
    """Run the commands, write their means, and draw the figure that needs two of them."""
    names = sys.argv[1:] or list(RUNS)
    for name in set(names) - RUNS.keys():
        raise UserError(unknown(name, RUNS, "figures/reproduce.py"))
    path = Path("figures", "results.json")
    for name in names:
        if "inverted" in name and not INVERTED.exists():
            invert_mnist()
        words = [*split(RUNS[name]), "--n-jobs", "2", "--results-dir", f"results/{name}"]
        if "--dataset" not in words:  # "auto" would replace a missing MNIST by the digits
            words += ["--dataset", "mnist"]
        print(f"\n{name}: python {' '.join(words)}", flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen([sys.executable, *words], env=environment) as process:
            try:
                process.wait()
            finally:
                process.terminate()  # if it was interrupted: a kill would leave its workers behind
        if process.returncode:
            sys.exit(process.returncode)
        rows = report.statistics(report.read_runs(Path("results", name)))
        rows = {row: {key: of[key] for key in ("seeds", *report.KEYS)} for row, of in rows.items()}
        means = json.loads(path.read_text()) if path.exists() else {}
        save_record(path, means | {name: rows})
    if {"mnist", "plain"} <= set(names):
        ours, plain = (report.read_runs(Path("results", name)) for name in ("mnist", "plain"))
        plain = [run | {"name": "plain DGR"} for run in plain]
        runs = draw.in_order(ours) + plain
        draw.save(draw.accuracy_so_far, runs, Path("figures", "accuracy.png"))


def invert_mnist() -> None:
    """Save MNIST's digits, black on white, as a folder of images."""
    data.load_published("MNIST", DATA_DIR)  # downloads it, or says in a line why not
    unfinished = INVERTED.with_name("unfinished")
    for part in ("train", "test"):
        for number, (image, label) in enumerate(MNIST(DATA_DIR, part == "train")):
            path = unfinished / part / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            ImageOps.invert(image).save(path)
    unfinished.rename(INVERTED)


if __name__ == "__main__":
    run_command(main)
