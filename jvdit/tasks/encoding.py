"""Encodes a data set of clips to a data set of latents, with a finished autoencoder.

The latents have the same record format as the clips. The data set's settings name the
autoencoder (hash, fields) and the source; a copy of the autoencoder, with the mean and
standard deviation of its latents, lies beside the shards. With an audio autoencoder,
records hold the latents of the sound as well. With a text encoder, they also hold the
text states of the captions, and a copy of the text encoder lies beside the shards; for
one from a released model, only the path of the release.
"""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import logging

from jvdit.data.clips import Source
from jvdit.data.conditions.beside import PRESENCE, VIEWS
from jvdit.data.grid import ClipGrid
from jvdit.data.record_features import latent_features
from jvdit.data.record_writer import RecordWriter
from jvdit.data.records import RecordDataset
from jvdit.data.sources import open_source, origin
from jvdit.machine import cluster
from jvdit.machine.files import said_if_full
from jvdit.machine.progress import Bars
from jvdit.models.video_vae import VideoVAE
from jvdit.ranges import check_ranges
from jvdit.tasks.config_grid import grid_of, read_config
from jvdit.tasks.latent_records import READERS, RecordMaker, sizes_of
from jvdit.weights.encoders import CaptionEncoder, ClipEncoder, SoundEncoder
from jvdit.weights.parameters import module_fields, save_weights

SHARD = 2048  # clips in a shard


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
    named = {"train": source, "val": validation}
    splits = _opened(named, sounds, views)
    _check(named, splits, encoder.module, config)
    settings: dict[str, Any] = {
        "vae": encoder.settings,
        "sources": {name: each.fingerprint for name, each in splits.items()},
        "origins": {name: origin(named[name]) for name in splits},
    }
    if sounds is not None:
        settings["audio_vae"] = sounds.settings
    captions = CaptionEncoder.load(text_encoder) if text_encoder else None
    states = None
    if captions is not None:
        settings["text"] = captions.settings | {"length": text_length}
        states = partial(captions, max_length=text_length)
    held = {"text": captions is not None, "sound": sounds is not None, "views": views}
    shards = {name: -(-len(each) // shard) for name, each in splits.items()}
    folder = pathlib.Path(out).absolute()
    with said_if_full(folder), cluster.held(folder):
        features = latent_features(**held)
        writer = RecordWriter(folder, features, shards=shards, settings=settings)
        with ThreadPoolExecutor(READERS) as threads:
            maker = RecordMaker(encoder, sounds, states, threads, tuple(views))
            _write(writer, splits, shard, maker)
        cluster.wait_for_others(f"encoded {folder}")
        if cluster.is_lead():
            _finish(writer, folder, encoder, sounds, captions)
        cluster.check_seen(folder / "vae" / "config.json")


def _opened(
    named: Mapping[str, str], sounds: SoundEncoder | None, views: Sequence[str]
) -> dict[str, Source]:
    """Opens the sources of the splits, with sound and all that views are made of.

    Raises:
        ValueError: there is to be sound, and none of the training clips has any.
    """
    rate = sounds.module.sample_rate if sounds else 0
    beside = [VIEWS[name].of for name in views if name in PRESENCE]
    splits = {
        split: open_source(name, audio_rate=rate, beside=beside)
        for split, name in named.items()
        if name
    }
    if sounds and not splits["train"].index["has_audio"].any():
        raise ValueError(
            f"none of the clips of {named['train']} has sound; prepare them from "
            "videos that have, or leave out `audio_vae`."
        )
    return splits


def _finish(
    writer: RecordWriter,
    folder: pathlib.Path,
    encoder: ClipEncoder,
    sounds: SoundEncoder | None,
    captions: CaptionEncoder | None,
) -> None:
    """Completes a data set whose shards are done; what encoded it lies beside them."""
    cluster.await_seen(lambda: all(_shards(writer)), f"all shards of {folder}")
    writer.finish()
    if captions is not None:
        captions.save(folder)
    for name, each in (("vae", encoder), ("audio_vae", sounds)):
        if each is not None:
            _save_autoencoder(each, folder, name)


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
        for size in np.unique(sizes_of(source.index), axis=0).tolist():
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


def _shards(writer: RecordWriter) -> Iterator[bool]:
    """Whether each shard is done."""
    for split, shards in writer.shards.items():
        yield from (writer.is_done(split, i) for i in range(shards))


def _write(
    writer: RecordWriter, splits: Mapping[str, Source], shard: int, maker: "RecordMaker"
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
