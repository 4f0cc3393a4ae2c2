"""Rule table of the Wan 2.1 and 2.2 autoencoders: from released names to parameters.

The released names number layers in ways that depend on the sizes, so the table is built
for a module: `rules(vae)`.
"""

from collections.abc import Iterator
from typing import Any

from jvdit.models.video_vae import VideoVAE
from jvdit.weights.rules import LAYOUTS, Rule, layers

# They store the scales of norms with axes of size 1.
_VIDEO: dict[str, Any] = {"layout": "o i t h w -> t h w i o"}
_VIDEO["norm"] = "gamma", "c 1 1 1 -> c"
_IMAGE: dict[str, Any] = {"layout": "o i h w -> h w i o"}
_IMAGE["norm"] = "gamma", "c 1 1 -> c"
# Layers, before, in and after the stages: diffusers' name, the original name, and ours.
_QUANT = (
    ("quant_conv", "conv1", "quant_conv"),
    ("post_quant_conv", "conv2", "post_quant_conv"),
)
_ENDS = (
    ("conv_in", "conv1", "conv_in"),
    ("norm_out", "head.0", "norm_out"),
    ("conv_out", "head.2", "conv_out"),
)
_MIDDLE = (
    ("mid_block.resnets.0", "middle.0", "mid_res_0"),
    ("mid_block.resnets.1", "middle.2", "mid_res_1"),
    ("mid_block.attentions.0", "middle.1", "mid_attention"),
)
_RES_BLOCK = (
    ("norm1", "residual.0", "norm_1"),
    ("conv1", "residual.2", "conv_1"),
    ("norm2", "residual.3", "norm_2"),
    ("conv2", "residual.6", "conv_2"),
    ("conv_shortcut", "shortcut", "shortcut"),
)
_ATTENTION = (("norm", "norm"), ("to_qkv", "qkv"), ("proj", "proj"))


def rules(vae: VideoVAE, layout: str = LAYOUTS[0]) -> list[Rule]:
    """The rule table of an autoencoder.

    Args:
        vae: the autoencoder.
        layout: whose tensor names the table reads, one of `LAYOUTS`.
    """
    which = LAYOUTS.index(layout)
    found = layers(_QUANT, which, **_VIDEO)
    for half in ("encoder", "decoder"):
        found += layers(_ENDS, which, f"{half}.", f"{half}/", **_VIDEO)
    for theirs, ours in _blocks(vae, which):
        if ours.endswith("attention/"):
            found += layers(_ATTENTION, 0, theirs, ours, **_IMAGE)
        elif ours.endswith("resample/"):
            found += layers([("resample.1", "conv")], 0, theirs, ours, **_IMAGE)
            found += layers([("time_conv", "time_conv")], 0, theirs, ours, **_VIDEO)
        else:
            found += layers(_RES_BLOCK, which, theirs, ours, **_VIDEO)
    return found


def _blocks(vae: VideoVAE, which: int) -> Iterator[tuple[str, str]]:
    """What their and our names of the layers in each block begin with.

    They number the decoder's stages from the coarsest on.
    """
    last = len(vae.multipliers) - 1
    for half, way in (("encoder", "down"), ("decoder", "up")):
        for row in _MIDDLE:
            yield f"{half}.{row[which]}.", f"{half}/{row[-1]}/"
        blocks = vae.num_res_blocks + (way == "up")
        sampler = f"{way}sampler" if vae.residual_shortcuts else f"{way}samplers.0"
        base = f"{half}.{way}{('_blocks', 'samples')[which]}"
        for stage in range(last + 1):
            place = f"{half}/{way}_{stage if way == 'down' else last - stage}"
            for block in range(blocks + (stage < last)):
                if not vae.residual_shortcuts and (which or way == "down"):
                    inner = f"{stage * (blocks + 1) + block}"
                elif which:
                    inner = f"{stage}.{way}samples.{block}"
                else:
                    name = sampler if block == blocks else f"resnets.{block}"
                    inner = f"{stage}.{name}"
                ours = "resample" if block == blocks else f"res_{block}"
                yield f"{base}.{inner}.", f"{place}/{ours}/"
