"""The generative model: a variational autoencoder (VAE).

A *scholar* is a solver (classifier) and a generator of the past. `GenerativeModel` is the contract
of any generator, `VAE` the one used here, `negative_elbo` its loss, `ClassConditionalGMM` the
density from which its latent variables are sampled once it has been trained.
"""

import math
import warnings
from abc import ABC, abstractmethod

import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits


class GenerativeModel(nn.Module, ABC):
    """Define the contract of a generator: generate images of everything learned so far.

    Replay uses a frozen copy, so `copy.deepcopy` has to work (hooks such as the old
    `torch.nn.utils.spectral_norm` and `weight_norm` prevent it, those in `parametrizations` don't).
    An interrupted run goes on from the `state_dict`: all that has to survive lives in parameters
    and buffers. The method promises to keep no training image.
    """

    @abstractmethod
    def generate(self, batch_size: int | None = None, condition: Tensor | None = None) -> Tensor:
        """Generate images, without gradients and as in evaluation mode.

        The signature is that of `avalanche.models.Generator.generate`.

        :param batch_size: number of images; None: a single one.
        :param condition: class labels (int64), shape (batch_size,); None: any learned class.
        :return: images in [0, 1], shape (batch_size, C, H, W), or (C, H, W) for a single one.
        """

    def learned_classes(self) -> Tensor:
        """Return the classes that it can be asked for (int64), shape (n,); empty: unconditional."""
        return torch.zeros(0, dtype=torch.int64)


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
            nn.Unflatten(1, shape),
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

    def decode(self, z: Tensor) -> Tensor:
        """Decode to logits of the pixels' Bernoulli distributions; their sigmoid is the image.

        :param z: latents, shape (batch, latent_size).
        :return: logits, shape (batch, C, H, W).
        """
        return self.decoder(z)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pass images through the computational graph: encode, sample z, decode.

        :param x: images in [0, 1], shape (batch, C, H, W).
        :return: logits, shape (batch, C, H, W); z_mean and z_log_var, shape (batch, latent_size).
        """
        z_mean, z_log_var = self.encode(x)
        return self.decode(self.reparametrize(z_mean, z_log_var)), z_mean, z_log_var

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Reconstruct images, shape (batch, C, H, W), from the mean of q(z|x), without noise."""
        return torch.sigmoid(self.decode(self.encode(x)[0]))

    def learned_classes(self) -> Tensor:
        """Return the classes to which the density is fitted (int64), shape (n,)."""
        return self.density.labels.unique() if self.density else super().learned_classes()

    def sample_latents(self, count: int, condition: Tensor | None = None) -> Tensor:
        """Sample z from the density, or from the prior N(0, I) as long as nothing is fitted.

        :param condition: class labels (int64), shape (count,); None: a random class for each.
        :return: latents, shape (count, latent_size).
        :raises ValueError: if no density is fitted to a class of the condition.
        """
        classes = self.learned_classes()
        if condition is not None and not torch.isin(condition, classes.to(condition)).all():
            raise ValueError("the condition has classes to which no density is fitted")
        if not len(classes):
            return torch.randn(count, self.latent_size, device=self.z_mean.weight.device)
        if condition is None:
            condition = classes[torch.randint(len(classes), (count,), device=classes.device)]
        return self.density.sample(condition)

    @torch.no_grad()
    def generate(self, batch_size: int | None = None, condition: Tensor | None = None) -> Tensor:
        """Generate the mean image of p(x|z) for sampled z; see `GenerativeModel.generate`."""
        count = 1 if batch_size is None else batch_size
        was_training = self.training
        images = torch.sigmoid(self.eval().decode(self.sample_latents(count, condition)))
        self.train(was_training)
        return images[0] if batch_size is None else images


def negative_elbo(
    x: Tensor, output: tuple[Tensor, Tensor, Tensor], kl_weight: float = 1.0
) -> Tensor:
    """Compute the negative evidence lower bound of each image, in nats, its divergence weighted.

    -ELBO = E_q[-log p(x|z)] + KL(q(z|x) || N(0, I)), the expectation from one sample of z (Kingma &
    Welling 2014, eq. 10). The first term is the `reconstruction_error`, the second has the closed
    form ½ Σ (σ² + z_mean² - 1 - z_log_var), summed over latents.
    A weight below 1 (β in Higgins et al. 2017) gives sharper images, and encodings further from the
    prior: good if z is sampled from a density that is fitted to the encodings.

    :param x: images in [0, 1], shape (batch, C, H, W).
    :param output: what `VAE.forward` returned for them.
    :param kl_weight: β.
    :return: one loss for each image, shape (batch,).
    """
    logits, z_mean, z_log_var = (part.float() for part in output)  # from bfloat16
    kl = 0.5 * (z_log_var.exp() + z_mean.square() - 1 - z_log_var).sum(1)
    return reconstruction_error(x, logits) + kl_weight * kl


def reconstruction_error(x: Tensor, logits: Tensor) -> Tensor:
    """Compute -log p(x|z) of each image, in nats: binary cross-entropy, summed over pixels."""
    pixels = binary_cross_entropy_with_logits(logits.float(), x, reduction="none")
    return pixels.flatten(1).sum(1)


class ClassConditionalGMM(nn.Module):
    """Fit a Gaussian mixture with a tied covariance to the encodings of each class.

    A VAE's encodings don't fill the prior N(0, I): many latents sampled from it lie where the
    decoder has learned nothing, and some classes come far too rarely. A density fitted to the
    encodings after training repairs both (ex-post density estimation, Ghosh et al. 2020, arXiv
    1903.12436, section 4). Ours is per class, so that all classes are replayed equally often.
    A class that returns in a later experience adds a mixture to those that it has, and each of them
    is sampled equally often.

    :param components: Gaussians in a mixture, at most.
    :param latent_size: dimensions of the latent variable.
    """

    def __init__(self, components: int, latent_size: int):
        super().__init__()
        self.components = components
        # A row for each mixture: its class, and the Cholesky factor of its covariance.
        self.register_buffer("labels", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("scales", torch.zeros(0, latent_size, latent_size))
        # A row for each Gaussian: its mixture, its weight in it, and its mean.
        self.register_buffer("mixtures", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("weights", torch.zeros(0))
        self.register_buffer("means", torch.zeros(0, latent_size))
        self.register_load_state_dict_pre_hook(ClassConditionalGMM.resize)

    def resize(self, state: dict, prefix: str, *args) -> None:
        """Make room for as many mixtures as a saved state has."""
        for name, old in self.named_buffers():
            setattr(self, name, old.new_empty(state[prefix + name].shape))

    def n_gaussians(self, encodings: int) -> int:
        """Count the Gaussians: one per five encodings, from 1 to `components`."""
        return min(self.components, max(1, encodings // 5))

    def fit(self, z: Tensor, y: Tensor) -> None:
        """Add a mixture for each class in y: a Gaussian for each cluster of k-means.

        The covariance is that of the encodings around the means of their clusters, plus 1e-3·I.
        A class of one image gets no mixture and isn't sampled.

        :param z: encodings (the z_mean of images), shape (n, latent_size).
        :param y: their class labels (int64), shape (n,).
        """
        for label in y.unique():
            encodings = z[y == label].cpu().double()
            if (n := len(encodings)) < 2:
                continue
            count, seed = self.n_gaussians(n), int(torch.randint(2**31, ()))
            clusters = KMeans(count, n_init=1, max_iter=20, random_state=seed)
            # KMeans warns of equal images; threads of numpy and torch get into each other's way.
            with warnings.catch_warnings(action="ignore"), threadpool_limits(1):
                members = torch.from_numpy(clusters.fit_predict(encodings.numpy()))
            means = torch.from_numpy(clusters.cluster_centers_)
            around = encodings - means[members]
            covariance = around.T @ around / (n - count) + 1e-3 * torch.eye(z.shape[1])
            sizes = members.bincount(minlength=count)
            kept = sizes > 1  # the mean of a single image would be that image
            new = {
                "labels": label[None],
                "scales": torch.linalg.cholesky(covariance)[None],
                "mixtures": torch.full_like(sizes[kept], len(self.labels)),
                "weights": sizes[kept] / sizes[kept].sum(),
                "means": means[kept],
            }
            for name, old in self.named_buffers():
                setattr(self, name, torch.cat([old, new[name].to(old)]))

    def sample(self, y: Tensor) -> Tensor:
        """Sample z of given classes: from a Gaussian of the class, chosen by its weight.

        :param y: class labels (int64), shape (n,).
        :return: latents, shape (n, latent_size).
        """
        y = y.to(self.labels)
        z = torch.empty(len(y), self.means.shape[1], device=y.device)
        for label in y.unique():
            weights = self.weights * (self.labels == label)[self.mixtures]
            rows = (y == label).nonzero().flatten()
            chosen = torch.multinomial(weights, len(rows), replacement=True)
            mean, scale = self.means[chosen], self.scales[self.mixtures[chosen]]
            z[rows] = mean + (scale @ torch.randn_like(mean)[..., None])[..., 0]  # mean + L·ε
        return z
