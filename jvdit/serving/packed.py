"""Continuous packing: clips enter and leave one compiled row between its steps.

Clips of any size, length, number of steps, guidance scale and condition share rows of
one static shape. Each is at a step of its own.
"""

import dataclasses
from collections.abc import Collection, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from jvdit.data.conditions import CONDITIONS
from jvdit.data.items import Item
from jvdit.data.packing import unpack_rows
from jvdit.data.patches import Size
from jvdit.diffusion.noise_path import TimestepPolicy
from jvdit.generation import restyle
from jvdit.generation.batches import noise_seeds
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request
from jvdit.generation.results import Latents
from jvdit.generation.settings import Settings
from jvdit.machine.cluster import to_host
from jvdit.serving import slots
from jvdit.serving.row_programs import Denoising, begun, entered, sized, stepped
from jvdit.serving.slots import BLOCK, RowShape, RowSlot
from jvdit.serving.token_counts import clip_tokens, picture_tokens
from jvdit.sharding import platform, rows_sharding


@dataclasses.dataclass(eq=False)
class PackedClip:
    """A clip that is being denoised; another of the same request is another clip.

    Attributes:
        request: complete.
        slot: its place.
        size: its latent frames, height and width.
        times: the timesteps of its picture and of its sound, from 1 down to 0.
        scale: of its guidance.
        index: steps that are done.
        broken: whether the network has made numbers that aren't finite.
    """

    request: Request
    slot: RowSlot
    size: Size
    times: np.ndarray
    scale: float
    index: int = 0
    broken: bool = False

    @property
    def left(self) -> int:
        """Steps that are still to be taken."""
        return len(self.times) - 1 - self.index


class Packed:
    """Rows of clips that are denoised together.

    Args:
        generator: of the model.
        tokens: of a row, at least those of the largest clip.
        clips: most clips of a row.
        steps: most steps of a clip.
        rows: how many rows; None: as many as the mesh divides, with guidance.
    """

    def __init__(
        self,
        generator: Generator,
        tokens: int,
        clips: int,
        steps: int,
        rows: int | None = None,
    ):
        model, mesh = generator.model, generator.mesh
        self.generator, self.steps = generator, steps
        # Sounds begin a block of their own.
        unit = (BLOCK if model.has_sound else 1) * mesh.shape["context"]
        tokens = -(-tokens // unit) * unit
        sounds = 0
        if model.has_sound:
            usual = generator.complete(Request(""))
            heard = generator.inputs.sounds(dataclasses.replace(usual, sound=True))
            share = tokens / max(clip_tokens(model, *usual.size), 1)
            sounds = -(-int(heard * share) // unit) * unit
        channels = max(model.dit.in_channels, model.dit.sound_channels)
        text = slots.room_of_text(model.text_length), model.dit.text_width
        self.settings = Settings().complete(model.defaults)
        rows = rows or generator.ways(self.settings.guidance_scale != 1)
        widths = channels, model.dit.cond_channels
        self.shape = RowShape(rows, tokens, sounds, clips, *text, *widths)
        self.running: list[PackedClip] = []
        self._arrays = slots.blank_rows(self.shape)
        self._placed: Any = None
        self._solution: Any = None
        self._seeds = np.zeros(self._level_shape, np.uint32)

    @property
    def _level_shape(self) -> tuple[int, int]:
        return self.shape.rows, self.shape.levels * (len(self.shape.kinds) or 1)

    @cached_property
    def _adapters(self) -> dict[str, Any]:
        """The network's variables besides its parameters, placed once."""
        variables = self.generator.experts.variables("dit")
        return {name: x for name, x in variables.items() if name != "params"}

    @property
    def _denoising(self) -> Denoising:
        model = self.generator.model
        guidance, solver = self.settings.solving["guidance"], self.settings.solver
        dit: Any = model.dit
        if platform() == "cpu" and dit.attention_implementation == "auto":
            # The bits of a clip shouldn't depend on the scores of others.
            dit = dit.clone(attention_implementation="steady")
        return Denoising(dit, model.path, solver or "unipc", guidance, self.shape.kinds)

    def takes(self, settings: Settings) -> bool:
        """Whether clips of these settings, and of this model, can be packed.

        Those with two networks, control, image states, a picture that must be given, or
        levels of their own can't; nor can guided ones where the model's own aren't.
        """
        model = self.generator.model
        each = "steps", "guidance_scale", "guidance_scale_2", "strength"
        usual = {name: getattr(self.settings, name) for name in each}
        plain = dataclasses.replace(settings, **usual)
        needed = any(CONDITIONS[name].needs for name in model.conditions)
        guides = self.settings.guidance_scale != 1 or settings.guidance_scale == 1
        return (
            plain == self.settings
            and not (model.dit.control_channels or model.boundary or needed)
            and model.image_encoder is None
            and (model.pictures is None or not settings.draft)
            and not settings.levels
            and settings.solver != "heun"
            and guides
        )

    def counts(self, request: Request) -> tuple[int, int]:
        """Tokens that a complete request needs: of its picture, and of its sound.

        What is given beside the picture is of its kind.
        """
        sounds = self.generator.inputs.sounds(request)
        return picture_tokens(self.generator.model, request), sounds

    def find(
        self,
        counts: tuple[int, int],
        closed: Collection[int] = (),
        taken: Sequence[RowSlot] | None = None,
    ) -> RowSlot | None:
        """Finds a place for a clip; None: there is no room at the moment.

        Args:
            counts: from `counts`.
            closed: rows that are kept for others.
            taken: places of others; None: those of the clips that are denoised.
        """
        taken = [x.slot for x in self.running] if taken is None else taken
        return slots.find_slot(self.shape, taken, counts, closed)

    def soonest(self, counts: tuple[int, int]) -> int:
        """The row in which there will be room for so many tokens soonest."""
        return slots.soonest(self.shape, {x.slot: x.left for x in self.running}, counts)

    def enter(self, request: Request, settings: Settings, slot: RowSlot) -> PackedClip:
        """Puts a clip in a row.

        Args:
            request: complete, and checked.
            settings: complete, of those that it `takes`.
            slot: from `find`.
        """
        generator = self.generator
        size, inputs = generator.check(request), generator.inputs
        given = inputs.known(request, size)
        noise, times = self._begin(request, settings, size)
        many = None if noise is None else [noise]
        (item,), (null,) = inputs.items([request], [size], [given], many)
        if len(item.latents) - item.sounds != slot.counts[0]:
            raise ValueError(
                f"a clip of {slot.counts[0]} tokens was expected, and it has "
                f"{len(item.latents) - item.sounds}."
            )
        slots.put(self._arrays, self.shape, slot, item, null)
        if times is None:
            times = self._times_of(item, slot, settings.steps or 1)
        clip = PackedClip(request, slot, size, times, settings.guidance_scale or 1.0)
        self._enter(clip, noise is not None)
        self.running.append(clip)
        return clip

    def _begin(
        self, request: Request, settings: Settings, size: Size
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """A picture that doesn't begin with drawn noise, and its times if not all."""
        generator, model = self.generator, self.generator.model
        if request.restyle is not None:
            how = settings.steps or 1, settings.strength
            made = restyle.noised(model, generator.codec, [request], *how)
            times = np.array([*made["levels"], 0.0], np.float32)
            return made["noise"][0], np.stack([times, times], axis=1)
        if (mark := generator.watermark) is None:
            return None, None
        return mark.noise(request.seed, (*size, model.vae.latent_channels)), None

    def _times_of(self, item: Item, slot: RowSlot, steps: int) -> np.ndarray:
        """The timesteps of a clip's picture and of its sound, from 1 down to 0."""
        count, policy = slot.counts[0], self.generator.model.policy
        times = self._times(policy, steps, count)
        along = policy.sound_times(times)
        if not np.any(np.broadcast_to(item.level, len(item.latents))[:count]):
            # The picture is given, so its sound goes by its own size.
            along = self._times(policy.of_sound, steps, max(item.sounds, 1))
        return np.stack([times, along], axis=1)

    def _times(self, policy: TimestepPolicy, steps: int, count: int) -> np.ndarray:
        """The timesteps of so many tokens, from 1 down to 0."""
        even = policy.even(steps, self.generator.model.path.timesteps)
        padded = np.zeros(self.steps + 1, np.float32)
        padded[: len(even)] = even
        found = sized(policy, padded, np.full(len(padded), count, np.float32))
        return np.asarray(found)[: len(even)]

    def _enter(self, clip: PackedClip, begun: bool) -> None:
        """Draws the noise of a clip, and clears what the solver kept in its place.

        Args:
            clip: the clip.
            begun: of its picture no noise is drawn.
        """
        slot, levels = clip.slot, self.shape.levels
        fresh = np.zeros(self._arrays["segment"].shape, bool)
        drawn = fresh.copy()
        for kind, place in enumerate(slots.places(self.shape, slot)):
            at = slot.row, place
            fresh[at] = True
            if kind or not begun:
                drawn[at] = self._arrays["level"][at] % levels > 0
        fresh_level, own = np.zeros(self._level_shape, bool), self._levels(slot)
        fresh_level[slot.row, own] = True
        self._seeds[slot.row, own] = noise_seeds(clip.request.seed, len(own))
        self._place()
        with jax.set_mesh(self.generator.mesh):
            placed = partial(jax.device_put, device=self._sharding)
            self._solution = entered(
                self._denoising,
                self._solution,
                self._placed[0],
                *placed((self._seeds, fresh, drawn, fresh_level)),
            )

    def _levels(self, slot: RowSlot) -> list[int]:
        """The noise levels of a clip, one for each kind."""
        kinds = len(self.shape.kinds) or 1
        return [kind * self.shape.levels + slot.number + 1 for kind in range(kinds)]

    @property
    def _sharding(self) -> Any:
        return rows_sharding(self.generator.mesh, self.shape.rows)

    def _place(self) -> None:
        """Puts the rows on the devices, after clips entered or left."""
        names = "latents", "position", "segment", "level", "cond"
        tokens = {name: self._arrays[name] for name in names if name in self._arrays}
        texts = [
            (self._arrays[f"{name}_embeds"], self._arrays[f"{name}_segment"])
            for name in ("text", "null")
        ]
        with jax.set_mesh(self.generator.mesh):
            # A copy: what is on a CPU's devices may share the host's memory.
            copied = jax.tree.map(np.array, (tokens, texts))
            self._placed = jax.device_put(copied, self._sharding)
            if self._solution is None:
                self._solution = begun(self._denoising, self._placed[0], self._seeds)

    def step(self) -> list[PackedClip]:
        """Takes a step of every clip, and returns those that are finished."""
        shape = self._level_shape
        index, steps = np.zeros(shape, np.int32), np.ones(shape, np.int32)
        t, t_next = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        scales = np.ones(shape, np.float32)
        own = self._denoising.guidance.sound_scale
        for clip in self.running:
            for kind, level in enumerate(self._levels(clip.slot)):
                at = clip.slot.row, level
                index[at], steps[at] = clip.index, len(clip.times) - 1
                t[at], t_next[at] = clip.times[clip.index : clip.index + 2, kind]
                scales[at] = own if kind and own is not None else clip.scale
        with jax.set_mesh(self.generator.mesh):
            now = (index, steps, t, t_next, scales, self._seeds)
            self._solution, broken = stepped(
                self._denoising,
                {"params": self.generator.residence["dit"], **self._adapters},
                self._solution,
                *self._placed,
                *jax.device_put(now, self._sharding),
            )
            broken = to_host(broken)  # this also waits
        for clip in self.running:
            clip.index += 1
            for place in slots.places(self.shape, clip.slot):
                clip.broken |= bool(broken[clip.slot.row, place].any())
        return [clip for clip in self.running if clip.broken or not clip.left]

    def latents(self, clip: PackedClip) -> Latents:
        """The latents of a clip as they are now.

        Raises:
            ValueError: they aren't finite.
        """
        if clip.broken:
            raise ValueError("the network made numbers that aren't finite.")
        return self._read(self._solution[0], clip)

    def foreseen(self, clip: PackedClip) -> np.ndarray:
        """The latents `[f h w c]` of a picture as the solver foresees their end."""
        latents, state = self._solution
        return self._read(state.get("x0", latents), clip).picture

    def _read(self, tokens: Array, clip: PackedClip) -> Latents:
        model, slot = self.generator.model, clip.slot
        row = to_host(tokens)[slot.row]
        pictures, sounds = (row[place] for place in slots.places(self.shape, slot))
        channels, patch = model.vae.latent_channels, model.patch_size
        ((picture,),) = unpack_rows(pictures[None], [[clip.size]], patch, channels)
        sound = sounds[:, : model.dit.sound_channels]
        return Latents(np.array(picture), np.array(sound) if len(sounds) else None)

    def leave(self, clip: PackedClip) -> None:
        """Takes a clip out of its row."""
        self.running.remove(clip)
        slots.clear(self._arrays, self.shape, clip.slot)
        self._seeds[clip.slot.row, self._levels(clip.slot)] = 0
        self._place()

    def warm_up(self) -> bool:
        """Compiles the programs; whether bits don't depend on a clip's place here."""
        request = self.generator.complete(Request(""))
        settings = dataclasses.replace(self.settings, steps=2)
        if (first := self.find(counts := self.counts(request))) is None:
            request = dataclasses.replace(request, frames=1, sound=False)
            first = self.find(counts := self.counts(request))
        if first is None:
            raise ValueError(
                f"a row of {self.shape.tokens} tokens takes no clip of this model, of "
                f"{counts[0]} tokens; raise --tokens."
            )
        second = self.find(counts, taken=[first]) or first
        found = []
        # The text encoder takes one prompt, or two: of the clip, and what to avoid.
        for slot, prompt in ((first, ""), (first, "a"), (second, "a")):
            asked = dataclasses.replace(request, prompt=prompt, negative_prompt="")
            clip = self.enter(asked, settings, slot)
            while clip not in self.step():
                pass
            found.append(self.latents(clip).picture)
            self.leave(clip)
        return np.array_equal(*found[1:])
