"""Adapters (LoRA) of Wan 2.2 TI2V-5B on clips of your own.

    python tools/prepare_clips.py my_videos --out data/clips --frames 49 --fps 24 \
        --size 704x1280 --windows all
    python -m jvdit.encode --source data/clips --out runs/wan/latents \
        --vae Wan2.2-TI2V-5B-Diffusers --text_encoder Wan2.2-TI2V-5B-Diffusers \
        --text_length 512
    python -m jvdit.train --config configs/wan_lora.py --workdir runs/wan/lora \
        --config.start_from=Wan2.2-TI2V-5B-Diffusers
    python -m jvdit.sample "…" --pretrained Wan2.2-TI2V-5B-Diffusers \
        --lora runs/wan/lora/model

Half of the clips are trained with their first frame given, so `--image` goes on
working. The released weights are frozen in bfloat16. Not run here, for want of the
weights: a tiny release takes the same way in `tests/parity/test_finetune_parity.py`.
"""

from jvdit import config as defaults

RELEASE = "Wan2.2-TI2V-5B-Diffusers"


def get_config():
    """One clip of 13 x 44 x 80 latents, in patches of 1 x 2 x 2, a row."""
    config = defaults.wan("wan2.2-ti2v-5b", RELEASE)
    config.steps = 2000
    config.data.sources = ("runs/wan/latents",)
    config.data.token_budget = 13 * 22 * 40
    config.dit.param_dtype = "bfloat16"
    config.given.first_frame = 0.5
    config.lora.update(rank=32, alpha=32.0)
    config.optim.lr = 1e-4
    config.sample_every = 500
    config.sample.frames = 49
    return config
