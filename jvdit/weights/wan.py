"""Rule table of the Wan 2.1 and 2.2 DiTs: from released tensor names to parameters.

The names are those of diffusers, or those of the original release
(github.com/Wan-Video/Wan2.1, Wan2.2).
"""

from jvdit.weights.rules import LAYOUTS, Rule, layers, unread

# Layers of a block, and those before and after the blocks: diffusers' name, the
# original name, and ours.
_BLOCK = (
    ("attn1.to_q", "self_attn.q", "self_attention/query"),
    ("attn1.to_k", "self_attn.k", "self_attention/key"),
    ("attn1.to_v", "self_attn.v", "self_attention/value"),
    ("attn1.to_out.0", "self_attn.o", "self_attention/out"),
    ("attn1.norm_q", "self_attn.norm_q", "self_attention/query_norm"),
    ("attn1.norm_k", "self_attn.norm_k", "self_attention/key_norm"),
    ("attn2.to_q", "cross_attn.q", "cross_attention/query"),
    ("attn2.to_k", "cross_attn.k", "cross_attention/key"),
    ("attn2.to_v", "cross_attn.v", "cross_attention/value"),
    ("attn2.to_out.0", "cross_attn.o", "cross_attention/out"),
    ("attn2.norm_q", "cross_attn.norm_q", "cross_attention/query_norm"),
    ("attn2.norm_k", "cross_attn.norm_k", "cross_attention/key_norm"),
    ("norm2", "norm3", "cross_norm"),
    ("ffn.net.0.proj", "ffn.0", "mlp/fc_in"),
    ("ffn.net.2", "ffn.2", "mlp/fc_out"),
    # Keys and values of an image (2.1 I2V).
    ("attn2.add_k_proj", "cross_attn.k_img", "cross_attention/image_key"),
    ("attn2.add_v_proj", "cross_attn.v_img", "cross_attention/image_value"),
    ("attn2.norm_added_k", "cross_attn.norm_k_img", "cross_attention/image_key_norm"),
    # The extra layer of control blocks (VACE).
    ("proj_out", "after_proj", "hint"),
)
# What only sound goes through, in networks that were trained on with it: our names.
_SOUND = tuple(tuple(f"{name}_sound" for name in row) for row in _BLOCK[:4])
_EMBEDDERS = (
    ("text_embedder.linear_1", "text_embedding.0", "text_embed/fc_in"),
    ("text_embedder.linear_2", "text_embedding.2", "text_embed/fc_out"),
    ("time_embedder.linear_1", "time_embedding.0", "time_embed/fc_in"),
    ("time_embedder.linear_2", "time_embedding.2", "time_embed/fc_out"),
    ("time_proj", "time_projection.1", "time_proj"),
    ("image_embedder.ff.net.0.proj", "img_emb.proj.1", "image_embed/mlp/fc_in"),
    ("image_embedder.ff.net.2", "img_emb.proj.3", "image_embed/mlp/fc_out"),
    ("image_embedder.norm1", "img_emb.proj.0", "image_embed/norm_in"),
    ("image_embedder.norm2", "img_emb.proj.4", "image_embed/norm_out"),
)
_ENDS = (
    ("proj_out", "head.head", "head"),
    ("vace_blocks.0.proj_in", "vace_blocks.0.before_proj", "control_in"),
)
_CONTROL = (("vace_patch_embedding", "vace_patch_embedding", "control_embed"),)
_BLOCKS = (("blocks.{i}.", "block_{i}/"), ("vace_blocks.{i}.", "control_{i}/"))
_POSITIONS = ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos")
_WEIGHT = "patch_embedding.weight"
_PATCH, _CELLS = "o c t h w -> (t h w c) o", {"t": 1, "h": 2, "w": 2}


def dit_rules(
    layout: str = LAYOUTS[0], channels: tuple[int, int] | None = None
) -> list[Rule]:
    """The rule table of a DiT with all of its branches (I2V, VACE).

    Args:
        layout: whose tensor names the table reads, one of `LAYOUTS`.
        channels: latent channels of the noisy input and of the conditioning input,
            which an I2V network's patch embedding takes together; None: the network
            takes the noisy input alone.
    """
    which = LAYOUTS.index(layout)
    parts = ("patch_embed",) if channels is None else ("patch_embed", "cond_embed")
    found = [Rule("patch_embedding.bias", "patch_embed/bias")]
    for i, ours in enumerate(parts):
        part, kernel = (i, channels or 1), f"{ours}/kernel"
        found.append(Rule(_WEIGHT, kernel, _PATCH, _CELLS, part, axis=1))
    found += layers(_CONTROL, which, layout=_PATCH, **_CELLS)
    found += layers(_EMBEDDERS, which, ("condition_embedder.", "")[which])
    found += layers(_ENDS, which)
    tables = [
        (("scale_shift_table", "head.modulation")[which], "head_modulation"),
        (_POSITIONS[which], "image_embed"),
    ]
    for theirs, ours in _BLOCKS:
        found += layers((*_BLOCK, *_SOUND), which, theirs, ours)
        table = theirs + ("scale_shift_table", "modulation")[which]
        tables.append((table, f"{ours}modulation"))
    found += [Rule(name, f"{own}/table", "1 r d -> r d") for name, own in tables]
    # diffusers' I2V releases hold a norm that its code doesn't use.
    return [*found, *unread("blocks.{i}.attn2.norm_added_q")]
