"""Rule table of CLIP's image encoder: from released tensor names to our parameters.

The names are those of transformers, or those of Wan's original release, whose own class
holds CLIP together with an XLM-Roberta. Releases hold more than Wan uses: the last
layer, the final norm, projections, and a text encoder.
"""

from dataclasses import replace

from jvdit.models.image_encoder import ImageEncoder
from jvdit.weights.rules import LAYOUTS, Rule, layers, unread

_PATCH = "o c h w -> (h w c) o"
# Layers of a block: transformers' name, the original name, and ours.
_BLOCK = (
    ("self_attn.out_proj", "attn.proj", "attention/out"),
    ("mlp.fc1", "mlp.0", "mlp/fc_in"),
    ("mlp.fc2", "mlp.2", "mlp/fc_out"),
    ("layer_norm1", "norm1", "attention_norm"),
    ("layer_norm2", "norm2", "mlp_norm"),
)
# The original keeps them in one matrix, in this order.
_QKV = (
    ("self_attn.q_proj", "attn.to_qkv", "attention/query"),
    ("self_attn.k_proj", "attn.to_qkv", "attention/key"),
    ("self_attn.v_proj", "attn.to_qkv", "attention/value"),
)
_FIRST, _LAST = ("pre_layrnorm", "pre_norm"), ("post_layernorm", "post_norm")
_LAYERS = ("encoder.layers.{i}.", "transformer.{i}.")

# Unused tensors of a release.
_TEXT = "text_model."
_UNREAD = (
    *("logit_scale", "text_projection", "visual_projection"),
    f"{_TEXT}embeddings.position_ids",
    f"{_TEXT}embeddings.position_embedding",
    f"{_TEXT}embeddings.token_embedding",
    f"{_TEXT}final_layer_norm",
    *(f"{_TEXT}{_LAYERS[0]}{row[0]}" for row in (*_BLOCK, *_QKV)),
)
_ROBERTA = ("attn.q", "attn.k", "attn.v", "attn.o", "norm1", "norm2", "ffn.0", "ffn.2")
_UNREAD_ORIGINAL = (
    *("log_scale", "visual.head", "textual.head.0", "textual.head.2", "textual.norm"),
    *(f"textual.{kind}_embedding" for kind in ("pos", "token", "type")),
    *(f"textual.blocks.{{i}}.{name}" for name in _ROBERTA),
)


def rules(encoder: ImageEncoder, layout: str = LAYOUTS[0]) -> list[Rule]:
    """The rule table of an image encoder.

    Args:
        encoder: the encoder; the release's layer after its last one isn't read.
        layout: whose tensor names the table reads, one of `LAYOUTS`.
    """
    if LAYOUTS.index(layout):
        return [*_image(encoder, "visual.", 1), *unread(*_UNREAD_ORIGINAL)]
    # transformers 5 drops the prefix when it saves the image encoder alone.
    shorter = [replace(rule, tied=True) for rule in _image(encoder, "", 0)]
    return [*_image(encoder, "vision_model.", 0), *shorter, *unread(*_UNREAD)]


def _image(encoder: ImageEncoder, prefix: str, which: int) -> list[Rule]:
    """Rules of the image encoder, whose names begin with `prefix`."""
    base = prefix + ("embeddings.", "")[which]
    side = {"h": encoder.patch_size, "w": encoder.patch_size}
    token, position, layouts = (
        ("class_embedding", "position_embedding.weight", ("", "")),
        ("cls_embedding", "pos_embedding", ("1 1 d -> d", "1 i d -> i d")),
    )[which]
    found = [
        Rule(f"{base}patch_embedding.weight", "embed/patch/kernel", _PATCH, side),
        Rule(f"{base}{token}", "embed/embedding", layouts[0]),
        Rule(f"{base}{position}", "embed/table", layouts[1]),
        *layers([(f"{prefix}{_FIRST[which]}", "norm")], 0),
    ]
    for i in range(encoder.depth):
        names = f"{prefix}{_LAYERS[which].format(i=i)}", f"block_{i}/"
        found += layers(_BLOCK, which, *names)
        for part, row in enumerate(_QKV):
            parts = (part, len(_QKV)) if which else (0, 1)
            found += [replace(x, part=parts) for x in layers([row], which, *names)]
    after = f"{prefix}{_LAYERS[which].format(i=encoder.depth)}"
    found += unread(*(f"{after}{row[which]}" for row in (*_BLOCK, *_QKV)))
    # Older versions of transformers saved the position ids.
    return [*found, *unread(f"{prefix}{_LAST[which]}", f"{base}position_ids")]
