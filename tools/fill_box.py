"""Packages a finished model with jvdit: `python tools/fill_box.py runs/box/all`.

Writes the model to `jvdit/box`, with weights rounded to bfloat16 to keep the package
small, and a contact sheet of the clips that it generates from the prompts of its
training, with their sound, which is the banner of README.md. For the numbers of its
model card run `python -m jvdit.evaluate --workdir jvdit/box --split single --seed 1`.
"""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jvdit.box import FOLDER
from jvdit.data.sheets import contact_sheet, write_png
from jvdit.generation.generator import Generator
from jvdit.weights.bundle import save_bundle
from jvdit.weights.opening import open_bundle

ROOT = pathlib.Path(__file__).parent.parent


def main() -> None:
    """Writes the model to the package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", help="workdir of a finished DiT training")
    workdir = pathlib.Path(parser.parse_args().workdir)
    model = open_bundle(workdir)
    rounded = {
        name: jax.tree.map(_rounded, network.params)
        for name, network in model.networks.items()
    }
    save_bundle(FOLDER, model.with_params(rounded))
    sys.path.insert(0, str(ROOT))
    from configs.world_box import PROMPTS

    clips, prompts = Generator.load()(PROMPTS), list(PROMPTS)
    sounds = [clip.spectrogram for clip in clips]
    sheet = contact_sheet([clip.video for clip in clips], prompts, sounds=sounds)
    write_png(FOLDER / "samples.png", sheet)
    size = sum(x.stat().st_size for x in FOLDER.rglob("*") if x.is_file())
    print(f"{FOLDER}: {size / 1e6:.1f} MB")


def _rounded(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(jnp.bfloat16)


if __name__ == "__main__":
    main()
