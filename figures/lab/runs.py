"""A process that trains, the folder of a run, and several runs side by side.

Each run has a folder, `results/<dataset>-<strategy>-<hash>-seed<n>`, with its `state.pt` to go on
from and, once it is finished, its arrays and its record.
"""

import json
import os
import platform
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import joblib
import numpy as np
import torch
from avalanche.benchmarks import CLScenario, DatasetExperience
from avalanche.models.dynamic_modules import avalanche_model_adaptation
from filelock import FileLock, Timeout
from torch.nn.utils.rnn import pad_sequence

from figures.lab.console import say, suit_any_console
from figures.lab.constants import Constants, UserError
from figures.lab.data import Images
from figures.lab.progress import ProgressBar, bar_of_runs

try:
    from dask.distributed import Client
except ImportError:  # only SCHEDULER needs it
    Client = None

ROOT = Path(__file__).parents[2]
# What the numbers of a run depend on, beside its constants: the text of these files.
SCRIPTS = [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("figures/lab/*.py"))]
SCRIPTS.append(ROOT / "figures" / "generators.py")
CODE = [path.read_bytes() for path in SCRIPTS]  # as it is imported: an edit counts from then on
# Constants that say where runs take place, and how many at a time: they don't count in the name of
# a folder, although the number of threads changes rounding, and a GPU the random numbers too.
ELSEWHERE = {
    "SEEDS", "DATA_DIR", "DEVICE", "RESULTS_DIR", "STRATEGIES", "THREADS", "N_JOBS",
    "SCHEDULER", "TENSORBOARD",
}  # fmt: skip

# --- The process ----------------------------------------------------------------------------------


def setup(constants: Constants) -> Constants:
    """Prepare this process for training, before torch computes anything in it.

    :return: the constants, with a DEVICE and a BFLOAT16 that suit the machine.
    :raises UserError: if the DEVICE can't be used.
    """
    if constants.THREADS or "OMP_NUM_THREADS" not in os.environ:  # which torch has read itself
        # Two threads wait for each other: beside other work they are slower, by a multiple.
        torch.set_num_threads(constants.THREADS or 1)
    # Adam's moments of units without gradient decay into denormal numbers, which take an x86 CPU
    # nine times as long. Threads take it over when they start.
    torch.set_flush_denormal(True)
    device, bfloat16 = constants.DEVICE, constants.BFLOAT16
    if device == "auto":
        device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(".")[0].split("\n")[0]
        raise UserError(f"DEVICE is {device!r}, which can't be used: {reason}") from None
    if bfloat16 is None:  # where an x86 CPU has instructions for products in bfloat16
        cpu = torch.cpu.get_capabilities()
        bfloat16 = device == "cpu" and bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    return constants.changed(DEVICE=device, BFLOAT16=bfloat16)


# --- One run --------------------------------------------------------------------------------------


class Run:
    """Keep the folder of a run: locked while it is worked on, saved after each experience.

    :param images: the data set; its tensors play no role.
    :param strategy: the strategy's name in the folder's.
    :param name: its name in tables and figures.
    :param generator: the name of what makes the generator, if that isn't in the constants.
    """

    def __init__(
        self, constants: Constants, images: Images, strategy: str, seed: int,
        name: str = "", generator: str = "",
    ):  # fmt: skip
        if generator == "<lambda>":
            raise UserError("make_generator has to have a name, as the folder's depends on it")
        digest = joblib.hash(((constants.model_dump(exclude=ELSEWHERE), generator), CODE))[:8]
        folder = f"{images.name}-{strategy}-{digest}-seed{seed}"
        self.folder = Path(constants.RESULTS_DIR) / folder
        self.path = self.folder / ("generator.json" if strategy == "generator" else "results.json")
        self.title = f"{name or strategy}, seed {seed}"
        packages = ("torch", "torchvision", "avalanche-lib")
        self.now = {"name": name or strategy, "notice": images.notice}  # whatever a record says
        self.record = self.now | {
            "dataset": images.name,
            "seed": seed,
            "constants": constants.model_dump(),
            "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
            "seconds": 0.0,
        }
        self.arrays: dict[str, list[torch.Tensor]] = defaultdict(list)

    @property
    def finished(self) -> bool:
        """Tell whether the run has been finished before."""
        return self.path.exists()

    @property
    def result(self) -> dict:
        """Return the record, with the `folder` it lies in."""
        return self.record | {"folder": self.folder}

    def __enter__(self) -> "Run":
        """Make and lock the folder, which a killed process releases too; read a finished record."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / "lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            say(f"{self.title}: waiting for another process that works on it")
            self.lock.acquire()
        for path in self.folder.glob(".[0-9]*-*"):  # left by a killed process
            path.unlink()
        if self.finished:
            say(f"{self.title}: finished already, in {self.folder}")
            self.record = read_record(self.path) | self.now
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Release the folder; say in one line what a user can mend."""
        self.lock.release()
        if isinstance(error, FloatingPointError):
            raise UserError(f"{self.title}: {error}; try a lower LEARNING_RATE") from error
        if isinstance(error, RuntimeError) and re.search("memory|overflow", str(error)):
            reason = str(error).split("\n")[0]
            raise UserError(f"{self.title}: {reason}; make the layers smaller") from error

    def remaining(self, benchmark: CLScenario, strategy) -> Sequence[DatasetExperience]:
        """Return the experiences to learn: all, or those that an interrupted run has left.

        For that the strategy, new as it is, is brought to where the run has ended, and so are
        torch's random numbers.
        """
        done, path = 0, self.folder / "state.pt"
        if path.exists():
            state = read_state(path)
            done = len(state["record"].get("accuracy_matrix") or state["record"]["loss_matrix"])
            strategy.make_optimizer(reset_optimizer_state=True)
            for experience in [*benchmark.train_stream[:done], *benchmark.test_stream]:
                avalanche_model_adaptation(strategy.model, experience)  # heads that grow
            load_state(strategy, state)
            self.record |= state["record"] | self.now
            self.arrays.update(state["arrays"])
        self.started = time.perf_counter()
        return benchmark.train_stream[done:]

    def save(self, strategy, progress: str) -> None:
        """Save what the next experiences depend on, and say how far the run is."""
        self.record["seconds"] += time.perf_counter() - self.started
        state = {
            "run": self.folder.name,
            "strategies": [strategy_state(part) for part in with_generator(strategy)],
            "random": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
            "record": self.record,
            "arrays": dict(self.arrays),
        }
        buffer = BytesIO()
        torch.save(state, buffer)
        with atomic(self.folder / "state.pt") as path:
            path.write_bytes(buffer.getvalue())
        place = f"{strategy.clock.train_exp_counter}/{len(self.record['experiences'])}"
        seconds = self.record["seconds"]
        say(f"{self.title}: experience {place}, {progress}, {seconds:.0f} s")
        self.started = time.perf_counter()

    def finish(self) -> None:
        """Save the arrays, those of unequal length filled up with NaN, then the record."""
        arrays = {
            name: pad_sequence(parts, batch_first=True, padding_value=torch.nan).numpy()
            for name, parts in self.arrays.items()
        }
        with atomic(self.folder / "arrays.npz") as path:
            np.savez_compressed(path, **arrays)
        save_record(self.path, self.record)  # last: the run is finished


def with_generator(strategy) -> list:
    """Return a strategy and, if it replays with the generator of another one, that one."""
    other = getattr(strategy.replay_plugin, "generator_strategy", None)
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


def load_state(strategy, state: dict) -> None:
    """Bring a new strategy, its generator's and torch's random numbers to a saved state."""
    for part, saved in zip(with_generator(strategy), state["strategies"], strict=True):
        part.model.load_state_dict(saved["model"])
        if "plugins" in saved:
            part.model.to(part.device)
            part.make_optimizer(reset_optimizer_state=True)  # else the next train() resets it
            part.optimizer.load_state_dict(saved["optimizer"])
            vars(part.clock).update(saved["clock"])
            for plugin, values in zip(part.plugins, saved["plugins"], strict=True):
                vars(plugin).update(values)
    cpu, *cuda = state["random"]
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state_all(cuda[: torch.cuda.device_count()])


def read_state(path: Path) -> dict:
    """Read the state that a run has left, all tensors on the CPU; no code in it is run.

    :raises UserError: if it is damaged, or of another run.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True)
        if state["run"] == path.resolve().parent.name:
            return state
        reason = f"but of {state['run']}"
    except Exception as error:  # a damaged file can raise anything
        reason = type(error).__name__
    raise UserError(f"{path} is no state of this run ({reason}); move it away to start anew")


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


def read_record(path: Path) -> dict:
    """Read the record of a finished run.

    :raises UserError: if it is damaged.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if {"name", "dataset", "seed", "constants"} <= set(record):
            return record
        reason = "it isn't the record of a run"
    except (ValueError, TypeError) as error:
        reason = error
    raise UserError(f"{path} can't be read ({reason}); move it away")


def save_record(path: Path, record: dict) -> None:
    """Save a record as JSON."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")


# --- Several runs ---------------------------------------------------------------------------------


def side_by_side(
    experiment: Callable, plans: list[dict], images: Images, constants: Constants
) -> list[dict]:
    """Call an experiment for each plan and each seed, N_JOBS at the same time.

    :param plans: arguments of the experiment, but for seed and images.
    :return: what the calls returned.
    """
    calls = [plan | {"seed": seed} for plan in plans for seed in constants.SEEDS]
    if constants.N_JOBS == 1 and not constants.SCHEDULER:
        return [experiment(**call, images=images) for call in calls]
    images = images._replace(train=(), test=())  # each process loads them itself
    with backend(constants):
        results = joblib.Parallel(return_as="generator_unordered")(
            joblib.delayed(one_of_many)(number, experiment, **call, images=images)
            for number, call in enumerate(calls)
        )
        by_number = dict(bar_of_runs(results, len(calls)))
    return [by_number[number] for number in range(len(calls))]


def one_of_many(number: int, experiment: Callable, /, **arguments) -> tuple[int, dict]:
    """Call an experiment in a process beside others; the bar is that of the main process.

    :return: the number of the call, and what it returned.
    """
    suit_any_console()
    ProgressBar.disable = True
    return number, experiment(**arguments)


def backend(constants: Constants):
    """Choose where joblib runs: in processes of this machine, or on the workers of SCHEDULER."""
    if constants.SCHEDULER is None:
        # joblib cleans up what an interruption leaves behind, and need not say so.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
        # Else joblib would give each process its share of all cores.
        inner = {"inner_max_num_threads": torch.get_num_threads()}
        return joblib.parallel_config("loky", n_jobs=constants.N_JOBS, **inner)
    if Client is None:
        raise UserError("SCHEDULER needs `pip install distributed`")
    try:
        client = Client(constants.SCHEDULER, timeout=10)
        client.wait_for_workers(1, timeout=30)
        for ask in client.run_on_scheduler, client.run:  # else joblib would wait for ever
            ask(lambda: bool(__import__("figures.lab")))
    except (OSError, ValueError):
        text = f"no Dask scheduler with a worker answers at {constants.SCHEDULER}"
        raise UserError(text) from None
    except ImportError as error:
        raise UserError(
            f"SCHEDULER needs the scripts' folder in the PYTHONPATH of scheduler and workers "
            f"({error})"
        ) from None
    return joblib.parallel_config("dask", client=client)
