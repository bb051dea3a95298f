"""The mathematics of the VAE, and the contract of a generator."""

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from GenerativeModel import VAE, GenerativeModel, LatentMixtures, negative_elbo

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


def test_kl_weight():
    torch.manual_seed(0)
    x = torch.rand(6, *SHAPE)
    output = torch.randn(6, *SHAPE), torch.randn(6, 4), torch.zeros(6, 4)
    kl = 0.5 * output[1].square().sum(1)
    difference = negative_elbo(x, output) - negative_elbo(x, output, kl_weight=0.25)
    torch.testing.assert_close(difference, 0.75 * kl)


def test_given_latents_are_decoded_as_they_are_and_cost_no_divergence(vae):
    x, z = torch.rand(5, *SHAPE), torch.randn(3, 4)
    logits, z_mean, z_log_var = vae(x, codes=z)
    torch.testing.assert_close(logits[5:], vae.decode(z))
    assert logits.shape[0] == z_mean.shape[0] == z_log_var.shape[0] == 8
    torch.testing.assert_close(z_mean[:5], vae.encode(x)[0])
    targets = torch.rand(8, *SHAPE)
    bernoulli = torch.nn.functional.binary_cross_entropy_with_logits
    expected = bernoulli(logits[5:], targets[5:], reduction="none").sum((1, 2, 3))
    torch.testing.assert_close(negative_elbo(targets, (logits, z_mean, z_log_var))[5:], expected)


def two_classes(count=4000):
    """Encodings in three dimensions: class 1 has two clusters, class 3 one, all correlated."""
    torch.manual_seed(0)
    z, y = torch.randn(count, 3), torch.arange(count) % 2 * 2 + 1
    z = z @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.5, 0.4], [0.0, 0.0, 0.2]])
    z[y == 1] += torch.where(torch.rand(count // 2, 1) < 0.3, -4.0, 2.0)
    z[y == 3] += torch.tensor([0.0, 3.0, -1.0])
    return z, y


def test_mixtures_reproduce_mean_covariance_and_clusters():
    z, y = two_classes()
    mixtures = LatentMixtures(classes=5, components=2, latent_size=3)
    mixtures.fit(z, y)
    for label in (1, 3):
        own, drawn = z[y == label], mixtures.sample(20000, torch.full((20000,), label))
        torch.testing.assert_close(drawn.mean(0), own.mean(0), atol=0.06, rtol=0)
        torch.testing.assert_close(drawn.T.cov(), own.T.cov(), atol=0.15, rtol=0.05)
    left = (mixtures.sample(20000, torch.ones(20000, dtype=torch.long))[:, 0] < -1).float().mean()
    expected = (z[y == 1, 0] < -1).float().mean().item()
    assert left.item() == pytest.approx(expected, abs=0.02)


def test_mixtures_draw_fitted_classes_equally_often():
    mixtures = LatentMixtures(classes=5, components=2, latent_size=1)
    y = torch.tensor([1] * 900 + [3] * 100)
    mixtures.fit(20.0 * y[:, None] + torch.randn(1000, 1), y)
    drawn = mixtures.sample(10000)
    ones = (drawn - 20).abs() < 10
    threes = (drawn - 60).abs() < 10
    assert (ones | threes).all() and ones.float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_mixtures_are_the_prior_until_they_are_fitted():
    torch.manual_seed(0)
    drawn = LatentMixtures(classes=5, components=3, latent_size=4).sample(20000)
    torch.testing.assert_close(drawn.mean(0), torch.zeros(4), atol=0.04, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), torch.eye(4), atol=0.05, rtol=0)


def test_no_component_is_about_single_images():
    mixtures = LatentMixtures(classes=2, components=10, latent_size=2)
    mixtures.fit(torch.randn(340, 2), torch.tensor([0] * 40 + [1] * 300))
    assert (mixtures.weights > 0).sum(1).tolist() == [1, 3]
    mixtures = LatentMixtures(classes=2, components=10, latent_size=2)
    mixtures.fit(torch.full((101, 2), 50.0), torch.tensor([0] * 1 + [1] * 100))
    assert mixtures.fitted.tolist() == [False, True] and (mixtures.sample(100) > 40).all()


def test_a_class_that_comes_back_keeps_half_of_what_it_was():
    mixtures = LatentMixtures(classes=2, components=2, latent_size=2)
    y = torch.zeros(1000, dtype=torch.long)
    mixtures.fit(torch.randn(1000, 2) - 10, y)
    mixtures.fit(torch.randn(1000, 2) + 10, y)
    assert (mixtures.sample(10000)[:, 0] < 0).float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_a_vae_draws_from_its_mixtures_and_its_state_holds_them():
    z, y = two_classes()
    vaes = [VAE(SHAPE, 16, 3, LatentMixtures(5, 2, 3)) for _ in range(2)]
    vaes[0].mixtures.fit(z, y)
    vaes[1].load_state_dict(vaes[0].state_dict())
    condition = torch.full((7,), 3)
    images = []
    for vae in vaes:
        torch.manual_seed(1)
        images.append(vae.generate(7, condition))
    torch.testing.assert_close(*images)
    torch.manual_seed(1)
    drawn = vaes[0].mixtures.sample(7, condition)
    torch.testing.assert_close(images[0], torch.sigmoid(vaes[0].decode(drawn)))


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
    with pytest.raises(ValueError, match="without mixtures"):
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
