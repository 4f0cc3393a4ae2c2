"""The image encoder against transformers' CLIP: states, pictures, names."""

import json

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from jvdit.generation.footage import for_encoder
from jvdit.models.image_encoder import VARIANTS, ImageEncoder
from jvdit.sharding import make_mesh
from jvdit.weights import clip
from jvdit.weights.folders import load_image_encoder
from jvdit.weights.released_configs import ImageConfig
from jvdit.weights.rules import assign, export, paths_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.numpy")
pil_clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")

TINY = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 42,
    "patch_size": 14,
    "projection_dim": 20,
    "layer_norm_eps": 1e-3,
}
# As in image_encoder/config.json of Wan2.1-I2V-14B-480P-Diffusers.
OFFICIAL = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 1024,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}


def oracle(activation="gelu", **fields):
    """Their encoder, every parameter drawn at random."""
    config = transformers.CLIPVisionConfig(**TINY | fields, hidden_act=activation)
    model = transformers.CLIPVisionModel(config).eval()
    for seed, (name, value) in enumerate(model.named_parameters()):
        drawn = np.random.default_rng(seed).normal(size=value.shape)
        if value.ndim > 1 and "position" not in name:
            drawn = drawn / np.sqrt(value[0].numel())
        elif "norm" in name or "lay" in name:
            drawn = 0.2 * drawn + (1 if "norm" in name and "weight" in name else 0)
        value.data = torch.from_numpy(drawn.astype(np.float32))
    return model


def states_of(model, images):
    """What Wan reads, from pictures with the channels last."""
    with torch.no_grad():
        pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    return states[-2].numpy()


def drawn_images(batch=2, side=TINY["image_size"]):
    rng = np.random.default_rng(70)
    return jnp.asarray(rng.normal(size=(batch, side, side, 3)), jnp.float32)


def apply(loaded, images):
    return jax.jit(loaded.module.apply)({"params": loaded.params}, images)


def relative_error(found, want):
    return np.linalg.norm(found - want) / np.linalg.norm(want)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_states_are_theirs(activation, tmp_path):
    theirs, images = oracle(activation), drawn_images()
    theirs.save_pretrained(tmp_path / "image_encoder")
    loaded = load_image_encoder(tmp_path)
    assert loaded.module.depth == 2 and loaded.module.activation == activation
    want, out = states_of(theirs, images), apply(loaded, images)
    assert out.shape == want.shape == (2, 10, 48)
    error = relative_error(out, want)
    print(f"relative error {error:.1e}, state rms {np.sqrt(np.mean(want**2)):.2f}")
    assert error < 2e-5


def test_every_form_of_a_release_gives_the_same_states(tmp_path):
    """Names of transformers 4 and 5, a whole CLIP, the original's, and a mesh."""
    theirs, images = oracle(), drawn_images()
    theirs.save_pretrained(tmp_path)
    short = load_image_encoder(tmp_path)
    want = apply(short, images)

    file = tmp_path / "model.safetensors"
    tensors = safetensors.load_file(file)
    prefixed = {f"vision_model.{name}": value for name, value in tensors.items()}
    ids = {"vision_model.embeddings.position_ids": np.arange(10)[None]}
    head = {"visual_projection.weight": np.zeros((20, 48), np.float32)}
    safetensors.save_file(prefixed | ids | head, file)
    long = load_image_encoder(tmp_path, make_mesh({"fsdp": -1}))
    for path, leaf in paths_of(long.params).items():
        np.testing.assert_array_equal(leaf, paths_of(short.params)[path])

    text = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    text |= {"vocab_size": 9, "bos_token_id": 7, "eos_token_id": 8}
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=text, vision_config=theirs.config.to_dict(), projection_dim=20
        )
    )
    whole.vision_model.load_state_dict(theirs.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    np.testing.assert_array_equal(
        apply(load_image_encoder(tmp_path / "whole"), images), want
    )

    original = export(clip.rules(short.module, "original"), short.params)
    for kind in ("weight", "bias"):
        layer = "encoder.layers.1.self_attn."
        fused = [tensors[f"{layer}{name}_proj.{kind}"] for name in "qkv"]
        np.testing.assert_array_equal(
            original[f"visual.transformer.1.attn.to_qkv.{kind}"], np.concatenate(fused)
        )
    safetensors.save_file(original, file)
    np.testing.assert_array_equal(apply(load_image_encoder(tmp_path), images), want)


def test_another_family_is_named_and_missing_layers_are_listed(tmp_path):
    theirs = oracle()
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"model_type": "siglip_vision_model"}))
    with pytest.raises(ValueError, match="'siglip_vision_model'. must be.*'clip'"):
        load_image_encoder(tmp_path)
    file.write_text(json.dumps(config | {"hidden_act": "gelu_new"}))
    with pytest.raises(ValueError, match=r"`activation` \(='gelu_new'\) must be in"):
        load_image_encoder(tmp_path)
    file.write_text(json.dumps(config | {"num_hidden_layers": 4}))
    load_image_encoder(tmp_path)  # a release without its last layer holds enough
    file.write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(ValueError, match="parameters get no tensor: block_3/"):
        load_image_encoder(tmp_path)
    file.write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match="16 tensors have no place .*layers.2"):
        load_image_encoder(tmp_path)


# Pictures


@pytest.mark.parametrize("shape", [(96, 160), (500, 301), (224, 224), (1080, 1920)])
def test_pictures_are_prepared_as_theirs(shape):
    from PIL import Image

    rng = np.random.default_rng(71)
    small = rng.integers(0, 256, (*(side // 8 for side in shape), 3), np.uint8)
    # Both flat areas and noise; overshoots at their edges have to be clipped.
    picture = np.array(Image.fromarray(small).resize(shape[::-1], Image.Resampling.BOX))
    picture[: shape[0] // 2] = rng.integers(0, 256, (shape[0] // 2, shape[1], 3))
    processor = pil_clip.CLIPImageProcessorPil()
    want = processor(images=Image.fromarray(picture), return_tensors="np")
    want = want["pixel_values"][0].transpose(1, 2, 0)
    found = for_encoder(picture, 224)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, want, atol=1e-6)


# Names of the released networks


def parameters(module):
    side = module.image_size
    init = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    return {path: leaf.shape for path, leaf in paths_of(init["params"]).items()}


def test_the_official_encoder_maps_whole():
    config = transformers.CLIPVisionConfig(**OFFICIAL)
    module = ImageEncoder(**msgspec.convert(config.to_dict(), ImageConfig).fields)
    assert module == ImageEncoder(**VARIANTS["clip-vit-h-14"])
    with torch.device("meta"):
        network = transformers.CLIPVisionModel(config)
    theirs = {name: tuple(x.shape) for name, x in network.state_dict().items()}
    ours = parameters(module)
    for prefix in ("", "vision_model."):
        named = {prefix + name: shape for name, shape in theirs.items()}
        found = assign(clip.rules(module), named, ours)
        read = [pieces[0].name for pieces in found.values()]
        assert len(set(read)) == len(ours) == 31 * 16 + 5
        left = {name.removeprefix(prefix) for name in named.keys() - set(read)}
        assert all(n.startswith(("post_layernorm", "encoder.layers.31.")) for n in left)
        assert len(left) == 18


def original_shapes():
    """Names and sizes of XLMRobertaCLIP, ViT-H/14, in wan/modules/clip.py of Wan."""
    d, t = 1280, 1024
    shapes = {"log_scale": (), "visual.head": (d, t), "visual.cls_embedding": (1, 1, d)}
    shapes["visual.pos_embedding"] = (1, 257, d)
    shapes["visual.patch_embedding.weight"] = (d, 3, 14, 14)
    sizes = {"visual.pre_norm": (d,), "visual.post_norm": (d,), "textual.norm": (t,)}
    for i in range(32):
        layer = f"visual.transformer.{i}."
        sizes |= {layer + "norm1": (d,), layer + "norm2": (d,)}
        sizes |= {layer + "attn.to_qkv": (3 * d, d), layer + "attn.proj": (d, d)}
        sizes |= {layer + "mlp.0": (4 * d, d), layer + "mlp.2": (d, 4 * d)}
    for i in range(24):
        layer = f"textual.blocks.{i}."
        sizes |= {layer + f"attn.{name}": (t, t) for name in "qkvo"}
        sizes |= {layer + "norm1": (t,), layer + "norm2": (t,)}
        sizes |= {layer + "ffn.0": (4 * t, t), layer + "ffn.2": (t, 4 * t)}
    for name, size in sizes.items():
        shapes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    tables = {"token": 250002, "type": 1, "pos": 514}
    shapes |= {f"textual.{n}_embedding.weight": (s, t) for n, s in tables.items()}
    return shapes | {
        "textual.head.0.weight": (t, t),
        "textual.head.2.weight": (t, t),
    }


def test_the_original_release_maps_whole():
    module = ImageEncoder(**VARIANTS["clip-vit-h-14"])
    found = assign(
        clip.rules(module, "original"), original_shapes(), parameters(module)
    )
    (piece,) = found["block_30/attention/value/kernel"]
    assert piece.name == "visual.transformer.30.attn.to_qkv.weight"
    assert piece.rule.part == (2, 3)
