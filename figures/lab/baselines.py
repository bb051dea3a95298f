"""The baselines that replay is compared with, as plugins of a `ReplayTemplate`."""

import math
from collections.abc import Callable

import torch
from avalanche.benchmarks import CLScenario
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor
from torch.nn import Module
from torch.utils.data import TensorDataset

from figures.lab.data import shape_and_classes, tensors_of


class JointPlugin(SupervisedPlugin):
    """Train on all experiences so far, as a reference; Avalanche calls this cumulative.

    Each minibatch has as many images as one of `replay` has current and replayed ones.

    :param replayed: (current images, experiences learned) -> replayed images in a minibatch.
    """

    def __init__(self, replayed: Callable[[int, int], int]):
        super().__init__()
        self.replayed, self.batch_size = replayed, None

    def after_train_dataset_adaptation(self, strategy: SupervisedTemplate, **kwargs):
        """Join the data of the experience and of all before it in its stream."""
        current, done = strategy.experience, strategy.clock.train_exp_counter
        so_far = current.origin_stream[: current.current_experience + 1]
        tensors = zip(*map(tensors_of, so_far))
        strategy.adapted_dataset = TensorDataset(*map(torch.cat, tensors))
        self.batch_size = self.batch_size or strategy.train_mb_size
        more = self.replayed(self.batch_size, done) if done else 0
        strategy.train_mb_size = self.batch_size + more


def images_in_memory_of(generator: Module, benchmark: CLScenario) -> int:
    """Count the images that fit into the bytes of a generator, if a pixel takes one byte.

    Its mixtures of the whole stream are counted in.
    """
    size = sum(part.nbytes for part in generator.state_dict().values())
    if density := getattr(generator, "density", None):
        latents = density.means.shape[1]
        for experience in benchmark.train_stream:
            for n in tensors_of(experience)[1].bincount().tolist():
                if n > 1:  # label and covariance; mixture, weight and mean of each Gaussian
                    size += 8 + 4 * latents**2 + density.n_gaussians(n) * (12 + 4 * latents)
    shape, _ = shape_and_classes(benchmark)
    return size // math.prod(shape)


class ExperienceReplayPlugin(SupervisedPlugin):
    """Extend each minibatch by stored real images, as many as `replay` replays, with the same r.

    They keep their labels, where replayed ones get soft targets.
    A uniform choice, as that of a reservoir: each image gets a random key, the largest are stored.
    Unlike the datasets in Avalanche's `ReplayPlugin` they are plain tensors, which the saved state
    of a run can hold.

    :param mem_size: number of images to store.
    :param replayed: (current images, experiences learned) -> replayed images in a minibatch.
    :param ratio: weight of the current data in the loss; None: 1/k at the k-th experience.
    """

    saved = ("stored", "experiences")

    def __init__(
        self, mem_size: int, replayed: Callable[[int, int], int], ratio: float | None = None
    ):
        super().__init__()
        self.mem_size, self.replayed, self.ratio = mem_size, replayed, ratio
        self.stored: list[Tensor] = []  # images, class labels, task labels, keys
        self.n_replayed = 0  # in the current minibatch
        self.experiences = 0  # that have been learned

    def before_training_iteration(self, strategy: SupervisedTemplate, **kwargs):
        """Concatenate stored images, their labels and task labels to the minibatch."""
        self.n_replayed = 0
        if self.stored:
            self.n_replayed = self.replayed(len(strategy.mb_x), self.experiences)
            rows = torch.randint(len(self.stored[0]), (self.n_replayed,))
            pairs = zip(strategy.mbatch, self.stored)
            strategy.mbatch = [torch.cat([new, old[rows].to(new.device)]) for new, old in pairs]

    def after_training_exp(self, strategy: SupervisedTemplate, **kwargs):
        """Choose among the stored images and those of the experience."""
        new = [*tensors_of(strategy.experience), torch.rand(len(strategy.experience.dataset))]
        if self.stored:
            new = [torch.cat(pair) for pair in zip(new, self.stored, strict=True)]
        chosen = new[-1].argsort(descending=True)[: self.mem_size]
        self.stored = [part[chosen] for part in new]
        self.experiences += 1
