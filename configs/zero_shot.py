"""The frozen backbone with class texts, for `dist_jax evaluate`; there is nothing to train.

    dist_jax evaluate --config=zero_shot:b16_8f_k400 --output=runs/zero_shot \\
        --config.backbone.checkpoint=clip_b16 --config.data.root=/data/k400 \\
        --config.data.val_list=val.txt --config.data.label_map=labels.txt

Differs: no paper; frames, views and sizes are those of DiST B/16, whose frozen part it is.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from dist_jax.configs import base

VARIANTS: dict[str, dict[str, object]] = {
    'b16_8f_k400': {'data.num_frames': 8},
    'demo': {'demo': True},
    'world': base.WORLD,
}


def get_config(variant: str = 'b16_8f_k400') -> ConfigDict:
    """One row of `VARIANTS` over the shared fields.

    Raises:
      ValueError: no such row.
    """
    config = base.get_config()
    config.model.family = 'zero_shot'
    config.model.unroll = False  # write layers out: faster steps on CPU, longer compilation
    return base.finish(config, VARIANTS, variant, base.demo_of_frames)
