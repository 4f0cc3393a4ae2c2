"""What may be known of a clip besides its text, as a network takes it.

A model's file names its conditions, rows of `CONDITIONS`. Each says which fields of a
request it takes and needs, and turns them into what is `Known`: tokens that are clean,
in the clip or beside it, channels beside the noise, or a control signal. A row that can
be trained says how training gives the same of a clip.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jvdit.data.conditions import beside, cells, channels
from jvdit.data.conditions.beside import VIEWS, Beside
from jvdit.data.conditions.cells import Layout, Marks
from jvdit.data.conditions.known import Asked, Known, Place, merged


class Condition(NamedTuple):
    """A row of `CONDITIONS`.

    Attributes:
        known: makes it of a request that has what the condition needs.
        takes: fields of a request that it makes use of.
        needs: those without which it can't be.
        marks: tokens of a clip that training gives. None: of its own it gives none.
        beside: what it gives beside the clip.
        channels: the view of a clip that training gives as channels beside the noise,
            by a projection that starts at zero.
        headless: training leaves out the first latent frame, which alone has the time
            0: the clip begins amid another.
    """

    known: Callable[[Asked, Place], Known]
    takes: tuple[str, ...]
    needs: tuple[str, ...] = ()
    marks: Callable[[Layout, np.random.Generator], Marks] | None = None
    beside: Beside | None = None
    channels: str = ""
    headless: bool = False

    @property
    def trains(self) -> bool:
        """Whether there is training for it."""
        return self.marks is not None or self.view != "" or self.headless

    @property
    def view(self) -> str:
        """What training needs beside the latents of a clip, in `VIEWS`; "": nothing."""
        return self.channels if self.beside is None else self.beside.view

    @property
    def changes_clips(self) -> bool:
        """Whether a clip of which it is given has other tokens, or more beside them."""
        return self.view != "" or self.headless


_BOTH = ("image", "last_image")
CONDITIONS = {
    # Clean cells of the clip: our own models, and Wan 2.2 TI2V.
    "first_frame": Condition(cells.first_frame, ("image",), marks=cells.first),
    "prefix": Condition(cells.prefix, ("prefix",), marks=cells.beginning),
    "extend": Condition(cells.tail, ("tail",), marks=cells.beginning, headless=True),
    "inpaint": Condition(cells.masked, ("video", "mask"), marks=cells.box),
    "inpaint_sound": Condition(
        cells.kept_sound, ("from_sound", "keep_sound"), marks=cells.spans
    ),
    # Tokens beside it.
    "suffix": Condition(beside.suffix, ("last_image", "suffix"), beside=beside.SUFFIX),
    "keyframes": Condition(beside.keyframes, ("keyframes",), beside=beside.KEYFRAMES),
    "reference": Condition(
        beside.references, ("references",), beside=beside.REFERENCES
    ),
    "interpolate": Condition(beside.slow, ("interpolate",), beside=beside.SLOW),
    "upscale": Condition(beside.small, ("upscale",), beside=beside.SMALL),
    # What it made before, chunk after chunk, see `models.attention.past`.
    "stream": Condition(cells.nothing, ()),
    # Channels beside the noise: signals that our own models follow, side by side.
    "edges": Condition(beside.outlines, ("edges",), channels="edges"),
    "guide": Condition(beside.guide, ("guide",), channels="guide"),
    "camera": Condition(beside.camera, ("camera",), channels="camera"),
    # Channels beside the noise: Wan 2.2 I2V, 2.1 I2V, and 2.1 FLF2V.
    "end_channels": Condition(channels.end_channels, _BOTH, needs=("image",)),
    "first_channels": Condition(channels.end_channels, ("image",), needs=("image",)),
    "both_channels": Condition(channels.end_channels, _BOTH, needs=_BOTH),
    # One kind clean, see `pairings.PAIRINGS`.
    "picture_to_sound": Condition(cells.whole, ("from_video",)),
    "sound_to_picture": Condition(cells.waveform, ("from_sound",)),
    # A signal for control blocks: VACE.
    "control": Condition(channels.control_signal, ("video", "mask", "references")),
}


def known(conditions: Sequence[str], request: Asked, place: Place) -> Known:
    """What is known of a clip by the conditions of its model.

    Args:
        conditions: names of `CONDITIONS`.
        request: that `check_given` let pass.
        place: of the clip.
    """
    parts, each = [], (place.channels, place.temporal_compression)
    for name in conditions:
        found = CONDITIONS[name].known(request, place)
        if found.cond is not None and CONDITIONS[name].channels:
            widths = channel_widths(conditions, *each)
            cond = side_by_side(found.cond, name, widths)
            found = found._replace(cond=cond)
        parts.append(found)
    found = merged(parts)
    if found.headless and found.cond is not None:
        found = found._replace(cond=found.cond[1:])
    return found


def channel_widths(
    conditions: Collection[str], latent_channels: int, temporal_compression: int
) -> dict[str, int]:
    """How many channels beside the noise each condition has of a latent.

    Args:
        conditions: of a model, of our own or in training, in any order.
        latent_channels: of the picture's latents.
        temporal_compression: pixel frames of a latent frame after the first.

    Returns:
        The widths in the order in which the channels lie.
    """
    return {
        name: VIEWS[row.channels].width(latent_channels, temporal_compression)
        for name, row in CONDITIONS.items()
        if row.channels and name in conditions
    }


def side_by_side(
    signal: Float[np.ndarray, "f h w u"], name: str, widths: Mapping[str, int]
) -> Float[np.ndarray, "f h w v"]:
    """A signal at its place among the channels of a model; zeros are the others.

    Args:
        signal: what the network is given by one condition.
        name: of that.
        widths: of all conditions of the model, see `channel_widths`.
    """
    before = sum(widths[x] for x in takewhile(lambda x: x != name, widths))
    after = sum(widths.values()) - before - widths[name]
    return np.pad(signal, [(0, 0)] * 3 + [(before, after)])


def check_given(conditions: Sequence[str], given: Sequence[str]) -> None:
    """Raises ValueError if what a request gives isn't what a model takes.

    Args:
        conditions: of the model.
        given: the names of the fields.
    """
    rows = [CONDITIONS[name] for name in conditions]
    takes = dict.fromkeys(x for row in rows for x in row.takes)
    for name in given:
        if name not in takes:
            told = " and ".join(f"`{x}`" for x in takes) or "no pictures"
            raise ValueError(f"`{name}` was given, but this model takes {told}.")
    for name in (x for row in rows for x in row.needs):
        if name not in given:
            raise ValueError(f"this model needs `{name}`: give it a picture.")
    if "mask" in given and "video" not in given:
        raise ValueError("`mask` says what to keep of `video`; give both.")
    if "video" in given and "mask" not in given and "control" not in conditions:
        raise ValueError("`video` is kept where `mask` is black; give both.")
    if "keep_sound" in given and ("from_sound" not in given or "tail" in given):
        raise ValueError(
            "`keep_sound` says what to keep of `from_sound`, in a clip by itself; give "
            "both."
        )
    if "from_sound" in given and "keep_sound" not in given:
        if "sound_to_picture" not in conditions:
            raise ValueError(
                "this model takes no whole `from_sound`; say what to keep of it by "
                "`keep_sound`."
            )
    if "suffix" in given and "last_image" in given:
        raise ValueError("`suffix` and `last_image` both say how it ends; give one.")


def check_conditions(conditions: Sequence[str]) -> tuple[str, ...]:
    """The conditions; raises ValueError if one isn't a row of `CONDITIONS`."""
    for name in conditions:
        if name not in CONDITIONS:
            raise ValueError(
                f"{name!r} is no condition that is known: {', '.join(CONDITIONS)}."
            )
    return tuple(conditions)
