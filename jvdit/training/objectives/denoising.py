"""The denoising objective: the loss of a backbone on packed latents.

That of the video autoencoder is in `autoencoding.py`; both follow `step.Objective`.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jvdit.data.conditions import CONDITIONS
from jvdit.data.items import KINDS
from jvdit.diffusion.denoise import denoise
from jvdit.diffusion.noise_path import NoisePath, TimestepPolicy
from jvdit.models.attention.patterns import places
from jvdit.models.backbones import Backbone
from jvdit.models.kinds import side_by_side
from jvdit.models.lora import LoRA
from jvdit.models.text_encoder import TextEncoder
from jvdit.shapes import Text, Tokens, apart
from jvdit.training.objectives.forcing import Forcing
from jvdit.training.objectives.pairings import paired
from jvdit.training.step import Batch, Metrics

BUCKETS = 5  # equal intervals of t in [0, 1], each with its own loss metric


def text_of(text_encoder: TextEncoder | None, params: Any, batch: Batch) -> Text:
    """The text states of a packed batch: from a trained encoder, or cached.

    Args:
        text_encoder: the encoder that is trained along; None: the batch holds cached
            `text_embeds`.
        params: parameters by network.
        batch: a packed batch.
    """
    if text_encoder is None:
        embeds = batch["text_embeds"]
    else:
        ids = batch["text_ids"], batch["text_segment"]
        embeds = text_encoder.apply({"params": params["text_encoder"]}, *ids)
    return Text(embeds, batch["text_segment"])


def generated(batch: Batch) -> Bool[Array, "b n"]:
    """Which tokens are generated, so neither padding nor given."""
    # Of each kind, of which the first is clean; chunks may have some of their own.
    levels = batch.get("t", batch["valid"]).shape[-1] + 1
    return batch["level"] % levels > 0


def clip_sizes(batch: Batch) -> Float[Array, "b m"]:
    """How many tokens each clip of each row has; 0 for an empty slot."""
    clips = batch["valid"].shape[1]
    member = jax.nn.one_hot(batch["segment"], clips + 1)
    return member.sum(1)[:, 1:]


@dataclasses.dataclass(frozen=True)
class FlowObjective:
    """Trains a backbone, and optionally a text encoder, to denoise packed latents.

    The loss is the squared error of the velocity (Eq. 14 of arXiv:2210.02747 for the
    flow path), weighted to equal the squared error of the path's target, and averaged
    over tokens. Each clip has its own timestep; given tokens are clean and have no
    loss.

    Attributes:
        dit: the backbone.
        text_encoder: a text encoder that is trained along; None: batches hold cached
            `text_embeds`.
        path: the noise path, and what the network predicts on it.
        policy: the distribution of training timesteps.
        one_clip: every row is exactly one clip without padding, so no mask is needed.
        pad_text: tokens attend to all text states of their clip, padding included, as
            Wan's do.
        boundary: with two experts, "dit" is trained at t above this and "dit_low"
            below, on the first and the second half of a batch's rows. 0: one network.
        given: the conditions that clips are trained with, names in `CONDITIONS`.
        given_noise: time t at which given tokens are in truth, for which the network is
            told 0 (noise augmentation, arXiv:2106.15282).
        lora: LoRA adapters of `dit` to train; everything else is then frozen. None: the
            networks themselves are trained.
        kinds: how many tokens of a row are of each kind; (): there are pictures alone.
        pairings: shares of the rows of `PAIRINGS`, by name, for clips with sound.
        cut: share of those clips in which picture and sound don't see one another.
        sound_weight: weight of the sound's mean error beside the picture's.
        frames: of every row, if it is one grid, see `Tokens`; 0: rows aren't so.
        forcing: whether chunks of clips have levels of their own.
    """

    dit: Backbone
    text_encoder: TextEncoder | None
    path: NoisePath
    policy: TimestepPolicy
    one_clip: bool = False
    pad_text: bool = False
    boundary: float = 0.0
    given: tuple[str, ...] = ()
    given_noise: float = 0.0
    lora: LoRA | None = None
    kinds: tuple[int, ...] = ()
    pairings: tuple[tuple[str, float], ...] = ()
    cut: float = 0.0
    sound_weight: float = 1.0
    frames: int = 0
    forcing: Forcing = Forcing()

    def init(self, key: PRNGKeyArray, batch: Batch) -> Any:
        """Initialises the parameters by network: "dit", "text_encoder", "dit_low".

        With LoRA, those of the adapters alone: {"lora": ...}.
        """
        keys = jax.random.split(key, 3)
        batch = {name: value[:1] for name, value in batch.items()}
        params = {}
        if self.text_encoder is not None:
            ids, segment = batch["text_ids"], batch["text_segment"]
            made = self.text_encoder.init(keys[0], ids, segment)
            params["text_encoder"] = made["params"]
        text = self._text(params, batch)
        tokens = self._tokens(batch, batch["latents"])
        levels = (batch["valid"].shape[1] + 1) * (len(self.kinds) or 1)
        t = jnp.zeros((1, 1 if tokens.level is None else levels))
        params["dit"] = self.dit.init(keys[1], tokens, t, text)["params"]
        if self.lora is not None:
            return {"lora": self.lora.init(keys[1], params["dit"])}
        if self.boundary:
            params["dit_low"] = self.dit.init(keys[2], tokens, t, text)["params"]
        return params

    @property
    def conditions(self) -> tuple[str, ...]:
        """The conditions that the network is trained with, names in `CONDITIONS`."""
        shares = self.pairings if self.kinds else ()
        pairs = tuple(x for x, share in shares if share and x in CONDITIONS)
        return self.given + pairs + ("stream",) * bool(self.forcing.share)

    def flops(self, tokens: int, text: int, frames: int = 0) -> int:
        """FLOPs of one row in a training step, forward and backward.

        Args:
            tokens: tokens of a row.
            text: text states of a row.
            frames: of a clip, in tokens.
        """
        trained = "adapters" if self.lora else "weights"
        return self.dit.flops(tokens, text, trained, frames)

    def prepare(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        """Draws a timestep for each clip, and a key for each row."""
        time_key, row_key = jax.random.split(key)
        rows = jax.random.split(row_key, len(batch["segment"]))
        if self.kinds:
            return {**self._paired(batch, time_key), "key": rows}
        sizes = jnp.maximum(clip_sizes(batch), 1)
        t = self.policy.sample(time_key, sizes)
        if self.boundary:
            spans = (self.boundary, 1.0), (0.0, self.boundary)
            parts = zip(
                spans, jax.random.split(time_key), jnp.split(sizes, 2), strict=True
            )
            halves = [
                dataclasses.replace(self.policy, span=span).sample(each, half)
                for span, each, half in parts
            ]
            t = jnp.concatenate(halves)
        if self.forcing.share:
            tokens = self._tokens(batch, batch["latents"])
            chunk = places(tokens).frame // self.dit.chunk_frames
            key = jax.random.fold_in(key, 1)
            batch = self.forcing.forced(batch, key, self.policy, chunk, t)
            return {**batch, "key": rows}
        return {**batch, "t": t, "key": rows}

    def _paired(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        """Draws what is learned of each clip of two kinds, and weighs the kinds."""
        batch = paired(batch, key, dict(self.pairings), self.policy, self.kinds)
        shape = batch["valid"].shape
        if self.cut:
            chosen = jax.random.bernoulli(jax.random.fold_in(key, 1), self.cut, shape)
            batch["cut"] = chosen
        # So that the mean over all tokens becomes the sum of the kinds' own means.
        counts = jnp.stack([x.sum() for x in self._parts(generated(batch))])
        weight = counts.sum() / jnp.maximum(counts, 1)
        weight *= jnp.asarray([1.0, self.sound_weight])
        batch["kind_weight"] = jnp.broadcast_to(weight, (shape[0], len(weight)))
        return batch

    def _parts(self, row: Array) -> list[Array]:
        """The tokens of each kind of a row."""
        return side_by_side(row, self.kinds)

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """How many tokens of the batch are generated."""
        return generated(batch).sum().astype(jnp.float32)

    def loss(
        self, params: Any, batch: Batch, *, ema: Any = None, step: Any = 0
    ) -> tuple[Float[Array, ""], Metrics]:
        """The sum over tokens of the squared error; as metrics, by noise level."""
        x0, noise = jax.vmap(_draw)(batch["key"], batch["latents"], batch["logvar"])
        rng = jax.random.fold_in(batch["key"][0], 1)
        error, t = self.error(params, batch, x0, noise, batch["t"], rng)
        metrics: Metrics = {}
        if not self.kinds:
            return error.sum(), _by_noise("loss_at_t", error, t, generated(batch))
        total = jnp.zeros(())
        columns = map(self._parts, (error, t, generated(batch)))
        for i, (errors, times, learned) in enumerate(zip(*columns, strict=True)):
            metrics |= _by_noise(f"{KINDS[i]}_loss_at_t", errors, times, learned)
            count = learned.sum().astype(jnp.float32)
            metrics[f"{KINDS[i]}_loss"] = (errors.sum(), count)
            total += batch["kind_weight"][0, i] * errors.sum()
        return total, metrics

    def error(
        self,
        params: Any,
        batch: Batch,
        x0: Float[Array, "b n c"],
        noise: Float[Array, "b n c"],
        t: Float[Array, "b *kinds m"],
        rng: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "b n"], Float[Array, "b n"]]:
        """The squared error of each token at given timesteps and noise.

        Args:
            params: parameters by network.
            batch: a packed batch.
            x0: clean latents.
            noise: normal noise to mix them with.
            t: timestep of each clip, and of each kind in it if there are two, 0 (data)
                to 1 (noise).
            rng: key of the adapters' dropout; None: no dropout.

        Returns:
            The error, averaged over channels, 0 for tokens that aren't generated; and
            the timestep of each token.
        """
        if not self.boundary:
            return self._error(params, "dit", batch, x0, noise, t, rng)
        inputs = dict(batch), x0, noise, t
        low, high = (
            self._error(
                params, name, *jax.tree.map(lambda x, i=i: jnp.split(x, 2)[i], inputs)
            )
            for i, name in ((1, "dit_low"), (0, "dit"))
        )
        return jax.tree.map(lambda *halves: jnp.concatenate(halves), high, low)

    def _error(self, params, name, batch, x0, noise, t, rng=None):
        clean = self._tokens(batch, x0)
        levels = t
        if clean.level is not None:
            levels = jnp.pad(t, (*((0, 0),) * (t.ndim - 1), (1, 0))).reshape(len(t), -1)
        token_t = clean.per_token(levels)
        noisy_t = token_t
        if self.given_noise:
            learned = generated(batch)[..., None]
            noisy_t = jnp.where(learned, token_t, self.given_noise)
        tokens = clean.with_latents(self.path.mix(x0, noise, noisy_t))
        variables, rngs = {"params": params[name]}, {}
        if self.lora is not None:
            variables["lora"] = self.lora.active(params["lora"], rng is not None)
            rngs = {} if rng is None else {"lora": rng}
        model = partial(self.dit.apply, variables, rngs=rngs)
        text = self._text(params, batch)
        if "cut" in batch:
            tokens, text = apart(tokens, text, batch["cut"])
        velocity = denoise(model, tokens, levels, text, self.path)
        wanted = self.path.true_velocity(x0, noise, token_t)
        weight = self.path.loss_weight(token_t) * generated(batch)[..., None]
        error = weight * (velocity - wanted) ** 2
        if self.kinds:
            # Channels that a kind lacks are zeros, and no part of its mean.
            widths = self.dit.in_channels, self.dit.sound_channels
            parts = zip(self._parts(error), widths, strict=True)
            parts = [part[..., :width].mean(-1) for part, width in parts]
            error = jnp.concatenate(parts, axis=1)
        else:
            error = error.mean(-1)
        return error, jnp.broadcast_to(token_t[..., 0], error.shape)

    def _tokens(self, batch: Batch, latents: Array) -> Tokens:
        given = bool(self.given) or self.forcing.share > 0
        how = {"one_clip": self.one_clip, "given": given, "kinds": self.kinds}
        return Tokens.of(batch, latents, frames=self.frames, **how)

    def _text(self, params: Any, batch: Batch) -> Text:
        text = text_of(self.text_encoder, params, batch)
        return Text(text.embeds) if self.pad_text and self.one_clip else text

    def validate(
        self, params: Any, batch: Batch, keys: Any, times: Float[Array, " times"]
    ) -> Float[Array, "times kinds"]:
        """The mean squared error of each kind at fixed timesteps with fixed noise.

        Nothing is drawn anew, so values are comparable over a run and between runs.

        Args:
            params: parameters by network, for example the average.
            batch: a packed batch.
            keys: a random key for each row.
            times: timesteps to measure at, 0 (data) to 1 (noise).
        """
        x0, noise = jax.vmap(_draw)(keys, batch["latents"], batch["logvar"])
        learned = self._parts(generated(batch))
        weights = jnp.stack([jnp.maximum(x.sum(), 1) for x in learned])
        b, m = batch["valid"].shape
        shape = (b, len(self.kinds), m) if self.kinds else (b, m)

        def at(t):
            inputs = batch, x0, noise, jnp.full(shape, t)
            networks = ("dit_low", "dit") if self.boundary else ("dit",)
            ways = [
                lambda name=name: self._error(params, name, *inputs)[0]
                for name in networks
            ]
            index = (t >= self.boundary).astype(int) * (len(networks) - 1)
            errors = self._parts(jax.lax.switch(index, ways))
            return jnp.stack([x.sum() for x in errors]) / weights

        return jax.lax.map(at, times)


def _by_noise(name: str, error: Array, t: Array, learned: Array) -> Metrics:
    """Sums of the errors of tokens in equal intervals of t, and how many those are."""
    metrics: Metrics = {}
    for i in range(BUCKETS):
        inside = (t >= i / BUCKETS) & (t < (i + 1) / BUCKETS + (i == BUCKETS - 1))
        inside = inside & learned
        span = f"{name}/{i / BUCKETS:.1f}-{(i + 1) / BUCKETS:.1f}"
        count = inside.sum().astype(jnp.float32)
        metrics[span] = (jnp.where(inside, error, 0.0).sum(), count)
    return metrics


def _draw(
    key: PRNGKeyArray, mean: Float[Array, "n c"], logvar: Float[Array, "n c"]
) -> tuple[Float[Array, "n c"], Float[Array, "n c"]]:
    """Draws latents from the autoencoder's posterior, and noise to mix them with."""
    latent_key, noise_key = jax.random.split(key)
    spread = jnp.exp(0.5 * logvar.astype(jnp.float32))
    latent = mean + spread * jax.random.normal(latent_key, mean.shape)
    return latent.astype(jnp.float32), jax.random.normal(noise_key, mean.shape)
