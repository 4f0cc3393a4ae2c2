"""Imports go down only: entry points, then training, then siblings, then shapes.

Entry points are a line of their own: each may import those before it in the list.
"""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent / "jvdit"
LOWEST = {"shapes", "sharding", "compilation", "cluster"}
MAY_IMPORT = {
    "box": set(),
    "shapes": set(),
    "sharding": {"pods"},
    "compilation": set(),
    "cluster": {"data"},
    "data": {"data"},
    "models": {"models"} | LOWEST,
    "diffusion": {"diffusion", "data"} | LOWEST,
    "evaluation": {"evaluation", "data"} | LOWEST,
    "pretrained": {"pretrained", "models", "data"} | LOWEST,
    "training": {"training", "models", "diffusion", "data"} | LOWEST,
    "pods": {"pods"},
}
ENTRY_POINTS = [
    "huge_pages",
    "conventions",
    "stop",
    "config",
    "caption_encoder",
    "clip_encoder",
    "latents",
    "networks",
    "generation",
    "encode",
    "sample",
    "evaluate_vae",
    "evaluate",
    "tasks",
    "train",
    "pod_programs",
]
FORBIDDEN = {"torch", "tensorflow", "transformers", "diffusers", "pickle"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names if node.module == "jvdit" else [node.module]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts != ("__init__",):
            yield parts[0], path


def test_rooms_import_only_what_lies_below():
    for room, path in modules():
        assert room in MAY_IMPORT or room in ENTRY_POINTS, f"{path}: unknown room"
        if room in ENTRY_POINTS:
            below = ENTRY_POINTS[: ENTRY_POINTS.index(room)]
            allowed = {*MAY_IMPORT, *below, room}
        else:
            allowed = MAY_IMPORT[room]
        for name in imports(path):
            if name.split(".")[0] == "jvdit" and "." in name:
                assert name.split(".")[1] in allowed, f"{path} imports {name}"


def test_no_foreign_framework_at_run_time():
    for _, path in modules():
        found = {name.split(".")[0] for name in imports(path)} & FORBIDDEN
        assert not found, f"{path} imports {found}"


def test_data_never_imports_jax():
    for room, path in modules():
        if room == "data":
            found = {name.split(".")[0] for name in imports(path)}
            assert not found & {"jax", "flax", "optax", "orbax"}, f"{path}: {found}"
