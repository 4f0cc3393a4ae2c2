"""Benchmarks jvdit against PyTorch on one GPU: Wan's sizes, random weights, bfloat16.

    python tools/benchmark_gpu.py denoise-1.3b train-1.3b --rounds 5 --json times.json

jvdit and the peer (diffusers' Wan models, compiled by torch block by block as their
documentation advises; the autoencoder eager) run in separate processes, which compile
at the same time and are then timed in turn, round by round.
"""

import argparse
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

# Name in `dit.VARIANTS`, tokens (frames, height, width), latent channels.
DITS = {
    "1.3b": ("wan2.1-t2v-1.3b", (21, 30, 52), 16),
    "5b": ("wan2.2-ti2v-5b", (31, 22, 40), 48),
}
TEXT = 512  # text states of a prompt
LATENTS = (1, 6, 60, 104, 16)  # latents of 21 frames of 480 x 832 pixels
MATRIX, PRODUCTS = 8192, 50  # size of a square matrix, products that are timed together
RANK = 32  # rank of the LoRA adapters on attention layers
CASES = ("matmul", "denoise-1.3b", "vae-decode", "train-1.3b", "denoise-5b", "lora-5b")
Run = Callable[[], Any]


def ours(case: str) -> tuple[Run, float]:
    """A benchmark in jvdit: a function to time, and its FLOPs (0: not known)."""
    import jax
    import jax.numpy as jnp

    kind, _, size = case.partition("-")
    if kind == "matmul":
        x = jax.random.normal(jax.random.key(0), (MATRIX, MATRIX), jnp.bfloat16)
        product = jax.jit(lambda x: x @ x)

        def products() -> None:
            jax.block_until_ready([product(x) for _ in range(PRODUCTS)][-1])

        return products, 2.0 * MATRIX**3 * PRODUCTS
    if kind == "vae":
        return _our_decoder(), 0.0
    return _our_dit(size, kind)


def _our_decoder() -> Run:
    import jax
    import jax.numpy as jnp

    from jvdit.models.video_vae import VARIANTS, VideoVAE
    from jvdit.models.video_vae_chunked import decode_stream, split

    half = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    model = VideoVAE(**VARIANTS["wan2.1"], **half)
    video = jnp.zeros((1, 1, 64, 64, 3))
    params = jax.jit(model.init)(jax.random.key(0), video)["params"]
    latents = jax.random.normal(jax.random.key(1), LATENTS, jnp.float32)

    def run() -> None:
        for piece in decode_stream(model, params, split(latents, 1)):
            jax.block_until_ready(piece)

    return run


def _our_dit(size: str, kind: str) -> tuple[Run, float]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from jvdit.models.dit import VARIANTS, DiT
    from jvdit.models.lora import LoRA
    from jvdit.shapes import Text, Tokens

    name, grid, _ = DITS[size]
    n = int(np.prod(grid))
    model = DiT(
        **VARIANTS[name],
        scan_layers=True,
        remat="none" if kind == "denoise" else "full",
        dtype=jnp.bfloat16,
        param_dtype=jnp.float32 if kind == "train" else jnp.bfloat16,
    )
    latents = jax.random.normal(jax.random.key(1), (1, n, model.in_channels))
    cells = np.indices(grid).reshape(1, 3, n).swapaxes(1, 2).astype(np.float32)
    tokens, t = Tokens(latents, jnp.asarray(cells)), jnp.full((1, 1), 0.5)
    states = jax.random.normal(jax.random.key(2), (1, TEXT, model.text_width))
    trained = {"denoise": "nothing", "train": "weights", "lora": "adapters"}[kind]
    text = Text(states.astype(jnp.bfloat16))
    flops = float(model.flops(n, TEXT, trained))
    params = jax.jit(model.init)(jax.random.key(0), tokens, t, text)
    if kind == "denoise":
        forward = jax.jit(model.apply)
        return lambda: jax.block_until_ready(forward(params, tokens, t, text)), flops
    optimizer = optax.adamw(1e-4, weight_decay=0.01)
    learned, frozen = params, {}
    if kind == "lora":
        adapters = LoRA(rank=RANK).init(jax.random.key(3), params["params"])
        learned, frozen = {"lora": adapters}, params

    def loss(learned, frozen, tokens, text):
        out = model.apply({**frozen, **learned}, tokens, t, text)
        return ((out - tokens.latents) ** 2).mean()

    def update(state, frozen, tokens, text):
        learned, moments = state
        grads = jax.grad(loss)(learned, frozen, tokens, text)
        changes, moments = optimizer.update(grads, moments, learned)
        return optax.apply_updates(learned, changes), moments

    step = jax.jit(update, donate_argnums=0)
    state = learned, jax.jit(optimizer.init)(learned)

    def run() -> None:
        nonlocal state
        state = jax.block_until_ready(step(state, frozen, tokens, text))

    return run, flops


def theirs(case: str) -> tuple[Run, float]:
    """A benchmark in PyTorch: a function to time, and 0 for its FLOPs."""
    import torch

    def synchronized(call: Run) -> Run:
        def run() -> None:
            call()
            torch.cuda.synchronize()

        return run

    kind, _, size = case.partition("-")
    if kind == "matmul":
        x = torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16)
        return synchronized(lambda: [x @ x for _ in range(PRODUCTS)]), 0.0
    if kind == "vae":
        diffusers: Any = importlib.import_module("diffusers")
        vae = diffusers.AutoencoderKLWan().to("cuda", torch.bfloat16)
        b, f, h, w, c = LATENTS
        z = torch.randn(b, c, f, h, w, device="cuda", dtype=torch.bfloat16)
        decode = torch.no_grad()(lambda: vae.decode(z))
        return synchronized(decode), 0.0
    return synchronized(_their_dit(size, kind)), 0.0


def _their_dit(size: str, kind: str) -> Run:
    import torch

    from jvdit.models.dit import VARIANTS

    diffusers: Any = importlib.import_module("diffusers")

    name, (f, h, w), channels = DITS[size]
    row, dtype = VARIANTS[name], torch.float32 if kind == "train" else torch.bfloat16
    with torch.device("cuda"):
        torch.set_default_dtype(dtype)
        model = diffusers.WanTransformer3DModel(
            num_attention_heads=row["num_heads"],
            attention_head_dim=row["width"] // row["num_heads"],
            in_channels=channels,
            out_channels=channels,
            ffn_dim=row["ffn_width"],
            num_layers=row["depth"],
        )
        torch.set_default_dtype(torch.float32)
        x = torch.randn(1, channels, f, 2 * h, 2 * w, dtype=dtype)
        inputs = x, torch.tensor([500.0]), torch.randn(1, TEXT, 4096, dtype=dtype)
    if kind == "lora":
        peft: Any = importlib.import_module("peft")
        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        model.requires_grad_(False)
        model.add_adapter(peft.LoraConfig(r=RANK, target_modules=layers))
        for weight in filter(lambda x: x.requires_grad, model.parameters()):
            weight.data = weight.data.float()
    model.compile_repeated_blocks(fullgraph=True)
    if kind == "denoise":
        model.eval()
        return torch.no_grad()(lambda: model(*inputs))
    model.enable_gradient_checkpointing()
    trained = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            out = model(*inputs).sample
        ((out.float() - x) ** 2).mean().backward()
        optimizer.step()

    return step


SIDES = {"ours": ours, "peer": theirs}


def serve(pipe: Any, side: str, cases: tuple[str, ...]) -> None:
    """Prepares one benchmark after another, and times it whenever asked to.

    Args:
        pipe: connection to the main process.
        side: "ours" or "peer".
        cases: names of the benchmarks, in order.
    """
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # two share the device
    for case in cases:
        began = time.perf_counter()
        try:
            run, flops = SIDES[side](case)
            for _ in range(2):
                run()
        except Exception as error:  # too little memory, or a library that lacks it
            pipe.send(f"{type(error).__name__}: {str(error)[:300]}")
            continue
        pipe.send((time.perf_counter() - began, flops))
        while pipe.recv() == "run":
            began = time.perf_counter()
            run()
            pipe.send(time.perf_counter() - began)
        del run


def rounds_of(pipes: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Times both sides in turn; returns the seconds of each round, by side."""
    times: dict[str, list[float]] = {side: [] for side in pipes}
    for _ in range(rounds):
        for side, pipe in pipes.items():
            pipe.send("run")
            times[side].append(pipe.recv())
    return times


def told(case: str, times: dict[str, list[float]], flops: float, peak: float) -> str:
    """Formats the result of one benchmark as a line.

    Args:
        case: name of the benchmark.
        times: seconds of each round, by side.
        flops: FLOPs of one call; 0: not known.
        peak: FLOP/s of the matrix product; 0: not known.
    """
    cells = [f"{case:14}"]
    for side, values in times.items():
        low, high = min(values), max(values)
        middle = statistics.median(values)
        cells.append(f"{side} {middle:.4g} s ({low:.4g}-{high:.4g})")
        if flops:
            cells.append(f"{flops / middle / 1e12:.0f} TFLOP/s")
        if flops and peak:
            cells.append(f"{flops / middle / peak:.0%} of the matrix product's")
    if len(times) == 2:
        ratios = [a / b for a, b in zip(*times.values(), strict=True)]
        cells.append(
            f"ours / peer {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f}-{max(ratios):.3f})"
        )
    return "  ".join(cells)


def main() -> None:
    """Runs the chosen benchmarks."""
    parser = argparse.ArgumentParser(
        description="Benchmarks jvdit against PyTorch on one GPU."
    )
    parser.add_argument(
        "cases",
        nargs="*",
        default=CASES,
        metavar="CASE",
        help=f"benchmarks to run (default: all): {', '.join(CASES)}",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="how often jvdit and the peer are timed in turn (default: 5)",
    )
    parser.add_argument(
        "--alone", action="store_true", help="time jvdit alone, without PyTorch"
    )
    parser.add_argument("--json", help="JSON file to write all measured times to")
    args = parser.parse_args()
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"no case {', '.join(unknown)}; there are: {', '.join(CASES)}")
    context = multiprocessing.get_context("spawn")
    pipes, rows, peak = {}, [], 0.0
    for side in ("ours",) if args.alone else SIDES:
        pipes[side], end = context.Pipe()
        work = context.Process(target=serve, args=(end, side, tuple(args.cases)))
        work.daemon = True
        work.start()
    packages = ("jax",) if args.alone else ("jax", "torch", "diffusers")
    print(*(f"{name} {importlib.metadata.version(name)}" for name in packages))
    for case in args.cases:
        answers = {side: pipe.recv() for side, pipe in pipes.items()}
        for side, answer in answers.items():
            print(f"{case:14}{side}: ready {answer}", flush=True)
        able = {s: pipes[s] for s, a in answers.items() if isinstance(a, tuple)}
        times = rounds_of(able, args.rounds)
        for pipe in able.values():
            pipe.send("next")
        flops = answers["ours"][1] if "ours" in able else 0.0
        if case == "matmul" and able:
            peak = flops / min(statistics.median(x) for x in times.values())
        print(told(case, times, flops, peak), flush=True)
        rows.append({"case": case, "seconds": times, "flops": flops})
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
