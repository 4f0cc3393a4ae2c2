"""Files say that they are AI-generated, and a signature holds what they say."""

import json
import pathlib
import stat
import subprocess
import sys

import av
import numpy as np
import pytest
from PIL import Image

c2pa = pytest.importorskip("c2pa")

from cryptography.hazmat.primitives import serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import dsa  # noqa: E402
from doors import command  # noqa: E402

from jvdit.data.media.reader import read_metadata  # noqa: E402
from jvdit.data.media.writer import ClipWriter  # noqa: E402
from jvdit.data.sheets import png  # noqa: E402
from jvdit.generation.generator import Generator  # noqa: E402
from jvdit.generation.provenance import ASSERTION, Provenance  # noqa: E402
from jvdit.generation.request import Request  # noqa: E402
from jvdit.generation.results import STATEMENT, GeneratedClip  # noqa: E402
from jvdit.machine import signing_key  # noqa: E402
from jvdit.machine.energy import Energy  # noqa: E402
from jvdit.machine.signing_key import KEY, ROOT, local_key, own_key  # noqa: E402
from jvdit.serving.jobs import CLIP as CLIP_FILE  # noqa: E402
from jvdit.serving.jobs import POSTER, Jobs  # noqa: E402
from jvdit.serving.preview import webp  # noqa: E402
from jvdit.serving.served import Served  # noqa: E402
from jvdit.serving.video_request import VideoRequest  # noqa: E402
from jvdit.serving.worker import Worker  # noqa: E402

SETTINGS = {"prompt": "一只猫", "levels": [1.0, 0.94], "none": None, "deep": [[0, 1]]}
RNG = np.random.default_rng(0)
CLIP = GeneratedClip(RNG.integers(0, 256, (9, 32, 48, 3), np.uint8), 8.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("config")


@pytest.fixture(scope="module")
def signed(folder):
    return Provenance(local_key(folder)).of("abc123")


def read(path, folder=None):
    """The state of a file's signature, what is wrong, and its manifest."""
    trust = {"trust_anchors": (folder / ROOT).read_text()} if folder else {}
    verify = {"verify_trust": bool(folder)}
    context = c2pa.Context.from_dict({"trust": trust, "verify": verify})
    with c2pa.Reader(str(path), context=context) as reader:
        told = json.loads(reader.json())
    codes = {x["code"] for x in told.get("validation_status", [])}
    return told["validation_state"], codes, told["manifests"][told["active_manifest"]]


def assertions(manifest):
    return {x["label"]: x["data"] for x in manifest["assertions"]}


def source_type(manifest):
    (action,) = assertions(manifest)["c2pa.actions.v2"]["actions"]
    assert action["action"] == "c2pa.created"
    return action["digitalSourceType"].rpartition("/")[2]


def save(path, signed, *given):
    CLIP.save(path, {"jvdit": SETTINGS}, finish=signed.signing(SETTINGS, *given))
    return path


def test_a_clip_says_what_it_is_and_the_signature_holds_it(tmp_path, folder, signed):
    path = save(tmp_path / "clip.mp4", signed)
    state, codes, manifest = read(path, folder)
    assert (state, codes) == ("Trusted", set())
    assert source_type(manifest) == "trainedAlgorithmicMedia"
    told = assertions(manifest)[ASSERTION]
    assert json.loads(told["settings"]) == SETTINGS and told["model"] == "abc123"
    # Who doesn't know the root can still see that nothing was changed.
    assert read(path)[0] == "Valid"
    # Nothing else of the file has changed.
    assert read_metadata(path) == {"jvdit": SETTINGS}
    CLIP.save(tmp_path / "plain.mp4", {"jvdit": SETTINGS})
    ours, plain = (
        np.stack([frame.to_ndarray() for frame in av.open(str(x)).decode(video=0)])
        for x in (path, tmp_path / "plain.mp4")
    )
    np.testing.assert_array_equal(ours, plain)
    with av.open(str(path)) as container:
        assert container.metadata["description"] == STATEMENT
    assert not [*tmp_path.glob(".tmp*")]


def test_pictures_are_signed_too(tmp_path, folder, signed):
    sheet = png(CLIP.video[0], {"Description": STATEMENT, "Comment": "猫"})
    for name, data in (("a.png", sheet), ("b.webp", webp([*CLIP.video[:2]]))):
        (tmp_path / name).write_bytes(signed.signed(data, SETTINGS))
        assert read(tmp_path / name, folder)[:2] == ("Trusted", set())
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.text["Comment"] == "猫"
    with Image.open(tmp_path / "b.webp") as poster:
        assert STATEMENT in poster.getexif().values() and poster.n_frames == 2


@pytest.mark.parametrize("where", [0.3, 0.5, 0.9])
def test_a_flipped_byte_is_found(where, tmp_path, folder, signed):
    path = save(tmp_path / "clip.mp4", signed)
    data = bytearray(path.read_bytes())
    begins = data.rfind(b"mdat") + 4
    data[begins + int(where * (len(data) - begins))] ^= 1
    path.write_bytes(data)
    state, codes, _ = read(path, folder)
    assert state == "Invalid" and "assertion.bmffHash.mismatch" in codes


def test_what_was_given_is_an_ingredient(tmp_path, folder, signed):
    """With its own manifest; what can't be read is no reason to refuse a clip."""
    first, other = save(tmp_path / "first.mp4", signed), tmp_path / "other.png"
    other.write_bytes(png(CLIP.video[0]))
    (tmp_path / "odd.bin").write_bytes(b"\x89PNG what is this")
    request = Request("x", prefix=str(first), keyframes=((0.5, str(other)),))
    more = str(tmp_path / "odd.bin"), str(tmp_path / "absent"), None
    state, codes, manifest = read(
        save(tmp_path / "second.mp4", signed, request, *more), folder
    )
    assert (state, codes) == ("Trusted", set())
    assert source_type(manifest) == "compositeWithTrainedAlgorithmicMedia"
    ingredients = {x["title"]: x for x in manifest["ingredients"]}
    assert {*ingredients} == {"first.mp4", "other.png"}
    assert {x["relationship"] for x in ingredients.values()} == {"inputTo"}
    assert "active_manifest" in ingredients["first.mp4"]
    given = Request("x", image=CLIP.video[0])  # pixels, of no file
    _, _, manifest = read(save(tmp_path / "third.mp4", signed, given))
    assert source_type(manifest) == "compositeWithTrainedAlgorithmicMedia"


def test_nothing_is_fetched_that_an_upload_names(tmp_path, signed, monkeypatch):
    """A picture may name an address for its manifest, which would be asked for it."""
    import http.server
    import threading

    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/manifest.c2pa"
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999'
        '/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" xmlns:dcterms="http://purl'
        f'.org/dc/terms/" dcterms:provenance="{address}"/></rdf:RDF></x:xmpmeta>'
    )
    path = tmp_path / "upload.png"
    path.write_bytes(png(CLIP.video[0], {"XML:com.adobe.xmp": xmp}))
    save(tmp_path / "clip.mp4", signed, str(path))
    assert not asked
    with pytest.raises(c2pa.C2paError):  # the bait works
        c2pa.Reader(str(path))
    server.shutdown()
    server.server_close()
    assert asked


def test_a_clip_that_fails_leaves_nothing(tmp_path, signed):
    path = tmp_path / "clip.mp4"
    with pytest.raises(ZeroDivisionError):
        with ClipWriter(path, (32, 32), 8.0, finish=lambda _: 1 / 0):
            raise ZeroDivisionError
    with pytest.raises(OSError, match="C2PA"):
        (tmp_path / "no.mp4").write_bytes(b"\x89PNG what is this")
        signed.signing(SETTINGS)(tmp_path / "no.mp4")
    assert {x.name for x in tmp_path.iterdir()} == {"no.mp4"}


def test_the_key_is_made_once_and_is_the_users_alone(folder, signed, tmp_path):
    assert stat.S_IMODE((folder / KEY).stat().st_mode) == 0o600
    assert b"PRIVATE" not in (folder / ROOT).read_bytes()
    assert local_key(folder) == local_key(folder)
    assert local_key(tmp_path) != local_key(folder)
    made = subprocess.run(
        [
            sys.executable,
            "-c",
            "import pathlib, sys; from jvdit.machine.signing_key import local_key; "
            "print(local_key(pathlib.Path(sys.argv[1])).private.decode())",
            str(folder),
        ],
        capture_output=True,
        text=True,
    )
    assert made.stdout.strip().encode() == local_key(folder).private.strip()


def test_a_key_of_ones_own(tmp_path, folder):
    key = folder / KEY
    assert own_key(key, key).algorithm == "es256"
    other = local_key(tmp_path) and tmp_path / KEY
    with pytest.raises(ValueError, match="another key"):
        own_key(key, other)
    with pytest.raises(ValueError, match="no private key"):
        own_key(folder / ROOT, key)
    (tmp_path / "empty.pem").write_bytes(b"")
    with pytest.raises(ValueError, match="no certificates"):
        own_key(key, tmp_path / "empty.pem")
    # The root isn't issued for signing, which C2PA finds before anything is made.
    alone = own_key(key, key)._replace(chain=(folder / ROOT).read_bytes())
    with pytest.raises(ValueError, match="the key can't sign"):
        Provenance(alone)
    strange = dsa.generate_private_key(1024).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (tmp_path / "dsa.pem").write_bytes(strange)
    with pytest.raises(ValueError, match="another key"):
        own_key(tmp_path / "dsa.pem", key)
    with pytest.raises(ValueError, match="must hold a key"):
        signing_key._algorithm(object(), pathlib.Path("x"))


def test_a_server_signs_clips_and_posters(tmp_path, signed):
    """With what was uploaded for them."""
    jobs = Jobs(tmp_path)
    id, files = jobs.receive({"image": [png(CLIP.video[0])]})
    told = {"settings": {"seed": 3}}
    job = jobs.add(id, files, VideoRequest(prompt="a"), told)
    worker = Worker(jobs, Served(Generator.load(), "box"), signed=signed)
    spent = Energy(3.0, "modelled: in a test")
    worker.finish(job, CLIP, spent)
    worker.stop(0.0)
    assert job.status == "completed"
    for name in (CLIP_FILE, POSTER):
        state, _, manifest = read(jobs.path(id, name))
        assert state == "Valid"
        told = json.loads(assertions(manifest)[ASSERTION]["settings"])
        size = {"frames": 9, "height": 32, "width": 48}
        assert told == {"prompt": "a", "seed": 3, "energy": spent.told, **size}
        assert [x["title"] for x in manifest["ingredients"]] == ["image-0.upload"]
    assert read_metadata(jobs.path(id, CLIP_FILE))["jvdit"]["prompt"] == "a"


HIDDEN = "import sys; sys.modules['c2pa'] = None\n"


@pytest.mark.parametrize(
    "flags, hidden, said",
    [
        ((), "", ""),
        (("--noc2pa",), "", ""),
        ((), HIDDEN, "c2pa is missing: pip install 'jvdit[provenance]'"),
    ],
    ids=["signed", "off", "not installed"],
)
def test_from_the_command_line(flags, hidden, said, workdir, tmp_path, monkeypatch):
    """The library may be missing: one line says so, and the clip is there."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "run.py").write_text(
        f"{hidden}import runpy\n"
        "runpy.run_module('jvdit.sample', run_name='__main__', alter_sys=True)\n"
    )
    line = [sys.executable, str(tmp_path / "run.py"), "a", f"--workdir={workdir}/dit"]
    line += [f"--out={tmp_path / 'out'}", "--steps=1", *flags]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert said in done.stderr and done.stderr.count("C2PA") == bool(said)
    for name in ("a_0.mp4", "sheet.png"):
        path = str(tmp_path / "out" / name)
        signed = c2pa.Reader.try_create(path)
        assert (signed is not None) == (not flags and not hidden)
    assert read_metadata(tmp_path / "out/a_0.mp4")["jvdit"]["steps"] == 1


def test_half_a_key_is_refused():
    done = command("sample", "a", "--c2pa_key=x.pem")
    assert done.returncode == 1 and "go together" in done.stderr
