"""Recognises networks that aren't read, by the names of their tensors.

So that a refusal names the family, in the place of hundreds of unknown tensors.
"""

import re
from collections.abc import Iterable

READ = "Wan 2.1 and 2.2: T2V, I2V, FLF2V, TI2V and VACE"
# The first pattern that is found in a name tells the family.
_FAMILIES = tuple(
    (re.compile(pattern), family)
    for pattern, family in (
        (r"audio_patchify_proj|av_ca_|audio_proj_in", "LTX-2"),
        (r"patchify_proj|(^|\.)caption_projection\.", "LTX-Video"),
        (r"casual_audio_encoder|audio_injector", "Wan 2.2 S2V"),
        (r"face_adapter|motion_encoder|pose_patch_embedding", "Wan 2.2 Animate"),
        (r"control_adapter|(^|\.)ref_conv\.", "Wan Fun (control or camera)"),
        (r"to_gate_compress", "FastWan with sparse attention; take its FullAttn model"),
        (r"individual_token_refiner|token_refiner\.", "HunyuanVideo"),
        (r"byt5_in\.|context_embedder_2", "HunyuanVideo 1.5"),
        (r"(^|\.)(double_blocks|single_transformer_blocks)\.", "FLUX or HunyuanVideo"),
        (r"visual_transformer_blocks", "Kandinsky 5"),
        (r"(^|\.)fusion_blocks?\.|audio_model\.", "Ovi"),
        (r"input_blocks\.|down_blocks\.", "Stable Diffusion, or an autoencoder"),
        (r"patch_embed\.text_proj|transformer_blocks\.0\.norm1\.linear", "CogVideoX"),
        (r"self_attn\.\w_audio|_audio\.weight$", "NAVA"),
    )
)


def family_of(names: Iterable[str]) -> str | None:
    """The family of a network that isn't read; None: its names don't tell."""
    several = [*names]
    for pattern, family in _FAMILIES:
        if any(pattern.search(name) for name in several):
            return family
    return None
