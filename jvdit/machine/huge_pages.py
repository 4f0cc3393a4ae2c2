"""Huge memory pages for the arrays of a command."""

import os
import pathlib
import sys

_POLICY = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLES = "GLIBC_TUNABLES"


def use_huge_pages() -> None:
    """Restarts this process once, so that its large arrays use huge pages.

    XLA on CPU allocates memory anew for each step, and the kernel maps it page by page,
    which takes a quarter of a training step on the procedural world. glibc asks for
    huge pages if GLIBC_TUNABLES says so when a process starts; so this process, keeping
    its id, starts again with the variable set. Nothing happens if it is already set, or
    if the kernel doesn't leave the choice to programs.
    """
    if sys.platform != "linux" or _TUNABLES in os.environ:
        return
    if not _POLICY.exists() or "[madvise]" not in _POLICY.read_text():
        return
    os.environ[_TUNABLES] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, sys.orig_argv)
