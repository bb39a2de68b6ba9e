"""The card of a release: what a person reads before using it, and what the Hub reads at its top."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dist_jax.scalars import label, show, telling
from input_pipeline import escape

MARK = '<!-- made by `dist_jax push` -->'  # a card without it is somebody's own
FOLDED = 50  # classes beyond which their names are folded
MOST_NAMED = 1000  # classes of a head in a card; all are in config.json
OWN_LIST = 'custom'  # what `data.name` says of a list that is of no known data set
# Figure of an evaluation -> what the Hub calls it.
_METRICS = {'top1': 'accuracy', 'top5': 'accuracy', 'map': 'mean_average_precision'}


def text(metadata: Mapping[str, Any], name: str, license: str = '') -> str:
    """A card, as Markdown with a head of YAML.

    Args:
      metadata: what `config.json` of the release holds.
      name: `owner/name`, or of a folder.
      license: as the Hub knows it ('apache-2.0'); '' where nothing was said.
    """
    config = metadata['config']
    title = name.rpartition('/')[2]
    parts = [
        _head(metadata, title, license),
        MARK,
        f'# {_inline(title)}',
        _what(metadata),
        '## Use',
        _use(metadata, name),
        '## Accuracy',
        _accuracy(metadata),
        '## Protocol',
        _table(('what', 'value'), _protocol(metadata)),
    ]
    if metadata['class_names']:
        parts += ['## Classes', *_classes(metadata['class_names'])]
    parts += [
        '## Training',
        _table(('field', 'value'), _training(config)),
        'All fields are in `config.json`.',
        '## Hashes',
        _table(('of', 'SHA-256'), _hashes(metadata)),
        '## Licence',
        _licence(metadata, license),
    ]
    return '\n\n'.join(part for part in parts if part) + '\n'


def _head(metadata: Mapping[str, Any], title: str, license: str) -> str:
    """What the Hub reads; JSON values are YAML."""
    config, backbone = metadata['config'], metadata['backbone'] or {}
    classifies = bool(metadata['class_names'])
    rows: dict[str, Any] = {'library_name': 'dist_jax'}
    if license:
        rows['license'] = license
    if classifies:
        rows['pipeline_tag'] = 'video-classification'
    rows['tags'] = ['video', 'jax', 'flax', config['model']['family']]
    if base_model := hub_repository(backbone):
        rows['base_model'] = base_model
    found = metadata['evaluation']
    if classifies and found and _METRICS.keys() & set(found['figures']):
        rows['model-index'] = [{'name': title, 'results': [_result(metadata)]}]
    lines = [f'{key}: {json.dumps(value)}' for key, value in rows.items()]
    return '\n'.join(['---', *lines, '---'])


def _result(metadata: Mapping[str, Any]) -> dict[str, Any]:
    found, data = metadata['evaluation'], metadata['config']['data']['name']
    named = 'own list' if data == OWN_LIST else data
    metrics = [
        {'type': kind, 'name': label(name), 'value': round(100 * found['figures'][name], 2)}
        for name, kind in _METRICS.items()
        if name in found['figures']
    ]
    dataset = {'type': data, 'name': escape.terminal(named)}
    return {'task': {'type': 'video-classification'}, 'dataset': dataset, 'metrics': metrics}


def hub_repository(backbone: Mapping[str, Any]) -> str:
    """`owner/name` of what a backbone was converted from; '' where that is not known."""
    return re.sub('^hf://', '', backbone.get('hub', '')).partition('@')[0]


def _what(metadata: Mapping[str, Any]) -> str:
    config, backbone = metadata['config'], metadata['backbone']
    on = 'without a backbone'
    if backbone:
        on = f'on the frozen backbone {_inline(backbone["name"])}'
    return (
        f'A video model of the family `{config["model"]["family"]}` {on}, trained with dist_jax on '
        f'`{config["data"]["name"]}`, step {metadata["step"]:,}. The files hold JSON and plain '
        'tensors; nothing in them is executed.'
    )


def _use(metadata: Mapping[str, Any], name: str) -> str:
    backbone, held = metadata['backbone'], 'backbone.safetensors' in metadata['files']
    where = repr(f'hf://{name}' if '/' in name else name)
    load = f'model = dist_jax.load({where})'
    before = "pip install 'dist_jax[hub]'"
    about = ''
    if backbone and not held:
        load = f"model = dist_jax.load({where}, backbone='backbone')"
        hub = backbone.get('hub')
        if hub:
            before += f'\ndist_jax convert {hub} backbone'
            if backbone['precision'] != 'float32':
                before += f' --precision {backbone["precision"]}'
        else:
            files = ', '.join(source['file'] for source in backbone.get('sources', ()))
            about = (
                'The frozen backbone is not in here. `backbone` is the folder that `dist_jax '
                f'convert` makes of it ({_inline(files or backbone["name"])}); its hash is below, '
                'and another one is refused.'
            )
    first = (
        "model.predict('a.mp4').top  # the most probable classes"
        if metadata['class_names']
        else "model.embed('a.mp4')  # one vector"
    )
    return '\n\n'.join(
        part
        for part in (
            f'```sh\n{before}\n```',
            about,
            f'```python\nimport dist_jax\n\n{load}\n{first}\n```',
        )
        if part
    )


def _accuracy(metadata: Mapping[str, Any]) -> str:
    found = metadata['evaluation']
    if not found:
        return 'Not measured: the run holds no evaluation of this step.'
    figures = telling(found['figures'], list(map(len, metadata['class_names'])))
    table = _table(
        ('figure', 'value'), [(label(name), show(name, value)) for name, value in figures.items()]
    )
    data = metadata['config']['data']['name']
    of = ', an own list' if data == OWN_LIST else f' of {_inline(data)}'
    fusion = f', fused with the frozen backbone ({found["fusion"]})' if found['fusion'] else ''
    on = f'{_inline(found["list"])}{of}'
    return f'{table}\n\nBy {found["by"]} on {on}, {found["num_views"]} views a video{fusion}.'


def _protocol(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    views, pixels = metadata['views'], metadata['preprocessing']
    return [
        ('clip', f'{views["num_frames"]} frames of {views["image_size"]} x {views["image_size"]}'),
        ('views', f'{views["num_clips"]} along time x {views["num_crops"]} crops, averaged'),
        ('sampling', f'{views["sampling"]}, interval {views["interval"]}'),
        ('pixels', pixels['pixels']),
        ('mean', ', '.join(f'{value:.6g}' for value in pixels['mean'])),
        ('std', ', '.join(f'{value:.6g}' for value in pixels['std'])),
    ]


def _training(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    fields = (
        ('batch_size',),
        ('num_epochs',),
        ('num_steps',),
        ('optimizer', 'name'),
        ('optimizer', 'peak_lr'),
        ('optimizer', 'weight_decay'),
        ('optimizer', 'ema_decay'),
        ('model', 'head'),
        ('seed',),
    )
    rows = []
    for field in fields:
        value: Any = config
        for name in field:
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            rows.append(('.'.join(field), str(value)))
    return rows


def _classes(heads: Sequence[Sequence[str]]) -> list[str]:
    parts = []
    for i, names in enumerate(heads):
        head = f'Head {i}: ' if len(heads) > 1 else ''
        block = escape.markdown('\n'.join(map(escape.terminal, names[:MOST_NAMED])))
        more = f'\n\nand {len(names) - MOST_NAMED} more' if len(names) > MOST_NAMED else ''
        summary = f'{head}{len(names)} classes'
        if len(names) > FOLDED:
            parts.append(f'<details><summary>{summary}</summary>\n\n{block}{more}\n\n</details>')
        else:
            parts.append(f'{summary}:\n\n{block}')
    return parts


def _hashes(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(f'`{name}`', f'`{file["sha256"]}`') for name, file in metadata['files'].items()]
    rows.append(('the trained parameters', f'`{metadata["params_sha256"]}`'))
    if backbone := metadata['backbone']:
        name = f'the parameters of the backbone {_inline(backbone["name"])}'
        rows.append((name, f'`{backbone["params_sha256"]}`'))
    rows.append(('the training list', f'`{metadata["train_list_sha256"]}`'))
    return rows


def _licence(metadata: Mapping[str, Any], license: str) -> str:
    own = (
        f'The trained parameters: {_inline(license)}.'
        if license
        else 'No licence was stated for the trained parameters: ask who published them.'
    )
    held = 'backbone.safetensors' in metadata['files']
    backbone = ''
    if metadata['backbone']:
        place = 'in this repository ' if held else ''
        backbone = f' The backbone {place}has a licence of its own, that of who trained it.'
    return (
        f'{own}{backbone} The videos and labels of the data set have terms, too, which may limit '
        'the use of what was trained on them. dist_jax itself is Apache-2.0.'
    )


def _table(columns: Sequence[str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [f'| {" | ".join(columns)} |', f'|{"---|" * len(columns)}']
    return '\n'.join(lines + [f'| {" | ".join(map(_cell, row))} |' for row in rows])


def _cell(value: str) -> str:
    return escape.terminal(value).replace('|', '\\|')


def _inline(value: object) -> str:
    """A name from outside in a line of Markdown, as code."""
    shown = escape.terminal(value).replace('`', "'")
    return f'`{shown}`' if shown else '(nothing)'
