"""The video autoencoder against diffusers' AutoencoderKLWan, on random weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from jvdit.models.video_vae import VideoVAE

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

THEIRS = {
    "2.1": {"base_dim": 6, "z_dim": 4},
    "2.2": {
        "base_dim": 8,
        "decoder_base_dim": 12,
        "z_dim": 6,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
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
STAGES, BLOCKS = 4, 2

# Part of a module's name there -> here, in order.
NAMES = (
    (r"mid_block\.resnets\.(\d)", r"mid_res_\1"),
    (r"mid_block\.attentions\.0", "mid_attention"),
    (r"up_blocks\.(\d)", lambda m: f"up_{STAGES - 1 - int(m[1])}"),
    (r"down_blocks\.(\d+)\.(resnets|downsampler)", r"down_\1.\2"),
    (r"down_blocks\.(\d+)", lambda m: flat_stage(int(m[1]))),
    (r"resnets\.(\d)", r"res_\1"),
    (r"upsamplers\.0|upsampler|downsampler", "resample"),
    (r"resample\.resample\.1", "resample.conv"),
    (r"conv_shortcut", "shortcut"),
    (r"to_qkv", "qkv"),
    (r"(norm|conv)([12])\b", r"\1_\2"),
    (r"gamma", "scale"),
    (r"weight", "kernel"),
)


def flat_stage(index):
    """Wan 2.1 lists all of the encoder's blocks in one row: res, res, resample."""
    stage, block = divmod(index, BLOCKS + 1)
    return f"down_{stage}." + ("resample" if block == BLOCKS else f"res_{block}")


def translate(name, value):
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    if name.endswith("scale"):
        return name, value.reshape(-1)
    if value.ndim > 1:
        value = np.moveaxis(value, (0, 1), (-1, -2))
    return name, value


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


def import_parameters(state):
    params = {}
    for name, value in state.items():
        name, value = translate(name, value.numpy())
        *path, leaf = name.split(".")
        node = params
        for part in path:
            node = node.setdefault(part, {})
        assert leaf not in node, name
        node[leaf] = jnp.asarray(value)
    return params


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
    params = import_parameters(model.state_dict())
    shapes = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 1, 32, 32, 3)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        lambda a: a.shape, shapes["params"]
    )

    ours = jax.jit(vae.apply)({"params": params}, video)
    assert ours[1].shape[1] == 3
    # Clamps would hide differences.
    assert np.abs(decoded).max() < 1 and np.abs(theirs[1]).max() < 20
    errors = [relative(a, b) for a, b in zip(ours, (decoded, *theirs), strict=True)]
    print(
        f"{kind}: decode {errors[0]:.1e}, mean {errors[1]:.1e}, logvar {errors[2]:.1e}"
    )
    assert max(errors) < 2e-5
