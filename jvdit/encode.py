"""Encodes a data set to latents: `python -m jvdit.encode --source … --vae … --out …`.

What is written is a data set of the same record format. Its settings say which
autoencoder made it (hash, fields), of which source; a copy of the autoencoder, with the
statistics of its latents, lies beside the shards. So do, with `--text_encoder`, states
of the captions, settings and a copy of the text encoder; of a released one, which may
stand for either, only where it lies. Killed and started again,
encoding goes on after its last finished shard.
"""

import math
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from rich.progress import Progress

from jvdit.caption_encoder import CaptionEncoder
from jvdit.compilation import jit, keep_compilations
from jvdit.data.catalog import open_source
from jvdit.data.clips import BadClip, Clip, Source
from jvdit.data.record_format import latent_features
from jvdit.data.records import RecordDataset, RecordWriter
from jvdit.huge_pages import use_huge_pages
from jvdit.models.video_vae import VideoVAE
from jvdit.models.video_vae_chunked import encode_stream, split
from jvdit.pretrained.folders import load_vae
from jvdit.pretrained.release import is_release, read_release
from jvdit.training.checkpoint import (
    build,
    load_weights,
    module_fields,
    save_weights,
    weights_hash,
)
from jvdit.training.vae_objective import to_float

_SOURCE = flags.DEFINE_string("source", None, "What to encode: see jvdit.data.catalog.")
_VALIDATION = flags.DEFINE_string("validation", "", "Goes to the split val.")
_VAE = flags.DEFINE_string(
    "vae", None, "The `model` folder of an autoencoder, or a released model."
)
_OUT = flags.DEFINE_string("out", None, "Folder of the latents.")
_TEXT_ENCODER = flags.DEFINE_string(
    "text_encoder", "", "Workdir or released model; encodes the captions too."
)
_TEXT_LENGTH = flags.DEFINE_integer("text_length", 64, "Tokens of a caption at most.")

_States = Callable[[Sequence[str]], list[np.ndarray]]

SHARD = 2048  # clips
BATCH = 32  # clips, fewer where they have many pixels
PIXELS = 1 << 23  # of a batch; a clip of more is encoded piece by piece


def encode(
    source: str,
    vae: str,
    out: str,
    validation: str = "",
    text_encoder: str = "",
    text_length: int = 64,
) -> None:
    """Encodes a source, and another one for validation.

    Args:
        source: name of the clips of the split train.
        vae: folder of the autoencoder: its workdir, `model` or weights.
        out: folder of the latents; what is finished there is not done again.
        validation: name of the clips of the split val. "": none.
        text_encoder: folder of the text encoder that encodes the captions. "": leave
            them to the training.
        text_length: tokens of a caption at the most.

    Raises:
        ValueError: the folder holds other latents, or a clip is of a size that the
            autoencoder doesn't take.
        FileNotFoundError: there is no such source or autoencoder.
    """
    module, params, fields = _autoencoder(vae)
    splits = {"train": open_source(source)}
    if validation:
        splits["val"] = open_source(validation)
    for each in splits.values():
        index = each.index
        sizes = np.stack([index["frames"], index["height"], index["width"]], 1)
        for size in np.unique(sizes, axis=0):
            module.latent_shape(*map(int, size))
    folder = pathlib.Path(out).absolute()
    settings = {
        "vae": {"hash": weights_hash(params), "fields": fields},
        "sources": {name: each.fingerprint for name, each in splits.items()},
    }
    shards = {name: -(-len(each) // SHARD) for name, each in splits.items()}
    states: _States | None = None
    if text_encoder:
        captions = CaptionEncoder.load(text_encoder)
        settings["text"] = captions.settings | {"length": text_length}
        states = partial(captions, max_length=text_length)
    writer = RecordWriter(
        folder,
        latent_features(text=states is not None),
        shards=shards,
        settings=settings,
    )
    if not writer.finished:
        _write(writer, splits, shards, _encoder(module, params), states)
        writer.finish()
    if fields.get("latents_mean") is None:
        mean, std = _statistics(folder)
        fields |= {"latents_mean": mean, "latents_std": std}
    save_weights(folder / "vae", params, fields)
    if states is not None:
        captions.save(folder)


def _autoencoder(vae: str) -> tuple[VideoVAE, Any, dict[str, Any]]:
    """An autoencoder of ours or of a released model: module, parameters, fields."""
    if is_release(vae):
        loaded = load_vae(read_release(vae).parts["vae"])
        return loaded.module, loaded.params, module_fields(loaded.module)
    params, fields = load_weights(_weights_folder(vae))
    return build(VideoVAE, fields), params, fields


def _weights_folder(vae: str) -> pathlib.Path:
    folder = pathlib.Path(vae)
    for inside in ("model/vae", "vae"):
        if (folder / inside / "config.json").exists():
            return folder / inside
    return folder


def _encoder(module: VideoVAE, params: Any) -> Callable[[Any], Any]:
    @jit
    def whole(params, video):
        return module.apply({"params": params}, to_float(video), method="encode")

    def encoded(params, video):
        if video[..., 0].size <= PIXELS:
            return whole(params, video)
        pieces = map(to_float, split(video, module.temporal_compression))
        moments = [*encode_stream(module, params, pieces)]
        return [np.concatenate(x, axis=1) for x in zip(*moments, strict=True)]

    return partial(encoded, jax.device_put(params))


def _write(writer: RecordWriter, splits, shards, run, states: _States | None) -> None:
    with Progress() as progress:
        total = sum(map(len, splits.values()))
        task = progress.add_task("encoding", total=total)
        for split, source in splits.items():
            for shard in range(shards[split]):
                ids = range(shard * SHARD, min((shard + 1) * SHARD, len(source)))
                if not writer.is_done(split, shard):
                    examples = _examples(source, ids, split, run, states)
                    writer.write_shard(split, shard, examples)
                progress.advance(task, len(ids))


def _examples(
    source: Source,
    ids: Sequence[int],
    split: str,
    run: Callable[[Any], Any],
    states: _States | None,
) -> Iterator[dict[str, Any]]:
    """The records of clips, those of one size after another.

    A device encodes the next batch while the one before is made to records.
    """
    before: Iterator[dict[str, Any]] = iter(())
    for size, alike in _by_size(source.index, ids).items():
        batch = min(BATCH, max(PIXELS // math.prod(size), 1))
        for start in range(0, len(alike), batch):
            chunk = alike[start : start + batch]
            clips = dict(zip(chunk, source.read(chunk), strict=True))
            for i, clip in clips.items():
                if isinstance(clip, BadClip):
                    logging.warning("left out clip %d of %s: %s", i, split, clip.reason)
            good = {i: c for i, c in clips.items() if not isinstance(c, BadClip)}
            if good:
                videos = np.stack([clip["video"] for clip in good.values()])
                # One shape, one compilation: the last batch is filled up.
                spare = np.repeat(videos[:1], batch - len(videos), axis=0)
                moments = run(np.concatenate([videos, spare]))
                yield from before
                before = _records(good, split, moments, states)
    yield from before


def _records(
    clips: Mapping[int, Clip], split: str, moments: Sequence[Any], states: Any
) -> Iterator[dict[str, Any]]:
    """The records of one batch, of which the last clips may be spare."""
    texts: list[Any] = [None] * len(clips)
    if states is not None:
        texts = states([clip["caption"] for clip in clips.values()])
    mean, logvar = map(np.asarray, moments)
    for (i, clip), *found in zip(clips.items(), mean, logvar, texts, strict=False):
        yield _record(f"{split}-{i:09d}", clip, *found)


def _record(
    key: str, clip: Clip, mean: np.ndarray, logvar: np.ndarray, text: np.ndarray | None
) -> Clip:
    frames, height, width = mean.shape[:3]
    record = {
        "key": key,
        "mean": mean.astype(jnp.bfloat16),
        "logvar": logvar.astype(jnp.bfloat16),
        "caption": clip["caption"],
        "meta": "{}",
        "frames": frames,
        "height": height,
        "width": width,
        "text_length": 0 if text is None else len(text),
        "fps": float(clip["fps"]),
        "has_audio": clip.get("audio") is not None,
    }
    if text is not None:
        record["text_embeds"] = text.astype(jnp.bfloat16)
    return record


def _by_size(index, ids: Sequence[int]) -> dict[tuple[int, ...], list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in ids:
        size = tuple(int(index[name][i]) for name in ("frames", "height", "width"))
        groups.setdefault(size, []).append(i)
    return groups


def _statistics(folder: pathlib.Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of latents drawn from the cache."""
    records = RecordDataset(folder, "train")
    stride = max(len(records) // 4096, 1)
    total = square = 0.0
    count = 0
    for i in range(0, len(records), stride):
        record = records[i]
        mean = np.asarray(record["mean"], np.float64)
        variance = np.exp(np.asarray(record["logvar"], np.float64))
        total = total + mean.sum((0, 1, 2))
        square = square + (mean**2 + variance).sum((0, 1, 2))
        count += mean[..., 0].size
    mean = np.asarray(total) / count
    std = np.sqrt(np.maximum(np.asarray(square) / count - mean**2, 1e-8))
    return mean.tolist(), std.tolist()


def main(argv: list[str]) -> None:
    """Parses, encodes, and turns mistakes of the user into one line."""
    if len(argv) > 1:
        sys.exit(f"unexpected argument {argv[1]!r}; see --help")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        keep_compilations()
        encode(
            _SOURCE.value,
            _VAE.value,
            _OUT.value,
            _VALIDATION.value,
            _TEXT_ENCODER.value,
            _TEXT_LENGTH.value,
        )
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(f"latents: {_OUT.value}")


if __name__ == "__main__":
    use_huge_pages()
    flags.mark_flags_as_required(["source", "vae", "out"])
    app.run(main)
