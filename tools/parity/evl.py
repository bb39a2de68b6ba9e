"""EVL: tapped features, the query after every layer, logits, loss, every gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from dist_jax import losses
from dist_jax.models import clip, clip_params, evl, evl_params
from dist_jax.models.api import Model
from dist_jax.models.backbone import Backbone, Taps
from dist_jax.models.params import Tree, export_tree, import_tree
from tools.parity.golden import Golden

# Recorded name -> ours.
_CONFIG_NAMES = {
    'depth': 'decoder_num_layers',
    'width': 'backbone_width',
    'qkv_dim': 'decoder_qkv_dim',
    'mlp_ratio': 'decoder_mlp_factor',
    'temporal_conv': 'enable_temporal_conv',
    'temporal_positions': 'enable_temporal_pos_embed',
    'temporal_cross_attention': 'enable_temporal_cross_attention',
}


def matches(golden: Golden) -> bool:
    """Whether the file records an EVL."""
    return 'decoder_qkv_dim' in golden.config


def run(golden: Golden) -> dict[str, np.ndarray]:
    """Runs the whole model on the recorded parameters and clips.

    Raises:
      ValueError: recorded parameters and recorded sizes contradict each other.
    """
    config = golden.config
    tensors = golden.section('params')
    hparams = evl_params.infer_hparams(tensors)
    for name, value in hparams.items():
        recorded = config.get(_CONFIG_NAMES.get(name, name), value)
        if recorded != value:
            raise ValueError(f'{golden.file}: config says {name}={recorded}, shapes {value}')
    rows = evl_params.evl_rows(hparams)
    params = import_tree(tensors, rows, evl_params.abstract_params(hparams))

    spec = clip.ClipSpec(
        image_size=config['input_size'],
        patch_size=config['patch_size'],
        width=config['backbone_width'],
        depth=config['backbone_layers'],
        num_heads=config['backbone_heads'],
        embed_dim=config['backbone_embed_dim'],
        text_width=1,
        text_depth=1,
        text_num_heads=1,
        activation=config['activation'],
        mlp_ratio=config['backbone_mlp_factor'],
    )
    backbone = Backbone(clip.KIND, spec)
    # The image tower alone was recorded.
    frozen = import_tree(
        {f'visual.{name}': value for name, value in golden.section('backbone').items()},
        [row for row in clip_params.openai_rows(spec) if row.target_path.startswith('visual/')],
        {'visual': backbone.abstract_params()['visual']},
    )
    labels = jnp.asarray(golden.tensors['inputs/labels']).astype(jnp.int32)
    video = jnp.asarray(rearrange(golden.tensors['inputs/video'], 'b c t h w -> b t h w c'))
    options = evl_params.build_options(hparams) | {'num_heads': config['decoder_num_heads']}

    def build(dropout: float) -> Model:
        return evl.build(
            backbone,
            num_classes=(hparams['num_classes'],),
            num_frames=config['num_frames'],
            dtype=jnp.float32,
            mlp_dropout=dropout,
            head_dropout=dropout,
            **options,
        )

    model, trained = build(config['mlp_dropout_eval_model']), build(config['dropout_for_grads'])
    frozen = model.frozen.prepare(jax.tree.map(jnp.asarray, frozen))
    targets = losses.smooth_one_hot(labels, hparams['num_classes'], 0.0)

    def loss_of(params: Tree, features: Tree) -> tuple[jax.Array, jax.Array]:
        rngs = {'dropout': jax.random.key(0)}
        outputs = trained.net.apply({'params': params}, features, train=True, rngs=rngs)
        return losses.soft_cross_entropy(outputs['logits'][0], targets).mean(), outputs['logits'][0]

    @jax.jit
    def all_of(params: Tree, frozen: Tree, video: jax.Array) -> tuple[Any, ...]:
        blocks = tuple(range(spec.depth - hparams['depth'], spec.depth))
        taps = Taps(outputs=blocks, attention=blocks)
        frames = rearrange(video, 'b t h w c -> (b t) h w c')
        tapped = clip.encode_image(frozen['visual'], frames, spec, taps)
        features = model.inputs(frozen, {'video': video})
        outputs = model.net.apply({'params': params}, features, intermediates=True)
        return tapped, outputs, jax.value_and_grad(loss_of, has_aux=True)(params, features)

    tapped, outputs, ((loss, logits), grads) = jax.device_get(all_of(params, frozen, video))
    ours = {
        'outputs/logits': outputs['logits'][0],
        'outputs/logits_train_nodrop': logits,
        'outputs/loss': np.reshape(loss, 1),
    }
    for i, query in enumerate(outputs['queries']):
        ours[f'outputs/decoder_x.{i}'] = query
    for name, source in (('out', 'outputs'), ('q', 'queries'), ('k', 'keys')):
        for i, value in enumerate(tapped[source]):
            ours[f'outputs/features.{i}.{name}'] = value.reshape(len(video), -1, *value.shape[1:])
    for name, gradient in export_tree(grads, rows).items():
        ours[f'grads/{name}'] = gradient
    return ours
