"""Encodes a data set to latents: `python -m jvdit.encode --source … --vae … --out …`.

What is written is a data set of the same record format; see `jvdit.tasks.encoding`.
Several hosts that are started with the same command share the work out. Killed and
started again, encoding goes on after its last finished shards.
"""

from jvdit.machine.huge_pages import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()  # begins this process anew, so before what takes seconds


from absl import flags

from jvdit.data.conditions.beside import VIEWS
from jvdit.machine import cluster, flag_parser
from jvdit.machine.command import refuse_arguments, told_in_a_line
from jvdit.machine.compilation import keep_compilations
from jvdit.machine.stop import StopRequest
from jvdit.tasks.encoding import SHARD, encode

_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "Clips to encode, as in a config's data.sources: world:SPLIT:TxHxW@FPS:CLIPS, "
    "tfds:NAME#SPLIT, or the folder of a prepared data set.",
)
_VALIDATION = flags.DEFINE_string(
    "validation", "", "Clips that become the split val, written like --source."
)
_VAE = flags.DEFINE_string(
    "vae", None, "Folder of the autoencoder: of its training, or of a released model."
)
_AUDIO_VAE = flags.DEFINE_string(
    "audio_vae", "", "Folder of the audio autoencoder: encodes the sound too."
)
_OUT = flags.DEFINE_string("out", None, "Folder that the latents are written to.")
_TEXT_ENCODER = flags.DEFINE_string(
    "text_encoder",
    "",
    "Folder of a text encoder, of a training or a released model: encodes the captions "
    "too.",
)
_TEXT_LENGTH = flags.DEFINE_integer(
    "text_length", 64, "Tokens of a caption at the most; longer ones are cut."
)
_SHARD = flags.DEFINE_integer(
    "shard", SHARD, "Clips of a file: what is done again after a kill."
)
_FOR = flags.DEFINE_string(
    "for", "", "Config that the latents are for: refuse sizes it doesn't take."
)
_VIEWS = flags.DEFINE_list(
    "views",
    [],
    f"What else to encode of each clip, for conditions to train: {', '.join(VIEWS)}. "
    "The guide and the camera of a clip lie beside it, see tools/prepare_clips.py.",
)
_connect = cluster.define_flags()
flags.adopt_module_key_flags(cluster)


def main(argv: list[str]) -> None:
    """Parses, encodes, and turns mistakes of the user into one line."""
    refuse_arguments(argv)
    with told_in_a_line("stopped; the same command goes on"):
        _connect()
        keep_compilations()
        with StopRequest() as stop, stop.apart():
            encode(
                _SOURCE.value,
                _VAE.value,
                _OUT.value,
                _VALIDATION.value,
                _TEXT_ENCODER.value,
                _TEXT_LENGTH.value,
                _AUDIO_VAE.value,
                _SHARD.value,
                _FOR.value,
                _VIEWS.value,
            )
    print(f"latents: {_OUT.value}")


if __name__ == "__main__":
    flag_parser.run(main, "source", "vae", "out")
