"""Full fine-tuning: `--config=fine_tune:VARIANT`.

`b16_8f_k400` is a classifier on the mean of frames; recipe and rates are our own choice, with no
figures. `msrvtt_b32` is CLIP4Clip with mean pooling (Luo et al., arXiv:2104.08860: 43.1
text-to-video R@1 on MSR-VTT with 9,000 videos), `pictures` the training of a small CLIP from random
weights (Radford et al. 2021, arXiv:2103.00020): single pictures and their captions.

    dist_jax train --config=fine_tune:msrvtt_b32 --workdir=runs/clip4clip \\
        --config.backbone.checkpoint=clip_b32 --config.data.root=/data/msrvtt/videos \\
        --config.data.train_list=/data/msrvtt/MSRVTT_train.9k.csv \\
        --config.data.val_list=/data/msrvtt/MSRVTT_JSFUSION_test.csv

Rows with sentences are evaluated before they are trained without a run or init_from: CLIP as it is.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from dist_jax.configs import base
from dist_jax.configs.inputs import INPUTS

# Rows of text-video retrieval, with the fields of `config.task` that it has.
RETRIEVAL = ('msrvtt_b32', 'pictures')

VARIANTS: dict[str, dict[str, object]] = {
    'b16_8f_k400': {
        'data.num_frames': 8,
        'model.pretrained_lr': 0.1,
        'optimizer.peak_lr': 1e-4,
        'optimizer.weight_decay': 0.05,
    },
    'msrvtt_b32': {
        **INPUTS['side4video_retrieval'],
        'backbone.name': 'vit_b32',
        'data.name': 'msrvtt',
        'batch_size': 128,
        'num_epochs': 5.0,
        'model.pretrained_lr': 1e-3,
        'optimizer.name': 'bertadam',
        'optimizer.peak_lr': 1e-4,
        'optimizer.warmup_start_lr': 0.0,
        'optimizer.warmup_epochs': 0.5,
        'optimizer.warmup': 'peak',
        'optimizer.weight_decay': 0.2,
        'optimizer.b2': 0.98,
        'optimizer.eps': 1e-6,
        'optimizer.clip_norm': 1.0,
        'optimizer.clip_tensor_norm': 1.0,
        'optimizer.label_smoothing': 0.0,
        'eval.every_epochs': 1.0,
    },
    'demo': {'demo': True},
    'world': base.WORLD,
    # tools/pretrain_tiny_clip.py
    'pictures': {
        'demo': True,
        **base.TINY_CLIP,
        'backbone.checkpoint': 'random',
        'data.name': 'motion_world_pictures',
        'data.num_frames': 1,
        'task.num_words': 24,
        'batch_size': 128,
        'num_steps': 5000,
        'eval.every_epochs': 8.0,
        'model.pretrained_lr': 1.0,
        'model.initial_scale': 1 / 0.07,
        'optimizer.peak_lr': 2e-3,
        'optimizer.warmup_start_lr': 0.0,
        'optimizer.warmup_epochs': 0.5,
        'optimizer.weight_decay': 1e-2,
        'optimizer.b2': 0.98,
    },
}


def get_config(variant: str = 'b16_8f_k400') -> ConfigDict:
    """One row of `VARIANTS` over the shared fields.

    Raises:
      ValueError: no such row.
    """
    config = base.get_config()
    config.model.family = 'fine_tune'
    # linear: a classifier; text: cosine with class names; words: sentences, both towers trained.
    config.model.head = 'linear'
    # Rate of what starts as the backbone's, a share of peak_lr, which is that of a classifier.
    config.model.pretrained_lr = 0.1
    config.model.initial_scale = 0.0  # of the logits of words at the start; 0: the backbone's
    config.model.remat = True  # recompute a block in the backward pass: less memory, more time
    config.model.unroll = False  # write layers out: faster steps on CPU, longer compilation
    if variant in RETRIEVAL:
        retrieval(config)
    return base.finish(config, VARIANTS, variant, demo)


def retrieval(config: ConfigDict) -> None:
    """Sentences in place of classes."""
    config.model.head = 'words'
    config.task.name = 'retrieve'
    config.task.num_words = 32  # tokens of a sentence, start and end included; the rest is cut
    # meanP: one vector of each; wti: words and frames, of equal weights.
    config.task.interaction = 'meanP'
    config.task.masked = 'zero'  # of wti: what pairs count of which one is none
    # What is right for a sentence: its pair, or video, all clips of its video.
    config.task.positives = 'pair'
    config.mixing.probability = 0.0
    config.optimizer.label_smoothing = 0.0


def demo(config: ConfigDict) -> None:
    """On the built-in clips."""
    base.demo_of_frames(config)
    config.model.remat = False
