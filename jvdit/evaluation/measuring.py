"""Measures sets of clips of the procedural world: scores, thumbnails, features."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from jvdit.data.sources import world_of
from jvdit.data.world import World
from jvdit.evaluation import distance, oracle
from jvdit.evaluation.oracle.adherence import confusions

CHUNK = 64  # clips that are measured at once
# Real clips that generated ones are compared with.
_TRAIN, _MOST_TRAIN, _HELD_OUT = 2048, 32_768, 256
_OTHER_SEED = 1_000_003  # added to a world's seed for its held-out clips


@dataclasses.dataclass
class Measured:
    """A set of clips, and what was measured of each.

    Attributes:
        scores: oracle scores, by name.
        thumbnails: thumbnails and their variants, from `distance.variants`.
        features: random features, from `distance.random_features`.
        videos: the clips, uint8 `[b T H W 3]`.
        confusions: what is seen in the place of what is told, from `confusions`.
    """

    scores: oracle.Scores
    thumbnails: np.ndarray
    features: np.ndarray
    videos: np.ndarray
    confusions: dict[str, tuple[tuple[str, ...], np.ndarray]]

    @classmethod
    def of(cls, world: World, chunks: Iterator[np.ndarray]) -> "Measured":
        """Measures clips of a split's first scenes, chunk by chunk.

        Args:
            world: the world and split whose scenes the clips show.
            chunks: batches of clips, in the order of the scenes.
        """
        parts, start = [], 0
        confused: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
        for videos in chunks:
            scenes = world.scenes(np.arange(start, start + len(videos)))
            start += len(videos)
            seen = oracle.observe(videos, scenes, world.fps)
            for name, (words, counts) in confusions(
                seen.reading, seen.tracks, scenes
            ).items():
                confused[name] = words, counts + confused.get(name, (words, 0))[1]
            parts.append(
                (
                    oracle.judge(seen, videos, scenes, world.fps),
                    distance.variants(videos),
                    distance.random_features(videos),
                    videos,
                )
            )
        scores, *arrays = zip(*parts, strict=True)
        joined = {k: np.concatenate([s[k] for s in scores]) for k in scores[0]}
        return cls(joined, *(np.concatenate(x) for x in arrays), confused)

    @property
    def counts(self) -> dict[str, int]:
        """How many clips each score is measured of."""
        return {k: int(np.isfinite(v).sum()) for k, v in self.scores.items()}

    @property
    def summary(self) -> dict[str, tuple[float, float, float]]:
        """The mean of each score, and the ends of its 95 % confidence interval."""
        return oracle.summary(self.scores)


def chunks(count: int) -> Iterator[np.ndarray]:
    """The indices from 0 to `count`, in chunks of at most `CHUNK`."""
    for start in range(0, count, CHUNK):
        yield np.arange(start, min(start + CHUNK, count))


def real(world: World, count: int) -> Iterator[np.ndarray]:
    """The world's own clips of its split's first scenes, chunk by chunk."""
    return map(world.videos, chunks(count))


def trained_on(sources: Sequence[str]) -> list[tuple[World, int]]:
    """The worlds that a model was trained on, and how many clips of each."""
    found = [world_of(name) for name in sources]
    return list(dict.fromkeys(x for x in found if x is not None))


def neighbours(
    world: World, trained: Sequence[tuple[World, int]]
) -> tuple[np.ndarray, np.ndarray]:
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
        for x in real(other, min(count, most))
    ]
    other = dataclasses.replace(world, seed=world.seed + _OTHER_SEED)
    held_out = [distance.variants(x) for x in real(other, _HELD_OUT)]
    return np.concatenate(train), np.concatenate(held_out)


def met_in_training(
    prompts: Sequence[str], trained: Sequence[tuple[World, int]]
) -> np.ndarray:
    """Which prompts are captions of clips that the model was trained on."""
    known = {
        caption
        for world, count in trained
        for ids in chunks(count)
        for caption in world.captions(ids)
    }
    return np.array([prompt in known for prompt in prompts], bool)
