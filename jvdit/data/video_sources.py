"""Clips that are windows of encoded videos, decoded when they are read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jvdit.data.cameras import parse_camera
from jvdit.data.clips import SIZE, Clip, Indexed, make_index
from jvdit.data.media.reader import decode_clip
from jvdit.data.order import fingerprint
from jvdit.data.records import RecordDataset, check_features

# What may lie beside the file of a clip, and how that ends.
SIDECARS = {"guide": ".guide.mp4", "camera": ".camera.json"}
LACKS = (
    "none of the clips of {0} has a {name}; put NAME{suffix} beside NAME.mp4, prepare "
    "the clips anew, or leave out the view."
)


class VideoWindows(Indexed):
    """Windows of encoded videos, decoded when they are read.

    Args:
        videos: index of whole videos.
        frames: of a clip. None: all that the video has.
        height, width: pixels; the video is scaled to cover the size and cropped. None:
            as is.
        fps: frames per second of a clip. None: those of the video.
        windows: "first": one clip a video, from its start; "all": as many clips, one
            after another, as fit.
        audio_rate: Hz of the sound; 0: none.
        beside: what else to read of each clip, see `Source.read`.

    Attributes:
        left_out: number of videos that are shorter than a window.

    Raises:
        ValueError: no video is long enough, or `windows` is unknown.
    """

    def __init__(
        self,
        videos: Mapping[str, np.ndarray],
        *,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: float | None = None,
        windows: str = "first",
        audio_rate: int = 0,
        beside: Sequence[str] = (),
    ):
        if windows not in ("first", "all"):
            raise ValueError(f"`windows` (={windows!r}) must be 'first' or 'all'.")
        rate = videos["fps"] if fps is None else np.full(len(videos["fps"]), fps)
        length = np.floor(videos["frames"] / videos["fps"] * rate + 1e-6)
        if frames is not None:
            length = np.full(len(rate), frames)
        # Half a frame of tolerance: the nearest frame is shown.
        fitting = (videos["frames"] + 0.5) / videos["fps"] / (length / rate)
        count = np.floor(fitting).astype(np.int64) * (length > 0)
        if windows == "first":
            count = np.minimum(count, 1)
        self.left_out = int((count == 0).sum())
        if not count.any():
            raise ValueError(
                f"None of {len(count)} videos lasts for `frames` (={frames}) at `fps` "
                f"(={fps}); the longest has {videos['frames'].max()} frames."
            )
        self._video = video = np.repeat(np.arange(len(count)), count)
        number = np.arange(len(video)) - np.repeat(np.cumsum(count) - count, count)
        self._start = number * (length / rate)[video]
        self._audio_rate, self.beside = audio_rate, tuple(beside)
        self.index = make_index(
            len(video),
            frames=length[video],
            height=videos["height"][video] if height is None else height,
            width=videos["width"][video] if width is None else width,
            fps=rate[video],
            has_audio=(videos["has_audio"][video] & (audio_rate > 0)),
        )
        # The last: channels of the sound.
        self._settings = [frames, height, width, fps, windows, audio_rate, 2]
        self._settings += self.beside

    def _record(self, video: int) -> Mapping[str, Any]:
        """Returns the file of a video, its `caption`, and what lies beside it."""
        raise LookupError(video)

    def _read_one(self, i: int) -> Clip:
        record, start = self._record(int(self._video[i])), float(self._start[i])
        window = {name: self.index[name][i].item() for name in (*SIZE, "fps")}
        how = {"start_seconds": start, "audio_rate": self._audio_rate}
        clip = decode_clip(record["video"], **window, **how)
        clip["caption"] = record["caption"]
        files = {name: record[name] for name in self.beside if record[name]}
        if "guide" in files:
            guide = decode_clip(files["guide"], **window, start_seconds=start)
            clip["guide"] = guide["video"]
        if "camera" in files:
            path = parse_camera(files["camera"], "the camera of a record")
            clip["camera"] = path.poses(**window, start=start)
        return clip


class RecordSource(VideoWindows):
    """Videos of a record data set.

    Args:
        path: the data set directory.
        split: which split.
        **window: `frames`, `height`, `width`, `fps`, `windows` and
            `audio_rate`, as for `VideoWindows`.

    Raises:
        ValueError: the data set holds no videos, or none is long enough.
    """

    def __init__(self, path: str | Path, split: str = "train", **window: Any):
        self._records = records = RecordDataset(path, split)
        if records.features.get("video") != "bytes":
            raise ValueError(
                f"{path} holds {sorted(records.features)} and no encoded videos; read "
                "latents with `LatentSource`."
            )
        check_features(records)
        for name in window.get("beside", ()):
            if name not in records.features:
                raise ValueError(LACKS.format(path, name=name, suffix=SIDECARS[name]))
        super().__init__(records.index, **window)
        held = records.fingerprint
        self.fingerprint = fingerprint("records", held, *self._settings)

    @property
    def captioned(self) -> bool:
        """Whether any of the clips has a caption."""
        return bool(self._records.index["caption_length"].any())

    def _record(self, video: int) -> Mapping[str, Any]:
        return self._records[video]
