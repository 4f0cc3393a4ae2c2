"""Requests as a network takes them: states of their texts, what is given, tokens."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jvdit.data.packing import Item, Size
from jvdit.generation.conditioning import Given, given_of, item_of, with_clean
from jvdit.generation.request import Request, for_encoder
from jvdit.machine.cluster import to_host
from jvdit.machine.compilation import jit
from jvdit.models.image_encoder import ImageEncoder
from jvdit.weights.caption_encoder import encode_captions

if TYPE_CHECKING:
    from jvdit.generation.generator import Generator

_PROMPTS = 8  # encoded at once


def known(
    generator: "Generator", requests: Sequence[Request], sizes: Sequence[Size]
) -> list[Given]:
    """What is known of each clip besides its text.

    Args:
        generator: the model.
        requests: complete ones, which `Generator.check` let pass.
        sizes: latent frames, height and width of each.
    """
    given = [
        given_of(request, size, generator.dit, generator.vae, generator.encode)
        for request, size in zip(requests, sizes, strict=True)
    ]
    encoder = generator.image_encoder
    if encoder is None:
        return given
    params = generator.residence["image_encoder"]
    for i, request in enumerate(requests):
        images = [for_encoder(x, encoder.image_size) for x in request.pictures]
        with jax.set_mesh(generator.mesh):
            states = _image_states(encoder, params, jnp.asarray(np.stack(images)))
        image = np.concatenate(np.asarray(to_host(states), np.float32))
        given[i] = given[i]._replace(image=image)
    return given


def items(
    generator: "Generator",
    requests: Sequence[Request],
    sizes: Sequence[Size],
    given: Sequence[Given],
    noise: Sequence[np.ndarray] | None,
) -> tuple[list[Item], list[Item]]:
    """Each request in tokens, with its prompt and with its negative prompt.

    Args:
        generator: the model.
        requests: complete ones.
        sizes: latent frames, those before the clip included, height and width of each.
        given: what is known of each.
        noise: to start from; None: it is drawn later.
    """
    prompts = [r.prompt for r in requests] + [r.negative_prompt or "" for r in requests]
    states, seconds = _text_states(generator, prompts), generator.conventions.seconds
    none = [None] * len(requests)
    vae, patch_size = generator.vae, generator.patch_size
    found = [
        item_of(*each, states[each[0].prompt], patch_size, vae, seconds)
        for each in zip(requests, sizes, given, noise or none, strict=True)
    ]
    if any(item.clean is not None for item in found):
        found = [with_clean(item) for item in found]
    nulls = [
        dataclasses.replace(item, text_embeds=states[request.negative_prompt or ""])
        for item, request in zip(found, requests, strict=True)
    ]
    return found, nulls


def _text_states(
    generator: "Generator", prompts: Sequence[str]
) -> dict[str, np.ndarray]:
    """The text states of each prompt."""
    texts, length = list(dict.fromkeys(prompts)), generator.text_length
    batch = min(1 << (len(texts) - 1).bit_length(), _PROMPTS)
    with jax.set_mesh(generator.mesh):
        states = encode_captions(
            generator.text_encoder,
            generator.residence["text_encoder"],
            generator.tokenizer,
            texts,
            length,
            batch,
        )
    if generator.conventions.pad_text:
        states = [np.pad(x, ((0, length - len(x)), (0, 0))) for x in states]
    return dict(zip(texts, states, strict=True))


@partial(jit, static_argnames="encoder")
def _image_states(encoder: ImageEncoder, params: Any, images: jax.Array):
    return encoder.apply({"params": params}, images)
