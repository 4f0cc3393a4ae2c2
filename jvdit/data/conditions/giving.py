"""What training gives of clips: sources of clips with what is given, and marks.

Conditions that add tokens to a clip, or leave some out, change its length; so the plan
must know of which clips they are given, as the reader must where more has to be read.
It sees another source of the same clips, whose
weight is the condition's share (`given_sources`). All others mark tokens of whatever
clip comes, by random numbers of its step and place (`known_in_training`).
"""

import copy
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from absl import logging
from jaxtyping import Float

from jvdit.data.clips import SIZE, BadClip, Clip, Ids, Indexed
from jvdit.data.conditions import (
    CONDITIONS,
    Layout,
    Marks,
    channel_widths,
    side_by_side,
)
from jvdit.data.conditions.beside import PRESENCE, VIEWS
from jvdit.data.conditions.known import Known
from jvdit.data.latent_source import LatentSource
from jvdit.data.order import fingerprint
from jvdit.data.patches import Size, token_grid


class GivenSource(Indexed):
    """Clips of a source of latents, all with what one condition gives.

    Clips that are too short or too odd for it are left out.

    Args:
        source: the clips.
        number: of that source among those of the training.
        condition: a name in `CONDITIONS`, of those that change the length of a clip.
        patch_size: latent frames, height and width of a token.

    Attributes:
        index: that of the clips, in which `given` counts latents beside the clip.
        first: number of the first latent frame of each clip.

    Raises:
        ValueError: the latents lack a view that the condition needs, or no clip is of a
            size that it can be given.
    """

    def __init__(
        self, source: LatentSource, number: int, condition: str, patch_size: Size
    ):
        self.condition, row = condition, CONDITIONS[condition]
        self._number = number
        self.first = int(row.headless)
        self._source = copy.copy(source)
        sizes = np.stack([source.index[name] for name in SIZE], axis=1)
        given = np.zeros(len(sizes), np.int64)
        fits = sizes[:, 0] > 2 * row.headless
        if view := row.view:
            if view not in source.views:
                wanted = ",".join((*source.views, view))
                raise ValueError(
                    f"`given.{condition}` needs latents with the view {view!r}; encode "
                    f"{source.path} anew with --views={wanted}."
                )
            self._source.view = view
            for size in np.unique(sizes, axis=0):
                alike = np.flatnonzero((sizes == size).all(1))
                given[alike] = self._cells(tuple(size.tolist()), alike, patch_size)
            fits &= given >= (row.beside is not None)
            if view in PRESENCE:
                fits &= source.has(view)
        self._ids = np.flatnonzero(fits)
        if not len(self._ids):
            raise ValueError(
                f"`given.{condition}` can't be given of any clip of {source.path}: "
                "they are pictures, too short, of odd sizes, or lack what it takes."
            )
        self.index = {name: x[fits] for name, x in source.index.items()}
        self.index["given"] = given[fits].astype(np.int32)
        self.index["frames"] = self.index["frames"] - row.headless
        self.fingerprint = fingerprint("given", source.fingerprint, condition)

    def read(self, ids: Ids) -> list[Clip | BadClip]:
        """Returns clips in the order asked for; see `Source.read`."""
        clips = self._source.read(self._ids[np.asarray(ids, np.int64)])
        if not CONDITIONS[self.condition].headless:
            return clips
        for clip in clips:
            if not isinstance(clip, BadClip):
                for name in ("mean", "logvar"):
                    if name in clip:
                        clip[name] = clip[name][1:]
        return clips

    def beside(self, clip: int) -> int:
        """How many latents lie beside a clip."""
        return int(self.index["given"][clip])

    def origin(self, clip: int) -> tuple[int, int]:
        """The number of the source that a clip comes from, and which clip it is."""
        return self._number, int(self._ids[clip])

    def _cells(self, size: Size, clips: np.ndarray, patch_size: Size) -> np.ndarray:
        """Latents that each of several clips of a size is given; 0: it can't be."""
        row = CONDITIONS[self.condition]
        found = VIEWS[row.view].size(size, self._source.temporal_compression)
        if found is None or np.mod(found, patch_size).any() or row.beside is None:
            return np.zeros(len(clips), np.int64)
        return row.beside.count(found[0], clips) * math.prod(found[1:])


def given_sources(
    sources: Sequence[LatentSource],
    weights: Sequence[float] | None,
    shares: Mapping[str, float],
    patch_size: Size,
) -> tuple[list[LatentSource | GivenSource], list[float] | None]:
    """The sources of a training, with those of clips of which something is given.

    Args:
        sources: the clips.
        weights: share of the clips from each. None: as many as it has.
        shares: of the clips of which each condition is given, 0 to 1.
        patch_size: latent frames, height and width of a token.

    Returns:
        The sources themselves come first, in their order; and the weights.

    Raises:
        ValueError: more than all clips are asked for, or a condition can be given of
            no clip of any source.
    """
    found: list[LatentSource | GivenSource] = [*sources]
    changing = {k: x for k, x in shares.items() if x and CONDITIONS[k].changes_clips}
    if not changing:
        return found, None if weights is None else [*weights]
    if sum(changing.values()) >= 1:
        told = " + ".join(f"{name} {share:g}" for name, share in changing.items())
        raise ValueError(
            f"the shares of what adds tokens to a clip ({told}) must sum to less than "
            "1: a clip is given one of them."
        )
    base = [*map(len, sources)] if weights is None else [*weights]
    left = [float(x) for x in base]
    more: list[float] = []
    for name, share in changing.items():
        faults = []
        for number, source in enumerate(sources):
            try:
                given = GivenSource(source, number, name, patch_size)
            except ValueError as fault:
                faults.append(fault)
                continue
            found.append(given)
            more.append(base[number] * share)
            left[number] -= more[-1]
        if len(faults) == len(sources):
            raise faults[0]
        for fault in faults:
            logging.warning("%s Its clips train without.", fault)
    return found, left + more


def known_in_training(
    latents: Float[np.ndarray, "f h w c"],
    view: Float[np.ndarray, "_f _h _w u"] | None,
    condition: str,
    shares: Mapping[str, float],
    *,
    patch_size: Size,
    fps: float,
    temporal_compression: int,
    beside: int,
    sounds: Float[np.ndarray, "n"],
    rng: np.random.Generator,
    conditions: Collection[str] = (),
) -> Known:
    """What training gives of a clip, in the form in which a request gives it.

    Args:
        latents: of the clip, normalised.
        view: what its source holds beside them, if anything; latents normalised.
        condition: that of a `GivenSource`, else "".
        shares: of the clips of which each condition is given.
        patch_size: latent frames, height and width of a token.
        fps: frames per second of the clip.
        temporal_compression: pixel frames of a latent frame after the first.
        beside: tokens that the plan has kept for what lies beside the clip.
        sounds: seconds at which each token of its sound ends.
        rng: decides what is given.
        conditions: all that the network is to take by channels beside the noise, whose
            places are side by side; (): this one alone.
    """
    row = CONDITIONS.get(condition)
    first = row.headless if row else False
    grid = token_grid(latents.shape[:3], patch_size)
    ends = (1 + temporal_compression * (np.arange(grid[0]) + first)) / fps
    layout = Layout(grid, ends, sounds)
    if first:
        shares = {condition: 1.0}
    marks = _drawn(shares, layout, rng)
    known = Known(sound_clean=marks.sounds)
    if row is not None and row.channels and view is not None:
        places = conditions or (condition,)
        widths = channel_widths(places, latents.shape[-1], temporal_compression)
        cond = side_by_side(view, condition, widths)
        known = known._replace(cond=cond)
    if row is not None and row.beside is not None and view is not None:
        count = beside * math.prod(patch_size) // math.prod(view.shape[1:3])
        part = row.beside.part(view, count, fps, temporal_compression, rng)
        known = known._replace(parts=(part,))
    if not marks.cells.any():
        return known
    clean = marks.cells
    for axis, side in enumerate(patch_size):
        clean = clean.repeat(side, axis)
    return known._replace(latents=latents, clean=clean)


def _drawn(
    shares: Mapping[str, float], layout: Layout, rng: np.random.Generator
) -> Marks:
    """The tokens of a clip that are given, each condition in its share of clips."""
    found = layout.nothing()
    for name, share in shares.items():
        marks = CONDITIONS[name].marks
        if marks is not None and rng.random() < share:
            for all_of_them, part in zip(found, marks(layout, rng), strict=True):
                np.logical_or(all_of_them, part, out=all_of_them)
    return found


def marking(shares: Mapping[str, float]) -> dict[str, float]:
    """Those of the shares whose conditions mark tokens of whatever clip comes."""
    return {k: x for k, x in shares.items() if not CONDITIONS[k].changes_clips}
