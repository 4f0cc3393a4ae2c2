"""A small network in the shape of Wan's, for forecasts."""

from jvdit import config as defaults


def get_config():
    """One clip of 2,000 tokens a row; heads of 128 channels, as on real ones."""
    config = defaults.wan("wan2.1-t2v-1.3b", "")
    config.dit.update(width=256, depth=3, num_heads=2, ffn_width=512)
    config.dit.update(remat="attention")
    config.data.token_budget = 2000
    return config
