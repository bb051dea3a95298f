"""The training strategies of the scholar, on Avalanche's `SupervisedTemplate`.

`DeepGenerativeReplayPlugin` extends each minibatch by samples of the past, `ReplayTemplate` weighs
present against past. On them stand `GenerativeReplay`, the strategy that trains the solver, and
`VAETraining` and `WGANTraining`, the strategies that train the generator.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Sequential
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

# Avalanche warns of missing QP solvers, which only GEM needs, and of evaluators without loggers.
warnings.filterwarnings("ignore", message=".*QP solver.*")
warnings.filterwarnings("ignore", message="No loggers specified")
from avalanche.benchmarks import CLScenario, benchmark_from_datasets, with_classes_timeline
from avalanche.benchmarks.scenarios.task_aware import with_task_labels
from avalanche.benchmarks.utils import ConstantSequence, DataAttribute, TaskLabels
from avalanche.benchmarks.utils.classification_dataset import (
    TaskAwareSupervisedClassificationDataset,
)
from avalanche.evaluation.metrics import loss_metrics
from avalanche.training.plugins import (
    EvaluationPlugin,
    GenerativeReplayPlugin,
    LRSchedulerPlugin,
    SupervisedPlugin,
)
from avalanche.training.templates import SupervisedTemplate
from avalanche.training.utils import load_all_dataset

from GenerativeModel import GenerativeModel, critic_loss, negative_elbo

# --- Replay ---------------------------------------------------------------------------------------


class Samples(NamedTuple):
    """Hold n generated samples of the past: the replayed part of a minibatch."""

    x: Tensor  # images in [0, 1], shape (n, C, H, W)
    y: Tensor  # class labels (int64), shape (n,)
    targets: Tensor | None = None  # soft targets, shape (n, classes)
    decoder_input: Tensor | None = None  # what the images were decoded from, shape (n, ...)


class DeepGenerativeReplayPlugin(GenerativeReplayPlugin):
    """Extend each training minibatch by generated samples of the past.

    Before an experience the base class copies solver and generator as `old_model` and
    `old_generator`. In each iteration the old generator generates images, the old solver labels
    them with the classes seen so far, and they are concatenated to the current minibatch (Shin et
    al. 2017, arXiv 1705.08690, section 3.1). Then the generator is trained on the experience.

    The base class, Avalanche's `GenerativeReplayPlugin`,

    - back-propagates through the frozen generator;
    - lets the old solver choose among all classes, by hard labels; makes task labels floats;
    - has no ratio r: by default the number of replayed samples decides the weight of the past;
    - increases that number linearly, where its docstring says double, and not at all if
      `replay_size` is set;
    - counts replayed samples in the training accuracy;
    - leaves the generator's training to `TrainGeneratorAfterExpPlugin`, which passes over the
      generator of a subclass.

    :param generator_strategy: strategy that trains the generator, with replay: it has a
        `GenerativeModel` as `model`, and `train(experience, **kwargs)`. None: the model that is
        trained is itself the generator.
    :param replay_size: replayed samples in a minibatch; None: as many as real ones; 0: none.
    :param increasing_replay_size: double that number at each experience after the second.
    :param ratio: r in [0, 1], the weight of the current data; None: 1/k at the k-th experience.
    :param temperature: T of the soft targets, softmax(logits / T) of the old solver (Hinton et al.
        2015, arXiv 1503.02531, eq. 1); None: hard labels.
    :param replay_labels: "solver": the old solver labels; "generator": a class-conditional
        generator does, by generating each learned class equally often.
    :raises TypeError: if the generator's strategy has no `GenerativeModel`, or the generator is to
        label and is unconditional.
    :raises ValueError: if the generator is to label and a temperature is given.
    """

    AHEAD = 2048  # images generated at a time, at most, unless a minibatch has more
    saved = ("experiences_learned", "seen_classes", "untrained_solver")  # in the state of a run

    def __init__(
        self,
        generator_strategy: SupervisedTemplate | None = None,
        replay_size: int | None = None,
        increasing_replay_size: bool = False,
        ratio: float | None = None,
        temperature: float | None = None,
        replay_labels: str = "solver",
    ):
        super().__init__(generator_strategy, True, replay_size, increasing_replay_size)
        self.fixed_ratio, self.temperature, self.replay_labels = ratio, temperature, replay_labels
        if generator_strategy is not None:
            model = generator_strategy.model
            if not isinstance(model, GenerativeModel):
                raise TypeError(f"{type(model).__name__} has to be a subclass of GenerativeModel")
            if replay_labels == "generator" and model.learned_classes() is None:
                raise TypeError(f"{type(model).__name__} is unconditional: let the solver label")
        if replay_labels == "generator" and temperature is not None:
            raise ValueError("a generator's labels are hard: set TEMPERATURE to none")
        if replay_labels not in ("solver", "generator"):
            raise ValueError(f"replay_labels is {replay_labels!r}, not 'solver' or 'generator'")
        self.old_generator = self.old_model = None
        self.experiences_learned = 0
        self.seen_classes: list[int] = []
        self.ahead: list[Samples] = []  # generated for minibatches to come
        self.replayed: Samples | None = None  # the replayed part of the current minibatch

    @property
    def ratio(self) -> float:
        """Return the weight r of the current data in the loss (Shin et al. 2017, eq. 1)."""
        return 1 / (self.experiences_learned + 1) if self.fixed_ratio is None else self.fixed_ratio

    def before_training_iteration(self, strategy: SupervisedTemplate, **kwargs):
        """Concatenate samples of the old scholar to the minibatch."""
        amount = len(strategy.mb_x) if self.replay_size is None else self.replay_size
        if self.untrained_solver or amount == 0:
            return
        if self.increasing_replay_size:
            amount *= 2 ** (self.experiences_learned - 1)
        if not self.ahead or len(self.ahead[0].x) != amount:
            self.generate_ahead(amount)
        self.replayed = self.ahead.pop()
        # Replayed samples take the task label of the first real one: there is only one head.
        task_labels = [part[:1].expand(amount, *part.shape[1:]) for part in strategy.mbatch[2:]]
        pairs = zip(strategy.mbatch, [self.replayed.x, self.replayed.y, *task_labels], strict=True)
        strategy.mbatch = [torch.cat([real, past.to(real.device)]) for real, past in pairs]

    @torch.no_grad()
    def generate_ahead(self, amount: int) -> None:
        """Sample for many minibatches at once, as the old scholar is the same for all of them."""
        count = amount * max(1, self.AHEAD // amount)
        samples = self.sample(count, self.old_generator, self.old_model)
        parts = (repeat(None) if part is None else part.split(amount) for part in samples)
        self.ahead = [Samples(*minibatch) for minibatch in zip(*parts)]

    def sample(self, amount: int, generator: GenerativeModel, solver: Module | None) -> Samples:
        """Generate images of the learned experiences, and label them.

        :param generator: in evaluation mode, as the solver.
        :param solver: None: unlabelled samples (label 0), for a generator to learn from.
        """
        if self.replay_labels == "generator":
            y = generator.sample_labels(amount)
            return Samples(generator.generate(amount, y), y)
        x = generator.generate(amount)
        if solver is None:
            return Samples(x, torch.zeros(amount, dtype=torch.int64))
        all_logits = solver(x)
        logits = torch.full_like(all_logits, -torch.inf)
        logits[:, self.seen_classes] = all_logits[:, self.seen_classes]
        targets = None if self.temperature is None else (logits / self.temperature).softmax(1)
        return Samples(x, logits.argmax(1), targets)

    def after_update(self, strategy: SupervisedTemplate, **kwargs):
        """Take the replayed samples out again, so that training accuracy is of real ones only."""
        if self.replayed is None:
            return
        real = slice(len(strategy.mb_x) - len(self.replayed.x))
        strategy.mbatch = [part[real] for part in strategy.mbatch]
        output = strategy.mb_output  # one tensor, or a tuple of them (VAE)
        is_tensor = isinstance(output, Tensor)
        strategy.mb_output = output[real] if is_tensor else tuple(part[real] for part in output)
        self.replayed = None

    def after_training_exp(self, strategy: SupervisedTemplate, **kwargs):
        """Train the generator on the experience too, and release the old scholar."""
        super().after_training_exp(strategy, **kwargs)
        self.experiences_learned += 1
        self.old_generator, self.old_model, self.ahead = None, None, []
        strategy.optimizer.zero_grad()  # the last gradient can show an image
        if not self.model_is_generator:
            new_classes = strategy.experience.dataset.targets.uniques
            self.seen_classes = sorted({*self.seen_classes, *map(int, new_classes)})
            self.generator_strategy.train(strategy.experience, **kwargs)


class ReplayAlignmentPlugin(DeepGenerativeReplayPlugin):
    """Align the new decoder of a class-conditional VAE with the old one, and fit its density.

    A VAE that encodes and decodes its samples like any other image blurs them a little more
    each time, by the noise of z. Here the density of the old latents is kept, and only the images
    decoded from them are learned again: replay alignment, Wu et al. 2018 (arXiv 1809.02058, section
    4.2), with the VAE's reconstruction loss. The encoder follows the current experience; replay
    doesn't need it any more.
    """

    def sample(self, amount: int, generator: GenerativeModel, solver: None) -> Samples:
        """Generate unlabelled images together with what they are decoded from."""
        decoder_input = generator.sample_decoder_input(amount)
        x = torch.sigmoid(generator.decode(decoder_input))
        y = torch.zeros(amount, dtype=torch.int64)  # unused: nothing here depends on labels
        return Samples(x, y, decoder_input=decoder_input)

    @torch.no_grad()
    def after_training_exp(self, strategy: SupervisedTemplate, **kwargs):
        """Fit the density of the latents to the experience's encodings, if there is a density."""
        model, device = strategy.model, strategy.device
        if model.density is not None:
            strategy.make_eval_dataloader(**kwargs)
            batches = [(model.encode(x.to(device))[0], y) for x, y, *_ in strategy.dataloader]
            model.density.fit(*map(torch.cat, zip(*batches)))
        super().after_training_exp(strategy, **kwargs)


# --- The strategies -------------------------------------------------------------------------------


class ReplayTemplate(SupervisedTemplate):
    """Train a model on current and replayed data, weighted (Shin et al. 2017, eq. 1).

    Without replay it is plain fine-tuning.

    :param criterion: (output, labels) -> loss of each image; cross-entropy by default.
    :param replay: plugin that extends the minibatches; None: no replay.
    :param iterations: minibatches in an epoch, whatever the size of the experience, as in van de
        Ven et al.; None: one pass through it, as in Avalanche.
    :param bfloat16: train in mixed precision: matrix products and what is computed from them in
        bfloat16, weights and cross-entropies in float32 (`torch.autocast`); None: don't.
    :param base_kwargs: as for `avalanche.training.templates.SupervisedTemplate`.
    """

    def __init__(
        self,
        *,
        criterion: Callable = partial(cross_entropy, reduction="none"),
        replay: DeepGenerativeReplayPlugin | None = None,
        iterations: int | None = None,
        bfloat16: bool | None = False,
        plugins: Sequence = (),
        **base_kwargs,
    ):
        self.replay, self.iterations, self.loss_of_each = replay, iterations, criterion
        self.bfloat16 = bool(bfloat16)
        plugins = [*plugins, *([replay] if replay else [])]
        # Avalanche's plugins, such as EWC, expect a mean; training calls the method below.
        base_kwargs["criterion"] = lambda *both: criterion(*both).mean()
        super().__init__(plugins=plugins, **base_kwargs)

    def criterion(self) -> Tensor:
        """Weigh current against replayed data: r·L(current) + (1 - r)·L(replayed), eq. 1.

        Each L is a mean over images, so that r decides how much the past matters; the number of
        replayed images only decides how noisy its gradient is.
        """
        losses, n = self.losses(), self.n_real
        if n == len(losses):
            return losses.mean()
        r = self.replay.ratio
        return r * losses[:n].mean() + (1 - r) * losses[n:].mean()

    @property
    def n_real(self) -> int:
        """Count the real images in the minibatch; those behind them are replayed."""
        replayed = self.replay.replayed if self.replay else None
        return len(self.mb_x) - (len(replayed.x) if replayed else 0)

    def losses(self) -> Tensor:
        """Compute the loss of each image in the minibatch, shape (batch,)."""
        return self.loss_of_each(self.mb_output, self.mb_y)

    def training_epoch(self, **kwargs):
        """Train on the minibatches, in bfloat16 if wanted (Kalamkar et al. 2019, 1905.12322)."""
        kind = self.device.type, torch.bfloat16, self.bfloat16
        with torch.autocast(*kind, cache_enabled=False):  # weights change within the context
            super().training_epoch(**kwargs)

    def make_train_dataloader(self, shuffle: bool = True, **kwargs):
        """Load `iterations` random minibatches; if it is None, or unshuffled, go through once."""
        data, count = self.adapted_dataset, self.iterations and self.iterations * self.train_mb_size
        rows = RandomSampler(data, num_samples=count) if shuffle else range(len(data))
        self.dataloader = self._loader(rows, self.train_mb_size)

    def make_eval_dataloader(self, **kwargs):
        """Load the data once, in order."""
        self.dataloader = self._loader(range(len(self.adapted_dataset)), self.eval_mb_size)

    def _loader(self, rows: RandomSampler | range, batch_size: int) -> DataLoader:
        data = self.adapted_dataset
        if not hasattr(data, "tensors"):  # not from in_memory_benchmark
            return DataLoader(data, batch_size, sampler=rows, collate_fn=data.collate_fn)
        tensors = TensorDataset(*(tensor.to(self.device) for tensor in data.tensors))
        # Whole minibatches are taken out of the tensors, not sample by sample.
        return DataLoader(tensors, None, sampler=BatchSampler(rows, batch_size, drop_last=False))


class GenerativeReplay(ReplayTemplate):
    """Train the solver with Deep Generative Replay.

    Its `replay`, a `DeepGenerativeReplayPlugin`, then trains the generator on each experience.
    """

    def losses(self) -> Tensor:
        """Compute the loss of each image: of replayed ones with soft targets, if there are any.

        That is the cross-entropy of softmax(logits / T) to the old solver's, without the customary
        factor T² (Hinton et al. 2015, section 2), which would give the past more weight.
        """
        losses, replayed, n = super().losses(), self.replay.replayed, self.n_real
        if replayed is None or replayed.targets is None:
            return losses
        logits = self.mb_output[n:] / self.replay.temperature
        return torch.cat([losses[:n], cross_entropy(logits, replayed.targets, reduction="none")])


class GeneratorTraining(ReplayTemplate):
    """Train a generator along a stream, each experience with replay of its past.

    A class-conditional generator replays each learned class equally often, with its label.

    :param model: a `GenerativeModel` whose `forward` takes images and their class labels.
    :param criterion: (images, output of the model) -> loss of each image.
    :param plugin: class of the replay plugin.
    :param replay_size, increasing_replay_size, ratio: as for `DeepGenerativeReplayPlugin`.
    :param base_kwargs: as for `ReplayTemplate` (optimizer, iterations, train_mb_size, ...).
    """

    def __init__(
        self,
        *,
        model: GenerativeModel,
        criterion: Callable,
        plugin: type[DeepGenerativeReplayPlugin] = DeepGenerativeReplayPlugin,
        replay_size: int | None = None,
        increasing_replay_size: bool = False,
        ratio: float | None = None,
        **base_kwargs,
    ):
        # Without a solver, replayed images of an unconditional generator stay unlabelled.
        labels = "solver" if model.learned_classes() is None else "generator"
        replay = plugin(None, replay_size, increasing_replay_size, ratio, replay_labels=labels)
        base_kwargs.setdefault("evaluator", EvaluationOnly(loss_metrics(experience=True)))
        super().__init__(model=model, criterion=criterion, replay=replay, **base_kwargs)

    def forward(self) -> Tensor | tuple[Tensor, ...]:
        """Compute the output of the model for images and their labels."""
        return self.model(self.mb_x, self.mb_y)

    def losses(self) -> Tensor:
        """Compute the loss of each image, shape (batch,)."""
        return self.loss_of_each(self.mb_x, self.mb_output)


class VAETraining(GeneratorTraining):
    """Train a `VAE`; with replay alignment, if it has a density or is a `ConditionalVAE`."""

    def __init__(self, *, model: GenerativeModel, criterion: Callable = negative_elbo, **kwargs):
        if model.learned_classes() is not None:
            kwargs.setdefault("plugin", ReplayAlignmentPlugin)
        super().__init__(model=model, criterion=criterion, **kwargs)

    def forward(self) -> tuple[Tensor, ...]:
        """Encode and decode real images; only decode what replayed ones were decoded from."""
        replayed, n = self.replay.replayed, self.n_real
        if replayed is None or replayed.decoder_input is None:
            return super().forward()
        return self.model(self.mb_x[:n], self.mb_y[:n], replayed.decoder_input)


class WGANTraining(GeneratorTraining):
    """Train a `WGAN`: two alternating objectives in Avalanche's loop of one loss and one step.

    An iteration is a step of the critic; every n-th is followed by a step of the generator. One
    optimizer serves both: Adam doesn't touch parameters without gradient, nor their moments.
    Replayed images count as real ones, weighted (Shin et al. 2017, section 3).

    :param n_critic: steps of the critic for each of the generator (Gulrajani et al., algorithm 1).
    :param base_kwargs: as for `GeneratorTraining`; the criterion is the critic's.
    """

    def __init__(self, *, criterion: Callable = critic_loss, n_critic: int = 5, **base_kwargs):
        self.n_critic = n_critic
        base_kwargs["bfloat16"] = False  # too coarse for differences of the critic's large scores
        super().__init__(criterion=criterion, **base_kwargs)

    def optimizer_step(self):
        """Step the critic and, after every `n_critic` of its steps, the generator."""
        super().optimizer_step()
        if (self.clock.train_exp_iterations + 1) % self.n_critic == 0:
            self.optimizer.zero_grad()
            loss = -self.model.critic(self.model.sample(len(self.mb_x))).mean()
            loss.backward(inputs=list(self.model.generator.parameters()))
            super().optimizer_step()


# --- Plugins that go with them --------------------------------------------------------------------


class OneCyclePlugin(LRSchedulerPlugin):
    """Raise the learning rate and anneal it to 0, in one cycle for each experience.

    Smith & Topin 2018 (arXiv 1708.07120): from a tenth up to the optimizer's learning rate within
    15 % of the iterations, then down along a cosine. Adam's first steps are as long as the learning
    rate, whatever the gradient; without the rise they destroy much of what the model has learned.
    Adam's moments are reset at the end of each experience: they are of its last small gradients,
    and training images can be recognised in them.

    :param optimizer: the strategy's optimizer.
    :param iterations: minibatches in an experience.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, iterations: int):
        schedule = OneCycleLR(
            optimizer, [group["lr"] for group in optimizer.param_groups],
            total_steps=iterations + 1, pct_start=0.15, div_factor=10, cycle_momentum=False,
        )  # fmt: skip
        super().__init__(schedule, step_granularity="iteration")

    def after_training_exp(self, strategy: SupervisedTemplate, **kwargs):
        """Reset the learning rate and the optimizer's moments."""
        super().after_training_exp(strategy, **kwargs)
        strategy.optimizer.state.clear()


class LossRecorder(SupervisedPlugin):
    """Record the loss of each training iteration of the latest experience.

    :param name: what is trained.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name, self.losses = name, torch.empty(0)

    def before_training_exp(self, strategy: SupervisedTemplate, **kwargs):
        """Make room for the losses, shape (iterations,).

        A list of as many small tensors would leave holes in memory: gigabytes with a WGAN.
        """
        count = strategy.train_epochs * len(strategy.dataloader)
        self.losses = torch.empty(count, device=strategy.device)

    def after_backward(self, strategy: SupervisedTemplate, **kwargs):
        """Record the loss, of current and replayed data, as it is minimised."""
        self.losses[strategy.clock.train_exp_iterations] = strategy.loss.detach()

    def after_training_exp(self, strategy: SupervisedTemplate, **kwargs):
        """Check the losses.

        :raises FloatingPointError: if one of them is infinite or not a number.
        """
        infinite = (~self.losses.isfinite()).nonzero()
        if len(infinite):
            first = int(infinite[0])
            raise FloatingPointError(
                f"the loss of the {self.name} is {float(self.losses[first])} at experience "
                f"{strategy.experience.current_experience + 1}, iteration {first + 1}"
            )


class EvaluationOnly(EvaluationPlugin):
    """Evaluate, and skip the hooks of a training iteration.

    Avalanche's plugin copies the experience at each of them, a third of a millisecond per iteration
    even if no metric listens. For training metrics use Avalanche's.
    """

    def skip(self, strategy: SupervisedTemplate, **kwargs):
        """Do nothing."""

    before_training_iteration = before_forward = after_forward = before_backward = skip
    after_backward = before_update = after_update = after_training_iteration = skip


class TrainOnly(Sequential):
    """Apply modules to the input in training mode only, such as random transforms."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the input through the modules; in evaluation mode unchanged."""
        return super().forward(x) if self.training else x


# --- Data in memory -------------------------------------------------------------------------------


def in_memory_benchmark(
    train: Sequence[tuple[Tensor, Tensor]], test: Sequence[tuple[Tensor, Tensor]]
) -> CLScenario:
    """Make an Avalanche benchmark from tensors, without task identity (every task label is 0).

    Our strategies feed from the `tensors` of its datasets. A subset of one, or one that a plugin
    has extended, doesn't have them any more and is loaded sample by sample.

    :param train: for each experience images in [0, 1], shape (n, C, H, W), and their class labels
        (int64), shape (n,).
    :param test: the same for its test set.
    :return: a benchmark with `train_stream` and `test_stream`.
    :raises ValueError: if pixels lie outside [0, 1].
    """
    streams = {"train": [], "test": []}
    for stream, pairs in zip(streams.values(), (train, test)):
        for x, y in pairs:
            if x.min() < 0 or x.max() > 1:
                raise ValueError(
                    f"pixels lie in [{x.min():.2f}, {x.max():.2f}] and have to lie in [0, 1]: "
                    "leave Normalize out of the transforms, solver and generator normalize"
                )
            attributes = [DataAttribute(y, "targets"), TaskLabels(ConstantSequence(0, len(y)))]
            dataset = TaskAwareSupervisedClassificationDataset(
                [TensorDataset(x, y)], data_attributes=attributes
            )
            dataset.tensors = (x, y, torch.zeros_like(y))
            stream.append(dataset)
    return with_task_labels(with_classes_timeline(benchmark_from_datasets(**streams)))


def load_in_memory(benchmark: CLScenario) -> CLScenario:
    """Load any Avalanche benchmark, such as `SplitFMNIST`, into memory, where it trains faster.

    The transforms are applied once: a random one gives each image one variant for the whole run.
    Class labels stay; task labels become 0, because there is one head.
    """
    streams = (benchmark.train_stream, benchmark.test_stream)
    return in_memory_benchmark(
        *([load_all_dataset(experience.dataset)[:2] for experience in s] for s in streams)
    )
