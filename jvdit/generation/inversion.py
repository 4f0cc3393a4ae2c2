"""Inversion: the noise from which a network would have made a clip."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from jvdit.data.conditions.known import to_pixels
from jvdit.diffusion.denoise import Guidance
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request


def inverted(
    generator: Generator,
    videos: Sequence[UInt8[np.ndarray, "T H W 3"]],
    prompts: Sequence[str],
    fps: float,
    *,
    steps: int = 50,
    refine: int = 3,
    rows: int = 8,
) -> list[Float[np.ndarray, "f h w c"]]:
    """Encodes clips, and solves the ODE of the network from t = 0 to t = 1.

    Its solution isn't exact: the steps are finite, and guidance is left out.

    Args:
        generator: of the network.
        videos: the pictures of the clips, of sizes that it could have made.
        prompts: of each, or "".
        fps: their frames per second.
        steps: of Euler's method.
        refine: how often latents are corrected until they are encoded as the clip is
            after they were decoded: what the encoder alone leaves is too rough.
        rows: how many rows of packed clips to solve together.

    Raises:
        ValueError: the network makes no clips of such a size.
    """
    requests = [
        Request(prompt, "", *video.shape[:3], fps=fps, sound=False)
        for video, prompt in zip(videos, prompts, strict=True)
    ]
    for request in requests:
        generator.check(request)
    codec, latents = generator.codec, []
    for video in videos:
        wanted = found = codec.encode(to_pixels(video))
        for _ in range(refine):
            (back,) = codec.decode(found[None])
            found = found + wanted - codec.encode(to_pixels(back))
        latents.append(found)
    how = {"solver": "euler", "steps": steps, "rows": rows, "guidance": Guidance()}
    return generator.latents(requests, noise=latents, rising=True, **how)
