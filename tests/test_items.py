"""Items: a clip that is learned and one that is asked for have the same tokens."""

import numpy as np
import pytest

from jvdit.data.conditions import CONDITIONS, known
from jvdit.data.conditions.known import Known, Place
from jvdit.data.items import item_of
from jvdit.data.packing import pack_rows
from jvdit.data.patches import patchify
from jvdit.generation.request import Request

PATCH, GRID = (1, 2, 2), (3, 2, 3)
HOW = {"patch_size": PATCH, "fps": 8.0, "temporal_compression": 2}
TEXT = np.zeros((2, 5), np.float32)
PICTURE = np.zeros((4, 6, 3), np.uint8)


def encode(video):
    """Every second frame, one pixel a latent."""
    return video[::2]


@pytest.fixture
def latents():
    return np.random.default_rng(0).normal(size=(3, 4, 6, 3)).astype(np.float32)


def packed(*items):
    return pack_rows([items], 64, 16, 3)


def test_levels_of_clips_that_share_a_row(latents):
    """Level 0 is what is given, and padding; a clip's own is its number."""
    clean = np.zeros(latents.shape[:3], bool)
    clean[0] = True
    first = item_of(latents, text_embeds=TEXT, **HOW)
    second = item_of(
        latents, known=Known(latents=latents, clean=clean), text_embeds=TEXT, **HOW
    )
    batch = packed(first, second)
    each = np.prod(GRID)
    want = [1] * each + [0] * 6 + [2] * (each - 6) + [0] * (64 - 2 * each)
    np.testing.assert_array_equal(batch["level"][0], want)
    segments = np.repeat([1, 2, 0], [each, each, 64 - 2 * each])
    np.testing.assert_array_equal(batch["segment"][0], segments)


def test_what_is_known_is_cut_as_the_latents_are(latents):
    extra = np.random.default_rng(1).normal(size=(3, 4, 6, 2)).astype(np.float32)
    what = Known(cond=extra, control=extra + 1)
    item = item_of(latents, known=what, logvar=latents, text_embeds=TEXT, **HOW)
    np.testing.assert_array_equal(item.cond, patchify(extra, PATCH))
    np.testing.assert_array_equal(item.control, patchify(extra + 1, PATCH))
    np.testing.assert_array_equal(item.logvar, item.latents)


def test_a_model_may_have_several_conditions():
    """What each of them knows is put together."""
    place = Place(3, encode, 2, 1)
    request = Request("", image=PICTURE, video=np.stack([PICTURE] * 5), **size())
    found = known(("first_frame", "control"), request, place)
    assert found.clean is not None and found.clean[0].all()
    assert found.control is not None and found.cond is None
    assert known((), request, place) == Known()


def size():
    return {"frames": 5, "height": 4, "width": 6}


def test_every_condition_takes_what_it_needs():
    for name, row in CONDITIONS.items():
        assert set(row.needs) <= set(row.takes), name
