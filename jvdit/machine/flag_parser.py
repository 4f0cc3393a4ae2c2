"""Flags of the commands: as users write them, mistakes told in one line."""

import importlib.util
import pathlib
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import app, flags

from jvdit.machine.json_files import nearest

_FLAG = re.compile(r"--?([A-Za-z][\w.-]*)(=.*)?", re.DOTALL)


def run(main: Callable[[list[str]], Any], *required: str) -> None:
    """Runs a command: parses the flags of the command line, and calls `main`.

    Hyphens in the name of a flag are read as underscores, and --config also takes the
    name of one of `configs/`. Exits with one line if the flags are wrong.

    Args:
        main: what to call with what isn't a flag; the program's name comes first.
        required: names of the flags that must be given.
    """
    if required:
        flags.mark_flags_as_required(required)
    app.run(main, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    argv = [argv[0], *map(_as_defined, argv[1:])]
    for i, config in _configs(argv):
        argv[i] = argv[i].removesuffix(config) + _config_file(config)
    sys.argv = argv  # where a config's flag looks for the settings that change
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        lines = str(error).strip().splitlines()
        # A config's own error comes with a traceback, and what it says is last.
        mistake = lines[-1 if "Traceback" in str(error) else 0].removesuffix(".")
        sys.exit(f"error: {mistake}; --help lists the flags.")
    except (AttributeError, KeyError, TypeError):
        # A setting that isn't there, unless the config itself is at fault.
        if told := _misnamed(argv):
            sys.exit(f"error: {told}")
        raise


def _as_defined(argument: str) -> str:
    """An argument as the flag is defined, with underscores in the place of hyphens."""
    match = _FLAG.fullmatch(argument)
    name = match[1].replace("-", "_") if match else ""
    root = name.partition(".")[0]
    if root.startswith("no_") and root[3:] in flags.FLAGS:
        name = f"no{root[3:]}"
    elif root not in flags.FLAGS and root.removeprefix("no") not in flags.FLAGS:
        return argument
    return f"--{name}{match[2] or ''}" if match else argument


def _configs(argv: list[str]) -> Iterator[tuple[int, str]]:
    """The argument that names a config, and the name."""
    for i, argument in enumerate(argv):
        if argument.startswith("--config="):
            yield i, argument.removeprefix("--config=")
        elif argument == "--config" and i + 1 < len(argv):
            yield i + 1, argv[i + 1]


def _config_file(config: str) -> str:
    """The file of a config, which may be given by its name alone."""
    if pathlib.Path(config.partition(":")[0]).suffix or "/" in config:
        return config
    spec = importlib.util.find_spec("configs")
    folders = spec.submodule_search_locations if spec else None
    found = {x.stem: x for f in folders or [] for x in pathlib.Path(f).glob("*.py")}
    if config in found:
        return str(found[config])
    near = f"; did you mean {nearest(config, found)}?" if found else "."
    sys.exit(f"error: there is no config of the name {config!r}{near}")


def _misnamed(argv: list[str]) -> str:
    """Says which --config.NAME=VALUE names no setting; "" if all do."""
    for _, config in _configs(argv):
        file, _, argument = config.partition(":")
        make = runpy.run_path(file)["get_config"]
        settings = (make(argument) if argument else make()).to_dict()
        for flag in filter(None, map(_FLAG.fullmatch, argv)):
            _, _, name = flag[1].partition("config.")
            if name and (told := _unknown(settings, name)):
                return told
    return ""


def _unknown(settings: Mapping[str, Any], name: str) -> str:
    """Says which part of a setting's name isn't there; "" if all are."""
    at, inside = settings, "the config"
    for part in name.split("."):
        if not isinstance(at, Mapping):
            return f"`{name}` is no setting: `{inside}` is a value."
        if part not in at:
            return _absent(settings, name, at, part)
        at, inside = at[part], part
    return ""


def _absent(
    settings: Mapping[str, Any], name: str, at: Mapping[str, Any], part: str
) -> str:
    """Says that a part of a setting's name isn't among those at its place."""
    having = [x for x in settings.get("order", ()) if part in settings["stages"][x]]
    if at is settings and having:
        return (
            f"this config has stages, and `{name}` is a setting of "
            f"{', '.join(having)}: write --config.stages.{having[-1]}.{name}=…"
        )
    near = ".".join(nearest(x, at) if x == part else x for x in name.split("."))
    return (
        f"`{name}` is no setting; did you mean {near}? Beside it there are "
        f"{', '.join(sorted(at))}."
    )
