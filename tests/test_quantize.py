"""Weights in few bits: errors that follow from the bits, in less memory, anywhere."""

import dataclasses
import importlib.util
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from doors import command
from flax.traverse_util import flatten_dict
from stacks import stack_layers

from jvdit.box import FOLDER
from jvdit.data.media.reader import read_metadata
from jvdit.diffusion.noise_path import NoisePath, TimestepPolicy
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request
from jvdit.generation.room import Room
from jvdit.models.dense import Dense
from jvdit.models.dit import VARIANTS, DiT
from jvdit.models.lora import LoRA
from jvdit.models.text_encoder import VARIANTS as TEXT_VARIANTS
from jvdit.models.text_encoder import TextEncoder
from jvdit.shapes import Text, Tokens
from jvdit.sharding import make_mesh, parameter_shardings
from jvdit.weights import wan
from jvdit.weights.few_bits import FORMS, few_bits
from jvdit.weights.opening import open_bundle
from jvdit.weights.parameters import Network
from jvdit.weights.rules import export, loader

MEMORY = pathlib.Path(__file__).parent.parent / "tools/memory.py"
TOOL = pathlib.Path(__file__).parent.parent / "tools/quantization_error.py"
WAN = VARIANTS["tiny"] | {"in_channels": 16, "out_channels": 16, "text_width": 12}
CONTROL = WAN | {"control_layers": (0, 1), "control_channels": 24}


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype("f"), shapes)


def inputs(width=16, control=0):
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    tokens = Tokens(draw(2, 8, width), draw(2, 8, 3))
    if control:
        tokens = dataclasses.replace(tokens, control=draw(2, 8, control))
    return tokens, jnp.full((2, 1), 0.4), Text(draw(2, 4, 12))


def network(fields, **more):
    dit = DiT(**fields, **more)
    given = inputs(control=fields.get("control_channels", 0))
    shapes = jax.eval_shape(dit.init, jax.random.key(0), *given)["params"]
    return dit, drawn(shapes), given


def apply(dit, params, given, **more):
    return jax.jit(dit.apply)({"params": params, **more}, *given)


def bound(kernel, form):
    """The most that each weight may be off by, from the bits of the form."""
    largest = np.abs(kernel).max(axis=-2, keepdims=True)
    if form == "int8":
        return largest / 254 + 0 * kernel
    # Three bits after the point, or the distance of the smallest numbers.
    return np.maximum(np.abs(kernel) / 16, largest / 448 / 1024)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", [np.asarray, jnp.asarray])
def test_a_weight_is_off_by_what_the_bits_say(form, where):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 40, 24)) * np.exp(4 * rng.normal(size=(3, 40, 24)))
    kernel = kernel.astype("f")
    kernel[1, :, 5] = 0
    params = {"blocks": {"mlp": {"fc_in": {"kernel": where(kernel)}}}}
    found = few_bits(params, form)["blocks"]["mlp"]["fc_in"]
    assert isinstance(found["kernel"], type(where(kernel)))
    assert found["kernel"].dtype == FORMS[form][0]
    assert found["scale"].shape == (3, 24)
    values, scale = (np.asarray(found[x]).astype("f") for x in ("kernel", "scale"))
    back = values * scale[:, None]
    most = bound(kernel, form) * 1.0001 + 1e-30
    np.testing.assert_array_less(np.abs(back - kernel), most)
    # The largest of each channel is exact but for rounding.
    largest = lambda x: np.abs(x).max(axis=-2)  # noqa: E731
    np.testing.assert_allclose(largest(back), largest(kernel), rtol=1e-6)
    assert few_bits(params, "") is params


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_not_hidden(form, bad):
    kernel = np.ones((4, 3), "f")
    kernel[2, 1] = bad
    found = few_bits({"block_0": {"kernel": kernel}}, form)["block_0"]
    params = jax.tree.map(jnp.asarray, found)
    y = Dense(3, use_bias=False).apply({"params": params}, jnp.ones((1, 4)))
    assert np.isfinite(y).tolist() == [[True, False, True]]


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_is_off_by_what_its_weights_are(form):
    x = inputs()[0].latents
    kernel = drawn(jnp.zeros((16, 20)))
    params = few_bits({"block_0": {"kernel": kernel, "bias": np.ones(20, "f")}}, form)
    found = jax.jit(Dense(20).apply)({"params": params["block_0"]}, x)
    want = x @ kernel + 1
    most = np.abs(x) @ bound(kernel, form)
    assert (np.abs(found - want) <= most + 1e-5).all()
    assert np.abs(found - want).max() > most.max() / 100  # few bits were used


def test_what_stands_around_the_blocks_is_left():
    """The hints of control too: a request scales them."""
    params = network(CONTROL)[1]
    few = few_bits(params, "int8")
    flat, before = flatten_dict(few, sep="/"), flatten_dict(params, sep="/")
    int8 = {path for path, x in flat.items() if x.dtype == np.int8}
    inside = {x for x in before if x.startswith(("block_", "control_")) and "/" in x}
    inside = {x for x in inside if x.partition("/")[0][-1].isdigit()}
    wanted = {x for x in inside if x.endswith("kernel") and "hint" not in x}
    assert int8 == wanted and len(int8) > 30
    assert all(flat[path] is x for path, x in before.items() if path not in int8)


@pytest.mark.parametrize("fields", [WAN, CONTROL], ids=["wan", "control"])
def test_layers_in_a_loop_are_the_same(fields):
    dit, params, given = network(fields)
    want = apply(dit, params, given)
    found = apply(dit, few_bits(params, "int8"), given)
    largest = np.abs(want).max()
    assert 1e-4 * largest < np.abs(found - want).max() < 0.05 * largest
    if fields is WAN:
        looped = few_bits(stack_layers(params), "int8")
        again = apply(DiT(**fields, scan_layers=True), looped, given)
        assert_close(again, found)


def test_adapters_add_what_they_add():
    dit, params, given = network(WAN)
    lora = LoRA(rank=3, targets=("mlp/fc_out$",))
    last = drawn(lora.init(jax.random.key(0), params), 3)
    # Of the last layer alone: what it adds goes on to the head unchanged by the others.
    few = few_bits(params, "int8")
    layer = few["block_1"]["mlp"]["fc_out"]
    adapter = last["block_1"]["mlp"]["fc_out"]
    x = drawn(jnp.zeros((5, layer["kernel"].shape[0])))
    dense = Dense(layer["kernel"].shape[1])
    run = jax.jit(dense.apply)
    found = run({"params": layer, "lora": adapter}, x)
    want = run({"params": layer}, x) + x @ adapter["lora_a"] @ adapter["lora_b"]
    assert_close(found, want)
    with_adapters = apply(dit, few, given, lora=last)
    plain = apply(dit, params, given, lora=last)
    difference = np.abs(with_adapters - plain).max()
    assert difference < 0.05 * np.abs(plain).max()
    assert difference < np.abs(with_adapters - apply(dit, few, given)).max()


@pytest.mark.parametrize("scan", [False, True])
def test_released_weights_arrive_in_few_bits_and_sharded(scan):
    """Tensor after tensor, with the bits of the whole, where the table has them."""
    dit, params, given = network(WAN)
    tensors = export(wan.dit_rules(), params)
    whole = stack_layers(params) if scan else params
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, whole))
    mesh = make_mesh({"fsdp": 2, "context": 2, "tensor": 2})
    places = parameter_shardings(shapes, mesh)
    bring = loader(wan.dit_rules(), tensors, shapes, places)
    found, want = bring("int8"), few_bits(whole, "int8")
    wanted = flatten_dict(parameter_shardings(want, mesh), sep="/")
    for path, x in flatten_dict(found, sep="/").items():
        assert x.sharding.is_equivalent_to(wanted[path], x.ndim), path
    for path, x in flatten_dict(found, sep="/").items():
        theirs = flatten_dict(want, sep="/")[path]
        # Compilers may divide in another way, and a half rounds up or down.
        np.testing.assert_allclose(x, theirs, 1e-6, x.dtype == np.int8, err_msg=path)
    held = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, whole))
    told = Network(dit, bring, held)
    count = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    assert told.num_bytes() == count(whole) and told.num_bytes("int8") == count(found)
    assert count(found) < 0.65 * count(whole)  # of these narrow layers; 0.26 of Wan's
    dit = DiT(**WAN, scan_layers=scan)
    alone = apply(dit, jax.device_get(found), given)
    with jax.set_mesh(mesh):
        shared = apply(dit, found, given)
    assert_close(np.asarray(shared), np.asarray(alone))


@pytest.mark.parametrize("scan", [False, True])
def test_a_program_holds_one_layer_at_a_time(scan):
    """XLA would turn all back before the first, and once for all steps of a solver."""
    fields = WAN | {"width": 128, "ffn_width": 1024, "depth": 8}
    dit, params, given = network(fields, scan_layers=scan)

    def steps(params, latents):
        def move(_, x):
            tokens = dataclasses.replace(given[0], latents=x)
            return x + dit.apply({"params": params}, tokens, *given[1:])

        return jax.lax.fori_loop(0, 3, move, latents)

    def memory(form):
        lowered = jax.jit(steps).lower(few_bits(params, form), given[0].latents)
        found = lowered.compile().memory_analysis()
        return found.argument_size_in_bytes, found.temp_size_in_bytes

    kernels = sum(x.nbytes for x in jax.tree.leaves(params))
    (held, besides), (before, _) = memory("int8"), memory("")
    assert held < 0.35 * before and besides < 0.35 * kernels


def test_the_text_encoder_changes_little():
    encoder = TextEncoder(**TEXT_VARIANTS["tiny"], vocab_size=50)
    ids = jnp.arange(12).reshape(2, 6)
    given = ids, jnp.ones_like(ids)
    params = drawn(jax.eval_shape(encoder.init, jax.random.key(0), *given)["params"])
    run = jax.jit(lambda params: encoder.apply({"params": params}, *given))
    want, found = run(params), run(few_bits(params, "int8"))
    assert 0 < np.abs(found - want).max() < 0.05 * np.abs(want).max()
    few = few_bits(params, "int8")
    assert few["token_embed"]["embedding"].dtype == np.float32


def tool():
    found = importlib.util.spec_from_file_location("quantization_error", TOOL)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def like_wan(box):
    """The box with a random network of Wan's form, and Wan's conventions."""
    fields = VARIANTS["tiny"] | {"text_width": box.dit.text_width}
    channels = box.dit.in_channels
    dit = DiT(**fields, in_channels=channels, out_channels=channels)
    shapes = jax.eval_shape(dit.init, jax.random.key(0), *dit.example_inputs())
    networks = {**box.networks, "dit": Network(dit, drawn(shapes["params"]))}
    return dataclasses.replace(
        box,
        networks=networks,
        path=NoisePath(timesteps=1000),
        policy=TimestepPolicy(shift=5.0),
        seconds=False,
        pad_text=True,
    )


@pytest.mark.parametrize(
    ("make", "limits"),
    [(lambda box: box, {"int8": 0.01, "fp8": 0.1}), (like_wan, {"int8": 0.01})],
    ids=["box", "wan"],
)
def test_latents_go_astray_little_at_first(make, limits):
    """Later steps go on from there: how far depends on the clip."""
    mesh = make_mesh(devices=jax.devices()[:1])
    model, study = make(open_bundle(FOLDER, mesh)), tool()
    requests = [Request("one object: a small red ball.", sound=False, frames=5)]
    run = partial(study.by_step, requests=requests, steps=4, scale=2.0)
    want = run(Generator(model, mesh))
    assert len(want) == 4
    for form, limit in limits.items():
        found = study.errors(run(Generator(model, mesh, quantize=form)), want)
        assert 0 < found[0] < limit and found.max() < 0.5, (form, found)


def room(limit, form="", ways=1, **sizes):
    """The room of networks with so many bytes in bfloat16, on devices of so many."""
    mesh = make_mesh({"context": ways}, jax.devices()[:ways])
    dit = DiT(**WAN, param_dtype=jnp.bfloat16)

    def network(size):
        kernel = jax.ShapeDtypeStruct((size // 2000, 1000), jnp.bfloat16)
        return Network(dit, lambda *_: {}, {"block_0": {"kernel": kernel}})

    networks = {name: network(size) for name, size in sizes.items()}
    found = Room(networks, mesh, form)
    found.__dict__["memory"] = limit * ways
    return found


def test_what_fits_is_told_before_anything_is_read():
    sizes = {"dit": 28 * 10**9, "text_encoder": 11 * 10**9}
    found = room(80 * 10**9, **sizes)
    assert (
        found.together and "28.0 GB, the text encoder 11.0 GB; kept tog" in found.told
    )
    assert "one at a time" in room(40 * 10**9, **sizes).told
    tight = room(30 * 10**9, **sizes).told
    assert tight.endswith("; little is left: add --quantize=int8")
    with pytest.raises(
        ValueError, match=r"the DiT takes 28.0 GB in bfloat16 and 14"
    ) as e:
        _ = room(24 * 10**9, **sizes).told
    assert str(e.value).endswith("this machine has 24.0 GB: add --quantize=int8.")
    few = room(24 * 10**9, "int8", **sizes).told
    assert few.startswith("weights in int8: the DiT 14.") and "one at a time" in few
    with pytest.raises(ValueError, match="over 4 such devices .--mesh=context=4"):
        _ = room(9 * 10**9, **sizes).told
    with pytest.raises(ValueError, match="DiT takes 14.0 GB in int8; .* over 4 such"):
        _ = room(6 * 10**9, "int8", **sizes).told
    assert room(9 * 10**9, ways=4, **sizes).told


def test_what_is_told_is_what_is_held():
    generator = Generator.load(mesh=make_mesh({"fsdp": -1}), quantize="int8")
    for name, size in generator.room.sizes("int8").items():
        held = generator.residence[name]
        assert size == sum(x.nbytes for x in jax.tree.leaves(held)), name
        int8 = any(x.dtype == np.int8 for x in jax.tree.leaves(held))
        assert int8 == (name not in ("vae", "audio_vae"))


def test_the_tool_and_a_start_count_the_same(monkeypatch):
    """What the compiler takes as arguments are the weights of `Room`, and inputs."""
    found = importlib.util.spec_from_file_location("memory", MEMORY)
    assert found is not None and found.loader is not None
    memory = importlib.util.module_from_spec(found)
    found.loader.exec_module(memory)
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    monkeypatch.setattr(memory, "chip", lambda: mesh)
    small = TEXT_VARIANTS["tiny"] | {"vocab_size": 64, "shared_bias": False}
    monkeypatch.setitem(memory.text_encoder.VARIANTS, "umt5-xxl", small)
    monkeypatch.setitem(memory.dit.VARIANTS, "wan2.1-t2v-1.3b", WAN)
    networks = memory.networks("wan2.1-t2v-1.3b")
    counted = memory.weights(networks)
    room = Room(networks, mesh)
    for form, sizes in counted.items():
        told = room.sizes(form if form in FORMS else "")
        assert {k: round(x * 1e9) for k, x in sizes.items()} == told
    assert counted["int8"]["dit"] < counted["as they are"]["dit"]
    network = networks["text_encoder"]
    held = memory.text_program(network).compile().memory_analysis()
    inputs = 2 * memory._ids().size * 4  # ids and mask, in int32
    count = room.sizes("")["text_encoder"]
    assert 0 <= held.argument_size_in_bytes - count - inputs < 100


def test_a_form_that_is_not_known():
    with pytest.raises(
        ValueError, match="`quantize` .='int3'. must be one of int8, fp8"
    ):
        Generator.load(quantize="int3")


def test_the_command_tells_what_it_takes(tmp_path):
    few = "--steps=1", "--frames=1", "--nodraft", "--size=16x16", "--quantize=int8"
    done = command("sample", "one object: …", *few, f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    told = "weights in int8: the text encoder 0.6 MB, the DiT 5."
    assert told in done.stderr
    file = done.stdout.splitlines()[0]
    assert read_metadata(file)["jvdit"]["quantize"] == "int8"
