"""Imports go down only: doors, then rooms, floor by floor, then shapes.

Rooms of one floor are strangers to one another.
"""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent / "jvdit"
FLOORS = (
    {"shapes", "ranges", "machine", "box"},
    {"sharding", "data"},
    {"models", "diffusion", "evaluation"},
    {"weights"},
    {"training"},
    {"config"},
    {"generation"},
    {"tasks", "serving"},
    {"pods"},
    {"encode", "sample", "serve", "evaluate", "train", "__main__"},
)
FORBIDDEN = {"torch", "tensorflow", "transformers", "diffusers", "pickle"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts != ("__init__",):
            yield parts[0], path


def test_rooms_import_only_what_lies_below():
    floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
    for room, path in modules():
        assert room in floor, f"{path}: unknown room"
        for name in imports(path):
            if name.startswith("jvdit."):
                other = name.split(".")[1]
                below = other == room or floor[other] < floor[room]
                assert below, f"{path} imports {name}"


def test_modules_import_one_another_in_no_circle():
    """Imports for types alone count, too."""
    files = {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path
        for _, path in modules()
    }
    above = {
        name: {x for x in imports(path) if x in files} for name, path in files.items()
    }
    while leaves := {name for name, needs in above.items() if not needs & above.keys()}:
        above = {name: needs for name, needs in above.items() if name not in leaves}
    assert not above, f"in a circle, or above one: {sorted(above)}"


def test_no_two_files_have_one_name():
    names = [path.name for _, path in modules() if path.name != "__init__.py"]
    assert not {name for name in names if names.count(name) > 1}


def test_no_two_classes_have_one_name():
    names = [
        node.name
        for _, path in modules()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    ]
    assert not {name for name in names if names.count(name) > 1}


def test_no_foreign_framework_at_run_time():
    for _, path in modules():
        found = {name.split(".")[0] for name in imports(path)} & FORBIDDEN
        assert not found, f"{path} imports {found}"


def test_data_never_imports_jax():
    for room, path in modules():
        if room == "data":
            found = {name.split(".")[0] for name in imports(path)}
            assert not found & {"jax", "flax", "optax", "orbax"}, f"{path}: {found}"
