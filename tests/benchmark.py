"""What Avalanche's interface costs: ratios against a bare loop and against stock Avalanche.

`python tests/benchmark.py` prints a table (11 minutes on two cores, `--quick` 1½;
nothing else should run). Pairs are measured in turn in one process, and medians are quoted.
"""

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import GenerativeReplay  # noqa: E402
import Generator  # noqa: E402
from GenerativeModel import VAE, negative_elbo  # noqa: E402
from TrainingInstances import in_memory_benchmark  # noqa: E402

SHAPE, BATCH = (1, 28, 28), 128


def constants_for(iterations: int, classes: int = 10) -> SimpleNamespace:
    """The scripts' own constants, but plain replay, as in van de Ven et al."""
    names = {**vars(Generator), **vars(GenerativeReplay)}
    constants = {name: names[name] for name in {**Generator.RULES, **GenerativeReplay.RULES}}
    changes = {
        **GenerativeReplay.PLAIN,
        "ITERATIONS": iterations,
        "BATCH_SIZE": BATCH,
        "CLASS_ORDER": tuple(range(classes)),
        "DEVICE": Generator.choose_device("auto"),
    }
    return SimpleNamespace(**constants | changes)


def synthetic(experiences: int, images: int) -> list[tuple]:
    """Experiences of two classes each with random images: their content costs no time."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.rand(images, *SHAPE, generator=generator),
            torch.randint(2 * k, 2 * k + 2, (images,), generator=generator),
        )
        for k in range(experiences)
    ]


def ours(experiences, constants):
    """Train and evaluate with the project's strategies; return the scholar."""
    benchmark = in_memory_benchmark(experiences, experiences)
    scholar = GenerativeReplay.make_scholar(SHAPE, constants)
    for experience in benchmark.train_stream:
        scholar.train(experience)
        scholar.eval(benchmark.test_stream)
    return scholar


def bare(experiences, constants):
    """The same by hand, as fast as we can write it; return solver and generator."""
    scholar = GenerativeReplay.make_scholar(SHAPE, constants)
    device = constants.DEVICE
    solver, vae = scholar.model.to(device), scholar.replay.generator.to(device)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-3, fused=True) for m in (solver, vae)]
    seen, accuracies = torch.empty(0, dtype=torch.long, device=device), []
    experiences = [(x.to(device), y.to(device)) for x, y in experiences]

    def minibatches(x, y):
        while True:
            for rows in torch.randperm(len(x), device=device).split(BATCH):
                yield x.index_select(0, rows), y.index_select(0, rows)

    def paint(count):
        z = torch.randn(count, vae.latent_size, device=device)
        return torch.sigmoid(old_vae.decode(z))

    for k, (images, labels) in enumerate(experiences, 1):
        old_solver, old_vae, r = copy.deepcopy(solver).eval(), copy.deepcopy(vae).eval(), 1 / k
        for x, y in islice(minibatches(images, labels), constants.ITERATIONS):
            n = len(x)
            if k > 1:
                with torch.no_grad():
                    replayed = paint(n)
                    y_old = seen[old_solver(replayed)[:, seen].argmax(1)]
                logits = solver(torch.cat([x, replayed]))
                loss = r * cross_entropy(logits[:n], y)
                loss = loss + (1 - r) * cross_entropy(logits[n:], y_old)
            else:
                loss = cross_entropy(solver(x), y)
            optimizers[0].zero_grad()
            loss.backward()
            optimizers[0].step()
        seen = torch.cat([seen, labels.unique()])
        for x, _ in islice(minibatches(images, labels), constants.ITERATIONS):
            n = len(x)
            if k > 1:
                with torch.no_grad():
                    x = torch.cat([x, paint(n)])
            losses = negative_elbo(x, vae(x))
            loss = losses.mean() if k == 1 else r * losses[:n].mean() + (1 - r) * losses[n:].mean()
            optimizers[1].zero_grad()
            loss.backward()
            optimizers[1].step()
        solver.eval()
        with torch.no_grad():
            for x, y in experiences:
                right = [solver(a).argmax(1) == b for a, b in zip(x.split(1000), y.split(1000))]
                accuracies.append(torch.cat(right).float().mean().item())
        solver.train()
    return solver, vae


def seconds(function, *arguments) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def overhead(repeats: int, iterations: int) -> list[float]:
    """Our time over the bare loop's, for a whole stream of five experiences."""
    experiences, constants = synthetic(5, 2000), constants_for(iterations)
    pairs = [
        (seconds(ours, experiences, constants), seconds(bare, experiences, constants))
        for _ in range(repeats)
    ]
    return [a / b for a, b in pairs]


def faster_than_stock(repeats: int) -> list[float]:
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

    folder = os.environ.get("DATA_DIR", "data")
    constants = constants_for(1)
    images = Generator.load_images("mnist", folder)
    stream = Generator.make_benchmark(images, constants).train_stream
    constants.ITERATIONS = -(-len(stream[1].dataset) // BATCH)
    scholar = GenerativeReplay.make_scholar(SHAPE, constants)
    scholar.train(stream[0])

    solver = copy.deepcopy(scholar.model)
    vae = StockVAE(SHAPE, latent_size=constants.LATENT_SIZE)
    common = {"train_mb_size": BATCH, "evaluator": EvaluationPlugin}
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
    stock_stream = SplitMNIST(5, dataset_root=folder, fixed_class_order=order).train_stream
    strategy.train(stock_stream[0])
    return [
        seconds(strategy.train, stock_stream[1]) / seconds(scholar.train, stream[1])
        for _ in range(repeats)
    ]


def growth(repeats: int, iterations: int) -> tuple[list[float], float]:
    """Time per iteration at the 50th experience over the 2nd, and peak memory after them."""
    constants, experiences = constants_for(iterations, classes=100), synthetic(50, 1000)
    benchmark = in_memory_benchmark(experiences, experiences)
    ratios, peaks = [], []
    for _ in range(repeats):
        scholar, times = GenerativeReplay.make_scholar(SHAPE, constants), []
        for experience in benchmark.train_stream:
            start = time.perf_counter()
            scholar.train(experience)
            times.append(time.perf_counter() - start)
            scholar.eval(benchmark.test_stream[: len(times)])
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        ratios.append(statistics.median(times[-3:]) / statistics.median(times[1:4]))
    return ratios, peaks[49] / peaks[1]


def start_up(repeats: int) -> list[float]:
    """Start-up of the scripts with all that they import, over `import avalanche` alone."""
    names = "Generator, GenerativeReplay, TrainingInstances, figures.draw"

    def load(what):
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", f"import {what}"], cwd=ROOT, check=True
        )

    return [seconds(load, names) / seconds(load, "avalanche") for _ in range(repeats)]


def main() -> None:
    """Measure, print the table and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, shorter runs")
    parser.add_argument("--json", metavar="FILE", help="write the medians to FILE")
    arguments = parser.parse_args()
    repeats, slow = (3, 1) if arguments.quick else (7, 7)  # slow: what takes ten seconds and more

    # Memory first: a peak of what came before would hide it.
    late, memory = growth(1 if arguments.quick else 5, 4 if arguments.quick else 20)
    rows = {
        "late_over_early": ("50th experience / 2nd, seconds per iteration", late, "<= 1.10"),
        "memory_growth": ("peak memory, 50th experience / 2nd", [memory], "<= 1.05"),
        "overhead": (
            "ours / bare loop, whole stream",
            overhead(repeats, 25 if arguments.quick else 100),
            "<= 1.10",
        ),
        "start_up": ("start-up / import avalanche", start_up(slow), "<= 1.20"),
    }
    try:
        stock = faster_than_stock(slow)
        rows["faster_than_stock"] = ("stock Avalanche / ours, per iteration", stock, ">= 2.50")
    except RuntimeError as error:
        print(f"No comparison with stock Avalanche, which needs MNIST: {error}", file=sys.stderr)

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'ratio':45} {'target':>8} {'median':>7} {'spread':>13}   n")
    for what, values, target in rows.values():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        middle = statistics.median(values)
        print(f"{what:45} {target:>8} {middle:7.2f} {spread:>13} {len(values):3}")
    if arguments.json:
        medians = {name: statistics.median(values) for name, (_, values, _) in rows.items()}
        Path(arguments.json).write_text(json.dumps(medians, indent=1))


if __name__ == "__main__":
    main()
