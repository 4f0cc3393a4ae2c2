"""Ids of the Hugging Face Hub, against a local server and a cache in its layout."""

import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
import urllib.parse

import numpy as np
import pytest
from safetensors.numpy import save_file

from jvdit.weights import hub

pytest.importorskip("huggingface_hub")
SHA = "0123456789" * 4
NETWORKS = ("transformer", "vae", "text_encoder")


def release(folder):
    """The files of a pipeline, and others that nobody needs."""
    index = {"_class_name": "WanPipeline", "scheduler": ["diffusers", "UniPC"]}
    texts = {"model_index.json": json.dumps(index), "README.md": "x"}
    texts |= {"scheduler/scheduler_config.json": "{}", "tokenizer/spiece.model": "x"}
    texts |= {f"{name}/config.json": "{}" for name in NETWORKS}
    texts |= {"vae/old.bin": "x", "assets/film.mp4": "x", "vae/notes.md": "x"}
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)
    for name in NETWORKS:
        for variant in ("", ".fp16"):
            file = folder / name / f"diffusion_pytorch_model{variant}.safetensors"
            save_file({"a": np.zeros(2, np.float32)}, file)


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        path = path.removeprefix("/api/models")
        owner, name, *rest = path.strip("/").split("/")
        error = {"gated": (403, "GatedRepo"), "none": (404, "RepoNotFound")}.get(owner)
        if error:
            return self.answer(b"", error[0], {"X-Error-Code": error[1]})
        root = self.server.root / owner / name
        files = [x for x in sorted(root.rglob("*")) if x.is_file()]
        names = [x.relative_to(root).as_posix() for x in files]
        if rest[:1] == ["resolve"]:
            file = "/".join(rest[2:])
            if file not in names:
                return self.answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
            self.server.asked.add(f"{name}/{file}")
            data = (root / file).read_bytes()
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self.answer(data, 200, {"ETag": etag, "X-Repo-Commit": SHA})
        if rest[:1] == ["tree"]:
            held = [
                {"type": "file", "path": x, "size": y.stat().st_size, "oid": "0" * 40}
                for x, y in zip(names, files, strict=True)
            ]
        else:
            held = {"id": f"{owner}/{name}", "sha": SHA}
            held["siblings"] = [{"rfilename": x} for x in names]
        return self.answer(json.dumps(held).encode(), 200, {})

    def answer(self, data, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def server(tmp_path):
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.root, made.asked = tmp_path / "served", set()
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


_SCRIPT = """
import sys
from jvdit.weights import hub
for line in sys.argv[1:]:
    function, *arguments = line.split()
    try:
        print(getattr(hub, function)(*arguments))
    except (ValueError, FileNotFoundError) as error:
        print(type(error).__name__, error)
"""


def run(server, cache, *lines, up=True):
    """What the functions of `hub` return in a process of their own, or tell."""
    port = server.server_address[1] if up else 9
    env = {k: x for k, x in os.environ.items() if not k.startswith(("HF_", "http"))}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(cache)}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _SCRIPT, *lines]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def files_of(folder):
    folder = pathlib.Path(folder)
    return {x.relative_to(folder).as_posix() for x in folder.rglob("*") if x.is_file()}


def test_a_release_is_downloaded_once_and_only_what_is_needed(tmp_path, server):
    release(server.root / "me/tiny")
    asked = "release_folder me/tiny"
    (found,) = run(server, tmp_path / "cache", asked)
    needed = {"model_index.json", "scheduler/scheduler_config.json"}
    needed |= {"tokenizer/spiece.model"} | {f"{x}/config.json" for x in NETWORKS}
    weights = "diffusion_pytorch_model{}.safetensors"
    needed |= {f"{x}/{weights.format('')}" for x in NETWORKS}
    assert files_of(found) == needed == {x[5:] for x in server.asked}
    # What lies in the cache in part is completed.
    for name in (f"vae/{weights.format('')}", "text_encoder/config.json"):
        (pathlib.Path(found) / name).unlink()
        assert run(server, tmp_path / "cache", f"{asked}@{SHA}") == [found]
        assert (pathlib.Path(found) / name).exists()
    server.asked.clear()
    lines = asked, f"{asked} fp16", "release_folder me/other"
    again, *refused = run(server, tmp_path / "cache", *lines, up=False)
    assert again == found and not server.asked, "the cache is taken without a question"
    for line in refused:
        assert "isn't whole in the hub's cache, and can't be downloaded" in line
    run(server, tmp_path / "cache", f"{asked} fp16")
    assert files_of(found) == needed | {
        f"{x}/{weights.format('.fp16')}" for x in NETWORKS
    }


def test_what_cannot_be_had_is_told_in_a_line(tmp_path, server):
    release(server.root / "me/pickles")
    for file in (server.root / "me/pickles/vae").glob("*.safetensors"):
        file.unlink()
    original = server.root / "me/original"
    original.mkdir(parents=True)
    (original / "config.json").touch()
    lines = run(
        server,
        tmp_path,
        "release_folder gated/x",
        "release_folder none/x",
        "release_folder me/pickles",
        "release_folder me/original",
        "adapter_file none/x",
    )
    words = "agreement.*hf auth login", "no such model.*hf auth login"
    words += "no safetensors in vae/.*pickles", "-Diffusers", "no such model"
    for line, pattern in zip(lines, words, strict=True):
        with pytest.raises(ValueError, match=pattern):
            raise ValueError(line)
        assert line.startswith("ValueError ")
    assert not server.asked


def test_adapters(tmp_path, server):
    for name, files in (
        ("one", ["low/a b.safetensors"]),
        ("usual", ["pytorch_lora_weights.safetensors", "other.safetensors"]),
        ("peft", ["adapter_model.safetensors", "adapter_config.json"]),
        ("many", ["a.safetensors", "in/b.safetensors", "x.bin"]),
    ):
        for file in files:
            path = server.root / "me" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(file)
    asked = "me/one", "me/usual", "me/peft", "me/many/in/b.safetensors", "me/many"
    asked = [f"adapter_file {name}" for name in asked]
    *found, refused = run(server, tmp_path, *asked)
    paths = [pathlib.Path(x) for x in found]
    names = "a b", "pytorch_lora_weights", "adapter_model", "b"
    assert [x.stem for x in paths] == [*names] and all(x.is_file() for x in paths)
    assert (paths[2].parent / "adapter_config.json").exists()
    assert "me/many/a.safetensors, me/many/in/b.safetensors" in refused
    server.asked.clear()
    assert run(server, tmp_path, *asked[1:4], up=False) == found[1:]
    assert not server.asked


def test_what_is_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    ids = "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "a/b@main", "a/b/c/d.safetensors"
    assert all(hub.is_id(name) for name in ids)
    paths = "runs/x", "./a/b", "/a/b", "a", "../a", str(tmp_path), "a/b c"
    assert not any(hub.is_id(name) for name in paths)
    assert hub.release_folder("runs/x") == pathlib.Path("runs/x")
    assert hub.adapter_file(tmp_path) == tmp_path
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'jvdit\[hub\]'"):
        hub.release_folder("a/b")
