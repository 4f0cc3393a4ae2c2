"""The HTTP API, in the shape of OpenAI's videos, and the page before it."""

import asyncio
import contextlib
import importlib.resources
from collections.abc import AsyncIterator
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from jvdit.machine.command import MISTAKES
from jvdit.serving.bodies import Uploads, read_body
from jvdit.serving.guard import Guard, TooLarge, refusal, too_large
from jvdit.serving.jobs import CLIP, DONE, POSTER, WAITING, Full, Jobs, VideoJob
from jvdit.serving.video_request import VideoRequest, in_api_words
from jvdit.serving.worker import Worker

_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_SHOWN, _MOST = 20, 100  # jobs in a list
_PIXELS = 1 << 25  # of a picture, as 8K; reading one takes 12 times as many bytes
_PAUSE = 0.1  # seconds between two looks at a job that a client waits for


class Api:
    """The routes of a server.

    Args:
        jobs: the queue.
        worker: makes the clips, and knows the model.
    """

    def __init__(self, jobs: Jobs, worker: Worker):
        self.jobs, self.worker, self.served = jobs, worker, worker.served
        self._checking = asyncio.Lock()

    @property
    def routes(self) -> list[Route]:
        """What is served where."""
        video = "/v1/videos/{id}"
        return [
            Route("/v1/videos", self.create, methods=["POST"]),
            Route("/v1/videos", self.listed),
            Route("/v1/videos/sync", self.create_and_wait, methods=["POST"]),
            Route(video, self.retrieve),
            Route(video, self.delete, methods=["DELETE"]),
            Route(f"{video}/content", self.content),
            Route(f"{video}/preview", self.preview),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/health", self.health),
            *(Route(path, _page(*file)) for path, file in _PAGE.items()),
        ]

    async def create(self, http: HttpRequest) -> Response:
        """Puts a clip in the queue."""
        return JSONResponse(self._view(await self._created(http)))

    async def create_and_wait(self, http: HttpRequest) -> Response:
        """Makes a clip and returns it; a client that goes away cancels it."""
        job = await self._created(http)
        try:
            while not job.over:
                if self.jobs.find(job.id) is None:
                    return refusal(404, "the job was cancelled.")
                if await http.is_disconnected():
                    raise ClientDisconnect
                await asyncio.sleep(_PAUSE)
        except BaseException:
            self.jobs.remove(job.id)
            raise
        if job.status != DONE:
            return refusal(500, job.error)
        return self._file(job, CLIP, "video/mp4")

    async def _created(self, http: HttpRequest) -> VideoJob:
        takes = [x["name"] for x in self.served.card["conditions"]]
        fields, files = await read_body(http, takes)
        async with self._checking:  # a small file may hold a large picture
            return await run_in_threadpool(self._add, fields, files)

    def _add(self, fields: dict[str, Any], files: Uploads) -> VideoJob:
        """Checks what is asked, and puts it in the queue."""
        spans = files.keep_sound
        asked, jobs = VideoRequest.of(fields, files.keyframes, spans), self.jobs
        id, names = jobs.receive(files.files)
        try:
            try:
                request, settings = self.served.order(asked, jobs.paths(id, names))
                request.read_given()
            except MISTAKES as error:  # an OSError is about a file that was given
                raise ValueError(jobs.without_paths(id, str(error))) from error
            told = self.served.told(request, settings, asked.lora)
            return jobs.add(id, names, asked, told)
        except BaseException:
            jobs.discard(id)
            raise

    async def listed(self, http: HttpRequest) -> Response:
        """The jobs, the newest first."""
        query = http.query_params
        limit, order = query.get("limit", str(_SHOWN)), query.get("order", "desc")
        if not (limit.isdecimal() and len(limit) < 4 and 1 <= int(limit) <= _MOST):
            raise ValueError(f"`limit` (={limit[:20]!r}) must be from 1 to {_MOST}.")
        if order not in ("asc", "desc"):
            raise ValueError(f"`order` (={order[:20]!r}) must be 'asc' or 'desc'.")
        jobs = self.jobs.all()[:: 1 if order == "asc" else -1]
        if (after := query.get("after")) is not None:
            ids = [job.id for job in jobs]
            if after not in ids:
                raise ValueError(f"`after` (={after[:60]!r}) is no job.")
            jobs = jobs[ids.index(after) + 1 :]
        shown = [self._view(job) for job in jobs[: int(limit)]]
        ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {}
        more = len(jobs) > len(shown)
        return JSONResponse({"object": "list", "data": shown, "has_more": more, **ends})

    async def retrieve(self, http: HttpRequest) -> Response:
        """One job."""
        return JSONResponse(self._view(self._found(http)))

    async def delete(self, http: HttpRequest) -> Response:
        """Cancels a job, or removes its clip."""
        id = self._found(http).id
        self.jobs.remove(id)
        return JSONResponse({"id": id, "object": "video.deleted", "deleted": True})

    async def content(self, http: HttpRequest) -> Response:
        """The clip of a job, or a picture of it."""
        job = self._found(http)
        variant = http.query_params.get("variant", "video")
        kinds = {"video": (CLIP, "video/mp4"), "thumbnail": (POSTER, "image/webp")}
        if variant not in kinds:
            raise ValueError(
                f"`variant` (={variant[:20]!r}) must be one of {', '.join(kinds)}."
            )
        if job.status != DONE:
            raise HTTPException(404, f"the video is {job.status}; it has no content.")
        return self._file(job, *kinds[variant])

    def _file(self, job: VideoJob, file: str, kind: str) -> Response:
        kept = {"cache-control": "private, immutable, max-age=3600"}
        name = f"{job.id}.{file.rpartition('.')[2]}"
        shown = {"filename": name, "content_disposition_type": "inline"}
        return FileResponse(self.jobs.path(job.id, file), 200, kept, kind, **shown)

    async def preview(self, http: HttpRequest) -> Response:
        """What can be seen so far of a clip that is being made."""
        picture = self.jobs.previews.get(self._found(http).id)
        if picture is None:
            raise HTTPException(404, "nothing is to be seen yet.")
        return Response(picture, 200, {"cache-control": "no-store"}, "image/webp")

    async def models(self, _: HttpRequest) -> Response:
        """The model that is served."""
        return JSONResponse({"object": "list", "data": [self.served.card]})

    async def model(self, http: HttpRequest) -> Response:
        """One model by its name."""
        if http.path_params["name"] != self.served.name:
            raise HTTPException(404, "there is no such model.")
        return JSONResponse(self.served.card)

    async def health(self, _: HttpRequest) -> Response:
        """Whether all is compiled, and how many jobs wait and run."""
        jobs, alive = self.jobs.all(), self.worker.is_alive()
        ready = alive and self.worker.ready.is_set()
        counts = {
            "queued": sum(job.status == WAITING for job in jobs),
            "in_progress": sum(not job.over and job.status != WAITING for job in jobs),
        }
        status = "ok" if ready else "warming up" if alive else "stopped"
        found = {"status": status, **counts, "same_bits": self.worker.same_bits}
        return JSONResponse(found, 200 if alive else 503)

    def _found(self, http: HttpRequest) -> VideoJob:
        job = self.jobs.find(http.path_params["id"])
        if job is None:
            raise HTTPException(404, "there is no such video, or no longer.")
        return job

    def _view(self, job: VideoJob) -> dict[str, Any]:
        """A job as the API shows it."""
        expires, over = self.jobs.expires_at(job), job.completed_at
        return {
            "id": job.id,
            "object": "video",
            "model": self.served.name,
            "status": job.status,
            "progress": job.progress,
            "created_at": int(job.created_at),
            "completed_at": None if over is None else int(over),
            "expires_at": None if expires is None else int(expires),
            "prompt": job.asked.prompt,
            "error": {"code": "failed", "message": job.error} if job.error else None,
            "remixed_from_video_id": None,
            "preview": job.id in self.jobs.previews,
            **job.told,
        }


def _page(name: str, kind: str) -> Any:
    """Serves a file of the page."""
    content = importlib.resources.files("jvdit.serving").joinpath("page", name)
    body = content.read_bytes()

    async def serve(_: HttpRequest) -> Response:
        return Response(body, 200, {"cache-control": "no-cache"}, kind)

    return serve


async def _refused(_: HttpRequest, error: Exception) -> Response:
    """The answer to a mistake of a client."""
    if isinstance(error, HTTPException):
        return refusal(error.status_code, str(error.detail), **(error.headers or {}))
    if isinstance(error, Full):
        return refusal(429, str(error), **{"retry-after": "10"})
    if isinstance(error, TooLarge):
        return too_large(error.args[0])
    if isinstance(error, TimeoutError):
        return refusal(408, "the body took too long to arrive.")
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    if isinstance(error, OSError):
        return refusal(507, "the server couldn't store the request; see its log.")
    return refusal(400, *in_api_words(str(error)))


def make_app(jobs: Jobs, worker: Worker, grace: float, **bounds: Any) -> Any:
    """Builds the ASGI application, which starts the worker and stops it.

    Args:
        jobs: the queue.
        worker: a thread that wasn't started.
        grace: seconds that what runs may take when the server is stopped.
        **bounds: arguments of `Guard`.
    """
    Image.MAX_IMAGE_PIXELS = _PIXELS

    @contextlib.asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            await run_in_threadpool(worker.stop, grace)

    told = [HTTPException, Full, TooLarge, ClientDisconnect, *MISTAKES]
    app = Starlette(
        routes=Api(jobs, worker).routes,
        exception_handlers=dict.fromkeys(told, _refused),
        lifespan=life,
    )
    return Guard(app, **bounds)
