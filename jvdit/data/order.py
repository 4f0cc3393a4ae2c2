"""Order without state: hashes, permutations and endless streams of clips.

Everything here is computed from integers alone, so it is the same on every host and
in every process, and costs the same anywhere in a run.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

Weights = Sequence[float | int] | None  # of sources; None: as many clips as they have
_VERSION = 1  # of the order; part of every fingerprint


def stable_hash(*parts: Any) -> np.ndarray:
    """Hashes integers (or integer arrays, elementwise) to uint64; never changes."""
    mixed = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            part = np.asarray(part).astype(np.uint64)
            mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + part
            mixed = mixed + np.uint64(0x9E3779B97F4A7C15)
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return np.asarray(mixed)


def stable_uniform(*parts: Any) -> np.ndarray:
    """Hashes integers to float64, uniform in [0, 1)."""
    return np.asarray((stable_hash(*parts) >> np.uint64(11)) * 2.0**-53)


def permute(index: Any, size: Any, key: Any) -> np.ndarray:
    """Returns where a keyed permutation of `range(size)` sends `index`.

    A Feistel network on two digits of about sqrt(size), walked until it lands below
    `size`: nothing is stored, however large `size` is. All arguments broadcast.
    """
    index, size, key = np.broadcast_arrays(
        np.asarray(index, np.int64), np.asarray(size, np.int64), np.asarray(key)
    )
    high_size = np.ceil(np.sqrt(size)).astype(np.int64)
    low_size = -(-size // high_size)
    result = index.copy()
    walking = np.ones(index.shape, bool)
    while walking.any():
        m, n, k = high_size[walking], low_size[walking], key[walking]
        high, low = np.divmod(result[walking], n)
        for turn in range(0, 8, 2):
            high = (high + _round(k, turn, low, m)) % m
            low = (low + _round(k, turn + 1, high, n)) % n
        result[walking] = high * n + low
        walking &= result >= size
    return result


def _round(
    key: np.ndarray, turn: int, digit: np.ndarray, modulus: np.ndarray
) -> np.ndarray:
    with np.errstate(over="ignore"):
        turned = key + np.uint64(turn * 0x632BE59BD9B4E019 % 2**64)
    mixed = stable_hash(turned ^ digit.astype(np.uint64))
    return (mixed >> np.uint64(1)).astype(np.int64) % modulus


class Streams:
    """Every (source, size) as an endless sequence of clips.

    Attributes:
        source: source of each stream.
        key: what its clips have in common, [k ...].
        clips: number of its clips.
        places: how many clips an epoch takes from it.
    """

    def __init__(self, keys: Iterable[np.ndarray], weights: Weights, seed: int):
        self._seed = seed
        found, members = [], []
        for source, key in enumerate(keys):
            order = np.lexsort(key.T[::-1])
            edges = np.flatnonzero((np.diff(key[order], axis=0) != 0).any(axis=1)) + 1
            starts = np.concatenate([[0], edges])
            count = np.diff(np.append(starts, len(key)))
            found.append((np.full(len(starts), source), key[order[starts]], count))
            members.append(order.astype(np.uint32 if len(key) < 2**32 else np.uint64))
        columns = list(zip(*found, strict=True))
        self.source, self.key, self.clips = map(np.concatenate, columns)
        self.places = np.concatenate(_places(columns[2], weights))
        self._start = np.concatenate([[0], np.cumsum(self.clips)[:-1]])
        self._members = np.concatenate(members)

    def __len__(self) -> int:
        return len(self.source)

    def take(self, stream: np.ndarray, element: np.ndarray) -> np.ndarray:
        """Returns which clip of its source an element of a stream is."""
        count = self.clips[stream]
        turn, place = np.divmod(element, count)
        place = permute(place, count, stable_hash(self._seed, 1, stream, turn))
        return self._members[self._start[stream] + place].astype(np.int64)


def _places(counts: Sequence[np.ndarray], weights: Weights) -> list[np.ndarray]:
    """Returns how many places of an epoch each size of each source gets.

    The epoch is as long as it takes to see the source that is seen least often once.
    """
    totals = np.array([count.sum() for count in counts])
    if weights is None:
        return list(counts)
    share = np.asarray(weights, np.float64)
    if share.shape != totals.shape or not (share > 0).all():
        raise ValueError(
            f"`weights` (={list(weights)}) must hold a positive number for each of the "
            f"{len(totals)} sources; leave a source out rather than weigh it 0."
        )
    slowest = int(np.argmin(share / totals))
    wanted = np.round(share * (totals[slowest] / share[slowest])).astype(np.int64)
    wanted[slowest] = totals[slowest]
    return list(map(_apportion, wanted.tolist(), counts))


def _apportion(total: int, shares: np.ndarray) -> np.ndarray:
    """Splits `total` in proportion to integers, by largest remainder."""
    turns, over = divmod(total, int(shares.sum()))  # apart, so that nothing overflows
    whole, rest = np.divmod(shares * over, shares.sum())
    whole[np.argsort(-rest, kind="stable")[: over - whole.sum()]] += 1
    return whole + shares * turns


def evenly_dealt(cost: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """An order in which both halves cost nearly the same, and the halves of those.

    Args:
        cost: of each of some things.
    """
    if np.ptp(cost) == 0:
        return np.arange(len(cost))

    def dealt(falling: np.ndarray) -> np.ndarray:
        if len(falling) % 2:
            return falling
        first = np.isin(np.arange(len(falling)) % 4, (0, 3))
        return np.concatenate([dealt(falling[first]), dealt(falling[~first])])

    return dealt(np.argsort(-cost, kind="stable"))


def host_share(name: str, total: int, step: int, host: int, hosts: int) -> np.ndarray:
    """Returns which rows of a step a host has."""
    if step < 0:
        raise ValueError(f"`step` (={step}) must not be negative.")
    if total % hosts or not 0 <= host < hosts:
        near = max(1, round(total / hosts)) * hosts
        raise ValueError(
            f"`{name}` (={total}) must be divisible by `hosts` (={hosts}); try {near}. "
            f"`host` (={host}) must be below `hosts`."
        )
    each = total // hosts
    return np.arange(host * each, (host + 1) * each)


def rank_by_kind(kinds: np.ndarray) -> np.ndarray:
    """Returns how many entries of the same kind precede each entry."""
    order = np.argsort(kinds, kind="stable")
    count = np.bincount(kinds)
    first = np.repeat(np.cumsum(count) - count, count)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(kinds)) - first
    return rank


def fingerprint(*parts: Any) -> str:
    """Hashes whatever JSON (and sequences of numbers) can say."""
    text = json.dumps([_VERSION, *parts], default=lambda x: list(map(float, x)))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
