"""A family that stands on no backbone and keeps batch statistics, and a task with own batch keys.

For tests only: what every new family and task may rely on. As a program it is `dist_jax` with both:

    python tests/conv_family.py train --config=tests/conv_family.py --workdir=...
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dist_jax import convert
from dist_jax.configs import base
from dist_jax.models import FAMILIES, Family, converted, heads, naming
from dist_jax.models.api import Model, ParamGroup
from dist_jax.models.batch_norm import BatchNorm
from dist_jax.models.layers import Pixels, as_pixels
from dist_jax.models.params import Row
from dist_jax.models.source_files import SourceFiles
from dist_jax.sharding import ShardingRule, gather_rows
from dist_jax.tasks import TASKS
from dist_jax.tasks.api import Figures


def get_config(variant: str = '') -> ConfigDict:
    """A few steps on the built-in clips."""
    config = base.get_config()
    base.demo(config)
    config.backbone.update(name='', checkpoint='')
    config.model = ConfigDict(
        {'family': 'conv', 'dtype': 'float32', 'width': 4, 'kernel_frames': 3}
    )
    config.update(batch_size=8, num_steps=6, num_epochs=1.0)
    config.optimizer.update(name='sgd', peak_lr=0.1, warmup_epochs=0.0)
    config.data.update(num_frames=4, image_size=24)
    config.eval.update(batch_size=8, num_clips=1)
    config.checkpoint.every_steps = 2
    config.log.update(every_steps=1, tensorboard=False)
    config.task.name = variant or 'classify'
    return config.lock()


class ConvNet(nn.Module):
    """One convolution, batch statistics, a mean over everything, a head."""

    width: int
    kernel_frames: int
    groups: int
    head: heads.Head
    dtype: Any
    shift: bool = False

    @nn.compact
    def __call__(self, inputs, *, mask=None, train=False):
        if 'video' not in inputs:  # a query
            return {'hint': inputs['hint']}
        kernel = (self.kernel_frames, 3, 3)
        conv = nn.Conv(self.width, kernel, (1, 4, 4), use_bias=False, dtype=self.dtype, name='conv')
        x = conv(as_pixels(inputs['video']))
        x = BatchNorm(self.groups, keep=0.5, name='bn')(x, mask, train)
        x = nn.relu(x).astype(jnp.float32).mean((1, 2, 3))
        if 'hint' in inputs:
            x = x + inputs['hint'].mean(-1, keepdims=True)
        if self.shift:
            x = x + self.param('shift', nn.initializers.zeros, (self.width,))
        return {'embedding': x, 'logits': self.head(x, {})}


def build(
    *,
    num_classes,
    num_frames,
    dtype,
    width,
    kernel_frames,
    batch_norm_groups=1,
    shift=False,
    spread=False,
) -> Model:
    """The network; a kernel over fewer frames becomes one over more.

    Without `shift` it leaves that of others behind; with `spread` it begins with the middle of
    their kernels in all of their three frames.
    """
    del num_frames

    def fit(path: str, stored: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        assert path == 'conv/kernel'
        before = (shape[0] - stored.shape[0]) // 2
        return jnp.pad(stored, [(before, before), *[(0, 0)] * 4])

    def begin(variables):
        variables = jax.tree.map(lambda x: x, variables)
        conv = variables['params']['conv']
        conv['kernel'] = conv['kernel'][1] * jnp.array([0.25, 0.5, 0.25]).reshape(3, 1, 1, 1, 1)
        return variables

    return Model(
        net=ConvNet(
            width, kernel_frames, batch_norm_groups, heads.Head('linear', num_classes), dtype, shift
        ),
        dtype=dtype,
        pixels=Pixels((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)),
        param_groups=(ParamGroup('kernel$'), ParamGroup('', weight_decay=0.0)),
        sharding_rules=(ShardingRule(''),),
        fit=fit,
        left_behind=('^shift$',),
        begin=begin if spread else None,
    )


@dataclasses.dataclass(frozen=True)
class Reading:
    """The two keys: a hint that the network reads, and where the clip is in the list."""

    spec: ClassVar = {'hint': ((2,), np.float32), 'place': ((), np.int32)}

    def __call__(self, record, label, rng):
        hint = np.zeros(2) if rng is None else rng.random(2)
        return {'hint': np.float32(hint), 'place': np.int32(len(record.video_id))}


class Spread:
    """Embeddings of a batch should lie apart, and at `place`: a loss that couples rows."""

    labels = ()
    needs_classes = needs_captions = False
    annotate = eval_annotate = Reading()
    element_spec: ClassVar = {
        'hint': jax.ShapeDtypeStruct((2,), jnp.float32),
        'place': jax.ShapeDtypeStruct((), jnp.int32),
    }
    input_keys = eval_input_keys = ('hint',)
    couples_rows = True
    mixes = False
    select_by = 'nearness'

    def __init__(self, labels):
        """Of a list's classes nothing is read."""

    def check_list(self, source, where):
        """Any will do."""

    def samples(self, source):
        return source

    def check(self, outputs):
        assert outputs['embedding'].ndim == 2

    def targets(self, batch):
        return batch['place'].astype(jnp.float32)

    def loss(self, outputs, targets, mask):
        x = outputs['embedding'].mean(-1)
        others = (x * mask).sum() - x * mask
        return (x - targets) ** 2 - 0.01 * jnp.abs(x - others)

    def predict(self, outputs, num_views):
        x = outputs['embedding'].mean(-1)
        return {'position': x.reshape(-1, num_views).mean(1)}

    def queries(self, source):
        """How long the names of the videos are."""
        names = [source[i].video_id for i in range(len(source))]
        return {'hint': np.float32([[len(name), 0] for name in names])}

    def predict_queries(self, outputs):
        return {'length': outputs['hint'][:, 0]}

    def evaluator(self, source):
        return Nearness()


class Nearness:
    """How near all videos of the list are to their places."""

    def __init__(self):
        self.parts, self.queries = [], []

    def add_queries(self, rows: Mapping[str, Any]) -> None:
        self.queries.append({key: rows[key] for key in ('index', 'hint', 'length')})

    def add(self, rows: Mapping[str, Any]) -> None:
        self.parts.append({key: rows[key] for key in ('index', 'place', 'position')})

    def result(self) -> Figures:
        rows = gather_rows(self.parts)
        nearness = -float(np.abs(rows['position'] - rows['place']).mean())
        queries = gather_rows(self.queries)
        np.testing.assert_array_equal(queries['length'], queries['hint'][:, 0])
        details = {'order': rows['index'].tolist(), 'queries': queries['index'].tolist()}
        return Figures({'nearness': nearness}, line=f'nearness {nearness:.3f}', details=details)


def rows(sizes: Mapping[str, Any]) -> list[Row]:
    """Every tensor of the network, its statistics among them, under names of another project."""
    del sizes
    table = {
        'conv.weight': ('conv/kernel', 'o i t h w -> t h w i o'),
        'bn.weight': ('bn/scale', None),
        'bn.bias': ('bn/bias', None),
        'bn.running_mean': ('batch_stats/bn/mean', None),
        'bn.running_var': ('batch_stats/bn/var', None),
        'fc.weight': ('head/column_0/classifier/kernel', 'o i -> i o'),
        'fc.bias': ('head/column_0/classifier/bias', None),
    }
    return [Row(name, path, pattern) for name, (path, pattern) in table.items()]


FAMILIES_ROW = Family(build, reads_backbone=False, batch_statistics=True)


def _plan(source: SourceFiles, options: naming.Options) -> naming.Plan:
    options.refuse('conv', 'the file says all')
    width, _, frames, *_ = source.tensors['conv.weight'].shape
    classes = len(source.tensors['fc.bias'])
    model = build(
        num_classes=(classes,), num_frames=1, dtype=jnp.float32, width=width, kernel_frames=frames
    )
    shapes = jax.eval_shape(
        model.net.init, jax.random.key(0), {'video': jnp.zeros((1, 1, 8, 8, 3))}
    )
    return naming.Plan(
        name='conv',
        spec={'width': width},
        tensors=source.tensors,
        rows=rows({}),
        abstract=converted.stored_tree(shapes),
        collections=('batch_stats',),
    )


NAMING = naming.Naming(
    kind='conv',
    family='conv',
    matches=lambda source: 'bn.running_mean' in source.tensors,
    plan=_plan,
    export=naming.Export(rows, lambda model, backbone: {}, prefix='', head='linear'),
)


def register() -> None:
    """What a new family and a new task put into the tables of the library."""
    FAMILIES['conv'] = FAMILIES_ROW
    TASKS['spread'] = Spread
    convert.KINDS['conv'] = NAMING


if __name__ == '__main__':
    from dist_jax.main import main
    from dist_jax.reports import page

    register()
    page.write_report = lambda *_: None  # others draw it
    sys.exit(main())
