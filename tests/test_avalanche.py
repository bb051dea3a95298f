"""The strategies as citizens of Avalanche, and their numbers beside those of a bare loop."""

import os
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import benchmark
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from avalanche.evaluation.metrics import (
    accuracy_metrics,
    confusion_matrix_metrics,
    loss_metrics,
)
from avalanche.logging import TextLogger
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, LwFPlugin
from test_scripts import mnist_folder, needs_mnist
from torch.utils.data import TensorDataset

import GenerativeReplay
from TrainingInstances import GenerativeReplay as GenerativeReplayStrategy
from TrainingInstances import in_memory_benchmark

CONSTANTS = benchmark.constants_for(iterations=12)
CONSTANTS.BATCH_SIZE = benchmark.BATCH = 16
CONSTANTS.DEVICE = "cpu"


@pytest.fixture
def experiences():
    return benchmark.synthetic(experiences=3, images=40)


def parameters(*models):
    return torch.cat([p.detach().flatten() for model in models for p in model.parameters()])


def test_the_same_numbers_as_a_bare_loop(experiences):
    torch.manual_seed(0)
    scholar = benchmark.ours(experiences, CONSTANTS)
    torch.manual_seed(0)
    solver, vae = benchmark.bare(experiences, CONSTANTS)
    torch.testing.assert_close(
        parameters(scholar.model, scholar.replay.generator), parameters(solver, vae)
    )


def test_the_same_numbers_through_avalanches_own_loader(experiences):
    def solver_after_first_experience(stream):
        torch.manual_seed(0)
        scholar = GenerativeReplay.make_scholar(benchmark.SHAPE, CONSTANTS)
        scholar.iterations = 7
        scholar.train(stream[0], shuffle=False)  # no draws before the generator's
        return parameters(scholar.model)

    def dataset(x, y):
        return AvalancheDataset(
            [TensorDataset(x, y)], data_attributes=[DataAttribute(y, "targets")]
        )

    fast = in_memory_benchmark(experiences, experiences).train_stream
    plain = benchmark_from_datasets(train=[dataset(*e) for e in experiences]).train_stream
    assert not hasattr(plain[0].dataset, "tensors")
    torch.testing.assert_close(
        solver_after_first_experience(fast), solver_after_first_experience(plain)
    )


def train_with(experiences, *plugins):
    """Solver's parameters, log and last results of a scholar with Avalanche's own extras."""
    stream, log = in_memory_benchmark(experiences, experiences), StringIO()
    metrics = (
        accuracy_metrics(epoch=True, stream=True),
        loss_metrics(minibatch=True),
        confusion_matrix_metrics(num_classes=10, stream=True, save_image=False),
    )
    torch.manual_seed(0)
    template = GenerativeReplay.make_scholar(benchmark.SHAPE, CONSTANTS)
    scholar = GenerativeReplayStrategy(
        model=template.model,
        optimizer=template.optimizer,
        generator_strategy=template.replay.generator_strategy,
        train_mb_size=16,
        plugins=plugins,
        evaluator=EvaluationPlugin(*metrics, loggers=[TextLogger(log)]),
    )
    for experience in stream.train_stream:
        scholar.train(experience)
        results = scholar.eval(stream.test_stream)
    return parameters(scholar.model), log.getvalue(), results


def test_loggers_and_metrics(experiences):
    _, log, results = train_with(experiences)
    assert log.count("Top1_Acc_Epoch/train_phase/train_stream/Task000 = ") == 3
    confusion = results["ConfusionMatrix_Stream/eval_phase/test_stream"]
    assert confusion.shape == (10, 10) and confusion.sum() == 120
    accuracy = results["Top1_Acc_Stream/eval_phase/test_stream/Task000"]
    assert accuracy == pytest.approx((confusion.diagonal().sum() / 120).item())


@pytest.mark.parametrize(
    ("without_effect", "plugin"),
    [
        (EWCPlugin(ewc_lambda=0.0), EWCPlugin(ewc_lambda=100.0)),
        (LwFPlugin(alpha=0.0, temperature=2.0), LwFPlugin(alpha=5.0, temperature=2.0)),
    ],
)
def test_another_plugin_has_its_say(experiences, without_effect, plugin):
    alone = train_with(experiences, without_effect)[0]
    with_plugin = train_with(experiences, plugin)[0]
    assert with_plugin.isfinite().all() and not torch.equal(alone, with_plugin)


@needs_mnist
def test_a_stock_benchmark_with_transforms_runs():
    from avalanche.benchmarks.classic import SplitMNIST
    from torchvision.transforms import RandomRotation

    stream = SplitMNIST(
        5, dataset_root=Path(os.path.abspath(mnist_folder())), train_transform=RandomRotation(5)
    ).train_stream
    scholar = GenerativeReplay.make_scholar(benchmark.SHAPE, CONSTANTS)
    scholar.iterations = scholar.replay.generator_strategy.iterations = 3
    scholar.train(stream[:2])
    assert scholar.replay.experiences_learned == 2
    seen = {*stream[0].classes_in_this_experience, *stream[1].classes_in_this_experience}
    assert set(scholar.replay.seen_classes.tolist()) == seen


def test_a_logger_of_ones_own_is_left_alone():
    scholar = SimpleNamespace(evaluator=EvaluationPlugin(loggers=[TextLogger(StringIO())]))
    GenerativeReplay.log_more(scholar, [], {"accuracy_matrix": [[1.0]]}, [])
