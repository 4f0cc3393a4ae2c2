"""The sampling loop: packs requests into batches, draws noise, runs solver steps."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Key, PyTree

from jvdit.data.items import Item
from jvdit.data.packing import best_fit, pack_rows, unpack_rows, unpack_sounds
from jvdit.data.patches import Size, grid_frames
from jvdit.diffusion.denoise import Guidance, guided
from jvdit.diffusion.noise_path import NoisePath, TimestepPolicy
from jvdit.diffusion.reuse import COLLECTION, Memory
from jvdit.diffusion.solvers import Solution, advance, begin, clip_noise
from jvdit.generation.results import Latents
from jvdit.machine.cluster import to_host
from jvdit.machine.compilation import jit
from jvdit.models.backbones import Backbone
from jvdit.shapes import Text, Tokens

# on_step(steps done, steps in all, packed latents of the batch)
OnStep = Callable[[int, int, np.ndarray], None]


# XORed into a clip's seed to get those of its picture's and its sound's noise.
OTHER_NOISE = (0, 1 << 30)


class Chunk(NamedTuple):
    """One batch: rows of packed requests that are denoised together.

    Attributes:
        rows: indices of the requests in each row. The arrays may have more rows than
            this; those repeat the first one.
        arrays: the packed batch with the prompts, as `pack_rows` returns it.
        null: the same batch with the negative prompts.
        seeds: noise seed for each noise level of each row, `[b g]`; 0: it is clean.
        kinds: how many tokens of a row are of each kind; (): all clips are silent.
        given: whether any request, of this batch or another, has given (clean) tokens.
            One value for all batches, so that they share one compilation.
    """

    rows: list[list[int]]
    arrays: dict[str, np.ndarray]
    null: dict[str, np.ndarray]
    seeds: np.ndarray
    given: bool
    kinds: tuple[int, ...] = ()

    @property
    def one_clip(self) -> bool:
        """Whether every row is exactly one clip without padding."""
        return not self.kinds and bool((self.arrays["segment"] == 1).all())

    @property
    def frames(self) -> int:
        """How many frames every row has, if it is one grid; 0: rows aren't so."""
        return grid_frames(self.arrays["position"]) if self.one_clip else 0


class Running(NamedTuple):
    """A batch part of the way from noise to data.

    Attributes:
        solution: the latents so far, and the solver's state.
        times: the timesteps, from 1 down to 0, for each noise level of each row.
        keys: random key for each noise level, for solvers that draw noise.
    """

    solution: Solution
    times: Float[Array, "times b g"]
    keys: Key[Array, "b g"]


def batches_of(
    items: Sequence[Item],
    nulls: Sequence[Item],
    seeds: Sequence[int],
    rows: int,
    ways: int,
    among: int,
    text_length: int,
    channels: int = 0,
) -> list[Chunk]:
    """Packs requests into rows, and rows into batches.

    Args:
        items: tokens and prompt of each request.
        nulls: the same items with the negative prompts.
        seeds: noise seed of each request.
        rows: most rows in a batch, before rounding up to a multiple of `ways`.
        ways: the rows of a batch are a multiple of this.
        among: the tokens of a row are a multiple of this: the number of devices over
            which the `context` axis divides them.
        text_length: most text states of an item.
        channels: width of a token, if some kinds are narrower than others.
    """
    counts = [len(item.latents) - item.sounds for item in items]
    sounds = [item.sounds for item in items]
    given = any(item.is_given for item in items)
    batches = []
    for group in _groups(items):
        packing = [[group[i] for i in row] for row in _rows([counts[i] for i in group])]
        budget, sound_budget = (
            -(-max(sum(x[i] for i in row) for row in packing) // among) * among
            for x in (counts, sounds)
        )
        kinds = (budget, sound_budget) if sound_budget else ()
        clips = max(map(len, packing))
        size = max(-(-min(rows, len(packing)) // ways) * ways, ways)
        for start in range(0, len(packing), size):
            chunk = packing[start : start + size]
            filled = chunk + [chunk[0]] * (size - len(chunk))
            sizes = budget, clips * text_length, clips, sound_budget, channels
            arrays, null = (
                pack_rows([[which[i] for i in row] for row in filled], *sizes)
                for which in (items, nulls)
            )
            places = np.zeros((size, len(kinds) or 1, clips + 1), np.uint32)
            for r, row in enumerate(filled):
                for i, request in enumerate(row, 1):
                    for kind, other in enumerate(OTHER_NOISE[: len(kinds) or 1]):
                        places[r, kind, i] = (seeds[request] ^ other) % (1 << 32)
            places = places.reshape(size, -1)
            batches.append(Chunk(chunk, arrays, null, places, given, kinds))
    return batches


def _groups(items: Sequence[Item]) -> list[list[int]]:
    """Groups items that may share a batch: all; with image states, those of one size.

    Image states belong to a whole row, so such an item has a row to itself.
    """
    if items[0].image is None:
        return [[*range(len(items))]]
    counts = [item.spans for item in items]
    return [
        [i for i, other in enumerate(counts) if other == count]
        for count in dict.fromkeys(counts)
    ]


def _rows(counts: Sequence[int]) -> list[list[int]]:
    if len(set(counts)) == 1:
        return [[i] for i in range(len(counts))]
    # The text budget follows the rows, so it bounds nothing here.
    return best_fit([(n,) for n in counts], (max(counts),), len(counts))


class Start(NamedTuple):
    """What decides how a batch begins.

    Attributes:
        path: the noise path that the network was trained on.
        policy: spaces the timesteps; larger clips may have a larger shift.
        steps: how many steps the solver takes.
        solver: a name in `SOLVERS`.
        noisy: the batch's pictures already are the initial noise.
        rising: times rise from 0 to 1 instead, from data to noise.
        one_clip: every row is exactly one clip without padding, so no mask is needed.
        given: some tokens may be given (clean).
        kinds: how many tokens of a row are of each kind; (): all clips are silent.
        frames: of every row, if it is one grid and the network asks for them.
    """

    path: NoisePath
    policy: TimestepPolicy
    steps: int
    solver: str
    noisy: bool = False
    rising: bool = False
    one_clip: bool = False
    given: bool = False
    kinds: tuple[int, ...] = ()
    frames: int = 0


@partial(jit, static_argnames="start")
def start_noise(start: Start, arrays: dict[str, Array], seeds: Array) -> Running:
    """Draws the initial noise of a batch, and computes its timesteps.

    Given tokens keep their clean latents.

    Args:
        start: settings.
        arrays: the packed batch, `Chunk.arrays`.
        seeds: noise seed for each noise level, `Chunk.seeds`.
    """
    solver, noisy, given, kinds = start.solver, start.noisy, start.given, start.kinds
    keys = jax.vmap(jax.vmap(jax.random.key))(seeds)
    how = {"one_clip": start.one_clip, "given": given, "kinds": kinds}
    tokens = Tokens.of(arrays, arrays["latents"], frames=start.frames, **how)
    levels = seeds.shape[1] // (len(kinds) or 1)  # of each kind; the first is clean
    times = _times(start, arrays, levels)
    if tokens.level is None:
        times, keys = times[:, :, 1:], keys[:, 1:]
    if start.rising:
        times = times[::-1]
    if not noisy or len(kinds) > 1:
        noise = clip_noise(keys, tokens)
        if given or noisy:
            drawn = (arrays["level"] % levels > 0) | (arrays["segment"] == 0)
            if noisy:
                drawn &= jnp.arange(drawn.shape[1])[None] >= kinds[0]
            noise = jnp.where(drawn[..., None], noise, tokens.latents)
        tokens = tokens.with_latents(noise)
    return Running(begin(tokens, times, solver), times, keys)


def _times(
    start: Start, arrays: dict[str, Array], levels: int
) -> Float[Array, "times b g"]:
    """The timesteps of each noise level of each row, so many for each kind.

    The sound of a clip goes along with its picture (`sound_times`). Where one of them
    is given, the other has the times of its own size.
    """
    path = start.path
    kinds = start.kinds or (arrays["segment"].shape[1],)
    ends = np.cumsum(kinds)[:-1].tolist()
    parts, times = jnp.split(arrays["segment"], ends, axis=1), []
    policies = start.policy, start.policy.of_sound
    for policy, segment in zip(policies, parts, strict=False):
        counts = jax.nn.one_hot(segment, levels).sum(1)
        found = policy.times(start.steps, jnp.maximum(counts, 1.0), path.timesteps)
        times.append(found.at[:, :, 0].set(0.0))
    if len(times) > 1:
        level = jnp.split(arrays["level"], ends, axis=1)[0]
        generated = jax.nn.one_hot(level, levels).sum(1) > 0
        along = start.policy.sound_times(times[0])
        times[1] = jnp.where(generated.at[:, 0].set(False)[None], along, times[1])
    return jnp.concatenate(times, axis=-1)


def texts_of(batch: Chunk, padded: bool, places: NamedSharding) -> tuple[Text, Text]:
    """Builds the text inputs of a batch: the prompts and the negative prompts.

    Args:
        batch: the batch; its arrays hold `text_embeds`.
        padded: tokens attend to every text state of their clip, padding included, as
            Wan's do. False: to those of the prompt alone.
        places: sharding of the rows.
    """

    def text(arrays):
        unmasked = padded and batch.one_clip
        segment = None if unmasked else arrays["text_segment"]
        parts = arrays["text_embeds"], segment, arrays.get("image")
        return Text(*jax.device_put(parts, places))

    return text(batch.arrays), text(batch.null)


class Stepper:
    """The compiled solver steps of one network; later calls reuse the compilation.

    Attributes:
        ratios: for each range of steps that was run with `skips`, how much larger the
            blocks' residual was at each step than at the one before.
    """

    def __init__(self, dit: Backbone, path: NoisePath):
        self.dit = dit
        self.ratios: dict[tuple[int, int], np.ndarray] = {}
        self._run = jit(
            partial(self._steps, path),
            static_argnames=("solver", "guidance", "count", "skips"),
        )

    def __call__(
        self,
        variables: PyTree,
        running: Running,
        texts: tuple[Text, Text],
        *,
        span: tuple[int, int],
        on_step: OnStep | None = None,
        skips: tuple[bool, ...] | None = None,
        **settings: Any,
    ) -> Running:
        """Takes the steps from `span[0]` up to, but not including, `span[1]`.

        Args:
            variables: the network's variables: parameters, and adapters if any.
            running: the batch, from `start_noise` or from an earlier call.
            texts: the text and the null text, from `texts_of`.
            span: the first step, and the one after the last.
            on_step: called after each step with the steps done, the steps in all, and
                the packed latents. Without it all steps are one compiled program.
            skips: for each step of the whole solution, whether it reuses the residual
                of the step before instead of running the blocks; None: no reuse.
            **settings: `solver` and `guidance`.
        """
        first, last = span
        count = last - first if on_step is None else 1
        kept = None
        if skips is not None:
            rows, tokens = running.solution.tokens.latents.shape[:2]
            kinds = len(running.solution.tokens.kinds) or 1
            rows *= settings["guidance"].evaluations(kinds)
            residual = jnp.zeros((rows, tokens, self.dit.width), self.dit.dtype)
            kept = residual, jnp.ones(len(skips))
        settings |= {"count": count, "skips": skips}
        for index in range(first, last, count):
            at = np.int32(index)
            running, kept = self._run(variables, running, texts, at, kept, **settings)
            if on_step is not None:
                steps = len(running.times) - 1
                on_step(index + 1, steps, to_host(running.solution.tokens.latents))
        if kept is not None:
            self.ratios[span] = np.asarray(kept[1])
        return running

    def lower(self, variables: Any, running: Any, texts: Any, **settings: Any) -> Any:
        """Lowers the program of some steps without running it, for forecasts.

        Args:
            variables: shapes of the network's variables.
            running: shapes of a batch.
            texts: shapes of the text and the null text.
            **settings: `solver`, `guidance`, `count` and `skips`.
        """
        at = jax.ShapeDtypeStruct((), jnp.int32)
        return self._run.lower(variables, running, texts, at, None, **settings)

    def _steps(
        self,
        path: NoisePath,
        variables: PyTree,
        running: Running,
        texts: tuple[Text, Text],
        first: Array,
        kept: Any,
        *,
        solver: str,
        guidance: Guidance,
        count: int,
        skips: tuple[bool, ...] | None,
    ) -> tuple[Running, Any]:
        solution, times, keys = running
        memory: Any = None if skips is None else Memory()

        def reusing(tokens: Tokens, t: Array, text: Text) -> Array:
            (residual, ratios), i = memory.value, memory.index
            skip = jnp.asarray(skips)[i]
            kept = {"residual": residual, "skip": skip, "ratio": ratios[i]}
            told = {**variables, COLLECTION: kept}
            out, state = self.dit.apply(told, tokens, t, text, mutable=[COLLECTION])
            kept = state[COLLECTION]
            memory.value = kept["residual"], ratios.at[i].set(kept["ratio"])
            return out

        model = partial(self.dit.apply, variables)
        if memory is not None:
            memory.value, model = kept, reusing
        denoiser = guided(model, *texts, path, guidance)
        solution = advance(
            denoiser, solution, times, path, keys, solver, first, count, memory
        )
        return Running(solution, times, keys), memory and memory.value


def unpacked(
    batch: Chunk,
    latents: np.ndarray,
    sizes: Sequence[Size],
    sounds: Sequence[int],
    beside: Sequence[int],
    patch_size: Size,
    channels: tuple[int, int],
) -> dict[int, Latents]:
    """Unpacks a batch's latents, for each request by its index.

    Args:
        batch: the batch.
        latents: packed, denoised.
        sizes: latent frames, height and width of each request.
        sounds: latents of its sound; 0: it is silent.
        beside: tokens that are given beside it.
        patch_size: latent frames, height and width of a token.
        channels: of a latent of a picture, and of a sound.
    """
    latents = latents[: len(batch.rows)]
    order = [*chain(*batch.rows)]
    row_sizes = [[sizes[i] for i in row] for row in batch.rows]
    others = [[beside[i] for i in row] for row in batch.rows]
    pictures = unpack_rows(latents, row_sizes, patch_size, channels[0], others)
    heard: Iterable[Any] = [None] * len(order)
    if batch.kinds:
        counts = [[sounds[i] for i in row] for row in batch.rows]
        heard = chain(*unpack_sounds(latents, counts, batch.kinds[1], channels[1]))
    return {
        i: Latents(picture, sound if sounds[i] else None)
        for i, picture, sound in zip(order, chain(*pictures), heard, strict=True)
    }
