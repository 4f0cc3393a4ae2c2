"""Diffusion forcing: levels of their own for the chunks of a clip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_rows import packed, tokens_of

from jvdit.diffusion.noise_path import NoisePath, TimestepPolicy
from jvdit.models import dit
from jvdit.models.attention.patterns import places
from jvdit.models.dit import DiT
from jvdit.training.objectives.denoising import FlowObjective
from jvdit.training.objectives.forcing import Forcing

CHUNKS, POLICY = 6, TimestepPolicy(distribution="uniform")


@pytest.fixture(scope="module")
def batch():
    """Rows of clips of several sizes."""
    rows, _ = packed(False)
    tokens = tokens_of(rows)
    clips = int(tokens.segment.max())
    return {
        "segment": tokens.segment,
        "level": tokens.segment,
        "position": tokens.position,
        "latents": tokens.latents,
        "valid": jnp.ones((len(rows), clips), bool),
    }


def chunks(batch):
    return places(tokens(batch)).frame // 2


def tokens(batch):
    from jvdit.shapes import Tokens

    return Tokens.of(batch, batch["latents"])


def drawn(batch, share, clean, seed=0):
    forcing, t = Forcing(share, clean, CHUNKS), jnp.full(batch["valid"].shape, 0.5)
    key = jax.random.key(seed)
    return forcing.forced(batch, key, POLICY, chunks(batch), t)


def clips_of(batch, made):
    """Of each clip: the chunks of its tokens, their levels, and their times."""
    t = np.pad(np.asarray(made["t"]), ((0, 0), (1, 0)))
    each = chunks(batch)
    for row in range(len(t)):
        for clip in range(1, int(batch["segment"][row].max()) + 1):
            place = np.asarray(batch["segment"][row] == clip)
            level = np.asarray(made["level"][row])[place]
            yield np.asarray(each[row])[place], level, t[row, level]


def test_each_chunk_has_a_level_of_its_own(batch):
    made = drawn(batch, share=1.0, clean=0.0)
    levels = []
    for chunk, level, t in clips_of(batch, made):
        for number in np.unique(chunk):
            assert len(set(level[chunk == number])) == 1
        assert (level > 0).all() and len(set(t)) == len(set(chunk))
        levels.append(set(level))
    row = levels[: int(batch["segment"][0].max())]
    assert len(set.union(*row)) == sum(map(len, row))  # clips share none
    assert (np.asarray(made["level"])[np.asarray(batch["segment"]) == 0] == 0).all()


def test_others_keep_the_one_that_they_have(batch):
    for _, level, t in clips_of(batch, drawn(batch, share=0.0, clean=1.0)):
        assert (level > 0).all() and (t == 0.5).all()


def test_clips_begin_with_clean_chunks_and_never_end_so(batch):
    begins = []
    for seed in range(30):
        made = drawn(batch, share=1.0, clean=1.0, seed=seed)
        for chunk, level, _ in clips_of(batch, made):
            clean = {*chunk[level == 0]}
            assert clean == {*range(len(clean))}  # the first ones
            assert chunk.max() not in clean
            begins.append((chunk.max() + 1, len(clean)))
    for count in {x for x, _ in begins} - {1}:
        found = [clean for chunks, clean in begins if chunks == count]
        assert {*found} == {*range(count)}  # every beginning comes


def test_a_later_chunk_changes_no_earlier_one(batch):
    """Causal in the loss, too: gradients reach no later chunk of the same clip."""
    fields = dit.VARIANTS["tiny"] | {"patterns": ("chunk_causal",), "chunk_frames": 2}
    network = DiT(**fields, in_channels=4, out_channels=4, text_width=6)
    objective = FlowObjective(
        network, None, NoisePath(), POLICY, forcing=Forcing(1.0, 0.5, CHUNKS)
    )
    b, n, _ = batch["latents"].shape
    rng = np.random.default_rng(0)
    batch = batch | {
        "latents": jnp.asarray(rng.normal(size=(b, n, 4)), jnp.float32),
        "logvar": jnp.full((b, n, 4), -30.0),
        "text_embeds": jnp.asarray(rng.normal(size=(b, 3, 6)), jnp.float32),
        "text_segment": jnp.ones((b, 3), jnp.int32),
    }
    params = objective.init(jax.random.key(0), batch)
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), params)
    made = objective.prepare(batch, jax.random.key(1))
    assert made["t"].shape == (b, batch["valid"].shape[1] * CHUNKS)
    noise = jnp.asarray(rng.normal(size=(b, n, 4)), jnp.float32)
    error, _ = objective.error(params, made, batch["latents"], noise, made["t"])
    given = np.asarray(made["level"] == 0)
    assert (np.asarray(error)[given] == 0).all()
    assert (np.asarray(error)[~given] > 0).all()
    clip, chunk = np.asarray(batch["segment"]), np.asarray(chunks(batch))
    for last in range(2):
        early = (clip == 1) & (chunk <= last)

        def loss(noise, early=early):
            error, _ = objective.error(params, made, batch["latents"], noise, made["t"])
            return (error * early).sum()

        moved = np.abs(jax.grad(loss)(noise)).sum(-1)
        assert (moved[~early] == 0).all()
        assert (moved[early & ~given] > 0).all()


def test_a_network_that_streams_says_so():
    network = DiT(**dit.VARIANTS["tiny"], in_channels=4, out_channels=4, text_width=6)
    plain = FlowObjective(network, None, NoisePath(), POLICY)
    assert plain.conditions == ()
    forced = dataclasses.replace(plain, forcing=Forcing(0.5))
    assert forced.conditions == ("stream",)
    with pytest.raises(ValueError, match=r"forcing\.share.*=2"):
        Forcing(2.0)
