"""Lowers the programs of training and sampling for a TPU pod, without the pod.

They are the programs that run in earnest: the same training step and solver step, with
the same shardings. They are traced with shapes, so no data or weights are needed.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from jvdit import sharding
from jvdit.config import Config
from jvdit.data.items import Item
from jvdit.data.packing import pack_rows
from jvdit.diffusion.denoise import Guidance
from jvdit.diffusion.noise_path import NoisePath, TimestepPolicy
from jvdit.generation.sampling import Start, Stepper, start_noise
from jvdit.machine.chips import several
from jvdit.models import video_vae_chunked as chunked
from jvdit.models.backbones import Backbone
from jvdit.models.video_vae import VideoVAE
from jvdit.shapes import Text
from jvdit.tasks.flow_objective import flow_objective
from jvdit.training.objectives.denoising import FlowObjective
from jvdit.training.optim import Optim
from jvdit.training.state import TrainState, new_state, state_shardings
from jvdit.training.step import jit_train_step

# Solver steps in the sampling program: two, so that not only the first is counted.
SAMPLED = 2
# Keeps libtpu from looking for a TPU on this machine.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def pod_mesh(topology: str, sizes: dict[str, int], devices: int | None = None) -> Mesh:
    """Describes the mesh of one or more TPU slices, without the slices.

    Args:
        topology: the topology, as `machine.chips.topology` returns it, such as
            "2xv6e:8x8".
        sizes: sizes of the mesh axes, as for `make_mesh`.
        devices: how many devices to use; None: all.

    Raises:
        ModuleNotFoundError: libtpu, which holds the compiler, isn't installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "compiling for TPUs needs their compiler: pip install libtpu"
        )
    os.environ.update({k: v for k, v in _ALONE.items() if k not in os.environ})
    slices, name = several(topology)
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=name, num_slices=slices
    )
    return sharding.make_mesh(sizes, described.devices[:devices])


def _shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _key() -> Any:
    # Only its shape: a mesh of absent devices can hold no array.
    return jax.eval_shape(lambda: jax.random.key(0))


def packed_shapes(
    config: Config, rows: int, channels: int, text_width: int, sound_channels: int = 0
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch that `PackedBatches` builds.

    Args:
        config: from `jvdit.config.flow` or `wan`.
        rows: rows of the batch.
        channels: channels of a token: latent channels times the cells of a patch.
        text_width: width of cached text states; 0: the batch holds token ids.
        sound_channels: channels of a token of sound.
    """
    data = config.data
    text: dict[str, Any] = {"text_ids": np.zeros(0, np.int32)}
    if text_width:
        text = {"text_embeds": np.zeros((0, text_width), np.float32)}
    blank, position = (np.zeros((1, c), np.float32) for c in (channels, 3))
    item = Item(blank, position, **text)
    bounds = data.token_budget, data.text_budget, data.max_clips, data.sound_budget
    batch = pack_rows([[item]], *bounds, max(channels, sound_channels))
    batch.pop("clip_id")
    return {k: _shape(rows, *x.shape[1:], dtype=x.dtype) for k, x in batch.items()}


def train_program(
    config: Config,
    mesh: Mesh,
    rows: int,
    latent_channels: int,
    text_width: int,
    sound_channels: int = 0,
    frames: int = 0,
) -> tuple[Any, TrainState, TrainState]:
    """Lowers one training step of a DiT on full rows of latents.

    Args:
        config: from `jvdit.config.flow` or `wan`.
        mesh: device mesh, from `pod_mesh` or of real devices.
        rows: rows of the whole batch.
        latent_channels: latent channels of the autoencoder.
        text_width: width of cached text states; 0: the config's text encoder is trained
            along.
        sound_channels: latent channels of the audio autoencoder, of a config with a
            `sound_budget`.
        frames: of the one clip of each row, in tokens; 0: not known.

    Returns:
        The lowered program, the shapes of its training state, and their shardings.
    """
    pt, ph, pw = config.patch_size
    channels = latent_channels * pt * ph * pw
    sound_channels = sound_channels if config.data.sound_budget else 0
    batch = packed_shapes(config, rows, channels, text_width, sound_channels)
    one_clip = config.data.max_clips == 1 and not sound_channels
    optim = Optim(**config.optim.to_dict())
    with jax.set_mesh(mesh), jax.default_matmul_precision(config.matmul_precision):
        objective = flow_objective(
            config,
            mesh,
            channels=channels,
            text_width=text_width,
            vocab_size=config.vocab_size,
            one_clip=one_clip,
            sound_channels=sound_channels,
            frames=frames if one_clip else 0,
        )
        state, frozen = _state_shapes(objective, optim, config.steps, batch)
        shardings = state_shardings(state, mesh)
        step = jit_train_step(
            objective,
            optim,
            config.steps,
            config.seed,
            mesh=mesh,
            shardings=shardings,
            frozen=sharding.parameter_shardings(frozen, mesh),
            options=config.compiler_options,
        )
        return step.lower(state, batch, frozen), state, shardings


def _state_shapes(
    objective: FlowObjective, optim: Optim, steps: int, batch: Any
) -> tuple[TrainState, Any]:
    """The shapes of a training state, and of the parameters under its adapters."""
    frozen, optimizer = {}, optim.optimizer(steps)
    if objective.lora:
        adapted = dataclasses.replace(objective, lora=None)
        frozen = jax.eval_shape(adapted.init, _key(), batch)
    state = jax.eval_shape(
        lambda key, batch: new_state(objective.init(key, batch), optimizer),
        _key(),
        batch,
    )
    return state, frozen


def sample_program(
    module: Backbone,
    mesh: Mesh,
    rows: int,
    tokens: int,
    text_length: int,
    sounds: int = 0,
    frames: int = 0,
) -> Any:
    """Lowers `SAMPLED` solver steps with guidance, in the module's dtypes.

    Args:
        module: the network.
        mesh: device mesh, from `pod_mesh` or of real devices.
        rows: how many clips are denoised together; guidance doubles the rows.
        tokens: tokens of each clip.
        text_length: text states of each prompt.
        sounds: tokens of the sound of each clip; 0: they are silent.
        frames: of each clip, in tokens; 0: not known.

    Returns:
        The lowered program.
    """
    # Padded as by `batches_of`; padding is a segment of its own.
    ways = mesh.shape["context"]
    kinds = tuple(-(-n // ways) * ways for n in (tokens, sounds) if sounds)
    padding = -tokens % ways
    one_clip = not (padding or kinds)
    frames = frames if one_clip else 0
    how = NoisePath(), TimestepPolicy(), SAMPLED, "unipc"
    start = Start(*how, one_clip=one_clip, kinds=kinds, frames=frames)
    arrays = _row_shapes(module, rows, sum(kinds) or tokens + padding)
    with jax.set_mesh(mesh):
        params = jax.eval_shape(
            lambda key: module.init(key, *module.example_inputs())["params"], _key()
        )
        running = jax.eval_shape(
            lambda *x: start_noise(start, *x),
            arrays,
            _shape(rows, 4 if kinds else 2, dtype=jnp.uint32),
        )
        text = _text_shapes(module, rows, text_length, one_clip)
        places = sharding.replicated(mesh), sharding.rows_sharding(mesh, rows)

        def by_row(shape: Any) -> Any:
            return _placed(shape, places[shape.shape[:1] == (rows,)])

        return Stepper(module, NoisePath()).lower(
            {"params": _divided(params, mesh)},
            jax.tree.map(by_row, running),
            jax.tree.map(by_row, (text, text)),
            solver="unipc",
            guidance=Guidance(5.0),
            count=SAMPLED,
            skips=None,
        )


def _row_shapes(
    module: Backbone, rows: int, tokens: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what a sampler's rows hold of each token."""
    wide = max(module.in_channels, module.sound_channels)
    widths = {"latents": wide, "position": 3}
    widths |= {"cond": module.cond_channels, "control": module.control_channels}
    row = rows, tokens
    arrays = {name: _shape(*row, width) for name, width in widths.items() if width}
    numbers = {name: _shape(*row, dtype=jnp.int32) for name in ("segment", "level")}
    return arrays | numbers


def _text_shapes(module: Backbone, rows: int, length: int, one_clip: bool) -> Any:
    """The shapes of the text of a sampler's rows, and of the picture beside it."""
    image = None
    if module.image_width:
        image = _shape(rows, module.image_length or 257, module.image_width)
    clips = None if one_clip else _shape(rows, length, dtype=jnp.int32)
    states = _shape(rows, length, module.text_width)
    return jax.eval_shape(Text, states, clips, image)


def vae_program(vae: VideoVAE, mesh: Mesh, clip: Sequence[int], step: str) -> Any:
    """Lowers the encoding or decoding of one piece in the middle of a video.

    Args:
        vae: the autoencoder.
        mesh: device mesh, from `autoencoder_mesh`.
        clip: frames, height and width of the whole video in pixels.
        step: "encode" or "decode".

    Returns:
        The lowered program, and how many such pieces follow the first frame.

    Raises:
        ValueError: the sizes are not whole numbers of latents.
    """
    frames, *latent = vae.latent_shape(*clip)
    with jax.set_mesh(mesh):
        program, at_a_time = chunked.encode_step, chunked.at_once(1, frames - 1)
        shape = at_a_time * vae.temporal_compression, *clip[1:], 3
        if step == "decode":
            program = chunked.decode_step
            at_a_time = chunked.decoded_at_once(vae, frames, *latent)
            shape = at_a_time, *latent, vae.latent_channels
        small = _shape(1, 1, *(vae.spatial_compression,) * 2, 3)
        params = jax.eval_shape(lambda *x: vae.init(*x)["params"], _key(), small)
        _, cache = jax.eval_shape(
            lambda *x: program(vae, *x, {}), params, _shape(1, 1, *shape[1:])
        )

        def divided(x: Any) -> Any:
            spec = sharding.activation_spec(*sharding.frame_axes(x))
            spec = sharding.fit(spec, x.shape, mesh.shape)
            return _placed(x, NamedSharding(mesh, spec))

        params = _divided(params, mesh)
        piece = _placed(_shape(1, *shape), sharding.replicated(mesh))
        lowered = program.lower(vae, params, piece, jax.tree.map(divided, cache))
    return lowered, -(-(frames - 1) // at_a_time)


def _divided(params: Any, mesh: Mesh) -> Any:
    return jax.tree.map(_placed, params, sharding.parameter_shardings(params, mesh))


def _placed(shape: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)
