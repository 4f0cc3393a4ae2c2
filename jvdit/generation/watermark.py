"""A watermark in the initial noise, which needs no training (Gaussian Shading).

The magnitudes of the noise are drawn as always, and its signs come from a key
(arXiv:2404.04956, with one bit of message: that the mark is there). Under one stream of
signs all clips would lie in one orthant, so there are 4096, of which a clip's seed and
the key choose one. Whoever has the key and the network finds the noise of a clip again,
roughly, and counts how many signs agree.
"""

import dataclasses
import hashlib
import hmac
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

STREAMS = 4096
_AT_ONCE = 64  # streams that are compared at once
_TAIL = 3.18  # a sum of weighted coins has at most so many times the normal tail
STOCHASTIC = ("ancestral", "renoise")  # solvers that draw noise of their own
_LEAST = 16  # bytes of a key
# The picture of a draft has the signs of the clip that it begins: its seed differs in
# this bit alone.
_SEEDS = (1 << 31) - 1


class Found(NamedTuple):
    """What a search for a watermark has found.

    Attributes:
        values: of the noise.
        agreeing: how many of their signs agree with the best stream.
        stream: number of that.
        z: sum of the noise with that stream's signs, in its standard deviations.
    """

    values: int
    agreeing: int
    stream: int
    z: float

    @property
    def p_value(self) -> float:
        """At most so probably any stream reaches this z, if the clip isn't marked."""
        one = min(_TAIL * 0.5 * math.erfc(self.z / math.sqrt(2)), 1.0)
        return -math.expm1(STREAMS * math.log1p(-min(one, 1 - 1e-16)))


@dataclasses.dataclass(frozen=True)
class Watermark:
    """Marks noise by a secret key, and finds it again.

    Attributes:
        key: the secret.

    Raises:
        ValueError: it is short enough to be guessed.
    """

    key: bytes = dataclasses.field(repr=False)

    def __post_init__(self):
        if len(self.key) < _LEAST:
            raise ValueError(
                f"a key of {len(self.key)} bytes can be guessed; give {_LEAST} or "
                "more, such as `head -c 32 /dev/urandom > FILE` makes."
            )

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Watermark":
        """Reads a key from a file; blanks at the ends of a passphrase don't count."""
        try:
            return cls(Path(path).expanduser().read_bytes().strip())
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None

    def noise(
        self, seed: int, shape: tuple[int, int, int, int]
    ) -> Float[np.ndarray, "f h w c"]:
        """Standard normal noise with the mark.

        Args:
            seed: of the clip.
            shape: latent frames, height, width, and channels.
        """
        rng = np.random.Generator(np.random.Philox(key=seed))
        drawn = np.abs(rng.standard_normal(shape, np.float32))
        return drawn * self._signs(self.stream(seed), drawn.size).reshape(shape)

    def stream(self, seed: int) -> int:
        """The number of the stream of signs of a clip."""
        return int.from_bytes(self._keyed(f"seed {seed & _SEEDS}")[:8]) % STREAMS

    def find(self, noise: Sequence[Float[np.ndarray, "f h w c"]]) -> list[Found]:
        """Searches for the mark in the noise of clips of one size.

        The statistic is the sum of the noise with the signs of a stream. Over a random
        key those are fair coins, whatever the clip, so that its tail is at most 3.18
        times the normal one, for any number of values (Bentkus and Dzindzalieta,
        Bernoulli 21, 2015). Large values, which inversion finds best, count most.

        Args:
            noise: of each clip, as `inverted` finds it.
        """
        seen = np.stack([x.reshape(-1) for x in noise])
        values = seen.shape[1]
        sums = np.zeros((STREAMS, len(noise)), np.float32)
        for at in range(0, STREAMS, _AT_ONCE):
            signs = np.stack([self._signs(at + i, values) for i in range(_AT_ONCE)])
            sums[at : at + _AT_ONCE] = signs @ seen.T
        best, z = sums.argmax(axis=0), sums.max(axis=0) / np.linalg.norm(seen, axis=1)
        found = []
        for i, stream in enumerate(best.tolist()):
            agreeing = int(((seen[i] > 0) == (self._signs(stream, values) > 0)).sum())
            found.append(Found(values, agreeing, stream, float(z[i])))
        return found

    def _signs(self, stream: int, count: int) -> Float[np.ndarray, " n"]:
        """The first signs of a stream, 1 or -1."""
        made = hashlib.shake_256(self._keyed(f"stream {stream}")).digest(-(-count // 8))
        bits = np.unpackbits(np.frombuffer(made, np.uint8), count=count)
        return bits.astype(np.float32) * 2 - 1

    def _keyed(self, text: str) -> bytes:
        # Hashed: HMAC takes keys that differ in zeros at their ends for one.
        key = hashlib.sha256(self.key).digest()
        return hmac.digest(key, text.encode(), "sha256")


def together(found: Sequence[Found]) -> float:
    """The p-value of several clips at once, none of which has the mark (Fisher)."""
    import scipy.stats  # takes half a second, which making a clip needn't wait for

    return float(scipy.stats.combine_pvalues([x.p_value for x in found])[1])
