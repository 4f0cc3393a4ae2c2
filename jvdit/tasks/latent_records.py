"""Records of latents: clips read and encoded, batch after batch of one size."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging

from jvdit.data.clips import SIZE, BadClip, Clip, Source
from jvdit.data.conditions.beside import PRESENCE, VIEWS, View
from jvdit.weights.encoders import ClipEncoder, SoundEncoder

READERS = min(16, os.cpu_count() or 1)  # threads that read clips


def sizes_of(index, ids: Any = slice(None)) -> np.ndarray:
    """Frames, height and width of clips."""
    return np.stack([index[name][ids] for name in SIZE], 1)


@dataclasses.dataclass(frozen=True)
class RecordMaker:
    """Encodes clips to records.

    Attributes:
        encoder: the autoencoder of pictures.
        sounds: that of sounds; None: sound isn't encoded.
        states: encodes captions to text states; None: captions aren't encoded.
        threads: threads that read clips.
        views: names of `VIEWS` to encode beside the clips.
    """

    encoder: ClipEncoder
    sounds: SoundEncoder | None
    states: Callable[[Sequence[str]], list[np.ndarray]] | None
    threads: ThreadPoolExecutor
    views: tuple[str, ...] = ()

    def records(
        self, source: Source, split: str, ids: Sequence[int]
    ) -> Iterator[dict[str, Any]]:
        """Encodes clips, size after size, and yields their records.

        The devices encode the next batch while the host builds records of the last.
        """
        before: Iterator[dict[str, Any]] = iter(())
        for size, alike in _by_size(source.index, ids).items():
            rows = self.encoder.rows(len(alike), size)
            for start in range(0, len(alike), rows):
                clips = self._read(source, split, alike[start : start + rows])
                if not clips:
                    continue
                videos = np.stack([clip["video"] for clip in clips.values()])
                # The last batch is padded to the same shape: one compilation.
                spare = np.repeat(videos[:1], rows - len(videos), axis=0)
                videos = np.concatenate([videos, spare])
                moments = self.encoder(videos)
                views = {
                    name: self._view(name, [*clips.values()], videos)
                    for name in self.views
                }
                yield from before
                before = self._made(clips, split, moments, views)
        yield from before

    def _read(self, source: Source, split: str, ids: Sequence[int]) -> dict[int, Clip]:
        """Reads clips on several threads, since a decoder uses one; skips bad ones."""
        each = -(-len(ids) // READERS)
        parts = [ids[i : i + each] for i in range(0, len(ids), each)]
        good = {}
        clips = chain(*self.threads.map(source.read, parts))
        for i, clip in zip(ids, clips, strict=True):
            if isinstance(clip, BadClip):
                logging.warning("left out clip %d of %s: %s", i, split, clip.reason)
            else:
                good[i] = clip
        return good

    def _view(
        self, name: str, clips: Sequence[Clip], videos: np.ndarray
    ) -> Sequence[np.ndarray] | np.ndarray:
        """A view `[f h w c]` of each of the clips of one size; maybe of no frames.

        Args:
            name: of the view.
            clips: that were read.
            videos: theirs, and copies that fill the batch.
        """
        view, vae = VIEWS[name], self.encoder.module
        size = vae.latent_shape(*videos.shape[1:4])
        compression = vae.temporal_compression
        width = view.width(vae.latent_channels, compression)
        blank = np.zeros((0, *size[1:], width), jnp.bfloat16)
        if view.size(size, compression) is None:
            return [blank] * len(clips)
        if view.measured is not None:
            blank, found = blank.astype(np.float32), (x.get(view.of) for x in clips)
            return [
                blank if x is None else view.measured(x, size, compression)
                for x in found
            ]
        if view.of != "video":
            lacking = np.zeros_like(videos[0])
            found = [clip.get(view.of) for clip in clips]
            # As many as there are videos: one compilation.
            found += [None] * (len(videos) - len(clips))
            videos = np.stack([lacking if x is None else x for x in found])
            made = self._encoded_view(view, videos)
            return [blank if x is None else y for x, y in zip(found, made, strict=True)]
        return self._encoded_view(view, videos)

    def _encoded_view(self, view: View, videos: np.ndarray) -> np.ndarray:
        """The latents `[b f h w c]` of a view of videos."""
        assert view.clips is not None
        rows = len(videos)
        parts = np.concatenate([view.clips(video) for video in videos])
        batch = self.encoder.rows(len(parts), parts.shape[1:4])
        padded = np.pad(parts, ((0, -len(parts) % batch), *((0, 0),) * 4))
        means = [
            np.asarray(self.encoder(padded[i : i + batch])[0]).astype(jnp.bfloat16)
            for i in range(0, len(padded), batch)
        ]
        means = np.concatenate(means)[: len(parts)]
        return means.reshape(rows, -1, *means.shape[2:])

    def _made(
        self,
        clips: Mapping[int, Clip],
        split: str,
        moments: Sequence[Any],
        views: Mapping[str, Sequence[np.ndarray] | np.ndarray],
    ) -> Iterator[dict[str, Any]]:
        """Builds the records of one batch, whose last rows may be padding."""
        texts: list[Any] = [None] * len(clips)
        if self.states is not None:
            texts = self.states([clip["caption"] for clip in clips.values()])
        made = *map(np.asarray, moments), texts, self._sounds([*clips.values()])
        rows = zip(clips.items(), *made, strict=False)
        for row, ((i, clip), *found, sound) in enumerate(rows):
            beside: Clip = {name: view[row] for name, view in views.items()}
            beside |= {
                told: len(beside[name]) > 0
                for name, told in PRESENCE.items()
                if name in beside
            }
            yield _record(f"{split}-{i:09d}", clip, *found) | sound | beside

    def _sounds(self, clips: Sequence[Clip]) -> list[dict[str, Any]]:
        """What each record has of its sound; sounds of a length go together."""
        if self.sounds is None:
            return [{} for _ in clips]
        blank = np.zeros((0, self.sounds.module.latent_channels), jnp.bfloat16)
        silent = {"sound_mean": blank, "sound_logvar": blank, "sounds": 0}
        found = [{**silent, "has_audio": False} for _ in clips]
        heard: dict[int, list[int]] = {}
        for i, clip in enumerate(clips):
            if clip["audio"] is not None and clip.get("has_audio", True):
                heard.setdefault(len(clip["audio"]), []).append(i)
        for alike in heard.values():
            moments = self.sounds(np.stack([clips[i]["audio"] for i in alike]))
            made = (np.asarray(x).astype(jnp.bfloat16) for x in moments)
            for i, mean, logvar in zip(alike, *made, strict=True):
                found[i] = {"sound_mean": mean, "sound_logvar": logvar}
                found[i] |= {"sounds": len(mean), "has_audio": True}
        return found


def _record(
    key: str, clip: Clip, mean: np.ndarray, logvar: np.ndarray, text: np.ndarray | None
) -> Clip:
    record = {
        "key": key,
        "mean": mean.astype(jnp.bfloat16),
        "logvar": logvar.astype(jnp.bfloat16),
        "caption": clip["caption"],
        "meta": "{}",
        **dict(zip(SIZE, mean.shape, strict=False)),
        "text_length": 0 if text is None else len(text),
        "fps": float(clip["fps"]),
        "has_audio": clip.get("audio") is not None,
    }
    if text is not None:
        record["text_embeds"] = text.astype(jnp.bfloat16)
    return record


def _by_size(index, ids: Sequence[int]) -> dict[tuple[int, ...], list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, size in zip(ids, sizes_of(index, ids).tolist(), strict=True):
        groups.setdefault(tuple(size), []).append(i)
    return groups
