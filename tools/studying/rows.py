"""What the study runs: worlds, rows and tests, as tables.

A row is one config, trained on one or several data sets with one or several seeds; a test is a
trained row on another list, or with another fusion. Names of data sets and of the variant of each
family stand here and nowhere else. Sizes and rates are those of that variant, in configs/.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from dist_jax.configs import base

Fields = Mapping[str, object]


@dataclasses.dataclass(frozen=True)
class Data:
    """One thing to learn, or to be tested on.

    Attributes:
      name: `data.name`.
      folder: that the set is written into; sets of one folder are written together.
      train, test: lists in the folder; 'path label' a line where shares are cut of them.
      labels: file of the class names; '' where there are none.
    """

    name: str
    folder: str
    train: str
    test: str
    labels: str = ''


@dataclasses.dataclass(frozen=True)
class World:
    """Rows of configs, and data sets by what is learned of them.

    Attributes:
      variant: row of each family's table of variants, which names the backbone.
      data: motion (what happens), looks (what is seen), pictures (single frames with classes),
        captions, and `motion_new` and `looks_new`, classes that nobody was trained on.
      fields: by config, what its variant there lacks for the study.
    """

    variant: str
    data: Mapping[str, Data]
    fields: Mapping[str, Fields] = dataclasses.field(default_factory=dict)


def _built_in(name: str) -> Data:
    return Data(name, name, 'train.txt', 'val.txt', 'labels.txt')


def _of_world(kind: str) -> Data:
    return Data(
        'motion_world' if kind == 'motion' else f'motion_world_{kind}',
        'world',
        f'{kind}_train.txt',
        f'{kind}_test.txt',
        f'{kind}_labels.txt',
    )


def _unseen(kind: str) -> Data:
    # Other classes than the set's own, so a list like anybody's.
    return Data('custom', 'world', '', f'{kind}_new.txt', f'{kind}_new_labels.txt')


# Figures are of the test lists, which nothing was tuned on and no checkpoint was chosen by.
WORLD = World(
    'world',
    {
        'motion': _of_world('motion'),
        'looks': _of_world('looks'),
        'pictures': _of_world('looks'),  # one frame of each video
        'captions': Data(
            'motion_world_captions', 'world', 'captions_train.jsonl', 'captions_test.jsonl'
        ),
        'motion_new': _unseen('motion'),
        'looks_new': _unseen('looks'),
    },
)
# The data of the demos, with a backbone that knows nothing: quick, for tries of the tool itself.
CLIPS = World(
    'demo',
    {
        'motion': _built_in('motion_clips'),
        'looks': _built_in('motion_clips'),
        'pictures': _built_in('motion_images'),
        'captions': Data('motion_captions', 'motion_captions', 'train.jsonl', 'val.jsonl'),
        'motion_new': _built_in('motion_clips'),
        'looks_new': _built_in('motion_clips'),
    },
    {'dist': {'model.head': 'text'}},
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One config.

    Attributes:
      name: unique; folders and claims use it.
      label: in tables and pictures.
      family: what its colour is of.
      group: part of the study.
      config: file of configs/, without its ending.
      data: keys of `World.data` that it is trained on, each by itself.
      fields: of the config, over the variant's and the study's.
      small, full: number of seeds in these sizes; 0 leaves it out.
      once: of `data`, that of which the small size has one seed.
      share: of the training list, in percent; the number of steps stays.
      form: behind the world's variant, for a family that has several.
      start: name of the row that it starts from (`init_from`), its first seed.
      fixed: nothing random decides its figures, so one seed says all.
      trained: False where nothing is: evaluated as it is.
    """

    name: str
    label: str
    family: str
    group: str
    config: str
    data: tuple[str, ...]
    fields: Fields = dataclasses.field(default_factory=dict)
    small: int = 1
    full: int = 3
    once: tuple[str, ...] = ()
    share: int = 100
    form: str = ''
    start: str = ''
    fixed: bool = False
    trained: bool = True


@dataclasses.dataclass(frozen=True)
class Test:
    """A trained row, evaluated once more, with every seed.

    Attributes:
      name: unique.
      row, trained_on: what is evaluated.
      data: key of `World.data`, whose test list and class names it is tested with.
      fields: of the evaluation.
    """

    name: str
    row: str
    trained_on: str
    data: str
    fields: Fields = dataclasses.field(default_factory=dict)
    group: str = 'zero-shot'


GROUPS = {
    'main': 'the main table',
    'ablation': 'parts of DiST, EVL and Side4Video removed',
    'frames': "frames, and DiST's alpha",
    'sts': 'STS networks',
    'data': 'data efficiency',
    'zero-shot': 'DiST on classes nobody was trained on, fusion with the frozen CLIP',
    'retrieval': 'texts and videos',
}

# All rows see as many clips: steps times clips of a batch. What starts from pictures saw as many of
# those before, single frames of the same videos.
STEPS = 700
BATCH_SIZE = 32
EVERY_RUN: Fields = {
    'batch_size': BATCH_SIZE,
    'data.num_workers': 1,  # beside the two threads of a step on two cores
    'eval.every_epochs': 0.0,  # the last step only
    'checkpoint.every_steps': 0,
    'log.every_steps': 10,
    'log.tensorboard': False,
}
BOTH = ('motion', 'looks')
MOTION = ('motion',)
CAPTIONS = ('captions',)


def _main(name: str, label: str, family: str, config: str, **more: object) -> Row:
    return Row(name, label, family, 'main', config, BOTH, **{'small': 3, 'full': 3, **more})


def _part(config: str, name: str, label: str, family: str, group: str, **fields: object) -> Row:
    """A family with another value of one of its options, on motion."""
    named = {f'model.{field}': value for field, value in fields.items()}
    return Row(f'{config}_{name}', label, family, group, config, MOTION, named)


def _frames(config: str, frames: int, label: str, family: str, small: int = 1) -> Row:
    """A family with other frames of the same stretch of time, on motion (16: of 6/7 of it)."""
    whole = base.WORLD['data.num_frames'] * base.WORLD['data.frame_interval']
    fields = {'data.num_frames': frames, 'data.frame_interval': whole // frames}
    return Row(f'{config}_{frames}_frames', label, family, 'frames', config, MOTION, fields, small)


def _shares(config: str, label: str, family: str, small: bool) -> tuple[Row, ...]:
    """A row of the main table on shares of the training list; all of it is the main table's."""
    return tuple(
        Row(
            f'{config}_{share}_percent',
            f'{label}, {share} %',
            family,
            'data',
            config,
            MOTION,
            small=int(small and share in (10, 50)),
            share=share,
        )
        for share in (5, 10, 20, 50)
    )


PLAIN = {'model.sts': 'off'}
# No step changes anything: a frame has the backbone's own embedding, a clip the mean of them.
FROZEN = {
    'num_steps': 1,
    'optimizer.peak_lr': 0.0,
    'optimizer.warmup_start_lr': 0.0,
    'task.interaction': 'meanP',
}

ROWS: tuple[Row, ...] = (
    # On the same frozen backbone, but for STS, which has none; fine-tuning trains it.
    _main(
        'zero_shot',
        'zero-shot CLIP',
        'zero-shot',
        'zero_shot',
        small=1,
        full=1,
        fixed=True,
        trained=False,
    ),
    _main('frame_mean', 'frame mean + linear', 'frame mean', 'frame_mean'),
    _main('attentive_probe', 'attentive probe', 'attentive probe', 'attentive_probe'),
    _main('fine_tune', 'fine-tuned, mean of frames', 'fine-tuning', 'fine_tune'),
    _main('dist', 'DiST', 'DiST', 'dist'),
    _main('evl', 'EVL', 'EVL', 'evl'),
    _main('side4video', 'Side4Video', 'Side4Video', 'side4video'),
    _main(
        'side4video_light',
        'Side4Video light',
        'Side4Video',
        'side4video',
        fields={'model.tap_every': 3},  # a layer for all three blocks, as wide
    ),
    Row(
        'sts_pictures', 'pictures', 'pictures', 'sts', 'sts', ('pictures',), full=1, form='_images'
    ),
    # Its steps take minutes together, so looks have one seed.
    _main('sts', 'STS, from pictures', 'STS', 'sts', start='sts_pictures', once=('looks',)),
    # Parts.
    _part('dist', 'no_spatial', 'no spatial branch', 'DiST', 'ablation', spatial_branch=False),
    _part('dist', 'no_temporal', 'no temporal branch', 'DiST', 'ablation', temporal_branch=False),
    _part('dist', 'no_integration', 'no integration', 'DiST', 'ablation', integration_branch=False),
    _part('dist', 'linear', 'linear classifier', 'DiST', 'ablation', head='linear'),
    _part('evl', 'no_conv', 'no convolution', 'EVL', 'ablation', temporal_conv=False),
    _part('evl', 'no_positions', 'no positions', 'EVL', 'ablation', temporal_positions=False),
    _part(
        'evl', 'no_cross', 'no cross attention', 'EVL', 'ablation', temporal_cross_attention=False
    ),
    _part('evl', '1_layer', '1 layer', 'EVL', 'ablation', depth=1),
    _part('evl', '2_layers', '2 layers', 'EVL', 'ablation', depth=2),
    _part('side4video', 'no_shift', 'no shift', 'Side4Video', 'ablation', class_token_shift=False),
    _part('side4video', 'no_conv', 'no convolution', 'Side4Video', 'ablation', temporal_conv=False),
    # Frames; alpha 2 of 8 frames is the main table's.
    _part('dist', 'alpha_1', 'alpha 1', 'DiST', 'frames', alpha=1),
    _part('dist', 'alpha_4', 'alpha 4', 'DiST', 'frames', alpha=4),
    _frames('dist', 4, '4 frames', 'DiST'),
    _frames('dist', 16, '16 frames', 'DiST', small=0),
    _frames('evl', 4, '4 frames', 'EVL'),
    _frames('evl', 16, '16 frames', 'EVL', small=0),
    _frames('side4video', 4, '4 frames', 'Side4Video', small=0),
    _frames('side4video', 16, '16 frames', 'Side4Video', small=0),
    # Data efficiency.
    *_shares('frame_mean', 'frame mean', 'frame mean', small=False),
    *_shares('attentive_probe', 'attentive probe', 'attentive probe', small=False),
    *_shares('fine_tune', 'fine-tuned frames', 'fine-tuning', small=False),
    *_shares('dist', 'DiST', 'DiST', small=True),
    *_shares('evl', 'EVL', 'EVL', small=True),
    *_shares('side4video', 'Side4Video', 'Side4Video', small=True),
    # Texts. DiST's classifier is the class names themselves, so the main table's tells new ones.
    Row(
        'retrieval_frozen',
        'frozen CLIP',
        'retrieval',
        'retrieval',
        'side4video_retrieval',
        CAPTIONS,
        FROZEN,
        full=1,
        fixed=True,
    ),
    Row(
        'retrieval',
        'Side4Video',
        'retrieval',
        'retrieval',
        'side4video_retrieval',
        CAPTIONS,
        small=3,
    ),
    Row(
        'retrieval_means',
        'Side4Video, one vector of each',
        'retrieval',
        'retrieval',
        'side4video_retrieval',
        CAPTIONS,
        {'task.interaction': 'meanP'},
        small=0,
    ),
    Row(
        'retrieval_1_frame',
        'Side4Video, one frame',
        'retrieval',
        'retrieval',
        'side4video_retrieval',
        CAPTIONS,
        {'data.num_frames': 1},
        small=0,
    ),
    # The network of STS without STS, and without pictures.
    Row(
        'sts_plain',
        'plain, from pictures',
        'STS',
        'sts',
        'sts',
        MOTION,
        PLAIN,
        start='sts_pictures',
    ),
    Row('sts_scratch', 'STS, from scratch', 'STS', 'sts', 'sts', MOTION),
    Row('sts_scratch_plain', 'plain, from scratch', 'STS', 'sts', 'sts', MOTION, PLAIN),
)

FUSIONS = (0.0, 0.25, 0.5, 0.75, 1.0)  # weight of the frozen CLIP: 1 is it alone


def fusion_name(data: str, weight: float) -> str:
    """Of the test of DiST on a list, with this weight."""
    return f'dist_{data}_fusion_{round(100 * weight)}'


TESTS: tuple[Test, ...] = tuple(
    Test(fusion_name(data, weight), 'dist', trained_on, data, {'eval.fusion': weight})
    for trained_on in BOTH
    for data in (trained_on, f'{trained_on}_new')
    for weight in FUSIONS
)


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of it is run.

    Attributes:
      world: where.
      steps: of every run.
      seeds: of a row on one of its data sets.
      only: names of its rows and tests; () for all rows with a seed, and their tests.
    """

    world: World
    steps: int
    seeds: Callable[[Row, str], int]
    only: tuple[str, ...] = ()


SIZES = {
    'small': Size(
        WORLD, STEPS, lambda row, data: min(row.small, 1) if data in row.once else row.small
    ),
    'full': Size(WORLD, STEPS, lambda row, data: row.full),
    'smoke': Size(
        CLIPS,
        4,
        lambda row, data: 1,
        ('frame_mean', 'frame_mean_10_percent', 'dist', fusion_name('motion_new', 0.5)),
    ),
}
