"""The commands' arrays lie in huge pages, without a variable set by hand."""

import os
import pathlib
import subprocess
import sys

import pytest

POLICY = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
CODE = """
import os, sys
from jvdit.machine.huge_pages import use_huge_pages
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:], flush=True)
use_huge_pages()
"""


def lines(**environment):
    rest = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", CODE, "a prompt", "--steps=3"]
    done = subprocess.run(
        command, env=rest | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.skipif(
    not POLICY.exists() or "[madvise]" not in POLICY.read_text(),
    reason="the kernel doesn't leave huge pages to programs",
)
def test_the_same_process_begins_again_once():
    before, after = lines()
    number = before.split()[0]
    assert before == f"{number} None a prompt --steps=3"
    assert after == f"{number} glibc.malloc.hugetlb=1 a prompt --steps=3"


def test_a_users_own_setting_stays():
    (line,) = lines(GLIBC_TUNABLES="glibc.malloc.check=0")
    assert line.endswith("glibc.malloc.check=0 a prompt --steps=3")
