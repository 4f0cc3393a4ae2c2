"""Stacked layers: the parameters of a network as `scan_layers` has them, and back."""

import jax
import jax.numpy as jnp


def stack_layers(params):
    """Joins the subtrees `block_0`, `block_1`, ... into `blocks`."""
    rest = {k: v for k, v in params.items() if not k.startswith("block_")}
    layers = [params[f"block_{i}"] for i in range(len(params) - len(rest))]
    return rest | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack_layers(params):
    """Undoes `stack_layers`."""
    blocks = params["blocks"]
    layers = {
        f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], blocks)
        for i in range(len(jax.tree.leaves(blocks)[0]))
    }
    return {k: v for k, v in params.items() if k != "blocks"} | layers
