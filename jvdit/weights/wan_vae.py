"""Rule table of the Wan 2.1 and 2.2 autoencoders: from released names to parameters.

The released names number layers in ways that depend on the sizes, so the table is built
for a module: `rules(vae)`.
"""

from collections.abc import Iterator

from jvdit.models.video_vae import VideoVAE
from jvdit.weights.rules import Rule

LAYOUTS = ("diffusers", "original")

_VIDEO = "o i t h w -> t h w i o"
_IMAGE = "o i h w -> h w i o"
# Parts of a residual block: diffusers' name, the original name, and ours.
_RES_NORM = (("norm1", "residual.0", "norm_1"), ("norm2", "residual.3", "norm_2"))
_RES_CONV = (
    ("conv1", "residual.2", "conv_1"),
    ("conv2", "residual.6", "conv_2"),
    ("conv_shortcut", "shortcut", "shortcut"),
)


def rules(vae: VideoVAE, layout: str = "diffusers") -> list[Rule]:
    """The rule table of an autoencoder.

    Args:
        vae: the autoencoder.
        layout: whose tensor names the table reads, one of `LAYOUTS`.
    """
    which = LAYOUTS.index(layout)
    found = _conv(("quant_conv", "conv1")[which], "quant_conv")
    found += _conv(("post_quant_conv", "conv2")[which], "post_quant_conv")
    for half in ("encoder", "decoder"):
        found += _conv(f"{half}.{('conv_in', 'conv1')[which]}", f"{half}/conv_in")
        found += _conv(f"{half}.{('conv_out', 'head.2')[which]}", f"{half}/conv_out")
        norm = ("norm_out", "head.0")[which]
        found.append(_gamma(f"{half}.{norm}", f"{half}/norm_out", 3))
        for theirs, ours in _middle(half, which):
            if ours.endswith("attention"):
                found += _attention(theirs, ours, which)
            else:
                found += _res_block(theirs, ours, which)
    for kind, theirs, ours in (*_down(vae, which), *_up(vae, which)):
        make = _res_block if kind == "block" else _resample
        found += make(theirs, ours, which)
    return found


def _middle(half: str, which: int) -> Iterator[tuple[str, str]]:
    names = (
        ("mid_block.resnets.0", "middle.0", "mid_res_0"),
        ("mid_block.attentions.0", "middle.1", "mid_attention"),
        ("mid_block.resnets.1", "middle.2", "mid_res_1"),
    )
    for row in names:
        yield f"{half}.{row[which]}", f"{half}/{row[2]}"


def _down(vae: VideoVAE, which: int) -> Iterator[tuple[str, str, str]]:
    """Kind, their name and our name of each layer in the encoder's stages."""
    stages, blocks = len(vae.multipliers), vae.num_res_blocks
    base = ("encoder.down_blocks", "encoder.downsamples")[which]
    for stage in range(stages):
        for block in range(blocks + (stage < stages - 1)):
            last = block == blocks
            if not vae.residual_shortcuts:
                theirs = f"{base}.{stage * (blocks + 1) + block}"
            elif which:
                theirs = f"{base}.{stage}.downsamples.{block}"
            else:
                inner = "downsampler" if last else f"resnets.{block}"
                theirs = f"{base}.{stage}.{inner}"
            ours = "resample" if last else f"res_{block}"
            yield (
                "resample" if last else "block",
                theirs,
                f"encoder/down_{stage}/{ours}",
            )


def _up(vae: VideoVAE, which: int) -> Iterator[tuple[str, str, str]]:
    """Kind, their name and our name of each layer in the decoder's stages.

    They number the decoder's stages from the coarsest on.
    """
    stages, blocks = len(vae.multipliers), vae.num_res_blocks + 1
    base = ("decoder.up_blocks", "decoder.upsamples")[which]
    for stage in range(stages):
        for block in range(blocks + (stage < stages - 1)):
            last = block == blocks
            if which and not vae.residual_shortcuts:
                theirs = f"{base}.{stage * (blocks + 1) + block}"
            elif which:
                theirs = f"{base}.{stage}.upsamples.{block}"
            else:
                up = "upsampler" if vae.residual_shortcuts else "upsamplers.0"
                theirs = f"{base}.{stage}.{up if last else f'resnets.{block}'}"
            ours = "resample" if last else f"res_{block}"
            place = f"decoder/up_{stages - 1 - stage}/{ours}"
            yield "resample" if last else "block", theirs, place


def _conv(theirs: str, ours: str, layout: str = _VIDEO) -> list[Rule]:
    return [
        Rule(f"{theirs}.weight", f"{ours}/kernel", layout),
        Rule(f"{theirs}.bias", f"{ours}/bias"),
    ]


def _gamma(theirs: str, ours: str, ones: int) -> Rule:
    """The rule of a norm's scale, which they store with trailing axes of size 1."""
    layout = f"c {' '.join('1' * ones)} -> c"
    return Rule(f"{theirs}.gamma", f"{ours}/scale", layout)


def _res_block(theirs: str, ours: str, which: int) -> list[Rule]:
    found = [_gamma(f"{theirs}.{n[which]}", f"{ours}/{n[2]}", 3) for n in _RES_NORM]
    for names in _RES_CONV:
        found += _conv(f"{theirs}.{names[which]}", f"{ours}/{names[2]}")
    return found


def _attention(theirs: str, ours: str, which: int) -> list[Rule]:
    found = [_gamma(f"{theirs}.norm", f"{ours}/norm", 2)]
    found += _conv(f"{theirs}.to_qkv", f"{ours}/qkv", _IMAGE)
    return found + _conv(f"{theirs}.proj", f"{ours}/proj", _IMAGE)


def _resample(theirs: str, ours: str, which: int) -> list[Rule]:
    found = _conv(f"{theirs}.resample.1", f"{ours}/conv", _IMAGE)
    return found + _conv(f"{theirs}.time_conv", f"{ours}/time_conv")
