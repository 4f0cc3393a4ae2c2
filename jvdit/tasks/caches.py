"""The encoders that made a cache of latents; refuses stale or mixed caches."""

from collections.abc import Sequence

from jvdit.config import Config
from jvdit.data.latent_source import LatentSource
from jvdit.data.sources import source_folder
from jvdit.machine.json_files import differences
from jvdit.models.audio_vae import AudioVAE
from jvdit.models.video_vae import VideoVAE
from jvdit.weights.encoders import CaptionEncoder
from jvdit.weights.parameters import Network, load_network, load_weights, weights_hash


def cached_autoencoder(
    config: Config, sources: Sequence[LatentSource]
) -> tuple[Network, str]:
    """Loads the autoencoder that encoded the training's latents.

    Args:
        config: the training's config; `autoencoder` names the one it expects, if any.
        sources: the opened `data.sources`.

    Returns:
        The autoencoder, and the hash of its weights.

    Raises:
        ValueError: the sources were encoded by different autoencoders, or by another
            than `config.autoencoder`.
    """
    first, held = config.data.sources[0], sources[0].settings["vae"]
    for name, source in zip(config.data.sources, sources, strict=True):
        if differing := differences(held, source.settings["vae"]):
            raise ValueError(
                f"the latents of {first} and {name} come "
                f"from two autoencoders: {'; '.join(differing)}. Encode one anew."
            )
    network = load_network(source_folder(first) / "vae", VideoVAE)
    if config.autoencoder:
        ours, _ = load_weights(config.autoencoder)
        asked = {"hash": weights_hash(ours)}
        if differing := differences({"hash": held["hash"]}, asked):
            raise ValueError(
                f"the latent cache {first} is stale: it was "
                f"encoded by another autoencoder than {config.autoencoder} "
                f"({'; '.join(differing)}). Encode it anew with "
                f"python -m jvdit.encode --vae {config.autoencoder}."
            )
    return network, held["hash"]


def cached_audio(config: Config, sources: Sequence[LatentSource]) -> Network:
    """Loads the audio autoencoder that encoded the sound of the training's latents.

    Sources without sound may lie beside those that have some.

    Args:
        config: the training's config.
        sources: the opened `data.sources`.

    Raises:
        ValueError: no source has sound, or autoencoders differ.
    """
    named = zip(config.data.sources, sources, strict=True)
    heard = {name: x.settings.get("audio_vae") for name, x in named}
    heard = {name: held for name, held in heard.items() if held}
    if not heard:
        raise ValueError(
            f"`data.sound_budget` (={config.data.sound_budget}) asks for sound, and "
            f"none of {', '.join(config.data.sources)} has any: encode them with "
            "--audio_vae, or set it to 0."
        )
    first = next(iter(heard))
    for name, held in heard.items():
        if differing := differences(heard[first], held):
            raise ValueError(
                f"the sounds of {first} and {name} come from two autoencoders: "
                f"{'; '.join(differing)}. Encode one anew."
            )
    folder = source_folder(first) / "audio_vae"
    return load_network(folder, AudioVAE)


def cached_captions(
    config: Config, sources: Sequence[LatentSource]
) -> CaptionEncoder | None:
    """Loads the text encoder that encoded the captions of the training's latents.

    Args:
        config: the training's config.
        sources: the opened `data.sources`.

    Returns:
        The encoder; None if the training trains a text encoder of its own.

    Raises:
        ValueError: the sources hold no text states, or states of different encoders.
    """
    if config.text_encoder:
        return None
    names, found = config.data.sources, [x.settings.get("text") for x in sources]
    for name, settings in zip(names, found, strict=True):
        if settings is None:
            raise ValueError(
                f"`text_encoder` is empty but the latents {name} hold no states of "
                "their captions; encode them with --text_encoder, or give the "
                "sizes of a text encoder to train."
            )
        if differing := differences(found[0], settings):
            raise ValueError(
                f"the captions of {names[0]} and {name} were encoded differently: "
                f"{'; '.join(differing)}. Encode one anew."
            )
    return CaptionEncoder.load(str(source_folder(names[0])))
