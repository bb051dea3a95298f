"""The generator of an earlier run: `python -m figures.saved_generator results/mnist-replay-...`.

It draws samples, reconstructions, and walks between classes, without training.
"""

import sys
from functools import partial
from pathlib import Path

import torch

import Generator
from figures import draw
from figures.lab import data
from figures.lab.constants import UserError, read_constants, run_command
from figures.lab.runs import read_state, setup


def main() -> None:
    """Draw saved_generator.png into each folder of a run that the command line names."""
    folders = [Path(word) for word in sys.argv[1:]]
    for folder in folders:
        show_saved_generator(folder)
    if not folders:
        raise UserError("name the folder of a run, with a state.pt in it")


@torch.no_grad()
def show_saved_generator(folder: Path) -> None:
    """Draw samples, reconstructions and walks of the generator in the folder of a run."""
    if not (folder / "state.pt").is_file():
        raise UserError(f"{str(folder)!r} is no folder of a run: it has no state.pt")
    state = read_state(folder / "state.pt")
    if len(state["strategies"]) == 1 and "accuracy_matrix" in state["record"]:
        raise UserError(f"{str(folder)!r} is a run without generator; name one of replay")
    record, model = state["record"], state["strategies"][-1]["model"]
    now, saved = read_constants(Generator), record["constants"]
    known = {name: saved[name] for name in type(now).model_fields.keys() & saved.keys()}
    constants = setup(now.changed(**known | {"DATA_DIR": now.DATA_DIR, "DEVICE": now.DEVICE}))
    images = data.load_images(constants)
    if images.name != record["dataset"]:
        raise UserError(f"DATASET is {images.name} by now; the run has learned {record['dataset']}")
    torch.manual_seed(record["seed"])  # of the order of the classes
    benchmark = data.make_benchmark(images, data.shuffle_classes(constants))
    vae = Generator.make_generator_strategy(benchmark, constants).model.to(constants.DEVICE)
    if vae.state_dict().keys() != model.keys():
        raise UserError(f"{str(folder)!r} has another generator than a VAE")
    vae.load_state_dict(model)
    x = data.first_of_each_class(benchmark, record["label_order"]).to(constants.DEVICE)
    # Each row of walks goes from one class to the next, in twenty steps.
    ends, share = vae.encode(x)[0][:, None], torch.linspace(0, 1, 20)[:, None].to(x)
    walks = torch.lerp(ends[0 : len(x) // 2 * 2 : 2], ends[1::2], share)
    arrays = {
        "samples": vae.generate(80).unflatten(0, (-1, 20)),
        "reconstructions": torch.stack([x, vae.reconstruct(x)]),
        "walks": vae.decode(walks.flatten(0, 1)).sigmoid().unflatten(0, (-1, 20)),
    }
    arrays = {name: array.cpu().numpy() for name, array in arrays.items()}
    picture = folder / "saved_generator.png"
    if draw.save(partial(draw.saved_generator, arrays=arrays), [record], picture):
        print(f"samples, reconstructions and walks: {picture}")


if __name__ == "__main__":
    run_command(main)
