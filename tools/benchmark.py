"""Benchmarks jvdit against PyTorch on the CPU, at equal sizes in float32.

    python tools/benchmark.py denoise train --tokens 320 --rounds 7 --json times.json

jvdit and the peer (diffusers' models in eager PyTorch) run in turn. Each turn makes
two calls and times the second; ratios compare the two turns of a round. On a busy
machine trust the ratios of CPU times.
"""

import argparse
import functools
import importlib.metadata
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange

from jvdit.data.items import Statistics
from jvdit.data.packed_batches import PackedBatches
from jvdit.data.pipeline import Batches
from jvdit.data.plan import BucketPlan, PackPlan
from jvdit.data.sources import ArraySource
from jvdit.machine.compilation import jit
from jvdit.machine.huge_pages import use_huge_pages
from jvdit.models.attention.dispatch import attention
from jvdit.models.audio_vae import VARIANTS, AudioVAE
from jvdit.models.dit import DiT
from jvdit.models.video_vae import VideoVAE
from jvdit.shapes import Text, Tokens, Visible

BATCH, DEPTH, WIDTH, HEADS, CHANNELS, TEXT, STATES = 4, 6, 256, 4, 16, 256, 64
# Two videos: torch takes a slow path for convolutions over time of a single one.
VAE_WIDTH, VIDEO = 32, (2, 17, 64, 64)
AUDIO_WIDTH, SOUND = 32, (2, 48_000, 1)  # half of KVAE-Audio's width, a second
# Latent frames, height and width of the clips that are packed.
PIPELINE_SIZES = [(1, 16, 16), (3, 8, 16), (5, 8, 8), (5, 16, 8), (5, 16, 16)]
PACKING_SIZES = [(1, 32, 32), (5, 32, 32), (5, 24, 40), (9, 30, 52), (21, 30, 52)]
ATTENDED = 4096  # tokens of the benchmark of attention alone
Run = Callable[[], Any]
Row = dict[str, Any]


def timed(run: Run) -> tuple[float, float]:
    """Times the second of two calls: seconds of wall time and of CPU time."""
    # The first call gets memory back that was released since the last turn. On a
    # virtual machine that takes a second for each gigabyte; consecutive steps don't
    # have this cost.
    jax.block_until_ready(run())
    time.sleep(0.05)  # idle threads of the first call spin for a while
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(what: str, rounds: int, ours: Run, peer: Run | None) -> Row:
    """Times jvdit and the peer in turn, for a number of rounds."""
    runs = {"ours": ours} | ({"peer": peer} if peer else {})
    row: Row = {"what": what, "rounds": rounds, "load": os.getloadavg()[0]}
    times = [{side: timed(run) for side, run in runs.items()} for _ in range(rounds)]
    for i, clock in enumerate(("wall", "cpu")):
        row[clock] = {side: [t[side][i] for t in times] for side in runs}
    return row


def show(row: Row) -> None:
    """Prints the medians and ranges of both clocks, and the note."""
    for clock in filter(row.__contains__, ("wall", "cpu")):
        ours, peer = row[clock]["ours"], row[clock].get("peer", [])
        cells = f"{row['what']:25} {clock:5}{row['rounds']:>3}"
        for x in filter(len, (ours, peer, np.divide(ours[: len(peer)], peer))):
            cell = f"{statistics.median(x):.3g} ({min(x):.3g}-{max(x):.3g})"
            cells += f"   {cell:22}"
        print(f"{cells} [{row['load']:.1f}]", flush=True)
    if "note" in row:
        print(f"{row['what']:25} {row['note']}", flush=True)


def check_sizes(params: Any, model: Any) -> None:
    """Checks that both networks have the same number of parameters."""
    if optax.tree.size(params) != sum(x.numel() for x in model.parameters()):
        raise RuntimeError("The numbers of parameters differ: not the same network.")


def our_dit(inputs: tuple[Any, ...], train: bool, **fields: Any) -> tuple[Any, Run]:
    """Our network's parameters, and its forward pass or training step to time.

    Args:
        inputs: (tokens, t, text, target).
        train: time a training step instead of a forward pass.
        **fields: of the network, beside its sizes.
    """
    patch = 4 * CHANNELS
    sound = patch // 2 if inputs[0].kinds else 0
    sizes = (WIDTH, DEPTH, HEADS, 4 * WIDTH, patch, patch, TEXT)
    model = DiT(*sizes, sound_channels=sound, **fields)
    params = jax.jit(model.init)(jax.random.key(0), *inputs[:3])
    forward, optimizer = jit(model.apply), optax.adamw(1e-4, weight_decay=0.01)

    @functools.partial(jit, donate_argnums=0)
    def update(state: Any, *inputs: Any) -> Any:
        params, moments = state
        grad = jax.grad(lambda p: ((forward(p, *inputs[:3]) - inputs[3]) ** 2).mean())
        changes, moments = optimizer.update(grad(params), moments, params)
        return optax.apply_updates(params, changes), moments

    state = jax.tree.map(jnp.copy, (params, optimizer.init(params)))

    def step() -> Any:
        nonlocal state
        return (state := update(state, *inputs))

    return params, step if train else functools.partial(forward, params, *inputs[:3])


def their_dit(params: Any, peers: Any, inputs: tuple[Any, ...], train: bool) -> Run:
    """The forward pass or training step of diffusers' network of the same sizes.

    Args:
        params: jvdit's parameters, to compare their number.
        peers: the modules torch and diffusers.
        inputs: (latents, t, text, target).
        train: time a training step instead of a forward pass.
    """
    torch, diffusers = peers
    heads = {"num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS}
    sizes = {"text_dim": TEXT, "ffn_dim": 4 * WIDTH, "num_layers": DEPTH}
    model = diffusers.WanTransformer3DModel(**heads, **sizes, rope_max_seq_len=64)
    check_sizes(params, model)
    *arrays, target = map(torch.from_numpy, inputs)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        ((model(*arrays).sample - target) ** 2).mean().backward()
        optimizer.step()

    return step if train else torch.inference_mode()(lambda: model(*arrays))


def clips(tokens: int) -> tuple[tuple[Any, ...], tuple[np.ndarray, ...]]:
    """Inputs of our network and of the peer: whole clips of 5 latent frames."""
    area = tokens // 5
    h = max(x for x in range(1, math.isqrt(area) + 1) if area % x == 0)
    rng = np.random.default_rng(0)
    size = (2, BATCH, CHANNELS, 5, 2 * h, 2 * area // h)
    x, y = rng.normal(size=size).astype(np.float32)
    states = rng.normal(size=(BATCH, STATES, TEXT)).astype(np.float32)
    t = np.linspace(0.1, 0.9, BATCH, dtype=np.float32)
    axes = "a b c f (h p) (w q) -> a b (f h w) (p q c)"
    patches = jnp.asarray(rearrange(np.stack([x, y]), axes, p=2, q=2))
    cells = np.indices((5, h, area // h)).reshape(1, 3, tokens)
    position = jnp.asarray(np.repeat(cells, BATCH, 0), jnp.float32).mT
    ours = Tokens(patches[0], position, frames=5), t[:, None]
    ours = *ours, Text(jnp.asarray(states)), patches[1]
    return ours, (x, 1000 * t, states, y)


def dit(args: argparse.Namespace, peers: Any, train: bool = False) -> Iterator[Row]:
    """Times the DiT on whole clips."""
    for tokens in args.tokens:
        given, other = clips(tokens)
        params, ours = our_dit(given, train)
        theirs = peers and their_dit(params, peers, other, train)
        what = f"{'train' if train else 'denoise'} {BATCH} x {tokens} tokens"
        yield measure(what, args.rounds, ours, theirs)


def patterns(args: argparse.Namespace, _: Any) -> Iterator[Row]:
    """Times attention that alternates between space and time against full attention."""
    for tokens in args.tokens:
        for train in (False, True):
            runs = [
                our_dit(clips(tokens)[0], train, patterns=names)[1]
                for names in (("spatial", "temporal"), ())
            ]
            what = f"alternating {'train' if train else 'denoise'} {BATCH} x {tokens}"
            yield measure(what, args.rounds, *runs)


def kernels(args: argparse.Namespace, _: Any) -> Iterator[Row]:
    """Times attention alone, forward and backward, of 8 causal chunks against all."""
    shape = (1, ATTENDED, HEADS, WIDTH // HEADS)
    q, k, v = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    chunk = jnp.arange(ATTENDED)[None] // (ATTENDED // 8)
    seen = Visible(chunk, jnp.zeros_like(chunk), chunk)

    def run(**how: Any) -> Run:
        def total(*qkv: Any) -> Any:
            return attention(*qkv, implementation="mapped", **how).sum()

        return functools.partial(jit(jax.grad(total, argnums=(0, 1, 2))), q, k, v)

    runs = run(visible=seen, pattern="chunk_causal"), run()
    yield measure(f"8 causal chunks of {ATTENDED // 8}", args.rounds, *runs)


def sound(args: argparse.Namespace, _: Any) -> Iterator[Row]:
    """Times a training step of picture and sound against one of the picture alone."""
    for tokens in args.tokens:
        heard = max(tokens // 64, 8)  # a sixtieth of a clip's tokens are sound
        rng = np.random.default_rng(0)
        runs = []
        for kinds in ((tokens, heard), ()):
            n = tokens + sum(kinds[1:])
            x, y = rng.normal(size=(2, BATCH, n, 4 * CHANNELS)).astype(np.float32)
            level = np.repeat(np.arange(2) * 2 + 1, (tokens, n - tokens))[None]
            packed = Tokens(
                jnp.asarray(x),
                jnp.asarray(rng.uniform(0, 9, (BATCH, n, 3)), jnp.float32),
                level=jnp.asarray(level.repeat(BATCH, 0)) if kinds else None,
                kinds=kinds,
            )
            states = rng.normal(size=(BATCH, STATES, TEXT)).astype(np.float32)
            t = np.full((BATCH, 4 if kinds else 1), 0.5, np.float32)
            inputs = (packed, jnp.asarray(t), Text(jnp.asarray(states)), jnp.asarray(y))
            runs.append(our_dit(inputs, train=True)[1])
        what = f"train {BATCH} x {tokens} + {heard} sound"
        yield measure(what, args.rounds, *runs)


def vae(args: argparse.Namespace, peers: Any) -> Iterator[Row]:
    """Times the encoder and decoder of Wan 2.1's VAE, at a third of its width."""
    model = VideoVAE(encoder_width=VAE_WIDTH, decoder_width=VAE_WIDTH)
    rng = np.random.default_rng(0)
    latents = (VIDEO[0], *model.latent_shape(*VIDEO[1:]), CHANNELS)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((*VIDEO, 3)))
    theirs = peers and peers[1].AutoencoderKLWan(base_dim=VAE_WIDTH).eval()
    for half, shape in (("encode", (*VIDEO, 3)), ("decode", latents)):
        x = rng.uniform(-1, 1, shape).astype(np.float32)
        apply = jit(functools.partial(model.apply, method=half))
        ours, peer = functools.partial(apply, params, jnp.asarray(x)), None
        if peers:
            check_sizes(params, theirs)
            given = peers[0].from_numpy(np.moveaxis(x, -1, 1).copy())
            peer = functools.partial(getattr(theirs.requires_grad_(False), half), given)
        yield measure(f"vae {half} {VIDEO}", args.rounds, ours, peer)


def audio_vae(args: argparse.Namespace, peers: Any) -> Iterator[Row]:
    """Times KVAE-Audio's autoencoder, at half its width, there and back."""
    half = {"encoder_width": AUDIO_WIDTH, "decoder_width": 3 * AUDIO_WIDTH // 4}
    half |= {"feature_width": 2**5 * AUDIO_WIDTH}
    model = AudioVAE(**VARIANTS["kvae-audio"] | half)
    x = np.random.default_rng(0).uniform(-1, 1, SOUND).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(0), jnp.asarray(x))
    apply = jit(lambda params, x: model.apply(params, x)[0])
    ours, peer = functools.partial(apply, params, jnp.asarray(x)), None
    if peers:
        torch, diffusers = peers
        sizes = {"encoder_dim": AUDIO_WIDTH, "latent_dim": model.feature_width}
        width = 2**5 * model.decoder_width
        theirs = diffusers.AutoencoderKLKVAEAudio(**sizes, decoder_dim=width).eval()
        check_sizes(params, theirs)
        given = torch.from_numpy(x.mT.copy())
        peer = torch.inference_mode()(lambda: theirs(given))
    yield measure(f"audio vae {SOUND}", args.rounds, ours, peer)


def pipeline(args: argparse.Namespace, _: Any) -> Iterator[Row]:
    """Times the data pipeline against a training step, and how long a step waits."""
    draw, f32 = np.random.default_rng(0).random, np.float32
    clips = [
        {
            "mean": draw((*x, CHANNELS), f32),
            "text_embeds": draw((16, TEXT), f32),
            "fps": 8,
        }
        for x in PIPELINE_SIZES * 40
    ]
    budgets: Row = {"token_budget": 320, "text_budget": STATES, "max_clips": 4}
    plan = PackPlan.of([source := ArraySource(clips)], rows_per_step=BATCH, **budgets)
    how: Row = {"latents": Statistics(np.zeros(CHANNELS), np.ones(CHANNELS))}
    how |= {"temporal_compression": 4, "null_embeds": draw((1, TEXT))}
    builder = PackedBatches([source], plan, **how)
    x = {name: jnp.asarray(value) for name, value in builder[0][0].items()}
    tokens = Tokens(x["latents"], x["position"], x["segment"], x["segment"])
    text, t = Text(x["text_embeds"], x["text_segment"]), jnp.full((BATCH, 5), 0.5)
    step = our_dit((tokens, t.at[:, 0].set(0), text, x["latents"]), train=True)[1]
    with Batches(builder, num_threads=args.threads, buffer_bytes=1) as batches:
        some = functools.partial(lambda k: [next(batches) for _ in k], range(50))
        row = measure("50 packed batches : step", args.rounds, some, step)
        clock, waited = time.perf_counter(), 0.0
        for _ in range(2 * args.rounds):
            waited -= time.perf_counter()
            next(batches)
            waited += time.perf_counter()
            jax.block_until_ready(step())
    row["wait_share"] = waited / (time.perf_counter() - clock)
    made, taken = map(statistics.median, row["wall"].values())
    row["note"] = f"{50 / made:.0f} batches/s, {1 / taken:.2g} steps/s; "
    row["note"] += f"steps wait {row['wait_share']:.2%} of the time"
    yield row


def packing(args: argparse.Namespace, _: Any) -> Iterator[Row]:
    """Measures padding in rows of 16,384 tokens, for 20,000 clips of five sizes."""
    sizes, budget = np.array(PACKING_SIZES * 4000), 16384
    index = {k: sizes[:, i] for i, k in enumerate(("frames", "height", "width"))}
    index["text_length"] = np.random.default_rng(0).integers(1, 200, len(sizes))
    limits: Row = {"text_budget": 4096, "max_clips": 32, "rows_per_step": 8}
    packed = PackPlan([index], token_budget=budget, **limits).padding
    rows = BucketPlan([index], pixel_budget=4 * budget).steps_per_epoch
    shares = packed, 1 - sizes.prod(axis=1).sum() / 4 / (rows * budget)
    note = "padding {:.2%} packed, {:.2%} in rows of one size each".format(*shares)
    yield {"what": "packing 5 sizes", "padding": shares, "note": note}


CASES = {"denoise": dit, "train": functools.partial(dit, train=True), "vae": vae}
CASES |= {
    "patterns": patterns,
    "kernels": kernels,
    "audio_vae": audio_vae,
    "sound": sound,
    "pipeline": pipeline,
    "packing": packing,
}


def main() -> None:
    """Runs the chosen benchmarks."""
    parser = argparse.ArgumentParser(
        description="Benchmarks jvdit against PyTorch on the CPU."
    )
    parser.add_argument(
        "cases",
        nargs="*",
        default="all",
        choices=[*CASES, "all"],
        help="benchmarks to run (default: all)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="how often jvdit and the peer are timed in turn (default: 5)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        choices=(1, 2),
        help="CPU threads that each side uses (default: 1)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[320, 1280],
        help="tokens of a clip for denoise and train, multiples of 5 "
        "(default: 320 1280)",
    )
    parser.add_argument("--json", help="JSON file to write all measured times to")
    args = parser.parse_args()
    if args.rounds < 1 or any(x < 5 or x % 5 for x in args.tokens):
        parser.error("--rounds must be positive, --tokens multiples of 5; try 320")
    # Both libraries start their threads at first use, on the CPUs then allowed.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    jax.config.update("jax_platforms", "cpu")
    rows, peers = [], None
    try:
        peers = tuple(map(importlib.import_module, ("torch", "diffusers")))
        peers[0].set_num_threads(args.threads)
    except ImportError as error:
        print(f"No peers ({error}); install them with: pip install 'jvdit[parity]'")
    host = f"{os.cpu_count()} CPUs, {args.threads} used"
    for package in ("jax", "torch", "diffusers")[: 3 if peers else 1]:
        host += f", {package} {importlib.metadata.version(package)}"
    print(
        f"{host}\n{'seconds':25} clock  n   {'ours':25}{'peer':25}ours / peer  [load]"
    )
    for case in CASES if "all" in args.cases else args.cases:
        for row in CASES[case](args, peers):
            show(row)
            rows.append(row)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": host, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    use_huge_pages()  # as jvdit's commands do; the peer has them too
    main()
