"""Codecs: scaling, chunks, gradient."""

import pytest
import torch

from limbeck.core.diffusion.codec import Autoencoder, Identity

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def vae():
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = AutoencoderKL(
            block_out_channels=(8,),
            down_block_types=("DownEncoderBlock2D",),
            norm_num_groups=4,
            up_block_types=("UpDecoderBlock2D",),
            latent_channels=4,
            layers_per_block=1,
        )
    return net.eval().requires_grad_(False)


def pictures(n=5):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_identity_is_the_sample_itself():
    x = pictures()
    assert Identity().encode(x) is x and Identity().decode(x) is x


def test_scaling_and_shift_follow_the_family(vae):
    x, codec = pictures(), Autoencoder(vae, 1.5305, 0.0609)
    own = vae.encode(x).latent_dist.mode()
    torch.testing.assert_close(codec.encode(x), (own - 0.0609) * 1.5305, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(codec.decode(codec.encode(x)), vae.decode(own).sample, rtol=1e-3, atol=1e-4)


def test_constants_per_channel(vae):
    scale, shift = [1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.3, 0.4]
    got = Autoencoder(vae, scale, shift).encode(pictures())
    own = vae.encode(pictures()).latent_dist.mode()
    for c in range(4):
        torch.testing.assert_close(got[:, c], (own[:, c] - shift[c]) * scale[c], rtol=1e-4, atol=1e-5)


def test_chunks_change_nothing(vae):
    x = pictures()
    whole, chunked = Autoencoder(vae, 0.18215, chunk=8), Autoencoder(vae, 0.18215, chunk=2)
    torch.testing.assert_close(whole.encode(x), chunked.encode(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.decode(whole.encode(x)), chunked.decode(chunked.encode(x)), rtol=1e-3, atol=1e-4)


def test_gradient_flows_both_ways(vae):
    x = pictures(2).requires_grad_()
    codec = Autoencoder(vae, 0.18215, chunk=1)
    codec.decode(codec.encode(x)).square().sum().backward()
    assert x.grad is not None and float(x.grad.abs().min(0).values.max()) > 0
    assert all(p.grad is None for p in vae.parameters())


def test_posterior_samples_come_from_the_generator(vae):
    codec = Autoencoder(vae)
    draws = [codec.encode(pictures(), torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_latents_keep_their_dtype_around_a_half_precision_autoencoder(vae):
    import copy

    half = Autoencoder(copy.deepcopy(vae).bfloat16(), 0.18215)
    assert half.decode(half.encode(pictures())).dtype == torch.float32
