"""The audio autoencoder against diffusers' KVAE-Audio, on random weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from safetensors.numpy import save_file
from tiny_models import filled

from jvdit.models.audio_vae import VARIANTS, AudioVAE
from jvdit.models.audio_vae_chunked import decode_sound, encode_sound
from jvdit.weights import kvae
from jvdit.weights.encoders import load_sound_network
from jvdit.weights.folders import load_audio_vae
from jvdit.weights.rules import assign, export, paths_of

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# Strides, even and odd ones in every place, and channels.
SIZES = {
    "odd within": ([2, 3, 4], 1),
    "odd without": ([5, 2, 3], 2),
}
SAME = {"encoder_dim": 4, "latent_dim": 24, "codebook_dim": 5, "attn_num_heads": 3}
SAME |= {"decoder_dim": 48, "sample_rate": 8000}
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def draw(*shape):
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def applied(vae, params, x, method):
    return jax.jit(vae.apply, static_argnames="method")(
        {"params": params}, jnp.asarray(x), method=method
    )


@pytest.fixture(scope="module", params=SIZES)
def release(request, tmp_path_factory):
    """Their network, and the folder that it was saved to."""
    rates, channels = SIZES[request.param]
    sizes = {"encoder_rates": rates, "decoder_rates": rates[::-1]} | SAME
    with torch.no_grad():
        model = diffusers.AutoencoderKLKVAEAudio(**sizes, num_channels=channels)
        for name, value in filled(model).state_dict().items():
            if name.endswith("original0"):  # lengths of kernels: clear of the clamps
                value.mul_(0.5)
    folder = tmp_path_factory.mktemp("release")
    model.save_pretrained(folder)
    return model, folder


def test_a_folder_loads_and_computes_what_theirs_does(release):
    model, folder = release
    network = load_audio_vae(folder)
    vae, params = network.module, network.params
    assert (vae.sample_rate, vae.decoder_width) == (8000, 6)
    assert load_sound_network(folder).module == vae
    sound = draw(2, 7 * vae.hop - 4, vae.channels)
    with torch.no_grad():
        theirs = model.encode(torch.from_numpy(sound.mT.copy())).latent_dist
        decoded = model.decode(theirs.mean).sample.numpy().mT
        seen = [x.numpy().mT for x in (theirs.mean, theirs.logvar)]
    found = applied(vae, params, sound, "encode")
    assert found[0].shape == (2, 7, 5)
    # Neither the clamp nor the limiter would hide a difference.
    assert np.abs(seen[1]).max() < 20 and 0.02 < np.abs(decoded).max() < 0.99
    assert_close([*found], seen)
    assert_close(applied(vae, params, seen[0], "decode"), decoded)


def test_windows_are_the_whole_with_attention_too(release):
    vae, params = (x := load_audio_vae(release[1])).module, x.params
    window = 2 * max(vae.margins) + 3
    sound = draw(1, (2 * window + 5) * vae.hop, vae.channels)
    whole = applied(vae, params, sound, "encode")
    assert_close(encode_sound(vae, params, sound, window), whole)
    apart = applied(vae.clone(num_heads=0), params, sound, "encode")
    assert np.abs(apart[0] - whole[0]).max() > 0.1, "the attention counts"
    decoded = applied(vae, params, whole[0], "decode")
    assert_close(decode_sound(vae, params, whole[0], window), decoded)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_weights_come_back_bit_for_bit_under_both_names(release, layout, tmp_path):
    model, folder = release
    network = load_audio_vae(folder)
    tensors = export(kvae.rules(network.module, layout), network.params)
    (tmp_path / CONFIG).write_text((folder / CONFIG).read_text())
    save_file(tensors, tmp_path / WEIGHTS)
    again = load_audio_vae(tmp_path).params
    jax.tree.map(np.testing.assert_array_equal, again, network.params)
    theirs = {name: value.numpy() for name, value in model.state_dict().items()}
    if layout == "diffusers":
        assert tensors.keys() == theirs.keys()
        assert all((tensors[name] == theirs[name]).all() for name in theirs)
    else:
        assert tensors.keys().isdisjoint(x for x in theirs if "parametriz" in x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_rates": [1, 1, 1]}, "decoder_rates.*must be"),
        ({"num_channels": 6}, "num_channels.*must be 1 or 2"),
        ({"decoder_dim": 44}, "decoder_dim.*multiple of 8"),
        ({"attn_num_heads": 5}, "latent_dim.*multiple of 5"),
        ({"encoder_dim": 8}, "shapes differ: encoder"),
        ({"attn_num_heads": None}, "attn_num_heads"),
    ],
)
def test_what_cannot_be_expressed_is_refused(release, changes, message, tmp_path):
    _, folder = release
    config = json.loads((folder / CONFIG).read_text()) | changes
    (tmp_path / CONFIG).write_text(json.dumps(config))
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    with pytest.raises(ValueError, match=message):
        load_audio_vae(tmp_path)


def test_the_row_of_the_table_is_the_released_network():
    """By its parameters' names and shapes: the released sizes are diffusers' own."""
    vae = AudioVAE(**VARIANTS["kvae-audio"])
    shapes = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, vae.hop, 1)))
    ours = {path: x.shape for path, x in paths_of(shapes["params"]).items()}
    with torch.device("meta"):
        model = diffusers.AutoencoderKLKVAEAudio()
    theirs = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    assert len(assign(kvae.rules(vae), theirs, ours)) == len(theirs)
    assert vae.latent_rate == model.config.sample_rate / model.hop_length == 50
