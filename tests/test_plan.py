"""The order of training is a pure function of (seed, step) and forgets no clip."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from jvdit.data.order import permute, stable_hash, stable_uniform
from jvdit.data.packing import best_fit
from jvdit.data.plan import BucketPlan, PackPlan

# Five latent sizes (frames, height, width): an image, two shapes, two lengths.
SIZES = [(1, 32, 32), (5, 32, 32), (5, 24, 40), (9, 30, 52), (21, 30, 52)]
BUDGETS = {"token_budget": 16384, "text_budget": 4096, "max_clips": 32}


def make_index(count, seed=0, sizes=SIZES, longest_text=200):
    rng = np.random.default_rng(seed)
    chosen = np.array(sizes)[rng.integers(len(sizes), size=count)]
    return {
        "frames": chosen[:, 0],
        "height": chosen[:, 1],
        "width": chosen[:, 2],
        "text_length": rng.integers(0, longest_text, count),
    }


def make_plan(*counts, rows_per_step=8, **kwargs):
    indexes = [make_index(count, seed) for seed, count in enumerate(counts)]
    plan = PackPlan(indexes, rows_per_step=rows_per_step, **(BUDGETS | kwargs))
    return plan, indexes


def slots_of_epochs(plan, epochs):
    """Returns the slots of each whole epoch, in order of time."""
    steps = -(-epochs * plan.rows_per_epoch // plan.rows_per_step)
    rows = [row for step in range(steps) for row in plan[step]]
    n = plan.rows_per_epoch
    return [
        list(itertools.chain.from_iterable(rows[e * n : (e + 1) * n]))
        for e in range(epochs)
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 97, 1000, 4097])
def test_permutations_are_permutations(size):
    a, b = (permute(np.arange(size), size, stable_hash(0, e)) for e in range(2))
    assert sorted(a) == sorted(b) == list(range(size))
    if size > 90:
        assert (a != b).mean() > 0.9 and (a != np.arange(size)).mean() > 0.9


def test_permutations_are_even():
    """Over many keys, every index goes everywhere equally often."""
    size, keys = 10, 4000
    places = permute(np.arange(size)[None], size, stable_hash(np.arange(keys))[:, None])
    for index in range(size):
        count = np.bincount(places[:, index], minlength=size)
        chi_square = ((count - keys / size) ** 2 / (keys / size)).sum()
        assert chi_square < 35  # 9 degrees of freedom: 1 in 16000
    uniform = stable_uniform(3, np.arange(10000))
    assert abs(uniform.mean() - 0.5) < 0.02 and abs(uniform.var() - 1 / 12) < 0.01


def test_best_fit_prefers_the_fullest_row_that_takes_an_item():
    rows = best_fit([(n, 1) for n in (7, 5, 3, 5, 2)], (10, 10), 9)
    assert rows == [[0, 2], [1, 3], [4]]
    assert best_fit([(1, 6), (1, 6), (1, 4)], (10, 10), 9) == [[0, 2], [1]]
    assert best_fit([(1, 1)] * 5, (10, 10), 2) == [[0, 1], [2, 3], [4]]


def test_rows_respect_every_budget():
    plan, indexes = make_plan(700, max_clips=9, text_budget=1024)
    for step in range(20):
        for row in plan[step]:
            assert 0 < len(row) <= 9
            assert sum(slot.tokens for slot in row) <= 16384
            assert sum(slot.text for slot in row) <= 1024
            for slot in row:
                index = indexes[slot.source]
                f, h, w, text = (
                    int(index[k][slot.clip])
                    for k in ("frames", "height", "width", "text_length")
                )
                assert slot.tokens == f * h * w // 4
                assert max(text, 1) <= slot.text < max(text, 1) + 16


@pytest.mark.parametrize("blocks", [1, 3])
def test_every_epoch_sees_every_clip_once(blocks, monkeypatch):
    monkeypatch.setattr("jvdit.data.plan._SMALLEST_BLOCK", 1000 // blocks)
    plan, _ = make_plan(700, 300)
    assert plan._blocks == blocks
    epochs = slots_of_epochs(plan, 3)
    for slots in epochs:
        seen = Counter((slot.source, slot.clip) for slot in slots)
        assert len(seen) == 1000 and set(seen.values()) == {1}
    assert epochs[0] != epochs[1]


def test_epochs_differ_in_order_and_in_company():
    plan, _ = make_plan(700, rows_per_step=1)
    epochs = [
        [plan[e * plan.rows_per_epoch + i][0] for i in range(plan.rows_per_epoch)]
        for e in range(2)
    ]
    company = [{frozenset(s.clip for s in row) for row in rows} for rows in epochs]
    assert len(company[0] & company[1]) < 0.1 * plan.rows_per_epoch
    sizes = [[[s.tokens for s in row] for row in rows] for rows in epochs]
    assert sizes[0] != sizes[1] and sorted(sizes[0]) == sorted(sizes[1])


def test_a_step_is_the_same_whenever_it_is_asked_for():
    plan, _ = make_plan(700)
    steps = [plan[step] for step in range(60)]
    again, _ = make_plan(700)
    for step in (59, 3, 31):
        assert again[step] == steps[step]
    other, _ = make_plan(700, seed=1)
    assert other[3] != steps[3]
    assert plan[10**12] == again[10**12]


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_read_what_one_host_reads(hosts):
    plan, _ = make_plan(700)
    for step in range(12):
        parts = [plan.rows(step, host, hosts) for host in range(hosts)]
        assert [len(part) for part in parts] == [8 // hosts] * hosts
        assert list(itertools.chain.from_iterable(parts)) == plan[step]
    with pytest.raises(ValueError, match=r"=8.*`hosts` \(=3\)"):
        plan.rows(0, 0, 3)
    with pytest.raises(ValueError, match="must be below"):
        plan.rows(0, hosts, hosts)


def test_padding_is_below_five_percent_of_five_sizes():
    plan, indexes = make_plan(3000)
    used = rows = 0
    for step in range(-(-plan.rows_per_epoch // 8)):
        for row in plan[step]:
            used, rows = used + sum(slot.tokens for slot in row), rows + 1
    measured = 1 - used / (rows * 16384)
    # Rows of one size each, as many clips in a row as fit: what bucketing does.
    tokens = np.stack([indexes[0][k] for k in ("frames", "height", "width")]).prod(0)
    kinds, counts = np.unique(tokens // 4, return_counts=True)
    bucket_rows = np.ceil(counts / (16384 // kinds))
    bucketed = 1 - (kinds * counts).sum() / (bucket_rows.sum() * 16384)
    assert plan.padding == pytest.approx(measured, abs=0.005)
    assert measured < 0.05 < bucketed, (measured, bucketed)


def test_weights_are_exact():
    plan, _ = make_plan(500, 80, 220, weights=[3, 1, 6])
    (slots,) = slots_of_epochs(plan, 1)
    count = np.bincount([slot.source for slot in slots])
    # Source 0 is the one seen least often, and is seen once.
    assert abs(count - np.array([500, 500 / 3, 1000])).max() <= 0.5
    assert set(Counter(s.clip for s in slots if s.source == 0).values()) == {1}
    with pytest.raises(ValueError, match="2 sources"):
        make_plan(5, 5, weights=[1, 0])


def test_a_source_that_is_seen_often_is_seen_evenly():
    plan, _ = make_plan(2000, 60, weights=[1, 1])
    assert plan._blocks >= 2000 / 60
    seen = np.zeros(60, int)
    for step in range(int(1.5 * plan.steps_per_epoch)):
        for slot in itertools.chain.from_iterable(plan[step]):
            if slot.source == 1:
                seen[slot.clip] += 1
    assert seen.mean() > 40
    # Each size in proportion: 1 place of 2000 / 60 passes over about 12 clips.
    assert seen.min() > 0.85 * seen.mean() and seen.max() < 1.15 * seen.mean()


def test_too_large_clips_are_named():
    with pytest.raises(ValueError, match=r"source 0 needs 8190 of .*\(=8000\)"):
        make_plan(50, token_budget=8000)
    with pytest.raises(ValueError, match=r"of `text_budget` \(=64\)"):
        make_plan(50, text_budget=64)
    with pytest.raises(ValueError, match=r"Clip \d+ of source 0: Latent height"):
        make_plan(50, patch_size=(1, 5, 2))


def test_fingerprint_tells_plans_apart():
    prints = {
        make_plan(100, **kwargs)[0].fingerprint
        for kwargs in (
            {},
            {"seed": 1},
            {"weights": [1.0]},
            {"token_budget": 32768},
            {"rows_per_step": 4},
            {"fingerprints": ["a"]},
        )
    }
    assert len(prints) == 6
    assert make_plan(100)[0].fingerprint in prints


def test_ten_million_clips_are_planned_in_seconds():
    """A tenth of that here; time and memory are those of sorting the index."""
    index = make_index(1_000_000)
    start = time.process_time()
    plan = PackPlan([index], rows_per_step=64, **BUDGETS)
    built = time.process_time()
    for step in range(50):
        plan[step * 997]
    stepped = time.process_time()
    assert built - start < 5 and (stepped - built) / 50 < 0.02
    arrays = [x for x in vars(plan).values() if isinstance(x, np.ndarray)]
    arrays += [x for x in vars(plan._streams).values() if isinstance(x, np.ndarray)]
    assert sum(x.nbytes for x in arrays) < 16 * 1_000_000
    assert plan.padding < 0.05


PIXEL_SIZES = [(1, 64, 64), (17, 64, 64), (17, 48, 80)]


# Of nearly as many pixels: 8 clips of each in a batch.
ALIKE = [(16, 64, 64), (17, 60, 64), (17, 48, 80)]


def make_buckets(*counts, sizes=ALIKE, **kwargs):
    kwargs = {"pixel_budget": 8 * 2**16, "multiple": 4} | kwargs
    indexes = [make_index(n, i, sizes) for i, n in enumerate(counts)]
    return BucketPlan(indexes, **kwargs), indexes


def test_all_clips_of_a_step_have_its_size():
    budget = 17 * 64 * 64 * 9
    plan, indexes = make_buckets(100, 50, sizes=PIXEL_SIZES, pixel_budget=budget)
    assert plan.batches == {(1, 64, 64): 152, (17, 48, 80): 8, (17, 64, 64): 8}
    for step in range(60):
        slots, size = plan[step], plan.size(step)
        assert len(slots) == plan.batches[size]
        for slot in slots:
            index = indexes[slot.source]
            found = [index[k][slot.clip] for k in ("frames", "height", "width")]
            assert tuple(found) == size


def test_no_clip_comes_again_before_all_of_its_size_have_come():
    plan, indexes = make_buckets(101, 43)
    assert set(plan.batches.values()) == {8}
    seen = {size: Counter() for size in ALIKE}
    for step in range(150):
        size = plan.size(step)
        for slot in plan[step]:
            seen[size][(slot.source, slot.clip)] += 1
        counts = list(seen[size].values())
        if len(counts) < plan.batches[size]:
            continue
        # Within a step one pass may end and the next begin, but not two.
        assert max(counts) - min(counts) <= 1
    sizes = np.concatenate([index["frames"] * index["width"] for index in indexes])
    assert sum(map(len, seen.values())) == len(sizes) == 144  # nothing is dropped
    total = sum(sum(c.values()) for c in seen.values())
    for counter in seen.values():
        assert sum(counter.values()) / total == pytest.approx(
            len(counter) / 144, rel=0.15
        )
    assert plan.distortion < 0.02


def test_bucket_weights_and_hosts():
    plan, _ = make_buckets(400, 100, weights=[1, 1])
    sources = [slot.source for step in range(100) for slot in plan[step]]
    assert np.mean(sources) == pytest.approx(0.5, abs=0.02)
    for step in range(10):
        parts = [plan.rows(step, host, 4) for host in range(4)]
        assert list(itertools.chain.from_iterable(parts)) == plan[step]
    # 8 passes over 400 clips hold 21 1/3 over 150: no clip of them is left behind.
    plan, _ = make_buckets(400, 150, weights=[1, 1])
    seen = Counter(s.clip for t in range(800) for s in plan[t] if s.source == 1)
    assert len(seen) == 150 and max(seen.values()) - min(seen.values()) <= 4
    plan, _ = make_buckets(400, 100, weights=[1, 1])
    again, _ = make_buckets(400, 100, weights=[1, 1])
    assert again[77] == plan[77] and again.fingerprint == plan.fingerprint


def test_bucket_mistakes_are_explained():
    with pytest.raises(ValueError, match=r"1, 64, 64.*`pixel_budget` \(=100\)"):
        make_buckets(9, sizes=PIXEL_SIZES, pixel_budget=100, multiple=1)


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_no_host_has_more_pairs_of_tokens_than_others(hosts):
    """Long clips take longer than short ones of as many tokens."""
    sizes = [(21, 16, 16), (9, 16, 16), (5, 8, 8), (1, 16, 16), (1, 8, 8)]
    budgets = {"token_budget": 1400, "text_budget": 4096, "max_clips": 40}
    plan = PackPlan([make_index(9000, sizes=sizes)], rows_per_step=64, **budgets)

    def pairs(rows):
        return sum(slot.tokens**2 for row in rows for slot in row)

    uneven, before = [], []
    for step in range(5):
        whole = plan.rows(step)
        parts = [plan.rows(step, host, hosts) for host in range(hosts)]
        assert [*itertools.chain(*parts)] == whole
        counts = [pairs(part) for part in parts]
        uneven.append(max(counts) / np.mean(counts))
        # As they would lie if they were shuffled.
        order = np.random.default_rng(step).permutation(64).reshape(hosts, -1)
        shuffled = [pairs([whole[i] for i in part]) for part in order]
        before.append(max(shuffled) / np.mean(shuffled))
    assert np.mean(uneven) - 1 < (np.mean(before) - 1) / 2, (uneven, before)
