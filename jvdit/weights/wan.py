"""Rule table of the Wan 2.1 and 2.2 DiTs: from released tensor names to parameters.

The names are those of diffusers, or those of the original release
(github.com/Wan-Video/Wan2.1, Wan2.2).
"""

from jvdit.weights.rules import Rule, modules, norms

LAYOUTS = ("diffusers", "original")

# Layers of a block, and those before and after the blocks: diffusers' name, the
# original name, and ours.
_BLOCK_LINEAR = (
    ("attn1.to_q", "self_attn.q", "self_attention/query"),
    ("attn1.to_k", "self_attn.k", "self_attention/key"),
    ("attn1.to_v", "self_attn.v", "self_attention/value"),
    ("attn1.to_out.0", "self_attn.o", "self_attention/out"),
    ("attn2.to_q", "cross_attn.q", "cross_attention/query"),
    ("attn2.to_k", "cross_attn.k", "cross_attention/key"),
    ("attn2.to_v", "cross_attn.v", "cross_attention/value"),
    ("attn2.to_out.0", "cross_attn.o", "cross_attention/out"),
    ("ffn.net.0.proj", "ffn.0", "mlp/fc_in"),
    ("ffn.net.2", "ffn.2", "mlp/fc_out"),
)
# Keys and values of an image (2.1 I2V), and the extra layer of control blocks (VACE).
_IMAGE_LINEAR = (
    ("attn2.add_k_proj", "cross_attn.k_img", "cross_attention/image_key"),
    ("attn2.add_v_proj", "cross_attn.v_img", "cross_attention/image_value"),
)
_IMAGE_NORM = (
    ("attn2.norm_added_k", "cross_attn.norm_k_img", "cross_attention/image_key_norm"),
)
_CONTROL = (("proj_out", "after_proj", "hint"),)
_BLOCK_NORM = (
    ("attn1.norm_q", "self_attn.norm_q", "self_attention/query_norm"),
    ("attn1.norm_k", "self_attn.norm_k", "self_attention/key_norm"),
    ("attn2.norm_q", "cross_attn.norm_q", "cross_attention/query_norm"),
    ("attn2.norm_k", "cross_attn.norm_k", "cross_attention/key_norm"),
    ("norm2", "norm3", "cross_norm"),
)
_ENDS = (
    (
        "condition_embedder.text_embedder.linear_1",
        "text_embedding.0",
        "text_embed/fc_in",
    ),
    (
        "condition_embedder.text_embedder.linear_2",
        "text_embedding.2",
        "text_embed/fc_out",
    ),
    (
        "condition_embedder.time_embedder.linear_1",
        "time_embedding.0",
        "time_embed/fc_in",
    ),
    (
        "condition_embedder.time_embedder.linear_2",
        "time_embedding.2",
        "time_embed/fc_out",
    ),
    ("condition_embedder.time_proj", "time_projection.1", "time_proj"),
    ("proj_out", "head.head", "head"),
)
_IMAGE_ENDS = (
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1", "mlp/fc_in"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3", "mlp/fc_out"),
)
_IMAGE_END_NORMS = (
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0", "norm_in"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4", "norm_out"),
)
_IMAGE_POSITIONS = ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos")
_PATCH, _CELLS = "o c t h w -> (t h w c) o", {"t": 1, "h": 2, "w": 2}


def dit_rules(
    layout: str = "diffusers", channels: tuple[int, int] | None = None
) -> list[Rule]:
    """The rule table of a DiT with all of its branches (I2V, VACE).

    Args:
        layout: whose tensor names the table reads, one of `LAYOUTS`.
        channels: latent channels of the noisy input and of the conditioning input,
            which an I2V network's patch embedding takes together; None: the network
            takes the noisy input alone.
    """
    which = LAYOUTS.index(layout)
    linear = {names[which]: names[2] for names in _ENDS}
    linear |= {n[which]: f"image_embed/{n[2]}" for n in _IMAGE_ENDS}
    norm = {n[which]: f"image_embed/{n[2]}" for n in _IMAGE_END_NORMS}
    first = ("vace_blocks.0.proj_in", "vace_blocks.0.before_proj")[which]
    linear[first] = "control_in"
    for theirs, ours in (("blocks", "block"), ("vace_blocks", "control")):
        rows = (
            *_BLOCK_LINEAR,
            *_IMAGE_LINEAR,
            *(_CONTROL if ours == "control" else ()),
        )
        linear |= {f"{theirs}.{{i}}.{n[which]}": f"{ours}_{{i}}/{n[2]}" for n in rows}
        rows = (*_BLOCK_NORM, *_IMAGE_NORM)
        norm |= {f"{theirs}.{{i}}.{n[which]}": f"{ours}_{{i}}/{n[2]}" for n in rows}
    parts = ("patch_embed",) if channels is None else ("patch_embed", "cond_embed")
    patches = [
        Rule(
            "patch_embedding.weight",
            f"{ours}/kernel",
            _PATCH,
            _CELLS,
            part=(i, channels or 1),
            axis=1,
        )
        for i, ours in enumerate(parts)
    ]
    patches.append(Rule("patch_embedding.bias", "patch_embed/bias"))
    patches += modules({"vace_patch_embedding": "control_embed"}, _PATCH, **_CELLS)
    table = ("scale_shift_table", "modulation")[which]
    tables = [
        Rule(f"blocks.{{i}}.{table}", "block_{i}/modulation/table", "1 r d -> r d"),
        Rule(
            f"vace_blocks.{{i}}.{table}", "control_{i}/modulation/table", "1 r d -> r d"
        ),
        Rule(
            ("scale_shift_table", "head.modulation")[which],
            "head_modulation/table",
            "1 r d -> r d",
        ),
        Rule(_IMAGE_POSITIONS[which], "image_embed/table", "1 i c -> i c"),
    ]
    # diffusers' I2V releases hold a norm that its code doesn't use.
    unread = Rule("blocks.{i}.attn2.norm_added_q.weight", "")
    return [*modules(linear), *norms(norm), *patches, *tables, unread]
