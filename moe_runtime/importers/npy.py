"""Reading `.npy` arrays of integers: the header strictly, the data without a copy.

numpy's own reader makes room for whatever a damaged header says before it looks at the data; this
one compares sizes first. Knows nothing of what the numbers mean.
"""

from __future__ import annotations

import mmap
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_runtime.errors import TraceError

__all__ = ["MAGIC", "map_npy", "parse_npy"]

MAGIC = b"\x93NUMPY"
_DTYPE = re.compile(r"'descr'\s*:\s*'([<>|=]?)([A-Za-z])(\d{1,3})'")
_ORDER = re.compile(r"'fortran_order'\s*:\s*(True|False)")
_SHAPE = re.compile(r"'shape'\s*:\s*\(([\d, ]*)\)")


def map_npy(path: Path) -> NDArray[Any]:
    """The integers of a file, mapped and not read.

    Raises:
        TraceError: no file, no complete `.npy`, or one that holds no integers.
    """
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        raise TraceError(f"{path}: cannot be read ({error}); check the path") from error
    return parse_npy(content, str(path))


def parse_npy(content: bytes | mmap.mmap, name: str) -> NDArray[Any]:
    """The integers of a `.npy` file's content; it is not copied.

    Raises:
        TraceError: not a complete `.npy`, or one that holds no integers; starts with `name`.
    """
    if content[:6] != MAGIC or len(content) < 12:
        raise TraceError(f"{name}: not a .npy array; is it cut off, or of another form?")
    wide = content[6] >= 2  # version 1.0 has a length of two bytes, later ones of four
    length = struct.unpack("<I" if wide else "<H", content[8 : 12 if wide else 10])[0]
    start = (12 if wide else 10) + length
    if length > 10_000 or start > len(content):
        raise TraceError(f"{name}: the .npy header is cut off or damaged; export it again")
    header = content[12 if wide else 10 : start].decode("latin1")
    dtype, order, shape = (form.search(header) for form in (_DTYPE, _ORDER, _SHAPE))
    if dtype is None or order is None or shape is None:
        raise TraceError(
            f"{name}: the .npy header is damaged, or holds objects or records: {header!r:.120}; "
            "export an array of integers"
        )
    kind, size = dtype[2], int(dtype[3])
    if kind not in "iu" or size not in {1, 2, 4, 8}:
        raise TraceError(
            f"{name}: holds numbers of type {kind}{size}; routed experts are integers (uint8, "
            "uint16, int32)"
        )
    numbers = [part for part in shape[1].replace(" ", "").split(",") if part]
    if len(numbers) > 8 or any(len(number) > 15 for number in numbers):
        raise TraceError(f"{name}: the .npy header's shape ({shape[1]:.60}) is damaged")
    dimensions = tuple(int(number) for number in numbers)
    count = 1
    for dimension in dimensions:
        count *= dimension
    if count * size != len(content) - start:
        raise TraceError(
            f"{name}: shape {dimensions} needs {count * size} bytes, found "
            f"{len(content) - start}; the file is cut off or damaged"
        )
    flat = np.frombuffer(content, np.dtype(f"{dtype[1]}{kind}{size}"), count, start)
    return flat.reshape(dimensions, order="F" if order[1] == "True" else "C")
