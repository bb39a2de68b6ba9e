"""The attentive probe: `--config=attentive_probe:VARIANT`.

Source: Bardes et al., V-JEPA, arXiv:2404.08471: one query over frozen tokens, trained for 20 epochs
of batches of 256 with AdamW, from 1e-3 on a cosine, without a warm-up, weight decay 0.01. Clips and
views are those of DiST on Kinetics; no figures.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from dist_jax.configs import base

VARIANTS: dict[str, dict[str, object]] = {
    'b16_8f_k400': {
        'data.num_frames': 8,
        'num_epochs': 20.0,
        'mixing.probability': 0.0,
        'optimizer.peak_lr': 1e-3,
        'optimizer.warmup_epochs': 0.0,
        'optimizer.weight_decay': 0.01,
        'optimizer.label_smoothing': 0.0,
    },
    'demo': {'demo': True},
    'world': base.WORLD,
}


def get_config(variant: str = 'b16_8f_k400') -> ConfigDict:
    """One row of `VARIANTS` over the shared fields.

    Raises:
      ValueError: no such row.
    """
    config = base.get_config()
    config.model.family = 'attentive_probe'
    config.model.head = 'linear'  # linear: a classifier; text: cosine with class names
    config.model.num_heads = 12  # of the query's attention; they divide the backbone's width
    config.model.mlp_ratio = 4.0  # hidden width of the MLP over the backbone's width
    config.model.class_tokens = False  # the query looks at class tokens, too
    config.model.temporal_positions = True  # a learned row for each frame
    config.model.unroll = False  # write layers out: faster steps on CPU, longer compilation
    return base.finish(config, VARIANTS, variant, demo)


def demo(config: ConfigDict) -> None:
    """On the built-in clips."""
    base.demo_of_frames(config)
    config.model.num_heads = 4
