"""Whatever the stream and the constants: what holds of replay, and that no image is kept."""

import copy
import gc
from types import FunctionType, ModuleType

import benchmark
import numpy as np
import pytest
import torch
from avalanche.core import SupervisedPlugin
from conftest import CONSTANTS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import GenerativeModel
import GenerativeReplay
import TrainingInstances
from figures import generators
from figures.lab.data import in_memory_benchmark
from figures.lab.runs import strategy_state, with_generator


@st.composite
def cases(draw):
    """Draw a stream of tiny images, and how a scholar is to learn it."""
    some_classes = st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True)
    experience = some_classes.map(lambda labels: labels * draw(st.integers(1, 5)))
    stream = draw(st.lists(experience, min_size=1, max_size=7))
    shape = draw(st.tuples(*[st.integers(1, 4)] * 3))
    return stream, shape, CONSTANTS.changed(
        HIDDEN_UNITS=4,
        LATENT_SIZE=2,
        NORMALIZE=False,  # there may be a single pixel
        BATCH_SIZE=draw(st.integers(1, 8)),
        ITERATIONS=draw(st.integers(1, 3)),
        ONE_CYCLE=draw(st.booleans()),
        MIXTURE_COMPONENTS=draw(st.integers(0, 2)),
        TEMPERATURE=draw(st.sampled_from([None, 2.0])),
        REPLAY_SIZE=draw(st.none() | st.integers(0, 5)),
        INCREASING_REPLAY_SIZE=draw(st.booleans()),
        RATIO=draw(st.sampled_from([None, 0, 0.5, 1])),
    )  # fmt: skip


class Witness(SupervisedPlugin):
    """Check each minibatch that a strategy learns, and note how many real images it had."""

    def __init__(self, constants):
        super().__init__()
        self.constants, self.minibatches = constants, []
        self.images = self.seen = self.frozen = None  # of this experience, set from outside

    def before_forward(self, strategy, **kwargs):
        plugin, k, n = strategy.replay_plugin, strategy.clock.train_exp_counter, strategy.n_current
        x, y, task_labels = strategy.mbatch
        self.minibatches.append(n)
        amount, doubled = self.constants.REPLAY_SIZE, self.constants.INCREASING_REPLAY_SIZE
        if amount is None:
            amount = n if plugin.model_is_generator or doubled else n * k
        assert len(x) - n == (amount * 2 ** (k - 1 if doubled else 0) if k else 0)
        assert len(x) == len(y) == len(task_labels)
        # The real images come first, unchanged, each with its label.
        rows = [(self.images[0] == image).flatten(1).all(1).nonzero().item() for image in x[:n]]
        assert y[:n].equal(self.images[1][rows])
        assert 0 <= x.min() and x.max() <= 1 and not x.requires_grad
        assert plugin.model_is_generator or set(y[n:].tolist()) <= self.seen
        for name in ("old_generator", "old_model") if k else ():
            if model := getattr(plugin, name):  # as it was before the experience
                assert not any(module.training for module in model.modules())
                state, before = model.state_dict(), self.frozen[name]
                # Avalanche has noted the new classes in the solver's head already.
                keys = [key for key in before if not key.endswith("active_units")]
                assert all(state[key].equal(before[key]) for key in keys)

    def after_training_iteration(self, strategy, **kwargs):
        n, output = self.minibatches[-1], strategy.mb_output
        output = [output] if isinstance(output, torch.Tensor) else output
        assert {len(part) for part in (*strategy.mbatch, *output)} == {n}  # of real ones only
        parts = strategy.loss, *strategy.model.parameters()
        assert all(part.isfinite().all() for part in parts)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases(), st.booleans())
def test_what_holds_of_replay_in_any_stream(case, one_pass):
    torch.manual_seed(0)
    labels, shape, constants = case
    data = [(torch.rand(len(y), *shape), torch.tensor(y)) for y in labels]
    stream, seen, sizes = in_memory_benchmark(data, data), set(), []
    scholar = GenerativeReplay.make_scholar(stream, constants)
    witnesses = Witness(constants), Witness(constants)
    for strategy, witness in zip((scholar, scholar.replay_plugin.generator_strategy), witnesses):
        strategy.plugins.append(witness)
        strategy.iterations = None if one_pass else constants.ITERATIONS
    for experience, (x, y) in zip(stream.train_stream, data):
        plugin = scholar.replay_plugin
        models = {"old_generator": plugin.generator, "old_model": scholar.model}
        frozen = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
        for witness in witnesses:
            witness.images, witness.seen, witness.frozen = (x, y), set(seen), frozen
        scholar.train(experience)
        seen |= set(y.tolist())
        assert plugin.seen_classes == sorted(seen)
        scholar.eval(stream.test_stream)
        assert set(scholar.model.eval()(x).argmax(1).tolist()) <= seen
        # Solver and generator have learned this experience once.
        parts = [len(part) for part in x.split(constants.BATCH_SIZE)]
        sizes += parts if one_pass else [constants.BATCH_SIZE] * constants.ITERATIONS
        assert witnesses[0].minibatches == witnesses[1].minibatches == sizes
    samples = plugin.generator.generate(5)
    assert samples.shape == (5, *shape) and 0 <= samples.min() and samples.max() <= 1


# ------------------------------------------------------------------------------------------------
# No image is kept
# ------------------------------------------------------------------------------------------------

SHAPE, PIXELS = (1, 5, 7), 35  # of no parameter
MODULES = TrainingInstances, GenerativeModel, generators


def inside(thing):
    """List what an object refers to: its contents, not the world (modules, others' classes)."""
    if isinstance(thing, type):
        ours = thing.__module__ in [module.__name__ for module in MODULES]
        return list(vars(thing).values()) if ours else []
    if isinstance(thing, ModuleType):
        return []
    if isinstance(thing, FunctionType):
        return [thing.__closure__, thing.__defaults__, thing.__kwdefaults__, vars(thing)]
    found = gc.get_referents(thing)
    if isinstance(thing, torch.Tensor):
        found += [thing.grad] if thing.is_leaf else [thing.grad_fn]
    if hasattr(thing, "next_functions"):  # a node of the graph of a loss
        found += [node for node, _ in thing.next_functions]
        found += [getattr(thing, key) for key in dir(thing) if key.startswith("_saved")]
    return found


def numbers_in(thing):
    """List what an object holds as tensors: itself, and the whole memory that it is a view of."""
    if isinstance(thing, torch.Tensor):
        memory = torch.empty(0, dtype=thing.dtype).set_(thing.untyped_storage())
        return [thing.detach(), memory]
    if isinstance(thing, np.ndarray) and thing.dtype.kind in "fiub":
        return [torch.tensor(thing)]
    if isinstance(thing, (list, tuple, bytes)) and thing and type(thing[0]) in (int, float):
        return [torch.tensor([value for value in thing if type(value) in (int, float)])]
    return []


def unit(rows):
    return nn.functional.normalize((rows - rows.mean(-1, keepdim=True)).double(), dim=-1)


def kept_images(carried, images):
    """List what has the shape of images, or their values somewhere, up to scale and offset."""
    images, stack, visited, found = unit(images.flatten(1)), [carried], {}, []
    while stack:
        thing = stack.pop()
        if id(thing) in visited:
            continue
        visited[id(thing)] = thing
        stack += inside(thing)
        for tensor in numbers_in(thing):
            windows = tensor.flatten().double()
            windows = (
                windows.unfold(0, PIXELS, 1) if len(windows) >= PIXELS else torch.zeros(1, PIXELS)
            )
            content = (unit(windows) @ images.T).abs().max() > 0.999
            if content or tuple(tensor.shape[-3:]) == SHAPE:
                found.append(f"{type(thing).__name__} of {tuple(tensor.shape)}")
    return found


def trained_scholar(generator="vae", **changes):
    """Return a scholar after a small stream, and the images that it was trained on."""
    torch.manual_seed(1)  # other numbers than those of the images
    stream = benchmark.synthetic(3, 20, SHAPE)
    small = {"HIDDEN_UNITS": 16, "LATENT_SIZE": 4, "ITERATIONS": 5, "BATCH_SIZE": 8} | changes
    scholar = GenerativeReplay.make_scholar(
        stream, CONSTANTS.changed(**small), make_generator=generators.GENERATORS[generator]
    )
    for experience in stream.train_stream:
        scholar.train(experience)
        scholar.eval(stream.test_stream)
    return scholar, torch.cat([e.dataset.tensors[0] for e in stream.train_stream])


def carried_over(scholar):
    """List all that is left of a run: the scholar, its state and the modules' globals."""
    strategies = with_generator(scholar)
    states = [strategy_state(strategy) for strategy in strategies]
    return [*strategies, states, *map(vars, MODULES)]


@pytest.mark.parametrize("generator", ["vae", "cvae", "wgan-gp"])
@pytest.mark.parametrize("changes", [{}, {"BATCH_SIZE": 1}])
def test_no_image_is_kept(generator, changes):
    scholar, images = trained_scholar(generator, **changes)
    assert kept_images(carried_over(scholar), images) == []


def test_without_one_cycle_images_can_be_made_out_in_adams_moments_but_nowhere_else():
    scholar, images = trained_scholar(**benchmark.PLAIN_DGR)
    assert kept_images(carried_over(scholar), images) != []
    for strategy in with_generator(scholar):
        strategy.optimizer.state.clear()
    assert kept_images(carried_over(scholar), images) == []


def test_an_image_that_is_kept_anywhere_is_found(monkeypatch):
    scholar, images = trained_scholar()
    image, row = images[33].clone(), images[33].flatten().clone()
    weight, generator_strategy = scholar.model[4].weight, scholar.replay_plugin.generator_strategy
    ways = [
        (scholar.replay_plugin, "memory", [images[33].clone()]),
        (scholar.replay_plugin, "one_pixel", image[0, 0, :1]),  # a view
        (scholar.replay_plugin.generator, "bytes", (row * 255).round().byte()),
        (generator_strategy, "part", torch.cat([torch.rand(3), row, torch.rand(9)])),
        (generator_strategy, "closure", lambda: image),
        (scholar, "numbers", row.tolist()),
        (scholar.evaluator, "array", row.numpy().copy()),
        (scholar.optimizer, "state", {weight: {"exp_avg": row.repeat(16, 1) / 10}}),
        (weight, "grad", -0.01 * row.repeat(16, 1)),
        (scholar, "loss", (row @ nn.Parameter(torch.rand(PIXELS, 2))).sum()),
        (TrainingInstances, "MEMORY", {0: image}),
    ]
    for way in ways:
        with monkeypatch.context() as patch:
            patch.setattr(*way, raising=False)
            assert kept_images(carried_over(scholar), images) != [], way
    assert kept_images(carried_over(scholar), images) == []
