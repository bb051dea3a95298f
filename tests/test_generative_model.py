"""The mathematics of the VAE, and the contract of a generator."""

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from GenerativeModel import VAE, GenerativeModel, negative_elbo

SHAPE = (3, 5, 7)


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return VAE(SHAPE, hidden_units=16, latent_size=4)


def test_loss_is_the_negative_elbo_of_torch_distributions():
    torch.manual_seed(0)
    x, logits = torch.rand(6, *SHAPE).round(), torch.randn(6, *SHAPE)
    z_mean, z_log_var = torch.randn(6, 4), torch.randn(6, 4)
    posterior = Normal(z_mean, torch.exp(0.5 * z_log_var))
    kl = kl_divergence(posterior, Normal(0.0, 1.0)).sum(1)
    log_likelihood = Bernoulli(logits=logits).log_prob(x).sum((1, 2, 3))
    loss = negative_elbo(x, (logits, z_mean, z_log_var))
    torch.testing.assert_close(loss, kl - log_likelihood)
    # The KL alone, where the reconstruction is perfect.
    certain = 1e4 * (2 * x - 1)
    torch.testing.assert_close(negative_elbo(x, (certain, z_mean, z_log_var)), kl)


def test_loss_of_a_sample_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    output = (torch.randn(6, *SHAPE), torch.randn(6, 4), torch.randn(6, 4))
    x = torch.rand(6, *SHAPE)
    alone = [negative_elbo(x[i : i + 1], [o[i : i + 1] for o in output]) for i in range(6)]
    torch.testing.assert_close(negative_elbo(x, output), torch.cat(alone))


def test_reparametrization_is_mean_plus_sigma_times_noise(vae):
    z_mean, z_log_var = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    torch.manual_seed(1)
    z = vae.reparametrize(z_mean, z_log_var)
    torch.manual_seed(1)
    noise = torch.randn(6, 4)
    torch.testing.assert_close(z, z_mean + z_log_var.exp().sqrt() * noise)
    z.sum().backward()
    torch.testing.assert_close(z_mean.grad, torch.ones(6, 4))
    torch.testing.assert_close(z_log_var.grad, 0.5 * (z - z_mean).detach())


def test_every_parameter_receives_a_gradient(vae):
    negative_elbo(torch.rand(8, *SHAPE), vae(torch.rand(8, *SHAPE))).mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in vae.parameters())


def test_the_architecture_is_symmetric_with_two_hidden_layers():
    def sizes(layers):
        return [tuple(m.weight.shape) for m in layers if isinstance(m, torch.nn.Linear)]

    vae = VAE((1, 28, 28), latent_size=100)
    assert sizes(vae.encoder) == [(400, 784), (400, 400)]
    assert sizes(vae.decoder) == [(400, 100), (400, 400), (784, 400)]
    assert sizes([vae.z_mean, vae.z_log_var]) == [(100, 400), (100, 400)]


@pytest.mark.parametrize("training", [True, False])
def test_generate(vae, training):
    vae.train(training)
    assert vae.generate(5).shape == (5, *SHAPE)
    assert vae.generate(0).shape == (0, *SHAPE)
    image = vae.generate()
    assert image.shape == SHAPE and not image.requires_grad
    assert image.min() >= 0 and image.max() <= 1
    assert vae.training == training and vae.decoder.training == training


def test_generate_is_in_evaluation_mode_whatever_the_callers_mode():
    vae = VAE(SHAPE, hidden_units=16, latent_size=4).train()
    vae.decoder.append(torch.nn.Dropout(1.0))  # would set every logit to 0, every pixel to 0.5
    assert (vae.generate(3) != 0.5).any()
    assert vae.decoder[-1].training


def test_generate_is_the_mean_of_the_decoder_at_draws_from_the_prior(vae):
    torch.manual_seed(2)
    images = vae.generate(3)
    torch.manual_seed(2)
    torch.testing.assert_close(images, torch.sigmoid(vae.decode(torch.randn(3, 4))))


def test_generate_refuses_a_condition(vae):
    with pytest.raises(ValueError, match="not conditional"):
        vae.generate(2, condition=torch.zeros(2))


def test_reconstruct_uses_the_mean_of_the_posterior(vae):
    x = torch.rand(4, *SHAPE)
    first = vae.reconstruct(x)
    assert first.shape == x.shape and not first.requires_grad
    torch.testing.assert_close(first, vae.reconstruct(x))


def test_a_generator_has_to_generate():
    class Mute(GenerativeModel):
        pass

    with pytest.raises(TypeError, match="generate"):
        Mute()


def test_training_lowers_the_loss_and_samples_resemble_the_data(vae):
    x = torch.zeros(32, *SHAPE)
    x[:, :, 2] = 1  # one bright line
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.01)
    losses = []
    for _ in range(200):
        loss = negative_elbo(x, vae(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 20
    assert (vae.generate(16) - x[:16]).abs().max() < 0.2
