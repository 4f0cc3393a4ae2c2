"""The tables that place arrays refuse what they don't know."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jvdit.sharding import (
    activation_spec,
    constrain,
    make_mesh,
    parameter_shardings,
    parameter_spec,
)


def test_mesh_fills_the_rest():
    assert dict(make_mesh({"data": 2, "fsdp": -1}).shape) == {
        "data": 2,
        "fsdp": 4,
        "context": 1,
        "tensor": 1,
    }
    assert make_mesh().shape["data"] == len(jax.devices()) == 8


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"date": 8}, "date.*unknown"),
        ({"data": 3}, "3 devices but there are 8"),
        ({"data": 3, "fsdp": -1}, "6 devices but there are 8"),
        ({"data": -1, "fsdp": -1}, "at most one"),
        ({"data": 0}, "positive"),
    ],
)
def test_impossible_meshes_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(sizes)


def test_constrain_places_by_name_and_knows_its_names():
    x = jnp.zeros((8, 4, 6))
    assert constrain(x, "batch", "tokens", None) is x  # no mesh
    with jax.set_mesh(make_mesh({"data": 4, "context": 2})):
        placed = jax.jit(lambda x: constrain(x, "batch", "tokens", None))(x)
        rows, tokens = placed.sharding.spec[:2]
        assert rows in ("data", ("data", "fsdp")) and tokens == "context"
        odd = jax.jit(lambda x: constrain(x, "batch", "tokens", None))(x[:3])
        assert odd.sharding.spec[:1] in ((), (None,))  # 3 rows don't divide
    with pytest.raises(ValueError, match="'?bacth"):
        activation_spec("bacth")
    with pytest.raises(ValueError, match="2 axis names"):
        constrain(x, "batch", "tokens")


def test_parameters_follow_their_path():
    sizes = {"data": 1, "fsdp": 4, "context": 1, "tensor": 1}
    assert parameter_spec("a/kernel", (6, 8), sizes) == PartitionSpec(None, "fsdp")
    assert parameter_spec("a/kernel", (6, 7), sizes) == PartitionSpec()
    assert parameter_spec("a/bias", (8,), sizes) == PartitionSpec()
    with pytest.raises(ValueError, match="no rule.*a/weights"):
        parameter_spec("a/weights", (8, 8), sizes)
    mesh = make_mesh({"fsdp": 8})
    placed = parameter_shardings({"a": {"kernel": jnp.zeros((16, 8))}}, mesh)
    assert placed["a"]["kernel"].spec == PartitionSpec("fsdp", None)
