"""The training loop.

A run that is killed at any moment and started again resumes from its newest checkpoint,
and ends with the same bits as one that was never stopped.
"""

import collections
import pathlib
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import msgspec
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from jvdit.config import Config
from jvdit.machine import cluster
from jvdit.machine.compilation import check_options
from jvdit.machine.files import said_if_full
from jvdit.machine.json_files import read_json, write_json
from jvdit.machine.lock import FolderLock
from jvdit.machine.stop import StopRequest
from jvdit.ranges import check_ranges
from jvdit.sharding import make_mesh, parameter_shardings
from jvdit.tasks import TASKS, Task
from jvdit.training.checkpoint import (
    CHECKPOINTS,
    Checkpoints,
    claim_workdir,
    owned,
    was_saved,
)
from jvdit.training.metrics import Metrics, Spent, Throughput, status_line
from jvdit.training.state import TrainState, new_state, state_shardings
from jvdit.training.step import jit_train_step
from jvdit.training.trace import Trace
from jvdit.weights.starting import finished_parameters

_LOOKED = "looked.json"  # holds the last step that has its validation and samples
PRECISIONS = ("default", "bfloat16", "float32")


def train(config: Config, workdir: str, stop: StopRequest | None = None) -> int:
    """Runs a training to its end, or until it is asked to stop.

    Args:
        config: from `jvdit.config`.
        workdir: folder of the run, created if needed; a run already there is resumed.
        stop: stop request to heed; None: SIGTERM and Ctrl-C, on the main thread.

    Returns:
        The number of steps done.

    Raises:
        ValueError: the config contradicts itself, the data or the workdir, or another
            run holds the workdir; raised before anything is compiled or written.
        FloatingPointError: `config.max_skipped` steps in a row weren't finite.
        OSError: files can't be written, for example because the disk is full.
        KeyboardInterrupt: it was asked to stop before there was anything to save.
    """
    if stop is None:
        with StopRequest() as stop:
            return train(config, workdir, stop)
    check_ranges(config.to_dict())
    check_options(config.compiler_options)
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
    task = TASKS[config.objective](config, mesh, pathlib.Path(workdir))
    task.check_rows(task.optim.accumulate)
    precision = jax.default_matmul_precision(config.matmul_precision)
    with jax.set_mesh(mesh), precision:
        loop = _Loop(config, pathlib.Path(workdir), mesh, task, stop)
        settings = {"identity": task.identity, "config": config.to_dict()}
        with said_if_full(workdir), cluster.held(workdir) as lock:
            claim_workdir(workdir, settings, task.networks)
            cluster.check_seen(pathlib.Path(workdir) / "config.json")
            return loop.run(lock)


class _Looked(msgspec.Struct, frozen=True):
    """The contents of `looked.json`."""

    step: int


class _Loop:
    def __init__(self, config, workdir, mesh: Mesh, task: Task, stop: StopRequest):
        self.config, self.workdir, self.mesh, self.task = config, workdir, mesh, task
        self.stop, self.key = stop, jax.random.key(config.seed)
        self.recent = collections.deque(maxlen=config.max_skipped)
        self.begin = partial(new_state, optimizer=task.optim.optimizer(config.steps))
        # Evaluating shapes already raises if the sizes of the network don't fit.
        self.shapes = jax.eval_shape(self._init, self.key, task.example)
        self.shardings = state_shardings(self.shapes, mesh)
        # A resumed run has its own weights; the task has read frozen ones.
        self.given, folder = {}, config.start_from
        named = {k: v for k, v in self.shapes.params.items() if k not in task.fresh}
        if folder and named and not was_saved(workdir / CHECKPOINTS):
            expert = config.get("expert", "dit")
            self.given = finished_parameters(folder, named, mesh, expert, self._initial)
        places = parameter_shardings(task.frozen, mesh)
        self.frozen = jax.device_put(task.frozen, places)
        self.places, self.objective = places, None

    def _init(self, key, batch) -> TrainState:
        return self.begin(self.task.objective.init(key, batch))

    def _use_objective(self, number: int):
        """Makes `self.step` the training step with the objective of a step's number."""
        objective = self.task.objective_at(number)
        if objective is self.objective:
            return
        self.objective = objective
        self.step = jit_train_step(
            objective,
            self.task.optim,
            self.config.steps,
            self.config.seed,
            mesh=self.mesh,
            shardings=self.shardings,
            frozen=self.places,
            options=self.config.compiler_options,
        )

    def run(self, lock: FolderLock) -> int:
        """Trains from the newest checkpoint or from step 0; returns the steps done."""
        self.lock = lock
        self.checkpoints = Checkpoints(self.workdir, self.config.keep_checkpoints)
        try:
            restored = self.checkpoints.restore(self.shapes, self.shardings)
            self.state, data = restored or (self._fresh(), {})
            self.start = int(self.state.step)
            self.data_note = self.task.compare_data(data)
            return self._train()
        finally:
            self.checkpoints.close()

    def _initial(self, network: str, paths: Sequence[str]) -> dict[str, Any]:
        """The initial parameters of a network at some paths, on the host."""

        def some(key: Any, batch: Any) -> dict[str, Any]:
            made = self.task.objective.init(key, batch)[network]
            made = flatten_dict(made, sep="/")
            return {path: made[path] for path in paths}

        return jax.tree.map(np.asarray, jax.jit(some)(self.key, self._blank))

    @property
    def _blank(self) -> dict[str, Any]:
        """A batch of zeros: only shapes matter, and rows differ from host to host."""
        return jax.tree.map(np.zeros_like, dict(self.task.example))

    def _fresh(self) -> TrainState:
        """The state at step 0: random weights, or those of `start_from`."""
        if not self.given:
            make = jax.jit(self._init, out_shardings=self.shardings)
            return make(self.key, self._blank)
        # Placed leaf by leaf: devices hold one array more than the state, at most.
        places = self.shardings.params
        leaves, tree = jax.tree.flatten(self.given)
        begun = {name: places[name] for name in self.given}
        self.given = {}
        for i, place in enumerate(jax.tree.leaves(begun)):
            leaves[i] = owned(jax.device_put(leaves[i], place))
        params = jax.tree.unflatten(tree, leaves)
        others = {name: x for name, x in places.items() if name not in begun}
        if others:

            def rest(key, batch):
                made = self.task.objective.init(key, batch)
                return {name: made[name] for name in others}

            params |= jax.jit(rest, out_shardings=others)(self.key, self._blank)
        begin = jax.jit(self.begin, donate_argnums=0, out_shardings=self.shardings)
        return begin(params)

    def _train(self) -> int:
        config, task = self.config, self.task
        trace = Trace(config.profile_steps, self.workdir / "profile")
        metrics = Metrics(
            self.workdir, config.steps, self.start, config.objective, config.logger
        )
        with metrics, task.batches(self.start) as batches, self.stop.saving():
            self._greet(metrics)
            self.spent = Spent(self.workdir)
            self._use_objective(self.start)
            self._compile_together()
            if self._missed_look():
                self._look(metrics, self.start)
            rates, pending, done = Throughput(task.flops), None, self.start
            for number in range(self.start, config.steps):
                if self.stop.look():
                    break
                self._use_objective(number)
                trace(number, self.state)
                waiting = time.perf_counter()
                batch = next(batches)
                idle = time.perf_counter() - waiting
                self.state, values = self.step(
                    self.state, task.place(batch), self.frozen
                )
                # The step before has finished by now, so reading it doesn't stall.
                self._account(metrics, pending, rates, batches)
                pending = (number, values, batch, idle)
                done = number + 1
                if _due(done, config.checkpoint_every):
                    self._save(done)
                self._look(metrics, done)
            trace.close(self.state)
            self._account(metrics, pending, rates, batches)
            if self.stop.asked and not done:
                return done
            self._save(done)
            self.checkpoints.wait()
            task.save(self.state.ema, self.workdir / "model")
            stopped = f"stopped at step {done}, saved; the same command goes on"
            finished = f"finished: {self.workdir}/model"
            told = stopped if self.stop.asked else finished
            metrics.say(f"{told}; {self.spent.total}")
        return done

    def _compile_together(self):
        """Compiles the step, and waits until every process has.

        CPU processes drop their connections after half a minute of waiting in a step.
        """
        if jax.process_count() > 1:
            batch, step = self.task.place(self.task.example), self.step
            compiled = step.lower(self.state, batch, self.frozen).compile()
            shapes = jax.tree.map(np.shape, batch)

            def run(state, batch, frozen):
                # Batches of clips of another size are compiled when they come.
                known = jax.tree.map(np.shape, batch) == shapes
                return (compiled if known else step)(state, batch, frozen)

            self.step = run
            cluster.wait_for_others("compiled")

    def _greet(self, metrics):
        parameters = sum(x.size for x in jax.tree.leaves(self.state.params))
        metrics.say(
            f"{self.config.objective}: {parameters / 1e6:.2f} M parameters on "
            f"{self.mesh.size} x {jax.devices()[0].device_kind}; {self.task.summary}"
        )
        if self.start:
            metrics.say(f"going on from step {self.start}")
        for line in filter(None, [*self.checkpoints.damaged, self.data_note]):
            metrics.say(f"WARNING: {line}")

    def _save(self, done):
        self.lock.check()
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
            # Each process reads other clips, and the others may die before they write.
            listed = cluster.own_file(self.workdir / "bad_clips.json")
            write_json(listed, [*self.recent])
            raise FloatingPointError(
                f"{skipped} steps in a row up to {number} had a loss, gradient or "
                f"update that isn't finite. Their clips are listed in {listed}, the "
                f"last of them {self.recent[-1][:8]}; lower `optim.lr`, or remove the "
                "clips."
            )
        if _due(number + 1, self.config.log_every):
            found = {name: float(value) for name, value in values.items()}
            speed, told = rates.rates(), {"bad_clips": batches.bad}
            speeds = {f"speed/{k}": v for k, v in speed.items()}
            for named in found, speeds, self.spent.scalars, told:
                metrics.scalars(number + 1, named)
            metrics.show(number + 1, status_line(found, speed, batches.bad))
        while batches.reports:
            step, clip, reason = batches.reports.popleft()
            told = f"step {step}: left out clip {clip}: {reason}"
            metrics.say(told, everywhere=True)

    def _looks(self, done):
        """Whether validation is due, and whether samples are."""
        every = self.config.evaluate_every, self.config.sample_every
        return [done == self.config.steps or _due(done, n) for n in every]

    def _missed_look(self):
        """Whether validation or samples of the starting weights are still missing."""
        file = self.workdir / _LOOKED

        def last():
            return read_json(file, "delete it", _Looked).step if file.exists() else -1

        begun = self.start or self.config.start_from
        due = begun and any(self._looks(self.start))
        return due and cluster.from_lead(last) < self.start

    def _look(self, metrics, done):
        """Runs validation and sampling with the averaged weights, if they are due.

        A stop request interrupts them; a resumed run makes up for what is missing.
        """
        validate, show = self._looks(done)
        if not (validate or show):
            return
        try:
            with self.stop.saving(False):
                if validate:
                    self._validate(metrics, done)
                if self.stop.look():
                    return
                if show:
                    self.task.save(self.state.ema, self.workdir / "model")
                    samples = self.workdir / "samples"
                    self.task.show(self.state.ema, metrics, done, samples)
                    metrics.flush()
        except KeyboardInterrupt:
            if not self.stop.asked:
                raise
            return
        if cluster.is_lead():
            write_json(self.workdir / _LOOKED, {"step": done})

    def _validate(self, metrics, done):
        found = self.task.validate(self.state.ema)
        metrics.scalars(done, found)
        if found:
            told = (f"{k.partition('/')[2]} {v:.4g}" for k, v in found.items())
            metrics.say(f"step {done}, held out: {', '.join(told)}")


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
