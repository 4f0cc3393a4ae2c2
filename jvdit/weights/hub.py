"""Models and adapters by their id on the Hugging Face Hub, such as "owner/name".

What lies in the hub's cache whole is taken from there without asking anyone; otherwise
the files that are needed are downloaded, safetensors alone. Needs `jvdit[hub]`.
"""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jvdit.weights import tensors
from jvdit.weights.release import read_release
from jvdit.weights.tensors import PathLike, TensorFiles

# owner/name, perhaps with a revision, and the path of a file.
_ID = re.compile(
    r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(?P<file>(/[^/@]+)*)(@(?P<revision>.+))?"
)
_INDEX = "model_index.json"
_FOLDERS = ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder")
_SMALL = ("scheduler", "tokenizer", "image_processor")
# Adapter files as PEFT and diffusers call them.
_ADAPTERS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


def is_id(name: PathLike) -> bool:
    """Whether a name can be an id on the hub: it isn't, and doesn't begin with, a path.

    "runs/dit" is none where a folder `runs` lies.
    """
    text = os.fspath(name)
    begins = pathlib.Path(text.partition("/")[0]).exists()
    return bool(_ID.fullmatch(text)) and not begins


def release_folder(name: PathLike, variant: str = "") -> pathlib.Path:
    """The folder of a released model, given by its path or its id on the hub.

    Args:
        name: a path, which is returned as it is; or "owner/name" or
            "owner/name@revision" of a pipeline as diffusers saves it.
        variant: version of the weights, see `TensorFiles`.

    Raises:
        ValueError: there is no such model, it can't be downloaded, or it has only
            pickled weights.
    """
    if not is_id(name):
        return pathlib.Path(name)
    repository, revision = _parts(name)[::2]
    cached = _cached(name, _INDEX)
    if cached is not None and _whole(cached.parent, variant):
        return cached.parent
    with _told(name) as hub:
        info = hub.HfApi().model_info(repository, revision=revision)
        names = _needed(name, [x.rfilename for x in info.siblings or ()], variant)
        found = hub.snapshot_download(
            repository, revision=revision, allow_patterns=names
        )
    return pathlib.Path(found)


def adapter_file(name: PathLike) -> pathlib.Path:
    """The file of adapters, given by its path or on the hub.

    Args:
        name: a path, which is returned as it is; or "owner/name", where that holds one
            file, or "owner/name/path/of/file.safetensors".

    Raises:
        ValueError: there is no such file or there are several, or it can't be
            downloaded.
    """
    if not is_id(name):
        return pathlib.Path(name)
    repository, file, revision = _parts(name)
    for likely in (file,) if file else _ADAPTERS:
        if (cached := _cached(name, likely)) is not None:
            return cached
    with _told(name) as hub:
        names = hub.list_repo_files(repository, revision=revision)
        several = [x for x in names if x.endswith(".safetensors") and file in ("", x)]
        usual = [x for x in several if x in _ADAPTERS]
        if len(several) != 1 and not usual:
            told = ", ".join(f"{repository}/{x}" for x in several[:5]) or "none"
            raise ValueError(f"name one of the safetensors of {repository}: {told}.")
        wanted = (usual or several)[0]
        beside = f"{wanted.rpartition('/')[0]}/adapter_config.json".lstrip("/")
        if beside in names:
            hub.hf_hub_download(repository, beside, revision=revision)
        return pathlib.Path(hub.hf_hub_download(repository, wanted, revision=revision))


def _parts(name: PathLike) -> tuple[str, str, str | None]:
    """The repository, the file in it, and the revision."""
    match = _ID.fullmatch(os.fspath(name))
    assert match is not None
    return match["id"], match["file"].lstrip("/"), match["revision"]


def _cached(name: PathLike, file: str) -> pathlib.Path | None:
    repository, _, revision = _parts(name)
    found = _hub(name).try_to_load_from_cache(repository, file, revision=revision)
    return pathlib.Path(found) if isinstance(found, str) else None


def _whole(folder: pathlib.Path, variant: str) -> bool:
    """Whether a folder of the cache holds all files of a pipeline."""
    with contextlib.suppress(FileNotFoundError):
        parts = read_release(folder).parts.values()
        for part in parts:
            TensorFiles(part, variant)
        there = [tensors.has_variant(part, variant) for part in parts]
        # Some networks of a release may lack a variant, but never the plain weights.
        enough = any(there) if variant else all(there)
        return enough and all((part / "config.json").exists() for part in parts)
    return False


def _needed(name: PathLike, files: Sequence[str], variant: str) -> list[str]:
    """The files of a pipeline that are needed."""
    if _INDEX not in files:
        raise ValueError(
            f"{name} has no {_INDEX}: it isn't laid out as diffusers does. Take the "
            "repository of that layout (Wan's end with -Diffusers)."
        )
    found = [_INDEX]
    for folder in (*_FOLDERS, *_SMALL):
        inside = [x for x in files if x.rpartition("/")[0] == folder]
        kinds = {x: tensors.variant_of(pathlib.Path(x)) for x in inside}
        kinds = {x: kind for x, kind in kinds.items() if kind is not None}
        chosen = tensors.chosen_variant(kinds.values(), variant)
        found += [x for x, kind in kinds.items() if kind == chosen]
        small = (".json", ".model", ".txt")
        found += [x for x in inside if x.endswith(small) and x not in kinds]
        if folder in _FOLDERS and inside and not kinds:
            raise ValueError(
                f"{name} has no safetensors in {folder}/, and pickles aren't "
                "downloaded; take another repository, or convert it yourself."
            )
    return found


def _hub(name: PathLike) -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            f"{name} is no folder or file here; to take it from the Hugging Face Hub, "
            "run: pip install 'jvdit[hub]'."
        ) from None
    return huggingface_hub


@contextlib.contextmanager
def _told(name: PathLike) -> Iterator[Any]:
    """The hub's library; its errors become a line with the remedy."""
    hub = _hub(name)
    errors, repository = hub.errors, _parts(name)[0]
    try:
        yield hub
    except errors.GatedRepoError:
        raise ValueError(
            f"{name} asks for your agreement: give it on the hub's page of "
            f"{repository}, and log in with `hf auth login`."
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise ValueError(
            f"{name} is no folder or file here, and the hub has no such model that you "
            "may see; if it is private, log in with `hf auth login`."
        ) from None
    except ValueError as error:
        if not isinstance(error, errors.HFValidationError):
            raise
        raise ValueError(f"{name} is no id on the hub: {error}.") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # such as a full disk
        told = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{name} is no folder or file here, isn't whole in the hub's cache, and "
            f"can't be downloaded: {told}"
        ) from None
