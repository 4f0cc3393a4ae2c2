"""Rule tables that map another project's tensors to our parameters, and back.

Each rule gives the name of a released tensor ("theirs"), the path of our parameter
("ours"), and how their layouts relate. `{i}` and `{j}` stand for numbers, the same on
both sides. A table must account for every tensor on either side: whatever one side has
and the other lacks is an error that lists the names.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import einops
import numpy as np
from jaxtyping import Shaped

from jvdit.models.layers import STACKS

Shape = tuple[int, ...]

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

    def shape_of(self, theirs: Shape) -> Shape:
        """The shape of our parameter; ValueError if theirs doesn't fit the pattern."""
        blank = np.broadcast_to(np.int8(0), theirs)  # takes no memory
        try:
            return tuple(self.to_ours(blank).shape)
        except einops.EinopsError as error:
            raise ValueError(str(error).strip().splitlines()[0]) from None


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


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The released tensors that fill each of our parameters, by its path.

    Attributes:
        pieces: the pieces of each parameter, in the order of the layers.
        shapes: the shape of each whole parameter.
    """

    pieces: dict[str, list[Piece]]
    shapes: dict[str, Shape]


def assign(
    rules: Sequence[Rule],
    theirs: Mapping[str, Shape],
    ours: Mapping[str, Shape],
    what: str = "the checkpoint",
) -> Assignment:
    """Finds the released tensors that fill each of our parameters.

    Args:
        rules: the rule table; each rule reads the tensors whose names match it.
        theirs: shape of each released tensor, by name.
        ours: shape of each of our parameters, by path. Where layers are stacked
            ("blocks/…", see `layers.scanned`), `block_{i}/…` of a rule is layer i.
        what: name of the checkpoint in error messages.

    Raises:
        ValueError: a tensor has no place, a parameter no tensor, or two shapes differ;
            lists which.
    """
    stacked = {path.partition("/")[0] for path in ours}
    patterns = [(_regex(rule.theirs), rule) for rule in rules]
    pieces: dict[str, list[Piece]] = {}
    unknown, unlike = [], []
    known = {
        name: [(m, r) for p, r in patterns if (m := p.fullmatch(name))]
        for name in theirs
    }
    # Tied names come last, when it is known whether the first names are there.
    for name in sorted(theirs, key=lambda name: any(r.tied for _, r in known[name])):
        if not known[name]:
            unknown.append(name)
        for match, rule in known[name]:
            path, layer = _place(rule.ours, match.groupdict(), stacked)
            if not path or rule.tied and pieces.get(path):
                continue
            pieces.setdefault(path, []).append(Piece(name, rule, layer))
            wanted = ours.get(path, ())[0 if layer is None else 1 :]
            if path not in ours:
                unknown.append(f"{name} (for {path})")
            elif (found := _shape(rule, theirs[name])) != wanted:
                unlike.append(f"{name} {theirs[name]} is {found} here, not {wanted}")
    missing = [path for path in ours if not _whole(pieces.get(path, []), ours[path])]
    problems = [
        f"{len(names)} {kind}: {_listed(names)}"
        for kind, names in (
            ("tensors have no place in the model", unknown),
            ("parameters get no tensor", missing),
            ("shapes differ", unlike),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{what} is not of this model: {'; '.join(problems)}.")
    for found in pieces.values():
        found.sort(key=lambda piece: piece.layer or 0)
    return Assignment(pieces, dict(ours))


def _whole(pieces: Sequence[Piece], shape: Shape) -> bool:
    """Whether the pieces fill each layer of a parameter exactly once."""
    layers = [piece.layer for piece in pieces]
    if None in layers or not layers:
        return layers == [None]
    return sorted(layers) == list(range(shape[0]))


def names_of(rules: Iterable[Rule], path: str, layers: int) -> list[Piece]:
    """The released tensors that hold one of our parameters: the inverse of `assign`.

    Args:
        rules: the rule table.
        path: path of our parameter.
        layers: how many layers a stacked parameter ("blocks/…") has; 0: not stacked.

    Raises:
        ValueError: no rule has such a path.
    """
    candidates = [path]
    if layers:
        stack, _, rest = path.partition("/")
        candidates = [f"{stack[:-1]}_{i}/{rest}" for i in range(layers)]
    found = []
    patterns = [(_regex(rule.ours), rule) for rule in rules]
    for layer, candidate in enumerate(candidates):
        for pattern, rule in patterns:
            if match := pattern.fullmatch(candidate):
                name = rule.theirs.format(**match.groupdict())
                found.append(Piece(name, rule, layer if layers else None))
                break
        else:
            raise ValueError(f"no rule says what parameter `{candidate}` is called.")
    return found


def places_of(rules: Iterable[Rule], name: str) -> list[tuple[str, Rule]]:
    """The paths that a released tensor fills, each with its rule; layers unstacked."""
    found = [(_regex(rule.theirs).fullmatch(name), rule) for rule in rules]
    return [
        (rule.ours.format(**match.groupdict()), rule)
        for match, rule in found
        if match and rule.ours
    ]


def modules(
    pairs: Mapping[str, str], layout: str = "o i -> i o", **sizes: int
) -> list[Rule]:
    """Rules for layers with a weight matrix and an optional bias.

    Args:
        pairs: their name of each layer, and ours.
        layout: einops pattern of the weight, from their layout to ours.
        **sizes: sizes of the axes that the pattern merges.
    """
    found = []
    for theirs, ours in pairs.items():
        found.append(Rule(f"{theirs}.weight", f"{ours}/kernel", layout, sizes))
        found.append(Rule(f"{theirs}.bias", f"{ours}/bias"))
    return found


def norms(pairs: Mapping[str, str]) -> list[Rule]:
    """Rules for norms with a weight and an optional bias, by their and our names."""
    found = []
    for theirs, ours in pairs.items():
        found.append(Rule(f"{theirs}.weight", f"{ours}/scale"))
        found.append(Rule(f"{theirs}.bias", f"{ours}/bias"))
    return found


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    """Compiles the pattern of a name; a number that occurs twice must be the same."""
    seen: set[str] = set()

    def number(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return rf"(?P<{name}>\d+)"

    parts = re.split(r"(\{\w\})", pattern)
    return re.compile(
        "".join(
            re.sub(r"\{(\w)\}", number, part)
            if part.startswith("{")
            else re.escape(part)
            for part in parts
        )
    )


def _place(
    path: str, numbers: Mapping[str, str], stacked: set[str]
) -> tuple[str, int | None]:
    """The path of a parameter, and the index of its layer if it is stacked."""
    first, _, rest = path.partition("/")
    stack = first.replace("_{i}", "s")
    if stack in STACKS and stack in stacked:
        return f"{stack}/{rest}".format(**numbers), int(numbers["i"])
    return path.format(**numbers), None


def _shape(rule: Rule, theirs: Shape) -> Shape | None:
    try:
        return rule.shape_of(theirs)
    except ValueError:
        return None


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
