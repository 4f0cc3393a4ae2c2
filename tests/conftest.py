"""Strict by default: 8 CPU devices, checked shapes, no silent broadcasting."""

import os

# Workers that run beside one another (-n auto) share the cores out: threads of several
# XLAs on the same core wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    ours = sorted(os.sched_getaffinity(0))[
        number :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    ]
    os.sched_setaffinity(0, ours or os.sched_getaffinity(0))

# Programs are compiled once and run on tiny arrays, so LLVM needn't try hard; but for
# what tests start in a process of its own, as a user would.
flags = os.environ.get("XLA_FLAGS")
os.environ["XLA_FLAGS"] = f"{flags or ''} --xla_backend_optimization_level=0"

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("jvdit", "beartype.beartype")

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

import pytest  # noqa: E402

assert len(jax.devices()) == 8  # the flags are read now
if flags is None:
    del os.environ["XLA_FLAGS"]
else:
    os.environ["XLA_FLAGS"] = flags


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=2, help="of the four processes' run")


def pytest_collection_modifyitems(items):
    """A file stays with one worker, as do all that take the training below."""
    for item in items:
        place = "thread" if "workdir" in item.fixturenames else str(item.path)
        item.add_marker(pytest.mark.xdist_group(place))


@pytest.fixture
def kills(request):
    return request.config.getoption("--kills")


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """A folder in which all stages of a small training have run."""
    # Imported late: what is imported above is not checked by beartype.
    import thread_config

    from jvdit.train import run

    folder = tmp_path_factory.mktemp("thread")
    run(thread_config.get_config(), str(folder))
    return folder


@pytest.fixture(scope="session")
def generator(workdir):
    """What that training can generate."""
    from jvdit.generation.generator import Generator

    return Generator.load(workdir / "dit")
