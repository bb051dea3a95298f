"""All numbers of the READMEs: `python -m figures.reproduce`, or with names of `RUNS` for some.

The commands run one after the other, two runs at a time with one thread each, and leave their
results in `results/NAME`. Finished runs are not run again: an interrupted list goes on. At the end
their means stand in `figures/results.json`, with which a test compares the READMEs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from figures import draw, results
from figures.ablation import PLAIN_DGR

# As published: 2,000 iterations of 128 + 128 images.
PUBLISHED = PLAIN_DGR | {"ITERATIONS": 2000, "BATCH_SIZE": 128, "BFLOAT16": False}
PLAIN = " ".join(f"--{name.lower().replace('_', '-')} {value}" for name, value in PUBLISHED.items())
INVERTED = Path("results", "images", "inverted-mnist")
THREE = "--seeds 0 1 2"
TEN = "--seeds 0 1 2 3 4 5 6 7 8 9"
ALL = f"GenerativeReplay.py --strategies replay naive joint er {THREE}"
BOTH = f"GenerativeReplay.py --strategies replay joint {THREE}"
RUNS = {
    "mnist": f"GenerativeReplay.py --strategies replay naive joint er {TEN}",
    "plain": f"GenerativeReplay.py {PLAIN} {THREE}",
    "orders": f"{BOTH} --shuffle-classes",
    "single": f"{BOTH} --n-experiences 10",
    "domain": f"{BOTH} --scenario domain",
    "inverted": f"{BOTH} --dataset {INVERTED}",
    "fashion": f"{ALL} --dataset fashion",
    "fashion-single": f"{BOTH} --dataset fashion --n-experiences 10",
    "permuted": f"{BOTH} --scenario permuted --n-experiences 10",
    "permuted-wide": f"{BOTH} --scenario permuted --n-experiences 10 --hidden-units 1000",
    "ablation": f"-m figures.ablation --iterations 300 {THREE}",
}


def main() -> None:
    """Run the commands, then collect and draw what has several of them in it."""
    for name in sys.argv[1:] or RUNS:
        if name == "inverted" and not INVERTED.exists():
            invert_mnist()
        words = *RUNS[name].split(), "--n-jobs", "2", "--results-dir", f"results/{name}"
        print(f"\n{name}: python {' '.join(words)}", flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *words], check=True, env=environment)
    runs = {name: results.read_runs(Path("results", name)) for name in RUNS if done(name)}
    rows = {name: results.statistics(group) for name, group in runs.items()}
    text = json.dumps({name: summary(row) for name, row in rows.items()}, indent=1)
    Path("figures", "results.json").write_text(text + "\n")
    if {"mnist", "plain"} <= runs.keys():
        plain = [run | {"name": "plain DGR"} for run in runs["plain"]]
        figure = draw.accuracy_so_far(draw.in_order(runs["mnist"]) + plain)
        draw.save(figure, Path("figures", "accuracy.png"))


def done(name: str) -> bool:
    """Tell whether there are results of a command."""
    return any(Path("results", name).glob("*/results.json"))


def summary(rows: dict) -> dict:
    """Shorten statistics to seeds, and mean and standard error of what is measured."""
    kept = ("mean", "standard_error")
    return {
        name: {"seeds": len(row["seeds"])}
        | {key: {k: row[key][k] for k in kept} for key in results.KEYS}
        for name, row in rows.items()
    }


def invert_mnist() -> None:
    """Save MNIST's digits, black on white, as a folder of images."""
    from PIL import ImageOps
    from torchvision.datasets import MNIST

    import Generator

    for part in ("train", "test"):
        for number, (image, label) in enumerate(MNIST(Generator.DATA_DIR, part == "train")):
            path = INVERTED / part / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            ImageOps.invert(image).save(path)


if __name__ == "__main__":
    results.run_command(main)
