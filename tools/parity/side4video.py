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
from dist_jax.models.params import Row, Tree, export_tree, flatten, import_tree, unflatten
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
    tensors = golden.section('params') | golden.section('buffers')
    hparams = side4video_params.infer_hparams(tensors)
    for name, value in hparams.items():
        if name not in ('mlp_ratio', 'depth') and config.get(name, value) != value:
            raise ValueError(f'{golden.file}: config says {name}={config[name]}, shapes {value}')
    rows = side4video_params.side4video_rows(hparams)
    tree = import_tree(tensors, rows, side4video_params.abstract_variables(hparams))
    found = {converted.COLLECTIONS: side4video_params.COLLECTIONS}
    variables = jax.tree.map(jnp.asarray, converted.variables(tree, found))

    backbone, frozen = _eva(golden) if config['arch'] == 'eva' else _clip(golden)
    model = side4video.build(
        backbone,
        num_classes=(hparams['num_classes'],),
        num_frames=config['T'],
        tap_every=backbone.spec.depth // hparams['depth'],
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
        f'eval/backbone_tokens/{i}': x.reshape(*video.shape[:2], *x.shape[1:])
        for i, x in enumerate(tokens)
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


def _clip(golden: Golden) -> tuple[Backbone, Tree]:
    config = golden.config
    spec = clip.ClipSpec(
        image_size=config['image_size'],
        patch_size=config['patch_size'],
        width=config['width'],
        depth=config['layers'],
        num_heads=config['heads'],
        embed_dim=config['embed_dim'],
        text_width=1,
        text_depth=1,
        text_num_heads=1,
    )
    return _frozen(golden, Backbone(clip.KIND, spec), clip_params.openai_rows(spec))


# Recorded switch -> ours.
_EVA_NAMES = {
    'layers': 'depth',
    'postnorm': 'post_norm',
    'subln': 'sub_ln',
    'naiveswiglu': 'swiglu',
    'pt_hw_seq_len': 'rope_grid',
}


def _eva(golden: Golden) -> tuple[Backbone, Tree]:
    config = golden.config
    num_heads = config['width'] // config['head_width']
    spec = eva_params.eva_spec(golden.section('backbone'), num_heads=num_heads)
    found = dataclasses.asdict(spec)
    for recorded, value in config.items():
        name = _EVA_NAMES.get(recorded, recorded)
        if found.get(name, value) != value:
            raise ValueError(f'{golden.file}: config says {recorded}={value}, shapes {found[name]}')
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
