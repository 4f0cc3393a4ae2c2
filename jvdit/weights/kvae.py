"""Rule table of KVAE-Audio's autoencoder, from released names to parameters.

The released names number the decoder's stages from the coarsest on, so the table is
built for a module: `rules(vae)`.
"""

from collections.abc import Iterator

from jvdit.models.audio_vae import AudioVAE
from jvdit.weights.rules import LAYOUTS, Rule, layers

# The length and the direction of a normalised kernel, as torch calls them from 2.1 on,
# and before.
_PARTS = (
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ("weight_g", "weight_v"),
)
_CONV, _TRANSPOSED = "o i t -> t i o", "i o t -> i t o"
# Each half, its resampling convolutions, and our name of these.
_HALVES = (("encoder", "conv1", "down"), ("decoder", "conv_t1", "up"))
_ATTENTION = (
    ("to_q", "query"),
    ("to_k", "key"),
    ("to_v", "value"),
    ("to_out.0", "out"),
)


def rules(vae: AudioVAE, layout: str = LAYOUTS[0]) -> list[Rule]:
    """The rule table of an autoencoder.

    Args:
        vae: the autoencoder.
        layout: "diffusers", or "original" for files whose kernels have the names of
            torch before 2.1.
    """
    found = layers(_ATTENTION, 0, "attn.", "attention/")
    for theirs, ours in _names(vae):
        if "snake" in theirs:
            found.append(Rule(f"{theirs}.alpha", f"{ours}/alpha", "1 c 1 -> c"))
            continue
        gain, kernel = _PARTS[LAYOUTS.index(layout)]
        pattern = _TRANSPOSED if theirs.endswith("conv_t1") else _CONV
        found += [
            Rule(f"{theirs}.{gain}", f"{ours}/gain", "c 1 1 -> c"),
            Rule(f"{theirs}.{kernel}", f"{ours}/kernel", pattern),
            Rule(f"{theirs}.bias", f"{ours}/bias"),
        ]
    return found


def _names(vae: AudioVAE) -> Iterator[tuple[str, str]]:
    """Their and our names of the activations and convolutions."""
    yield "in_proj", "quant_conv"
    yield "out_proj", "post_quant_conv"
    last = len(vae.strides) - 1
    for half, sampler, way in _HALVES:
        yield f"{half}.conv1", f"{half}/conv_in"
        yield f"{half}.snake1", f"{half}/snake_out"
        yield f"{half}.conv2", f"{half}/conv_out"
        for stage in range(last + 1):
            number = stage if way == "down" else last - stage
            block = f"{half}.block.{number}"
            yield f"{block}.snake1", f"{half}/snake_{stage}"
            yield f"{block}.{sampler}", f"{half}/{way}_{stage}"
            for unit in range(len(vae.dilations)):
                inner = f"{block}.res_unit{unit + 1}"
                for part, place in ((1, "in"), (2, "out")):
                    own = f"{half}/units_{stage}"
                    yield f"{inner}.snake{part}", f"{own}/snake_{unit}_{place}"
                    yield f"{inner}.conv{part}", f"{own}/conv_{unit}_{place}"
