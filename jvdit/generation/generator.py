"""From prompts to clips: tokenise, pack, solve, decode."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jvdit.box import FOLDER
from jvdit.data.patches import Size
from jvdit.diffusion.denoise import Guidance
from jvdit.diffusion.noise_path import NoisePath, TimestepPolicy
from jvdit.diffusion.reuse import Reuse
from jvdit.diffusion.solvers import check_solver
from jvdit.generation.draft import drafted
from jvdit.generation.inputs import Inputs
from jvdit.generation.request import Request, complete
from jvdit.generation.residence import Residence, fits_together
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
from jvdit.models.video_vae import to_uint8
from jvdit.models.video_vae_chunked import decode_normalized, encode_normalized
from jvdit.sharding import (
    autoencoder_mesh,
    make_mesh,
    parameter_shardings,
    rows_sharding,
)
from jvdit.weights.bundle import Bundle
from jvdit.weights.model_folder import save_bundle
from jvdit.weights.opening import open_bundle

ROWS = 8  # solved at once
# watch(what is done at the moment, steps or frames of it that are done, and in all)
Watch = Callable[[str, int, int], None]


@dataclasses.dataclass
class Generator:
    """Generates clips by a finished model.

    Attributes:
        model: of our own or a release, see `open_bundle`.
        mesh: of the devices; default: all of them on `data`.
        together: whether all parameters that are read from files stay on the devices.
            False: those of one network are there at a time. Default: as they fit.
    """

    model: Bundle
    mesh: Mesh = dataclasses.field(default_factory=make_mesh)
    together: bool | None = None

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str] = FOLDER,
        mesh: Mesh | None = None,
        **options: Any,
    ) -> "Generator":
        """Loads a finished model, default: that in the box.

        Args:
            folder: see `open_bundle`.
            mesh: of the devices; default: all of them on `data`.
            **options: of `open_bundle`, for a released model.

        Raises:
            FileNotFoundError: there is no such model; says what is missing.
            ValueError: the folder holds another model, or damaged files.
        """
        mesh = make_mesh() if mesh is None else mesh
        return cls(open_bundle(folder, mesh, **options), mesh)

    def load_params(self, params: Mapping[str, Any]) -> None:
        """Replaces weights, already on the mesh, without compiling anew."""
        self.residence.update(params)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a folder that `load` reads and that needs nothing else."""
        save_bundle(folder, self.model)

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
        settings = settings.complete(self.model.defaults)
        requests = [self.complete(request) for request in requests]
        for request in requests:
            self.check(request)
        if not requests:
            return
        watch = watch or _unwatched
        options: dict[str, Any] = {"rows": rows, "reuse": reuse}
        if settings.draft:
            self.model.check_draft()
            options["settings"] = dataclasses.replace(settings, draft=False)

            def drafting(_: str, done: int, total: int) -> None:
                watch("drafting", done, total)

            paint = partial(self.painter.clips, watch=drafting, **options)
            animate = partial(self.clips, watch=watch, **options)
            yield from drafted(requests, rows, paint, animate)
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
        return complete(request, self.model.defaults, self.unit)

    @property
    def unit(self) -> int:
        """What the height and width of a clip are multiples of, in pixels."""
        model = self.model
        return math.lcm(*model.patch_size[1:]) * model.vae.spatial_compression

    def check(self, request: Request) -> Size:
        """The latent size of a request.

        Raises:
            ValueError: there is no such size, or the model takes other pictures.
        """
        request, patch_size = self.complete(request), self.model.patch_size
        size = self.model.vae.latent_shape(*request.size)
        whole = [
            max(round(n / p), 1) * p for n, p in zip(size, patch_size, strict=True)
        ]
        nearest = self.model.vae.video_shape(*whole)
        for i, name in enumerate(("frames", "height", "width")):
            if size[i] % patch_size[i]:
                raise ValueError(
                    f"`{name}` (={request.size[i]}) makes {size[i]} latents, which "
                    f"patches of {patch_size[i]} don't divide; try {nearest[i]}."
                )
        if not (request.fps or 0) > 0:
            raise ValueError(f"`fps` (={request.fps}) must be positive; try 8.")
        self.model.check_given(request.given)
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
        model = self.model
        model.policy.times(steps, jnp.ones(1))
        requests = [self.complete(request) for request in requests]
        sizes = [self.check(request) for request in requests]
        given = [
            self._inputs.known(*pair) for pair in zip(requests, sizes, strict=True)
        ]
        sizes = [(f + g.lead, h, w) for (f, h, w), g in zip(sizes, given, strict=True)]
        guidances = {"dit": guidance, "dit_low": low_guidance or guidance}
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        if all(each.scale != 1 for each in guidances.values()) and ways % 2 == 0:
            ways //= 2  # guidance doubles the rows
        batches = batches_of(
            *self._inputs.items(requests, sizes, given, noise),
            [request.seed for request in requests],
            rows,
            ways,
            self.mesh.shape["context"],
            model.text_length,
        )
        begin = model.path, model.policy, steps, solver, bool(noise)
        for batch in batches:
            latents = self._solved(batch, begin, guidances, reuse, on_step)
            found = unpacked(batch, latents, sizes, model.patch_size)
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
        vae = self.model.vae
        total, frames = vae.video_shape(*latents.shape[1:4])[0], []
        with jax.set_mesh(autoencoder_mesh(self.mesh, *latents.shape[2:4])):
            for video in decode_normalized(vae, self.residence["vae"], latents):
                frames.append(to_host(_bytes(video)))
                if on_frames is not None:
                    on_frames(sum(x.shape[1] for x in frames), total)
        return np.concatenate(frames, axis=1)

    def encode(
        self, video: Float[np.ndarray, "T H W 3"]
    ) -> Float[np.ndarray, "f h w c"]:
        """Pixels in [-1, 1] to normalised latents, the mean of each."""
        vae = self.model.vae
        _, *latent = vae.latent_shape(*video.shape[:3])
        with jax.set_mesh(autoencoder_mesh(self.mesh, *latent)):
            return encode_normalized(vae, self.residence["vae"], video)

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
                if (lora := self.model.adapters.get(name)) is not None:
                    homes = parameter_shardings(lora, self.mesh)
                    variables["lora"] = jax.device_put(lora, homes)
                running = self.stepper(
                    variables,
                    running or batch.begin(places, *begin),
                    texts_of(batch, self.model.pad_text, places),
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
        model = self.model
        times = model.policy.times(steps, jnp.ones(1), model.path.timesteps)
        shown = model.path.shown(np.asarray(times)[:-1, 0])
        high = int((shown >= np.float32(model.boundary)).sum())
        spans = {"dit": (0, high), "dit_low": (high, steps)}
        return {name: span for name, span in spans.items() if span[0] < span[1]}

    @cached_property
    def residence(self) -> Residence:
        """The parameters, on the devices or waiting for their turn."""
        together = self.together
        if together is None:
            together = fits_together(self.model.num_bytes, self.mesh)
        sources = {name: x.source for name, x in self.model.networks.items()}
        return Residence(sources, self.mesh, together)

    @cached_property
    def painter(self) -> "Generator":
        """What draws the pictures of drafts."""
        if self.model.pictures is None:
            return self
        return Generator(self.model.pictures, self.mesh)

    @cached_property
    def stepper(self) -> Stepper:
        """The compiled steps of the network."""
        return Stepper(self.model.dit, self.model.path)

    @cached_property
    def _inputs(self) -> Inputs:
        return Inputs(self.model, self.residence, self.mesh, self.encode)


_bytes = jit(to_uint8)


def _unwatched(doing: str, done: int, total: int) -> None:
    """Watches nothing."""
