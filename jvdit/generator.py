"""From prompts to clips: tokenise, pack, solve, decode."""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jvdit.data.packing import Item, best_fit, pack_rows, positions, unpack_rows
from jvdit.data.tokenizer import Tokenizer
from jvdit.diffusion.denoise import Guidance, guided
from jvdit.diffusion.flow import Path, TimestepPolicy
from jvdit.diffusion.solvers import check_solver, clip_noise, solve
from jvdit.models.dit import DiT
from jvdit.models.text_encoder import TextEncoder
from jvdit.models.video_vae import VideoVAE
from jvdit.models.video_vae_chunked import decode_stream, split
from jvdit.shapes import Text, Tokens
from jvdit.sharding import batch_sharding, make_mesh, parameter_shardings
from jvdit.training.checkpoint import (
    build,
    load_weights,
    model_folder,
    module_fields,
    save_weights,
    write_json,
)
from jvdit.training.vae_objective import to_uint8

_DECODED_PIXELS = 1 << 21  # at once: a few GB of activations in a large autoencoder

_MODULES = {"dit": DiT, "text_encoder": TextEncoder, "vae": VideoVAE}


@dataclasses.dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes:
        prompt: what the clip shows.
        negative_prompt: what guidance turns away from.
        frames, height, width: of the clip, in pixels.
        fps: frames per second of the clip.
        seed: of its noise; the same seed gives the same clip whatever else is
            generated along with it.
    """

    prompt: str
    negative_prompt: str = ""
    frames: int = 17
    height: int = 64
    width: int = 64
    fps: float = 8.0
    seed: int = 0


def size_fields(
    defaults: dict[str, Any], size: str | None, frames: int | None, fps: float | None
) -> dict[str, Any]:
    """Fields of a `Request` that say how large a clip is.

    Args:
        defaults: of the model.
        size: "HEIGHTxWIDTH" in pixels, or None: the model's, as for the others.
        frames: of the clip.
        fps: frames per second.

    Raises:
        ValueError: the size reads otherwise.
    """
    names = ("frames", "height", "width", "fps")
    fields = {name: defaults[name] for name in names if name in defaults}
    if size is not None:
        match = re.fullmatch(r"(\d+)x(\d+)", size)
        if match is None:
            raise ValueError(
                f"`size` (={size!r}) must read HEIGHTxWIDTH, such as 64x96."
            )
        fields |= {"height": int(match[1]), "width": int(match[2])}
    given = {"frames": frames, "fps": fps}
    return fields | {name: value for name, value in given.items() if value is not None}


@dataclasses.dataclass
class Generator:
    """A trained text-to-video model with everything that it needs.

    Attributes:
        dit, text_encoder, vae: the modules; `vae` knows the statistics of its latents.
        params: theirs, under these names.
        tokenizer: of the prompts.
        path, policy: on which the network was trained.
        patch_size: latent frames, height and width of a token.
        text_length: tokens of a prompt at the most; longer ones are cut.
        defaults: fields of `Request` and arguments of a call that suit the model.
        mesh: of the devices; default: all of them on `data`.
    """

    dit: DiT
    text_encoder: TextEncoder
    vae: VideoVAE
    params: dict[str, Any]
    tokenizer: Tokenizer
    path: Path
    policy: TimestepPolicy
    patch_size: tuple[int, int, int]
    text_length: int
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    mesh: Mesh | None = None

    @classmethod
    def load(cls, folder: str | os.PathLike[str], mesh: Mesh | None = None):
        """Loads a `model` folder, or the one inside a workdir.

        Raises:
            FileNotFoundError: there is no such model; says what is missing.
        """
        folder = model_folder(folder)
        settings_file = folder / "generator.json"
        if not settings_file.exists():
            raise FileNotFoundError(
                f"{folder} holds no text-to-video model (generator.json is missing); "
                "give the workdir of a training with config.objective = 'flow'."
            )
        settings = json.loads(settings_file.read_text())
        modules, params = {}, {}
        for name, module in _MODULES.items():
            params[name], fields = load_weights(folder / name)
            modules[name] = build(module, fields)
        return cls(
            **modules,
            params=params,
            tokenizer=Tokenizer(folder / "tokenizer.model"),
            path=Path(**settings["path"]),
            policy=TimestepPolicy(
                **settings["policy"]
                | {"shift_range": tuple(settings["policy"]["shift_range"])}
            ),
            patch_size=tuple(settings["patch_size"]),
            text_length=settings["text_length"],
            defaults=settings["defaults"],
            mesh=mesh,
        )

    def load_params(self, params: dict[str, Any]) -> None:
        """Replaces weights, already on the mesh, without compiling anew."""
        self._placed.update(params)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a folder that `load` reads and that needs nothing else."""
        folder = pathlib.Path(folder)
        for name in _MODULES:
            fields = module_fields(getattr(self, name))
            save_weights(folder / name, self.params[name], fields)
        (folder / "tokenizer.model").write_bytes(self.tokenizer.model)
        write_json(
            folder / "generator.json",
            {
                "path": dataclasses.asdict(self.path),
                "policy": dataclasses.asdict(self.policy),
                "patch_size": self.patch_size,
                "text_length": self.text_length,
                "defaults": self.defaults,
            },
        )

    def __call__(
        self,
        requests: Sequence[Request],
        *,
        steps: int = 30,
        solver: str = "unipc",
        guidance: Guidance = Guidance(4.0),  # noqa: B008 - immutable
        rows: int = 8,
        on_step: Callable[[int, int, int], None] | None = None,
    ) -> list[np.ndarray]:
        """Generates clips: uint8 `[T H W 3]` each, in the order of the requests.

        Args:
            requests: of any sizes; short ones share rows with others.
            steps: of the solver.
            solver: a name of `SOLVERS`.
            guidance: how strongly to follow the prompts.
            rows: how many rows to solve at once; fewer need less memory.
            on_step: called after each step with the number of the batch of rows, how
                many there are, and the number of the step.

        Raises:
            ValueError: a size, solver or number can't be; before any compilation.
        """
        latents = self.latents(requests, steps, solver, guidance, rows, on_step)
        videos: dict[int, np.ndarray] = {}
        shapes = [x.shape for x in latents]
        for shape in dict.fromkeys(shapes):
            alike = [i for i, other in enumerate(shapes) if other == shape]
            for start in range(0, len(alike), rows):
                chunk = alike[start : start + rows]
                decoded = self.decode(np.stack([latents[i] for i in chunk]))
                videos |= dict(zip(chunk, decoded, strict=True))
        return [videos[i] for i in range(len(requests))]

    def check(self, request: Request) -> tuple[int, int, int]:
        """The latent size of a request; ValueError if there is no such size."""
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
        return size

    def latents(
        self,
        requests: Sequence[Request],
        steps: int,
        solver: str,
        guidance: Guidance,
        rows: int = 8,
        on_step: Callable[[int, int, int], None] | None = None,
    ) -> list[np.ndarray]:
        """Normalised latents `[f h w c]` of each request; arguments as in a call."""
        check_solver(solver)
        self.policy.times(steps, jnp.ones(1))
        sizes = [self.check(request) for request in requests]
        items = [
            (self._item(request, request.prompt, size), null)
            for request, size in zip(requests, sizes, strict=True)
            for null in [self._item(request, request.negative_prompt, size)]
        ]
        packing = self._pack([item for item, _ in items])
        budget = max(sum(len(items[i][0].latents) for i in row) for row in packing)
        clips = max(map(len, packing))
        ways = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        rows = max(-(-min(rows, len(packing)) // ways) * ways, ways)
        out: dict[int, np.ndarray] = {}
        starts = range(0, len(packing), rows)
        for number, start in enumerate(starts):
            chunk = packing[start : start + rows]
            filled = chunk + [chunk[0]] * (rows - len(chunk))
            text_budget = clips * self.text_length
            batch, null = (
                pack_rows(
                    [[items[i][k] for i in row] for row in filled],
                    budget,
                    text_budget,
                    clips,
                )
                for k in (0, 1)
            )
            keys = self._keys(filled, requests, clips)
            watch = on_step and partial(on_step, number, len(starts))
            x = self._solve(batch, null, keys, steps, solver, guidance, watch)
            row_sizes = [[sizes[i] for i in row] for row in filled]
            unpacked = unpack_rows(x, row_sizes, self.patch_size)
            for row, clips_of_row in zip(chunk, unpacked, strict=False):
                out |= dict(zip(row, clips_of_row, strict=True))
        return [out[i] for i in range(len(requests))]

    def decode(self, latents: Float[np.ndarray, "b f h w c"]) -> np.ndarray:
        """Normalised latents to pixels, uint8 `[b T H W 3]`.

        Takes the memory of a few latent frames, whatever the length.
        """
        x = self.vae.denormalize(jnp.asarray(latents))
        pixels = x[:, 0, ..., 0].size * self.vae.spatial_compression**2
        piece = max(_DECODED_PIXELS // (pixels * self.vae.temporal_compression), 1)
        with jax.set_mesh(self._mesh):
            pieces = decode_stream(self.vae, self._placed["vae"], split(x, piece))
            frames = [np.asarray(to_uint8(video)) for video in pieces]
        return np.concatenate(frames, axis=1)

    # How it is done

    def _item(self, request: Request, prompt: str, size: tuple[int, int, int]) -> Item:
        position = positions(
            size, self.patch_size, request.fps, self.vae.temporal_compression
        )
        channels = int(np.prod(self.patch_size)) * self.vae.latent_channels
        ids = self.tokenizer.encode(prompt, self.text_length)
        latents = np.zeros((len(position), channels), np.float32)
        return Item(latents, position, text_ids=np.asarray(ids, np.int32))

    def _pack(self, items: Sequence[Item]) -> list[list[int]]:
        counts = [len(item.latents) for item in items]
        if len(set(counts)) == 1:
            return [[i] for i in range(len(items))]
        text = [self.text_length] * len(items)
        return best_fit(counts, text, max(counts), sum(text), len(items))

    def _keys(self, rows, requests, clips):
        seeds = np.zeros((len(rows), clips + 1), np.int64)
        for r, row in enumerate(rows):
            for i, request in enumerate(row):
                seeds[r, i + 1] = requests[request].seed
        return jax.vmap(jax.vmap(jax.random.key))(jnp.asarray(seeds, jnp.uint32))

    def _solve(self, batch, null, keys, steps, solver, guidance, on_step):
        one_clip = bool((batch["segment"] == 1).all())
        places = batch_sharding(self._mesh)
        batch, null, keys = jax.device_put((batch, null, keys), places)
        self._on_step = on_step
        with jax.set_mesh(self._mesh):
            x = self._compiled(
                self._placed,
                batch,
                null,
                keys,
                steps=steps,
                solver=solver,
                guidance=guidance,
                one_clip=one_clip,
                watched=on_step is not None,
            )
            x = np.asarray(x)
        jax.effects_barrier()
        return x

    @cached_property
    def _mesh(self) -> Mesh:
        return make_mesh() if self.mesh is None else self.mesh

    @cached_property
    def _placed(self):
        return jax.device_put(self.params, parameter_shardings(self.params, self._mesh))

    def _report(self, index, _):
        if self._on_step is not None:
            self._on_step(int(index))

    @cached_property
    def _compiled(self):
        @partial(
            jax.jit,
            static_argnames=("steps", "solver", "guidance", "one_clip", "watched"),
        )
        def run(
            params, batch, null, keys, *, steps, solver, guidance, one_clip, watched
        ):
            segment = batch["segment"]
            levels = keys.shape[1]
            counts = jax.nn.one_hot(segment, levels).sum(1)
            times = self.policy.times(steps, jnp.maximum(counts, 1.0))
            times = times.at[:, :, 0].set(0.0)
            tokens = Tokens(batch["latents"], batch["position"], segment, segment)
            if one_clip:
                tokens = Tokens(batch["latents"], batch["position"])
                times, keys = times[:, :, 1:], keys[:, 1:]
            tokens = tokens.with_latents(clip_noise(keys, tokens))
            texts = [
                Text(
                    self.text_encoder.apply(
                        {"params": params["text_encoder"]},
                        b["text_ids"],
                        b["text_segment"],
                    ),
                    b["text_segment"],
                )
                for b in (batch, null)
            ]
            model = partial(self.dit.apply, {"params": params["dit"]})
            denoiser = guided(model, *texts, self.path, guidance)
            watch = self._report if watched else None
            return solve(denoiser, tokens, times, self.path, keys, solver, watch)

        return run
