"""Network inputs of requests: text states, conditions, and latent tokens."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from jvdit.data.conditions import Known, Place, known
from jvdit.data.items import Item, item_of, with_sound
from jvdit.data.patches import Size, sound_positions
from jvdit.generation.codec import Codec
from jvdit.generation.footage import for_encoder
from jvdit.generation.request import Request
from jvdit.generation.room import Residence
from jvdit.machine.cluster import to_host
from jvdit.machine.compilation import jit
from jvdit.models.image_encoder import ImageEncoder
from jvdit.weights.bundle import Bundle
from jvdit.weights.encoders import encode_captions

_PROMPTS = 8  # prompts in a batch of the text encoder


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Turns requests into the inputs of a model's network.

    Attributes:
        model: the model.
        params: parameters by network name, on the mesh.
        mesh: the device mesh.
        codec: the model's autoencoders.
    """

    model: Bundle
    params: Residence
    mesh: Mesh
    codec: Codec

    def known(self, request: Request, size: Size) -> Known:
        """Encodes what a request gives besides its prompt: images, video, mask.

        Args:
            request: a complete request that `Generator.check` has accepted.
            size: latent frames, height and width of the clip.
        """
        vae = self.model.vae
        how = self.codec.encode, vae.temporal_compression, vae.spatial_compression
        place = Place(size[0], *how, channels=vae.latent_channels)
        if self.model.has_sound:
            heard, encode = self.model.audio_vae, self.codec.encode_sound
            place = place._replace(encode_sound=encode, latent_rate=heard.latent_rate)
            place = place._replace(sound=(heard.sample_rate, heard.channels))
        found = known(self.model.conditions, request, place)
        if self.model.dit.cond_channels and found.cond is None:
            width = self.model.dit.cond_channels // math.prod(self.model.patch_size)
            cond = np.zeros((*size, width), np.float32)[found.headless :]
            found = found._replace(cond=cond)
        encoder = self.model.image_encoder
        if encoder is None:
            return found
        images = [for_encoder(x, encoder.image_size) for x in request.pictures]
        with jax.set_mesh(self.mesh):
            params = self.params["image_encoder"]
            states = _image_states(encoder, params, jnp.asarray(np.stack(images)))
        image = np.concatenate(np.asarray(to_host(states), np.float32))
        return found._replace(image=image)

    def items(
        self,
        requests: Sequence[Request],
        sizes: Sequence[Size],
        given: Sequence[Known],
        noise: Sequence[np.ndarray] | None,
    ) -> tuple[list[Item], list[Item]]:
        """Builds the tokens of each request, ready to be packed.

        Args:
            requests: complete requests.
            sizes: latent frames, height and width of each; the frames include given
                tokens that stand before the clip, such as reference images.
            given: the conditions of each, from `known`.
            noise: the initial noise of each picture; None: drawn later, from the seeds.

        Returns:
            The items of the requests with their prompts, and the same items with their
            negative prompts.
        """
        positive, negative = self.texts(requests)
        found, channels = [], self.model.vae.latent_channels
        for i, request in enumerate(requests):
            start = np.zeros((*sizes[i], channels)) if noise is None else noise[i]
            first, start = int(given[i].headless), np.asarray(start, np.float32)
            item = self.item(request, start, given[i], first, positive[i])
            found.append(self._with_sound(item, request, given[i]))
        nulls = [
            dataclasses.replace(item, text_embeds=states)
            for item, states in zip(found, negative, strict=True)
        ]
        return found, nulls

    def item(
        self,
        request: Request,
        latents: Float[np.ndarray, "f h w c"],
        known: Known,
        first: int,
        text: Float[np.ndarray, "s e"],
    ) -> Item:
        """Builds the tokens of a picture.

        Args:
            request: complete.
            latents: its initial noise, or zeros where that is drawn later.
            known: its conditions.
            first: number of its first latent frame.
            text: states of its prompt.
        """
        model = self.model
        return item_of(
            latents,
            patch_size=model.patch_size,
            fps=request.frame_rate,
            temporal_compression=model.vae.temporal_compression,
            seconds=model.seconds,
            known=known,
            first=first,
            text_embeds=text,
        )

    def _with_sound(self, item: Item, request: Request, given: Known) -> Item:
        """Adds the tokens of its sound to a request that has some."""
        count = self.sounds(request)
        if not count:
            return item
        vae = self.model.audio_vae
        latents, clean = given_sound(given, count, vae.latent_channels)
        fps = None if self.model.seconds else request.fps
        times = vae.latent_rate, fps, self.model.vae.temporal_compression, given.late
        place = sound_positions(count, *times)
        return with_sound(item, latents, place, given=clean)

    def sounds(self, request: Request) -> int:
        """Latents of the sound of a complete request; 0: it is silent."""
        if not request.sound:
            return 0
        vae = self.model.audio_vae
        late = 0.0 if request.tail is None else request.tail.late
        samples = request.samples(vae.sample_rate) - round(late * vae.sample_rate)
        return vae.length(samples)

    def texts(self, requests: Sequence[Request]) -> list[list[np.ndarray]]:
        """The text states of the prompts, and of the negative prompts."""
        kinds = [
            [(request.prompt, request.prompt_embeds) for request in requests],
            [(x.negative_prompt or "", x.negative_prompt_embeds) for x in requests],
        ]
        texts = [text for kind in kinds for text, given in kind if given is None]
        states, model = self._text_states(list(dict.fromkeys(texts))), self.model
        found = [
            [states[text] if given is None else given for text, given in kind]
            for kind in kinds
        ]
        if not model.pad_text:
            return found
        length = model.text_length
        pad = lambda x: np.pad(x, ((0, length - len(x)), (0, 0)))  # noqa: E731
        return [[pad(x) for x in kind] for kind in found]

    def _text_states(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Encodes prompts, which are distinct."""
        if not texts:
            return {}
        batch = min(1 << (len(texts) - 1).bit_length(), _PROMPTS)
        with jax.set_mesh(self.mesh):
            model, params = self.model, self.params["text_encoder"]
            encoder = model.text_encoder, params, model.tokenizer
            states = encode_captions(*encoder, texts, model.text_length, batch)
        return dict(zip(texts, states, strict=True))


def given_sound(
    known: Known, count: int, channels: int
) -> tuple[Float[np.ndarray, "n c"], Bool[np.ndarray, "n"]]:
    """The latents of a request's sound, and which of them are given; zeros are not.

    Args:
        known: what is known of the clip.
        count: latents of its sound.
        channels: of each.
    """
    latents, clean = np.zeros((count, channels), np.float32), np.zeros(count, bool)
    if known.sound is not None:
        held = min(len(known.sound), count)
        clean[:held] = True if known.sound_clean is None else known.sound_clean[:held]
        latents[:held] = np.where(clean[:held, None], known.sound[:held], 0)
    return latents, clean


@partial(jit, static_argnames="encoder")
def _image_states(encoder: ImageEncoder, params: Any, images: jax.Array):
    return encoder.apply({"params": params}, images)
