"""What Avalanche's interface costs: ratios against plain loops and against stock Avalanche.

`python tests/benchmark.py` prints a table (`--quick`: a short one). Nothing else should run. Pairs
are measured in turn, and medians are quoted.
"""

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler, RandomSampler

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import CONSTANTS, DATA_DIR  # noqa: E402

import GenerativeReplay  # noqa: E402
from figures.ablation import PLAIN_DGR  # noqa: E402
from figures.lab.data import in_memory_benchmark, load_images, make_benchmark  # noqa: E402
from figures.lab.runs import setup  # noqa: E402
from figures.plain_dgr import plain_dgr  # noqa: E402
from GenerativeModel import VAE, negative_elbo  # noqa: E402
from TrainingInstances import DeepGenerativeReplayPlugin  # noqa: E402

SHAPE = (1, 28, 28)
# Plain DGR with minibatches of 128 + 128, as in van de Ven et al.
PLAIN = {**PLAIN_DGR, "BATCH_SIZE": 128, "REPLAY_SIZE": 128}


def synthetic(experiences: int, images: int, shape: tuple = SHAPE):
    """Stream of two classes in each experience, of random images: their content costs no time."""
    generator = torch.Generator().manual_seed(0)
    data = [
        (
            torch.rand(images, *shape, generator=generator),
            torch.randint(2 * k, 2 * k + 2, (images,), generator=generator),
        )
        for k in range(experiences)
    ]
    return in_memory_benchmark(data, data)


def ours(benchmark, constants):
    """Train and evaluate with the project's strategies; return the scholar."""
    scholar = GenerativeReplay.make_scholar(benchmark, constants)
    for experience in benchmark.train_stream:
        scholar.train(experience)
        scholar.eval(benchmark.test_stream)
    return scholar


def plain_loop(benchmark, constants):
    """The same in a plain loop; return solver and generator.

    The random numbers are those of the strategies, so that the weights are the same at the end.
    """
    scholar = GenerativeReplay.make_scholar(benchmark, constants)
    solver, vae = scholar.model, scholar.replay_plugin.generator
    experiences = [experience.dataset.tensors[:2] for experience in benchmark.train_stream]
    loop = plain_dgr if vae.density else without_components
    for _ in loop(solver, vae, experiences, constants):
        solver.eval()
        with torch.no_grad():
            for x, y in experiences:
                right = [solver(a).argmax(1) == b for a, b in zip(x.split(1000), y.split(1000))]
                torch.cat(right).float().mean().item()
        solver.train()
    return solver, vae


def without_components(solver, vae, experiences, constants):
    """Deep Generative Replay without the components of the default recipe, as `plain_dgr`."""
    size, iterations, rate = constants.BATCH_SIZE, constants.ITERATIONS, constants.LEARNING_RATE
    optimizers = [torch.optim.Adam(m.parameters(), lr=rate, fused=True) for m in (solver, vae)]
    seen, amount = [], constants.REPLAY_SIZE
    count = DeepGenerativeReplayPlugin.AHEAD // amount * amount

    @torch.no_grad()
    def replay(labelled):
        while True:
            x, labels = old_vae.generate(count), torch.zeros(count, dtype=torch.int64)
            if labelled:
                labels = torch.tensor(seen)[old_solver(x)[:, seen].argmax(1)]
            yield from zip(x.split(amount), labels.split(amount))

    def solver_losses(x, y):
        return cross_entropy(solver(x), y, reduction="none")

    def vae_losses(x, y):
        return negative_elbo(x, vae(x), constants.KL_WEIGHT)

    for k, (x, y) in enumerate(experiences, 1):
        old_solver, old_vae = copy.deepcopy(solver).eval(), copy.deepcopy(vae).eval()
        solver[-1].active_units[y.unique()] = 1  # the others' logits are masked
        for losses_of, optimizer in zip((solver_losses, vae_losses), optimizers):
            past = replay(labelled=losses_of is solver_losses)
            for rows in BatchSampler(RandomSampler(x, num_samples=iterations * size), size, False):
                batch = x[rows], y[rows]
                if k == 1:
                    loss = losses_of(*batch).mean()
                else:
                    losses = losses_of(*map(torch.cat, zip(batch, next(past))))
                    loss = losses[:size].mean() / k + (1 - 1 / k) * losses[size:].mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        seen = sorted({*seen, *y.unique().tolist()})
        yield k


def seconds(function, *arguments) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def overhead(repeats: int, iterations: int, **changes) -> list[float]:
    """Our time over the plain loop's, for a whole stream of five experiences."""
    benchmark, constants = synthetic(5, 2000), CONSTANTS.changed(ITERATIONS=iterations, **changes)
    return [
        seconds(ours, benchmark, constants) / seconds(plain_loop, benchmark, constants)
        for _ in range(repeats)
    ]


def faster_than_stock(repeats: int, **changes) -> list[float]:
    """Time per iteration of Avalanche's GenerativeReplay on SplitMNIST, over ours.

    At the second experience, solver and generator step together, with the same solver, the same
    layers in the VAE, batch and replay size. All else of the stock strategy is as it comes.
    """
    import avalanche.training.supervised as stock
    from avalanche.benchmarks.classic import SplitMNIST
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.plugins import GenerativeReplayPlugin as StockPlugin

    class StockVAE(VAE):
        def generate(self, batch_size=None, condition=None):  # as Avalanche's: with gradients
            return torch.sigmoid(self.decode(torch.randn(batch_size, self.latent_size)))

    data = {"DATASET": "mnist", "DATA_DIR": str(DATA_DIR)}
    constants = CONSTANTS.changed(ITERATIONS=1, **data, **PLAIN | changes)
    benchmark = make_benchmark(load_images(constants), constants)
    stream, size = benchmark.train_stream, constants.BATCH_SIZE
    constants = constants.changed(ITERATIONS=-(-len(stream[1].dataset) // size))
    scholar = GenerativeReplay.make_scholar(benchmark, constants)
    scholar.train(stream[0])

    solver = copy.deepcopy(scholar.model)
    vae = StockVAE(SHAPE, latent_size=constants.LATENT_SIZE)
    common = {"train_mb_size": size, "evaluator": EvaluationPlugin}
    strategy = stock.GenerativeReplay(
        model=solver,
        optimizer=torch.optim.Adam(solver.parameters()),
        generator_strategy=stock.VAETraining(
            model=vae,
            optimizer=torch.optim.Adam(vae.parameters()),
            criterion=lambda x, output: negative_elbo(x, output).mean(),
            plugins=[StockPlugin()],
            **common,
        ),
        **common,
    )
    order = list(constants.CLASS_ORDER)
    stock_stream = SplitMNIST(5, dataset_root=DATA_DIR, fixed_class_order=order).train_stream
    strategy.train(stock_stream[0])
    return [
        seconds(strategy.train, stock_stream[1]) / seconds(scholar.train, stream[1])
        for _ in range(repeats)
    ]


def growth(repeats: int, iterations: int) -> tuple[list[float], list[float]]:
    """Time per iteration at the 50th experience over the 2nd, and peak memory after them."""
    constants, benchmark = CONSTANTS.changed(ITERATIONS=iterations, **PLAIN), synthetic(50, 1000)
    ratios, peaks = [], []
    for _ in range(repeats):
        scholar, times = GenerativeReplay.make_scholar(benchmark, constants), []
        for experience in benchmark.train_stream:
            times.append(seconds(scholar.train, experience))
            scholar.eval(benchmark.test_stream[: len(times)])
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        ratios.append(statistics.median(times[-3:]) / statistics.median(times[1:4]))
    return ratios, [peaks[49] / peaks[1]]


def start_up(repeats: int) -> list[float]:
    """Start-up of the scripts with all that they import, over `import avalanche` alone."""
    names = "Generator, GenerativeReplay, TrainingInstances, figures.draw"

    def load(what):
        command = [sys.executable, "-W", "ignore", "-c", f"import {what}"]
        subprocess.run(command, cwd=ROOT, check=True)

    return [seconds(load, names) / seconds(load, "avalanche") for _ in range(repeats)]


def two_at_a_time(repeats: int, iterations: int) -> list[float]:
    """Two seeds of the digits in two processes, over one after the other."""

    def command(jobs):
        script = [sys.executable, ROOT / "GenerativeReplay.py", "--dataset", "digits"]
        words = map(str, ["--seeds", 0, 1, "--iterations", iterations, "--n-jobs", jobs])
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([*script, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)

    return [seconds(command, 2) / seconds(command, 1) for _ in range(repeats)]


def main() -> None:
    """Measure, and print each row as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, shorter runs")
    quick = parser.parse_args().quick
    repeats, slow, iterations = (3, 1, 25) if quick else (7, 7, 100)
    bfloat16 = {"BFLOAT16": setup(CONSTANTS.changed(BFLOAT16=None)).BFLOAT16}  # as by default
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'ratio':48} {'target':>8} {'median':>7} {'spread':>13}   n")

    def report(what: str, target: str, values: list[float]) -> None:
        spread = f"{min(values):.2f} to {max(values):.2f}"
        middle = f"{statistics.median(values):7.2f}"
        print(f"{what:48} {target:>8} {middle} {spread:>13} {len(values):3}", flush=True)

    # Memory first: a peak of what came before would hide it.
    late, memory = growth(1 if quick else 5, 4 if quick else 20)
    report("50th experience / 2nd, seconds per iteration", "<= 1.05", late)
    report("50th experience / 2nd, peak memory", "<= 1.05", memory)
    mnist = bfloat16 | {"INPUT_SHIFT": 1}  # the random images here have no margin
    report("default recipe, ours / plain loop", "<= 1.05", overhead(repeats, iterations, **mnist))
    report("plain DGR, ours / plain loop", "<= 1.05", overhead(repeats, iterations, **PLAIN))
    report("start-up / import avalanche", "<= 1.20", start_up(slow))
    if not quick:
        report("two seeds, two at a time / one by one", "<= 0.65", two_at_a_time(5, 300))
    if (DATA_DIR / "MNIST").exists():
        stock = faster_than_stock(slow, **bfloat16)
        report("plain DGR, stock / ours, as both come", ">= 3.00", stock)
        report("plain DGR, stock / ours, both in float32", "", faster_than_stock(slow))
    else:
        print(f"No comparison with stock Avalanche: MNIST is not in {DATA_DIR}", file=sys.stderr)


if __name__ == "__main__":
    main()
