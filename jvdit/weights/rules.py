"""Rule tables that map another project's tensors to our parameters, and back.

Each rule gives the name of a released tensor ("theirs"), the path of our parameter
("ours"), and how their layouts relate. `{i}` and `{j}` stand for numbers, the same on
both sides. A table must account for every tensor on either side: whatever one side has
and the other lacks is an error that lists the names. What a table names is loaded
straight onto the devices.
"""

import dataclasses
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Shaped

from jvdit.models.layers import stack_of
from jvdit.sharding import replicated
from jvdit.weights.few_bits import in_few_bits

Shape = tuple[int, ...]

# Whose names a table reads: diffusers' and transformers', or those of Wan's authors.
LAYOUTS = ("diffusers", "original")

LISTED = 5  # most names that a message lists; it counts the rest


@dataclasses.dataclass(frozen=True)
class Rule:
    """Maps one kind of released tensor to our parameter.

    Attributes:
        theirs: name of the released tensor, with {i} for the number of a layer.
        ours: path of our parameter, joined by "/", with the same numbers; "": releases
            hold the tensor, but we don't use it.
        layout: einops pattern from their layout to ours; "": the layouts are equal.
        sizes: sizes of the axes that the pattern merges, to split them on the way back.
        part: (index, count) if our parameter is one of several equal parts of their
            tensor, or (index, sizes) if the parts are of these sizes.
        axis: axis of their tensor along which the parts lie.
        tied: this is a second name of a tensor that another rule reads; it is read
            only if the first name is absent.
    """

    theirs: str
    ours: str
    layout: str = ""
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    part: tuple[int, int | tuple[int, ...]] = (0, 1)
    axis: int = 0
    tied: bool = False

    def to_ours(self, tensor: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """Converts their tensor to our layout; a view of it wherever possible."""
        index, parts = self.part
        if isinstance(parts, tuple) and sum(parts) != tensor.shape[self.axis]:
            raise ValueError(f"{parts} are no parts of {tensor.shape[self.axis]}.")
        if parts != 1:
            edges = np.cumsum(parts)[:-1] if isinstance(parts, tuple) else parts
            tensor = np.split(tensor, edges, self.axis)[index]
        if not self.layout:
            return tensor
        return einops.rearrange(tensor, self.layout, **self.sizes)

    def to_theirs(self, leaf: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """Converts our parameter to their layout: the whole tensor, or one part."""
        if not self.layout:
            return leaf
        left, right = self.layout.split("->")
        return einops.rearrange(leaf, f"{right} -> {left}", **self.sizes)

    def shape_of(self, theirs: Shape) -> Shape | None:
        """The shape of our parameter; None if theirs doesn't fit the pattern."""
        blank = np.broadcast_to(np.int8(0), theirs)  # takes no memory
        try:
            return tuple(self.to_ours(blank).shape)
        except (einops.EinopsError, ValueError, IndexError):
            return None


class Piece(NamedTuple):
    """A released tensor that fills one of our parameters, or one layer of a stack.

    Attributes:
        name: name of the released tensor.
        rule: the rule that converts it.
        layer: index of the layer in a stacked parameter; None: it isn't stacked.
    """

    name: str
    rule: Rule
    layer: int | None


def assign(
    rules: Sequence[Rule],
    theirs: Mapping[str, Shape],
    ours: Mapping[str, Shape],
    what: str = "the checkpoint",
) -> dict[str, list[Piece]]:
    """Finds the released tensors that fill each of our parameters.

    Args:
        rules: the rule table; each rule reads the tensors whose names match it.
        theirs: shape of each released tensor, by name.
        ours: shape of each of our parameters, by path. Where layers are stacked
            ("blocks/…", see `layers.scanned`), `block_{i}/…` of a rule is layer i.
        what: name of the checkpoint in error messages.

    Returns:
        The pieces of each parameter, in the order of the layers.

    Raises:
        ValueError: a tensor has no place, a parameter no tensor, or two shapes differ;
            lists which.
    """
    pieces = {x: names_of(rules, x, shape, theirs) for x, shape in ours.items()}
    used, unlike, unknown = set(), [], []
    for path, found in pieces.items():
        for name, rule, layer in found:
            used.add(name)
            wanted = ours[path][0 if layer is None else 1 :]
            if (shape := rule.shape_of(theirs[name])) != wanted:
                unlike.append(f"{name} {theirs[name]} is {shape} here, not {wanted}")
    for name in [x for x in theirs if x not in used]:
        matches = ((_regex(rule.theirs).fullmatch(name), rule) for rule in rules)
        places = [(rule.ours.format(**m.groupdict()), rule) for m, rule in matches if m]
        if not any(rule.tied or not path for path, rule in places):
            unknown.append(name + "".join(f" (for {path})" for path, _ in places))
    missing = [x for x in ours if len(pieces[x]) < len(layers_of(x, ours[x]))]
    problems = [
        f"{len(names)} {kind}: {listed(names)}"
        for kind, names in (
            ("tensors have no place in the model", unknown),
            ("parameters get no tensor", missing),
            ("shapes differ", unlike),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{what} is not of this model: {'; '.join(problems)}.")
    return pieces


def names_of(
    rules: Iterable[Rule], path: str, shape: Shape, among: Container[str] | None = None
) -> list[Piece]:
    """The released tensors that hold one of our parameters, in the order of its layers.

    Args:
        rules: the rule table; the first that names a tensor counts.
        path: path of our parameter.
        shape: its shape.
        among: names of the tensors that there are; those without one are left out.
            None: all that the rules name.

    Raises:
        ValueError: no rule has such a path.
    """
    found = []
    patterns = [(_regex(rule.ours), rule) for rule in rules]
    for layer, place in layers_of(path, shape):
        matches = ((pattern.fullmatch(place), rule) for pattern, rule in patterns)
        named = [
            (rule.theirs.format(**m.groupdict()), rule) for m, rule in matches if m
        ]
        if among is None and not named:
            raise ValueError(f"no rule says what parameter `{place}` is called.")
        there = [x for x in named if among is None or x[0] in among]
        found += [Piece(*x, layer) for x in there[:1]]
    return found


def layers_of(path: str, shape: Shape) -> list[tuple[int | None, str]]:
    """The number and the path of each layer that is stacked in a parameter, if any."""
    stack, _, rest = path.partition("/")
    if (found := stack_of(stack)) is None:
        return [(None, path)]
    name, first = found
    return [(i, f"{name}_{first + i}/{rest}") for i in range(shape[0])]


def layers(
    rows: Iterable[tuple[str, ...]],
    which: int,
    theirs: str = "",
    ours: str = "",
    layout: str = "o i -> i o",
    norm: tuple[str, str] = ("weight", ""),
    **sizes: int,
) -> list[Rule]:
    """Rules for layers with a weight and an optional bias.

    Args:
        rows: names of each layer: theirs, in the order of `LAYOUTS`, and ours, which
            says whether it is a norm.
        which: index of the layout that is read.
        theirs: what their names begin with.
        ours: what our names begin with.
        layout: einops pattern of a kernel, from their layout to ours.
        norm: what they call the scale of a norm, and the pattern of it.
        **sizes: sizes of the axes that the pattern merges.
    """
    found = []
    for row in rows:
        name, own = f"{theirs}{row[which]}", f"{ours}{row[-1]}"
        weight = Rule(f"{name}.weight", f"{own}/kernel", layout, sizes)
        if "norm" in own.rpartition("/")[2]:
            weight = Rule(f"{name}.{norm[0]}", f"{own}/scale", norm[1])
        found += [weight, Rule(f"{name}.bias", f"{own}/bias")]
    return found


def unread(*names: str) -> list[Rule]:
    """Rules that ignore tensors of these names, and the layers that are called so."""
    ends = ("", ".weight", ".bias")
    return [Rule(name + end, "") for name in names for end in ends]


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    """Compiles the pattern of a name; a number that occurs twice must be the same."""
    seen: set[str] = set()

    def number(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return rf"(?P<{name}>\d+)"

    return re.compile(re.sub(r"\\\{(\w)\\\}", number, re.escape(pattern)))


def listed(names: Sequence[str]) -> str:
    """Names for a message: the first, and how many more there are."""
    more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def paths_of(tree: Any) -> dict[str, Any]:
    """The leaves of a nested dict, by path joined with "/"."""
    return flatten_dict(tree, sep="/")


def loader(
    rules: Sequence[Rule],
    tensors: Mapping[str, np.ndarray],
    shapes: Any,
    shardings: Any | None = None,
    dtype: DTypeLike | None = None,
    what: str = "the checkpoint",
) -> Callable[..., dict[str, Any]]:
    """Returns a function that loads a module's parameters from released tensors.

    Tensors go to the devices one after another, each device getting its own shard; the
    host never holds more than one tensor beside the memory-mapped files. Given a form
    of `few_bits`, each is in it before the next one comes.

    Args:
        rules: rule table of the network.
        tensors: tensors of the checkpoint, by name; views of files will do.
        shapes: shapes of the parameters, from `jax.eval_shape` of the module's `init`.
        shardings: sharding of each parameter; None: all on the default device.
        dtype: dtype of the parameters; None: those of `shapes`.
        what: name of the checkpoint in error messages.

    Raises:
        ValueError: the checkpoint is not of this model; lists what differs.
    """
    wanted = paths_of(shapes)
    places = paths_of(shardings) if shardings is not None else {}
    ours = {path: tuple(leaf.shape) for path, leaf in wanted.items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    pieces = assign(rules, theirs, ours, what)

    def load(form: str = "") -> dict[str, Any]:
        leaves: dict[str, Any] = {}
        for path, leaf in wanted.items():
            kind, place = jnp.dtype(dtype or leaf.dtype), places.get(path)
            name, rule, layer = pieces[path][0]
            if layer is None:
                placed = _placed(rule.to_ours(tensors[name]), kind, place)
                leaves |= in_few_bits(path, placed, form)
                continue
            # Layer after layer is written into a stack that is already sharded.
            inner = place and NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
            for name, rule, layer in pieces[path]:
                placed = _placed(rule.to_ours(tensors[name]), kind, inner)
                for part, x in in_few_bits(path, placed, form).items():
                    where = place if part == path else place and replicated(place.mesh)
                    shape = len(pieces[path]), *x.shape
                    zeros, write = _stacking(shape, x.dtype, where)
                    stack = leaves[part] if part in leaves else zeros()
                    leaves[part] = write(stack, x, layer)
        return unflatten_dict(leaves, sep="/")

    return load


@lru_cache
def _stacking(shape: tuple[int, ...], dtype: np.dtype, place: NamedSharding | None):
    """Compiled functions that allocate a stack, and that write a layer into it."""
    zeros = jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=place)
    return zeros, jax.jit(_write, donate_argnums=0, out_shardings=place)


def _write(stack: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)


def _placed(
    value: np.ndarray, dtype: np.dtype, place: NamedSharding | None
) -> jax.Array:
    if place is None:
        return jnp.asarray(np.ascontiguousarray(value).astype(dtype, copy=False))
    return jax.make_array_from_callback(
        value.shape,
        place,
        lambda index: np.ascontiguousarray(value[index]).astype(dtype, copy=False),
    )


def export(rules: Sequence[Rule], params: Any) -> dict[str, np.ndarray]:
    """Converts our parameters to released tensors: the inverse of `load`, bit for bit.

    Args:
        rules: rule table of the network.
        params: parameters of the network.

    Raises:
        ValueError: no rule names the tensor of a parameter.
    """
    parts: dict[str, dict[int, np.ndarray]] = {}
    axes: dict[str, int] = {}
    for path, leaf in paths_of(params).items():
        value = np.asarray(leaf)
        for name, rule, layer in names_of(rules, path, value.shape):
            turned = rule.to_theirs(value if layer is None else value[layer])
            parts.setdefault(name, {})[rule.part[0]] = np.ascontiguousarray(turned)
            axes[name] = rule.axis
    return {
        name: found[0]
        if len(found) == 1
        else np.concatenate([found[i] for i in sorted(found)], axes[name])
        for name, found in parts.items()
    }
