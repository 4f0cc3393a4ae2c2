"""The model in the box: a finished small model, as data of this package.

Beside this file lies what `Generator.load` reads, and README.md, its card.
"""

import pathlib

FOLDER = pathlib.Path(__file__).parent
