"""Linear layers whose products honour JAX's matmul precision, on CPU too.

Under `jax.default_matmul_precision("bfloat16")` the factors of a float32 product are
rounded to bfloat16 and the sums stay float32. A TPU computes so by default; XLA on CPU
ignores the setting, although a processor with matrix units (Intel AMX) is several times
faster at it. Activations, gradients and weights remain float32 in either case.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jvdit.models.lora import RATE, A, B
from jvdit.sharding import alone, platform

SCALE = "scale"  # beside a kernel in few bits: what each of its columns is times


def product(x: Float[Array, "*batch i"], kernel: Float[Array, "i o"]) -> Array:
    """The product of a linear layer, rounded where JAX asks for it."""
    asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    single = x.dtype == kernel.dtype == jnp.float32
    rounded = single and asked == "bfloat16"
    if platform() != "cpu" or not (rounded or alone()):
        return x @ kernel
    # As matrices: XLA on CPU turns factors with more axes around in memory for the
    # gradient of the kernel, 6 to 10 % of the time of a training step.
    multiply = _rounded_product if rounded else jnp.matmul
    y = multiply(x.reshape(-1, x.shape[-1]), kernel)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _wide(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _rounded_product(
    x: Float[Array, "n i"], kernel: Float[Array, "i o"]
) -> Float[Array, "n o"]:
    return _wide(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    return _wide(x, kernel), (x, kernel)


def _backward(factors: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = factors
    grad = grad.astype(jnp.bfloat16)
    return _wide(grad, turned(kernel)), _wide(turned(x), grad)


def turned(x: Float[Array, "i o"]) -> Float[Array, "o i"]:
    """The transposed matrix as a factor of a fast product in bfloat16.

    XLA on CPU uses the matrix units only if both factors lie row by row in memory. A
    transposition is a mere change of view to it, which it folds into the product.
    """
    if platform() != "cpu":
        return x.T
    flat = jax.lax.optimization_barrier(x.T.reshape(-1))
    return jax.lax.optimization_barrier(flat.reshape(x.shape[::-1]))


_rounded_product.defvjp(_forward, _backward)


def _after(x: Array, kernel: Array) -> Array:
    """A kernel in few bits that can't be widened before x is known.

    XLA would do so for all layers before the first, and once for all steps of a solver.
    """
    if platform() != "cpu":
        return jax.lax.optimization_barrier((kernel, x))[0]
    # There XLA drops barriers. Where x isn't a number, wrong bits do no harm.
    bits = jax.lax.bitcast_convert_type(kernel, jnp.int8)
    bits ^= jnp.isnan(x.reshape(-1)[0]).astype(jnp.int8)
    return jax.lax.bitcast_convert_type(bits, kernel.dtype)


def along_last(vector: Float[Any, " d"], x: Array) -> Any:
    """A vector as an array that broadcasts along the last axis of `x`."""
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))


class Layer(nn.Module, kw_only=True):
    """A Linen module with the two types that all of ours have.

    Attributes:
        dtype: type of the computation and of the result.
        param_dtype: type of the parameters.
    """

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @property
    def types(self) -> dict[str, Any]:
        """The two types, for the layers inside."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def fields_of(self, block: type) -> dict[str, Any]:
        """The values here of the fields that a class of blocks has as well."""
        ours = {x.name for x in dataclasses.fields(self)} - {"parent", "name"}
        names = [x.name for x in dataclasses.fields(block) if x.name in ours]
        return {name: getattr(self, name) for name in names}

    def constant(self, name: str, value: int, *shape: int) -> Array:
        """The parameter of this name, which begins with one value everywhere."""
        init = nn.initializers.constant(value)
        return self.param(name, init, shape, self.param_dtype)


class Dense(Layer):
    """A linear layer over the last axis, with an adapter where it is given one.

    The adapter is in the collection "lora", see `lora.py`. The kernel may be given in
    few bits, with its `SCALE` beside it, see `few_bits.py`.

    Attributes:
        features: channels of the result.
        use_bias: whether to add a bias, which starts at zero.
        kernel_init: initialiser of the kernel.
    """

    features: int
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        """Maps the last axis to `features` channels."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        x = x.astype(self.dtype)
        scale = self.get_variable("params", SCALE)
        if scale is not None:
            kernel = _after(x, kernel)
        y = product(x, kernel.astype(self.dtype))
        if scale is not None:
            y = (y * along_last(scale, y)).astype(self.dtype)
        if self.use_bias:
            bias = self.constant("bias", 0, self.features)
            y += along_last(bias.astype(self.dtype), y)
        if self.has_variable("lora", A):
            y += self._adapted(x)
        return y

    def _adapted(self, x: Array) -> Array:
        a, b = (self.get_variable("lora", name).astype(x.dtype) for name in (A, B))
        if self.has_variable("lora", RATE):
            keep = 1 - self.get_variable("lora", RATE)
            seen = jax.random.bernoulli(self.make_rng("lora"), keep, x.shape)
            x = jnp.where(seen, x / keep, 0).astype(x.dtype)
        return (x @ a) @ b
