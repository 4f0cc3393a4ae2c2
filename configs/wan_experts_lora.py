"""Adapters (LoRA) of one expert of Wan 2.2 T2V-A14B on clips of your own.

    python tools/prepare_clips.py my_videos --out data/clips --frames 49 --fps 16 \
        --size 480x832 --windows all
    python -m jvdit.encode --source data/clips --out runs/wan/latents \
        --vae Wan2.2-T2V-A14B-Diffusers --text_encoder Wan2.2-T2V-A14B-Diffusers \
        --text_length 512
    for expert in high low; do
        python -m jvdit.train --config configs/wan_experts_lora.py:$expert \
            --workdir runs/wan/lora_$expert
    done
    python -m jvdit.sample "…" --pretrained Wan2.2-T2V-A14B-Diffusers \
        --lora_high runs/wan/lora_high/model --lora_low runs/wan/lora_low/model

Each expert learns at the noise at which it works. Not run here, for want of the
weights; see `wan_lora.py`.
"""

from jvdit import config as defaults
from jvdit.weights.recipes import RECIPES

NAME = "wan2.2-t2v-a14b"
EXPERTS = {"high": "dit", "low": "dit_low"}


def get_config(expert="high"):
    """One clip of 13 x 60 x 104 latents, in patches of 1 x 2 x 2, a row."""
    if expert not in EXPERTS:
        raise ValueError(f"expert {expert!r} must be one of {[*EXPERTS]}.")
    config = defaults.wan(NAME, "Wan2.2-T2V-A14B-Diffusers")
    config.steps = 2000
    config.expert = EXPERTS[expert]
    boundary = RECIPES[NAME]["boundary"]
    config.timesteps.span = (boundary, 1.0) if expert == "high" else (0.0, boundary)
    config.data.sources = ("runs/wan/latents",)
    config.data.token_budget = 13 * 30 * 52
    config.dit.param_dtype = "bfloat16"
    config.lora.update(rank=32, alpha=32.0)
    config.optim.lr = 1e-4
    return config
