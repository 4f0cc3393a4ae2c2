"""What a training of a DiT shows of itself: sample clips, and their scores."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jvdit.data.media.reader import decode_clip
from jvdit.data.media.writer import encode_clip
from jvdit.data.sheets import contact_sheet, write_png
from jvdit.data.world import World
from jvdit.diffusion.solvers import check_solver
from jvdit.evaluation import oracle
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request
from jvdit.machine.cluster import is_lead
from jvdit.tasks.flow_model import FlowModel
from jvdit.training.metrics import Metrics

_TOLD = ("all", "count", "color", "shape", "size", "direction", "physics")


class Samples:
    """Clips from the config's prompts, and the scores of clips of the world's.

    Args:
        model: that is trained.
        mesh: of the devices.

    Raises:
        ValueError: the config's clips can't be, or not be scored.
    """

    def __init__(self, model: FlowModel, mesh: Mesh):
        self.model, self.mesh, self.sample = model, mesh, model.config.sample
        self._generator: Generator | None = None
        check_solver(self.sample.solver)
        if self.sample.scored:
            oracle.check_frames(self._world().frames)
        generator = Generator(model.bundle({}), mesh)
        if self.sample.draft:
            generator.model.check_draft()
        for request in self._requests(self.sample.prompts or [""]):
            generator.check(request)
            if model.pictures is not None:
                picture = dataclasses.replace(request, frames=1)
                generator.painter.check(picture)

    def show(
        self, params: Any, metrics: Metrics, step: int, folder: pathlib.Path
    ) -> None:
        """Generates with such parameters; writes clips and a sheet, logs scores."""
        prompts, scored = self.sample.prompts, self.sample.scored
        if not prompts and not scored:
            return
        bundle = self.model.bundle(params)
        if self._generator is None:
            self._generator = Generator(bundle, self.mesh, together=False)
        elif bundle.adapters:
            self._generator.model = bundle
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

    def _requests(self, prompts: Sequence[str]) -> list[Request]:
        size = {name: self.sample[name] for name in ("frames", "height", "width")}
        size["fps"] = self.sample.fps
        return [Request(prompt, seed=i, **size) for i, prompt in enumerate(prompts)]

    def _clips(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """Clips of the prompts by the solver that ships, with seeds 0, 1, ..."""
        assert self._generator is not None
        return self._generator(
            self._requests(prompts),
            draft=self.sample.draft,
            steps=self.sample.steps,
            solver=self.sample.solver,
            guidance_scale=self.sample.guidance_scale,
            rows=self.model.config.data.rows,
        )

    def _write(
        self,
        videos: Sequence[np.ndarray],
        metrics: Metrics,
        step: int,
        folder: pathlib.Path,
    ) -> None:
        """Writes sample clips, and a sheet of them.

        Of a run that started from finished weights, with what those gave above each.
        """
        rows, captions, fps = [], [], self.sample.fps
        for i, (video, prompt) in enumerate(
            zip(videos, self.sample.prompts, strict=True)
        ):
            before = folder / f"step_{0:07d}_{i}.mp4"
            if step and before.exists():
                frames, height, width, _ = video.shape
                size = {"frames": frames, "height": height, "width": width}
                rows.append(decode_clip(str(before), fps=fps, **size)["video"])
                captions += [prompt, f"after {step} steps"]
            else:
                captions.append(prompt)
            rows.append(video)
        sheet = contact_sheet(rows, captions)
        metrics.sheet(step, "samples", sheet)
        write_png(folder / f"step_{step:07d}.png", sheet)
        for i, video in enumerate(videos):
            encode_clip(folder / f"step_{step:07d}_{i}.mp4", video, fps)

    def _world(self) -> World:
        sample = self.sample
        return World("val", 0, sample.frames, sample.height, sample.width, sample.fps)

    def _scores(self, ids: np.ndarray) -> dict[str, float]:
        """What the oracle says of clips of the first prompts of the world's val."""
        world = self._world()
        videos = np.stack(self._clips(world.captions(ids)))
        return oracle.means(oracle.score(videos, world.scenes(ids), world.fps))
