"""The data sets: one row each. A new one is a new row; `list_formats` reads its lists."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from input_pipeline import (
    class_names,
    kinetics,
    motion_captions,
    motion_clips,
    motion_images,
    motion_world,
)
from input_pipeline.transforms import Flip

PLAIN_FLIP = Flip()
# "... from left to right" and its two relatives, in the official label map: for lists of numbers.
# Where names are known, `class_names.mirror_pairs` finds the pairs, and the same ones there.
SOMETHING_FLIP = Flip(label_pairs=((86, 87), (93, 94), (166, 167)))


@dataclass(frozen=True)
class SplitFile:
    """Where the original annotation files say what belongs to a split.

    Attributes:
      names: of the file in the folder of annotations, the first that is there; '.' is the folder.
      list_format: its parser, a key of `list_formats.FORMATS`.
      subset: for parsers of files with several splits.
    """

    names: tuple[str, ...]
    list_format: str = 'csv'
    subset: str = ''


@dataclass(frozen=True)
class DatasetInfo:
    """What the code has to know about a data set.

    Attributes:
      num_classes: number of classes; one per head (verb, noun) as a tuple; 0 takes what the label
        map or the list says.
      list_format: of its usual lists, see `sources.open_source`.
      flip: mirroring in training; None where it would lie. Its pairs of labels count for lists
        whose classes have no names; else they come from the names.
      sampling: a key of `sampling.PROTOCOLS`, the one of DiST for it.
      class_key: of a class name; names with equal keys are one class, in whatever list they are.
      splits: the original annotation files, which `dist_jax dataset build` reads.
      label_files: class names, one file per head, relative to the annotations; alternatives are
        separated by '|'. () numbers the names of the lists in sorted order.
      captions: texts take the place of classes.
      frame_rate: frames per second of a set that comes as folders of JPEG files.
      generate: writes a built-in set into a folder: its files, and the lists and class names that
        `splits` and `label_files` name.
    """

    num_classes: int | tuple[int, ...]
    list_format: str
    flip: Flip | None = PLAIN_FLIP
    sampling: str = 'segment'
    class_key: Callable[[str], str] = class_names.key
    splits: Mapping[str, SplitFile] = field(default_factory=dict)
    label_files: tuple[str, ...] = ()
    captions: bool = False
    frame_rate: float = 0.0
    generate: Callable[..., bool] | None = None


KINETICS_SPLITS = {
    'train': SplitFile(('train.csv',)),
    'validation': SplitFile(('validate.csv', 'val.csv', 'validation.csv')),
    'test': SplitFile(('test.csv',)),
}
KINETICS = {'class_key': kinetics.merged_key, 'splits': KINETICS_SPLITS}
BUILT_IN = {
    'list_format': 'kinetics',
    'splits': {
        'train': SplitFile(('train.txt',), 'kinetics'),
        'validation': SplitFile(('val.txt',), 'kinetics'),
    },
    'label_files': ('labels.txt',),
}


def _world(name: str) -> dict[str, Any]:
    """The clips of `motion_world` with one of their kinds of classes."""
    return {
        'list_format': 'kinetics',
        'splits': {
            split: SplitFile((f'{name}_{file}.txt',), 'kinetics')
            for split, file in (('train', 'train'), ('validation', 'val'), ('test', 'test'))
        },
        'label_files': (f'{name}_labels.txt',),
        'generate': motion_world.generate,
    }


# Sentences say left and right: no flip.
CAPTIONS = {'flip': None, 'captions': True}
BUILT_IN_CAPTIONS = {
    'list_format': 'json',
    'splits': {
        'train': SplitFile(('train.jsonl',), 'json'),
        'validation': SplitFile(('val.jsonl',), 'json'),
    },
    **CAPTIONS,
}
MSRVTT_JSON = ('MSRVTT_data.json', 'videodatainfo_2017.json', 'train_val_videodatainfo.json')

DATASETS: dict[str, DatasetInfo] = {
    'kinetics400': DatasetInfo(400, 'kinetics', **KINETICS),
    'kinetics600': DatasetInfo(600, 'kinetics', **KINETICS),
    'kinetics700': DatasetInfo(700, 'kinetics', **KINETICS),
    'kinetics700_2020': DatasetInfo(700, 'kinetics', **KINETICS),
    'kinetics710': DatasetInfo(710, 'kinetics', label_files=('names.txt',), **KINETICS),
    'something_v1': DatasetInfo(
        174,
        'csv',
        flip=SOMETHING_FLIP,
        splits={
            'train': SplitFile(('something-something-v1-train.csv', 'train.csv')),
            'validation': SplitFile(('something-something-v1-validation.csv', 'validation.csv')),
        },
        label_files=('something-something-v1-labels.csv|labels.csv',),
        frame_rate=12.0,
    ),
    'something_v2': DatasetInfo(
        174,
        'ssv2_json',
        flip=SOMETHING_FLIP,
        splits={
            'train': SplitFile(('something-something-v2-train.json', 'train.json'), 'ssv2_json'),
            'validation': SplitFile(
                ('something-something-v2-validation.json', 'validation.json'), 'ssv2_json'
            ),
        },
        label_files=('something-something-v2-labels.json|labels.json',),
    ),
    'ucf101': DatasetInfo(
        101,
        'ucf101',
        sampling='interval',
        splits={
            f'{kind}{fold}': SplitFile((f'{kind}list0{fold}.txt',), 'ucf101')
            for fold in (1, 2, 3)
            for kind in ('train', 'test')
        },
        label_files=('classInd.txt',),
    ),
    'hmdb51': DatasetInfo(
        51,
        'hmdb51',
        sampling='interval',
        splits={
            f'{kind}{fold}': SplitFile(('.',), 'hmdb51', f'{kind}{fold}')
            for fold in (1, 2, 3)
            for kind in ('train', 'test')
        },
    ),
    'epic_kitchens': DatasetInfo(
        (97, 300),
        'csv',
        sampling='interval',
        splits={
            'train': SplitFile(('EPIC_100_train.csv',)),
            'validation': SplitFile(('EPIC_100_validation.csv',)),
        },
        label_files=(
            'EPIC_100_verb_classes.csv',
            'EPIC_100_noun_classes_v2.csv|EPIC_100_noun_classes.csv',
        ),
    ),
    # Any number of classes a video: for task.name=multi_label.
    'charades': DatasetInfo(
        157,
        'csv',
        splits={
            'train': SplitFile(('Charades_v1_train.csv',)),
            'test': SplitFile(('Charades_v1_test.csv',)),
        },
        label_files=('Charades_v1_classes.txt',),
    ),
    'msrvtt': DatasetInfo(
        0,
        'msrvtt',
        splits={
            'train': SplitFile(MSRVTT_JSON, 'msrvtt', 'train'),
            'validation': SplitFile(MSRVTT_JSON, 'msrvtt', 'validate'),
            'test': SplitFile(('test_videodatainfo.json', *MSRVTT_JSON), 'msrvtt', 'test'),
            'train_9k': SplitFile(('MSRVTT_train.9k.csv',), 'msrvtt'),
            'train_7k': SplitFile(('MSRVTT_train.7k.csv',), 'msrvtt'),
            'test_1k': SplitFile(('MSRVTT_JSFUSION_test.csv',), 'msrvtt'),
        },
        **CAPTIONS,
    ),
    'msvd': DatasetInfo(
        0,
        'msvd',
        splits={
            'train': SplitFile(('train_list.txt',), 'msvd'),
            'validation': SplitFile(('val_list.txt',), 'msvd'),
            'test': SplitFile(('test_list.txt',), 'msvd'),
        },
        **CAPTIONS,
    ),
    'vatex': DatasetInfo(
        0,
        'vatex',
        splits={
            'train': SplitFile(('vatex_training_v1.0.json',), 'vatex'),
            'validation': SplitFile(('vatex_validation_v1.0.json',), 'vatex'),
            'test': SplitFile(
                ('vatex_public_test_english_v1.1.json', 'vatex_public_test_english_v1.0.json'),
                'vatex',
            ),
        },
        **CAPTIONS,
    ),
    'imagenet1k': DatasetInfo(
        1000,
        'image_folder',
        splits={
            'train': SplitFile(('train',), 'image_folder'),
            'validation': SplitFile(('val', 'validation'), 'image_folder'),
        },
    ),
    # Directions are its classes.
    'motion_clips': DatasetInfo(
        len(motion_clips.CLASS_NAMES), flip=None, generate=motion_clips.generate, **BUILT_IN
    ),
    'motion_images': DatasetInfo(
        len(motion_images.CLASS_NAMES), generate=motion_images.generate, **BUILT_IN
    ),
    'motion_captions': DatasetInfo(0, generate=motion_captions.generate, **BUILT_IN_CAPTIONS),
    # One folder of clips serves the first four.
    'motion_world': DatasetInfo(len(motion_world.MOTIONS), flip=None, **_world('motion')),
    'motion_world_looks': DatasetInfo(len(motion_world.LOOKS), **_world('looks')),
    # Shape, colour, ground and every motion of a clip. The motions are single: mirrored ones are
    # classes, too.
    'motion_world_attributes': DatasetInfo(
        len(motion_world.ATTRIBUTES),
        'csv',
        splits={
            split: SplitFile((f'attributes_{file}.csv',))
            for split, file in (('train', 'train'), ('validation', 'val'), ('test', 'test'))
        },
        label_files=('attributes_labels.txt',),
        generate=motion_world.generate,
    ),
    'motion_world_captions': DatasetInfo(
        0,
        'json',
        splits={
            'train': SplitFile(('captions_train.jsonl',), 'json'),
            'validation': SplitFile(('captions_val.jsonl',), 'json'),
            'test': SplitFile(('captions_test.jsonl',), 'json'),
        },
        generate=motion_world.generate,
        **CAPTIONS,
    ),
    'motion_world_pictures': DatasetInfo(
        0, generate=motion_world.generate_pictures, **BUILT_IN_CAPTIONS
    ),
    'custom': DatasetInfo(0, 'auto'),
}
