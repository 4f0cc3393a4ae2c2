"""Builders: the batch of any step of this host.

`PackedBatches` packs latents for the diffusion transformer, `ClipBatches` stacks pixels
for the video VAE. What a batch holds is a function of the plan and the step; a clip
that cannot be read is masked and reported, never left out, so that all hosts have
batches of the same shape.
"""

import concurrent.futures
import dataclasses
import math
import operator
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jvdit.data.clips import BadClip, Clip, Source
from jvdit.data.conditions import CONDITIONS, channel_widths
from jvdit.data.conditions.beside import VIEWS
from jvdit.data.conditions.giving import GivenSource, known_in_training
from jvdit.data.conditions.known import Known
from jvdit.data.items import Item, Statistics, item_of, with_sound
from jvdit.data.order import stable_hash, stable_uniform
from jvdit.data.packing import pack_rows
from jvdit.data.patches import sound_positions
from jvdit.data.plan import BucketPlan, PackPlan, Slot
from jvdit.data.tokenizer import Tokenizer

Arrays = dict[str, np.ndarray]
Bad = list[tuple[int, str]]  # (clip id, reason)

_NAMES = {"mean": "latents", "logvar": "log variances"}
_NAMES |= {f"sound_{name}": f"{what} of a sound" for name, what in _NAMES.items()}
_NAMES["view"] = "latents beside the clip"
_DROPOUT, _GIVING = 17, 18  # tell these uses of the seed from others
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
class PackedBatches(Builder):
    """Packed latents for the diffusion transformer: the batch of every step.

    Args:
        sources: sources of latents.
        plan: of the same sources.
        latents: statistics of the latents of pictures.
        sounds: those of sounds; None: clips are silent.
        temporal_compression: pixel frames that a latent frame after the first covers.
        tokenizer: makes `text_ids` of captions. None: `text_embeds` are those that the
            sources hold.
        null_embeds: text states of the empty caption; needed without a tokenizer.
        caption_dropout: probability that a caption is replaced by the empty one; which
            ones is a function of (seed, step, row, place).
        seconds: whether positions count seconds (our own models) or latent frames
            (imported ones).
        pad_text: whether text states are filled up to their room with zeros that
            tokens see, as imported models do.
        given: share of the clips of which each condition is given, by name; of those
            that change a clip the sources say so themselves.
        channels: the conditions that are given by channels beside the noise, side by
            side; zeros where nothing is given.
        host: which host this is.
        hosts: how many there are.
        timeout: seconds that one reading of clips may take.

    Attributes:
        cond_channels: of a token beside the noise.

    Raises:
        ValueError: the hosts cannot share a step, or the text has no form.
    """

    plan: PackPlan
    _: dataclasses.KW_ONLY
    latents: Statistics
    sounds: Statistics | None = None
    temporal_compression: int
    tokenizer: Tokenizer | None = None
    null_embeds: Float[np.ndarray, "s e"] | None = None
    caption_dropout: float = 0.0
    seconds: bool = True
    pad_text: bool = False
    given: Mapping[str, float] = dataclasses.field(default_factory=dict)
    channels: Sequence[str] = ()
    cond_channels: int = dataclasses.field(init=False)

    def __post_init__(self):
        super().__post_init__()
        if (self.tokenizer is None) == (self.null_embeds is None):
            raise ValueError("Give exactly one of `tokenizer` and `null_embeds`.")
        if bool(self.plan.sound_budget) != (self.sounds is not None):
            raise ValueError(
                f"`sound_budget` (={self.plan.sound_budget}) of the plan and `sounds` "
                f"(={self.sounds}) must be given together: sound or no sound."
            )
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(
                f"`caption_dropout` (={self.caption_dropout}) must be from 0 to 1."
            )
        plan = self.plan
        plan.rows(0, self.host, self.hosts)  # raises if the hosts cannot share a step
        # Of a latent beside the noise, and of a token.
        each = self.latents.width, self.temporal_compression
        self._cond = sum(channel_widths(self.channels, *each).values())
        self.cond_channels = self._cond * math.prod(plan.patch_size)
        self._channels = self._width = self.latents.width * math.prod(plan.patch_size)
        if self.sounds is not None:
            self._width = max(self._channels, self.sounds.width)
        text = 4 if self.null_embeds is None else 4 * self.null_embeds.shape[1]
        row = (plan.token_budget + plan.sound_budget) * (8 * self._width + 20)
        row += plan.token_budget * 4 * self.cond_channels
        row += plan.text_budget * (text + 4) + 9 * plan.max_clips
        self.nbytes = row * plan.rows_per_step // self.hosts

    def locate(self, clip_id: int) -> tuple[int, int]:
        """Returns the source of a clip id, and which clip of it that is."""
        number, clip = super().locate(clip_id)
        source = self.sources[number]
        if isinstance(source, GivenSource):
            return source.origin(clip)
        return number, clip

    def __getitem__(self, step: int) -> tuple[Arrays, Bad]:
        """Returns the batch of a step and what could not be read for it."""
        rows = self.plan.rows(step, self.host, self.hosts)
        clips = iter(self.read(step, sum(rows, [])))
        bad: Bad = []
        packed: list[list[Item]] = []
        for r, row in enumerate(rows, self.host * len(rows)):
            places = np.arange(len(row))
            drawn = stable_uniform(self.plan.seed, _DROPOUT, step, r, places)
            packed.append([])
            each = enumerate(zip(row, drawn < self.caption_dropout, strict=True))
            for place, (slot, dropped) in each:
                clip: Any = next(clips)
                if reason := self._fault(slot, clip):
                    bad.append((self.clip_id(slot), reason))
                    packed[-1].append(self._empty_item(slot))
                else:
                    key = stable_hash(self.plan.seed, _GIVING, step, r, place)
                    packed[-1].append(self._item(slot, clip, bool(dropped), int(key)))
        plan = self.plan
        budgets = plan.token_budget, plan.text_budget, plan.max_clips
        return pack_rows(packed, *budgets, plan.sound_budget, self._width), bad

    def _fault(self, slot: Slot, clip: Clip | BadClip) -> str | None:
        """Returns why a clip cannot be trained on, if it cannot."""
        if isinstance(clip, BadClip):
            return clip.reason
        mean, channels = clip["mean"], self.latents.width
        pieces = map(operator.floordiv, mean.shape, self.plan.patch_size)
        tokens = slot.tokens - self._beside(slot)
        if math.prod(pieces) != tokens or mean.shape[3] != channels:
            return (
                f"latents of {mean.shape}, planned as {tokens} tokens of "
                f"{channels} channels"
            )
        if slot.sounds and len(clip.get("sound_mean", ())) != slot.sounds:
            return f"a sound of other than the {slot.sounds} latents that were planned"
        for name in ("mean", "logvar", "view", "sound_mean", "sound_logvar"):
            if not np.isfinite(clip.get(name, 0.0)).all():
                return f"{_NAMES[name]} that are not finite"
        return None

    def _beside(self, slot: Slot) -> int:
        """Tokens that are given beside a clip."""
        source = self.sources[slot.source]
        if not isinstance(source, GivenSource):
            return 0
        return source.beside(slot.clip) // math.prod(self.plan.patch_size)

    def _known(self, slot: Slot, clip: Clip, mean: np.ndarray, key: int) -> Known:
        """What training gives of a clip."""
        condition = getattr(self.sources[slot.source], "condition", "")
        if not condition and not any(self.given.values()):
            return Known()
        view = clip.get("view")
        row = CONDITIONS.get(condition)
        if view is not None and row and not VIEWS[row.view].measured:
            view, _ = self.latents.normalized(view, None)
        rate = self.sounds.rate if self.sounds else 1.0
        return known_in_training(
            mean,
            view,
            condition,
            self.given,
            patch_size=self.plan.patch_size,
            fps=float(clip["fps"]),
            temporal_compression=self.temporal_compression,
            beside=self._beside(slot),
            sounds=np.arange(1, slot.sounds + 1) / rate,
            rng=np.random.Generator(np.random.Philox(key=key)),
            conditions=self.channels,
        )

    def _item(self, slot: Slot, clip: Clip, dropped: bool, key: int) -> Item:
        mean, logvar = self.latents.normalized(clip["mean"], clip.get("logvar"))
        known = self._known(slot, clip, mean, key)
        if self._cond and known.cond is None:
            cond = np.zeros((*mean.shape[:3], self._cond), np.float32)
            known = known._replace(cond=cond)
        item = item_of(
            mean,
            patch_size=self.plan.patch_size,
            fps=float(clip["fps"]),
            temporal_compression=self.temporal_compression,
            seconds=self.seconds,
            known=known,
            logvar=logvar,
            first=getattr(self.sources[slot.source], "first", 0),
            clip_id=self.clip_id(slot),
            **self._text(slot, clip, dropped),
        )
        if self.sounds is None or not slot.sounds:
            return item
        stored = clip["sound_mean"], clip.get("sound_logvar")
        mean, logvar = self.sounds.normalized(*stored)
        place = sound_positions(
            len(mean),
            self.sounds.rate,
            None if self.seconds else float(clip["fps"]),
            self.temporal_compression,
        )
        given = False if known.sound_clean is None else known.sound_clean
        return with_sound(item, mean, place, given=given, logvar=logvar)

    def _text(self, slot: Slot, clip: Clip, dropped: bool) -> dict[str, Any]:
        if self.tokenizer is not None:
            caption = "" if dropped else clip["caption"]
            ids = self.tokenizer.encode(caption, slot.text)
            return {"text_ids": np.array(ids, np.int32)}
        if clip.get("text_embeds") is None:
            raise ValueError(
                f"Clip {slot.clip} of source {slot.source} has no `text_embeds`; give "
                "a `tokenizer`, or encode the captions into the data set."
            )
        embeds: Any = self.null_embeds if dropped else clip["text_embeds"][: slot.text]
        if self.pad_text:
            embeds = np.pad(embeds, ((0, slot.text - len(embeds)), (0, 0)))
        return {"text_embeds": np.asarray(embeds, np.float32)}

    def _empty_item(self, slot: Slot) -> Item:
        """Returns what takes the place of a bad clip: padding of its size."""
        text: dict[str, Any] = {"text_ids": np.zeros(0, np.int32)}
        if self.null_embeds is not None:
            text = {"text_embeds": np.zeros((0, self.null_embeds.shape[1]), np.float32)}
        tokens = slot.tokens + slot.sounds
        if self._cond:
            text["cond"] = np.zeros((tokens, self.cond_channels), np.float32)
        return Item(
            np.zeros((tokens, self._channels), np.float32),
            np.zeros((tokens, 3), np.float32),
            sounds=slot.sounds,
            clip_id=self.clip_id(slot),
            valid=False,
            **text,
        )


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
