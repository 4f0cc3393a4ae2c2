"""What becomes of long films of the procedural world, read by its oracle.

    python tools/film_drift.py --workdir M --split single --frames 400 --n 4

Makes films of the split's first prompts, window after window, and prints the oracle's
scores of every two seconds (averaged over the films, and over quarters of their time),
what drifts in a second (slopes of logarithms: 0 at best), after how many seconds the
last film's first frames were there and how many followed in a second, how many programs
were compiled on the way, and the most memory that the process has held.
"""

import resource
import time
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags

from jvdit.data.world import World
from jvdit.evaluation.long_clips import drifts, windows
from jvdit.generation.films import Film, make_film
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request
from jvdit.generation.settings import Settings
from jvdit.machine import flag_parser
from jvdit.machine.command import refuse_arguments, told_in_a_line
from jvdit.machine.compilation import keep_compilations
from jvdit.machine.progress import Bars

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the model.")
_SPLIT = flags.DEFINE_string("split", "single", "Split of the world.")
_SEED = flags.DEFINE_integer("seed", 1, "World seed; training has 0.")
_FRAMES = flags.DEFINE_integer("frames", 400, "Frames of a film.", lower_bound=32)
_N = flags.DEFINE_integer("n", 4, "Films.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", None, "Solver steps (default: the model's).")
_CARRY = flags.DEFINE_integer("carry", None, "Latent frames carried (default: half).")
_QUARTERS = 4


def films(generator: Generator, world: World) -> tuple[np.ndarray, np.ndarray | None]:
    """The films, and their sound if they have some."""
    videos, sounds = [], []
    captions = world.captions(np.arange(_N.value))
    with Bars() as bars:
        task = bars.add_task("frames", total=_N.value * world.frames)
        for i, caption in enumerate(captions):
            film = Film(Request(caption, seed=i), world.frames, carry=_CARRY.value)
            pieces, times = [], [time.perf_counter()]
            for piece in make_film(generator, film, Settings(steps=_STEPS.value)):
                bars.update(task, completed=i * world.frames + piece.done)
                pieces.append(piece)
                times.append(time.perf_counter())
            videos.append(np.concatenate([x.video for x in pieces]))
            heard = [x.audio for x in pieces if x.audio is not None]
            if heard:
                sounds.append(np.concatenate(heard)[:, 0])
    later = (world.frames - len(pieces[0].video)) / (times[-1] - times[1])
    print(f"first frames after {times[1] - times[0]:.2f} s, then {later:.1f} a second")
    return np.stack(videos), np.stack(sounds) if sounds else None


def main(argv: Sequence[str]) -> None:
    """Prints the scores."""
    refuse_arguments(argv)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: (
            compiled.append(name) if name.endswith("backend_compile_duration") else None
        )
    )
    with told_in_a_line("stopped"):
        keep_compilations()
        generator = Generator.load(_WORKDIR.value)
        usual = generator.complete(Request(""))
        _, height, width = usual.size
        fps = float(usual.fps or 1.0)
        split, seed = _SPLIT.value, _SEED.value
        world = World(split, seed, _FRAMES.value, height, width, fps=fps)
        videos, sound = films(generator, world)
        scenes = world.scenes(np.arange(len(videos)))
        found = windows(videos, scenes, fps)
        names = list(found[0])
        print("quarter  " + "".join(f"{name:>10}" for name in names))
        for number, part in enumerate(np.array_split(np.arange(len(found)), _QUARTERS)):
            means = [np.nanmean([found[i][name] for i in part]) for name in names]
            print(f"{number + 1:7}  " + "".join(f"{x:10.2f}" for x in means))
        rate = generator.model.audio_vae.sample_rate if sound is not None else 16_000
        for name, values in drifts(videos, scenes, fps, sound, rate).items():
            print(f"{name}: {np.nanmean(values):+.4f}")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{len(compiled)} programs compiled, {peak:.0f} MB at the most")


if __name__ == "__main__":
    flag_parser.run(main, "workdir")
