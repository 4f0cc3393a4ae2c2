import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jvdit.training.metrics import Metrics
from jvdit.training.trace import Trace


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package, which remembers what it is told."""
    told = []

    def init(**given):
        told.append(("init", given))
        run = types.SimpleNamespace(id=given["id"] or "new")
        run.log = lambda values, step: told.append((step, values))
        run.finish = lambda: told.append(("finish", run.id))
        return run

    module = types.ModuleType("wandb")
    module.init, module.Image = init, np.shape
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_a_run_of_wandb_goes_on_under_its_id(wandb, tmp_path):
    for start in (0, 5):
        with Metrics(tmp_path, 10, start, "flow", "wandb") as metrics:
            metrics.scalars(start + 1, {"loss": 0.5, "none": float("nan")})
            video = np.zeros((2, 8, 8, 3), np.uint8)
            metrics.sheet(start + 1, "samples", tmp_path, [video], ["a"])
    ids = [given["id"] for kind, given in wandb if kind == "init"]
    assert ids == [None, "new"]
    assert (1, {"loss": 0.5}) in wandb and (6, {"loss": 0.5}) in wandb
    assert [step for step, values in wandb if "samples" in values] == [1, 6]
    assert wandb.count(("finish", "new")) == 2


def test_torch_is_left_alone(tmp_path, monkeypatch):
    """tensorboardX imports it where it can: seconds at the start of every run."""
    held = {name for name in sys.modules if name.split(".")[0] == "tensorboardX"}
    for name in held | {"torch"} & sys.modules.keys():
        monkeypatch.delitem(sys.modules, name)
    with Metrics(tmp_path, 10, 0, "flow"):
        assert "tensorboardX" in sys.modules and "torch" not in sys.modules


def test_a_logger_that_is_not_there_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        Metrics(tmp_path, 10, 0, "flow", "wandb")
    with pytest.raises(ValueError, match="logger.*'mlflow'.*tensorboard, wandb"):
        Metrics(tmp_path, 10, 0, "flow", "mlflow")


def test_a_trace_has_the_steps_that_were_asked_for(tmp_path):
    trace, x = Trace("2:4", tmp_path), jnp.ones(3)
    on = []
    for step in range(6):
        trace(step, x)
        on.append(trace._on)
        x = x + 1
    trace.close(x)
    assert on == [False, False, True, True, False, False]
    assert [*tmp_path.rglob("*.xplane.pb")]
    for wrong in ("3", "4:4", "5:2", "a:b"):
        with pytest.raises(ValueError, match="10:13"):
            Trace(wrong, tmp_path)
