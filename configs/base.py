"""Fields that every experiment has, with the DiST release's recipe as values.

A family's file (`configs/dist.py`) starts from here, adds its model options and picks one row of
its table of variants. The result is locked: a field that does not exist is an error.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The shared fields. Unit and meaning stand beside each."""
    config = ConfigDict()

    config.seed = 0  # initial parameters, order of the data, augmentation, mixing, dropout
    config.batch_size = 256  # clips per optimizer step, over all devices and hosts
    # Parts a batch is processed in, one after the other; part i has the clips i, i + accumulation
    # and so on. Batch statistics are those of each part. A loss over all rows (retrieval) stays
    # that of the whole batch: each part is run twice.
    config.accumulation = 1
    config.num_epochs = 36.0  # passes over the training list
    config.num_steps = 0  # optimizer steps; above 0 it takes the place of num_epochs
    # Paths of this file are made absolute where a run starts, but for names found from data.root.
    # Parameters and statistics to start from: a run or a converted checkpoint; '' for none.
    config.init_from = ''
    # Its class names, where it does not hold them (converted checkpoints); as data.label_map.
    config.init_label_map = ''
    # Classes that a linear classifier finds no weights for there, by name: error, fresh to start
    # them anew, or all_fresh to train all classes anew, whatever their names.
    config.init_missing = 'error'

    # Devices are data x fsdp x tensor. Batches are split over data and fsdp, weights over fsdp and
    # tensor; slices of a pod follow each other on data.
    config.mesh = ConfigDict()
    config.mesh.data = -1  # -1: the devices that the others leave
    config.mesh.fsdp = 1  # weights in this many parts, a layer gathered where it is used
    config.mesh.tensor = 1  # heads and hidden channels in this many parts

    config.backbone = ConfigDict()
    config.backbone.name = 'vit_b16'  # a size of one of dist_jax.models.BACKBONES; '' for none
    # Folder written by `dist_jax convert`; 'tiny_clip' for the small CLIP that comes with this
    # package, 'random' for a random backbone.
    config.backbone.checkpoint = ''

    config.task = ConfigDict()
    # What is learned, a key of dist_jax.tasks.TASKS: classify, multi_label (any number of classes a
    # video) or retrieve.
    config.task.name = 'classify'
    # Loss of classify: cross_entropy, or bce, a sigmoid for each class with the mean over classes;
    # '' for the task's own, cross_entropy.
    config.task.criterion = ''

    config.model = ConfigDict()
    config.model.family = 'dist'  # a key of dist_jax.models.FAMILIES
    config.model.dtype = 'bfloat16'  # compute: bfloat16 or float32; norms, softmax, loss: float32

    # Families with batch statistics. A group is so many clips in a row of one part of a batch (see
    # accumulation), and is normalised by itself: 1 for the whole part; as many as devices split it
    # into, data x fsdp, for a form in which devices need nothing of each other.
    config.batch_norm = ConfigDict()
    config.batch_norm.groups = 1  # must divide batch_size / accumulation
    # Above 0, running statistics are replaced after every epoch and after the last step by the
    # average of those of so many batches, the next ones of the training stream, not mixed.
    config.batch_norm.precise_batches = 0

    config.data = ConfigDict()
    config.data.name = 'kinetics400'  # a key of input_pipeline.datasets.DATASETS
    config.data.root = ''  # folder that paths in the lists start from
    # List of training videos, a folder of class folders, or what `dist_jax dataset build` wrote.
    config.data.train_list = ''
    config.data.val_list = ''  # list of validation videos
    # For lists that hold several splits (HMDB51: train1 to train3); '' is the one named train.
    config.data.train_subset = ''
    config.data.val_subset = (
        ''  # likewise (HMDB51: test1 to test3); '' is the one named val or validation, else test
    )
    # '' for what the file is, and the data set's own; see input_pipeline.list_formats.
    config.data.list_format = ''
    config.data.label_map = ''  # class names; two files, separated by a comma, for two heads
    config.data.truncate_texts = False  # cut class names that are too long for the text tower
    # Text heads read ApplyEyeMakeup as Apply Eye Makeup and brush_hair as brush hair, in sets where
    # no class name has a space. Names in results stay as the list has them.
    config.data.split_names = True
    config.data.num_frames = 16  # frames of a clip
    config.data.image_size = 224  # pixels
    # A key of input_pipeline.sampling.PROTOCOLS; '' for the data set's own.
    config.data.sampling = ''
    # Frames of a 30 fps video for interval sampling, of the file itself for stride sampling.
    config.data.frame_interval = 8
    # Of JPEG pictures: libjpeg, with the pixels that published image recipes saw, or ffmpeg.
    config.data.jpeg_decoder = 'libjpeg'
    # Clips of a video in its batch: decoded once, transformed so many times. They count in
    # batch_size.
    config.data.repeats = 1
    # An epoch has so many times more clips; without, it has as many clips as the list has videos,
    # and so many epochs go through the list once.
    config.data.repeats_extend_epoch = True
    # Training clips go through what follows from top to bottom; docs/guides/augmentation.md has the
    # values of the four systems. One draw for a clip, the same in all its frames.
    config.data.rand_augment = ''  # policy such as 'rand-m7-n4-mstd0.5-inc1'; '' for none
    config.data.auto_augment = ''  # in its place, policy such as 'original-mstd0.5'; '' for none
    config.data.augment_interpolation = 'bicubic'  # of their rotations: nearest, bilinear, bicubic
    config.data.augment_fill = (128, 128, 128)  # what they bring in from outside the frame
    config.data.augment_after_crop = False  # run them on the cropped clip, not on whole frames
    config.data.resize = ()  # before the crop: (short side,) or (height, width); () for none
    # bilinear, bicubic; smooth_bilinear, smooth_bicubic (Pillow). In evaluation too.
    config.data.resize_interpolation = 'bilinear'
    config.data.crop = 'random_resized'  # random_resized, multi_scale (TSN) or centre
    config.data.crop_area = (0.4, 1.0)  # random_resized: share of the frame
    config.data.crop_aspect = (3 / 4, 4 / 3)  # random_resized: width / height
    config.data.crop_swap = False  # random_resized: exchange width and height half of the time
    config.data.crop_scales = (1.0, 0.875, 0.75, 0.66)  # multi_scale: shares of the short side
    config.data.crop_interpolation = 'bilinear'  # as of resize; not of the centre crop
    # Fractions of a pixel in resize, centre and test crops: nearest, down, torchvision or mmcv.
    config.data.crop_rounding = 'nearest'
    config.data.flip = True  # mirror half of the clips where the data set allows it
    config.data.colour_jitter = 0.0  # share of clips with jittered colours
    config.data.grayscale = 0.2  # share of clips turned grey
    config.data.erase = 0.0  # share of clips with an erased box
    config.data.erase_mode = 'const'  # const (mean colour), rand (one colour) or pixel (noise)
    # Share of unreadable videos beyond which a run stops, and beyond which an evaluation inside it
    # fails (the run goes on); one video is always allowed, unless this is 0.
    config.data.max_bad_share = 0.01
    # Readers of a host: processes, which use all cores and are replaced when they die over a file;
    # -1 for one a CPU, at most 128. With 0 there are none, and threads read.
    config.data.num_workers = -1
    config.data.num_threads = 8  # that read, where there are no processes
    config.data.record_timeout = 60.0  # seconds after which a reader process is given up
    config.data.buffer_size = 8  # batches read ahead

    config.mixing = ConfigDict()
    config.mixing.mixup_alpha = 0.8  # Beta parameter; 0 turns mixup off
    config.mixing.cutmix_alpha = 1.0  # Beta parameter; 0 turns cutmix off
    config.mixing.probability = 1.0  # share of batches that are mixed
    config.mixing.switch_probability = 0.5  # share of cutmix among them

    config.optimizer = ConfigDict()
    # adamw, sgd (decay in the gradient, as torch's), lamb, or bertadam (as adamw, without bias
    # correction).
    config.optimizer.name = 'adamw'
    config.optimizer.schedule = 'cosine'  # of the learning rate: cosine, linear or constant
    config.optimizer.peak_lr = 3.2e-4  # at the top of the schedule
    config.optimizer.end_lr = 0.0  # at the last step; not of constant
    config.optimizer.warmup_start_lr = 8e-7  # at step 0
    # Linear, and shorter than num_epochs; with num_steps, counted as its share of num_epochs.
    config.optimizer.warmup_epochs = 6.0
    # What rises: the rate, to where the schedule then is (join) or to peak_lr (peak), or the peak
    # of the schedule, which runs meanwhile (scale).
    config.optimizer.warmup = 'join'
    # The schedule runs from the end of the warm-up to the last step, not from step 0.
    config.optimizer.after_warmup = False
    # The rate is renewed at the first step of an epoch and at those that complete so many steps of
    # it; 1 for every step, 0 for every epoch.
    config.optimizer.refresh_steps = 1
    config.optimizer.weight_decay = 1e-4  # of matrices; biases, norms and tables are not decayed
    config.optimizer.decay_all = False  # those, too
    config.optimizer.b1 = 0.9  # of adamw, lamb and bertadam, as b2 and eps
    config.optimizer.b2 = 0.999  # likewise
    config.optimizer.eps = 1e-8  # likewise
    config.optimizer.momentum = 0.9  # of sgd
    config.optimizer.nesterov = False  # of sgd
    config.optimizer.clip_norm = 0.0  # global gradient norm; 0 for no clipping
    # Gradient norm of each tensor, clipped after that; 0 for no clipping. Layers count each by
    # itself where the family says which arrays stack them.
    config.optimizer.clip_tensor_norm = 0.0
    config.optimizer.label_smoothing = 0.1  # share of a label that all classes get alike
    # Moving average of parameters and batch statistics, used in evaluation; 0 for none.
    config.optimizer.ema_decay = 0.0

    config.eval = ConfigDict()
    # Between evaluations; the last step is always evaluated, with 0 no other.
    config.eval.every_epochs = 4.0
    config.eval.batch_size = 64  # videos per step, over all devices and hosts
    config.eval.num_clips = 3  # views along time
    config.eval.num_crops = 1  # views along a side, 1 or 3
    config.eval.crop_layout = 'ends'  # where 3 crops lie: ends, halves or quarters
    config.eval.image_size = 0  # pixels; 0 for data.image_size, which some families need
    config.eval.resize = ()  # (short side,) or (height, width); () for the image size
    config.eval.fusion = 0.0  # weight of the frozen backbone's own logits
    # Report unreadable videos, however many; else one fails `dist_jax evaluate`, and more than
    # data.max_bad_share an evaluation inside training.
    config.eval.allow_bad_videos = False

    config.checkpoint = ConfigDict()
    # Between saves; an evaluation, the last step and a stop always save, with 0 nothing else.
    config.checkpoint.every_steps = 500
    config.checkpoint.keep = 1  # newest checkpoints kept, at least 1, beside the best one
    # Compare states, backbone and init_from with their digests when they are read. False saves
    # 1.2 s of a core for each GB, and damage loads unnoticed.
    config.checkpoint.verify = True

    config.log = ConfigDict()
    # Between lines; the last step always has one, with 0 no other. A run that would have fewer than
    # three has ten.
    config.log.every_steps = 20
    config.log.tensorboard = True  # event files beside metrics.jsonl
    # Services that get the figures, too: wandb, mlflow, trackio; several with commas between them.
    # Each is an extra of this package; docs/guides/watching.md.
    config.log.report_to = ''
    config.log.project = 'dist_jax'  # what the run belongs to there
    config.log.profile = 0  # steps of each start that are traced, for XProf

    config.pod = ConfigDict()
    # Seconds without a step after which a process writes the stacks of its threads and ends with
    # exit code 75; compiling, evaluating and saving may take any time. 0 for no limit.
    config.pod.stall_timeout = 1800.0

    return config


# Fields that came after the first runs and decide what a run does, as it was before them.
BEFORE_FIELDS = {
    'data.split_names': False,
    'task.name': 'classify',
    'task.criterion': '',
    'data.jpeg_decoder': 'ffmpeg',
    'data.repeats_extend_epoch': True,
    'batch_norm.groups': 1,
    'batch_norm.precise_batches': 0,
    'optimizer.name': 'adamw',
    'optimizer.schedule': 'cosine',
    'optimizer.warmup': 'join',
    'optimizer.after_warmup': False,
    'optimizer.refresh_steps': 1,
    'optimizer.decay_all': False,
    'optimizer.eps': 1e-8,
    'optimizer.clip_tensor_norm': 0.0,
    'optimizer.momentum': 0.9,
    'optimizer.nesterov': False,
}

# Those of one family, likewise.
BEFORE_FAMILY_FIELDS: dict[str, dict[str, object]] = {
    'dist': {
        'model.spatial_branch': True,
        'model.temporal_branch': True,
        'model.integration_branch': True,
        'model.init_std': 0.02,
    },
    'side4video': {'model.temporal_conv': True, 'model.class_token_shift': True},
}

# Fields that had another name when runs were saved: the name then -> the name now.
RENAMED_FIELDS = {'data.num_samples': 'data.repeats'}

# (lowest, highest) of numbers that nothing else checks; None for no bound.
BOUNDS: dict[str, tuple[float, float | None]] = {
    **dict.fromkeys(
        (
            'accumulation',
            'batch_norm.groups',
            'data.image_size',
            'data.repeats',
            'eval.num_clips',
            'checkpoint.keep',
            'model.alpha',
            'model.integration_dim',
            'model.temporal_dim',
            'model.temporal_patch',
            'model.temporal_kernel',
            'model.qkv_dim',
            'model.side_dim',
            'model.tap_every',
        ),
        (1, None),
    ),
    **dict.fromkeys(
        (
            'seed',
            'num_steps',
            'batch_norm.precise_batches',
            'data.num_threads',
            'data.buffer_size',
            'mixing.mixup_alpha',
            'mixing.cutmix_alpha',
            'optimizer.peak_lr',
            'optimizer.end_lr',
            'optimizer.warmup_start_lr',
            'optimizer.warmup_epochs',
            'optimizer.refresh_steps',
            'optimizer.weight_decay',
            'optimizer.clip_norm',
            'optimizer.clip_tensor_norm',
            'eval.every_epochs',
            'eval.image_size',
            'model.ada_pooling_layers',
            'model.cls_token_std',
            'model.init_std',
            'model.pretrained_lr',
            'model.initial_scale',
            'checkpoint.every_steps',
            'log.every_steps',
            'log.profile',
            'pod.stall_timeout',
        ),
        (0, None),
    ),
    'data.num_workers': (-1, None),
    **dict.fromkeys(
        (
            'data.max_bad_share',
            'mixing.probability',
            'mixing.switch_probability',
            'optimizer.label_smoothing',
            'eval.fusion',
        ),
        (0, 1),
    ),
}
POSITIVE = (
    'num_epochs',
    'data.record_timeout',
    'optimizer.eps',
    'model.temporal_conv_mlp_ratio',
    'model.integration_mlp_ratio',
    'model.integration_temporal_mlp_ratio',
    'model.mlp_ratio',
)
# Sizes beyond these are slips: arrays, threads or counters are made of them before anything else
# could say so.
MOST: dict[str, float] = {
    'seed': 2**32 - 1,
    **dict.fromkeys(
        ('num_steps', 'num_epochs', 'accumulation', 'optimizer.refresh_steps'), 2**31 - 1
    ),
    'batch_norm.precise_batches': 2**20,
    **dict.fromkeys(('batch_size', 'eval.batch_size', 'batch_norm.groups'), 2**20),
    **dict.fromkeys(('data.image_size', 'eval.image_size', 'data.resize', 'eval.resize'), 2**12),
    **dict.fromkeys(('data.num_frames', 'eval.num_clips', 'data.repeats'), 2**12),
    **dict.fromkeys(('data.num_workers', 'data.num_threads', 'data.buffer_size'), 2**10),
    **dict.fromkeys(('data.record_timeout', 'pod.stall_timeout', 'log.profile'), 10**6),
    **dict.fromkeys(
        ('model.integration_dim', 'model.temporal_dim', 'model.qkv_dim', 'model.side_dim'), 2**16
    ),
    **dict.fromkeys(
        (
            'model.alpha',
            'model.temporal_patch',
            'model.temporal_kernel',
            'model.num_heads',
            'model.tap_every',
        ),
        2**10,
    ),
    'model.ada_pooling_layers': 2**10,
    **dict.fromkeys((name for name in POSITIVE if name.startswith('model.')), 2**10),
}
# Decays, which would never forget with 1, and shares of what is dropped, which would leave nothing.
BELOW_ONE = (
    'optimizer.b1',
    'optimizer.b2',
    'optimizer.momentum',
    'optimizer.ema_decay',
    'model.dropout',
    'model.mlp_dropout',
    'model.head_dropout',
    'model.stochastic_depth',
)
# Names that fields choose from, the keys of a table of dist_jax each.
CHOICES = {
    'data.jpeg_decoder': ('libjpeg', 'ffmpeg'),
    'optimizer.name': ('adamw', 'sgd', 'lamb', 'bertadam'),
    'optimizer.schedule': ('cosine', 'linear', 'constant'),
    'optimizer.warmup': ('join', 'peak', 'scale'),
    'init_missing': ('error', 'fresh', 'all_fresh'),
}


def check(config: ConfigDict) -> None:
    """Refuses numbers and names that a run could not be made of.

    Raises:
      ValueError: naming the field, its value and what it may be.
    """
    for field, value in _numbers(config):
        if not math.isfinite(value):
            raise ValueError(f'{field}={value} must be a finite number')
        low, high = BOUNDS.get(field, (None, None))
        if low is not None and value < low:
            raise ValueError(f'{field}={value} must be at least {low}')
        if high is not None and value > high:
            raise ValueError(f'{field}={value} must be at most {high}')
        if value > MOST.get(field, math.inf):
            raise ValueError(f'{field}={value} must be at most {MOST[field]}')
        if field in POSITIVE and value <= 0:
            raise ValueError(f'{field}={value} must be above 0')
        if field.endswith('.resize') and value != int(value):
            raise ValueError(f'{field}={value} must be whole pixels')
        if field in BELOW_ONE and not 0 <= value < 1:
            raise ValueError(f'{field}={value} must be at least 0 and below 1')
    for field, names in CHOICES.items():
        value = flat(config)[field]
        if value not in names:
            raise ValueError(f'{field}={value!r} is not known{_did_you_mean(value, names)}')
    if config.optimizer.nesterov and not config.optimizer.momentum:
        raise ValueError('optimizer.nesterov=True needs optimizer.momentum above 0, it is 0')
    if config.optimizer.warmup == 'scale' and config.optimizer.after_warmup:
        raise ValueError(
            "optimizer.warmup='scale' raises the peak of a schedule that runs meanwhile, and "
            'optimizer.after_warmup=True lets it run afterwards; set one of them otherwise'
        )
    groups, clips = config.batch_norm.groups, config.batch_size // config.accumulation
    if clips % groups:
        raise ValueError(
            f'batch_norm.groups={groups} must divide the {clips} clips of batch_size='
            f'{config.batch_size} / accumulation={config.accumulation}'
        )
    warmup, epochs = config.optimizer.warmup_epochs, config.num_epochs
    if warmup >= epochs:
        raise ValueError(
            f'optimizer.warmup_epochs={warmup} is not shorter than num_epochs={epochs}: the '
            'learning rate would rise to the end and never come near optimizer.peak_lr. Shorten '
            f'it, as in --config.optimizer.warmup_epochs={epochs / 6:.2g} (the share in the '
            'recipes), or give the length with --config.num_steps, which keeps the share'
        )


def before_fields(saved: Mapping[str, Any]) -> dict[str, object]:
    """'group.field' -> value, of fields that are newer than a saved config may be."""
    return BEFORE_FIELDS | BEFORE_FAMILY_FIELDS.get(saved['model']['family'], {})


def _numbers(config: ConfigDict) -> Iterator[tuple[str, float]]:
    """('group.field', value) of all numbers, those of tuples too."""
    for field, value in flat(config).items():
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, (int, float)):
                yield field, each


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message about a name that is none of these: the closest of them, and all."""
    close = difflib.get_close_matches(name, names, 1)
    hint = f'; did you mean {close[0]!r}?' if close else '.'
    return f'{hint} There are: {", ".join(names)}'


def flat(config: ConfigDict | Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """A config, or what JSON has kept of one, as 'group.field' -> value."""
    found = {}
    for name, value in config.items():
        group = isinstance(value, (ConfigDict, dict))
        found |= flat(value, f'{prefix}{name}.') if group else {f'{prefix}{name}': value}
    return found


def plain(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON values: tuples become lists."""

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [convert(item) for item in value]
        return value

    return convert(config.to_dict())


def restored(saved: Mapping[str, Any]) -> ConfigDict:
    """The config that `plain` made JSON values of, locked; newer fields are as they were then."""
    config = get_config().to_dict()
    for name, value in before_fields(saved).items():
        group, field = name.split('.')
        config[group][field] = value
    for name, value in saved.items():
        config[name] = config.get(name, {}) | value if isinstance(value, dict) else value
    return ConfigDict(_with_tuples(config)).lock()


def _with_tuples(value: Any) -> Any:
    """JSON's lists as what they were before `plain`: configs hold tuples alone."""
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def demo(config: ConfigDict) -> None:
    """The built-in motion clips and a tiny random backbone, for minutes on two cores."""
    config.backbone.update(name='tiny', checkpoint='random')
    config.model.dtype = 'float32'
    config.batch_size = 32
    config.num_epochs = 20.0
    config.data.update(
        name='motion_clips',
        num_frames=16,
        image_size=48,
        crop='centre',
        flip=False,  # directions are classes
        grayscale=0.0,
        num_workers=0,
        num_threads=2,
    )
    config.mixing.probability = 0.0
    # Short runs of small batches: a fast second moment and clipping keep them from stalling.
    config.optimizer.update(
        peak_lr=2e-3,
        warmup_start_lr=2e-5,
        warmup_epochs=2.0,
        b2=0.99,
        clip_norm=1.0,
        label_smoothing=0.0,
    )
    config.eval.update(every_epochs=5.0, batch_size=40, num_clips=1)
    config.checkpoint.every_steps = 200


def demo_of_frames(config: ConfigDict) -> None:
    """`demo` for a family that sees as many frames as DiST's backbone does."""
    demo(config)
    config.model.unroll = True
    config.data.num_frames = 8


# The small CLIP that comes with the package.
TINY_CLIP: dict[str, object] = {
    'backbone.name': 'tiny_clip',
    'backbone.checkpoint': 'tiny_clip',
    'data.image_size': 32,
}
# The built-in benchmark beside it, over what `demo` says.
WORLD: dict[str, object] = {
    'demo': True,
    **TINY_CLIP,
    'data.name': 'motion_world',
    # Even steps in time that cover most of a clip.
    'data.num_frames': 8,
    'data.sampling': 'interval',
    'data.frame_interval': 7,
    'num_steps': 800,
    'eval.every_epochs': 2.0,
    'optimizer.b2': 0.999,
}


def finish(
    config: ConfigDict,
    variants: Mapping[str, Mapping[str, object]],
    variant: str,
    demo: Callable[[ConfigDict], None],
) -> ConfigDict:
    """Applies one row of a table of variants and locks the config.

    Args:
      config: shared and family fields.
      variants: name -> row; a row maps 'group.field' to a value, or 'demo' to True.
      variant: name of the row.
      demo: what the row 'demo' does.

    Raises:
      ValueError: no such row; the message lists all.
    """
    if variant not in variants:
        raise ValueError(f'no variant {variant!r}{_did_you_mean(variant, variants)}')
    config.lock()
    row = dict(variants[variant])
    if row.pop('demo', False):
        demo(config)
    config.update_from_flattened_dict(row)
    return config
