"""Runs configs of several stages: encodings and trainings, each in its own folder."""

import pathlib

from ml_collections import ConfigDict

from jvdit.config import Config
from jvdit.machine import cluster
from jvdit.machine.stop import StopRequest
from jvdit.ranges import check_ranges
from jvdit.tasks.encoding import encode
from jvdit.tasks.loop import train


def run(config: Config, workdir: str) -> bool:
    """Runs a config: one training, or several stages one after another.

    Args:
        config: a training's config, or one with `stages` and their `order`.
        workdir: folder of the run; each stage has a folder of its name inside.

    Returns:
        True if it ran to its end; False if it was asked to stop before.

    Raises:
        ValueError: a setting of any stage is out of its range, the processes of this
            run were given different settings, or a stage can't run; see `train` and
            `encode` for their other errors.
    """
    for settings in config.stages.values() if "stages" in config else (config,):
        check_ranges(settings.to_dict())
    cluster.check_alike({"workdir": workdir, "config": config.to_dict()})
    with StopRequest() as stop:
        if "stages" not in config:
            return train(config, workdir, stop) >= config.steps and not stop.look()
        return all(_ran(config, name, workdir, stop) for name in config.order)


def _ran(config: Config, name: str, workdir: str, stop: StopRequest) -> bool:
    """Runs one stage; returns whether it ran to its end without a stop request."""
    stage = config.stages[name].copy_and_resolve_references()
    folder = str(pathlib.Path(workdir) / name)
    with stage.unlocked():
        _fill_workdir(stage, workdir)
    if stage.objective == "encode":
        settings = {k: v for k, v in stage.items() if k != "objective"}
        with stop.apart():
            encode(out=folder, **settings)
    elif train(stage, folder, stop) < stage.steps:
        return False
    return not stop.look()


def _fill_workdir(config: Config, workdir: str) -> None:
    """Replaces {workdir} in the strings of a stage's config, in place."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            _fill_workdir(value, workdir)
        elif isinstance(value, str):
            config[name] = value.replace("{workdir}", workdir)
        elif isinstance(value, tuple) and value and isinstance(value[0], str):
            config[name] = tuple(v.replace("{workdir}", workdir) for v in value)
