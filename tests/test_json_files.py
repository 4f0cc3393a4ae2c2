"""JSON that is read into types: what is damaged is told in a line that names it."""

import json

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from jvdit.diffusion.reuse import Reuse, save_ratios
from jvdit.generation.prompt_lines import _Line, read_request
from jvdit.generation.request import LATENTS, STATES, Request
from jvdit.machine.json_files import parse_json, read_json
from jvdit.machine.lock import FolderLock, _parsed
from jvdit.models.audio_vae import AudioVAE
from jvdit.models.dit import DiT
from jvdit.models.image_encoder import ImageEncoder
from jvdit.models.text_encoder import TextEncoder
from jvdit.models.video_vae import VideoVAE
from jvdit.tasks.loop import _Looked
from jvdit.training import digests
from jvdit.training.checkpoint import _names_in, claim_workdir
from jvdit.training.metrics import read_history
from jvdit.weights.adapter_scales import Alphas
from jvdit.weights.bundle import _ModelSettings
from jvdit.weights.folders import _dit_config
from jvdit.weights.parameters import load_network, save_weights
from jvdit.weights.release import read_release
from jvdit.weights.released_configs import (
    AudioVAEConfig,
    ImageConfig,
    TextConfig,
    VAEConfig,
    dit_fields,
)
from jvdit.weights.tensors import TensorFiles

TIMES = 300  # damages of each file

DIFFUSERS = {
    **{"_class_name": "WanVACETransformer3DModel", "patch_size": [1, 2, 2]},
    **{"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2},
    **{"ffn_dim": 40, "in_channels": 36, "out_channels": 16, "text_dim": 32},
    **{"freq_dim": 256, "cross_attn_norm": True, "eps": 1e-6, "image_dim": None},
    **{"qk_norm": "rms_norm_across_heads", "vace_layers": [0, 1]},
    **{"pos_embed_seq_len": None, "vace_in_channels": 96, "added": {"x": [1]}},
}
ORIGINAL = {
    **{"model_type": "flf2v", "dim": 24, "ffn_dim": 40, "freq_dim": 256, "eps": 1e-6},
    **{"num_heads": 2, "num_layers": 2, "in_dim": 36, "out_dim": 16, "text_len": 512},
}
VAE = {
    **{"_class_name": "AutoencoderKLWan", "base_dim": 8, "z_dim": 2},
    **{"decoder_base_dim": None, "dim_mult": [1, 2, 4], "num_res_blocks": 1},
    **{"temperal_downsample": [False, True], "attn_scales": [], "patch_size": 2},
    **{"is_residual": True, "latents_mean": [0.5, 0], "latents_std": [1.5, 2]},
}
AUDIO_VAE = {
    **{"_class_name": "AutoencoderKLKVAEAudio", "encoder_dim": 4, "latent_dim": 8},
    **{"encoder_rates": [2, 3], "decoder_rates": [3, 2], "decoder_dim": 16},
    **{"codebook_dim": 4, "sample_rate": 48000, "num_channels": 1},
    **{"attn_num_heads": 2},
}
TEXT = {
    **{"model_type": "umt5", "feed_forward_proj": "gated-gelu", "vocab_size": 100},
    **{"d_model": 8, "num_layers": 2, "num_heads": 2, "d_kv": 4, "d_ff": 16},
    **{"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
    **{"layer_norm_epsilon": 1e-6},
}
VISION = {
    **{"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"intermediate_size": 96, "patch_size": 8, "image_size": 32},
    **{"hidden_act": "gelu", "layer_norm_eps": 1e-5, "num_channels": 3},
}
INDEX = {
    **{"_class_name": "WanPipeline", "boundary_ratio": 0.875, "vae": ["x", "y"]},
    **{"expand_timesteps": False, "transformer_2": ["diffusers", "Wan"]},
    **{"scheduler": ["diffusers", None], "image_encoder": [None, None]},
}
SCHEDULER = {
    **{"_class_name": "UniPCMultistepScheduler", "flow_shift": 3, "solver_order": 2},
    **{"prediction_type": "flow_prediction", "use_flow_sigmas": True, "shift": None},
    **{"disable_corrector": [], "solver_type": "bh2", "num_train_timesteps": 1000},
}
ADAPTERS = {"lora_alpha": 8, "alpha_pattern": {"attn": 4.5}, "use_rslora": True}
RUN = {
    "identity": {"objective": "flow", "dit": {"width": 8, "depth": 2}},
    "config": {"optim": {"name": "adamw", "lr": 1e-3, "most": float("inf")}},
}
LINE = {
    **{"prompt": "a cat", "negative_prompt": "", "frames": 17, "height": 64, "fps": 8},
    **{"width": 64, "seed": 3, "image": "a.png", "mask": None, "references": ["b.png"]},
}
MODEL = {
    **{"path": {"schedule": "flow", "target": "velocity", "timesteps": 0}},
    **{"policy": {"shift": 3, "shift_range": [1, 12.0], "shift_tokens": None}},
    **{"patch_size": [1, 2, 2], "text_length": 48, "defaults": {"frames": 9}},
}
OLDER = MODEL | {"conventions": {"clean_frames": True, "pad_text": False}}
MODEL |= {"conditions": ["first_frame"], "seconds": False, "backbone": "dit"}
NETWORK = {
    **{"width": 32, "depth": 2, "num_heads": 2, "ffn_width": 64, "in_channels": 4},
    **{"out_channels": 4, "text_width": 8, "rope_dims": None, "dtype": "float32"},
    **{"position_scale": [4.0, 1, 1], "control_layers": [], "remat": "none"},
}


def release(folder):
    for name in ("transformer", "transformer_2", "vae", "text_encoder"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer/spiece.model").touch()
    return lambda: read_release(folder).recipe({})


def scheduler(folder):
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    return release(folder)


def originals(folder):
    for name in ("google/umt5-xxl", "high_noise_model", "low_noise_model"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in ("models_t5.pth", "Wan2.1_VAE.pth", "google/umt5-xxl/spiece.model"):
        (folder / name).touch()
    return lambda: read_release(folder)


def dit(folder):
    return lambda: DiT(**dit_fields(_dit_config(folder / "config.json")))


def network(kind, module):
    def reader(folder):
        file = folder / "config.json"
        return lambda: module(**read_json(file, "copy it anew", kind).fields)

    return reader


def index(folder):
    save_file({"a": np.zeros(3)}, folder / "x-1.safetensors")
    return lambda: TensorFiles(folder)


def peft(folder):
    save_file({"a": np.zeros(3)}, folder / "x.safetensors")
    return lambda: Alphas(folder, TensorFiles(folder)).of("x.attn", 4)


def run(folder):
    config, checkpoint = json.loads(json.dumps(RUN)), folder / "checkpoints/3"
    checkpoint.mkdir(parents=True, exist_ok=True)
    return lambda: claim_workdir(folder, config, {"dit": DiT})


def listing(folder):
    (folder / "a").touch()

    def read():
        assert isinstance(digests.find_damage(folder), str)
        digests.is_listed(folder)

    return read


def prompts(folder):
    def read():
        line = (folder / "lines").read_bytes().decode(errors="surrogateescape")
        if line.lstrip().startswith("{"):
            read_request(line, "line 1", {"seed": 1})

    return read


def history(folder):
    return lambda: read_history(folder)


def model(folder):
    file = folder / "generator.json"
    return lambda: read_json(file, "copy it anew", _ModelSettings).fields


def own_network(folder):
    fields = json.loads((folder / "config.json").read_text())
    save_weights(folder, {"a": np.zeros(3, np.float32)}, fields)
    return lambda: load_network(folder, DiT)


# By name: the file, what it holds, and what makes its reader.
FILES = {
    "index of a pipeline": ("model_index.json", INDEX, release),
    "scheduler": ("scheduler/scheduler_config.json", SCHEDULER, scheduler),
    "release of the authors": ("high_noise_model/config.json", ORIGINAL, originals),
    "DiT of diffusers": ("config.json", DIFFUSERS, dit),
    "DiT of the authors": ("config.json", ORIGINAL, dit),
    "VAE": ("config.json", VAE, network(VAEConfig, VideoVAE)),
    "audio VAE": ("config.json", AUDIO_VAE, network(AudioVAEConfig, AudioVAE)),
    "text encoder": ("config.json", TEXT, network(TextConfig, TextEncoder)),
    "CLIP": (
        "config.json",
        {"model_type": "clip", "vision_config": VISION},
        network(ImageConfig, ImageEncoder),
    ),
    "vision model of CLIP": (
        "config.json",
        {"model_type": "clip_vision_model", **VISION},
        network(ImageConfig, ImageEncoder),
    ),
    "index of tensors": (
        "x.safetensors.index.json",
        {"metadata": {"total_size": 24}, "weight_map": {"a": "x-1.safetensors"}},
        index,
    ),
    "adapters of PEFT": ("adapter_config.json", ADAPTERS, peft),
    "workdir": ("config.json", RUN, run),
    "last look": (
        "looked.json",
        {"step": 3},
        lambda folder: lambda: read_json(folder / "looked.json", "delete", _Looked),
    ),
    "digests": ("digests.0.json", {"processes": 1, "files": {"a": [0, "b"]}}, listing),
    "arrays of orbax": (
        "state/_METADATA",
        {"tree_metadata": {"('a',)": {"x": 1}}},
        lambda folder: lambda: _names_in(folder),
    ),
    "curve": (
        "curve.json",
        {"ratios": [1, 0.9, 1.1]},
        lambda folder: lambda: Reuse.load(folder / "curve.json"),
    ),
    "scalars": ("history.jsonl", {"step": 3, "loss": 0.5}, history),
    "holder of a lock": (
        ".lock",
        {"host": "h", "pid": 3, "since": "now", "place": "p", "token": "t"},
        lambda folder: lambda: str(_parsed((folder / ".lock").read_bytes())),
    ),
    "prompts": ("lines", LINE, prompts),
    "model of ours": ("generator.json", MODEL, model),
    "older model of ours": ("generator.json", OLDER, model),
    "network of ours": ("config.json", NETWORK, own_network),
}
VALUES = [None, True, False, -1, 0, 1.5, "x", "", "\ud800", [], {}, [[1]], {"a": 1}]
VALUES += [10**30, -(10**400), float("nan"), float("inf"), ["x"], [None, None], 10**9]


def places(value):
    """Every (container, key) in a value, and its own."""
    keys = value if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def damaged(rng, value):
    """A text of JSON, damaged in one of many ways."""
    text = json.dumps(value).encode()
    at = int(rng.integers(len(text)))
    box = json.loads(json.dumps([value]))
    container, key = [*places(box)][rng.integers(len([*places(box)]))]
    way = rng.choice(["cut", "flip", "bytes", "delete", "swap", "swap", "swap", "deep"])
    if way == "cut":
        return text[:at]
    if way == "flip":
        return text[:at] + bytes([text[at] ^ 1 << rng.integers(8)]) + text[at + 1 :]
    if way == "bytes":
        return text[:at] + b"\xff\x80" + text[at:]
    if way == "delete" and container is not box:
        del container[key]
        return json.dumps(box[0]).encode()
    container[key] = VALUES[rng.integers(len(VALUES))] if way == "swap" else "@"
    depth = int(rng.choice([50, 900, 100_000]))
    nested = "[" * depth + "]" * (depth * bool(rng.integers(2)))
    return json.dumps(box[0]).replace('"@"', nested).encode()


def refused(read, *names):
    """Whether a file was refused, by a line that has one of some names."""
    try:
        read()
    except (ValueError, FileNotFoundError) as error:
        assert any(name in str(error) for name in names), error
        return True
    return False


@pytest.mark.parametrize("what", FILES)
def test_of_a_damaged_file_its_name_is_told_or_it_works(tmp_path, what):
    name, value, reader = FILES[what]
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))
    read = reader(tmp_path)
    read()
    rng, count = np.random.default_rng(len(what)), 0
    for _ in range(TIMES):
        file.write_bytes(text := damaged(rng, value))
        try:
            count += refused(read, file.name, str(tmp_path), "line 1")
        except Exception as error:
            raise AssertionError(f"{text[:300]!r}: {error!r}") from error
    silent = {"digests", "arrays of orbax", "scalars", "holder of a lock"}
    assert what in silent or count > TIMES / 5


def header(folder, text):
    """A file of one tensor whose header is another."""
    content = len(text).to_bytes(8, "little") + text + bytes(12)
    (folder / "x.safetensors").write_bytes(content)


def test_a_damaged_header_of_tensors(tmp_path):
    entry = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    value = {"__metadata__": {"format": "pt"}, "a": entry}
    header(tmp_path, json.dumps(value).encode())
    assert TensorFiles(tmp_path)["a"].tolist() == [0, 0, 0]
    rng, count = np.random.default_rng(0), 0
    for _ in range(TIMES):
        header(tmp_path, damaged(rng, value))
        count += refused(lambda: TensorFiles(tmp_path), "x.safetensors")
    assert count > TIMES / 2


def test_damaged_metadata_of_adapters(tmp_path):
    """As diffusers writes them: JSON in the header's texts."""
    rng, count = np.random.default_rng(0), 0
    value = {f"transformer.{k}": v for k, v in ADAPTERS.items()}
    for _ in range(TIMES):
        text = damaged(rng, value).decode(errors="ignore")
        held = {"lora_adapter_metadata": text}
        save_file({"a": np.zeros(1)}, tmp_path / "x.safetensors", metadata=held)
        count += refused(peft_of(tmp_path), "lora_adapter_metadata")
    assert count > TIMES / 5


def peft_of(folder):
    return lambda: Alphas(folder, TensorFiles(folder)).of("x.attn", 4)


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "x.json").mkdir()
    with pytest.raises(ValueError, match="x.json is no file.*; copy it anew"):
        read_json(tmp_path / "x.json", "copy it anew")
    with pytest.raises(FileNotFoundError, match="y.json"):
        read_json(tmp_path / "y.json", "copy it anew")


class Inner(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    count: int
    times: tuple[float, ...] = ()


class Outer(msgspec.Struct, frozen=True):
    inner: list[Inner]


@pytest.mark.parametrize(
    "kind, text, told",
    [
        (Inner, '{"count": 1, "tims": []}', "`tims` is unknown, the nearest.*`times`"),
        (Inner, '{"times": []}', "lacks the required field `count`"),
        (Inner, "[]", r"it .=\[\]. must be `object`"),
        (Outer, '{"inner": [{"count": "x"}]}', r"`inner\[0\].count` .='x'. must be"),
        (
            Outer,
            '{"inner": [{"count": 1, "a": 2}]}',
            "`inner.0.`.*has unknown field `a`",
        ),
        (dict[str, int], '{"a": "x"}', "must be `int`, got `str`"),
    ],
)
def test_the_field_its_value_and_its_rule_are_named(kind, text, told):
    with pytest.raises(ValueError, match=f"x.jsonl, line 7.*{told}.*; mend it"):
        parse_json(text, "x.jsonl, line 7", kind, "mend it")


def test_what_python_writes_is_read_again(tmp_path):
    """Infinity, and names of files that are no UTF-8, which JSON doesn't know."""
    value = {"lr": float("inf"), "file": b"a\xff".decode(errors="surrogateescape")}
    assert parse_json(json.dumps(value), "x") == value
    save_ratios(tmp_path / "curve.json", [1.0, 0.5])
    assert Reuse.load(tmp_path / "curve.json", 0.3) == Reuse((1.0, 0.5), 0.3)
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert _parsed((tmp_path / ".lock").read_bytes()) is not None
    lock.release()


def test_a_line_has_the_fields_of_a_request():
    line = [field.name for field in msgspec.structs.fields(_Line)]
    assert {*line, *STATES, *LATENTS} == {*Request.__dataclass_fields__}
    request = read_request(json.dumps(LINE), "", {"seed": 9, "mask": "m.png"})
    assert request == Request(**LINE | {"references": ("b.png",), "fps": 8.0})
    with pytest.raises(ValueError, match="line 1: `promt` is unknown.*`prompt`"):
        read_request('{"promt": "x"}', "line 1", {})
    request = read_request('{"prompt": "x", "references": null}', "", {})
    assert request == Request("x")
    for line in ('{"prompt": "\\ud83d"}', "half \ud83d", '{"prompt": "\\u0000"}'):
        with pytest.raises(ValueError, match="line 1: .*prompt.* has U.[D0]"):
            read_request(line, "line 1", {})
