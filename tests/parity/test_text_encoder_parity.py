"""The text encoder against transformers' UMT5 and T5 v1.1, on equal random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdit.models.text_encoder import TextEncoder, relative_buckets
from jvdit.weights import umt5
from jvdit.weights.rules import loader

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DEPTH, LENGTHS, ROW = 2, (150, 40), 160
SIZES = {"width": 32, "num_heads": 4, "head_dim": 6, "ffn_width": 40, "vocab_size": 99}


def oracle(family):
    """Their encoder, every parameter drawn at random."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=SIZES["vocab_size"],
        d_model=SIZES["width"],
        d_kv=SIZES["head_dim"],
        d_ff=SIZES["ffn_width"],
        num_layers=DEPTH,
        num_heads=SIZES["num_heads"],
        feed_forward_proj="gated-gelu",
    )
    model = getattr(transformers, f"{family}EncoderModel")(config).eval()
    for seed, (name, value) in enumerate(model.named_parameters()):
        drawn = np.random.default_rng(seed).normal(size=value.shape)
        if value.ndim == 1:
            drawn = 1 + 0.2 * drawn
        elif "bias" not in name and "shared" not in name:
            drawn = drawn / np.sqrt(value.shape[1])
        value.data = torch.from_numpy(drawn.astype(np.float32))
    return model


@pytest.mark.parametrize(
    ("family", "shared_bias"), [("UMT5", False), ("T5", True)], ids=["umt5", "t5"]
)
def test_states_are_theirs(family, shared_bias):
    theirs = oracle(family)
    rng = np.random.default_rng(50)
    ids = rng.integers(2, 99, (len(LENGTHS), ROW)).astype(np.int32)
    segment = (np.arange(ROW)[None] < np.array(LENGTHS)[:, None]).astype(np.int32)
    ids = ids * segment
    with torch.no_grad():
        want = theirs(
            input_ids=torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(segment).long(),
        ).last_hidden_state.numpy()
    want = want * segment[..., None]
    model = TextEncoder(**SIZES, depth=DEPTH, shared_bias=shared_bias)
    inputs = jnp.asarray(ids), jnp.asarray(segment)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    tensors = {name: value.numpy() for name, value in theirs.state_dict().items()}
    rules = umt5.rules(shared_bias=shared_bias)
    params = loader(rules, tensors, shapes)()
    out = jax.jit(model.apply)({"params": params}, *inputs)
    error = np.linalg.norm(out - want) / np.linalg.norm(want)
    print(f"relative error {error:.1e}, state rms {np.sqrt(np.mean(want**2)):.2f}")
    assert error < 2e-5


def test_buckets_are_theirs_up_to_a_long_caption():
    model = oracle("T5")
    attention = model.encoder.block[0].layer[0].SelfAttention
    offset = torch.arange(512)[None] - torch.arange(512)[:, None]
    want = attention._relative_position_bucket(offset, True, 32, 128).numpy()
    np.testing.assert_array_equal(relative_buckets(512, 32, 128), want)
