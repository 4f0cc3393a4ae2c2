"""Rule table of CLIP's image encoder: from released tensor names to our parameters.

The names are those of transformers, or those of Wan's original release, whose own class
holds CLIP together with an XLM-Roberta. Releases hold more than Wan uses: the last
layer, the final norm, projections, and a text encoder.
"""

from collections.abc import Iterable
from dataclasses import replace

from jvdit.models.image_encoder import ImageEncoder
from jvdit.weights.rules import Rule, modules, norms

LAYOUTS = ("transformers", "original")

_PATCH = "o c h w -> (h w c) o"
# Layers of a block: transformers' name, the original name, and ours.
_LINEAR = (
    ("self_attn.out_proj", "attn.proj", "attention/out"),
    ("mlp.fc1", "mlp.0", "mlp/fc_in"),
    ("mlp.fc2", "mlp.2", "mlp/fc_out"),
)
_NORM = (
    ("layer_norm1", "norm1", "attention_norm"),
    ("layer_norm2", "norm2", "mlp_norm"),
)
# The original keeps queries, keys and values in one matrix, in this order.
_QKV = (
    ("self_attn.q_proj", "attention/query"),
    ("self_attn.k_proj", "attention/key"),
    ("self_attn.v_proj", "attention/value"),
)
_FUSED = "attn.to_qkv"
_ENDS = (("pre_layrnorm", "pre_norm"), ("post_layernorm", "post_norm"))

# Unused tensors of a release; a layer among them has a weight and a bias.
_UNREAD = (
    "logit_scale",
    "text_projection.weight",
    "visual_projection.weight",
    "text_model.embeddings.position_ids",
    "text_model.embeddings.position_embedding.weight",
    "text_model.embeddings.token_embedding.weight",
)
_UNREAD_ORIGINAL = (
    "log_scale",
    "visual.head",
    "textual.head.0.weight",
    "textual.head.2.weight",
    "textual.pos_embedding.weight",
    "textual.token_embedding.weight",
    "textual.type_embedding.weight",
)
_UNREAD_ORIGINAL_LAYERS = (
    "textual.norm",
    *(
        f"textual.blocks.{{i}}.{name}"
        for name in (
            *("attn.q", "attn.k", "attn.v", "attn.o"),
            *("norm1", "norm2", "ffn.0", "ffn.2"),
        )
    ),
)


def rules(encoder: ImageEncoder, layout: str = "transformers") -> list[Rule]:
    """The rule table of an image encoder.

    Args:
        encoder: the encoder; the release's layer after its last one isn't read.
        layout: whose tensor names the table reads, one of `LAYOUTS`.
    """
    if LAYOUTS.index(layout):
        unread = modules(dict.fromkeys(_UNREAD_ORIGINAL_LAYERS, ""))
        return [
            *_image(encoder, "visual.", 1),
            *(Rule(name, "") for name in _UNREAD_ORIGINAL),
            *_unread(unread),
        ]
    # transformers 5 drops the prefix when it saves the image encoder alone.
    shorter = [replace(rule, tied=True) for rule in _image(encoder, "", 0)]
    text = [*_layer("text_model.encoder.layers.{i}", "", 0)]
    text += norms({"text_model.final_layer_norm": ""})
    return [
        *_image(encoder, "vision_model.", 0),
        *shorter,
        *(Rule(name, "") for name in _UNREAD),
        *_unread(text),
    ]


def _image(encoder: ImageEncoder, prefix: str, which: int) -> list[Rule]:
    """Rules of the image encoder, whose names begin with `prefix`."""
    base = prefix + ("embeddings.", "")[which]
    side = {"h": encoder.patch_size, "w": encoder.patch_size}
    token, position, layout = (
        ("class_embedding", "position_embedding.weight", ""),
        ("cls_embedding", "pos_embedding", "1 i d -> i d"),
    )[which]
    found = [
        Rule(f"{base}patch_embedding.weight", "embed/patch/kernel", _PATCH, side),
        Rule(f"{base}{token}", "embed/embedding", "1 1 d -> d" if which else ""),
        Rule(f"{base}{position}", "embed/table", layout),
    ]
    first, last = (f"{prefix}{names[which]}" for names in _ENDS)
    found += norms({first: "norm"})
    layer = prefix + ("encoder.layers", "transformer")[which]
    for i in range(encoder.depth):
        found += _layer(f"{layer}.{i}", f"block_{i}", which)
    found += _unread(_layer(f"{layer}.{encoder.depth}", "", which))
    found += _unread(norms({last: ""}))
    # Older versions of transformers saved this buffer.
    return found if which else [*found, Rule(f"{base}position_ids", "")]


def _layer(theirs: str, ours: str, which: int) -> list[Rule]:
    """Rules of one layer."""
    found = modules({f"{theirs}.{n[which]}": f"{ours}/{n[2]}" for n in _LINEAR})
    found += norms({f"{theirs}.{n[which]}": f"{ours}/{n[2]}" for n in _NORM})
    for i, (name, place) in enumerate(_QKV):
        if not which:
            found += modules({f"{theirs}.{name}": f"{ours}/{place}"})
            continue
        fused = modules({f"{theirs}.{_FUSED}": f"{ours}/{place}"})
        found += [replace(rule, part=(i, len(_QKV))) for rule in fused]
    return found


def _unread(found: Iterable[Rule]) -> list[Rule]:
    """Rules for the same tensors that ignore them."""
    return [Rule(rule.theirs, "") for rule in found]
