"""Restores the newest undamaged checkpoint; renames damaged ones."""

import itertools
import pathlib
from typing import Any

import jax
import msgspec
import orbax.checkpoint as ocp

from jvdit.machine import cluster
from jvdit.machine.json_files import read_json
from jvdit.training.digests import find_damage, is_listed

DAMAGED = ".damaged"  # suffix of the folder of a damaged checkpoint, after the step
_TOLD = 300  # most characters to quote of another library's message


class _Arrays(msgspec.Struct, frozen=True):
    """Orbax's metadata of the arrays in a checkpoint, by name."""

    tree_metadata: dict[str, Any]


def was_saved(folder: pathlib.Path) -> bool:
    """Whether a `checkpoints` folder holds a finished checkpoint, damaged or not."""
    return any(x.name.partition(DAMAGED)[0].isdigit() for x in folder.glob("*"))


def restore_newest(
    manager: ocp.CheckpointManager, folder: pathlib.Path, abstract: Any
) -> tuple[Any, list[str]]:
    """Restores the newest undamaged checkpoint, and renames newer, damaged ones.

    Every process must call this; all restore the same step, the newest that process 0
    sees.

    Args:
        manager: orbax's manager of the checkpoints.
        folder: the `checkpoints` folder.
        abstract: the state's shapes, dtypes and shardings.

    Returns:
        What the manager restored, None if nothing was saved yet; and a line for each
        checkpoint that was renamed.

    Raises:
        ValueError: all are damaged, or they hold other arrays.
    """
    told: list[str] = []
    while True:
        newest = manager.latest_step()
        step = cluster.tell_all("" if newest is None else str(newest))[0]
        if not step:
            break
        restored = None
        ours = jax.process_index(), jax.process_count()
        damage = _first(find_damage(folder / step, *ours))
        if not damage:
            restored, damage = _try(manager, folder, step, abstract)
            damage = _first(damage)
        if not damage:
            return restored, told
        del restored
        aside = _keep_aside(folder, step)
        told.append(f"checkpoint {step} is damaged, kept as {aside} ({damage})")
        manager.reload()
    if was_saved(folder):
        aside = sorted(path.name for path in folder.glob(f"*{DAMAGED}*"))
        raise ValueError(
            f"{folder} has no whole checkpoint: {'; '.join(told) or ', '.join(aside)}. "
            "Copy a whole one there from elsewhere, or begin anew in another --workdir."
        )
    return None, told


def owned(leaf: jax.Array) -> jax.Array:
    """Copies an array if its memory may be borrowed, so that it can be donated.

    On a CPU, memory may be borrowed from numpy or from a file; elsewhere it never is.
    """
    borrowed = any(device.platform == "cpu" for device in leaf.sharding.device_set)
    return leaf.copy() if borrowed else leaf


def _first(told: str) -> str:
    """The first non-empty text among those of all processes."""
    return next(filter(None, cluster.tell_all(told)), "")


def _try(
    manager: ocp.CheckpointManager, folder: pathlib.Path, step: str, abstract: Any
) -> tuple[Any, str]:
    """Restores a checkpoint, or says why it is damaged; raises any other error."""
    args = ocp.args.Composite(
        state=ocp.args.PyTreeRestore(
            abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        ),
        data=ocp.args.JsonRestore(),
    )
    try:
        return manager.restore(int(step), args=args), ""
    except Exception as error:
        steps = map(str, manager.all_steps())
        _check_arrays(folder, step, steps, abstract, error)
        # Not damage: the machine is at fault, or the files are as they were written.
        machine = isinstance(error, MemoryError | PermissionError)
        if machine or "RESOURCE_EXHAUSTED" in str(error) or is_listed(folder / step):
            raise
        return None, str(error).strip().partition("\n")[0][:_TOLD] or repr(error)


def _check_arrays(folder, step, steps, abstract, error: Exception) -> None:
    """Tells an undamaged checkpoint of another training from a damaged one of this.

    Raises:
        ValueError: the checkpoint's metadata can be read, and no checkpoint in the
            folder has the arrays of this run.
    """
    asked = {_name(path) for path, _ in jax.tree.leaves_with_path(abstract)}
    held = _names_in(folder / step)
    if held and not any(asked <= _names_in(folder / other) for other in steps):
        raise ValueError(
            f"checkpoint {step} in {folder} lacks arrays that this run asks for, such "
            f"as {min(asked - held)}: it was begun with another optimizer or other "
            "networks. Restore those settings, or choose another --workdir."
        ) from error


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
