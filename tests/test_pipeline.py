"""Batches are a function of the step; what cannot be read is masked and reported."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from jvdit.data.builders import ClipBatches, StalledError
from jvdit.data.clips import BadClip
from jvdit.data.items import Statistics
from jvdit.data.packed_batches import PackedBatches
from jvdit.data.patches import patchify, positions
from jvdit.data.pipeline import BadDataError, Batches
from jvdit.data.plan import BucketPlan, PackPlan
from jvdit.data.sources import ArraySource, WorldSource
from jvdit.data.tokenizer import Tokenizer, train_tokenizer
from jvdit.data.world import World

SIZES = [(1, 4, 4), (3, 4, 6), (5, 4, 4)]
PATCH = (1, 2, 2)
MEAN, STD = np.array([0.5, -1, 2]), np.array([2.0, 0.5, 1])
CAPTIONS = [f"a red fox number {i} runs" for i in range(40)]


def make_clip(i, rng):
    shape = (*SIZES[i % len(SIZES)], 3)
    return {
        "mean": rng.normal(size=shape).astype(np.float32),
        "logvar": rng.normal(size=shape).astype(np.float32) - 4,
        "caption": CAPTIONS[i],
        "fps": [8.0, 16.0][i % 2],
    }


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(train_tokenizer(CAPTIONS, 400))


@pytest.fixture(scope="module")
def source():
    rng = np.random.default_rng(0)
    return ArraySource([make_clip(i, rng) for i in range(40)])


class Faulty(ArraySource):
    """Latents of which some cannot be had."""

    def read(self, ids):
        return [
            BadClip(f"broken {i}") if i % 5 == 0 else clip
            for i, clip in zip(ids, super().read(ids), strict=True)
        ]


class Stuck(ArraySource):
    """Latents of which one is never had."""

    def __init__(self, *args):
        super().__init__(*args)
        self.release = threading.Event()

    def read(self, ids):
        if 7 in ids:
            self.release.wait(60)
        return super().read(ids)


def make_builder(sources, tokenizer, seed=0, weights=None, **kwargs):
    plan = PackPlan.of(
        sources,
        token_budget=48,
        text_budget=128,
        max_clips=6,
        rows_per_step=4,
        weights=weights,
        seed=seed,
    )
    options = {"latents": Statistics(MEAN, STD), "temporal_compression": 4}
    return PackedBatches(sources, plan, tokenizer=tokenizer, **(options | kwargs))


def take(builder, count, **kwargs):
    with Batches(builder, **kwargs) as batches:
        return [next(batches) for _ in range(count)]


def assert_equal(xs, ys):
    for x, y in zip(xs, ys, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)


def test_tokens_are_those_of_the_clip_normalised(source, tokenizer):
    (batch,) = take(make_builder([source], tokenizer), 1)
    seen = 0
    for r, m in zip(*np.nonzero(batch["valid"]), strict=True):
        (clip,) = source.read([batch["clip_id"][r, m]])
        mine = batch["segment"][r] == m + 1
        size = clip["mean"].shape[:3]
        expected = patchify((clip["mean"] - MEAN) / STD, PATCH)
        np.testing.assert_allclose(batch["latents"][r, mine], expected, rtol=1e-5)
        # The standard deviation of the posterior is divided by STD as the mean is.
        expected = patchify(np.exp(0.5 * clip["logvar"]) / STD, PATCH)
        deviation = np.exp(0.5 * batch["logvar"][r, mine])
        np.testing.assert_allclose(deviation, expected, rtol=1e-5)
        expected = positions(size, PATCH, clip["fps"], 4)
        np.testing.assert_array_equal(batch["position"][r, mine], expected)
        words = batch["text_ids"][r, batch["text_segment"][r] == m + 1]
        assert tokenizer.decode(words) == clip["caption"] and words[-1] == 1
        seen += 1
    assert seen > 4


def test_text_may_be_stored_states(source):
    null = np.full((1, 6), -1, np.float32)
    clips = [
        clip | {"text_embeds": np.full((1 + i % 20, 6), i + 1, np.float32)}
        for i, clip in enumerate(source.read(range(40)))
    ]
    (batch,) = take(make_builder([ArraySource(clips)], None, null_embeds=null), 1)
    for r, m in zip(*np.nonzero(batch["valid"]), strict=True):
        words = batch["text_embeds"][r, batch["text_segment"][r] == m + 1]
        clip = batch["clip_id"][r, m]
        assert words.shape == (1 + clip % 20, 6) and (words == clip + 1).all()
    with pytest.raises(ValueError, match="no `text_embeds`"):
        take(make_builder([source], None, null_embeds=null), 1)
    with pytest.raises(ValueError, match="exactly one"):
        make_builder([source], None)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_make_the_batch_of_one(source, tokenizer, hosts):
    kwargs = {"caption_dropout": 0.5}
    whole = take(make_builder([source], tokenizer, **kwargs), 12)
    parts = [
        take(make_builder([source], tokenizer, host=h, hosts=hosts, **kwargs), 12)
        for h in range(hosts)
    ]
    joined = [
        {k: np.concatenate([p[k] for p in step]) for k in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_equal(joined, whole)
    with pytest.raises(ValueError, match="divisible by `hosts`"):
        make_builder([source], tokenizer, host=0, hosts=3)


def test_resuming_changes_nothing(source, tokenizer):
    builder = make_builder([source], tokenizer, caption_dropout=0.3)
    whole = take(builder, 30)
    assert_equal(take(builder, 11, start=19), whole[19:])
    with Batches(builder) as batches:
        first = [next(batches) for _ in range(5)]
        assert batches.step == 5
        batches.step = 23
        rest = [next(batches) for _ in range(7)]
        assert batches.step == 30
        assert batches.fingerprint == builder.plan.fingerprint
    assert_equal(first + rest, whole[:5] + whole[23:])


def test_threads_do_not_change_the_order(source, tokenizer):
    builder = make_builder([source], tokenizer)
    assert_equal(take(builder, 30, num_threads=1), take(builder, 30, num_threads=8))


def test_every_clip_is_seen_once_a_pass(source, tokenizer):
    builder = make_builder([source], tokenizer)
    rows = builder.plan.rows_per_epoch
    batches = take(builder, -(-3 * rows // 4))
    ids = np.concatenate([batch["clip_id"] for batch in batches])
    for epoch in range(3):
        seen = ids[epoch * rows : (epoch + 1) * rows].ravel()
        assert sorted(seen[seen >= 0]) == list(range(40))


def test_clip_ids_tell_sources_apart(source, tokenizer):
    few = ArraySource([make_clip(i, np.random.default_rng(9)) for i in range(4)])
    builder = make_builder([source, few], tokenizer, weights=[0.8, 0.2])
    (batch,) = take(builder, 1)
    ids = np.concatenate([b["clip_id"].ravel() for b in take(builder, 12)])
    assert set(ids) > {-1, 40, 41, 42, 43}
    assert builder.locate(41) == (1, 1) and builder.locate(39) == (0, 39)
    assert batch["latents"].dtype == np.float32 and batch["segment"].dtype == np.int32


def test_captions_are_dropped_by_step_and_place(source, tokenizer):
    def dropped(p, seed=0):
        builder = make_builder([source], tokenizer, seed, caption_dropout=p)
        out, first = [], set()
        for batch in take(builder, 40):
            first.add(int((batch["text_segment"][0] == 1).sum()) == 1)
            for r, m in zip(*np.nonzero(batch["valid"]), strict=True):
                out.append((batch["text_segment"][r] == m + 1).sum() == 1)
        assert len(first) == (1 if p in (0, 1) else 2)  # a place is not fated
        return np.array(out)

    assert not dropped(0.0).any() and dropped(1.0).all()
    third = dropped(0.3)
    assert abs(third.mean() - 0.3) < 3 * np.sqrt(0.21 / len(third))
    np.testing.assert_array_equal(third, dropped(0.3))
    other = dropped(0.3, seed=1)
    assert (third[:400] != other[:400]).any()


def test_bad_clips_are_masked_and_reported(source, tokenizer):
    clips = source.read(range(40))
    clips[1] = clips[1] | {"mean": clips[1]["mean"] * np.nan}
    clips[2] = clips[2] | {"mean": clips[2]["mean"][:, :, :2]}
    faulty = Faulty(clips)
    faulty.index = source.index  # clip 2 is not as large as the index says
    builder = make_builder([faulty], tokenizer)
    reasons = {}
    with Batches(builder) as batches:
        ids, valid = [], []
        for _ in range(-(-builder.plan.rows_per_epoch // 4)):
            batch = next(batches)
            ids.append(batch["clip_id"])
            valid.append(batch["valid"])
            for r, m in np.argwhere(~batch["valid"] & (batch["clip_id"] >= 0)):
                assert not (batch["segment"][r] == m + 1).any()
                assert not (batch["text_segment"][r] == m + 1).any()
            assert np.isfinite(batch["latents"]).all()
        reasons = {clip: reason for _, clip, reason in batches.reports}
        assert batches.bad == len(batches.reports) >= 10
    bad = {*range(0, 40, 5), 1, 2}
    assert set(reasons) == bad and reasons[5] == "broken 5"
    assert "not finite" in reasons[1] and "planned as 20 tokens" in reasons[2]
    ids, valid = np.concatenate(ids), np.concatenate(valid)
    assert set(ids[~valid & (ids >= 0)]) == bad and not set(ids[valid]) & bad


def test_too_many_bad_clips_end_the_run(source, tokenizer):
    faulty = Faulty(source.read(range(40)))  # one clip of five
    builder = make_builder([faulty], tokenizer)
    with Batches(builder, max_bad=0.3) as batches:
        while batches.clips < 400:
            next(batches)
    seen = 0
    with Batches(builder, max_bad=0.1) as batches:
        with pytest.raises(BadDataError, match="share of 0.1.*broken"):
            while batches.clips < 400:
                seen += next(batches)["valid"].size
    assert seen >= 150  # not for the first few


def test_a_stuck_source_is_named(source, tokenizer):
    stuck = Stuck(source.read(range(40)))
    builder = make_builder([stuck], tokenizer, timeout=0.5)
    step = next(s for s in range(99) if any(x.clip == 7 for x in builder.slots(s)))
    start = time.monotonic()
    with Batches(builder) as batches:
        with pytest.raises(StalledError, match=rf"step {step}: clips \[.*\b7\b.*Stuck"):
            for _ in range(99):
                next(batches)
        assert batches.step == step  # all before it came
    # The other watchdog: whatever it is that hangs, waiting ends.
    builder.timeout = 60.0
    with Batches(builder, start=step, timeout=0.5) as batches:
        with pytest.raises(StalledError, match=rf"batch of step {step} .*\b7\b"):
            next(batches)
    assert time.monotonic() - start < 20
    stuck.release.set()


def test_errors_of_a_source_arrive_with_their_place(source, tokenizer):
    class Broken(ArraySource):
        def read(self, ids):
            raise OSError("disk on fire")

    builder = make_builder([Broken(source.read(range(40)))], tokenizer)
    with Batches(builder) as batches:
        with pytest.raises(OSError, match="disk on fire") as caught:
            next(batches)
    assert "step 0: clips" in caught.value.__notes__[0]


def test_what_is_made_ahead_is_bounded_by_bytes(source, tokenizer):
    builder = make_builder([source], tokenizer)
    (batch,) = take(builder, 1)
    assert builder.nbytes == sum(x.nbytes for x in batch.values())
    assert Batches(builder, buffer_bytes=10 * builder.nbytes).prefetched == 10
    assert Batches(builder, buffer_bytes=1).prefetched == 2
    half = make_builder([source], tokenizer, host=1, hosts=2)
    assert half.nbytes == builder.nbytes // 2


def test_clip_batches_are_of_one_size():
    small, large = World(frames=1, height=16, width=16), World(frames=5, height=16)
    sources = [WorldSource(small, 140, audio=False), WorldSource(large, 5, audio=False)]
    budget = {"pixel_budget": 4 * large.frames * large.height * large.width}
    plan = BucketPlan.of(sources, **budget, multiple=4)
    builder = ClipBatches(sources, plan)
    whole = take(builder, 8)
    for step, batch in enumerate(whole):
        size = plan.size(step)
        assert batch["video"].shape == (plan.batches[size], *size, 3)
        assert batch["valid"].all() and (batch["fps"] == 8).all()
        for video, clip in zip(batch["video"], batch["clip_id"], strict=True):
            source, number = builder.locate(int(clip))
            (expected,) = sources[source].read([number])
            np.testing.assert_array_equal(video, expected["video"])
    assert {b["video"].shape[1] for b in whole} == {1, 5}
    parts = [take(ClipBatches(sources, plan, host=h, hosts=2), 8) for h in range(2)]
    joined = [
        {k: np.concatenate([a[k], b[k]]) for k in a}
        for a, b in zip(*parts, strict=True)
    ]
    assert_equal(joined, whole)
    with pytest.raises(ValueError, match="multiple=3"):
        ClipBatches(sources, BucketPlan.of(sources, **budget), host=0, hosts=3)
    with pytest.raises(ValueError, match="same sources"):
        ClipBatches(sources[:1], plan)


def test_bad_clips_of_pixels_are_masked():
    world = World(frames=1, height=16, width=16)
    clips = WorldSource(world, 10).read(range(10))
    faulty = Faulty(clips)
    plan = BucketPlan.of([faulty], pixel_budget=5 * 16 * 16)
    with Batches(ClipBatches([faulty], plan)) as batches:
        got = [next(batches), next(batches)]
        assert sorted(clip for _, clip, _ in batches.reports) == [0, 5]
    for batch in got:
        np.testing.assert_array_equal(batch["valid"], batch["clip_id"] % 5 != 0)
        assert not batch["video"][~batch["valid"]].any()


WORKERS = """
import numpy as np
from jvdit.data.builders import ClipBatches
from jvdit.data.pipeline import Batches
from jvdit.data.plan import BucketPlan
from jvdit.data.sources import WorldSource
from jvdit.data.world import World

if __name__ == "__main__":
    source = WorldSource(World(frames=1, height=16, width=16), 12, audio=False)
    builder = ClipBatches([source], BucketPlan.of([source], pixel_budget=4 * 16 * 16))
    with Batches(builder) as batches:
        expected = [next(batches) for _ in range(9)]
    with Batches(builder, start=2, num_workers=2) as batches:
        for x in expected[2:]:
            y = next(batches)
            assert all(np.array_equal(x[name], y[name]) for name in x)
    print("equal")
"""


def run(tmp_path, code):
    script = tmp_path / "script.py"
    script.write_text(code)
    root = __file__.rsplit("/tests/", 1)[0]
    return subprocess.run(
        [sys.executable, str(script)],
        env={"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_processes_make_the_same_batches(tmp_path):
    done = run(tmp_path, WORKERS)
    assert done.stdout.strip() == "equal", done.stderr


HANGING = """
import threading
import numpy as np
from jvdit.data.builders import ClipBatches
from jvdit.data.pipeline import Batches
from jvdit.data.plan import BucketPlan
from jvdit.data.sources import ArraySource

class Stuck(ArraySource):
    def read(self, ids):
        threading.Event().wait()

source = Stuck([{"video": np.zeros((1, 4, 4, 3), np.uint8), "fps": 8.0}] * 4)
plan = BucketPlan.of([source], pixel_budget=2 * 4 * 4)
with Batches(ClipBatches([source], plan, timeout=0.5)) as batches:
    next(batches)
"""


def test_a_process_with_a_stuck_source_ends(tmp_path):
    done = run(tmp_path, HANGING)
    assert done.returncode == 1 and "StalledError" in done.stderr


def test_data_does_not_import_jax(tmp_path):
    """Only grain may: a worker must not take hold of an accelerator."""
    code = """
import sys, types
class Grain(types.ModuleType):
    def __getattr__(self, name):
        return object
sys.modules["grain"] = Grain("grain")
import jvdit.data.pipeline, jvdit.data.sources, jvdit.data.tokenizer
found = {"jax", "flax", "torch", "tensorflow", "transformers"} & set(sys.modules)
print("imported:", sorted(found))
"""
    done = run(tmp_path, code)
    assert done.stdout.strip() == "imported: []", done.stdout + done.stderr


def test_a_worker_without_shared_memory_is_told_with_the_remedy():
    source = WorldSource(World(frames=1, height=16, width=16), 12, audio=False)
    builder = ClipBatches([source], BucketPlan.of([source], pixel_budget=4 * 16 * 16))

    class Died:
        def __next__(self):
            raise RuntimeError("Worker process was terminated with exit code -7.")

        def close(self):
            pass

    with Batches(builder, num_workers=64) as batches:
        batches._batches = Died()
        with pytest.raises(OSError, match=r"/dev/shm has \d+ MB.*64.*--shm-size=64m"):
            next(batches)
        assert int(next(iter(Batches(builder)))["clip_id"].size) > 0
