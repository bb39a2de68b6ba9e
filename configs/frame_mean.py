"""The frame-only baseline: mean of frozen frame embeddings and a classifier.

`demo` shares data, backbone, schedule and number of steps with `dist:demo`; `k400` is
the recipe of DiST B/16 8+16 frames.
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
    config.model.family = 'frame_mean'
    config.model.head = 'linear'  # a classifier; there is no other
    config.model.unroll = False  # write layers out: faster steps on CPU, longer compilation
    return base.finish(config, VARIANTS, variant, base.demo_of_frames)
