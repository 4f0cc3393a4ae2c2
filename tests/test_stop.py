"""Asked to stop, a run stops wherever it is."""

import signal

import pytest
from ml_collections import ConfigDict

from jvdit.machine.stop import StopRequest
from jvdit.tasks import stages as stages_module
from jvdit.tasks.stages import run


def stages():
    """Two stages of training around one of encoding, of which nothing is run."""
    stage = {"objective": "flow", "steps": 3}
    each = {"a": stage, "b": {"objective": "encode"}, "c": stage}
    return ConfigDict({"stages": each, "order": ("a", "b", "c")})


@pytest.mark.parametrize("at", [0, 1, 2])
def test_between_stages_and_in_them(tmp_path, monkeypatch, at):
    """In a stage's last look, after which all of its steps are done; or encoding."""
    seen = []

    def trained(config, workdir, stop):
        seen.append(workdir)
        with stop.saving():
            if len(seen) > at:
                signal.raise_signal(signal.SIGTERM)
        return config.steps

    def encoded(out):
        seen.append(out)
        if len(seen) > at:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(stages_module, "train", trained)
    monkeypatch.setattr(stages_module, "encode", encoded)
    if at == 1:
        with pytest.raises(KeyboardInterrupt):
            run(stages(), str(tmp_path))
    else:
        assert not run(stages(), str(tmp_path))
    assert seen == [str(tmp_path / name) for name in "abc"[: at + 1]]


def test_a_signal_is_noted_only_while_there_is_something_to_save():
    with StopRequest() as stop, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    assert stop.asked
    with StopRequest() as stop, stop.saving():
        with pytest.raises(KeyboardInterrupt), stop.saving(False):
            signal.raise_signal(signal.SIGTERM)
        assert stop.look()
        with pytest.raises(KeyboardInterrupt), stop.saving(False):
            raise AssertionError("it was asked before")
    with StopRequest() as stop, stop.saving():
        signal.raise_signal(signal.SIGTERM)
        assert stop.look()


def test_after_a_training_signals_do_what_they_did():
    numbers = signal.SIGTERM, signal.SIGINT
    before = [signal.getsignal(number) for number in numbers]
    with StopRequest() as stop, stop.saving():
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
    assert [signal.getsignal(number) for number in numbers] == before
