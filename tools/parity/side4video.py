"""Side4Video: tokens of the backbone, every layer, statistics, logits, loss, every gradient."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from dist_jax import losses
from dist_jax.models import (
    clip,
    clip_params,
    converted,
    eva,
    eva_params,
    side4video,
    side4video_params,
)
from dist_jax.models.backbone import Backbone, Taps
from dist_jax.models.params import (
    Row,
    Tree,
    export_tree,
    flatten,
    hidden_ratio,
    import_tree,
    tensor_shape,
    unflatten,
)
from tools.parity.golden import Golden

# Recorded name -> ours, of what every layer did.
_OF_LAYERS = {
    'x_side': 'stream',
    'x_mixed': 'mixed',
    'conv_out': 'conv',
    'attn_out': 'attn',
    'cls_side': 'class',
    'cls_shifted': 'shifted',
}


def matches(golden: Golden) -> bool:
    """Whether the file records a recognition network of Side4Video."""
    return 'side_dim' in golden.config and 'num_classes' in golden.config


def run(golden: Golden) -> dict[str, np.ndarray]:
    """Runs the whole model on the recorded parameters and clips, with both kinds of statistics.

    Raises:
      ValueError: recorded parameters and recorded sizes contradict each other.
    """
    config = golden.config
    _check_inputs(golden)
    tensors = golden.section('params') | golden.section('buffers')
    hparams = side4video_params.infer_hparams(tensors)
    sizes = {name: hparams[name] for name in ('side_dim', 'width', 'patch_size', 'num_classes')}
    sizes['image_size'] = hparams['grid'] * hparams['patch_size']
    _agree(golden, sizes | {'arch': 'eva' if hparams['post_norm'] else 'clip'}, 'params')
    rows = side4video_params.side4video_rows(hparams)
    tree = import_tree(tensors, rows, side4video_params.abstract_variables(hparams))
    found = {converted.COLLECTIONS: side4video_params.COLLECTIONS}
    variables = jax.tree.map(jnp.asarray, converted.variables(tree, found))

    backbone, frozen = eva_inside(golden) if hparams['post_norm'] else clip_inside(golden)
    model = side4video.build(
        backbone,
        num_classes=(hparams['num_classes'],),
        num_frames=config['T'],
        tap_every=tap_every(golden, hparams['depth']),
        dtype=jnp.float32,
        **side4video_params.build_options(hparams),
    )
    labels = jnp.asarray(golden.tensors['inputs/labels']).astype(jnp.int32)
    targets = losses.smooth_one_hot(labels, hparams['num_classes'], config['label_smoothing'])
    taps = Taps(outputs=tuple(range(backbone.spec.depth)))

    def loss_of(params: Tree, stats: Tree, features: Tree, train: bool) -> tuple[jax.Array, Tree]:
        outputs, updated = model.net.apply(
            {'params': params, **stats},
            features,
            train=train,
            intermediates=True,
            mutable=list(stats),
        )
        return losses.soft_cross_entropy(outputs['logits'][0], targets).mean(), (outputs, updated)

    @jax.jit
    def all_of(variables: Tree, frozen: Tree, video: jax.Array) -> tuple[Any, ...]:
        frames = rearrange(video, 'b t h w c -> (b t) h w c')
        tokens = backbone.encode_image(frozen['visual'], frames, taps)['outputs']
        features = model.inputs(frozen, {'video': video})
        stats = dict(variables)
        params = stats.pop('params')
        gradients = jax.value_and_grad(loss_of, has_aux=True)
        return tokens, *(gradients(params, stats, features, train) for train in (False, True))

    video = jnp.asarray(golden.tensors['inputs/video'])
    tokens, *modes = jax.device_get(all_of(variables, frozen, video))
    ours = {
        f'{mode}/backbone_tokens/{i}': x.reshape(*video.shape[:2], *x.shape[1:])
        for i, x in enumerate(tokens)
        for mode in ('eval', 'train')
    }
    for mode, section, ((loss, (outputs, updated)), grads) in zip(
        ('eval', 'train'), ('eval_grads', 'grads'), modes, strict=True
    ):
        ours |= _forward(mode, loss, outputs)
        exported = export_tree(converted.stored_tree({'params': grads, **updated}), rows)
        for name, value in exported.items():
            if not name.rpartition('.')[2].startswith('running_'):
                ours[f'{section}/{name}'] = value
                ours[f'{section}_norm/{name}'] = np.sqrt(np.square(value.astype(np.float64)).sum())
            elif mode == 'train':
                ours[f'train_buffers/{name}'] = value
    return ours


def _forward(mode: str, loss: np.ndarray, outputs: Tree) -> dict[str, np.ndarray]:
    """What came out, under its recorded names."""

    def grid(x: np.ndarray) -> np.ndarray:
        return (
            x if x.ndim == 3 else rearrange(x, 'b t (h w) c -> b t h w c', h=math.isqrt(x.shape[2]))
        )

    found = {
        f'{mode}/x_side/stem': grid(outputs['stem']),
        f'{mode}/feature': outputs['embedding'],
        f'{mode}/logits': outputs['logits'][0],
        f'{mode}/loss': loss,
    }
    for recorded, name in _OF_LAYERS.items():
        for i, value in enumerate(outputs['layers'][name]):
            found[f'{mode}/{recorded}/{i}'] = grid(value)
    return found


def tap_every(golden: Golden, depth: int) -> int:
    """From which blocks the `depth` layers of the side network read.

    Of all of CLIP's, and of every second one of EVA's, as released; else evenly, as far as the
    blocks go.

    Raises:
      ValueError: no spacing gives so many.
    """
    layers = golden.config['layers']
    released = 2 if golden.config['arch'] == 'eva' else 1
    for every in (released, max(layers // depth, 1)):
        if layers // every == depth:
            return every
    raise ValueError(
        f'{golden.file}: config says layers={layers}, params have taps of {depth} of them, which '
        'are not every n-th'
    )


_NEEDED = ('arch', 'B', 'T', 'image_size', 'patch_size', 'width', 'layers', 'label_smoothing')
_NEEDED_BESIDE = {'clip': ('heads',), 'eva': ('head_width', 'postnorm', 'rope', 'pt_hw_seq_len')}


def _check_inputs(golden: Golden) -> None:
    config, inputs = golden.config, golden.section('inputs')
    if config.get('arch') not in _NEEDED_BESIDE:
        raise ValueError(
            f'{golden.file}: config says arch={config.get("arch")!r}, known are '
            f'{list(_NEEDED_BESIDE)}'
        )
    needed = (*_NEEDED, *_NEEDED_BESIDE[config['arch']])
    missing = [f'config field {name}' for name in needed if name not in config]
    missing += [f'inputs/{name}' for name in ('video', 'labels') if name not in inputs]
    if missing:
        raise ValueError(f'{golden.file}: {", ".join(missing)} missing')
    for name in needed:
        if name != 'arch' and not isinstance(config[name], (int, float)):
            raise ValueError(f'{golden.file}: config says {name}={config[name]!r}, not a number')
    size = config['image_size']
    for name, shape in (
        ('video', (config['B'], config['T'], size, size, 3)),
        ('labels', (config['B'],)),
    ):
        if inputs[name].shape != shape:
            raise ValueError(
                f'{golden.file}: inputs/{name} is {inputs[name].shape}, by its config {shape}'
            )


def _agree(golden: Golden, found: dict[str, Any], section: str) -> None:
    for name, value in found.items():
        recorded = golden.config.get(name, value)
        if recorded != value:
            raise ValueError(
                f'{golden.file}: config says {name}={recorded}, the shapes of {section} {value}'
            )


def clip_inside(golden: Golden) -> tuple[Backbone, Tree]:
    """The frozen CLIP in a file, and its tree."""
    weights = golden.section('backbone')
    width, patch_size = clip_params.patch_sizes(weights, 'visual.conv1.weight')
    table, blocks = 'visual.positional_embedding', 'visual.transformer.resblocks.'
    tokens, _ = tensor_shape(weights, table, 2, 'CLIP')
    hidden, _ = tensor_shape(weights, f'{blocks}0.mlp.c_fc.weight', 2, 'CLIP')
    spec = clip.ClipSpec(
        image_size=clip_params.grid_of(table, tokens) * patch_size,
        patch_size=patch_size,
        width=width,
        depth=clip_params.depth_of(weights, blocks),
        num_heads=golden.config['heads'],
        embed_dim=golden.config.get('embed_dim', width),
        text_width=1,
        text_depth=1,
        text_num_heads=1,
        mlp_ratio=hidden_ratio(hidden, width),
    )
    found = dataclasses.asdict(spec)
    sizes = {name: found[name] for name in ('image_size', 'patch_size', 'width')}
    _agree(golden, sizes | {'layers': spec.depth}, 'backbone')
    return _frozen(golden, Backbone(clip.KIND, spec), clip_params.openai_rows(spec))


# Recorded size -> ours, where shapes show it.
_EVA_SIZES = {
    'layers': 'depth',
    'subln': 'sub_ln',
    'naiveswiglu': 'swiglu',
    **{name: name for name in ('image_size', 'patch_size', 'width', 'embed_dim')},
}


def eva_inside(golden: Golden) -> tuple[Backbone, Tree]:
    """The frozen EVA-CLIP in a file, and its tree."""
    config, weights = golden.config, golden.section('backbone')
    if config['width'] % config['head_width']:
        raise ValueError(
            f'{golden.file}: config says width={config["width"]} and '
            f'head_width={config["head_width"]}, which does not divide it'
        )
    spec = eva_params.eva_spec(weights, num_heads=config['width'] // config['head_width'])
    found = dataclasses.asdict(spec)
    _agree(golden, {name: found[ours] for name, ours in _EVA_SIZES.items()}, 'backbone')
    # No shape tells these. EVA-02 has one combination for each kind of projections.
    spec = dataclasses.replace(
        spec,
        post_norm=config['postnorm'],
        rope=config['rope'],
        rope_grid=config['pt_hw_seq_len'],
    )
    return _frozen(golden, Backbone(eva.KIND, spec), eva_params.visual_rows(spec))


def _frozen(golden: Golden, backbone: Backbone, rows: list[Row]) -> tuple[Backbone, Tree]:
    """The image tower, of which what comes behind the last block may not be recorded."""
    weights = golden.section('backbone')
    rows = [row for row in rows if row.source_name in weights or row.source_name is None]
    recorded = {row.target_path for row in rows}
    abstract = {
        path: leaf for path, leaf in flatten(backbone.abstract_params()).items() if path in recorded
    }
    tree = import_tree(weights, rows, unflatten(abstract))
    return backbone, jax.tree.map(jnp.asarray, tree)
