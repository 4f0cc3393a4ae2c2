"""The rolling cache of a causal network: what it keeps, and that nothing changes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close

from jvdit.models.attention.past import Past
from jvdit.models.attention.patterns import PATTERNS, Pattern
from jvdit.models.dit import DiT
from jvdit.shapes import Text, Tokens, Visible

CELLS, FRAMES, CHUNK = 4, 6, 2  # of a clip
EACH = CELLS * CHUNK
FIELDS = {
    "width": 24,
    "depth": 2,
    "num_heads": 2,
    "ffn_width": 16,
    "in_channels": 3,
    "out_channels": 3,
    "text_width": 5,
    "freq_dim": 8,
    "patterns": ("chunk_causal",),
    "chunk_frames": CHUNK,
    "attention_implementation": "xla",
}


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def clip(rows=2):
    t = np.repeat(np.arange(FRAMES), CELLS) * 0.25
    cell = np.tile(np.arange(CELLS), FRAMES)
    position = np.stack([t, cell // 2, cell % 2], axis=-1)
    position = np.broadcast_to(position, (rows, *position.shape))
    latents = draw(rows, FRAMES * CELLS, 3)
    return Tokens(latents, jnp.asarray(position, jnp.float32))


def part(tokens, chunk):
    place = slice(chunk * EACH, (chunk + 1) * EACH)
    return Tokens(tokens.latents[:, place], tokens.position[:, place])


def network(**fields):
    """A network that predicts something, its parameters, and what it is given."""
    dit = DiT(**{**FIELDS, **fields})
    tokens, text = clip(), Text(draw(2, 3, 5, seed=1))
    made = dit.init(jax.random.key(0), tokens, jnp.zeros((2, 1)), text)
    random = lambda x: 0.3 * draw(*x.shape, seed=x.size)  # noqa: E731
    return dit, jax.tree.map(random, made), tokens, text


def streamed(dit, variables, tokens, text, capacity, sink=0):
    """The clip chunk by chunk, each with what is kept of those before."""
    t, found = jnp.full((2, 1), 0.3), []
    past = Past.empty(2, capacity, sink)
    for i in range(FRAMES // CHUNK):
        chunk = part(tokens, i)
        seen, kept = dit.apply(variables, chunk, t, text, past, mutable=["cache"])
        if i:
            # Looked at again without being kept, as while it is denoised.
            again = dit.apply(variables, chunk, t, text, past)
            np.testing.assert_array_equal(again, seen)
        variables, past = {**variables, **kept}, past.after(chunk.position)
        found.append(seen)
    return jnp.concatenate(found, axis=1)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_what_is_kept_changes_nothing(scan_layers):
    dit, *inputs = network(scan_layers=scan_layers)
    variables, tokens, text = inputs
    whole = dit.apply(variables, tokens, jnp.full((2, 1), 0.3), text)
    found = streamed(dit, *inputs, capacity=FRAMES * CELLS)
    assert_close(found, whole)


def windowed(at, reach):
    """Each chunk sees itself and the one before."""
    first = at.frame // reach.chunk * reach.chunk
    return at.between(first - reach.chunk, first + reach.chunk - 1)


class WithFirst(Visible):
    """The same, and the first frame of the clip."""

    def mask(self):
        rest = super().mask()
        return rest | (self.id == self.id.min())[:, None, :]


def with_first(at, reach):
    return WithFirst(*windowed(at, reach))


@pytest.mark.parametrize(
    ("rule", "sink"), [(windowed, 0), (with_first, CELLS)], ids=["window", "sink"]
)
def test_the_oldest_leave_and_the_sink_stays(rule, sink, monkeypatch):
    # Where the position in time doesn't count, it doesn't that the sink moves on.
    scale = (0.0, 1.0, 1.0) if sink else (1.0, 1.0, 1.0)
    dit, *inputs = network(position_scale=scale)
    found = streamed(dit, *inputs, capacity=EACH + sink, sink=sink)
    monkeypatch.setitem(PATTERNS, "chunk_causal", Pattern(rule))
    variables, tokens, text = inputs
    whole = dit.apply(variables, tokens, jnp.full((2, 1), 0.3), text)
    assert_close(found, whole)
    monkeypatch.setitem(
        PATTERNS,
        "chunk_causal",
        Pattern(lambda at, _: at.between(0, at.frame // CHUNK * CHUNK + CHUNK - 1)),
    )
    other = dit.apply(variables, tokens, jnp.full((2, 1), 0.3), text)
    assert jnp.abs(other - whole).max() > 1e-3 * jnp.abs(whole).max()


def test_the_sink_moves_on_with_the_others():
    tokens, past = clip(1), Past.empty(1, 2 * EACH, sink=CELLS)
    for i in range(FRAMES // CHUNK):
        past = past.after(part(tokens, i).position)
    t = np.asarray(past.position)[0, ::CELLS, 0]
    # Frames 1 and 2 have left, half a second; the sink has moved on by that.
    np.testing.assert_allclose(t, [0.5, 0.75, 1.0, 1.25])
    assert int(past.count) == 2 * EACH


def test_only_causal_networks_go_on_from_what_they_kept():
    for fields in ({"patterns": ()}, {"patterns": ("chunk_causal", "full")}):
        dit, variables, tokens, text = network(**fields)
        run = partial(dit.apply, variables, part(tokens, 0), jnp.zeros((2, 1)), text)
        with pytest.raises(ValueError, match="must all be 'chunk_causal'"):
            run(Past.empty(2, EACH), mutable=["cache"])
    with pytest.raises(ValueError, match=r"`sink` \(=8\) must be from 0 to 7"):
        Past.empty(1, 8, sink=8)
