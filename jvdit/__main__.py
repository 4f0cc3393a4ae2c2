"""`python -m jvdit` lists the commands, `python -m jvdit COMMAND …` runs one."""

import importlib.util
import pathlib
import runpy
import sys

COMMANDS = ("sample", "serve", "train", "encode", "evaluate")


def summary(command: str) -> str:
    """What a command does, by the first line of its documentation."""
    spec = importlib.util.find_spec(f"jvdit.{command}")
    assert spec is not None and spec.origin is not None
    text = pathlib.Path(spec.origin).read_text()
    return text.removeprefix('"""').partition(":")[0] + "."


def main() -> None:
    """Lists the commands, or runs one."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in COMMANDS:
        sys.argv = [f"jvdit.{command}", *sys.argv[2:]]
        runpy.run_module(f"jvdit.{command}", run_name="__main__", alter_sys=True)
    elif command in ("--help", "-h", "--helpfull"):
        print("jvdit trains, samples and measures diffusion transformers of video.\n")
        for name in COMMANDS:
            print(f"  python -m jvdit.{name:10} {summary(name)}")
        print("\nEach takes --help. README.md shows them at work.")
    else:
        sys.exit(f"error: {command!r} is none of {', '.join(COMMANDS)}.")


if __name__ == "__main__":
    main()
