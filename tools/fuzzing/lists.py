"""Lists of videos and label maps for the fuzz: one of each format, damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tools.fuzzing import damage
from tools.fuzzing.child import Input
from tools.fuzzing.damage import Rng

_SENTENCES = {
    'videos': [{'video_id': f'video{k}', 'split': 'train'} for k in range(3)],
    'sentences': [{'video_id': f'video{k}', 'caption': f'a cat {k}'} for k in range(3)],
}
# Name -> (format, file to read ('' for the folder), files, other options of `open_source`).
LISTS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    'kinetics lines': ('auto', 'l.txt', {'l.txt': 'a b/1.mp4 0\na/2.mp4 1\na/3.mp4 0'}, {}),
    'csv, bare': ('csv', 'l.csv', {'l.csv': 'a.mp4,0\nb.mp4,1\nc d.mp4,1'}, {}),
    'csv, header': (
        'auto',
        'l.csv',
        {'l.csv': 'path,label,start,end\na.mp4,walk,0.5,1:02.5\nb.mp4,run,,\nc.mp4,run,0,9'},
        {},
    ),
    'csv, split': (
        'auto',
        'l.csv',
        {'l.csv': 'path,label,split\na.mp4,0,train\nb.mp4,1,train\nc.mp4,1,val'},
        {'subset': 'train'},
    ),
    'csv, Kinetics': (
        'auto',
        'l.csv',
        {
            'l.csv': 'label,youtube_id,time_start,time_end,split\n'
            'abseiling,0347ZoDXyP0,95,105,train\nair drumming,xyzxyzxyzxy,1,11.0,train'
        },
        {'subset': 'train'},
    ),
    'csv, EPIC': (
        'auto',
        'l.csv',
        {
            'l.csv': 'narration_id,participant_id,video_id,start_timestamp,stop_timestamp,'
            'verb_class,noun_class\nP01_0,P01,P01_01,00:00:01.08,00:00:03.00,3,7\n'
            'P01_1,P01,P01_01,00:00:05.08,00:00:06.00,0,1'
        },
        {'num_classes': (97, 300)},
    ),
    'multi-label lines': (
        'multi_label',
        'l.txt',
        {'l.txt': 'a b/1.mp4 0,2\na/2.mp4\na/3.mp4 1 2\nfolder 3'},
        {},
    ),
    'csv, labels': (
        'auto',
        'l.csv',
        {'l.csv': 'path,labels\na.mp4,walk;run\nb.mp4,\nc.mp4,run|sit', 'n.txt': 'run\nsit\nwalk'},
        {'label_map': 'n.txt', 'several': True},
    ),
    'csv, Charades': (
        'auto',
        'l.csv',
        {
            'l.csv': 'id,subject,script,actions,length\nAAAAA,S1,"a, b",c092 11.90 21.20;'
            'c147 0.00 12.60,30\nBBBBB,S2,c,,12.5',
            'n.txt': ''.join(f'c{k:03d} name {k}\n' for k in range(157)),
        },
        {'label_map': 'n.txt', 'num_classes': 157},
    ),
    'jsonl, labels': (
        'auto',
        'l.jsonl',
        {'l.jsonl': '{"path": "a.mp4", "labels": [1, 0]}\n{"path": "b.mp4", "labels": []}'},
        {'several': True},
    ),
    'Something-Something': (
        'auto',
        'l.json',
        {
            'l.json': [
                {'id': '1', 'label': 'x', 'template': 'Putting [something]'},
                {'id': '2', 'label': 'y', 'template': 'Taking [something]'},
            ],
            'labels.json': {'Putting something': '0', 'Taking something': '1'},
        },
        {'label_map': 'labels.json'},
    ),
    'UCF101': (
        'auto',
        'trainlist01.txt',
        {
            'trainlist01.txt': 'Archery/v_1.avi 1\nBowling/v_2.avi 2\nBowling/v_3.avi',
            'classInd.txt': '1 Archery\n2 Bowling',
        },
        {'label_map': 'classInd.txt'},
    ),
    'HMDB51': (
        'auto',
        '',
        {
            'run_test_split1.txt': 'a.avi 1\nb.avi 2\nc.avi 0',
            'walk_test_split1.txt': 'd.avi 1\ne.avi 2',
        },
        {'subset': 'train1'},
    ),
    'json': (
        'auto',
        'l.json',
        {'l.json': [{'path': 'a.mp4', 'label': 1, 'end': 2.5}, {'path': 'b', 'label': 0}]},
        {},
    ),
    'jsonl': (
        'auto',
        'l.jsonl',
        {'l.jsonl': '{"path": "a.mp4", "label": 1}\n{"path": "b.mp4", "label": 0, "start": 1}'},
        {},
    ),
    'folder': ('auto', '', {'walk/a.mp4': '', 'run/b.mp4': '', 'run/c.avi': ''}, {}),
    'MSR-VTT': ('auto', 'l.json', {'l.json': _SENTENCES}, {}),
    'MSR-VTT, csv': (
        'msrvtt',
        'l.csv',
        {'l.csv': 'key,video_id\nret0,video0\nret1,video1', 'MSRVTT_data.json': _SENTENCES},
        {},
    ),
    'MSVD': (
        'msvd',
        'l.txt',
        {'l.txt': 'v_1\nv_2', 'AllVideoDescriptions.txt': '# x\nv_1 a cat\nv_2 a dog\nv_2 b'},
        {},
    ),
    'VATEX': (
        'auto',
        'l.json',
        {'l.json': [{'videoID': 'abcdefghijk_000001_000011', 'enCap': ['a cat', 'a dog']}]},
        {},
    ),
}

LABEL_MAPS: dict[str, Any] = {
    'names.txt': 'chess\nriding a bike\nwalking',
    'numbered.txt': '0 chess\n1 riding a bike\n2 walking',
    'map.csv': 'id,name\n1,riding a bike\n0,chess',
    'bare.csv': '0,chess\n1,riding a bike',
    'map.json': {'chess': '0', 'riding a bike': '1'},
    'inverse.json': {'0': 'chess', '1': 'riding a bike'},
    'list.json': ['chess', 'riding a bike'],
}


def read(path: Path, file: str, list_format: str, **options: Any) -> None:
    """Reads a list and every record of it, as a run or a build of a data set does."""
    from input_pipeline.sources import open_source

    label_map = options.pop('label_map', '')
    source = open_source(
        path / file, list_format, label_map=path / label_map if label_map else '', **options
    )
    for k in range(len(source)):
        _ = source[k]


def read_label_map(path: Path) -> None:
    """Reads class names and looks each of them up."""
    from input_pipeline import label_maps

    classes = label_maps.read_label_map(path)
    for name in classes.names:
        classes.find(name, str(path))


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def prepare(folder: Path) -> list[Input]:
    """Writes a good list of every format."""
    items = []
    for name, (list_format, file, files, options) in LISTS.items():
        for inside, content in files.items():
            _write(folder / name / inside, content)
        options = {'file': file, 'list_format': list_format, **options}
        items.append(Input(folder / name, name, options))
    return items


def write(seeds: list[Input], folder: Path, rng: Rng, number: int) -> Input:
    """Writes a list of which one file, or what stands beside it, is bad."""
    seed = seeds[number % len(seeds)]
    files = LISTS[seed.origin][2]
    for inside, content in files.items():
        _write(folder / inside, content)
    inside = list(files)[rng.integers(len(files))]
    _spoil(folder / inside, files[inside], rng)
    return Input(folder, seed.origin, seed.options)


def _spoil(path: Path, content: Any, rng: Rng) -> None:
    data, how = path.read_bytes(), rng.random()
    if how < 0.04:
        path.unlink()
        if how < 0.02:
            os.mkfifo(path)
        else:
            path.mkdir()
    elif how < 0.25:
        path.write_bytes(damage.bytes_of(data, data[::-1], rng))
    elif isinstance(content, str):
        path.write_bytes(damage.text_of(content, rng))
    else:
        path.write_bytes(damage.json_of(content, rng))


def prepare_label_maps(folder: Path) -> list[Input]:
    """Writes a good label map of every format."""
    for name, content in LABEL_MAPS.items():
        _write(folder / name, content)
    return [Input(folder / name, name) for name in LABEL_MAPS]


def write_label_map(seeds: list[Input], path: Path, rng: Rng, number: int) -> Input:
    """Writes a bad label map."""
    name = seeds[number % len(seeds)].origin
    path = path.with_name(f'{path.name}_{name}')
    _write(path, LABEL_MAPS[name])
    _spoil(path, LABEL_MAPS[name], rng)
    return Input(path, name)
