"""The video autoencoder against diffusers' AutoencoderKLWan, on random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from tiny_models import VAE_2_2

from jvdit.models.video_vae import VideoVAE
from jvdit.weights import wan_vae
from jvdit.weights.rules import export, loader

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

THEIRS = {
    "2.1": {"base_dim": 6, "z_dim": 4},
    "2.2": {
        **VAE_2_2,
        "z_dim": 6,
        "latents_mean": [0.0] * 6,
        "latents_std": [1.0] * 6,
    },
}
OURS = {
    "2.1": VideoVAE(encoder_width=6, decoder_width=6, latent_channels=4),
    "2.2": VideoVAE(
        encoder_width=8,
        decoder_width=12,
        latent_channels=6,
        patch_size=2,
        residual_shortcuts=True,
    ),
}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def oracle(kind):
    """Their network, every parameter drawn, heads scaled clear of the clamps."""
    model = diffusers.AutoencoderKLWan(**THEIRS[kind]).eval()
    for i, (name, value) in enumerate(model.state_dict().items()):
        drawn = draw(*value.shape, seed=i)
        if name.endswith("gamma"):
            drawn = 1 + 0.2 * drawn
        elif value.ndim > 1:
            drawn = drawn / np.sqrt(np.prod(value.shape[1:]))
        if "decoder.conv_out" in name:
            drawn = drawn * 0.1
        value.copy_(torch.from_numpy(drawn))
    return model


def relative(found, expected):
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("kind", THEIRS)
def test_encoding_and_decoding_equal_theirs(kind):
    vae = OURS[kind]
    video = np.clip(draw(2, 9, 32, 48, 3), -1, 1)
    with torch.no_grad():
        model = oracle(kind)
        posterior = model.encode(
            torch.from_numpy(rearrange(video, "b f h w c -> b c f h w"))
        ).latent_dist
        decoded = model.decode(posterior.mean, return_dict=False)[0].numpy()
    theirs = [
        rearrange(a.numpy(), "b c f h w -> b f h w c")
        for a in (posterior.mean, posterior.logvar)
    ]
    decoded = rearrange(decoded, "b c f h w -> b f h w c")
    shapes = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 1, 32, 32, 3)))
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    params = loader(wan_vae.rules(vae), tensors, shapes["params"])()
    back = export(wan_vae.rules(vae), params)
    assert back.keys() == tensors.keys()
    assert all((back[name] == tensors[name]).all() for name in back)

    ours = jax.jit(vae.apply)({"params": params}, video)
    assert ours[1].shape[1] == 3
    # Clamps would hide differences.
    assert np.abs(decoded).max() < 1 and np.abs(theirs[1]).max() < 20
    errors = [relative(a, b) for a, b in zip(ours, (decoded, *theirs), strict=True)]
    print(
        f"{kind}: decode {errors[0]:.1e}, mean {errors[1]:.1e}, logvar {errors[2]:.1e}"
    )
    assert max(errors) < 2e-5
