"""Rows of picture and sound: layout, what is seen, what is learned, sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from flax.traverse_util import flatten_dict

from jvdit.data.items import Item, with_sound
from jvdit.data.packing import pack_rows, unpack_rows, unpack_sounds
from jvdit.data.patches import latent_times, patchify, positions, sound_positions
from jvdit.diffusion.denoise import denoise
from jvdit.diffusion.noise_path import NoisePath, TimestepPolicy
from jvdit.generation import sampling
from jvdit.models.dit import VARIANTS, DiT
from jvdit.models.lora import LoRA
from jvdit.shapes import Text, Tokens, apart
from jvdit.sharding import batch_sharding, make_mesh
from jvdit.training.objectives.denoising import FlowObjective, generated
from jvdit.training.objectives.pairings import PAIRINGS, check_pairings, paired
from jvdit.weights.adapters import ANY, read_lora, write_lora
from jvdit.weights.fitting import fitted, other_parts
from jvdit.weights.wan import dit_rules

KINDS, CLIPS, PATCH = (24, 8), 2, (1, 2, 2)
PICTURE, SOUND, TEXT = 8, 6, 16  # channels
TINY = DiT(
    **VARIANTS["tiny"],
    in_channels=PICTURE,
    out_channels=PICTURE,
    text_width=TEXT,
    sound_channels=SOUND,
    own_blocks=1,
)


def clip(number, frames, sounds, *, given=False):
    rng = np.random.default_rng(number)
    latents = rng.normal(size=(frames, 4, 4, 2)).astype(np.float32)
    item = Item(
        patchify(latents, PATCH),
        positions(latents.shape[:3], PATCH, 8.0, 2),
        text_embeds=rng.normal(size=(3, TEXT)).astype(np.float32),
        clip_id=number,
    )
    if not sounds:
        return item
    waves = rng.normal(size=(sounds, SOUND)).astype(np.float32)
    place = sound_positions(sounds, 25.0, None, 2)
    return with_sound(item, waves, place, given=given)


ITEMS = [
    [clip(0, 3, 4), clip(1, 2, 3)],
    [clip(2, 5, 0)],
    [clip(3, 1, 8)],
    [clip(4, 6, 7)],
]


def pack(rows, kinds=KINDS):
    packed = pack_rows(rows, kinds[0], 8, CLIPS, *kinds[1:], max(PICTURE, SOUND))
    return {name: jnp.asarray(x) for name, x in packed.items() if name != "clip_id"}


@pytest.fixture(scope="module")
def batch():
    return pack(ITEMS)


def tokens_of(batch, **how):
    return Tokens.of(batch, batch["latents"], kinds=KINDS, **how)


def text_of(batch):
    return Text(batch["text_embeds"], batch["text_segment"])


@pytest.fixture(scope="module")
def params():
    made = jax.jit(TINY.init)(jax.random.key(0), *TINY.example_inputs())["params"]
    leaves, tree = jax.tree.flatten(made)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in pairs]
    return jax.tree.unflatten(tree, noisy)


def times(batch, seed=0):
    t = np.random.default_rng(seed).uniform(size=(len(batch["valid"]), 2 * (CLIPS + 1)))
    t[:, [0, CLIPS + 1]] = 0
    return jnp.asarray(t, jnp.float32)


def test_each_kind_has_its_part_of_a_row_and_comes_out_again(batch):
    pictures = [[(3, 4, 4), (2, 4, 4)], [(5, 4, 4)], [(1, 4, 4)], [(6, 4, 4)]]
    sounds = [[4, 3], [0], [8], [7]]
    found = unpack_rows(batch["latents"], pictures, PATCH, 2)
    heard = unpack_sounds(batch["latents"], sounds, KINDS[1], SOUND)
    for items, shown, told in zip(ITEMS, found, heard, strict=True):
        for item, latents, waves in zip(items, shown, told, strict=True):
            (_, split), _ = item.spans
            np.testing.assert_array_equal(
                patchify(latents, PATCH), item.latents[:split, :PICTURE]
            )
            np.testing.assert_array_equal(waves, item.latents[split:, :SOUND])
    assert not batch["segment"][:, KINDS[0] :][1].any()
    level = batch["level"][0]
    np.testing.assert_array_equal(level[: KINDS[0]], [1] * 12 + [2] * 8 + [0] * 4)
    np.testing.assert_array_equal(level[KINDS[0] :], [4] * 4 + [5] * 3 + [3])
    # The middles of 25 stretches a second.
    np.testing.assert_allclose(batch["position"][0, 24:28, 0], [0.02, 0.06, 0.1, 0.14])
    with pytest.raises(ValueError, match=r"needs 8 of `sound_budget` \(=7\)"):
        pack_rows([[clip(3, 1, 8)]], 24, 8, 2, 7)


def test_sound_has_the_clock_of_its_picture():
    """Where time counts latent frames, a sound is at the frame that it sounds with."""
    fps, compression = 16.0, 4
    frames = latent_times(9, fps, compression)
    tokens = sound_positions(1000, 500.0, fps, compression)[:, 0]
    seconds = sound_positions(1000, 500.0, None, compression)[:, 0]
    inside = (seconds > frames[1]) & (seconds < frames[-1])
    want = np.interp(seconds[inside], frames, np.arange(9))
    np.testing.assert_allclose(tokens[inside], want, atol=1e-3)


def test_a_given_sound_is_at_the_clean_level_of_its_kind():
    packed = pack([[clip(0, 1, 4, given=True)]])
    assert (packed["level"][0, 24:] == CLIPS + 1).all()
    assert (packed["level"][0, :4] == 1).all()


def test_silent_rows_are_as_in_a_model_without_sound(params, batch):
    """To the last bit: what sound has of its own isn't touched."""
    silent = TINY.clone(sound_channels=0, own_blocks=None)
    row = pack([[clip(2, 5, 0)]], (24, 0))
    tokens = Tokens.of(row, row["latents"])
    t = times(row)[:, : CLIPS + 1]

    def plain(tree):
        return {
            k: plain(v) if isinstance(v, dict) else v
            for k, v in tree.items()
            if "sound" not in k
        }

    ours = jax.jit(TINY.apply)({"params": params}, tokens, t, text_of(row))
    theirs = jax.jit(silent.apply)({"params": plain(params)}, tokens, t, text_of(row))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("rows, kinds", [(ITEMS, KINDS), ([[clip(2, 5, 0)]], (24, 0))])
def test_velocities_are_as_wide_as_the_widest_kind(rows, kinds):
    """In silent rows too, which may share a batch with others."""
    wide = TINY.clone(sound_channels=PICTURE + 4)
    latents = pack(rows, kinds)["latents"]
    row = pack(rows, kinds) | {"latents": jnp.pad(latents, [(0, 0), (0, 0), (0, 4)])}
    parts = KINDS if kinds[1] else ()
    tokens, levels = Tokens.of(row, row["latents"], kinds=parts), (len(parts) or 1) * 3
    t = jnp.zeros((len(rows), levels))
    made = jax.eval_shape(
        wide.init_with_output, jax.random.key(0), tokens, t, text_of(row)
    )
    assert made[0].shape == row["latents"].shape


def test_kinds_see_one_another_unless_they_are_kept_apart(params, batch):
    """By gradients: of each token, with respect to the tokens of the other kind."""
    text = text_of(batch)
    chosen = jnp.asarray([[True, False]] + [[False, False]] * 3)

    def output(latents, cut):
        tokens = tokens_of(batch).with_latents(latents)
        told = text
        if cut:
            tokens, told = apart(tokens, text, chosen)
        return TINY.apply({"params": params}, tokens, times(batch), told)

    def reach(cut):
        latents, rest = batch["latents"][:1], batch["latents"][1:]

        def first(x):
            return jnp.abs(output(jnp.concatenate([x, rest]), cut)[0]).sum(-1)

        return np.abs(np.asarray(jax.jit(jax.jacfwd(first))(latents))[:, 0]).sum(-1) > 0

    segment = np.asarray(batch["segment"][0])
    sound = np.arange(sum(KINDS)) >= KINDS[0]
    same = segment[:, None] == segment
    used = segment > 0
    used = used[:, None] & used
    np.testing.assert_array_equal(reach(False)[used], same[used])
    alike = (sound[:, None] == sound) | (segment != 1)
    np.testing.assert_array_equal(reach(True)[used], (same & alike)[used])


def test_both_kinds_still_see_their_text_when_kept_apart(params, batch):
    tokens = tokens_of(batch)

    def output(embeds, cut):
        text = Text(embeds, batch["text_segment"])
        pair = apart(tokens, text) if cut else (tokens, text)
        return TINY.apply({"params": params}, pair[0], times(batch), pair[1])

    embeds = batch["text_embeds"]
    for cut in (True, False):
        run = jax.jit(lambda x, cut=cut: output(x, cut))
        changed = np.abs(run(embeds) - run(embeds + 0.1)).sum(-1) > 0
        assert changed[batch["segment"] > 0].all()


def test_a_clip_is_the_same_whatever_else_is_in_its_row(params, batch):
    alone = pack([[clip(1, 2, 3)]])
    t = times(batch)
    here = jax.jit(TINY.apply)({"params": params}, tokens_of(batch), t, text_of(batch))
    levels = jnp.stack([t[0, 0], t[0, 2], t[0, 1], t[0, 3], t[0, 5], t[0, 4]])[None]
    there = jax.jit(TINY.apply)(
        {"params": params}, tokens_of(alone), levels, text_of(alone)
    )
    mine, own = batch["segment"][0] == 2, alone["segment"][0] == 1
    assert_close(np.asarray(there)[0, own], np.asarray(here)[0, mine])


@pytest.mark.parametrize("scan", [False, True])
def test_divided_over_devices_is_the_whole(batch, scan):
    """Tokens of both kinds are divided over `context`, and heads over `tensor`."""
    dit = TINY.clone(scan_layers=scan, depth=3)
    params = jax.jit(dit.init)(jax.random.key(0), *dit.example_inputs())["params"]
    params = jax.tree.map(lambda x: x + 0.05, params)
    arrays = tokens_of(batch), times(batch), text_of(batch)

    def loss(params, tokens, t, text):
        model = lambda *x: dit.apply({"params": params}, *x)  # noqa: E731
        return (denoise(model, tokens, t, text, NoisePath()) ** 2).mean()

    run = jax.jit(jax.value_and_grad(loss))
    whole = run(params, *arrays)
    mesh = make_mesh({"data": 2, "context": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        placed = jax.device_put(arrays, batch_sharding(mesh))
        divided = run(params, *placed)
    assert_close(divided, jax.tree.map(np.asarray, whole))


@pytest.mark.parametrize("scan", [False, True])
def test_a_network_grown_from_a_silent_one_shows_the_same_pictures(batch, scan):
    silent = TINY.clone(sound_channels=0, own_blocks=None, scan_layers=scan, depth=3)
    heard = TINY.clone(scan_layers=scan, depth=3)
    key, row = jax.random.key(0), pack([[clip(2, 5, 0)]], (24, 0))
    held = jax.jit(silent.init)(key, *silent.example_inputs())["params"]
    held = jax.tree.map(lambda x: x + 0.03, held)
    new = jax.jit(heard.init)(key, *heard.example_inputs())["params"]
    assert other_parts(held, new) and not other_parts(new, new)
    flat = flatten_dict(new, sep="/")
    asked = []

    def fresh(paths):
        asked.extend(paths)
        return {path: flat[path] for path in paths}

    params = fitted(held, new, fresh)
    assert {x.partition("/")[0] for x in asked} == {"sound_embed", "sound_head"}
    inputs = Tokens.of(row, row["latents"]), times(row)[:, : CLIPS + 1], text_of(row)
    want = jax.jit(silent.apply)({"params": held}, *inputs)
    found = jax.jit(heard.apply)({"params": params}, *inputs)
    assert_close(found, want)
    # And back: what sound has of its own is left out, whichever way blocks are stacked.
    assert other_parts(params, held)
    for other in (scan, not scan):
        again = silent.clone(scan_layers=other)
        shapes = jax.eval_shape(again.init, key, *silent.example_inputs())["params"]
        less = fitted(params, shapes, fresh)
        found = jax.jit(again.apply)({"params": less}, *inputs)
        assert_close(found, want)


@pytest.mark.parametrize("scan", [False, True])
def test_adapters_of_sound_come_back_from_a_file(tmp_path, scan):
    dit = TINY.clone(scan_layers=scan, depth=3)
    shapes = jax.eval_shape(dit.init, jax.random.key(0), *dit.example_inputs())
    made = LoRA(rank=2).init(jax.random.key(1), shapes["params"])
    made = jax.tree.map(lambda x: x + 0.1, made)
    names = {x.split("/")[-2] for x in flatten_dict(made, sep="/")}
    assert {"query", "query_sound", "out_sound"} <= names
    rules = dit_rules()
    write_lora(tmp_path, made, rules)
    found = read_lora(tmp_path, [rules], shapes["params"]).trees[ANY]
    jax.tree.map(np.testing.assert_array_equal, found, made)


def objective(**shares):
    return FlowObjective(
        TINY,
        None,
        NoisePath(),
        TimestepPolicy(),
        kinds=KINDS,
        pairings=tuple(shares.items()),
        sound_weight=0.5,
    )


@pytest.mark.parametrize("name", PAIRINGS)
def test_a_pairing_decides_what_is_learned(batch, name):
    picture, sound, together = PAIRINGS[name]
    made = paired(batch, jax.random.key(3), {name: 1.0}, TimestepPolicy(), KINDS)
    learned = np.asarray(generated(made))
    heard = np.array([0, 2, 3])  # rows with sound
    there = np.asarray(batch["segment"]) > 0
    for part, comes in ((slice(0, 24), picture), (slice(24, None), sound)):
        mine = there[heard][:, part]
        np.testing.assert_array_equal(learned[heard][:, part], mine & (comes == 0))
        segment = np.asarray(made["segment"])[heard][:, part]
        np.testing.assert_array_equal(segment > 0, mine & (comes != 2))
    # A clip without sound is learned as a picture, whatever the row.
    assert learned[1, :20].all()
    t = np.asarray(made["t"])
    assert t.shape == (4, 2, CLIPS)
    assert (t[heard, 0, 0] == t[heard, 1, 0]).all() == together


@pytest.mark.parametrize("given", ["", "picture", "sound"])
def test_training_and_sampling_have_sound_at_the_same_times(batch, given):
    """Its own where it is made for a picture, and later ones where along with it."""
    policy = TimestepPolicy(shift=2.0, shift_range=(1.0, 9.0), sound_shift=3.0)
    task = "together" if not given else [*PAIRINGS][2 + (given == "sound")]
    made = paired(batch, jax.random.key(3), {task: 1.0}, policy, KINDS)
    arrays = {name: made[name] for name in ("segment", "level")}
    start = sampling.Start(NoisePath(), policy, 8, "euler", kinds=KINDS)
    times = np.asarray(sampling._times(start, arrays, CLIPS + 1))[:, 0]
    picture, sound = times[:, 1], times[:, CLIPS + 2]
    even = jnp.linspace(1, 0, 9)
    np.testing.assert_allclose(picture, TimestepPolicy(shift=2.0).shifted(even, even))
    later = TimestepPolicy(shift=6.0).shifted(even, even)
    np.testing.assert_allclose(sound, later, rtol=1e-5)
    if not given:
        drawn = made["t"][0, :, 0]
        np.testing.assert_allclose(drawn[1], policy.sound_times(drawn[0]), rtol=1e-6)


def test_the_loss_is_the_sum_of_the_means_of_the_kinds(batch):
    task = objective(apart=1.0)
    params = task.init(jax.random.key(0), batch)
    made = task.prepare(batch, jax.random.key(1))
    loss, metrics = jax.jit(task.loss)(params, made)
    mean = loss / task.weight(made)
    picture, sound = (metrics[f"{k}_loss"] for k in ("picture", "sound"))
    wanted = picture[0] / picture[1] + 0.5 * sound[0] / sound[1]
    np.testing.assert_allclose(mean, wanted, rtol=1e-5)
    assert picture[1] == (batch["segment"][:, :24] > 0).sum()


def test_a_padded_channel_has_no_error(batch):
    """A new network predicts 0: the error is that of the channels that there are."""
    task = objective(together=1.0)
    params = task.init(jax.random.key(0), batch)
    made = task.prepare(batch, jax.random.key(1))
    ones = jnp.ones_like(made["latents"])
    error, _ = task.error(params, made, 0 * ones, ones, made["t"])
    np.testing.assert_allclose(error, generated(made).astype(jnp.float32), rtol=1e-6)


def test_bad_pairings_are_refused():
    for shares, message in (
        ({"toghether": 1.0}, "toghether"),
        ({"apart": 0.0}, "above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            check_pairings(shares)
