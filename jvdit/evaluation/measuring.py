"""Measures sets of clips of the procedural world: scores, thumbnails, features."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from jvdit.data.world import World
from jvdit.evaluation import distance, oracle

CHUNK = 64  # clips that are measured at once
_TRAIN, _HELD_OUT = 2048, 512  # real clips that generated ones are compared with


@dataclasses.dataclass
class Measured:
    """A set of clips, and what was measured of each.

    Attributes:
        scores: oracle scores, by name.
        thumbnails: thumbnails, from `distance.thumbnails`.
        features: random features, from `distance.random_features`.
        videos: the clips, uint8 `[b T H W 3]`.
    """

    scores: oracle.Scores
    thumbnails: np.ndarray
    features: np.ndarray
    videos: np.ndarray

    @classmethod
    def of(cls, world: World, chunks: Iterator[np.ndarray]) -> "Measured":
        """Measures clips of a split's first scenes, chunk by chunk.

        Args:
            world: the world and split whose scenes the clips show.
            chunks: batches of clips, in the order of the scenes.
        """
        parts, start = [], 0
        for videos in chunks:
            scenes = world.scenes(np.arange(start, start + len(videos)))
            start += len(videos)
            parts.append(
                (
                    oracle.score(videos, scenes, world.fps),
                    distance.thumbnails(videos),
                    distance.random_features(videos),
                    videos,
                )
            )
        scores, *arrays = zip(*parts, strict=True)
        joined = {k: np.concatenate([s[k] for s in scores]) for k in scores[0]}
        return cls(joined, *(np.concatenate(x) for x in arrays))

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


def neighbours(world: World) -> tuple[np.ndarray, np.ndarray]:
    """Thumbnails of the world's training clips, and of its held-out clips."""

    def of(split: str, count: int) -> np.ndarray:
        other = dataclasses.replace(world, split=split)
        return np.concatenate([distance.thumbnails(x) for x in real(other, count)])

    return of("train", _TRAIN), of("val", _HELD_OUT)
