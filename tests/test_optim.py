"""The optimizers move what they should, as they should, where it lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close

from jvdit.sharding import make_mesh
from jvdit.training.optim import Optim, kinds
from jvdit.training.state import new_state, state_shardings

SETTINGS = {"warmup": 0, "lr": 0.01, "clip": 1e9, "weight_decay": 0.0}


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


GRADIENTS = {
    "dit": {
        "dense": {"kernel": draw(0, 24, 16), "bias": draw(1, 16)},
        "blocks": {"query": {"kernel": draw(2, 3, 16, 16)}},
        "conv": {"kernel": draw(3, 3, 3, 3, 4, 8)},
        "token_embed": {"embedding": draw(4, 32, 8)},
    }
}


def update(name, gradients):
    optimizer = Optim(name=name, **SETTINGS).optimizer(10)
    params = jax.tree.map(jnp.zeros_like, gradients)
    return jax.jit(optimizer.update)(gradients, optimizer.init(params), params)[0]


def matrices(updates):
    """Every matrix of the tree, as rows x columns."""
    tree = updates["dit"]
    yield from (tree["dense"]["kernel"], *tree["blocks"]["query"]["kernel"])
    yield tree["conv"]["kernel"].reshape(-1, 8)


def test_muon_moves_matrices_by_orthogonal_steps_of_adams_size():
    for matrix in matrices(update("muon", GRADIENTS)):
        scale = SETTINGS["lr"] * 0.2 * max(matrix.shape) ** 0.5
        values = jnp.linalg.svd(matrix, compute_uv=False) / scale
        assert 0.6 < values.min() and values.max() < 1.25
        rms = jnp.sqrt(jnp.mean(matrix**2)) / SETTINGS["lr"]
        assert 0.15 < rms < 0.25  # what AdamW's steps have in practice


def test_muon_follows_the_gradient():
    for step, gradient in zip(
        matrices(update("muon", GRADIENTS)), matrices(GRADIENTS), strict=True
    ):
        assert (step * gradient).sum() < 0


def test_muon_leaves_vectors_and_tables_to_adamw():
    muon, adamw = (update(name, GRADIENTS)["dit"] for name in ("muon", "adamw"))
    for path in (("dense", "bias"), ("token_embed", "embedding")):
        np.testing.assert_array_equal(muon[path[0]][path[1]], adamw[path[0]][path[1]])
        assert kinds(GRADIENTS)["dit"][path[0]][path[1]] == "adamw"


def test_a_stack_of_layers_moves_as_its_layers_do():
    stack = update("muon", GRADIENTS)["dit"]["blocks"]["query"]["kernel"]
    for i, layer in enumerate(GRADIENTS["dit"]["blocks"]["query"]["kernel"]):
        alone = update("muon", {"dense": {"kernel": layer}})["dense"]["kernel"]
        assert_close(stack[i], alone)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_lie_where_their_parameters_lie(name):
    mesh = make_mesh({"data": 2, "fsdp": 4})
    state = new_state(GRADIENTS, Optim(name=name).optimizer(10))
    places = state_shardings(state, mesh)
    kernel = places.params["dit"]["dense"]["kernel"]
    assert "fsdp" in str(kernel.spec)
    found = [
        (jax.tree_util.keystr(path), place.spec)
        for path, place in jax.tree_util.tree_leaves_with_path(places.opt_state)
    ]
    moments = [spec for path, spec in found if path.endswith("['dense']['kernel']")]
    assert len(moments) == (1 if name == "muon" else 2)
    assert all(spec == kernel.spec for spec in moments)
    assert all("fsdp" not in str(spec) for path, spec in found if "count" in path)


def test_unknown_optimizers_are_named():
    with pytest.raises(ValueError, match="'sgd'.*adamw, muon"):
        Optim(name="sgd")
