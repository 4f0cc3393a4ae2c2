"""A finished model as one object; `opening.py` reads one from a folder."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jvdit.data.conditions import check_conditions, check_given
from jvdit.data.tokenizer import Tokenizer
from jvdit.diffusion.noise_path import NoisePath, TimestepPolicy
from jvdit.models.backbones import Backbone
from jvdit.models.image_encoder import ImageEncoder
from jvdit.models.text_encoder import TextEncoder
from jvdit.models.video_vae import VideoVAE
from jvdit.weights.network import Network


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """A finished model: its networks, and all settings needed to use them.

    Attributes:
        networks: networks by name: "dit", "text_encoder" and "vae", which holds the
            statistics of its latents. A model with two experts has "dit" for high noise
            and "dit_low" for t below `boundary`; one whose tokens attend to an image
            has an "image_encoder".
        tokenizer: tokenizer of the prompts.
        path, policy: noise path and timesteps that the network was trained with.
        patch_size: latent frames, height and width of a token.
        text_length: most tokens of a prompt; longer prompts are cut.
        conditions: what a request may give besides its prompt, names in `CONDITIONS`.
        seconds: RoPE positions in time count seconds. False: latent frames, as in Wan.
        pad_text: every token attends to `text_length` text states, zeros past the end
            of the prompt, as in Wan. False: to those of the prompt alone.
        boundary: time t below which "dit_low" takes over; 0: there is one network.
        defaults: the model's defaults for fields of `Request` and `Settings`.
        adapters: LoRA adapters of "dit" and "dit_low", with their scale multiplied in.
        text_release: folder of the released model whose text encoder this is, or "".
        sources: names of what the model was trained on, as far as it is known.
        pictures: a model that generates the images of drafts; None: this one does.

    Raises:
        ValueError: a condition is unknown.
    """

    networks: Mapping[str, Network]
    tokenizer: Tokenizer
    path: NoisePath
    policy: TimestepPolicy
    patch_size: tuple[int, int, int]
    text_length: int
    conditions: tuple[str, ...] = ()
    seconds: bool = True
    pad_text: bool = False
    boundary: float = 0.0
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adapters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text_release: str = ""
    sources: tuple[str, ...] = ()
    pictures: "Bundle | None" = None

    def __post_init__(self):
        check_conditions(self.conditions)

    @property
    def dit(self) -> Backbone:
        """The backbone, which denoises; with two experts, that for high noise."""
        return self.networks["dit"].module

    @property
    def vae(self) -> VideoVAE:
        """The video autoencoder."""
        return self.networks["vae"].module

    @property
    def text_encoder(self) -> TextEncoder:
        """The text encoder."""
        return self.networks["text_encoder"].module

    @property
    def image_encoder(self) -> ImageEncoder | None:
        """The image encoder, or None if the tokens attend to no image."""
        network = self.networks.get("image_encoder")
        return None if network is None else network.module

    @property
    def num_bytes(self) -> int:
        """Bytes of all parameters that are read from files when they are needed."""
        return sum(network.num_bytes for network in self.networks.values())

    def with_params(self, params: Mapping[str, Any]) -> "Bundle":
        """A copy of the model with other parameters for some networks, by name."""
        changed = {
            name: dataclasses.replace(self.networks[name], source=source, num_bytes=0)
            for name, source in params.items()
        }
        return dataclasses.replace(self, networks={**self.networks, **changed})

    def check_given(self, given: Sequence[str]) -> None:
        """Raises a ValueError if the model doesn't take these fields of a request."""
        check_given(self.conditions, given)

    def check_draft(self) -> None:
        """Raises a ValueError unless a first frame may, but need not, be given."""
        if "first_frame" not in self.conditions:
            raise ValueError(
                "`draft` needs a model that may, but need not, be given a first frame; "
                "one that is trained with config.first_frame."
            )
