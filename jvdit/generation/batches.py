"""Batches: requests packed into rows, and what was made of them unpacked again."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from jvdit.data.items import Item
from jvdit.data.packing import best_fit, pack_rows, unpack_rows, unpack_sounds
from jvdit.data.patches import Size, grid_frames
from jvdit.generation.inputs import Inputs
from jvdit.generation.request import Request
from jvdit.generation.results import Latents
from jvdit.generation.watermark import Watermark
from jvdit.shapes import Text
from jvdit.weights.bundle import Bundle

_NOISES = (0, 1 << 30)  # XORed into a clip's seed: of its picture, and of its sound


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


class PackedRequests(NamedTuple):
    """Requests in batches.

    Attributes:
        batches: the batches.
        sizes: latent frames, height and width of each request, and of what stands
            before its clip.
        leads: how many of those frames stand before it.
        sounds: latents of its sound; 0: it is silent.
        beside: tokens that are given beside it.
    """

    batches: list[Chunk]
    sizes: list[Size]
    leads: list[int]
    sounds: list[int]
    beside: list[int]

    def latents(
        self, batch: Chunk, latents: np.ndarray, model: Bundle
    ) -> dict[int, Latents]:
        """Unpacks the denoised latents of a batch, by the index of the request."""
        latents = latents[: len(batch.rows)]
        order = [*chain(*batch.rows)]
        sizes, beside, sounds = (
            [[each[i] for i in row] for row in batch.rows]
            for each in (self.sizes, self.beside, self.sounds)
        )
        patch, channels = model.patch_size, model.vae.latent_channels
        pictures = chain(*unpack_rows(latents, sizes, patch, channels, beside))
        heard: Iterable[Any] = [None] * len(order)
        if batch.kinds:
            widths = batch.kinds[1], model.dit.sound_channels
            heard = chain(*unpack_sounds(latents, sounds, *widths))
        return {
            i: Latents(picture[self.leads[i] :], sound if self.sounds[i] else None)
            for i, picture, sound in zip(order, pictures, heard, strict=True)
        }


def pack_requests(
    inputs: Inputs,
    requests: Sequence[Request],
    sizes: Sequence[Size],
    rows: int,
    ways: int,
    *,
    among: int = 1,
    noise: Sequence[np.ndarray] | None = None,
    watermark: Watermark | None = None,
) -> PackedRequests:
    """Makes the tokens of requests, and packs them into batches.

    Args:
        inputs: of the model.
        requests: complete ones that the model takes.
        sizes: latent frames, height and width of their clips.
        rows: as of `batches_of`, like the two that follow.
        ways: of which the rows are a multiple.
        among: of which the tokens of a row are a multiple.
        noise: the initial noise of each picture. None: it is drawn later from its seed.
        watermark: marks the noise that isn't given.
    """
    model = inputs.model
    given = [inputs.known(*pair) for pair in zip(requests, sizes, strict=True)]
    leads = [known.lead for known in given]
    whole = [
        (f + known.lead - known.headless, h, w)
        for (f, h, w), known in zip(sizes, given, strict=True)
    ]
    if noise is None and watermark is not None:
        channels = model.vae.latent_channels
        # None where something precedes a clip.
        noise = [
            np.pad(
                watermark.noise(request.seed, (f - lead, h, w, channels)),
                [(lead, 0), (0, 0), (0, 0), (0, 0)],
            )
            for request, (f, h, w), lead in zip(requests, whole, leads, strict=True)
        ]
    items, nulls = inputs.items(requests, whole, given, noise)
    batches = batches_of(
        *(items, nulls, [request.seed for request in requests]),
        *(rows, ways, among, model.text_length),
        channels=max(model.dit.in_channels, model.dit.sound_channels),
    )
    sounds = [inputs.sounds(request) for request in requests]
    beside = [item.beside for item in items]
    return PackedRequests(batches, whole, leads, sounds, beside)


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
                    places[r, :, i] = noise_seeds(seeds[request], len(kinds) or 1)
            places = places.reshape(size, -1)
            batches.append(Chunk(chunk, arrays, null, places, given, kinds))
    return batches


def noise_seeds(seed: int, kinds: int) -> list[int]:
    """Seeds of the noise of a clip: of its picture, and with two kinds of its sound."""
    return [(seed ^ other) % (1 << 32) for other in _NOISES[:kinds]]


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
