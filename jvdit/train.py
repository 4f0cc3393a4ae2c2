"""Trains what a config describes: `python -m jvdit.train --config … --workdir …`.

Killed at any moment and started again with the same command, a run goes on from its
newest checkpoint and ends with the same bits as one that was never stopped.
"""

import collections
import pathlib
import signal
import sys
import threading
import time
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from jvdit import cluster
from jvdit.compilation import keep_compilations
from jvdit.config import Config
from jvdit.huge_pages import use_huge_pages
from jvdit.latents import encode
from jvdit.networks import finished_parameters
from jvdit.sharding import make_mesh, parameter_shardings
from jvdit.tasks import TASKS, Task
from jvdit.training.checkpoint import (
    CHECKPOINTS,
    Checkpoints,
    claim_workdir,
    write_json,
)
from jvdit.training.metrics import Metrics, Throughput
from jvdit.training.optim import Optim
from jvdit.training.restoring import owned, was_saved
from jvdit.training.state import TrainState, new_state, state_shardings
from jvdit.training.step import jit_train_step

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything of the run goes.")
_connect = cluster.define_flags()
_EXIT_STOPPED = flags.DEFINE_integer(
    "exit_stopped", 0, "Exit code if it was asked to stop, and did: for a launcher."
)
# What is the fault of settings, files or machines, and told in a line.
MISTAKES = (ValueError, OSError, FloatingPointError)
PRECISIONS = ("default", "bfloat16", "float32")


class StopRequest:
    """Within it SIGTERM and Ctrl-C are noticed, so that the loop can save and end.

    A second signal ends the process at once. Among several processes JAX itself takes
    SIGTERM, and they stop together.

    Attributes:
        asked: whether to stop.
    """

    def __init__(self):
        self.asked, self._alone = False, jax.process_count() == 1
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if self._alone and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number, frame):
        self.asked = True
        signal.signal(number, signal.SIG_DFL)

    def look(self, step: int) -> bool:
        """Whether to stop after this step; every process asks at every step."""
        if not self._alone:
            self.asked = cluster.all_asked_to_stop(step)
        return self.asked


def train(config: Config, workdir: str) -> int:
    """Runs a training to its end, or until it is asked to stop.

    Args:
        config: from `jvdit.config`.
        workdir: made if need be; a run that is there goes on.

    Returns:
        The steps done.

    Raises:
        ValueError: the config contradicts itself, the data or the workdir; raised
            before anything is compiled or written.
        FloatingPointError: `config.max_skipped` steps in a row weren't finite.
    """
    if config.matmul_precision not in PRECISIONS:
        raise ValueError(
            f"`matmul_precision` (={config.matmul_precision!r}) must be one of: "
            f"{', '.join(PRECISIONS)}."
        )
    if "://" in workdir:
        raise ValueError(
            f"`workdir` (={workdir}) must be a path that all hosts see; mount the "
            "bucket, as tools/launch.py does with --bucket."
        )
    mesh = make_mesh(config.mesh.to_dict())
    optim = Optim(**config.optim)
    task = TASKS[config.objective](config, mesh, pathlib.Path(workdir))
    task.check_rows(optim.accumulate)
    precision = jax.default_matmul_precision(config.matmul_precision)
    with StopRequest() as stop, jax.set_mesh(mesh), precision:
        loop = _Loop(config, pathlib.Path(workdir), mesh, task, optim, stop)
        settings = {"identity": task.identity, "config": config.to_dict()}
        claim_workdir(workdir, settings, task.networks)
        cluster.check_seen(pathlib.Path(workdir) / "config.json")
        return loop.run()


class _Loop:
    def __init__(
        self, config, workdir, mesh: Mesh, task: Task, optim: Optim, stop: StopRequest
    ):
        self.config, self.workdir, self.mesh, self.task = config, workdir, mesh, task
        self.stop = stop
        self.recent: collections.deque[Any] = collections.deque(
            maxlen=config.max_skipped
        )
        begin = partial(new_state, optimizer=optim.optimizer(config.steps))

        def init(key, batch):
            return begin(task.objective.init(key, batch))

        # Shapes alone already tell whether the sizes of the network fit together.
        self.init, self.begin, self.key = init, begin, jax.random.key(config.seed)
        self.shapes = jax.eval_shape(init, self.key, task.example)
        self.shardings = state_shardings(self.shapes, mesh)
        # A run that goes on has its weights; what is frozen was read by the task.
        self.given, folder = None, config.start_from
        if folder and not task.frozen and not was_saved(workdir / CHECKPOINTS):
            expert = config.get("expert", "dit")
            networks = self.shapes.params
            self.given = finished_parameters(folder, networks, mesh, expert)
        places = parameter_shardings(task.frozen, mesh)
        self.frozen = jax.device_put(task.frozen, places)
        self.step = jit_train_step(
            task.objective,
            optim,
            config.steps,
            config.seed,
            mesh=mesh,
            shardings=self.shardings,
            frozen=places,
            options=config.compiler_options,
        )

    def run(self) -> int:
        """Trains from the newest checkpoint, or the beginning; returns steps done."""
        self.checkpoints = Checkpoints(self.workdir, self.config.keep_checkpoints)
        try:
            restored = self.checkpoints.restore(self.shapes, self.shardings)
            self.state, data = restored or (self._fresh(), {})
            self.start = int(self.state.step)
            self.data_note = self.task.compare_data(data)
            return self._train()
        finally:
            self.checkpoints.close()

    def _fresh(self) -> TrainState:
        """The state of step 0: random, or with the weights of `start_from`."""
        if self.given is None:
            make = jax.jit(self.init, out_shardings=self.shardings)
            # Of an example only the shapes matter, and its rows are another host's too.
            blank = jax.tree.map(np.zeros_like, dict(self.task.example))
            return make(self.key, blank)
        # There is never more on a device than the state, and one array.
        leaves, tree = jax.tree.flatten(self.given)
        self.given = None
        for i, place in enumerate(jax.tree.leaves(self.shardings.params)):
            leaves[i] = owned(jax.device_put(leaves[i], place))
        params = jax.tree.unflatten(tree, leaves)
        begin = jax.jit(self.begin, donate_argnums=0, out_shardings=self.shardings)
        return begin(params)

    def _train(self) -> int:
        config, task = self.config, self.task
        metrics = Metrics(self.workdir, config.steps, self.start, config.objective)
        with metrics, task.batches(self.start) as batches:
            self._greet(metrics)
            self._compile_together()
            rates, pending, done = Throughput(task.flops), None, self.start
            for number in range(self.start, config.steps):
                waiting = time.perf_counter()
                batch = next(batches)
                idle = time.perf_counter() - waiting
                self.state, values = self.step(
                    self.state, task.place(batch), self.frozen
                )
                # The step before is finished by now: reading it stalls nothing.
                self._account(metrics, pending, rates, batches)
                pending = (number, values, batch, idle)
                done = number + 1
                stopping = self.stop.look(done)
                if stopping or _due(done, config.checkpoint_every):
                    self._save(done)
                self._look(metrics, done)
                if stopping:
                    break
            self._account(metrics, pending, rates, batches)
            self._save(done)
            self.checkpoints.wait()
            task.save(self.state.ema, self.workdir / "model")
            if self.stop.asked:
                metrics.say(f"stopped at step {done}, saved; the same command goes on")
            else:
                metrics.say(f"finished: {self.workdir}/model")
        return done

    def _compile_together(self):
        """Lets no process begin to talk while another is still compiling.

        Between processors, connections are given up after half a minute.
        """
        if jax.process_count() > 1:
            batch = self.task.place(self.task.example)
            step = self.step.lower(self.state, batch, self.frozen)
            self.step = step.compile()
            cluster.wait_for_others("compiled")

    def _greet(self, metrics):
        parameters = sum(x.size for x in jax.tree.leaves(self.state.params))
        metrics.say(
            f"{self.config.objective}: {parameters / 1e6:.2f} M parameters on "
            f"{self.mesh.size} x {jax.devices()[0].device_kind}; {self.task.summary}"
        )
        if self.start:
            metrics.say(f"going on from step {self.start}")
        for line in self.checkpoints.damaged:
            metrics.say(f"WARNING: {line}")
        if self.data_note:
            metrics.say(f"WARNING: {self.data_note}")

    def _save(self, done):
        data = {"step": done, "fingerprint": self.task.fingerprint}
        self.checkpoints.save(done, self.state, data)

    def _account(self, metrics, pending, rates, batches):
        if pending is None:
            return
        number, values, batch, idle = pending
        skipped = int(values["skipped_in_a_row"])
        rates.add(idle, **self.task.counts(batch))
        self.recent.append(self.task.names(batch))
        if skipped >= self.config.max_skipped:
            if cluster.is_lead():
                write_json(self.workdir / "bad_clips.json", [*self.recent])
            raise FloatingPointError(
                f"{skipped} steps in a row up to {number} had a loss or gradient that "
                "isn't finite. Their clips are listed in "
                f"{self.workdir}/bad_clips.json, the last of them "
                f"{self.recent[-1][:8]}; lower `optim.lr`, or remove the clips."
            )
        if _due(number + 1, self.config.log_every):
            found = {name: float(value) for name, value in values.items()}
            speed = rates.rates()
            metrics.scalars(number + 1, found)
            metrics.scalars(number + 1, {f"speed/{k}": v for k, v in speed.items()})
            metrics.scalars(number + 1, {"bad_clips": batches.bad})
            metrics.show(number + 1, _status(found, speed, batches.bad))
        while batches.reports:
            step, clip, reason = batches.reports.popleft()
            metrics.say(f"step {step}: left out clip {clip}: {reason}")

    def _look(self, metrics, done):
        """Validation and samples, from the average, at their intervals."""
        ema, last = self.state.ema, done == self.config.steps
        if last or _due(done, self.config.evaluate_every):
            found = self.task.validate(ema)
            metrics.scalars(done, found)
            if found:
                told = (f"{k.partition('/')[2]} {v:.4g}" for k, v in found.items())
                metrics.say(f"step {done}, held out: {', '.join(told)}")
        if last or _due(done, self.config.sample_every):
            self.task.save(ema, self.workdir / "model")
            self.task.show(ema, metrics, done, self.workdir / "samples")
            metrics.flush()


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _status(values: dict[str, float], speed: dict[str, float], bad: int) -> str:
    parts = [f"loss {values['loss']:.4f}"]
    if "psnr" in values:
        parts.append(f"psnr {values['psnr']:.1f} dB")
    parts += [
        f"{speed[name]:.3g} {name.removesuffix('_per_s')}/s"
        for name in ("steps_per_s", "clips_per_s", "tokens_per_s")
        if name in speed
    ]
    if "mfu" in speed:
        parts.append(f"MFU {speed['mfu']:.0%}")
    parts.append(f"idle {speed['idle']:.0%}")
    if values["skipped"]:
        parts.append(f"skipped {values['skipped']:.0f}")
    if bad:
        parts.append(f"bad clips {bad}")
    return " ".join(parts)


def run(config: Config, workdir: str) -> bool:
    """Runs a config, stage after stage if it has several.

    Returns:
        Whether it came to its end; False: it was asked to stop.
    """
    if "stages" not in config:
        return train(config, workdir) >= config.steps
    for name in config.order:
        stage = config.stages[name].copy_and_resolve_references()
        folder = str(pathlib.Path(workdir) / name)
        with stage.unlocked():
            _fill_workdir(stage, workdir)
        if stage.objective == "encode":
            settings = {k: v for k, v in stage.items() if k != "objective"}
            encode(out=folder, **settings)
        elif train(stage, folder) < stage.steps:
            return False
    return True


def _fill_workdir(config: Config, workdir: str) -> None:
    """Replaces {workdir} in the strings of a stage."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            _fill_workdir(value, workdir)
        elif isinstance(value, str):
            config[name] = value.replace("{workdir}", workdir)
        elif isinstance(value, tuple) and value and isinstance(value[0], str):
            config[name] = tuple(v.replace("{workdir}", workdir) for v in value)


def main(argv: list[str]) -> None:
    """Parses, runs, and turns mistakes of the user into one line."""
    if len(argv) > 1:
        sys.exit(f"unexpected argument {argv[1]!r}; settings are --config.NAME=VALUE")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        _connect()
        keep_compilations(WORKDIR.value)
        if jax.default_backend() == "tpu":
            cluster.heed_notices()
        finished = run(CONFIG.value, WORKDIR.value)
    except MISTAKES as error:
        if flags.FLAGS["verbosity"].present:
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # before the first step, or while encoding
        print("stopped; the same command goes on")
        finished = False
    if not finished:
        sys.exit(_EXIT_STOPPED.value)


if __name__ == "__main__":
    use_huge_pages()
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
