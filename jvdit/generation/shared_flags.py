"""The flags that `jvdit.sample` and `jvdit.serve` share: models, marks, signing."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from jax.sharding import Mesh

from jvdit.box import FOLDER
from jvdit.generation.watermark import STOCHASTIC, Watermark
from jvdit.machine.files import config_folder
from jvdit.weights.bundle import Bundle
from jvdit.weights.few_bits import FORMS
from jvdit.weights.opening import open_bundle

if TYPE_CHECKING:
    from jvdit.generation.provenance import Provenance

WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of a training run, or of its finished model (default: the small model in "
    "the box).",
)
PRETRAINED = flags.DEFINE_string(
    "pretrained",
    None,
    "Folder of a released Wan 2 model, or its id on the Hugging Face Hub, instead of "
    "--workdir.",
)
LORA = flags.DEFINE_multi_string(
    "lora",
    [],
    "Adapter files (LoRA and its kin), each perhaps with its strength: FILE:0.8,FILE.",
)
QUANTIZE = flags.DEFINE_enum(
    "quantize",
    None,
    [*FORMS],
    "Hold the weights of the DiT and of the text encoder in few bits.",
)
C2PA = flags.DEFINE_boolean(
    "c2pa",
    True,
    "Sign a C2PA manifest into each file, which says that it is AI-generated, and how; "
    "needs pip install 'jvdit[provenance]'.",
)
C2PA_KEY = flags.DEFINE_string(
    "c2pa_key",
    None,
    "File of the private key that signs, in PEM (default: one made at first use, in "
    "~/.config/jvdit).",
)
C2PA_CERT = flags.DEFINE_string("c2pa_cert", None, "Certificates of --c2pa_key (PEM).")
WATERMARK = flags.DEFINE_string(
    "watermark",
    None,
    "File of a secret key, by which the clips' noise is marked; "
    "tools/detect_watermark.py finds the mark.",
)


def named_bundle(mesh: Mesh, **options: Any) -> Bundle:
    """The model that the flags name, without adapters.

    Args:
        mesh: the device mesh.
        **options: of `open_bundle`, for a released model.

    Raises:
        FileNotFoundError: the model or a part of it is missing.
        ValueError: both flags are given, or the folder holds something else.
    """
    if WORKDIR.value is not None and PRETRAINED.value is not None:
        raise ValueError("give one of --workdir and --pretrained, not both.")
    if PRETRAINED.value is not None:
        return open_bundle(PRETRAINED.value, mesh, **options)
    # An absolute path, which is no id on the hub.
    return open_bundle(Path(WORKDIR.value or FOLDER).absolute(), mesh)


def watermark() -> Watermark | None:
    """The mark of the clips; None: they have none.

    Raises:
        ValueError: the key is too short.
        OSError: it can't be read.
    """
    return None if WATERMARK.value is None else Watermark.read(WATERMARK.value)


def check_markable(solver: str | None) -> None:
    """Raises a ValueError if a solver makes of marked noise what can't be undone."""
    if solver in STOCHASTIC:
        raise ValueError(
            f"--watermark doesn't go with the solver {solver!r}, which draws noise at "
            "every step; leave one out."
        )


def provenance() -> "Provenance | None":
    """What signs the files of a model; None: nothing does, and a line says why.

    Raises:
        ValueError: a key was given, and can't sign.
        OSError: it can't be read.
    """
    own = C2PA_KEY.value, C2PA_CERT.value
    if (own[0] is None) != (own[1] is None):
        raise ValueError("--c2pa_key and --c2pa_cert go together; give both.")
    if not C2PA.value:
        return None
    unsigned = "files are written without a C2PA manifest"
    try:
        from jvdit.generation.provenance import Provenance
        from jvdit.machine.signing_key import local_key, own_key
    except ImportError as error:
        told = f"{error.name} is missing: pip install 'jvdit[provenance]'."
        if own[0]:
            raise ValueError(told) from None
        print(f"{unsigned}; {told}", file=sys.stderr)
        return None
    if own[0] and own[1]:
        return Provenance(own_key(Path(own[0]), Path(own[1])))
    try:
        return Provenance(local_key(config_folder()))
    except OSError as error:
        print(f"{unsigned}; there is no place for a key: {error}", file=sys.stderr)
        return None
