"""The model that a DiT training produces, as a `Bundle` and as files."""

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
from jvdit.weights.bundle import Bundle, save_bundle
from jvdit.weights.encoders import CaptionEncoder
from jvdit.weights.folders import save_dit
from jvdit.weights.parameters import Network
from jvdit.weights.release import is_release, read_release

# Fields of the config's `sample` that aren't defaults of the finished model.
_OF_TRAINING = ("prompts", "scored", "pictures")


@dataclasses.dataclass(frozen=True)
class FlowModel:
    """Builds and saves the model that a training produces.

    Attributes:
        config: the training's config.
        objective: the training's objective.
        vae: the autoencoder of the latents.
        captions: encoder of the cached text states; None: one is trained along.
        tokenizer: tokenizer of the captions.
        frozen: parameters that aren't trained, by network.
        pictures: a model that generates the images of drafts; None: this one does.
    """

    config: Config
    objective: FlowObjective
    vae: Network
    captions: CaptionEncoder | None
    tokenizer: Tokenizer
    frozen: Mapping[str, Any]
    pictures: Bundle | None

    def bundle(self, params: Mapping[str, Any]) -> Bundle:
        """The model with given parameters of the trained networks, by network name."""
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
        """Writes the finished model; only process 0 writes, but every one must call.

        LoRA adapters, and a finetuned network of a released model, are written by
        themselves in diffusers' format; otherwise the folder holds the whole model.

        Args:
            params: parameters of the trained networks, by network name.
            folder: where to write.
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
