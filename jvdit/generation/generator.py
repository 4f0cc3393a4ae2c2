"""From prompts to clips: tokenise, pack, solve, decode."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jvdit.box import FOLDER
from jvdit.data.packing import Size
from jvdit.data.tokenizer import Tokenizer
from jvdit.diffusion.denoise import Guidance
from jvdit.diffusion.noise_path import NoisePath, TimestepPolicy
from jvdit.diffusion.reuse import Reuse
from jvdit.diffusion.solvers import check_solver
from jvdit.generation.conditioning import check_pictures, pictures_of
from jvdit.generation.draft import drafted
from jvdit.generation.inputs import items, known
from jvdit.generation.model_folder import (
    PICTURES,
    pictures_folder,
    read_model,
    write_model,
)
from jvdit.generation.request import Request, complete
from jvdit.generation.residence import Residence
from jvdit.generation.sampling import (
    Chunk,
    OnStep,
    Stepper,
    batches_of,
    texts_of,
    unpacked,
)
from jvdit.generation.settings import Settings
from jvdit.machine.cluster import to_host
from jvdit.machine.compilation import jit
from jvdit.models.dit import DiT
from jvdit.models.image_encoder import ImageEncoder
from jvdit.models.text_encoder import TextEncoder
from jvdit.models.video_vae import VideoVAE, to_uint8
from jvdit.models.video_vae_chunked import decode_normalized, encode_normalized
from jvdit.sharding import (
    autoencoder_mesh,
    make_mesh,
    parameter_shardings,
    rows_sharding,
)
from jvdit.weights.conventions import Conventions

ROWS = 8  # solved at once
# watch(what is done at the moment, steps or frames of it that are done, and in all)
Watch = Callable[[str, int, int], None]


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
        defaults: fields of `Request` and of `Settings` that suit the model.
        mesh: of the devices; default: all of them on `data`.
        conventions: what the network takes its inputs to mean.
        boundary: time below which "dit_low" takes over; 0: there is one network.
        image_encoder: of the given pictures, where the network attends to them.
        adapters: of "dit" and "dit_low" (`lora.py`), at their strength.
        text_release: folder of the released model that has this text encoder, or "".
        together: whether all of the parameters fit on the devices at once.
        pictures: a model that draws the pictures of drafts; None: this one does.
    """

    dit: DiT
    text_encoder: TextEncoder
    vae: VideoVAE
    params: Mapping[str, Any]
    tokenizer: Tokenizer
    path: NoisePath
    policy: TimestepPolicy
    patch_size: tuple[int, int, int]
    text_length: int
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    mesh: Mesh = dataclasses.field(default_factory=make_mesh)
    conventions: Conventions = Conventions()
    boundary: float = 0.0
    image_encoder: ImageEncoder | None = None
    text_release: str = ""
    together: bool = True
    adapters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pictures: "Generator | None" = None

    @classmethod
    def load(cls, folder: str | os.PathLike[str] = FOLDER, mesh: Mesh | None = None):
        """Loads a `model` folder, or the one inside a workdir; else that in the box.

        Raises:
            FileNotFoundError: there is no such model; says what is missing.
        """
        drawn, mesh = pictures_folder(folder), mesh or make_mesh()
        pictures = cls.load(drawn, mesh) if drawn.is_dir() else None
        return cls(**read_model(folder), mesh=mesh, pictures=pictures)

    def load_params(self, params: dict[str, Any]) -> None:
        """Replaces weights, already on the mesh, without compiling anew."""
        self.residence.update(params)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a folder that `load` reads and that needs nothing else."""
        write_model(folder, self)
        if self.pictures is not None:
            self.pictures.save(pathlib.Path(folder) / PICTURES)

    def __call__(
        self,
        prompts: str | Request | Sequence[str | Request],
        *,
        rows: int = ROWS,
        watch: Watch | None = None,
        reuse: Reuse | None = None,
        **fields: Any,
    ) -> Any:
        """Generates clips as `jvdit.sample` does, as suits the model.

        Args:
            prompts: text, or requests; one, or several.
            rows: see `clips`, as for `watch` and `reuse`.
            watch: see there.
            reuse: see there.
            **fields: of `Settings`, and of the `Request` of each prompt that is text;
                their seeds follow one another.

        Returns:
            A clip, uint8 `[T H W 3]`; of several prompts a list of them, in order.

        Raises:
            ValueError: a size, solver or number can't be; before any compilation.
            TypeError: there is no such field, or no prompt is text that could have it.
        """
        one = isinstance(prompts, str | Request)
        several = [prompts] if one else [*prompts]
        names = {field.name for field in dataclasses.fields(Settings)}
        settings = Settings(**{k: v for k, v in fields.items() if k in names})
        common = {k: v for k, v in fields.items() if k not in names}
        if common and not any(isinstance(x, str) for x in several):
            raise TypeError(
                f"{sorted(common)} must be given in the requests themselves."
            )
        seed = common.pop("seed", 0)
        requests = [
            Request(x, seed=seed + i, **common) if isinstance(x, str) else x
            for i, x in enumerate(several)
        ]
        made = dict(self.clips(requests, settings, rows=rows, watch=watch, reuse=reuse))
        return made[0] if one else [made[i] for i in range(len(requests))]

    def clips(
        self,
        requests: Sequence[Request],
        settings: Settings = Settings(),  # noqa: B008 - immutable
        *,
        rows: int = ROWS,
        watch: Watch | None = None,
        reuse: Reuse | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Generates clips, each handed over as soon as it is ready.

        Args:
            requests: of any sizes; short ones share rows with others.
            settings: how.
            rows: how many rows to solve at once; fewer need less memory.
            watch: called with what is done at the moment ("drafting", "denoising" or
                "decoding"), how many steps or frames of it are done, and of how many.
            reuse: see `latents`.

        Yields:
            The number of a request, and its clip, uint8 `[T H W 3]`.

        Raises:
            ValueError: a size, solver or number can't be; before any compilation.
        """
        settings = settings.complete(self.defaults)
        requests = [self.complete(request) for request in requests]
        for request in requests:
            self.check(request)
        if not requests:
            return
        watch = watch or _unwatched
        options: dict[str, Any] = {"rows": rows, "reuse": reuse}
        if settings.draft:
            yield from drafted(self, requests, settings, watch=watch, **options)
            return
        parts = self.solve(
            requests,
            on_step=lambda done, total, _: watch("denoising", done, total),
            **settings.solving,
            **options,
        )
        for latents in parts:
            yield from self._decoded(latents, watch)

    def complete(self, request: Request) -> Request:
        """The request with what it left open as suits the model."""
        return complete(request, self.defaults, self.unit)

    @property
    def unit(self) -> int:
        """What the height and width of a clip are multiples of, in pixels."""
        return math.lcm(*self.patch_size[1:]) * self.vae.spatial_compression

    def check(self, request: Request) -> Size:
        """The latent size of a request.

        Raises:
            ValueError: there is no such size, or the model takes other pictures.
        """
        request = self.complete(request)
        size = self.vae.latent_shape(*request.size)
        whole = [
            max(round(n / p), 1) * p for n, p in zip(size, self.patch_size, strict=True)
        ]
        nearest = self.vae.video_shape(*whole)
        for i, name in enumerate(("frames", "height", "width")):
            if size[i] % self.patch_size[i]:
                raise ValueError(
                    f"`{name}` (={request.size[i]}) makes {size[i]} latents, which "
                    f"patches of {self.patch_size[i]} don't divide; try {nearest[i]}."
                )
        if not (request.fps or 0) > 0:
            raise ValueError(f"`fps` (={request.fps}) must be positive; try 8.")
        check_pictures(request, *pictures_of(self.dit, self.conventions))
        return size

    def latents(self, requests: Sequence[Request], **options: Any) -> list[np.ndarray]:
        """Normalised latents `[f h w c]` of each request; arguments as of `solve`."""
        found: dict[int, np.ndarray] = {}
        for part in self.solve(requests, **options):
            found |= part
        return [found[i] for i in range(len(requests))]

    def solve(
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
    ) -> Iterator[dict[int, np.ndarray]]:
        """Solves requests batch by batch.

        Args:
            requests: of any sizes; short ones share rows with others.
            steps: of the solver.
            solver: a name of `SOLVERS`.
            guidance: how strongly to follow the prompts.
            low_guidance: of the expert for low noise; None: the same.
            rows: how many rows to solve at once; fewer need less memory.
            on_step: called after each step with how many are done of a batch, how many
                it has in all, and its packed latents.
            noise: to start from, instead of that of the seeds.
            reuse: which steps reuse what blocks added before: faster, not quite equal.

        Yields:
            Of the requests of a batch: number, and normalised latents `[f h w c]`.

        Raises:
            ValueError: a size, solver or number can't be; before any compilation.
        """
        check_solver(solver)
        if reuse is not None and solver == "heun":
            raise ValueError(
                "`reuse` needs a solver of one evaluation a step; take 'unipc'."
            )
        self.policy.times(steps, jnp.ones(1))
        requests = [self.complete(request) for request in requests]
        sizes = [self.check(request) for request in requests]
        given = known(self, requests, sizes)
        sizes = [(f + g.lead, h, w) for (f, h, w), g in zip(sizes, given, strict=True)]
        guidances = {"dit": guidance, "dit_low": low_guidance or guidance}
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        if all(each.scale != 1 for each in guidances.values()) and ways % 2 == 0:
            ways //= 2  # guidance doubles the rows
        batches = batches_of(
            *items(self, requests, sizes, given, noise),
            [request.seed for request in requests],
            rows,
            ways,
            self.mesh.shape["context"],
            self.text_length,
        )
        begin = self.path, self.policy, steps, solver, bool(noise)
        for batch in batches:
            latents = self._solved(batch, begin, guidances, reuse, on_step)
            found = unpacked(batch, latents, sizes, self.patch_size)
            yield {i: x[given[i].lead :] for i, x in found.items()}

    def decode(
        self,
        latents: Float[np.ndarray, "b f h w c"],
        on_frames: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Normalised latents to pixels, uint8 `[b T H W 3]`.

        Takes the memory of a few latent frames, whatever the length.
        `on_frames` is called now and then with how many frames are done, of how many.
        """
        total, frames = self.vae.video_shape(*latents.shape[1:4])[0], []
        with jax.set_mesh(autoencoder_mesh(self.mesh, *latents.shape[2:4])):
            for video in decode_normalized(self.vae, self.residence["vae"], latents):
                frames.append(to_host(_bytes(video)))
                if on_frames is not None:
                    on_frames(sum(x.shape[1] for x in frames), total)
        return np.concatenate(frames, axis=1)

    def encode(
        self, video: Float[np.ndarray, "T H W 3"]
    ) -> Float[np.ndarray, "f h w c"]:
        """Pixels in [-1, 1] to normalised latents, the mean of each."""
        _, *latent = self.vae.latent_shape(*video.shape[:3])
        with jax.set_mesh(autoencoder_mesh(self.mesh, *latent)):
            return encode_normalized(self.vae, self.residence["vae"], video)

    # How it is done

    def _decoded(
        self, latents: Mapping[int, np.ndarray], watch: Watch
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The clips of a batch; those of one size are decoded together."""
        shapes = {i: x.shape for i, x in latents.items()}
        for shape in dict.fromkeys(shapes.values()):
            alike = [i for i, other in shapes.items() if other == shape]
            stack = np.stack([latents[i] for i in alike])
            videos = self.decode(stack, lambda *counts: watch("decoding", *counts))
            yield from zip(alike, videos, strict=True)

    def _solved(
        self,
        batch: Chunk,
        begin: tuple[NoisePath, TimestepPolicy, int, str, bool],
        guidances: Mapping[str, Guidance],
        reuse: Reuse | None,
        on_step: OnStep | None,
    ) -> np.ndarray:
        """The latents of a batch at t = 0, network after network."""
        *_, steps, solver, _ = begin
        places = rows_sharding(self.mesh, len(batch.seeds))
        running = None
        for name, span in self._spans(steps).items():
            with jax.set_mesh(self.mesh):
                variables = {"params": self.residence[name]}
                if name in self.adapters:
                    lora = self.adapters[name]
                    homes = parameter_shardings(lora, self.mesh)
                    variables["lora"] = jax.device_put(lora, homes)
                running = self.stepper(
                    variables,
                    running or batch.begin(places, *begin),
                    texts_of(batch, self.conventions.pad_text, places),
                    solver=solver,
                    guidance=guidances[name],
                    span=span,
                    on_step=on_step,
                    skips=reuse and reuse.skips(steps, span[0]),
                )
                # Waits, too: the next network needs the place of this one.
                latents = to_host(running.solution.tokens.latents)
                del variables
        return latents

    def _spans(self, steps: int) -> dict[str, tuple[int, int]]:
        """Which network takes which steps."""
        times = self.policy.times(steps, jnp.ones(1), self.path.timesteps)
        shown = self.path.shown(np.asarray(times)[:-1, 0])
        high = int((shown >= np.float32(self.boundary)).sum())
        spans = {"dit": (0, high), "dit_low": (high, steps)}
        return {name: span for name, span in spans.items() if span[0] < span[1]}

    @cached_property
    def residence(self) -> Residence:
        """The parameters, on the devices or waiting for their turn."""
        return Residence(self.params, self.mesh, self.together)

    @cached_property
    def stepper(self) -> Stepper:
        """The compiled steps of the network."""
        return Stepper(self.dit, self.path)


_bytes = jit(to_uint8)


def _unwatched(doing: str, done: int, total: int) -> None:
    """Watches nothing."""
