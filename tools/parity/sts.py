"""STS: convolutions, and whole networks with their stages, statistics, loss and every gradient.

Networks were recorded in float64. In float32 they are deep enough for rounding to show: the rules
are those that the recordings' own float32 runs would pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dist_jax import losses
from dist_jax.models import conv3d, converted, sts, sts_params
from dist_jax.models.params import Tree, export_tree, import_tree, unflatten
from tools.parity.golden import Golden

_TO_OURS = (0, 2, 3, 4, 1)  # (B, C, T, H, W) -> (B, T, H, W, C)
_TO_THEIRS = (0, 4, 1, 2, 3)
_KERNEL_TO_OURS = (2, 3, 4, 1, 0)  # (O, I, kt, kh, kw) -> (kt, kh, kw, I, O)
_KERNEL_TO_THEIRS = (4, 3, 0, 1, 2)

_CAPTURED = (sts.Unit, sts.Block, sts.Pathway)

# Of networks in float32, (forward, gradient): by their metadata, PyTorch's own float32 runs of the
# recorded ones differ from float64 by up to 2e-5 in logits and 7e-4 in the length of a gradient.
FLOAT32_BOUNDS = (2e-5, 7e-4)

# A network is run once, and compiling it takes longer than that.
_QUICK = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}


def matches(golden: Golden) -> bool:
    """Whether the file records STS convolutions or networks."""
    return is_network(golden) or isinstance(golden.config.get('cases'), dict)


def is_network(golden: Golden) -> bool:
    """Whether the file records a network."""
    return {'runs', 'groups'} <= set(golden.config)


def run(golden: Golden, dtype: Any = jnp.float32) -> dict[str, np.ndarray]:
    """Runs everything that is recorded.

    Args:
      golden: of convolutions or of a network.
      dtype: float64 only with 64-bit types switched on.

    Raises:
      ValueError: recorded parameters and recorded sizes contradict each other.
    """
    parts = _runs(golden, dtype) if is_network(golden) else _cases(golden, dtype)
    return {name: np.asarray(value) for part in parts for name, value in part.items()}


def error(golden: Golden, name: str, recorded: np.ndarray, ours: np.ndarray) -> float | None:
    """How far a gradient of a network is off; None for what is compared as in other families.

    Rounding in the normalised layers moves elements of a gradient by much more than its length, so
    lengths of differences are compared. Of `gradstats` it is the largest over parameters of: the
    lengths' ratio, the sum of gradient times parameter over both lengths, and the mean over what
    it could be. That sum is 0 on paper for a convolution before a batch norm.
    """
    section, _, rest = name.partition('/')
    if not is_network(golden):
        return None
    if section == 'grads':
        length = np.linalg.norm(recorded)
        return float(np.linalg.norm(ours - recorded) / (length or 1))
    if section != 'gradstats':
        return None
    params = _params(golden, rest)
    lengths = np.asarray([np.linalg.norm(params[each]) for each in _order(golden, rest)])
    sizes = np.asarray([params[each].size for each in _order(golden, rest)])
    of_gradient = np.where(recorded[:, 0] > 0, recorded[:, 0], 1)
    scales = np.stack([of_gradient, of_gradient * lengths, of_gradient / np.sqrt(sizes)], 1)
    return float(np.abs((ours - recorded) / scales).max())


# Convolutions.


def _cases(golden: Golden, dtype: Any) -> Iterator[dict[str, Any]]:
    for name, case in golden.config['cases'].items():
        if name == 'inflate':
            yield _inflated(golden, dtype)
        elif case['kind'] == 'Conv2plus1d_reshape':
            yield _factorised(golden, name, case, dtype)
        else:
            yield _convolution(golden, name, case['stride_s'], dtype)


def _convolution(golden: Golden, case: str, stride: int, dtype: Any) -> dict[str, Any]:
    x, upstream = (_activations(golden, f'inputs/{case}/{part}', dtype) for part in ('x', 'cot'))
    kernel = golden.tensors[f'params/{case}/weight'].transpose(_KERNEL_TO_OURS)

    def apply(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
        return conv3d.sts_conv3d(x, kernel, stride), None

    y, (to_x, to_kernel), _ = _pulled(apply, (x, jnp.asarray(kernel, dtype)), upstream)
    return {
        f'outputs/{case}/y': y.transpose(_TO_THEIRS),
        f'grads/{case}/x': to_x.transpose(_TO_THEIRS),
        f'grads/{case}/weight': to_kernel.transpose(_KERNEL_TO_THEIRS),
    }


def _factorised(golden: Golden, case: str, config: Any, dtype: Any) -> dict[str, Any]:
    """A (2+1)D convolution, with running statistics and with those of the batch."""
    kernel, stride = tuple(config['kernel']), config['stride'][1]
    separable = kernel[0] > 1
    spec = sts.UnitSpec('', config['cout'], kernel, stride, factorised=True, separable=separable)
    unit = sts.Factorised(spec, sts.Rules(dtype))
    x, upstream = (_activations(golden, f'inputs/{case}/{part}', dtype) for part in ('x', 'cot'))
    leaves = {
        'params/conv_s/kernel': 'params/{}/conv_s.weight',
        'params/conv_t/kernel': 'params/{}/conv_t.weight',
        'params/bn_s/scale': 'params/{}/bn_s.weight',
        'params/bn_s/bias': 'params/{}/bn_s.bias',
        'batch_stats/bn_s/mean': 'buffers/{}/bn_s.running_mean',
        'batch_stats/bn_s/var': 'buffers/{}/bn_s.running_var',
    }
    read = {path: golden.tensors[name.format(case)] for path, name in leaves.items()}
    variables = unflatten(
        {
            path: jnp.asarray(leaf.transpose(_KERNEL_TO_OURS) if leaf.ndim == 5 else leaf, dtype)
            for path, leaf in read.items()
        }
    )
    found = {}
    for mode in ('eval', 'train'):

        def apply(params: Tree, x: jax.Array, train: bool = mode == 'train') -> tuple:
            return unit.apply(
                {**variables, 'params': params}, x, None, train, mutable='batch_stats'
            )

        y, (to_params, to_x), updated = _pulled(apply, (variables['params'], x), upstream)
        prefix = f'{case}/{mode}'
        found |= {
            f'outputs/{prefix}/y': y.transpose(_TO_THEIRS),
            f'grads/{prefix}/x': to_x.transpose(_TO_THEIRS),
        }
        for path, name in leaves.items():
            top, module, leaf = path.split('/')
            name = name.rpartition('/')[2]
            if top == 'params':
                value = to_params[module][leaf]
                value = value.transpose(_KERNEL_TO_THEIRS) if value.ndim == 5 else value
                found[f'grads/{prefix}/{name}'] = value
            else:
                found[f'outputs/{prefix}/buffers/{name}'] = updated[top][module][leaf]
    return found


def _pulled(apply: Callable[..., Any], inputs: tuple[Any, ...], upstream: jax.Array) -> Any:
    """(value, gradients of the inputs, what else came out) of a function of (value, rest)."""

    def run(*inputs: Any) -> Any:
        y, pull, rest = jax.vjp(apply, *inputs, has_aux=True)
        return y, pull(upstream), rest

    return jax.jit(run, compiler_options=_QUICK)(*inputs)


def _inflated(golden: Golden, dtype: Any) -> dict[str, Any]:
    kernels = {
        name: jnp.asarray(value.transpose(_KERNEL_TO_OURS), dtype)
        for name, value in golden.section('inputs').items()
        if name.startswith('inflate/')
    }
    return {
        f'outputs/{name}': value.transpose(_KERNEL_TO_THEIRS)
        for name, value in sts.inflated(kernels).items()
    }


def _activations(golden: Golden, name: str, dtype: Any) -> jax.Array:
    return jnp.asarray(golden.tensors[name].transpose(_TO_OURS), dtype)


# Networks.


def _group(golden: Golden, name: str) -> dict[str, Any]:
    return golden.config['groups'][golden.config['runs'][name]['group']]


def _order(golden: Golden, name: str) -> list[str]:
    """Names of the parameters of a run."""
    return golden.config['runs'][name].get('param_order') or _group(golden, name)['param_order']


def _of_images(name: str) -> bool:
    return name.rpartition('/')[2].startswith('v3d')


def _params(golden: Golden, name: str) -> dict[str, np.ndarray]:
    """Parameters of a run under the names of the authors' files.

    Raises:
      ValueError: one is not recorded.
    """
    return {each: _tensor(golden, name, 'params', each) for each in _order(golden, name)}


def _tensor(golden: Golden, name: str, section: str, each: str) -> np.ndarray:
    """Both forms share what is before the classifier; variants, what is not under their prefix."""
    prefix = _group(golden, name)['prefix']
    shared = each.replace(sts_params.ROOTS['image'], sts_params.ROOTS['video'])
    places = [f'{prefix}v3d/{each}', f'v3d/{each}', f'{prefix}{shared}', shared]
    for place in places:
        if f'{section}/{place}' in golden.tensors:
            return golden.tensors[f'{section}/{place}']
    raise ValueError(f'{golden.file}: run {name!r} needs {each!r}, which is not in {section}')


def _statistics(golden: Golden, name: str) -> dict[str, np.ndarray]:
    """Statistics of a run, likewise."""
    prefix = _group(golden, name)['prefix']
    root = sts_params.ROOTS['image' if _of_images(name) else 'video']
    names = {each.removeprefix(prefix) for each in golden.section('buffers')}
    own = {each for each in names if each.startswith(sts_params.ROOTS['video'])}
    renamed = {each.replace(sts_params.ROOTS['video'], root) for each in own}
    return {each: _tensor(golden, name, 'buffers', each) for each in renamed}


def _runs(golden: Golden, dtype: Any) -> Iterator[dict[str, Any]]:
    for name in golden.config['runs']:
        yield _run(golden, name, dtype)


def _run(golden: Golden, name: str, dtype: Any) -> dict[str, Any]:
    """Everything that one run can have recorded."""
    tensors = _params(golden, name) | _statistics(golden, name)
    sizes = sts_params.infer_sizes(tensors)
    abstract = sts_params.abstract_variables(sizes)
    rows = sts_params.rows_of(sizes, abstract)
    tree = import_tree(tensors, rows, abstract)
    found = {converted.COLLECTIONS: sts_params.COLLECTIONS}
    variables = jax.tree.map(lambda x: jnp.asarray(x, dtype), converted.variables(tree, found))
    collections = {'batch_stats': variables['batch_stats']}

    info = golden.config['runs'][name]
    mode = 'official' if info.get('sts') else 'off'
    spec, form = sts_params.network(sizes), sizes['form']
    head = sts.classifier((sizes['num_classes'],), spec, form)
    net = sts.StsNet(spec, sts.Rules(dtype, sts=mode, form=form), head)
    video, labels = _inputs(golden, name, dtype)
    targets = losses.smooth_one_hot(labels, sizes['num_classes'], 0.0)
    train = info['mode'] == 'train'

    def forward(params: Tree, video: jax.Array) -> tuple[jax.Array, Tree]:
        outputs, seen = net.apply(
            {'params': params, **collections},
            {'video': video},
            train=train,
            mutable=['batch_stats', 'intermediates'],
            capture_intermediates=lambda module, _: isinstance(module, _CAPTURED),
        )
        (logits,) = outputs['logits']
        return losses.soft_cross_entropy(logits, targets).mean(), (logits, seen)

    (loss, (logits, seen)), gradients = jax.jit(
        jax.value_and_grad(forward, has_aux=True), compiler_options=_QUICK
    )(variables['params'], video)
    made = {'logits': logits, 'loss': loss.reshape(1)}
    made |= _features(spec, seen['intermediates'])
    tree = converted.stored_tree({'params': gradients, 'batch_stats': seen['batch_stats']})
    exported = export_tree(jax.tree.map(np.asarray, tree), rows)
    order = _order(golden, name)
    made |= {f'buffers/{each}': exported[each] for each in exported.keys() - set(order)}
    outputs = {f'outputs/{name}/{each}': value for each, value in made.items()}
    outputs |= {f'grads/{name}/{each}': exported[each] for each in order}
    sums = [
        (
            np.linalg.norm(exported[each]),
            (exported[each] * tensors[each]).sum(),
            exported[each].mean(),
        )
        for each in order
    ]
    return outputs | {f'gradstats/{name}': np.asarray(sums)}


def _inputs(golden: Golden, name: str, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Clips and labels of a run; variants without pictures of their own take the shared ones."""
    place, kind = _group(golden, name)['inputs_from'], 'video'
    if _of_images(name):
        kind = 'v3d/image'
        place = place if f'{place}{kind}' in golden.tensors else 'inputs/'
    clips = golden.tensors[f'{place}{kind}']
    clips = clips[:, :, None] if clips.ndim == 4 else clips
    labels = golden.tensors[f'{place}label']
    return jnp.asarray(clips.transpose(_TO_OURS), dtype), jnp.asarray(labels).astype(jnp.int32)


def _features(spec: sts.NetworkSpec, seen: Tree) -> dict[str, Any]:
    """Stages and features under their recorded names, of what the modules returned."""

    def output(module: str) -> Any:
        return seen[module]['__call__'][0]

    if spec.fast is not None:
        paths = {'slow': output('slow_path')[-1], 'fast': output('fast_path')[-1]}
        return {f'feat_{path}': x.transpose(_TO_THEIRS) for path, x in paths.items()}
    pathway = spec.pathway
    stem = jax.nn.relu(output(pathway.stem[-1].name))
    stages = {pathway.stem[-1].name: stem}
    if pathway.pool:
        stages['maxpool'] = sts.max_pool(stem)
    for stage, depth in enumerate(pathway.depths):
        stages[f'layer{stage + 1}'] = output(f'layer{stage + 1}_{depth - 1}')
    last = output(pathway.last[-1].name) if pathway.last else stages[f'layer{stage + 1}']
    found = {f'stage/backbone.{name}': x[:1] for name, x in stages.items()}
    found['feat'] = jax.nn.relu(last)
    return {name: x.transpose(_TO_THEIRS) for name, x in found.items()}
