"""All weights of Wan 14B or 5B on clips of 720 x 1280, on a pod; with sound, if asked.

    python tools/compile_for_pod.py --config configs/wan_pod.py \
        --topology v5p-128 --mesh fsdp=8,context=8
    python tools/launch.py --on tpu-vm --slice v5p-128 --zone us-east5-a --bucket B -- \
        --config configs/wan_pod.py --workdir /mnt/B/wan \
        --config.start_from=/mnt/B/Wan2.1-T2V-14B-Diffusers \
        --config.data.sources="('/mnt/B/latents',)" \
        --config.data.rows=8 --config.mesh.fsdp=8 --config.mesh.context=8

Clips are encoded as in `wan_full.py`, of 81 frames. A row is one clip of 75,600 tokens,
which the devices along `context` share. `configs/wan_pod.py:14b-sound` and `:5b-sound`
train picture and sound together, on latents that were encoded with `--audio_vae`: five
seconds are 256 tokens of sound at 50 a second, and the network grows projections for
them. Not run here, for want of a pod; what the first command says of several slices is
in `jvdit/pods/README.md`.
"""

from jvdit import config as defaults

# Release, and latents of a clip in patches of 1 x 2 x 2.
_SIZES = {
    "14b": ("wan2.1-t2v-14b", 21 * 45 * 80),
    "5b": ("wan2.2-ti2v-5b", 31 * 22 * 40),
}


def get_config(size: str = "14b"):
    """One clip a row.

    Args:
        size: "14b" or "5b", with "-sound" behind it for picture and sound.
    """
    name, _, sound = size.partition("-")
    if name not in _SIZES or sound not in ("", "sound"):
        known = ", ".join(f"{x}, {x}-sound" for x in _SIZES)
        raise ValueError(f"the config {size!r} must be one of: {known}.")
    variant, tokens = _SIZES[name]
    config = defaults.wan(variant, "")
    config.steps = 5000
    config.data.sources = ("runs/wan/latents",)
    config.data.token_budget = tokens
    config.data.sound_budget = 256 * bool(sound)
    # Flash attention is half of a step: what it made is kept.
    config.dit.remat = "attention"
    return config
