"""Measures the speed of the TPU attention kernels by their schedules, without a TPU.

    pip install libtpu
    python tools/kernel_schedules.py --chip v6e
    python tools/kernel_schedules.py --chip v5p --ahead 1024,2048,512 --segments

The compiler writes a schedule of every instruction, with a line for each cycle. The
tool prints the cycles of one block of queries and keys, and the share of the chip's
peak that this is. Schedules don't include stalls. The block sizes and kernel speeds in
`jvdit/machine/chips.py` were found in this way.
"""

import dataclasses
import os
import pathlib
import re
import tempfile

from absl import flags

os.environ |= {"JAX_PLATFORMS": "cpu"}

import jax
import jax.numpy as jnp

from jvdit.machine import flag_parser
from jvdit.machine.chips import CHIPS, Chip
from jvdit.models.attention import mosaic
from jvdit.pods.programs import pod_mesh
from jvdit.shapes import Visible

# The smallest slice of each chip.
SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
_CHIP = flags.DEFINE_enum("chip", "v6e", SLICES, "TPU to compile for.")
_TOKENS = flags.DEFINE_integer(
    "tokens", 75600, "Number of queries, and of keys, of the attention."
)
_SEGMENTS = flags.DEFINE_bool(
    "segments", False, "Compile the kernels with the mask of packed clips."
)
_AHEAD = flags.DEFINE_multi_string(
    "ahead",
    None,
    "Block sizes of the forward kernel as QUERIES,KEYS,KEYS_AT_ONCE: keys fetched, and "
    "of those the keys computed, at once. Repeat the flag to try several (default: the "
    "chip's own).",
)
_BACK = flags.DEFINE_multi_string(
    "back", None, "Block sizes of the backward kernel, written as for --ahead."
)
CHANNELS = 128


def regions(folder: pathlib.Path, kernel: str) -> list[int]:
    """The lengths in lines of a kernel's inner loops, which hold most of its products.

    Args:
        folder: folder of the compiler's dumps.
        kernel: name of the kernel.
    """
    # Of a kernel in several parts, the first.
    utilization = f"*{kernel}*-final_hlo-static-per-bundle-utilization.txt"
    table = min(folder.glob(utilization))
    rows = table.read_text().split("== UTILIZATION:\n")[1].splitlines()
    products = [int(row.split()[0]) for row in rows if row.strip()]
    whole = table.name.partition("-")[0]
    (text,) = folder.glob(f"{whole}-{kernel}*[0-9]-final_bundles.txt")
    begun, ended = {}, {}
    for line in text.read_text().splitlines():
        place = re.match(r"\s*(0x[0-9a-f]+|0)\s", line)
        for mark, number in re.findall(r"(Start|End) region (\d+)", line):
            if place and mark == "Start":
                begun.setdefault(number, int(place[1], 16))
            elif place:
                ended[number] = int(place[1], 16)
    found = {(begun[n], ended[n]) for n in begun.keys() & ended.keys()}
    busy = [(a, b) for a, b in found if sum(products[a : b + 1]) > 0.3 * sum(products)]
    inner = [
        (a, b)
        for a, b in busy
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in busy)
    ]
    return [b - a + 1 for a, b in sorted(inner)]


def compile_kernel(name: str, tokens: int, segments: bool) -> None:
    """Compiles the forward or backward kernel for one head, on the current mesh."""
    x = jax.ShapeDtypeStruct((1, tokens, 1, CHANNELS), jnp.bfloat16)
    line = jax.ShapeDtypeStruct((1, 1, tokens), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    inputs = (x, x, x, Visible.packed(ids) if segments else None)
    run = mosaic.mosaic_forward
    if name == "flash_backward":
        run, inputs = mosaic.mosaic_backward, (*inputs, line, line, x)
    whole = jax.sharding.PartitionSpec()
    run = jax.shard_map(run, in_specs=whole, out_specs=whole, check_vma=False)
    jax.jit(run).lower(*inputs).compile()


def measure(
    folder: pathlib.Path, chip: Chip, name: str, most: tuple[int, ...], cores: int
) -> str:
    """Compiles a kernel and reads its schedule; returns a line for each inner loop."""
    for old in folder.iterdir():
        old.unlink()
    compile_kernel(name, _TOKENS.value, _SEGMENTS.value)
    backward = name == "flash_backward"
    queries = mosaic.block_for(_TOKENS.value, most[0])
    share = _TOKENS.value // cores if backward else _TOKENS.value
    keys = mosaic.block_for(share, most[1])
    flops = (5 if backward else 2) * 2 * queries * keys * CHANNELS
    cycles = flops / (chip.peak / cores) * chip.clock
    kinds = [""] if backward else ["", ", done again"]
    return "\n".join(
        f"{name}{kind}, blocks {','.join(map(str, most))}: "
        f"{queries} x {keys} in {lines} cycles, {cycles / lines:.3f} of the peak"
        for kind, lines in zip(kinds, regions(folder, name), strict=True)
    )


def sweep(folder: pathlib.Path) -> None:
    """Prints the speed of both kernels at each of the chosen block sizes."""
    chip = CHIPS[_CHIP.value]
    mesh = pod_mesh(SLICES[_CHIP.value], {"data": -1})
    passes = {"flash_forward": ("ahead", _AHEAD), "flash_backward": ("back", _BACK)}
    with jax.set_mesh(mesh):
        blocks = mosaic._blocks()
        for name, (field, asked) in passes.items():
            for text in asked.value or [",".join(map(str, getattr(blocks, field)))]:
                most = tuple(map(int, text.split(",")))
                changed = dataclasses.replace(blocks, **{field: most})
                mosaic._blocks = lambda changed=changed: changed
                try:
                    print(measure(folder, chip, name, most, blocks.cores), flush=True)
                except (ValueError, jax.errors.JaxRuntimeError) as error:
                    print(f"{name}, blocks {text}: {error}"[:500])
            mosaic._blocks = lambda: blocks


def main(_: list[str]) -> None:
    """Compiles the kernels and reads their schedules."""
    with tempfile.TemporaryDirectory(prefix="jvdit-schedules-") as folder:
        options = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        os.environ |= {"LIBTPU_INIT_ARGS": options, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        sweep(pathlib.Path(folder))


if __name__ == "__main__":
    flag_parser.run(main)
