"""The whole way, from clips to samples; and that a run survives what happens to it."""

import dataclasses
import math
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import thread_config
from closeness import assert_close
from doors import command
from jax import tree
from ml_collections import ConfigDict
from PIL import Image

from jvdit.data.records import RecordDataset
from jvdit.diffusion.denoise import Guidance
from jvdit.generation.batches import Chunk
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request
from jvdit.sharding import make_mesh
from jvdit.tasks.encoding import encode
from jvdit.tasks.flow import FlowTask
from jvdit.tasks.loop import train
from jvdit.training.checkpoint import claim_workdir
from jvdit.weights.bundle import read_bundle
from jvdit.weights.opening import EXPERTS, with_adapters
from jvdit.weights.parameters import load_weights, save_weights, weights_hash

HERE = pathlib.Path(__file__).parent


# What a run leaves


def test_every_stage_leaves_what_the_next_and_the_user_need(workdir):
    for stage in ("vae", "dit"):
        folder = workdir / stage
        assert (folder / "config.json").exists()
        assert any((folder / "tensorboard").iterdir())
        assert [*(folder / "samples").glob("*.png")]
        assert (folder / "model").is_dir()
    films = [*(workdir / "dit" / "samples").glob("*.mp4")]
    assert len(films) == 2
    steps = {int(path.name) for path in (workdir / "dit/checkpoints").glob("[0-9]*")}
    assert steps == {4, 6, 8}  # the newest three


def test_latents_are_those_of_the_autoencoder(workdir):
    params, _ = load_weights(workdir / "vae/model/vae")
    records = RecordDataset(workdir / "latents", "train")
    assert len(records) == 64 and len(RecordDataset(workdir / "latents", "val")) == 8
    assert records.settings["vae"]["hash"] == weights_hash(params)
    record = records[3]
    assert record["mean"].shape == record["logvar"].shape == (2, 2, 2, 4)
    assert record["caption"].split()[1].startswith("object")
    _, fields = load_weights(workdir / "latents/vae")
    assert len(fields["latents_std"]) == 4 and min(fields["latents_std"]) > 0


def test_encoding_again_writes_nothing_anew(workdir):
    shard = next((workdir / "latents").rglob("*array_record*"))
    before = shard.stat().st_mtime_ns
    encode(
        "world:train:5x16x16@8:64",
        str(workdir / "vae"),
        str(workdir / "latents"),
        "world:val:5x16x16@8:8",
    )
    assert shard.stat().st_mtime_ns == before


def test_cached_captions_train_like_those_encoded_along(workdir, tmp_path):
    encode(
        "world:train:5x16x16@8:64",
        str(workdir / "vae"),
        str(tmp_path / "latents"),
        text_encoder=str(workdir / "dit"),
    )
    along = thread_config.flow_config(workdir)
    along.data.update(max_clips=1, token_budget=4, caption_dropout=0.0, validation="")
    along.given.first_frame = 0.0  # drawn by place, and the caches differ in order
    cached = along.copy_and_resolve_references()
    cached.data.sources = (str(tmp_path / "latents"),)
    cached.text_encoder = ConfigDict()
    params = {
        name: load_weights(workdir / "dit/model" / name)[0]
        for name in ("dit", "text_encoder")
    }
    # A new DiT says nothing, and hardly heeds its text: make it.
    head, text = params["dit"]["head"], params["dit"]["text_embed"]
    rng = np.random.default_rng(0)
    head["kernel"] = rng.normal(0, 0.2, head["kernel"].shape).astype(np.float32)
    params["dit"]["text_embed"] = tree.map(lambda x: 30 * x, text)

    def errors(config, mix_up=False):
        """The error of every clip: the two caches may come in different orders."""
        task, found = FlowTask(config, make_mesh(), tmp_path), {}
        error_of = jax.jit(task.objective.error)
        for step in range(8):
            batch, bad = task.batch_builder[step]
            assert not bad
            ids = batch["clip_id"][:, 0]
            batch = tree.map(jnp.asarray, batch)
            if mix_up:
                batch["text_embeds"] = batch["text_embeds"][::-1]
            x0, noise = batch["latents"], jnp.full_like(batch["latents"], 0.3)
            t = jnp.full(batch["valid"].shape, 0.5)
            error, _ = error_of(params, batch, x0, noise, t)
            found |= dict(zip(ids.tolist(), error.mean(1).tolist(), strict=True))
        return np.array([found[i] for i in range(64)])

    encoded_along = errors(along)
    np.testing.assert_allclose(errors(cached), encoded_along, rtol=1e-2)
    assert np.abs(errors(cached, mix_up=True) / encoded_along - 1).max() > 0.05


# Sampling


def test_a_clip_is_the_same_whatever_else_is_in_the_batch(generator):
    ours = Request("one object: a red circle", frames=5, height=16, width=16, seed=7)
    larger = Request("two objects", frames=9, height=16, width=32, seed=1)
    settings = {"steps": 3, "solver": "unipc", "guidance": Guidance(2.0)}
    alone = generator.latents([ours], **settings)
    among = generator.latents([larger, ours, ours], **settings)
    assert_close(among[1], alone[0])
    assert_close(among[1], among[2])
    assert among[0].shape == (3, 2, 4, 4)
    other = Request("one object: a red circle", frames=5, height=16, width=16, seed=8)
    assert np.abs(generator.latents([other], **settings)[0] - alone[0]).max() > 0.1


@pytest.mark.parametrize("sizes", [{"data": 1}, {"data": 4}, {"data": 2, "context": 4}])
def test_guidance_and_tokens_are_divided_over_devices(workdir, generator, sizes):
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    few = Generator.load(workdir / "dit", mesh)
    requests = [
        Request(f"{i} objects", frames=5, height=16, width=16, seed=i) for i in (1, 2)
    ]
    settings = {"steps": 2, "guidance": Guidance(3.0)}
    found = few.latents(requests, **settings)
    for x, y in zip(found, generator.latents(requests, **settings), strict=True):
        assert_close(x, y)
    # Two requests with guidance are four rows: no more are made up for four devices.
    rows = []
    few.latents(requests, on_step=lambda _, __, x: rows.append(len(x)), **settings)
    assert set(rows) == {2}


def test_each_of_two_experts_is_guided_by_its_own_scale(workdir, generator):
    """Two that are alike are one that is guided between times, on any devices."""

    def stirred(params):  # such that the text matters
        rng = np.random.default_rng(0)
        return jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape), params)

    one = Generator.load(workdir / "dit", make_mesh(devices=jax.devices()[:1]))
    dit = stirred(generator.model.networks["dit"].params)
    one.model = one.model.with_params({"dit": dit})
    expert = one.model.networks["dit"]
    networks = {**one.model.networks, "dit_low": expert}
    experts = dataclasses.replace(one.model, networks=networks, boundary=0.5)
    two = Generator(experts, generator.mesh)
    request = Request("two objects", frames=5, height=16, width=16)
    found = {}
    for scales, between in (((1.0, 4.0), (0.0, 0.5)), ((4.0, 1.0), (0.5, 1.0))):
        high, low = (Guidance(scale) for scale in scales)
        settings = {"guidance": high, "low_guidance": low}
        (found[scales],) = two.latents([request], steps=3, **settings)
        (want,) = one.latents([request], steps=3, guidance=Guidance(4.0, between))
        error = np.abs(found[scales] - want).max() / np.abs(want).max()
        assert error < 1e-4, (scales, error)
    assert np.abs(found[1.0, 4.0] - found[4.0, 1.0]).max() > 0.1


def test_two_experts_are_trained_from_one_network(workdir, tmp_path):
    """Each at its own times, and both are saved; a sample asks the one in charge."""
    config = thread_config.flow_config(workdir)
    config.start_from = str(workdir / "dit/model")
    config.expert, config.boundary, config.steps = "both", 0.5, 2
    config.data.rows, config.sample.prompts, config.sample.scored = 16, (), 0
    config.data.validation, config.given.first_frame = "", 0.0
    config.optim.ema, config.optim.warmup = 0.0, 0
    train(config, str(tmp_path))
    model = read_bundle(tmp_path / "model")
    assert model.boundary == 0.5
    before = load_weights(workdir / "dit/model/dit")[0]["head"]["kernel"]
    heads = [model.networks[name].params["head"]["kernel"] for name in EXPERTS]
    assert all(np.abs(head - before).max() > 1e-5 for head in heads)
    assert np.abs(heads[0] - heads[1]).max() > 1e-5
    request, spans = Request("x", frames=5, height=16, width=16), {}
    for name in EXPERTS:
        params = tree.map(lambda x: x + 0.1, model.networks[name].params)
        changed = Generator(model.with_params({name: params}))
        (spans[name],) = changed.latents([request], steps=4)
    (plain,) = Generator(model).latents([request], steps=4)
    assert all(np.abs(x - plain).max() > 1e-3 for x in spans.values())


def test_tokens_that_devices_do_not_divide_are_padded(workdir, generator):
    mesh = make_mesh({"context": 8})
    many = Generator.load(workdir / "dit", mesh)
    request = Request("a circle", frames=5, height=16, width=16, seed=3)
    settings = {"steps": 2, "guidance": Guidance(3.0)}
    found, expected = (
        many.latents([request], **settings),
        generator.latents([request], **settings),
    )
    assert_close(found[0], expected[0])
    tokens = []
    many.latents(
        [request], on_step=lambda _, __, x: tokens.append(x.shape[1]), **settings
    )
    assert set(tokens) == {8}


def test_a_clip_begins_with_the_picture_that_it_is_given(generator):
    """Trained with `first_frame`, on its own latents; others beside it don't see it."""
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    plain = Request("x", frames=5, height=16, width=16)
    settings = {"steps": 2, "guidance": Guidance(2.0)}
    alone = generator.latents([plain], **settings)
    requests = [dataclasses.replace(plain, image=picture), plain]
    given, beside = generator.latents(requests, **settings)
    first = generator.codec.encode(picture[None].astype(np.float32) / 127.5 - 1)
    assert_close(given[:1], first)
    assert np.abs(given[1:] - beside[1:]).max() > 1e-3
    assert_close(beside, alone[0])


def test_a_draft_gives_the_first_frame(generator, tmp_path):
    """To clips that have none; what isn't a clip, or has one, takes one pass."""
    picture = np.random.default_rng(1).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    plain = Request("x", frames=5, height=16, width=16)
    given = dataclasses.replace(plain, image=picture, seed=3)
    still = dataclasses.replace(plain, frames=1, seed=4)
    settings = {"steps": 2, "solver": "euler", "guidance_scale": 1.0, "rows": 8}
    told = []
    videos = generator(
        [plain, given, still],
        draft=True,
        watch=lambda *now: told.append(now),
        **settings,
    )
    (draft,) = generator(
        [dataclasses.replace(plain, frames=1, seed=1 << 31)], **settings
    )
    begun = [dataclasses.replace(plain, image=draft.video[0]), given, still]
    for found, want in zip(videos, generator(begun, **settings), strict=True):
        np.testing.assert_allclose(found.video, want.video, atol=1)
    assert told[:2] == [("drafting", 1, 2), ("drafting", 2, 2)]
    doing = [name for name, *_ in told]
    assert [*dict.fromkeys(doing)] == ["drafting", "denoising", "decoding"]
    assert told[doing.index("denoising")] == ("denoising", 1, 2)
    # Another model's picture, which a folder keeps beside the model's own parts.
    painter = Generator(dataclasses.replace(generator.model, conditions=()))
    drawn = Generator(dataclasses.replace(generator.model, pictures=painter.model))
    drawn.save(tmp_path / "model")
    drawn = Generator.load(tmp_path / "model")
    clip = drawn(plain, draft=True, **settings)
    picture = painter([dataclasses.replace(plain, seed=1 << 31, frames=1)], **settings)
    begun = dataclasses.replace(plain, image=picture[0].video[0])
    (want,) = generator([begun], **settings)
    np.testing.assert_allclose(clip.video, want.video, atol=1)
    with pytest.raises(ValueError, match="first_frame"):
        painter(plain, draft=True, **settings)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"frames": 6}, "frames.*6.*try 5 or 9"),
        ({"height": 20}, "height.*20.*16"),
        ({"width": 24}, "width.*24.*3 latents.*patches of 2.*try 32"),
        ({"fps": 0.0}, "fps.*0"),
    ],
)
def test_impossible_sizes_are_named(generator, change, message):
    request = {"prompt": "x", "frames": 5, "height": 16, "width": 16} | change
    with pytest.raises(ValueError, match=message):
        generator([Request(**request)])


# A run that is stopped, killed, misused


def final_state(workdir):
    manager = ocp.CheckpointManager(pathlib.Path(workdir).absolute() / "checkpoints")
    restored = manager.restore(
        manager.latest_step(), args=ocp.args.Composite(state=ocp.args.PyTreeRestore())
    )
    manager.close()
    return tree.map(np.asarray, restored["state"])


def launch(thread, workdir):
    """Trains the flow stage in a process of its own."""
    config = workdir.parent / "flow_config.py"
    config.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "from thread_config import flow_config\n"
        f"def get_config():\n    return flow_config({str(thread)!r})\n"
    )
    command = [sys.executable, "-m", "jvdit.train", f"--config={config}"]
    command += [f"--workdir={workdir}", "--config.steps=32"]
    command += ["--config.checkpoint_every=4", "--config.sample_every=0"]
    command += ["--config.evaluate_every=0", "--config.sample.prompts=()"]
    command += ["--config.sample.scored=0", "--exit_stopped=75"]
    return subprocess.Popen(command)


def _newest(workdir):
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def wait_for_step(process, workdir, step):
    deadline = time.monotonic() + 300
    while step > _newest(workdir):
        assert process.poll() is None, "ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Restored here as plain arrays: where they were placed doesn't matter.
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_killed_and_restarted_is_bit_identical(latents, tmp_path):
    """SIGKILL, then SIGTERM, then to the end: as if it had never stopped."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert launch(latents, whole).wait(timeout=300) == 0
    killed = launch(latents, broken)
    wait_for_step(killed, broken, 4)
    killed.kill()
    killed.wait()
    ended = launch(latents, broken)
    wait_for_step(ended, broken, 12)
    ended.send_signal(signal.SIGTERM)
    assert ended.wait(timeout=300) == 75
    assert _newest(broken) < 32
    assert launch(latents, broken).wait(timeout=300) == 0
    a, b = final_state(whole), final_state(broken)
    assert int(a["step"]) == int(b["step"]) == 32
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_stopped_in_a_look_it_looks_when_it_goes_on(workdir, tmp_path, monkeypatch):
    """Not to the next step, nor a stage; samples come, and the bits stay the same."""
    config = thread_config.flow_config(workdir)
    config.steps, config.checkpoint_every = 4, 0
    config.evaluate_every = config.sample_every = 2
    config.sample.update(prompts=("one object",), scored=0)
    folder = tmp_path / "run"
    pictures = [folder / f"samples/step_000000{i}.png" for i in (2, 4)]
    with monkeypatch.context() as patched:
        ask = lambda *_: signal.raise_signal(signal.SIGTERM)  # noqa: E731
        patched.setattr(FlowTask, "show", ask)
        assert train(config, str(folder)) == 2
    assert _newest(folder) == 2 and not (folder / "samples").exists()
    (folder / "model/.tmp@gone@1@weights.safetensors").touch()
    with monkeypatch.context() as patched:  # killed before the last samples
        show = FlowTask.show

        def killed(task, params, metrics, step, samples):
            if step == 4:
                raise KeyError("killed")
            show(task, params, metrics, step, samples)

        patched.setattr(FlowTask, "show", killed)
        config.checkpoint_every = 2
        with pytest.raises(KeyError, match="killed"):
            train(config, str(folder))
    assert [x.exists() for x in pictures] == [True, False]
    assert train(config, str(folder)) == 4
    assert pictures[1].exists()
    assert not [*folder.rglob(".tmp@*"), *folder.glob(".lock")]
    before = pictures[1].stat().st_mtime_ns
    assert train(config, str(folder)) == 4
    assert pictures[1].stat().st_mtime_ns == before
    whole = thread_config.flow_config(workdir)
    whole.steps, whole.checkpoint_every = 4, 0
    whole.evaluate_every, whole.sample_every = 0, 0
    whole.sample.update(prompts=(), scored=0)
    whole.data.validation = ""
    train(whole, str(tmp_path / "whole"))
    a, b = final_state(folder), final_state(tmp_path / "whole")
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda f: (f / "config.json").write_text(""),
            "config.json is damaged.*delete",
        ),
        (
            lambda f: (f / "model/tokenizer.model").write_bytes(b"cut"),
            "tokenizer.model is no sentencepiece model, or was cut off; .*delete it",
        ),
    ],
)
def test_what_was_cut_off_is_said_and_can_be_deleted(
    workdir, tmp_path, damage, message
):
    folder, config = tmp_path / "dit", thread_config.flow_config(workdir)
    shutil.copytree(workdir / "dit", folder)
    before = (folder / "model/tokenizer.model").read_bytes()
    damage(folder)
    with pytest.raises(ValueError, match=message) as raised:
        train(config, str(folder))
    assert "\n" not in str(raised.value)
    pathlib.Path(str(raised.value).partition(" is ")[0]).unlink()
    assert FlowTask(config, make_mesh(), folder).tokenizer.model == before


def test_another_optimizer_is_refused(tmp_path):
    def claim(name):
        settings = {"identity": {}, "config": {"optim": {"name": name}}}
        claim_workdir(tmp_path, settings)

    claim("muon")
    claim("adamw")  # nothing is trained yet
    (tmp_path / "checkpoints/3").mkdir(parents=True)
    with pytest.raises(ValueError, match="begun with `optim.name` 'adamw'.*'muon'"):
        claim("muon")
    claim("adamw")


def test_a_workdir_of_another_model_is_refused_and_untouched(workdir, tmp_path):
    folder = tmp_path / "dit"
    shutil.copytree(workdir / "dit", folder)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    config = thread_config.flow_config(workdir)
    config.dit.width = 64
    with pytest.raises(ValueError, match="another model.*dit.width.*32.*64"):
        train(config, str(folder))
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_run_starts_from_the_weights_of_another(workdir, tmp_path):
    config = thread_config.flow_config(workdir)
    config.start_from = str(workdir / "dit/model")
    config.steps = 2
    config.sample.update(prompts=(), scored=0)
    config.optim.update(lr=1e-9, weight_decay=0.0)
    # Only at the end.
    config.checkpoint_every = config.evaluate_every = config.sample_every = 0
    # Its captions would make another tokenizer of that many pieces.
    config.vocab_size -= 20
    train(config, str(tmp_path / "on"))
    assert [f.name for f in (tmp_path / "on/checkpoints").iterdir()] == ["2"]
    models = [f / "model/tokenizer.model" for f in (workdir / "dit", tmp_path / "on")]
    assert models[0].read_bytes() == models[1].read_bytes()
    for name in ("dit", "text_encoder"):
        given, _ = load_weights(workdir / "dit/model" / name)
        found, _ = load_weights(tmp_path / "on/model" / name)
        assert_close(found, given, 4)
    config.dit.width = 64
    with pytest.raises(ValueError, match="other networks.*32.*64.*start_from"):
        train(config, str(tmp_path / "wider"))
    config.start_from = str(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no model"):
        train(config, str(tmp_path / "wider"))
    assert not (tmp_path / "wider").exists()


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_adapters_of_a_model_of_ones_own(workdir, tmp_path):
    config = thread_config.flow_config(workdir)
    config.start_from = str(workdir / "dit/model")
    config.steps = config.evaluate_every = config.sample_every = 3
    config.sample.update(prompts=("one object",), scored=0)
    config.optim.update(warmup=0, lr=0.05)
    config.lora.update(rank=2, alpha=4.0, dropout=0.1)
    train(config, str(tmp_path / "lora"))
    before, after = sorted((tmp_path / "lora/samples").glob("*.png"))
    assert before.name == "step_0000000.png"
    with Image.open(before) as before, Image.open(after) as after:
        assert after.height > 1.8 * before.height, "with what the weights gave before"
    config.steps, config.sample.prompts = 4, ()
    train(config, str(tmp_path / "lora"))  # goes on
    state = final_state(tmp_path / "lora")
    assert int(state["step"]) == 4 and list(state["params"]) == ["lora"]
    (file,) = (tmp_path / "lora/model").iterdir()
    generator = Generator.load(workdir / "dit")
    request = Request("one object", frames=5, height=16, width=16)
    settings = {"steps": 2, "guidance": Guidance(2.0)}
    plain = generator.latents([request], **settings)[0]
    generator.model = with_adapters(generator.model, [(file, 10.0)])
    assert np.abs(generator.latents([request], **settings)[0] - plain).max() > 1e-3
    generator.model = with_adapters(generator.model, [(file, -10.0)])
    again = generator.latents([request], **settings)[0]
    assert_close(again, plain)
    config.lora.rank = 3
    with pytest.raises(ValueError, match="`lora.rank` is 2 there but 3 here"):
        train(config, str(tmp_path / "lora"))
    config.start_from = ""
    with pytest.raises(ValueError, match="`start_from` names no model"):
        train(config, str(tmp_path / "none"))


def test_attention_patterns_are_trained_and_sampled_on_rows_of_one_grid(
    latents, tmp_path, monkeypatch
):
    config = thread_config.flow_config(latents)
    config.data.update(max_clips=1, token_budget=4)
    config.dit.update(depth=2, patterns=("spatial", "temporal"), skips=True)
    config.steps = 2
    config.sample.update(prompts=(), scored=0)
    config.checkpoint_every = config.sample_every = config.evaluate_every = 0
    task = FlowTask(config, make_mesh(), tmp_path / "task")
    assert task.objective.frames == 2
    full = task.objective.dit.clone(patterns=(), skips=True)
    tokens, text = (task.example[x].shape[1] for x in ("segment", "text_segment"))
    assert task.flops < 8 * full.flops(tokens, text, "weights")
    train(config, str(tmp_path / "on"))
    generator = Generator.load(tmp_path / "on")
    request = Request("two objects", frames=5, height=16, width=16, seed=3)
    found = generator.latents([request], steps=2)
    # The same by the rule of visibility, as in rows of several clips.
    monkeypatch.setattr(Chunk, "frames", 0)
    assert_close(found, generator.latents([request], steps=2))


def test_a_field_that_came_later_is_at_its_default_in_an_old_workdir(tmp_path):
    class Later(nn.Module):
        width: int
        gain: float = 2.0

    def claim(**fields):
        settings = {"identity": {"dit": fields}}
        claim_workdir(tmp_path, settings, {"dit": Later})

    claim(width=3)
    for fields in ({"width": 3, "gain": 1.0}, {"width": 4, "gain": 2.0}, {}):
        with pytest.raises(ValueError, match="holds another model: .*(gain|width)"):
            claim(**fields)
    claim(width=3, gain=2.0)


def test_a_stale_cache_is_refused(workdir, tmp_path):
    params, fields = load_weights(workdir / "vae/model/vae")
    config = thread_config.flow_config(workdir)
    config.autoencoder = str(workdir / "vae/model/vae")
    params["quant_conv"]["bias"] = params["quant_conv"]["bias"] + 1
    save_weights(tmp_path / "vae", params, fields)
    config.autoencoder = str(tmp_path / "vae")
    with pytest.raises(ValueError, match="stale.*hash.*Encode it anew"):
        train(config, str(tmp_path / "dit"))
    assert not (tmp_path / "dit").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.sample.update(solver="eulr"), "solver.*'eulr'.*euler"),
        (lambda c: c.sample.update(height=17), "height.*17.*16"),
        (lambda c: c.data.update(rows=6), "rows.*6.*divisible by 8.*try 8"),
        (lambda c: c.data.update(sources=("world:train:5x16x16@8:9",)), "pixels"),
        (lambda c: c.data.update(sources=("world:train",)), "must read world:SPLIT"),
        (lambda c: c.data.update(sources=("nowhere",)), "nowhere"),
        (lambda c: c.dit.update(num_heads=5), "width.*32.*num_heads.*5"),
        (lambda c: c.mesh.update(data=3), "3 devices but there are 8"),
        (
            lambda c: (
                c.mesh.update(data=1, context=8),
                c.data.update(token_budget=12),
            ),
            "token_budget.*12.*divisible.*8.*try 16",
        ),
        (lambda c: c.update(matmul_precision="bf16"), "precision.*'bf16'.*bfloat16"),
        (lambda c: c.sample.update(frames=1), "1 frames.*at least 4"),
    ],
)
def test_bad_settings_are_one_line_and_touch_nothing(
    workdir, tmp_path, change, message
):
    config = thread_config.flow_config(workdir)
    change(config)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(config, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_a_typo_on_the_command_line_is_answered_with_the_right_name(tmp_path):
    command = [sys.executable, "-m", "jvdit.train", f"--workdir={tmp_path}/new"]
    command += [f"--config={HERE}/../configs/world_dit.py"]
    command += ["--config.stages.videos.optim.lrr=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (
        done.returncode != 0 and "did you mean stages.videos.optim.lr?" in done.stderr
    )
    assert not (tmp_path / "new").exists()


def test_a_folder_without_a_model_is_named(tmp_path):
    done = command("sample", "x", f"--workdir={tmp_path}")
    assert done.returncode == 1
    assert "holds no text-to-video model" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_workdir_has_to_hold_checkpoints(tmp_path, monkeypatch):
    """As a bucket without folders doesn't: they are renamed when they are whole."""

    def refuse(*names):
        raise OSError("not supported")

    with monkeypatch.context() as patched:
        patched.setattr(pathlib.Path, "rename", refuse)
        with pytest.raises(ValueError, match="can't be renamed .*hierarchical"):
            claim_workdir(tmp_path / "run", {})
    assert not [*(tmp_path / "run").iterdir()]
