"""Checks of a DiT: whether its fields and its inputs fit each other."""

from typing import Any

from jaxtyping import Array

from jvdit.models.attention.dispatch import wan_axes_dims
from jvdit.models.attention.mosaic import warn_of_heads
from jvdit.models.attention.past import Past
from jvdit.models.attention.patterns import PATTERNS
from jvdit.shapes import Text, Tokens

# A `DiT`, whose module imports this one.
Network = Any


def check_inputs(
    dit: Network, tokens: Tokens, t: Array, text: Text, past: Past | None
) -> None:
    """Raises a ValueError if fields of a DiT and its inputs don't fit each other."""
    _check_widths(dit, tokens)
    _check_channels(dit, tokens, text)
    if tokens.level is None and t.shape[1] != 1:
        raise ValueError(
            f"`t` has {t.shape[1]} levels in a row but `tokens.level` is None; "
            "give every token its level."
        )
    _check_patterns(dit, tokens, past)


def _check_widths(dit: Network, tokens: Tokens) -> None:
    """Checks the heads, and the channels of the tokens."""
    head_dim, rest = divmod(dit.width, dit.num_heads)
    if rest:
        raise ValueError(
            f"`width` (={dit.width}) must be divisible by `num_heads` "
            f"(={dit.num_heads}); try {(head_dim + 1) * dit.num_heads}."
        )
    if sum(dit.rotary_dims) != head_dim:
        raise ValueError(
            f"`rope_dims` (={dit.rotary_dims}) must sum to the channels of a head, "
            f"`width` / `num_heads` (={head_dim}); try {wan_axes_dims(head_dim)}."
        )
    if dit.attention_implementation == "auto":
        warn_of_heads(dit.width, dit.num_heads, tokens.latents.shape[1])
    channels = tokens.latents.shape[-1]
    if channels != dit.token_channels:
        raise ValueError(
            f"tokens have {channels} channels but `in_channels` is "
            f"{dit.in_channels}: the channels of a patch times its cells."
        )
    if tokens.kinds and not dit.sound_channels:
        raise ValueError("the tokens are of two kinds but `sound_channels` is 0.")


def _check_channels(dit: Network, tokens: Tokens, text: Text) -> None:
    """Checks what is known of the tokens beside the noise."""
    for name, wanted, given in (
        ("cond_channels", dit.cond_channels, tokens.cond),
        ("control_channels", dit.control_channels, tokens.control),
        ("image_width", dit.image_width, text.image),
    ):
        found = 0 if given is None else given.shape[-1]
        if found != wanted:
            what = name.partition("_")[0]
            raise ValueError(
                f"the {what} has {found} channels but `{name}` is {wanted}; "
                f"give a {what} of that many, or none where it is 0."
            )
    states = 0 if text.image is None else text.image.shape[1]
    if dit.image_length and states != dit.image_length:
        raise ValueError(
            f"{states} image states were given but `image_length` is "
            f"{dit.image_length}: those of a first and a last picture."
        )


def _check_patterns(dit: Network, tokens: Tokens, past: Past | None) -> None:
    """Checks that they are known, and that the tokens allow for them."""
    given = f"`patterns` (={tuple(dit.patterns)})"
    if not set(dit.patterns) <= set(PATTERNS):
        raise ValueError(f"{given} must be names in: {', '.join(PATTERNS)}.")
    n = tokens.latents.shape[1]
    if past is not None and not (dit.is_causal and tokens.segment is None):
        raise ValueError(
            f"{given} must all be 'chunk_causal' for a network to go on from what "
            "it kept, and rows must be one clip each."
        )
    if tokens.frames and (n % tokens.frames or tokens.kinds):
        raise ValueError(
            f"`tokens.frames` (={tokens.frames}) must divide the {n} tokens of a "
            "row of one kind; it is 0 where rows are no grids."
        )
    if dit.patterns and tokens.visible is not None and not tokens.kinds:
        raise ValueError(
            "`tokens.visible` says itself what attention sees; leave it out for a "
            f"network with {given}."
        )
