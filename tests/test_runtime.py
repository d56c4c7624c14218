"""Where a run takes place; what other tests see of it is in ``nemo/``."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys
from nemo_minitron import runtime
runtime.has_cuda = lambda: False
if sys.argv[1] == "kept":
    runtime.keep_freed_memory()
size = 64 << 20
malloc, free, memset = (getattr(ctypes.CDLL(None), name) for name in ("malloc", "free", "memset"))
malloc.restype, free.argtypes, memset.argtypes = ctypes.c_void_p, [ctypes.c_void_p], [ctypes.c_void_p, int_, size_]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    piece = malloc(size)
    memset(piece, 1, size)
    free(piece)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
""".replace("int_, size_", "ctypes.c_int, ctypes.c_size_t")


def faults(*, kept: bool, **environment: str) -> int:
    """Page faults of a process that takes, fills and frees 64 MiB ten times."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", FAULTS, "kept" if kept else "free"]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_serves_again():
    """Pages are had once instead of ten times; an environment that sets malloc itself is obeyed."""
    once, each = faults(kept=True), faults(kept=False)
    assert 0 < once < each / 4
    assert faults(kept=True, MALLOC_MMAP_THRESHOLD_=str(1 << 20)) > 4 * once
