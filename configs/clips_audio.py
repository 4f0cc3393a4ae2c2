"""The audio autoencoder on the sound of one's own clips: mono, at 16 kHz.

    python tools/prepare_clips.py VIDEOS --out data/clips --frames 17 --fps 8 \
        --size 64x96 --windows all --val 0.15
    python -m jvdit.train --config configs/clips_audio.py --workdir runs/clips/audio
    python -m jvdit.evaluate --audio_vae runs/clips/audio --data 'data/clips#val'

The finished autoencoder is runs/clips/audio, with 25 latents a second. Clips without
sound, or with gaps in it, are left out. Stereo: --config.vae.channels=2; another rate:
--config.vae.sample_rate=24000, with more latents a second as well. Clips of another
place or length: --config.data.sources='("…#train:16x16x16@8",)' and so on.

On the sound of 204 public clips the 1,200 steps took 49 minutes of two cores, beside
much other work. Of held-out files it has the loudness and not yet the pitch
(SI-SDR -10.1 dB, -36.1 before; log-mel distance 8.5 dB, 17.1 before): a beginning.
"""

from jvdit import config as defaults

CLIPS = "data/clips"
BOX = "jvdit/box/audio_vae"


def get_config():
    """Settings of the run."""
    config = defaults.audio_vae("world")
    # It knows the sounds of the world already.
    config.start_from = BOX
    # A second at a time, two of each clip. Pictures are decoded beside the sound: small
    # ones, for they aren't looked at.
    config.data.sources = (f"{CLIPS}#train:8x16x16@8",)
    config.data.validation = f"{CLIPS}#val:17x16x16@8"
    config.data.sample_budget = 12 * 16_000
    config.optim.name = "muon"
    config.optim.lr = 4e-3
    config.optim.schedule = "linear"
    config.optim.warmup = 100
    config.steps = 1200
    # A short run: the average forgets soon.
    config.optim.ema = 0.99
    config.checkpoint_every = 250
    config.evaluate_every = config.sample_every = 400
    return config
