"""A source of latents of clips: those of a record data set."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jvdit.data.clips import SIZE, BadClip, Clip, Ids, Indexed, make_index
from jvdit.data.conditions.beside import PRESENCE, VIEWS
from jvdit.data.grid import ClipGrid
from jvdit.data.order import fingerprint
from jvdit.data.records import RecordDataset, check_features


class LatentSource(Indexed):
    """Latents (and text states) of a record data set.

    Args:
        path: the data set directory.
        split: which split.
        max_text: most text tokens kept for a caption that has no stored states.
        pad_text: every caption has room for `max_text` tokens.
        frames: take at most the first so many pixel frames of each clip, which a causal
            autoencoder codes without looking at the others. None: all.

    Attributes:
        path: the data set directory.
        settings: what made the latents: the VAE, its normalisation and so on.
        views: names of `VIEWS` that were encoded beside the clips.
        view: the one that is read with them; "": none.

    Raises:
        ValueError: the data set holds no latents, or none of so many frames.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        max_text: int = 512,
        pad_text: bool = False,
        frames: int | None = None,
    ):
        self._records = records = RecordDataset(path, split)
        features, index = records.features, records.index
        if "mean" not in features:
            raise ValueError(
                f"{path} holds {sorted(features)} and no latents; encode it first, or "
                "read its videos with `RecordSource`."
            )
        check_features(records, "text_length")
        self.path, self.settings = records.path, records.settings
        self.views, self.view = tuple(x for x in VIEWS if x in features), ""
        text = index["text_length"]
        if not text.all():
            # No tokenizer makes more tokens of a caption than it has characters, but
            # for what its vocabulary lacks; that is cut off.
            bound = np.minimum(index["caption_length"] + 2, max_text)
            text = np.where(text > 0, text, bound)
        if pad_text:
            text = np.full_like(text, max_text)
        taken = {name: index[name] for name in (*SIZE, "fps", "has_audio")}
        taken["sounds"] = index.get("sounds", 0)
        if frames is not None:
            each = self.temporal_compression
            if faults := ClipGrid(period=each).faults(frames, 0, 0):
                raise ValueError(f"{faults[0]}.")
            most = 1 + (frames - 1) // each
            taken["frames"] = np.minimum(taken["frames"], most)
            taken["sounds"] = self._sounds(frames, taken)
        self.index = make_index(len(records), text_length=text, **taken)
        options = ("padded",) * pad_text + (f"frames {frames}",) * (frames is not None)
        held = records.fingerprint, max_text
        self.fingerprint = fingerprint("latents", *held, *options)

    @property
    def temporal_compression(self) -> int:
        """Pixel frames of a latent frame after the first."""
        fields = self.settings["vae"]["fields"]
        return 2 ** sum(map(bool, fields["temporal_downsample"]))

    def captions(self, ids: Ids) -> list[str]:
        """Returns the captions of clips; see `RecordDataset.captions`."""
        return self._records.captions(ids)

    def has(self, view: str) -> np.ndarray:
        """Which clips have a view that some may lack, a row of `PRESENCE`."""
        return np.asarray(self._records.index[PRESENCE[view]], bool)

    def _read_one(self, i: int) -> Clip | BadClip:
        record = self._records[i]
        size = tuple(int(self._records.index[name][i]) for name in SIZE)
        if record["mean"].shape[:3] != size:
            return BadClip(f"latents of {record['mean'].shape}, indexed as {size}")
        clip = {name: record[name] for name in ("caption", "fps", "has_audio")}
        frames, sounds = (int(self.index[name][i]) for name in ("frames", "sounds"))
        lengths = {"mean": frames, "logvar": frames, "text_embeds": None}
        if sounds:
            lengths |= {"sound_mean": sounds, "sound_logvar": sounds}
        for name, most in lengths.items():
            if name in record:
                clip[name] = np.asarray(record[name][:most], np.float32)
        if self.view:
            size = frames, *size[1:]
            found = VIEWS[self.view].size(size, self.temporal_compression)
            most = found[0] if found else 0
            clip["view"] = np.asarray(record[self.view][:most], np.float32)
        return clip

    def _sounds(self, frames: int, index: Mapping[str, Any]) -> Any:
        """How many latents of each sound belong to the first frames; pictures: none."""
        if frames == 1 or "audio_vae" not in self.settings:
            return 0
        fields = self.settings["audio_vae"]["fields"]
        hop = fields["patch_size"] * math.prod(fields["strides"])
        held = np.ceil(frames / index["fps"] * fields["sample_rate"] / hop)
        return np.minimum(index["sounds"], held.astype(np.int64))
