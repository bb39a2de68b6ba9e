"""Conversion engine: named tensors and a table in, a parameter tree out, and back.

A table is a list of `Row`s. Each row names one source tensor, the target leaf, an einops pattern
from source to target layout, and, where the target stacks layers (or q, k, v), the slot that the
tensor fills. Rows are explicit: a family's `*_params.py` writes one per tensor as a function of
the geometry, so nothing is found by guessing at names.

    Row('visual.conv1.weight', 'visual/conv1/kernel', 'o i h w -> h w i o')
    Row('...layers.3.self_attn.k_proj.weight', 'visual/blocks/attn/qkv/kernel',
        '(h d) w -> w h d', index=(3, ALL, 1), sizes={'h': 12})

The same rows run backwards for export.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, path_aware_map, unflatten_dict

from dist_jax.models.parts import PartedArray, parts_of

Tree = dict[str, Any]

ALL = slice(None)
"""In `Row.index`: the whole axis."""

MAX_BLOCKS = 1000  # of one tower
MAX_LINES = 200  # of one reason in a message: a file of the wrong kind has no name right


class ConversionError(ValueError):
    """A checkpoint and a table that do not fit; the message lists every reason.

    At most `MAX_LINES` names of each stand in the message, all of them in the attributes.

    Attributes:
      unused: source tensors that no row reads.
      unfilled: target leaves, or slots of stacked leaves, that no tensor fills.
      mismatched: shapes or kinds that differ, both sides in the text.
      duplicates: slots or tensors that the table names twice.
    """

    def __init__(
        self,
        unused: Sequence[str] = (),
        unfilled: Sequence[str] = (),
        mismatched: Sequence[str] = (),
        duplicates: Sequence[str] = (),
        context: str = '',
    ):
        self.unused, self.unfilled = list(unused), list(unfilled)
        self.mismatched, self.duplicates = list(mismatched), list(duplicates)
        lines = [context or 'the checkpoint does not fit the model']
        for title, names in (
            ('source tensors that nothing uses', self.unused),
            ('target parameters that nothing fills', self.unfilled),
            ('shapes that differ', self.mismatched),
            ('named twice by the table', self.duplicates),
        ):
            if names:
                lines.append(f'  {title} ({len(names)}):')
                lines.extend(f'    {name}' for name in names[:MAX_LINES])
                if len(names) > MAX_LINES:
                    lines.append(f'    … and {len(names) - MAX_LINES} more')
        super().__init__('\n'.join(lines))


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a conversion table.

    Attributes:
      source_name: name of the tensor in the checkpoint; None for a constant (`fill`).
      target_path: leaf of the tree, keys joined by '/'.
      pattern: einops pattern, source layout -> target layout; None where they agree.
      index: slot of the target that the tensor fills: integers, or `ALL` for a whole axis.
        Trailing axes may be left out. Empty: the tensor is the leaf.
      sizes: axis sizes that the pattern needs and the shapes do not give.
      fill: value of a slot that has no source tensor (a key bias that a format leaves out).
      roll: places by which the first axis is turned in the target: its last ones come first.
    """

    source_name: str | None
    target_path: str
    pattern: str | None = None
    index: tuple[int | slice, ...] = ()
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    fill: float | None = None
    roll: int = 0

    @property
    def slot(self) -> str:
        """Target path with its index, as error messages print it."""
        if not self.index:
            return self.target_path
        inside = ','.join(':' if isinstance(i, slice) else str(i) for i in self.index)
        return f'{self.target_path}[{inside}]'

    @property
    def stacked(self) -> bool:
        """Whether it fills one row of the leaf, or a part of one."""
        return bool(self.index) and not isinstance(self.index[0], slice)

    def inside(self, start: int, stop: int) -> tuple[int | slice, ...] | None:
        """`index` within rows start:stop of the leaf; None if the slot is in none of them."""
        if not self.stacked:
            return self.index
        first, *rest = self.index
        return (first - start, *rest) if start <= first < stop else None

    def forward(self, tensor: np.ndarray) -> np.ndarray:
        """Source layout -> target layout (a view where possible)."""
        if self.pattern:
            tensor = einops.rearrange(tensor, self.pattern, **self.sizes)
        return np.roll(tensor, self.roll, 0) if self.roll else tensor

    def backward(self, value: np.ndarray) -> np.ndarray:
        """Target layout -> source layout."""
        if self.roll:
            value = np.roll(value, -self.roll, 0)
        if not self.pattern:
            return value
        source, target = self.pattern.split('->')
        return einops.rearrange(value, f'{target} -> {source}', **self.sizes)


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict -> {'a/b/c': leaf}, sorted by path."""
    return dict(sorted(flatten_dict(tree, sep='/').items()))


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """{'a/b/c': leaf} -> nested dict."""
    return unflatten_dict(flat, sep='/')


def with_precision(abstract: Mapping[str, Any], dtype: Any, keep: Collection[str] = ()) -> Tree:
    """Abstract tree with floating leaves in `dtype`.

    Norm parameters (siblings of a `scale`) and `logit_scale` stay float32: they are read in
    float32 and weigh nothing, and bfloat16 would turn a logit scale of 100 into 98.9. Subtrees at
    the top whose names are in `keep` stay as they are.
    """

    def leaf(path: tuple[str, ...], value: Any) -> jax.ShapeDtypeStruct:
        if path[0] in keep:
            return value
        small = path[-1] == 'logit_scale' or path[:-1] in norms
        floating = jnp.issubdtype(value.dtype, jnp.floating)
        kind = value.dtype if not floating else jnp.float32 if small else dtype
        return jax.ShapeDtypeStruct(value.shape, kind)

    norms = {path[:-1] for path in flatten_dict(abstract) if path[-1] == 'scale' and path[1:]}
    return path_aware_map(leaf, abstract)


def in_precision(tree: Mapping[str, Any], dtype: Any) -> Tree:
    """A tree of arrays with the dtypes of `with_precision`."""
    return jax.tree.map(
        lambda leaf, like: leaf.astype(like.dtype), tree, with_precision(tree, dtype)
    )


def import_tree(
    tensors: Mapping[str, np.ndarray],
    rows: Iterable[Row],
    abstract: Mapping[str, Any],
    ignore: Iterable[str] = (),
    *,
    keep_dtype: bool = False,
    parted: bool = False,
    context: str = '',
) -> Tree:
    """Fills a tree from named tensors, completely on both sides.

    Args:
      tensors: name -> array; with `parted`, the values are read whenever a part is.
      rows: the table.
      abstract: target tree with leaves that have `shape` and `dtype` (`jax.eval_shape` output).
      ignore: names that may stay unused, `fnmatch` patterns allowed ('*.num_batches_tracked').
      keep_dtype: take the dtype of the source instead of `abstract`'s (the widest one where a
        stacked leaf has several).
      parted: nothing is made yet; each layer of a stack will be, of its tensors alone.
      context: first line of the error, for instance the file name.

    Returns:
      Nested dict of numpy arrays, or `PartedArray`s, with the shapes of `abstract`.

    Raises:
      ConversionError: one error that names every unused tensor, unfilled slot, shape mismatch
        and duplicate.
    """
    rows, targets = list(rows), flatten(abstract)
    mismatched, duplicates = [], _repeated(row.source_name for row in rows)
    coverage = _Coverage(rows, {path: leaf.shape for path, leaf in targets.items()})
    duplicates += coverage.duplicates
    mismatched += coverage.misplaced

    kinds = {path: np.dtype(leaf.dtype) for path, leaf in targets.items()}
    if keep_dtype:
        found: dict[str, list[np.dtype]] = {}
        for row in rows:
            if row.source_name in tensors:
                found.setdefault(row.target_path, []).append(tensors[row.source_name].dtype)
        kinds |= {path: np.dtype(jnp.result_type(*several)) for path, several in found.items()}

    # Leaves are made when all their tensors are known to be there: a file of one block that claims
    # a thousand would otherwise get the memory of a thousand.
    of_leaf: dict[str, list[Row]] = {}
    for row in coverage.rows:
        of_leaf.setdefault(row.target_path, []).append(row)
        if row.source_name is not None and row.source_name not in tensors:
            continue
        coverage.mark(row)
        slot_shape = _slot_shape(targets[row.target_path].shape, row.index)
        problem = _problem(row, tensors, slot_shape, kinds[row.target_path])
        if problem:
            mismatched.append(problem)

    read, ignore = {row.source_name for row in rows}, tuple(ignore)
    unused = [
        f'{name} {tuple(tensors[name].shape)}'
        for name in tensors
        if name not in read and not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore)
    ]
    unfilled = coverage.unfilled()
    if unused or unfilled or mismatched or duplicates:
        raise ConversionError(unused, unfilled, mismatched, duplicates, context)

    def leaf(path: str, own: list[Row]) -> PartedArray:
        shape, kind = tuple(targets[path].shape), kinds[path]
        stacked = all(row.stacked for row in own)
        make = functools.partial(_make_part, tensors, own, shape, kind)
        return PartedArray(shape, kind, make, stacked)

    tree = unflatten({path: leaf(path, own) for path, own in of_leaf.items()})
    return tree if parted else jax.tree.map(PartedArray.whole, tree)


def _make_part(
    tensors: Mapping[str, np.ndarray],
    rows: Sequence[Row],
    shape: tuple[int, ...],
    kind: np.dtype,
    start: int,
    stop: int,
) -> np.ndarray:
    """Rows start:stop of the leaf that `rows` fill."""
    part = np.empty((stop - start, *shape[1:]) if shape else (), kind)
    for row in rows:
        where = row.inside(start, stop)
        if where is not None:
            constant = row.source_name is None
            part[where] = row.fill if constant else row.forward(tensors[row.source_name])
    return part


def non_finite(tree: Mapping[str, Any], rows: Iterable[Row]) -> list[str]:
    """Source names of the tensors that gave NaN or infinite values, in the order of the table."""
    rows, leaves = list(rows), flatten(tree)
    of_leaf: dict[str, list[Row]] = {}
    for row in rows:
        if row.source_name is not None:
            of_leaf.setdefault(row.target_path, []).append(row)
    found = set()
    for path, own in of_leaf.items():
        leaf = leaves[path]
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        for part, start in parts_of(leaf):
            stop = start + (len(part) if part.ndim else 1)
            slots = {row.source_name: row.inside(start, stop) for row in own}
            found |= {
                name
                for name, slot in slots.items()
                if slot is not None and not np.isfinite(part[slot]).all()
            }
    return [row.source_name for row in rows if row.source_name in found]


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """A tensor under its foreign name, before anything is read.

    Attributes:
      name: of the tensor; '' for a slot that must hold a constant and has no tensor.
      shape: in the layout of the file.
      dtype: that it is written in.
      leaf: what holds it: an array or a `PartedArray`.
      row: of the table.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    leaf: Any
    row: Row


def outgoing(
    tree: Mapping[str, Any],
    rows: Iterable[Row],
    prefix: str = '',
    dtypes: Mapping[str, Any] | None = None,
) -> list[Outgoing]:
    """What a table makes of a filled tree, in the order of the leaves.

    Args:
      tree: what the table exports, all of it.
      rows: the table.
      prefix: set before every name.
      dtypes: by name in the table; the leaf's own where it says nothing.

    Raises:
      ConversionError: a leaf, or a slot of one, that no row exports; a row without its leaf.
    """
    rows, leaves, dtypes = list(rows), flatten(tree), dtypes or {}
    coverage = _Coverage(rows, {path: np.shape(leaf) for path, leaf in leaves.items()})
    duplicates = coverage.duplicates + _repeated(row.source_name for row in rows)
    mismatched = list(coverage.misplaced)
    found: list[Outgoing] = []
    for row in coverage.rows:
        coverage.mark(row)
        leaf = leaves[row.target_path]
        # Shapes are read off an array of one element that is seen as many.
        slot = np.broadcast_to(np.int8(0), _slot_shape(np.shape(leaf), row.index))
        try:
            shape = row.backward(slot).shape
        except einops.EinopsError:
            mismatched.append(f'{row.slot} {slot.shape} does not fit {row.pattern!r} backwards')
            continue
        name = row.source_name and f'{prefix}{row.source_name}'
        kind = dtypes.get(row.source_name, leaf.dtype)
        found.append(Outgoing(name or '', shape, np.dtype(kind), leaf, row))
    unfilled = coverage.unfilled()
    if unfilled or mismatched or duplicates:
        raise ConversionError(
            unfilled=[f'{slot}: no row of the table exports it' for slot in unfilled],
            mismatched=mismatched,
            duplicates=duplicates,
            context='the tree does not fit the table that exports it',
        )
    return sorted(found, key=lambda each: each.row.target_path)


def read_outgoing(tensors: Iterable[Outgoing]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, contiguous array) of each; stacks are read in parts, and nothing of them is kept.

    Args:
      tensors: those of one leaf after each other.

    Raises:
      ConversionError: slots that should hold the constant `fill` and do not.
    """
    for _, group in itertools.groupby(tensors, key=lambda each: id(each.leaf)):
        group = list(group)
        leaf, stacked = group[0].leaf, all(each.row.stacked for each in group)
        whole = isinstance(leaf, PartedArray) and not stacked
        for part, start in parts_of(leaf.whole() if whole else leaf):
            stop = start + (len(part) if part.ndim else 1)
            slots = [(each, each.row.inside(start, stop)) for each in group]
            slots = [(each, part[where]) for each, where in slots if where is not None]
            wrong = [
                f'{each.row.slot} has no place in the file unless it is {each.row.fill}'
                for each, value in slots
                if not each.name and not (value == each.row.fill).all()
            ]
            if wrong:
                context = 'the tree does not fit the table that exports it'
                raise ConversionError(mismatched=wrong, context=context)
            for each, value in slots:
                if each.name:
                    # Not ascontiguousarray, which turns a scalar into a vector.
                    yield each.name, np.array(each.row.backward(value), each.dtype, order='C')


def export_tree(tree: Mapping[str, Any], rows: Iterable[Row]) -> dict[str, np.ndarray]:
    """The way back: a filled tree -> {source name: contiguous array}.

    Raises:
      ConversionError: see `outgoing` and `read_outgoing`.
    """
    return dict(read_outgoing(outgoing(tree, rows)))


def export_file(
    tensors: Iterable[Outgoing], path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Writes tensors as safetensors, one after the other.

    Args:
      tensors: of `outgoing`, of one tree or of several after each other.
      path: file to write; it appears whole or not at all.
      overwrite: replace an existing file.

    Raises:
      ConversionError: see `read_outgoing`; names twice.
      FileExistsError: the file exists.
    """
    path, tensors = Path(path), list(tensors)
    if path.is_dir() or (path.exists() and not overwrite):
        raise FileExistsError(f'{path} exists; pass --overwrite to replace it')
    named = [each for each in tensors if each.name]
    twice = _repeated(each.name for each in named)
    if twice:
        raise ConversionError(duplicates=twice, context=f'{path} would have names twice')
    leaves = {each.name: (each.shape, each.dtype) for each in named}
    write_tensors(path, leaves, read_outgoing(tensors), {'format': 'pt'})


def write_tensors(
    path: str | os.PathLike[str],
    leaves: Mapping[str, tuple[Sequence[int], np.dtype]],
    values: Iterable[tuple[str, np.ndarray | PartedArray]],
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file, one tensor after the other; it appears whole or not at all.

    Args:
      path: file to write; one that is there is replaced.
      leaves: see `safetensors_header`.
      values: each of them once, in any order.
      metadata: texts.
    """
    path = Path(path)
    text, places = safetensors_header(leaves, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}.partial')
    try:
        with open(partial, 'wb') as file:
            file.write(text)
            for name, value in values:
                file.seek(places[name])
                for part, _ in parts_of(value):
                    file.write(part.tobytes())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def safetensors_header(
    leaves: Mapping[str, tuple[Sequence[int], np.dtype]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """What a safetensors file begins with, for who writes its tensors one by one.

    They are laid out as the library does, which has no way to write without having all in memory.

    Args:
      leaves: name -> shape and dtype.
      metadata: texts.

    Returns:
      The first bytes of the file, and the place of each tensor in it, in the order of the places.
    """
    kinds = list(_SAFETENSORS)
    header: dict[str, Any] = {'__metadata__': dict(metadata)}
    start = 0
    for name in sorted(leaves, key=lambda name: (kinds.index(leaves[name][1].name), name)):
        shape, dtype = leaves[name]
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {
            'dtype': _SAFETENSORS[dtype.name],
            'shape': list(shape),
            'data_offsets': [start, end],
        }
        start = end
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    del header['__metadata__']
    places = {name: 8 + len(text) + entry['data_offsets'][0] for name, entry in header.items()}
    return len(text).to_bytes(8, 'little') + text, places


# In the order in which the library writes them.
_SAFETENSORS = {
    'int64': 'I64',
    'float64': 'F64',
    'float32': 'F32',
    'int32': 'I32',
    'bfloat16': 'BF16',
    'float16': 'F16',
    'int16': 'I16',
    'int8': 'I8',
    'uint8': 'U8',
    'bool': 'BOOL',
}


class _Coverage:
    """Which slots of which targets a table names, and which of them were filled."""

    def __init__(self, rows: Sequence[Row], shapes: Mapping[str, tuple[int, ...]]):
        self.shapes, self.misplaced, self.duplicates = shapes, [], []
        self.rows: list[Row] = []
        claimed: dict[str, np.ndarray] = {}
        self.filled: dict[str, np.ndarray] = {}
        self.by_slot: dict[tuple[str, tuple[int, ...]], str] = {}
        split: dict[str, list[bool]] = {path: [] for path in shapes}
        for row in rows:
            shape = shapes.get(row.target_path)
            source = row.source_name or f'constant {row.fill}'
            if shape is None:
                self.misplaced.append(f'{source} -> {row.slot}: the model has no such parameter')
            elif len(row.index) > len(shape) or any(
                not isinstance(i, slice) and not 0 <= i < size
                for i, size in zip(row.index, shape, strict=False)
            ):
                self.misplaced.append(f'{source} -> {row.slot}: outside of {tuple(shape)}')
            else:
                self.rows.append(row)
                axes = split[row.target_path]
                axes.extend([False] * (len(row.index) - len(axes)))
                for axis, i in enumerate(row.index):
                    axes[axis] |= not isinstance(i, slice)
        # One flag per slot: axes that no row splits collapse to length 1.
        for path, axes in split.items():
            grid = tuple(shapes[path][a] if used else 1 for a, used in enumerate(axes))
            claimed[path], self.filled[path] = np.zeros(grid, bool), np.zeros(grid, bool)
        for row in self.rows:
            if claimed[row.target_path][row.index].any():
                self.duplicates.append(f'{row.slot} (by {row.source_name})')
            claimed[row.target_path][row.index] = True
            if row.source_name:
                where = np.zeros_like(claimed[row.target_path])
                where[row.index] = True
                for slot in np.argwhere(where):
                    self.by_slot[row.target_path, tuple(slot)] = row.source_name

    def mark(self, row: Row) -> None:
        self.filled[row.target_path][row.index] = True

    def unfilled(self) -> list[str]:
        """Every slot still empty, with the source name the table expects there."""
        lines = []
        for path, filled in self.filled.items():
            for slot in np.argwhere(~filled):
                index = tuple(int(i) for i in slot)
                source = self.by_slot.get((path, index))
                inside = ','.join(
                    ':' if filled.shape[a] == 1 and self.shapes[path][a] != 1 else str(i)
                    for a, i in enumerate(index)
                )
                lines.append(
                    path
                    + (f'[{inside}]' if index else f' {tuple(self.shapes[path])}')
                    + (f' (from {source})' if source else '')
                )
        return lines


def _slot_shape(shape: tuple[int, ...], index: tuple[int | slice, ...]) -> tuple[int, ...]:
    return tuple(
        size for axis, size in enumerate(shape) if axis >= len(index) or index[axis] == ALL
    )


def _repeated(names: Iterable[str | None]) -> list[str]:
    seen, again = set(), []
    for name in names:
        if name is not None and name in seen:
            again.append(name)
        seen.add(name)
    return again


def _problem(
    row: Row, tensors: Mapping[str, np.ndarray], slot_shape: tuple[int, ...], kind: np.dtype
) -> str:
    """Why a row cannot fill its slot; empty if it can."""
    if row.source_name is None:
        return ''
    tensor = tensors[row.source_name]
    try:
        value = row.forward(tensor)
    except einops.EinopsError:
        value = None
    if value is None or value.shape != slot_shape:
        got = '' if value is None or not row.pattern else f' -> {value.shape}'
        pattern = f' by {row.pattern!r}' if row.pattern else ''
        return f'{row.source_name} {tensor.shape}{got}{pattern}, but {row.slot} needs {slot_shape}'
    problem = _cast_problem(value, kind)
    return f'{row.source_name}: {problem}' if problem else ''


def _cast_problem(value: np.ndarray, kind: np.dtype) -> str:
    """Why `value` must not be cast to `kind`; empty if it may."""
    if jnp.issubdtype(value.dtype, jnp.floating) != jnp.issubdtype(kind, jnp.floating):
        return f'dtype {value.dtype} where {kind} is expected'
    if kind == np.float16 and value.dtype != np.float16 and value.size:
        largest = np.abs(np.where(np.isfinite(value), value, 0)).max()
        if largest > np.finfo(np.float16).max:
            return f'a value of {float(largest):.3g} overflows float16; use bfloat16 or float32'
    return ''


def numbered(names: Iterable[str], prefix: str) -> int:
    """How many blocks `prefix`0, `prefix`1, … there are: one more than the largest number.

    A gap then shows as unfilled when the tree is filled.

    Raises:
      ValueError: a number that no complete file can reach.
    """
    names = list(names)
    starts = [name.removeprefix(prefix).split('.')[0] for name in names if name.startswith(prefix)]
    largest = max((int(start) for start in starts if start.isdecimal()), default=-1)
    if largest >= min(len(names), MAX_BLOCKS):
        limit = 'tensors' if largest < MAX_BLOCKS else f'tensors, or than {MAX_BLOCKS}'
        raise ValueError(f'{prefix}{largest}: more blocks than {limit}')
    return largest + 1


def tensor_shape(tensors: Mapping[str, Any], name: str, rank: int, family: str) -> tuple[int, ...]:
    """The shape of a tensor that shows a size.

    Raises:
      ValueError: it is missing, empty or of another rank; `family` names what the file should be.
    """
    if name not in tensors:
        raise ValueError(f'{name} is missing; this is no complete {family} checkpoint')
    found = tuple(tensors[name].shape)
    if len(found) != rank or 0 in found:
        raise ValueError(f'{name}: shape {found}, expected {rank} axes, none of them empty')
    return found


def hidden_ratio(hidden: int, width: int) -> float:
    """Ratio r with int(width * r) == hidden, which a plain quotient can miss by rounding."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def count(tree: Mapping[str, Any]) -> int:
    """Number of parameters of a tree (arrays or abstract leaves)."""
    return sum(math.prod(leaf.shape) for leaf in flatten(tree).values())


def tree_sha256(tree: Any) -> str:
    """SHA-256 over the leaves of any pytree, in the order of their paths.

    Each leaf adds its path, dtype, shape and bytes in C order, so equal digests mean bit-equal
    trees. Arrays must be addressable from this process.
    """
    named = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = '/'.join(
            str(getattr(k, 'key', getattr(k, 'idx', getattr(k, 'name', k)))) for k in keys
        )
        named[path] = leaf
    digest = hashlib.sha256()
    for path, leaf in sorted(named.items()):
        leaf = leaf if isinstance(leaf, PartedArray) else np.asarray(leaf)
        digest.update(f'{path}\0{leaf.dtype.name}\0{leaf.shape}\0'.encode())
        for part, _ in parts_of(leaf):
            digest.update(np.array(part, order='C', copy=None).reshape(-1).view(np.uint8))
    return digest.hexdigest()
