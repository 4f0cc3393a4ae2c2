"""Encodes a data set of clips to a data set of latents, with a finished autoencoder.

The latents have the same record format as the clips. The data set's settings name the
autoencoder (hash, fields) and the source; a copy of the autoencoder, with the mean and
standard deviation of its latents, lies beside the shards. With an audio autoencoder,
records hold the latents of the sound as well. With a text encoder, they also hold the
text states of the captions, and a copy of the text encoder lies beside the shards; for
one from a released model, only the path of the release.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from jvdit.data.clips import SIZE, BadClip, Clip, Source
from jvdit.data.conditions.beside import PRESENCE, VIEWS, View
from jvdit.data.grid import ClipGrid
from jvdit.data.records import RecordDataset, RecordWriter, latent_features
from jvdit.data.sources import open_source, origin
from jvdit.machine import cluster
from jvdit.machine.files import said_if_full
from jvdit.machine.progress import Bars
from jvdit.models.video_vae import VideoVAE
from jvdit.ranges import check_ranges
from jvdit.tasks.config_grid import grid_of, read_config
from jvdit.weights.encoders import CaptionEncoder, ClipEncoder, SoundEncoder
from jvdit.weights.parameters import module_fields, save_weights

SHARD = 2048  # clips in a shard
_READERS = min(16, os.cpu_count() or 1)  # threads that read clips


def encode(
    source: str,
    vae: str,
    out: str,
    validation: str = "",
    text_encoder: str = "",
    text_length: int = 64,
    audio_vae: str = "",
    shard: int = SHARD,
    config: str = "",
    views: Sequence[str] = (),
) -> None:
    """Encodes a source of clips, and optionally a second one for validation.

    Every process must call this; each encodes a part of the shards on its host's
    devices.

    Args:
        source: name of the training clips, which become the split "train".
        vae: the autoencoder: its training workdir, `model` folder or weights, or a
            released model.
        out: folder for the latents; shards already finished there aren't encoded again.
        validation: name of the held-out clips, which become the split "val"; "": none.
        text_encoder: folder of the text encoder for the captions; "": store captions
            only, for a training that trains its own encoder.
        text_length: most tokens of a caption; longer ones are cut.
        audio_vae: the autoencoder of the sound; "": clips become silent.
        shard: how many clips a shard has. Processes divide the work by shards.
        config: file of the config that the latents are for; "": not known yet, and what
            few models take is only logged.
        views: names of `VIEWS` to encode beside the clips, for what training gives of
            them (`given`).

    Raises:
        ValueError: a view isn't known, the folder holds other latents, another run is
            encoding into it, the autoencoder doesn't take the size of a clip, or the
            processes don't see the same folder.
        FileNotFoundError: there is no such source or autoencoder.
        OSError: files can't be written, for example because the disk is full.
    """
    cluster.check_alike(locals())
    check_ranges({"shard": shard, "text_length": text_length})
    if unknown := [name for name in views if name not in VIEWS]:
        raise ValueError(f"view {unknown[0]!r} must be one of: {', '.join(VIEWS)}.")
    encoder = ClipEncoder.load(vae)
    sounds = SoundEncoder.load(audio_vae) if audio_vae else None
    rate = sounds.module.sample_rate if sounds else 0
    named = {"train": source, "val": validation}
    beside = [VIEWS[name].of for name in views if name in PRESENCE]
    splits = {
        split: open_source(name, audio_rate=rate, beside=beside)
        for split, name in named.items()
        if name
    }
    if sounds and not splits["train"].index["has_audio"].any():
        raise ValueError(
            f"none of the clips of {source} has sound; prepare them from videos that "
            "have, or leave out `audio_vae`."
        )
    _check(named, splits, encoder.module, config)
    folder = pathlib.Path(out).absolute()
    settings: dict[str, Any] = {
        "vae": encoder.settings,
        "sources": {name: each.fingerprint for name, each in splits.items()},
        "origins": {name: origin(named[name]) for name in splits},
    }
    if sounds is not None:
        settings["audio_vae"] = sounds.settings
    states = None
    if text_encoder:
        captions = CaptionEncoder.load(text_encoder)
        settings["text"] = captions.settings | {"length": text_length}
        states = partial(captions, max_length=text_length)
    with said_if_full(folder), cluster.held(folder):
        writer = RecordWriter(
            folder,
            latent_features(
                text=states is not None, sound=sounds is not None, views=views
            ),
            shards={name: -(-len(each) // shard) for name, each in splits.items()},
            settings=settings,
        )
        with ThreadPoolExecutor(_READERS) as threads:
            _write(
                writer,
                splits,
                shard,
                _Maker(encoder, sounds, states, threads, tuple(views)),
            )
        cluster.wait_for_others(f"encoded {folder}")
        if cluster.is_lead():
            cluster.await_seen(lambda: all(_shards(writer)), f"all shards of {folder}")
            writer.finish()
            if states is not None:
                captions.save(folder)
            for name, each in (("vae", encoder), ("audio_vae", sounds)):
                if each is not None:
                    _save_autoencoder(each, folder, name)
        cluster.check_seen(folder / "vae" / "config.json")


def _check(
    named: Mapping[str, str], splits: Mapping[str, Source], vae: VideoVAE, config: str
) -> None:
    """Checks the sizes and captions of clips before any is encoded.

    Raises:
        ValueError: the autoencoder doesn't take a size, or the config's patches, or its
            training needs captions.
    """
    time, space = vae.temporal_compression, vae.spatial_compression
    grid = ClipGrid(period=time, height=2 * space, width=2 * space)  # patches of 2 x 2
    if config:
        grid = grid_of(read_config(config), vae)
    for split, source in splits.items():
        faults = []
        for size in np.unique(_sizes(source.index), axis=0).tolist():
            vae.latent_shape(*size)
            faults += grid.faults(*size)
        if not getattr(source, "captioned", True):
            told = f"none of the clips of {named[split]} has a caption"
            if grid.needs_captions:
                raise ValueError(f"{told}, and the training of {config} needs some.")
            logging.warning(told)
        told = "; ".join(dict.fromkeys(faults))
        if told and config:
            raise ValueError(f"{named[split]} isn't for {config}: {told}.")
        if told:
            logging.warning("%s: for most models, %s", named[split], told)


def _sizes(index, ids: Any = slice(None)) -> np.ndarray:
    """Frames, height and width of clips."""
    return np.stack([index[name][ids] for name in SIZE], 1)


def _shards(writer: RecordWriter) -> Iterator[bool]:
    """Whether each shard is done."""
    for split, shards in writer.shards.items():
        yield from (writer.is_done(split, i) for i in range(shards))


def _write(
    writer: RecordWriter, splits: Mapping[str, Source], shard: int, maker: "_Maker"
) -> None:
    """Writes this process's shards: every n-th one, for n processes."""
    pieces = [
        (split, i, range(i * shard, min((i + 1) * shard, len(source))))
        for split, source in splits.items()
        for i in range(writer.shards[split])
    ]
    mine = pieces[jax.process_index() :: jax.process_count()]
    with Bars(show=cluster.is_lead()) as progress:
        task = progress.add_task("encoding", total=sum(len(ids) for *_, ids in mine))
        for split, i, ids in mine:
            if not writer.is_done(split, i):
                records = maker.records(splits[split], split, ids)
                writer.write_shard(split, i, records)
            progress.advance(task, len(ids))


@dataclasses.dataclass(frozen=True)
class _Maker:
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
        each = -(-len(ids) // _READERS)
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
    for i, size in zip(ids, _sizes(index, ids).tolist(), strict=True):
        groups.setdefault(tuple(size), []).append(i)
    return groups


def _save_autoencoder(
    encoder: ClipEncoder | SoundEncoder, folder: pathlib.Path, name: str
) -> None:
    """Saves an autoencoder beside its latents, with latent statistics if it has none.

    These are the mean and standard deviation of each latent channel.
    """
    fields = module_fields(encoder.module)
    if fields.get("latents_mean") is None:
        mean, std = _statistics(folder, "sound_" if name == "audio_vae" else "")
        fields |= {"latents_mean": mean, "latents_std": std}
    save_weights(folder / name, encoder.params, fields)


def _statistics(folder: pathlib.Path, kind: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel, over a sample of records."""
    records = RecordDataset(folder, "train")
    stride = max(len(records) // 4096, 1)
    total = square = count = 0
    for i in range(0, len(records), stride):
        record = records[i]
        mean = np.asarray(record[f"{kind}mean"], np.float64)
        mean = mean.reshape(-1, mean.shape[-1])
        variance = np.exp(np.asarray(record[f"{kind}logvar"], np.float64))
        total = total + mean.sum(0)
        square = square + (mean**2).sum(0) + variance.reshape(mean.shape).sum(0)
        count += len(mean)
    mean = np.asarray(total) / count
    std = np.sqrt(np.maximum(np.asarray(square) / count - mean**2, 1e-8))
    return mean.tolist(), std.tolist()
