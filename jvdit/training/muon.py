"""Muon: orthogonalised momentum (Keller Jordan, 2024; arXiv:2502.16982).

optax.contrib computes it in float32. Here the matrix products are in bfloat16, as
published: the iteration corrects its own rounding errors, and matrix units are several
times faster in bfloat16.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jvdit.models.dense import turned
from jvdit.models.layers import stack_of

# (a, b, c) of the quintic x -> a x + b x^3 + c x^5 that Newton-Schulz applies to all
# singular values at once: five iterations take values in (0, 1] to about 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def scale_by_muon(momentum: float = 0.95) -> optax.GradientTransformation:
    """Replaces gradients by their orthogonalised Nesterov momentum.

    Updates are scaled to the root mean square of AdamW's. Every leaf must be a kernel,
    taken as a matrix from all axes but the last to the last; in a scanned stack of
    layers (see `stack_of`) each layer has its own matrix.

    Args:
        momentum: decay of the momentum.
    """

    def step(updates: Any, _) -> Any:
        return jax.tree_util.tree_map_with_path(_step, updates)

    return optax.chain(optax.trace(momentum, nesterov=True), optax.stateless(step))


def _step(path: tuple, kernel: Array) -> Array:
    stacked = any(stack_of(str(getattr(key, "key", key))) for key in path)
    stack = kernel.shape[:1] if stacked else ()
    rows = math.prod(kernel.shape[len(stack) : -1])
    matrix = kernel.reshape(*stack, rows, kernel.shape[-1])
    made = jax.vmap(orthogonal)(matrix) if stack else orthogonal(matrix)
    # The root mean square of AdamW's steps is 0.2 or so (arXiv:2502.16982, Eq. 4).
    return 0.2 * max(matrix.shape[-2:]) ** 0.5 * made.reshape(kernel.shape)


def orthogonal(x: Float[Array, "i o"]) -> Float[Array, "i o"]:
    """Approximates the nearest semi-orthogonal matrix, by Newton-Schulz iteration.

    Singular values end up between about 0.7 and 1.2. The result is float32; a matrix of
    zeros stays zero.
    """
    if x.shape[0] > x.shape[1]:
        return orthogonal(turned(x)).T
    a, b, c = COEFFICIENTS
    x = x.astype(jnp.float32)
    x = (x / (jnp.linalg.norm(x) + 1e-8)).astype(jnp.bfloat16)
    for step in range(STEPS):
        gram = _product(x, turned(x))
        mixed = b * gram + c * _product(gram, gram)
        y = a * x.astype(jnp.float32) + _product(mixed, x)
        x = y.astype(jnp.bfloat16) if step < STEPS - 1 else y
    return x


def _product(x: Array, y: Array) -> Array:
    x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)
