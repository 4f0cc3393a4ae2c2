"""Measures sets of clips of the procedural world: scores, thumbnails, features."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from jvdit.data.sources import world_of
from jvdit.data.world import World
from jvdit.data.world.scene import MATERIALS, Scenes
from jvdit.evaluation import distance, oracle
from jvdit.evaluation.oracle.adherence import confusions

# Worlds that a model was trained on, and how many clips of each.
Trained = Sequence[tuple[World, int]]
LATE = 0.060  # seconds of a control
CHUNK = 64  # clips that are measured at once
# Real clips that generated ones are compared with.
_TRAIN, _MOST_TRAIN, _HELD_OUT = 2048, 32_768, 256
_OTHER_SEED = 1_000_003  # added to a world's seed for its held-out clips


class Shown(NamedTuple):
    """A batch of clips of one size.

    Attributes:
        videos: their pictures, in [0, 255].
        audio: their sounds, samples in [-1, 1]; None: they are silent.
        rate: samples per second.
    """

    videos: UInt8[np.ndarray, "b T H W 3"]
    audio: Float[np.ndarray, "b a e"] | None = None
    rate: int = 0

    @property
    def mono(self) -> np.ndarray | None:
        """The sounds as the oracle hears them `[b a]`."""
        return None if self.audio is None else self.audio.mean(-1)


@dataclasses.dataclass
class Measured:
    """A set of clips, and what was measured of each.

    Attributes:
        scores: oracle scores, by name.
        thumbnails: thumbnails and their variants, from `distance.variants`.
        features: random features, from `distance.random_features`.
        clips: the clips.
        controls: scores of sound if the clips had another, by the name of that; {} if
            they are silent.
        confusions: what is seen in the place of what is told, from `confusions`.
    """

    scores: oracle.Scores
    thumbnails: np.ndarray
    features: np.ndarray
    clips: Shown
    controls: dict[str, oracle.Scores]
    confusions: dict[str, tuple[tuple[str, ...], np.ndarray]]

    @classmethod
    def of(cls, world: World, chunks: Iterator[Shown]) -> "Measured":
        """Measures clips of a split's first scenes, chunk by chunk.

        Args:
            world: the world and split whose scenes the clips show.
            chunks: batches of clips, in the order of the scenes.
        """
        parts, start = [], 0
        confused: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
        wrong: dict[str, list[oracle.Scores]] = {}
        for shown in chunks:
            videos, heard = shown.videos, (shown.mono, shown.rate)
            scenes = world.scenes(np.arange(start, start + len(videos)))
            start += len(videos)
            seen = oracle.observe(videos, scenes, world.fps)
            told_seen = confusions(seen.reading, seen.tracks, scenes)
            for name, (words, counts) in told_seen.items():
                confused[name] = words, counts + confused.get(name, (words, 0))[1]
            for name, (told, audio) in controls(scenes, *heard).items():
                found = oracle.listen(seen, told, world.fps, audio, shown.rate)
                wrong.setdefault(name, []).append(found)
            scores = oracle.judge(seen, videos, scenes, world.fps, *heard)
            variants = distance.variants(videos)
            parts.append((scores, variants, distance.random_features(videos), shown))
        scores, thumbnails, features, clips = zip(*parts, strict=True)
        audio = [x.audio for x in clips if x.audio is not None]
        audio = np.concatenate(audio) if audio else None
        return cls(
            oracle.joined(scores),
            np.concatenate(thumbnails),
            np.concatenate(features),
            Shown(np.concatenate([x.videos for x in clips]), audio, clips[0].rate),
            {name: oracle.joined(found) for name, found in wrong.items()},
            confused,
        )

    @property
    def counts(self) -> dict[str, int]:
        """How many clips each score is measured of."""
        return {k: int(np.isfinite(v).sum()) for k, v in self.scores.items()}

    @property
    def summary(self) -> dict[str, tuple[float, float, float]]:
        """The mean of each score, and the ends of its 95 % confidence interval."""
        return oracle.summary(self.scores)


def controls(
    scenes: Scenes, audio: Float[np.ndarray, "b a"] | None, rate: int
) -> dict[str, tuple[Scenes, np.ndarray]]:
    """Sounds that are wrong in a known way, by name; {} for silent clips.

    Returns:
        For each, what is told of the scenes, and what sounds.
    """
    if audio is None:
        return {}
    other = (scenes.material + 1) % len(MATERIALS)
    late = np.pad(audio, ((0, 0), (round(LATE * rate), 0)))[:, : audio.shape[1]]
    return {
        "another clip's": (scenes, np.roll(audio, 1, axis=0)),
        "60 ms late": (scenes, late),
        "silence": (scenes, np.zeros_like(audio)),
        "of another material": (dataclasses.replace(scenes, material=other), audio),
    }


def chunks(count: int) -> Iterator[np.ndarray]:
    """The indices from 0 to `count`, in chunks of at most `CHUNK`."""
    for start in range(0, count, CHUNK):
        yield np.arange(start, min(start + CHUNK, count))


def real(world: World, count: int, sound: bool = False) -> Iterator[Shown]:
    """The world's own clips of its split's first scenes, chunk by chunk."""
    for ids in chunks(count):
        clips = world.clips(ids, audio=sound)
        audio = clips["audio"] if sound else None
        yield Shown(clips["video"], audio, world.audio_rate)


def trained_on(sources: Sequence[str]) -> list[tuple[World, int]]:
    """The worlds that a model was trained on, and how many clips of each."""
    found = [world_of(name) for name in sources]
    return list(dict.fromkeys(x for x in found if x is not None))


def neighbours(world: World, trained: Trained) -> tuple[np.ndarray, np.ndarray]:
    """Thumbnails of training clips, and variants of those of held-out clips.

    Args:
        world: the world that is evaluated; its size and rate are taken.
        trained: what the model was trained on, from `trained_on`; if that isn't known,
            clips of split "train".
    """
    like = [
        (dataclasses.replace(world, split=other.split, seed=other.seed), count)
        for other, count in trained
    ]
    like = like or [(dataclasses.replace(world, split="train", seed=0), _TRAIN)]
    most = _MOST_TRAIN // len(like)
    train = [
        distance.thumbnails(x)
        for other, count in like
        for x in map(other.videos, chunks(min(count, most)))
    ]
    other = dataclasses.replace(world, seed=world.seed + _OTHER_SEED)
    others = map(other.videos, chunks(_HELD_OUT))
    held_out = [distance.variants(x) for x in others]
    return np.concatenate(train), np.concatenate(held_out)


def met_in_training(prompts: Sequence[str], trained: Trained) -> np.ndarray:
    """Which prompts are captions of clips that the model was trained on."""
    known = {
        caption
        for world, count in trained
        for ids in chunks(count)
        for caption in world.captions(ids)
    }
    return np.array([prompt in known for prompt in prompts], bool)
