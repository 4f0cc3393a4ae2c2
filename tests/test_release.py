"""Folders of released models: what is read from them, and what is refused in a line."""

import json
import weakref
from unittest import mock

import jax
import msgspec
import numpy as np
import pytest
from PIL import Image

import jvdit
from jvdit.data.conditions import Place, check_conditions, check_given, known
from jvdit.data.tokenizer import (
    Tokenizer,
    cleaned,
    sentencepiece_of,
    train_tokenizer,
)
from jvdit.generation.completion import size_like
from jvdit.generation.request import Request
from jvdit.generation.room import Residence, Room
from jvdit.models.dit import VARIANTS
from jvdit.sharding import make_mesh
from jvdit.weights.bundle import Bundle
from jvdit.weights.opening import _tell
from jvdit.weights.parameters import Network, weights_hash
from jvdit.weights.recipes import RECIPES, name_of
from jvdit.weights.release import SchedulerConfig, read_release, scheduler_of
from jvdit.weights.released_configs import OriginalDiT, dit_fields
from jvdit.weights.starting import fingerprint, model_hash


@pytest.mark.parametrize("name", RECIPES)
def test_a_release_is_known_by_its_sizes(name):
    fields = VARIANTS[name]
    assert name_of(fields, "guidance_scale_2" in RECIPES[name]) == name
    assert name_of(fields | {"depth": 7}, False) is None


def folder_of(tmp_path, index, **files):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for name in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "tokenizer/spiece.model").write_bytes(b"")
    return tmp_path


def test_what_a_folder_says_of_itself(tmp_path):
    index = {"_class_name": "WanPipeline", "boundary_ratio": 0.875}
    index |= {"transformer_2": ["diffusers", "WanTransformer3DModel"]}
    folder = folder_of(tmp_path, index | {"expand_timesteps": True})
    with pytest.raises(FileNotFoundError, match="transformer_2 is missing"):
        read_release(folder)
    (folder / "transformer_2").mkdir()
    index["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    (folder / "model_index.json").write_text(
        json.dumps(index | {"expand_timesteps": True})
    )
    scheduler = folder / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps({"flow_shift": 7.0}))
    release = read_release(folder)
    assert set(release.parts) == {"dit", "dit_low", "text_encoder", "vae"}
    assert release.clean_frames
    # The folder comes before what the authors of a known network advise.
    unknown = release.recipe(VARIANTS["tiny"])
    assert (unknown["shift"], unknown["boundary"]) == (7.0, 0.875)
    known = release.recipe(VARIANTS["wan2.2-i2v-a14b"])
    assert (known["shift"], known["boundary"], known["solver"]) == (7.0, 0.875, "unipc")
    assert known["guidance_scale"] == 3.5
    scheduler.unlink()
    (folder / "model_index.json").write_text(
        json.dumps(index | {"boundary_ratio": None})
    )
    known = read_release(folder).recipe(VARIANTS["wan2.2-i2v-a14b"])
    assert (known["shift"], known["boundary"]) == (5.0, 0.9)


def test_a_scheduler_is_followed_or_said():
    unipc = scheduler_of(
        "UniPCMultistepScheduler",
        SchedulerConfig(flow_shift=3.0, shift=8.0),
    )
    assert (unipc.solver, unipc.shift, unipc.notes) == ("unipc", 3.0, ())
    assert unipc.timesteps == 1000
    euler = scheduler_of("FlowMatchEulerDiscreteScheduler", SchedulerConfig(shift=8.0))
    assert (euler.solver, euler.shift, euler.notes) == ("euler", 8.0, ())
    assert euler.timesteps == 0
    few = scheduler_of("FlowMatchLCMScheduler", SchedulerConfig(shift=5.0))
    assert (few.solver, few.shift, few.notes) == ("renoise", 5.0, ())
    dpm = scheduler_of("DPMSolverMultistepScheduler", SchedulerConfig(solver_order=3))
    assert (dpm.solver, dpm.shift) == ("dpmpp_2m", None)
    assert dpm.notes == (
        "`solver_order` (=3) of DPMSolverMultistepScheduler isn't followed; 'dpmpp_2m' "
        "samples as with 2.",
    )
    for kind, solver in (
        ("FlowMatchHeunDiscreteScheduler", "heun"),
        ("DPMSolverSinglestepScheduler", "dpmpp_2m"),
        ("DEISMultistepScheduler", "unipc"),
    ):
        other = scheduler_of(kind, SchedulerConfig())
        assert other.solver == solver
        assert other.notes == (
            f"{kind} isn't among our solvers; the nearest, {solver!r}, is taken.",
        )
    with pytest.raises(ValueError, match="`prediction_type` .='epsilon'.* must be"):
        config = SchedulerConfig(prediction_type="epsilon")
        scheduler_of("UniPCMultistepScheduler", config)
    with pytest.raises(ValueError, match="`num_train_timesteps` .=500.* must be 1000"):
        config = SchedulerConfig(num_train_timesteps=500)
        scheduler_of("FlowMatchEulerDiscreteScheduler", config)


def test_what_is_not_followed_is_logged(tmp_path, caplog):
    index = {"_class_name": "WanPipeline"}
    folder = folder_of(
        tmp_path, index | {"scheduler": ["", "FlowMatchHeunDiscreteScheduler"]}
    )
    (folder / "scheduler/scheduler_config.json").write_text('{"shift": 3.0}')
    release = read_release(folder)
    recipe = release.recipe(VARIANTS["wan2.2-ti2v-5b"])
    for shift, count in ((None, 2), (4.0, 1)):
        caplog.clear()
        _tell(release, recipe, shift)
        assert len(caplog.messages) == count
        assert "nearest, 'heun', is taken" in caplog.messages[0]
        assert all("authors advise 5" in x for x in caplog.messages[1:])


def test_the_names_that_the_readme_uses_are_exported():
    from jvdit import Generator

    assert "Generator" in jvdit.__all__
    assert Generator.__module__ == "jvdit.generation.generator"


def test_the_layout_of_the_authors(tmp_path):
    for name in ("high_noise_model", "low_noise_model", "google/umt5-xxl"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "high_noise_model/config.json").write_text('{"model_type": "t2v"}')
    (tmp_path / "google/umt5-xxl/spiece.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"has no models_t5\*"):
        read_release(tmp_path)
    for name in ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "Wan2.1_VAE.safetensors").write_bytes(b"")
    parts = read_release(tmp_path).parts
    assert parts["dit_low"].name == "low_noise_model"
    assert parts["vae"].name == "Wan2.1_VAE.safetensors"
    # Refused with the command that turns it, when it is opened.
    assert parts["text_encoder"].suffix == ".pth"


def test_weights_that_wait_in_files_are_known_by_them(tmp_path):
    folder = folder_of(tmp_path, {"_class_name": "WanPipeline"})
    file = folder / "text_encoder/model.safetensors"
    file.write_bytes(b"some weights")
    dit = {"kernel": np.ones(3, np.float32)}

    def found(changed=dit):  # the function is another one in every process
        params = {"dit": changed, "text_encoder": lambda: {}}
        networks = {name: Network(None, source) for name, source in params.items()}
        model = mock.Mock(spec=Bundle, networks=networks, text_release=folder)
        model.pictures = None
        return model_hash(model)

    first = found()
    assert found() == first != found({"kernel": np.zeros(3, np.float32)})
    alone = fingerprint(file)  # as the original release has it
    file.write_bytes(b"other weights")
    assert found() != first and fingerprint(file) != alone
    with pytest.raises(TypeError, match="text_encoder.*is no array"):
        weights_hash({"text_encoder": lambda: {}})


def test_another_family_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        read_release(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        read_release(tmp_path)
    folder = folder_of(tmp_path, {"_class_name": "LTX2Pipeline"})
    with pytest.raises(ValueError, match="is a LTX2Pipeline; known are WanPipeline"):
        read_release(folder)


def test_a_tokenizer_json_is_a_sentencepiece_model(tmp_path):
    texts = ["a cat dancing on the moon", "two dogs play in the snow, é"] * 5
    made = Tokenizer(train_tokenizer(texts, 320))
    processor = made._processor
    pieces = [
        (processor.id_to_piece(i), processor.get_score(i))
        for i in range(made.vocab_size)
    ]
    model = {"type": "Unigram", "vocab": pieces, "byte_fallback": True}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"model": model}))
    again = Tokenizer(sentencepiece_of(file))
    for text in (*texts, "a zebra!", "  two   cats ", "日本"):
        assert again.encode(text) == made.encode(text), text
    file.write_text(json.dumps({"model": {"type": "BPE"}}))
    with pytest.raises(ValueError, match="holds a BPE model"):
        sentencepiece_of(file)


def test_text_is_cleaned():
    assert cleaned("  a &amp;amp; b\n\tc â€œd ") == 'a & b c "d'


# Pictures


def encode(video):
    """Latents that tell where they come from: one of 4 frames and 2 x 2 pixels."""
    frames = np.concatenate([video[:1].repeat(3, 0), video]).reshape(
        -1, 4, *video.shape[1:]
    )
    return frames.mean(1)[:, ::2, ::2]


def given(condition, encode=encode, spatial=2, **fields):
    request = Request("", frames=9, height=4, width=6, **fields)
    return known([condition], request, Place(3, encode, 4, spatial))


def test_a_first_and_a_last_frame_as_channels():
    first, last = np.full((4, 6, 3), 255, np.uint8), np.zeros((4, 6, 3), np.uint8)
    cond = given("end_channels", image=first, last_image=last).cond
    assert cond.shape == (3, 2, 3, 4 + 3)
    assert (cond[0, ..., :4] == 1).all() and (cond[1, ..., :4] == 0).all()
    assert (cond[2, 0, 0, :4] == [0, 0, 0, 1]).all()
    assert (cond[0, ..., 4:] == 1).all() and (cond[2, ..., 4:] == -0.25).all()
    alone = given("end_channels", image=first).cond
    assert (alone[2] == 0).all()


def test_a_clean_first_frame():
    found = given("first_frame", image=np.full((4, 6, 3), 255, np.uint8))
    assert found.clean[0].all() and not found.clean[1:].any()
    assert (found.latents[0] == 1).all() and (found.latents[1:] == 0).all()


def test_a_mask_parts_footage_into_what_stays_and_what_changes():
    video = np.full((9, 4, 6, 3), 255, np.uint8)
    mask = np.zeros_like(video)
    mask[5:, :2] = 255
    reference = np.zeros((4, 6, 3), np.uint8)
    found = given("control", video=video, mask=mask, references=(reference,))
    control = found.control
    assert found.lead == 1 and control.shape == (4, 2, 3, 3 + 3 + 4)
    assert (control[0, ..., :3] == -1).all() and (control[0, ..., 3:] == 0).all()
    keep, new, cells = np.split(control[1:], [3, 6], axis=-1)
    assert (keep[2, 0] == 0).all() and (new[2, 0] == 1).all()
    assert (keep[2, 1] == 1).all() and (new[2, 1] == 0).all()
    assert (cells[:2] == 0).all() and (cells[2, 0] == 1).all()


def test_greys_of_a_mask_are_shown_and_part_footage_at_half():
    video = np.full((9, 4, 6, 3), 255, np.uint8)
    mask = np.zeros_like(video)
    mask[:, 0, 0], mask[:, 0, 1] = 127, 128
    control = given("control", lambda x: x[::4], 1, video=video, mask=mask).control
    keep, new, cells = control[..., :3], control[..., 3:6], control[..., 6:]
    assert (keep[:, 0, 0] == 1).all() and (new[:, 0, 0] == 0).all()
    assert (keep[:, 0, 1] == 0).all() and (new[:, 0, 1] == 1).all()
    np.testing.assert_allclose(cells[:, 0, :3, 0] * 255, [[127, 128, 0]] * 3, rtol=1e-6)


def test_original_files_of_i2v_differ_in_their_weights_alone():
    config = {"model_type": "i2v", "dim": 24, "ffn_dim": 40, "freq_dim": 256}
    config |= {"num_heads": 2, "num_layers": 2, "in_dim": 36, "out_dim": 16}
    config = msgspec.convert(config | {"eps": 1e-6}, OriginalDiT)
    assert dit_fields(config)["image_width"] == 1280
    fields = dit_fields(config, attends=False)
    assert fields["image_width"] == 0 and fields["cond_channels"] == 80


def test_pictures_that_a_model_does_not_take():
    picture = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="`image` was given.*takes no pictures"):
        check_given([], Request("", image=picture).given)
    with pytest.raises(ValueError, match="needs `image`"):
        check_given(["first_channels"], Request("").given)
    with pytest.raises(ValueError, match="give both"):
        check_given(["control"], Request("", mask=picture[None]).given)
    with pytest.raises(ValueError, match="'depth' is no condition.*first_frame"):
        check_conditions(["depth"])
    with pytest.raises(ValueError, match="has 1 frames and the clip needs 17"):
        size = {"frames": 17, "height": 8, "width": 8}
        Request("", video=picture[None], **size).clip("video")
    with pytest.raises(ValueError, match=r"uint8 \[H W 3\]"):
        _ = Request("", image=picture.astype(np.float32)).pictures
    with pytest.raises(FileNotFoundError, match="`image` .*absent.png"):
        _ = Request("", image="absent.png").pictures


def test_a_picture_of_another_size_is_covered_and_cropped(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    size = {"frames": 1, "height": 8, "width": 8}
    request = Request("", image=str(tmp_path / "wide.png"), **size)
    assert request.fitted(request.pictures[0]).min() > 230  # the middle, all white
    assert request.settings["image"].endswith("wide.png")
    assert size_like(pixels.shape[:2], 64 * 64, 16) == (32, 96)
    with pytest.raises(ValueError, match="is no picture"):
        (tmp_path / "broken.png").write_bytes(b"no")
        _ = Request("", image=str(tmp_path / "broken.png")).pictures


# Residence


def test_a_network_leaves_before_the_next_comes():
    mesh, held = make_mesh(devices=jax.devices()[:1]), []

    class Weights(dict):
        pass  # which a weak reference can follow

    def bring():
        assert not held or held[-1]() is None, "two networks at a time"
        made = Weights(a=np.ones(2))
        held.append(weakref.ref(made))
        return made

    residence = Residence({"x": bring, "y": bring, "z": {}}, mesh, together=False)
    for name in "xzyx":
        assert residence[name] is not None
    assert len(held) == 3


def test_one_network_is_on_the_devices_at_a_time():
    mesh, brought = make_mesh(devices=jax.devices()[:1]), []

    def bring(name):
        brought.append(name)
        return {"a": {"kernel": np.ones((2, 2), np.float32)}}

    sources = {name: lambda name=name: bring(name) for name in "xy"}
    for together, want in ((True, "xy"), (False, "xyx")):
        brought.clear()
        residence = Residence(sources, mesh, together)
        for name in "xxyx":
            _ = residence[name]
        assert "".join(brought) == want
    for count, fits in ((1000, True), (1 << 60, False)):
        shapes = {"a": jax.ShapeDtypeStruct((count,), float)}
        assert Room({"vae": Network(None, bring, shapes)}, mesh).together == fits
