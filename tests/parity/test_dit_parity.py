"""The DiT against diffusers' WanTransformer3DModel, on equal random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from jvdit.models.dit import VARIANTS, DiT
from jvdit.shapes import Text, Tokens

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

DEPTH, HEADS, HEAD_DIM, TEXT, FFN = 2, 3, 16, 20, 80
FRAMES, HEIGHT, WIDTH = 3, 4, 3  # latents in patches

# Their module -> ours; {i} runs over the blocks.
MODULES = {
    "condition_embedder.time_embedder.linear_1": "time_embed/fc_in",
    "condition_embedder.time_embedder.linear_2": "time_embed/fc_out",
    "condition_embedder.time_proj": "time_proj",
    "condition_embedder.text_embedder.linear_1": "text_embed/fc_in",
    "condition_embedder.text_embedder.linear_2": "text_embed/fc_out",
    "patch_embedding": "patch_embed",
    "blocks.{i}.norm2": "block_{i}/cross_norm",
    "blocks.{i}.ffn.net.0.proj": "block_{i}/mlp/fc_in",
    "blocks.{i}.ffn.net.2": "block_{i}/mlp/fc_out",
    "proj_out": "head",
} | {
    f"blocks.{{i}}.{theirs}.{part}": f"block_{{i}}/{ours}/{name}"
    for theirs, ours in (("attn1", "self_attention"), ("attn2", "cross_attention"))
    for part, name in {
        "to_q": "query",
        "to_k": "key",
        "to_v": "value",
        "to_out.0": "out",
        "norm_q": "query_norm",
        "norm_k": "key_norm",
    }.items()
}
TABLES = {
    "blocks.{i}.scale_shift_table": "block_{i}/modulation/table",
    "scale_shift_table": "head_modulation/table",
}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def oracle(channels):
    """Their network, every parameter drawn at random."""
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT,
        freq_dim=256,
        ffn_dim=FFN,
        num_layers=DEPTH,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    ).eval()
    for seed, (name, value) in enumerate(model.named_parameters()):
        drawn = draw(*value.shape, seed=seed)
        if name.endswith("bias") or "table" in name:
            drawn = 0.3 * drawn
        elif value.ndim == 1:
            drawn = 1 + 0.2 * drawn
        else:
            drawn = drawn / np.sqrt(np.prod(value.shape[1:]))
        value.data = torch.from_numpy(np.asarray(drawn, np.float32))
    return model


def imported(model):
    """Their parameters under our names; every one of them is used once."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    params = {}

    def put(path, leaf, value):
        *parents, last = (*path.split("/"), leaf) if leaf else path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(value)

    for i in range(DEPTH):
        for theirs, ours in MODULES.items():
            theirs, ours = theirs.format(i=i), ours.format(i=i)
            for leaf in ("weight", "bias"):
                value = state.pop(f"{theirs}.{leaf}", None)
                if value is None:
                    continue
                if leaf == "bias":
                    put(ours, "bias", value)
                elif value.ndim == 1:
                    put(ours, "scale", value)
                elif value.ndim == 5:
                    order = "d c pt ph pw -> (pt ph pw c) d"
                    put(ours, "kernel", rearrange(value, order))
                else:
                    put(ours, "kernel", value.T)
        for theirs, ours in TABLES.items():
            value = state.pop(theirs.format(i=i), None)
            if value is not None:
                put(ours.format(i=i), "", value[0])
    assert not state, f"not imported: {sorted(state)}"
    return params


def compare(channels, t, level):
    """Runs both; `t` and `level` as ours, theirs gets a timestep for each token."""
    theirs = oracle(channels)
    rows = t.shape[0]
    latents = draw(rows, channels, FRAMES, 2 * HEIGHT, 2 * WIDTH, seed=100)
    embeds = draw(rows, 12, TEXT, seed=101)
    timestep = t[:, 0] if level is None else np.take_along_axis(t, level, axis=1)
    with torch.no_grad():
        want = theirs(
            torch.from_numpy(latents),
            torch.from_numpy(1000 * timestep),
            torch.from_numpy(embeds),
        ).sample.numpy()
    pattern = "b c f (h p) (w q) -> b (f h w) (p q c)"
    cells = np.stack(np.indices((FRAMES, HEIGHT, WIDTH)), -1).reshape(1, -1, 3)
    tokens = Tokens(
        jnp.asarray(rearrange(latents, pattern, p=2, q=2)),
        jnp.asarray(np.repeat(cells, rows, axis=0), jnp.float32),
        level=None if level is None else jnp.asarray(level),
    )
    model = DiT(
        width=HEADS * HEAD_DIM,
        depth=DEPTH,
        num_heads=HEADS,
        ffn_width=FFN,
        in_channels=4 * channels,
        out_channels=4 * channels,
        text_width=TEXT,
    )
    out = jax.jit(model.apply)(
        {"params": imported(theirs)}, tokens, jnp.asarray(t), Text(jnp.asarray(embeds))
    )
    want = rearrange(want, pattern, p=2, q=2)
    error = np.linalg.norm(out - want) / np.linalg.norm(want)
    print(f"relative error {error:.1e}, velocity rms {np.sqrt(np.mean(want**2)):.2f}")
    assert error < 2e-5


def test_t2v_with_one_level_in_a_row():
    compare(16, np.array([[0.999], [0.037]], np.float32), None)


def test_ti2v_with_a_clean_first_frame():
    level = np.repeat([[0, 1, 1]], HEIGHT * WIDTH, axis=1).astype(np.int32)
    compare(48, np.array([[0.0, 0.731]], np.float32), level)


@pytest.mark.parametrize(
    ("name", "sizes"),
    {
        "wan2.1-t2v-1.3b": (30, 12, 8960, 16, 16),
        "wan2.1-t2v-14b": (40, 40, 13824, 16, 16),
        "wan2.2-t2v-a14b": (40, 40, 13824, 16, 16),
        "wan2.2-i2v-a14b": (40, 40, 13824, 36, 16),
        "wan2.2-ti2v-5b": (30, 24, 14336, 48, 48),
    }.items(),
)
def test_rows_of_the_size_table_have_the_parameters_of_the_releases(name, sizes):
    depth, heads, ffn, in_channels, out_channels = sizes
    with torch.device("meta"):
        theirs = diffusers.WanTransformer3DModel(
            num_layers=depth,
            num_attention_heads=heads,
            ffn_dim=ffn,
            in_channels=in_channels,
            out_channels=out_channels,
        )
    model = DiT(**VARIANTS[name], scan_layers=True)
    channels = VARIANTS[name]["in_channels"]
    tokens = Tokens(jnp.zeros((1, 1, channels)), jnp.zeros((1, 1, 3)))
    inputs = tokens, jnp.zeros((1, 1)), Text(jnp.zeros((1, 1, 4096)))
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    ours = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
    assert ours == sum(value.numel() for value in theirs.parameters())
