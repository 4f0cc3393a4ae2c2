"""Linear layers: float32 exactly, or rounded to bfloat16 where JAX asks for it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close

from jvdit.models.dense import Dense


def results(x, precision):
    layer = Dense(7)
    params = layer.init(jax.random.key(0), x)

    def loss(params, x):
        return (jnp.sin(layer.apply(params, x))).sum()

    with jax.default_matmul_precision(precision):
        y = jax.jit(layer.apply)(params, x)
        return (
            params["params"]["kernel"],
            y,
            *jax.jit(jax.grad(loss, (0, 1)))(params, x),
        )


def rounded(x):
    return np.asarray(jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_products_and_gradients_are_rounded_where_asked(precision):
    x = jax.random.normal(jax.random.key(1), (3, 5, 6))
    kernel, y, grads, into_x = results(x, precision)
    keep = rounded if precision == "bfloat16" else np.asarray
    expected = keep(x) @ keep(kernel)
    assert_close(y, expected)
    assert y.dtype == into_x.dtype == grads["params"]["kernel"].dtype == jnp.float32
    slope = np.cos(expected)
    assert_close(into_x, keep(slope) @ keep(kernel).T)
    into_kernel = np.einsum("bni,bno->io", keep(x), keep(slope))
    assert_close(grads["params"]["kernel"], into_kernel)
    assert_close(grads["params"]["bias"], slope.sum((0, 1)))


def test_half_precision_layers_are_left_alone():
    x = jnp.ones((2, 6), jnp.bfloat16)
    layer = Dense(7, dtype=jnp.bfloat16)
    with jax.default_matmul_precision("bfloat16"):
        y, _ = layer.init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16


def factors(function, *arguments):
    """The types of the factors of every product of a compiled function."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    types = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", text))
    products = re.findall(r" dot\((%[\w.-]+), (%[\w.-]+)\)", text)
    return {types[name] for pair in products for name in pair}


def test_gradients_products_stay_in_bfloat16_where_the_forward_ones_do():
    """Else the processor's matrix units are left, unnoticed but for the time."""
    x, layer = jnp.ones((256, 64)), Dense(128)
    with jax.default_matmul_precision("bfloat16"):
        params = layer.init(jax.random.key(0), x)
        if factors(layer.apply, params, x) != {"bf16"}:
            pytest.skip("XLA multiplies in float32 on this processor")
        loss = jax.grad(lambda p, x: jnp.sin(layer.apply(p, x)).sum(), (0, 1))
        assert factors(loss, params, x) == {"bf16"}
