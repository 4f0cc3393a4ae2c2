"""Text to video on one's own clips, on a GPU: `clips_dit.py`, wider and for longer.

    python -m jvdit.train --config configs/clips_dit_gpu.py --workdir runs/clips/dit

Learns its captions by heart: so many steps took 157 seconds of an H100, without the
minute of compilation, and gave `clips_dit.png` at a guidance scale of 2.5.
"""

from configs import clips_dit
from configs.world_gpu import busy


def get_config():
    """Settings of the run."""
    config = clips_dit.get_config()
    config.dit.update(width=384, depth=8, num_heads=6, ffn_width=1536)
    config.dit.update(dtype="bfloat16", scan_layers=True)
    config.matmul_precision = "default"
    config.data.rows = 64
    return busy(config, steps=1859)
