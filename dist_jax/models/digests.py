"""Digests of parameters and of what is said about them: bit rot is noticed when they are read.

The digest of an array sums its bits. They are taken as unsigned words; each is mixed with its
position in the array, in four ways, and the results are summed modulo 2^32. Parts of an array add
up, so its 128 bits depend on neither mesh, hosts nor files, and nobody needs it whole. For a given
position the mixing is a bijection of the word: a change of one word always shows, and one of
several words is missed once in 2^128. It finds accidents; it is no signature.

    metadata['digests']   {path: [dtype, shape, digest]} of every array that is stored
    metadata['sha256']    of the rest of the metadata as JSON, so of these digests too

The hash identifies what is stored as well, whatever mesh it was saved from.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dist_jax.models.parts import parts_of
from input_pipeline.machine import num_cpus

Digests = Mapping[str, Sequence[Any]]

SEAL = 'sha256'
DIGESTS = 'digests'
MOST_NAMED = 8  # arrays in a message

# Per lane: of the position, and two odd factors of a multiplicative hash (any odd numbers do).
LANES = (
    (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35),
    (0x27D4EB2F, 0x165667B1, 0xD3A2646D),
    (0xC2B2AE3D, 0xFD7046C5, 0xB55A4F09),
    (0x7FEB352D, 0x846CA68B, 0x68E31DA5),
)
PIECE_WORDS = 2**15  # mixed at a time: what fits a cache
PART_WORDS = 2**22  # of a thread


class DamagedError(ValueError):
    """What is stored is not what was written."""


def digests(tree: Any) -> dict[str, list[Any]]:
    """{path: [dtype, shape, digest]} of every array of a tree, sorted by path.

    Args:
      tree: any pytree of numpy arrays, `PartedArray`s and `jax.Array`s. Arrays that lie on the
        devices of several processes are digested by all together: then every process must call
        this.
    """
    named = tree_paths(tree)
    found = {path: Digest(leaf.dtype, leaf.shape) for path, leaf in named.items()}
    for path, leaf in named.items():
        for part, start in _blocks(leaf):
            found[path].add(part, start)
    shared = [
        path
        for path, leaf in named.items()
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    ]
    return rows(found, shared)


class Digest:
    """Of one array, whose parts are added one by one, each once and in any order."""

    def __init__(self, dtype: Any, shape: Sequence[int]):
        self.dtype, self.shape = np.dtype(dtype), tuple(shape)
        self.total = np.zeros(len(LANES), np.uint32)

    def add(self, part: np.ndarray, start: tuple[int, ...]) -> None:
        """Adds a part, given the position of its first element."""
        pieces = list(_parts(part, start))
        if len(pieces) == 1:
            self.total += _block_sum(*pieces[0], self.shape)
            return
        with ThreadPoolExecutor(num_cpus()) as pool:
            for total in pool.map(lambda piece: _block_sum(*piece, self.shape), pieces):
                self.total += total


def rows(found: Mapping[str, Digest], shared: Sequence[str] = ()) -> dict[str, list[Any]]:
    """{path: [dtype, shape, digest]}, as it is stored.

    Args:
      found: by path.
      shared: paths of which each process added its own parts: then every process must call this.
    """
    totals = {path: digest.total for path, digest in found.items()}
    if shared:
        own = np.stack([totals[path] for path in shared])
        of_all = multihost_utils.process_allgather(own).sum(0, dtype=np.uint32)
        totals |= dict(zip(shared, of_all, strict=True))
    return {
        path: [
            digest.dtype.name,
            list(digest.shape),
            ''.join(f'{lane:08x}' for lane in totals[path]),
        ]
        for path, digest in found.items()
    }


def check(where: str | os.PathLike[str], found: Mapping[str, Any], stored: Digests) -> None:
    """Compares what was read, in its stored dtypes, with the digests that were stored with it.

    Args:
      where: it was read from.
      found: `rows` of what was read; may be a part of what is stored.
      stored: from the metadata.

    Raises:
      DamagedError: naming the arrays that differ.
    """
    wrong = [path for path, row in found.items() if row != stored.get(path)]
    if wrong:
        more = f' and {len(wrong) - MOST_NAMED} more' if len(wrong) > MOST_NAMED else ''
        raise DamagedError(
            f'{os.fspath(where)} is damaged: {len(wrong)} of {len(found)} arrays are not what was '
            f'written: {", ".join(wrong[:MOST_NAMED])}{more}'
        )


def tree_paths(tree: Any) -> dict[str, Any]:
    """{'a/b/0/c': leaf} of any pytree, sorted by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(p, simple=True, separator='/'): leaf for p, leaf in leaves}
    return dict(sorted(named.items()))


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with their own hash."""
    return {**values, SEAL: _json_sha256(values)}


def check_seal(where: str | os.PathLike[str], values: Any, *, required: bool) -> None:
    """Compares JSON values with the hash among them.

    Args:
      where: they were read from.
      values: as read.
      required: whether they must have one; older files have none.

    Raises:
      DamagedError: other values than those that were written.
    """
    rest = {key: value for key, value in values.items() if key != SEAL}
    if (required or SEAL in values) and values.get(SEAL) != _json_sha256(rest):
        raise DamagedError(f'{os.fspath(where)} is damaged: its values are not what was written')


def _json_sha256(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(text.encode()).hexdigest()


def _blocks(leaf: Any) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
    """(values, position of their first) of the parts of an array, each on one process only."""
    if not isinstance(leaf, jax.Array):
        for part, row in parts_of(leaf):
            yield part, (row, *(0,) * part.ndim)[: part.ndim]
        return
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            yield np.asarray(shard.data), tuple(part.start or 0 for part in shard.index)


def _parts(
    block: np.ndarray, start: tuple[int, ...]
) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
    """A block in slices of its first axis, for threads."""
    if block.ndim == 0 or block.size <= PART_WORDS:
        yield block, start
        return
    rows = max(1, PART_WORDS * len(block) // block.size)
    for row in range(0, len(block), rows):
        yield block[row : row + rows], (start[0] + row, *start[1:])


def _block_sum(block: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """uint32 (4,): the sum of a block of an array.

    Args:
      block: values.
      start: of the block in the array.
      shape: of the array.
    """
    total = np.zeros(len(LANES), np.uint64)
    if not block.size:
        return total.astype(np.uint32)
    # An axis for the words of an element, of which eight bytes have two.
    words = max(block.dtype.itemsize // 4, 1)
    sizes, shape, start = (*block.shape, words), (*shape, words), (*start, 0)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    # Positions follow each other on the axes that the block has whole, and on the one before them.
    axis = len(sizes) - 1
    while axis > 0 and sizes[axis] == shape[axis]:
        axis -= 1
    run = math.prod(sizes[axis:])
    first = np.asarray(sum(a * b for a, b in zip(start, strides)))
    for size, stride in zip(sizes[:axis], strides):
        first = first[..., None] + np.arange(size) * stride
    first = first.reshape(-1, 1)
    kind = np.dtype(f'u{min(block.dtype.itemsize, 4)}')
    rows = np.ascontiguousarray(block).reshape(-1).view(kind).reshape(-1, run)

    height, width = max(1, PIECE_WORDS // run), min(run, PIECE_WORDS)
    for top in range(0, len(rows), height):
        for left in range(0, run, width):
            piece = rows[top : top + height, left : left + width].astype(np.uint32)
            along = np.arange(left, left + piece.shape[1])
            position = (first[top : top + height] + along).astype(np.uint32)
            for lane, factors in enumerate(LANES):
                place, one, two = (np.uint32(factor) for factor in factors)
                mixed = position * place
                mixed ^= piece
                mixed *= one
                mixed ^= mixed >> np.uint32(15)
                mixed *= two
                mixed ^= mixed >> np.uint32(16)
                total[lane] += mixed.sum(dtype=np.uint64)
    return (total % 2**32).astype(np.uint32)
