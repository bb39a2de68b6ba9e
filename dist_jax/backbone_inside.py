"""The frozen backbone that authors store beside a network: what it is, and whether it is ours.

Networks are converted without it. It can be compared with a converted one, and a network written
back together with one. Backbones may be larger than memory: they are read tensor by tensor.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dist_jax.backbones import family_of
from dist_jax.models import BACKBONES, converted
from dist_jax.models.backbone import Backbone
from dist_jax.models.naming import Inside, Naming, Plan
from dist_jax.models.params import Outgoing, Row, flatten, outgoing, read_outgoing, unflatten

MOST_NAMED = 8  # tensors in a message
KEY = 'backbone'  # in the metadata of a converted network

Tree = dict[str, Any]


def names(naming: Naming, plan: Plan) -> list[str]:
    """Tensors of a file that are those of a frozen backbone."""
    return naming.inside[plan.backbone].names(plan.tensors) if plan.backbone else []


def describe(naming: Naming, plan: Plan) -> dict[str, Any] | None:
    """What the metadata of a network says of the backbone in its file, before it is compared.

    Returns:
      `family`, `name` (of the published size, or ''), `geometry` (the fields of its spec that the
      tensors show), `dtypes` (of its tensors in the file, by name) and `compared` (None; see
      `compare`). None where the file holds no backbone.

    Raises:
      ValueError: a tensor that shows a size is missing.
    """
    found = names(naming, plan)
    if not found:
        return None
    geometry = naming.inside[plan.backbone].geometry(plan.tensors)
    specs = BACKBONES[plan.backbone].specs.items()
    fits = (
        name
        for name, spec in specs
        if all(getattr(spec, field) == value for field, value in geometry.items())
    )
    return {
        'family': plan.backbone,
        'name': next(fits, ''),
        'geometry': geometry,
        'dtypes': {name: plan.tensors[name].dtype.name for name in found},
        'compared': None,
    }


def compare(naming: Naming, plan: Plan, found: Mapping[str, Any], backbone: Backbone) -> Tree:
    """Compares the backbone in a file with a converted one, both rounded to float16.

    The authors halve some tensors and not others. What was converted to bfloat16 is compared as
    that, after float16.

    Args:
      naming: of the file.
      plan: of the file.
      found: of `describe`.
      backbone: converted.

    Returns:
      `path`, `name` and `params_sha256` of the converted one, and `differing`, names of tensors.

    Raises:
      ValueError: it is of another kind or geometry.
    """
    family, tensors = family_of(backbone), plan.tensors
    own = {field: getattr(backbone.spec, field, None) for field in found['geometry']}
    unlike, ours = [], []
    if family == found['family'] and own == found['geometry']:
        inside = naming.inside[family]
        released = {row.source_name for row in released_rows(inside, backbone.spec)}
        ours = _outgoing(inside, backbone, {*released, *found['dtypes']})
        shapes = {each.name: each.shape for each in ours if each.name}
        unlike = [
            f'{name}: {_shape(tensors, name)} inside, {shapes.get(name, "none")} there'
            for name in (shapes | found['dtypes'])
            if _shape(tensors, name) != shapes.get(name)
        ]
    if unlike or not ours:
        lines = [
            f'the backbone inside is {shown(found)}, which does not fit {backbone.path}: '
            f'{backbone.name} ({family}, {_sizes(own)})',
            *(f'  {line}' for line in unlike[:MOST_NAMED]),
        ]
        if len(unlike) > MOST_NAMED:
            lines.append(f'  … and {len(unlike) - MOST_NAMED} more')
        raise ValueError('\n'.join(lines))
    differing = [name for name, value in read_outgoing(ours) if not _same(tensors[name], value)]
    return {
        'path': os.fspath(backbone.path),
        'name': backbone.name,
        'params_sha256': backbone.params_sha256,
        'differing': differing,
    }


def _shape(tensors: Mapping[str, np.ndarray], name: str) -> tuple[int, ...] | str:
    return tensors[name].shape if name in tensors else 'none'


def _same(theirs: np.ndarray, ours: np.ndarray) -> bool:
    """Whether values agree in the precision that both have."""
    with np.errstate(over='ignore'):  # to infinity, on both sides
        theirs = theirs.astype(np.float16)
        if ours.dtype == jnp.bfloat16:
            theirs = theirs.astype(ours.dtype)
        else:
            ours = ours.astype(np.float16)
    return np.array_equal(theirs, ours, equal_nan=True)


def shown(found: Mapping[str, Any] | None) -> str:
    """A backbone in a file, for one line."""
    if found is None:
        return 'none'
    name = f'{found["name"]}: ' if found['name'] else ''
    return f'{name}{found["family"]}, {_sizes(found["geometry"])}, {len(found["dtypes"])} tensors'


def _sizes(geometry: Mapping[str, Any]) -> str:
    return ', '.join(f'{field}={value}' for field, value in geometry.items())


def export(
    naming: Naming,
    backbone: Backbone,
    prefix: str,
    dtypes: Mapping[str, str] | None,
    image_size: int | None,
) -> list[Outgoing]:
    """The tensors of a backbone as files of a network hold them.

    Args:
      naming: of the files.
      backbone: converted.
      prefix: before the names.
      dtypes: those of the file that the network is from; None for those that the released files
        hold, in the dtypes of the converted backbone.
      image_size: of the run that the network is from, in pixels; None for the backbone's own.

    Raises:
      ValueError: files of this naming hold no such backbone.
    """
    family = family_of(backbone)
    if family not in naming.inside:
        raise ValueError(
            f'--with_backbone: files with {naming.kind} names hold no backbone of family {family}'
        )
    inside = naming.inside[family]
    if image_size is not None:
        backbone = backbone.at(image_size)
    if dtypes is None:
        wanted = {row.source_name for row in released_rows(inside, backbone.spec)}
    else:
        wanted = set(dtypes)
    lacking = wanted - {row.source_name for row in inside.rows(backbone.spec)}
    if lacking:
        raise ValueError(
            f'{backbone.path} ({backbone.name}) has not all tensors that the file held beside the '
            f'network, such as {min(lacking)}; pass --backbone with the one that it belongs to'
        )
    return _outgoing(inside, backbone, wanted, prefix, dtypes)


def released_rows(inside: Inside, spec: Any) -> list[Row]:
    """Rows of what the released files hold of a backbone."""

    def held(path: str) -> bool:
        return not any(path == part or path.startswith(f'{part}/') for part in inside.left_out)

    return [row for row in inside.rows(spec) if row.source_name and held(row.target_path)]


def _outgoing(
    inside: Inside,
    backbone: Backbone,
    names: Collection[str],
    prefix: str = '',
    dtypes: Mapping[str, str] | None = None,
) -> list[Outgoing]:
    """Tensors of a backbone under the names that its files have; names without a row are none."""
    kind, spec = backbone.kind, backbone.spec
    rows = inside.rows(spec)
    targets = {row.target_path for row in rows if row.source_name in names}
    tree = flatten(converted.stored_arrays(backbone.path, targets))
    for path in targets & set(kind.tables):
        tree[path] = kind.resize(tree[path].whole(), spec).astype(tree[path].dtype)
    rows = [
        row
        for row in rows
        if row.target_path in targets and (row.source_name is None or row.source_name in names)
    ]
    return outgoing(unflatten(tree), rows, prefix, dtypes)
