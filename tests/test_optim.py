"""The optimizers move what they should, as they should, where it lies."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from flax.traverse_util import flatten_dict, unflatten_dict

from jvdit.models.dit import VARIANTS as DITS
from jvdit.models.dit import DiT
from jvdit.models.lora import LoRA
from jvdit.models.text_encoder import VARIANTS, TextEncoder
from jvdit.sharding import make_mesh
from jvdit.training.optim import Optim, decaying, kinds
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


@functools.cache
def shapes(scan_layers):
    """Of networks that have every kind of parameter, and of adapters, by path."""
    channels = {"in_channels": 4, "out_channels": 4, "text_width": 8}
    pictures = {"cond_channels": 3, "image_width": 8, "image_length": 5}
    control = {"control_channels": 6, "control_layers": (0, 1)}
    scanned = {"scan_layers": scan_layers}
    dit = DiT(**DITS["tiny"], **channels, **pictures, **control, **scanned)
    sizes = VARIANTS["tiny"] | {"vocab_size": 9, "shared_bias": False}
    text = TextEncoder(**sizes, **scanned)
    ids = jnp.zeros((1, 1), jnp.int32)

    def init(key):
        adapted = dit.init(key, *dit.example_inputs())["params"]
        return {
            "dit": adapted,
            "text_encoder": text.init(key, ids, ids)["params"],
            "lora": LoRA(rank=2).init(key, adapted),
        }

    return flatten_dict(jax.eval_shape(init, jax.random.key(0)), sep="/")


def tree_of(flat):
    return unflatten_dict(flat, sep="/")


def stacked(flat):
    """Joins `block_0`, `block_1` and `control_0`, `control_1` as scanned layers."""
    joined = {}
    for path, x in flat.items():
        for stack in ("blocks", "controls"):
            path = re.sub(rf"/{stack[:-1]}_\d/", f"/{stack}/", path)
        joined.setdefault(path, []).append(x)
    return {k: jnp.stack(x) if len(x) > 1 else x[0] for k, x in joined.items()}


def test_kernels_embeddings_and_adapters_decay_and_nothing_else():
    never = ("bias", "scale", "table", "relative_bias/embedding")
    for scan_layers in (False, True):
        found = flatten_dict(decaying(tree_of(shapes(scan_layers))), sep="/")
        for path, decays in found.items():
            assert decays != path.endswith(never), path


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_layers_take_the_same_step_scanned_and_unrolled(name):
    # Of a kind some: others compile for long.
    kept = r"(block|control).*/(self_attention/query.*|modulation|cross_norm|hint)/"
    alone, scanned = (
        {k: x for k, x in shapes(scan_layers).items() if re.search(kept, k)}
        for scan_layers in (False, True)
    )
    rng = np.random.default_rng(0)
    params, grads = (
        {k: jnp.asarray(rng.normal(size=x.shape), "float32") for k, x in alone.items()}
        for _ in range(2)
    )
    optim = Optim(**SETTINGS | {"name": name, "weight_decay": 0.5})

    @jax.jit
    def step(grads, params):
        optimizer = optim.optimizer(10)
        return optimizer.update(grads, optimizer.init(params), params)[0]

    def stepped(grads, params):
        return flatten_dict(step(tree_of(grads), tree_of(params)), sep="/")

    found = stepped(stacked(grads), stacked(params))
    expected = stacked(stepped(grads, params))
    assert {k: x.shape for k, x in found.items()} == {
        k: x.shape for k, x in scanned.items()
    }
    for path, x in found.items():
        # The decay is 5e-3 of each; a stack's products in bfloat16 are its layers'.
        np.testing.assert_allclose(x, expected[path], atol=1e-5, err_msg=path)
