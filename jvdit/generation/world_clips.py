"""Clips of the procedural world's scenes, generated once and kept for evaluation."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jvdit.data.world import World
from jvdit.evaluation.giving_truth import GIVEN
from jvdit.evaluation.measuring import Shown, chunks
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request
from jvdit.machine.energy import Energy, Meter
from jvdit.machine.files import replacing


@dataclasses.dataclass(frozen=True)
class Setting:
    """How clips are generated; one column of the report."""

    steps: int
    guidance: float
    solver: str
    draft: bool
    given: str = "nothing"
    sync: float = 1.0
    after: bool = False

    @property
    def solving(self) -> dict[str, Any]:
        """The setting as fields of `Settings`."""
        return {
            "draft": self.draft,
            "steps": self.steps,
            "solver": self.solver,
            "guidance_scale": self.guidance,
            "sound_sync_scale": self.sync,
            "sound_after": self.after,
        }

    def __str__(self) -> str:
        told = ", from a draft" * self.draft
        told += f", given {self.given}" * (self.given != "nothing")
        told += ", its sound afterwards" * self.after
        told += f", guided in step {self.sync:g}" * (self.sync != 1)
        return f"{self.solver} {self.steps} steps, guidance {self.guidance:g}{told}"


def requests_for(world: World, ids: np.ndarray, what: str) -> list[Request]:
    """Requests for clips of scenes, by their captions and what else is given."""
    size = {name: getattr(world, name) for name in ("frames", "height", "width")}
    given: list[dict[str, Any]] = [{}] * len(ids)
    if what != "nothing":
        row = GIVEN[what]
        given = [row.fields(truth) for truth in row.truths(world, ids)]
    return [
        Request(prompt, "", fps=world.fps, seed=int(i), **size, **more)
        for i, prompt, more in zip(ids, world.captions(ids), given, strict=True)
    ]


def generated(
    generator: Generator,
    world: World,
    setting: Setting,
    folder: pathlib.Path,
    count: int,
    rows: int,
    advance: Callable[[int], None],
    spent: list[Energy],
) -> Iterator[Shown]:
    """Clips of the split's first prompts, in chunks; those that are there are read.

    Args:
        generator: of the model.
        world: the split.
        setting: of generation.
        folder: that keeps the clips.
        count: how many clips.
        rows: rows that are solved at once.
        advance: called with the number of clips of each chunk.
        spent: gets the energy of each chunk, as it was when that was made.
    """
    meter = Meter()
    for ids in chunks(count):
        file = folder / f"{ids[0]:06d}-{len(ids)}.npz"
        if not file.exists():
            meter.lap()
            clips = generator(
                requests_for(world, ids, setting.given),
                rows=rows,
                **setting.solving,
            )
            kept = {"videos": np.stack([clip.video for clip in clips])}
            if clips[0].audio is not None:
                kept["audio"] = np.stack([clip.audio for clip in clips])
                kept["rate"] = np.array(clips[0].audio_rate)
            kept["energy"] = np.array(json.dumps(dataclasses.asdict(meter.lap())))
            with replacing(file) as scratch, scratch.open("wb") as opened:
                np.savez(opened, **kept)
        advance(len(ids))
        with np.load(file) as held:
            if "energy" in held:
                spent.append(Energy(**json.loads(str(held["energy"]))))
            rate = int(held["rate"]) if "rate" in held else 0
            yield Shown(held["videos"], held["audio"] if rate else None, rate)
