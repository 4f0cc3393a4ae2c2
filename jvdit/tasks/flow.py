"""Training the DiT on cached latents, with a text encoder or on cached text states."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jvdit.config import Config
from jvdit.data.catalog import open_source
from jvdit.data.media.reader import decode_clip
from jvdit.data.media.writer import encode_clip
from jvdit.data.pipeline import PackedBatches
from jvdit.data.plan import PackPlan
from jvdit.data.sheets import contact_sheet, write_png
from jvdit.data.sources import LatentSource
from jvdit.data.tokenizer import Tokenizer, train_tokenizer
from jvdit.data.world import World
from jvdit.diffusion.noise_path import NoisePath
from jvdit.diffusion.solvers import check_solver
from jvdit.evaluation import oracle
from jvdit.generation.draft import check_draft
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request
from jvdit.machine.cluster import is_lead, to_host
from jvdit.machine.compilation import jit
from jvdit.models.dit import DiT
from jvdit.models.text_encoder import TextEncoder
from jvdit.sharding import parameter_shardings
from jvdit.tasks.caches import cached_autoencoder, cached_captions
from jvdit.tasks.flow_objective import flow_objective
from jvdit.tasks.task import Task
from jvdit.training.objectives.denoising import FlowObjective
from jvdit.weights import wan
from jvdit.weights.adapters import write_lora
from jvdit.weights.conventions import Conventions
from jvdit.weights.folders import save_dit
from jvdit.weights.networks import fingerprint, finished_parameters
from jvdit.weights.parameters import module_fields
from jvdit.weights.release import is_release, read_release

_OF_TRAINING = ("prompts", "scored", "pictures")
_TOLD = ("all", "count", "color", "shape", "size", "direction", "physics")


class FlowTask(Task):
    """Trains a DiT, and perhaps a text encoder, on cached latents."""

    objective: FlowObjective
    networks: ClassVar = {"dit": DiT, "text_encoder": TextEncoder, "path": NoisePath}
    sources: list[LatentSource]  # type: ignore[assignment]

    def __init__(self, config: Config, mesh: Mesh, workdir: pathlib.Path):
        super().__init__(config, mesh, workdir)
        data = config.data
        self.vae, self.vae_params, self.vae_hash = cached_autoencoder(
            config, self.sources
        )
        self.captions = cached_captions(config, self.sources)
        self.tokenizer = self.captions.tokenizer if self.captions else self._tokenizer()
        self.plan = self._plan(self.sources, config.seed, data.weights or None)
        self.fingerprint = self.plan.fingerprint
        self.batch_builder = self._packed(self.sources, self.plan, data.caption_dropout)
        self.example, _ = self.batch_builder[0]
        one_clip = data.max_clips == 1 and self.plan.padding == 0
        self.objective = self._objective(one_clip)
        if self.objective.lora:
            self.frozen = self._base()
        self.identity = self._identity()
        clips = sum(map(len, self.sources))
        self.summary = f"{clips} clips, {self.plan.padding:.1%} padding"
        self.flops = self._flops()
        self._check_samples()
        self._validation = self._validation_batch()
        self._measure = jit(self.objective.validate)
        self._generator: Generator | None = None

    # Building

    def open(self, name):  # noqa: D102
        source = open_source(
            name,
            max_text=self.config.data.text_length,
            pad_text=self.config.conventions.pad_text,
        )
        if not isinstance(source, LatentSource):
            raise ValueError(
                f"source {name!r} holds pixels, but config.objective 'flow' trains on "
                "latents; encode it first with python -m jvdit.encode."
            )
        return source

    def _plan(self, sources, seed: int, weights=None) -> PackPlan:
        data = self.config.data
        return PackPlan.of(
            sources,
            token_budget=data.token_budget,
            text_budget=data.text_budget,
            max_clips=data.max_clips,
            rows_per_step=data.rows,
            patch_size=tuple(self.config.patch_size),
            weights=weights,
            seed=seed,
        )

    def _tokenizer(self) -> Tokenizer:
        if self.config.tokenizer:
            return Tokenizer(self.config.tokenizer)
        # A run that goes on, and one that starts from another, keep its token ids.
        for folder in filter(
            None, (str(self.workdir / "model"), self.config.start_from)
        ):
            if (kept := pathlib.Path(folder) / "tokenizer.model").exists():
                return Tokenizer(kept)
        captions = []
        for source in self.sources:
            stride = max(len(source) // 20_000, 1)
            captions += source.captions(range(0, len(source), stride))
        return Tokenizer(train_tokenizer(captions, self.config.vocab_size))

    def _packed(self, sources, plan, dropout):
        text: dict[str, Any] = {"tokenizer": self.tokenizer}
        if self.captions:
            text = {"null_embeds": self.captions([""], 1)[0]}
            self.captions.free()
        return PackedBatches(
            sources,
            plan,
            latent_mean=np.asarray(self.vae.latents_mean),
            latent_std=np.asarray(self.vae.latents_std),
            temporal_compression=self.vae.temporal_compression,
            caption_dropout=dropout,
            seconds=self.config.conventions.seconds,
            pad_text=self.config.conventions.pad_text,
            host=self.host,
            hosts=self.hosts,
            timeout=self.config.data.timeout,
            **text,
        )

    def _objective(self, one_clip: bool) -> FlowObjective:
        width = self.captions.module.width if self.captions else 0
        return flow_objective(
            self.config,
            self.mesh,
            channels=self.example["latents"].shape[-1],
            text_width=width,
            vocab_size=0 if self.captions else self.tokenizer.vocab_size,
            one_clip=one_clip,
        )

    def _base(self) -> dict[str, Any]:
        """The networks that the adapters adapt."""
        folder = self.config.start_from
        if not folder:
            raise ValueError(
                "`lora.rank` asks for adapters, and `start_from` names no model that "
                "they adapt; give its `model` folder."
            )
        init = dataclasses.replace(self.objective, lora=None).init
        wanted = jax.eval_shape(init, jax.random.key(0), self.example)
        params = finished_parameters(folder, wanted, self.mesh, self.config.expert)
        return jax.device_put(params, parameter_shardings(params, self.mesh))

    def _identity(self) -> dict[str, Any]:
        objective = self.objective
        text = None
        if self.captions:
            # What made the cache, without reading the encoder for it.
            text = dict(self.sources[0].settings["text"])
            text.pop("length")
        adapters, expert = {}, self.config.expert
        if objective.lora:
            adapters = dataclasses.asdict(objective.lora)
            adapters |= {"base": fingerprint(self.config.start_from, expert)}
        return {
            **({"lora": adapters} if adapters else {}),
            **({"expert": expert} if expert != "dit" else {}),
            "objective": "flow",
            "seed": self.config.seed,
            "dit": module_fields(objective.dit),
            "text_encoder": text or module_fields(objective.text_encoder),
            "path": self.config.path.to_dict(),
            "patch_size": list(self.config.patch_size),
            "tokenizer": self.tokenizer.fingerprint,
            "autoencoder": self.vae_hash,
        }

    def _flops(self) -> float:
        rows, tokens = self.example["segment"].shape
        text = self.example["text_segment"].shape[1]
        return float(rows * self.hosts * self.objective.flops(tokens, text))

    def _check_samples(self):
        sample = self.config.sample
        check_solver(sample.solver)
        if sample.scored:
            oracle.check_frames(self._world().frames)
        self._pictures = None
        if sample.pictures:
            self._pictures = Generator.load(sample.pictures, self.mesh)
        generator = self._generator_of(None)
        if sample.draft:
            check_draft(generator)
        for request in self._requests(self.config.sample.prompts or [""]):
            generator.check(request)
            if self._pictures is not None:
                self._pictures.check(dataclasses.replace(request, frames=1))

    def _validation_batch(self):
        data = self.config.data
        if not data.validation:
            return None
        source = self.open(data.validation)
        plan = self._plan([source], 0)
        return self._packed([source], plan, 0.0)

    # The loop's questions

    def counts(self, batch):  # noqa: D102
        return {
            "clips": float(batch["valid"].sum()) * self.hosts,
            "tokens": float((batch["segment"] > 0).sum()) * self.hosts,
        }

    def validate(self, params):
        """The error at fixed times, with fixed clips and noise."""
        if self._validation is None:
            return {}
        times = jnp.asarray(self.config.validation_times, jnp.float32)
        batches = max(self.config.data.validation_clips // self.config.data.rows, 1)
        total = np.zeros(len(times))
        for i in range(batches):
            batch, _ = self._validation[i]
            rows = len(batch["segment"]) * self.hosts
            keys = jax.random.split(jax.random.key(i), rows)
            params = {**self.frozen, **params}
            total += to_host(self._measure(params, self.place(batch), keys, times))
        errors = dict(zip(self.config.validation_times, total / batches, strict=True))
        found = {f"validation/t={t:g}": float(e) for t, e in errors.items()}
        return found | {"validation/loss": float(np.mean(total / batches))}

    def _requests(self, prompts: Sequence[str]) -> list[Request]:
        sample = self.config.sample
        size = {name: sample[name] for name in ("frames", "height", "width", "fps")}
        return [Request(prompt, seed=i, **size) for i, prompt in enumerate(prompts)]

    def _clips(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """Clips of the prompts by the solver that ships, with seeds 0, 1, ..."""
        assert self._generator is not None
        sample = self.config.sample
        return self._generator(
            self._requests(prompts),
            draft=sample.draft,
            steps=sample.steps,
            solver=sample.solver,
            guidance_scale=sample.guidance_scale,
            rows=self.config.data.rows,
        )

    def _generator_of(self, params) -> Generator:
        sample, objective = self.config.sample, self.objective
        conventions = self.config.conventions.to_dict()
        conventions["clean_frames"] |= objective.first_frame > 0
        weights = {**self.frozen, **(params or {}), "vae": self.vae_params}
        text_encoder = objective.text_encoder
        if self.captions:
            text_encoder = self.captions.module
            weights["text_encoder"] = self.captions.params
        return Generator(
            dit=objective.dit,
            text_encoder=text_encoder,
            vae=self.vae,
            params=weights,
            tokenizer=self.tokenizer,
            path=objective.path,
            policy=objective.policy,
            patch_size=tuple(self.config.patch_size),
            text_length=self.config.data.text_length,
            defaults={k: v for k, v in sample.items() if k not in _OF_TRAINING},
            mesh=self.mesh,
            conventions=Conventions(**conventions),
            boundary=objective.boundary,
            pictures=self._pictures,
            text_release=self.captions.release if self.captions else "",
            together=False,
        )

    def show(self, params, metrics, step, folder):
        """Clips from the config's prompts, and the scores of clips of the world's."""
        prompts, scored = self.config.sample.prompts, self.config.sample.scored
        if not prompts and not scored:
            return
        if self._generator is None:
            self._generator = self._generator_of(params)
        if self.objective.lora:
            self._generator.adapters = {"dit": self._adapters(params)}
        else:
            self._generator.load_params(params)
        if prompts:
            videos = self._clips(prompts)
            if is_lead():
                self._write(videos, metrics, step, folder)
        if scored:
            found = self._scores(np.arange(scored))
            metrics.scalars(step, {f"oracle/{name}": x for name, x in found.items()})
            told = (f"{name} {found[name]:.2f}" for name in _TOLD)
            metrics.say(f"step {step}, {scored} clips scored: {', '.join(told)}")

    def _write(self, videos, metrics, step, folder):
        """Writes sample clips, and a sheet of them.

        Of a run that started from finished weights, with what those gave above each.
        """
        rows, captions = [], []
        for i, (video, prompt) in enumerate(
            zip(videos, self.config.sample.prompts, strict=True)
        ):
            before = folder / f"step_{0:07d}_{i}.mp4"
            if step and before.exists():
                frames, height, width, _ = video.shape
                size = {"frames": frames, "height": height, "width": width}
                fps = self.config.sample.fps
                rows.append(decode_clip(str(before), fps=fps, **size)["video"])
                captions += [prompt, f"after {step} steps"]
            else:
                captions.append(prompt)
            rows.append(video)
        sheet = contact_sheet(rows, captions)
        metrics.sheet(step, "samples", sheet)
        write_png(folder / f"step_{step:07d}.png", sheet)
        for i, video in enumerate(videos):
            name = f"step_{step:07d}_{i}.mp4"
            encode_clip(folder / name, video, self.config.sample.fps)

    def _world(self) -> World:
        sample = self.config.sample
        return World("val", 0, sample.frames, sample.height, sample.width, sample.fps)

    def _scores(self, ids: np.ndarray) -> dict[str, float]:
        """What the oracle says of clips of the first prompts of the world's val."""
        world = self._world()
        videos = self._clips(world.captions(ids))
        return oracle.means(
            oracle.score(np.stack(videos), world.scenes(ids), world.fps)
        )

    def _adapters(self, params) -> dict[str, Any]:
        lora = self.objective.lora
        assert lora is not None
        return lora.active(params["lora"], training=False)

    def save(self, params, folder):
        """Writes a finished model.

        Adapters, and a network of a released model, are written alone, as diffusers
        reads them.
        """
        params, start = to_host(params), self.config.start_from
        if not is_lead():
            return
        if self.objective.lora:
            write_lora(folder, self._adapters(params), wan.dit_rules())
        elif start and is_release(start):
            expert, parts = self.config.expert, read_release(start).parts
            for name in ("dit", "dit_low") if expert == "both" else ("dit",):
                like = parts[name if expert == "both" else expert]
                save_dit(folder / like.name, params[name], self.objective.dit, like)
        else:
            self._generator_of(params).save(folder)
