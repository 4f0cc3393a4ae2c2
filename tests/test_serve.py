"""The HTTP API: a fake model for mistakes and floods, that in the box for clips."""

import base64
import contextlib
import dataclasses
import functools
import http.client
import io
import json
import math
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")

from doors import command  # noqa: E402
from processes import free_port, kill, wait_for  # noqa: E402

from jvdit.box import FOLDER  # noqa: E402
from jvdit.generation.generator import Generator  # noqa: E402
from jvdit.generation.request import Request  # noqa: E402
from jvdit.generation.results import GeneratedClip  # noqa: E402
from jvdit.generation.watermark import Watermark  # noqa: E402
from jvdit.serving.app import make_app  # noqa: E402
from jvdit.serving.bodies import Uploads  # noqa: E402
from jvdit.serving.jobs import Jobs, Limits  # noqa: E402
from jvdit.serving.served import Served  # noqa: E402
from jvdit.serving.video_request import VideoRequest  # noqa: E402
from jvdit.serving.worker import Worker  # noqa: E402
from jvdit.sharding import make_mesh  # noqa: E402
from jvdit.weights.opening import open_bundle  # noqa: E402

PROMPT = "one object: a small red circle."


class FakeGenerator(Generator):
    """Makes grey clips, one step whenever `gate` is open."""

    def __init__(self):
        mesh = make_mesh()
        super().__init__(open_bundle(FOLDER, mesh), mesh)
        self.gate, self.made, self.asked = threading.Event(), [], []

    def clips(self, requests, settings, rows, watch):
        (request,) = requests
        for step in range(settings.steps):
            watch("denoising", step, settings.steps)
            self.gate.wait(20)
        self.made.append(request.prompt)
        self.asked.append(request)
        watch("denoising", 1, 1)
        yield 0, GeneratedClip(np.full((*request.size, 3), 90, np.uint8), 8.0)


class BrokenGenerator(FakeGenerator):
    """Makes nothing."""

    def clips(self, requests, settings, rows, watch):
        raise KeyError("inside")


@contextlib.contextmanager
def serving(folder, generator, limits=Limits(), grace=0.0, **bounds):  # noqa: B008
    """A server on a free port, in a thread."""
    jobs = Jobs(folder, limits)
    worker = Worker(jobs, Served(generator, "fake"))
    app = make_app(jobs, worker, grace, **bounds)
    port = free_port()
    config = uvicorn.Config(
        app, "127.0.0.1", port, log_level="error", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield types.SimpleNamespace(port=port, jobs=jobs, worker=worker)
    finally:
        server.should_exit = True
        until(lambda: worker._deadline is not None)
        generator.gate.set()
        thread.join()


@pytest.fixture(scope="module")
def fake():
    return FakeGenerator()


@pytest.fixture
def served(tmp_path, fake):
    fake.gate.set()
    with serving(tmp_path / "jobs", fake, num_bytes=1 << 20, seconds=1.0) as server:
        yield server


def ask(port, method, path, body=None, **headers):
    """Status and JSON of an answer."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    if isinstance(body, dict):
        body, headers = json.dumps(body), {"content-type": "application/json"} | headers
    link.request(
        method, path, body, {k.replace("_", "-"): v for k, v in headers.items()}
    )
    answer = link.getresponse()
    content = answer.read()
    link.close()
    return answer.status, json.loads(content) if content[:1] in b"{[" else content


def create(port, **fields):
    return ask(port, "POST", "/v1/videos", {"prompt": PROMPT, **fields})


def until(happened, seconds=30):
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def png(side=16):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (200, 30, 30)).save(buffer, "png")
    return buffer.getvalue()


def url(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


PNG = url(png())


@functools.cache
def film(frames=9, side=32):
    """An mp4 of so many frames, at the frame rate of the model in the box."""
    clip = GeneratedClip(np.full((frames, side, side, 3), 90, np.uint8), 8.0)
    with tempfile.TemporaryDirectory() as folder:
        clip.save(pathlib.Path(folder, "film.mp4"))
        return pathlib.Path(folder, "film.mp4").read_bytes()


def test_a_clip_is_made_listed_played_and_removed(served):
    status, job = create(served.port, seconds="1", seed=3, size="32x24")
    assert (status, job["object"], job["size"], job["seconds"]) == (
        (200, "video", "32x24", "1.125")
    )
    path = f"/v1/videos/{job['id']}"
    done = until(
        lambda: (x := ask(served.port, "GET", path)[1])["progress"] == 100 and x
    )
    assert done["status"] == "completed" and done["expires_at"] > done["completed_at"]
    assert "--seed=3" in done["command"] and "seed=3" in done["python"]
    status, content = ask(served.port, "GET", f"{path}/content")
    with av.open(io.BytesIO(content)) as film:
        assert len([*film.decode(video=0)]) == 9
    assert ask(served.port, "GET", f"{path}/content?variant=thumbnail")[0] == 200
    assert ask(served.port, "GET", path + "/content", range="bytes=0-9")[0] == 206
    assert [x["id"] for x in ask(served.port, "GET", "/v1/videos")[1]["data"]] == [
        job["id"]
    ]
    assert ask(served.port, "DELETE", path)[1]["deleted"]
    assert ask(served.port, "GET", path)[0] == 404
    assert not (served.jobs.folder / job["id"]).exists()


def keyframe(seconds, image=PNG):
    return {"seconds": seconds, "image": image}


MISTAKES = {
    "unknown": ({"promt": "x"}, "promt"),
    "nested": ({"conditions": {"imag": "data:image/png;base64,AA=="}}, "imag"),
    "steps": ({"num_inference_steps": 0}, "num_inference_steps"),
    "many steps": ({"num_inference_steps": 10**9}, "num_inference_steps"),
    "endless": ({"num_inference_steps": "9" * 400}, "num_inference_steps"),
    "frames": ({"num_frames": -1}, "num_frames"),
    "frames that no latents make": ({"num_frames": 4000000}, "num_frames"),
    "both": ({"seconds": 1, "num_frames": 9}, "num_frames"),
    "size": ({"size": "32"}, "size"),
    "odd size": ({"size": "33x32"}, "width"),
    "large": ({"size": "99992x99992"}, "208"),
    "nan": ({"seconds": float("nan")}, "seconds"),
    "type": ({"seed": "three"}, "seed"),
    "seed": ({"seed": -1}, "seed"),
    "scale": ({"guidance_scale": 2.0**70}, "guidance_scale"),
    "fast": ({"fps": 2.0**70}, "fps"),
    "slow": ({"fps": 1e-20}, "fps"),
    "nul": ({"prompt": "a\0b"}, "prompt"),
    "long": ({"prompt": "x" * 30000}, "prompt"),
    "model": ({"model": "sora-2"}, "model"),
    "lora": ({"lora": "../../etc/passwd"}, "lora"),
    "sound": ({"sound": "loud"}, "sound"),
    "path": ({"input_reference": "/etc/passwd"}, "input_reference"),
    "file url": ({"input_reference": {"image_url": "file:///etc/passwd"}}, "input_ref"),
    "http url": ({"conditions": {"image": "http://127.0.0.1:1/x.png"}}, "image"),
    "no picture": ({"conditions": {"image": "data:image/png;base64,AAAA"}}, "image"),
    "no base64": ({"conditions": {"image": "data:image/png;base64,%%"}}, "image"),
    "not taken": ({"conditions": {"guide": "data:video/mp4;base64,AAAA"}}, "guide"),
    "its place": ({"keyframes": [{"seconds": 0.5, "image": PNG}]}, "conditions.keyf"),
    "no time": ({"conditions": {"keyframes": [PNG]}}, '"seconds": 0.5'),
    "a time": ({"conditions": {"keyframes": [keyframe("soon")]}}, "`conditions.keyfr"),
    "past time": ({"conditions": {"keyframes": [keyframe(-1)]}}, "'-1'"),
    "late": ({"conditions": {"keyframes": [keyframe(9)]}}, "keyframe at 9 s"),
    "keyframe": ({"conditions": {"keyframes": [keyframe(0, "/x")]}}, "keyframes.image"),
    "too many": ({"conditions": {"references": [PNG] * 17}}, "at most 16"),
    "two frames": ({"conditions": {"image": [PNG, PNG]}}, "given twice"),
    "strength alone": ({"strength": 0.5}, "restyle"),
    "strength": ({"conditions": {"restyle": PNG}, "strength": 2}, "strength"),
    "restyled sound": ({"conditions": {"restyle": PNG}, "sound": True}, "sound"),
    "mask alone": ({"conditions": {"mask": PNG}}, "mask"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(served, name):
    fields, said = MISTAKES[name]
    status, answer = create(served.port, **fields)
    assert status == 400 and said in answer["error"]["message"]
    assert "Traceback" not in str(answer) and str(served.jobs.folder) not in str(answer)
    assert [*served.jobs.folder.glob("video_*")] == []


def test_pictures_may_come_in_json(served):
    for fields in (
        {"input_reference": {"image_url": PNG}},
        {"conditions": {"image": PNG}},
    ):
        status, job = create(served.port, **fields)
        assert status == 200 and job["settings"]["conditions"] == ["image"]


def clip_url(frames=9, side=32):
    return url(film(frames, side), "video/mp4")


CONDITIONS = {
    "last frame": ({"last_image": PNG}, "last_image=your_last_image"),
    "suffix": ({"suffix": clip_url(3)}, "suffix=your_suffix"),
    "keyframes": (
        {"keyframes": [keyframe(0.5), keyframe("1")]},
        "keyframes=0.5:your_keyframes_1,1:your_keyframes_2",
    ),
    "references": (
        {"references": [PNG, PNG]},
        "references=your_references_1,your_references_2",
    ),
    "prefix": ({"prefix": clip_url(5)}, "prefix=your_prefix"),
    "interpolate": ({"interpolate": clip_url()}, "interpolate=your_interpolate"),
    "upscale": ({"upscale": clip_url(9, 16)}, "upscale=your_upscale"),
    "inpaint": ({"video": clip_url(), "mask": PNG}, "mask=your_mask"),
    "restyle": ({"restyle": clip_url()}, "strength=0.6 --restyle=your_restyle"),
    "sound": ({"from_video": clip_url()}, "from_video=your_from_video"),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_conditions_reach_the_generator(served, fake, name):
    """Each in JSON; and what is shown makes the same request again."""
    given, shown = CONDITIONS[name]
    status, job = create(served.port, conditions=given, num_frames=9, size="32x32")
    assert status == 200, job
    assert [*job["settings"]["conditions"]] == [*given]
    assert f"--{shown}" in job["command"]
    until(lambda: served.jobs.find(job["id"]).over)
    request = fake.asked[-1]
    for field, value in given.items():
        found = getattr(request, field)
        several = found if isinstance(found, tuple) else (found,)
        assert len(several) == (len(value) if isinstance(value, list) else 1)
    assert [x[0] for x in request.keyframes] == [0.5, 1.0][: len(request.keyframes)]
    text = job["python"].partition("clip = generator(")[2].partition("\n)")[0]
    fields = eval(f"dict(prompt={text.strip()})")
    assert {*given} <= {*fields}


def test_a_small_file_of_a_large_picture_is_refused(served):
    Image.new("1", (6000, 6000)).save(file := io.BytesIO(), "png")
    large = url(file.getvalue())
    assert len(large) < 1 << 16
    status, answer = create(served.port, input_reference=large)
    assert status == 400 and "36000000 pixels" in answer["error"]["message"]


def test_the_largest_that_can_be_made_is_told(served):
    _, answer = create(served.port, size="64x64", num_frames=33)
    assert "9 frames of 40x40" not in answer["error"]["message"]
    told = answer["error"]["message"].partition("the largest are ")[2]
    for part in told.rstrip(".").split(" or "):
        frames, size = part.split(" frames of ")
        assert create(served.port, size=size, num_frames=int(frames))[0] == 200


@pytest.mark.parametrize("body", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b""])
def test_bodies_that_are_no_json(served, body):
    kind = {"content_type": "application/json"}
    assert ask(served.port, "POST", "/v1/videos", body, **kind)[0] == 400


def form(**parts):
    """A multipart body; bytes are files."""
    lines = []
    for name, value in parts.items():
        file = '; filename="../../x.png"' if isinstance(value, bytes) else ""
        lines.append(f'--B\r\nContent-Disposition: form-data; name="{name}"{file}')
        content = value if isinstance(value, bytes) else value.encode()
        lines[-1] = f"{lines[-1]}\r\n\r\n".encode() + content
    return b"\r\n".join([*lines, b"--B--\r\n"])


def test_forms_with_files(served):
    kind = {"content_type": "multipart/form-data; boundary=B"}
    post = lambda **parts: ask(served.port, "POST", "/v1/videos", form(**parts), **kind)  # noqa: E731
    status, job = post(prompt=PROMPT, seconds="1", input_reference=png())
    assert status == 200 and job["settings"]["conditions"] == ["image"]
    assert (served.jobs.folder / job["id"] / "image-0.upload").read_bytes() == png()
    status, job = post(**{"prompt": PROMPT, "conditions[image]": png()})
    assert status == 200
    timed = {"conditions[keyframes][0.25]": png(), "conditions[keyframes][1]": png(8)}
    status, job = post(**{"prompt": PROMPT, "conditions[last_image]": png(), **timed})
    assert job["settings"]["conditions"] == ["last_image", "keyframes"]
    assert served.jobs.find(job["id"]).asked.keyframes == (0.25, 1.0)
    for name in ("conditions[keyframes]", "conditions[keyframes][x]"):
        status, answer = post(**{"prompt": PROMPT, name: png()})
        assert status == 400 and "seconds" in answer["error"]["message"]
    for wrong in ({"prompt": PROMPT, "x": "1"}, {"prompt": PROMPT, "prompt2": png()}):
        assert post(**wrong)[0] == 400
    assert post(prompt=PROMPT, input_reference=b"no picture")[0] == 400
    assert ask(served.port, "POST", "/v1/videos", b"--B\r\nx", **kind)[0] == 400
    assert not [*served.jobs.folder.parent.glob("*.png")]


def test_paths_lead_nowhere(served):
    for path in ("/v1/videos/..%2f..%2fetc", "/v1/videos/%2e%2e/content", "/../etc"):
        assert ask(served.port, "GET", path)[0] == 404
        assert ask(served.port, "DELETE", path)[0] in (404, 405)


def test_large_bodies_and_slow_ones_end(served):
    assert create(served.port, prompt="x" * (2 << 20))[0] == 413
    with socket.create_connection(("127.0.0.1", served.port)) as link:
        link.sendall(b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\n")
        link.sendall(b"Content-Type: application/json\r\nContent-Length: 500\r\n\r\n{")
        assert b" 408 " in link.recv(1000)
    with socket.create_connection(("127.0.0.1", served.port)) as link:
        link.sendall(b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\n")
        link.sendall(b"Content-Type: application/json\r\n")
        link.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(40):
                link.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        assert b" 413 " in link.recv(1000)
    assert ask(served.port, "GET", "/health")[1]["status"] == "ok"


def test_half_an_upload_leaves_nothing(served):
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", served.port)) as link:
            link.sendall(b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\n")
            link.sendall(b"Content-Type: multipart/form-data; boundary=B\r\n")
            link.sendall(b"Content-Length: 900000\r\n\r\n" + form(prompt="x")[:60])
    assert until(lambda: create(served.port, prompt="y" * 70_000)[0] != 503)
    assert not [*served.jobs.folder.glob("video_*")]


def test_other_sites_and_names_are_refused(served):
    wrong = [{"origin": x} for x in ("http://evil.example", "http://[", "null")]
    wrong += [{"host": x} for x in ("evil.example", "[", "[::1", "a b", "")]
    for headers in wrong:
        assert ask(served.port, "GET", "/v1/videos", **headers)[0] == 403
    own = f"http://127.0.0.1:{served.port}"
    assert ask(served.port, "GET", "/v1/videos", origin=own)[0] == 200


def test_a_token_is_asked_for(tmp_path, fake):
    with serving(tmp_path, fake, token="secret") as server:
        assert ask(server.port, "GET", "/v1/videos")[0] == 401
        wrong = {"authorization": "Bearer s\xe9cret"}
        assert ask(server.port, "GET", "/v1/videos", **wrong)[0] == 401
        shown = {"authorization": "Bearer secret"}
        assert ask(server.port, "GET", "/v1/videos", **shown)[0] == 200
        assert ask(server.port, "GET", "/health")[0] == 200
        assert b"<title>" in ask(server.port, "GET", "/")[1]


def test_others_are_served_with_a_token_only():
    done = command("serve", "--host=0.0.0.0")
    assert done.returncode == 1 and "--token" in done.stderr


def test_a_port_that_is_taken_is_told_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = command("serve", f"--port={taken.getsockname()[1]}")
    assert done.returncode == 1 and "in use" in done.stderr


def test_a_full_queue_says_so(tmp_path, fake):
    fake.gate.clear()
    with serving(tmp_path, fake, Limits(waiting=3)) as server:
        until(lambda: create(server.port)[0] == 429)
        assert len(server.jobs.waiting()) == 3
        fake.gate.set()
        until(lambda: not server.jobs.waiting())
        assert create(server.port)[0] == 200


def test_a_flood_is_answered(served, fake):
    statuses = []
    flood = [
        threading.Thread(target=lambda: statuses.append(create(served.port)[0]))
        for _ in range(100)
    ]
    for each in flood:
        each.start()
    for each in flood:
        each.join()
    assert set(statuses) <= {200, 429} and 200 in statuses
    assert ask(served.port, "GET", "/v1/videos?limit=100")[0] == 200


def test_what_is_given_is_read_one_at_a_time(served, monkeypatch):
    """A small file may hold a large picture, and Pillow's limit is for one thread."""
    inside, most, receive = [], [], Jobs.receive

    def watched(jobs, files):
        inside.append(None)
        most.append(len(inside))
        time.sleep(0.02)
        try:
            return receive(jobs, files)
        finally:
            inside.pop()

    monkeypatch.setattr(Jobs, "receive", watched)
    with ThreadPoolExecutor(6) as pool:
        answers = [*pool.map(lambda seed: create(served.port, seed=seed), range(6))]
    assert [status for status, _ in answers] == [200] * 6 and max(most) == 1


def test_jobs_are_made_in_order_and_cancelled(tmp_path, fake):
    fake.gate.clear()
    fake.made.clear()
    with serving(tmp_path, fake) as server:
        ids = [create(server.port, prompt=f"{i}")[1]["id"] for i in range(4)]
        until(lambda: server.jobs.find(ids[0]).status == "in_progress")
        for id in (ids[0], ids[2]):  # one that runs, and one that waits
            assert ask(server.port, "DELETE", f"/v1/videos/{id}")[0] == 200
        fake.gate.set()
        until(lambda: server.jobs.find(ids[3]).status == "completed")
        assert fake.made == ["1", "3"]
        assert {x.name for x in tmp_path.glob("video_*")} == {ids[1], ids[3]}


@pytest.mark.parametrize("grace", [20.0, 0.0])
def test_what_runs_at_the_end_is_finished_or_stored(tmp_path, fake, grace):
    fake.gate.clear()
    with serving(tmp_path, fake, grace=grace) as server:
        ids = [create(server.port)[1]["id"] for _ in range(2)]
        until(lambda: server.jobs.find(ids[0]).status == "in_progress")
    first, second = Jobs(tmp_path).all()
    assert [first.id, second.id] == ids
    assert first.status == ("completed" if grace else "queued")
    assert second.status == "queued"
    with serving(tmp_path, fake) as server:
        until(lambda: all(job.status == "completed" for job in server.jobs.all()))


def test_a_client_that_goes_away_cancels(tmp_path, fake):
    fake.gate.clear()
    with serving(tmp_path, fake) as server:
        body = json.dumps({"prompt": PROMPT}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as link:
            link.sendall(b"POST /v1/videos/sync HTTP/1.1\r\nHost: localhost\r\n")
            link.sendall(b"Content-Type: application/json\r\n")
            link.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
            until(server.jobs.all)
        until(lambda: not server.jobs.all())
        fake.gate.set()
        fields = {"prompt": PROMPT, "num_inference_steps": 2}
        status, content = ask(server.port, "POST", "/v1/videos/sync", fields)
        assert status == 200 and b"ftyp" in content[:16]


def test_a_failure_is_the_job_s_own(tmp_path, fake):
    with serving(tmp_path, BrokenGenerator()) as server:
        id = create(server.port)[1]["id"]
        job = until(lambda: (x := server.jobs.find(id)).over and x)
        assert job.status == "failed" and "inside" not in job.error
        assert ask(server.port, "GET", f"/v1/videos/{id}/content")[0] == 404


def test_results_expire_and_give_way(tmp_path, fake):
    fake.gate.set()
    with serving(tmp_path, fake, Limits(kept=2)) as server:
        ids = [create(server.port)[1]["id"] for _ in range(4)]
        until(lambda: all((x := server.jobs.find(i)) is None or x.over for i in ids))
        server.jobs.expire()
        assert [job.id for job in server.jobs.all()] == ids[2:]
        server.jobs.limits = Limits(seconds=0.0)
        server.jobs.expire()
        assert not server.jobs.all() and not [*tmp_path.glob("video_*")]


def test_openai_s_client_works(served):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{served.port}/v1", api_key="x", max_retries=0
    )
    video = client.videos.create_and_poll(
        prompt=PROMPT,
        seconds="1",
        size="32x32",
        input_reference=("first.png", png(), "image/png"),
        extra_body={"num_inference_steps": 3, "seed": 5},
        poll_interval_ms=50,
    )
    assert (video.status, video.progress, video.seconds) == ("completed", 100, "1.125")
    assert b"ftyp" in client.videos.download_content(video.id).read()[:16]
    assert [x.id for x in client.videos.list(limit=5)] == [video.id]
    assert [x.id for x in client.models.list()] == ["fake"]
    with pytest.raises(openai.BadRequestError, match="promt"):
        client.videos.create(prompt=PROMPT, extra_body={"promt": "x"})
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_a_killed_server_goes_on(tmp_path):
    """The model in the box, killed under load and told to stop, loses no clip."""
    port = free_port()

    def start():
        line = [sys.executable, "-m", "jvdit.serve", f"--port={port}", "--grace=0"]
        line += [f"--out={tmp_path / 'jobs'}", "--max_steps=4"]
        with (tmp_path / "log").open("a") as log:
            process = subprocess.Popen(line, stdout=log, stderr=log)
        wait_for([process], lambda: _health(port))
        return process

    first = start()
    try:
        fields = {"num_inference_steps": 2, "num_frames": 1}
        ids = [create(port, **fields, seed=i)[1]["id"] for i in range(12)]
        seen = lambda: {  # noqa: E731
            x["id"]: x for x in ask(port, "GET", "/v1/videos")[1]["data"]
        }
        done = lambda: [i for i, x in seen().items() if x["status"] == "completed"]  # noqa: E731
        wait_for([first], done)
        before = done()
        first.kill()
        first.wait()
        first = start()
        now = seen()
        assert [*reversed(now)] == ids
        assert all(now[i]["status"] == "completed" for i in before)
        wait_for([first], lambda: len(done()) == len(ids))
        for i in ids:
            assert b"ftyp" in ask(port, "GET", f"/v1/videos/{i}/content")[1][:16]
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) in (0, -signal.SIGTERM)
    finally:
        kill([first])
    assert "Traceback" not in (tmp_path / "log").read_text()


def _health(port):
    with contextlib.suppress(OSError):
        return ask(port, "GET", "/health")[1]["status"] in ("ok", "warming up")
    return False


def test_only_adapters_that_are_offered_may_be_named(fake):
    tuned = FakeGenerator()
    source = {"lora": "all.safetensors"}
    served = Served(fake, "fake", source=source, loras={"gravity": tuned})
    asked = VideoRequest.of({"prompt": PROMPT, "lora": "gravity"})
    told = served.told(*served.order(asked, {}), asked.lora)
    assert "--lora=all.safetensors,your_gravity " in told["command"]
    assert "strengths(['all.safetensors,your_gravity'])" in told["python"]
    compile(told["python"], "recipe", "exec")
    assert served.maker(asked) is tuned and served.card["loras"] == ["gravity"]
    with pytest.raises(ValueError, match="gravity is"):
        served.order(VideoRequest.of({"prompt": PROMPT, "lora": "other"}), {})


def test_an_offered_adapter_that_is_no_file_is_told(tmp_path):
    done = command("serve", "--offer_lora=gravity", "--port=0", f"--out={tmp_path}")
    assert done.returncode == 1 and "must read NAME=FILE" in done.stderr
    done = command("serve", "--offer_lora=x=no.file", "--port=0", f"--out={tmp_path}")
    assert done.returncode == 1 and "no.file" in done.stderr


def test_paths_of_cameras_and_spans_of_sounds_are_taken(fake):
    """By a model that has such conditions; spans are no files."""
    more = "inpaint_sound", "guide", "camera"
    conditions = (*fake.model.conditions, *more)
    model = dataclasses.replace(fake.model, conditions=conditions)
    served = Served(Generator(model, fake.mesh), "fake")
    accepts = {x["name"]: x["accepts"] for x in served.card["conditions"]}
    assert accepts["camera"] == "application/json" and accepts["guide"] == "video/*"
    files = Uploads([*accepts])
    for span in ([0, 0.5], "0.75:1", "1.05:"):
        files.put_span(span, "conditions.keep_sound")
    for wrong in ("soon", [1], [[0, 1], 2], 3, {"a": 1}, [0, True]):
        with pytest.raises(ValueError, match="must be spans"):
            files.put_span(wrong, "conditions.keep_sound")
    with pytest.raises(ValueError, match="isn't taken"):
        Uploads(["image"]).put_span([0, 1], "conditions.keep_sound")
    files.put_span([2, 0], "conditions.keep_sound")  # an end of 0 is none that is open
    assert files.keep_sound.pop() == (2.0, 0.0)
    spans = files.keep_sound
    assert spans == [(0.0, 0.5), (0.75, 1.0), (1.05, math.inf)]
    asked = VideoRequest.of({"prompt": PROMPT, "num_frames": 9}, (), spans)
    with pytest.raises(ValueError, match="`keep_sound` says what to keep"):
        served.order(asked, {})
    request, settings = served.order(asked, {"from_sound": ["a"], "camera": ["b"]})
    assert request.keep_sound == (*spans,)
    told = served.told(request, settings)
    assert "--keep_sound=0:0.5,0.75:1,1.05:" in told["command"]
    assert "--camera=your_camera" in told["command"]
    assert '(1.05, float("inf"))' in told["python"]


def test_what_opens_the_model_is_said_of_each_clip(fake):
    asked = VideoRequest.of({"prompt": PROMPT})
    for source, opened in (
        ({}, ""),
        ({"quantize": "int8"}, "quantize='int8'"),
        ({"pretrained": "wan", "quantize": "int8"}, "'wan', quantize='int8'"),
    ):
        served = Served(fake, "fake", source=source)
        told = served.told(*served.order(asked, {}))
        assert f"Generator.load({opened})" in told["python"]
        assert all(f"--{k}={v}" in told["command"] for k, v in source.items())


def test_a_server_that_marks_says_so_and_restyles_nothing(fake):
    mark = Watermark(b"a key of the tests, long enough")
    marking = Generator(fake.model, fake.mesh, watermark=mark)
    served = Served(marking, "fake", source={"watermark": "your_key"})
    asked = VideoRequest.of({"prompt": PROMPT})
    told = served.told(*served.order(asked, {}))
    assert told["settings"]["watermark"] == "gaussian shading"
    assert "--watermark=your_key" in told["command"]
    assert "Watermark.read('your_key')" in told["python"]
    assert "restyle" not in [x["name"] for x in served.card["conditions"]]
    with pytest.raises(ValueError, match="`restyle` begins with footage"):
        served.order(asked, {"restyle": ["film.mp4"]})


def test_a_key_that_can_be_guessed_marks_no_server(tmp_path):
    (tmp_path / "key").write_bytes(b"abc")
    done = command("serve", f"--watermark={tmp_path / 'key'}", "--port=0")
    assert done.returncode == 1 and "can be guessed" in done.stderr


def test_the_largest_request_is_that_of_the_rows(fake):
    served = Served(fake, "fake")
    assert served.tokens == 208 and served.tokens_of(9, 32, 32) == 80
    assert served.card["conditions"][0]["name"] == "image"
    assert fake.complete(Request("")).size == (9, 32, 32)
