"""The baselines that replay is compared with, as plugins of a `ReplayTemplate`."""

import math

import torch
from avalanche.benchmarks import CLScenario
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor
from torch.nn import Module
from torch.utils.data import TensorDataset

from figures.lab.data import shape_and_classes, tensors_of


class JointPlugin(SupervisedPlugin):
    """Train on all experiences so far, as a reference."""

    def after_train_dataset_adaptation(self, strategy: SupervisedTemplate, **kwargs):
        """Join the data of the experience and of all before it."""
        current = strategy.experience
        so_far = current.origin_stream[: current.current_experience + 1]
        tensors = zip(*map(tensors_of, so_far))
        strategy.adapted_dataset = TensorDataset(*map(torch.cat, tensors))


def images_in_memory_of(generator: Module, benchmark: CLScenario) -> int:
    """Count the images that fit into the bytes of a generator, if a pixel takes one byte.

    Its mixtures of the whole stream are counted in.
    """
    size = sum(part.numel() * part.element_size() for part in generator.state_dict().values())
    if getattr(generator, "density", None):
        mixtures = sum(len(e.classes_in_this_experience) for e in benchmark.train_stream)
        size += mixtures * generator.density.bytes_per_mixture
    shape, _ = shape_and_classes(benchmark)
    return size // math.prod(shape)


class ExperienceReplayPlugin(SupervisedPlugin):
    """Extend each minibatch by as many stored real images (er), all weighted alike: r = 1/2.

    A reservoir (Vitter 1985): every image gets a random key, and those with the largest are stored.
    Unlike the datasets in Avalanche's `ReplayPlugin` they are plain tensors, which the saved state
    of a run can hold.

    :param mem_size: number of images to store.
    """

    saved = ("stored",)

    def __init__(self, mem_size: int):
        super().__init__()
        self.mem_size = mem_size
        self.stored: list[Tensor] = []  # images, class labels, task labels, keys

    def before_training_iteration(self, strategy: SupervisedTemplate, **kwargs):
        """Concatenate stored images, their labels and task labels to the minibatch."""
        if self.stored:
            rows = torch.randint(len(self.stored[0]), (len(strategy.mb_x),))
            pairs = zip(strategy.mbatch, self.stored)
            strategy.mbatch = [torch.cat([new, old[rows].to(new.device)]) for new, old in pairs]

    def after_training_exp(self, strategy: SupervisedTemplate, **kwargs):
        """Choose among the stored images and those of the experience."""
        new = [*tensors_of(strategy.experience), torch.rand(len(strategy.experience.dataset))]
        if self.stored:
            new = [torch.cat(pair) for pair in zip(new, self.stored, strict=True)]
        chosen = new[-1].argsort(descending=True)[: self.mem_size]
        self.stored = [part[chosen] for part in new]
