"""The order of training, as a function of (seed, step).

A plan knows the sizes of all clips and says which of them every step is made of. It
has no state: a step is computed from its number alone, by hashes and permutations of
integers, in a time that depends neither on the step nor on the size of the data set.
So a run can be resumed at any step, on any number of hosts, processes or threads, and
sees what it would have seen.

Clips of one source and one size form a *stream*: an endless sequence in which every
pass over the clips is a new permutation of them. What a plan fixes is which stream
every place of every row draws from, and which element of the stream it draws.
"""

import dataclasses
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int

from jvdit.data.clips import SIZE
from jvdit.data.order import (
    Streams,
    evenly_dealt,
    fingerprint,
    host_share,
    permute,
    rank_by_kind,
    stable_hash,
)
from jvdit.data.packing import best_fit
from jvdit.data.patches import Size, token_grid

Index = Mapping[str, np.ndarray]
AnyPlan = TypeVar("AnyPlan", bound="StepPlan")

TEXT_MULTIPLE = 16  # captions take places in steps of it, so that sizes repeat
_SMALLEST_BLOCK = 1 << 15  # places; the last rows of a packing are ill filled
_MOST_BLOCKS = 1 << 16
_LONGEST_CYCLE = 1 << 20  # steps


class Slot(NamedTuple):
    """A place in a row, and the clip that takes it.

    Attributes:
        source, clip: which source, and which clip of it.
        tokens, text: tokens of the clip's picture and of what is given beside it, and
            text tokens kept for its caption.
        sounds: tokens of its sound.
    """

    source: int
    clip: int
    tokens: int = 0
    text: int = 0
    sounds: int = 0


@dataclasses.dataclass(eq=False, repr=False)
class StepPlan(ABC):
    """Which clips every step is made of, by what they have in common.

    Args:
        indexes: the index of each source.
        weights, seed, fingerprints: as of `PackPlan`.

    Attributes:
        sizes: clips of each source.
        clips_per_epoch: places of an epoch, all sources together.
        steps_per_epoch: steps of an epoch; not an integer, as steps run across its end.
        fingerprint: equal for plans that give equal clips at every step.
    """

    indexes: dataclasses.InitVar[Sequence[Index]]
    _: dataclasses.KW_ONLY
    weights: Sequence[float | int] | None = None
    seed: int = 0
    fingerprints: Sequence[str] = ()
    steps_per_epoch: float = dataclasses.field(init=False)

    def _sort(self, indexes, keys: Iterable[np.ndarray], *shape: Any) -> None:
        """Sorts the clips into streams.

        Args:
            indexes: the index of each source.
            keys: what tells the streams of each source apart, one row a clip.
            *shape: what else the order depends on.
        """
        self.sizes = [len(index["frames"]) for index in indexes]
        self._streams = Streams(keys, self.weights, self.seed)
        self.clips_per_epoch = int(self._streams.places.sum())
        chosen = self.weights, self.seed, self.sizes, self.fingerprints
        self.fingerprint = fingerprint(*shape, *chosen)

    @classmethod
    def of(cls: type[AnyPlan], sources: Sequence[Any], **kwargs: Any) -> AnyPlan:
        """Makes the plan of sources; the rest is as for the class."""
        prints = [source.fingerprint for source in sources]
        return cls([x.index for x in sources], fingerprints=prints, **kwargs)

    @abstractmethod
    def rows(self, step: int, host: int = 0, hosts: int = 1) -> list[Any]:
        """Returns what a host reads of a step."""

    def __getitem__(self, step: int) -> list[Any]:
        return self.rows(step)


@dataclasses.dataclass(eq=False, repr=False)
class PackPlan(StepPlan):
    """Which clips sit in which row of every step, in rows of one token budget.

    An epoch is packed once, from sizes alone, and every epoch draws other clips into
    the same places; so all epochs have the same number of rows. A large epoch is
    divided into blocks: each holds the same rows, in an order of its own, and what
    does not divide is packed by itself and spread evenly. Packing time and memory so
    depend on the number of different sizes and hardly on that of clips.

    Without weights an epoch holds every clip exactly once. With weights it is as long
    as the source that is seen least often needs to be seen once, and the streams of
    the others go on from epoch to epoch: no clip is ever skipped, and the sizes of a
    source keep their proportions to within one clip of each size an epoch.

    Rows have equally many tokens, but a long clip has more pairs of them than short
    ones: the rows of a step lie so that its halves, and the halves of those, have
    nearly the same number of pairs, and no host or device waits for the others.

    Args:
        indexes: the index of each source: `frames`, `height`, `width` of the latents
            and `text_length`, one entry a clip; `given` may count latents beside them.
        weights: share of the clips (not of the tokens) that each source gets, in any
            unit. None: as many as it has.
        patch_size: latent frames, height and width of a patch.
        token_budget, max_clips: most tokens and most clips of a row.
        text_budget: text tokens of a row; a caption takes a multiple of 16.
        sound_budget: most tokens of sounds of a row; 0: clips are silent.
        rows_per_step: rows of a batch, all hosts together.
        seed: of the order.
        fingerprints: of the sources; they make that of the plan.

    Attributes:
        rows_per_epoch: rows of an epoch; steps run across its end.
        padding: fraction of the tokens of an epoch that are padding.

    Raises:
        ValueError: a clip exceeds a budget, a size does not fit the patch, or a weight
            is not positive.
    """

    _: dataclasses.KW_ONLY
    token_budget: int
    text_budget: int
    max_clips: int
    rows_per_step: int
    patch_size: Size = (1, 2, 2)
    sound_budget: int = 0

    def __post_init__(self, indexes: Sequence[Index]):
        budgets = self._budgets
        keys = []
        for source, index in enumerate(indexes):
            tokens = _token_counts(source, _clip_sizes(index), self.patch_size)
            tokens = tokens + index.get("given", 0) // math.prod(self.patch_size)
            text = np.maximum(np.asarray(index["text_length"], np.int64), 1)
            text = -(-text // TEXT_MULTIPLE) * TEXT_MULTIPLE
            needs = {"token_budget": tokens, "text_budget": text}
            if self.sound_budget:
                needs["sound_budget"] = np.asarray(index["sounds"], np.int64)
            for (name, need), budget in zip(needs.items(), budgets, strict=True):
                if need.max() > budget:
                    raise ValueError(
                        f"Clip {need.argmax()} of source {source} needs {need.max()} "
                        f"of `{name}` (={budget}); raise the budget to {need.max()} "
                        "or use smaller clips."
                    )
            keys.append(np.stack([*needs.values()], axis=1))
        shape = (self.patch_size, *budgets, self.max_clips, self.rows_per_step)
        self._sort(indexes, keys, "pack", shape)
        self._pack()

    @property
    def _budgets(self) -> tuple[int, ...]:
        """What a row may hold of each thing that a clip needs."""
        sounds = (self.sound_budget,) * (self.sound_budget > 0)
        return self.token_budget, self.text_budget, *sounds

    def _pack(self) -> None:
        """Packs one block and what remains, and lays both out in arrays."""
        streams = self._streams
        places = streams.places
        total = self.clips_per_epoch
        # The fastest source should not begin a second pass within a block.
        blocks = math.ceil((places / streams.clips).max())
        # Places to pack: total / blocks + sizes * blocks / 2, least at the square root.
        fewest = math.isqrt(2 * total // len(streams))
        blocks = max(blocks, min(fewest, total // _SMALLEST_BLOCK), 1)
        self._blocks = min(blocks, _MOST_BLOCKS)
        self._per_block = places // self._blocks
        rows: list[list[int]] = []
        drawn: list[np.ndarray] = []
        for part, count in enumerate((self._per_block, places % self._blocks)):
            rng = np.random.Generator(np.random.Philox(key=[self.seed, part]))
            stream = rng.permutation(np.repeat(np.arange(len(streams)), count))
            first = sum(map(len, drawn))
            needs = streams.key[stream].tolist()
            packed = best_fit(needs, self._budgets, self.max_clips)
            rows += [[first + item for item in row] for row in packed]
            drawn.append(stream)
            if part == 0:
                self._block_rows = len(rows)
        self._rest_rows = len(rows) - self._block_rows
        self.rows_per_epoch = self._blocks * self._block_rows + self._rest_rows
        # Which element of its stream a place draws, within its part.
        ranks = np.concatenate([rank_by_kind(stream) for stream in drawn])
        order = np.fromiter(itertools.chain.from_iterable(rows), np.int64)
        self._stream, self._rank = np.concatenate(drawn)[order], ranks[order]
        self._row_start = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
        self._block_start = np.arange(self._blocks + 1) * self._block_rows + (
            np.arange(self._blocks + 1) * self._rest_rows // self._blocks
        )
        tokens = (streams.key[:, 0] + streams.key[:, 2:].sum(axis=1))[self._stream]
        self._pairs = np.add.reduceat(tokens**2, self._row_start[:-1])
        used = int(places @ streams.key[:, 0])
        self.padding = 1 - used / (self.rows_per_epoch * self.token_budget)
        self.steps_per_epoch = self.rows_per_epoch / self.rows_per_step

    def rows(self, step: int, host: int = 0, hosts: int = 1) -> list[list[Slot]]:
        """Returns the rows of a step that a host reads: the clips in each.

        Host i of `hosts`, from 0, has the i-th of as many equal parts.

        Raises:
            ValueError: the rows cannot be shared equally, or `step` is negative.
        """
        mine = host_share("rows_per_step", self.rows_per_step, step, host, hosts)
        every = step * self.rows_per_step + np.arange(self.rows_per_step)
        epoch, row = np.divmod(every, self.rows_per_epoch)
        template, block = self._templates(epoch, row)
        chosen = mine
        if epoch[0] == epoch[-1]:  # the rows of an epoch stay together
            chosen = evenly_dealt(self._pairs[template])[mine]
        epoch, template, block = epoch[chosen], template[chosen], block[chosen]
        sizes = self._row_start[template + 1] - self._row_start[template]
        which = np.repeat(np.arange(len(mine)), sizes)
        place = np.arange(len(which)) + np.repeat(
            self._row_start[template] - np.cumsum(sizes) + sizes, sizes
        )
        stream, block = self._stream[place], block[which]
        element = self._rank[place] + block * self._per_block[stream]
        element += epoch[which] * self._streams.places[stream]
        clip = self._streams.take(stream, element)
        columns = self._streams.source[stream], clip, *self._streams.key[stream].T
        slots = map(Slot, *(column.tolist() for column in columns))
        return [list(itertools.islice(slots, size)) for size in sizes.tolist()]

    def _templates(
        self, epoch: np.ndarray, row: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns which packed row a row of an epoch is, and in which block.

        A row of what remains counts as of the block after the last.
        """
        block = np.searchsorted(self._block_start, row, side="right") - 1
        first, after = self._block_start[block], self._block_start[block + 1]
        key = stable_hash(self.seed, 2, epoch, block)
        template = permute(row - first, after - first, key)
        rest = template >= self._block_rows
        if rest.any():
            number = template[rest] - self._block_rows
            number += block[rest] * self._rest_rows // self._blocks
            key = stable_hash(self.seed, 3, epoch[rest])
            number = permute(number, self._rest_rows, key)
            template[rest] = self._block_rows + number
        return template, np.where(rest, self._blocks, block)


@dataclasses.dataclass(eq=False, repr=False)
class BucketPlan(StepPlan):
    """Which clips make up every step, all clips of a step being of one size.

    For models that take pixels, such as the video VAE. Every size has its own endless
    stream and its own number of clips a step; a fixed cycle of steps gives each size
    its share. Nothing is dropped: where the clips of a size do not divide into
    steps, a step takes the last of one pass and the first of the next.

    Args:
        indexes: the index of each source: `frames`, `height`, `width` in pixels.
        pixel_budget: most pixels (frames * height * width, summed over clips) of a
            step.
        multiple: the clips of a step are a multiple of it; the number of devices of all
            hosts, say.
        unit: what the budget counts: "pixel", or "sample" of sources of sounds.
        weights, seed, fingerprints: as of `PackPlan`.

    Attributes:
        batches: clips of a step by size (frames, height, width).
        cycle: steps after which the sequence of sizes repeats.
        distortion: largest relative error of the share of clips that a size gets, which
            comes of the cycle having whole steps.

    Raises:
        ValueError: a clip exceeds the budget.
    """

    _: dataclasses.KW_ONLY
    pixel_budget: int
    multiple: int = 1
    unit: str = "pixel"

    def __post_init__(self, indexes: Sequence[Index]):
        pixels, multiple = self.pixel_budget, self.multiple
        shape = (None, pixels, multiple)
        self._sort(indexes, map(_clip_sizes, indexes), "bucket", shape)
        found, self._size_of = np.unique(self._streams.key, axis=0, return_inverse=True)
        self._sizes: list[Size] = [(f, h, w) for f, h, w in found.tolist()]
        each = found.prod(axis=1)
        self._batch = pixels // each // multiple * multiple
        if not self._batch.all():
            bad, unit = self._batch.argmin(), self.unit
            raise ValueError(
                f"{multiple} clips of {self._sizes[bad]} have {multiple * each[bad]} "
                f"{unit}s, which exceeds `{unit}_budget` (={pixels}); raise it."
            )
        self.batches = dict(zip(self._sizes, self._batch.tolist(), strict=True))
        self._schedule_sizes()

    def _schedule_sizes(self) -> None:
        """Gives every step of the cycle its size, and its rank among those."""
        places = np.bincount(self._size_of, self._streams.places).astype(np.int64)
        self._places = places
        steps = turns = places / self._batch
        self.steps_per_epoch = float(steps.sum())
        if (steps % 1 != 0).any() or steps.sum() > _LONGEST_CYCLE:
            # At least 50 steps of each size: shares to within 1 %.
            length = min(_LONGEST_CYCLE, math.ceil(50 / (steps / steps.sum()).min()))
            turns = np.maximum(np.round(steps * (length / steps.sum())), 1)
        turns = turns.astype(np.int64)
        share = turns * self._batch / (turns @ self._batch)
        self.distortion = float(np.abs(share * places.sum() / places - 1).max())
        rng = np.random.Generator(np.random.Philox(key=[self.seed, 0]))
        self._turns = turns
        self._schedule = rng.permutation(np.repeat(np.arange(len(turns)), turns))
        self._rank = rank_by_kind(self._schedule)
        self.cycle = len(self._schedule)

    def size(self, step: int) -> Size:
        """Returns the frames, height and width of all clips of a step."""
        return self._sizes[self._schedule[step % self.cycle]]

    def rows(self, step: int, host: int = 0, hosts: int = 1) -> list[Slot]:
        """Returns the clips of a step that a host reads; see `PackPlan.rows`."""
        cycle, at = divmod(step, self.cycle)
        size = self._schedule[at]
        mine = host_share("batch", int(self._batch[size]), step, host, hosts)
        turn = cycle * self._turns[size] + self._rank[at]
        turn, place = np.divmod(turn * self._batch[size] + mine, self._places[size])
        key = stable_hash(self.seed, 4, size, turn)
        place = permute(place, self._places[size], key)
        streams = np.flatnonzero(self._size_of == size)
        ends = np.cumsum(self._streams.places[streams])
        which = np.searchsorted(ends, place, side="right")
        stream = streams[which]
        count = self._streams.places[stream]
        clip = self._streams.take(stream, place - ends[which] + count * (turn + 1))
        source = self._streams.source[stream]
        return list(map(Slot, source.tolist(), clip.tolist()))


def _clip_sizes(index: Index) -> Int[np.ndarray, "k 3"]:
    return np.stack([np.asarray(index[axis], np.int64) for axis in SIZE], axis=1)


def _token_counts(
    source: int, sizes: Int[np.ndarray, "k 3"], patch_size: Size
) -> Int[np.ndarray, "k"]:
    bad = ((sizes % np.array([patch_size]) != 0) | (sizes < 1)).any(axis=1)
    for clip in np.flatnonzero(bad)[:1]:
        try:
            token_grid(tuple(sizes[clip].tolist()), patch_size)
        except ValueError as error:
            raise ValueError(f"Clip {clip} of source {source}: {error}") from None
    return sizes.prod(axis=1) // math.prod(patch_size)
