"""The sound of clips, as a source of its own."""

import numpy as np

from jvdit.data.clips import BadClip, Clip, Ids, Indexed, Source, make_index
from jvdit.data.order import fingerprint


class SoundSource(Indexed):
    """The sounds of those clips of a source that have some.

    A sound's `frames` are its samples, its `height` and `width` are 1, and its `fps`
    are its samples per second, so that plans and batches are made as of pictures.

    Args:
        source: clips with `audio` at `rate`, see `open_source`.
        rate: samples per second.
        channels: 1: sounds are mixed down; 2: one channel is repeated.

    Raises:
        ValueError: no clip has sound.
    """

    def __init__(self, source: Source, rate: int, channels: int = 1):
        self._kept = np.flatnonzero(source.index["has_audio"])
        if not len(self._kept):
            raise ValueError(
                f"none of the {len(source)} clips has sound; prepare them anew from "
                "videos that have, or train the autoencoder of pictures."
            )
        self._source, self.rate, self.channels = source, rate, channels
        index = {name: value[self._kept] for name, value in source.index.items()}
        samples = np.round(index["frames"] / index["fps"] * rate).astype(np.int64)
        index |= {"frames": samples, "fps": rate, "height": 1, "width": 1}
        self.index = make_index(len(self._kept), **index)
        self.fingerprint = fingerprint("sounds", source.fingerprint, rate, channels)

    def read(self, ids: Ids) -> list[Clip | BadClip]:
        """Returns clips with `audio` float32 [a channels], in order."""
        clips = self._source.read(self._kept[np.asarray(ids)])
        for i, clip in enumerate(clips):
            if isinstance(clip, BadClip):
                continue
            audio, caption = sound_of(clip, self.channels), clip["caption"]
            sound = {"audio": audio, "fps": float(self.rate), "caption": caption}
            clips[i] = audio if isinstance(audio, BadClip) else sound
        return clips


def sound_of(clip: Clip, channels: int) -> np.ndarray | BadClip:
    """The sound of a clip, float32 [a channels], if it is whole."""
    audio = clip["audio"]
    if audio is None or not clip.get("has_audio", True):
        return BadClip("its sound is missing, silent or has gaps")
    return in_channels(audio, channels)


def in_channels(audio: np.ndarray, channels: int) -> np.ndarray:
    """A sound [a e] in 1 or 2 channels: mixed down, or its one channel repeated."""
    if audio.shape[1] == channels:
        return audio
    return audio.mean(1, keepdims=True).repeat(channels, 1)
