"""Builders: the batch of any step of this host.

`ClipBatches` stacks pixels for the autoencoders; `packed_batches` packs latents for the
diffusion transformer. What a batch holds is a function of the plan and the step; a clip
that cannot be read is masked and reported, never left out, so that all hosts have
batches of the same shape.
"""

import concurrent.futures
import dataclasses
import math
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from jvdit.data.clips import BadClip, Clip, Source
from jvdit.data.plan import BucketPlan, PackPlan, Slot

Arrays = dict[str, np.ndarray]
Bad = list[tuple[int, str]]  # (clip id, reason)

_NAMED = 16  # clips that an error names


class StalledError(TimeoutError):
    """A batch, or the reading of clips for it, that does not arrive."""


@dataclasses.dataclass(eq=False, repr=False)
class Builder:
    """What makes batches of a plan.

    Args:
        sources: sources of clips.
        plan: of the same sources.
        host: which host this is.
        hosts: how many there are.
        timeout: seconds that one reading of clips may take.

    Attributes:
        nbytes: bytes of the largest batch of a host.
    """

    sources: Sequence[Source]
    plan: PackPlan | BucketPlan
    _: dataclasses.KW_ONLY
    host: int = 0
    hosts: int = 1
    timeout: float = 300.0
    nbytes: int = dataclasses.field(init=False)

    def __post_init__(self):
        found = [len(source) for source in self.sources]
        if found != self.plan.sizes:
            raise ValueError(
                f"The plan is of sources with {self.plan.sizes} clips, and these have "
                f"{found}; make the plan of the same sources."
            )
        self._first_id = np.cumsum([0, *found])

    def __len__(self) -> int:
        return sys.maxsize

    def clip_id(self, slot: Slot) -> int:
        """Returns the number of a clip among those of all sources."""
        return int(self._first_id[slot.source]) + slot.clip

    def locate(self, clip_id: int) -> tuple[int, int]:
        """Returns the source of a clip id, and which clip of it that is."""
        source = int(np.searchsorted(self._first_id, clip_id, side="right")) - 1
        return source, clip_id - int(self._first_id[source])

    def slots(self, step: int) -> list[Slot]:
        """Returns the clips of a step, in order."""
        rows: Any = self.plan.rows(step, self.host, self.hosts)
        return sum(rows, []) if isinstance(rows[0], list) else rows

    def read(self, step: int, slots: Sequence[Slot]) -> list[Clip | BadClip]:
        """Returns the clips of a step, those of one source being read together.

        Raises:
            StalledError: a source takes longer than `timeout`.
        """
        clips: list[Clip | BadClip] = [BadClip("not read")] * len(slots)
        for number, source in enumerate(self.sources):
            mine = [i for i, slot in enumerate(slots) if slot.source == number]
            if not mine:
                continue
            ids = [slots[i].clip for i in mine]
            what = f"{few(ids)} of source {number} ({type(source).__name__})"
            what = f"Reading step {step}: clips {what}"
            read = call_within(self.timeout, lambda what=what: what, source.read, ids)
            for i, clip in zip(mine, read, strict=True):
                clips[i] = clip
        return clips


def call_within(timeout: float, what: Any, function: Any, argument: Any) -> Any:
    """Calls a function in a thread, which the process does not wait for when it ends.

    Args:
        timeout: seconds that the call may take.
        what: function that says what is done, for errors.
        function: what is called.
        argument: what it is called with.

    Raises:
        StalledError: the call takes longer.
    """
    outcome = concurrent.futures.Future()

    def call() -> None:
        try:
            outcome.set_result(function(argument))
        except BaseException as error:
            error.add_note(what())
            outcome.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    if not concurrent.futures.wait([outcome], timeout).done:
        raise StalledError(
            f"{what()} has taken {timeout:g} s and has not ended. Is the storage "
            "reachable, was a worker stopped? If it is only slow, raise `timeout`."
        )
    return outcome.result()


def few(ids: Sequence[int]) -> str:
    """Writes the first of many ids."""
    more = f", … ({len(ids)} in all)" if len(ids) > _NAMED else ""
    return f"[{', '.join(map(str, ids[:_NAMED]))}{more}]"


@dataclasses.dataclass(eq=False, repr=False)
class ClipBatches(Builder):
    """Clips of one size within a step: the batch of every step.

    `video` uint8 [b T H W 3], or `audio` float32 [b a e] of sources of sounds; `fps`
    float32 [b], `valid` bool [b], `clip_id` int64 [b]. A clip that cannot be read is
    black, or silent, and not valid.

    Args:
        sources: sources of pixels, or of sounds.
        plan: of the same sources.
        channels: of the sounds; 0: the sources are of pixels.
        host: which host this is.
        hosts: how many there are.
        timeout: seconds that one reading of clips may take.

    Raises:
        ValueError: the hosts cannot share the clips of some size.
    """

    plan: BucketPlan
    _: dataclasses.KW_ONLY
    channels: int = 0

    def __post_init__(self):
        super().__post_init__()
        batches = self.plan.batches.items()
        for size, count in batches:
            if count % self.hosts:
                raise ValueError(
                    f"The {count} clips of size {size} of a step must be divisible by "
                    f"`hosts` (={self.hosts}); make the plan with "
                    f"`multiple={self.hosts}`."
                )
        largest = max(math.prod(size) * count for size, count in batches)
        self.nbytes = (4 * self.channels or 3) * largest // self.hosts

    def __getitem__(self, step: int) -> tuple[Arrays, Bad]:
        """Returns the batch of a step and what could not be read for it."""
        slots = self.plan.rows(step, self.host, self.hosts)
        size = self.plan.size(step)
        name, shape, kind = "video", (*size, 3), np.uint8
        if self.channels:
            name, shape, kind = "audio", (size[0], self.channels), np.float32
        batch = {
            name: np.zeros((len(slots), *shape), kind),
            "fps": np.ones(len(slots), np.float32),
            "valid": np.zeros(len(slots), np.bool_),
            "clip_id": np.array([self.clip_id(slot) for slot in slots], np.int64),
        }
        bad: Bad = []
        for i, clip in enumerate(self.read(step, slots)):
            if not isinstance(clip, BadClip) and clip[name].shape != shape:
                clip = BadClip(f"{name} of {clip[name].shape}, planned as {shape}")
            if isinstance(clip, BadClip):
                bad.append((int(batch["clip_id"][i]), clip.reason))
            else:
                batch[name][i], batch["fps"][i] = clip[name], clip["fps"]
                batch["valid"][i] = True
        return batch, bad
