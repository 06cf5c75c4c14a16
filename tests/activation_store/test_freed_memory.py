"""Freed memory is kept and had again, and given back in the end. What is computed in it is the same: test_run.py."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from activation_store import freed_memory

PAGES_ASKED_FOR = """
import resource, torch
from pathlib import Path
from activation_store.freed_memory import freed_memory_kept

numbers = torch.ones(16 << 20)

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    numbers.mul(2).add(1).exp()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

before = resident()
for _ in range(12):
    as_it_is = pages()
with freed_memory_kept() as can:
    for _ in range(12):  # it takes a few until there is a block for each
        kept = pages()
left_over = resident() - before
print(can, as_it_is, kept, left_over >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_large_blocks_are_had_again_without_asking_the_kernel():
    done = subprocess.run([sys.executable, "-c", PAGES_ASKED_FOR], capture_output=True, text=True, check=True)
    can, as_it_is, kept, left_over = done.stdout.split()
    assert can == "True"
    assert int(as_it_is) > 50  # for three blocks of 64 MiB; a page may have 2 MiB
    assert int(kept) < 5
    assert int(left_over) < 30  # MiB


def test_another_c_library_is_left_alone(monkeypatch):
    class NoMallopt:
        def __init__(self, name):
            pass

    monkeypatch.setattr(freed_memory.ctypes, "CDLL", NoMallopt)
    with freed_memory.freed_memory_kept() as can:
        assert can is False
