"""Adapters: in place they do what merged weights do, alone, stacked and in a scan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from flax.traverse_util import flatten_dict, unflatten_dict
from stacks import stack_layers

from jvdit.models.dit import VARIANTS, DiT
from jvdit.models.lora import LoRA, check, scaled, stacked
from jvdit.shapes import Text, Tokens

SIZES = {**VARIANTS["tiny"], "in_channels": 6, "out_channels": 6, "text_width": 10}
ATTENTION = LoRA(rank=3, alpha=6.0)
MLP = LoRA(rank=2, alpha=2.0, targets=(r"mlp/fc_(in|out)$", "patch_embed", "head$"))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


INPUTS = (
    Tokens(draw(2, 5, 6), jnp.zeros((2, 5, 3))),
    jnp.full((2, 1), 0.4),
    Text(draw(2, 3, 10, seed=1)),
)


def drawn(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype("f"), tree)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(DiT(**SIZES).init, jax.random.key(0), *INPUTS)
    return drawn(shapes["params"])


def adapters_of(lora, params, seed):
    return drawn(lora.init(jax.random.key(0), params), seed)


def apply(params, adapters=None, key=None, **fields):
    variables = {"params": params} | ({} if adapters is None else {"lora": adapters})
    rngs = None if key is None else {"lora": jax.random.key(key)}
    return jax.jit(DiT(**SIZES, **fields).apply)(variables, *INPUTS, rngs=rngs)


def test_new_adapters_change_nothing(params):
    fresh = ATTENTION.init(jax.random.key(0), params)
    assert (apply(params, fresh) == apply(params)).all()


def merged(params, adapters):
    """Parameters of a network without adapters that does the same."""
    flat, low = (flatten_dict(x, sep="/") for x in (params, adapters))
    check(params, adapters)
    for layer in {path.removesuffix("lora_a") for path in low if path.endswith("a")}:
        change = low[layer + "lora_a"] @ low[layer + "lora_b"]
        flat[layer + "kernel"] = flat[layer + "kernel"] + change
    return unflatten_dict(flat, sep="/")


@pytest.mark.parametrize("scan", [False, True])
def test_in_place_merged_and_stacked_are_the_same(params, scan):
    if scan:
        params = stack_layers(params)
    one, two = (
        lora.active(adapters_of(lora, params, seed), training=False)
        for seed, lora in enumerate((ATTENTION, MLP))
    )
    again = scaled(adapters_of(ATTENTION, params, 5), 0.5)
    both = stacked([one, two, again])
    found = apply(params, both, scan_layers=scan)
    want = merged(merged(merged(params, one), two), again)
    assert_close(found, apply(want, scan_layers=scan))
    assert np.abs(found - apply(params, one, scan_layers=scan)).max() > 0.01


def test_strength_is_alpha_by_rank(params):
    adapters = adapters_of(ATTENTION, params, 0)
    layer = ("block_1", "cross_attention", "key")
    a, b, kernel = adapters, ATTENTION.active(adapters, False), params
    for name in layer:
        a, b, kernel = a[name], b[name], kernel[name]
    change = merged(params, ATTENTION.active(adapters, False))
    for name in layer:
        change = change[name]
    want = 6.0 / 3 * a["lora_a"] @ a["lora_b"]
    assert_close(change["kernel"], kernel["kernel"] + want, 16)


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_hides_inputs_of_the_adapter_alone_and_in_training_alone(params, scan):
    if scan:
        params = stack_layers(params)
    lora = LoRA(rank=3, alpha=3.0, dropout=0.5)
    adapters = adapters_of(lora, params, 0)
    fields = {"scan_layers": scan}
    training = lora.active(adapters, training=True)
    several = jnp.stack([apply(params, training, key=i, **fields) for i in range(3)])
    assert (several.std(0) > 0).mean() > 0.9
    fresh = lora.active(lora.init(jax.random.key(0), params), training=True)
    assert_close(apply(params, fresh, key=0, **fields), apply(params, **fields))
    still = lora.active(adapters, training=False)
    assert (apply(params, still, **fields) == apply(params, still, **fields)).all()


def test_what_does_not_fit_is_named(params):
    adapters = adapters_of(ATTENTION, params, 0)
    wider = DiT(**SIZES | {"width": 64})
    other = jax.eval_shape(wider.init, jax.random.key(0), *INPUTS)["params"]
    with pytest.raises(ValueError, match=r"block_0/.* is \(64, 64\), adapted by \(32"):
        check(other, adapters)
    shallow = {k: v for k, v in params.items() if k != "block_1"}
    with pytest.raises(ValueError, match="there is no layer block_1/"):
        check(shallow, adapters)
    low = adapters["block_0"]["self_attention"]["query"]
    half = {"block_0": {"self_attention": {"query": {"lora_a": low["lora_a"]}}}}
    with pytest.raises(ValueError, match="block_0/.*/query has one factor only"):
        check(params, half)
    with pytest.raises(ValueError, match="find no layer; layers are for example"):
        LoRA(targets=("attn",)).init(jax.random.key(0), params)
    with pytest.raises(ValueError, match="rank.*at least 1"):
        LoRA(rank=0)
