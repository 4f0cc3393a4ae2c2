"""The video autoencoder: causal, the same whole and in pieces, strict about sizes."""

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close

from jvdit.models import video_vae_stages
from jvdit.models.video_vae import VARIANTS, VideoVAE
from jvdit.models.video_vae_chunked import (
    decode_normalized,
    decode_step,
    decode_stream,
    encode_normalized,
    encode_stream,
    split,
)
from jvdit.sharding import make_mesh

# The least that halves once.
SMALL = {
    "encoder_width": 4,
    "multipliers": (1, 1),
    "num_res_blocks": 1,
    "temporal_downsample": (True,),
    "latent_channels": 4,
}
# Both families of rows, and frames halved where the image isn't.
ROWS = {
    "tiny": VARIANTS["tiny"],
    "time_alone": {**VARIANTS["tiny"], "spatial_downsample": (True, False)},
    "plain": {
        **VARIANTS["tiny"],
        "multipliers": (1, 2, 2),
        "patch_size": 1,
        "residual_shortcuts": False,
        "stage_taps": (1, 3, 3),
        "temporal_downsample": (False, True),
    },
}


@functools.cache
def build(row, **changes):
    vae = VideoVAE(**{**(ROWS.get(row) or SMALL), **changes})
    video = jnp.asarray(
        np.random.RandomState(0).uniform(-1, 1, (2, 9, 16, 24, 3)), jnp.float32
    )
    shapes = jax.eval_shape(vae.init, jax.random.key(0), video[:1, :1])["params"]
    rng = np.random.RandomState(1)

    def draw(a):
        # No parameter is left at 0 or 1, where mistakes would hide.
        fan_in = np.prod(a.shape[:-1]) if a.ndim > 1 else 10
        value = rng.standard_normal(a.shape) / np.sqrt(fan_in) + (a.ndim == 1)
        return jnp.asarray(value, a.dtype)

    params = jax.tree.map(draw, shapes)
    return vae, params, video


@functools.cache
def whole(row):
    vae, params, video = build(row)
    run = jax.jit(lambda p, v: vae.apply({"params": p}, v))
    return run(params, video)


@pytest.mark.parametrize("row", ROWS)
def test_shapes_follow_the_compressions(row):
    vae, _, video = build(row)
    reconstruction, mean, logvar = whole(row)
    latent = vae.latent_shape(9, 16, 24)
    assert reconstruction.shape == video.shape == (2, *vae.video_shape(*latent), 3)
    assert mean.shape == logvar.shape == (2, *latent, vae.latent_channels)


@pytest.mark.parametrize(
    ("row", "pieces"),
    [
        *(("tiny", pieces) for pieces in ((1, 4, 4), (5, 4), (1, 8))),
        ("time_alone", (1, 4, 4)),
        ("plain", (5, 4)),
    ],
)
def test_encoding_in_pieces_is_encoding_whole(row, pieces):
    vae, params, video = build(row)
    parts = np.split(video, np.cumsum(pieces)[:-1], axis=1)
    moments = list(encode_stream(vae, params, [jnp.asarray(p) for p in parts]))
    for i in (0, 1):
        joined = jnp.concatenate([m[i] for m in moments], axis=1)
        assert_close(joined, whole(row)[1 + i])


@pytest.mark.parametrize(
    ("row", "frames"), [("tiny", 1), ("tiny", 2), ("time_alone", 2), ("plain", 1)]
)
def test_decoding_in_pieces_is_decoding_whole(row, frames):
    vae, params, _ = build(row)
    reconstruction, mean, _ = whole(row)
    pieces = list(decode_stream(vae, params, split(mean, frames)))
    assert pieces[0].shape[1] == 1
    assert pieces[1].shape[1] == frames * vae.temporal_compression
    assert_close(jnp.concatenate(pieces, axis=1), reconstruction)


@pytest.mark.parametrize("row", ROWS)
def test_large_frames_in_turns_are_the_same(row, monkeypatch):
    """Every stage takes a frame at a time, and what it keeps goes on."""
    vae, params, _ = build(row)
    reconstruction, mean, _ = whole(row)
    monkeypatch.setattr(video_vae_stages, "ACTIVATIONS_AT_ONCE", 0)
    decode = jax.jit(functools.partial(vae.apply, method="decode", mutable="cache"))
    first, cache = decode({"params": params}, mean[:, :1])
    later, _ = decode({"params": params, **cache}, mean[:, 1:])
    assert "scan[" in str(jax.make_jaxpr(decode)({"params": params, **cache}, mean))
    joined = jnp.concatenate([first, later], axis=1)
    assert_close(joined, reconstruction)


@pytest.mark.parametrize("row", ROWS)
def test_an_image_is_the_first_frame_of_its_video(row):
    vae, params, video = build(row)
    run = jax.jit(lambda p, v: vae.apply({"params": p}, v))
    image = run(params, video[:, :1])
    for alone, first in zip(image, whole(row), strict=True):
        assert_close(alone, first[:, :1])


@pytest.mark.parametrize("row", ROWS)
def test_latents_and_frames_depend_on_no_later_ones(row):
    vae, params, video = build(row)
    mean = whole(row)[1]
    u = vae.temporal_compression

    @jax.jit
    def seen(params, video, mean):
        def frames(method, x, indices):
            def run(x):
                y = vae.apply({"params": params}, x, method=method)
                return y[0] if method == "encode" else y

            y, pull = jax.vjp(run, x)
            chosen = jnp.arange(y.shape[1])[None] == jnp.asarray(indices)[:, None]
            noise = jax.random.normal(jax.random.key(0), y.shape)
            picked = noise[None] * chosen[:, None, :, None, None, None]
            (gradients,) = jax.vmap(pull)(picked)
            return jnp.abs(gradients).sum(axis=(1, 3, 4, 5))

        latents = frames("encode", video, range(mean.shape[1]))
        return latents, frames("decode", mean, (0, u, u + 1))

    encoded, decoded = seen(params, video, mean)
    for i, gradient in enumerate(encoded):
        last = u * i
        assert gradient[last] > 0 and (gradient[last + 1 :] == 0).all()
    for latent, gradient in zip((0, 1, 2), decoded, strict=True):
        assert gradient[latent] > 0 and (gradient[latent + 1 :] == 0).all()


def test_one_compilation_serves_every_later_piece():
    vae, params, _ = build("tiny")

    def compilations(frames):
        latents = jnp.zeros((2, frames, 2, 3, vae.latent_channels))
        assert len(list(decode_stream(vae, params, split(latents, 1)))) == frames
        return sum(x._cache_size() for x in decode_step._programs.values())

    assert compilations(3) == compilations(6)


def test_pieces_must_be_whole_latent_frames():
    vae, params, video = build("tiny")
    stream = encode_stream(vae, params, [video[:, :5], video[:, 5:8]])
    next(stream)
    with pytest.raises(ValueError, match="compression"):
        next(stream)


@functools.cache
def encoder_gradient(remat):
    vae, params, video = build("small", decoder_width=4, remat=remat)

    def loss(params):
        mean, logvar = vae.apply({"params": params}, video[:, :5], method="encode")
        return jnp.mean(mean**2) + jnp.mean(jnp.sin(logvar))

    compiled = jax.jit(jax.grad(loss)).lower(params).compile()
    return compiled(params)["encoder"], compiled.as_text().count("convolution(")


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputation_changes_no_gradient(remat):
    (expected, once), (found, count) = map(encoder_gradient, ("none", remat))
    assert_close(found, expected)
    # "dots" keeps the convolutions, "full" computes them again.
    assert (count > once) == (remat == "full")


def test_compute_type_leaves_parameters_and_results_in_float32():
    vae, params, video = build("tiny", dtype=jnp.bfloat16)
    y, mean, logvar = jax.jit(lambda p: vae.apply({"params": p}, video[:, :5]))(params)
    assert {a.dtype for a in (y, mean, logvar)} == {jnp.dtype(jnp.float32)}
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    want = whole("tiny")[1][:, :2]
    assert np.linalg.norm(mean - want) < 0.05 * np.linalg.norm(want)


def test_normalized_latents_return():
    vae = VideoVAE(**{**ROWS["tiny"], "latents_mean": (1.0, 2.0, 3.0, 4.0)})
    vae = vae.clone(latents_std=(0.5, 1.0, 2.0, 4.0))
    latents = jnp.asarray(
        np.random.RandomState(0).normal((1, 2, 3, 4.0), (0.5, 1, 2, 4), (9, 4))
    )
    normalized = vae.normalize(latents)
    assert abs(float(normalized.mean())) < 1 and float(jnp.abs(normalized).max()) < 5
    assert_close(vae.denormalize(normalized), latents, 16)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((16, 64, 64), r"`T` \(=16\).*try 13 or 17"),
        ((0, 64, 64), r"`T` \(=0\).*try 1 or 5"),
        ((17, 62, 64), r"`H` \(=62\).*try 64"),
        ((17, 64, 3), r"`W` \(=3\).*try 4"),
    ],
)
def test_sizes_that_are_not_whole_latents_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        VideoVAE(**VARIANTS["clips"]).latent_shape(*size)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temporal_downsample": (True,)}, "2 halvings of 3"),
        ({"spatial_downsample": (True,)}, "`spatial_.*2 halvings of 3"),
        ({"stage_taps": (3, 3)}, "3 `multipliers`"),
        ({"remat": "some"}, "'some'.*dots"),
        ({"multipliers": (1, 3, 2)}, "powers of two"),
    ],
)
def test_fields_that_contradict_are_refused(fields, message):
    vae = VideoVAE(**{**VARIANTS["tiny"], **fields})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 1, 8, 8, 3)))


def test_latents_of_another_vae_are_refused():
    vae, params, _ = build("tiny")
    with pytest.raises(ValueError, match="5 channels"):
        vae.apply({"params": params}, jnp.zeros((1, 1, 2, 2, 5)), method="decode")


@pytest.mark.parametrize(
    ("name", "millions", "compression"),
    [("wan2.1", 126.893, (4, 8, 16)), ("wan2.2", 704.689, (4, 16, 48))],
)
def test_published_sizes(name, millions, compression):
    vae = VideoVAE(**VARIANTS[name])
    image = jnp.zeros((1, 1, 16, 16, 3))
    params = jax.eval_shape(vae.init, jax.random.key(0), image)
    count = sum(np.prod(a.shape) for a in jax.tree.leaves(params))
    assert round(count / 1e6, 3) == millions
    found = (vae.temporal_compression, vae.spatial_compression, vae.latent_channels)
    assert found == compression
    assert vae.normalize(jnp.zeros((1, vae.latent_channels))).shape[-1] == found[-1]


def test_every_variant_is_a_module():
    for row in VARIANTS.values():
        assert isinstance(VideoVAE(**row), nn.Module)


def test_the_mesh_changes_no_latent():
    vae, params, video = build("small", decoder_width=4)
    video = video[:, :3]

    def run(params, video):
        return vae.apply({"params": params}, video)

    expected = jax.jit(run)(params, video)
    with jax.set_mesh(make_mesh({"data": 2, "context": 4})):
        text = jax.jit(run).lower(params, video).compile().as_text()
        found = jax.jit(run)(params, video)
    assert "collective-permute" in text or "all-gather" in text
    assert_close(found, expected)


@pytest.mark.parametrize(
    ("row", "sizes"),
    [
        ("plain", {"tensor": 2}),
        ("tiny", {"tensor": 2, "context": 4}),
        ("time_alone", {"tensor": 2, "context": 4}),
    ],
)
def test_devices_that_divide_frames_change_none(row, sizes):
    """Nor do those that fill the last piece."""
    vae, params, _ = build(row)
    c = vae.temporal_compression
    r = np.random.RandomState(2)
    video = r.uniform(-1, 1, (1 + 7 * c, 16, 24, 3)).astype(np.float32)
    expected = encode_normalized(vae, params, video)
    pixels = np.concatenate([*decode_normalized(vae, params, expected[None])], axis=1)
    devices = jax.devices()[: math.prod(sizes.values())]
    with jax.set_mesh(make_mesh(sizes, devices)):
        found = encode_normalized(vae, params, video)
        again = np.concatenate([*decode_normalized(vae, params, found[None])], axis=1)
    assert_close(found, expected)
    assert again.shape == pixels.shape == (1, *video.shape)
    assert_close(again, pixels)


def test_a_device_sends_the_next_one_what_it_looks_back_at_alone():
    vae, params, _ = build("plain")
    latents = jnp.ones((1, 4, 4, 6, vae.latent_channels))
    with jax.set_mesh(make_mesh({"tensor": 2}, jax.devices()[:2])):
        _, cache = decode_step(vae, params, latents[:, :1], {})
        text = decode_step.lower(vae, params, latents, cache).compile().as_text()
    assert "all-gather(" not in text
    shapes = re.findall(r"f32\[([\d,]+)\]\S* (?:collective-permute|all-reduce)\(", text)
    sent = [math.prod(map(int, shape.split(","))) for shape in shapes]
    assert sent and max(sent) <= max(x.size for x in jax.tree.leaves(cache))


def test_a_new_autoencoder_treats_every_frame_as_an_image():
    """What it learns of images will then hold for videos.

    But for residual shortcuts: they give the channels of a cell to different frames.
    """
    vae = build("plain")[0]
    image = np.random.RandomState(0).uniform(-1, 1, (1, 1, 16, 16, 3))
    still = jnp.asarray(np.repeat(image, 9, axis=1), jnp.float32)
    params = jax.jit(vae.init)(jax.random.key(0), still[:, :1])["params"]
    reconstruction, mean, _ = jax.jit(vae.apply)({"params": params}, still)
    assert jnp.std(reconstruction) > 0.01
    for frames in (reconstruction, mean):
        later = frames[:, 1:]
        assert_close(later, later[:, :1] + 0 * later)
