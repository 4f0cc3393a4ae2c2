"""Treats a server badly, and says what it answered and whether anything was lost.

    python tools/serve_hostile.py
    python tools/serve_hostile.py --requests 200 --kills 3

Starts a server of the model in the box, queues good clips, and sends it what no client
should: bodies that are no JSON, nested or endless; values of the wrong type or beyond
all bounds; paths that lead elsewhere; files that aren't what they say; floods; uploads
that stop half-way; clients that go away, or that send a byte at a time. Then it is
killed under load, again and again. Ends with 1 if it answered 500 or wrote a traceback,
grew, or if a clip that it took was lost.
"""

import argparse
import base64
import collections
import contextlib
import functools
import http.client
import io
import json
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

_CLIP = {"prompt": "one object: a small red circle.", "num_inference_steps": 6}
_QUICK = _CLIP | {"num_inference_steps": 1, "num_frames": 1}
_BODY = 1  # MB that the server takes
_SECONDS = 75.0  # that an answer may take; an unfinished body has 60
_GROWTH = 64  # MB
_GONE = "no answer"
_BUSY = "503"  # too much at a time: ask again


class Server:
    """A server in a process of its own, which may be killed and begun anew."""

    def __init__(self, folder: pathlib.Path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log = folder / "log"
        self._line = [sys.executable, "-m", "jvdit.serve", f"--port={self.port}"]
        self._line += [f"--out={folder / 'jobs'}", f"--body={_BODY}", "--queue=24"]
        self.process: Any = None

    def start(self) -> None:
        """Starts it, and returns when it answers."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self._line, stdout=log, stderr=log)
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self.ask("GET", "/health")
                return
            if self.process.poll() is not None:
                raise OSError(f"the server ended: {self.log.read_text()[-500:]}")
            time.sleep(0.05)

    def stop(self, how: signal.Signals) -> None:
        """Sends it a signal, and waits until it is gone."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait()

    def ask(self, method: str, path: str, fields: Any = None) -> tuple[int, Any]:
        """Status and content of an answer, JSON being read."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(link):
            body = None if fields is None else json.dumps(fields)
            link.request(method, path, body, {"content-type": "application/json"})
            answer = link.getresponse()
            content = answer.read()
        return answer.status, json.loads(content) if content[:1] == b"{" else content

    def create(self, fields: Any) -> str:
        """Queues a clip; its id, or "" if there is no room."""
        status, found = self.ask("POST", "/v1/videos", fields)
        return found["id"] if status == 200 else ""

    def jobs(self) -> dict[str, str]:
        """The status of each job, by its id."""
        found, after = {}, ""
        while True:
            page = self.ask("GET", f"/v1/videos?limit=100&order=asc{after}")[1]
            found |= {x["id"]: x["status"] for x in page["data"]}
            if not page["has_more"]:
                return found
            after = f"&after={page['last_id']}"

    def clip(self, id: str) -> bytes:
        """The file of a clip that is completed."""
        return self.ask("GET", f"/v1/videos/{id}/content")[1]

    @property
    def megabytes(self) -> float:
        """What it holds of the memory."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024


# Hostile requests: each makes the bytes of one, of a random kind.


def _post(body: bytes, kind: str = "application/json", **headers: str) -> bytes:
    told = {"host": "127.0.0.1", "content-type": kind, "content-length": len(body)}
    told |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}" for name, value in told.items() if value != ""]
    head = "\r\n".join(["POST /v1/videos HTTP/1.1", *lines, "connection: close"])
    return head.encode("latin-1") + b"\r\n\r\n" + body


def _get(path: str, method: str = "GET", host: str = "127.0.0.1", more="") -> bytes:
    head = (
        f"{method} {path} HTTP/1.1\r\nhost: {host}\r\n{more}connection: close\r\n\r\n"
    )
    return head.encode("latin-1")


def _form(name: str, file: str, content: bytes) -> bytes:
    part = f'--x\r\ncontent-disposition: form-data; name="{name}"; filename="{file}"'
    body = part.encode() + b"\r\n\r\n" + content
    field = b'\r\n--x\r\ncontent-disposition: form-data; name="prompt"\r\n\r\na ball'
    return _post(body + field + b"\r\n--x--\r\n", "multipart/form-data; boundary=x")


def _picture(side: int) -> bytes:
    Image.new("1", (side, side)).save(file := io.BytesIO(), "png")
    return file.getvalue()


def _no_json(rng: random.Random) -> bytes:
    bodies = b"", b"{", b"[]", b"null", b"7", b'"x"', b"\xff\xfe\x00", b"NaN", b"{,}"
    return _post(rng.choice((*bodies, rng.randbytes(300), b'{"prompt":"a"')))


def _nested(rng: random.Random) -> bytes:
    deep = rng.choice((900, 20_000, 200_000))
    inside = '{"prompt":' * deep + '"a"' + "}" * deep
    whole = rng.choice(("[" * deep, inside, '{"prompt":' + "[" * deep + "]" * deep))
    return _post(whole.encode()[: 900 << 10])


def _values(rng: random.Random) -> bytes:
    wrong = [None, [], {}, True, "x", -1, 0, 1.5, 1e308, -(2**70), 2**70, "1" * 5000]
    wrong += [float("nan"), float("inf"), "", "\ud800", "a\0b", "9" * 400, "1e999"]
    names = ["prompt", "size", "num_frames", "seconds", "fps", "num_inference_steps"]
    names += ["guidance_scale", "seed", "lora", "sound", "negative_prompt", "model"]
    names += ["conditions", "input_reference", "__class__", "no_such_field"]
    name = rng.choice(names)
    # What is right by chance, as an empty prompt, makes a clip; a quick one.
    body = json.dumps({**_QUICK, name: rng.choice(wrong)})
    return _post(body.encode())


def _sizes(rng: random.Random) -> bytes:
    sizes = "99999x99999", "0x0", "-8x8", "8x", "31x33", "１２x８", "8x8x8", "1e3x8"
    fields = {"size": rng.choice(sizes), "num_frames": rng.choice((9, 10**9, 10, 0))}
    if rng.random() < 0.3:
        fields = {"prompt": "a" * rng.choice((20_001, 500_000))}
    return _post(json.dumps({**_CLIP, **fields}).encode())


def _paths(rng: random.Random) -> bytes:
    tricks = "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%00", "x" * 20_000, "%ff%fe"
    tricks += "....//etc/passwd", "video_../job.json", "*", "?variant=../job.json", "%"
    start = rng.choice(("/", "/v1/videos/", "/page.css/", "//", "/v1/models/"))
    method = rng.choice(("GET", "DELETE", "PUT", "POST", "HEAD", "TRACE", "OPTIONS"))
    return _get(start + rng.choice(tricks) + rng.choice(("", "/content")), method)


def _references(rng: random.Random) -> bytes:
    place = "file:///etc/passwd", "/etc/passwd", "http://127.0.0.1:1/x.png", "data:,x"
    place += "data:image/png;base64,####", "data:image/png;base64,", "../job.json"
    for content in _files():
        place += (f"data:image/png;base64,{base64.b64encode(content).decode()}",)
    given: Any = rng.choice(place)
    field = rng.choice(("input_reference", "conditions"))
    given = (
        {rng.choice(("image", "video", "../x")): given} if field[0] == "c" else given
    )
    return _post(json.dumps({**_QUICK, "num_frames": 9, field: given}).encode())


def _uploads(rng: random.Random) -> bytes:
    name = rng.choice(("conditions[image]", "input_reference", "image", "conditions[x"))
    return _form(
        name, rng.choice(("../../x.png", "\0", "x" * 999)), rng.choice(_files())
    )


@functools.cache
def _files() -> list[bytes]:
    whole = _picture(16)
    bomb = whole[:16] + b"\x00\x01\x00\x00" * 2 + whole[24:]
    return [
        b"no picture",
        whole[:40],
        bomb,
        _picture(9000),
        b"\0" * 5000,
        b"ftypmp42" * 9,
    ]


def _http(rng: random.Random) -> bytes:
    parts = [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        rng.randbytes(200) + b"\r\n\r\n",
        b"A" * 70_000,
    ]
    parts += [_get("/health", host=x) for x in ("evil.example", "[", "a b", "[::1", "")]
    origins = "http://evil.example", "http://[", "null", "\xff"
    parts += [_get("/health", more=f"origin: {x}\r\n") for x in origins]
    parts += [_get("/health", more="x: y\r\n" * 5000), _get("/v1/videos?limit=-1")]
    parts += [_get(f"/v1/videos?limit={'9' * 5000}"), _get("/v1/videos?after=%00")]
    parts += [_post(b"{}", transfer_encoding="chunked"), _post(b"{}", "text/xml")]
    parts += [_post(b"{}", content_length=x) for x in ("-1", "9" * 30, "9" * 5000, "x")]
    chunked = {"transfer_encoding": "chunked", "content_length": ""}
    parts += [_post(b"zz\r\n{}\r\n", **chunked), _post(b"ffffffffff\r\n{", **chunked)]
    return rng.choice(parts)


def _huge(rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return _post(b"{", content_length=str(10 << 30))
    chunk = b"%x\r\n" % (1 << 16) + b" " * (1 << 16) + b"\r\n"
    body = chunk * (20 * _BODY) + b"0\r\n\r\n"
    return _post(body, transfer_encoding="chunked", content_length="")


def _half(rng: random.Random) -> bytes:
    content = _form(
        "conditions[image]", "x.png", rng.randbytes(rng.choice((99, 90_000)))
    )
    return content[: rng.randrange(40, len(content))]


def _flood(rng: random.Random) -> bytes:
    return _post(json.dumps(_QUICK).encode())


KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "no JSON": _no_json,
    "nested": _nested,
    "wrong values": _values,
    "sizes and lengths": _sizes,
    "paths": _paths,
    "references": _references,
    "uploads": _uploads,
    "broken HTTP": _http,
    "huge bodies": _huge,
    "half an upload": _half,
    "flood": _flood,
    "goes away": _flood,
    "a byte at a time": _no_json,
}
_LEAVES = {"half an upload", "goes away"}  # before an answer


def send(server: Server, kind: str, data: bytes) -> tuple[str, str]:
    """Sends the bytes of a request; what came of it, and the id of a clip that did."""
    with contextlib.suppress(OSError):  # a server may close before all is sent
        place = "127.0.0.1", server.port
        with socket.create_connection(place, _SECONDS) as link:
            with contextlib.suppress(ConnectionError):
                if kind == "a byte at a time":
                    for byte in data[:40]:
                        link.sendall(bytes([byte]))
                        time.sleep(0.05)
                    return "it left", ""
                link.sendall(data)
            if kind in _LEAVES:
                return "it left", ""
            return _answer(link)
    return _GONE, ""


def _answer(link: socket.socket) -> tuple[str, str]:
    found = b""
    with contextlib.suppress(OSError):
        while more := link.recv(1 << 16):
            found += more
    words = found[:20].split()
    if len(words) < 2 or not words[0].startswith(b"HTTP"):
        return _GONE, ""
    status = words[1].decode("latin-1")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        if status == "200":
            return status, str(json.loads(found.partition(b"\r\n\r\n")[2])["id"])
    return status, ""


def hostile(
    server: Server, count: int, rng: random.Random
) -> tuple[dict[str, collections.Counter[str]], set[str]]:
    """Sends so many hostile requests; their answers by kind, and the clips taken."""
    answers = {kind: collections.Counter[str]() for kind in KINDS}
    taken: set[str] = set()
    kinds = [*KINDS] * (count // len(KINDS) + 1)
    orders = [(kind, KINDS[kind](rng)) for kind in kinds[:count]]
    rng.shuffle(orders)
    with ThreadPoolExecutor(16) as pool:
        for (kind, _), (status, id) in zip(
            orders, pool.map(lambda x: send(server, *x), orders), strict=True
        ):
            answers[kind][status] += 1
            taken |= {id} if id.startswith("video_") else set()
    return answers, taken


def until(happened: Callable[[], Any]) -> Any:
    """Waits for something, and returns it."""
    while not (found := happened()):
        time.sleep(0.1)
    return found


def treated_badly(server: Server, count: int, rng: random.Random) -> list[str]:
    """Sends hostile requests, prints the answers, and returns what went wrong."""
    server.start()
    until(lambda: server.ask("GET", "/health")[1]["status"] == "ok")
    hostile(server, 130, rng)  # what is held from now on, is held for good
    until(lambda: not _open(server))
    before, good = server.megabytes, {server.create(_CLIP) for _ in range(3)}
    begun = time.monotonic()
    answers, taken = hostile(server, count, rng)
    spent, status = time.monotonic() - begun, server.ask("GET", "/health")[0]
    until(lambda: not _open(server))
    after, jobs = server.megabytes, server.jobs()
    lost = [id for id in (*good, *taken) if jobs.get(id) not in ("completed", "failed")]
    lost += [id for id in good if b"ftyp" not in server.clip(id)[:16]]
    table = Table("kind", "answers", title=f"{count} hostile requests")
    for kind, found in answers.items():
        told = ", ".join(f"{status}: {n}" for status, n in sorted(found.items()))
        table.add_row(kind, told)
    Console().print(table)
    print(
        f"{spent:.0f} s; {len(good)} good clips and {len(taken)} that came among the "
        f"rest were taken, {len(lost)} lost; memory {before:.0f} MB before and "
        f"{after:.0f} after"
    )
    wrong = [f"{lost} lost"] if lost else []
    wrong += ["it isn't healthy"] if status != 200 else []
    wrong += [f"it grew by {after - before:.0f} MB"] if after > before + _GROWTH else []
    found = {status for counts in answers.values() for status in counts}
    mistakes = {x for x in found if x.isdigit() and int(x) >= 500} - {_BUSY}
    wrong += [f"it answered {x}" for x in mistakes]
    server.stop(signal.SIGTERM)
    return wrong


def _open(server: Server) -> list[str]:
    over = "completed", "failed"
    return [id for id, status in server.jobs().items() if status not in over]


def _made(server: Server) -> set[str]:
    return {id for id, status in server.jobs().items() if status == "completed"}


def killed(server: Server, kills: int, rng: random.Random) -> list[str]:
    """Kills it under load and begins it anew; returns what went wrong."""
    server.start()
    taken, kept, wrong = set(server.jobs()), dict[str, bytes](), list[str]()
    for number in range(kills + 1):
        if number:
            server.stop(signal.SIGKILL)
            server.start()
        jobs = server.jobs()
        wrong += [f"{id} is lost" for id in taken - {*jobs}]
        for id, clip in kept.items():
            if jobs.get(id) != "completed" or server.clip(id) != clip:
                wrong.append(f"the clip of {id} is lost")
        if number == kills:
            break
        for _ in range(12 - len(_open(server))):
            fields = {
                "num_inference_steps": rng.randint(1, 6),
                "seed": rng.randint(0, 99),
            }
            taken |= {
                server.create(_CLIP | fields | {"num_frames": rng.choice((1, 9))})
            }
        most = len(kept) + rng.randint(0, 3)
        until(lambda most=most: len(_made(server)) >= most)
        time.sleep(rng.random() / 2)
        kept |= {id: server.clip(id) for id in _made(server) - {*kept}}
    until(lambda: not _open(server))
    failed = [id for id, status in server.jobs().items() if status != "completed"]
    wrong += [f"{id} has failed" for id in failed if id in taken]
    told = wrong[0] if wrong else "all are there, with their bits"
    print(
        f"{kills} kills: {len(taken)} clips were taken, and {len(kept)} of them made "
        f"before a kill: {told}"
    )
    server.stop(signal.SIGTERM)
    return wrong


def main() -> None:
    """Prints what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000, help="hostile ones")
    parser.add_argument("--kills", type=int, default=20, help="under load")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    args = parser.parse_args()
    rng, wrong = random.Random(args.seed), list[str]()
    for count, does in ((args.requests, treated_badly), (args.kills, killed)):
        with tempfile.TemporaryDirectory() as folder:
            server = Server(pathlib.Path(folder))
            try:
                wrong += does(server, count, rng) if count else []
            finally:
                server.stop(signal.SIGKILL)
            log = server.log.read_text() if server.log.exists() else ""
            traces = log.split("Traceback")[1:]
            wrong += ["a traceback:" + each[-1500:] for each in traces[:3]]
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
