"""Packing loses nothing and mixes nothing up."""

import numpy as np
import pytest

from jvdit.data.items import Item
from jvdit.data.packing import pack_rows, unpack_rows
from jvdit.data.patches import latent_times, patchify, positions, token_grid, unpatchify

PATCH = (1, 2, 2)
SIZES = [[(3, 4, 6), (1, 8, 2)], [(2, 2, 2)], []]


def make_item(size, clip_id, *, text=3, valid=True, fps=8.0, seed=0):
    rng = np.random.default_rng((seed, clip_id))
    latents = rng.normal(size=(*size, 5)).astype(np.float32)
    return Item(
        patchify(latents, PATCH),
        positions(size, PATCH, fps, 4),
        logvar=patchify(latents - 3, PATCH),
        text_ids=np.arange(1, text + 1) + 10 * clip_id,
        clip_id=clip_id,
        valid=valid,
    )


def pack(sizes=SIZES, *, token_budget=24, text_budget=8, max_clips=3, **kwargs):
    ids = iter(range(99))
    rows = [[make_item(size, next(ids), **kwargs) for size in row] for row in sizes]
    return rows, pack_rows(rows, token_budget, text_budget, max_clips)


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 2, 3)])
def test_patches_go_together_again(patch):
    latents = np.random.default_rng(0).normal(size=(4, 6, 12, 5))
    tokens = patchify(latents, patch)
    assert tokens.shape == (4 * 6 * 12 // np.prod(patch), 5 * np.prod(patch))
    np.testing.assert_array_equal(unpatchify(tokens, (4, 6, 12), patch), latents)


def test_a_token_holds_its_patch_with_channels_fastest():
    latents = np.random.default_rng(0).normal(size=(2, 4, 6, 5))
    tokens = patchify(latents, PATCH)
    # The token of frame 1, patch row 1, patch column 2, in a grid of 2 x 2 x 3.
    patch = latents[1:2, 2:4, 4:6]
    np.testing.assert_array_equal(tokens[(1 * 2 + 1) * 3 + 2], patch.ravel())


def test_sizes_that_do_not_fit_the_patch_are_named():
    with pytest.raises(ValueError, match=r"width \(=5\).*\(=2\); try 4"):
        token_grid((1, 4, 5), PATCH)
    with pytest.raises(ValueError, match="6 tokens, and 5"):
        unpatchify(np.zeros((5, 4)), (1, 4, 6), PATCH)


def test_time_is_the_middle_of_the_pixel_frames_in_seconds():
    # Pixel frames 0 | 1 2 3 4 | 5 6 7 8 at 8 per second.
    np.testing.assert_allclose(latent_times(3, 8.0, 4), np.array([0, 2.5, 6.5]) / 8)
    np.testing.assert_allclose(latent_times(3, 10.0, 1), [0, 0.1, 0.2])
    with pytest.raises(ValueError, match="fps"):
        latent_times(3, 0.0, 4)


def test_two_frame_rates_share_one_clock():
    """What is shown at the same second is at the same coordinate."""
    slow = positions((3, 4, 4), PATCH, 8.0, 4)
    fast = positions((5, 4, 4), PATCH, 16.0, 4)
    # The latent frames at 16 fps in pairs show what those at 8 fps show, up to the
    # half frame by which the middles of 4 and of 8 pixel frames differ.
    fast_times, slow_times = np.unique(fast[:, 0]), np.unique(slow[:, 0])
    pairs = (fast_times[1::2] + fast_times[2::2]) / 2
    np.testing.assert_allclose(pairs, slow_times[1:], atol=0.5 / 16 + 1e-6)
    np.testing.assert_array_equal(slow[:4, 1:], [[0, 0], [0, 1], [1, 0], [1, 1]])
    counted = positions((3, 4, 4), PATCH, None, 4)
    np.testing.assert_array_equal(np.unique(counted[:, 0]), [0, 1, 2])


def test_a_time_patch_is_at_the_mean_of_its_frames():
    t = positions((4, 1, 1), (2, 1, 1), 1.0, 2)[:, 0]
    np.testing.assert_allclose(t, [(0 + 1.5) / 2, (3.5 + 5.5) / 2])


def test_every_item_is_one_segment_of_its_row():
    rows, batch = pack()
    assert batch["latents"].shape == (3, 24, 20) and batch["valid"].shape == (3, 3)
    for r, row in enumerate(rows):
        for i, item in enumerate(row):
            mine = batch["segment"][r] == i + 1
            np.testing.assert_array_equal(batch["latents"][r, mine], item.latents)
            np.testing.assert_array_equal(batch["logvar"][r, mine], item.logvar)
            np.testing.assert_array_equal(batch["position"][r, mine], item.position)
            words = batch["text_segment"][r] == i + 1
            np.testing.assert_array_equal(batch["text_ids"][r, words], item.text_ids)
    np.testing.assert_array_equal(batch["clip_id"], [[0, 1, -1], [2, -1, -1], [-1] * 3])
    np.testing.assert_array_equal(batch["valid"], batch["clip_id"] >= 0)
    padding = batch["segment"] == 0
    assert padding.sum() == 3 * 24 - 22 - 2
    assert not batch["latents"][padding].any()
    assert not batch["text_ids"][batch["text_segment"] == 0].any()
    noise = np.exp(0.5 * batch["logvar"][padding])
    assert noise.max() < 1e-6


def test_rows_come_apart_again():
    rows, batch = pack()
    unpacked = unpack_rows(batch["latents"], SIZES, PATCH, 5)
    for row, sizes, items in zip(rows, SIZES, unpacked, strict=True):
        assert [x.shape[:3] for x in items] == sizes
        for item, x in zip(row, items, strict=True):
            np.testing.assert_array_equal(patchify(x, PATCH), item.latents)


def test_a_bad_item_keeps_its_place_and_is_padding():
    good = make_item((1, 4, 4), 0)
    bad = make_item((1, 4, 4), 1, valid=False)
    batch = pack_rows([[good, bad, make_item((1, 4, 4), 2)]], 16, 16, 4)
    np.testing.assert_array_equal(batch["valid"], [[True, False, True, False]])
    np.testing.assert_array_equal(batch["clip_id"], [[0, 1, 2, -1]])
    assert (
        set(batch["segment"].ravel())
        == set(batch["text_segment"].ravel())
        == {
            0,
            1,
            3,
        }
    )
    assert not batch["latents"][batch["segment"] == 0].any()


def test_too_large_items_are_named_with_both_numbers():
    with pytest.raises(ValueError, match=r"needs 18 of `token_budget` \(=17\).*\[0\]"):
        pack([[(3, 4, 6)]], token_budget=17)
    with pytest.raises(ValueError, match=r"needs 9 of `text_budget` \(=8\)"):
        pack([[(1, 2, 2)]], text=9)
    with pytest.raises(ValueError, match=r"row needs 36 of `token_budget` \(=24\)"):
        pack([[(3, 4, 6), (3, 4, 6)]])
    with pytest.raises(ValueError, match=r"needs 2 of `max_clips` \(=1\)"):
        pack([[(1, 2, 2), (1, 2, 2)]], max_clips=1)
    with pytest.raises(ValueError, match="no item"):
        pack_rows([[], []], 8, 8, 2)


def test_text_may_be_embeddings():
    item = make_item((1, 4, 4), 0)
    embeds = np.ones((2, 7), np.float32)
    item = Item(item.latents, item.position, text_embeds=embeds)
    batch = pack_rows([[item]], 8, 8, 1)
    assert batch["text_embeds"].shape == (1, 8, 7) and "text_ids" not in batch
    assert (batch["text_embeds"].sum((0, 2)) > 0).sum() == 2
    with pytest.raises(ValueError, match="exactly one"):
        Item(item.latents, item.position)
