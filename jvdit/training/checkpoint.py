"""Checkpoints of a training, by orbax.

A workdir holds `config.json`, `checkpoints/STEP/` (state, and where the data stands)
and, for inference, `model/` (`weights.py`).
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import threading
from collections.abc import Mapping
from typing import Any

import jax
import msgspec
import orbax.checkpoint as ocp

from jvdit.machine import cluster
from jvdit.machine.json_files import differences, parse_json, read_json, write_json
from jvdit.training.digests import write_digests
from jvdit.training.restoring import owned, restore_newest
from jvdit.weights.parameters import json_field

_LARGE_PART = 1 << 20  # bytes of an array that one of several devices writes
CHECKPOINTS = "checkpoints"  # folder in a workdir
PathLike = str | os.PathLike[str]


class _Optim(msgspec.Struct, frozen=True):
    """What of an optimizer's settings its state depends on."""

    name: str | None = None


class _Config(msgspec.Struct, frozen=True):
    """What of a run's settings its checkpoints depend on."""

    optim: _Optim = _Optim()


class _Run(msgspec.Struct, frozen=True):
    """What `config.json` of a workdir holds."""

    identity: dict[str, Any] = {}
    config: _Config = _Config()


class Checkpoints:
    """Saves and restores training states in a workdir, asynchronously.

    Args:
        workdir: the folder; `checkpoints/` is made inside.
        keep: how many to keep, the newest.

    Attributes:
        damaged: a line for each checkpoint that `restore` found damaged and kept aside.
    """

    def __init__(self, workdir: PathLike, keep: int = 3):
        self._folder = pathlib.Path(workdir).absolute() / CHECKPOINTS
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=True
        )
        handlers = {"state": _state_handler(), "data": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(
            self._folder, options=options, item_handlers=handlers
        )
        self._listing: threading.Thread | None = None
        self.damaged: list[str] = []

    @property
    def latest(self) -> int | None:
        """The newest finished step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: Mapping[str, Any]) -> None:
        """Starts saving; returns as soon as the state is copied to the host.

        Args:
            step: under which to save; saving a step twice does nothing.
            state: a `TrainState`.
            data: where the data stands, as JSON values.
        """
        if step == self.latest:
            return
        self._await_listing()
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state), data=ocp.args.JsonSave(dict(data))
            ),
        )
        # Killed before it is done, it leaves a checkpoint as those of before were.
        self._listing = threading.Thread(target=self._list, args=(step,), daemon=True)
        self._listing.start()

    def _list(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception:  # told in the main thread, which waits for it, too
            return
        folder = self._folder / str(step)
        with contextlib.suppress(OSError, ValueError):  # a full disk, an absent share
            cluster.await_seen(folder.exists, f"checkpoint {step}")
            write_digests(folder, jax.process_index(), jax.process_count())

    def _await_listing(self) -> None:
        if self._listing is not None:
            self._listing.join()

    def restore(self, shapes: Any, shardings: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest whole state, placed by `shardings`, and where its data stood.

        Damaged checkpoints that are newer are renamed to `STEP.damaged`. All processes
        have to call it, and go on from the same step: the first one's.

        Args:
            shapes: of the state, from `jax.eval_shape`.
            shardings: of each array; another mesh than at saving is fine.

        Returns:
            None: nothing was saved yet.

        Raises:
            ValueError: all checkpoints are damaged, or the newest holds other arrays.
        """
        abstract = jax.tree.map(
            lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
            shapes,
            shardings,
        )
        found, self.damaged = restore_newest(self._manager, self._folder, abstract)
        if found is None:
            return None
        data = dict(found["data"])
        # The state is donated. There is never more than it, and a copy of one array.
        leaves, tree = jax.tree.flatten(found["state"])
        del found
        for i in range(len(leaves)):
            leaves[i] = owned(leaves[i])
        return jax.tree.unflatten(tree, leaves), data

    def wait(self) -> None:
        """Returns when everything is on disk; raises what went wrong on the way."""
        self._manager.wait_until_finished()
        self._await_listing()

    def close(self) -> None:
        """Waits, and ends the background threads."""
        self._await_listing()
        self._manager.close()


def _state_handler() -> ocp.PyTreeCheckpointHandler:
    """Writes arrays; of those on several devices each writes a part if it is large.

    Left to itself, orbax cuts every bias into as many files as there are devices.
    """
    arrays = ocp.type_handlers.ArrayHandler(
        min_slice_bytes_for_replica_parallel=_LARGE_PART
    )
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def claim_workdir(
    workdir: PathLike,
    config: Mapping[str, Any],
    modules: Mapping[str, type] | None = None,
) -> None:
    """Makes a workdir this run's own, or checks that it already is.

    Everything under `config["identity"]` must agree with what the folder was made for;
    the rest (steps, intervals, device counts) may change between restarts.

    Args:
        workdir: the folder.
        config: of the run.
        modules: the classes of the networks in the identity, by name. A field that a
            class got only after the folder was made is at its default there.

    Raises:
        ValueError: the folder holds another model; the message says what differs. Or
            it can't hold checkpoints.
    """
    path = pathlib.Path(workdir) / "config.json"
    if path.exists():
        begun = "delete it if this is the command that the run was begun with"
        held = read_json(path, begun, _Run)
        ours = parse_json(json.dumps(config), "this run's config", _Run)
        theirs, known = held.identity, ours.identity
        for name, module in (modules or {}).items():
            if isinstance(theirs.get(name), dict):
                later = json.loads(json.dumps(_defaults(module)))
                later = {key: later[key] for key in later.keys() & known[name].keys()}
                theirs[name] = later | theirs[name]
        differing = differences(theirs, known)
        if differing:
            raise ValueError(
                f"workdir {workdir} holds another model: {'; '.join(differing)}. "
                "Choose another --workdir, or restore those settings."
            )
        _check_optimizer(path.parent, held.config.optim.name, ours.config.optim.name)
    if jax.process_index() == 0:
        _check_renaming(path.parent)
        write_json(path, config)


def _check_optimizer(
    folder: pathlib.Path, theirs: str | None, ours: str | None
) -> None:
    """Whether the optimizer is the one whose state the checkpoints hold.

    Raises:
        ValueError: it isn't.
    """
    begun = any((folder / "checkpoints").glob("[0-9]*"))
    if begun and theirs != ours and None not in (theirs, ours):
        raise ValueError(
            f"workdir {folder} was begun with `optim.name` {theirs!r}, whose moments "
            f"{ours!r} can't go on with; restore it, or begin another run, with "
            f"--config.start_from={folder}/model in another --workdir."
        )


def _check_renaming(folder: pathlib.Path) -> None:
    """Whether folders can be renamed, by which a checkpoint is there as a whole.

    Raises:
        ValueError: they can't.
    """
    before, after = (folder / f"renamed.{os.getpid()}.{i}.tmp" for i in range(2))
    (before / "folder").mkdir(parents=True)
    (before / "folder" / "file").touch()
    try:
        before.rename(after)
    except OSError as error:
        raise ValueError(
            f"folders in workdir {folder} can't be renamed ({error}), and so no "
            "checkpoint be finished; a mounted bucket must have a hierarchical "
            "namespace, see tools/launch.py."
        ) from error
    finally:
        for probe in (before, after):
            shutil.rmtree(probe, ignore_errors=True)


def _defaults(module: type) -> dict[str, Any]:
    """The fields of a Linen class that needn't be given, as JSON values."""
    return {
        field.name: json_field(field.name, field.default)
        for field in dataclasses.fields(module)
        if field.name not in ("parent", "name")
        and field.default is not dataclasses.MISSING
    }
