"""What stands before an HTTP API: who may ask, and how much a body may hold."""

import asyncio
import dataclasses
import hmac
import ipaddress
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

_SMALL = 1 << 16  # bytes of a body that needs no place among the large ones

_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


def refusal(
    status: int, message: str, field: str | None = None, **headers: str
) -> JSONResponse:
    """An error in the form of OpenAI's API, naming the field that it is about."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": field, "code": None}
    return JSONResponse({"error": error}, status, headers)


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own, for itself alone."""
    name = host.strip("[]")
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _split(url: str) -> SplitResult:
    """The parts of a URL; none of one that is malformed."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


class TooLarge(Exception):
    """A body is larger than is taken."""


@dataclasses.dataclass
class Guard:
    """ASGI middleware: token, hosts and origins, and bounds of bodies.

    A page of another site can't use the server of whoever looks at it: names that
    point here but aren't this machine's are refused, and so are foreign origins.

    Attributes:
        app: what it stands before.
        token: that a client must show; "": none, for this machine alone.
        num_bytes: most bytes of a body.
        seconds: that a body may take to arrive.
        large: most bodies of more than 64 KB that arrive at a time.
    """

    app: Any
    token: str = ""
    num_bytes: int = 64 << 20
    seconds: float = 60.0
    large: int = 8

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        headers = Headers(scope=scope)
        refused = self._refused(scope["path"], headers)
        if refused is not None:
            await refused(scope, receive, sending)
            return
        size = headers.get("content-length", "")
        bodiless = scope["method"] in ("GET", "HEAD", "DELETE")
        large = not (bodiless or (size.isdecimal() and int(size) <= _SMALL))
        if large and self.large < 1:
            busy = "too many uploads arrive at this moment; ask again."
            answer = refusal(503, busy, **{"retry-after": "5"})
            await answer(scope, receive, sending)
            return
        self.large -= large
        free = partial(self._free, large)
        bounded = _Bounded(receive, self.num_bytes, self.seconds, free)
        try:
            await self.app(scope, bounded, sending)
        finally:
            bounded.end()

    def _free(self, large: bool) -> None:
        self.large += large

    def _refused(self, path: str, headers: Headers) -> JSONResponse | None:
        host = headers.get("host", "")
        if not self.token and not is_loopback(_split(f"//{host}").hostname or ""):
            return refusal(403, f"this server isn't called {host[:80]!r}.")
        origin = headers.get("origin")
        if origin is not None and _split(origin).netloc != host:
            return refusal(403, f"pages of {origin[:80]!r} may not use this server.")
        if self.token and path.startswith("/v1"):
            shown = headers.get("authorization", "")
            wanted = f"Bearer {self.token}"
            if not hmac.compare_digest(shown.encode(), wanted.encode()):
                return refusal(401, "show the server's token: Authorization: Bearer …")
        size = headers.get("content-length", "0")
        if size.isdecimal() and int(size) > self.num_bytes:
            return too_large(self.num_bytes)
        return None


class _Bounded:
    """Receives at most so many bytes of a body, in at most so many seconds.

    Raises:
        TooLarge: there are more.
        TimeoutError: they take longer.
    """

    def __init__(
        self, receive: Any, num_bytes: int, seconds: float, ended: Callable[[], None]
    ):
        self._receive, self._num_bytes, self._ended = receive, num_bytes, [ended]
        self._until = asyncio.get_running_loop().time() + seconds
        self._read = 0

    async def __call__(self) -> Any:
        if not self._ended:  # what follows is that the client goes away
            return await self._receive()
        async with asyncio.timeout_at(self._until):
            message = await self._receive()
        self._read += len(message.get("body", b""))
        if self._read > self._num_bytes:
            raise TooLarge(self._num_bytes)
        if not message.get("more_body", False):
            self.end()
        return message

    def end(self) -> None:
        """Nothing more of the body comes."""
        if self._ended:
            self._ended.pop()()


def too_large(num_bytes: int) -> JSONResponse:
    """The answer to a body that is larger than is taken."""
    return refusal(413, f"a request may have {num_bytes >> 20} MB at most.")
