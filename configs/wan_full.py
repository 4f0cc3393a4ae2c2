"""All weights of Wan 2.1 T2V-1.3B on clips of your own.

    python tools/prepare_clips.py my_videos --out data/clips --frames 49 --fps 16 \
        --size 480x832 --windows all
    python -m jvdit.encode --source data/clips --out runs/wan/latents \
        --vae Wan2.1-T2V-1.3B-Diffusers --text_encoder Wan2.1-T2V-1.3B-Diffusers \
        --text_length 512
    python -m jvdit.train --config configs/wan_full.py --workdir runs/wan/full \
        --config.mesh.fsdp=8
    python -m jvdit.sample "…" --pretrained Wan2.1-T2V-1.3B-Diffusers \
        --dit runs/wan/full/model/transformer

Master weights, moments and the average are float32. Not run here, for want of the
weights; see `wan_lora.py`.
"""

from jvdit import config as defaults


def get_config():
    """One clip of 13 x 60 x 104 latents, in patches of 1 x 2 x 2, a row."""
    config = defaults.wan("wan2.1-t2v-1.3b", "Wan2.1-T2V-1.3B-Diffusers")
    config.steps = 5000
    config.data.sources = ("runs/wan/latents",)
    config.data.token_budget = 13 * 30 * 52
    return config
