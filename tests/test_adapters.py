"""Adapter files of all kinds do what weights merged by hand do, under every naming."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from safetensors.numpy import save_file
from stacks import stack_layers

from jvdit.data.tokenizer import Tokenizer
from jvdit.diffusion.noise_path import NoisePath, TimestepPolicy
from jvdit.models.dit import DiT
from jvdit.models.lora import merged, parted
from jvdit.shapes import Text, Tokens
from jvdit.weights import wan
from jvdit.weights.adapter_report import report_adapters
from jvdit.weights.adapters import ANY, read_lora, strengths, write_lora
from jvdit.weights.bundle import Bundle
from jvdit.weights.opening import with_adapters
from jvdit.weights.parameters import Network
from jvdit.weights.released_configs import patch_channels
from jvdit.weights.rules import export, loader

SIZES = {"width": 24, "depth": 2, "num_heads": 2, "ffn_width": 20, "in_channels": 64}
SIZES |= {"out_channels": 64, "text_width": 10, "freq_dim": 16}
LINEAR = ("self_attn.q", "self_attn.o", "cross_attn.k", "ffn.0", "ffn.2")
ENDS = ("head.head", "text_embedding.0", "time_embedding.2", "time_projection.1")
RANK, ALPHA = 3, 6.0
BEFORE = "diffusion_model."


def draw(name, *shape):
    rng = np.random.default_rng([*name.encode()])
    return rng.normal(size=shape).astype(np.float32) * 0.3


def tables(dit):
    return [wan.dit_rules(layout, patch_channels(dit)) for layout in wan.LAYOUTS]


class Case:
    """A network, its weights under their authors' names, and a file of adapters."""

    def __init__(self, scan=False, **fields):
        self.dit = DiT(**SIZES, **fields)
        shapes = jax.eval_shape(
            self.dit.init, jax.random.key(0), *self.dit.example_inputs()
        )["params"]
        self.params = jax.tree_util.tree_map_with_path(
            lambda path, x: draw(jax.tree_util.keystr(path), *x.shape), shapes
        )
        self.weights = export(tables(self.dit)[1], self.params)
        self.shapes, self.changed, self.file = shapes, dict(self.weights), {}
        if scan:
            self.dit = self.dit.clone(scan_layers=True)
            self.params = stack_layers(self.params)

    def low(self, layer, alpha=None, **more):
        """Factors of a layer; returns what they add to its weight."""
        weight = self.weights[f"{layer}.weight"]
        out, *inputs = weight.shape
        ones = (1,) * (len(inputs) - 1)
        down, up = draw("a" + layer, RANK, *inputs), draw("b" + layer, out, RANK, *ones)
        name = f"{BEFORE}{layer}"
        self.file[f"{name}.lora_down.weight"] = down
        self.file[f"{name}.lora_up.weight"] = up
        if alpha is not None:
            self.file[f"{name}.alpha"] = np.full(alpha[1:], alpha[0], np.float32)
        strength = 1 if alpha is None else alpha[0] / RANK
        change = np.tensordot(up.reshape(out, RANK), down, 1) * strength
        self.changed[f"{layer}.weight"] = weight + change
        return change

    def diff(self, name, suffix):
        """A difference of a whole tensor; `name` without it in the file."""
        change = draw("d" + name, *self.weights[name].shape)
        stem = re.sub(r"\.(weight|bias|modulation)$", "", name)
        stem = name if suffix == "diff" and name.endswith("modulation") else stem
        self.file[f"{BEFORE}{stem}.{suffix}"] = change
        self.changed[name] = self.changed[name] + change

    def saved(self, folder, file=None):
        save_file(self.file if file is None else file, folder / "x.safetensors")
        return folder / "x.safetensors"

    def output(self, params, adapters=None):
        n, rng = 4, np.random.default_rng(0)
        tokens = Tokens(
            jnp.asarray(rng.normal(size=(1, n, 64)), jnp.float32),
            jnp.asarray(rng.integers(0, 3, (1, n, 3)), jnp.float32),
            cond=jnp.asarray(draw("c", 1, n, cond))
            if (cond := self.dit.cond_channels)
            else None,
        )
        text = Text(jnp.asarray(rng.normal(size=(1, 3, 10)), jnp.float32))
        variables = {"params": params} | ({"lora": adapters} if adapters else {})
        return jax.jit(self.dit.apply)(variables, tokens, jnp.full((1, 1), 0.7), text)

    def model(self, **more):
        networks = {"dit": Network(self.dit, self.params)} | more
        return Bundle(
            networks,
            object.__new__(Tokenizer),
            NoisePath(),
            TimestepPolicy(),
            patch_size=(1, 2, 2),
            text_length=3,
            boundary=0.5 if more else 0.0,
        )

    def adapted(self, file, factor=1.0):
        model = with_adapters(self.model(), [(file, factor)])
        return self.output(model.networks["dit"].params, model.adapters.get("dit"))

    def by_hand(self):
        rules, shapes = tables(self.dit)[1], self.shapes
        params = loader(rules, self.changed, shapes)()
        return self.output(stack_layers(params) if self.dit.scan_layers else params)

    def check(self, folder):
        found, want = self.adapted(self.saved(folder)), self.by_hand()
        assert_close(found, want, 30)
        assert np.abs(want - self.output(self.params)).max() > 0.05


def accelerator(**fields):
    """As lightx2v's: factors, and differences of all that has none."""
    case = Case(**fields)
    for i in range(SIZES["depth"]):
        for name in LINEAR:
            case.low(f"blocks.{i}.{name}", alpha=(ALPHA, 1))
            case.diff(f"blocks.{i}.{name}.bias", "diff_b")
        for name in ("self_attn.norm_q", "cross_attn.norm_k", "norm3"):
            case.diff(f"blocks.{i}.{name}.weight", "diff")
        case.diff(f"blocks.{i}.norm3.bias", "diff_b")
    return case


@pytest.mark.parametrize("scan", [False, True])
def test_differences_beside_factors(tmp_path, scan, caplog):
    case = accelerator(scan=scan)
    for name in ENDS:
        case.low(name, alpha=(ALPHA,))
        case.diff(f"{name}.bias", "diff_b")
    case.diff("blocks.0.modulation", "diff_m")
    case.diff("blocks.1.modulation", "diff")
    case.diff("head.modulation", "diff_m")
    case.diff("text_embedding.2.weight", "diff")
    case.diff("patch_embedding.weight", "diff")
    case.diff("patch_embedding.bias", "diff_b")
    case.check(tmp_path)
    assert not caplog.records


def test_strength_is_that_of_all_parts(tmp_path):
    case = Case()
    case.low("blocks.1.ffn.2")
    case.diff("blocks.1.norm3.weight", "diff")
    file = case.saved(tmp_path)
    assert_close(case.adapted(file, 0.0), case.output(case.params))
    for name, value in case.weights.items():
        case.changed[name] = value + 0.5 * (case.changed[name] - value)
    assert_close(case.adapted(file, 0.5), case.by_hand(), 30)


def diffusers_names(name):
    for theirs, original, _ in (*wan._BLOCK, *wan._ENDS):
        name = name.replace(f".{original}.", f".{theirs}.")
    return name.replace(BEFORE, "transformer.").replace("lora_down", "lora_A")


NAMINGS = {
    "pipe.dit.": lambda x: x.replace(BEFORE, "pipe.dit."),
    "model.diffusion_model.": lambda x: f"model.{x}",
    "base_model.model.": lambda x: x.replace(BEFORE, "base_model.model."),
    "none": lambda x: x.removeprefix(BEFORE),
    "peft": lambda x: x.replace("down", "down.default"),
    "diffusers": lambda x: diffusers_names(x).replace("lora_up", "lora_B"),
} | {
    before: lambda x, before=before: re.sub(
        rf"{BEFORE}(.+)(\.(?:lora_|alpha|diff).*)",
        lambda m: before + m[1].replace(".", "_") + m[2],
        x,
    )
    for before in ("lora_unet_", "lora_unet__", "lycoris_")
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_other_names_are_the_same_file(tmp_path, naming):
    case = accelerator()
    for name in ENDS if naming != "diffusers" else ():
        case.low(name, alpha=(ALPHA,))
    names = {name: NAMINGS[naming](name) for name in case.file}
    assert sum(name != other for name, other in names.items()) > 5
    plain = read_lora(case.saved(tmp_path), tables(case.dit), case.params)
    renamed = {names[name]: value for name, value in case.file.items()}
    found = read_lora(case.saved(tmp_path, renamed), tables(case.dit), case.params)
    assert not plain.left and not found.left
    jax.tree.map(np.testing.assert_array_equal, found.trees, plain.trees)


def test_the_patch_embedding_of_a_network_with_given_frames(tmp_path):
    case = Case(cond_channels=80)
    assert case.weights["patch_embedding.weight"].shape == (24, 36, 1, 2, 2)
    case.low("patch_embedding", alpha=(ALPHA,))
    case.diff("patch_embedding.bias", "diff_b")
    case.check(tmp_path)
    case.diff("patch_embedding.weight", "diff")
    case.file = {k: x for k, x in case.file.items() if "lora" not in k}
    del case.file[f"{BEFORE}patch_embedding.alpha"]
    case.changed["patch_embedding.weight"] = (
        case.weights["patch_embedding.weight"]
        + case.file[f"{BEFORE}patch_embedding.diff"]
    )
    case.check(tmp_path)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("along", ["peft", "outputs", "inputs"])
def test_dora(tmp_path, scan, along):
    case = Case(scan=scan)
    # The second layer of the stack has factors alone, and the third neither.
    case.low("blocks.1.ffn.0")
    layers = ["blocks.0.ffn.0", "blocks.1.cross_attn.v", "text_embedding.2"]
    for layer in layers + ["patch_embedding"] * (along == "peft"):
        case.low(layer, alpha=(ALPHA,))
        weight = case.changed[f"{layer}.weight"]
        axes = (0,) if along == "inputs" else tuple(range(1, weight.ndim))
        norm = np.sqrt((weight**2).sum(axes, keepdims=True))
        size = 1 + draw("m" + layer, *norm.shape)
        case.changed[f"{layer}.weight"] = weight * size / norm
        if weight.ndim == 2 and along == "peft":
            size = size[:, 0]
        elif along == "peft":
            size = size.swapaxes(0, 1)  # [1 o 1 1 1]
        end = "lora_magnitude_vector" if along == "peft" else "dora_scale"
        case.file[f"{BEFORE}{layer}.{end}"] = size
    case.check(tmp_path)
    assert_close(case.adapted(case.saved(tmp_path), 0.0), case.output(case.params))


def test_what_the_network_lacks_is_left_out_and_named(tmp_path, caplog):
    case = Case()
    case.low("blocks.1.ffn.2")
    down = draw("x", 3, 24)
    case.file |= {
        f"{BEFORE}blocks.7.ffn.2.lora_down.weight": down,
        f"{BEFORE}blocks.7.ffn.2.lora_up.weight": down.T.copy(),
        f"{BEFORE}blocks.0.cross_attn.k_img.diff_b": down[0],
        f"{BEFORE}blocks.0.ffn.0.lora_down.weight": down,
        f"{BEFORE}blocks.0.self_attn.q.lora_up.weight": down.T.copy(),
        f"{BEFORE}blocks.0.self_attn.q.lora_down.weight": down[:, :-1].copy(),
        f"{BEFORE}blocks.0.norm3.diff": down,
        f"{BEFORE}blocks.0.self_attn.k.hada_w1_a": down,
    }
    case.check(tmp_path)
    (record,) = caplog.records
    told = record.getMessage()
    assert "8 tensors are left out" in told and "blocks.7.ffn.2" in told
    left = read_lora(case.saved(tmp_path), tables(case.dit), case.params).left
    reasons = {name.removeprefix(BEFORE): why for name, why in left.items()}
    assert len(reasons) == 8
    assert "no such layer" in reasons["blocks.0.cross_attn.k_img.diff_b"]
    assert "missing" in reasons["blocks.0.ffn.0.lora_down.weight"]
    assert "(24, 24)" in reasons["blocks.0.self_attn.q.lora_up.weight"]
    assert "(24,)" in reasons["blocks.0.norm3.diff"]
    assert "known" in reasons["blocks.0.self_attn.k.hada_w1_a"]
    case.file = {
        k: x for k, x in case.file.items() if k.removeprefix(BEFORE) in reasons
    }
    with pytest.raises(ValueError, match="no adapters of this network: .*no such"):
        case.adapted(case.saved(tmp_path))


def test_values_that_cannot_be_are_refused_by_name(tmp_path):
    case = accelerator()
    name = f"{BEFORE}blocks.1.ffn.0.lora_up.weight"
    bad = case.file[name].copy()
    bad[1, 2] = np.inf
    with pytest.raises(ValueError, match="blocks.1.ffn.0.lora_up.weight .*finite"):
        case.adapted(case.saved(tmp_path, case.file | {name: bad}))
    name = f"{BEFORE}blocks.1.ffn.0.alpha"
    with pytest.raises(ValueError, match="ffn.0.alpha must hold one number"):
        case.adapted(case.saved(tmp_path, case.file | {name: np.ones(2, "f")}))
    low = {"lora_alpha": 2.0, "alpha_pattern": {"(": 1.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(low))
    plain = {k: x for k, x in case.file.items() if "alpha" not in k}
    with pytest.raises(ValueError, match="`alpha_pattern` .*'\\('.*regular"):
        case.adapted(case.saved(tmp_path, plain))
    again = {f"model.{name}": x for name, x in case.file.items()}
    with pytest.raises(ValueError, match="twice"):
        case.adapted(case.saved(tmp_path, case.file | again))


def test_an_expert_that_the_names_tell(tmp_path):
    case = accelerator()
    low = Network(case.dit, jax.tree.map(jnp.zeros_like, case.params))
    renamed = {k.replace(BEFORE, "transformer_2."): x for k, x in case.file.items()}
    two, file = case.model(dit_low=low), case.saved(tmp_path, renamed)
    found = with_adapters(two, [(file, 1.0)])
    assert [*found.adapters] == ["dit_low"]
    bias = [x.params["block_0"]["cross_norm"]["bias"] for x in found.networks.values()]
    assert_close(bias[0], case.params["block_0"]["cross_norm"]["bias"])
    assert np.abs(bias[1]).min() > 0
    for model, networks in ((case.model(), ("dit", "dit_low")), (two, ("dit",))):
        with pytest.raises(ValueError, match="is for dit_low by the names"):
            with_adapters(model, [(file, 1.0)], networks)
    # Beside names of the one expert, names that tell none are the other's.
    both = case.saved(tmp_path, renamed | {f"{BEFORE}blocks.0.norm3.diff": bias[0]})
    found = with_adapters(two, [(both, 1.0)])
    scales = [
        x.params["block_0"]["cross_norm"]["scale"] for x in found.networks.values()
    ]
    want = case.params["block_0"]["cross_norm"]["scale"] + bias[0]
    assert_close(scales[0], want)
    assert_close(scales[1], case.file[f"{BEFORE}blocks.0.norm3.diff"])


@pytest.mark.parametrize("scan", [False, True])
def test_what_is_written_is_read_again(tmp_path, scan):
    case = accelerator(cond_channels=80, scan=scan)
    case.low("patch_embedding")
    case.low("blocks.1.cross_attn.v")
    size = 1 + draw("m", 24)
    case.file[f"{BEFORE}blocks.1.cross_attn.v.lora_magnitude_vector"] = size
    case.diff("patch_embedding.bias", "diff_b")
    case.diff("blocks.1.modulation", "diff_m")
    file, own = case.saved(tmp_path), tables(case.dit)
    first = read_lora(file, own, case.params).trees[ANY]
    written = write_lora(tmp_path / "again", first, own[0])
    again = read_lora(written, own, case.params)
    assert not again.left
    low, rest = parted(again.trees[ANY])
    found = case.output(merged(case.params, rest), low)
    assert_close(found, case.adapted(file), 30)
    # Adapters of the two parts of one tensor, trained apart.
    parts = {x: {"lora_a": draw(x, n, 2), "lora_b": draw("b" + x, 2, 24)}
             for x, n in (("patch_embed", 64), ("cond_embed", 80))}  # fmt: skip
    for each in (parts, {"cond_embed": parts["cond_embed"]}):
        written = write_lora(tmp_path / "parts", each, own[0])
        again = read_lora(written, own, case.params).trees[ANY]
        found, want = (case.output(case.params, x) for x in (again, each))
        assert_close(found, want, 30)
        assert np.abs(want - case.output(case.params)).max() > 0.05


def test_files_and_strengths_of_a_command_line(tmp_path):
    (tmp_path / "a,b:2").touch()
    there, absent = str(tmp_path / "a,b:2"), str(tmp_path / "absent")
    assert strengths([f"{there}:1e-1,{absent}:-2,x", there, f"{there},{there}"]) == [
        (there, 0.1),
        (absent, -2.0),
        ("x", 1.0),
        *[(there, 1.0)] * 3,
    ]
    assert strengths(["C:folder", "a:.5,"]) == [("C:folder", 1.0), ("a", 0.5)]
    with pytest.raises(ValueError, match="x:nan must be a finite number"):
        strengths(["x:nan"])


def test_a_report_of_a_file(tmp_path):
    case = accelerator(cond_channels=80)
    case.low("patch_embedding")
    case.file[f"{BEFORE}blocks.9.ffn.0.diff_b"] = draw("x", 20)
    read, left, again = report_adapters(case.model(), case.saved(tmp_path)).split("\n")
    assert "11 layers with factors" in read and "12 differences of biases" in read
    assert "6 differences of weights" in read
    assert left.startswith("1 tensors are left out: this network has no such layer")
    assert again.endswith("it does the same.")
