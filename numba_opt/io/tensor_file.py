"""The safetensors format: named arrays and a few texts, nothing that executes.

A file is the header's length (8 bytes, little-endian), a header in JSON, and the arrays' bytes without gaps.
What is read is one block of memory, in which the arrays are views; what is written goes from the arrays to
the file a piece at a time.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import NONSENSE, CheckpointError
from . import files

Arrays = dict[str, np.ndarray]

DTYPES = {
    **{f"F{8 * size}": f"<f{size}" for size in (2, 4, 8)},
    **{f"I{8 * size}": f"<i{size}" for size in (2, 4, 8)},
    **{f"U{8 * size}": f"<u{size}" for size in (2, 4, 8)},
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
    "C64": "<c8",
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
PIECE = 2**20  # bytes that are read, hashed and written together
LONGEST = 100_000_000  # bytes of a header; the format's own limit
METADATA = "__metadata__"


class Header(NamedTuple):
    """The header of a file, and where the arrays begin."""

    arrays: dict[str, tuple[np.dtype, tuple[int, ...], int]]  # dtype, shape, first byte after the header
    metadata: dict[str, str]
    start: int  # of the arrays, in the file
    size: int  # of the file


def write(
    file: Any, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str], seal: tuple[str, Any]
) -> None:
    """Write a file that can be seeked in.

    `seal` is a text's name and a hash, as `hashlib` has them, which is given all that is written; its digest
    becomes that text. So what is written has that digest, even if somebody changes the arrays meanwhile.
    """
    name, digest = seal
    header, places = _laid_out(arrays, {name: "0" * 2 * digest.digest_size, **metadata})
    for key in sorted(arrays):
        array = plain(arrays[key])
        digest.update(described(key, array))
        content = array.reshape(-1).view(np.uint8)
        file.seek(len(header) + places[key])
        for first in range(0, len(content), PIECE):
            piece = content[first : first + PIECE].tobytes()
            digest.update(piece)
            files.put(file, piece)
    texts = "0" * 2 * digest.digest_size, digest.hexdigest()
    blank, sealed = (json.dumps({name: text})[1:-1].encode() for text in texts)
    file.seek(0)
    files.put(file, header.replace(blank, sealed, 1))  # no name or text has it, as their quotes are escaped


def plain(array: np.ndarray) -> np.ndarray:
    """An array as files have it: contiguous, and little-endian."""
    return np.asarray(array, array.dtype.newbyteorder("<"), order="C")


def described(name: str, array: np.ndarray) -> bytes:
    """Return the bytes that a digest is given before an array's content."""
    return repr((name, array.dtype.str, array.shape)).encode()


def _laid_out(arrays: Mapping[str, np.ndarray], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """A header with the length before it, and where each array goes after it."""
    header: dict[str, Any] = {METADATA: metadata}
    places, end = {}, 0
    for name in sorted(arrays, key=lambda name: (-arrays[name].itemsize, name)):  # so that all are aligned
        array = arrays[name]
        code = CODES.get(array.dtype.newbyteorder("<").str)
        if code is None:
            raise TypeError(f"{name} is {array.dtype}, which checkpoints cannot hold")
        places[name], end = end, end + array.nbytes
        header[name] = {"dtype": code, "shape": array.shape, "data_offsets": [places[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def read(file: io.FileIO, size: int) -> tuple[Arrays, dict[str, str]]:
    """The arrays and texts in a file of `size` bytes."""

    def taken(count: int) -> memoryview:
        buffer = np.empty(count, np.uint8).data
        if files.fill(buffer, file) < count:
            raise CheckpointError("not a whole safetensors file: it became shorter while it was read")
        return buffer

    length = _length(bytes(taken(min(size, 8))), size)
    header = _header(bytes(taken(length)), size)
    return _views(header, taken(size - header.start))


def parse(content: bytes | bytearray) -> tuple[Arrays, dict[str, str]]:
    """The arrays, as views, and the texts in a file's content."""
    length = _length(content[:8], len(content))
    header = _header(bytes(content[8 : 8 + length]), len(content))
    return _views(header, memoryview(content)[header.start :])


def _views(header: Header, block: memoryview) -> tuple[Arrays, dict[str, str]]:
    arrays: Arrays = {
        name: np.ndarray(shape, dtype, block, offset)
        for name, (dtype, shape, offset) in header.arrays.items()
    }
    return arrays, header.metadata


def _length(start: bytes | bytearray, size: int) -> int:
    """The header's length, which a file of some size begins with."""
    length = int.from_bytes(start, "little")
    if size < 8 or not 2 <= length <= min(LONGEST, size - 8):
        raise CheckpointError(f"not a whole safetensors file: {size} bytes, with a header of {length}")
    return length


def _header(text: bytes, size: int) -> Header:
    """A header, all of which is checked: the arrays fill what is left of a file of `size` bytes."""
    try:
        found = parsed(text.decode())
        start = 8 + len(text)
        if type(found) is not dict:
            raise ValueError("its header is not a dict")
        texts = found.pop(METADATA, None)
        texts = {} if texts is None else texts
        if type(texts) is not dict or not all(type(value) is str for value in texts.values()):
            raise ValueError("its metadata are not texts")
        spans = {name: _span(name, entry) for name, entry in found.items()}
        end = 0
        for name, (_, _, first, last) in sorted(spans.items(), key=lambda item: item[1][2:]):
            if first != end:
                raise ValueError(f"array {name!r} begins at byte {first}; expected {end}")
            end = last
        if start + end != size:
            raise ValueError(f"it has {size} bytes; expected {start + end}")
    except NONSENSE as error:
        raise CheckpointError(f"not a whole safetensors file: {str(error)[:200]}") from error
    arrays = {name: (dtype, shape, first) for name, (dtype, shape, first, _) in spans.items()}
    return Header(arrays, texts, start, size)


def _span(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """An array's dtype, shape, and bytes from and to, which a header tells."""
    code, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if code not in DTYPES:
        raise ValueError(f"array {name!r} is of the unknown dtype {code!r}")
    dtype = np.dtype(DTYPES[code])
    numbers = (*shape, first, last)
    lists = type(shape) is type(entry["data_offsets"]) is list
    if not lists or len(shape) > 64 or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise ValueError(f"array {name!r} has shape {shape!r} from byte {first!r} to {last!r}")
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"array {name!r} of shape {shape} has {last - first} bytes")
    np.broadcast_to(np.zeros((), dtype), shape)  # more dimensions, or longer ones, than NumPy has
    return dtype, tuple(shape), first, last


def parsed(text: str) -> Any:
    """Parse a JSON text, in which no name comes twice."""
    return json.loads(text, object_pairs_hook=_dict)


def _dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice")
    return found
