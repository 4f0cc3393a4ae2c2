"""Trains a DiT on cached latents: with its own text encoder, or on cached states."""

import dataclasses
import pathlib
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jvdit.config import Config
from jvdit.data.pipeline import PackedBatches
from jvdit.data.plan import PackPlan
from jvdit.data.sources import LatentSource, open_source
from jvdit.data.tokenizer import Tokenizer, train_tokenizer
from jvdit.diffusion.noise_path import NoisePath
from jvdit.machine.cluster import to_host
from jvdit.machine.compilation import jit
from jvdit.models.backbones import MODELS
from jvdit.models.text_encoder import TextEncoder
from jvdit.sharding import parameter_shardings
from jvdit.tasks.caches import cached_autoencoder, cached_captions
from jvdit.tasks.flow_model import FlowModel
from jvdit.tasks.flow_objective import flow_objective
from jvdit.tasks.samples import Samples
from jvdit.tasks.task import Task
from jvdit.training.objectives.denoising import FlowObjective
from jvdit.weights.opening import open_bundle
from jvdit.weights.parameters import module_fields
from jvdit.weights.starting import fingerprint, finished_parameters


class FlowTask(Task):
    """Trains a DiT, and optionally a text encoder, on cached latents."""

    objective: FlowObjective
    networks: ClassVar = {"text_encoder": TextEncoder, "path": NoisePath} | {
        name: family.module for name, family in MODELS.items()
    }
    sources: list[LatentSource]  # type: ignore[assignment]

    def __init__(self, config: Config, mesh: Mesh, workdir: pathlib.Path):
        super().__init__(config, mesh, workdir)
        data = config.data
        self.vae, self.vae_hash = cached_autoencoder(config, self.sources)
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
        drawn = config.sample.pictures
        self.model = FlowModel(
            config,
            self.objective,
            self.vae,
            self.captions,
            self.tokenizer,
            self.frozen,
            open_bundle(drawn) if drawn else None,
        )
        self.samples = Samples(self.model, mesh)
        self._validation = self._validation_batch()
        self._measure = jit(self.objective.validate)

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
        # A resumed run, and one that starts from another, keep the same token ids.
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
            latent_mean=np.asarray(self.vae.module.latents_mean),
            latent_std=np.asarray(self.vae.module.latents_std),
            temporal_compression=self.vae.module.temporal_compression,
            conditions=("first_frame",) if self.config.first_frame else (),
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
        """Reads the frozen networks that the LoRA adapters adapt."""
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
            # The cache's settings identify the encoder, which needn't be read.
            text = dict(self.sources[0].settings["text"])
            text.pop("length")
        adapters, expert, backbone = {}, self.config.expert, self.config.backbone
        if objective.lora:
            adapters = dataclasses.asdict(objective.lora)
            adapters |= {"base": fingerprint(self.config.start_from, expert)}
        return {
            **({"lora": adapters} if adapters else {}),
            **({"expert": expert} if expert != "dit" else {}),
            **({"backbone": backbone} if backbone != "dit" else {}),
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

    def _validation_batch(self):
        data = self.config.data
        if not data.validation:
            return None
        source = self.open(data.validation)
        plan = self._plan([source], 0)
        return self._packed([source], plan, 0.0)

    # What the training loop calls

    def counts(self, batch):  # noqa: D102
        return {
            "clips": float(batch["valid"].sum()) * self.hosts,
            "tokens": float((batch["segment"] > 0).sum()) * self.hosts,
        }

    def validate(self, params):
        """The squared error at fixed timesteps, on fixed held-out clips and noise."""
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

    def show(self, params, metrics, step, folder):  # noqa: D102
        self.samples.show(params, metrics, step, folder)

    def save(self, params, folder):  # noqa: D102
        self.model.save(params, folder)
