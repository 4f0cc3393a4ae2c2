"""Trains a DiT on cached latents: with its own text encoder, or on cached states."""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jvdit.config import Config
from jvdit.data.conditions import CONDITIONS
from jvdit.data.conditions.giving import given_sources, marking
from jvdit.data.items import Statistics
from jvdit.data.latent_source import LatentSource
from jvdit.data.packed_batches import PackedBatches
from jvdit.data.patches import grid_frames
from jvdit.data.plan import PackPlan
from jvdit.data.sources import open_source, origin
from jvdit.data.tokenizer import Tokenizer, train_tokenizer
from jvdit.diffusion.noise_path import NoisePath
from jvdit.machine.cluster import is_lead, to_host
from jvdit.machine.compilation import jit
from jvdit.models.backbones import MODELS
from jvdit.models.text_encoder import TextEncoder
from jvdit.sharding import parameter_shardings
from jvdit.tasks.caches import (
    cached_audio,
    cached_autoencoder,
    cached_captions,
)
from jvdit.tasks.flow_objective import flow_objective, given_shares
from jvdit.tasks.samples import Samples
from jvdit.tasks.task import Task
from jvdit.training.objectives.denoising import FlowObjective
from jvdit.weights import wan
from jvdit.weights.adapters import write_lora
from jvdit.weights.bundle import Bundle, conditions_of, save_bundle, sources_of
from jvdit.weights.folders import save_dit
from jvdit.weights.opening import open_bundle
from jvdit.weights.parameters import Network, module_fields, weights_hash
from jvdit.weights.release import is_release, read_release
from jvdit.weights.starting import fingerprint, finished_parameters

# Fields of the config's `sample` that aren't defaults of the finished model.
_OF_TRAINING = ("prompts", "scored", "pictures")


class FlowTask(Task):
    """Trains a DiT, and optionally a text encoder, on cached latents."""

    objective: FlowObjective
    networks: ClassVar = {"text_encoder": TextEncoder, "path": NoisePath} | {
        name: family.module for name, family in MODELS.items()
    }
    sources: list[LatentSource]  # type: ignore[assignment]
    batch_builder: PackedBatches  # type: ignore[assignment]

    def __init__(self, config: Config, mesh: Mesh, workdir: pathlib.Path):
        super().__init__(config, mesh, workdir)
        self.channels = _channels(given_shares(config))
        _check_channels(self.channels, config.start_from)
        data = config.data
        self.vae, self.vae_hash = cached_autoencoder(config, self.sources)
        self.audio_vae = None
        if data.sound_budget:
            self.audio_vae = cached_audio(config, self.sources)
        self.captions = cached_captions(config, self.sources)
        self.tokenizer = self.captions.tokenizer if self.captions else self._tokenizer()
        drawn, weights = given_sources(
            self.sources,
            data.weights or None,
            given_shares(config),
            tuple(config.patch_size),
        )
        self.plan = self._plan(drawn, config.seed, weights)
        self.fingerprint = self.plan.fingerprint
        self.batch_builder = self._packed(
            drawn, self.plan, data.caption_dropout, marking(given_shares(config))
        )
        self.example, _ = self.batch_builder[0]
        held = [self.open(data.validation)] if data.validation else []
        lengths = [x.index["frames"] for x in (*self.sources, *held)]
        frames = np.concatenate(lengths) // config.patch_size[0]
        # What is given beside some clips would make their rows longer than a grid.
        alike = bool(np.ptp(frames) == 0) and len(drawn) == len(self.sources)
        self.objective = self._objective(alike, int(frames.max()))
        if self.objective.lora:
            self.frozen, self.fresh = self._base(), ("lora",)
        self.identity = self._identity()
        clips = sum(map(len, self.sources))
        self.summary = f"{clips} clips, {self.plan.padding:.1%} padding"
        rows, tokens = self.example["segment"].shape
        text = self.example["text_segment"].shape[1]
        each = self.objective.flops(tokens, text, round(frames.mean()))
        self.flops = float(rows * self.hosts * each)
        drawn = config.sample.pictures
        self.pictures = open_bundle(drawn) if drawn else None
        self.samples = Samples(config, self.bundle, mesh)
        self._validation = None
        if held:
            self._validation = self._packed(held, self._plan(held, 0))
        self._measure = jit(self.objective.validate)

    # Building

    def _objective(self, alike: bool, longest: int) -> FlowObjective:
        """The objective, by the sizes that the data set.

        Args:
            alike: all clips have as many frames, and nothing is given beside any.
            longest: frames of the longest clip, in tokens.
        """
        config, sound = self.config, self.audio_vae
        one_clip = config.data.max_clips == 1 and self.plan.padding == 0
        one_clip = one_clip and not config.data.sound_budget
        grid = one_clip and alike
        return flow_objective(
            config,
            self.mesh,
            channels=self.vae.module.latent_channels * math.prod(config.patch_size),
            cond_channels=self.batch_builder.cond_channels,
            text_width=self.captions.module.width if self.captions else 0,
            vocab_size=0 if self.captions else self.tokenizer.vocab_size,
            one_clip=one_clip,
            sound_channels=sound.module.latent_channels if sound else 0,
            frames=grid_frames(self.example["position"]) if grid else 0,
            longest=longest,
        )

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
            sound_budget=data.sound_budget,
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
        for folder in (str(self.workdir / "model"), self.config.start_from):
            kept = pathlib.Path(folder) / "tokenizer.model"
            if folder and kept.exists():
                return Tokenizer(kept)
        captions = []
        for source in self.sources:
            stride = max(len(source) // 20_000, 1)
            captions += source.captions(range(0, len(source), stride))
        return Tokenizer(train_tokenizer(captions, self.config.vocab_size))

    def _packed(self, sources, plan, dropout=0.0, given=None):
        text: dict[str, Any] = {"tokenizer": self.tokenizer}
        if self.captions:
            text = {"null_embeds": self.captions.null}
            self.captions.free()
        vae = self.vae.module
        return PackedBatches(
            sources,
            plan,
            channels=tuple(given_shares(self.config)),
            latents=Statistics.of(vae),
            sounds=Statistics.of(self.audio_vae.module) if self.audio_vae else None,
            temporal_compression=vae.temporal_compression,
            given=given or {},
            caption_dropout=dropout,
            seconds=self.config.conventions.seconds,
            pad_text=self.config.conventions.pad_text,
            **self.share,
            **text,
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
        identity = {
            "objective": "flow",
            "seed": self.config.seed,
            "dit": module_fields(objective.dit),
            "text_encoder": text or module_fields(objective.text_encoder),
            "path": self.config.path.to_dict(),
            "patch_size": list(self.config.patch_size),
            "tokenizer": self.tokenizer.fingerprint,
            "autoencoder": self.vae_hash,
        }
        if self.audio_vae:
            identity["audio_vae"] = weights_hash(self.audio_vae.params)
        # Settings that came later count where they aren't what they were before.
        for name in ("expert", "backbone"):
            if self.config[name] != "dit":
                identity[name] = self.config[name]
        if self.channels not in ([], ["edges"]):
            identity["channels"] = self.channels
        if objective.lora:
            base = fingerprint(self.config.start_from, self.config.expert)
            identity["lora"] = dataclasses.asdict(objective.lora) | {"base": base}
        return identity

    def bundle(self, params: Mapping[str, Any]) -> Bundle:
        """The model with given parameters of the trained networks, by network name."""
        objective, config = self.objective, self.config
        trees = {**self.frozen, **params}
        encoder = Network(objective.text_encoder, trees.get("text_encoder"))
        networks = {
            name: Network(objective.dit, trees.get(name))
            for name in ("dit", "dit_low")[: 2 if objective.boundary else 1]
        }
        networks["text_encoder"] = self.captions.network if self.captions else encoder
        if self.audio_vae:
            networks["audio_vae"] = self.audio_vae
        return Bundle(
            networks={**networks, "vae": self.vae},
            tokenizer=self.tokenizer,
            path=objective.path,
            policy=objective.policy,
            patch_size=tuple(config.patch_size),
            text_length=config.data.text_length,
            conditions=objective.conditions,
            **config.conventions.to_dict(),
            boundary=objective.boundary,
            defaults={k: v for k, v in config.sample.items() if k not in _OF_TRAINING},
            adapters=self._adapters(params),
            text_release=self.captions.release if self.captions else "",
            sources=self._trained_on(),
            pictures=self.pictures,
        )

    def _trained_on(self) -> tuple[str, ...]:
        start = self.config.start_from
        before = sources_of(start) if start and not is_release(start) else ()
        return tuple(dict.fromkeys((*before, *map(origin, self.config.data.sources))))

    def _adapters(self, params: Mapping[str, Any]) -> dict[str, Any]:
        lora = self.objective.lora
        if lora is None or "lora" not in params:
            return {}
        return {"dit": lora.active(params["lora"], training=False)}

    # What the training loop calls

    def counts(self, batch):  # noqa: D102
        counted = {"clips": batch["valid"], "tokens": batch["segment"] > 0}
        return {name: float(x.sum()) * self.hosts for name, x in counted.items()}

    def validate(self, params):
        """The squared error at fixed timesteps, on fixed held-out clips and noise."""
        if self._validation is None:
            return {}
        times = jnp.asarray(self.config.validation_times, jnp.float32)
        batches = max(self.config.data.validation_clips // self.config.data.rows, 1)
        total: Any = 0.0
        params = {**self.frozen, **params}
        for i in range(batches):
            batch, _ = self._validation[i]
            rows = len(batch["segment"]) * self.hosts
            keys = jax.random.split(jax.random.key(i), rows)
            total += to_host(self._measure(params, self.place(batch), keys, times))
        errors = total / batches
        found = {"validation/loss": float(np.mean(errors[:, 0]))}
        if self.audio_vae:
            found["validation/sound_loss"] = float(np.mean(errors[:, 1]))
        for t, error in zip(self.config.validation_times, errors, strict=True):
            for name, value in zip(("", "sound_"), error, strict=False):
                found[f"validation/{name}t={t:g}"] = float(value)
        return found

    def show(self, params, metrics, step, folder):  # noqa: D102
        self.samples.show(params, metrics, step, folder)

    def save(self, params, folder):
        """Writes the finished model; only process 0 writes, but every one must call.

        LoRA adapters, and a finetuned network of a released model, are written by
        themselves in diffusers' format; otherwise, as with sound, the folder holds the
        whole model.
        """
        params, config = to_host(params), self.config
        start, dit = config.start_from, self.objective.dit
        if not is_lead():
            return
        if self.objective.lora:
            write_lora(folder, self._adapters(params)["dit"], wan.dit_rules())
        elif start and is_release(start) and not self.audio_vae:
            expert, parts = config.expert, read_release(start).parts
            for name in ("dit", "dit_low") if expert == "both" else ("dit",):
                like = parts[name if expert == "both" else expert]
                save_dit(folder / like.name, params[name], dit, like)
        else:
            save_bundle(folder, self.bundle(params))


def _channels(conditions: Iterable[str]) -> list[str]:
    """Those of the conditions that are given by channels beside the noise, in order."""
    return [x for x in CONDITIONS if x in conditions and CONDITIONS[x].channels]


def _check_channels(channels: Sequence[str], start: str) -> None:
    """Raises a ValueError if a model to start from has learned other channels."""
    learned = _channels(conditions_of(start)) if start and not is_release(start) else []
    if learned and channels and learned != channels:
        raise ValueError(
            f"{start} takes {', '.join(learned)} by channels beside the noise, and "
            f"`given` asks for {', '.join(channels)}, which would mean other things "
            "there: give the same ones, or start from a network without any."
        )
