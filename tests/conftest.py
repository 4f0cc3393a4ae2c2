"""Strict by default: 8 CPU devices, checked shapes, no silent broadcasting."""

import atexit
import os
import shutil
import tempfile

import jaxlib

# Workers that run beside one another (-n auto) share the cores out among the threads of
# their XLAs, which would wait for each other. Processes that tests start have all.
cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
if ours := sorted(cores)[number::workers]:
    os.sched_setaffinity(0, ours)

# Programs are compiled once and run on tiny arrays, so LLVM needn't try hard, nor MLIR,
# which takes as long; and a program that took long is kept for the processes that tests
# start one after another. These begin with huge pages, and not a second time for them.
wanted = ["--xla_backend_optimization_level=0"]
wanted.append("--xla_cpu_parallel_codegen_split_count=1")  # a worker has a core or two
if jaxlib.__version__.startswith("0.10."):  # XLA ends at a flag that it doesn't know
    wanted.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*wanted, os.environ.get("XLA_FLAGS", "")])
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    kept = tempfile.mkdtemp(prefix="jvdit-compiled-")
    atexit.register(shutil.rmtree, kept, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = kept
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["XDG_CACHE_HOME"] = os.environ["JAX_COMPILATION_CACHE_DIR"]

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("jvdit", "beartype.beartype")

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

import pytest  # noqa: E402

assert len(jax.devices()) == 8  # cores are counted now
if cores:
    os.sched_setaffinity(0, cores)


def pytest_addoption(parser):
    told = "how often test_cluster.py kills a run of two processes at random"
    parser.addoption("--kills", type=int, default=2, help=told)


# A worker that began one of these last would work on alone.
LONGEST = ("trained", "finetune_parity", "release_parity", "test_video_vae", "test_dit")


def pytest_collection_modifyitems(items):
    """A file stays with one worker, as do all that take one of the trainings below."""

    def rank(item):
        places = [i for i, x in enumerate(LONGEST) if x in groups[item]]
        return min(places, default=len(LONGEST))

    groups = {
        item: "trained" if "latents" in item.fixturenames else str(item.path)
        for item in items
    }
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=rank)


def trained(folder, *stages):
    """Runs stages of a small training."""
    # Imported late: what is imported above is not checked by beartype.
    import thread_config

    from jvdit.tasks.stages import run

    config = thread_config.get_config()
    config.order = stages
    run(config, str(folder))
    return folder


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    """A folder in which an autoencoder was trained, and has made latents."""
    return trained(tmp_path_factory.mktemp("latents"), "vae", "latents")


@pytest.fixture(scope="session")
def workdir(latents, tmp_path_factory):
    """The same with the last stage: all that a small training has."""
    folder = tmp_path_factory.mktemp("thread") / "all"
    return trained(shutil.copytree(latents, folder), "dit")


@pytest.fixture(scope="session")
def generator(workdir):
    """What that training can generate."""
    from jvdit.generation.generator import Generator

    return Generator.load(workdir / "dit")
