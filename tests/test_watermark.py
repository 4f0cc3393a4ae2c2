"""The mark in the noise: normal noise, found by its key and by no other."""

import numpy as np
import pytest
import scipy.stats
from doors import command

from jvdit.data.media.reader import read_metadata
from jvdit.diffusion.denoise import Guidance
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request
from jvdit.generation.watermark import STREAMS, Watermark, together

KEY = Watermark(b"a key of the tests, long enough")
SHAPE = (3, 4, 4, 16)


@pytest.fixture(scope="module")
def marking(generator):
    """The same network, which marks what it makes."""
    made = Generator(generator.model, generator.mesh, watermark=KEY)
    made._held = generator._held
    return made


def test_marked_noise_is_normal():
    """In all its values over many seeds, and in signs that go together."""
    noise = np.stack([KEY.noise(seed, SHAPE) for seed in range(300)])
    assert scipy.stats.kstest(noise.ravel()[::7], "norm").pvalue > 1e-3
    values = noise.reshape(300, -1)
    moments = values.mean(0) * 300**0.5, (values**2).mean(0)
    assert np.abs(moments[0]).max() < 5 and np.abs(moments[1] - 1).max() < 0.5
    # No two values go together, as they would under one stream of signs.
    cross = (values.T @ values / 300)[np.triu_indices(values.shape[1], 1)]
    assert np.abs(cross).max() * 300**0.5 < 6.5
    streams = [KEY.stream(seed) for seed in range(STREAMS)]
    assert len({*streams}) > 0.6 * STREAMS  # 1 - 1/e of them


def test_noise_is_a_function_of_key_and_seed():
    noise = KEY.noise(3, SHAPE)
    np.testing.assert_array_equal(noise, Watermark(KEY.key).noise(3, SHAPE))
    assert not np.allclose(noise, KEY.noise(4, SHAPE))
    other = Watermark(b"another key that is long enough").noise(3, SHAPE)
    np.testing.assert_array_equal(np.abs(noise), np.abs(other))
    assert 0.4 < (np.sign(noise) == np.sign(other)).mean() < 0.6


def test_a_draft_has_the_signs_of_the_clip_that_it_begins():
    clip, picture = KEY.noise(5, SHAPE), KEY.noise(5 ^ 1 << 31, (1, *SHAPE[1:]))
    np.testing.assert_array_equal(np.sign(clip[:1]), np.sign(picture))
    assert not np.allclose(clip[:1], picture)


def test_the_mark_is_found_in_noise_that_is_known_roughly():
    """By the right key; and the stream is that of the seed."""
    rng = np.random.default_rng(0)
    rough = [0.7 * KEY.noise(s, SHAPE) + rng.standard_normal(SHAPE) for s in range(4)]
    for seed, found in enumerate(KEY.find(rough)):
        assert found.p_value < 1e-6 and found.stream == KEY.stream(seed)
        assert found.agreeing > 0.55 * found.values == 0.55 * np.prod(SHAPE)
    for wrong in (b"another key that is long enough", KEY.key + b"\0"):
        assert min(x.p_value for x in Watermark(wrong).find(rough)) > 1e-4


def test_p_values_of_wrong_keys_are_no_smaller_than_they_say():
    """And not much larger: at most by the constant of the bound."""
    rng = np.random.default_rng(1)
    noise = [rng.laplace(size=SHAPE).astype(np.float32) + 0.2 for _ in range(100)]
    keys = [Watermark(f"wrong key number {i}".encode()) for i in range(4)]
    found = [x.p_value for key in keys for x in key.find(noise)]
    for level in (0.05, 0.2, 0.5):
        share = np.mean(np.array(found) < level)
        assert share < level + 3 * (level / len(found)) ** 0.5
    assert np.mean(np.array(found) < 0.95) > 0.3
    marked = KEY.find([0.7 * KEY.noise(s, SHAPE) + noise[s] for s in range(3)])
    assert together(marked) < min(x.p_value for x in marked)


def test_signs_of_a_network_come_back(generator, marking):
    """From its own latents: the ODE is solved backwards."""
    requests = [Request("a", "", 5, 16, 16, seed=n) for n in (1, 2)]
    how = {"solver": "euler", "steps": 8, "guidance": Guidance()}
    latents = marking.latents(requests, **how)
    back = generator.latents(requests, noise=latents, rising=True, **how)
    for request, noise in zip(requests, back, strict=True):
        true = KEY.noise(request.seed, noise.shape)
        assert (np.sign(noise) == np.sign(true)).mean() > 0.9
        assert KEY.find([noise])[0].stream == KEY.stream(request.seed)
    plain = generator.latents(requests, **how)
    back = generator.latents(requests, noise=plain, rising=True, **how)
    assert min(KEY.find([noise])[0].p_value for noise in back) > 1e-4


def test_a_marked_clip_is_the_same_alone_and_among_others(generator, marking):
    how = {"steps": 2, "draft": False}
    alone = marking([Request("a", seed=7)], **how)[0]
    others = [
        Request("c", seed=8, frames=1),
        Request("a", seed=7),
        Request("d", seed=9),
    ]
    among = marking(others, **how)[1]
    # As it is for other clips: rows of other lengths sum in another order.
    assert np.abs(among.video.astype(int) - alone.video).max() <= 1
    plain = generator([Request("a", seed=7)], **how)[0]
    assert np.abs(plain.video.astype(int) - alone.video).mean() > 5


def test_from_the_command_line(workdir, tmp_path):
    """A clip says that it is marked; the tool reads it, and what isn't one."""
    (tmp_path / "key").write_bytes(KEY.key)
    args = ["a", f"--workdir={workdir}/dit", f"--out={tmp_path}", "--steps=1"]
    done = command("sample", *args, f"--watermark={tmp_path}/key")
    assert done.returncode == 0, done.stderr
    (clip,) = tmp_path.glob("*.mp4")
    assert read_metadata(clip)["jvdit"]["watermark"] == "gaussian shading"
    (tmp_path / "short").write_bytes(b"abc\n")
    for more, told in (
        ((f"--watermark={tmp_path}/short",), "can be guessed"),
        ((f"--watermark={tmp_path}/none",), "No such file"),
        ((f"--watermark={tmp_path}/key", "--solver=ancestral"), "draws noise"),
        ((f"--watermark={tmp_path}/key", "--cascade=upscale"), "--cascade"),
    ):
        done = command("sample", *args, *more)
        assert done.returncode == 1 and told in done.stderr, done.stderr
        told = [x for x in done.stderr.splitlines() if x.startswith("error")]
        assert len(told) == 1 and "Traceback" not in done.stderr
