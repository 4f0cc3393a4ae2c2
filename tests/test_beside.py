"""What lies beside clips: guides and camera paths, from their files to a network."""

import json

import numpy as np
import pytest
from media_files import numbered, numbers

from jvdit.data.cameras import CameraPath, parse_camera, plucker_rays, read_camera
from jvdit.data.ingest.clip_file import Recipe
from jvdit.data.ingest.ingest import ingest
from jvdit.data.ingest.listing import list_items
from jvdit.data.media.writer import encode_clip
from jvdit.data.sources import open_source
from jvdit.data.world import World
from jvdit.data.world.render import SHAPE_PALETTE
from jvdit.generation.request import Request

FPS = 8


def turned(angle):
    """Rotations about the upright axis by angles in radians."""
    c, s, zero = np.cos(angle), np.sin(angle), np.zeros_like(angle)
    rows = [c, zero, s, zero, zero + 1, zero, -s, zero, c]
    return np.stack(rows, axis=-1).reshape(-1, 3, 3)


def moving(count, width=64, height=48):
    """A camera that turns and moves."""
    at = np.arange(count)
    shift = np.stack([at * 0.5, -at * 0.25, at * 1.0], axis=-1)
    world = np.concatenate([turned(0.05 * at), shift[..., None]], axis=-1)
    inside = np.tile([50.0, 50.0, width / 2 + 2, height / 2], (count, 1))
    return CameraPath(world, inside, height, width, FPS)


def fields(path):
    return json.loads(path.json())


def write(path, first=0, count=12, size=(48, 64)):
    frames = numbered(first + count)[first:, :1, :1]
    encode_clip(path, np.broadcast_to(frames, (count, *size, 3)), FPS)


RECIPE = Recipe(
    frames=5, fps=FPS, sizes=((32, 48),), windows="all", audio_rate=0, preset="fast"
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of videos with and without something beside them, and its clips."""
    root = tmp_path_factory.mktemp("videos")
    for i, name in enumerate(("both", "plain", "short", "wide", "mirrored", "brief")):
        write(root / f"{name}.mp4", i)
    write(root / "both.guide.mp4", 20, size=(96, 128))
    write(root / "short.guide.mp4", 21, count=3)
    write(root / "wide.guide.mp4", 22, size=(48, 96))
    write(root / "lonely.guide.mp4", 9)  # of no video: one itself
    for name, count in (("both", 12), ("mirrored", 12), ("brief", 4)):
        file = fields(moving(count))
        if name == "mirrored":
            file["world_to_camera"][3][0] = [-x for x in file["world_to_camera"][3][0]]
        (root / f"{name}.camera.json").write_text(json.dumps(file))
    report = ingest([root], root.parent / "beside", RECIPE, workers=1)
    return root, root.parent / "beside", {x["file"]: x for x in report.files}


def test_what_lies_beside_a_video_is_cut_as_it_is(prepared):
    """The same window, rate, size and crop; a clip without has none."""
    root, out, files = prepared
    source = open_source(str(out), beside=("guide", "camera"))
    assert [files[f"{x}.mp4"]["clips"] for x in ("both", "plain")] == [2, 2]
    assert files["lonely.guide.mp4"]["clips"] == 2
    assert "both.guide.mp4" not in files and "both.camera.json" not in files
    clips = {}
    for clip in source.read(range(len(source))):
        clips.setdefault(int(numbers(clip["video"])[0]), clip)
    path, poses = read_camera(root / "both.camera.json"), []
    for start, first in ((0, 0), (5, 5)):
        clip = clips[first]
        assert clip["guide"].shape == clip["video"].shape
        assert numbers(clip["guide"]) == [*range(20 + start, 25 + start)]
        wanted = path.poses(5, 32, 48, FPS, start / FPS)
        np.testing.assert_allclose(clip["camera"], wanted, atol=1e-5)
        poses.append(clip["camera"][:, 3])
    assert np.abs(poses[0] - poses[1]).min() > 1
    assert "guide" not in clips[1] and "camera" not in clips[1]
    whole = open_source(f"{out}#train:2x16x24@4", beside=("guide", "camera"))
    clip = whole.read([0])[0]
    assert numbers(clip["guide"]) == [20, 22]
    np.testing.assert_allclose(clip["camera"][:, 3], [0, 1], atol=1e-5)


def test_single_files_find_what_lies_beside_them(prepared):
    """As of `prepare_clips videos/*.mp4`, where a guide is an input too, no clip."""
    root, *_ = prepared
    names = "both", "both.guide", "plain", "lonely.guide"
    items = list_items([root / f"{name}.mp4" for name in names])
    found = {x.key: (x.reason, [*x.beside]) for x in items}
    assert found["both.mp4"] == ("", ["guide", "camera"])
    assert found["both.guide.mp4"] == ("other", [])
    assert found["plain.mp4"] == found["lonely.guide.mp4"] == ("", [])


def test_a_bad_file_beside_a_video_is_told(prepared):
    _, out, files = prepared
    for name, reason, told in (
        ("short", "bad_guide", "short.guide.mp4: short"),
        ("wide", "bad_guide", "it is 96x48 and the video 64x48"),
        ("mirrored", "bad_camera", "matrix 3 is no rotation"),
    ):
        entry = files[f"{name}.mp4"]
        assert (entry["clips"], entry["reason"]) == (0, reason), entry
        assert told in entry["detail"]
    brief = files["brief.mp4"]
    assert (brief["clips"], brief["dropped"]) == (0, 2)
    assert "4 frames at 8 per second, and the clip needs 5" in brief["detail"]


def test_a_table_names_what_lies_beside(tmp_path):
    write(tmp_path / "a.mp4", 1)
    (tmp_path / "depth").mkdir()
    write(tmp_path / "depth" / "a.mp4", 30)
    table = '{"path": "a.mp4", "guide_path": "depth/a.mp4", "caption": "x"}\n'
    (tmp_path / "metadata.jsonl").write_text(
        table + table.replace("depth/", "lost/").replace('"x"', '"y"')
    )
    report = ingest([tmp_path], tmp_path / "out", RECIPE, workers=1)
    assert report.reasons == {"missing": 1} and report.clips == 2
    (clip, *_) = open_source(f"{tmp_path}/out", beside=("guide",)).read([0])
    assert numbers(clip["guide"])[0] == 30
    with pytest.raises(ValueError, match=r"has a camera; put NAME.camera.json beside"):
        open_source(f"{tmp_path}/out", beside=("camera",))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fps": 0}, "`fps` .=0. must be a finite number above 0"),
        ({"fps": "fast"}, "`fps`"),
        ({"intrinsics": [1, 1, 1]}, r"`intrinsics` is \[3\]; give \[fx, fy, cx, cy\]"),
        ({"intrinsics": [-1, 1, 1, 1]}, "finite, and fx and fy of them above 0"),
        ({"world_to_camera": []}, "list of 3 x 4 matrices"),
        ({"world_to_camera": [[[1, 0, 0, 0]]]}, "list of 3 x 4 matrices"),
        ({"world_to_camera": np.eye(3, 4)[None].tolist() * 2, "focus": 1}, "focus"),
        ({"world_to_camera": [(2 * np.eye(3, 4)).tolist()] * 2}, "0 is no rotation"),
        ({"world_to_camera": np.full((2, 3, 4), np.nan).tolist()}, "aren't finite"),
    ],
)
def test_files_that_are_no_camera_path(change, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_camera(json.dumps(fields(moving(2)) | change), "a.json")
    assert str(error.value).count("\n") == 0


def test_a_path_lasts_as_long_as_its_video_at_any_rate():
    """At twice the rate the last frame is half a frame after the last pose."""
    for fps in (8, 12.5, 23.976, 24):
        for count in range(2, 40):
            path = moving(count)._replace(fps=fps)
            assert len(path.poses(2 * count, 48, 64, 2 * fps)) == 2 * count
            with pytest.raises(ValueError, match="give a pose of each"):
                path.poses(2 * count + 1, 48, 64, 2 * fps)


def test_points_on_a_ray_are_seen_in_its_cell():
    """Whatever the axes of the world, in every frame, by the camera of that frame."""
    poses = moving(5).poses(5, 32, 48, FPS)
    size, compression = (3, 4, 6), 2
    rays = plucker_rays(poses, size, compression).reshape(3, 4, 6, 2, 6)
    direction, moment = rays[..., :3], rays[..., 3:]
    np.testing.assert_allclose(np.linalg.norm(direction, axis=-1), 1, atol=1e-6)
    np.testing.assert_array_equal(rays[0, ..., 0, :], rays[0, ..., 1, :])
    first = poses[0, :12].reshape(3, 4)
    for frame in range(5):
        cell, sub = divmod(frame + compression - 1, compression)
        matrix = poses[frame, :12].reshape(3, 4)
        fx, fy, cx, cy = poses[frame, 12:]
        for y, x in ((0, 0), (3, 5), (1, 4)):
            d, m = direction[cell, y, x, sub], moment[cell, y, x, sub]
            # The ray's nearest point to the first camera, and on by any length.
            point = np.cross(d, m) + 7.0 * d
            world = first[:, :3].T @ (point - first[:, 3])
            seen = matrix[:, :3] @ world + matrix[:, 3]
            found = fx * seen[0] / seen[2] + cx, fy * seen[1] / seen[2] + cy
            np.testing.assert_allclose(found, ((x + 0.5) / 6, (y + 0.5) / 4), atol=1e-4)
    moved = poses.copy()
    turn = turned(np.array([1.1]))[0]
    for pose in moved:  # another world
        matrix = pose[:12].reshape(3, 4)
        pose[:12] = np.c_[matrix[:, :3] @ turn, matrix @ [3.0, 1.0, 2.0, 1.0]].ravel()
    again = plucker_rays(moved, size, compression).reshape(rays.shape)
    np.testing.assert_allclose(again, rays, atol=1e-4)


def test_the_world_knows_its_guide_and_its_camera():
    """Objects are where the guide has them; scenery moves as the camera says."""
    world = World("train", 0, 17, 64, 64, fps=8.0)
    ids = np.array([13, 19])  # the camera pans
    scenes = world.scenes(ids)
    found = world.clips(ids, audio=False, beside=("guide", "camera"))
    video = found["video"].astype(int)
    coloured = np.ptp(video, axis=-1) > 40
    told = found["guide"].max(-1) > 128
    assert (coloured == told).mean() > 0.99 and 0.01 < told.mean() < 0.5
    for row in range(len(ids)):
        colours = SHAPE_PALETTE[np.unique(scenes.shape[row, : scenes.count[row]])]
        inside = found["guide"][row].reshape(-1, 3)
        inside = inside[inside.max(-1) > 230]
        off = np.abs(inside[:, None] - colours).max(-1).min(1)
        assert np.quantile(off, 0.5) <= 1
    times = np.arange(17) / 8.0
    place = np.array([0.3, 0.1, 1.0, 1.0])  # of the scenery, one short side away
    for poses, offset in zip(found["camera"], scenes.pan_offset(times), strict=True):
        seen = poses[:, :12].reshape(-1, 3, 4) @ place
        x = poses[:, 12] * seen[:, 0] / seen[:, 2] + poses[:, 14]
        np.testing.assert_allclose(x - x[0], offset - offset[0], atol=1e-6)
        assert np.ptp(x) > 0.1


def test_a_request_has_the_camera_of_each_frame(tmp_path):
    path = moving(9)
    (tmp_path / "camera.json").write_text(path.json())
    size = {"frames": 9, "height": 32, "width": 48, "fps": 8.0}
    request = Request("", **size, camera=str(tmp_path / "camera.json"))
    assert request.given == ["camera"]
    assert request.settings["camera"].endswith("camera.json")
    np.testing.assert_allclose(request.poses(), path.poses(9, 32, 48, 8.0), atol=1e-5)
    with pytest.raises(ValueError, match="has 9 frames at 8 per second.*needs 17"):
        Request("", **size | {"frames": 17}, camera=path).read_given()
    with pytest.raises(FileNotFoundError, match="`camera`.*doesn't exist"):
        Request("", **size, camera=str(tmp_path / "lost.json")).read_given()
    guide = np.zeros((5, 32, 48, 3), np.uint8)
    with pytest.raises(ValueError, match="`guide` has 5 frames and the clip needs 9"):
        Request("", **size, guide=guide).read_given()
