"""Sample clips of a DiT training, and their scores on the procedural world."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jvdit.config import Config
from jvdit.data.clips import SIZE
from jvdit.data.media.reader import decode_clip
from jvdit.data.world import World
from jvdit.diffusion.solvers import check_solver
from jvdit.evaluation import oracle
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request
from jvdit.generation.results import GeneratedClip
from jvdit.machine.cluster import is_lead
from jvdit.training.metrics import Metrics
from jvdit.weights.bundle import Bundle

_TOLD = ("all", "count", "color", "shape", "size", "direction", "physics")


class Samples:
    """Generates clips of the config's prompts, and scores clips of the world's prompts.

    Args:
        config: the training's config.
        bundle: makes the model of the parameters of its trained networks, by name.
        mesh: the device mesh.

    Raises:
        ValueError: the model can't generate clips of the config's size, or they can't
            be scored.
    """

    def __init__(self, config: Config, bundle: Callable[[Any], Bundle], mesh: Mesh):
        self.bundle, self.mesh, self.sample = bundle, mesh, config.sample
        self.rows = config.data.rows
        self._generator: Generator | None = None
        check_solver(self.sample.solver)
        if self.sample.scored:
            oracle.check_frames(self._world().frames)
        generator = Generator(bundle({}), mesh)
        if self.sample.draft:
            generator.model.check_draft()
        for request in self._requests(self.sample.prompts or [""]):
            generator.check(request)
            if generator.model.pictures is not None:
                generator.painter.check(dataclasses.replace(request, frames=1))

    def show(
        self, params: Any, metrics: Metrics, step: int, folder: pathlib.Path
    ) -> None:
        """Generates clips, writes them and a contact sheet, and logs scores.

        Args:
            params: parameters to generate with, by network name.
            metrics: where the sheet and the scores are logged.
            step: training steps done.
            folder: where clips and the sheet are written.
        """
        prompts, scored = self.sample.prompts, self.sample.scored
        if not prompts and not scored:
            return
        bundle = self.bundle(params)
        if self._generator is None:
            self._generator = Generator(bundle, self.mesh, together=False)
        elif bundle.adapters:
            self._generator.model = bundle
        else:
            self._generator.load_params(params)
        if prompts:
            clips = self._clips(prompts)
            if is_lead():
                self._write(clips, metrics, step, folder)
        if scored:
            found = self._scores(np.arange(scored))
            metrics.scalars(step, {f"oracle/{name}": x for name, x in found.items()})
            told = (f"{name} {found[name]:.2f}" for name in _TOLD)
            metrics.say(f"step {step}, {scored} clips scored: {', '.join(told)}")

    def _requests(self, prompts: Sequence[str]) -> list[Request]:
        size = {name: self.sample[name] for name in (*SIZE, "fps")}
        return [Request(prompt, seed=i, **size) for i, prompt in enumerate(prompts)]

    def _clips(self, prompts: Sequence[str]) -> list[GeneratedClip]:
        """Generates clips of prompts as `config.sample` says, with seeds 0, 1, …."""
        assert self._generator is not None
        names = ("draft", "steps", "solver", "guidance_scale")
        names += ("sound_after", "sound_sync_scale")
        settings = {name: self.sample[name] for name in names}
        return self._generator(self._requests(prompts), rows=self.rows, **settings)

    def _write(self, clips: Any, metrics: Metrics, step: int, folder: pathlib.Path):
        """Writes sample clips, and a contact sheet of them.

        If the run started from finished weights, the sheet shows the clip of those
        weights above each.
        """
        rows, captions, sounds, fps = [], [], [], self.sample.fps
        for i, prompt in enumerate(self.sample.prompts):
            before = folder / f"step_{0:07d}_{i}.mp4"
            captions.append(prompt)
            if step and before.exists():
                size = dict(zip(SIZE, clips[i].video.shape, strict=False))
                rows.append(decode_clip(str(before), fps=fps, **size)["video"])
                sounds.append(None)
                captions.append(f"after {step} steps")
            rows.append(clips[i].video)
            sounds.append(clips[i].spectrogram)
        metrics.sheet(step, "samples", folder, rows, captions, sounds)
        for i, clip in enumerate(clips):
            file = folder / f"step_{step:07d}_{i}.mp4"
            clip.save(file, scale=clip.viewing_scale)

    def _world(self) -> World:
        sample = self.sample
        return World("val", 0, sample.frames, sample.height, sample.width, sample.fps)

    def _scores(self, ids: np.ndarray) -> dict[str, float]:
        """Mean oracle scores of clips for prompts of the world's val split."""
        world = self._world()
        clips = self._clips(world.captions(ids))
        videos, heard = np.stack([clip.video for clip in clips]), {}
        sounds = [clip.audio.mean(1) for clip in clips if clip.audio is not None]
        if sounds:
            heard = {"audio": np.stack(sounds), "audio_rate": clips[0].audio_rate}
        return oracle.means(oracle.score(videos, world.scenes(ids), world.fps, **heard))
