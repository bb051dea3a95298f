"""The files that a run leaves, and the numbers of several runs.

Each run has a folder, `results/<dataset>-<strategy>-<hash>-seed<n>`, with its `state.pt` to go on
from and, once it is finished, its record `results.json`.
"""

import csv
import json
import math
import os
import platform
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from io import BytesIO, StringIO
from pathlib import Path
from statistics import mean, stdev

import joblib
import numpy as np
from filelock import FileLock, Timeout

SCRIPTS = sorted(Path(__file__).parent.parent.glob("*.py"))
# Constants that say where runs take place, and how many at a time: they don't count in the name of
# a folder, although the number of threads changes rounding, and a GPU the random numbers too.
ELSEWHERE = {
    "SEEDS", "DATA_DIR", "DEVICE", "RESULTS_DIR", "STRATEGIES", "N_JOBS", "SCHEDULER",
    "TENSORBOARD",
}  # fmt: skip


class UserError(Exception):
    """Report in one line, with exit code 2, what the user has to change."""


def run_command(main: Callable[[], None]) -> None:
    """Run the main function of a script; end errors of the user and interruptions in one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        text = "\ninterrupted; the same command goes on after the last finished experience"
        print(text, file=sys.stderr)
        sys.exit(130)


# ------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------


def run_folder(constants, images, strategy: str, seed: int) -> Path:
    """Return the folder of a run, named by the other constants and the text of the scripts."""
    deciding = constants.model_dump(exclude=ELSEWHERE)
    digest = joblib.hash((deciding, [path.read_bytes() for path in SCRIPTS]))[:8]
    return Path(constants.RESULTS_DIR) / f"{images.name}-{strategy}-{digest}-seed{seed}"


@contextmanager
def run_lock(folder: Path, title: str) -> Iterator[None]:
    """Make the folder of a run and lock it; a killed process releases it too."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{title}: waiting for another process that works on it", flush=True)
        lock.acquire()
    try:
        for path in folder.glob(".[0-9]*-*"):  # left by a killed process
            path.unlink()
        yield
    except FloatingPointError as error:
        raise UserError(f"{title}: {error}; try a lower LEARNING_RATE") from error
    finally:
        lock.release()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path; what is written there becomes `path` once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_record(path: Path, record: dict) -> None:
    """Save a record as JSON."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Save arrays by name, compressed."""
    with atomic(path) as temporary:
        np.savez_compressed(temporary, **arrays)


def with_generator(strategy) -> list:
    """Return a strategy and, if it replays with the generator of another one, that one."""
    other = strategy.replay and strategy.replay.generator_strategy
    return [strategy] if other in (None, strategy) else [strategy, other]


def strategy_state(strategy) -> dict:
    """Collect what a strategy carries from one experience to the next: tensors and plain values.

    A plugin names its share in `saved`. Another strategy than Avalanche's has its model alone.
    """
    state = {"model": strategy.model.state_dict()}
    if hasattr(strategy, "plugins"):
        state["optimizer"] = strategy.optimizer.state_dict()
        state["clock"] = dict(vars(strategy.clock))
        state["plugins"] = [
            {name: getattr(plugin, name) for name in getattr(plugin, "saved", ())}
            for plugin in strategy.plugins
        ]
    return state


def load_strategy_state(strategy, state: dict) -> None:
    """Go on where `strategy_state` was called, in a strategy that was built in the same way."""
    strategy.model.load_state_dict(state["model"])
    if "plugins" in state:
        strategy.model.to(strategy.device)
        strategy.make_optimizer(reset_optimizer_state=True)  # else the next train() resets it
        strategy.optimizer.load_state_dict(state["optimizer"])
        vars(strategy.clock).update(state["clock"])
        for plugin, saved in zip(strategy.plugins, state["plugins"], strict=True):
            vars(plugin).update(saved)


def read_state(path: Path) -> dict:
    """Read the state that a run has left, all tensors on the CPU; no code in it is run."""
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True)
        if state["run"] == path.resolve().parent.name:
            return state
        reason = f"but of {state['run']}"
    except Exception as error:  # a damaged file can raise anything
        reason = type(error).__name__
    raise UserError(f"{path} is no state of this run ({reason}); move it away to start anew")


def load_state(folder: Path, strategy) -> dict:
    """Bring a new strategy, and torch's random numbers, to where an interrupted run has ended.

    :return: the saved state; empty if there is none.
    """
    import torch

    if not (folder / "state.pt").exists():
        return {}
    state = read_state(folder / "state.pt")
    for part, saved in zip(with_generator(strategy), state["strategies"], strict=True):
        load_strategy_state(part, saved)
    cpu, *cuda = state["random"]
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state_all(cuda[: torch.cuda.device_count()])
    return state


def resumable(stream, strategy, folder: Path, run: dict) -> Iterator:
    """Yield the experiences that a run has not learned yet; save it and say so after each.

    :param strategy: a `ReplayTemplate` that is trained meanwhile.
    :param run: its `record`, `progress` (a text), and lists of whatever else is to be saved.
    """
    import torch

    record, saved = run["record"], load_state(folder, strategy)
    record.update(saved.get("record", {}), name=record["name"])
    run.update({name: saved[name] for name in saved.keys() & run.keys() - {"record"}})
    for experience in stream[strategy.clock.train_exp_counter :]:
        started = time.perf_counter()
        yield experience
        record["seconds"] += time.perf_counter() - started
        state = {
            "run": folder.name,
            "strategies": [strategy_state(part) for part in with_generator(strategy)],
            "random": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
        }
        buffer = BytesIO()
        torch.save(state | run, buffer)
        with atomic(folder / "state.pt") as path:
            path.write_bytes(buffer.getvalue())
        title = f"{record['name']}, seed {record['seed']}: experience "
        place, seconds = f"{strategy.clock.train_exp_counter}/{len(stream)}", record["seconds"]
        print(f"{title}{place}, {run['progress']}, {seconds:.0f} s", flush=True)


def new_record(constants, images, name: str, seed: int) -> dict:
    """Start the record of a run with what its numbers depend on."""
    packages = {package: version(package) for package in ("torch", "torchvision", "avalanche-lib")}
    return {
        "name": name,
        "dataset": images.name,
        "notice": images.notice,
        "seed": seed,
        "constants": constants.model_dump(),
        "versions": {"python": platform.python_version(), **packages},
        "seconds": 0.0,
    }


# ------------------------------------------------------------------------------------------------
# Several runs
# ------------------------------------------------------------------------------------------------

KEYS = ("final_accuracy", "forgetting", "seconds")


def read_runs(folder: Path) -> list[dict]:
    """Read the records of the runs in a folder or, if it has none, in its subfolders.

    Each also gets the `folder` it lies in. Folders of the same name hold the same run: it counts
    once.
    """
    files = sorted(folder.glob("*/results.json")) or sorted(folder.rglob("results.json"))
    runs = []
    for path in {file.parent.name: file for file in files}.values():
        try:
            runs.append(json.loads(path.read_text(encoding="utf-8")) | {"folder": path.parent})
        except ValueError as error:
            raise UserError(f"{path} can't be read ({error}); move it away") from error
    if not runs:
        raise UserError(f"there is no results.json in or below {str(folder)!r}")
    return named_apart(runs)


def named_apart(runs: list[dict]) -> list[dict]:
    """Tell runs of one name apart: by data set, and by hash if their constants differ."""
    datasets = {run["dataset"] for run in runs}
    kinds = {(run["dataset"], run["name"], kind(run)) for run in runs}
    names = [names for *names, _ in kinds]
    named = []
    for run in runs:
        name = run["name"]
        if names.count([run["dataset"], name]) > 1:
            name += f" ({kind(run).rpartition('-')[2]})"
        if len(datasets) > 1:
            name = f"{run['dataset']}, {name}"
        named.append(run | {"name": name})
    return named


def kind(run: dict) -> str:
    """Return what a run has in common with those of other seeds: its folder without the seed."""
    return run["folder"].name.rpartition("-seed")[0]


def by_name(runs: list[dict]) -> dict[str, list[dict]]:
    """Group runs of the same name."""
    names = dict.fromkeys(run["name"] for run in runs)
    return {name: [run for run in runs if run["name"] == name] for name in names}


def over_seeds(values: list[float]) -> dict:
    """Compute mean and standard error (None for a single value); keep the values."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": mean(values), "standard_error": error, "values": values}


def statistics(runs: list[dict]) -> dict:
    """Summarize runs: for each name its seeds, its constants, and `KEYS` over the seeds."""
    return {
        name: {key: group[0][key] for key in ("dataset", "notice", "constants", "versions")}
        | {"seeds": [run["seed"] for run in group]}
        | {key: over_seeds([run[key] for run in group]) for key in KEYS}
        for name, group in by_name(runs).items()
    }


def table(runs: list[dict]) -> str:
    """Format accuracy, forgetting and seconds: a line for each run, and for each name its mean."""
    width = max(len(run["name"]) for run in runs) + 19
    lines = [f"{'':{width}}{'final accuracy':>17}{'forgetting':>17}{'seconds':>9}"]
    for name, row in statistics(runs).items():
        for seed, *numbers in zip(row["seeds"], *(row[key]["values"] for key in KEYS)):
            label = f"{name}, seed {seed}"
            lines.append("{:{}}{:17.2%}{:17.2%}{:9.0f}".format(label, width, *numbers))
        if len(row["seeds"]) > 1:
            pairs = (f"{row[k]['mean']:.2%} ± {row[k]['standard_error']:.2%}" for k in KEYS[:2])
            label, seconds = f"{name}, mean ± s.e.", row["seconds"]["mean"]
            lines.append("{:{}}{:>17}{:>17}{:9.0f}".format(label, width, *pairs, seconds))
    return "\n".join(lines)


def tidy(runs: list[dict]) -> str:
    """Format the accuracy matrices as CSV, a row for each number; experiences count from 1."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["strategy", "seed", "experience_trained", "experience_tested", "accuracy"])
    for run in runs:
        for trained, row in enumerate(run["accuracy_matrix"], 1):
            for tested, accuracy in enumerate(row, 1):
                writer.writerow([run["name"], run["seed"], trained, tested, accuracy])
    return text.getvalue()
