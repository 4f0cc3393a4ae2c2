"""What a training of a DiT makes: a model as a bundle, and as files."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from jvdit.config import Config
from jvdit.data.tokenizer import Tokenizer
from jvdit.machine.cluster import is_lead, to_host
from jvdit.training.objectives.denoising import FlowObjective
from jvdit.weights import wan
from jvdit.weights.adapters import write_lora
from jvdit.weights.bundle import Bundle
from jvdit.weights.caption_encoder import CaptionEncoder
from jvdit.weights.folders import save_dit
from jvdit.weights.model_folder import save_bundle
from jvdit.weights.network import Network
from jvdit.weights.release import is_release, read_release

# Of the config's `sample`, what a finished model has no use for.
_OF_TRAINING = ("prompts", "scored", "pictures")


@dataclasses.dataclass(frozen=True)
class FlowModel:
    """The model that a training is about.

    Attributes:
        config: of the training.
        objective: of the same.
        vae: the autoencoder of its latents.
        captions: what encoded its captions; None: an encoder is trained along.
        tokenizer: of the captions.
        frozen: parameters that stay as they are, by network.
        pictures: a model that draws the pictures of drafts; None: this one.
    """

    config: Config
    objective: FlowObjective
    vae: Network
    captions: CaptionEncoder | None
    tokenizer: Tokenizer
    frozen: Mapping[str, Any]
    pictures: Bundle | None

    def bundle(self, params: Mapping[str, Any]) -> Bundle:
        """The model with such parameters of what is trained, by network."""
        objective, config = self.objective, self.config
        trees = {**self.frozen, **params}
        if self.captions is not None:
            text_encoder = self.captions.network
        else:
            trained = trees.get("text_encoder")
            text_encoder = Network(objective.text_encoder, trained)
        networks = {
            name: Network(objective.dit, trees.get(name))
            for name in ("dit", "dit_low")[: 2 if objective.boundary else 1]
        }
        return Bundle(
            networks={**networks, "text_encoder": text_encoder, "vae": self.vae},
            tokenizer=self.tokenizer,
            path=objective.path,
            policy=objective.policy,
            patch_size=tuple(config.patch_size),
            text_length=config.data.text_length,
            conditions=objective.conditions,
            **config.conventions.to_dict(),
            boundary=objective.boundary,
            defaults={k: v for k, v in config.sample.items() if k not in _OF_TRAINING},
            adapters=self._adapters(params),
            text_release=self.captions.release if self.captions else "",
            pictures=self.pictures,
        )

    def _adapters(self, params: Mapping[str, Any]) -> dict[str, Any]:
        lora = self.objective.lora
        if lora is None or "lora" not in params:
            return {}
        return {"dit": lora.active(params["lora"], training=False)}

    def save(self, params: Mapping[str, Any], folder: pathlib.Path) -> None:
        """Writes a finished model.

        Adapters, and a network of a released model, are written alone, as diffusers
        reads them.
        """
        params, config = to_host(params), self.config
        start, dit = config.start_from, self.objective.dit
        if not is_lead():
            return
        if self.objective.lora:
            write_lora(folder, self._adapters(params)["dit"], wan.dit_rules())
        elif start and is_release(start):
            expert, parts = config.expert, read_release(start).parts
            for name in ("dit", "dit_low") if expert == "both" else ("dit",):
                like = parts[name if expert == "both" else expert]
                save_dit(folder / like.name, params[name], dit, like)
        else:
            save_bundle(folder, self.bundle(params))
