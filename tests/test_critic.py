"""A critic: what it judges, whose gradient is whose, and what it leaves alone."""

import dataclasses
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import thread_config
from closeness import assert_close
from jax import tree
from safetensors.numpy import save_file

from jvdit.models import audio_vae, video_vae
from jvdit.models.critics import PictureCritic, SoundCritic
from jvdit.tasks.loop import train
from jvdit.training.objectives.autoencoding import VAEObjective
from jvdit.training.objectives.critic import Critic, balanced, hinge, matching
from jvdit.training.objectives.perceptual import given_features, read_features
from jvdit.training.objectives.waveform import AudioVAEObjective
from jvdit.training.optim import Optim
from jvdit.training.state import new_state
from jvdit.training.step import make_train_step
from jvdit.weights.parameters import load_weights

PICTURES, SOUNDS = PictureCritic(width=4, depth=2), SoundCritic(4, 2, (16, 64))
# Compiled in a moment: one stage each.
SMALLER = {
    "pictures": {
        "multipliers": (1,),
        "temporal_downsample": (),
        "middle_attention": False,
    },
    "sounds": {"strides": (2,), "dilations": (1,)},
}
WARM = {"lr": 1e-2, "b1": 0.5, "b2": 0.9, "warmup": 0, "weight_decay": 0.0}


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 0.4, shape), jnp.float32)


def of_pictures(critic):
    fields = video_vae.VARIANTS["tiny"] | SMALLER["pictures"]
    noise = np.random.default_rng(1).integers(0, 256, (4, 3, 16, 16, 3), np.uint8)
    # The last can't be read, and counts for nothing.
    batch = {"video": jnp.asarray(noise), "valid": jnp.arange(4) < 3}
    return VAEObjective(video_vae.VideoVAE(**fields), critic=critic), batch


def of_sounds(critic):
    vae = audio_vae.AudioVAE(**audio_vae.VARIANTS["tiny"] | SMALLER["sounds"])
    batch = {"audio": random(4, 192, 1), "valid": jnp.arange(4) < 3}
    return AudioVAEObjective(vae, windows=(16, 64), critic=critic), batch


KINDS = {"pictures": (of_pictures, PICTURES), "sounds": (of_sounds, SOUNDS)}


# The networks


@pytest.mark.parametrize(
    ("module", "shape"), [(PICTURES, (3, 5, 16, 24, 3)), (SOUNDS, (3, 200, 2))]
)
def test_the_judgement_of_a_clip_depends_on_that_clip_alone(module, shape):
    clips = random(*shape)
    params = module.init(jax.random.key(0), clips)
    together = module.apply(params, clips)
    alone = module.apply(params, clips[1:2])
    assert_close(alone, tree.map(lambda x: x[1:2], together))
    logits, features = together
    assert len(features) == 2 * len(logits)
    assert all(x.shape[-1] == 1 and np.std(x) > 0.01 for x in logits)


def test_a_picture_is_a_video_of_one_frame():
    video = random(2, 5, 16, 16, 3)
    params = PICTURES.init(jax.random.key(0), video)
    # A new one looks at each frame alone: make it look back.
    params = tree.map(lambda x: x + 0.1 * random(*x.shape, seed=1), params)
    picture = PICTURES.apply(params, video[:, :1])
    first = tree.map(lambda x: x[:, :1], PICTURES.apply(params, video))
    assert picture[0][0].shape == (2, 1, 4, 4, 1)
    assert_close(picture, first)
    back = jax.grad(lambda x: PICTURES.apply(params, x)[0][0][:, 4].sum())(video)
    seen = np.abs(back).sum((0, 2, 3, 4)) > 0
    assert seen.all()  # 1 frame, and 2 more for each layer


def test_sounds_of_any_length_and_only_whole_quarters_of_windows():
    params = SOUNDS.init(jax.random.key(0), random(1, 192, 1))
    for samples in (1, 63, 300):
        logits, _ = SOUNDS.apply(params, random(1, samples, 1))
        assert all(np.isfinite(x).all() and x.size for x in logits)
    with pytest.raises(ValueError, match=r"windows.*18.*multiples of 4.*16 for 18"):
        SoundCritic(windows=(18,)).init(jax.random.key(0), random(1, 64, 1))


# The losses


def test_the_hinge_is_one_in_doubt_and_has_no_gradient_where_it_is_sure():
    doubt, sure = jnp.zeros((2, 1, 2, 2, 1)), jnp.full((2, 1, 2, 2, 1), 3.0)
    np.testing.assert_array_equal(hinge([doubt] * 2, [doubt] * 2), np.ones(2))
    np.testing.assert_array_equal(hinge([sure], [-sure]), np.zeros(2))
    np.testing.assert_array_equal(hinge([-sure], [sure]), np.full(2, 4.0))
    slope = jax.grad(lambda a, b: hinge([a], [b]).sum(), argnums=(0, 1))
    assert all((x == 0).all() for x in slope(sure, -sure))
    real, decoded = slope(doubt, doubt)
    np.testing.assert_array_equal(real, -0.5 / 4)
    np.testing.assert_array_equal(decoded, 0.5 / 4)


def test_matching_is_relative_to_the_features_of_real_clips_that_count():
    real = [jnp.asarray([[2.0, -2.0], [4.0, 4.0], [1e6, 1e6]])]
    valid = jnp.asarray([1.0, 1.0, 0.0])
    found = matching([real[0] + 0.3], real, valid)
    np.testing.assert_allclose(found[:2], 0.3 / 3.001, rtol=1e-5)
    np.testing.assert_array_equal(matching(real, real, valid), 0)


def test_the_balance_is_that_of_the_equation():
    """By hand, in float64, for a decoder that is one linear layer."""
    hidden, kernel = random(2, 1, 8, 8, 5), random(5, 3, seed=1)
    real, valid = random(2, 1, 8, 8, 3, seed=2), jnp.ones(2)
    critic = Critic(PICTURES, weight=0.8, matching=2.0)
    params = {"vae": {"decoder": {"conv_out": {"kernel": kernel}}}}
    params["critic"] = critic.init(jax.random.key(0), real)

    def decode(vae):
        return hidden @ vae["decoder"]["conv_out"]["kernel"]

    def errors(decoded):
        return 0.5 * jnp.square(decoded - real).sum(), {}

    _, metrics = critic.loss(params, decode, errors, real, valid)
    decoded = decode(params["vae"])
    network = partial(PICTURES.apply, {"params": params["critic"]})

    def generator(decoded):
        (logits,), features = network(decoded)
        told = -logits.mean((1, 2, 3, 4))
        return (told + 2 * matching(features, network(real)[1], valid)).sum()

    hidden, decoded, real, slope = (
        np.asarray(x, np.float64).reshape(128, -1)
        for x in (hidden, decoded, real, jax.grad(generator)(decoded))
    )
    lengths = [np.linalg.norm(hidden.T @ x) for x in (decoded - real, slope)]
    assert_close(metrics["balance"] / 2, np.float64(0.8 * lengths[0] / lengths[1]))
    assert balanced({"x": jnp.ones(3)}, {"x": jnp.zeros(3)}) == 1e4


@pytest.mark.parametrize("kind", KINDS)
def test_each_network_has_a_gradient_of_its_own(kind):
    """The vae's doesn't reach through the critic's loss, nor the other way round."""
    make, module = KINDS[kind]
    objective, batch = make(Critic(module, matching=2.0))
    params = jax.jit(objective.init)(jax.random.key(0), batch)
    params = tree.map(lambda x: x + 0.1 * random(*x.shape, seed=1), params)
    batch = objective.prepare(batch, jax.random.key(1))
    plain, _ = make(None)
    valid = batch["valid"].astype(jnp.float32)

    @jax.jit
    def found(params):
        graded = jax.value_and_grad(objective.loss, has_aux=True)
        (_, metrics), gradient = graded(params, batch)
        return gradient, metrics

    def apart(vae, critic, held, balance):
        """Both losses, each written out as a function of its own network."""
        errors, _ = plain.loss({"vae": vae}, batch)
        real, decoded = clips(vae)
        look = partial(module.apply, {"params": held["critic"]})
        ours, features = look(decoded)
        told = -sum(x.reshape(4, -1).mean(1) for x in ours) / len(ours)
        told = told + 2.0 * matching(features, look(real)[1], valid)
        look = partial(module.apply, {"params": critic})
        judged = hinge(look(real)[0], look(clips(held["vae"])[1])[0])
        return errors + balance * (valid * told).sum(), (valid * judged).sum()

    def clips(vae):
        apply = partial(plain.vae.apply, {"params": vae})
        real = batch.get("audio")
        real = video_vae.to_float(batch["video"]) if real is None else real
        mean, logvar = apply(real, method="encode")
        noise = jax.vmap(lambda k, m: jax.random.normal(k, m.shape))
        latents = mean + jnp.exp(0.5 * logvar) * noise(batch["key"], mean)
        return real, apply(latents, method="decode")[:, : real.shape[1]]

    gradient, metrics = found(params)
    balance = metrics["balance"] / 3
    assert balance > 0

    @jax.jit
    def wanted(params, balance):
        both = params["vae"], params["critic"]
        of_vae = jax.grad(lambda *x: apart(*x, params, balance)[0])(*both)
        of_critic = jax.grad(lambda *x: apart(*x, params, balance)[1], 1)(*both)
        return {"vae": of_vae, "critic": of_critic}

    assert_close(gradient, wanted(params, balance))


def test_before_its_start_it_changes_no_bit_and_then_it_learns():
    make, module = KINDS["sounds"]
    critic = Critic(module)
    objective, batch = make(critic)
    optim = Optim(warmup=0, lr=1e-3, networks={"critic": WARM})
    plain = dataclasses.replace(optim, networks={})
    init = jax.jit(objective.init)(jax.random.key(0), batch)
    off = new_state({"vae": init["vae"]}, plain.optimizer(99))
    on = new_state(init, optim.optimizer(99))
    step_off = jax.jit(make_train_step(make(None)[0], plain, 99, seed=0))
    early, _ = make(dataclasses.replace(critic, heeded=False))
    step_on = jax.jit(make_train_step(early, optim, 99, seed=0))
    for _ in range(3):
        off, before = step_off(off, batch)
        on, metrics = step_on(on, batch)
    np.testing.assert_array_equal(metrics["loss"], before["loss"])
    for ours, theirs in ((on.params, off.params), (on.ema, off.ema)):
        tree.map(np.testing.assert_array_equal, ours["vae"], theirs["vae"])
        tree.map(np.testing.assert_array_equal, ours["critic"], init["critic"])
    step_on = jax.jit(make_train_step(objective, optim, 99, seed=0))
    told = []
    for _ in range(30):
        on, metrics = step_on(on, batch)
        told.append(float(metrics["critic"]))
    assert not on.skipped and metrics["balance"] > 0
    assert 0.5 < told[0] < 2 and told[-1] < 0.8 * told[0]


def test_a_critic_with_impossible_numbers_is_refused():
    for fields, told in (
        ({"weight": -0.5}, r"weight.*-0\.5.*at least 0"),
        ({"matching": float("nan")}, "matching.*nan"),
    ):
        with pytest.raises(ValueError, match=told):
            Critic(PICTURES, **fields)


# A run


def config_of(steps=3, start=3):
    config = thread_config.get_config().stages.vae.copy_and_resolve_references()
    config.steps, config.evaluate_every, config.sample_every = steps, 0, 0
    config.data.validation, config.checkpoint_every = "", 1
    config.keep_checkpoints = 9
    config.vae.update(SMALLER["pictures"])
    config.critic.start = start
    config.critic.network.update(width=4, depth=2)
    return config


# Orbax warns that arrays come back where they were.
RESTORED = pytest.mark.filterwarnings("ignore:Sharding info not provided")


def state_of(workdir, step):
    """A checkpoint's state, as numpy arrays."""
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore())
        return tree.map(np.asarray, manager.restore(step, args=args)["state"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three steps, whose critic begins with the last."""
    folder = tmp_path_factory.mktemp("critic") / "whole"
    assert train(config_of(steps=3), str(folder)) == 3
    return folder


@RESTORED
def test_a_run_resumes_with_its_critic_and_its_model_has_none(whole, tmp_path):
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints/3")
    shutil.rmtree(parts / "model")
    assert train(config_of(steps=3), str(parts)) == 3
    before, first, again = state_of(whole, 2), state_of(whole, 3), state_of(parts, 3)
    tree.map(np.testing.assert_array_equal, first, again)
    assert set(first["params"]) == {"vae", "critic"}
    ours, theirs, new = (
        x["params"]["critic"] for x in (first, before, state_of(whole, 1))
    )
    tree.map(np.testing.assert_array_equal, theirs, new)
    assert np.abs(ours["conv_0"]["kernel"] - theirs["conv_0"]["kernel"]).max() > 0
    for folder in (whole, parts):
        assert [x.name for x in (folder / "model").iterdir()] == ["vae"]
    with pytest.raises(ValueError, match="holds another model: .*critic"):
        train(config_of(start=0), str(whole))
    with pytest.raises(ValueError, match=r"critic.start.*-3.*at least 0"):
        train(config_of(start=-3), str(whole))


@RESTORED
def test_a_critic_begins_anew_beside_an_autoencoder_that_goes_on(whole, tmp_path):
    config = config_of(steps=1, start=5)
    config.start_from = str(whole / "model")
    config.optim.lr = 1e-12
    # And the perceptual term takes features of one's own.
    config.loss.features = str(write_network(tmp_path / "network"))
    train(config, str(tmp_path / "next"))
    theirs, ours = (
        load_weights(x / "model/vae")[0] for x in (whole, tmp_path / "next")
    )
    assert_close(ours, theirs)
    params = state_of(tmp_path / "next", 1)["params"]
    assert set(params) == {"vae", "critic"}
    assert np.std(params["critic"]["conv_0"]["kernel"]) > 0.01


# Features of one's own


def write_network(folder, **changes):
    """Two scales: the pixels themselves, and then their sums and differences."""
    pixels = np.zeros((3, 3, 3, 3), np.float32)
    pixels[1, 1] = np.eye(3)
    mixed = np.zeros((3, 3, 3, 2), np.float32)
    mixed[1, 1] = [[1, 1], [1, -1], [1, 0]]
    tensors = {
        "input.scale": np.full(3, 0.5, np.float32),
        "input.bias": np.full(3, 0.5, np.float32),
        "scale_0.conv_0.kernel": pixels,
        "scale_0.conv_0.bias": np.zeros(3, np.float32),
        "scale_1.conv_0.kernel": mixed,
        "scale_1.conv_0.bias": np.zeros(2, np.float32),
    } | changes
    folder.mkdir(exist_ok=True)
    held = {name: x for name, x in tensors.items() if x is not None}
    save_file(held, folder / "network.safetensors")
    return folder


def test_features_of_ones_own_are_those_of_the_network(tmp_path):
    params = tree.map(jnp.asarray, read_features(write_network(tmp_path / "network")))
    frames = np.random.default_rng(0).uniform(-1, 1, (2, 4, 6, 3)).astype(np.float32)

    def normed(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    first = frames * 0.5 + 0.5
    pooled = first.reshape(2, 2, 2, 3, 2, 3).max((2, 4))
    red, green, _ = np.moveaxis(pooled, -1, 0)
    second = np.stack([pooled.sum(-1), np.maximum(red - green, 0)], -1)
    found = given_features(params, jnp.asarray(frames))
    assert_close(found, [normed(first), normed(second)])
    with pytest.raises(ValueError, match=r"1 x 6 pixels.*2 scales need 2"):
        given_features(params, jnp.zeros((1, 1, 6, 3)))


def test_the_perceptual_term_is_that_of_the_network_where_there_is_one(tmp_path):
    objective, batch = of_pictures(None)
    batch = objective.prepare(batch, jax.random.key(0))
    params = jax.jit(objective.init)(jax.random.key(0), batch)
    params["features"] = tree.map(
        jnp.asarray, read_features(write_network(tmp_path / "network"))
    )
    loss = jax.jit(objective.loss)
    _, before = loss({"vae": params["vae"]}, batch)
    _, after = loss(params, batch)
    np.testing.assert_array_equal(after["l1"], before["l1"])
    assert abs(after["perceptual"] / before["perceptual"] - 1) > 0.05


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("scale_1.conv_0.bias", None, r"lacks `scale_1.conv_0.bias`.*\(2,\)"),
        ("scale_1.conv_0.bias", np.zeros(3), r"of \(3,\).*of shape \(2,\)"),
        ("scale_1.conv_0.kernel", np.zeros((2, 3, 3, 3)), r"\(3, 3, 3, 3\)"),
        ("scale_0.conv_0.kernel", np.zeros((3, 3, 1, 3)), r"\(3, 3, 3, 3\)"),
        ("scale_3.conv_0.bias", np.zeros(3), "scale_3.conv_0.*without gaps"),
        ("input.bias", None, "lacks `input.bias`"),
        ("features.0.weight", np.zeros(3), "features.0.weight.*scale_0.conv_0"),
        ("scale_0.conv_0.bias", np.full(3, np.nan), "finite"),
    ],
)
def test_a_network_of_another_layout_is_refused(tmp_path, name, value, told):
    write_network(tmp_path / "network", **{name: value})
    with pytest.raises(ValueError, match=told):
        read_features(tmp_path / "network")
