"""A clip of a causal model, chunk after chunk, with a rolling cache of what was made.

Every chunk is denoised while it sees the keys and values of those before, which are
computed once, when a chunk is finished (arXiv:2412.07772, 2506.08009). So frames are
there as soon as their chunk is, and a clip of any length needs the same memory.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jvdit.data.conditions.known import Known
from jvdit.data.patches import token_grid, unpatchify
from jvdit.diffusion.denoise import Guidance, guided
from jvdit.diffusion.noise_path import NoisePath
from jvdit.diffusion.solvers import advance
from jvdit.generation.batches import Chunk, batches_of, texts_of
from jvdit.generation.experts import check_control
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request
from jvdit.generation.sampling import Running, Start, start_noise
from jvdit.machine.cluster import to_host
from jvdit.machine.compilation import jit
from jvdit.models.attention.past import Past
from jvdit.models.backbones import Backbone
from jvdit.shapes import Text, Tokens
from jvdit.sharding import rows_sharding

NEXT = 0x9E3779B1  # added to a clip's seed for each of its chunks
_FIELDS = {"prompt", "image"}  # of a request, that a stream makes use of

# What the network keeps: the collection "cache", and which tokens these are.
Kept = tuple[PyTree, Past]


class Stream:
    """A clip that goes on for as long as it is asked to.

    Attributes:
        chunk: latent frames of a chunk.
        count: latent frames so far.

    Args:
        generator: of a model that was trained with `forcing`.
        request: complete; its frames are those of a clip of the training, its size and
            frame rate those of the stream, and a given image is its first frame.
        solving: `Settings.solving`.
        window: latent frames before a chunk that it sees.
        sink: the first latent frames of the clip that it sees for good, besides.

    Raises:
        ValueError: the model can't stream, the request gives what a stream doesn't
            take, or the window isn't made of whole chunks.
    """

    def __init__(
        self,
        generator: Generator,
        request: Request,
        solving: dict[str, Any],
        window: int,
        sink: int = 0,
    ):
        check_stream(generator, request, window, sink)
        check_control(generator.model, solving["guidance"])
        if solving["levels"]:
            generator = generator.timed(tuple(solving["levels"]))
        self._generator, self._model = generator, generator.model
        self._request, self._solving = request, solving
        model, dit = self._model, self._model.dit
        self.chunk, self.count = dit.chunk_frames, 0
        size = model.vae.latent_shape(*request.size)
        _, height, width = token_grid(size, model.patch_size)
        cells = height * width
        # The noise of a chunk is that of a whole clip's, whose size shifts it.
        count = jnp.full(1, float(size[0] * cells))
        shift = float(model.policy.shift_for(count)[0])
        policy = dataclasses.replace(
            model.policy, shift=shift, shift_tokens=None, shift_range=(shift, shift)
        )
        how = solving["steps"], solving["solver"]
        self._start = Start(model.path, policy, *how, one_clip=True)
        self._capacity = (window + sink) * cells, sink * cells
        self._size = size
        self._kept: Kept | None = None

    def next(self, prompt: str) -> Float[np.ndarray, "f h w c"]:
        """Makes the next chunk.

        Args:
            prompt: what is to be seen in it.
        """
        given = Known()
        if self.count == 0 and self._request.image is not None:
            given = self._generator.inputs.known(self._request, self._chunk_size)
        return self._taken(prompt, given)

    def take(self, latents: Float[np.ndarray, "f h w c"], prompt: str) -> None:
        """Goes on from latents that are there; those of whole chunks."""
        for start in range(0, len(latents), self.chunk):
            part = latents[start : start + self.chunk]
            known = Known(latents=part, clean=np.ones(part.shape[:3], bool))
            self._taken(prompt, known)

    @property
    def _chunk_size(self) -> tuple[int, int, int]:
        return self.chunk, *self._size[1:]

    def _taken(self, prompt: str, given: Known) -> np.ndarray:
        """Makes what isn't given of a chunk, and keeps all of it."""
        generator, model = self._generator, self._model
        batch = self._batch(prompt, given)
        places = rows_sharding(generator.mesh, len(batch.seeds))
        dit, guidance = model.dit, self._solving["guidance"]
        with jax.set_mesh(generator.mesh):
            variables = generator.experts.variables("dit")
            texts = texts_of(batch, model.pad_text, places)
            arrays = jax.device_put((batch.arrays, batch.seeds), places)
            running = start_noise(self._start._replace(given=batch.given), *arrays)
            tokens = running.solution.tokens
            if self._kept is None:
                rows = len(batch.seeds) * guidance.evaluations()
                past = Past.empty(rows, *self._capacity)
                like = jax.eval_shape(
                    lambda *given: _keep(dit, guidance, *given)[0],
                    *(variables, ({}, past), tokens, texts),
                )
                cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
                self._kept = cache, past
            if given.clean is None or not given.clean.all():
                tokens = _denoised(
                    *(dit, guidance, model.path, self._start.solver),
                    *(variables, self._kept, running, texts),
                )
            # All tokens of a finished chunk are clean.
            tokens = dataclasses.replace(tokens, level=None)
            self._kept = _keep(dit, guidance, variables, self._kept, tokens, texts)
            (row,) = np.asarray(to_host(tokens.latents))
        self.count += self.chunk
        return unpatchify(row, self._chunk_size, model.patch_size)

    def _batch(self, prompt: str, given: Known) -> Chunk:
        """The tokens of the chunk that follows, and its texts."""
        model, inputs = self._model, self._generator.inputs
        request = dataclasses.replace(self._request, prompt=prompt)
        blank = np.zeros((*self._chunk_size, model.vae.latent_channels), np.float32)
        item, null = (
            inputs.item(request, blank, given, self.count, text)
            for (text,) in inputs.texts([request])
        )
        seed = (request.seed + NEXT * self.count) % 2**32
        (batch,) = batches_of([item], [null], [seed], 1, 1, 1, model.text_length)
        return batch


def check_stream(
    generator: Generator, request: Request, window: int, sink: int = 0
) -> None:
    """Raises a ValueError unless a model can stream this; see `Stream`."""
    model = generator.model
    if "stream" not in model.conditions:
        raise ValueError(
            "this model can't stream: train one with `forcing.share`, or ask for clips "
            "of the length of a window."
        )
    if more := set(request.given) - _FIELDS:
        raise ValueError(
            f"a stream begins with an `image` and goes on by itself; leave "
            f"{', '.join(sorted(f'`{x}`' for x in more))} out."
        )
    if model.dit.cond_channels:
        raise ValueError("a stream has no channels beside the noise, such as edges.")
    if generator.mesh.shape["context"] > 1:
        raise ValueError("a stream isn't divided over devices; leave --mesh out.")
    if model.patch_size[0] != 1:
        raise ValueError(
            f"a stream needs tokens of one frame, and `patch_size` "
            f"(={model.patch_size}) has {model.patch_size[0]}."
        )
    chunk = model.dit.chunk_frames
    if window < chunk or window % chunk or sink % chunk or sink < 0:
        raise ValueError(
            f"the {window} latent frames of a stream's window (`carry`) and the {sink} "
            f"of its `sink` must be whole chunks of {chunk}."
        )


_FIXED = ("dit", "guidance")


@partial(jit, static_argnames=(*_FIXED, "path", "solver"))
def _denoised(
    dit: Backbone,
    guidance: Guidance,
    path: NoisePath,
    solver: str,
    variables: PyTree,
    kept: Kept,
    running: Running,
    texts: tuple[Text, Text],
) -> Tokens:
    """Denoises a chunk, which sees what is kept of those before."""
    cache, past = kept

    def model(tokens: Tokens, t: Array, text: Text) -> Array:
        return dit.apply({**variables, "cache": cache}, tokens, t, text, past)

    solution, times, keys = running
    denoiser = guided(model, *texts, path, guidance)
    return advance(denoiser, solution, times, path, keys, solver).tokens


@partial(jit, static_argnames=_FIXED)
def _keep(
    dit: Backbone,
    guidance: Guidance,
    variables: PyTree,
    kept: Kept,
    tokens: Tokens,
    texts: tuple[Text, Text],
) -> Kept:
    """What is kept after a finished chunk: keys and values of its clean tokens."""
    cache, past = kept
    rows = [(tokens, text) for text in texts[: guidance.evaluations()]]
    tokens, text = jax.tree.map(lambda *x: jnp.concatenate(x), *rows)
    t = jnp.zeros((len(tokens.latents), 1))
    inputs = {**variables, "cache": cache}
    _, changed = dit.apply(inputs, tokens, t, text, past, mutable=["cache"])
    return changed["cache"], past.after(tokens.position)
