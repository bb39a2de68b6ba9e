"""What the four systems do with their videos: fields of `data`, `eval` and `mixing`.

A family's file starts from its row; any other config takes one with
`config.update_from_flattened_dict(INPUTS['side4video_ssv2'])`. `docs/guides/augmentation.md` shows
them side by side. What a row does not name stays as `configs/base.py` has it, which is DiST on
Kinetics.
"""

from __future__ import annotations

_UNMIXED = {'mixing.probability': 0.0}
_ONE_VIEW = {'eval.num_clips': 1, 'eval.num_crops': 1}

# Side4Video resizes with Pillow.
_SIDE4VIDEO = {
    'data.num_frames': 8,
    'data.resize_interpolation': 'smooth_bicubic',
    'data.crop_rounding': 'torchvision',
    **_UNMIXED,
}
_SIDE4VIDEO_RECOGNITION = {
    **_SIDE4VIDEO,
    'data.crop_area': (0.08, 1.0),
    'data.crop_swap': True,
    'data.crop_interpolation': 'smooth_bilinear',
    'eval.num_crops': 3,
    'eval.crop_layout': 'quarters',
}
_SIDE4VIDEO_RETRIEVAL = {
    **_SIDE4VIDEO,
    'data.num_frames': 12,
    'data.crop': 'centre',
    'data.flip': False,
    'data.grayscale': 0.0,
    **_ONE_VIEW,
}
# In training-time validation STS takes one clip, one crop and the size of training.
_STS = {
    'data.resize': (256,),
    'data.crop_area': (0.08, 1.0),
    'data.crop_rounding': 'mmcv',
    'data.grayscale': 0.0,
    'eval.num_crops': 3,
    'eval.crop_layout': 'halves',
    'eval.image_size': 256,
    **_UNMIXED,
}
POLICY = 'rand-m7-n4-mstd0.5-inc1'

INPUTS: dict[str, dict[str, object]] = {
    'dist_k400': {'data.sampling': 'segment'},
    # Labels that name a side swap with the flip; see input_pipeline.datasets.
    'dist_ssv2': {'data.sampling': 'segment'},
    'evl_k400': {
        'data.sampling': 'stride',
        'data.frame_interval': 16,
        'data.rand_augment': POLICY,
        'data.crop_area': (0.08, 1.0),
        'data.crop_rounding': 'down',
        'data.flip': False,  # as the released code
        'data.grayscale': 0.0,
        **_UNMIXED,
    },
    'side4video_k400': {  # with EVA-CLIP E/14: data.rand_augment=POLICY
        **_SIDE4VIDEO_RECOGNITION,
        'data.sampling': 'tsn_shift',
        'data.resize': (256,),
        'eval.num_clips': 4,
        'eval.resize': (256,),
    },
    'side4video_ssv2': {
        **_SIDE4VIDEO_RECOGNITION,
        'data.sampling': 'split',
        'data.repeats': 2,
        'data.rand_augment': POLICY,
        'data.resize': (256, 320),
        'data.grayscale': 0.0,
        'eval.num_clips': 2,
        'eval.resize': (256, 320),
    },
    # MSR-VTT and MSVD; VATEX: data.sampling=block.
    'side4video_retrieval': {**_SIDE4VIDEO_RETRIEVAL, 'data.sampling': 'block_start'},
    'sts_k400': {  # CSN and SlowFast; R(2+1)D and SlowOnly: 8 frames, 8 apart
        **_STS,
        'data.sampling': 'stride_wrap',
        'data.num_frames': 32,
        'data.frame_interval': 2,
        'eval.num_clips': 10,
    },
    'sts_ssv2': {
        **_STS,
        'data.sampling': 'block',
        'data.num_frames': 8,
        'data.flip': False,
        'eval.num_clips': 1,
    },
    # Pictures are videos of one frame. An epoch shows a third of them, three times each. Evaluation
    # of the release: eval.resize=(256,), 224 / 0.875.
    'sts_imagenet': {
        'data.sampling': 'segment',
        'data.num_frames': 1,
        'data.repeats': 3,
        'data.repeats_extend_epoch': False,
        'data.rand_augment': 'rand-m7-mstd0.5-inc1',
        'data.augment_fill': (124, 116, 104),
        'data.augment_after_crop': True,
        'data.resize_interpolation': 'smooth_bicubic',
        'data.crop_area': (0.08, 1.0),
        'data.crop_interpolation': 'smooth_bicubic',
        'data.crop_rounding': 'torchvision',
        'data.grayscale': 0.0,
        'mixing.mixup_alpha': 0.1,
        'mixing.probability': 0.5,
        **_ONE_VIEW,
        'eval.resize': (235,),  # 224 / 0.95
    },
}
