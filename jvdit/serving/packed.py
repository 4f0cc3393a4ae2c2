"""Continuous packing: clips enter and leave one compiled row between its steps.

Clips of any size, length, number of steps, guidance scale and condition share rows of
one static shape. Each is at a step of its own.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jvdit.data.packing import unpack_rows
from jvdit.data.patches import Size
from jvdit.diffusion.denoise import Guidance, guided
from jvdit.diffusion.noise_path import NoisePath, TimestepPolicy
from jvdit.diffusion.solvers import Now, Solution, advance_each, begin, clip_noise
from jvdit.generation.batches import OTHER_NOISE
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request
from jvdit.generation.results import Latents
from jvdit.generation.settings import Settings
from jvdit.machine.cluster import to_host
from jvdit.machine.compilation import jit
from jvdit.models.backbones import Backbone
from jvdit.serving.slots import (
    BLOCK,
    RowShape,
    RowSlot,
    blank_rows,
    clear,
    find_slot,
    places,
    put,
    room_of_text,
    soonest,
)
from jvdit.shapes import Text, Tokens
from jvdit.sharding import platform, rows_sharding

# What may be given of packed clips: it is clean tokens in their own places.
_PACKED = {"image", "prefix", "video", "mask", "from_video", "from_sound"}


@dataclasses.dataclass
class PackedClip:
    """A clip that is being denoised.

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


class Denoising(NamedTuple):
    """What is compiled into the programs of a row.

    Attributes:
        dit: the network.
        path: noise path.
        solver: a name in `SOLVERS`.
        guidance: with the scale of the text for each clip in its place.
        kinds: how many tokens of a row are of each kind.
    """

    dit: Backbone
    path: NoisePath
    solver: str
    guidance: Guidance
    kinds: tuple[int, ...]


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
            share = tokens / max(_tokens_of(generator, usual), 1)
            sounds = -(-int(heard * share) // unit) * unit
        channels = max(model.dit.in_channels, model.dit.sound_channels)
        text = room_of_text(model.text_length), model.dit.text_width
        self.settings = Settings().complete(model.defaults)
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        if self.settings.guidance_scale != 1 and ways % 2 == 0:
            ways //= 2  # guidance doubles the rows
        self.shape = RowShape(rows or ways, tokens, sounds, clips, *text, channels)
        self.running: list[PackedClip] = []
        self._arrays = blank_rows(self.shape)
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

    def takes(self, settings: Settings, request: Request | None = None) -> bool:
        """Whether clips of these settings, and of this model, can be packed.

        Those with two networks, channels beside the noise, control, image states or
        levels of their own can't; nor can guided ones where the model's own aren't, or
        what is given by tokens beside the clip's own.
        """
        model = self.generator.model
        dit = model.dit
        plain = dataclasses.replace(
            settings,
            steps=self.settings.steps,
            guidance_scale=self.settings.guidance_scale,
            guidance_scale_2=self.settings.guidance_scale_2,
        )
        extras = dit.cond_channels, dit.control_channels, model.boundary
        guides = self.settings.guidance_scale != 1 or settings.guidance_scale == 1
        return (
            plain == self.settings
            and not any(extras)
            and model.image_encoder is None
            and (model.pictures is None or not settings.draft)
            and not settings.levels
            and settings.solver != "heun"
            and guides
            and not {*(request.given if request else ())} - _PACKED
        )

    def counts(self, request: Request) -> tuple[int, int]:
        """Tokens that a complete request needs, of its picture and of its sound."""
        sounds = self.generator.inputs.sounds(request)
        return _tokens_of(self.generator, request), sounds

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
        return find_slot(self.shape, taken, counts, closed)

    def soonest(self, counts: tuple[int, int]) -> int:
        """The row in which there will be room for so many tokens soonest."""
        return soonest(self.shape, {x.slot: x.left for x in self.running}, counts)

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
        (item,), (null,) = inputs.items([request], [size], [given], None)
        put(self._arrays, self.shape, slot, item, null)
        count, steps = slot.counts[0], settings.steps or 1
        policy = generator.model.policy
        times = self._times(policy, steps, count)
        along = policy.sound_times(times)
        if not np.any(np.broadcast_to(item.level, len(item.latents))[:count]):
            # The picture is given, so its sound goes by its own size.
            along = self._times(policy.of_sound, steps, max(item.sounds, 1))
        times = np.stack([times, along], axis=1)
        clip = PackedClip(request, slot, size, times, settings.guidance_scale or 1.0)
        self._enter(clip)
        self.running.append(clip)
        return clip

    def _times(self, policy: TimestepPolicy, steps: int, count: int) -> np.ndarray:
        """The timesteps of so many tokens, from 1 down to 0."""
        even = policy.even(steps, self.generator.model.path.timesteps)
        padded = np.zeros(self.steps + 1, np.float32)
        padded[: len(even)] = even
        sized = _sized(policy, padded, np.full(len(padded), count, np.float32))
        return np.asarray(sized)[: len(even)]

    def _enter(self, clip: PackedClip) -> None:
        """Draws the noise of a clip, and clears what the solver kept in its place."""
        slot = clip.slot
        fresh = np.zeros(self._arrays["segment"].shape, bool)
        for place in places(self.shape, slot):
            fresh[slot.row, place] = True
        fresh_level = np.zeros(self._level_shape, bool)
        for level, other in zip(self._levels(slot), OTHER_NOISE, strict=False):
            fresh_level[slot.row, level] = True
            seed = (clip.request.seed ^ other) % (1 << 32)
            self._seeds[slot.row, level] = seed
        self._place()
        with jax.set_mesh(self.generator.mesh):
            placed = partial(jax.device_put, device=self._sharding)
            self._solution = _entered(
                self._denoising,
                self._solution,
                self._placed[0],
                *placed((self._seeds, fresh, fresh_level)),
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
        names = "latents", "position", "segment", "level"
        tokens = {name: self._arrays[name] for name in names}
        texts = [
            (self._arrays[f"{name}_embeds"], self._arrays[f"{name}_segment"])
            for name in ("text", "null")
        ]
        with jax.set_mesh(self.generator.mesh):
            # A copy: what is on a CPU's devices may share the host's memory.
            copied = jax.tree.map(np.array, (tokens, texts))
            self._placed = jax.device_put(copied, self._sharding)
            if self._solution is None:
                self._solution = _begun(self._denoising, self._placed[0], self._seeds)

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
            self._solution, broken = _stepped(
                self._denoising,
                {"params": self.generator.residence["dit"], **self._adapters},
                self._solution,
                *self._placed,
                *jax.device_put(now, self._sharding),
            )
            broken = to_host(broken)  # this also waits
        for clip in self.running:
            clip.index += 1
            for place in places(self.shape, clip.slot):
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
        pictures, sounds = (row[place] for place in places(self.shape, slot))
        channels, patch = model.vae.latent_channels, model.patch_size
        ((picture,),) = unpack_rows(pictures[None], [[clip.size]], patch, channels)
        sound = sounds[:, : model.dit.sound_channels]
        return Latents(np.array(picture), np.array(sound) if len(sounds) else None)

    def leave(self, clip: PackedClip) -> None:
        """Takes a clip out of its row."""
        self.running.remove(clip)
        clear(self._arrays, self.shape, clip.slot)
        for level in self._levels(clip.slot):
            self._seeds[clip.slot.row, level] = 0
        self._place()

    def warm_up(self) -> bool:
        """Compiles the programs; whether bits don't depend on a clip's place here."""
        request = self.generator.complete(Request(""))
        settings = dataclasses.replace(self.settings, steps=2)
        first = self.find(counts := self.counts(request))
        if first is None:
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


def _tokens_of(generator: Generator, request: Request) -> int:
    size = generator.model.vae.latent_shape(*request.size)
    each = zip(size, generator.model.patch_size, strict=True)
    return int(np.prod([n // p for n, p in each]))


@partial(jit, static_argnums=0)
def _sized(policy: TimestepPolicy, even: Array, counts: Array) -> Array:
    return policy.sized(even, counts)


def _keys(seeds: Array) -> Array:
    return jax.vmap(jax.vmap(jax.random.key))(seeds)


def _tokens(how: Denoising, arrays: Mapping[str, Array], latents: Array) -> Tokens:
    return Tokens.of(arrays, latents, kinds=how.kinds)


@partial(jit, static_argnums=0)
def _begun(how: Denoising, arrays: Mapping[str, Array], seeds: Array) -> Any:
    """Latents and the solver's state of empty rows."""
    times = jnp.zeros((1, *seeds.shape))
    solution = begin(_tokens(how, arrays, arrays["latents"]), times, how.solver)
    return solution.tokens.latents, solution.state


@partial(jit, static_argnums=0)
def _entered(
    how: Denoising,
    solution: Any,
    arrays: Mapping[str, Array],
    seeds: Array,
    fresh: Array,
    fresh_level: Array,
) -> Any:
    """The solution after clips entered: noise, and nothing that the solver keeps."""
    latents, state = solution
    tokens = _tokens(how, arrays, arrays["latents"])
    levels = seeds.shape[1] // (len(how.kinds) or 1)
    drawn = (arrays["level"] % levels > 0)[..., None]
    begun = jnp.where(drawn, clip_noise(_keys(seeds), tokens), arrays["latents"])

    def cleared(kept: Array) -> Array:
        new = fresh[..., None] if kept.ndim == 3 else fresh_level
        return jnp.where(new, 0.0, kept)

    latents = jnp.where(fresh[..., None], begun, latents)
    return latents, jax.tree.map(cleared, state)


@partial(jit, static_argnums=0)
def _stepped(
    how: Denoising,
    variables: Any,
    solution: Any,
    arrays: Mapping[str, Array],
    texts: Any,
    index: Array,
    steps: Array,
    t: Float[Array, "b g"],
    t_next: Float[Array, "b g"],
    scales: Float[Array, "b g"],
    seeds: Array,
) -> Any:
    """The solution after a step of every clip, and the tokens that aren't finite."""
    latents, state = solution
    model = partial(how.dit.apply, variables)
    text, null = (Text(*each) for each in texts)
    denoiser = guided(model, text, null, how.path, how.guidance, scales)
    now = Now(index, steps, t, t_next, how.path, _keys(seeds))
    tokens = _tokens(how, arrays, latents)
    moved = advance_each(denoiser, Solution(tokens, state), now, how.solver)
    # What isn't finite in one clip would reach others through sums with zeros.
    latents, state = moved.tokens.latents, moved.state
    broken = ~jnp.isfinite(latents).all(axis=-1)
    tame = lambda x: jnp.where(jnp.isfinite(x), x, 0.0)  # noqa: E731
    return jax.tree.map(tame, (latents, state)), broken
