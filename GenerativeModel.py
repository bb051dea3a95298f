"""The generative model of the scholar: a variational autoencoder (VAE), and two others.

In:  images in [0, 1], any shape (channels, height, width).  Out: new images like them.
`GenerativeModel` is the contract that any generator meets, `VAE` the one that we use,
`LatentMixtures` what it may draw its latents from, and `negative_elbo` its loss.
`ConditionalVAE` is told the class, `WGAN` (its loss: `critic_loss`) isn't trained by one loss.
Run: nothing; `python Generator.py` trains and shows it.  Next to read: Generator.py.
"""

import math
import warnings
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, MultivariateNormal
from torch.nn import functional as F


class GenerativeModel(nn.Module, ABC):
    """What any generator has to offer so that a scholar can replay with it.

    - `generate` paints images of the distribution that was learned so far. Replay calls it (of a
      VAE that knows its classes also `draw` and `decode`) on a frozen copy: it must not track
      gradients, not depend on the training mode nor change it, and return float images in [0, 1].
    - `classes` says which classes `generate` can be asked for. A generator that knows them can
      label what it paints; else the old solver does.
    - All that has to survive from one experience to the next lives in the module's parameters and
      buffers. The copy that replays is a `deepcopy`, and no training sample may be kept.

    A generator is trained by a strategy that has it as `model`, with `train(experience)`. If one
    loss trains it, that is `GeneratorTraining` in TrainingInstances.py, for which the generator
    needs a `forward` from images and labels to what its loss is computed from.
    """

    @abstractmethod
    def generate(self, batch_size: int | None = None, condition: Tensor | None = None) -> Tensor:
        """Sample new images, with the signature of `avalanche.models.Generator.generate`.

        :param batch_size: number of images, or None for a single one.
        :param condition: class labels (int64), shape (batch_size,), for those that know classes;
            None: any of what was learned.
        :return: images in [0, 1], shape (batch_size, C, H, W), or (C, H, W) without a batch size.
        """

    def classes(self) -> Tensor | None:
        """Labels (int64) of the classes learned so far, shape (n,); None: it knows no classes."""
        return None

    def draw_labels(self, count: int) -> Tensor:
        """Random class labels (int64), shape (count,): each class learned equally often."""
        classes = self.classes()
        return classes[torch.randint(len(classes), (count,), device=classes.device)]


class LatentMixtures(nn.Module):
    """A mixture of Gaussians with full covariances over the latents of each class.

    A VAE's encodings don't fill the prior N(0, I): many latents drawn from it lie where the decoder
    has learned nothing, and some classes come far too rarely. A density that is fitted to the
    encodings after training repairs both (ex-post density estimation, Ghosh et al. 2020, arXiv
    1903.12436, section 4). It is per class, so that all classes are replayed equally often.

    :param classes: how many classes there are to be.
    :param components: Gaussians for each class.
    :param latent_size: dimensions of the latent variable.
    """

    def __init__(self, classes: int, components: int, latent_size: int):
        super().__init__()
        self.register_buffer("fitted", torch.zeros(classes, dtype=torch.bool))
        # Until a class is fitted, its mixture is the prior itself.
        self.register_buffer("weights", torch.eye(components)[:1].repeat(classes, 1))
        self.register_buffer("means", torch.zeros(classes, components, latent_size))
        identity = torch.eye(latent_size).repeat(classes, components, 1, 1)
        self.register_buffer("scales", identity)  # Cholesky factors of the covariances

    def fit(self, z: Tensor, y: Tensor) -> None:
        """Fit the mixtures of the classes in y by expectation maximisation; the others stay.

        A class that comes back gets a mixture of what it was and what it is now, with at least half
        of it for what it was. A small class gets fewer components, so that there are a hundred
        encodings for each on average; a class of one image gets none, and is not drawn.

        :param z: encodings, shape (n, latent_size).
        :param y: their class labels (int64), shape (n,).
        """
        from sklearn.mixture import GaussianMixture

        for label in y.unique().tolist():
            own = z[y == label]
            if self.fitted[label]:
                count = max(len(own), 100 * self.weights.shape[1])
                old = self.sample(count, torch.full((count,), label, device=z.device))
                own = torch.cat([own, old])
            own = own.cpu().double().numpy()
            if len(own) < 2:
                continue
            count = min(self.weights.shape[1], max(1, len(own) // 100))
            seed = int(torch.randint(2**31, ()))
            mixture = GaussianMixture(count, reg_covar=1e-3, max_iter=50, random_state=seed)
            with warnings.catch_warnings():  # fifty steps are enough, converged or not
                warnings.simplefilter("ignore", category=UserWarning)
                mixture.fit(own)
            self.fitted[label] = True
            self.weights[label] = 0
            self.weights[label, :count] = torch.tensor(mixture.weights_)
            self.means[label, :count] = torch.tensor(mixture.means_)
            covariances = torch.tensor(mixture.covariances_)
            self.scales[label, :count] = torch.linalg.cholesky(covariances).to(self.scales)

    def sample(self, count: int, y: Tensor | None = None) -> Tensor:
        """Draw latents of given classes, or of all fitted ones, each equally often.

        :param count: number of latents.
        :param y: class labels (int64), shape (count,), or None.
        :return: latents, shape (count, latent_size).
        """
        if y is None:
            share = self.fitted.float() + ~self.fitted.any()  # all, as long as none is fitted
            y = Categorical(share, validate_args=False).sample((count,))
        component = Categorical(self.weights[y], validate_args=False).sample()
        mean, scale = self.means[y, component], self.scales[y, component]
        return MultivariateNormal(mean, scale_tril=scale, validate_args=False).sample()


class VAE(GenerativeModel):
    """A fully connected, symmetric variational autoencoder (Kingma & Welling 2014, 2019).

    Encoder q(z|x) and decoder p(x|z) have two hidden ReLU layers each, as many as the solver has;
    this is also the generator of van de Ven et al. (2018, arXiv 1809.10635, section 4.2).

    :param shape: shape of one image, (channels, height, width).
    :param hidden_units: units in each hidden layer.
    :param latent_size: dimensions of the latent variable z.
    :param mixtures: what to draw z from once it is fitted; None: always the prior N(0, I).
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        hidden_units: int = 400,
        latent_size: int = 32,
        mixtures: LatentMixtures | None = None,
    ):
        super().__init__()
        self.shape, self.latent_size, self.mixtures = tuple(shape), latent_size, mixtures
        pixels = math.prod(shape)
        self.encoder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(pixels, hidden_units), nn.ReLU(),
            nn.Linear(hidden_units, hidden_units), nn.ReLU(),
        )  # fmt: skip
        self.z_mean = nn.Linear(hidden_units, latent_size)
        self.z_log_var = nn.Linear(hidden_units, latent_size)
        self.decoder = nn.Sequential(
            nn.Linear(latent_size, hidden_units), nn.ReLU(),
            nn.Linear(hidden_units, hidden_units), nn.ReLU(),
            nn.Linear(hidden_units, pixels),
            nn.Unflatten(1, self.shape),
        )  # fmt: skip

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters of q(z|x) = N(z; z_mean, σ²), with σ = exp(½·z_log_var).

        :param x: images in [0, 1], shape (batch, C, H, W).
        :return: z_mean and z_log_var, each of shape (batch, latent_size).
        """
        hidden = self.encoder(x)
        return self.z_mean(hidden), self.z_log_var(hidden)

    def decode(self, z: Tensor) -> Tensor:
        """Logits of the pixels' Bernoulli distributions p(x|z); their sigmoid is the image.

        :param z: latent variables, shape (batch, latent_size).
        :return: logits, shape (batch, C, H, W).
        """
        return self.decoder(z)

    @staticmethod
    def reparametrize(z_mean: Tensor, z_log_var: Tensor) -> Tensor:
        """Draw z = z_mean + σ·ε with ε ~ N(0, I) (Kingma & Welling 2014, section 2.4).

        The randomness enters from outside, through ε, so that the gradient reaches z_mean and
        z_log_var along differentiable operations.
        """
        return z_mean + torch.exp(0.5 * z_log_var) * torch.randn_like(z_mean)

    def code(self, z: Tensor, y: Tensor | None) -> Tensor:
        """What is decoded: here z itself, whatever the class.

        :param z: latent variables, shape (batch, latent_size).
        :param y: class labels (int64), shape (batch,); only a `ConditionalVAE` needs them.
        """
        return z

    def forward(
        self, x: Tensor, y: Tensor | None = None, codes: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One pass through the computational graph: encode, draw z, decode.

        :param x: images in [0, 1], shape (batch, C, H, W).
        :param y: their class labels, see `code`.
        :param codes: what `draw` has drawn, m of them, to decode behind those of the images.
        :return: logits (batch + m, C, H, W), z_mean and z_log_var (batch + m, latent_size): the
            arguments of `negative_elbo`. The codes that were given count as drawn from the
            prior itself (mean 0, variance 1), without a divergence from it.
        """
        z_mean, z_log_var = self.encode(x)
        code = self.code(self.reparametrize(z_mean, z_log_var), y)
        if codes is not None:
            code, m = torch.cat([code, codes]), len(codes)
            z_mean, z_log_var = (F.pad(part, (0, 0, 0, m)) for part in (z_mean, z_log_var))
        return self.decode(code), z_mean, z_log_var

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Encode images and decode the mean of q(z|x), without noise.

        :param x: images in [0, 1], shape (batch, C, H, W).
        :param y: their class labels, see `code`.
        :return: images in [0, 1], same shape.
        """
        return torch.sigmoid(self.decode(self.code(self.encode(x)[0], y)))

    def classes(self) -> Tensor | None:
        """Those that have a mixture; see the base class."""
        return None if self.mixtures is None else self.mixtures.fitted.nonzero().flatten()

    @torch.no_grad()
    def draw(self, count: int, condition: Tensor | None = None) -> Tensor:
        """Draw codes to decode: from the mixtures if there are any, else from the prior N(0, I).

        :param count: number of codes.
        :param condition: class labels (int64) to draw for, shape (count,); None: any.
        :return: codes, shape (count, latent_size).
        :raises ValueError: if a condition is given to a VAE without mixtures.
        """
        if self.mixtures is not None:
            return self.mixtures.sample(count, condition)
        if condition is not None:
            raise ValueError("VAE: without mixtures it knows no classes, leave condition at None")
        return torch.randn(count, self.latent_size, device=self.z_mean.weight.device)

    @torch.no_grad()
    def generate(self, batch_size: int | None = None, condition: Tensor | None = None) -> Tensor:
        """Draw a code and return the mean of its image's distribution; see the base class.

        :raises ValueError: if a condition is given to a VAE without mixtures.
        """
        was_training, count = self.training, 1 if batch_size is None else batch_size
        images = torch.sigmoid(self.eval().decode(self.draw(count, condition)))
        self.train(was_training)
        return images[0] if batch_size is None else images


class ConditionalVAE(VAE):
    """A VAE whose decoder is told the class: p(x|z, y), with z ~ N(0, I).

    As in Kingma et al. 2014 (arXiv 1406.5298, model M2), but that the encoder is not told: it has
    the image before it. y is given as a one-hot vector beside z.

    :param classes: how many classes there are to be; for the others see `VAE`.
    """

    def __init__(self, shape: tuple, classes: int, hidden_units: int = 400, latent_size: int = 32):
        super().__init__(shape, hidden_units, latent_size)
        self.decoder[0] = nn.Linear(latent_size + classes, hidden_units)
        self.register_buffer("learned", torch.zeros(classes, dtype=torch.bool))

    def code(self, z: Tensor, y: Tensor) -> Tensor:
        """Both z and the class, shape (batch, latent_size + classes)."""
        return torch.cat([z, F.one_hot(y, len(self.learned)).to(z)], 1)

    def forward(self, x: Tensor, y: Tensor, codes: Tensor | None = None) -> tuple[Tensor, ...]:
        """As of a `VAE`, and note the classes that it is trained on."""
        if self.training:
            self.learned[y] = True
        return super().forward(x, y, codes)

    def classes(self) -> Tensor:
        """Those that it was trained on; see the base class."""
        return self.learned.nonzero().flatten()

    def draw(self, count: int, condition: Tensor | None = None) -> Tensor:
        """Draw codes: z from the prior, and a class, unless that is given."""
        y = self.draw_labels(count) if condition is None else condition
        return self.code(super().draw(count), y)


def negative_elbo(
    x: Tensor, output: tuple[Tensor, Tensor, Tensor], kl_weight: float = 1.0
) -> Tensor:
    """Negative evidence lower bound of each image, in nats: what the VAE minimises.

    -ELBO = E_q[-log p(x|z)] + KL(q(z|x) || N(0, I)), the expectation from one draw of z (Kingma &
    Welling 2014, eq. 10). The first term is Bernoulli (binary cross-entropy, summed over pixels),
    the second has the closed form ½ Σ (σ² + z_mean² - 1 - z_log_var), summed over latents.
    A weight of the second below 1 (β in Higgins et al. 2017) gives sharper images, and encodings
    that keep less to the prior: for those who draw z from a density fitted to the encodings.

    :param x: images in [0, 1], shape (batch, C, H, W).
    :param output: what `VAE.forward` returned for them.
    :param kl_weight: β.
    :return: one value for each image, shape (batch,). Their mean is the loss, so that its scale
        does not depend on the batch size.
    """
    logits, z_mean, z_log_var = output
    pixels = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    reconstruction = pixels.flatten(1).sum(1)
    kl = 0.5 * (z_log_var.exp() + z_mean.square() - 1 - z_log_var).sum(1)
    return reconstruction + kl_weight * kl


class WGAN(GenerativeModel):
    """A fully connected Wasserstein GAN, the generator of Shin et al. 2017.

    The critic learns to score real images higher than painted ones, the painter to be scored high
    (Arjovsky et al. 2017, arXiv 1701.07875). Both have two hidden layers, as the VAE's halves do.
    Critic and painter are both carried on from one experience to the next.

    :param shape: shape of one image, (channels, height, width).
    :param hidden_units: units in each hidden layer.
    :param latent_size: dimensions of the noise z ~ N(0, I) that is turned into an image.
    """

    def __init__(self, shape: tuple, hidden_units: int = 400, latent_size: int = 32):
        super().__init__()
        self.latent_size, pixels = latent_size, math.prod(shape)
        self.painter = nn.Sequential(
            nn.Linear(latent_size, hidden_units), nn.ReLU(),
            nn.Linear(hidden_units, hidden_units), nn.ReLU(),
            nn.Linear(hidden_units, pixels), nn.Sigmoid(),
            nn.Unflatten(1, tuple(shape)),
        )  # fmt: skip
        self.critic = nn.Sequential(
            nn.Flatten(),
            nn.Linear(pixels, hidden_units), nn.LeakyReLU(0.2),
            nn.Linear(hidden_units, hidden_units), nn.LeakyReLU(0.2),
            nn.Linear(hidden_units, 1), nn.Flatten(0),
        )  # fmt: skip

    def paint(self, count: int) -> Tensor:
        """New images, shape (count, C, H, W), with gradients."""
        z = torch.randn(count, self.latent_size, device=self.critic[1].weight.device)
        return self.painter(z)

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What the critic learns from: real images, as many painted ones, and what is between.

        :param x: images in [0, 1], shape (batch, C, H, W).
        :param y: their class labels, which play no role.
        :return: scores of the real and of the painted images, and the norm of the score's gradient
            at a random point between the two, each of shape (batch,): see `critic_loss`.
        """
        with torch.no_grad():
            painted = self.paint(len(x))
            between = x.lerp(painted, torch.rand(len(x), 1, 1, 1, device=x.device))
        with torch.enable_grad():  # in evaluation too
            score = self.critic(between.requires_grad_()).sum()
            (gradient,) = torch.autograd.grad(score, between, create_graph=True)
        return self.critic(x), self.critic(painted), gradient.flatten(1).norm(dim=1)

    @torch.no_grad()
    def generate(self, batch_size: int | None = None, condition: Tensor | None = None) -> Tensor:
        """Paint; see the base class.

        :raises ValueError: if a condition is given.
        """
        if condition is not None:
            raise ValueError("WGAN: it knows no classes, leave condition at None")
        images = self.paint(1 if batch_size is None else batch_size)
        return images[0] if batch_size is None else images


def critic_loss(x: Tensor, output: tuple[Tensor, Tensor, Tensor], penalty: float = 10) -> Tensor:
    """What the critic of a `WGAN` minimises, for each image (Gulrajani et al. 2017, eq. 3).

    Its score of a painted image minus that of a real one, and λ·(‖gradient‖ - 1)², which keeps
    the score from changing faster than the image (arXiv 1704.00028).

    :param x: images, whose scores are in `output` already.
    :param output: what `WGAN.forward` returned for them.
    :param penalty: λ.
    :return: one value for each image, shape (batch,).
    """
    real, painted, slope = output
    return painted - real + penalty * (slope - 1).square()
