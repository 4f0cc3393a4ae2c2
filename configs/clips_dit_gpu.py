"""Text to video on one's own clips, on a GPU: `clips_dit.py`, wider and for longer.

    python -m jvdit.train --config configs/clips_dit_gpu.py --workdir runs/clips/dit
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
    return busy(config, steps=5000)
