"""A number for the rows of a table, whatever their order, row groups and files.

Two tables with equal numbers hold the same rows, as surely as 64 bits can say: each row has the
XXH3 of all its values, and the numbers of rows are added up.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

Cells = NDArray[np.uint64]  # [rows]

_ROWS_AT_ONCE = 1_024  # whose cells are in memory at a time
_MODULUS = 1 << 64


def hash_rows(table: pa.Table) -> int:
    """The sum of the rows' hashes, modulo 2^64; those of parts of a table add up to that of all.

    Values count bit for bit: NaN is equal to itself, 0.0 is not -0.0; a null list is not an
    empty one, nor one of nulls. Names of columns do not count, their order does.

    Raises:
        TypeError: a column has a type that no file of earmark has.
    """
    total = 0
    for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
        if batch.num_rows:
            cells = [cell for column in batch.columns for cell in _cells(column)]
            total += sum(_digests(np.stack(cells, axis=1)))
    return total % _MODULUS


def _digests(rows: NDArray[np.generic]) -> list[int]:
    """XXH3 of each row of a matrix."""
    content = memoryview(np.ascontiguousarray(rows)).cast("B")
    size = content.nbytes // len(rows)
    digest = xxhash.xxh3_64_intdigest
    return [digest(content[at : at + size]) for at in range(0, content.nbytes, size)]


def _cells(array: pa.Array) -> list[Cells]:
    """What stands for each value of an array: numbers that are the same for equal values alone."""
    kind, missing = array.type, _is_null(array)
    if pa.types.is_struct(kind):
        return [missing, *(cell for child in array.flatten() for cell in _cells(child))]
    if pa.types.is_string(kind):
        texts = array.cast(pa.large_binary()).fill_null(b"")
        return [missing, _of_slices(*_offsets_and_bytes(texts))]
    if pa.types.is_list(kind):
        offsets = array.offsets.to_numpy()
        # What lies under a null list is nobody's.
        lengths = np.where(missing.astype(bool), 0, np.diff(offsets))
        values = array.flatten()
        ends = np.concatenate([[0], np.cumsum(lengths)])
        return [missing, *_of_lists(values, ends)]
    if pa.types.is_fixed_size_list(kind):
        if array.null_count:
            raise TypeError(f"a null of type {kind}: a missing vector is a list of nulls")
        return _of_lists(array.flatten(), np.arange(len(array) + 1) * kind.list_size)
    return [missing, _bits(array).astype(np.uint64)]


def _of_lists(values: pa.Array, ends: NDArray[np.int64]) -> list[Cells]:
    """Cells of lists, of their flat values and where each list ends (and the first begins)."""
    kind = values.type
    lengths = np.diff(ends).astype(np.uint64)
    if pa.types.is_primitive(kind):  # thousands of scores: their bytes as they lie there
        bits = _bits(values)
        digests = _of_slices(ends * bits.itemsize, bits.view(np.uint8))
        nulls = np.zeros(len(lengths), np.uint64)
        if values.null_count:
            flags = values.is_null().to_numpy(zero_copy_only=False)
            before = np.concatenate([[0], np.cumsum(flags)])
            some = before[ends[1:]] > before[ends[:-1]]
            nulls[some] = _of_slices(ends, flags.view(np.uint8))[some]
        return [lengths, digests, nulls]
    cells = np.stack(_cells(values), axis=1) if len(values) else np.zeros((0, 1), np.uint64)
    content = np.ascontiguousarray(cells).view(np.uint8).ravel()
    return [lengths, _of_slices(ends * cells.shape[1] * 8, content)]


def _of_slices(ends: NDArray[np.int64], content: NDArray[np.uint8]) -> Cells:
    """XXH3 of the bytes between each end and the next."""
    view, digest = memoryview(content), xxhash.xxh3_64_intdigest
    places = ends.tolist()
    return np.array([digest(view[start:end]) for start, end in pairwise(places)], np.uint64)


def _offsets_and_bytes(texts: pa.LargeBinaryArray) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    _, offsets, content = texts.buffers()
    ends = np.frombuffer(offsets, np.int64, len(texts) + 1, 8 * texts.offset)
    flat = np.zeros(0, np.uint8) if content is None else np.frombuffer(content, np.uint8)
    return ends, flat


def _bits(array: pa.Array) -> NDArray[np.unsignedinteger]:
    """The values of a primitive array, 0 for a null, as unsigned integers of their width."""
    kind = array.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise TypeError(f"rows with a column of type {kind} cannot be hashed")
    if not len(array):
        return np.zeros(0, f"u{kind.bit_width // 8}")
    width = kind.bit_width // 8
    bits = np.frombuffer(array.buffers()[1], f"u{width}", len(array), width * array.offset)
    if array.null_count:
        bits = np.where(_is_null(array).astype(bool), bits.dtype.type(0), bits)
    return bits


def _is_null(array: pa.Array) -> Cells:
    return array.is_null().to_numpy(zero_copy_only=False).astype(np.uint64)
