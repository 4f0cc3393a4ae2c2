"""Training the autoencoders: of pictures on clips of pixels, of sound on waveforms."""

import dataclasses
import pathlib
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
from jax.sharding import Mesh

from jvdit.config import Config
from jvdit.data.builders import ClipBatches
from jvdit.data.clips import BadClip, Source
from jvdit.data.plan import BucketPlan
from jvdit.data.sounds import SoundSource
from jvdit.data.sources import open_source
from jvdit.data.spectrum import spectrogram
from jvdit.evaluation.hearing import log_mel_distance, si_sdr
from jvdit.evaluation.reconstruction import psnr, ssim
from jvdit.machine.cluster import is_lead, to_host
from jvdit.machine.compilation import jit
from jvdit.models.audio_vae import AudioVAE
from jvdit.models.critics import PictureCritic, SoundCritic
from jvdit.models.video_vae import VideoVAE
from jvdit.tasks.task import Task
from jvdit.training.objectives.autoencoding import VAEObjective
from jvdit.training.objectives.critic import Critic
from jvdit.training.objectives.perceptual import read_features
from jvdit.training.objectives.waveform import AudioVAEObjective
from jvdit.weights.parameters import build, module_fields, save_weights

_SHOWN = 6  # pairs of a sheet


class AutoencoderTask(Task):
    """What training an autoencoder of any kind of data has in common.

    Attributes:
        module: class of the autoencoder.
        kind: its name as an objective.
        what: name of the data in a clip.
        objective_class: class of the objective.
        unit: what the setting counts that bounds a batch.
        critic_class: class of the critic's network.
    """

    objective: VAEObjective | AudioVAEObjective
    module: ClassVar[type]
    kind: ClassVar[str]
    what: ClassVar[str]
    objective_class: ClassVar[type]
    unit: ClassVar[str]
    critic_class: ClassVar[type]
    fresh = ("critic",)  # a finished model has none

    def __init__(self, config: Config, mesh: Mesh, workdir: pathlib.Path):
        self.vae = build(self.module, config.vae.to_dict())
        super().__init__(config, mesh, workdir)
        ways = mesh.shape["data"] * mesh.shape["fsdp"] * config.optim.accumulate
        self.plan = BucketPlan.of(
            self.sources,
            pixel_budget=config.data[f"{self.unit}_budget"],
            unit=self.unit,
            multiple=ways,
            weights=config.data.weights or None,
            seed=config.seed,
        )
        for size in self.plan.batches:
            self.check_size(*size)
        self.fingerprint = self.plan.fingerprint
        critic, loss = self._critic(), config.loss.to_dict()
        if folder := loss.pop("features", ""):
            self.frozen = {"features": read_features(folder)}
        self.objective = objective = self.objective_class(
            self.vae, critic=critic, **loss
        )
        idle = critic and dataclasses.replace(critic, heeded=False)
        self._early = dataclasses.replace(objective, critic=idle)
        fields = module_fields(self.vae)
        self.identity = {"objective": self.kind, "vae": fields, "seed": config.seed}
        if critic is not None:
            self.identity["critic"] = module_fields(critic.module)
        self.batch_builder = ClipBatches(
            self.sources, self.plan, channels=self.channels, **self.share
        )
        self.example, _ = self.batch_builder[0]
        clips = sum(map(len, self.sources))
        self.summary = f"{clips} clips, batches {self.plan.batches}"
        held, count = config.data.validation, config.data.validation_clips
        self._validation = _held_out(self.open(held), count) if held else []
        self._reconstruct = jit(objective.reconstruct)

    channels: int = 0

    def _critic(self) -> Critic | None:
        """The critic, if there is one, which gets an optimizer of its own."""
        settings = self.config.critic.to_dict()
        start, fields = settings.pop("start"), settings.pop("network")
        optim = settings.pop("optim")
        if start == 0:
            return None
        networks = {"critic": optim, **self.optim.networks}
        self.optim = dataclasses.replace(self.optim, networks=networks)
        return Critic(build(self.critic_class, fields), **settings)

    def objective_at(self, step: int) -> Any:
        """The objective after so many steps: before the start, without the critic."""
        begun = step + 1 >= self.config.critic.start
        return self.objective if begun else self._early

    def check_size(self, *size: int) -> None:
        """Raises a ValueError if the autoencoder doesn't take clips of a size."""

    @abstractmethod
    def measure(self, original: np.ndarray, decoded: np.ndarray) -> dict[str, float]:
        """How near a reconstruction comes to its original."""

    @abstractmethod
    def picture(self, clip: np.ndarray) -> np.ndarray:
        """A clip as a video to be looked at."""

    def counts(self, batch):  # noqa: D102
        return {"clips": float(batch["valid"].sum()) * self.hosts}

    def _reconstructed(self, params, count=None):
        """Held-out clips, and their reconstructions."""
        originals = [clip[self.what] for clip in self._validation[:count]]
        decoded = [to_host(self._reconstruct(params, v[None]))[0] for v in originals]
        return list(zip(originals, decoded, strict=True))

    def validate(self, params):
        """Means over held-out clips of how near reconstructions come to them."""
        found = [self.measure(*pair) for pair in self._reconstructed(params)]
        return {
            f"validation/{name}": float(np.nanmean([each[name] for each in found]))
            for name in (found[0] if found else ())
        }

    def show(self, params, metrics, step, folder):
        """Writes a contact sheet of held-out clips above their reconstructions."""
        pairs = self._reconstructed(params, _SHOWN)
        if not pairs:
            return
        films = [self.picture(clip) for pair in pairs for clip in pair]
        captions = []
        for pair in pairs:
            found = self.measure(*pair)
            told = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
            captions += ["original", told]
        metrics.sheet(step, "reconstructions", folder, films, captions)

    def save(self, params, folder):  # noqa: D102
        params = to_host(params["vae"])
        if is_lead():
            save_weights(folder / "vae", params, module_fields(self.vae))


class VAETask(AutoencoderTask):
    """Trains a video autoencoder on clips of pixels."""

    module, objective_class = VideoVAE, VAEObjective
    kind, what, unit = "video_vae", "video", "pixel"
    critic_class = PictureCritic
    networks: ClassVar = {"vae": VideoVAE, "critic": PictureCritic}

    def check_size(self, *size):  # noqa: D102
        self.vae.latent_shape(*size)

    def measure(self, original, decoded):
        """PSNR in dB, and SSIM."""
        return {
            "psnr": float(psnr(decoded, original)),
            "ssim": float(ssim(decoded, original)),
        }

    def picture(self, clip):  # noqa: D102
        return clip


class AudioVAETask(AutoencoderTask):
    """Trains an audio autoencoder on the sound of clips."""

    module, objective_class = AudioVAE, AudioVAEObjective
    kind, what, unit = "audio_vae", "audio", "sample"
    critic_class = SoundCritic
    networks: ClassVar = {"vae": AudioVAE, "critic": SoundCritic}

    @property
    def channels(self):  # noqa: D102
        return self.vae.channels

    def open(self, name: str) -> Source:
        """Opens the sounds of a data source."""
        rate = self.vae.sample_rate
        return SoundSource(open_source(name, audio_rate=rate), rate, self.vae.channels)

    def measure(self, original, decoded):
        """Scale-invariant signal-to-distortion ratio and log-mel distance, in dB."""
        return {
            "si_sdr": si_sdr(decoded, original),
            "log_mel": log_mel_distance(decoded, original, self.vae.sample_rate),
        }

    def picture(self, clip):  # noqa: D102
        return spectrogram(clip, self.vae.sample_rate)[None]


def _held_out(source: Source, count: int) -> list[dict[str, Any]]:
    clips = source.read(range(min(count, len(source))))
    return [clip for clip in clips if not isinstance(clip, BadClip)]
