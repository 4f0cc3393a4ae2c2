"""Captions to token ids and back: sentencepiece, with the conventions of T5."""

import base64
import hashlib
import html
import io
import itertools
import os
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ftfy
import msgspec
import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from jvdit.machine.files import write_atomically
from jvdit.machine.json_files import read_json

# T5 numbers its special pieces so; pad is 0, which is also how batches are filled.
PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
BYTE_PIECES = 256
_MESSAGES: Any = sentencepiece_model_pb2  # made when imported
_LONGEST_PART = 16  # characters of a piece that is no whole word
_TRAINING = {
    "model_type": "unigram",
    "hard_vocab_limit": False,  # else a small corpus is refused
    "normalization_rule_name": "nmt_nfkc",
    "character_coverage": 0.9995,
    "pad_id": PAD_ID,
    "eos_id": EOS_ID,
    "unk_id": UNK_ID,
    "bos_id": -1,
    "pad_piece": "<pad>",
    "eos_piece": "</s>",
    "unk_piece": "<unk>",
    "num_threads": 1,  # sums of floats depend on how sentences are dealt out
    "max_sentence_length": 1 << 20,  # bytes; longer ones are silently left out
    "minloglevel": 2,
}


class Tokenizer:
    """A sentencepiece model read as T5 reads it.

    Ids are those of transformers' `T5Tokenizer` on the same model file, but that a
    literal "</s>" or "<pad>" in a caption, which is foreign data, is plain text.

    Args:
        model: path of a sentencepiece model file or of a `tokenizer.json` that holds
            one, or its bytes.
        byte_fallback: what a run of characters outside the vocabulary becomes in a
            model that has byte pieces: "bytes" (the pieces, lossless; sentencepiece) or
            "unk" (one unknown id for the whole run; transformers). Without byte pieces
            it is always one unknown id.
        clean: whether captions are cleaned first, see `cleaned`.

    Attributes:
        fingerprint: hash of the model and of the choices above; part of the key of
            anything computed from the ids.

    Raises:
        ValueError: the file is no sentencepiece model, its special ids are not T5's, or
            `byte_fallback` is unknown.
    """

    def __init__(
        self,
        model: str | Path | bytes,
        byte_fallback: str = "bytes",
        *,
        clean: bool = False,
    ):
        if byte_fallback not in ("bytes", "unk"):
            raise ValueError(
                f"`byte_fallback` (={byte_fallback!r}) must be in ('bytes', 'unk')."
            )
        where = f"{len(model)} bytes" if isinstance(model, bytes) else str(model)
        if where.endswith(".json"):
            model = sentencepiece_of(where)
        data = model if isinstance(model, bytes) else Path(model).read_bytes()
        self._processor = processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(data)
        except RuntimeError as error:
            raise ValueError(
                f"{where} is no sentencepiece model, or was cut off; copy it anew or, "
                "in the workdir of a training, delete it: the same one is made again."
            ) from error
        found = (processor.pad_id(), processor.eos_id(), processor.unk_id())
        if found != (PAD_ID, EOS_ID, UNK_ID):
            raise ValueError(
                f"The model ({where}) has (pad, eos, unk) ids {found} and T5 has "
                f"{(PAD_ID, EOS_ID, UNK_ID)}; train it with `train_tokenizer`."
            )
        self.vocab_size = processor.vocab_size()
        self.byte_fallback = byte_fallback
        self._bytes = frozenset(filter(processor.IsByte, range(self.vocab_size)))
        self._clean = clean
        choices = f"{byte_fallback} False 0".encode()  # as it was written once
        choices += b" clean" if clean else b""
        self.fingerprint = hashlib.blake2b(data + choices, digest_size=16).hexdigest()

    @property
    def model(self) -> bytes:
        """The sentencepiece model: what to write to a file to have it again."""
        return self._processor.serialized_model_proto()

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Returns the ids of a caption, ending in `EOS_ID`, without padding.

        Args:
            text: any text; the empty one is `[EOS_ID]`.
            max_length: most ids to return, the ending one included; what is beyond is
                cut off. None: all.

        Raises:
            ValueError: `max_length` leaves no room for the ending id.
        """
        if max_length is not None and max_length < 1:
            raise ValueError(f"`max_length` (={max_length}) must be at least 1.")
        ids = self._processor.EncodeAsIds(cleaned(text) if self._clean else text)
        if self.byte_fallback == "unk" and self._bytes:
            runs = itertools.groupby(ids, self._bytes.__contains__)
            fused = ([UNK_ID] if are_bytes else run for are_bytes, run in runs)
            ids = [*itertools.chain.from_iterable(fused)]
        return [*ids[: None if max_length is None else max_length - 1], EOS_ID]

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        """Returns the text of ids up to the first `EOS_ID`; padding says nothing."""
        said = [*itertools.takewhile(lambda i: i != EOS_ID, map(int, ids))]
        if wrong := [i for i in said if not 0 <= i < self.vocab_size]:
            raise ValueError(
                f"Id {wrong[0]} is not in the vocabulary (`vocab_size` = "
                f"{self.vocab_size}); was it made by another tokenizer?"
            )
        return self._processor.DecodeIds([i for i in said if i != PAD_ID])


def cleaned(text: str) -> str:
    """Text as Wan's networks were shown it: mended, without entities, in one line."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def train_tokenizer(
    captions: Iterable[str],
    vocab_size: int,
    path: str | Path | None = None,
    *,
    byte_fallback: bool = True,
) -> bytes:
    """Trains a unigram model with T5's special ids; the same bytes every time.

    Args:
        captions: the text to learn from, one caption at a time.
        vocab_size: most pieces to keep: 3 special ones, 256 bytes if `byte_fallback`,
            and the rest learned. A small corpus gives fewer; the model says how many.
        path: where to write the model as well.
        byte_fallback: whether what the vocabulary lacks is spelled in bytes.

    Raises:
        ValueError: there is no text, or `vocab_size` has no room for the characters.
    """
    reserved = 3 + BYTE_PIECES * byte_fallback
    if vocab_size <= reserved:
        raise ValueError(
            f"`vocab_size` (={vocab_size}) must exceed the {reserved} pieces that are "
            f"reserved; try {2 * reserved}."
        )
    texts = [caption for caption in captions if caption.strip()]
    if not texts:
        raise ValueError("`captions` holds no text to train a tokenizer on.")
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv", encoding="utf-8") as seeds:
        options = {}
        if pieces := _seed_pieces(texts, vocab_size - reserved):
            seeds.write("".join(f"{piece}\t{count}\n" for piece, count in pieces))
            seeds.flush()
            options["seed_sentencepieces_file"] = seeds.name
        try:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=iter(texts),
                model_writer=model,
                vocab_size=vocab_size,
                byte_fallback=byte_fallback,
                **_TRAINING,
                **options,
            )
        except RuntimeError as error:
            raise ValueError(
                f"No tokenizer of `vocab_size` (={vocab_size}) from {len(texts)} "
                f"captions: {error}. If it is smaller than the number of characters, "
                "raise it."
            ) from error
    proto = _MESSAGES.ModelProto.FromString(model.getvalue())
    # Its name is a chance; sentencepiece before 0.2.3 writes it but doesn't know it.
    proto.trainer_spec.DiscardUnknownFields()
    if "seed_sentencepieces_file" in proto.trainer_spec.DESCRIPTOR.fields_by_name:
        proto.trainer_spec.ClearField("seed_sentencepieces_file")
    data = proto.SerializeToString(deterministic=True)
    if path is not None:
        write_atomically(Path(path), data)
    return data


def _seed_pieces(texts: list[str], room: int) -> list[tuple[str, int]]:
    """Returns what to learn pieces from, where the vocabulary can hold every word.

    Left to itself, sentencepiece considers the substrings that several different words
    share. A language of a hundred words has few of them, and its words, however
    frequent, are spelled out in letters: twice as many tokens as they are.
    """
    words: Counter[str] = Counter()
    for text in texts:
        words.update("▁" + w for w in unicodedata.normalize("NFKC", text).split())
        if len(words) > room:
            return []
    counts, kinds = Counter(words), Counter(words.keys())
    for word, count in words.items():
        ends = range(1, len(word) + 1)
        parts = {word[i:j] for j in ends for i in range(max(0, j - _LONGEST_PART), j)}
        for part in parts - {word}:
            counts[part] += count
            kinds[part] += 1
    shared = ((n, p) for p, n in counts.items() if kinds[p] > 1 or p in words)
    # Words are wanted without the comma that follows them, too.
    bare = {m[0] for word in words for m in re.finditer(r"▁?\w+", word)} - words.keys()
    alone = ((counts[p], p) for p in bare if kinds[p] == 1)
    ordered = sorted([*shared, *alone], key=lambda x: (-x[0], x[1]))
    return [(piece, count) for count, piece in ordered]


class _Added(msgspec.Struct):
    id: int


class _Model(msgspec.Struct):
    type: str = "nameless"
    vocab: list[tuple[str, float]] | dict[str, int] = []
    byte_fallback: bool | None = None


class _Normalizer(msgspec.Struct):
    precompiled_charsmap: str | None = None
    normalizers: list["_Normalizer"] = []

    def table(self) -> str | None:
        """Returns the table that normalises characters, if there is one."""
        inner = (normalizer.table() for normalizer in self.normalizers)
        return self.precompiled_charsmap or next(filter(None, inner), None)


class _TokenizerJson(msgspec.Struct):
    model: _Model = msgspec.field(default_factory=_Model)
    added_tokens: list[_Added] = []
    normalizer: _Normalizer | None = None


def sentencepiece_of(file: str | os.PathLike[str]) -> bytes:
    """Returns the sentencepiece model in a `tokenizer.json`, as the bytes of its file.

    transformers saves T5's tokenizer in this form alone; both hold the same pieces and
    scores, and the same table that normalises characters.

    Raises:
        ValueError: the file holds no unigram model.
    """
    settings = read_json(file, "copy it anew", _TokenizerJson)
    model = settings.model
    if model.type != "Unigram":
        raise ValueError(f"{file} holds a {model.type} model; that of T5 is Unigram.")
    try:
        return _as_proto(settings).SerializeToString()
    except (TypeError, ValueError) as error:  # of protobuf's fields, and of base64
        raise ValueError(f"{file} is damaged ({error}); copy it anew.") from error


def _as_proto(settings: _TokenizerJson) -> Any:
    model = settings.model
    proto = _MESSAGES.ModelProto()
    kinds = proto.SentencePiece
    added = (token.id for token in settings.added_tokens)
    special = dict.fromkeys(added, kinds.CONTROL)
    special |= {PAD_ID: kinds.CONTROL, EOS_ID: kinds.CONTROL, UNK_ID: kinds.UNKNOWN}
    for number, (piece, score) in enumerate(model.vocab):
        is_byte = model.byte_fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", piece)
        kind = special.get(number, kinds.BYTE if is_byte else kinds.NORMAL)
        proto.pieces.add(piece=piece, score=score, type=kind)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = trainer.UNIGRAM
    trainer.pad_id, trainer.eos_id, trainer.unk_id = PAD_ID, EOS_ID, UNK_ID
    trainer.bos_id = -1
    trainer.byte_fallback = bool(model.byte_fallback)
    normalizer.add_dummy_prefix = True
    normalizer.remove_extra_whitespaces = True
    normalizer.escape_whitespaces = True
    if settings.normalizer and (table := settings.normalizer.table()):
        normalizer.precompiled_charsmap = base64.b64decode(table)
    return proto
