"""Content credentials (C2PA): a signed statement in each file that it is AI-generated.

Needs the package `c2pa-python`. Nothing here uses the network: signatures carry no time
stamp of an authority, and what files refer to isn't fetched.
"""

import contextlib
import copy
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import c2pa
import numpy as np

from jvdit.data.sheets import png
from jvdit.generation.request import FIELDS_GIVEN, Request
from jvdit.machine.signing_key import SigningKey

ASSERTION = "org.jvdit.generation"  # holds the settings, and the digest of the model
_SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_MADE = f"{_SOURCE}trainedAlgorithmicMedia"
_COMPOSED = f"{_SOURCE}compositeWithTrainedAlgorithmicMedia"
_OFFLINE = {
    "builder": {"thumbnail": {"enabled": False}},
    # What a client uploads may name an address, which isn't to be asked.
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
}
# Where in a file its type is written, and how.
_TYPES = (
    (0, b"\x89PNG", "image/png"),
    (0, b"\xff\xd8", "image/jpeg"),
    (8, b"WEBP", "image/webp"),
    (8, b"WAVE", "audio/wav"),
    (8, b"AVI ", "video/avi"),
    (4, b"ftypqt", "video/quicktime"),
    (4, b"ftyp", "video/mp4"),
)


class Provenance:
    """Signs the files of a model's clips.

    A file is `c2pa.created` by a trained algorithm; where something was given, such as
    a first frame or footage, it is a composite, and what was given its ingredients.

    Args:
        key: that signs.

    Raises:
        ValueError: C2PA refuses the key or its certificates.
    """

    def __init__(self, key: SigningKey):
        self._key, self._model = key, ""
        try:
            self.signed(png(np.zeros((8, 8, 3), np.uint8)), {})
        except OSError as error:
            raise ValueError(f"the key can't sign: {error}") from error

    def of(self, model: str) -> "Provenance":
        """The same, for a model by the digest of its weights."""
        made = copy.copy(self)
        made._model = model
        return made

    def signing(
        self, settings: Mapping[str, Any], *given: Any
    ) -> Callable[[Path], None]:
        """A function that signs a file in its place.

        Args:
            settings: how it was made, JSON values.
            *given: what it was made of: files, or requests that name some.
        """

        def sign(path: Path) -> None:
            scratch = path.with_suffix(".signed")
            try:
                with path.open("rb") as source, scratch.open("w+b") as made:
                    self._sign(source, made, settings, given)
                os.replace(scratch, path)
            finally:
                scratch.unlink(missing_ok=True)

        return sign

    def signed(self, data: bytes, settings: Mapping[str, Any], *given: Any) -> bytes:
        """The bytes of a file, signed; arguments as of `signing`."""
        made = io.BytesIO()
        self._sign(io.BytesIO(data), made, settings, given)
        return made.getvalue()

    def _sign(self, source: Any, made: Any, settings: Any, given: Any) -> None:
        kind, parts, agent = _kind(source), [*_values(given)], {"name": "jvdit"}
        action = {
            "action": "c2pa.created",
            "softwareAgent": agent,
            "digitalSourceType": _COMPOSED if parts else _MADE,
        }
        # A text: readers of manifests take lists of numbers for bytes.
        told = {"settings": json.dumps(settings, sort_keys=True), "model": self._model}
        manifest = {
            "claim_generator_info": [agent],
            "format": kind,
            "assertions": [
                {"label": "c2pa.actions.v2", "data": {"actions": [action]}},
                {"label": ASSERTION, "data": told},
            ],
        }
        key = self._key
        try:
            how = key.algorithm.encode(), key.chain, key.private, None
            with (
                c2pa.Signer.from_info(c2pa.C2paSignerInfo(*how)) as signer,
                c2pa.Builder(manifest, context=self._context) as builder,
            ):
                for part in parts:
                    if isinstance(part, str | os.PathLike) and Path(part).is_file():
                        _add_ingredient(builder, Path(part))
                builder.sign(signer, kind, source, made)
        except c2pa.C2paError as error:
            raise OSError(f"C2PA: {error}") from error

    @cached_property
    def _context(self) -> c2pa.Context:
        return c2pa.Context.from_dict(_OFFLINE)


def _add_ingredient(builder: c2pa.Builder, file: Path) -> None:
    """Names what a clip was made of, with its own manifest if it has one."""
    about = {"title": file.name, "relationship": "inputTo"}
    with file.open("rb") as opened:
        if kind := _kind(opened):  # else the settings name it
            with contextlib.suppress(c2pa.C2paError):
                builder.add_ingredient(about, kind, opened)


def _kind(opened: Any) -> str:
    """The MIME type of a file, by how it begins; "" if C2PA can't read it."""
    head = opened.read(16)
    opened.seek(0)
    found = (kind for at, mark, kind in _TYPES if head[at:].startswith(mark))
    return next(found, "")


def _values(given: tuple[Any, ...]) -> Iterator[Any]:
    """What is given, one thing after the other."""
    for one in given:
        if isinstance(one, Request):
            yield from _values(tuple(getattr(one, name) for name in FIELDS_GIVEN))
        elif isinstance(one, tuple):
            yield from _values(one)
        elif one is not None:
            yield one
