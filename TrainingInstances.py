"""The training strategies of the scholar, on Avalanche's `SupervisedTemplate`.

`GenerativeReplay` trains the solver and `VAETraining` the generator (not to be confused with
Avalanche's of the same names). Each has a `DeepGenerativeReplayPlugin` of its own, which extends
its minibatches by samples of the past. `ReplayTemplate`, their base class, weighs current
against replayed images.

An experience: the plugin of the solver copies solver and generator (`before_training_exp`), then
the solver trains. In each iteration the plugin adds samples of the copies to the minibatch
(`before_training_iteration`), the template computes the weighted loss (`criterion`), and after the
step the plugin takes the samples out again (`after_update`). At the end it drops the copies and has
the generator trained on the experience in the same way (`after_training_exp`).

Carried to the next experience are the weights of both, the density of the latents, the classes
seen, and the number of experiences. Copies, samples, gradients and, by `OneCyclePlugin`, Adam's
moments are dropped.
"""

import copy
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR
from torch.random import fork_rng
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from figures.lab.runs import with_generator  # first: it filters two warnings of Avalanche's

# isort: split
from avalanche.evaluation.metrics import loss_metrics
from avalanche.training.plugins import GenerativeReplayPlugin, SupervisedPlugin
from avalanche.training.templates import SupervisedTemplate

from figures.lab.report import EvaluationOnly
from GenerativeModel import VAE, GenerativeModel, negative_elbo, reconstruction_error

# --- Replay ---------------------------------------------------------------------------------------


class Samples(NamedTuple):
    """Hold n generated samples of the past: the replayed part of a minibatch."""

    x: Tensor  # images in [0, 1], shape (n, C, H, W)
    y: Tensor  # class labels (int64), shape (n,)
    targets: Tensor | None = None  # soft targets, shape (n, classes), or the labels once more
    z: Tensor | None = None  # latents that the images were decoded from, shape (n, latent_size)

    def split(self, n: int) -> tuple["Samples", "Samples"]:
        """Divide the samples into the first n and the rest."""
        parts = [(None, None) if part is None else (part[:n], part[n:]) for part in self]
        return tuple(map(Samples._make, zip(*parts)))


class DeepGenerativeReplayPlugin(GenerativeReplayPlugin):
    """Extend each training minibatch by generated samples of the past.

    Before an experience the base class copies solver and generator as `old_model` and
    `old_generator`. In each iteration the old generator generates images, the old solver labels
    them with the classes seen so far, and they are concatenated to the current minibatch (Shin et
    al. 2017, arXiv 1705.08690, section 3.1). After the experience the generator is trained on it.

    The base class, Avalanche's `GenerativeReplayPlugin`,

    - back-propagates through the frozen generator;
    - lets the old solver choose among all classes, by hard labels; makes task labels floats;
    - has no ratio r: by default the number of replayed samples decides the weight of the past;
    - increases that number linearly, where its docstring says double, and not at all if
      `replay_size` is set;
    - counts replayed samples in the training accuracy;
    - leaves the generator's training to `TrainGeneratorAfterExpPlugin`, which doesn't train it if
      the plugin is a subclass.

    :param generator_strategy: strategy that trains the generator, with replay: it has a
        `GenerativeModel` as `model`, and `train(experience, **kwargs)`. None: this
        plugin is the generator's own.
    :param replay_size: replayed samples beside n current ones; 0: none; None: n for the generator,
        n·(k - 1) at the k-th experience for the solver, whose past weighs more and more (see
        `ratio`) and needs a less noisy gradient.
    :param increasing_replay_size: double it (None: n) at each experience after the second instead.
    :param ratio: r in [0, 1], the weight of the current data, in a `ReplayTemplate`; None: 1/k at
        the k-th experience.
    :param temperature: T of the soft targets, softmax(logits / T) of the old solver (Hinton et al.
        2015, arXiv 1503.02531, eq. 1), in `GenerativeReplay`; None: hard labels.
    :raises TypeError: if the generator's strategy has no `GenerativeModel`.
    """

    AHEAD = 2048  # images generated at a time, at most, unless a minibatch has more
    REDRAWS = 4  # of an image, at most, to get the class that was asked for
    # In the state of a run: figures/lab/runs.py
    saved = ("seen_classes", "experiences", "untrained_solver")

    def __init__(
        self,
        generator_strategy: SupervisedTemplate | None = None,
        replay_size: int | None = None,
        increasing_replay_size: bool = False,
        ratio: float | None = None,
        temperature: float | None = None,
    ):
        super().__init__(generator_strategy, True, replay_size, increasing_replay_size)
        if not isinstance(self.generator, GenerativeModel | None):
            kind = type(self.generator).__name__
            raise TypeError(f"{kind} has to be a subclass of GenerativeModel")
        self.model_is_generator = generator_strategy is None
        self.ratio, self.temperature = ratio, temperature
        self.seen_classes: list[int] = []
        self.experiences = 0  # that have been learned
        self.release_old_scholar()

    def release_old_scholar(self) -> None:
        """Forget the frozen copies and what they have generated."""
        self.old_generator = self.old_model = None
        self.ahead: Samples | None = None  # for minibatches to come
        self.replayed: Samples | None = None  # the replayed part of the current minibatch

    def amount(self, n_current: int, experiences: int) -> int:
        """Count the replayed samples beside n_current ones, after some experiences."""
        if self.increasing_replay_size:
            first = n_current if self.replay_size is None else self.replay_size
            return first * 2 ** (experiences - 1)
        if self.replay_size is None:
            return n_current if self.model_is_generator else n_current * experiences
        return self.replay_size

    def before_training_exp(self, strategy: SupervisedTemplate, **kwargs):
        """Drop what an interruption left, copy any old scholar, and warn of huge replay."""
        self.release_old_scholar()
        super().before_training_exp(strategy, **kwargs)
        amount = self.amount(strategy.train_mb_size, self.experiences)
        if self.experiences and amount > 4096:
            text = f"each minibatch of experience {self.experiences + 1} replays {amount} images"
            warnings.warn(text, stacklevel=2)

    def before_training_iteration(self, strategy: SupervisedTemplate, **kwargs):
        """Concatenate samples of the old scholar to the minibatch.

        :raises ValueError: if the experience begins with pixels outside of [0, 1].
        """
        if strategy.clock.train_exp_iterations == 0:
            low, high = strategy.mb_x.aminmax()
            if low < 0 or high > 1:
                text = f"pixels lie in [{low:.2f}, {high:.2f}] and have to lie in [0, 1], as "
                raise ValueError(text + "generated ones do: divide by 255, leave Normalize out")
        amount = self.amount(len(strategy.mb_x), self.experiences)
        if self.experiences == 0 or amount == 0:
            return
        if self.ahead is None or len(self.ahead.x) < amount:
            # The old scholar stays the same, so it generates for many minibatches at once.
            count = amount * max(1, self.AHEAD // amount)
            with torch.no_grad():
                self.ahead = self.sample(count, self.old_generator, self.old_model)
        self.replayed, self.ahead = self.ahead.split(amount)
        # Replayed samples take the task label of the first current one: there is only one head.
        task_labels = [part[:1].expand(amount, *part.shape[1:]) for part in strategy.mbatch[2:]]
        pairs = zip(strategy.mbatch, [self.replayed.x, self.replayed.y, *task_labels], strict=True)
        strategy.mbatch = [torch.cat([new, past.to(new.device)]) for new, past in pairs]

    def sample(self, count: int, generator: GenerativeModel, solver: Module | None) -> Samples:
        """Generate images of the learned experiences, and label them.

        A generator that can be asked for classes is asked for each with the same chance. An image
        in which the old solver sees another class is drawn again: few training images make a wide
        density, some of whose samples look like other classes. The last draw is kept, with the
        label that the old solver gives it.

        :param generator: in evaluation mode, as the solver.
        :param solver: None: unlabelled samples (label 0), for a generator to learn from.
        """
        classes = generator.learned_classes()
        asked = classes[torch.randint(len(classes), (count,))] if len(classes) else None
        x = generator.generate(count, asked)
        low, high = x.aminmax()
        if len(x) != count or low < 0 or high > 1:
            text = f"{type(generator).__name__} has generated {len(x)} images with pixels in "
            raise ValueError(f"{text}[{low:.2f}, {high:.2f}] instead of {count} in [0, 1]")
        if solver is None:
            return Samples(x, torch.zeros(count, dtype=torch.int64))
        logits = self.logits_of_seen_classes(solver, x)
        for _ in range(0 if asked is None else self.REDRAWS):
            again = (logits.argmax(1) != asked).nonzero().flatten()
            if not len(again):
                break
            x[again] = generator.generate(len(again), asked[again])
            logits[again] = self.logits_of_seen_classes(solver, x[again])
        y = logits.argmax(1)
        return Samples(x, y, (logits / self.temperature).softmax(1) if self.temperature else y)

    def logits_of_seen_classes(self, solver: Module, x: Tensor) -> Tensor:
        """Compute the old solver's logits, -∞ for new classes: Avalanche opens its head to them
        before it is copied.
        """
        all_logits = solver(x).float()
        logits = torch.full_like(all_logits, -torch.inf)
        logits[:, self.seen_classes] = all_logits[:, self.seen_classes]
        return logits

    @property
    def n_replayed(self) -> int:
        """Count the replayed samples in the current minibatch."""
        return len(self.replayed.x) if self.replayed else 0

    def after_update(self, strategy: SupervisedTemplate, **kwargs):
        """Take the replayed samples out again: training accuracy is of current ones only."""
        if self.replayed is None:
            return
        n = len(strategy.mb_x) - self.n_replayed
        strategy.mbatch = [part[:n] for part in strategy.mbatch]
        output = strategy.mb_output  # one tensor, or a tuple of them (VAE)
        is_tensor = isinstance(output, Tensor)
        strategy.mb_output = output[:n] if is_tensor else tuple(part[:n] for part in output)
        self.replayed = None

    def after_training_exp(self, strategy: SupervisedTemplate, **kwargs):
        """Release the old scholar; if this is the solver's plugin, have the generator trained."""
        self.release_old_scholar()
        strategy.optimizer.zero_grad()  # the last gradient is made of training images
        if not self.model_is_generator:
            self.generator_strategy.train(strategy.experience, **kwargs)
            new_classes = strategy.experience.dataset.targets.uniques
            self.seen_classes = sorted({*self.seen_classes, *map(int, new_classes)})
        self.experiences += 1
        super().after_training_exp(strategy, **kwargs)  # from now on there is a past to replay


class ReplayAlignmentPlugin(DeepGenerativeReplayPlugin):
    """Align the new decoder of a VAE with the old one, and fit the density of its latents.

    A VAE that encodes and decodes its samples like any other image blurs them a little more
    each time, by the noise of z. Here the density of the old latents is kept, and only the images
    decoded from them are learned again: replay alignment, Wu et al. 2018 (arXiv 1809.02058, section
    4.2), with the VAE's reconstruction loss. The encoder follows the current experience; replay
    doesn't need it any more.
    """

    def sample(self, count: int, generator: VAE, solver: None) -> Samples:
        """Generate unlabelled images together with the latents that they are decoded from."""
        z = generator.sample_latents(count)
        x = torch.sigmoid(generator.decode(z))
        return Samples(x, torch.zeros(count, dtype=torch.int64), z=z)

    @torch.no_grad()
    def after_training_exp(self, strategy: SupervisedTemplate, **kwargs):
        """Fit the density of the latents to the experience's encodings."""
        model, device = strategy.model, strategy.device
        if model.density is not None:
            strategy.make_eval_dataloader()
            batches = [(model.encode(x.to(device))[0], y) for x, y, *_ in strategy.dataloader]
            model.density.fit(*map(torch.cat, zip(*batches)))
        super().after_training_exp(strategy, **kwargs)


# --- The strategies -------------------------------------------------------------------------------


class ReplayTemplate(SupervisedTemplate):
    """Train a model on current and replayed data, weighted (Shin et al. 2017, eq. 1).

    Without replay it is plain fine-tuning. For another loss override `loss_per_image`.

    :param replay_plugin: plugin that extends the minibatches, by `n_replayed` images, once it has
        learned some `experiences`; its `ratio` is that of the loss. None: no replay.
    :param iterations: minibatches in an epoch, whatever the size of the experience, as in van de
        Ven et al.; None: one pass through it, as in Avalanche.
    :param bfloat16: train in mixed precision (Kalamkar et al. 2019, arXiv 1905.12322): matrix
        products in bfloat16, weights and cross-entropies in float32 (`torch.autocast`).
    :param base_kwargs: as for `avalanche.training.templates.SupervisedTemplate`.
    """

    def __init__(
        self,
        *,
        replay_plugin: SupervisedPlugin | None = None,
        iterations: int | None = None,
        bfloat16: bool = False,
        plugins: Sequence[SupervisedPlugin] = (),
        **base_kwargs,
    ):
        if "criterion" in base_kwargs:
            raise TypeError("instead of giving a criterion, override loss_per_image")
        self.replay_plugin, self.iterations, self.bfloat16 = replay_plugin, iterations, bfloat16
        plugins = [*plugins, *([replay_plugin] if replay_plugin else [])]
        super().__init__(plugins=plugins, **base_kwargs)

    def criterion(self) -> Tensor:
        """Weigh current against replayed data: r·L(current) + (1 - r)·L(replayed).

        Each L is a mean over images: the number of replayed ones decides how noisy the gradient of
        the past is, not how much the past matters. r = 1/k as in van de Ven & Tolias 2018.
        """
        losses, n = self.loss_per_image(), self.n_current
        if n == len(losses):
            return losses.mean()
        r = self.replay_plugin.ratio
        if r is None:
            r = 1 / (self.replay_plugin.experiences + 1)
        return r * losses[:n].mean() + (1 - r) * losses[n:].mean()

    @property
    def n_current(self) -> int:
        """Count the current images in the minibatch; the rest are replayed, or stored."""
        replaying = self.is_training and self.replay_plugin
        return len(self.mb_x) - (self.replay_plugin.n_replayed if replaying else 0)

    def loss_per_image(self) -> Tensor:
        """Compute the loss of each image in the minibatch, shape (batch,)."""
        return cross_entropy(self.mb_output.float(), self.mb_y, reduction="none")

    def train(self, experiences, eval_streams: Sequence | None = None, **kwargs) -> dict:
        """Train on experiences; undo one that is interrupted by Ctrl-C or an error.

        Adam's moments begin anew then.

        :param experiences: one, or several in order; this and the rest as in Avalanche.
        """
        experiences = [*experiences] if isinstance(experiences, Iterable) else [experiences]
        eval_streams = [experiences] if eval_streams is None else eval_streams
        strategies = with_generator(self)
        others = [vars(s).get(name) for s in strategies for name in ("replay_plugin", "clock")]
        for experience in experiences:
            models = [s.model for s in strategies]
            before = [(old, vars(new)) for old, new in zip(models, copy.deepcopy(models))]
            before += [(other, dict(vars(other))) for other in others if other]
            try:
                super().train(experience, eval_streams, **kwargs)
            except BaseException:
                for part, attributes in before:
                    vars(part).update(attributes)  # a whole model: its head may have grown
                raise
        return self.evaluator.get_last_metrics()

    def eval(self, *args, **kwargs):
        """Evaluate; the z that a VAE samples here take none of the training's random numbers."""
        with fork_rng([self.device] if self.device.type == "cuda" else []):
            return super().eval(*args, **kwargs)

    def training_epoch(self, **kwargs):
        """Train on the minibatches, in bfloat16 if wanted."""
        # No cache: the weights change within the context.
        with torch.autocast(self.device.type, torch.bfloat16, self.bfloat16, cache_enabled=False):
            super().training_epoch(**kwargs)

    def make_train_dataloader(self, shuffle: bool = True, **kwargs):
        """Load `iterations` minibatches, or go through the data once.

        :param shuffle: random order; else that of the data, from its beginning again if need be.
        :param kwargs: drop_last, num_workers, ..., as for torch's `DataLoader`.
        """
        data, count = self.adapted_dataset, self.iterations and self.iterations * self.train_mb_size
        in_order = torch.arange(count or len(data)) % len(data)
        rows = RandomSampler(data, num_samples=count) if shuffle else in_order.tolist()
        self.dataloader = self.load(rows, self.train_mb_size, **kwargs)

    def make_eval_dataloader(self, shuffle: bool = False, **kwargs):
        """Load the data once, in order; `shuffle` is ignored, as order doesn't change a mean."""
        self.dataloader = self.load(range(len(self.adapted_dataset)), self.eval_mb_size, **kwargs)

    def load(
        self, rows: Iterable[int], size: int, drop_last: bool = False, **options
    ) -> DataLoader:
        """Load minibatches of rows; only their order uses the training's random numbers."""
        data, options["generator"] = self.adapted_dataset, torch.Generator()
        if hasattr(data, "tensors"):  # whole minibatches are taken out of them, not single samples
            tensors = TensorDataset(*(tensor.to(self.device) for tensor in data.tensors))
            minibatches = BatchSampler(rows, size, drop_last)
            return DataLoader(tensors, None, sampler=minibatches, **options)
        options |= {"collate_fn": data.collate_fn, "drop_last": drop_last}
        return DataLoader(data, size, sampler=rows, **options)


class GenerativeReplay(ReplayTemplate):
    """Train the solver with Deep Generative Replay.

    Its `replay_plugin` then trains the generator on each experience.
    """

    def loss_per_image(self) -> Tensor:
        """Compute the loss of each image: of current ones with their labels, of replayed ones
        with the old solver's targets.

        With soft targets both solvers' logits are divided by T, without the customary factor T²
        (Hinton et al. 2015, section 2), which would give the past more weight.
        """
        n, plugin, logits = self.n_current, self.replay_plugin, self.mb_output.float()
        losses = cross_entropy(logits[:n], self.mb_y[:n], reduction="none")
        if n == len(self.mb_x):
            return losses
        soft_logits = logits[n:] / (plugin.temperature or 1)
        past = cross_entropy(soft_logits, plugin.replayed.targets, reduction="none")
        return torch.cat([losses, past])


class VAETraining(ReplayTemplate):
    """Train a `VAE` along a stream, each experience with replay of the earlier ones.

    :param model: the VAE.
    :param replay_plugin: a `ReplayAlignmentPlugin` if the VAE has a density.
    :param kl_weight: β of `negative_elbo`; 1 suits a VAE without density.
    :param base_kwargs: as for `ReplayTemplate` (optimizer, iterations, train_mb_size, ...).
    """

    def __init__(self, *, model: VAE, kl_weight: float = 0.07, **base_kwargs):
        self.kl_weight = kl_weight
        base_kwargs.setdefault("evaluator", EvaluationOnly(loss_metrics(experience=True)))
        super().__init__(model=model, **base_kwargs)

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Encode and decode images; of replayed ones that come with latents, decode those alone.

        :return: as `VAE.forward`, but then z_mean and z_log_var are of current images alone.
        """
        n = self.n_current
        if n == len(self.mb_x) or self.replay_plugin.replayed.z is None:
            return self.model(self.mb_x)
        z_mean, z_log_var = self.model.encode(self.mb_x[:n])
        z = torch.cat([self.model.reparametrize(z_mean, z_log_var), self.replay_plugin.replayed.z])
        return self.model.decode(z), z_mean, z_log_var

    def loss_per_image(self) -> Tensor:
        """Compute the negative ELBO of each image, or, if it was decoded from known latents, the
        reconstruction error alone.

        :return: losses, shape (batch,).
        """
        x, (logits, z_mean, z_log_var) = self.mb_x, self.mb_output
        encoded = len(z_mean)
        output = logits[:encoded], z_mean, z_log_var
        losses = negative_elbo(x[:encoded], output, self.kl_weight)
        return torch.cat([losses, reconstruction_error(x[encoded:], logits[encoded:])])


# --- Plugins that go with them --------------------------------------------------------------------


class OneCyclePlugin(SupervisedPlugin):
    """Raise the learning rate and anneal it, in one cycle for each experience.

    After Smith & Topin 2018 (arXiv 1708.07120): from a tenth up to the optimizer's learning rate
    within 15 % of the iterations, then down to almost 0, along cosines, as torch does it. Adam's
    first steps are as long as the learning rate, however small the gradient; the rise keeps them
    short. Adam's moments are reset at the end of each experience: they derive from training images.

    :param optimizer: the strategy's optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        super().__init__()
        self.rates = [group["lr"] for group in optimizer.param_groups]

    def before_training_exp(self, strategy: SupervisedTemplate, **kwargs):
        """Begin a cycle, and drop what an interruption has left."""
        strategy.optimizer.state.clear()
        iterations = strategy.train_epochs * len(strategy.dataloader)
        self.schedule = OneCycleLR(
            strategy.optimizer, self.rates, total_steps=iterations + 1,
            pct_start=0.15, div_factor=10, cycle_momentum=False,
        )  # fmt: skip

    def after_training_iteration(self, strategy: SupervisedTemplate, **kwargs):
        """Go on in the cycle; if a plugin has added minibatches, the rate stays low at its end."""
        if self.schedule.last_epoch + 1 < self.schedule.total_steps:
            self.schedule.step()

    def after_training_exp(self, strategy: SupervisedTemplate, **kwargs):
        """Reset the optimizer's moments."""
        strategy.optimizer.state.clear()


class LossRecorder(SupervisedPlugin):
    """Record the loss of each training iteration of the latest experience.

    :param name: what is trained.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name, self.losses = name, []

    def before_training_exp(self, strategy: SupervisedTemplate, **kwargs):
        """Begin anew."""
        self.losses = []

    def after_backward(self, strategy: SupervisedTemplate, **kwargs):
        """Record the loss, of current and replayed data, as it is minimised.

        :raises FloatingPointError: if it is infinite or not a number.
        """
        self.losses.append(loss := strategy.loss.item())
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss of the {self.name} is {loss} at experience "
                f"{strategy.experience.current_experience + 1}, iteration {len(self.losses)}"
            )
