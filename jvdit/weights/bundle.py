"""A finished model as one object; `opening.py` makes one of a folder."""

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
    """A model with everything that sampling, encoding and training ask of it.

    Attributes:
        networks: by name: "dit", "text_encoder", "vae"; with two experts "dit" works at
            high noise and "dit_low" below `boundary`; "image_encoder", of pictures to
            which the tokens attend. `vae` knows the statistics of its latents.
        tokenizer: of the prompts.
        path, policy: on which the network was trained.
        patch_size: latent frames, height and width of a token.
        text_length: tokens of a prompt at the most; longer ones are cut.
        conditions: what may be known of a clip besides its text, of `CONDITIONS`.
        seconds: positions in time count seconds; False: latent frames, as Wan's.
        pad_text: every token sees `text_length` text states, zero past the end of the
            prompt, as Wan's; False: the states of the prompt alone.
        boundary: time below which "dit_low" takes over; 0: there is one network.
        defaults: fields of a request and of its settings that suit the model.
        adapters: LoRA of "dit" and "dit_low", at their strength.
        text_release: folder of the released model that has this text encoder, or "".
        pictures: a model that draws the pictures of drafts; None: this one does.

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
    pictures: "Bundle | None" = None

    def __post_init__(self):
        check_conditions(self.conditions)

    @property
    def dit(self) -> Backbone:
        """The network that denoises."""
        return self.networks["dit"].module

    @property
    def vae(self) -> VideoVAE:
        """The autoencoder."""
        return self.networks["vae"].module

    @property
    def text_encoder(self) -> TextEncoder:
        """The encoder of prompts."""
        return self.networks["text_encoder"].module

    @property
    def image_encoder(self) -> ImageEncoder | None:
        """The encoder of pictures to which the tokens attend, if they do."""
        network = self.networks.get("image_encoder")
        return None if network is None else network.module

    @property
    def num_bytes(self) -> int:
        """Of all parameters that are read when they are asked for."""
        return sum(network.num_bytes for network in self.networks.values())

    def with_params(self, params: Mapping[str, Any]) -> "Bundle":
        """The model with other parameters of some networks, by name."""
        changed = {
            name: dataclasses.replace(self.networks[name], source=source, num_bytes=0)
            for name, source in params.items()
        }
        return dataclasses.replace(self, networks={**self.networks, **changed})

    def check_given(self, given: Sequence[str]) -> None:
        """Raises ValueError if the model doesn't take these pictures of a request."""
        check_given(self.conditions, given)

    def check_draft(self) -> None:
        """Raises ValueError if the model can't go on from a picture."""
        if "first_frame" not in self.conditions:
            raise ValueError(
                "`draft` needs a model that may, but need not, be given a first frame; "
                "one that is trained with config.first_frame."
            )
