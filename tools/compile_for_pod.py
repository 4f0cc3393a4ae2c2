r"""Forecasts whether a training fits a TPU pod, and how fast it runs, without the pod.

    pip install libtpu
    python tools/compile_for_pod.py --config configs/wan_pod.py \
        --topology v5p-8,v5p-128,v6e-256 --rows 0
    python tools/compile_for_pod.py --config configs/wan_pod.py --topology v6e-64 \
        --mesh fsdp=8,context=8 --mesh fsdp=4,context=16 --price 2.7
    python tools/compile_for_pod.py --config configs/wan_pod.py --topology 2xv5p-128 \
        --mesh data=2,fsdp=8,context=8 --config.data.rows=16
    python tools/compile_for_pod.py --step decode --clip 81x720x1280 --topology v6e-8

The real training step, sampling step or autoencoder is compiled for the real slice, by
the TPU compiler, which needs no TPU; nothing is downloaded and nothing runs. Memory is
as the compiler reports it. Time is an estimate: the cycles that the compiler expects,
flash attention at the speed of its kernels' schedules, and links at their bandwidth.
Without --mesh several meshes are tried. A batch has as many rows as in training,
`data.rows`; with --rows 0 it has one for each device along data and fsdp.
"""

import dataclasses
import os
import sys
import time
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu"}

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from jvdit.machine import flag_parser
from jvdit.machine.chips import CHIPS, Chip, several, topology
from jvdit.models import video_vae
from jvdit.models.dit import DiT
from jvdit.pods.forecast import Forecast, forecast
from jvdit.pods.program_text import read
from jvdit.pods.programs import (
    SAMPLED,
    pod_mesh,
    sample_program,
    train_program,
    vae_program,
)
from jvdit.ranges import check_ranges
from jvdit.sharding import (
    autoencoder_mesh,
    parameter_shardings,
    parse_mesh,
    sampling_sizes,
)
from jvdit.tasks.task import check_division

GB = 1e9
CLIP_STEPS = ("encode", "decode")
WAN_TEXT = 4096  # width of UMT5's text states, which all released models take
_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_TOPOLOGY = flags.DEFINE_list(
    "topology",
    ["v5p-8"],
    "TPU slices to compile for, separated by commas, such as v5p-8,2xv6e-256.",
)
_MESH = flags.DEFINE_multi_string(
    "mesh",
    None,
    "Devices along each mesh axis, such as fsdp=8,context=8. Repeat the flag to try "
    "several meshes (default: some that suit the slice).",
)
_STEP = flags.DEFINE_enum(
    "step",
    "train",
    ("train", "sample", *CLIP_STEPS),
    "Program to compile: a training step, a solver step with guidance, or the encoding "
    "or decoding of a clip.",
)
_VAE = flags.DEFINE_enum(
    "vae",
    "wan2.1",
    [*video_vae.VARIANTS],
    "Autoencoder, for --step encode and --step decode.",
)
_CLIP = flags.DEFINE_string(
    "clip",
    "81x720x1280",
    "Frames, height and width in pixels (TxHxW) of the clip that --step encode or "
    "--step decode takes, or of the clip of a row whose network has `dit.patterns`.",
)
_ROWS = flags.DEFINE_integer(
    "rows",
    None,
    "Rows of a batch. 0: one for each device along data and fsdp; with --step sample "
    "half as many, because guidance doubles them (default: the config's `data.rows` "
    "for training, 0 for sampling).",
)
_LATENTS = flags.DEFINE_integer(
    "latent_channels", 16, "Latent channels of the autoencoder."
)
_SOUND_LATENTS = flags.DEFINE_integer(
    "sound_channels",
    64,
    "Latent channels of the audio autoencoder, for configs with a `data.sound_budget`.",
)
_PRICE = flags.DEFINE_float(
    "price",
    None,
    "Price of a chip for an hour, to show the cost of 1,000 steps or clips.",
)
_DETAILS = flags.DEFINE_boolean(
    "details", True, "Print how memory, time and sent bytes divide up for each mesh."
)


@dataclasses.dataclass
class Result:
    """The forecast for one slice and mesh, or why the program doesn't fit there.

    Attributes:
        slice: name of the slice.
        mesh: devices along each mesh axis.
        rows: rows of the batch.
        wrong: why the program can't be compiled for the mesh; "": it can.
        memory: bytes of a chip by kind, such as "weights".
        forecast: time and sent bytes of the program.
        steps: steps or clips that one run of the program makes up.
        flops: FLOPs of the program on all chips together.
        slivers: how many matrices are sharded into parts of incomplete tiles.
        chip: the chip of the slice.
        compiled_in: seconds that the compilation took.
    """

    slice: str
    mesh: dict[str, int]
    rows: int
    wrong: str = ""
    memory: dict[str, float] = dataclasses.field(default_factory=dict)
    forecast: Forecast = dataclasses.field(default_factory=Forecast)
    steps: float = 1
    flops: float = 0.0
    slivers: int = 0
    chip: Chip = CHIPS["v5p"]
    compiled_in: float = 0.0

    @property
    def chips(self) -> int:
        """How many devices the mesh has."""
        return int(np.prod([*self.mesh.values()]))

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation in [0, 1]; recomputed activations don't count."""
        peak = self.chips * self.chip.peak
        return self.flops / (peak * self.forecast.seconds)


def meshes_to_try(chips: int) -> list[dict[str, int]]:
    """The meshes to try on a slice when none is given.

    Training: 4 or 8 neighbouring chips along context (Ulysses), the rest along fsdp.
    """
    if _STEP.value in CLIP_STEPS:
        return [{"context": chips}]
    if _STEP.value == "sample":
        return [sampling_sizes(2 * (_ROWS.value or 1), chips)]
    contexts = [c for c in (4, 8) if c <= chips]
    return [{"fsdp": chips // c, "context": c} for c in contexts]


def share(shapes: Any, shardings: Any) -> float:
    """The bytes of a sharded tree of arrays on one chip."""
    return sum(
        np.prod(place.shard_shape(x.shape)) * x.dtype.itemsize
        for x, place in zip(
            jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True
        )
    )


def slivers(shapes: Any, shardings: Any) -> int:
    """Counts the matrices whose shard on a chip isn't made of whole 8 x 128 tiles."""
    parts = [
        place.shard_shape(x.shape)[-2:]
        for x, place in zip(
            jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True
        )
        if x.ndim > 1 and not place.is_fully_replicated
    ]
    return sum(bool(rows % 8 or columns % 128) for rows, columns in parts)


def lower(config: Any, mesh: Any, result: Result) -> Any:
    """Lowers the training or sampling program; fills in memory and FLOPs by shapes."""
    text_width = 0 if config.text_encoder else WAN_TEXT
    sounds = config.data.sound_budget
    pictures, text = config.data.token_budget, config.data.text_budget
    tokens = pictures + sounds
    # In tokens, of the one clip of each row.
    frames = 0
    if config.dit.patterns:
        vae = video_vae.VideoVAE(**video_vae.VARIANTS[_VAE.value])
        frames = vae.latent_shape(*_clip())[0] // config.patch_size[0]
    if _STEP.value == "train":
        lowered, state, places = train_program(
            config,
            mesh,
            result.rows,
            _LATENTS.value,
            text_width,
            _SOUND_LATENTS.value,
            frames,
        )
        result.memory = {
            "weights": share(state.params, places.params),
            "average": share(state.ema, places.ema),
            "optimizer": share(state.opt_state, places.opt_state),
        }
        result.slivers = slivers(state.params, places.params)
        if frozen := lowered.in_avals[0][2]:
            held = share(frozen, parameter_shardings(frozen, mesh))
            result.memory["frozen weights"] = held
        module = _module(config, text_width)
        trained = "adapters" if config.lora.rank else "weights"
        each = module.flops(tokens, text, trained, frames)
        result.flops = float(result.rows * each)
        return lowered
    module = _module(config, text_width, param_dtype=config.dit.dtype)
    sizes = result.rows, pictures, text, sounds, frames
    lowered = sample_program(module, mesh, *sizes)
    params = lowered.in_avals[0][0]["params"]
    places = parameter_shardings(params, mesh)
    result.memory = {"weights": share(params, places)}
    result.slivers = slivers(params, places)
    # In sampling all steps are one program; this one has two, with guidance.
    result.steps = SAMPLED
    each = module.flops(tokens, text, frames=frames)
    result.flops = 2.0 * SAMPLED * result.rows * each
    return lowered


def lower_clip(mesh: Any, result: Result) -> tuple[Any, Any]:
    """Lowers one piece of encoding or decoding a clip; returns it with its mesh.

    The table shows the time of all pieces of the clip.
    """
    clip = frames, height, width = _clip()
    vae = video_vae.VideoVAE(**video_vae.VARIANTS[_VAE.value])
    mesh = autoencoder_mesh(mesh, *vae.latent_shape(*clip)[1:])
    result.mesh = dict(mesh.shape)
    lowered, pieces = vae_program(vae, mesh, clip, _STEP.value)
    if not pieces:
        raise ValueError(
            f"`clip` (={_CLIP.value}) has one frame, but what is compiled is a piece "
            f"after the first; try {1 + vae.temporal_compression}x{height}x{width}."
        )
    result.steps = 1 / pieces
    return lowered, mesh


def _clip() -> tuple[int, int, int]:
    """Frames, height and width of `--clip`."""
    try:
        frames, height, width = map(int, _CLIP.value.split("x"))
    except ValueError as error:
        raise ValueError(
            f"`clip` (={_CLIP.value}) must be TxHxW, such as 81x720x1280."
        ) from error
    return frames, height, width


def _module(config: Any, text_width: int, **changed: Any) -> DiT:
    channels = int(_LATENTS.value * np.prod(config.patch_size))
    fields = config.dit.to_dict() | changed
    return DiT(
        in_channels=channels,
        out_channels=channels,
        text_width=text_width or config.text_encoder.width,
        sound_channels=_SOUND_LATENTS.value if config.data.sound_budget else 0,
        **fields,
    )


def measure(config: Any, name: str, sizes: dict[str, int]) -> Result:
    """Compiles the program for one slice and mesh, and forecasts it."""
    where = topology(name)
    mesh = pod_mesh(where, sizes)
    rows = _ROWS.value
    if rows is None and _STEP.value == "train":
        rows = config.data.rows
    if not rows:
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        if _STEP.value == "sample" and rows % 2 == 0:
            rows //= 2  # guidance doubles them
    chip = CHIPS[several(where)[1].partition(":")[0]]
    result = Result(name, dict(mesh.shape), rows, chip=chip)
    if _STEP.value == "train":
        parts = config.optim.accumulate
        try:
            check_division(rows, config.data.token_budget, mesh, parts)
        except ValueError as error:  # other meshes may still do
            result.wrong = str(error)
            return result
    start = time.perf_counter()
    if _STEP.value in CLIP_STEPS:
        lowered, mesh = lower_clip(mesh, result)
    else:
        lowered = lower(config, mesh, result)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        result.wrong = (
            str(error).partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")
        )
        return result
    result.compiled_in = time.perf_counter() - start
    memory = compiled.memory_analysis()
    known = sum(result.memory.values())
    result.memory["all else"] = memory.peak_memory_in_bytes - known
    result.memory["on the host"] = memory.host_temp_size_in_bytes
    result.forecast = forecast(read(compiled.as_text()), chip, mesh.shape)
    return result


def overview(results: list[Result]) -> Table:
    """Builds a table with a line for each slice and mesh; the fastest is marked."""
    unit = "clip" if _STEP.value in CLIP_STEPS else "step"
    table = Table(title=f"{_STEP.value}, estimated; memory by the compiler")
    if any(best(results, each.slice) for each in results):
        table.caption = "* of the meshes tried, the one with most clips a second"
    price = [f"cost / 1,000 {unit}s"] if _PRICE.value else []
    columns = (
        "slice",
        "mesh",
        "clips",
        "GB of a chip",
        f"s / {unit}",
        "MFU",
        "waiting",
    )
    for column in (*columns, *price):
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    for each in results:
        mesh = " ".join(f"{k} {n}" for k, n in each.mesh.items() if n > 1)
        if each.wrong:
            table.add_row(each.slice, mesh, str(each.rows), "[red]no, see below")
            continue
        used = sum(v for k, v in each.memory.items() if k != "on the host")
        seconds = each.forecast.seconds
        waiting = each.forecast.parts["links"] / seconds
        cells = [
            f"{used / GB:.1f} of {each.chip.memory / GB:.1f}",
            f"{seconds / each.steps:.2f}",
            f"{each.mfu:.0%}" * (each.flops > 0)
            + " *" * (each is best(results, each.slice)),
            f"{waiting:.0%}",
        ]
        if _PRICE.value:
            hours = seconds / each.steps * 1000 / 3600
            cells.append(f"{hours * each.chips * _PRICE.value:,.0f}")
        table.add_row(each.slice, mesh, str(each.rows), *cells)
    return table


def best(results: list[Result], name: str) -> Result | None:
    """The result with most clips per second on a slice, of several meshes tried."""
    tried = [r for r in results if r.slice == name]
    fitting = [r for r in tried if not r.wrong] if len(tried) > 1 else []
    return max(fitting, key=lambda r: r.rows / r.forecast.seconds, default=None)


def details(result: Result, console: Console) -> None:
    """Prints how memory, time and sent bytes divide up on one slice and mesh."""
    mesh = " ".join(f"{k} {n}" for k, n in result.mesh.items() if n > 1)
    console.print(
        f"\n[bold]{result.slice}, {mesh}[/] compiled in {result.compiled_in:.0f} s"
    )
    for title, values, unit, scale in (
        ("memory", result.memory, "GB", GB),
        ("time", result.forecast.parts, "s", 1.0),
        ("by part", result.forecast.sources, "s", 1.0),
        (
            "sent",
            {f"{k} over {a}": n for (k, a), n in result.forecast.sent.items()},
            "GB",
            GB,
        ),
    ):
        largest = sorted(values.items(), key=lambda x: -x[1])
        told = [f"{k} {n / scale:.2f} {unit}" for k, n in largest if n / scale >= 0.005]
        console.print(f"  {title}: {', '.join(told)}")
    if result.slivers:
        console.print(
            f"  [yellow]{result.slivers} matrices are divided into parts that aren't "
            "whole tiles of 8 x 128; fewer devices along fsdp suit them better."
        )


def main(_: list[str]) -> None:
    """Compiles for each chosen slice and mesh, and prints the forecasts."""
    console, results = Console(), []
    if _CONFIG.value is None and _STEP.value not in CLIP_STEPS:
        sys.exit(
            f"error: --step {_STEP.value} needs --config, such as configs/wan_pod.py"
        )
    try:
        if _CONFIG.value is not None:
            check_ranges(_CONFIG.value.to_dict())
        for name in _TOPOLOGY.value:
            chips = pod_mesh(topology(name), {"data": -1}).size
            meshes = [parse_mesh(x) for x in _MESH.value or ()] or meshes_to_try(chips)
            for sizes in meshes:
                with console.status(f"compiling for {name}, {sizes} …"):
                    results.append(measure(_CONFIG.value, name, sizes))
                if _DETAILS.value and not results[-1].wrong:
                    details(results[-1], console)
    except (ValueError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    console.print(overview(results))
    for each in results:
        if each.wrong:
            console.print(f"[red]{each.slice}, {each.mesh}:[/] {each.wrong}")


if __name__ == "__main__":
    flag_parser.run(main)
