"""Adapter files of PEFT and diffusers load and match, and ours load there."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from safetensors.numpy import load_file, save_file
from tiny_models import DIT, filled

from jvdit.models.lora import LoRA, merged, parted
from jvdit.shapes import Text, Tokens
from jvdit.weights import wan
from jvdit.weights.adapters import ANY, FILE, read_lora, write_lora
from jvdit.weights.folders import load_dit

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

TABLES = [wan.dit_rules(layout) for layout in wan.LAYOUTS]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "patch_embedding"]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def network():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 40}
    return filled(diffusers.WanTransformer3DModel(**DIT | sizes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    network().save_pretrained(folder)
    return folder


def adapted(seed=0, **settings):
    """Their network with adapters drawn at random."""
    config = peft.LoraConfig(target_modules=TARGETS, **{"r": 4} | settings)
    model = network()
    model.add_adapter(config)
    for i, (name, value) in enumerate(model.named_parameters()):
        if "magnitude" in name:
            value.data *= torch.from_numpy(1 + 0.3 * draw(*value.shape, seed=i))
        elif "lora_" in name:
            drawn = 0.3 * draw(*value.shape, seed=1000 * seed + i)
            value.data = torch.from_numpy(drawn.astype(np.float32))
    return model


LATENTS, TEXT = draw(1, 16, 2, 4, 4), draw(1, 6, 32, seed=1)


def theirs(model):
    inputs = (torch.from_numpy(x) for x in (LATENTS, np.array([700.0]), TEXT))
    latents, t, text = inputs
    with torch.no_grad():
        out = model(latents, t.float(), text).sample.numpy()
    return patches(out)


def patches(x):
    return rearrange(x, "b c f (h p) (w q) -> b (f h w) (p q c)", p=2, q=2)


def ours(loaded, adapters=None):
    cells = np.stack(np.indices((2, 2, 2)), -1).reshape(1, -1, 3)
    tokens = Tokens(jnp.asarray(patches(LATENTS)), jnp.asarray(cells, jnp.float32))
    variables = {"params": loaded.params} | ({"lora": adapters} if adapters else {})
    text = Text(jnp.asarray(TEXT))
    return jax.jit(loaded.module.apply)(variables, tokens, jnp.full((1, 1), 0.7), text)


def changed(loaded, found):
    """Parameters with what is merged into them, and the adapters beside them."""
    low, rest = parted(found)
    return loaded.changed(lambda params: merged(params, rest)), low


def alike(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b) < 2e-5


@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape")  # of biases
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kind", ["lora", "lora_bias", "use_dora"])
def test_a_file_of_diffusers(folder, tmp_path, scan, kind):
    model = adapted(lora_alpha=8, **{kind: True} if kind != "lora" else {})
    model.save_lora_adapter(tmp_path)
    loaded = load_dit(folder, dtype=jnp.float32, scan_layers=scan)
    found = read_lora(tmp_path, TABLES, loaded.params)
    assert not found.left
    assert alike(ours(*changed(loaded, found.trees[ANY])), theirs(model))
    assert not alike(ours(loaded), theirs(model))


def test_a_folder_of_peft(folder, tmp_path):
    config = peft.LoraConfig(target_modules=TARGETS, r=4, lora_alpha=6, use_rslora=True)
    model = peft.get_peft_model(network(), config)
    for i, (name, value) in enumerate(model.named_parameters()):
        if "lora_" in name:
            value.data = torch.from_numpy(0.3 * draw(*value.shape, seed=i))
    model.save_pretrained(tmp_path)
    loaded = load_dit(folder, dtype=jnp.float32)
    found = read_lora(tmp_path, TABLES, loaded.params).trees[ANY]
    assert alike(ours(loaded, found), theirs(model.base_model.model))


@pytest.mark.parametrize("kohya", [False, True])
def test_names_of_comfyui_and_kohya_with_alphas(folder, tmp_path, kohya):
    model = adapted(lora_alpha=8)
    model.save_lora_adapter(tmp_path)
    tensors = {}
    (file,) = tmp_path.glob("*.safetensors")
    for name, value in load_file(file).items():
        name = name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        for theirs_, original, _ in wan._BLOCK:
            name = name.replace(f".{theirs_}.", f".{original}.")
        tensors[name.replace("transformer.", "diffusion_model.")] = value
        if "lora_up" in name:
            layer = name.partition(".lora_up")[0]
            layer = layer.replace("transformer.", "diffusion_model.")
            tensors[f"{layer}.alpha"] = np.full((), 8, np.float32)
    assert any("self_attn" in name for name in tensors)
    if kohya:
        # blocks.0.self_attn.q.alpha -> lora_unet_blocks_0_self_attn_q.alpha
        layers = r"(?:diffusion_model\.)?(blocks.+?)(\.(?:lora_\w+\.weight|alpha))"

        def joined(match):
            return f"lora_unet_{match[1].replace('.', '_')}{match[2]}"

        tensors = {re.sub(layers, joined, name): x for name, x in tensors.items()}
        assert "lora_unet_blocks_0_self_attn_q.lora_down.weight" in tensors
    save_file(tensors, tmp_path / "comfy.safetensors")
    loaded = load_dit(folder, dtype=jnp.float32)
    found = read_lora(tmp_path / "comfy.safetensors", TABLES, loaded.params).trees[ANY]
    assert alike(ours(loaded, found), theirs(model))


@pytest.mark.parametrize("scan", [False, True])
def test_ours_loads_there(folder, tmp_path, scan):
    loaded = load_dit(folder, dtype=jnp.float32, scan_layers=scan)
    lora = LoRA(rank=3, alpha=9.0, targets=(r"attention/", "fc_out$", "patch_embed$"))
    adapters = lora.init(jax.random.key(0), loaded.params)
    adapters = jax.tree.map(lambda x: 0.3 * jnp.asarray(draw(*x.shape)), adapters)
    active = lora.active(adapters, training=False)
    file = write_lora(tmp_path, active, TABLES[0])
    assert file.name == FILE
    model = network()
    model.load_lora_adapter(tmp_path, prefix="transformer", use_safetensors=True)
    assert alike(ours(loaded, active), theirs(model))
    again = read_lora(file, TABLES, loaded.params).trees[ANY]
    jax.tree.map(np.testing.assert_array_equal, again, active)


def test_an_accelerator_that_diffusers_loads(folder, tmp_path):
    """Factors and biases in ComfyUI's names; diffusers leaves differences of norms."""
    tensors, model = {}, network()
    for i, (name, original, ours_) in enumerate(wan._BLOCK):
        layer = dict(model.blocks[0].named_modules()).get(name)
        if "norm" in ours_ or layer is None:
            continue
        for block in (0, 1):
            stem = f"diffusion_model.blocks.{block}.{original}"
            down, up = (4, layer.in_features), (layer.out_features, 4)
            tensors[f"{stem}.lora_down.weight"] = 0.3 * draw(*down, seed=10 * i + block)
            tensors[f"{stem}.lora_up.weight"] = 0.3 * draw(*up, seed=10 * i + block + 2)
            tensors[f"{stem}.alpha"] = np.full((), 2, np.float32)
            tensors[f"{stem}.diff_b"] = draw(layer.out_features, seed=i)
    save_file(tensors, file := tmp_path / "x.safetensors")
    held, _ = diffusers.WanPipeline.lora_state_dict(file, return_lora_metadata=True)
    model.load_lora_adapter(held, prefix="transformer")
    loaded = load_dit(folder, dtype=jnp.float32)
    found = read_lora(file, TABLES, loaded.params)
    assert not found.left and len(tensors) == 80
    assert alike(ours(*changed(loaded, found.trees[ANY])), theirs(model))


def test_another_networks_file_is_named(folder, tmp_path):
    loaded = load_dit(folder, dtype=jnp.float32)
    name = "unet.down_blocks.0.lora_A.weight"
    save_file({name: draw(4, 24)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no adapters of this network: .*unet"):
        read_lora(tmp_path / "other.safetensors", TABLES, loaded.params)
