"""Forecasts for TPU pods: from a program written out here, and from a compiled one."""

import collections
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pod_config
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jvdit.machine.chips import CHIPS, topology
from jvdit.machine.compilation import jit
from jvdit.models.dit_blocks import CHOICE
from jvdit.models.video_vae import VARIANTS, VideoVAE
from jvdit.pods.forecast import forecast
from jvdit.pods.program_text import arrays, group, read
from jvdit.pods.programs import pod_mesh, train_program, vae_program
from jvdit.sharding import autoencoder_mesh, make_mesh

HERE = pathlib.Path(__file__).parent
AXES = {"data": 1, "fsdp": 2, "context": 4, "tensor": 1}
CYCLES = 'backend_config={"window_config":{"estimated_cycles":"1750000"}}'
# A gathering that hides behind a product, one that doesn't, and a loop of four turns
# around a kernel, whose attributes fill several lines.
TEXT = f"""HloModule step, is_scheduled=true

%condition (p: (s32[])) -> pred[] {{
  %p = (s32[]) parameter(0)
  %bound = s32[] constant(4)
  ROOT %less = pred[] compare(%p, %bound), direction=LT
}}

%body (p.1: (s32[])) -> (s32[]) {{
  %p.1 = (s32[]) parameter(0)
  %flash_forward.1 = bf16[2,1024,128]{{2,1,0}} custom-call(%p.1), \
custom_call_target="tpu_custom_call", operand_layout_constraints={{s8[1,1,1]{{2,1,0}}, \
bf16[2,1024,128]{{2,1,0}}, bf16[2,2048,128]{{2,1,0}}, bf16[2,2048,128]{{2,1,0}}}}, \
frontend_attributes={{kernel_metadata={{
}}, name="x"}}
  ROOT %next = (s32[]) tuple(%p.1)
}}

ENTRY %main (x: f32[1024,1024]) -> f32[1024,1024] {{
  %x = f32[1024,1024]{{1,0:T(8,128)}} parameter(0)
  %all-gather-start = (f32[1024,1024]{{1,0}}, f32[4096,1024]{{1,0}}) \
all-gather-start(%x), replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}, dimensions={{0}}
  %product = f32[1024,1024]{{1,0}} fusion(%x), kind=kOutput, calls=%f, \
metadata={{op_name="jit(step)/DiT/blocks/mlp/dot_general"}}, {CYCLES}
  %all-gather-done = f32[4096,1024]{{1,0}} all-gather-done(%all-gather-start)
  %all-reduce = f32[1024,1024]{{1,0}} all-reduce(%product), \
replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %start = (s32[]) tuple(%x)
  ROOT %loop = (s32[]) while(%start), condition=%condition, body=%body
}}
"""


def test_a_program_is_read_whole():
    program = read(TEXT)
    assert program.entry == "main"
    by_name = {x.name: x for c in program.computations.values() for x in c}
    assert len(program.computations["body"]) == 3  # the kernel's lines are one
    assert program.trips(by_name["loop"]) == 4
    assert by_name["product"].cycles == 1_750_000
    assert by_name["all-gather-done"].operands == ["all-gather-start"]
    assert arrays("(bf16[2,3]{1,0}, s32[])") == [("bf16", (2, 3)), ("s32", ())]
    np.testing.assert_array_equal(group(by_name["all-reduce"].text, 8), [0, 4])
    passed_on = "source_target_pairs={{0,0},{1,5},{5,1}}, metadata={}"
    np.testing.assert_array_equal(group(passed_on, 8), [1, 5])


def test_time_is_that_of_the_core_and_of_links_that_it_waits_for():
    chip = CHIPS["v5p"]
    made = forecast(read(TEXT), chip, AXES)
    kernel = 4 * 2 * 1024 * 2048 * 128 / (chip.peak * chip.flash[0])
    reduced = 2 * 4 * 1024**2 * (1 / 2) / (2 * chip.link)
    assert made.parts["attention"] == pytest.approx(4 * kernel)
    assert made.parts["products"] == pytest.approx(1e-3)
    # 12 MB arrive in 0.07 ms, while the product takes 1 ms: nothing waits for them.
    assert made.parts["links"] == pytest.approx(reduced)
    assert made.seconds == pytest.approx(sum(made.parts.values()))
    assert made.sent["all-gather", "context"] == 3 * 4 * 1024**2
    assert made.sent["all-reduce", "fsdp"] == 4 * 1024**2
    assert made.sources["MLP"] == pytest.approx(1e-3)


def across(op, name, shape, kind):
    """A line by which slices 1 to 4 talk to each other."""
    told = {
        "host_transfer_rendezvous": f"{kind.lower()}.1",
        "megascale_target": "{1,2,3,4}x{0:7}",
        "megascale_transfer_type": kind,
    }
    attributes = ",".join(f'_xla_{k}="{v}"' for k, v in told.items())
    return f"  %{name} = ({shape}, u32[], token[]) {op}(%x), channel_id=1, \
is_host_transfer=true, frontend_attributes={{{attributes}}}\n"


@pytest.mark.parametrize(
    "source, times", [("DiT/x/cond", 1), (f"DiT/{CHOICE}/cond", 0.5)]
)
def test_a_cycle_of_layers_takes_each_of_its_patterns_as_often(source, times):
    """Of another choice the longer way counts."""
    text = TEXT[: TEXT.index("ENTRY")]
    for name, cycles in (("a", CYCLES), ("b", CYCLES.replace("1750000", "0"))):
        text += f"%{name} (x: f32[4]) -> f32[4] {{\n"
        text += "  %x = f32[4]{0} parameter(0)\n  ROOT %p = f32[4]{0} fusion(%x), "
        text += (
            f'kind=kOutput, calls=%f, metadata={{op_name="{source}"}}, {cycles}\n}}\n'
        )
    text += "ENTRY %main (x: f32[4]) -> f32[4] {\n  %x = f32[4]{0} parameter(0)\n"
    text += "  ROOT %c = f32[4]{0} conditional(%x, %x, %x), "
    text += "branch_computations={%a, %b}\n}\n"
    made = forecast(read(text), CHIPS["v5p"], AXES)
    assert made.seconds == pytest.approx(times * 1e-3)


def test_slices_send_over_the_network_behind_what_runs_meanwhile():
    chip, size = CHIPS["v5p"], 4.0 * 1024**2
    reduced = 2 * size * 3 / 4
    head = TEXT[: TEXT.index("ENTRY")] + TEXT[TEXT.index("ENTRY") :].split("\n")[0]
    given = "  %x = f32[1024,1024]{1,0:T(8,128)} parameter(0)\n"
    product = f"  %p = f32[4]{{0}} fusion(%x), kind=kOutput, calls=%f, {CYCLES}\n"
    text = f"{head}\n{given}"
    for op, name in (("recv", "r"), ("send", "s")):
        text += across(op, name, "f32[1024,1024]{1,0}", "ALL_REDUCE")
    text += product + "  %rd = (f32[1024,1024]{1,0}, token[]) recv-done(%r)\n"
    # Of a whole array on each chip the others get a part, which they wait for.
    text += across("send", "s2", "f32[1024,1024]{1,0}", "REDUCE_SCATTER")
    text += across("recv", "r2", "f32[256,1024]{1,0}", "REDUCE_SCATTER")
    text += "  ROOT %rd2 = (f32[256,1024]{1,0}, token[]) recv-done(%r2)\n}\n"
    made = forecast(read(text), chip, AXES)
    assert made.sent["all-reduce", "slices"] == reduced
    assert made.sent["reduce-scatter", "slices"] == size * 3 / 4
    waited = reduced / chip.network - 1e-3 + size * 3 / 4 / chip.network
    assert made.parts["links"] == pytest.approx(waited)


def test_only_gradients_go_between_slices(config):
    """Copies of the model are in different slices, parts of it are not."""
    mesh = pod_mesh("2xv5e:2x4", {"data": 2, "fsdp": 8})
    lowered, state, places = train_program(config, mesh, 16, 16, 64)
    program = read(lowered.compile().as_text())
    made = forecast(program, CHIPS["v5e"], mesh.shape)
    leaves = zip(
        jax.tree.leaves(state.params), jax.tree.leaves(places.params), strict=True
    )
    held = sum(np.prod(p.shard_shape(x.shape)) for x, p in leaves)
    sent = {k: v for (k, axes), v in made.sent.items() if axes == "slices"}
    # Some of them in bfloat16, some in float32; sums come back, so twice a half of it.
    assert 2 * held <= sent.pop("all-reduce") <= 4 * held
    assert sum(sent.values()) < held / 2, sent
    assert not [axes for _, axes in made.sent if "data" in axes]


def test_the_options_of_a_chip_are_known_on_large_slices(config):
    """There the compiler refuses some that it takes on small ones."""
    mesh = pod_mesh("v5e:4x8", {"fsdp": 4, "context": 8})

    def traded(x):
        y = x
        for _ in range(2):
            y = jax.lax.all_to_all(y, "context", 1, 0, tiled=True)
            x = x @ x.T @ x  # meanwhile
            y = jax.lax.all_to_all(y + 1, "context", 0, 1, tiled=True) + x
        return y

    place = PartitionSpec(("fsdp", "context"))
    x = jax.ShapeDtypeStruct(
        (4096, 1024), "bfloat16", sharding=NamedSharding(mesh, place)
    )
    spread = {"in_specs": place, "out_specs": place, "check_vma": False}
    with jax.set_mesh(mesh):
        program = jit(jax.shard_map(traded, mesh=mesh, **spread))
        assert "all-to-all" in program.lower(x).compile().as_text()


def test_slices_are_known_as_they_are_rented():
    assert topology("v5p-8") == "v5p:2x2x1"
    assert topology("v6e-256") == "v6e:16x16"
    assert topology("v5e:4x8") == "v5e:4x8"
    assert topology("2xv5p-128") == "2xv5p:4x4x4"
    with pytest.raises(ValueError, match=r"'v6e-65'.*try 'v6e-64'"):
        topology("v6e-65")


@pytest.fixture(scope="module")
def config():
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu, the compiler, is not installed")
    return pod_config.get_config()


def kernels(program):
    """How often each kernel of flash attention is called."""
    names = [
        x.name.partition(".")[0]
        for computation in program.computations.values()
        for x in computation
        if x.op == "custom-call" and "tpu_custom_call" in x.text
    ]
    return collections.Counter(names)


def test_a_training_step_for_a_slice_that_is_not_there(config):
    mesh = pod_mesh("v6e:2x2", {"fsdp": 2, "context": 2})
    lowered, state, places = train_program(config, mesh, 2, 16, 64)
    compiled = lowered.compile()
    program = read(compiled.as_text())
    # Attention to clip and to text; the backward pass has kept the former.
    assert kernels(program) == {
        "flash_forward": 3,
        "flash_backward": 2,
    }
    # An axis of two channels would leave most lanes empty.
    shapes = {s for _, s in arrays(compiled.as_text())}
    assert not [s for s in shapes if s[-1:] == (2,) and np.prod(s) > 1e4]
    ops = [x.op for c in program.computations.values() for x in c]
    assert ops.count("all-to-all-start") >= 4
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True)
    held = sum(np.prod(p.shard_shape(x.shape)) * x.dtype.itemsize for x, p in leaves)
    memory = compiled.memory_analysis()
    assert held <= memory.argument_size_in_bytes <= 2 * held + 2**24
    assert memory.peak_memory_in_bytes < 2**30
    made = forecast(program, CHIPS["v6e"], mesh.shape)
    assert made.parts["attention"] > 0 and made.parts["products"] > 0
    assert made.sent["all-to-all", "context"] > 0


@pytest.mark.parametrize("step", ["encode", "decode"])
def test_pixels_are_divided_and_only_their_edges_are_sent(config, step):
    """The longer side of a clip goes over the devices, with halos for convolutions."""
    mesh = pod_mesh("v5e:2x2", {"context": 4})
    vae = VideoVAE(**VARIANTS["tiny"] | {"middle_attention": False})
    lowered, pieces = vae_program(vae, mesh, (9, 64, 256), step)
    assert pieces == (2 if step == "encode" else 1)
    compiled = lowered.compile()
    made = forecast(read(compiled.as_text()), CHIPS["v5e"], mesh.shape)
    whole = 4 * 4 * 64 * 256 * 4  # bytes of the finest activations
    assert made.sent["collective-permute", "context"] > 0
    assert sum(made.sent.values()) < whole / 2, dict(made.sent)


def test_devices_that_cannot_divide_pixels_divide_frames(config):
    """Of four, two divide 6 latents; the other two send what layers look back at."""
    mesh = autoencoder_mesh(pod_mesh("v5e:2x2", {"context": 4}), 4, 6)
    vae = VideoVAE(**VARIANTS["tiny"] | {"middle_attention": False})
    lowered, pieces = vae_program(vae, mesh, (17, 32, 48), "decode")
    assert pieces == 1
    compiled = lowered.compile()
    made = forecast(read(compiled.as_text()), CHIPS["v5e"], mesh.shape)
    assert made.sent["collective-permute", "context"] > 0
    assert made.sent["collective-permute", "tensor"] > 0
    assert not made.sent["all-gather", "tensor"]


TOOL = """
import sys
import jax
from absl import flags
from rich.console import Console
sys.path.insert(0, sys.argv.pop(1))
import compile_for_pod as tool
from jvdit.sharding import make_mesh

class TooLarge:
    def compile(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too large")

flags.FLAGS(sys.argv)
tool.pod_mesh = lambda where, sizes: make_mesh(sizes)
tool.lower = lambda *_: TooLarge()
meshes = {"fsdp": 2, "context": 2}, {"fsdp": 4}, {"fsdp": 4}
for flags.FLAGS.rows in (0, None):
    results = [tool.measure(tool._CONFIG.value, "v6e-4", sizes) for sizes in meshes]
    print([(each.rows, each.wrong) for each in results])
results[0].wrong, results[0].forecast.seconds = "", 1.0
Console().print(tool.overview(results))
"""


def test_a_forecast_is_of_the_rows_of_the_config():
    line = [sys.executable, "-c", TOOL, HERE.parent / "tools"]
    line += [f"--config={HERE / 'pod_config.py'}", "--config.data.rows=6"]
    paths = {"PYTHONPATH": str(HERE.parent), "JAX_NUM_CPU_DEVICES": "4"}
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | paths)
    assert done.returncode == 0, done.stderr
    told = done.stdout
    assert "[(2, 'too large'), (4, 'too large')" in told  # as many as the mesh asks for
    assert "[(6, 'too large'), (6, 'rows of a batch (=6) must be divisible by" in told
    # What is marked is told.
    assert told.count("*") == 2 and "* of the meshes tried" in told


def test_adapters_are_forecast_beside_the_weights_that_they_adapt():
    config = pod_config.get_config()
    config.lora.rank, config.dit.depth, config.data.token_budget = 4, 1, 8
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    lowered, state, _ = train_program(config, mesh, 1, 16, 64)
    assert [*state.params] == ["lora"]
    frozen = lowered.in_avals[0][2]["dit"]
    assert frozen["blocks"]["mlp"]["fc_in"]["kernel"].shape == (1, 256, 512)


def test_a_sampling_step_from_the_command_line(config):
    tool = HERE.parent / "tools/compile_for_pod.py"
    line = [sys.executable, tool, f"--config={HERE / 'pod_config.py'}"]
    line += ["--topology=v5e:2x2", "--mesh=data=2,context=2", "--step=sample"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "MFU" in done.stdout and "all-to-all over context" in " ".join(
        done.stdout.split()
    )
