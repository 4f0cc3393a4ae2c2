"""Camera paths: where the camera of each frame is, and the rays that it sees along.

A file of a camera path is JSON:

    {"fps": 8, "width": 1280, "height": 720,
     "intrinsics": [fx, fy, cx, cy],
     "world_to_camera": [[[r, r, r, t], [r, r, r, t], [r, r, r, t]], …]}

`world_to_camera` has the first three rows of the matrix of each frame: a rotation, and
a translation in whatever unit the training's files have. Axes are OpenCV's, as in
RealEstate10K: x points right, y down and z ahead. `intrinsics`, one for all or one for
each frame, are pixels of a picture of `width` x `height`, whose upper left corner is
(0, 0).
"""

import json
import os
from typing import NamedTuple

import msgspec
import numpy as np
from einops import rearrange
from jaxtyping import Float

from jvdit.data.patches import Size
from jvdit.machine.json_files import parse_json
from jvdit.machine.text_files import read_text

# Of a frame: 3 x 4 of world to camera, and fx, fy, cx, cy in sides of the picture.
Poses = Float[np.ndarray, "T 16"]
RAY = 6  # direction and moment
_TURNED = 1e-3  # by which a rotation may miss being one
_ROUNDING = 1e-6  # of a frame's number


class _File(msgspec.Struct, forbid_unknown_fields=True):
    world_to_camera: list[list[list[float]]]
    intrinsics: list[float | list[float]]
    width: float
    height: float
    fps: float


class CameraPath(NamedTuple):
    """The camera of each frame of a video.

    Attributes:
        world_to_camera: the first three rows of each matrix, axes as of OpenCV.
        intrinsics: fx, fy, cx and cy of each, in pixels.
        height, width: of the picture, in pixels.
        fps: frames per second.
    """

    world_to_camera: Float[np.ndarray, "T 3 4"]
    intrinsics: Float[np.ndarray, "T 4"]
    height: float
    width: float
    fps: float

    def poses(
        self, frames: int, height: int, width: int, fps: float | int, start: float = 0.0
    ) -> Poses:
        """The cameras of a clip that shows a window of the video.

        As the video is, they are taken at the nearest frame, scaled to cover the clip
        and cropped around the centre.

        Args:
            frames: of the clip.
            height: of the clip in pixels.
            width: of the clip in pixels.
            fps: frames per second of the clip.
            start: seconds at which it begins.

        Raises:
            ValueError: there are too few frames.
        """
        nearest = (start + np.arange(frames) / fps) * self.fps
        count = len(self.world_to_camera)
        if nearest[-1] > count - 0.5 + _ROUNDING:
            raise ValueError(
                f"the camera path has {count} frames at {self.fps:g} per second, and "
                f"the clip needs {int(np.ceil(nearest[-1] + 0.5))}; give a pose of "
                "each, or ask for fewer `frames`."
            )
        which = np.minimum(np.rint(nearest).astype(int), count - 1)
        scale = max(height / self.height, width / self.width)
        focal, centre = np.split(self.intrinsics[which] * scale, 2, axis=1)
        sides = np.array([width, height])
        middle = scale * np.array([self.width, self.height]) / 2
        within = (centre - middle) / sides + 0.5
        poses = self.world_to_camera[which].reshape(frames, 12)
        found = np.concatenate([poses, focal / sides, within], axis=1)
        return found.astype(np.float32)

    def covers(self, fps: float | int) -> int:
        """The most frames, at a rate, of a clip whose cameras the path has."""
        last = (len(self.world_to_camera) - 0.5 + _ROUNDING) * fps / self.fps
        return int(last) + 1

    def window(
        self, frames: int, height: int, width: int, fps: float | int, start: float = 0.0
    ) -> "CameraPath":
        """The path of such a clip; arguments and errors as of `poses`."""
        poses = self.poses(frames, height, width, fps, start)
        return CameraPath.of(poses, height, width, fps)

    @classmethod
    def of(cls, poses: Poses, height: int, width: int, fps: float) -> "CameraPath":
        """The path of a clip of a size in pixels, whose cameras are known."""
        poses = poses.astype(np.float64)
        sides = np.array([width, height] * 2)
        world = poses[:, :12].reshape(-1, 3, 4)
        return cls(world, poses[:, 12:] * sides, height, width, fps)

    def json(self) -> str:
        """The text of its file."""
        fields = self._asdict()
        for name in ("world_to_camera", "intrinsics"):
            fields[name] = fields[name].tolist()
        return json.dumps(fields)

    def check_shape(self, height: int, width: int) -> None:
        """Raises a ValueError if a video has another aspect ratio."""
        ratio = self.width / self.height * height / width
        if not 0.98 < ratio < 1.02:
            raise ValueError(
                f"the camera path is of a picture of {self.width:g}x{self.height:g} "
                f"and the video has {width}x{height} (width x height): give the "
                "`width` and `height` of the pictures that `intrinsics` are of."
            )


def read_camera(path: str | os.PathLike[str]) -> CameraPath:
    """Reads the file of a camera path; see the module for its form.

    Raises:
        OSError: it can't be read.
        ValueError: it isn't of that form, or holds what is no camera.
    """
    return parse_camera(read_text(path), str(path))


def parse_camera(text: str, where: str) -> CameraPath:
    """Parses the text of a camera path.

    Args:
        text: JSON.
        where: name of it in errors.

    Raises:
        ValueError: as of `read_camera`.
    """
    file = parse_json(text, where, _File)
    try:
        world = np.array(file.world_to_camera, np.float64)
        inside = np.array(file.intrinsics, np.float64)
    except ValueError:  # lists of several lengths
        world = inside = np.zeros(0)
    if world.ndim != 3 or world.shape[1:] != (3, 4):
        raise ValueError(
            f"{where}: `world_to_camera` must be a list of 3 x 4 matrices, one for "
            "each frame, as lists of rows, and `intrinsics` one list or one for each."
        )
    if inside.shape not in ((4,), (len(world), 4)):
        raise ValueError(
            f"{where}: `intrinsics` is {[*inside.shape]}; give [fx, fy, cx, cy], or as "
            f"many of them as there are matrices ({len(world)})."
        )
    inside = np.broadcast_to(inside, (len(world), 4))
    path = CameraPath(world, inside, file.height, file.width, file.fps)
    _check(path, where)
    return path


def _check(path: CameraPath, where: str) -> None:
    sizes = {"width": path.width, "height": path.height, "fps": path.fps}
    for name, value in sizes.items():
        if not 0 < value < np.inf:
            raise ValueError(
                f"{where}: `{name}` (={value:g}) must be a finite number above 0."
            )
    if not (np.isfinite(path.world_to_camera).all() and path.intrinsics.size):
        raise ValueError(f"{where}: the matrices hold numbers that aren't finite.")
    if not (np.isfinite(path.intrinsics).all() and (path.intrinsics[:, :2] > 0).all()):
        raise ValueError(
            f"{where}: `intrinsics` must be finite, and fx and fy of them above 0."
        )
    turn = path.world_to_camera[..., :3]
    off = np.abs(turn @ turn.swapaxes(1, 2) - np.eye(3)).max((1, 2))
    if (off > _TURNED).any() or (np.linalg.det(turn) < 0).any():
        bad = int(np.argmax((off > _TURNED) | (np.linalg.det(turn) < 0)))
        raise ValueError(
            f"{where}: the left 3 x 3 of matrix {bad} is no rotation: it misses being "
            f"orthonormal by {off[bad]:.3g}, and its determinant is "
            f"{np.linalg.det(turn[bad]):.3g}; give rotations without scale or mirror."
        )


def plucker_rays(poses: Poses, size: Size, compression: int) -> np.ndarray:
    """The rays through the middle of each latent cell, of all frames that it covers.

    A ray is its direction d, of length 1, and its moment o x d about the place of the
    first camera, in whose axes both are (Plücker coordinates, section 3.1 of
    arXiv:2106.02634; cameras of videos by them: arXiv:2404.02101). The rays of a latent
    frame's pixel frames are stacked, so that nothing of the path is lost; the first
    latent frame, of one pixel frame, has its rays as often.

    Args:
        poses: of the pixel frames.
        size: latent frames, height and width.
        compression: pixel frames of a latent frame after the first.

    Returns:
        float32 `[f h w u]`, u = 6 x `compression`.

    Raises:
        ValueError: there are too few poses.
    """
    frames, height, width = size
    wanted = 1 + (frames - 1) * compression
    if len(poses) < wanted:
        raise ValueError(f"{len(poses)} poses are too few for {wanted} frames.")
    poses = np.asarray(poses[:wanted], np.float64)
    matrix, inside = poses[:, :12].reshape(-1, 3, 4), poses[:, 12:]
    turn, shift = matrix[..., :3], matrix[..., 3]
    back = turn[0] @ turn.swapaxes(1, 2)  # from each camera's axes to the first one's
    origin = shift[0] - np.einsum("tij,tj->ti", back, shift)
    y, x = ((np.arange(n) + 0.5) / n for n in (height, width))
    fx, fy, cx, cy = (column[:, None, None] for column in inside.T)
    across, down = (x - cx) / fx, (y[:, None] - cy) / fy
    ahead = np.stack(np.broadcast_arrays(across, down, 1.0), axis=-1)
    ahead /= np.linalg.norm(ahead, axis=-1, keepdims=True)
    direction = np.einsum("tij,thwj->thwi", back, ahead)
    moment = np.cross(origin[:, None, None], direction)
    rays = np.concatenate([direction, moment], axis=-1).astype(np.float32)
    rays = np.concatenate([rays[:1].repeat(compression - 1, axis=0), rays])
    return rearrange(rays, "(f c) h w u -> f h w (c u)", c=compression)
