"""Properties of pictures and of HDR: what a standard display is to show."""

import zlib

import numpy as np
import pytest
from media_files import HEIGHT, WIDTH, flat_yuv, grey, mux
from PIL import Image

from jvdit.data.media import tone
from jvdit.data.media.pictures import PICTURES, film_of, read_picture
from jvdit.data.media.reader import decode_clip, probe


def hdr(level, transfer, matrix=(0.2627, 0.0593)):
    """A grey HDR clip, or one of another colour."""
    rgb = (level,) * 3 if isinstance(level, int) else level
    picture = flat_yuv(rgb, matrix, pixels="yuv420p10le")
    tags = {"color_trc": transfer, "colorspace": 9, "color_primaries": 9}
    return mux([picture] * 16, pixels="yuv420p10le", tags=tags)


@pytest.mark.parametrize("transfer, name", [(16, "PQ"), (18, "HLG"), (14, "BT.2020")])
def test_hdr_is_shown_on_a_standard_display(transfer, name):
    shown = []
    for level in range(16, 250, 24):
        window = dict(frames=4, fps=8, height=64, width=64)
        clip = decode_clip(hdr(level, transfer), **window)
        assert clip["source"]["hdr"] == name
        shown.append(clip["video"][2].mean((0, 1)))
    assert np.ptp(shown, axis=1).max() < 1.5  # grey stays grey
    levels = np.mean(shown, axis=1)
    rising = np.diff(levels[levels < 254])
    assert len(rising) > 3 and (rising > 0).all() and levels[0] < 30
    red = decode_clip(hdr((200, 60, 30), transfer), **window)["video"][0, 9, 9]
    assert red[0] > 200 and max(red[1:]) < 10  # more saturated than BT.709 can show


def test_light_below_the_knee_is_kept_and_white_is_bent():
    """Codes of PQ by the formula of SMPTE ST 2084, of HLG by that of BT.2100."""

    def shown(code, transfer):
        codes = np.full((1, 1, 3), round(code * 65535), np.uint16)
        return int(tone.standard(codes, transfer)[0, 0, 0])

    for code, light in ((0.3021, 10), (0.4401, 50), (0.5081, 100)):  # cd/m2
        assert abs(shown(code, "PQ") - 255 * (light / 203) ** (1 / 2.4)) < 2
    assert 220 < shown(0.5807, "PQ") < 240  # 203 cd/m2
    assert abs(shown(0.75, "HLG") - shown(0.5807, "PQ")) < 2  # as BT.2408 puts them
    assert shown(0.7518, "PQ") == shown(1.0, "PQ") == shown(1.0, "HLG") == 255
    assert shown(0, "PQ") == shown(0, "HLG") == 0 and shown(0.5, "BT.2020") == 128


def picture(path, mode="RGB", frames=1):
    """Pictures, each brighter than the one before."""
    found = [Image.fromarray(grey(40 + 30 * k)[0]).convert(mode) for k in range(frames)]
    more = dict(append_images=found[1:], duration=125, lossless=True)
    found[0].save(path, **(dict(save_all=True) | more if frames > 1 else {}))
    return path


@pytest.mark.parametrize("suffix", sorted(PICTURES))
def test_pictures_are_films_of_one_frame(tmp_path, suffix):
    film = film_of(path := picture(tmp_path / f"a{suffix}"))
    assert probe(film, scan=True).frames == 1
    clip = decode_clip(film, frames=1, fps=8, height=HEIGHT, width=WIDTH)
    assert np.abs(clip["video"] - np.float32(40)).max() < 3
    assert not clip["source"]["transparent"]
    assert np.array_equal(read_picture(path), clip["video"][0])


def test_animations_are_films_and_deep_pictures_are_scaled(tmp_path):
    film = film_of(picture(tmp_path / "a.webp", frames=6))
    clip = decode_clip(film, frames=6, fps=8, height=HEIGHT, width=WIDTH)
    assert clip["video"].mean((1, 2, 3)).round().tolist() == [
        40,
        70,
        100,
        130,
        160,
        190,
    ]
    values = np.full((HEIGHT, WIDTH), 32768, np.uint16)
    Image.fromarray(values).save(tmp_path / "b.png")
    film = film_of(tmp_path / "b.png")
    clip = decode_clip(film, frames=1, fps=8, height=HEIGHT, width=WIDTH)
    assert (clip["video"] == 128).all() and (
        read_picture(tmp_path / "b.png") == 128
    ).all()
    clear = np.dstack([grey(200)[0], np.full((HEIGHT, WIDTH), 128, np.uint8)])
    Image.fromarray(clear).save(tmp_path / "c.png")
    film = film_of(tmp_path / "c.png")
    clip = decode_clip(film, frames=1, fps=8, height=HEIGHT, width=WIDTH)
    assert (clip["video"] == 100).all() and clip["source"]["transparent"]


def test_a_picture_that_claims_too_much_or_is_damaged_is_told_in_a_line(tmp_path):
    def chunk(kind, data):
        check = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + check

    side = (2**31 - 1).to_bytes(4, "big")
    header = chunk(b"IHDR", side * 2 + bytes([8, 2, 0, 0, 0]))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "b.png").write_bytes(picture(tmp_path / "c.png").read_bytes()[:90])
    for read in (read_picture, film_of):
        for name, told in (("a.png", "4611686014132420609 pixels"), ("b.png", "")):
            with pytest.raises(
                ValueError, match=f"{name}' is no picture: .*{told}"
            ) as e:
                read(tmp_path / name)
            assert "\n" not in str(e.value)
