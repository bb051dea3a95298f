"""The generative model: a variational autoencoder (VAE).

A *scholar* is a solver (classifier) and a generator of the past. `GenerativeModel` is the contract
of any generator, `VAE` that of the scholar, `negative_elbo` its loss, `ClassConditionalGMM` the
density from which its latent variables are sampled once it has been trained. Two other generators,
`ConditionalVAE` and `WGAN`, come last.
"""

import math
import warnings
from abc import ABC, abstractmethod

import torch
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.distributions import Categorical, MultivariateNormal
from torch.nn import functional as F


class GenerativeModel(nn.Module, ABC):
    """Define the contract of a generator: generate images of everything learned so far.

    To be trained by `GeneratorTraining` it also needs `forward(images, labels)`.
    Replay samples from a frozen deep copy. An interrupted run goes on from the `state_dict`: all
    that has to survive lives in parameters and buffers, and no training image may be kept.
    A class-conditional generator also says which classes it can be asked for.
    """

    @abstractmethod
    def generate(self, batch_size: int | None = None, condition: Tensor | None = None) -> Tensor:
        """Generate images, without gradients and whatever the training mode.

        The signature is that of `avalanche.models.Generator.generate`.

        :param batch_size: number of images; None: a single one.
        :param condition: class labels (int64), shape (batch_size,); None: any learned class.
        :return: images in [0, 1], shape (batch_size, C, H, W), or (C, H, W) for a single one.
        """

    def learned_classes(self) -> Tensor | None:
        """Return the classes learned so far (int64), shape (n,); None: unconditional."""
        return None

    def sample_labels(self, count: int) -> Tensor:
        """Sample class labels (int64), shape (count,), each learned class equally often."""
        classes = self.learned_classes()
        return classes[torch.randint(len(classes), (count,), device=classes.device)]


class VAE(GenerativeModel):
    """Learn images with a fully connected, symmetric variational autoencoder.

    Kingma & Welling 2014 (arXiv 1312.6114) and 2019 (arXiv 1906.02691). Encoder q(z|x) and decoder
    p(x|z) have two hidden ReLU layers each, like the solver, and like the generator of van de Ven &
    Tolias 2018 (arXiv 1809.10635, section 4.2).

    :param shape: shape of one image, (channels, height, width).
    :param hidden_units: units in each hidden layer.
    :param latent_size: dimensions of the latent variable z.
    :param density: density from which z is sampled to generate; None: the prior N(0, I).
    :param normalize: module that normalizes what the encoder sees; None: the images as they are.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        hidden_units: int = 400,
        latent_size: int = 32,
        density: "ClassConditionalGMM | None" = None,
        normalize: nn.Module | None = None,
    ):
        super().__init__()
        self.latent_size, self.density = latent_size, density
        pixels = math.prod(shape)
        self.encoder = nn.Sequential(
            normalize or nn.Identity(),
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
            nn.Unflatten(1, tuple(shape)),
        )  # fmt: skip

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images as parameters of q(z|x) = N(z; z_mean, σ²), with σ = exp(½·z_log_var).

        :param x: images in [0, 1], shape (batch, C, H, W).
        :return: z_mean and z_log_var, shape (batch, latent_size) each.
        """
        hidden = self.encoder(x)
        return self.z_mean(hidden), self.z_log_var(hidden)

    @staticmethod
    def reparametrize(z_mean: Tensor, z_log_var: Tensor) -> Tensor:
        """Sample z = z_mean + σ·ε with ε ~ N(0, I) (Kingma & Welling 2014, section 2.4).

        The randomness enters from outside, through ε, so that the gradient reaches z_mean and
        z_log_var along differentiable operations.
        """
        return z_mean + torch.exp(0.5 * z_log_var) * torch.randn_like(z_mean)

    def decoder_input(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Return the input of the decoder: z alone, or with its class in a `ConditionalVAE`."""
        return z

    def decode(self, decoder_input: Tensor) -> Tensor:
        """Decode to logits of the pixels' Bernoulli distributions; their sigmoid is the image.

        :param decoder_input: from the method of that name, or from `sample_decoder_input`.
        :return: logits, shape (batch, C, H, W).
        """
        return self.decoder(decoder_input)

    def forward(
        self, x: Tensor, y: Tensor | None = None, replayed: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pass images through the computational graph: encode, sample z, decode.

        :param x: images in [0, 1], shape (batch, C, H, W).
        :param y: their class labels, for `decoder_input`.
        :param replayed: m inputs of the decoder, to be decoded behind those of the images (for
            `ReplayAlignmentPlugin`). Their z_mean and z_log_var are 0, as is the divergence.
        :return: logits (batch + m, C, H, W), z_mean and z_log_var (batch + m, latent_size): the
            arguments of `negative_elbo`.
        """
        z_mean, z_log_var = self.encode(x)
        decoder_input = self.decoder_input(self.reparametrize(z_mean, z_log_var), y)
        if replayed is not None:
            decoder_input, m = torch.cat([decoder_input, replayed]), len(replayed)
            z_mean, z_log_var = (F.pad(part, (0, 0, 0, m)) for part in (z_mean, z_log_var))
        return self.decode(decoder_input), z_mean, z_log_var

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Reconstruct images from the mean of q(z|x), without noise; shapes as in `forward`."""
        return torch.sigmoid(self.decode(self.decoder_input(self.encode(x)[0], y)))

    def learned_classes(self) -> Tensor | None:
        """Return the classes to which the density has been fitted; None: there is no density."""
        return None if self.density is None else self.density.labels.unique()

    @torch.no_grad()
    def sample_decoder_input(self, count: int, condition: Tensor | None = None) -> Tensor:
        """Sample z from the density, or from the prior N(0, I) as long as nothing is fitted.

        :param condition: class labels (int64), shape (count,); None: any learned class.
        :return: inputs of the decoder, shape (count, latent_size).
        :raises ValueError: if no density is fitted to a class of the condition.
        """
        fitted = torch.empty(0) if self.density is None else self.density.labels
        if condition is not None and not torch.isin(condition, fitted.to(condition)).all():
            raise ValueError("the condition has classes to which no density is fitted")
        if len(fitted):
            y = self.sample_labels(count) if condition is None else condition
            return self.density.sample(y)
        return torch.randn(count, self.latent_size, device=self.z_mean.weight.device)

    @torch.no_grad()
    def generate(self, batch_size: int | None = None, condition: Tensor | None = None) -> Tensor:
        """Generate the mean image of p(x|z) for sampled z; see `GenerativeModel.generate`."""
        was_training, count = self.training, 1 if batch_size is None else batch_size
        images = torch.sigmoid(self.eval().decode(self.sample_decoder_input(count, condition)))
        self.train(was_training)
        return images[0] if batch_size is None else images


def negative_elbo(
    x: Tensor, output: tuple[Tensor, Tensor, Tensor], kl_weight: float = 1.0
) -> Tensor:
    """Compute the negative evidence lower bound of each image, in nats: the loss of the VAE.

    -ELBO = E_q[-log p(x|z)] + KL(q(z|x) || N(0, I)), the expectation from one sample of z (Kingma &
    Welling 2014, eq. 10). The first term is Bernoulli (binary cross-entropy, summed over pixels),
    the second has the closed form ½ Σ (σ² + z_mean² - 1 - z_log_var), summed over latents.
    A weight below 1 (β in Higgins et al. 2017) gives sharper images, and encodings further from the
    prior: good if z is sampled from a density that is fitted to the encodings.

    :param x: images in [0, 1], shape (batch, C, H, W).
    :param output: what `VAE.forward` returned for them.
    :param kl_weight: β.
    :return: one loss for each image, shape (batch,).
    """
    logits, z_mean, z_log_var = output
    pixels = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    reconstruction = pixels.flatten(1).sum(1)
    kl = 0.5 * (z_log_var.exp() + z_mean.square() - 1 - z_log_var).sum(1)
    return reconstruction + kl_weight * kl


class ClassConditionalGMM(nn.Module):
    """Fit a Gaussian mixture model, full covariances, to the encodings of each class.

    A VAE's encodings don't fill the prior N(0, I): many latents sampled from it lie where the
    decoder has learned nothing, and some classes come far too rarely. A density fitted to the
    encodings after training repairs both (ex-post density estimation, Ghosh et al. 2020, arXiv
    1903.12436, section 4). Ours is per class, so that all classes are replayed equally often.
    A class that returns in a later experience adds a mixture to those that it has, and each of them
    is sampled equally often. Each takes `bytes_per_mixture` of memory.

    :param components: Gaussians in a mixture.
    :param latent_size: dimensions of the latent variable.
    """

    def __init__(self, components: int, latent_size: int):
        super().__init__()
        self.bytes_per_mixture = 8 + components * (4 + 2 * latent_size + 2 * latent_size**2)
        # One row for each mixture; half precision is precise enough, and half as large.
        self.register_buffer("labels", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("weights", torch.zeros(0, components))
        self.register_buffer("means", torch.zeros(0, components, latent_size).half())
        # Cholesky factors of the covariances.
        self.register_buffer("scales", torch.zeros(0, components, latent_size, latent_size).half())
        self.register_load_state_dict_pre_hook(self.resize)

    @staticmethod
    def resize(density: "ClassConditionalGMM", state: dict, prefix: str, *args) -> None:
        """Make room for as many mixtures as a saved state has."""
        for name, old in density.named_buffers():
            setattr(density, name, old.new_empty(state[prefix + name].shape))

    def fit(self, z: Tensor, y: Tensor) -> None:
        """Fit a mixture to each class in y by expectation maximisation, beside those there are.

        A small class gets fewer components, one for each full hundred of encodings but at least
        one; a class of one image gets none and isn't sampled.

        :param z: encodings (the z_mean of images), shape (n, latent_size).
        :param y: their class labels (int64), shape (n,).
        """
        for label in y.unique():
            encodings = z[y == label].cpu().double().numpy()
            if len(encodings) < 2:
                continue
            count = min(self.weights.shape[1], max(1, len(encodings) // 100))
            seed = int(torch.randint(2**31, ()))
            mixture = GaussianMixture(count, reg_covar=1e-3, max_iter=50, random_state=seed)
            # Fifty steps are enough, converged or not, and the threads of numpy and torch get into
            # each other's way.
            with warnings.catch_warnings(action="ignore"), threadpool_limits(1):
                mixture.fit(encodings)
            scales = torch.linalg.cholesky(torch.tensor(mixture.covariances_))
            self.labels = torch.cat([self.labels, label[None].to(self.labels)])
            fitted = {"weights": mixture.weights_, "means": mixture.means_, "scales": scales}
            for name, new in fitted.items():
                old = getattr(self, name)
                row = old.new_zeros(1, *old.shape[1:])  # a component that is missing has weight 0
                row[0, :count] = torch.as_tensor(new)
                setattr(self, name, torch.cat([old, row]))

    def sample(self, y: Tensor) -> Tensor:
        """Sample latents of given classes: a mixture of the class, a component of it, z.

        :param y: class labels (int64), shape (n,).
        :return: latents, shape (n, latent_size).
        """
        of_the_class = (self.labels == y.to(self.labels)[:, None]).float()
        mixture = Categorical(of_the_class, validate_args=False).sample()
        component = Categorical(self.weights[mixture], validate_args=False).sample()
        mean, scale = self.means[mixture, component], self.scales[mixture, component]
        return MultivariateNormal(
            mean.float(), scale_tril=scale.float(), validate_args=False
        ).sample()


# --- Other generators -----------------------------------------------------------------------------


class ConditionalVAE(VAE):
    """Give the decoder of a VAE the class: p(x|z, y), with z ~ N(0, I) and y as a one-hot vector.

    Kingma et al. 2014 (arXiv 1406.5298, model M2), but the encoder isn't given the class: it sees
    the image.

    :param classes: number of classes in the whole stream; for the others see `VAE`.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        hidden_units: int = 400,
        latent_size: int = 8,
        normalize: nn.Module | None = None,
    ):
        super().__init__(shape, hidden_units, latent_size, normalize=normalize)
        self.decoder[0] = nn.Linear(latent_size + classes, hidden_units)
        self.register_buffer("learned", torch.zeros(classes, dtype=torch.bool))

    def decoder_input(self, z: Tensor, y: Tensor) -> Tensor:
        """Return z and the one-hot class, shape (batch, latent_size + classes)."""
        return torch.cat([z, F.one_hot(y, len(self.learned)).to(z)], 1)

    def forward(self, x: Tensor, y: Tensor, replayed: Tensor | None = None) -> tuple[Tensor, ...]:
        """Pass images through the graph as in a `VAE`, and note the classes trained on."""
        if self.training:
            self.learned[y] = True
        return super().forward(x, y, replayed)

    def learned_classes(self) -> Tensor:
        """Return the classes trained on (int64), shape (n,)."""
        return self.learned.nonzero().flatten()

    def sample_decoder_input(self, count: int, condition: Tensor | None = None) -> Tensor:
        """Sample z from the prior, and a class unless it is given."""
        y = self.sample_labels(count) if condition is None else condition
        return self.decoder_input(super().sample_decoder_input(count), y)


class WGAN(GenerativeModel):
    """Learn images with a fully connected Wasserstein GAN, the generator of Shin et al. 2017.

    The critic learns to score real images higher than generated ones, the generator to be scored
    high (Arjovsky et al. 2017, arXiv 1701.07875). Both have two hidden layers, like the halves of
    the VAE, and are carried on from one experience to the next.

    :param shape: shape of one image, (channels, height, width).
    :param hidden_units: units in each hidden layer.
    :param latent_size: dimensions of the noise z ~ N(0, I).
    """

    def __init__(self, shape: tuple, hidden_units: int = 400, latent_size: int = 32):
        super().__init__()
        self.latent_size, pixels = latent_size, math.prod(shape)
        self.generator = nn.Sequential(
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

    def sample(self, count: int) -> Tensor:
        """Generate images with gradients, shape (count, C, H, W)."""
        z = torch.randn(count, self.latent_size, device=self.critic[1].weight.device)
        return self.generator(z)

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Score real images, as many generated ones, and points between them.

        :param x: images in [0, 1], shape (batch, C, H, W).
        :param y: their class labels, which play no role.
        :return: scores of the real and of the generated images, and the norm of the score's
            gradient at a random point between the two, shape (batch,) each: see `critic_loss`.
        """
        with torch.no_grad():
            generated = self.sample(len(x))
            between = x.lerp(generated, torch.rand(len(x), 1, 1, 1, device=x.device))
        with torch.enable_grad():  # in evaluation too
            score = self.critic(between.requires_grad_()).sum()
            (gradient,) = torch.autograd.grad(score, between, create_graph=True)
        return self.critic(x), self.critic(generated), gradient.flatten(1).norm(dim=1)

    @torch.no_grad()
    def generate(self, batch_size: int | None = None, condition: Tensor | None = None) -> Tensor:
        """Generate images; see `GenerativeModel.generate`.

        :raises ValueError: if a condition is given.
        """
        if condition is not None:
            raise ValueError("a WGAN is unconditional: leave condition at None")
        images = self.sample(1 if batch_size is None else batch_size)
        return images[0] if batch_size is None else images


def critic_loss(x: Tensor, output: tuple[Tensor, Tensor, Tensor], penalty: float = 10) -> Tensor:
    """Compute the loss of the critic of a `WGAN` for each image (Gulrajani et al. 2017, eq. 3).

    It is the score of a generated image minus that of a real one, plus λ·(‖gradient‖ - 1)², which
    keeps the score from changing faster than the image (arXiv 1704.00028).

    :param x: images, whose scores are in `output` already.
    :param output: what `WGAN.forward` returned for them.
    :param penalty: λ.
    :return: one loss for each image, shape (batch,).
    """
    real, generated, slope = output
    return generated - real + penalty * (slope - 1).square()
