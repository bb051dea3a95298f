"""The mathematics of the VAE and of the density of its latents, and the contract of a generator."""

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence
from torchvision.transforms import v2

from figures.lab.baselines import images_in_memory_of
from figures.lab.data import in_memory_benchmark
from GenerativeModel import VAE, ClassConditionalGMM, negative_elbo

SHAPE = (3, 5, 7)


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return VAE(SHAPE, hidden_units=16, latent_size=4)


def test_loss_is_the_negative_elbo_of_torch_distributions():
    torch.manual_seed(0)
    x, logits = torch.rand(6, *SHAPE).round(), torch.randn(6, *SHAPE)
    z_mean, z_log_var = torch.randn(6, 4), torch.randn(6, 4)
    kl = kl_divergence(Normal(z_mean, torch.exp(0.5 * z_log_var)), Normal(0.0, 1.0)).sum(1)
    log_likelihood = Bernoulli(logits=logits).log_prob(x).sum((1, 2, 3))
    output = logits, z_mean, z_log_var
    torch.testing.assert_close(negative_elbo(x, output), kl - log_likelihood)
    torch.testing.assert_close(negative_elbo(x, output, 0.25), 0.25 * kl - log_likelihood)


def test_reparametrization_is_mean_plus_sigma_times_noise(vae):
    z_mean, z_log_var = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    torch.manual_seed(1)
    z = vae.reparametrize(z_mean, z_log_var)
    torch.manual_seed(1)
    torch.testing.assert_close(z, z_mean + z_log_var.exp().sqrt() * torch.randn(6, 4))
    z.sum().backward()
    torch.testing.assert_close(z_mean.grad, torch.ones(6, 4))
    torch.testing.assert_close(z_log_var.grad, 0.5 * (z - z_mean).detach())


def test_the_architecture_is_symmetric_with_two_hidden_layers():
    vae = VAE((1, 28, 28), latent_size=100)
    weights = [tuple(p.shape) for p in vae.parameters() if p.ndim == 2]
    encoder, posterior = [(400, 784), (400, 400)], [(100, 400)] * 2
    assert weights == encoder + posterior + [(400, 100), (400, 400), (784, 400)]


def test_the_encoder_sees_normalized_images(vae):
    normalize = v2.Normalize([0.5], [0.5])
    normalized = VAE(SHAPE, hidden_units=16, latent_size=4, normalize=normalize)
    normalized.load_state_dict(vae.state_dict())
    x = torch.rand(4, *SHAPE)
    torch.testing.assert_close(normalized.encode(x), vae.encode(2 * x - 1))


def test_training_lowers_the_loss_and_samples_resemble_the_data(vae):
    x, losses = torch.zeros(32, *SHAPE), []
    x[:, :, 2] = 1  # one bright line
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.01)
    for _ in range(200):
        loss = negative_elbo(x, vae(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in vae.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 20
    assert (vae.generate(16) - x[:16]).abs().max() < 0.2
    assert (vae.reconstruct(x) - x).abs().max() < 0.2


@pytest.mark.parametrize("training", [True, False])
def test_generate_in_evaluation_mode_and_without_gradient_whatever_the_mode(vae, training):
    vae.decoder.append(torch.nn.Dropout(1.0))  # in training mode all pixels would be 0.5
    vae.train(training)
    torch.manual_seed(2)
    images = vae.generate(3)
    assert {module.training for module in vae.modules()} == {training}
    torch.manual_seed(2)
    torch.testing.assert_close(images, torch.sigmoid(vae.eval().decode(torch.randn(3, 4))))
    assert images.shape == (3, *SHAPE) and not images.requires_grad and (images != 0.5).any()
    assert vae.generate().shape == SHAPE and vae.generate(0).shape == (0, *SHAPE)


def test_a_vae_without_density_is_unconditional(vae):
    with pytest.raises(ValueError, match="no density"):
        vae.generate(2, condition=torch.zeros(2, dtype=torch.int64))


def test_reconstruct_decodes_the_mean_of_the_posterior(vae):
    x = torch.rand(4, *SHAPE)
    reconstructed = vae.reconstruct(x)
    assert not reconstructed.requires_grad
    torch.testing.assert_close(reconstructed, torch.sigmoid(vae.decode(vae.encode(x)[0])))


# ------------------------------------------------------------------------------------------------
# The density of the latents
# ------------------------------------------------------------------------------------------------


def two_classes(count=4000):
    """Encodings in three dimensions: class 1 has two clusters, class 3 one, all correlated."""
    torch.manual_seed(0)
    z, y = torch.randn(count, 3), torch.arange(count) % 2 * 2 + 1
    z = z @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.5, 0.4], [0.0, 0.0, 0.2]])
    z[y == 1] += torch.where(torch.rand(count // 2, 1) < 0.3, -4.0, 2.0)
    z[y == 3] += torch.tensor([0.0, 3.0, -1.0])
    return z, y


def test_samples_have_mean_covariance_and_clusters_of_the_encodings():
    z, y = two_classes()
    density = ClassConditionalGMM(components=10, latent_size=3)
    density.fit(z, y)
    for label in (1, 3):
        encodings, samples = z[y == label], density.sample(torch.full((20000,), label))
        torch.testing.assert_close(samples.mean(0), encodings.mean(0), atol=0.06, rtol=0)
        torch.testing.assert_close(samples.T.cov(), encodings.T.cov(), atol=0.15, rtol=0.05)
        lower = [(part[:, 0] < -1).float().mean().item() for part in (samples, encodings)]
        assert lower[0] == pytest.approx(lower[1], abs=0.02)


def test_small_classes_get_fewer_gaussians_and_a_single_image_none():
    density = ClassConditionalGMM(components=10, latent_size=2)
    y = torch.tensor([0] * 4 + [1] * 15 + [2] * 300 + [3])
    sizes = ((4, 1), (15, 3), (300, 10), (1, 1))  # images of a class, and groups of them
    groups = torch.cat([torch.arange(n) % count for n, count in sizes])
    density.fit(9 * groups[:, None] + torch.randn(len(y), 2), y)  # no cluster of a single image
    assert density.labels.tolist() == [0, 1, 2]
    assert density.mixtures.bincount().tolist() == [1, 3, 10]


def test_no_gaussian_has_the_encoding_of_a_single_image_as_its_mean():
    density, z = ClassConditionalGMM(components=2, latent_size=2), torch.randn(50, 2)
    z[7] = 99  # far from all others: k-means makes it a cluster of its own
    density.fit(z, torch.zeros(50, dtype=torch.int64))
    assert len(density.means) == 1 and density.means.abs().max() < 1


def test_each_visit_of_a_class_keeps_its_share():
    density = ClassConditionalGMM(2, latent_size=2)
    for visit, count in enumerate((1000, 300, 3000)):
        density.fit(torch.randn(count, 2) + 20 * visit, torch.zeros(count, dtype=torch.int64))
    density.fit(torch.randn(1000, 2) - 99, torch.full((1000,), 5))
    z = density.sample(torch.zeros(30000, dtype=torch.int64))
    shares = (z.mean(1) / 20).round().long().bincount(minlength=3) / len(z)
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), atol=0.015, rtol=0)


def test_er_gets_the_bytes_of_a_generator_that_has_seen_the_whole_stream():
    sizes = 1000, 1, 300, 3000  # of a class that returns; of one image no mixture is made
    stream = [(torch.rand(n, 1, 1, 1), torch.zeros(n, dtype=torch.int64)) for n in sizes]
    vae = VAE((1, 1, 1), 8, latent_size=2, density=ClassConditionalGMM(2, 2))
    expected = images_in_memory_of(vae, in_memory_benchmark(train=stream, test=stream))
    for x, y in stream:
        vae.density.fit(vae.encode(x)[0].detach(), y)
    assert expected == sum(part.nbytes for part in vae.state_dict().values())


def test_a_vae_generates_from_its_density_and_its_state_holds_it():
    vaes = [VAE(SHAPE, 16, 3, ClassConditionalGMM(2, 3)) for _ in range(2)]
    assert vaes[0].learned_classes().tolist() == []
    torch.testing.assert_close(
        vaes[0].sample_latents(20000).T.cov(), torch.eye(3), atol=0.05, rtol=0
    )  # the prior, until something is fitted
    vaes[0].density.fit(*two_classes())
    vaes[1].load_state_dict(vaes[0].state_dict())
    assert vaes[1].learned_classes().tolist() == [1, 3]
    z = vaes[1].sample_latents(2000)  # class 3 lies at z[1] = 3
    assert 900 < ((z - torch.tensor([0.0, 3.0, -1.0])).norm(dim=1) < 3.2).sum() < 1300
    condition, images = torch.full((7,), 3), []
    for model in vaes:
        torch.manual_seed(1)
        images.append(model.generate(7, condition))
    with pytest.raises(ValueError, match="no density"):
        vaes[0].generate(2, torch.tensor([1, 2]))
    torch.manual_seed(1)
    z = vaes[0].density.sample(condition)
    torch.testing.assert_close(images, [torch.sigmoid(vaes[0].decode(z))] * 2)


def test_each_class_is_sampled_equally_often_however_often_it_has_come():
    vae = VAE(SHAPE, 16, 2, ClassConditionalGMM(1, 2))
    for label, count in ((4, 500), (2, 20), (4, 500)):
        vae.density.fit(torch.randn(count, 2) + 20 * label, torch.full((count,), label))
    labels = (vae.sample_latents(4000).mean(1) / 20).round().long()
    assert labels.bincount(minlength=5).tolist() == pytest.approx([0, 0, 2000, 0, 2000], abs=120)
