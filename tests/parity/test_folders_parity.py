"""Folders that diffusers and transformers save load as they are."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from tiny_models import text_config

from jvdit.sharding import make_mesh
from jvdit.weights import umt5, wan, wan_vae
from jvdit.weights.folders import load_dit, load_text_encoder, load_vae
from jvdit.weights.released_configs import patch_channels
from jvdit.weights.rules import export, paths_of

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A tiny pipeline's folder, and its networks."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32}
    sizes |= {"ffn_dim": 40, "num_layers": 2}
    picture = {
        "in_channels": 36,
        "out_channels": 16,
        "image_dim": 24,
        "added_kv_proj_dim": 24,
    }
    control = {"vace_layers": [0, 1], "vace_in_channels": 96}
    networks = {
        "transformer": diffusers.WanTransformer3DModel(**sizes),
        "transformer_2": diffusers.WanTransformer3DModel(**sizes),
        "i2v/transformer": diffusers.WanTransformer3DModel(
            **sizes | picture, pos_embed_seq_len=10
        ),
        "vace/transformer": diffusers.WanVACETransformer3DModel(**sizes, **control),
        "vae": diffusers.AutoencoderKLWan(base_dim=4, z_dim=4),
        "text_encoder": transformers.UMT5EncoderModel(text_config(50)),
    }
    folder = tmp_path_factory.mktemp("release")
    for name, network in networks.items():
        network.eval().save_pretrained(folder / name, max_shard_size="100KB")
    return folder, networks


def same(rules, loaded, network):
    """Every tensor came through, bit for bit."""
    theirs = {name: value.numpy() for name, value in network.state_dict().items()}
    ours = export(rules, loaded.params)
    assert ours.keys() <= theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    return ours.keys() == theirs.keys()


@pytest.mark.parametrize("part", ["", "transformer_2", "i2v", "vace"])
def test_a_dit_of_a_folder(release, part):
    folder, networks = release
    name = part if part == "transformer_2" else f"{part}/transformer".lstrip("/")
    assert len(list((folder / name).glob("*.safetensors"))) > 1
    loaded = load_dit(folder / part, dtype=jnp.float32, scan_layers=part == "vace")
    rules = wan.dit_rules(channels=patch_channels(loaded.module))
    assert same(rules, loaded, networks[name])
    assert loaded.module.width == 24 and loaded.module.depth == 2
    assert loaded.module.image_length == (10 if part == "i2v" else 0)


def test_an_autoencoder_and_a_text_encoder(release):
    folder, networks = release
    vae = load_vae(folder)
    assert same(wan_vae.rules(vae.module), vae, networks["vae"])
    text = load_text_encoder(folder, dtype=jnp.float32)
    same(umt5.rules(), text, networks["text_encoder"])
    ids = jnp.array([[5, 7, 1]])
    with torch.no_grad():
        want = networks["text_encoder"](torch.tensor([[5, 7, 1]])).last_hidden_state
    found = jax.jit(text.module.apply)({"params": text.params}, ids, jnp.ones_like(ids))
    assert_close(found, want.numpy())


def test_on_a_mesh_and_in_half_precision(release):
    mesh = make_mesh({"fsdp": -1})
    loaded = load_dit(release[0], mesh, scan_layers=True)
    whole = load_dit(release[0], scan_layers=True)
    for path, leaf in paths_of(loaded.params).items():
        assert leaf.dtype == jnp.bfloat16 and leaf.sharding.mesh == mesh, path
        np.testing.assert_array_equal(leaf, paths_of(whole.params)[path])


def test_the_original_names_are_read_too(release, tmp_path):
    from safetensors.numpy import save_file

    folder, networks = release
    ours = load_dit(folder, dtype=jnp.float32)
    tensors = export(wan.dit_rules("original"), ours.params)
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    config = {"model_type": "t2v", "dim": 24, "ffn_dim": 40, "freq_dim": 256}
    config |= {"num_heads": 2, "num_layers": 2, "in_dim": 16, "out_dim": 16}
    config |= {"text_dim": 32, "eps": 1e-6, "_class_name": "WanModel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = load_dit(tmp_path, dtype=jnp.float32)
    assert again.module == ours.module
    assert same(wan.dit_rules(), again, networks["transformer"])


def test_another_family_and_a_missing_file_are_named(release, tmp_path):
    folder, _ = release
    with pytest.raises(FileNotFoundError, match="no config.json.*`transformer/`"):
        load_dit(tmp_path)
    with pytest.raises(ValueError, match="AutoencoderKLWan is not one of Wan's"):
        load_dit(folder / "vae")
    with pytest.raises(ValueError, match="lacks the.*`model_type`"):
        load_text_encoder(folder / "vae")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    for file in (folder / "transformer").glob("*.safetensors*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"ffn_dim": 40})[:-9])
    with pytest.raises(ValueError, match="config.json is damaged"):
        load_dit(tmp_path)
    less = {name: value for name, value in config.items() if name != "ffn_dim"}
    (tmp_path / "config.json").write_text(json.dumps(less))
    with pytest.raises(ValueError, match="config.json.*lacks.*`ffn_dim`"):
        load_dit(tmp_path)
    config["num_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="parameters get no tensor: block_2/"):
        load_dit(tmp_path)
    next(tmp_path.glob("*00001*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of"):
        load_dit(tmp_path)
