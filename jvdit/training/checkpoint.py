"""Checkpoints of training (orbax) and folders of finished weights (safetensors).

A workdir holds `config.json`, `checkpoints/STEP/` (state, and where the data stands)
and, for inference, `model/`: a folder of finished weights that needs nothing else.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import threading
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jvdit import cluster
from jvdit.training.digests import write_digests
from jvdit.training.restoring import owned, restore_newest

_LARGE_PART = 1 << 20  # bytes of an array that one of several devices writes
CHECKPOINTS = "checkpoints"  # folder in a workdir
_DIGEST = "digest"  # of weights, in the metadata of their file
PathLike = str | os.PathLike[str]


def write_json(path: PathLike, value: Any) -> None:
    """Writes JSON so that a reader sees all of it or the file that was there before."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    scratch.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    os.replace(scratch, path)


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
        held = json.loads(path.read_text())
        ours = json.loads(json.dumps(config))["identity"]
        theirs = held.get("identity", {})
        for name, module in (modules or {}).items():
            if isinstance(theirs.get(name), dict):
                later = json.loads(json.dumps(_defaults(module)))
                later = {key: later[key] for key in later.keys() & ours[name].keys()}
                theirs[name] = later | theirs[name]
        differing = differences(theirs, ours)
        if differing:
            raise ValueError(
                f"workdir {workdir} holds another model: {'; '.join(differing)}. "
                "Choose another --workdir, or restore those settings."
            )
    if jax.process_index() == 0:
        _check_renaming(path.parent)
        write_json(path, config)


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


def differences(held: Any, asked: Any, name: str = "") -> list[str]:
    """What differs between two nested settings, as "name: held X, asked Y"."""
    if isinstance(held, Mapping) and isinstance(asked, Mapping):
        lines = []
        for key in sorted({*held, *asked}):
            below = f"{name}.{key}" if name else key
            missing = "(nothing)"
            lines += differences(held.get(key, missing), asked.get(key, missing), below)
        return lines
    return [] if held == asked else [f"`{name}` is {held!r} there but {asked!r} here"]


# Finished weights


def module_fields(module: Any) -> dict[str, Any]:
    """The fields of a Linen module as JSON values."""
    return {
        field.name: _json(field.name, getattr(module, field.name))
        for field in dataclasses.fields(module)
        if field.name not in ("parent", "name")
    }


def _defaults(module: type) -> dict[str, Any]:
    """The fields of a Linen class that needn't be given, as JSON values."""
    return {
        field.name: _json(field.name, field.default)
        for field in dataclasses.fields(module)
        if field.name not in ("parent", "name")
        and field.default is not dataclasses.MISSING
    }


def _json(name: str, value: Any) -> Any:
    return jnp.dtype(value).name if name.endswith("dtype") else value


def build(module: type, fields: dict[str, Any]) -> Any:
    """A Linen module from its fields; lists (of JSON) become tuples."""
    return module(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    )


def model_folder(folder: PathLike) -> pathlib.Path:
    """The `model` folder of a workdir, or the folder itself."""
    folder = pathlib.Path(folder)
    return folder / "model" if (folder / "model").is_dir() else folder


def save_weights(folder: PathLike, params: Any, config: Mapping[str, Any]) -> None:
    """Writes `weights.safetensors` and `config.json`: a model that others can load.

    Args:
        folder: made if need be; files are replaced whole.
        params: a nested dict of arrays.
        config: what `load_weights` gives back beside them.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = flatten_dict(params, sep="/")
    flat = {path: np.asarray(leaf) for path, leaf in flat.items()}
    scratch = folder / f"weights.{os.getpid()}.tmp"
    save_file(flat, scratch, metadata={_DIGEST: weights_hash(params)})
    os.replace(scratch, folder / "weights.safetensors")
    write_json(folder / "config.json", config)


def load_weights(folder: PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what `save_weights` wrote: (params, config).

    Raises:
        FileNotFoundError: there is no model in the folder.
        ValueError: the weights can't be read, for example because they were cut off,
            or they have changed since they were written.
    """
    weights, config = weights_files(folder)
    try:
        with safe_open(weights, "numpy") as opened:
            metadata = opened.metadata() or {}
        params = unflatten_dict(load_file(weights), sep="/")
    except Exception as error:
        raise ValueError(f"{weights} can't be read ({error}); copy it anew.") from error
    check_weights(weights, params, metadata)
    try:
        return params, json.loads(config.read_text())
    except ValueError as error:
        raise ValueError(f"{config} is no JSON ({error}); copy it anew.") from error


def weights_files(folder: PathLike) -> tuple[pathlib.Path, pathlib.Path]:
    """The files that `save_weights` wrote to a folder: weights and config.

    Raises:
        FileNotFoundError: there is no model in the folder.
    """
    folder = pathlib.Path(folder)
    weights, config = folder / "weights.safetensors", folder / "config.json"
    if not weights.exists() or not config.exists():
        raise FileNotFoundError(
            f"{folder} holds no model (weights.safetensors and config.json); give the "
            "`model` folder of a workdir that has saved a checkpoint."
        )
    return weights, config


def check_weights(file: pathlib.Path, params: Any, metadata: Mapping[str, str]) -> None:
    """Makes sure that weights are those that `save_weights` wrote.

    Args:
        file: that they were read from.
        params: what it holds.
        metadata: of the file. Without a digest, as of a file that something else wrote
            in the place of ours, there is nothing to compare.

    Raises:
        ValueError: they aren't.
    """
    if metadata.get(_DIGEST, held := weights_hash(params)) != held:
        raise ValueError(
            f"{file} has changed since it was written (its digest is {held}, not "
            f"{metadata[_DIGEST]}): copy it anew. If the change was meant, write the "
            "weights with `save_weights`, or without the metadata of the old file."
        )


def weights_hash(params: Any) -> str:
    """A short digest of names, shapes and values: which weights these are."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        value = np.asarray(leaf)
        digest.update(
            f"{jax.tree_util.keystr(path)} {value.shape} {value.dtype}".encode()
        )
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:16]
