"""The training strategies, on Avalanche's `SupervisedTemplate`.

In:  a stream of experiences, a model with its optimizer.  Out: the model, trained along it.
`VAETraining` or `WGANTraining` trains the generator and `GenerativeReplay` the solver, both with
generative replay: `ReplayedData` extends each minibatch by the past, `ScholarTemplate` weighs
present against past.
Run: nothing; the two other scripts do.  Next to read: GenerativeReplay.py.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.nn import Module, Sequential
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import TensorDataset
from tqdm import tqdm

# Avalanche warns at import of two solvers that are only needed for GEM.
warnings.filterwarnings("ignore", message=".*QP solver.*")
warnings.filterwarnings("ignore", message="No loggers specified")
from avalanche.benchmarks import (  # noqa: E402
    CLScenario,
    benchmark_from_datasets,
    with_classes_timeline,
)
from avalanche.benchmarks.scenarios.task_aware import with_task_labels  # noqa: E402
from avalanche.benchmarks.utils import ConstantSequence, DataAttribute, TaskLabels  # noqa: E402
from avalanche.benchmarks.utils.classification_dataset import (  # noqa: E402
    TaskAwareSupervisedClassificationDataset,
)
from avalanche.training.plugins import (  # noqa: E402
    EvaluationPlugin,
    GenerativeReplayPlugin,
    LRSchedulerPlugin,
    ReplayPlugin,
    SupervisedPlugin,
)
from avalanche.training.storage_policy import ReservoirSamplingBuffer  # noqa: E402
from avalanche.training.templates import SupervisedTemplate  # noqa: E402
from avalanche.training.utils import cycle  # noqa: E402

from GenerativeModel import critic_loss, negative_elbo  # noqa: E402

# ------------------------------------------------------------------------------------------------
# Replay
# ------------------------------------------------------------------------------------------------


class ReplayedData(GenerativeReplayPlugin):
    """Extend each training minibatch by samples of the past.

    Before an experience, solver and generator are copied and frozen. In each iteration the old
    generator paints images, the old solver labels them with the classes that it has seen, and they
    are concatenated to the current minibatch (Shin et al. 2017, arXiv 1705.08690, section 3.1). A
    generator that knows its classes can label instead. After the solver's experience the generator
    learns it, by a strategy of its own.

    Avalanche's plugin is the base; what is overridden is where it departs from this: it
    back-propagates into the frozen generator, lets the solver choose among all classes, turns
    labels into floats, counts replayed samples in the training metrics, grows linearly instead of
    doubling (and not at all when `replay_size` is set), and knows no importance ratio.

    :param generator_strategy: what trains the generator, which is its `model`, by
        `train(experience)`; None if the model that is trained is the generator itself.
    :param replay_size: replayed samples added to each minibatch; None: as many as it has; 0: none.
    :param increasing_replay_size: double that amount at every further experience.
    :param ratio: importance r of the current data in [0, 1]; None: 1/k at the k-th experience.
    :param temperature: T of soft targets, by which the old solver's logits are divided before the
        softmax (Hinton et al. 2015, arXiv 1503.02531, eq. 1); None: hard labels.
    :param labels: who labels replayed images: "solver" (the old one), or "generator", which then
        draws the labels first, each class equally often, and paints what they say.
    :raises TypeError: if the generator or its strategy lacks something; the message names it.
    :raises ValueError: if the generator is to give soft targets.
    """

    def __init__(
        self,
        generator_strategy: SupervisedTemplate | None = None,
        replay_size: int | None = None,
        increasing_replay_size: bool = False,
        ratio: float | None = None,
        temperature: float | None = None,
        labels: str = "solver",
    ):
        if generator_strategy is not None:
            for what in ("model", "train(experience)"):
                if not hasattr(generator_strategy, what.split("(")[0]):
                    kind = type(generator_strategy).__name__
                    raise TypeError(f"generator_strategy is a {kind} without {what}")
            check_generator(generator_strategy.model, "generator_strategy.model", labels)
        if labels == "generator" and temperature is not None:
            raise ValueError("a generator's labels are hard: they leave no use for a temperature")
        super().__init__(generator_strategy, True, replay_size, increasing_replay_size)
        self.ratio, self.temperature, self.labels = ratio, temperature, labels
        self.old_generator = self.old_model = None
        self.targets: Tensor | None = None  # soft targets, shape (replayed samples, classes)
        self.experiences_learned = 0
        self.seen_classes: Tensor | None = None  # sorted labels, shape (number of classes,)
        self.current_size = 0  # real samples in the minibatch; those behind them are replayed

    @property
    def importance(self) -> float:
        """The r of Shin et al. 2017, eq. 1: the share of the current data in the loss."""
        return 1 / (self.experiences_learned + 1) if self.ratio is None else self.ratio

    def amount(self, minibatch_size: int) -> int:
        """Number of replayed samples for a minibatch of `minibatch_size` real ones."""
        if self.untrained_solver:
            return 0
        amount = minibatch_size if self.replay_size is None else self.replay_size
        doublings = self.experiences_learned - 1 if self.increasing_replay_size else 0
        return amount * 2**doublings

    def before_training_iteration(self, strategy: SupervisedTemplate, **kwargs):
        """Concatenate replayed images, their labels and task labels to the minibatch."""
        self.current_size = len(strategy.mb_x)
        amount = self.amount(self.current_size)
        if amount == 0:
            return
        with torch.no_grad():
            x, y = self.paint(amount, self.old_generator, self.old_model)
        x, y = x.to(strategy.device), y.to(strategy.device)
        # Only one head and no task identity: replayed samples take the task label of the first.
        task_labels = [part[:1].expand(amount, *part.shape[1:]) for part in strategy.mbatch[2:]]
        strategy.mbatch = [
            torch.cat(pair) for pair in zip(strategy.mbatch, [x, y, *task_labels], strict=True)
        ]

    def paint(self, amount: int, generator: Module, solver: Module | None) -> tuple[Tensor, Tensor]:
        """Images of what was learned, and labels for them.

        :param generator: who paints.
        :param solver: who labels, unless the generator does; None: nobody, the labels are all 0
            (for a generator that knows no classes, to learn from).
        :return: images, shape (amount, C, H, W), and class labels (int64), shape (amount,).
        """
        if self.labels == "generator":
            y = generator.draw_labels(amount)
            return generator.generate(amount, y), y
        x = generator.generate(amount)
        y = torch.zeros(amount, dtype=torch.int64) if solver is None else self.label(solver, x)
        return x, y

    def label(self, solver: Module, x: Tensor) -> Tensor:
        """Labels that a solver gives to images, among the classes seen so far.

        With a temperature, its probabilities are left in `targets`.

        :param solver: in evaluation mode.
        :param x: images, shape (batch, C, H, W).
        :return: class labels (int64), shape (batch,).
        """
        logits = solver(x.to(self.seen_classes.device))
        seen = logits[:, self.seen_classes]
        if self.temperature is not None:
            self.targets = torch.zeros_like(logits)
            self.targets[:, self.seen_classes] = (seen / self.temperature).softmax(1)
        return self.seen_classes[seen.argmax(1)]

    def after_update(self, strategy: SupervisedTemplate, **kwargs):
        """Take the replayed samples out again, so that training metrics count real ones only."""
        real = slice(self.current_size)
        strategy.mbatch = [part[real] for part in strategy.mbatch]
        output = strategy.mb_output  # one tensor, or a tuple of them (VAE)
        whole = isinstance(output, Tensor)
        strategy.mb_output = output[real] if whole else tuple(part[real] for part in output)
        strategy.loss = strategy.current_loss

    def state_dict(self) -> dict:
        """What has to survive between two experiences, the generator's part included."""
        names = "experiences_learned", "seen_classes", "untrained_solver"
        state = {name: getattr(self, name) for name in names}
        return state | ({"generator": keeper.state_dict()} if (keeper := self._keeper()) else {})

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was called."""
        if keeper := self._keeper():
            keeper.load_state_dict(state.pop("generator"))
        vars(self).update(state)

    def _keeper(self):
        """Who keeps what the generator has learned: its strategy, or the generator itself."""
        if self.model_is_generator or self.generator_strategy is None:
            return None
        strategy = self.generator_strategy
        return strategy if hasattr(strategy, "state_dict") else strategy.model

    def after_training_exp(self, strategy: SupervisedTemplate, **kwargs):
        """Note what was learned, let the generator learn it too, and let go of the old scholar."""
        super().after_training_exp(strategy, **kwargs)
        self.experiences_learned += 1
        self.old_generator = self.old_model = None
        if self.model_is_generator:
            return
        classes = set(strategy.experience.dataset.targets.uniques)
        if self.seen_classes is not None:
            classes.update(self.seen_classes.tolist())
        self.seen_classes = torch.tensor(sorted(classes), device=strategy.device)
        self.generator_strategy.train(strategy.experience, **kwargs)


class ReplayedLatents(ReplayedData):
    """Replay for a VAE that knows its classes: the new decoder learns the old one's images.

    A generator that learns its own samples like any other image copies them through its noise, and
    blurs a little more each time. Here the old latents are kept (the mixtures that they come from
    change only for a class that comes back) and only what is decoded from them is learned again:
    replay alignment, Wu et al. 2018 (arXiv 1809.02058), with the VAE's own reconstruction loss. The
    encoder follows the current experience; for replay it isn't needed any more.
    """

    codes: Tensor | None = None  # what the replayed images are decoded from, shape (amount, ...)

    def paint(self, amount: int, generator: Module, solver: None) -> tuple[Tensor, Tensor]:
        """As in the base class; leaves what the images are decoded from in `codes`."""
        self.codes = generator.draw(amount)
        y = torch.zeros(amount, dtype=torch.int64)  # for nobody: the code knows the class
        return torch.sigmoid(generator.decode(self.codes)), y

    def after_update(self, strategy: SupervisedTemplate, **kwargs):
        """Take the replayed samples out again."""
        super().after_update(strategy, **kwargs)
        self.codes = None


def check_generator(generator: object, name: str, labels: str = "solver") -> None:
    """See to it that a generator has what replay asks of it: the contract of `GenerativeModel`.

    :param name: what to call it in an error.
    :param labels: who labels what it paints, see `ReplayedData`.
    :raises TypeError: if it lacks something; the message names it.
    """
    kind = f"{name} is a {type(generator).__name__}"
    if not isinstance(generator, Module):
        raise TypeError(f"{kind}, not a torch.nn.Module: replay needs a copy of all that it is")
    if not callable(getattr(generator, "generate", None)):
        raise TypeError(f"{kind} without generate(batch_size, condition); see GenerativeModel")
    if labels == "generator" and not knows_classes(generator):
        raise TypeError(f"{kind} that knows no classes (see GenerativeModel): let the solver label")


def knows_classes(generator: Module) -> bool:
    """Whether a generator can be asked for a class, and so label what it paints."""
    return hasattr(generator, "draw_labels") and generator.classes() is not None


# ------------------------------------------------------------------------------------------------
# The strategies
# ------------------------------------------------------------------------------------------------


class EvaluationOnly(EvaluationPlugin):
    """An `EvaluationPlugin` for metrics of the evaluation alone, without the hooks of training.

    Avalanche's own copies the experience at each of the eight hooks of an iteration, which costs
    a third of a millisecond even if no metric listens. Use that one for training metrics.
    """

    def __getattribute__(self, name: str):
        if name.startswith(("before_", "after_")) and "eval" not in name:
            raise AttributeError(name)  # Avalanche skips hooks that a plugin doesn't have
        return super().__getattribute__(name)


class ScholarTemplate(SupervisedTemplate):
    """What the strategies of solver and generator share: the weighted loss and fast data loading.

    Without replay it is plain fine-tuning.

    :param replay: the plugin that extends the minibatches, or None.
    :param iterations: minibatches in an epoch, whatever the size of the dataset (as van de Ven et
        al. do); None: one pass through it, as in Avalanche.
    :param base_kwargs: as for `avalanche.training.templates.SupervisedTemplate`.
    """

    def __init__(
        self,
        *,
        replay: ReplayedData | None = None,
        iterations: int | None = None,
        plugins: Sequence | None = None,
        **base_kwargs,
    ):
        if replay and replay.generator_strategy is None:
            check_generator(base_kwargs["model"], "model", replay.labels)
        self.replay, self.iterations = replay, iterations
        super().__init__(plugins=[*(plugins or []), *([replay] if replay else [])], **base_kwargs)

    def forward(self) -> Tensor | tuple[Tensor, ...]:
        """Output of the model: without task identity, whatever task labels a benchmark brings."""
        return self.model(self.mb_x)

    def criterion(self) -> Tensor:
        """Present and past, weighted (Shin et al. 2017, eq. 1): r·L(current) + (1 - r)·L(replay).

        Each L is a mean over samples, so that r decides how much the past matters; how many samples
        stand for it only decides how noisy its gradient is.
        """
        mean_loss = self.mean_loss()
        current_size = self.replay.current_size if self.replay else len(self.mb_x)
        if self.is_eval or len(self.mb_x) == current_size:
            loss = mean_loss(slice(None))
            self.current_loss = loss.detach()
            return loss
        current, replayed = mean_loss(slice(current_size)), mean_loss(slice(current_size, None))
        self.current_loss = current.detach()
        r = self.replay.importance
        return r * current + (1 - r) * replayed

    def mean_loss(self) -> Callable[[slice], Tensor]:
        """The mean loss over a part of the minibatch, as a function of the part."""
        return lambda part: self._criterion(self.mb_output[part], self.mb_y[part])

    def make_train_dataloader(self, shuffle: bool = True, **kwargs):
        """Feed from memory where the dataset allows it, else through Avalanche's loader."""
        if hasattr(self.adapted_dataset, "tensors"):
            self.dataloader = self._tensor_loader(self.train_mb_size, shuffle)
        else:
            super().make_train_dataloader(shuffle=shuffle, **kwargs)
        if self.iterations is not None:
            self.dataloader = FixedIterations(self.dataloader, self.iterations)

    def make_eval_dataloader(self, **kwargs):
        """Feed from memory where the dataset allows it, else through Avalanche's loader."""
        if hasattr(self.adapted_dataset, "tensors"):
            self.dataloader = self._tensor_loader(self.eval_mb_size, shuffle=False)
        else:
            super().make_eval_dataloader(**kwargs)

    def _train_cleanup(self):
        super()._train_cleanup()
        # The last gradient of a unit that only one image has activated is that image, scaled.
        self.optimizer.zero_grad()

    def state_dict(self) -> dict:
        """What has to survive between two experiences: model, optimizer, counters and plugins.

        Tensors and plain values, so that `torch.load` reads it with `weights_only=True`. Plugins
        of your own that remember something have to bring these two methods as well.
        """
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "clock": dict(vars(self.clock)),
            "plugins": [plugin.state_dict() for plugin in self._stateful()],
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was called, in a strategy that was built in the same way."""
        self.model.to(self.device)
        self.make_optimizer(reset_optimizer_state=True)  # or the next train() does, and forgets
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        vars(self.clock).update(state["clock"])
        for plugin, own in zip(self._stateful(), state["plugins"], strict=True):
            plugin.load_state_dict(own)
        if self.replay and self.replay.seen_classes is not None:
            self.replay.seen_classes = self.replay.seen_classes.to(self.device)

    def _stateful(self) -> list:
        return [plugin for plugin in self.plugins if hasattr(plugin, "state_dict")]

    def _tensor_loader(self, batch_size: int, shuffle: bool) -> "TensorLoader":
        tensors = [tensor.to(self.device) for tensor in self.adapted_dataset.tensors]
        return TensorLoader(tensors, batch_size, shuffle)


class GeneratorTraining(ScholarTemplate):
    """Trains a generator along a stream, each experience with replay of its own past.

    If it knows its classes, it paints each equally often, and replayed images carry their labels.

    :param model: a `GenerativeModel`; its `forward` takes images and their class labels.
    :param criterion: (images, model output) -> loss of each image.
    :param replayed_data: the kind of replay.
    :param replay_size: see `ReplayedData`, as the next two.
    :param increasing_replay_size: ..
    :param ratio: ..
    :param evaluator: an `EvaluationPlugin`; by default one without metrics.
    :param base_kwargs: as for `ScholarTemplate` (iterations, train_mb_size, device, ...).
    """

    def __init__(
        self,
        *,
        model: Module,
        criterion: Callable,
        replayed_data: type[ReplayedData] = ReplayedData,
        replay_size: int | None = None,
        increasing_replay_size: bool = False,
        ratio: float | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] = EvaluationOnly,
        **base_kwargs,
    ):
        labels = "generator" if knows_classes(model) else "solver"
        replay = replayed_data(None, replay_size, increasing_replay_size, ratio, labels=labels)
        own = {"model": model, "criterion": criterion, "replay": replay, "evaluator": evaluator}
        super().__init__(**own, **base_kwargs)

    def forward(self) -> Tensor | tuple[Tensor, ...]:
        """Output of the model, which may read the labels."""
        return self.model(self.mb_x, self.mb_y)

    def mean_loss(self) -> Callable[[slice], Tensor]:
        """The mean loss over a part of the minibatch, as a function of the part."""
        losses = self._criterion(self.mb_x, self.mb_output)
        return lambda part: losses[part].mean()


class VAETraining(GeneratorTraining):
    """Trains a `VAE`; if it knows its classes, replay is by latents (`ReplayedLatents`).

    If it draws from mixtures, they are fitted to the encodings of each experience's images at its
    end. For the parameters see `GeneratorTraining`.
    """

    def __init__(self, *, model: Module, criterion: Callable = negative_elbo, **base_kwargs):
        self.mixtures = getattr(model, "mixtures", None)
        if knows_classes(model):
            base_kwargs["replayed_data"] = ReplayedLatents
        super().__init__(model=model, criterion=criterion, **base_kwargs)

    def forward(self) -> tuple[Tensor, ...]:
        """Output of the model; the codes of replayed images are decoded as they are."""
        codes = getattr(self.replay, "codes", None)
        if codes is None:
            return super().forward()
        current = slice(self.replay.current_size)
        return self.model(self.mb_x[current], self.mb_y[current], codes)

    def _after_training_exp(self, **kwargs):
        if self.mixtures is not None:
            self.make_eval_dataloader(**kwargs)
            with torch.no_grad():
                pairs = [
                    (self.model.encode(x.to(self.device))[0], y) for x, y, *_ in self.dataloader
                ]
            self.mixtures.fit(*map(torch.cat, zip(*pairs)))
        super()._after_training_exp(**kwargs)


class WGANTraining(GeneratorTraining):
    """Trains a `WGAN`: an objective that alternates, fitted into Avalanche's one loss and step.

    An iteration is a step of the critic; every n-th is followed by a step of the painter. One
    optimizer does for both: a parameter without gradient is left alone, with all that Adam knows
    of it. Replayed images count as real ones, with their importance (Shin et al. 2017, section 3).

    :param n_critic: steps of the critic for each of the painter (Gulrajani et al., algorithm 1).
    :param base_kwargs: as for `GeneratorTraining`; the criterion is the critic's.
    """

    def __init__(self, *, criterion: Callable = critic_loss, n_critic: int = 5, **base_kwargs):
        self.n_critic = n_critic
        super().__init__(criterion=criterion, **base_kwargs)

    def optimizer_step(self):
        """The critic's, whose gradients are there; and when it is its turn, the painter's."""
        super().optimizer_step()
        if (self.clock.train_exp_iterations + 1) % self.n_critic == 0:
            self.optimizer.zero_grad()
            loss = -self.model.critic(self.model.paint(len(self.mb_x))).mean()
            loss.backward(inputs=list(self.model.painter.parameters()))
            super().optimizer_step()


class GenerativeReplay(ScholarTemplate):
    """Deep Generative Replay: trains the solver, and after each experience the generator.

    :param generator_strategy: what trains the generator, such as `VAETraining`: anything that has
        a generator as `model` and `train(experience)`, see `GenerativeModel`.
    :param replay_size: see `ReplayedData`, as the next four.
    :param increasing_replay_size: ..
    :param ratio: ..
    :param temperature: ..
    :param labels: ..
    :param base_kwargs: as for `ScholarTemplate` (model, the solver; optimizer, iterations, device,
        ...); its criterion, by default the cross-entropy, is of the real images only if there is a
        temperature.
    """

    def __init__(
        self,
        *,
        generator_strategy: SupervisedTemplate,
        replay_size: int | None = None,
        increasing_replay_size: bool = False,
        ratio: float | None = None,
        temperature: float | None = None,
        labels: str = "solver",
        **base_kwargs,
    ):
        replay = ReplayedData(
            generator_strategy, replay_size, increasing_replay_size, ratio, temperature, labels
        )
        super().__init__(replay=replay, **base_kwargs)

    def mean_loss(self) -> Callable[[slice], Tensor]:
        """The mean loss over a part of the minibatch; over replayed samples with soft targets.

        With a temperature T that is the cross-entropy of softmax(logits / T) to the old solver's,
        without the customary factor T² (Hinton et al. 2015, section 2). That takes weight from the
        past, which was better in trials: the old solver's probabilities teach more than labels do.
        """
        hard, temperature = super().mean_loss(), self.replay.temperature

        def mean_loss(part: slice) -> Tensor:
            if temperature is None or part.start is None:  # real images
                return hard(part)
            return cross_entropy(self.mb_output[part] / temperature, self.replay.targets)

        return mean_loss


# ------------------------------------------------------------------------------------------------
# What goes along with them: plugins, loaders, a benchmark in memory
# ------------------------------------------------------------------------------------------------


class Annealing(LRSchedulerPlugin):
    """The learning rate falls to 0 over each experience, along a cosine, and then starts anew.

    SGDR (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5). The optimizer starts anew as well: the
    moments of an annealed Adam are of tiny gradients, and its first steps would be huge. They are
    let go at the end of the experience, because images can be made out in them.

    :param optimizer: the strategy's optimizer.
    :param iterations: minibatches in an experience.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, iterations: int):
        schedule = CosineAnnealingLR(optimizer, iterations)
        super().__init__(schedule, step_granularity="iteration")

    def after_training_exp(self, strategy: SupervisedTemplate, **kwargs):
        """Reset the learning rate, and forget the optimizer's moments."""
        super().after_training_exp(strategy, **kwargs)
        strategy.optimizer.state.clear()


class StoredImages(ReplayPlugin):
    """Experience replay, to compare with: extend each minibatch by as many stored real images.

    Avalanche's `ReplayPlugin` keeps them, a random sample of all that came (reservoir sampling).
    What is overridden is how they reach the minibatch: from memory, and for as many iterations as
    the strategy wants, where Avalanche's loader ends with the larger of the two data sets.

    :param mem_size: number of images to keep.
    """

    def __init__(self, mem_size: int):
        super().__init__(mem_size, storage_policy=ReservoirSamplingBuffer(mem_size))
        self.minibatches: Iterator | None = None

    def before_training_exp(self, strategy: SupervisedTemplate, **kwargs):
        """Get the images ready."""
        if len(self.storage_policy.buffer):
            tensors = [part.to(strategy.device) for part in self._stored()]
            self.minibatches = cycle(TensorLoader(tensors, strategy.train_mb_size, shuffle=True))

    def before_training_iteration(self, strategy: SupervisedTemplate, **kwargs):
        """Concatenate stored images, their labels and task labels to the minibatch."""
        if self.minibatches is not None:
            pairs = zip(strategy.mbatch, next(self.minibatches), strict=True)
            strategy.mbatch = [torch.cat(pair) for pair in pairs]

    def after_training_exp(self, strategy: SupervisedTemplate, **kwargs):
        """Let the reservoir choose among the images that it has and the new ones."""
        self.storage_policy.post_adapt(strategy, strategy.experience)

    def _stored(self) -> list[Tensor]:
        """Images, class labels and task labels."""
        x, *labels = zip(*self.storage_policy.buffer)
        return [torch.stack(x), *map(torch.tensor, labels)]

    def state_dict(self) -> dict:
        """The images and the numbers by which the reservoir decides which to keep."""
        stored = self._stored()[:2] if len(self.storage_policy.buffer) else []
        return {"stored": stored, "weights": self.storage_policy._buffer_weights}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was called."""
        if state["stored"]:
            self.storage_policy.buffer = in_memory_dataset(*state["stored"])
        self.storage_policy._buffer_weights = state["weights"]


class Progress(SupervisedPlugin):
    """Keep the loss of each training iteration, see that it is finite, and show a bar.

    :param name: what is trained.
    :param visible: whether there is a bar (on the standard error stream).
    """

    EVERY = 50  # iterations between two looks at the losses: on a GPU each look costs a wait

    def __init__(self, name: str, visible: bool = False):
        super().__init__()
        self.name, self.visible = name, visible
        self.losses: list[Tensor] = []  # for each experience: one per iteration, on the CPU
        self.current: list[Tensor] = []  # those since the last look
        self.bar: tqdm | None = None

    def before_training_exp(self, strategy: SupervisedTemplate, **kwargs):
        """Begin a new bar."""
        self.losses.append(torch.empty(0))
        self.bar = tqdm(
            total=len(strategy.dataloader) * strategy.train_epochs,
            desc=f"experience {strategy.experience.current_experience + 1}, {self.name}",
            bar_format="{desc} {percentage:3.0f}%|{bar}| {remaining} left{postfix}",
            ncols=79,
            leave=False,
            disable=not self.visible,
        )

    def after_backward(self, strategy: SupervisedTemplate, **kwargs):
        """Note the loss: of present and past, as it is minimised."""
        self.current.append(strategy.loss.detach())
        if len(self.current) == self.EVERY:
            self._look(strategy)

    def after_training_exp(self, strategy: SupervisedTemplate, **kwargs):
        """Note the last losses and take the bar away."""
        self._look(strategy)
        self.bar.close()

    def _look(self, strategy: SupervisedTemplate) -> None:
        """Keep the latest losses.

        :raises FloatingPointError: if one is infinite or not a number.
        """
        if not self.current:
            return
        latest = torch.stack(self.current).flatten().cpu()
        before, self.current = len(self.losses[-1]), []
        self.losses[-1] = torch.cat([self.losses[-1], latest])
        if not latest.isfinite().all():
            self.bar.close()
            first = before + int((~latest.isfinite()).nonzero()[0]) + 1
            raise FloatingPointError(
                f"the loss of the {self.name} is {float(latest[first - before - 1])} at experience "
                f"{strategy.experience.current_experience + 1}, iteration {first}"
            )
        self.bar.set_postfix_str(f"loss {latest.mean():.3g}", refresh=False)
        self.bar.update(len(latest))

    def state_dict(self) -> dict:
        """The losses so far."""
        return {"losses": self.losses}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was called."""
        self.losses = state["losses"]


class WhileTraining(Sequential):
    """Modules that act on the input in training mode only, such as random transforms."""

    def forward(self, x: Tensor) -> Tensor:
        """The input through the modules; in evaluation mode as it is."""
        return super().forward(x) if self.training else x


class TensorLoader:
    """Minibatches of tensors that lie in memory.

    One `index_select` per tensor and minibatch, where a data loader collects sample by sample.

    :param tensors: tensors of equal length: images, class labels, task labels.
    :param batch_size: samples in a minibatch; the last one may be shorter.
    :param shuffle: whether each pass has a new order.
    """

    def __init__(self, tensors: Sequence[Tensor], batch_size: int, shuffle: bool):
        self.tensors, self.batch_size, self.shuffle = tensors, batch_size, shuffle

    def __len__(self) -> int:
        return -(-len(self.tensors[0]) // self.batch_size)

    def __iter__(self) -> Iterator[list[Tensor]]:
        order = torch.randperm if self.shuffle else torch.arange
        indices = order(len(self.tensors[0]), device=self.tensors[0].device)
        for batch in indices.split(self.batch_size):
            yield [tensor.index_select(0, batch) for tensor in self.tensors]


class FixedIterations:
    """Exactly `iterations` minibatches, over as many passes through `loader` as that takes."""

    def __init__(self, loader: Sequence, iterations: int):
        self.loader, self.iterations = loader, iterations

    def __len__(self) -> int:
        return self.iterations

    def __iter__(self) -> Iterator[list[Tensor]]:
        return islice(cycle(self.loader), self.iterations)


def in_memory_dataset(x: Tensor, y: Tensor) -> TaskAwareSupervisedClassificationDataset:
    """Dataset of one experience, for any Avalanche benchmark, that our strategies feed from memory.

    Its `tensors` are what they look for. A subset of it, or one that a plugin has extended, doesn't
    have them any more and goes through Avalanche's own data loader. For transforms, build another
    dataset: those given to this one later have no effect.

    :param x: images in [0, 1], shape (n, C, H, W).
    :param y: class labels (int64), shape (n,).
    """
    attributes = [DataAttribute(y, "targets"), TaskLabels(ConstantSequence(0, len(y)))]
    dataset = TaskAwareSupervisedClassificationDataset(
        [TensorDataset(x, y)], data_attributes=attributes
    )
    dataset.tensors = (x, y, torch.zeros_like(y))
    return dataset


def in_memory_benchmark(
    train: Sequence[tuple[Tensor, Tensor]], test: Sequence[tuple[Tensor, Tensor]]
) -> CLScenario:
    """Avalanche benchmark from tensors, without task identity (every task label is 0).

    :param train: images and class labels of each experience, as for `in_memory_dataset`.
    :param test: the same for its test set.
    :return: a benchmark with `train_stream` and `test_stream`.
    """
    streams = {"train": train, "test": test}
    datasets = {name: [in_memory_dataset(x, y) for x, y in s] for name, s in streams.items()}
    return with_task_labels(with_classes_timeline(benchmark_from_datasets(**datasets)))
