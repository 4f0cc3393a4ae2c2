"""A `tokenizer.json` of the tokenizers library as a sentencepiece model.

transformers saves T5's tokenizer in this form alone; both hold the same pieces and
scores, and the same table that normalises characters.
"""

import base64
import json
import os
import re
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from jvdit.data.tokenizer import EOS_ID, PAD_ID, UNK_ID

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def sentencepiece_of(file: str | os.PathLike[str]) -> bytes:
    """The sentencepiece model in a `tokenizer.json`, as the bytes of its file.

    Raises:
        ValueError: the file holds no unigram model.
    """
    with open(file, encoding="utf-8") as opened:
        settings = json.load(opened)
    model = settings.get("model", {})
    if model.get("type") != "Unigram":
        raise ValueError(
            f"{file} holds a {model.get('type')} model; that of T5 is Unigram."
        )
    messages: Any = sentencepiece_model_pb2  # made at run time
    proto = messages.ModelProto()
    kinds = proto.SentencePiece
    special = {PAD_ID: kinds.CONTROL, EOS_ID: kinds.CONTROL, UNK_ID: kinds.UNKNOWN}
    added = {token["id"]: token for token in settings.get("added_tokens", [])}
    for number, (piece, score) in enumerate(model["vocab"]):
        kind = special.get(number, kinds.NORMAL)
        if number in added and number not in special:
            kind = kinds.CONTROL
        elif model.get("byte_fallback") and _BYTE.fullmatch(piece):
            kind = kinds.BYTE
        proto.pieces.add(piece=piece, score=score, type=kind)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = trainer.UNIGRAM
    trainer.pad_id, trainer.eos_id, trainer.unk_id = PAD_ID, EOS_ID, UNK_ID
    trainer.bos_id = -1
    trainer.byte_fallback = bool(model.get("byte_fallback"))
    normalizer.add_dummy_prefix = True
    normalizer.remove_extra_whitespaces = True
    normalizer.escape_whitespaces = True
    if table := _character_table(settings.get("normalizer")):
        normalizer.precompiled_charsmap = base64.b64decode(table)
    return proto.SerializeToString()


def _character_table(normalizer: Any) -> str | None:
    if not normalizer:
        return None
    if normalizer.get("type") == "Precompiled":
        return normalizer["precompiled_charsmap"]
    inner = map(_character_table, normalizer.get("normalizers", []))
    return next((table for table in inner if table), None)
