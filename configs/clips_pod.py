r"""Text to video on one's own clips of many sizes: 420 M parameters, for a TPU slice.

    python tools/prepare_clips.py VIDEOS --out data/clips --frames 81 --fps 16 \
        --size 480x832 832x480 640x640 --windows all --val 0.01
    python -m jvdit.encode --source data/clips --validation 'data/clips#val' \
        --vae Wan2.2-TI2V-5B-Diffusers --text_encoder Wan2.2-TI2V-5B-Diffusers \
        --text_length 512 --out data/latents
    python tools/compile_for_pod.py --config configs/clips_pod.py --topology v6e-16
    python tools/launch.py --on tpu-vm --slice v6e-16 --zone us-east5-a --bucket B -- \
        --config configs/clips_pod.py --workdir /mnt/B/clips \
        --config.data.sources="('/mnt/B/latents', '/mnt/B/latents#train:1')"

Between the models of the procedural world (4 M) and Wan (1.3 B and more). The released
autoencoder makes 21 x 15 x 26 tokens of 81 frames of 480 x 832 pixels, after patches of
1 x 2 x 2; a row holds one such clip, or several shorter ones, or pictures, and all of
it is one compilation. `docs/scaling.md` tells what to choose, and what the third
command says. Not trained here, for want of a pod.
"""

from jvdit import config as defaults

LATENTS = "data/latents"


def get_config():
    """Settings of the run."""
    config = defaults.flow("world-m", text_variant="")
    config.dit.update(width=1024, depth=24, num_heads=8, ffn_width=4096)
    config.dit.update(dtype="bfloat16", scan_layers=True, remat="attention")
    # One second of the clip is to RoPE what one cell is in height and width.
    config.dit.position_scale = (4.0, 1.0, 1.0)
    # Clips, and their first frames as pictures, in one stream.
    config.data.sources = (LATENTS, f"{LATENTS}#train:1")
    config.data.weights = (0.8, 0.2)
    config.data.validation = f"{LATENTS}#val"
    config.data.update(rows=64, token_budget=8192, max_clips=8)
    config.data.update(text_length=512, text_budget=1024)
    config.given.first_frame = 0.3
    # The larger a clip, the more noise it needs before nothing of it is seen.
    config.timesteps.update(shift=3.0, shift_tokens=4096, shift_range=(1.0, 12.0))
    config.optim.update(lr=2e-4, warmup=2000, schedule="cosine", b2=0.95, ema=0.9999)
    config.steps = 200_000
    config.sample.update(frames=81, height=480, width=832, fps=16.0)
    return config
