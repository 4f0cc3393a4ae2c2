"""Batches of packed latents for the diffusion transformer."""

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jvdit.data.builders import Arrays, Bad, Builder
from jvdit.data.clips import BadClip, Clip
from jvdit.data.conditions import CONDITIONS, channel_widths
from jvdit.data.conditions.beside import VIEWS
from jvdit.data.conditions.giving import GivenSource, known_in_training
from jvdit.data.conditions.known import Known
from jvdit.data.items import Item, Statistics, item_of, with_sound
from jvdit.data.order import stable_hash, stable_uniform
from jvdit.data.packing import pack_rows
from jvdit.data.patches import sound_positions
from jvdit.data.plan import PackPlan, Slot
from jvdit.data.tokenizer import Tokenizer
from jvdit.ranges import check_ranges

_NAMES = {"mean": "latents", "logvar": "log variances"}
_NAMES |= {f"sound_{name}": f"{what} of a sound" for name, what in _NAMES.items()}
_NAMES["view"] = "latents beside the clip"
_DROPOUT, _GIVING = 17, 18  # tell these uses of the seed from others


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
        check_ranges({"caption_dropout": self.caption_dropout}, "data.")
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
            planned = f"{tokens} tokens of {channels} channels"
            return f"latents of {mean.shape}, planned as {planned}"
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
        fps = None if self.seconds else float(clip["fps"])
        clock = self.sounds.rate, fps, self.temporal_compression
        place = sound_positions(len(mean), *clock)
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
