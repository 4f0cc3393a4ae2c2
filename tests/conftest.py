"""Strict by default: 8 CPU devices, checked shapes, no silent broadcasting."""

from jaxtyping import install_import_hook

install_import_hook("jvdit", "beartype.beartype")

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

import pytest  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=2, help="of the four processes' run")


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
