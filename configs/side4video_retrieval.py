"""Side4Video for text-video retrieval: `--config=side4video_retrieval:VARIANT`.

Source: Yao et al., arXiv:2311.15769, and the retrieval scripts of the authors' release. Figures
beside the rows are the paper's text-to-video R@1 with its best model; ours need the real data.

    dist_jax train --config=side4video_retrieval:msrvtt_b16 --workdir=runs/msrvtt \\
        --config.backbone.checkpoint=clip_b16 --config.data.root=/data/msrvtt/videos \\
        --config.data.train_list=/data/msrvtt/MSRVTT_train.9k.csv \\
        --config.data.val_list=/data/msrvtt/MSRVTT_JSFUSION_test.csv

Names read data set_backbone.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from dist_jax.configs import base
from dist_jax.configs.inputs import INPUTS
from dist_jax.configs.side4video import BACKBONES

# Frames of MSR-VTT and MSVD are every n-th from the first on, of VATEX the middles of equal parts.
SAMPLING = {'msrvtt': 'block_start', 'msvd': 'block_start', 'vatex': 'block'}

# MSR-VTT 52.3, MSVD 56.1, VATEX 68.8. The release trains MSR-VTT and VATEX with B/16 and MSVD with
# B/32, and has scripts that test E/14 and L/14; all have 320 channels.
VARIANTS: dict[str, dict[str, object]] = {
    f'{data}_{backbone}': {
        **INPUTS['side4video_retrieval'],
        **BACKBONES[backbone],
        'model.side_dim': 320,
        'data.name': data,
        'data.sampling': sampling,
    }
    for data, sampling in SAMPLING.items()
    for backbone in BACKBONES
} | {
    'demo': {'demo': True},
    'world': {**base.WORLD, 'data.name': 'motion_world_captions', 'task.num_words': 24},
}


def get_config(variant: str = 'msrvtt_b16') -> ConfigDict:
    """One row of `VARIANTS` over the shared fields and the recipe of the release.

    Raises:
      ValueError: no such row.
    """
    config = base.get_config()
    config.task.name = 'retrieve'
    config.task.num_words = 32  # tokens of a sentence, start and end included; the rest is cut
    # wti: words and frames, weighted; meanP: one vector of each.
    config.task.interaction = 'wti'
    # What pairs of a word and a frame count of which one is none: zero (the release) or ignore.
    config.task.masked = 'zero'
    # What is right for a sentence: its pair (the release), or video, all clips of its video.
    config.task.positives = 'pair'
    config.task.cdcr = 0.0  # weight of channel decorrelation; the release has 1e-3, switched off
    config.model.family = 'side4video_retrieval'
    config.model.side_dim = 320  # channels of the side network, a multiple of 64
    config.model.tap_every = 1  # blocks of the backbone for one layer beside them
    config.model.post_norm = False  # norms behind the branches, as on EVA
    config.model.mlp_ratio = 4.0  # hidden channels over channels
    # Rate of what starts as the backbone's (text tower, projections, scale), a share of peak_lr.
    config.model.pretrained_lr = 1e-3
    # The release's gradients of both towers, divided by its number of devices; 1: of the loss.
    config.model.gradient_world = 1
    # Computed again in the backward pass: none, branches (the release on EVA) or layers.
    config.model.remat = 'layers'
    config.model.unroll = False  # write layers out: faster steps on CPU, longer compilation
    config.update(recipe())
    return base.finish(config, VARIANTS, variant, demo)


def recipe() -> dict[str, object]:
    """What all released scripts share."""
    return {
        'batch_size': 128,  # pairs of a sentence and a video; all others of a batch are wrong ones
        'num_epochs': 5.0,
        'batch_norm': {'groups': 8},  # the release has the statistics of each of its eight devices
        'optimizer': {
            'name': 'bertadam',
            'peak_lr': 1e-4,
            'warmup_start_lr': 0.0,
            'warmup_epochs': 0.5,
            'warmup': 'peak',
            'weight_decay': 0.2,
            'b2': 0.98,
            'eps': 1e-6,
            'clip_norm': 1.0,
            'clip_tensor_norm': 1.0,
            'label_smoothing': 0.0,
        },
        'eval': {'every_epochs': 1.0},
    }


def demo(config: ConfigDict) -> None:
    """Sentences about moving things, at a size that two cores train in minutes."""
    base.demo(config)
    config.data.update(name='motion_captions', num_frames=8)
    config.update(batch_size=64, num_epochs=16.0)
    config.batch_norm.groups = 1
    config.optimizer.update(weight_decay=1e-4, clip_tensor_norm=0.0)
    # The text tower learns from the start, as fast as the rest: the tiny backbone's is random, and
    # the small CLIP never read words of motion.
    config.model.update(side_dim=64, remat='none', unroll=True, pretrained_lr=1.0)
