"""Huge pages for a command's arrays."""

import os
import pathlib
import sys

_POLICY = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLES = "GLIBC_TUNABLES"


def use_huge_pages() -> None:
    """Starts this process anew, once, so that its large arrays lie in huge pages.

    XLA on CPU takes memory anew for each step, and the kernel hands it out page by
    page: a quarter of the time of a training step of the procedural world. glibc asks
    for huge pages if GLIBC_TUNABLES says so when a process begins; so this one, which
    keeps its number, begins again with it. Nothing happens where the variable is set
    already, or where the kernel doesn't leave the choice to programs.
    """
    if sys.platform != "linux" or _TUNABLES in os.environ:
        return
    if not _POLICY.exists() or "[madvise]" not in _POLICY.read_text():
        return
    os.environ[_TUNABLES] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, sys.orig_argv)
