"""What a process does with the memory of freed tensors."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc"
)

_SCRIPT = """
import resource, torch
from terraloom.models.devices import give_back_memory, keep_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident_mb():
    line = next(l for l in open("/proc/self/status") if l.startswith("VmRSS"))
    return int(line.split()[1]) / 1024

def pages(tensors=20):
    before = faults()
    for _ in range(tensors):
        torch.ones(64 * 2**18)  # 64 MB
    return faults() - before

torch.ones(8)
afresh = pages()
keep_memory()
pages(1)
kept, held = pages(), resident_mb()
give_back_memory()
print(afresh, kept, held, resident_mb())
"""


def test_freed_memory_is_kept_and_given_back_on_demand() -> None:
    """Without large pages, each tensor of 64 MB takes 16384 page faults as it comes."""
    out = subprocess.run(
        [sys.executable, "-c", _SCRIPT], check=True, capture_output=True, text=True,
        env={"PATH": "", "THP_MEM_ALLOC_ENABLE": "0"},
    ).stdout  # fmt: skip
    afresh, kept, held, left = map(float, out.split())
    assert kept < afresh / 10
    assert held - left > 50
