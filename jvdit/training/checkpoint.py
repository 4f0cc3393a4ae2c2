"""Training checkpoints, written by orbax.

A workdir holds `config.json`, `checkpoints/STEP/` (training state and data position)
and, for inference, `model/` with the averaged weights.
"""

import contextlib
import dataclasses
import itertools
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
from jvdit.training.digests import find_damage, is_listed, write_digests
from jvdit.weights.parameters import json_field

_LARGE_PART = 1 << 20  # least bytes of an array that each of several devices writes
CHECKPOINTS = "checkpoints"  # folder in a workdir
DAMAGED = ".damaged"  # suffix of the folder of a damaged checkpoint, after the step
_TOLD = 300  # most characters to quote of another library's message
PathLike = str | os.PathLike[str]


class _Arrays(msgspec.Struct, frozen=True):
    """Orbax's metadata of the arrays in a checkpoint, by name."""

    tree_metadata: dict[str, Any]


class _Optim(msgspec.Struct, frozen=True):
    """The optimizer settings that decide the layout of its state."""

    name: str | None = None


class _Config(msgspec.Struct, frozen=True):
    """The settings of a run that its checkpoints depend on."""

    optim: _Optim = _Optim()


class _Run(msgspec.Struct, frozen=True):
    """The contents of a workdir's `config.json`."""

    identity: dict[str, Any] = {}
    config: _Config = _Config()


class Checkpoints:
    """Saves and restores training states in a workdir, asynchronously.

    Args:
        workdir: the folder; `checkpoints/` is made inside.
        keep: how many of the newest checkpoints to keep.

    Attributes:
        damaged: a line for each damaged checkpoint that `restore` renamed.
    """

    def __init__(self, workdir: PathLike, keep: int = 3):
        self._folder = pathlib.Path(workdir).absolute() / CHECKPOINTS
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        handlers = {"state": _state_handler(), "data": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(
            self._folder, options=options, item_handlers=handlers
        )
        self._listing: threading.Thread | None = None
        self.damaged: list[str] = []

    @property
    def latest(self) -> int | None:
        """The step of the newest finished checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: Mapping[str, Any]) -> None:
        """Starts saving; returns as soon as the state is copied to the host.

        Args:
            step: number of training steps done; saving a step twice does nothing.
            state: a `TrainState`.
            data: position in the training data, as JSON values.
        """
        if step == self.latest:
            return
        self._await_listing()
        parts = {
            "state": ocp.args.PyTreeSave(state),
            "data": ocp.args.JsonSave({**data}),
        }
        self._manager.save(step, args=ocp.args.Composite(**parts))
        # Killed before it is done, it leaves a whole checkpoint without digests.
        self._listing = threading.Thread(target=self._list, args=(step,), daemon=True)
        self._listing.start()

    def _list(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception:  # the main thread also waits, and raises it
            return
        folder = self._folder / str(step)
        with contextlib.suppress(OSError, ValueError):  # a full disk, an absent share
            cluster.await_seen(folder.exists, f"checkpoint {step}")
            write_digests(folder, jax.process_index(), jax.process_count())

    def _await_listing(self) -> None:
        if self._listing is not None:
            self._listing.join()

    def restore(self, shapes: Any, shardings: Any) -> tuple[Any, dict[str, Any]] | None:
        """Restores the newest undamaged checkpoint.

        Newer ones that are damaged are renamed to `STEP.damaged`. Every process must
        call this; all restore the same step, the newest that process 0 sees.

        Args:
            shapes: shapes of the state, from `jax.eval_shape`.
            shardings: sharding of each array; the mesh may differ from that at saving.

        Returns:
            The state and the saved data position; None if nothing was saved yet.

        Raises:
            ValueError: all checkpoints are damaged, or the newest holds other arrays.
        """
        abstract = jax.tree.map(
            lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
            shapes,
            shardings,
        )
        self.damaged = []
        found = self._newest(abstract)
        if found is None:
            return None
        data = dict(found["data"])
        # Donation needs owned memory. Copying leaf by leaf needs room for one array.
        leaves, tree = jax.tree.flatten(found["state"])
        del found
        for i in range(len(leaves)):
            leaves[i] = owned(leaves[i])
        return jax.tree.unflatten(tree, leaves), data

    def _newest(self, abstract: Any) -> Any:
        """Restores the newest undamaged checkpoint, and renames newer, damaged ones."""
        ours = jax.process_index(), jax.process_count()
        while step := self._told():
            restored, damage = None, _first(find_damage(self._folder / step, *ours))
            if not damage:
                restored, damage = self._try(step, abstract)
                damage = _first(damage)
            if not damage:
                return restored
            del restored
            aside = _keep_aside(self._folder, step)
            told = f"checkpoint {step} is damaged, kept as {aside} ({damage})"
            self.damaged.append(told)
            self._manager.reload()
        if was_saved(self._folder):
            aside = sorted(path.name for path in self._folder.glob(f"*{DAMAGED}*"))
            told = "; ".join(self.damaged) or ", ".join(aside)
            raise ValueError(
                f"{self._folder} has no whole checkpoint: {told}. Copy a whole one "
                "there from elsewhere, or begin anew in another --workdir."
            )
        return None

    def _told(self) -> str:
        """The newest step that process 0 sees; "": none."""
        return cluster.tell_all("" if self.latest is None else str(self.latest))[0]

    def _try(self, step: str, abstract: Any) -> tuple[Any, str]:
        """Restores a checkpoint, or says why it is damaged; raises any other error."""
        places = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(abstract, restore_args=places),
            data=ocp.args.JsonRestore(),
        )
        try:
            return self._manager.restore(int(step), args=args), ""
        except Exception as error:
            self._check_arrays(step, abstract, error)
            # Not damage: the machine is at fault, or the files are as they were.
            machine = isinstance(error, MemoryError | PermissionError)
            machine = machine or "RESOURCE_EXHAUSTED" in str(error)
            if machine or is_listed(self._folder / step):
                raise
            return None, str(error).strip().partition("\n")[0][:_TOLD] or repr(error)

    def _check_arrays(self, step: str, abstract: Any, error: Exception) -> None:
        """Tells an undamaged checkpoint of another training from a damaged one of this.

        Raises:
            ValueError: the checkpoint's metadata can be read, and no checkpoint in the
                folder has the arrays of this run.
        """
        asked = {_name(path) for path, _ in jax.tree.leaves_with_path(abstract)}
        held, *others = (
            _names_in(self._folder / str(x)) for x in (step, *self._manager.all_steps())
        )
        if held and not any(asked <= other for other in others):
            raise ValueError(
                f"checkpoint {step} in {self._folder} lacks arrays that this run asks "
                f"for, such as {min(asked - held)}: it was begun with another "
                "optimizer or other networks. Restore those settings, or choose "
                "another --workdir."
            ) from error

    def wait(self) -> None:
        """Waits until everything is on disk; raises any error from saving."""
        self._manager.wait_until_finished()
        self._await_listing()

    def close(self) -> None:
        """Waits for saves to finish, and ends the background threads."""
        self._await_listing()
        self._manager.close()


def _state_handler() -> ocp.PyTreeCheckpointHandler:
    """An orbax handler that splits only large arrays over the devices that write them.

    By default orbax cuts every bias into as many files as there are devices.
    """
    arrays = ocp.type_handlers.ArrayHandler(
        min_slice_bytes_for_replica_parallel=_LARGE_PART
    )
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def was_saved(folder: pathlib.Path) -> bool:
    """Whether a `checkpoints` folder holds a finished checkpoint, damaged or not."""
    return any(x.name.partition(DAMAGED)[0].isdigit() for x in folder.glob("*"))


def owned(leaf: jax.Array) -> jax.Array:
    """Copies an array if its memory may be borrowed, so that it can be donated.

    On a CPU, memory may be borrowed from numpy or from a file; elsewhere it never is.
    """
    borrowed = any(device.platform == "cpu" for device in leaf.sharding.device_set)
    return leaf.copy() if borrowed else leaf


def _first(told: str) -> str:
    """The first non-empty text among those of all processes."""
    return next(filter(None, cluster.tell_all(told)), "")


def _name(path: Any) -> str:
    """The name of an array as orbax writes it."""
    return str(tuple(jax.tree_util.keystr((key,), simple=True) for key in path))


def _names_in(folder: pathlib.Path) -> set[str]:
    """The names of the arrays in a checkpoint; none if they can't be read."""
    try:
        held = read_json(folder / "state/_METADATA", "copy it anew", _Arrays)
        return {*held.tree_metadata}
    except (OSError, ValueError):
        return set()


def _keep_aside(folder: pathlib.Path, step: str) -> str:
    """Renames a checkpoint, so that it is no longer restored; returns the new name."""
    names = (f"{step}{DAMAGED}{number or ''}" for number in itertools.count())
    name = next(name for name in names if not (folder / name).exists())
    name = cluster.tell_all(name)[0]
    if cluster.is_lead():
        (folder / step).rename(folder / name)
    cluster.wait_for_others(f"renamed {name}")
    cluster.await_seen(
        lambda: not (folder / step).exists(), f"{folder / name}, renamed,"
    )
    return name


def claim_workdir(
    workdir: PathLike,
    config: Mapping[str, Any],
    modules: Mapping[str, type] | None = None,
) -> None:
    """Claims a workdir for this run, or checks that the run there is this one.

    Everything under `config["identity"]` must match the workdir's `config.json`; the
    rest (steps, intervals, device counts) may change between restarts.

    Args:
        workdir: the folder.
        config: the run's settings: "identity" and "config".
        modules: the classes of the networks in the identity, by name. A field that was
            added to a class after the workdir was made counts as its default there.

    Raises:
        ValueError: the folder holds another model, and the message says what differs;
            or its file system can't rename folders, which checkpoints need.
    """
    path = pathlib.Path(workdir) / "config.json"
    if path.exists():
        begun = "delete it if this is the command that the run was begun with"
        held = read_json(path, begun, _Run)
        ours = parse_json(json.dumps(config), "this run's config", _Run)
        theirs, known = held.identity, ours.identity
        for name, module in (modules or {}).items():
            if isinstance(theirs.get(name), dict):
                later = {
                    field.name: json_field(field.name, field.default)
                    for field in dataclasses.fields(module)
                    if field.name in known.get(name, {})
                    and field.default is not dataclasses.MISSING
                }
                theirs[name] = json.loads(json.dumps(later)) | theirs[name]
        differing = differences(theirs, known)
        if differing:
            raise ValueError(
                f"workdir {workdir} holds another model: {'; '.join(differing)}. "
                "Choose another --workdir, or restore those settings."
            )
        _check_optimizer(path.parent, held.config.optim.name, ours.config.optim.name)
    if cluster.is_lead():
        _check_renaming(path.parent)
        write_json(path, config)


def _check_optimizer(
    folder: pathlib.Path, theirs: str | None, ours: str | None
) -> None:
    """Checks that the checkpoints hold the state of this optimizer.

    Raises:
        ValueError: they hold that of another.
    """
    begun = any((folder / CHECKPOINTS).glob("[0-9]*"))
    if begun and theirs != ours and None not in (theirs, ours):
        raise ValueError(
            f"workdir {folder} was begun with `optim.name` {theirs!r}, whose moments "
            f"{ours!r} can't go on with; restore it, or begin another run, with "
            f"--config.start_from={folder}/model in another --workdir."
        )


def _check_renaming(folder: pathlib.Path) -> None:
    """Checks that folders can be renamed, which is how a checkpoint appears whole.

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
