"""The DiT against diffusers' WanTransformer3DModel, on equal random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from jvdit.models.dit import VARIANTS, DiT
from jvdit.shapes import Text, Tokens
from jvdit.weights import wan
from jvdit.weights.released_configs import patch_channels
from jvdit.weights.rules import assign, export, loader, paths_of

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

DEPTH, HEADS, HEAD_DIM, TEXT, FFN, IMAGE = 3, 3, 16, 20, 80, 24
FRAMES, HEIGHT, WIDTH = 3, 4, 3  # latents in patches
OUT = {16: 16, 36: 16, 48: 48}  # latent channels of noise, of those taken


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def oracle(channels, control=0, **options):
    """Their network, every parameter drawn at random."""
    kind = diffusers.WanTransformer3DModel
    if control:
        kind = diffusers.WanVACETransformer3DModel
        options = {"vace_in_channels": control, "vace_layers": [0, 2]} | options
    model = kind(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=channels,
        out_channels=OUT[channels],
        text_dim=TEXT,
        freq_dim=256,
        ffn_dim=FFN,
        num_layers=DEPTH,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
        **options,
    ).eval()
    for seed, (name, value) in enumerate(model.named_parameters()):
        drawn = draw(*value.shape, seed=seed)
        if name.endswith("bias") or "table" in name or "pos_embed" in name:
            drawn = 0.3 * drawn
        elif value.ndim == 1:
            drawn = 1 + 0.2 * drawn
        else:
            drawn = drawn / np.sqrt(np.prod(value.shape[1:]))
        value.data = torch.from_numpy(np.asarray(drawn, np.float32))
    return model


def patches(latents):
    pattern = "b c f (h p) (w q) -> b (f h w) (p q c)"
    return jnp.asarray(rearrange(latents, pattern, p=2, q=2))


def compare(channels, t, level=None, *, states=12, control=0, image=None, scan=False):
    """Runs both; `t` and `level` as ours, theirs gets a timestep for each token."""
    options, more, fields = {}, {}, {}
    rows = t.shape[0]
    if image is not None:
        pictures, positions = image
        drawn = draw(rows, pictures * 5, IMAGE, seed=103)
        options = {"image_dim": IMAGE, "added_kv_proj_dim": HEADS * HEAD_DIM}
        options |= {"pos_embed_seq_len": 5 * pictures if positions else None}
        fields = {"image_width": IMAGE, "image_length": 5 * pictures * positions}
        split = drawn.reshape(-1, 5, IMAGE) if positions else drawn
        more = {"encoder_hidden_states_image": torch.from_numpy(split)}
    size = (FRAMES, 2 * HEIGHT, 2 * WIDTH)
    if control:
        signal = draw(rows, control, *size, seed=102)
        more |= {"control_hidden_states": torch.from_numpy(signal)}
        fields |= {"control_channels": 4 * control, "control_layers": (0, 2)}
    theirs = oracle(channels, control, **options)
    latents = draw(rows, channels, *size, seed=100)
    embeds = draw(rows, states, TEXT, seed=101)
    timestep = t[:, 0] if level is None else np.take_along_axis(t, level, axis=1)
    with torch.no_grad():
        want = theirs(
            torch.from_numpy(latents),
            torch.from_numpy(1000 * timestep),
            torch.from_numpy(embeds),
            **more,
        ).sample.numpy()
    cells = np.stack(np.indices((FRAMES, HEIGHT, WIDTH)), -1).reshape(1, -1, 3)
    given = OUT[channels]
    tokens = Tokens(
        patches(latents[:, :given]),
        jnp.asarray(np.repeat(cells, rows, axis=0), jnp.float32),
        level=None if level is None else jnp.asarray(level),
        cond=patches(latents[:, given:]) if given < channels else None,
        control=patches(signal) if control else None,
    )
    model = DiT(
        width=HEADS * HEAD_DIM,
        depth=DEPTH,
        num_heads=HEADS,
        ffn_width=FFN,
        in_channels=4 * given,
        out_channels=4 * given,
        cond_channels=4 * (channels - given),
        text_width=TEXT,
        scan_layers=scan,
        **fields,
    )
    picture = None if image is None else jnp.asarray(drawn)
    inputs = tokens, jnp.asarray(t), Text(jnp.asarray(embeds), image=picture)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    tensors = {name: value.numpy() for name, value in theirs.state_dict().items()}
    rules = wan.dit_rules(channels=patch_channels(model))
    params = loader(rules, tensors, shapes)()
    back = export(rules, params)
    assert back.keys() == tensors.keys()
    assert all((back[name] == tensors[name]).all() for name in back)
    out = jax.jit(model.apply)({"params": params}, *inputs)
    want = patches(want)
    error = np.linalg.norm(out - want) / np.linalg.norm(want)
    print(f"relative error {error:.1e}, velocity rms {np.sqrt(np.mean(want**2)):.2f}")
    assert error < 2e-5


def test_t2v_with_one_level_in_a_row():
    compare(16, np.array([[0.999], [0.037]], np.float32))


def test_ti2v_with_a_clean_first_frame():
    level = np.repeat([[0, 1, 1]], HEIGHT * WIDTH, axis=1).astype(np.int32)
    compare(48, np.array([[0.0, 0.731]], np.float32), level)


ONE = np.array([[0.731]], np.float32)


def test_i2v_attends_to_a_picture():
    # diffusers takes all states but the last 512 for those of the picture.
    compare(36, ONE, states=512, image=(1, False))


def test_flf2v_attends_to_two_pictures_whose_states_have_positions():
    compare(36, ONE, states=512, image=(2, True))


@pytest.mark.parametrize("scan", [False, True])
def test_vace_takes_hints_from_control_signals(scan):
    compare(16, ONE, control=96, scan=scan)


SIZES = {
    "wan2.1-t2v-1.3b": (30, 12, 8960, 16, 16),
    "wan2.1-t2v-14b": (40, 40, 13824, 16, 16),
    "wan2.1-i2v-14b": (40, 40, 13824, 36, 16, {"image_dim": 1280}),
    "wan2.1-flf2v-14b": (
        *(40, 40, 13824, 36, 16),
        {"image_dim": 1280, "pos_embed_seq_len": 514},
    ),
    "wan2.1-vace-1.3b": (30, 12, 8960, 16, 16, {"vace_layers": [*range(0, 30, 2)]}),
    "wan2.1-vace-14b": (40, 40, 13824, 16, 16, {"vace_layers": [*range(0, 40, 5)]}),
    "wan2.2-t2v-a14b": (40, 40, 13824, 16, 16),
    "wan2.2-i2v-a14b": (40, 40, 13824, 36, 16),
    "wan2.2-ti2v-5b": (30, 24, 14336, 48, 48),
}


@pytest.mark.parametrize("name", SIZES)
def test_rows_of_the_size_table_have_the_parameters_of_the_releases(name):
    depth, heads, ffn, in_channels, out_channels, *more = SIZES[name]
    options = more[0] if more else {}
    if "image_dim" in options:
        options["added_kv_proj_dim"] = 5120
    kind = diffusers.WanTransformer3DModel
    if "vace_layers" in options:
        kind = diffusers.WanVACETransformer3DModel
    with torch.device("meta"):
        theirs = kind(
            num_layers=depth,
            num_attention_heads=heads,
            ffn_dim=ffn,
            in_channels=in_channels,
            out_channels=out_channels,
            **options,
        )
    row = VARIANTS[name]
    model = DiT(**row, scan_layers=True)
    control = row.get("control_channels")
    tokens = Tokens(
        jnp.zeros((1, 1, row["in_channels"])),
        jnp.zeros((1, 1, 3)),
        cond=jnp.zeros((1, 1, 80)) if "cond_channels" in row else None,
        control=jnp.zeros((1, 1, control)) if control else None,
    )
    states = row.get("image_length") or 257
    image = jnp.zeros((1, states, 1280)) if "image_width" in row else None
    inputs = tokens, jnp.zeros((1, 1)), Text(jnp.zeros((1, 1, 4096)), image=image)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    ours = {path: tuple(leaf.shape) for path, leaf in paths_of(params).items()}
    names = {name: tuple(x.shape) for name, x in theirs.state_dict().items()}
    rules = wan.dit_rules(channels=patch_channels(model))
    assert assign(rules, names, ours).keys() == ours.keys()
