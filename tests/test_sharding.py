"""The tables that place arrays refuse what they don't know."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jvdit import sharding
from jvdit.machine.chips import CHIPS, Chip, chip_of
from jvdit.sharding import (
    activation_spec,
    constrain,
    make_mesh,
    parameter_shardings,
    parameter_spec,
    parse_mesh,
    rows_sharding,
    sampling_sizes,
    shard_axes,
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


def test_a_mesh_is_written_with_its_axes():
    assert parse_mesh("fsdp=8, context=-1") == {"fsdp": 8, "context": -1}
    for text in ("8x8", "fsdp=", ""):
        with pytest.raises(ValueError, match="must be AXIS=DEVICES"):
            parse_mesh(text)


@pytest.mark.parametrize(
    "rows, devices, data, tensor",
    [
        *[(1, 1, 1, 1), (2, 1, 1, 1), (2, 8, 2, 1), (3, 8, 4, 1), (16, 8, 8, 1)],
        *[(2, 6, 2, 1), (0, 4, 1, 1), (2, 32, 2, 1), (2, 64, 2, 2), (2, 34, 2, 1)],
    ],
)
def test_few_rows_leave_no_device_idle(rows, devices, data, tensor):
    sizes = sampling_sizes(rows, devices)
    context = devices // data // tensor
    assert sizes == {"data": data, "context": context, "tensor": tensor}


def test_rows_that_do_not_divide_are_everywhere():
    mesh = make_mesh({"data": 2, "context": 4})
    assert rows_sharding(mesh, 1).is_fully_replicated
    assert rows_sharding(mesh, 4).shard_shape((4, 3)) == (2, 3)


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
    names = ("fsdp",)
    spec = parameter_spec("a/kernel", (6, 8), sizes, names)
    assert spec == PartitionSpec(None, "fsdp")
    assert parameter_spec("a/kernel", (6, 7), sizes, names) == PartitionSpec()
    assert parameter_spec("a/bias", (8,), sizes, names) == PartitionSpec()
    with pytest.raises(ValueError, match="no rule.*a/weights"):
        parameter_spec("a/weights", (8, 8), sizes, names)
    mesh = make_mesh({"fsdp": 8})
    placed = parameter_shardings({"a": {"kernel": jnp.zeros((16, 8))}}, mesh)
    assert placed["a"]["kernel"].spec == PartitionSpec("fsdp", None)


@pytest.mark.parametrize(
    "fsdp, memory, names",
    [
        (8, 2 * 5 * 2**20 // 8, ("fsdp",)),
        (8, 2 * 5 * 2**20 // 8 - 1, ("fsdp", "context")),  # five copies need more
        (4, 1e12, ("fsdp", "context")),
    ],
)
def test_parameters_are_divided_over_context_where_they_need_it(
    fsdp, memory, names, monkeypatch
):
    chip = Chip("", memory=float(memory))
    monkeypatch.setattr(sharding, "chip_of", lambda kind: chip)
    mesh = make_mesh({"fsdp": fsdp, "context": 8 // fsdp})
    kernel = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    assert shard_axes({"a": kernel}, mesh) == names


def test_chips_that_are_not_there_have_their_memory():
    assert chip_of("TPU v6 lite") is CHIPS["v6e"]
    assert chip_of("TPU v5p") is CHIPS["v5p"] and chip_of("TPU7x") is CHIPS["tpu"]
    assert chip_of(jax.devices()[0].device_kind).memory == float("inf")
