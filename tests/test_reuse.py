"""Reusing what the blocks added: which steps, and that nothing else changes."""

import jax
import numpy as np
import pytest
from closeness import assert_close

from jvdit.diffusion.denoise import Guidance
from jvdit.diffusion.reuse import Reuse, save_ratios
from jvdit.generation.calibration import calibrate
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request


def test_steps_that_reuse_are_bounded_in_error_and_number():
    still = Reuse((1.0,), most=3, retention=0.25)
    assert still.skips(12) == (
        *[False] * 3,
        *[True] * 3,
        False,
        *[True] * 3,
        False,
        True,
    )
    # 0.95, then 0.95 squared: 0.05 and 0.0975 add up to more than 0.1.
    falling = Reuse((0.95,), threshold=0.1, most=9, retention=0.0)
    assert falling.skips(7) == (False, *(True, False) * 3)
    assert not any(Reuse((1.0,), most=0).skips(10))
    assert not any(Reuse((0.5,)).skips(10))
    # A curve of another number of steps is read at the same shares of the way.
    curve = Reuse((1.0, 1.0, 0.5, 0.5), most=99, retention=0.0)
    assert curve.skips(8) == (False, *(True,) * 3, *(False,) * 4)
    assert curve.skips(8, first=2)[2] is False


def test_a_curve_is_kept_in_a_file(tmp_path):
    save_ratios(tmp_path / "curve.json", [1.0, 0.98, 1.01])
    assert Reuse.load(tmp_path / "curve.json", 0.2).ratios == (1.0, 0.98, 1.01)
    (tmp_path / "curve.json").write_text("[]")
    with pytest.raises(ValueError, match="curve.json.*calibrate"):
        Reuse.load(tmp_path / "curve.json")
    with pytest.raises(ValueError, match="must be positive"):
        Reuse(())


REQUEST = Request("one object: a red circle", frames=5, height=16, width=16, seed=7)
SETTINGS = {"steps": 6, "guidance": Guidance(2.0)}


@pytest.fixture(scope="module")
def outspoken(generator):
    """Hardly trained, its head says little: here it says much."""
    params = jax.tree.map(lambda x: x, generator.model.networks["dit"].params)
    head = params["head"]
    head["kernel"] = jax.random.normal(jax.random.key(0), head["kernel"].shape)
    return Generator(generator.model.with_params({"dit": params}), generator.mesh)


def test_only_steps_that_reuse_change_the_clip(outspoken):
    generator = outspoken
    plain = generator.latents([REQUEST], **SETTINGS)[0]
    never = generator.latents([REQUEST], reuse=Reuse((1.0,), most=0), **SETTINGS)[0]
    assert_close(never, plain)
    often = generator.latents([REQUEST], reuse=Reuse((1.0,)), **SETTINGS)[0]
    assert np.abs(often - plain).max() > 0.01
    with pytest.raises(ValueError, match="one evaluation a step"):
        generator.latents([REQUEST], solver="heun", reuse=Reuse((1.0,)))


def test_the_curve_is_that_of_the_blocks(generator):
    curve = calibrate(generator, REQUEST, **SETTINGS)
    assert len(curve) == 6 and curve[0] == 1.0
    assert all(0.5 < x < 2 for x in curve)
