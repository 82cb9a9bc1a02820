"""What the gzip around compressed parts costs: zlib's stored blocks against ISA-L's levels, in turn, in one run.

python -m benchmarks.outer_gzip [MEGABYTES]
"""

from __future__ import annotations

import os
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

from isal import isal_zlib

from workers.streams import GZIP

CONTENDERS: dict[str, Callable[[], Any]] = {
    "zlib level 0": lambda: zlib.compressobj(0, wbits=GZIP),
    "isal level 0": lambda: isal_zlib.compressobj(0, wbits=GZIP),
    "isal level 1": lambda: isal_zlib.compressobj(1, wbits=GZIP),
}


def main(megabytes: int) -> None:
    """Print for each contender its speed and how much larger it makes bytes that do not compress."""
    chunk = os.urandom(1 << 20)
    for name, make in CONTENDERS.items():
        started = time.perf_counter()
        compressor = make()
        size = sum(len(compressor.compress(chunk)) for _ in range(megabytes)) + len(compressor.flush())
        speed = megabytes / (time.perf_counter() - started)
        print(f"{name}: {speed:.0f} MB/s, {size / (megabytes << 20):.4f} of the input")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
