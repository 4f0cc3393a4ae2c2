"""Whole pipelines: the same noise gives diffusers' latents at every step, and video."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from closeness import ROUNDINGS, assert_close
from doors import command
from einops import rearrange
from PIL import Image
from tiny_models import (
    IMAGE_WIDTH,
    NEGATIVE,
    PROMPT,
    VAE_2_2,
    draw,
    picture,
    pipeline,
)

from jvdit.data.media.reader import decode_clip, read_metadata
from jvdit.diffusion.denoise import Guidance
from jvdit.diffusion.noise_path import NoisePath, TimestepPolicy
from jvdit.diffusion.reuse import Reuse
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request
from jvdit.models import video_vae
from jvdit.models.text_encoder import VARIANTS as text_encoder_sizes
from jvdit.sharding import make_mesh
from jvdit.weights import umt5, wan, wan_vae
from jvdit.weights.folders import load_dit, load_text_encoder, load_vae
from jvdit.weights.opening import open_bundle
from jvdit.weights.release import SchedulerConfig, scheduler_of
from jvdit.weights.rules import export
from jvdit.weights.tensors import write_tensors

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")


def compare(
    pipe,
    tmp_path,
    *,
    side=8,
    lead=0,
    words=16,
    low=None,
    scale=4.0,
    hints=None,
    reuse=None,
    **given,
):
    """Runs both from a saved folder and the same noise."""
    height, width, frames, steps = 4 * side, 6 * side, 9, 5
    pipe.save_pretrained(tmp_path)
    channels = pipe.vae.config.z_dim
    noise = draw("noise", 1, channels, 3 + lead, 4, 6)
    theirs = []

    def keep(pipe, i, t, state):
        theirs.append(state["latents"].numpy().copy())
        return state

    options = {} if low is None else {"guidance_scale_2": low}
    ours = {} if hints is None else {"conditioning_scale": hints}
    options |= {} if hints is None else {"conditioning_scale": _list(hints)}
    with torch.no_grad():
        want = pipe(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=scale,
            max_sequence_length=words,
            latents=torch.from_numpy(noise),
            callback_on_step_end=keep,
            output_type="np",
            **options,
            **{name: _for_them(value) for name, value in given.items()},
        ).frames[0]
    mesh = make_mesh(devices=jax.devices()[:1])
    model = open_bundle(tmp_path, mesh, dtype=jnp.float32)
    model = dataclasses.replace(model, text_length=words)
    generator = Generator(model, mesh, together=False)
    assert model.defaults["guidance_scale"] == 5.0
    names = {"last_image": "last_image", "reference_images": "references"}
    request = Request(
        PROMPT,
        NEGATIVE,
        frames,
        height,
        width,
        **{names.get(name, name): value for name, value in given.items()},
    )
    seen = []
    latents = generator.latents(
        [request],
        steps=steps,
        solver=model.defaults["solver"],
        guidance=Guidance(scale),
        low_guidance=None if low is None else Guidance(low),
        noise=[rearrange(noise[0], "c f h w -> f h w c")],
        on_step=lambda done, total, x: seen.append((done, total, x)),
        reuse=reuse,
        **ours,
    )
    assert sorted(x[:2] for x in seen) == [(i + 1, steps) for i in range(steps)]
    # A clean first frame is what diffusers puts back only at the end.
    first = int("first_frame" in model.conditions and "image" in given)
    for i, (_, _, x) in enumerate(sorted(seen, key=lambda x: x[0])):
        ours = rearrange(x[0], "(f h w) (p q c) -> c f (h p) (w q)", h=2, w=3, p=2, q=2)
        # Guidance multiplies what the network errs by.
        assert_close(ours[:, first:], theirs[i][0][:, first:], scale * ROUNDINGS)
    video = generator.codec.decode(latents[0][None])[0]
    assert video.shape == (frames, height, width, 3)
    difference = np.abs(video / 255 - want)
    assert difference.max() < 0.5 / 255 + 1e-3, difference.max()


def _list(scales):
    return [*scales] if isinstance(scales, tuple) else scales


def _for_them(value):
    if isinstance(value, tuple):
        return [_for_them(x) for x in value]
    if value.ndim == 4:
        return [Image.fromarray(x) for x in value]
    return Image.fromarray(value)


def test_t2v(tmp_path):
    compare(pipeline(diffusers.WanPipeline, 3.0), tmp_path)


def test_t2v_that_reuses_what_its_blocks_added(tmp_path):
    ratios = (1.0, 1.02, 0.99, 0.97, 0.98)
    pipe = pipeline(diffusers.WanPipeline, 3.0)
    cache = diffusers.MagCacheConfig(
        mag_ratios=list(ratios), num_inference_steps=5, threshold=0.1
    )
    pipe.transformer.enable_cache(cache)
    reuse = Reuse(ratios, threshold=0.1)
    assert reuse.skips(5) == (False, True, True, True, False)
    compare(pipe, tmp_path, reuse=reuse)


def test_t2v_with_two_experts(tmp_path):
    pipe = pipeline(diffusers.WanPipeline, 12.0, experts=0.875)
    compare(pipe, tmp_path, low=3.0)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def test_t2v_by_euler_with_one_expert_unguided(tmp_path):
    pipe = pipeline(diffusers.WanPipeline, 5.0, experts=0.875)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    compare(pipe, tmp_path, low=1.0)


def test_t2v_by_dpm_solver(tmp_path):
    pipe = pipeline(diffusers.WanPipeline, 3.0)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(flow_shift=3.0, **FLOW)
    compare(pipe, tmp_path)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 7.0, 8.0, 12.0])
@pytest.mark.parametrize(
    "kind", ["UniPCMultistep", "FlowMatchEulerDiscrete", "FlowMatchLCM"]
)
def test_timesteps_of_schedulers(kind, shift):
    """Of every number of steps: what the network is shown, and which expert is."""
    options = FLOW | {"flow_shift": shift} if kind == "UniPCMultistep" else {}
    made = getattr(diffusers, f"{kind}Scheduler")(**options or {"shift": shift})
    ours = scheduler_of(
        f"{kind}Scheduler", msgspec.convert(dict(made.config), SchedulerConfig)
    )
    assert ours.shift == shift and not ours.notes
    policy = TimestepPolicy(**ours.policy(shift))
    path, found, wanted = NoisePath(timesteps=ours.timesteps), [], []
    for steps in range(1, 1001):
        made.set_timesteps(steps)
        times = np.asarray(policy.times(steps, jnp.ones(()), ours.timesteps))[:-1]
        shown = path.shown(times)
        high = [(shown >= np.float32(x)).sum() for x in (0.875, 0.9)]
        found.append((times, shown * 1000, high))
        want = made.timesteps.numpy()
        high = [(want >= x).sum() for x in (875.0, 900.0)]
        wanted.append((made.sigmas.numpy()[:-1], want, high))
    times, shown, high = (np.concatenate(x) for x in zip(*found, strict=True))
    sigmas, want, theirs = (np.concatenate(x) for x in zip(*wanted, strict=True))
    # The ends of theirs and the shift are rounded, and each time is once more.
    np.testing.assert_allclose(times, sigmas, rtol=5e-7)
    np.testing.assert_allclose(shown, want, rtol=5e-7)
    if ours.timesteps:
        assert np.array_equal(np.round(shown), want)
    assert np.array_equal(high, theirs)


LARGE = {"in_channels": 48, "out_channels": 48}


def test_ti2v_without_a_picture(tmp_path):
    pipe = pipeline(
        diffusers.WanPipeline, 5.0, VAE_2_2, dit=LARGE, expand_timesteps=True
    )
    compare(pipe, tmp_path, side=16)


def test_ti2v_from_a_picture(tmp_path):
    kind = diffusers.WanImageToVideoPipeline
    pipe = pipeline(kind, 5.0, VAE_2_2, dit=LARGE, expand_timesteps=True)
    compare(pipe, tmp_path, side=16, image=picture("image", 64, 96))


def test_requests_with_and_without_a_picture_in_one_call(tmp_path):
    pipe = pipeline(
        diffusers.WanImageToVideoPipeline,
        5.0,
        VAE_2_2,
        dit=LARGE,
        expand_timesteps=True,
    )
    pipe.save_pretrained(tmp_path)
    mesh = make_mesh(devices=jax.devices()[:1])
    generator = Generator.load(tmp_path, mesh, dtype=jnp.float32)
    size = {"frames": 5, "height": 32, "width": 64}
    plain = Request("a cat", **size, seed=7)
    seen = Request("a cat", **size, image=picture("image", 32, 64))
    larger = Request("a dog", frames=9, height=32, width=64)
    settings = {"steps": 2, "guidance": Guidance(2.0)}
    alone = [generator.latents([x], **settings)[0] for x in (plain, seen, larger)]
    for order in ([0, 1, 2], [1, 2, 0]):
        requests = [(plain, seen, larger)[i] for i in order]
        together = generator.latents(requests, **settings)
        for i, found in zip(order, together, strict=True):
            assert_close(found, alone[i])
    assert np.abs(alone[0][0] - alone[1][0]).max() > 0.1


KNOWN = {"in_channels": 36, "out_channels": 16}


def test_i2v_with_two_experts(tmp_path):
    kind = diffusers.WanImageToVideoPipeline
    pipe = pipeline(kind, 5.0, dit=KNOWN, experts=0.9)
    compare(pipe, tmp_path, low=3.5, image=picture("image", 32, 48))


ATTENDED = KNOWN | {"image_dim": IMAGE_WIDTH, "added_kv_proj_dim": 48}


def test_i2v_that_attends_to_the_picture(tmp_path):
    pipe = pipeline(diffusers.WanImageToVideoPipeline, 3.0, dit=ATTENDED)
    compare(pipe, tmp_path, words=512, image=picture("image", 32, 48))


def test_from_a_first_frame_to_a_last_one(tmp_path):
    dit = ATTENDED | {"pos_embed_seq_len": 10}
    pipe = pipeline(diffusers.WanImageToVideoPipeline, 16.0, dit=dit)
    ends = {"image": picture("image", 32, 48), "last_image": picture("last", 32, 48)}
    compare(pipe, tmp_path, words=512, **ends)


CONTROL = {"vace_layers": [0, 1], "vace_in_channels": 96}


def test_vace_with_footage_a_mask_and_references(tmp_path):
    pipe = pipeline(diffusers.WanVACEPipeline, 16.0, dit=CONTROL)
    mask = np.zeros((9, 32, 48, 3), np.uint8)
    mask[3:, 8:, :20] = 255
    mask[:, :8] = np.arange(48, dtype=np.uint8)[:, None] * 5  # greys at an edge
    references = picture("one", 32, 48), picture("two", 32, 48)
    compare(
        pipe,
        tmp_path,
        lead=2,
        video=picture("video", 9, 32, 48),
        mask=mask,
        reference_images=references,
    )


def test_vace_from_text_alone(tmp_path):
    pipe = pipeline(diffusers.WanVACEPipeline, 16.0, dit=CONTROL)
    compare(pipe, tmp_path, hints=(0.5, 1.7))


def test_the_command_line_with_a_picture_and_adapters(tmp_path):
    kind = diffusers.WanImageToVideoPipeline
    pipe = pipeline(kind, 5.0, dit=KNOWN, experts=0.9)
    pipe.save_pretrained(tmp_path / "release")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"])
    pipe.transformer.add_adapter(config)
    layers = peft.utils.get_peft_model_state_dict(pipe.transformer)
    kind.save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers)
    Image.fromarray(picture("image", 40, 80)).save(tmp_path / "first.png")
    line = ["a cat"]
    line += [f"--pretrained={tmp_path}/release", "--dtype=float32", "--steps=5"]
    line += [f"--image={tmp_path}/first.png", "--size=32x48", "--frames=5"]
    line += [f"--lora={tmp_path}/lora:0.5", f"--lora_low={tmp_path}/lora"]
    line += [f"--out={tmp_path}/out"]
    done = command("sample", *line)
    assert done.returncode == 0, done.stderr
    clip = decode_clip(
        tmp_path / "out/a-cat_0.mp4", frames=5, fps=16, height=32, width=48
    )
    assert clip["video"].shape == (5, 32, 48, 3)
    settings = read_metadata(tmp_path / "out/a-cat_0.mp4")["jvdit"]
    assert settings["image"].endswith("first.png") and settings["guidance_scale"] == 5.0
    told = command("sample", *line, "--last=absent.png", "--frames=6")
    assert told.returncode and "try 5 or 9" in told.stderr.splitlines()[-1]


def test_the_layout_of_the_authors(tmp_path, monkeypatch):
    """The same networks under the names of the original release, with two experts."""
    pipe = pipeline(diffusers.WanImageToVideoPipeline, 5.0, dit=KNOWN, experts=0.9)
    folder, ours = tmp_path / "diffusers", tmp_path / "original"
    pipe.save_pretrained(folder)
    config = {"model_type": "i2v", "dim": 48, "ffn_dim": 80, "freq_dim": 256}
    config |= {"num_heads": 3, "num_layers": 2, "in_dim": 36, "out_dim": 16}
    config |= {"text_dim": 32, "eps": 1e-6, "_class_name": "WanModel"}
    for name, part in (
        ("high_noise_model", "transformer"),
        ("low_noise_model", "transformer_2"),
    ):
        loaded = load_dit(folder / part, dtype=jnp.float32)
        rules = wan.dit_rules("original", (16, 20))
        (ours / name).mkdir(parents=True)
        write_tensors(ours / name / "model.safetensors", export(rules, loaded.params))
        (ours / name / "config.json").write_text(json.dumps(config))
    vae = load_vae(folder)
    tensors = export(wan_vae.rules(vae.module, "original"), vae.params)
    write_tensors(ours / "Wan2.1_VAE.safetensors", tensors)
    text = load_text_encoder(folder, dtype=jnp.float32)
    tensors = export(umt5.rules("original"), text.params)
    write_tensors(ours / "models_t5_umt5-xxl-enc-bf16.safetensors", tensors)
    (ours / "google/umt5-xxl").mkdir(parents=True)
    shutil.copy(folder / "tokenizer/tokenizer.json", ours / "google/umt5-xxl")
    # Files without settings are of the released sizes.
    kinds = ("dtype", "param_dtype", "parent", "name")
    for table, name, module in (
        (video_vae.VARIANTS, "wan2.1", vae.module),
        (text_encoder_sizes, "umt5-xxl", text.module),
    ):
        fields = {x.name: getattr(module, x.name) for x in dataclasses.fields(module)}
        sizes = {key: value for key, value in fields.items() if key not in kinds}
        monkeypatch.setitem(table, name, sizes)
    mesh = make_mesh(devices=jax.devices()[:1])
    image = picture("image", 32, 48)
    request = Request("a cat", frames=5, height=32, width=48, image=image)
    found = []
    for place in (folder, ours):
        model = open_bundle(place, mesh, dtype=jnp.float32, shift=5.0)
        generator = Generator(dataclasses.replace(model, boundary=0.9), mesh)
        found += generator.latents([request], steps=4, guidance=Guidance(2.0))
    assert_close(found[1], found[0])
