"""Checkpoints of the authors of STS, for images and for videos: names, geometry, table.

Source: names of the released files (state dict under `state_dict`, maybe with `module.` before each
name). Networks for images have `get_feature.` and `classifier`, those for videos `backbone.` and
`cls_head`. Below, the paths of our tree are their names, but for what `_foreign` says.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dist_jax.models import sts
from dist_jax.models.converted import stored_tree
from dist_jax.models.naming import Export, Naming, Options, Plan
from dist_jax.models.params import Row, Tree, flatten, numbered, tensor_shape
from dist_jax.models.source_files import SourceFiles

COLLECTIONS = ('batch_stats',)

# Of `sts.FORMS` -> what names of tensors before the classifier start with.
ROOTS = {'image': 'get_feature.', 'video': 'backbone.'}

MAX_STAGES = 4
MAX_BLOCKS = 200  # of all stages; tracing a thousand takes minutes, and published ones have 50


@dataclasses.dataclass(frozen=True)
class Kind:
    """Networks of one kind, of any width and depth.

    Attributes:
      make: width, depths, ... -> network.
      sign: what names of no other kind hold.
      stem: tensor whose first axis is the width.
      path: of the names of blocks.
    """

    make: Callable[..., sts.NetworkSpec]
    sign: str
    stem: str
    path: str = ''


# The last one has no sign of its own.
KINDS = {
    'slowfast': Kind(sts.slowfast, 'fast_path.', 'slow_path.conv1.conv.weight', 'slow_path.'),
    'r2plus1d': Kind(sts.r2plus1d, '.conv_s.', 'conv1.conv.conv_t.weight'),
    'x3d': Kind(sts.x3d, '.se_module.', 'conv1_s.conv.weight'),
    'csn': Kind(sts.csn, '.conv2.0.', 'conv1.conv.weight'),
    'slowonly': Kind(sts.slowonly, '', 'conv1.conv.weight'),
}

# Of the convolutions from the fast pathway to the slow one, frames that they see -> frames of the
# fast one for each of the slow. The second is nowhere in a file; so it is in the published ones.
RATIOS = {5: 8, 7: 4}

_BLOCK = re.compile(r'(backbone|get_feature)\.((slow|fast)_path\.)?layer\d+\.\d+\.')


def is_sts_naming(tensors: Mapping[str, Any]) -> bool:
    """Names of the authors' files, without `module.`."""
    return any(_BLOCK.match(name) for name in tensors)


def infer_sizes(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Every size of a network that its tensors show.

    Args:
      tensors: names without `module.` -> array; only shapes are read.

    Returns:
      network (of `sts.NETWORKS`, None for other sizes), form, num_classes; kind (of `KINDS`) and
      options, which are the arguments of its `make`.

    Raises:
      ValueError: a tensor that shows a size is missing or has another shape.
    """
    shape = functools.partial(tensor_shape, tensors, family='STS')

    images = any(name.startswith(ROOTS['image']) for name in tensors)
    form = 'image' if images else 'video'
    root = ROOTS[form]
    name = next(name for name, kind in KINDS.items() if any(kind.sign in each for each in tensors))
    kind = KINDS[name]
    path = f'{root}{kind.path}'
    options: dict[str, Any] = {
        'width': shape(f'{root}{kind.stem}', 5)[0],
        'depths': _depths(tensors, f'{path}layer'),
    }
    if name == 'csn':
        options['stem_size'] = shape(f'{root}{kind.stem}', 5)[3]
    if name == 'slowfast':
        lateral = f'{path}conv1_lateral.conv.weight'
        frames = shape(lateral, 5)[2]
        if frames not in RATIOS:
            raise ValueError(
                f'{lateral} sees {frames} frames, but only networks of '
                f'{" or ".join(map(str, RATIOS))} there are known: how many frames the fast '
                'pathway has for one of the slow is not in a file'
            )
        options |= {
            'fast_width': shape(f'{root}fast_path.conv1.conv.weight', 5)[0],
            'fusion_kernel': frames,
            'ratio': RATIOS[frames],
        }
    if name == 'r2plus1d' and options['width'] < 2:
        raise ValueError(f'{root}{kind.stem}: of one channel, no shortcut of this network is made')
    spec = kind.make(**options)
    classifier = _heads(form, spec)[_CLASSIFIER]
    return {
        'network': next((name for name, known in sts.NETWORKS.items() if known == spec), None),
        'form': form,
        'num_classes': shape(f'{classifier}.weight', 2)[0],
        'kind': name,
        'options': options,
    }


def _depths(tensors: Mapping[str, Any], prefix: str) -> tuple[int, ...]:
    """Blocks of each stage, named `prefix`1.0 and so on."""
    stages = numbered(tensors, prefix) - 1
    if stages > MAX_STAGES:
        raise ValueError(f'{prefix}{stages}: more stages than {MAX_STAGES}')
    depths = tuple(numbered(tensors, f'{prefix}{i + 1}.') for i in range(max(stages, 1)))
    for stage, depth in enumerate(depths):
        if not depth:
            missing = f'{prefix}{stage + 1}.0'
            raise ValueError(f'{missing} is missing; this is no complete STS checkpoint')
    if sum(depths) > MAX_BLOCKS:
        raise ValueError(f'{prefix}: {sum(depths)} blocks, more than {MAX_BLOCKS}')
    return depths


def network(sizes: Mapping[str, Any]) -> sts.NetworkSpec:
    """The network of `infer_sizes`, or of `run_sizes`."""
    if 'kind' not in sizes:
        return sts.NETWORKS[sizes['network']]
    options = sizes['options']
    return KINDS[sizes['kind']].make(**options | {'depths': tuple(options['depths'])})


def run_sizes(model: Mapping[str, Any], backbone: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `sts_rows` reads, from the `model` fields of a run."""
    del backbone
    return {'network': model['network'], 'form': model['form']}


def abstract_variables(sizes: Mapping[str, Any]) -> Tree:
    """Parameters and statistics as they are stored, float32 `jax.ShapeDtypeStruct` leaves.

    Args:
      sizes: of `infer_sizes`, or of `run_sizes` for a classifier of one class.
    """
    spec, form = network(sizes), sizes['form']
    head = sts.classifier((sizes.get('num_classes', 1),), spec, form)
    net = sts.StsNet(spec, sts.Rules(jnp.float32, sts='off', form=form), head)
    clip = jax.ShapeDtypeStruct((1, 1, 32, 32, 3), jnp.float32)
    return stored_tree(jax.eval_shape(net.init, jax.random.key(0), {'video': clip}))


def sts_rows(sizes: Mapping[str, Any]) -> list[Row]:
    """Table of the names: a row for each leaf. Reads form, and what `network` does."""
    return rows_of(sizes, abstract_variables(sizes))


def rows_of(sizes: Mapping[str, Any], abstract: Tree) -> list[Row]:
    """`sts_rows` where `abstract_variables` are at hand: to make them, the network is traced."""
    spec, form = network(sizes), sizes['form']
    heads = _heads(form, spec)
    rows = []
    for path, leaf in flatten(abstract).items():
        module, _, name = path.removeprefix(f'{COLLECTIONS[0]}/').rpartition('/')
        source = heads.get(module) or f'{ROOTS[form]}{_foreign(module, spec)}'
        pattern, roll = None, 0
        if name == 'kernel':
            # In blocks, linear maps are convolutions there.
            linear = 'o i -> i o' if module in heads else 'o i 1 1 1 -> i o'
            pattern = 'o i t h w -> t h w i o' if len(leaf.shape) == 5 else linear
        # A classifier of both pathways reads the slow one first for images, and the fast one first
        # for videos, as it always does here.
        if spec.fast and form == 'image' and path == f'{_CLASSIFIER}/kernel':
            roll = sts.out_channels(spec.fast)
        rows.append(Row(f'{source}.{_LEAVES[name]}', path, pattern, roll=roll))
    return rows


_CLASSIFIER = 'head/column_0/classifier'

_LEAVES = {
    'kernel': 'weight',
    'scale': 'weight',
    'bias': 'bias',
    'mean': 'running_mean',
    'var': 'running_var',
}


def _heads(form: str, spec: sts.NetworkSpec) -> dict[str, str]:
    """Modules behind the pooling, ours -> theirs."""
    if form == 'image':
        return {_CLASSIFIER: 'classifier', 'fc1': 'fc1'}
    last = 'fc2' if spec.hidden else 'fc_cls'
    return {_CLASSIFIER: f'cls_head.{last}', 'fc1': 'cls_head.fc1'}


def _foreign(module: str, spec: sts.NetworkSpec) -> str:
    """Their name of a module before the pooling; CSN's second convolutions are lists of one."""
    name = re.sub(r'\blayer(\d+)_(\d+)\b', r'layer\1.\2', module.replace('/', '.'))
    if spec.pathway.block is sts.csn_block:
        name = re.sub(r'^(layer\d+\.\d+\.conv2)\b', r'\1.0', name)
    return name


def _plan(source: SourceFiles, options: Options) -> Plan:
    options.refuse('sts', 'all sizes are in its files')
    sizes = infer_sizes(source.tensors)
    blocks = sum(sizes['options']['depths'])
    name = sizes['network'] or f'{sizes["kind"]}_{sizes["options"]["width"]}x{blocks}'
    abstract = abstract_variables(sizes)
    return Plan(
        name=f'sts_{name}_{sizes["form"]}',
        spec=sizes,
        tensors=source.tensors,
        rows=rows_of(sizes, abstract),
        abstract=abstract,
        ignore=('*.num_batches_tracked',),
        collections=COLLECTIONS,
    )


NAMINGS = (
    Naming(
        kind='sts',
        family='sts',
        matches=lambda source: is_sts_naming(source.tensors),
        plan=_plan,
        export=Export(sts_rows, run_sizes, prefix='', head='linear'),
    ),
)
