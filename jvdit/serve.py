"""Serves clips over HTTP: `python -m jvdit.serve`, then http://127.0.0.1:8000.

One process owns the devices. Requests wait in a queue, are answered in the shape of
OpenAI's videos API, and outlive the server. A page shows what is made.
"""

from jvdit.machine.huge_pages import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()  # begins this process anew, so before what takes seconds


import contextlib
import os
import pathlib
import socket
from typing import Any

from absl import flags

from jvdit.generation import shared_flags as shared
from jvdit.generation.generator import Generator
from jvdit.generation.settings import Settings
from jvdit.generation.watermark import Watermark
from jvdit.machine import flag_parser
from jvdit.machine.command import refuse_arguments, told_in_a_line
from jvdit.machine.compilation import keep_compilations
from jvdit.machine.files import check_writable
from jvdit.machine.lock import FolderLock
from jvdit.sharding import make_mesh, parse_mesh
from jvdit.weights.adapters import strengths
from jvdit.weights.opening import EXPERTS, with_adapters
from jvdit.weights.starting import model_hash

flags.adopt_module_key_flags(shared)

_OFFERED = flags.DEFINE_multi_string(
    "offer_lora",
    [],
    "Adapter that a request may name, as NAME=FILE or NAME=FILE:0.8; those clips are "
    "made by themselves.",
)
_NAME = flags.DEFINE_string("name", None, "Name of the model (default: its folder's).")
_OUT = flags.DEFINE_string("out", "served", "Folder that keeps the jobs and clips.")
_HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "Address to listen at; all but this machine's needs --token."
)
_PORT = flags.DEFINE_integer(
    "port", 8000, "Port to listen at.", lower_bound=0, upper_bound=65535
)
_TOKEN = flags.DEFINE_string(
    "token", None, "What clients must show (default: the variable JVDIT_TOKEN)."
)
_TOKENS = flags.DEFINE_integer(
    "tokens",
    None,
    "Latent tokens of a row, and the most of a clip (default: as many as two of the "
    "model's own clips take).",
    lower_bound=1,
)
_ROWS = flags.DEFINE_integer(
    "rows",
    None,
    "Rows of so many tokens that are denoised together (default: one for each device "
    "along data and fsdp, or for two where guidance doubles them).",
    lower_bound=1,
)
_CLIPS = flags.DEFINE_integer("clips", 4, "Most clips in a row.", lower_bound=1)
_STEPS = flags.DEFINE_integer("max_steps", 100, "Most steps of a clip.", lower_bound=1)
_QUEUE = flags.DEFINE_integer("queue", 64, "Most jobs that wait.", lower_bound=1)
_KEEP = flags.DEFINE_float(
    "keep", 24.0, "Hours that finished clips are kept.", lower_bound=0.0
)
_DISK = flags.DEFINE_float(
    "disk", 4.0, "GB of disk space; the oldest clips give way.", lower_bound=0.001
)
_BODY = flags.DEFINE_integer("body", 64, "Most MB of a request.", lower_bound=1)
_GRACE = flags.DEFINE_float(
    "grace",
    30.0,
    "Seconds that running clips may take once the server is told to stop; what isn't "
    "finished then waits for the next start.",
    lower_bound=0.0,
)
_MESH = flags.DEFINE_string(
    "mesh", None, "Devices along each axis, such as data=2 (default: all along data)."
)


def _token() -> str:
    """The token that clients must show; "" for this machine alone."""
    from jvdit.serving.guard import is_loopback

    token = _TOKEN.value or os.environ.get("JVDIT_TOKEN", "")
    if not token and not is_loopback(_HOST.value):
        raise ValueError(
            f"--host={_HOST.value} can be reached by others: give a --token that they "
            "must show, or listen at 127.0.0.1."
        )
    return token


def _socket() -> socket.socket:
    """A socket at the host and port, taken before anything is loaded.

    Raises:
        OSError: it can't be had.
    """
    where = _HOST.value, _PORT.value
    family = socket.AF_INET6 if ":" in _HOST.value else socket.AF_INET
    found = socket.socket(family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(where)
    except OSError as error:
        found.close()
        told = f"--host={where[0]} --port={where[1]}: {error.strerror or error}"
        raise OSError(f"{told}; choose another.") from None
    return found


def _generator(mark: Watermark | None) -> tuple[Generator, dict[str, str]]:
    """The generator, and the flags that open its model; its clips may have a mark."""
    mesh = make_mesh(parse_mesh(_MESH.value) if _MESH.value else None)
    model = shared.named_bundle(mesh)
    if files := strengths(shared.LORA.value):
        model = with_adapters(model, files, EXPERTS)
    if mark is not None:
        shared.check_markable(Settings().complete(model.defaults).solver)
    form = shared.QUANTIZE.value or ""
    generator = Generator(model, mesh, quantize=form, watermark=mark)
    print(generator.room.told, flush=True)
    flags_given = shared.WORKDIR, shared.PRETRAINED, shared.QUANTIZE
    source = {flag.name: flag.value for flag in flags_given if flag.value}
    if shared.LORA.value:
        source["lora"] = ",".join(shared.LORA.value)
    if mark is not None:
        source["watermark"] = "your_key"
    return generator, source


def _offered(generator: Generator) -> dict[str, Generator]:
    """Generators with an adapter that requests may name, by its name."""
    found = {}
    for text in _OFFERED.value:
        name, equals, file = text.partition("=")
        if not (name and equals and file):
            raise ValueError(f"--offer_lora (={text!r}) must read NAME=FILE.")
        model = with_adapters(generator.model, strengths([file]), EXPERTS)
        found[name] = generator.beside(model)
    return found


def serve() -> None:
    """Serves until the process is told to stop.

    Raises:
        ValueError: a setting is wrong, or another server holds the folder.
        OSError: the folder or the port can't be used.
    """
    try:
        import uvicorn

        from jvdit.serving import app, jobs, packed, served, worker
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is missing: pip install 'jvdit[serve]'."
        ) from None
    signed, mark = shared.provenance(), shared.watermark()
    token, folder = _token(), pathlib.Path(_OUT.value)
    with contextlib.ExitStack() as held:
        listening = held.enter_context(_socket())
        check_writable(folder)
        lock = FolderLock(folder)
        lock.acquire()
        held.callback(lock.release)
        limits = jobs.Limits(
            waiting=_QUEUE.value,
            seconds=_KEEP.value * 3600,
            num_bytes=int(_DISK.value * 2**30),
        )
        queue = jobs.Jobs(folder, limits)
        generator, source = _generator(mark)
        opened = shared.PRETRAINED.value or shared.WORKDIR.value or "jvdit-box"
        name = _NAME.value or pathlib.Path(opened).name
        most, loras = (_TOKENS.value or 0, _STEPS.value), _offered(generator)
        model = served.Served(generator, name, *most, source, loras)
        signed = signed and signed.of(model_hash(generator.model))
        most = _CLIPS.value, model.steps, _ROWS.value
        rows = packed.Packed(generator, model.tokens, *most)
        work = worker.Worker(queue, model, rows, signed)
        bounds = {"token": token, "num_bytes": _BODY.value << 20}
        made = app.make_app(queue, work, _GRACE.value, **bounds)
        how: dict[str, Any] = {"log_level": "warning", "server_header": False}
        how |= {"limit_concurrency": 256, "timeout_graceful_shutdown": 5}
        place = f"http://{_HOST.value}:{listening.getsockname()[1]}"
        print(f"{name} is served at {place}", flush=True)
        uvicorn.Server(uvicorn.Config(made, **how)).run([listening])


def main(argv: list[str]) -> None:
    """Parses, serves, and turns mistakes of the user into one line."""
    refuse_arguments(argv)
    with told_in_a_line("stopped; what waits goes on with the next start."):
        keep_compilations()
        serve()


if __name__ == "__main__":
    flag_parser.run(main)
