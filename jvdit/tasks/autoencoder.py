"""Training the video autoencoder on clips of pixels."""

import pathlib
from typing import Any, ClassVar

import numpy as np
from jax.sharding import Mesh

from jvdit.config import Config
from jvdit.data.builders import ClipBatches
from jvdit.data.clips import BadClip, Source
from jvdit.data.plan import BucketPlan
from jvdit.evaluation.reconstruction import psnr, ssim
from jvdit.machine.cluster import is_lead, to_host
from jvdit.machine.compilation import jit
from jvdit.models.video_vae import VideoVAE
from jvdit.tasks.task import Task
from jvdit.training.objectives.autoencoding import VAEObjective
from jvdit.weights.parameters import build, module_fields, save_weights

MEASURES = {"psnr": psnr, "ssim": ssim}


class VAETask(Task):
    """Trains a video autoencoder on clips of pixels."""

    objective: VAEObjective
    networks: ClassVar = {"vae": VideoVAE}

    def __init__(self, config: Config, mesh: Mesh, workdir: pathlib.Path):
        super().__init__(config, mesh, workdir)
        self.vae = build(VideoVAE, config.vae.to_dict())
        ways = mesh.shape["data"] * mesh.shape["fsdp"] * config.optim.accumulate
        self.plan = BucketPlan.of(
            self.sources,
            pixel_budget=config.data.pixel_budget,
            multiple=ways,
            weights=config.data.weights or None,
            seed=config.seed,
        )
        for size in self.plan.batches:
            self.vae.latent_shape(*size)
        self.fingerprint = self.plan.fingerprint
        self.objective = VAEObjective(self.vae, **config.loss)
        fields = module_fields(self.vae)
        self.identity = {"objective": "video_vae", "vae": fields, "seed": config.seed}
        self.batch_builder = ClipBatches(self.sources, self.plan, **self.share)
        self.example, _ = self.batch_builder[0]
        clips = sum(map(len, self.sources))
        self.summary = f"{clips} clips, batches {self.plan.batches}"
        held, count = config.data.validation, config.data.validation_clips
        self._validation = _held_out(self.open(held), count) if held else []
        self._reconstruct = jit(self.objective.reconstruct)

    def counts(self, batch):  # noqa: D102
        return {"clips": float(batch["valid"].sum()) * self.hosts}

    def _reconstructed(self, params):
        """Pairs of a held-out video and its reconstruction."""
        originals = [clip["video"] for clip in self._validation]
        decoded = [to_host(self._reconstruct(params, v[None]))[0] for v in originals]
        return list(zip(originals, decoded, strict=True))

    def validate(self, params):
        """Mean PSNR (dB) and SSIM over held-out videos and images."""
        pairs = self._reconstructed(params)
        return {
            f"validation/{name}": float(np.mean([measure(b, a) for a, b in pairs]))
            for name, measure in MEASURES.items()
            if pairs
        }

    def show(self, params, metrics, step, folder):
        """Writes a contact sheet of held-out videos above their reconstructions."""
        pairs = self._reconstructed(params)[:6]
        if not pairs:
            return
        videos = [video for pair in pairs for video in pair]
        captions = [
            text
            for a, b in pairs
            for text in ("original", f"{psnr(b, a):.1f} dB, SSIM {ssim(b, a):.3f}")
        ]
        metrics.sheet(step, "reconstructions", folder, videos, captions)

    def save(self, params, folder):  # noqa: D102
        params = to_host(params["vae"])
        if is_lead():
            save_weights(folder / "vae", params, module_fields(self.vae))


def _held_out(source: Source, count: int) -> list[dict[str, Any]]:
    clips = source.read(range(min(count, len(source))))
    return [clip for clip in clips if not isinstance(clip, BadClip)]
