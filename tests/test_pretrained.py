"""Importing weights: complete both ways or refused, bit for bit, wherever it goes."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from stacks import stack_layers

from jvdit.machine.json_files import fit_json
from jvdit.models.dit import VARIANTS, DiT
from jvdit.shapes import Text, Tokens
from jvdit.sharding import make_mesh, parameter_shardings
from jvdit.weights import umt5, wan
from jvdit.weights.folders import load_dit
from jvdit.weights.opening import open_bundle
from jvdit.weights.released_configs import DiffusersDiT, dit_fields
from jvdit.weights.rules import Rule, assign, export, loader, paths_of
from jvdit.weights.tensors import TensorFiles, has_variant

FIELDS = VARIANTS["tiny"] | {"in_channels": 16, "out_channels": 16, "text_width": 12}


def dit(**fields):
    module = DiT(**FIELDS, **fields)
    tokens = Tokens(jnp.zeros((1, 1, 16)), jnp.zeros((1, 1, 3)))
    inputs = tokens, jnp.zeros((1, 1)), Text(jnp.zeros((1, 1, 12)))
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def load(*args, **named):
    return loader(*args, **named)()


def drawn(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)


def same(a, b):
    flat = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all((np.asarray(x) == np.asarray(y)).all() for x, y in flat)


@pytest.fixture(scope="module")
def params():
    return drawn(dit())


@pytest.mark.parametrize("layout", wan.LAYOUTS)
def test_export_and_load_are_inverse(params, layout):
    rules = wan.dit_rules(layout)
    tensors = export(rules, params)
    assert same(load(rules, tensors, dit()), params)
    names = {name.partition(".")[0] for name in tensors}
    assert "blocks" in names and "patch_embedding" in names


def test_stacked_layers_are_the_same_tensors(params):
    stacked = stack_layers(params)
    tensors = export(wan.dit_rules(), stacked)
    assert same(tensors, export(wan.dit_rules(), params))
    assert same(load(wan.dit_rules(), tensors, dit(scan_layers=True)), stacked)


@pytest.mark.parametrize("scan", [False, True])
def test_parameters_arrive_where_they_belong(params, scan):
    shapes = dit(scan_layers=scan)
    places = parameter_shardings(shapes, make_mesh({"fsdp": -1}))
    tensors = export(wan.dit_rules(), params)
    loaded = load(wan.dit_rules(), tensors, shapes, places)
    assert same(loaded, stack_layers(params) if scan else params)
    wanted, found = paths_of(places), paths_of(loaded)
    assert all(leaf.sharding == wanted[path] for path, leaf in found.items())
    kernel = found["blocks/mlp/fc_in/kernel" if scan else "block_0/mlp/fc_in/kernel"]
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == 8


def test_a_type_is_turned_on_the_way(params):
    tensors = export(wan.dit_rules(), params)
    loaded = load(wan.dit_rules(), tensors, dit(), dtype=jnp.bfloat16)
    wanted = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    assert same(loaded, wanted)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.bfloat16)}


def test_what_is_left_over_or_missing_is_listed(params):
    rules, shapes = wan.dit_rules(), dit()
    tensors = export(rules, params)
    with pytest.raises(ValueError, match="1 tensors have no place .*: blocks.0.extra"):
        load(rules, tensors | {"blocks.0.extra": np.zeros(3)}, shapes)
    less = {name: x for name, x in tensors.items() if name != "blocks.1.ffn.net.2.bias"}
    with pytest.raises(ValueError, match="1 parameters get no .*block_1/mlp/fc_out/b"):
        load(rules, less, shapes)
    with pytest.raises(ValueError, match="1 parameters get no .*blocks/mlp/fc_out/b"):
        load(rules, less, dit(scan_layers=True))
    wrong = tensors | {"proj_out.weight": np.zeros((16, 31))}
    with pytest.raises(
        ValueError, match=r"my.folder.*1 shapes differ: proj_out.weight"
    ):
        load(rules, wrong, shapes, what="my folder")
    more = {name.replace("blocks.1", "blocks.2"): x for name, x in tensors.items()}
    with pytest.raises(ValueError, match="27 tensors have no place .* and 22 more"):
        load(rules, tensors | more, shapes)


def test_a_fused_tensor_is_parted_and_joined_again():
    rules = [
        Rule("attn.qkv.weight", f"{name}/kernel", "o i -> i o", part=(i, 3))
        for i, name in enumerate(("query", "key", "value"))
    ]
    fused = np.arange(24.0).reshape(6, 4)
    shapes = {n: {"kernel": jnp.zeros((4, 2))} for n in ("query", "key", "value")}
    loaded = load(rules, {"attn.qkv.weight": fused}, shapes)
    np.testing.assert_array_equal(loaded["key"]["kernel"], fused[2:4].T)
    np.testing.assert_array_equal(export(rules, loaded)["attn.qkv.weight"], fused)


def test_a_second_name_of_a_tensor_is_read_only_in_place_of_the_first():
    rules = umt5.rules()[-2:]
    ours = {"token_embed/embedding": (5, 4)}
    first, second = "shared.weight", "encoder.embed_tokens.weight"
    for names in ((first,), (second,), (second, first)):
        found = assign(rules, dict.fromkeys(names, (5, 4)), ours)
        (piece,) = found["token_embed/embedding"]
        assert piece.name == (first if first in names else second)


def test_a_tensor_that_nothing_reads_is_no_mistake(params):
    tensors = export(wan.dit_rules(), params)
    unread = {"blocks.1.attn2.norm_added_q.weight": np.ones(32)}
    assert same(load(wan.dit_rules(), tensors | unread, dit()), params)


# Files


def test_tensors_of_shards_are_views_of_the_files(tmp_path):
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4).astype(ml_dtypes.bfloat16),
        "c": np.array(7, np.int64),
    }
    names = {"a": "x-1.safetensors", "b": "x-2.safetensors", "c": "x-2.safetensors"}
    for file in set(names.values()):
        part = {name: tensors[name] for name in names if names[name] == file}
        save_file(part, tmp_path / file, metadata={"format": "pt"})
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    save_file({"other": np.zeros(3)}, tmp_path / "fp16.safetensors")
    found = TensorFiles(tmp_path)
    assert found.keys() == tensors.keys() and found.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)
        base = found[name]
        while not isinstance(base, np.memmap):
            base = base.base
    with pytest.raises(ValueError, match="read-only"):
        found["a"][0, 0] = 1
    (tmp_path / "x-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of 2 .*x-2.safetensors"):
        TensorFiles(tmp_path)


def save(folder, **files):
    folder.mkdir(exist_ok=True, parents=True)
    for name, tensors in files.items():
        held = {x: np.full(3, value, np.float32) for x, value in tensors.items()}
        save_file(held, folder / f"{name}.safetensors")


def test_a_variant_beside_plain_weights(tmp_path):
    plain, half = "diffusion_pytorch_model", "diffusion_pytorch_model.fp16"
    save(tmp_path / "whole", **{plain: {"a": 1}, half: {"a": 2}})
    parts = {f"{half}-00001-of-00002": {"a": 2}, f"{half}-00002-of-00002": {"b": 2}}
    save(tmp_path / "parts", **{plain: {"a": 1, "b": 1}}, **parts)
    names = {"a": [*parts][0], "b": [*parts][1]}
    names = {x: f"{file}.safetensors" for x, file in names.items()}
    index = tmp_path / "parts" / f"{plain}.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": names}))
    for folder in (tmp_path / "whole", tmp_path / "parts"):
        for variant, value in ("", 1), ("fp16", 2), ("bf16", 1):
            found = TensorFiles(folder, variant)
            assert all((x == value).all() for x in found.values())
            assert len(found) == (1 if folder.name == "whole" else 2)
        assert has_variant(folder, "fp16") and not has_variant(folder, "bf16")
        (folder / f"{plain}.safetensors").unlink()
        assert (TensorFiles(folder)["a"] == 2).all(), "the only one there is"


def test_the_authors_folder_of_a_small_network(tmp_path, params):
    """One file without an index, beside the converted files of other networks."""
    tensors = export(wan.dit_rules("original"), params)
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    save(
        tmp_path, **{"Wan2.1_VAE": {"conv1.weight": 1}, "models_t5": {"norm.weight": 1}}
    )
    assert TensorFiles(tmp_path).keys() == tensors.keys()


def test_scaled_tensors_are_read_as_the_scale_times_the_value(tmp_path):
    """fp8 as ComfyUI writes it, one scale for each tensor or for each row."""
    rng, file = np.random.default_rng(0), tmp_path / "x.safetensors"
    whole = {
        f"layer.{i}.weight": rng.normal(size=(4, 3)).astype("f") for i in (0, 1, 2)
    }
    held = {"scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn)}
    for i, (name, value) in enumerate(whole.items()):
        scale = np.abs(value).max(keepdims=True) / 448 if i else np.float32(1)
        if i == 2:
            scale = np.abs(value).max(1, keepdims=True) / 448
        held[name] = (value / scale).astype(ml_dtypes.float8_e4m3fn)
        held[f"layer.{i}.{'weight_scale' if i == 2 else 'scale_weight'}"] = scale
        held[f"layer.{i}.scale_input"] = np.ones(1, np.float32)
    held = {f"model.diffusion_model.{name}": np.asarray(x) for name, x in held.items()}
    save_file(held, file)
    found = TensorFiles(file)
    found.within("model.diffusion_model.")
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_allclose(found[name], value, rtol=0.07, atol=0.01)
    name = "model.diffusion_model.layer.0.scale_weight"
    save_file(held | {name: np.ones((4, 2), np.float32)}, file)
    with pytest.raises(ValueError, match="layer.0.scale_weight .*blocks.*bf16"):
        TensorFiles(file)


def test_what_cannot_be_read_is_told_with_what_can(tmp_path):
    file = tmp_path / "x.safetensors"
    save(tmp_path, x={"a.weight": 1, "a.weight.absmax": 1})
    with pytest.raises(ValueError, match="bitsandbytes .*a.weight.absmax.*bf16"):
        TensorFiles(file)
    (tmp_path / "x.gguf").touch()
    with pytest.raises(ValueError, match="x.gguf is GGUF.*safetensors"):
        TensorFiles(tmp_path / "x.gguf")
    config = {"model_type": "s2v", "dim": 48, "ffn_dim": 80, "freq_dim": 256}
    config |= {"num_heads": 3, "num_layers": 2, "in_dim": 16, "out_dim": 16, "eps": 1}
    for name, family in FOREIGN.items():
        save(tmp_path, x={f"model.diffusion_model.{name}": 1})
        with pytest.raises(ValueError, match=f"a network of {family}.*VACE"):
            open_bundle(file)
        save(tmp_path / "bare", x={name: 1})
        with pytest.raises(ValueError, match=f"bare is a network of {family}.*VACE"):
            open_bundle(tmp_path / "bare")
        save(tmp_path / "folder", diffusion_pytorch_model={name: 1})
        (tmp_path / "folder/config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"folder is a network of {family}"):
            load_dit(tmp_path / "folder")
    save(tmp_path, x={"blocks.0.self_attn.q.lora_down.weight": 1})
    with pytest.raises(ValueError, match="x.safetensors holds adapters.*--lora"):
        open_bundle(file)
    save(tmp_path, x={"blocks.0.self_attn.q.weight": 1})
    with pytest.raises(ValueError, match="weights alone.*--dit .*release"):
        open_bundle(file)
    save(tmp_path / "folder", diffusion_pytorch_model={"blocks.0.ffn.0.weight": 1})
    (tmp_path / "folder/config.json").write_text(json.dumps(config | {"in_dim": 48}))
    with pytest.raises(ValueError, match="`in_dim` .=48.* 16, or 36 .*Wan Fun"):
        load_dit(tmp_path / "folder")


FOREIGN = {
    "patchify_proj.weight": "LTX-Video",
    "audio_patchify_proj.weight": "LTX-2",
    "double_blocks.0.img_mod.lin.weight": "FLUX or HunyuanVideo",
    "txt_in.individual_token_refiner.blocks.0.norm1.weight": "HunyuanVideo",
    "casual_audio_encoder.weights": "Wan 2.2 S2V",
    "face_adapter.fuser_blocks.0.linear1_q.weight": "Wan 2.2 Animate",
    "control_adapter.conv.weight": "Wan Fun",
}


def test_a_single_file_of_a_network_takes_the_config_of_its_release(tmp_path):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 20}
    sizes |= {"in_channels": 16, "out_channels": 16, "text_dim": 12, "num_layers": 2}
    sizes |= {"freq_dim": 16, "eps": 1e-6, "cross_attn_norm": True}
    (tmp_path / "release").mkdir()
    (tmp_path / "release/config.json").write_text(json.dumps(sizes))
    module = DiT(**dit_fields(fit_json(sizes, "config", DiffusersDiT, "")))
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())
    params = drawn(shapes["params"])
    tensors = export(wan.dit_rules("original"), params)
    tensors = {f"model.diffusion_model.{name}": x for name, x in tensors.items()}
    vae = {"first_stage_model.conv1.weight": np.ones(1, np.float32)}
    save_file(tensors | vae, tmp_path / "comfy.safetensors")
    found = load_dit(
        tmp_path / "comfy.safetensors", dtype=jnp.float32, like=tmp_path / "release"
    )
    assert same(found.params, params)


def test_bad_files_are_named_with_the_remedy(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(100, np.float32)}, file)
    whole = file.read_bytes()
    for kept in (len(whole) - 1, 40, 3):
        file.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match="model.safetensors .*download it again"):
            TensorFiles(tmp_path)
    file.write_bytes(b"<html>" + b"x" * 200)
    with pytest.raises(ValueError, match="model.safetensors .*download it again"):
        TensorFiles(tmp_path)
    file.rename(tmp_path / "Wan2.1_VAE.pth")
    for path in (tmp_path, tmp_path / "Wan2.1_VAE.pth"):
        with pytest.raises(ValueError, match="pickle.*python -c .*weights_only=True"):
            TensorFiles(path)
    with pytest.raises(FileNotFoundError, match="nowhere doesn't exist"):
        TensorFiles(tmp_path / "nowhere")
    (tmp_path / "Wan2.1_VAE.pth").unlink()
    with pytest.raises(FileNotFoundError, match="holds no .*safetensors"):
        TensorFiles(tmp_path)


def test_the_command_that_converts_a_pickle_works_in_any_folder(tmp_path):
    torch = pytest.importorskip("torch")
    (tmp_path / "it's \"$HOME`").mkdir()
    file = tmp_path / "it's \"$HOME`" / "a b.pth"
    torch.save({"a": torch.arange(3.0)}, file)
    with pytest.raises(ValueError, match="pickle") as told:
        TensorFiles(file)
    line = str(told.value).partition(": python ")[2]
    subprocess.run(f"{sys.executable} {line}", shell=True, check=True)
    assert TensorFiles(file.with_suffix(".safetensors"))["a"].tolist() == [0, 1, 2]


_MEASURE = """
import sys, threading, jax, jax.numpy as jnp
from jvdit.weights.rules import loader
from jvdit.weights.rules import Rule
from jvdit.weights.tensors import TensorFiles
from jvdit.sharding import make_mesh, parameter_shardings

def held():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024

shape = jax.ShapeDtypeStruct((12, 2048, 2048), jnp.bfloat16)
shapes = {"blocks": {"kernel": shape}}
places = parameter_shardings(shapes, make_mesh())
rules = [Rule("blocks.{i}.weight", "block_{i}/kernel", "o i -> i o")]
tensors = TensorFiles(sys.argv[1])
jax.block_until_ready(jnp.zeros(8) + 1)
before, peak, stop = held(), 0.0, threading.Event()

def watch():
    global peak
    while not stop.is_set():
        peak = max(peak, held())

thread = threading.Thread(target=watch)
thread.start()
jax.block_until_ready(loader(rules, tensors, shapes, places, jnp.bfloat16)())
stop.set()
thread.join()
print(peak - before)
"""


def test_loading_takes_the_memory_of_few_tensors(tmp_path):
    """Of a stack of 12 layers of 16 MiB, here 8 each: 96 MiB stay, and little more."""
    layer = np.ones((2048, 2048), np.float32)
    tensors = {f"blocks.{i}.weight": layer for i in range(12)}
    save_file(tensors, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", _MEASURE, str(tmp_path)]
    # As a user runs it: what conftest.py tells the compiler takes memory too.
    ours = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    environment["JAX_PLATFORMS"] = "cpu"
    found = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment
    )
    taken = float(found.stdout.split()[-1])
    print(f"{taken:.0f} MiB")
    # What stays, twice a tensor, and what compiling the two small programs takes.
    assert taken < 96 + 2 * 16 + 40
