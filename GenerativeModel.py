"""The generative model of the scholar: a variational autoencoder (VAE).

In:  images in [0, 1], any shape (channels, height, width).  Out: new images like them.
`GenerativeModel` is the contract that any generator meets, `VAE` the one that we use, and
`negative_elbo` its loss.  Nothing here knows of experiences or replay.
Run: nothing; `python Generator.py` trains and shows it.  Next to read: Generator.py.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GenerativeModel(nn.Module, ABC):
    """What any generator has to offer so that a scholar can replay with it.

    - `generate` paints images of the distribution that was learned so far. It is the only method
      that replay calls, on a frozen copy: it must not track gradients, not depend on the training
      mode nor change it, and return float images in [0, 1] on the generator's own device.
    - `forward` returns whatever the generator's loss needs, batch dimension first: one tensor or
      a tuple of tensors. Loss and generator meet in a strategy (`VAETraining`, in
      TrainingInstances.py); a model that is trained otherwise brings a strategy of its own.
    - All that has to survive from one experience to the next lives in the module's parameters and
      buffers. The copy that replays is a `deepcopy`, and no training sample may be kept.
    """

    @abstractmethod
    def generate(self, batch_size: int | None = None, condition: Tensor | None = None) -> Tensor:
        """Sample new images, with the signature of `avalanche.models.Generator.generate`.

        :param batch_size: number of images, or None for a single one.
        :param condition: what to generate (such as class labels), for conditional models.
        :return: images in [0, 1], shape (batch_size, C, H, W), or (C, H, W) without a batch size.
        """


class VAE(GenerativeModel):
    """A fully connected, symmetric variational autoencoder (Kingma & Welling 2014, 2019).

    Encoder q(z|x) and decoder p(x|z) have two hidden ReLU layers each, as many as the solver has;
    this is also the generator of van de Ven et al. (2018, arXiv 1809.10635, section 4.2).

    :param shape: shape of one image, (channels, height, width).
    :param hidden_units: units in each hidden layer.
    :param latent_size: dimensions of the latent variable z.
    """

    def __init__(self, shape: tuple[int, int, int], hidden_units: int = 400, latent_size: int = 32):
        super().__init__()
        self.shape, self.latent_size = tuple(shape), latent_size
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

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One pass through the computational graph: encode, draw z, decode.

        :param x: images in [0, 1], shape (batch, C, H, W).
        :return: logits (batch, C, H, W), z_mean and z_log_var (batch, latent_size): the arguments
            of `negative_elbo`.
        """
        z_mean, z_log_var = self.encode(x)
        return self.decode(self.reparametrize(z_mean, z_log_var)), z_mean, z_log_var

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Encode images and decode the mean of q(z|x), without noise.

        :param x: images in [0, 1], shape (batch, C, H, W).
        :return: images in [0, 1], same shape.
        """
        return torch.sigmoid(self.decode(self.encode(x)[0]))

    @torch.no_grad()
    def generate(self, batch_size: int | None = None, condition: Tensor | None = None) -> Tensor:
        """Draw z from the prior N(0, I) and return the mean of p(x|z); see the base class.

        :raises ValueError: if a condition is given: this model has none.
        """
        if condition is not None:
            raise ValueError("VAE.generate: this VAE is not conditional, leave condition at None")
        count = 1 if batch_size is None else batch_size
        z = torch.randn(count, self.latent_size, device=self.z_mean.weight.device)
        if was_training := self.training:
            self.eval()
        images = torch.sigmoid(self.decode(z))
        if was_training:
            self.train()
        return images[0] if batch_size is None else images


def negative_elbo(x: Tensor, output: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Negative evidence lower bound of each image, in nats: what the VAE minimises.

    -ELBO = E_q[-log p(x|z)] + KL(q(z|x) || N(0, I)), the expectation from one draw of z (Kingma &
    Welling 2014, eq. 10). The first term is Bernoulli (binary cross-entropy, summed over pixels),
    the second has the closed form ½ Σ (σ² + z_mean² - 1 - z_log_var), summed over latents.

    :param x: images in [0, 1], shape (batch, C, H, W).
    :param output: what `VAE.forward` returned for them.
    :return: one value for each image, shape (batch,). Their mean is the loss, so that its scale
        does not depend on the batch size.
    """
    logits, z_mean, z_log_var = output
    pixels = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    reconstruction = pixels.flatten(1).sum(1)
    kl = 0.5 * (z_log_var.exp() + z_mean.square() - 1 - z_log_var).sum(1)
    return reconstruction + kl
