"""Finetuning a released model: it starts as diffusers' network, and ends there too."""

import json
import pathlib
import runpy
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from einops import rearrange
from safetensors.numpy import load_file
from tiny_models import DIT, VAE_2_2, filled, pipeline

from jvdit import config as defaults
from jvdit.diffusion.denoise import Guidance
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request
from jvdit.models.dit import VARIANTS
from jvdit.sharding import make_mesh
from jvdit.tasks.encoding import encode
from jvdit.tasks.flow import FlowTask
from jvdit.tasks.loop import train
from jvdit.weights.opening import with_adapters
from jvdit.weights.starting import finished_parameters

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

EXPERTS = ("transformer", "transformer_2")
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A tiny release with two experts, and latents of its autoencoder."""
    folder = tmp_path_factory.mktemp("finetune")
    pipe = pipeline(diffusers.WanPipeline, 5.0, experts=0.875)
    pipe.save_pretrained(folder / "release")
    encode(
        "world:train:5x32x32@8:24",
        str(folder / "release"),
        str(folder / "latents"),
        "",
        str(folder / "release"),
        text_length=16,
    )
    return folder, pipe


def config_of(folder, expert="dit"):
    """The settings of a release's finetuning, with the sizes of the tiny one."""
    config = defaults.wan("wan2.1-t2v-1.3b", str(folder / "release"))
    sizes = {"width": 48, "depth": 2, "num_heads": 3, "ffn_width": DIT["ffn_dim"]}
    config.dit.update(**sizes, dtype="float32", remat="none")
    config.expert = expert
    config.steps = config.sample_every = config.evaluate_every = 2
    config.data.update(rows=8, token_budget=8, text_length=16, text_budget=16)
    config.data.sources = (str(folder / "latents"),)
    config.data.caption_dropout = 0.0
    config.sample.update(frames=5, height=32, width=32, steps=2)
    config.sample.prompts = ("a red circle",)
    config.optim.update(lr=1e-9, weight_decay=0.0, warmup=0)
    return config


@pytest.mark.parametrize("expert", ["dit", "dit_low"])
def test_the_loss_is_that_of_diffusers_network(release, tmp_path, expert):
    folder, pipe = release
    task = FlowTask(config_of(folder, expert), make_mesh(), tmp_path)
    batch = jax.tree.map(jnp.asarray, task.batch_builder[0][0])
    shapes = jax.eval_shape(task.objective.init, jax.random.key(0), batch)
    params = finished_parameters(folder / "release", shapes, make_mesh(), expert)
    x0 = batch["latents"]
    noise = jax.random.normal(jax.random.key(1), x0.shape)
    t = jnp.full(batch["valid"].shape, 0.6284)
    found, _ = jax.jit(task.objective.error)(params, batch, x0, noise, t)
    mixed = (1 - 0.6284) * x0 + 0.6284 * noise

    def cells(tokens):
        pattern = "b (f h w) (p q c) -> b c f (h p) (w q)"
        return rearrange(np.asarray(tokens), pattern, h=2, w=2, p=2, q=2)

    network = {"dit": pipe.transformer, "dit_low": pipe.transformer_2}[expert]
    with torch.no_grad():
        velocity = network(
            torch.from_numpy(cells(mixed)),
            torch.full((8,), 628),
            torch.from_numpy(np.array(batch["text_embeds"])),
        ).sample.numpy()
    error = (velocity - cells(noise - x0)) ** 2
    want = rearrange(error, "b c f (h p) (w q) -> b (f h w) (c p q)", p=2, q=2)
    np.testing.assert_allclose(found, want.mean(-1), rtol=1e-4)
    # All 16 states are seen, those past the end of a caption too.
    assert batch["text_segment"].min() == 1


def test_the_loss_with_a_first_frame_is_that_of_diffusers_network(tmp_path):
    """TI2V: given tokens are clean and at timestep 0, and no part of the loss."""
    large = {"in_channels": 48, "out_channels": 48}
    kind = diffusers.WanPipeline
    pipe = pipeline(kind, 5.0, VAE_2_2, dit=large, expand_timesteps=True)
    pipe.save_pretrained(tmp_path / "release")
    release, cache = str(tmp_path / "release"), str(tmp_path / "latents")
    encode("world:train:5x32x64@8:8", release, cache, "", release, text_length=16)
    config = config_of(tmp_path)
    config.data.token_budget = 4
    config.given.first_frame = 1.0
    config.sample.width = 64
    task = FlowTask(config, make_mesh(), tmp_path / "run")
    assert task.bundle({}).conditions == ("first_frame",)
    batch = jax.tree.map(jnp.asarray, task.batch_builder[0][0])
    shapes = jax.eval_shape(task.objective.init, jax.random.key(0), batch)
    params = finished_parameters(release, shapes, make_mesh(), "dit")
    batch = task.objective.prepare(batch, jax.random.key(0))
    x0 = batch["latents"]
    noise = jax.random.normal(jax.random.key(1), x0.shape)
    t = jnp.full(batch["valid"].shape, 0.6284)
    found, _ = jax.jit(task.objective.error)(params, batch, x0, noise, t)
    level = np.array([0, 0, 0.6284, 0.6284])[None, :, None]
    mixed = torch.from_numpy(np.array((1 - level) * x0 + level * noise, np.float32))
    with torch.no_grad():
        velocity = pipe.transformer(
            rearrange(mixed, "b (f w) (p q c) -> b c f p (w q)", f=2, p=2, q=2),
            torch.tensor([[0, 0, 628, 628]] * 8),
            torch.from_numpy(np.array(batch["text_embeds"])),
        ).sample.numpy()
    velocity = rearrange(velocity, "b c f p (w q) -> b (f w) (p q c)", p=2, q=2)
    want = ((velocity - (noise - x0)) ** 2).mean(-1)
    np.testing.assert_allclose(found[:, 2:], want[:, 2:], rtol=1e-4)
    np.testing.assert_array_equal(found[:, :2], 0)


def load(folder, **parts):
    mesh = make_mesh(devices=jax.devices()[:1])
    release = folder / "release"
    return Generator.load(release, mesh, dtype=jnp.float32, parts=parts)


def latents(generator):
    request = Request("a red circle", frames=5, height=32, width=32)
    return generator.latents([request], steps=4, guidance=Guidance(2.0))[0]


@pytest.fixture(scope="module")
def plain(release):
    """What the release generates as it is."""
    return latents(load(release[0]))


def test_all_weights_of_an_expert(release, plain, tmp_path):
    folder, _ = release
    moved = folder / "moved"
    config = config_of(folder, "dit_low")
    config.start_from = str(shutil.copytree(folder / "release", moved))
    config.sample.prompts = ()
    config.steps = 1
    train(config, str(tmp_path / "full"))
    shutil.rmtree(moved / "transformer_2")
    (moved / "transformer_2").mkdir()
    given = folder / "release/transformer_2/config.json"
    shutil.copy(given, moved / "transformer_2")
    config.steps = 2
    train(config, str(tmp_path / "full"))  # goes on without its weights
    made = tmp_path / "full/model/transformer_2"
    theirs = diffusers.WanTransformer3DModel.from_pretrained(made)
    own = load_file(made / "diffusion_pytorch_model.safetensors")
    given = load_file(
        folder / "release/transformer_2/diffusion_pytorch_model.safetensors"
    )
    assert own.keys() == given.keys() == theirs.state_dict().keys()
    assert_close(own, given, 8)
    tuned = latents(load(folder, dit_low=made))
    assert_close(tuned, plain)


def test_both_experts_learn_each_at_its_own_noise(release, tmp_path):
    folder, _ = release
    config = config_of(folder, "both")
    with pytest.raises(ValueError, match="needs a `boundary`"):
        FlowTask(config, make_mesh(), tmp_path)
    config.boundary = 0.875
    with pytest.raises(ValueError, match="divisible by 16.*try 16"):
        FlowTask(config, make_mesh(), tmp_path)
    config.data.rows = 16
    objective = FlowTask(config, make_mesh(), tmp_path).objective
    batch = {"segment": jnp.ones((16, 8), int), "valid": jnp.ones((16, 1), bool)}
    t = objective.prepare(batch, jax.random.key(0))["t"]
    assert (t[:8] >= 0.875).all() and (t[8:] <= 0.875).all()
    train(config, str(tmp_path / "both"))
    given = {name: folder / "release" / name for name in EXPERTS}
    for name in EXPERTS:
        file = "diffusion_pytorch_model.safetensors"
        own = load_file(tmp_path / "both/model" / name / file)
        assert_close(own, load_file(given[name] / file), 8)


def test_adapters_of_an_expert(release, plain, tmp_path):
    folder, _ = release
    config = config_of(folder)
    config.lora.update(rank=2, alpha=2.0)
    config.optim.lr = 0.3
    config.timesteps.span = (0.875, 1.0)
    config.mesh.update(data=2, fsdp=-1)
    train(config, str(tmp_path / "lora"))
    with pytest.raises(FileNotFoundError, match="adapters; give their model"):
        Generator.load(tmp_path / "lora")
    generator = load(folder)
    adapters = [(tmp_path / "lora/model", 1.0)]
    generator.model = with_adapters(generator.model, adapters, ["dit"])
    tuned = latents(generator)
    assert np.abs(tuned - plain).max() > 1e-2
    sheets = list((tmp_path / "lora/samples").glob("*.png"))
    assert sheets
    theirs = filled(diffusers.WanTransformer3DModel(**DIT))
    theirs.load_lora_adapter(
        tmp_path / "lora/model", prefix="transformer", use_safetensors=True
    )


@pytest.mark.parametrize(
    ("file", "variant"),
    [
        ("wan_lora.py", "wan2.2-ti2v-5b"),
        ("wan_full.py", "wan2.1-t2v-1.3b"),
        ("wan_experts_lora.py", "wan2.2-t2v-a14b"),
    ],
)
def test_configs_are_of_their_release(file, variant):
    config = runpy.run_path(str(CONFIGS / file))["get_config"]()
    row = VARIANTS[variant]
    assert {name: config.dit[name] for name in row if name in config.dit} == {
        name: value for name, value in row.items() if name in config.dit
    }
    json.dumps(config.to_dict())
