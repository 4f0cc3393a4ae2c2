"""A finished model as people use it: from the command line and as a function."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jvdit.data.media.reader import decode_clip, read_metadata
from jvdit.diffusion.denoise import Guidance
from jvdit.generation.completion import complete
from jvdit.generation.generator import Generator
from jvdit.generation.prompt_lines import read_prompts, read_request
from jvdit.generation.request import Request
from jvdit.generation.settings import Settings
from jvdit.sharding import make_mesh
from jvdit.weights.starting import finished_parameters

DEFAULTS = {"frames": 5, "height": 16, "width": 16, "fps": 8.0}


def command(*args):
    line = [sys.executable, "-m", "jvdit.sample", *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300)


def test_from_the_command_line(workdir, generator, tmp_path):
    """Prompts in any script, a file of them, and twice; the function gives the same."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text(
        '一只猫\n\n{"prompt": "one object", "frames": 1, "seed": 5}\n', encoding="utf-8"
    )
    args = ["One object!", f"--workdir={workdir}/dit", f"--prompts={prompts}"]
    args += [f"--out={out}", "--steps=2", "--solver=ddim", "--seed=5"]
    done = command(*args)
    assert done.returncode == 0, done.stderr
    films = ["one-object_5.mp4", "一只猫_6.mp4", "one-object_5-2.mp4"]
    told = [str(out / name) for name in [*films, "sheet.png"]]
    assert sorted(done.stdout.split()) == sorted(told)
    found = {read_metadata(out / x)["jvdit"]["frames"]: x for x in films[::2]}
    assert sorted(found) == [1, 5]
    settings = read_metadata(out / "一只猫_6.mp4")["jvdit"]
    assert settings["seed"] == 6 and settings["solver"] == "ddim"
    assert settings["prompt"] == "一只猫" and settings["steps"] == 2

    before = {path: path.read_bytes() for path in out.iterdir()}
    assert command(*args, "--guidance_scale=2").returncode == 0
    assert all(path.read_bytes() == kept for path, kept in before.items())
    assert len([*out.iterdir()]) == 2 * len(before)

    again = {"steps": 2, "solver": "ddim"}
    clip = generator("One object!", seed=5, **again)
    (same,) = generator([Request("One object!", seed=5)], **again)
    np.testing.assert_array_equal(same.video, clip.video)
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG\r\n")
    wrong = ['{"seed": 1}', "\\x", '{"prompt": "x", "seed": "1"}']
    wrong += [json.dumps({"prompt": "x", "mask": str(tmp_path / "damaged.png")})]
    wrong += ['{"prompt": "good", "references": null}', '{"prompt": "cut \\ud83d"}']
    prompts.write_text("\n".join(wrong))
    done = command(*args[1:], f"--prompts={prompts}", f"--out={tmp_path / 'some'}")
    assert done.returncode == 1 and "4 of 6 prompts were left out" in done.stderr
    assert all(f"left out: {prompts} line {k}" in done.stderr for k in (1, 3, 4, 6))
    assert {x.name for x in (tmp_path / "some").glob("*.mp4")} == {
        "x_6.mp4",
        "good_9.mp4",
    }

    clip.save(tmp_path / "ours.mp4", scale=clip.viewing_scale)
    ours, written, other = (
        decode_clip(str(file), frames=5, height=16, width=16, fps=8.0)["video"]
        for file in (tmp_path / "ours.mp4", out / found[5], out / films[1])
    )
    assert np.abs(written.astype(int) - ours).mean() < 1
    assert np.abs(written.astype(int) - other).mean() > 10


def test_mistakes_are_told_before_anything_is_computed(workdir, tmp_path):
    (tmp_path / "file").touch()
    model = f"--workdir={workdir}/dit"
    for args, message in (
        (["x", model, f"--out={tmp_path}/file/out"], "file"),
        (["x", f"--workdir={tmp_path}"], "holds no text-to-video model"),
    ):
        done = command(*args)
        assert done.returncode == 1 and message in done.stderr
        assert done.stderr.startswith("error:") and "Traceback" not in done.stderr


def test_clips_come_batch_by_batch_in_the_order_of_the_requests(generator):
    sizes = [(5, 16, 16), (1, 16, 32), (5, 16, 16)]
    requests = [Request("x", "", *size, seed=i) for i, size in enumerate(sizes)]
    settings = Settings(steps=2, solver="euler", guidance_scale=1.0)
    seen = []
    coming = generator.clips(
        requests, settings, rows=1, watch=lambda *x: seen.append(x)
    )
    number, clip = next(coming)
    assert clip.video.shape == (*sizes[number], 3) and clip.video.dtype == np.uint8
    assert clip.fps == 8 and clip.audio is None
    frames = sizes[number][0]
    assert seen[:2] == [("denoising", 1, 2), ("denoising", 2, 2)]
    assert seen[-1] == ("decoding", frames, frames)
    assert [x for x in seen if x[0] == "denoising"] == seen[:2], (
        "the others are to come"
    )
    for wrong in ({"seed": 3}, {"stepz": 3}):
        with pytest.raises(TypeError, match=f"{[*wrong][0]}.*requests themselves"):
            generator(requests, **wrong)
    with pytest.raises(TypeError, match="stepz"):
        generator("x", stepz=3)
    rest = dict(coming)
    assert sorted([number, *rest]) == [0, 1, 2]
    clips = generator(requests, steps=2, solver="euler", guidance_scale=1.0)
    assert [clip.video.shape for clip in clips] == [(*size, 3) for size in sizes]


def test_a_model_completes_what_requests_and_settings_leave_open():
    whole = complete(Request("x", frames=9), DEFAULTS, 16)
    assert whole.size == (9, 16, 16) and whole.fps == 8 and whole.negative_prompt == ""
    wide = np.zeros((32, 64, 3), np.uint8)
    assert complete(Request("x", image=wide), DEFAULTS, 8).size == (5, 8, 16)
    assert complete(Request("x", image=wide, height=16), DEFAULTS, 8).size[1:] == (
        16,
        16,
    )

    model = {"guidance_scale": 3.0, "guidance_scale_2": 5.0, "steps": 7, "draft": True}
    found = Settings().complete(model)
    assert found.solving["low_guidance"] == Guidance(5.0) and found.steps == 7
    assert Settings(guidance_scale=2.0).complete(model).guidance_scale_2 == 2.0
    assert Settings(guidance_scale=1.0, guidance_scale_2=4.0).complete(model).solving[
        "low_guidance"
    ] == Guidance(4.0)
    assert Settings(draft=False).complete(model).draft is False
    with pytest.raises(ValueError, match="`steps`.*0"):
        Settings(steps=0)


def test_presets_and_levels_come_before_what_the_model_has():
    model = {"steps": 40, "guidance_scale": 5.0, "solver": "unipc", "boundary": 0.9}
    found = Settings(preset="lightx2v-2+2").complete(model)
    assert found.solver == "renoise" and found.guidance_scale == 1 and found.steps == 4
    assert found.levels == pytest.approx((1, 0.9375, 5 / 6, 0.625))
    found = Settings(preset="lightx2v-4", solver="euler", guidance_scale=2.0)
    found = found.complete(model)
    assert (found.solver, found.guidance_scale_2, found.steps) == ("euler", 2.0, 4)
    assert Settings(levels=(1.0, 0.5)).complete(model).steps == 2
    with pytest.raises(ValueError, match="two experts; take 'lightx2v-4'"):
        Settings(preset="lightning-2+2").complete({"boundary": 0.0})
    with pytest.raises(ValueError, match="`preset` .*lightx2v-4"):
        Settings(preset="lightx2v")
    for wrong in ((0.5, 0.6), (1000.0, 500.0), (1.0, 0.0), (float("nan"),)):
        with pytest.raises(ValueError, match="`levels` .*divided by 1000"):
            Settings(levels=wrong)


def test_levels_take_the_place_of_the_spacing(generator):
    request = Request("x", "", 1, 16, 16)
    spaced = generator.model.policy.times(3, jnp.full((1,), 4.0))[:-1, 0]
    plain, same, other = (
        generator.latents([request], steps=3, levels=levels, solver="euler")[0]
        for levels in (None, tuple(spaced.tolist()), (1.0, 0.9, 0.1))
    )
    np.testing.assert_allclose(same, plain, atol=1e-6)
    assert np.abs(other - plain).max() > 2e-5
    with pytest.raises(ValueError, match="`steps` .* must be 2, one for each"):
        generator(request, steps=5, levels=(1.0, 0.5))


def test_text_states_in_the_place_of_prompts(generator):
    sizes = {"frames": 1, "height": 16, "width": 16}
    asked = Request("one object", "nothing", **sizes)
    (positive,), (negative,) = generator.inputs.texts([asked])
    given = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    settings = {"steps": 2, "guidance": Guidance(3.0)}
    found = generator.latents(
        [asked, Request("", **sizes, **given), Request("", "nothing", **sizes)],
        **settings,
    )
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 0
    shown = Request("", **sizes, **given).settings
    assert shown["prompt_embeds"] == f"states {len(positive)}x{positive.shape[1]}"
    for wrong in (positive[None], positive[:, :-1], np.zeros((999, len(positive[0])))):
        with pytest.raises(ValueError, match="`prompt_embeds` is .*batch axis"):
            generator.check(Request("", **sizes, prompt_embeds=wrong))
    with pytest.raises(ValueError, match="finite"):
        generator.check(Request("", **sizes, prompt_embeds=np.nan * positive))


def test_a_field_of_the_wrong_kind_is_named():
    with pytest.raises(
        ValueError, match="line 2: `frames` .='17'. must be `int . null`"
    ):
        read_request('{"prompt": "y", "frames": "17"}', "line 2", {"seed": 0})
    line = '{"prompt": "y", "references": "a.png"}'
    request = read_request(line, "line 1", {"seed": 4})
    assert request.references == ("a.png",) and request.seed == 4


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompt_files_are_read_by_their_mark(tmp_path, encoding):
    file = tmp_path / "prompts.jsonl"
    lines = ['{"prompt":"a cat","seed":7}', "", "  ", "ein ‘Café’\u2028 am\x85 Meer"]
    file.write_bytes("\r\n".join(lines).encode(encoding))
    (first, line), (second, plain) = read_prompts(str(file))
    assert read_request(line, first, {"seed": 0}) == Request("a cat", seed=7)
    assert plain == lines[3] and second == f"{file} line 4"
    file.write_bytes(b"a dog\ncaf\xe9\n")
    (_, good), (where, bad) = read_prompts(str(file))
    assert good == "a dog"
    with pytest.raises(ValueError, match="prompts.jsonl line 2: the prompt has U.DCE9"):
        read_request(bad, where, {})


@pytest.mark.parametrize("kind", ["uint16", "int32", "float32"])
def test_pictures_of_more_bits_keep_their_brightness(tmp_path, kind):
    """A grey ramp; Pillow by itself cuts off what is above 255."""
    grey = np.linspace(0, 1, 64).reshape(8, 8)
    values = grey if kind == "float32" else np.rint(grey * 65535)
    file = tmp_path / ("x.png" if kind == "uint16" else "x.tiff")
    Image.fromarray(values.astype(kind)).save(file)
    (found,) = Request("x", image=file).pictures
    assert found.shape == (8, 8, 3) and found.dtype == np.uint8
    np.testing.assert_allclose(found[..., 0], grey * 255, atol=1)
    wild = dataclasses.replace(Request("x"), image=tmp_path / "wild.tiff")
    Image.fromarray((grey * 1e4).astype("float32")).save(tmp_path / "wild.tiff")
    with pytest.raises(ValueError, match="10000.*floats in"):
        wild.pictures  # noqa: B018


def test_a_folder_may_hold_weights_in_fewer_bits(generator, tmp_path):
    """They are computed with in the types of the networks."""
    networks = generator.model.networks
    half = jax.tree.map(
        lambda x: np.asarray(x).astype(jnp.bfloat16),
        {name: network.params for name, network in networks.items()},
    )
    Generator(generator.model.with_params(half)).save(tmp_path)
    loaded = Generator.load(tmp_path).model
    for name, network in loaded.networks.items():
        for x, y in zip(
            jax.tree.leaves(network.params), jax.tree.leaves(half[name]), strict=True
        ):
            assert x.dtype == np.float32
            np.testing.assert_array_equal(x, y.astype(np.float32))
    wanted = {"dit": networks["dit"].params}
    begun = finished_parameters(tmp_path, wanted, make_mesh())
    assert {x.dtype for x in jax.tree.leaves(begun)} == {np.dtype("float32")}
