"""Deep Generative Replay in one plain loop, not Avalanche's: `python -m figures.plain_dgr`.

It learns scikit-learn's digits, two at a time. On a small stream the loop ends with the weights of
the strategies (a test says so): with the default recipe this is all that they compute. What the
tables call plain DGR is something else, the method without the components of the recipe.
"""

import copy
import sys

import torch
from torch.nn.functional import cross_entropy
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import BatchSampler, RandomSampler

import GenerativeReplay
from figures.lab import data
from figures.lab.constants import UserError, read_constants, run_command
from figures.lab.runs import setup
from GenerativeModel import negative_elbo, reconstruction_error
from Generator import make_generator_strategy

UNUSED = (  # constants of GenerativeReplay.py
    "SHUFFLE_CLASSES", "STRATEGIES", "REPLAY_SIZE", "INCREASING_REPLAY_SIZE", "RATIO", "ONE_CYCLE",
    "DEVICE", "N_JOBS", "SCHEDULER", "TENSORBOARD", "RESULTS_DIR",
)  # fmt: skip


def plain_dgr(solver, vae, experiences, constants):
    """Train solver and VAE on each experience, images and their labels; yield k after the k-th."""
    size, iterations, beta = constants.BATCH_SIZE, constants.ITERATIONS, constants.KL_WEIGHT
    temperature, seen = constants.TEMPERATURE, []
    for k, (x, y) in enumerate(experiences, 1):
        old_solver, old_vae = copy.deepcopy(solver).eval(), copy.deepcopy(vae).eval()
        solver[-1].active_units[y.unique()] = 1  # the others' logits are masked
        r = 1 / k  # of Shin et al. 2017, eq. 1; 1/k is the choice of van de Ven & Tolias 2018

        step = one_cycle(solver, constants)
        past = labelled_replay(old_vae, old_solver, seen, temperature, size * (k - 1))  # if k > 1
        for rows in BatchSampler(RandomSampler(x, num_samples=iterations * size), size, False):
            with torch.autocast("cpu", torch.bfloat16, constants.BFLOAT16):
                if k == 1:
                    loss = cross_entropy(solver(x[rows]).float(), y[rows])
                else:
                    old_x, targets = next(past)
                    logits = solver(torch.cat([x[rows], old_x])).float()
                    current = cross_entropy(logits[:size], y[rows])
                    old = cross_entropy(logits[size:] / temperature, targets)
                    loss = r * current + (1 - r) * old
            step(loss)

        step, past = one_cycle(vae, constants), replay(old_vae, size)
        for rows in BatchSampler(RandomSampler(x, num_samples=iterations * size), size, False):
            with torch.autocast("cpu", torch.bfloat16, constants.BFLOAT16):
                if k == 1:
                    loss = negative_elbo(x[rows], vae(x[rows]), beta).mean()
                else:  # the new decoder learns what the old one decodes: replay alignment
                    old_x, old_z = next(past)
                    z_mean, z_log_var = vae.encode(x[rows])
                    z = vae.reparametrize(z_mean, z_log_var)
                    logits = vae.decode(torch.cat([z, old_z]))
                    current = negative_elbo(x[rows], (logits[:size], z_mean, z_log_var), beta)
                    old = reconstruction_error(old_x, logits[size:])
                    loss = r * current.mean() + (1 - r) * old.mean()
            step(loss)

        with torch.no_grad():
            vae.density.fit(vae.encode(x)[0], y)  # from which z will be sampled
        seen = sorted({*seen, *y.unique().tolist()})
        yield k


@torch.no_grad()
def replay(vae, size):
    """Yield minibatches of the past for ever, images and latents, generated ~2,048 at once."""
    while True:
        z = vae.sample_latents(size * max(1, 2048 // size))
        yield from zip(vae.decode(z).sigmoid().split(size), z.split(size))


@torch.no_grad()
def labelled_replay(vae, solver, seen, temperature, size):
    """Yield minibatches of the past for ever: images, and the old solver's soft targets."""
    while True:
        y = torch.tensor(seen)[torch.randint(len(seen), (size * max(1, 2048 // size),))]
        x = vae.generate(len(y), y)
        logits = solver(x).float()  # its head masks classes that it hasn't seen
        for _ in range(4):  # draw again what the old solver sees as another class
            again = (logits.argmax(1) != y).nonzero().flatten()
            if not len(again):
                break
            x[again] = vae.generate(len(again), y[again])
            logits[again] = solver(x[again]).float()
        yield from zip(x.split(size), (logits / temperature).softmax(1).split(size))


def one_cycle(model, constants):
    """Return a function that takes a step of Adam, in one cycle of the learning rate."""
    optimizer = Adam(model.parameters(), lr=constants.LEARNING_RATE, fused=True)
    schedule = OneCycleLR(
        optimizer, constants.LEARNING_RATE, total_steps=constants.ITERATIONS + 1,
        pct_start=0.15, div_factor=10, cycle_momentum=False,
    )  # fmt: skip

    def step(loss):
        """Descend the gradient of a loss, and go on in the cycle."""
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    return step


def main() -> None:
    """Learn the digits and print the accuracy on those so far after each experience."""
    constants = read_constants(GenerativeReplay, ["--dataset", "digits", *sys.argv[1:]])
    for name in UNUSED:
        if getattr(constants, name) != getattr(GenerativeReplay, name):
            raise UserError(f"{name} has no effect in this loop; GenerativeReplay.py has it")
    if len(constants.SEEDS) > 1:
        raise UserError("this loop runs once: SEEDS has to be a single one")
    if not (constants.TEMPERATURE and constants.MIXTURE_COMPONENTS):
        raise UserError("this loop has soft targets and a density; GenerativeReplay.py needs none")
    constants = setup(constants)
    images = data.load_images(constants)
    constants = data.fill_in(constants, images)
    torch.manual_seed(constants.SEEDS[0])
    benchmark = data.make_benchmark(images, constants)
    solver = GenerativeReplay.make_solver(benchmark, constants)
    vae = make_generator_strategy(benchmark, constants).model
    experiences = [experience.dataset.tensors[:2] for experience in benchmark.train_stream]
    for k in plain_dgr(solver, vae, experiences, constants):
        solver.eval()
        tests = [experience.dataset.tensors for experience in benchmark.test_stream[:k]]
        accuracies = [(solver(x).argmax(1) == y).float().mean() for x, y, _ in tests]
        print(f"experience {k}: {torch.stack(accuracies).mean():.2%}", flush=True)
        solver.train()


if __name__ == "__main__":
    run_command(main)
