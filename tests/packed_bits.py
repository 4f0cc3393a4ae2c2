"""Denoises clips alone and among others, and compares their bits: a process of its own.

XLA's old emitters, which tests take because they compile sooner, add in an order that
depends on the place; those that users have don't.
"""

import dataclasses

import jax
import numpy as np

from jvdit.generation.generator import Generator
from jvdit.generation.request import Request
from jvdit.serving.packed import Packed
from jvdit.sharding import make_mesh

PROMPT = "one object: a small red circle."


def rows(**sizes):
    """Rows of the model in the box, on one device."""
    generator = Generator.load(mesh=make_mesh(devices=jax.devices()[:1]))
    return Packed(
        generator, **{"tokens": 208, "rows": 1, "clips": 4, "steps": 20} | sizes
    )


def order(packed, seed, steps, scale=2.0, **fields):
    """A request, and how to denoise it."""
    request = packed.generator.complete(Request(PROMPT, seed=seed, **fields))
    how = dataclasses.replace(packed.settings, steps=steps, guidance_scale=scale)
    return request, how


def run(packed, orders, arrivals):
    """Latents of each, which come at these steps, and wait until there is room."""
    found, running, step = {}, {}, 0
    waiting = [*zip(arrivals, range(len(orders)), strict=True)]
    while waiting or running:
        for when, i in [*waiting]:
            slot = packed.find(packed.counts(orders[i][0]))
            if when <= step and slot is not None:
                running[i] = packed.enter(*orders[i], slot)
                waiting.remove((when, i))
        for clip in packed.step():
            (i,) = [i for i, other in running.items() if other is clip]
            found[i] = packed.latents(clip).picture
            packed.leave(running.pop(i))
        step += 1
    return found


def main():
    """Compares, and prints how many programs were compiled in between."""
    packed, compiled = rows(), []
    assert packed.warm_up(), "the check at the start of a server found other bits"
    picture = np.full((32, 32, 3), 90, np.uint8)
    for frames in (1, 5):  # the encoder is compiled for each size
        packed.generator.codec.encode(np.zeros((frames, 32, 32, 3), np.float32))
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "compile" in event else None
    )
    wanted = [
        order(packed, 3, 5, image=picture),
        order(packed, 4, 4, 1.0),
        # With 32 and with 48 tokens beside the clip's 80.
        order(packed, 6, 3, keyframes=((0.5, picture),), last_image=picture),
        order(packed, 7, 3, interpolate=np.stack([picture] * 5)),
    ]
    alone = [run(packed, [each], [0])[0] for each in wanted]
    assert not np.array_equal(*alone[:2])
    others = [
        order(packed, 1, 6, 3.0, frames=1),
        order(packed, 2, 2, 1.0, frames=3, height=24, width=16),
        order(packed, 5, 3, height=16, width=16),
    ]
    for arrivals in [0, 0, 1, 0, 2, 0, 1], [1, 3, 0, 2, 0, 1, 0]:
        among = run(packed, [*others, *wanted], arrivals)
        for i, lone in enumerate(alone):
            np.testing.assert_array_equal(among[3 + i], lone)
    print("the same bits", len(compiled), "compiled", set(compiled))


if __name__ == "__main__":
    main()
