"""From prompts to clips: tokenise, pack, solve, decode."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jvdit.caption_encoder import encode_captions
from jvdit.cluster import to_host
from jvdit.compilation import jit
from jvdit.conventions import Conventions
from jvdit.data.packing import Item, Size
from jvdit.data.tokenizer import Tokenizer
from jvdit.diffusion.denoise import Guidance
from jvdit.diffusion.flow import Path, TimestepPolicy
from jvdit.diffusion.reuse import Reuse
from jvdit.diffusion.solvers import check_solver
from jvdit.generation.conditioning import (
    Given,
    check_pictures,
    given_of,
    item_of,
    pictures_of,
    with_clean,
)
from jvdit.generation.model_folder import (
    PICTURES,
    pictures_folder,
    read_model,
    write_model,
)
from jvdit.generation.request import Request, for_encoder
from jvdit.generation.residence import Residence
from jvdit.generation.sampling import (
    Batch,
    OnStep,
    Stepper,
    batches_of,
    counting,
    texts_of,
    unpacked,
)
from jvdit.models.dit import DiT
from jvdit.models.image_encoder import ImageEncoder
from jvdit.models.text_encoder import TextEncoder
from jvdit.models.video_vae import VideoVAE
from jvdit.models.video_vae_chunked import decode_normalized, encode_normalized
from jvdit.sharding import (
    autoencoder_mesh,
    make_mesh,
    parameter_shardings,
    rows_sharding,
)
from jvdit.training.vae_objective import to_uint8

ROWS = 8  # solved at once
_PROMPTS = 8  # encoded at once


@dataclasses.dataclass
class Generator:
    """A text-to-video model with everything that it needs.

    Attributes:
        dit, text_encoder, vae: the modules; `vae` knows the statistics of its latents.
        params: theirs, under these names: trees, or functions that bring them to the
            devices (`Residence`). With two experts, "dit" works at high noise and
            "dit_low" below `boundary`; an image encoder's are "image_encoder".
        tokenizer: of the prompts.
        path, policy: on which the network was trained.
        patch_size: latent frames, height and width of a token.
        text_length: tokens of a prompt at the most; longer ones are cut.
        defaults: fields of `Request` and arguments of a call that suit the model.
        mesh: of the devices; default: all of them on `data`.
        conventions: what the network takes its inputs to mean.
        boundary: time below which "dit_low" takes over; 0: there is one network.
        image_encoder: of the given pictures, where the network attends to them.
        adapters: of "dit" and "dit_low" (`lora.py`), at their strength.
        text_release: folder of the released model that has this text encoder, or "".
        together: whether all of the parameters fit on the devices at once.
        pictures: a model that draws the first frames of drafts; None: this one does.
    """

    dit: DiT
    text_encoder: TextEncoder
    vae: VideoVAE
    params: Mapping[str, Any]
    tokenizer: Tokenizer
    path: Path
    policy: TimestepPolicy
    patch_size: tuple[int, int, int]
    text_length: int
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    mesh: Mesh | None = None
    conventions: Conventions = Conventions()
    boundary: float = 0.0
    image_encoder: ImageEncoder | None = None
    text_release: str = ""
    together: bool = True
    adapters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pictures: "Generator | None" = None

    @classmethod
    def load(cls, folder: str | os.PathLike[str], mesh: Mesh | None = None):
        """Loads a `model` folder, or the one inside a workdir.

        Raises:
            FileNotFoundError: there is no such model; says what is missing.
        """
        drawn = pictures_folder(folder)
        pictures = cls.load(drawn, mesh) if drawn.is_dir() else None
        return cls(**read_model(folder), mesh=mesh, pictures=pictures)

    def load_params(self, params: dict[str, Any]) -> None:
        """Replaces weights, already on the mesh, without compiling anew."""
        self._residence.update(params)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a folder that `load` reads and that needs nothing else."""
        write_model(folder, self)
        if self.pictures is not None:
            self.pictures.save(pathlib.Path(folder) / PICTURES)

    def __call__(
        self, requests: Sequence[Request], **settings: Any
    ) -> list[np.ndarray]:
        """Generates clips: uint8 `[T H W 3]` each, in the order of the requests.

        Args and errors are those of `latents`.
        """
        latents = self.latents(requests, **settings)
        rows = settings.get("rows", ROWS)
        videos: dict[int, np.ndarray] = {}
        shapes = [x.shape for x in latents]
        for shape in dict.fromkeys(shapes):
            alike = [i for i, other in enumerate(shapes) if other == shape]
            for start in range(0, len(alike), rows):
                chunk = alike[start : start + rows]
                decoded = self.decode(np.stack([latents[i] for i in chunk]))
                videos |= dict(zip(chunk, decoded, strict=True))
        return [videos[i] for i in range(len(requests))]

    def calibrate(self, request: Request, **settings: Any) -> list[float]:
        """The curve that `Reuse` goes by, measured on a clip; settings as of a call.

        Raises:
            ValueError: see `latents`.
        """
        measured = self._stepper.ratios = {}
        self.latents([request], reuse=Reuse((1.0,), most=0), **settings)
        curve = np.ones(max(last for _, last in measured))
        for (first, last), ratios in measured.items():
            # The first step of a network has none before it.
            curve[first + 1 : last] = ratios[first + 1 : last]
        return curve.tolist()

    @property
    def unit(self) -> int:
        """What the height and width of a clip are multiples of, in pixels."""
        return math.lcm(*self.patch_size[1:]) * self.vae.spatial_compression

    def check(self, request: Request) -> tuple[int, int, int]:
        """The latent size of a request.

        Raises:
            ValueError: there is no such size, or the model takes other pictures.
        """
        size = self.vae.latent_shape(request.frames, request.height, request.width)
        for name, cells, patch in zip(
            ("frames", "height", "width"), size, self.patch_size, strict=True
        ):
            if cells % patch:
                unit = patch * self.vae.spatial_compression
                asked = getattr(request, name)
                raise ValueError(
                    f"`{name}` (={asked}) must be divisible by {unit}; try "
                    f"{max(round(asked / unit), 1) * unit}."
                )
        if not request.fps > 0:
            raise ValueError(f"`fps` (={request.fps}) must be positive; try 8.")
        check_pictures(request, *pictures_of(self.dit, self.conventions))
        return size

    def latents(
        self,
        requests: Sequence[Request],
        *,
        steps: int = 30,
        solver: str = "unipc",
        guidance: Guidance = Guidance(4.0),  # noqa: B008 - immutable
        low_guidance: Guidance | None = None,
        rows: int = ROWS,
        on_step: OnStep | None = None,
        noise: Sequence[Float[np.ndarray, "f h w c"]] | None = None,
        reuse: Reuse | None = None,
    ) -> list[np.ndarray]:
        """Normalised latents `[f h w c]` of each request.

        Args:
            requests: of any sizes; short ones share rows with others.
            steps: of the solver.
            solver: a name of `SOLVERS`.
            guidance: how strongly to follow the prompts.
            low_guidance: of the expert for low noise; None: the same.
            rows: how many rows to solve at once; fewer need less memory.
            on_step: called after each step with how many are done, how many there are
                in all, and the packed latents.
            noise: to start from, instead of that of the seeds.
            reuse: which steps reuse what the network's blocks added before; faster,
                and not quite the same. None: none.

        Raises:
            ValueError: a size, solver or number can't be; before any compilation.
        """
        check_solver(solver)
        if reuse is not None and solver == "heun":
            raise ValueError(
                "`reuse` needs a solver of one evaluation a step; take 'unipc'."
            )
        self.policy.times(steps, jnp.ones(1))
        sizes = [self.check(request) for request in requests]
        given = self._given(requests, sizes)
        sizes = [(f + g.lead, h, w) for (f, h, w), g in zip(sizes, given, strict=True)]
        guidances = {"dit": guidance, "dit_low": low_guidance or guidance}
        ways = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        if all(each.scale != 1 for each in guidances.values()) and ways % 2 == 0:
            ways //= 2  # guidance doubles the rows
        batches = batches_of(
            *self._items(requests, sizes, given, noise),
            [request.seed for request in requests],
            rows,
            ways,
            self._mesh.shape["context"],
            self.text_length,
        )
        self._stepper.on_step = on_step and counting(on_step, len(batches) * steps)
        solved = self._solved(batches, steps, solver, guidances, reuse, bool(noise))
        found = unpacked(batches, solved, sizes, self.patch_size)
        jax.effects_barrier()
        return [x[g.lead :] for x, g in zip(found, given, strict=True)]

    def decode(self, latents: Float[np.ndarray, "b f h w c"]) -> np.ndarray:
        """Normalised latents to pixels, uint8 `[b T H W 3]`.

        Takes the memory of a few latent frames, whatever the length.
        """
        with jax.set_mesh(autoencoder_mesh(self._mesh, *latents.shape[2:4])):
            pieces = decode_normalized(self.vae, self._residence["vae"], latents)
            frames = [to_host(to_uint8(video)) for video in pieces]
        return np.concatenate(frames, axis=1)

    def encode(
        self, video: Float[np.ndarray, "T H W 3"]
    ) -> Float[np.ndarray, "f h w c"]:
        """Pixels in [-1, 1] to normalised latents, the mean of each."""
        _, *latent = self.vae.latent_shape(*video.shape[:3])
        with jax.set_mesh(autoencoder_mesh(self._mesh, *latent)):
            return encode_normalized(self.vae, self._residence["vae"], video)

    # How it is done

    def _solved(
        self,
        batches: Sequence[Batch],
        steps: int,
        solver: str,
        guidances: Mapping[str, Guidance],
        reuse: Reuse | None,
        noisy: bool,
    ) -> list[np.ndarray]:
        """The latents of each batch at t = 0, network after network."""
        spans = self._spans(steps)
        begin = self.path, self.policy, steps, solver, noisy
        running: list[Any] = [None] * len(batches)
        with jax.set_mesh(self._mesh):
            for name, span in spans.items():
                variables = {"params": self._residence[name]}
                if name in self.adapters:
                    lora = self.adapters[name]
                    homes = parameter_shardings(lora, self._mesh)
                    variables["lora"] = jax.device_put(lora, homes)
                for i, batch in enumerate(batches):
                    places = rows_sharding(self._mesh, len(batch.seeds))
                    at = self._stepper(
                        variables,
                        running[i] or batch.begin(places, *begin),
                        texts_of(batch, self.conventions.pad_text, places),
                        solver=solver,
                        guidance=guidances[name],
                        span=span,
                        skips=reuse and reuse.skips(steps, span[0]),
                    )
                    # Waits, too: the next network needs the place of this one.
                    latents = to_host(at.solution.tokens.latents)
                    running[i] = latents if span[1] == steps else at
                del variables
        return running

    def _given(self, requests: Sequence[Request], sizes: Sequence[Size]) -> list[Given]:
        """What is known of each clip besides its text."""
        given = [
            given_of(request, size, self.dit, self.vae, self.encode)
            for request, size in zip(requests, sizes, strict=True)
        ]
        encoder = self.image_encoder
        if encoder is None:
            return given
        params = self._residence["image_encoder"]
        for i, request in enumerate(requests):
            images = [for_encoder(x, encoder.image_size) for x in request.pictures]
            with jax.set_mesh(self._mesh):
                states = _image_states(encoder, params, jnp.asarray(np.stack(images)))
            image = np.concatenate(np.asarray(to_host(states), np.float32))
            given[i] = given[i]._replace(image=image)
        return given

    def _items(
        self,
        requests: Sequence[Request],
        sizes: Sequence[Size],
        given: Sequence[Given],
        noise: Sequence[np.ndarray] | None,
    ) -> tuple[list[Item], list[Item]]:
        """Each request in tokens, with its prompt and with its negative prompt."""
        prompts = [r.prompt for r in requests] + [r.negative_prompt for r in requests]
        states, seconds = self._states(prompts), self.conventions.seconds
        none = [None] * len(requests)
        items = [
            item_of(*each, states[each[0].prompt], self.patch_size, self.vae, seconds)
            for each in zip(requests, sizes, given, noise or none, strict=True)
        ]
        if any(item.clean is not None for item in items):
            items = [with_clean(item) for item in items]
        nulls = [
            dataclasses.replace(item, text_embeds=states[request.negative_prompt])
            for item, request in zip(items, requests, strict=True)
        ]
        return items, nulls

    def _states(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """The text states of each prompt."""
        texts = list(dict.fromkeys(prompts))
        batch = min(1 << (len(texts) - 1).bit_length(), _PROMPTS)
        with jax.set_mesh(self._mesh):
            states = encode_captions(
                self.text_encoder,
                self._residence["text_encoder"],
                self.tokenizer,
                texts,
                self.text_length,
                batch,
            )
        if self.conventions.pad_text:
            states = [
                np.pad(x, ((0, self.text_length - len(x)), (0, 0))) for x in states
            ]
        return dict(zip(texts, states, strict=True))

    def _spans(self, steps: int) -> dict[str, tuple[int, int]]:
        """Which network takes which steps."""
        times = self.policy.times(steps, jnp.ones(1), self.path.timesteps)
        shown = self.path.shown(np.asarray(times)[:-1, 0])
        high = int((shown >= np.float32(self.boundary)).sum())
        spans = {"dit": (0, high), "dit_low": (high, steps)}
        return {name: span for name, span in spans.items() if span[0] < span[1]}

    @cached_property
    def _mesh(self) -> Mesh:
        return make_mesh() if self.mesh is None else self.mesh

    @cached_property
    def _residence(self) -> Residence:
        return Residence(self.params, self._mesh, self.together)

    @cached_property
    def _stepper(self) -> Stepper:
        return Stepper(self.dit, self.path)


@partial(jit, static_argnames="encoder")
def _image_states(encoder: ImageEncoder, params: Any, images: jax.Array):
    return encoder.apply({"params": params}, images)
