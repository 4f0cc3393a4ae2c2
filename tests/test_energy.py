"""Joules: counters that wrap, shares that add up, and a source for every number."""

import json
import sys
import time
import types

import jax
import pytest

from jvdit.machine import energy
from jvdit.machine.chips import CHIPS, chip_of
from jvdit.machine.energy import Counter, Energy, Meter, Shares, nvml, rapl
from jvdit.training.metrics import Metrics, Spent, read_history


def zone(folder, number, name, value, most=1_000_000):
    place = folder / f"intel-rapl:{number}"
    place.mkdir()
    for file, text in (
        ("name", name),
        ("energy_uj", value),
        ("max_energy_range_uj", most),
    ):
        (place / file).write_text(f"{text}\n")
    return place / "energy_uj"


def test_a_counter_of_rapl_wraps(tmp_path):
    """It is counted on, however often; parts of a package aren't counted twice."""
    package = zone(tmp_path, "0", "package-0", 999_990)
    memory = zone(tmp_path, "0:1", "dram", 500_000)
    core, psys = zone(tmp_path, "0:0", "core", 7), zone(tmp_path, "1", "psys", 7)
    parts = rapl(tmp_path)
    assert [part.source for part in parts] == ["measured: RAPL"] * 2
    begun = sum(part.joules() for part in parts)
    for _ in range(2):
        for value in (0, 600_000, 999_990):
            package.write_text(str(value))
            core.write_text("900000"), psys.write_text("900000")
            now = sum(part.joules() for part in parts)
    assert now - begun == pytest.approx(2 * 1.000001, abs=1e-9)
    memory.write_text("600000")
    assert sum(p.joules() for p in parts) - now == pytest.approx(0.1)


def test_what_may_not_be_read_is_no_counter(tmp_path):
    zone(tmp_path, "0", "package-0", 5).unlink()
    zone(tmp_path, "1", "package-1", "?")
    assert rapl(tmp_path) == [] == rapl(tmp_path / "absent")


def test_gpus_are_those_that_jax_uses(monkeypatch):
    """In the order of CUDA_VISIBLE_DEVICES, of which NVML knows nothing."""
    counters = {"3": 5_000, "1": 70_000, "GPU-x": 900_000}
    library = types.ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    library.NVMLError, library.nvmlInit = NVMLError, lambda: None
    library.nvmlDeviceGetHandleByIndex = str
    library.nvmlDeviceGetHandleByUUID = str
    library.nvmlDeviceGetTotalEnergyConsumption = lambda handle: counters[handle]
    devices = [types.SimpleNamespace(local_hardware_id=i) for i in range(3)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    parts = nvml({"CUDA_VISIBLE_DEVICES": "3,1,GPU-x"})
    assert [part.joules() for part in parts] == [5, 70, 900]
    counters["1"] += 500
    assert parts[1].joules() == 70.5

    def none(handle):
        raise NVMLError("not supported")

    library.nvmlDeviceGetTotalEnergyConsumption = none
    assert nvml({"CUDA_VISIBLE_DEVICES": "3,1,GPU-x"}) == []
    library.nvmlInit = lambda: none(0)
    assert nvml({}) == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml({}) == []


def test_cores_are_modelled_where_nothing_is_measured(monkeypatch, tmp_path):
    """By the time of this process alone, and said so."""
    monkeypatch.setattr(energy, "_POWERCAP", tmp_path)
    meter, begun = Meter(), time.process_time()
    while time.process_time() < begun + 0.05:
        pass
    found = meter.lap()
    assert found.joules >= 0.05 * CHIPS["cpu"].watts
    assert found.source == "modelled: CPU time x 7.5 W a core"
    assert "idle_joules" not in found.told and str(found).endswith(f"({found.source})")
    monkeypatch.setenv("JVDIT_WATTS", "4")
    assert Meter().source == "modelled: CPU time x 4 W a core"
    monkeypatch.setenv("JVDIT_WATTS", "much")
    with pytest.raises(ValueError, match="must be watts"):
        Meter()


@pytest.mark.parametrize(
    "kind, source",
    [
        ("NVIDIA H100 80GB HBM3", "modelled: 8 x NVIDIA H100 x 700 W + modelled: CPU"),
        ("TPU v6 lite", "unknown: TPU v6 lite has no counter and no published watts"),
    ],
)
def test_accelerators_are_modelled_by_their_most_watts(
    kind, source, monkeypatch, tmp_path
):
    monkeypatch.setattr(energy, "_POWERCAP", tmp_path)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(energy, "this_chip", lambda: chip_of(kind))
    found = Meter().lap()
    assert found.source.startswith(source)
    known = "unknown" not in source
    assert (found.told["joules"] is not None) == known
    assert str(found).startswith("energy unknown") != known
    json.dumps(found.told, allow_nan=False)


def counting(*readings):
    """A meter of a counter that reads these numbers."""
    left = iter(readings)
    return Meter([Counter("of a test", lambda: next(left))])


def test_shares_add_up_to_the_whole():
    """Clips of a batch share what they were made with; the rest is their own."""
    meter = counting(0.0, 80.0, 81.0, 83.0, 86.0, 96.0, 96.5, 96.5)
    shares = Shares(meter)
    found = [shares.next(n).joules for n in (4, 4, 4, 4, 2, 2)]
    assert found == [20, 21, 22, 23, 5, 5.5]
    assert sum(found) == meter.total.joules == 96.5


def test_what_is_measured_is_told_with_what_idleness_takes(monkeypatch):
    monkeypatch.setattr(energy, "_REST", 0.1)
    begun = time.monotonic()
    machine = [Counter("measured: X", lambda: 50 * (time.monotonic() - begun))]
    meter = Meter(machine)
    time.sleep(0.1)
    found = meter.lap()
    assert found.idle == pytest.approx(found.joules, rel=0.2)
    assert found.told["idle_joules"] == found.idle


def test_energies_of_two_sources_name_both():
    a, b = Energy(1500.0, "a", 1.0), Energy(340.0, "b")
    assert str(a + b + a) == "3.34 kJ (a; b)"
    assert (a + b).told == {"joules": 1840.0, "source": "a; b"}
    assert str(a * 2.0) == "3 kJ, 2 J of it idle (a)"


def test_a_run_counts_on_over_its_restarts(tmp_path):
    """And its history says so at every log."""
    for step in (1, 2):
        before = read_history(tmp_path).get("energy/joules", [(0, 0.0)])[-1][1]
        with Metrics(tmp_path, 2, step - 1, "test") as metrics:
            spent = Spent(tmp_path)
            assert spent.total.joules >= before
            begun = time.process_time()
            while time.process_time() < begun + 0.01:
                pass
            metrics.scalars(step, spent.scalars)
    first, second = (x for _, x in read_history(tmp_path)["energy/joules"])
    assert second > first > 0
