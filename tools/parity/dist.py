"""DiST: every recorded intermediate, the logits, the loss, and the gradient of every parameter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from dist_jax import losses
from dist_jax.models import clip, clip_params, dist, dist_params
from dist_jax.models.backbone import Backbone, Taps
from dist_jax.models.layers import l2_normalize
from dist_jax.models.params import Tree, export_tree, import_tree
from tools.parity.golden import Golden


def matches(golden: Golden) -> bool:
    """Whether the file records a DiST."""
    return 'integration_dim' in golden.config


def run(golden: Golden) -> dict[str, np.ndarray]:
    """Runs the whole model on the recorded parameters and clips.

    Raises:
      ValueError: recorded parameters and recorded sizes contradict each other.
    """
    config = golden.config
    tensors = dist_params.rename(golden.section('params'))
    hparams = dist_params.infer_hparams(tensors)
    for name, value in hparams.items():
        # A ratio is rounded to whole channels, so the shapes give it back only roughly.
        if not name.endswith('_ratio') and config.get(name, value) != value:
            raise ValueError(f'{golden.file}: config says {name}={config[name]}, shapes {value}')
    rows = dist_params.dist_rows(hparams)
    params = import_tree(tensors, rows, dist_params.abstract_params(hparams))

    weights = golden.section('backbone')
    spec = clip_params.openai_spec(
        weights,
        activation=config.get('activation', 'quick_gelu'),
        num_heads=config.get('num_heads'),
        text_num_heads=config.get('text_heads'),
    )
    backbone = Backbone(clip.KIND, spec)
    frozen_tree = import_tree(
        weights,
        clip_params.openai_rows(spec),
        backbone.abstract_params(),
        clip_params.OPENAI_IGNORE,
    )
    selected = tuple(config.get('selected_layers', range(spec.depth)))
    tokens = jnp.asarray(golden.tensors['inputs/text_tokens'])
    labels = jnp.asarray(golden.tensors['inputs/labels']).astype(jnp.int32)
    video = jnp.asarray(rearrange(golden.tensors['inputs/video'], 'b t c h w -> b t h w c'))
    model = dist.build(
        backbone,
        num_classes=(len(tokens),),
        dtype=jnp.float32,
        selected_layers=selected,
        **dist_params.build_options(hparams),
    )
    frozen = model.frozen.prepare(jax.tree.map(jnp.asarray, frozen_tree), (tokens,))
    targets = losses.smooth_one_hot(labels, len(tokens), config.get('label_smoothing', 0.0))

    def loss_of(params: Tree, frozen: Tree, video: jax.Array) -> tuple[jax.Array, Tree]:
        outputs = model.net.apply(
            {'params': params}, model.inputs(frozen, {'video': video}), intermediates=True
        )
        return losses.soft_cross_entropy(outputs['logits'][0], targets).mean(), outputs

    @jax.jit
    def all_of(params: Tree, frozen: Tree, video: jax.Array) -> tuple[Any, ...]:
        frames = rearrange(video[:, :: hparams['alpha']], 'b t h w c -> (b t) h w c')
        taps = Taps(outputs=tuple(range(spec.depth)))
        streams = clip.encode_image(frozen['visual'], frames, spec, taps)['outputs']
        value, grads = jax.value_and_grad(loss_of, has_aux=True)(params, frozen, video)
        return streams, value, grads

    streams, (loss, outputs), grads = jax.device_get(all_of(params, frozen, video))
    ours = {
        'outputs/temporal_stem': rearrange(outputs['stem'], 'b t h w c -> b c t h w'),
        'outputs/text_features': clip.KIND.encode_text(frozen_tree['text'], tokens, spec),
        'outputs/video_embedding_normalized': np.asarray(l2_normalize(outputs['embedding'])),
        'outputs/logits': outputs['logits'][0],
        'outputs/loss': loss,
    }
    for i, block in _recorded_blocks(golden, selected, spec.depth).items():
        ours[f'outputs/mid_feat.{i}'] = rearrange(streams[block], 'n l w -> l n w')
    for i, (temporal, integration) in enumerate(zip(outputs['temporal'], outputs['integration'])):
        ours[f'outputs/temporal_nets.{i}'] = rearrange(temporal, 'b t h w c -> b c t h w')
        ours[f'outputs/integration_nets.{i}'] = rearrange(integration, 'b t l c -> l (b t) c')
    for i, query in enumerate(outputs['pooling'] if hparams['ada_pooling_layers'] else ()):
        ours[f'outputs/adapooling_nets.{i}'] = query[None]
    for name, gradient in export_tree(grads, rows).items():
        ours[f'grads/{name}'] = gradient
    return ours


def _recorded_blocks(golden: Golden, selected: tuple[int, ...], depth: int) -> dict[int, int]:
    """Number in `mid_feat.<number>` -> block of the backbone.

    The reference keeps the streams by block. A file whose numbers cannot be that, because a
    selected block is not among them, counts the selected blocks instead.
    """
    numbers = {
        int(name.rpartition('.')[2])
        for name in golden.recorded
        if name.startswith('outputs/mid_feat.')
    }
    if not numbers >= set(selected) and numbers == set(range(len(selected))):
        return dict(enumerate(selected))
    return {block: block for block in range(depth)}
