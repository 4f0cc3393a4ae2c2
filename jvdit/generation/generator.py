"""Generates clips from prompts: tokenise, pack, denoise, decode."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jvdit.box import FOLDER
from jvdit.data.patches import Size
from jvdit.diffusion.denoise import Guidance
from jvdit.diffusion.reuse import Reuse
from jvdit.diffusion.solvers import check_solver
from jvdit.generation.batches import pack_requests
from jvdit.generation.checks import check_request
from jvdit.generation.codec import Codec
from jvdit.generation.completion import complete
from jvdit.generation.draft import DRAFTING, SHOWING, in_two_passes
from jvdit.generation.experts import Experts, check_control, hint_scales
from jvdit.generation.inputs import Inputs
from jvdit.generation.request import Request
from jvdit.generation.restyle import noised
from jvdit.generation.results import GeneratedClip, Latents
from jvdit.generation.room import Residence, Room
from jvdit.generation.sampling import OnStep, Start, Stepper
from jvdit.generation.settings import NAMES, Settings
from jvdit.generation.watermark import Watermark
from jvdit.sharding import make_mesh
from jvdit.weights.bundle import Bundle, save_bundle
from jvdit.weights.few_bits import check_form
from jvdit.weights.opening import open_bundle

ROWS = 8  # rows of a batch that are denoised together
# watch(phase, steps or frames done in it, steps or frames in all)
Watch = Callable[[str, int, int], None]


@dataclasses.dataclass
class Generator:
    """Generates clips with a finished model.

    Attributes:
        model: a model of our own or a released one, as `open_bundle` returns it.
        mesh: the device mesh; by default all devices along `data`.
        together: True keeps the parameters of all networks on the devices; False holds
            one network there at a time, to save memory. By default decided by whether
            they fit.
        quantize: a name in `FORMS` of `few_bits`, such as "int8": the kernels of the
            DiT and of the text encoder are held so, in a half or less of the memory.
        watermark: marks the noise of pictures; None: nothing does.

    Raises:
        ValueError: `quantize` is no such name.
    """

    model: Bundle
    mesh: Mesh = dataclasses.field(default_factory=make_mesh)
    together: bool | None = None
    quantize: str = ""
    watermark: Watermark | None = None

    def __post_init__(self):
        check_form(self.quantize)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str] = FOLDER,
        mesh: Mesh | None = None,
        quantize: str = "",
        **options: Any,
    ) -> "Generator":
        """Loads a finished model; by default the small one that comes with jvdit.

        Args:
            folder: a training workdir, its `model` folder, or a released Wan model.
            mesh: the device mesh; by default all devices along `data`.
            quantize: form of the weights, as of the class.
            **options: for a released model: `dtype`, `shift`, `parts` and the other
                arguments of `open_bundle`.

        Raises:
            FileNotFoundError: the model or a part of it is missing.
            ValueError: the folder holds something else, or damaged files.
        """
        check_form(quantize)
        mesh = make_mesh() if mesh is None else mesh
        return cls(open_bundle(folder, mesh, **options), mesh, quantize=quantize)

    def timed(self, levels: tuple[float, ...]) -> "Generator":
        """The same generator at noise levels of its own; one for each, with one memory.

        Its network is given these very levels, not the nearest of a thousand timesteps.
        """
        model, made = self._timed.get(levels, (None, self))
        if model is not self.model:
            path = dataclasses.replace(self.model.path, timesteps=0)
            policy = dataclasses.replace(self.model.policy, levels=levels)
            timed = dataclasses.replace(self.model, path=path, policy=policy)
            made = self.beside(timed)
            self._timed[levels] = self.model, made
        return made

    def beside(self, model: Bundle) -> "Generator":
        """A generator of a variant of the model; equal networks have one memory."""
        made = dataclasses.replace(self, model=model)
        if model.networks is self.model.networks:
            made._held = model.networks, self.residence
        return made

    def load_params(self, params: Mapping[str, Any]) -> None:
        """Replaces the parameters of some networks without compiling again.

        Args:
            params: parameters by network name, already placed on the mesh.
        """
        self.residence.update(params)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Saves the whole model in one folder, from which `load` reads it."""
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
        """Generates clips from prompts, as `python -m jvdit.sample` does.

        Whatever isn't given takes the model's own default.

        Args:
            prompts: one prompt or several; each is text or a `Request`.
            rows: how many rows of packed clips to denoise together; fewer need less
                memory.
            watch: progress callback, called with the phase ("drafting", "denoising" or
                "decoding"), and the steps or frames done and in all.
            reuse: lets some steps reuse the residual of the step before (MagCache):
                faster, but not quite the same clip.
            **fields: fields of `Settings` (`steps`, `guidance_scale`, ...), and, for
                the prompts given as text, of `Request` (`frames`, `seed`, ...). Each
                such prompt gets the seed after the one before it.

        Returns:
            A `GeneratedClip`; for several prompts a list of them, in order.

        Raises:
            ValueError: the model can't generate this size, or a setting is out of
                range; raised before anything is compiled.
            TypeError: a field is unknown, or is one of `Request` while every prompt is
                a request already.
        """
        one = isinstance(prompts, str | Request)
        several = [prompts] if one else [*prompts]
        common = {k: v for k, v in fields.items() if k not in NAMES}
        settings = Settings(**{k: v for k, v in fields.items() if k in NAMES})
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
    ) -> Iterator[tuple[int, GeneratedClip]]:
        """Generates clips and yields each as soon as it is decoded.

        Args:
            requests: clips of any sizes; short ones are packed into rows together.
            settings: solver, number of steps, and guidance.
            rows: as for a call, like the two that follow.
            watch: progress callback.
            reuse: lets some steps reuse the residual of the step before.

        Yields:
            The index of a request, and its clip.

        Raises:
            ValueError: the model can't generate a size, or a setting is out of range;
                raised before anything is compiled.
        """
        settings = settings.complete(self.model.defaults)
        requests = [self.complete(request) for request in requests]
        for request in requests:
            self.check(request)
        if not requests:
            return
        watch = watch or (lambda doing, done, total: None)
        options: dict[str, Any] = {"rows": rows, "reuse": reuse}
        if settings.sound_after and any(x.sound for x in requests):
            self.model.check_given(["from_video"])
            plain = dataclasses.replace(settings, sound_after=False)
            show = partial(self.clips, settings=plain, watch=watch, **options)
            plain = dataclasses.replace(plain, draft=False)
            dub = partial(self.clips, settings=plain, watch=watch, **options)
            yield from in_two_passes(SHOWING, requests, rows, show, dub)
            return
        if settings.draft:
            self.model.check_draft()
            options["settings"] = dataclasses.replace(settings, draft=False)
            drafting = partial(self.painter.clips, **options)
            paint = partial(drafting, watch=lambda _, *done: watch("drafting", *done))
            animate = partial(self.clips, watch=watch, **options)
            yield from in_two_passes(DRAFTING, requests, rows, paint, animate)
            return
        options |= settings.solving
        if any(x.restyle is not None for x in requests):
            how = settings.steps or 1, settings.strength
            options |= noised(self.model, self.codec, requests, *how)
        options["on_step"] = lambda *told: watch("denoising", *told[:2])
        for latents in self.solve(requests, **options):
            yield from self.codec.clips(latents, requests, partial(watch, "decoding"))

    def complete(self, request: Request) -> Request:
        """Fills the fields that a request leaves open with the model's defaults."""
        period = self.model.vae.temporal_compression
        found = complete(request, self.model.defaults, self.unit, period)
        if found.sound is None:
            asked = found.from_video is not None or found.from_sound is not None
            # A picture has no sound.
            heard = self.model.has_sound and (found.frames != 1 or asked)
            heard = heard and found.restyle is None
            found = dataclasses.replace(found, sound=heard or asked)
        return found

    @property
    def unit(self) -> int:
        """Height and width of a clip must be multiples of this, in pixels."""
        model = self.model
        return math.lcm(*model.patch_size[1:]) * model.vae.spatial_compression

    def ways(self, guided: bool) -> int:
        """How many rows the mesh divides; guidance doubles those that are given."""
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return ways // 2 if guided and ways % 2 == 0 else ways

    def check(self, request: Request) -> Size:
        """Checks that the model can generate a request.

        Returns:
            The latent frames, height and width of its clip.

        Raises:
            ValueError: the model can't generate this size, or doesn't take the images
                or video that the request gives.
        """
        return check_request(self.model, self.complete(request))

    def latents(self, requests: Sequence[Request], **options: Any) -> list[np.ndarray]:
        """Generates the normalised latents `[f h w c]` of each picture, in order.

        Args:
            requests: clips of any sizes.
            **options: further arguments of `solve`, such as `steps` and `guidance`.
        """
        found: dict[int, Latents] = {}
        for part in self.solve(requests, **options):
            found |= part
        return [found[i].picture for i in range(len(requests))]

    def solve(
        self,
        requests: Sequence[Request],
        *,
        steps: int = 30,
        levels: Sequence[float] | None = None,
        solver: str = "unipc",
        guidance: Guidance = Guidance(4.0),  # noqa: B008 - immutable
        low_guidance: Guidance | None = None,
        rows: int = ROWS,
        on_step: OnStep | None = None,
        noise: Sequence[Float[np.ndarray, "f h w c"]] | None = None,
        reuse: Reuse | None = None,
        conditioning_scale: float | Sequence[float] = 1.0,
        rising: bool = False,
    ) -> Iterator[dict[int, Latents]]:
        """Denoises requests from t = 1 to t = 0, batch by batch.

        Args:
            requests: clips of any sizes; short ones are packed into rows together.
            steps: how many steps the solver takes.
            levels: noise levels of the steps, in the place of the model's spacing.
            solver: a name in `SOLVERS`.
            guidance: classifier-free guidance.
            low_guidance: guidance of the low-noise expert, in a model with two experts;
                None: the same as `guidance`.
            rows: how many rows of packed clips to denoise together; fewer need less
                memory.
            on_step: called after each step with the steps done in this batch, the
                steps in all, and the batch's packed latents.
            noise: the initial noise of each picture; None: drawn from its seed.
            reuse: lets some steps reuse the residual of the step before (MagCache):
                faster, but not quite the same clip.
            conditioning_scale: as in `Settings`.
            rising: from t = 0 to t = 1 instead; `noise` then is what was made.

        Yields:
            For each batch, the normalised latents of its requests, by the index of the
            request.

        Raises:
            ValueError: the model can't generate a size, or a setting is out of range;
                raised before anything is compiled.
        """
        made = self.timed(tuple(levels)) if levels else self
        check_solver(solver)
        if reuse is not None and solver == "heun":
            raise ValueError(
                "`reuse` needs one evaluation a step; take the solver 'unipc'."
            )
        model = made.model
        model.policy.times(steps, jnp.ones(1))
        hint_scales(model, conditioning_scale)
        check_control(model, guidance)
        guidances = {"dit": guidance, "dit_low": low_guidance or guidance}
        ways = self.ways(all(each.scale != 1 for each in guidances.values()))
        requests = [self.complete(request) for request in requests]
        sizes = [self.check(request) for request in requests]
        packed = pack_requests(
            *(made.inputs, requests, sizes, rows, ways),
            among=self.mesh.shape["context"],
            noise=noise,
            watermark=self.watermark,
        )
        marked = noise is not None or self.watermark is not None
        start = Start(model.path, model.policy, steps, solver, marked, rising)
        how = guidances, on_step, reuse, conditioning_scale
        for batch in packed.batches:
            latents = made.experts.solved(batch, start, *how)
            yield packed.latents(batch, latents, model)

    # Implementation

    @property
    def codec(self) -> Codec:
        """The autoencoders."""
        return Codec(self.model, self.residence, self.mesh)

    @property
    def residence(self) -> Residence:
        """The parameters by network, placed on the devices when they are needed."""
        networks, held = self._held
        if networks is not self.model.networks:
            networks, together = self.model.networks, self.together
            together = self.room.together if together is None else together
            sources = {name: x.source for name, x in networks.items()}
            held = Residence(sources, self.mesh, together, self.quantize)
            self._held = networks, held
        return held

    @property
    def room(self) -> Room:
        """What the networks take of the devices' memory, and whether they fit."""
        return Room(self.model.networks, self.mesh, self.quantize)

    @cached_property
    def _held(self) -> tuple[Any, Any]:
        """The networks whose parameters are placed, and their places."""
        return None, None

    @cached_property
    def _timed(self) -> dict[tuple[float, ...], tuple[Any, "Generator"]]:
        """Generators by their noise levels, each with the model that it is made of."""
        return {}

    @cached_property
    def painter(self) -> "Generator":
        """Generates the images of drafts: this generator, or that of `pictures`."""
        if self.model.pictures is None:
            return self
        return dataclasses.replace(self, model=self.model.pictures, together=None)

    @property
    def experts(self) -> Experts:
        """The networks that denoise."""
        return Experts(self.model, self.residence, self.mesh, self.stepper)

    @cached_property
    def stepper(self) -> Stepper:
        """The compiled solver steps of the network."""
        return Stepper(self.model.dit, self.model.path)

    @property
    def inputs(self) -> Inputs:
        """Turns requests into the inputs of the network."""
        return Inputs(self.model, self.residence, self.mesh, self.codec)
