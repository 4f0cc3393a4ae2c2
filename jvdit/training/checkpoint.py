"""Checkpoints of training (orbax) and folders of finished weights (safetensors).

A workdir holds `config.json`, `checkpoints/STEP/` (state, and where the data stands)
and, for inference, `model/`: a folder of finished weights that needs nothing else.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from jvdit.data.files import replacing
from jvdit.data.json_files import differences, read_json, write_json

_LARGE_PART = 1 << 20  # bytes of an array that one of several devices writes
PathLike = str | os.PathLike[str]


class Checkpoints:
    """Saves and restores training states in a workdir, asynchronously.

    Args:
        workdir: the folder; `checkpoints/` is made inside.
        keep: how many to keep, the newest.
    """

    def __init__(self, workdir: PathLike, keep: int = 3):
        path = pathlib.Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=True
        )
        handlers = {"state": _state_handler(), "data": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(
            path, options=options, item_handlers=handlers
        )

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
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state), data=ocp.args.JsonSave(dict(data))
            ),
        )

    def restore(self, shapes: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        """The newest state, placed by `shardings`, and where its data stood.

        Args:
            shapes: of the state, from `jax.eval_shape`.
            shardings: of each array; another mesh than at saving is fine.
        """
        abstract = jax.tree.map(
            lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
            shapes,
            shardings,
        )
        restored = self._manager.restore(
            self.latest,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    abstract,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                ),
                data=ocp.args.JsonRestore(),
            ),
        )
        # Restored buffers may be borrowed from the reader; donation needs our own.
        state = jax.tree.map(lambda x: x.copy(), restored["state"])
        return state, dict(restored["data"])

    def wait(self) -> None:
        """Returns when everything is on disk; raises what went wrong on the way."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the background threads."""
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
        held = read_json(path, begun)
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
        _check_optimizer(path.parent, held.get("config", {}), config.get("config", {}))
    if jax.process_index() == 0:
        _check_renaming(path.parent)
        write_json(path, config)


def _check_optimizer(
    folder: pathlib.Path, held: Mapping[str, Any], asked: Mapping[str, Any]
) -> None:
    """Whether the optimizer is the one whose state the checkpoints hold.

    Raises:
        ValueError: it isn't.
    """
    theirs, ours = (x.get("optim", {}).get("name") for x in (held, asked))
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
    flat = flatten_dict(params, sep="/")
    flat = {path: np.asarray(leaf) for path, leaf in flat.items()}
    with replacing(folder / "weights.safetensors") as scratch:
        save_file(flat, scratch)
    write_json(folder / "config.json", config)


def load_weights(folder: PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what `save_weights` wrote: (params, config).

    Raises:
        FileNotFoundError: there is no model in the folder.
        ValueError: the weights can't be read, for example because they were cut off.
    """
    folder = pathlib.Path(folder)
    weights, config = folder / "weights.safetensors", folder / "config.json"
    if not weights.exists() or not config.exists():
        raise FileNotFoundError(
            f"{folder} holds no model (weights.safetensors and config.json); give the "
            "`model` folder of a workdir that has saved a checkpoint."
        )
    try:
        flat = load_file(weights)
    except Exception as error:
        raise ValueError(f"{weights} can't be read ({error}); copy it anew.") from error
    fields = read_json(config, "copy it anew")
    return unflatten_dict(flat, sep="/"), fields


def load_parameters(folder: PathLike, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the weights that a run is to start from.

    Args:
        folder: the `model` folder of another run: one folder of weights each network.
        wanted: the run's parameters, or their shapes.

    Raises:
        FileNotFoundError: a network is missing there.
        ValueError: its parameters have other names or shapes.
    """
    params = {name: load_weights(pathlib.Path(folder) / name)[0] for name in wanted}
    held, asked = (
        {jax.tree_util.keystr(k): v.shape for k, v in jax.tree.leaves_with_path(tree)}
        for tree in (params, dict(wanted))
    )
    differing = differences(held, asked)
    if differing:
        raise ValueError(
            f"{folder} holds other networks than this config's: {differing[0]}"
            f" ({len(differing)} parameters differ in all); change `start_from` or the "
            "sizes of the networks."
        )
    return params


def weights_hash(params: Any) -> str:
    """A short digest of names, shapes and values: which weights these are.

    Raises:
        TypeError: a leaf isn't an array, whose address would make each run another.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        value = np.asarray(leaf)
        if value.dtype == object:
            raise TypeError(f"{jax.tree_util.keystr(path)} is no array but {leaf!r}.")
        digest.update(
            f"{jax.tree_util.keystr(path)} {value.shape} {value.dtype}".encode()
        )
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:16]
