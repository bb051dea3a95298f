"""The strategies beside a plain loop, and beside what else there is in Avalanche."""

import re
from io import StringIO

import benchmark
import pytest
import torch
from avalanche.benchmarks import (
    benchmark_from_datasets,
    nc_benchmark,
    with_classes_timeline,
)
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from avalanche.evaluation.metrics import accuracy_metrics, confusion_matrix_metrics, loss_metrics
from avalanche.logging import TextLogger
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, LwFPlugin
from conftest import CONSTANTS, DATA_DIR, needs_mnist, run
from PIL import Image
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import Compose, Lambda, Normalize, ToTensor

import GenerativeReplay
import TrainingInstances
from figures.lab.data import load_in_memory
from figures.lab.report import EvaluationOnly

SMALL = {"HIDDEN_UNITS": 16, "ITERATIONS": 6, "BATCH_SIZE": 16}


def parameters(*models):
    return torch.cat([p.detach().flatten() for model in models for p in model.parameters()])


@pytest.mark.parametrize("changes", [{"INPUT_SHIFT": 1}, {"BFLOAT16": True}, benchmark.PLAIN])
def test_the_same_weights_as_from_a_plain_loop(changes):
    stream, constants = benchmark.synthetic(3, 40), CONSTANTS.changed(**changes | SMALL)
    torch.manual_seed(0)
    scholar = benchmark.ours(stream, constants)
    torch.manual_seed(0)
    models = benchmark.plain_loop(stream, constants)
    ours = scholar.model, scholar.replay_plugin.generator
    torch.testing.assert_close(parameters(*ours), parameters(*models))


def test_the_plain_loop_is_a_command(tmp_path):
    words = "--iterations", 20, "--n-experiences", 3, "--seeds", 3
    plain = run("figures.plain_dgr", *words, cwd=tmp_path)
    assert plain.returncode == 0 and plain.stderr == ""
    words = "--dataset", "digits", *words
    ours = run("GenerativeReplay.py", *words, cwd=tmp_path, figures=False)
    accuracies = [
        [float(number) for number in re.findall(r"experience .*?(\d+\.\d+)%", done.stdout)]
        for done in (plain, ours)
    ]
    assert len(accuracies[0]) == 3 and accuracies[0] == pytest.approx(accuracies[1], abs=1)


def stock_dataset(x, y, *_):
    return AvalancheDataset([TensorDataset(x, y)], data_attributes=[DataAttribute(y, "targets")])


def test_the_same_numbers_through_avalanches_own_dataset_without_task_labels():
    ours = benchmark.synthetic(3, 40)
    datasets = [stock_dataset(*experience.dataset.tensors) for experience in ours.train_stream]
    stock = with_classes_timeline(benchmark_from_datasets(train=datasets, test=datasets))
    trained = []
    for streams in (ours, stock):
        torch.manual_seed(0)
        scholar = GenerativeReplay.make_scholar(ours, CONSTANTS.changed(**SMALL))
        for experience in streams.train_stream:
            scholar.train(experience)
            scholar.eval(streams.test_stream)
        trained.append(parameters(scholar.model, scholar.replay_plugin.generator))
    torch.testing.assert_close(*trained)


def train_with(*plugins):
    """Return the solver's parameters, the log and the last results beside Avalanche's extras."""
    stream, constants, log = benchmark.synthetic(3, 40), CONSTANTS.changed(**SMALL), StringIO()
    metrics = (
        accuracy_metrics(epoch=True, stream=True),
        loss_metrics(minibatch=True),
        confusion_matrix_metrics(num_classes=6, stream=True, save_image=False),
    )
    torch.manual_seed(0)
    template = GenerativeReplay.make_scholar(stream, constants)
    generator_strategy = template.replay_plugin.generator_strategy
    scholar = TrainingInstances.GenerativeReplay(
        model=template.model,
        optimizer=template.optimizer,
        replay_plugin=TrainingInstances.DeepGenerativeReplayPlugin(generator_strategy),
        train_mb_size=16,
        plugins=plugins,
        evaluator=EvaluationPlugin(*metrics, loggers=[TextLogger(log)]),
    )
    for experience in stream.train_stream:
        scholar.train(experience)
        metrics = scholar.eval(stream.test_stream)
    return parameters(scholar.model), log.getvalue(), metrics


def test_loggers_and_metrics():
    _, log, results = train_with()
    assert log.count("Top1_Acc_Epoch/train_phase/train_stream/Task000 = ") == 3
    confusion = results["ConfusionMatrix_Stream/eval_phase/test_stream"]
    accuracy = results["Top1_Acc_Stream/eval_phase/test_stream/Task000"]
    assert confusion.sum() == 120 and accuracy == pytest.approx(confusion.trace().item() / 120)


@pytest.mark.parametrize(
    ("without_effect", "plugin"),
    [
        (EWCPlugin(ewc_lambda=0.0), EWCPlugin(ewc_lambda=100.0)),
        (LwFPlugin(alpha=0.0, temperature=2.0), LwFPlugin(alpha=5.0, temperature=2.0)),
    ],
)
def test_another_plugin_takes_effect_beside_replay(without_effect, plugin):
    alone, both = train_with(without_effect)[0], train_with(plugin)[0]
    assert both.isfinite().all() and not torch.equal(alone, both)


def test_a_metric_of_training_needs_avalanches_evaluator():
    stream = benchmark.synthetic(3, 40)
    scholar = GenerativeReplay.make_scholar(stream, CONSTANTS.changed(**SMALL), "naive")
    scholar.plugins.append(EvaluationOnly(accuracy_metrics(epoch=True)))
    with pytest.raises(ValueError, match="Top1_Acc_Epoch/train_phase.* needs Avalanche's Eval"):
        scholar.train(stream.train_stream[0])


class Pictures(Dataset):
    """Six pictures of each of four classes, as PIL images."""

    targets = [label for label in range(4) for _ in range(6)]

    def __getitem__(self, index):
        return Image.new("L", (8, 8), 40 * self.targets[index]), self.targets[index]

    def __len__(self):
        return len(self.targets)


def stock_benchmark(*transforms):
    transform = Compose([ToTensor(), *transforms])
    return nc_benchmark(
        Pictures(), Pictures(), 2, task_labels=True, fixed_class_order=[3, 1, 0, 2],
        train_transform=transform, eval_transform=transform,
    )  # fmt: skip


def test_any_benchmark_in_memory():
    stock = stock_benchmark(Lambda(lambda x: x + torch.rand(1) / 9))
    ours = load_in_memory(stock)
    x, y, t = ours.train_stream[1].dataset.tensors
    assert x.shape == (12, 1, 8, 8) and sorted(y.tolist()) == [0] * 6 + [2] * 6
    assert t.tolist() == [0] * 12 and stock.train_stream[1].task_label == 1
    noise = (x.flatten(1) - 40 * y[:, None] / 255).mean(1)
    assert noise.min() >= -1e-6 and len(noise.unique()) == 12  # drawn for each image, once
    scholar = GenerativeReplay.make_scholar(ours, CONSTANTS.changed(**SMALL))
    for experience in ours.train_stream:
        scholar.train(experience)
    assert scholar.replay_plugin.seen_classes == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="leave Normalize out"):
        load_in_memory(stock_benchmark(Normalize([0.5], [0.5])))
    with pytest.raises(ValueError, match="train stream, experience 1: .* is ToTensor among"):
        load_in_memory(nc_benchmark(Pictures(), Pictures(), 2, task_labels=False))
    with pytest.raises(ValueError, match="did you mean joint"):
        GenerativeReplay.make_scholar(ours, CONSTANTS, "jiont")


@needs_mnist
def test_a_stock_benchmark_with_transforms():
    from avalanche.benchmarks.classic import SplitMNIST
    from torchvision.transforms import RandomRotation

    stream = SplitMNIST(5, dataset_root=DATA_DIR, train_transform=RandomRotation(5)).train_stream
    constants = CONSTANTS.changed(MIXTURE_COMPONENTS=0, **SMALL)
    scholar = GenerativeReplay.make_scholar(benchmark.synthetic(5, 10), constants)
    scholar.train(stream[:2])
    seen = {*stream[0].classes_in_this_experience, *stream[1].classes_in_this_experience}
    assert set(scholar.replay_plugin.seen_classes) == seen
