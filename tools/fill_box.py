"""Puts a finished model into the box: `python tools/fill_box.py runs/box/videos`.

Weights are rounded to bfloat16, so that the package stays small. A sheet is drawn of
what the model then makes of the prompts of its training: the banner of README.md. For
its card: `python -m jvdit.evaluate --workdir jvdit/box --split single --seed 1`.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jvdit.box import FOLDER
from jvdit.data.sheets import contact_sheet, write_png
from jvdit.generation.generator import Generator
from jvdit.machine.json_files import read_json


def main() -> None:
    """Parses and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", help="of a finished training of a DiT")
    workdir = pathlib.Path(parser.parse_args().workdir)
    generator = Generator.load(workdir)
    generator.params = jax.tree.map(
        lambda x: np.asarray(x).astype(jnp.bfloat16), dict(generator.params)
    )
    generator.save(FOLDER)
    settings = read_json(workdir / "config.json", "copy it anew")["config"]
    prompts = settings["sample"]["prompts"]
    sheet = contact_sheet(Generator.load()(prompts), prompts)
    write_png(FOLDER / "samples.png", sheet)
    size = sum(x.stat().st_size for x in FOLDER.rglob("*") if x.is_file())
    print(f"{FOLDER}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
