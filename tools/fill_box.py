"""Puts a finished model into the box: `python tools/fill_box.py runs/box/videos`.

Weights are rounded to bfloat16, so that the package stays small; what the model does
then is measured from the box, `python -m jvdit.evaluate --workdir jvdit/box`.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from jvdit.box import FOLDER
from jvdit.generation.generator import Generator


def main() -> None:
    """Parses and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", help="of a finished training of a DiT")
    generator = Generator.load(parser.parse_args().workdir)
    generator.params = jax.tree.map(
        lambda x: np.asarray(x).astype(jnp.bfloat16), dict(generator.params)
    )
    generator.save(FOLDER)
    size = sum(x.stat().st_size for x in FOLDER.rglob("*") if x.is_file())
    print(f"{FOLDER}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
