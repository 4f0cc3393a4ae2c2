"""All weights of Wan 2.1 T2V-14B on clips of 81 x 720 x 1280, on a pod.

    python tools/compile_for_pod.py --config configs/wan_pod.py \
        --topology v5p-128 --mesh fsdp=8,context=8
    python tools/launch.py --on tpu-vm --slice v5p-128 --zone us-east5-a --bucket B -- \
        --config configs/wan_pod.py --workdir /mnt/B/wan \
        --config.start_from=/mnt/B/Wan2.1-T2V-14B-Diffusers \
        --config.data.sources="('/mnt/B/latents',)" \
        --config.data.rows=8 --config.mesh.fsdp=8 --config.mesh.context=8

Clips are encoded as in `wan_full.py`, of 81 frames. A row is one clip of 75,600 tokens,
which the devices along `context` share. Not run here, for want of a pod; what the first
command says of several slices is in `jvdit/pods/README.md`.
"""

from jvdit import config as defaults


def get_config():
    """One clip of 21 x 90 x 160 latents, in patches of 1 x 2 x 2, a row."""
    config = defaults.wan("wan2.1-t2v-14b", "")
    config.steps = 5000
    config.data.sources = ("runs/wan/latents",)
    config.data.token_budget = 21 * 45 * 80
    # Flash attention is half of a step: what it made is kept.
    config.dit.remat = "attention"
    return config
