"""Whatever the stream and the constants: what holds of replay, and that no image is kept."""

import gc
import math
from types import FunctionType, ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from avalanche.core import SupervisedPlugin
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import GenerativeModel
import GenerativeReplay
import Generator
import TrainingInstances
from TrainingInstances import VAETraining, in_memory_benchmark

CLASSES = 6


@st.composite
def cases(draw):
    """A stream of tiny images, and how a scholar is to learn it."""
    some_classes = st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=3, unique=True)
    sizes = st.integers(1, 5)  # images of a class
    return SimpleNamespace(
        stream=draw(
            st.lists(
                some_classes.flatmap(lambda cs: st.fixed_dictionaries({c: sizes for c in cs})),
                min_size=1,
                max_size=10,
            )
        ),
        shape=draw(st.tuples(*[st.integers(1, 4)] * 3)),
        batch_size=draw(st.integers(1, 8)),
        iterations=draw(st.none() | st.integers(1, 3)),
        anneal=draw(st.booleans()),
        components=draw(st.integers(0, 2)),
        temperature=draw(st.sampled_from([None, 2.0])),
        replay={
            "replay_size": draw(st.none() | st.integers(0, 5)),
            "increasing_replay_size": draw(st.booleans()),
            "ratio": draw(st.sampled_from([None, 0, 0.5, 1])),
        },
    )


def documented_amount(case, k, minibatch_size):
    """Replayed samples in a minibatch of the k-th experience (from 1), by the README's table."""
    if k == 1:
        return 0
    size = case.replay["replay_size"]
    amount = minibatch_size if size is None else size
    return amount * 2 ** (k - 2) if case.replay["increasing_replay_size"] else amount


def documented_minibatches(case, images):
    """Real images in each minibatch of an experience with so many."""
    rest = [images % case.batch_size] if images % case.batch_size else []
    one_pass = [case.batch_size] * (images // case.batch_size) + rest
    count = case.iterations or len(one_pass)
    return (one_pass * count)[:count]


class Witness(SupervisedPlugin):
    """Checks each minibatch that a strategy learns, and notes how many real images it had."""

    def __init__(self, case):
        super().__init__()
        self.case, self.minibatches = case, {}
        self.images = self.seen = self.frozen = None  # of this experience, set from outside

    def before_forward(self, strategy, **kwargs):
        replay, k = strategy.replay, strategy.experience.current_experience + 1
        n, (x, y, task) = replay.current_size, strategy.mbatch
        self.minibatches.setdefault(k, []).append(n)
        assert len(x) - n == documented_amount(self.case, k, n)
        assert len(x) == len(y) == len(task)
        # The current samples come first, unchanged, each with its label.
        rows = [(self.images[0] == image).flatten(1).all(1).nonzero().item() for image in x[:n]]
        assert len(set(rows)) == n and torch.equal(y[:n], self.images[1][rows])
        assert 0 <= x.min() and x.max() <= 1 and not x.requires_grad
        if not replay.model_is_generator:
            assert set(y[n:].tolist()) <= self.seen
        if k > 1:  # replay is by the scholar as it was before the experience
            old = {"generator": replay.old_generator, "solver": replay.old_model}
            for name in ("generator",) if replay.model_is_generator else ("generator", "solver"):
                assert not any(module.training for module in old[name].modules())
                for key, value in old[name].state_dict().items():
                    assert torch.equal(value, self.frozen[name][key])

    def before_backward(self, strategy, **kwargs):
        assert torch.isfinite(strategy.loss)

    def after_training_iteration(self, strategy, **kwargs):
        n, output = strategy.replay.current_size, strategy.mb_output
        output = [output] if isinstance(output, torch.Tensor) else output
        assert {len(part) for part in (*strategy.mbatch, *output)} == {n}  # of real ones only
        assert torch.isfinite(strategy.loss)
        for parameter in strategy.model.parameters():
            assert torch.isfinite(parameter).all()


def tiny_scholar(case):
    """A scholar for a case, and the witnesses of its solver and its generator."""
    witnesses = Witness(case), Witness(case)
    solver = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(case.shape), CLASSES))
    mixtures = None
    if case.components:
        mixtures = GenerativeModel.LatentMixtures(CLASSES, case.components, latent_size=2)
    vae = GenerativeModel.VAE(case.shape, hidden_units=4, latent_size=2, mixtures=mixtures)

    def common(model, witness):
        constants = SimpleNamespace(
            LEARNING_RATE=0.01,
            ITERATIONS=case.iterations or 1,
            BATCH_SIZE=case.batch_size,
            ANNEAL=case.anneal and case.iterations,
            DEVICE="cpu",
        )
        arguments = Generator.strategy_arguments("model", model, constants)
        arguments["plugins"].append(witness)
        return arguments | {"iterations": case.iterations} | case.replay

    scholar = TrainingInstances.GenerativeReplay(
        generator_strategy=VAETraining(**common(vae, witnesses[1])),
        temperature=case.temperature,
        evaluator=TrainingInstances.EvaluationOnly(),
        **common(solver, witnesses[0]),
    )
    return scholar, witnesses


@settings(max_examples=50, deadline=None, derandomize=True)
@given(cases())
def test_replay_is_what_it_has_to_be(case):
    torch.manual_seed(0)
    labels = [
        torch.tensor([c for c, count in experience.items() for _ in range(count)])
        for experience in case.stream
    ]
    data = [(torch.rand(len(y), *case.shape, dtype=torch.float64).float(), y) for y in labels]
    scholar, witnesses = tiny_scholar(case)
    replays = scholar.replay, scholar.replay.generator_strategy.replay
    seen = set()
    stream = in_memory_benchmark(data, data).train_stream
    for k, (experience, images) in enumerate(zip(stream, data, strict=True), 1):
        models = {"generator": scholar.replay.generator, "solver": scholar.model}
        frozen = {
            name: {key: value.clone() for key, value in model.state_dict().items()}
            for name, model in models.items()
        }
        for witness in witnesses:
            witness.images, witness.seen, witness.frozen = images, set(seen), frozen
        scholar.train(experience)
        seen |= set(case.stream[k - 1])
        for replay in replays:
            assert replay.experiences_learned == k
            assert replay.old_generator is None and replay.old_model is None
        assert scholar.replay.seen_classes.tolist() == sorted(seen)
        # Solver and generator have learned this experience once, and no other.
        for witness in witnesses:
            assert witness.minibatches.keys() == set(range(1, k + 1))
            assert witness.minibatches[k] == documented_minibatches(case, len(images[1]))
    painted = scholar.replay.generator.generate(5)
    assert painted.shape == (5, *case.shape) and 0 <= painted.min() and painted.max() <= 1
    scholar.eval(stream)


SHAPE, PIXELS = (1, 5, 7), 35  # of no parameter


def inside(thing):
    """What an object refers to: its contents, not the world (modules, others' classes, globals)."""
    if isinstance(thing, type):
        ours = thing.__module__ in ("TrainingInstances", "GenerativeModel")
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


def kept_images(carried, images):
    """Where something that is carried over holds an image of those, or may hold one.

    That is: any tensor or array of the shape of images, and any whose values, or those of the
    memory that it is a view of, are an image somewhere, up to scale and offset.
    """
    images = nn.functional.normalize((images - images.mean((1, 2, 3), True)).flatten(1).double())
    stack, visited, found = [carried], {}, []
    while stack:
        thing = stack.pop()
        if id(thing) in visited:
            continue
        visited[id(thing)] = thing
        stack += inside(thing)
        if isinstance(thing, np.ndarray) and thing.dtype.kind in "fiub":
            tensors = [torch.tensor(thing)]
        elif isinstance(thing, torch.Tensor):
            whole = torch.empty(0, dtype=thing.dtype).set_(thing.untyped_storage())
            tensors = [thing.detach(), whole]
        elif isinstance(thing, (list, tuple)) and thing and type(thing[0]) in (int, float):
            tensors = [torch.tensor([v for v in thing if type(v) in (int, float)])]
        elif isinstance(thing, (bytes, bytearray)):
            tensors = [torch.tensor(list(thing))]
        else:
            continue
        if tuple(tensors[0].shape[-3:]) == SHAPE:
            found.append(f"shape {tuple(tensors[0].shape)}")
        for tensor in tensors:
            if tensor.numel() >= PIXELS:
                windows = tensor.flatten().double().unfold(0, PIXELS, 1)
                windows = nn.functional.normalize(windows - windows.mean(1, True))
                if (windows @ images.T).abs().max() > 0.999:
                    found.append(f"content, in a tensor of {tuple(tensors[0].shape)}")
    return found


def trained_scholar(**changes):
    """The experiment's scholar after a small stream, and the images that it was trained on."""
    torch.manual_seed(0)
    names = {**vars(Generator), **vars(GenerativeReplay)}
    small = {"DEVICE": "cpu", "HIDDEN_UNITS": 16, "LATENT_SIZE": 4, "ITERATIONS": 5}
    rules = {**Generator.RULES, **GenerativeReplay.RULES}
    constants = SimpleNamespace(**{name: names[name] for name in rules} | small | changes)
    scholar = GenerativeReplay.make_scholar(SHAPE, constants)
    y = torch.arange(6).repeat_interleave(10)
    x = torch.rand(len(y), *SHAPE)
    data = [(x[i : i + 20], y[i : i + 20]) for i in (0, 20, 40)]
    benchmark = in_memory_benchmark(data, data)
    for experience in benchmark.train_stream:
        scholar.train(experience)
        scholar.eval(benchmark.test_stream)
    return scholar, x


def carried_over(scholar):
    """All that is left of a run: the scholar, the state of its parts, and the modules' globals."""
    strategies = scholar, scholar.replay.generator_strategy
    states = [part.state_dict() for s in strategies for part in (s.model, s.optimizer)]
    return [*strategies, states, vars(TrainingInstances), vars(GenerativeModel)]


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("components", [10, 0])
def test_no_image_is_kept(components, batch_size):
    scholar, images = trained_scholar(MIXTURE_COMPONENTS=components, BATCH_SIZE=batch_size)
    assert kept_images(carried_over(scholar), images) == []


def test_without_annealing_images_can_be_made_out_in_adams_moments_but_nowhere_else():
    scholar, images = trained_scholar(BATCH_SIZE=8, **GenerativeReplay.PLAIN)
    assert kept_images(carried_over(scholar), images) != []
    for strategy in (scholar, scholar.replay.generator_strategy):
        strategy.optimizer.state.clear()
    assert kept_images(carried_over(scholar), images) == []


def in_a_closure(scholar, image):
    scholar.remember = lambda: image


def in_the_graph_of_a_loss(scholar, image):
    weight = nn.Parameter(torch.rand(PIXELS, 2))
    scholar.loss = (image.reshape(1, PIXELS) @ weight).sum()


WAYS_TO_KEEP_AN_IMAGE = {
    "attribute of a plugin": lambda s, image: setattr(s.replay, "memory", [image.clone()]),
    "one pixel of it": lambda s, image: setattr(s.replay, "pixel", image[0, 0, :1]),
    "buffer, as bytes": lambda s, image: s.replay.generator.register_buffer(
        "b", (image.flatten() * 255).round().byte()
    ),
    "part of a larger tensor": lambda s, image: setattr(
        s.replay.generator_strategy, "t", torch.cat([torch.rand(3), image.flatten(), torch.rand(9)])
    ),
    "list of numbers": lambda s, image: setattr(s, "numbers", image.flatten().tolist()),
    "array": lambda s, image: setattr(s.evaluator, "array", image.numpy().copy()),
    "gradient": lambda s, image: setattr(
        s.model[3].weight, "grad", -0.01 * image.flatten().repeat(16, 1)
    ),
    "moment of Adam": lambda s, image: s.optimizer.state.update(
        {s.model[3].weight: {"exp_avg": image.flatten().repeat(16, 1) / 10}}
    ),
    "closure": in_a_closure,
    "graph of a loss": in_the_graph_of_a_loss,
    "global variable": lambda s, image: setattr(TrainingInstances, "MEMORY", {0: image.clone()}),
}


@pytest.mark.parametrize("way", WAYS_TO_KEEP_AN_IMAGE)
def test_an_image_that_is_kept_is_found(way, monkeypatch):
    monkeypatch.setattr(TrainingInstances, "MEMORY", None, raising=False)
    scholar, images = trained_scholar(BATCH_SIZE=8)
    image = images[33].clone()
    WAYS_TO_KEEP_AN_IMAGE[way](scholar, image)
    del image
    assert kept_images(carried_over(scholar), images) != []
