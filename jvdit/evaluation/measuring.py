"""Sets of clips of the world's scenes: scores of each, and features of them all."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from jvdit.data.world import World
from jvdit.evaluation import distance, oracle

CHUNK = 64  # clips at once
_TRAIN, _HELD_OUT = 2048, 512  # real clips that copies are looked for among


@dataclasses.dataclass
class Measured:
    """What is known of a set of clips: scores of each, features, and the clips."""

    scores: oracle.Scores
    thumbnails: np.ndarray
    features: np.ndarray
    videos: np.ndarray

    @classmethod
    def of(cls, world: World, chunks: Iterator[np.ndarray]) -> "Measured":
        """Measures clips of the split's first scenes, chunk by chunk."""
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
        """Mean and interval of each score."""
        return oracle.summary(self.scores)


def chunks(count: int) -> Iterator[np.ndarray]:
    """The numbers of so many clips, some at a time."""
    for start in range(0, count, CHUNK):
        yield np.arange(start, min(start + CHUNK, count))


def real(world: World, count: int) -> Iterator[np.ndarray]:
    """The world's own clips of the same scenes."""
    return map(world.videos, chunks(count))


def neighbours(world: World) -> tuple[np.ndarray, np.ndarray]:
    """Thumbnails of training clips and of held-out ones."""

    def of(split: str, count: int) -> np.ndarray:
        other = dataclasses.replace(world, split=split)
        return np.concatenate([distance.thumbnails(x) for x in real(other, count)])

    return of("train", _TRAIN), of("val", _HELD_OUT)
