"""The generator of an earlier run: `python -m figures.saved_generator results/mnist-replay-...`.

It draws samples, reconstructions, and walks between classes, without training.
"""

import sys
from pathlib import Path

import torch

import GenerativeReplay
import Generator
from figures import draw, results


def main() -> None:
    """Draw saved_generator.png into each folder of a run that the command line names."""
    folders, sys.argv[1:] = sys.argv[1:], []
    for folder in map(Path, folders):
        show_saved_generator(folder)
    if not folders:
        raise results.UserError("name the folder of a run, with a state.pt in it")


def show_saved_generator(folder: Path) -> None:
    """Draw samples, reconstructions and walks of the generator in the folder of a run."""
    if not (folder / "state.pt").is_file():
        raise results.UserError(f"{str(folder)!r} is no folder of a run: it has no state.pt")
    state = results.read_state(folder / "state.pt")
    if len(state["strategies"]) == 1 and "accuracy_matrix" in state["record"]:
        raise results.UserError(f"{str(folder)!r} is a run without generator; name one of replay")
    now = Generator.read_constants(Generator, GenerativeReplay)
    here = {"DATA_DIR": now.DATA_DIR, "DEVICE": Generator.choose_device(now.DEVICE)}
    constants = now.model_copy(update=state["record"]["constants"] | here)
    images = Generator.load_images(constants)
    benchmark = Generator.make_benchmark(images, constants)
    generator = Generator.make_generator_strategy(benchmark, constants).model.to(constants.DEVICE)
    generator.load_state_dict(state["strategies"][-1]["model"])
    arrays = {"samples": generator.generate(80).unflatten(0, (-1, 20))}
    if hasattr(generator, "reconstruct"):
        labels = list(Generator.stream_names(images, constants)[1])
        x, y = Generator.first_of_each_class(benchmark, labels, constants.DEVICE)
        arrays["reconstructions"] = torch.stack([x, generator.reconstruct(x, y)])
        with torch.no_grad():  # each row of walks goes from one class to the next, in twenty steps
            ends = generator.decoder_input(generator.encode(x)[0], y)[:, None]
            share = torch.linspace(0, 1, 20, device=constants.DEVICE)[:, None]
            count = len(x) // 2
            walks = torch.lerp(ends[0::2][:count], ends[1::2], share).flatten(0, 1)
            arrays["walks"] = generator.decode(walks).sigmoid().unflatten(0, (-1, 20))
    arrays = {name: array.cpu().numpy() for name, array in arrays.items()}
    draw.save(draw.saved_generator(state["record"], arrays), folder / "saved_generator.png")
    print(f"samples, reconstructions and walks: {folder / 'saved_generator.png'}")


if __name__ == "__main__":
    results.run_command(main)
