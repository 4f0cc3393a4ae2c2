"""The audio autoencoder of the procedural world: 16 kHz, 25 latents a second.

    python -m jvdit.train --config configs/world_audio.py --workdir runs/world/audio

The finished autoencoder is runs/world/audio; that of the box, jvdit/box/audio_vae, took
2,500 steps in 47 minutes of two cores of an EPYC, beside other work. Of 256 clips of
split test SI-SDR is 12.3 dB, and the oracle hears .951 of the bounces within 40 ms
(real: .945) and the right material in .978 (.977).
"""

from jvdit import config as defaults


def get_config():
    """Settings of the run."""
    config = defaults.audio_vae("world")
    # Pictures are rendered beside the sound: small ones, for they aren't looked at.
    config.data.sources = ("world:train:9x16x16@8:1000000",)
    config.data.validation = "world:val:17x16x16@8:64"
    config.data.sample_budget = 12 * 18_000
    config.optim.name = "muon"
    config.optim.lr = 5e-3
    config.optim.schedule = "linear"
    config.optim.warmup = 100
    config.steps = 2500
    config.checkpoint_every = 250
    config.evaluate_every = 250
    config.sample_every = 500
    return config
