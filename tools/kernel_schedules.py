"""Says how fast the attention kernels of TPUs are by their schedules, without a TPU.

    pip install libtpu
    python tools/kernel_schedules.py --chip v6e
    python tools/kernel_schedules.py --chip v5p --ahead 1024,2048,512 --segments

The compiler writes down every instruction of a core, a line for each cycle. Printed are
the lines of one block of queries and keys, and what share of the chip's peak that is.
Stalls are not in a schedule. How blocks were chosen (`machine/chips.py`), and
what `jvdit/machine/chips.py` knows of the kernels.
"""

import dataclasses
import os
import pathlib
import re
import tempfile

from absl import app, flags

os.environ |= {"JAX_PLATFORMS": "cpu"}

import jax
import jax.numpy as jnp

from jvdit.machine.chips import CHIPS, Chip
from jvdit.models.attention import mosaic
from jvdit.pods.programs import pod_mesh
from jvdit.shapes import Visible

# The smallest slice of a chip.
SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
_CHIP = flags.DEFINE_enum("chip", "v6e", SLICES, "Whose schedules.")
_TOKENS = flags.DEFINE_integer("tokens", 75600, "Queries, and as many keys.")
_SEGMENTS = flags.DEFINE_bool("segments", False, "Whether clips are packed.")
_AHEAD = flags.DEFINE_multi_string("ahead", None, "To try: queries,keys,at once.")
_BACK = flags.DEFINE_multi_string("back", None, "The same for the gradients.")
CHANNELS = 128


def regions(folder: pathlib.Path, kernel: str) -> list[int]:
    """Lines of the parts of a kernel that hold most of its products, in their order."""
    # Of a pass in several parts, the first.
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
    """Compiles one of the two passes for one head, on the mesh that is set."""
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
    """What a schedule says, a line for each part of a kernel."""
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
    """Prints what the schedules of all blocks asked for say."""
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
    app.run(main)
