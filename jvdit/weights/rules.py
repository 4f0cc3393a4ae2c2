"""Tables between another project's parameters and ours, read in both directions.

A table is a list of rules. Each says under which name they keep a tensor, at which path
our module does, and how the two layouts relate. `{i}` and `{j}` stand for numbers, on
both sides the same. A table has to account for every tensor on either side: what one
side has and the other lacks is an error that lists the names.
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

LISTED = 5  # names that a message lists before it only counts


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where one kind of tensor is, there and here.

    Attributes:
        theirs: name of the tensor, with {i} for the number of a layer.
        ours: path of the parameter, joined by "/", with the same numbers; "": releases
            hold the tensor, but nothing reads it.
        layout: einops pattern from theirs to ours; "": they are equal.
        sizes: of the axes that a pattern joins, in the other direction.
        part: which of how many equal parts of an axis of theirs is ours, or of parts of
            which sizes.
        axis: that is parted.
        tied: this is a second name of a tensor that another rule reads; it is read
            only where the first name is absent.
    """

    theirs: str
    ours: str
    layout: str = ""
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    part: tuple[int, int | tuple[int, ...]] = (0, 1)
    axis: int = 0
    tied: bool = False

    def to_ours(self, tensor: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """Their tensor in our layout: a view wherever that is possible."""
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
        """Our parameter in their layout: the whole tensor, or its part."""
        if not self.layout:
            return leaf
        left, right = self.layout.split("->")
        return einops.rearrange(leaf, f"{right} -> {left}", **self.sizes)

    def shape_of(self, theirs: Shape) -> Shape:
        """The shape of our parameter; ValueError if the pattern doesn't take theirs."""
        blank = np.broadcast_to(np.int8(0), theirs)  # takes no memory
        try:
            return tuple(self.to_ours(blank).shape)
        except einops.EinopsError as error:
            raise ValueError(str(error).strip().splitlines()[0]) from None


class Piece(NamedTuple):
    """What fills a parameter of ours, or one layer of a stacked one.

    Attributes:
        name: of their tensor.
        rule: how it is turned.
        layer: which layer of a stack it is; None: the parameter is not stacked.
    """

    name: str
    rule: Rule
    layer: int | None


@dataclasses.dataclass(frozen=True)
class Assignment:
    """All of the pieces of each of our parameters, by its path.

    Attributes:
        pieces: in the order of the layers.
        shapes: of the whole parameters.
    """

    pieces: dict[str, list[Piece]]
    shapes: dict[str, Shape]


def assign(
    rules: Sequence[Rule],
    theirs: Mapping[str, Shape],
    ours: Mapping[str, Shape],
    what: str = "the checkpoint",
) -> Assignment:
    """Finds for every parameter of ours what fills it.

    Args:
        rules: the table; a name is read by the rules whose pattern it matches.
        theirs: shape of each of their tensors.
        ours: shape of each parameter, by path. Where layers of ours are stacked
            ("blocks/…", see `layers.stack_layers`), `block_{i}/…` of a rule is layer i.
        what: names the checkpoint in messages.

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
    # Second names last, when it is known whether the first ones are there.
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
    """Whether each layer of a parameter is there once."""
    layers = [piece.layer for piece in pieces]
    if None in layers or not layers:
        return layers == [None]
    return sorted(layers) == list(range(shape[0]))


def names_of(rules: Iterable[Rule], path: str, layers: int) -> list[Piece]:
    """What a parameter of ours becomes there: the inverse of `assign`.

    Args:
        rules: the table.
        path: of the parameter.
        layers: of a stacked parameter ("blocks/…"); 0: it is not stacked.

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
    """The paths that a tensor of theirs fills, each with its rule; unstacked."""
    found = [(_regex(rule.theirs).fullmatch(name), rule) for rule in rules]
    return [
        (rule.ours.format(**match.groupdict()), rule)
        for match, rule in found
        if match and rule.ours
    ]


def modules(
    pairs: Mapping[str, str], layout: str = "o i -> i o", **sizes: int
) -> list[Rule]:
    """Rules of layers with a weight matrix and perhaps a bias, by the layers' names."""
    found = []
    for theirs, ours in pairs.items():
        found.append(Rule(f"{theirs}.weight", f"{ours}/kernel", layout, sizes))
        found.append(Rule(f"{theirs}.bias", f"{ours}/bias"))
    return found


def norms(pairs: Mapping[str, str]) -> list[Rule]:
    """Rules of norms with a weight and perhaps a bias, by the norms' names."""
    found = []
    for theirs, ours in pairs.items():
        found.append(Rule(f"{theirs}.weight", f"{ours}/scale"))
        found.append(Rule(f"{theirs}.bias", f"{ours}/bias"))
    return found


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    """The pattern of a name; a number that occurs twice must be the same."""
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
    """The path of a parameter, and which layer of a stack it is."""
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
