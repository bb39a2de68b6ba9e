"""From finished shards to a data set: index, TFDS metadata, manifest, report and histograms."""

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dist_jax.dataset.building.examples import label_names, make_features
from dist_jax.dataset.building.shards import MANIFEST, BuildFolder, Task
from dist_jax.drawing import cut, theme
from input_pipeline.escape import json_text, terminal
from input_pipeline.label_sets import LabelSets
from input_pipeline.packed import Texts, TextTuples
from input_pipeline.records import (
    FACTS,
    INDEX,
    SETS_FEATURE,
    SplitIndex,
    index_file,
    index_text,
)

_MOST_BARS = 48  # classes that get a bar and their name; of more, so many are named


@dataclass(frozen=True)
class Summary:
    """What came of a split.

    Attributes:
      listed: videos in the list.
      stored: records in the shards.
      num_bytes: of the shards.
      dropped: number of videos by kind of problem.
    """

    listed: int
    stored: int
    num_bytes: int
    dropped: dict[str, int]


def finish(folder: BuildFolder) -> dict[str, Summary]:
    """Completes a data set whose shards are all built; may be cut off and called again.

    Args:
      folder: of the build.

    Returns:
      What came of each split.

    Raises:
      ValueError: if no video of a split could be stored.
    """
    manifest = json.loads(json.dumps(folder.manifest))
    summaries, problems, histograms, infos = {}, {}, {}, []
    for split, count in folder.splits.items():
        tasks = [Task(split, k) for k in range(count)]
        results = folder.results(tasks)
        index = _make_index(folder, tasks, results)
        folder.write(index_file(split), index.to_bytes())
        problems[split] = [problem for result in results for problem in result['problems']]
        summaries[split] = Summary(
            manifest['splits'][split]['num_listed'],
            len(index.labels),
            sum(result['file_bytes'] for result in results),
            dict(Counter(problem['kind'] for problem in problems[split]).most_common()),
        )
        histograms[split] = _histogram(folder, index)
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=index.shard_lengths.tolist(),
                num_bytes=int(index.num_bytes.sum()),
                filename_template=_template(folder),
            )
        )
        manifest['splits'][split]['shards'] = [
            {
                'file': folder.shard_name(task),
                'records': len(result['rows']),
                'bytes': result['file_bytes'],
                'sha256': result['sha256'],
            }
            for task, result in zip(tasks, results)
        ]
    empty = [split for split, summary in summaries.items() if not summary.stored]
    folder.write('report.json', _json(_report(summaries, problems)))
    folder.write('report.txt', report_text(folder.name, summaries, problems))
    if empty:
        raise ValueError(
            f'{folder.path}: not one video of {", ".join(empty)} could be stored; see report.txt'
        )
    folder.write('labels.json', _json(histograms))
    _draw_histograms(histograms, folder)
    tfds.folder_dataset.write_metadata(
        data_dir=folder.path,
        features=make_features(folder.class_names, folder.several),
        split_infos=infos,
        filename_template=_template(folder),
        check_data=False,
        description=f'{folder.name} as encoded videos, built from its original files',
    )
    manifest['complete'] = True
    folder.write(MANIFEST, _json(manifest))
    folder.write(
        INDEX,
        index_text(folder.name, list(folder.splits), folder.class_names, folder.several),
    )
    (folder.path / 'build').rmtree()
    return summaries


def _template(folder: BuildFolder) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
        data_dir=folder.path, dataset_name=folder.name, filetype_suffix='array_record'
    )


def _make_index(
    folder: BuildFolder, tasks: Sequence[Task], results: Sequence[Mapping[str, Any]]
) -> SplitIndex:
    rows = [row for result in results for row in result['rows']]
    own = [row['label'] for row in rows]
    labels = (
        LabelSets.pack(own)
        if folder.several
        else np.array(own, np.int32).reshape(len(rows), len(folder.class_names))
    )
    return SplitIndex(
        video_ids=Texts.pack([row['video_id'] for row in rows]),
        labels=labels,
        facts={name: np.array([row[name] for row in rows], kind) for name, kind in FACTS.items()},
        num_bytes=np.array([row['num_bytes'] for row in rows], np.int64),
        crc32=np.array([row['crc32'] for row in rows], np.uint32),
        captions=TextTuples.pack([row['captions'] for row in rows]),
        shards=tuple(map(folder.shard_name, tasks)),
        shard_lengths=np.array([len(result['rows']) for result in results], np.int64),
    )


def _json(content: Any) -> str:
    return json_text(content, indent=1) + '\n'


def _report(
    summaries: Mapping[str, Summary], problems: Mapping[str, Sequence[Mapping[str, str]]]
) -> dict[str, Any]:
    return {
        split: {
            'listed': summary.listed,
            'stored': summary.stored,
            'shard_bytes': summary.num_bytes,
            'dropped': summary.dropped,
            'videos': list(problems[split]),
        }
        for split, summary in summaries.items()
    }


def report_text(
    name: str,
    summaries: Mapping[str, Summary],
    problems: Mapping[str, Sequence[Mapping[str, str]]],
) -> str:
    """The report for reading: counts by reason, then every video that is not in the set."""
    lines = [f'{name}: videos listed, stored, and left out by reason']
    for split, summary in summaries.items():
        lines.append(
            f'{split}: {summary.listed} listed, {summary.stored} stored '
            f'({summary.stored / summary.listed:.2%}), {summary.num_bytes / 1e9:.3f} GB'
        )
        lines += [f'  {kind}: {count}' for kind, count in summary.dropped.items()]
    for split in summaries:
        if problems[split]:
            lines.append(f'\nleft out of {split}: id, file in the list, reason, line of the list')
        for problem in problems[split]:
            reason = f'{problem["kind"]}: {problem["reason"]}'
            fields = (problem['video_id'], problem['name'], reason, problem['where'])
            lines.append('  ' + '\t'.join(map(terminal, fields)))
    return '\n'.join(lines) + '\n'


def _histogram(folder: BuildFolder, index: SplitIndex) -> dict[str, dict[str, int]]:
    """Number of videos by class for each head; in sets of captions by number of captions."""
    if not folder.class_names:
        counts = Counter(np.diff(index.captions.ends, prepend=0).tolist())
        return {'captions per video': {str(k): counts[k] for k in sorted(counts)}}
    if folder.several:
        (names,) = folder.class_names
        return {SETS_FEATURE: dict(zip(names, index.labels.counts(len(names)).tolist()))}
    found = {}
    for head, (label, names) in enumerate(
        zip(label_names(len(folder.class_names)), folder.class_names)
    ):
        counts = np.bincount(index.labels[:, head], minlength=len(names)).tolist()
        found[label] = dict(zip(names, counts))
    return found


def _draw_histograms(
    histograms: Mapping[str, Mapping[str, Mapping[str, int]]], folder: BuildFolder
) -> None:
    """labels.png: a row a split, a column a head; classes from the most frequent on."""
    heads = max(len(heads) for heads in histograms.values())
    heights = [
        max(
            0.6 + 0.2 * len(counts) if len(counts) <= _MOST_BARS else 4.2 for counts in row.values()
        )
        for row in histograms.values()
    ]
    with theme():
        figure = Figure(figsize=(11 * heads, sum(heights)), layout='constrained')
        axes = figure.subplots(len(histograms), heads, squeeze=False, height_ratios=heights)
        for row, (split, found) in zip(axes, histograms.items()):
            for axis, (what, counts) in zip(row, found.items()):
                title = f'{cut(folder.name, 40)}, {split}, {what}'
                _draw_counts(axis, title, counts, 'labels' if folder.several else 'videos')
        file = io.BytesIO()
        figure.savefig(file, format='png', dpi=110)
    folder.write('labels.png', file.getvalue())


def _draw_counts(axis: Axes, title: str, counts: Mapping[str, int], of: str) -> None:
    pairs = sorted(counts.items(), key=lambda pair: -pair[1])
    names, values = [cut(name, 40) for name, _ in pairs], [count for _, count in pairs]
    empty = sum(value == 0 for value in values)
    mean = sum(values) / len(values)
    each = f'{values[0]:,} each'
    if len(set(values)) > 1:
        each = f'{min(values):,} to {max(values):,} each, mean {mean:.1f}'
    axis.set_title(
        f'{title}: {sum(values):,} {of}, {len(values)} values with {each}'
        + (f', {empty} without a video' if empty else '')
    )
    if len(pairs) <= _MOST_BARS:
        _draw_bars(axis, names, values)
    else:
        _draw_profile(axis, names, values, mean)


def _draw_bars(axis: Axes, names: Sequence[str], values: Sequence[int]) -> None:
    """A bar a class, its name before and its number behind."""
    axis.barh(range(len(values)), values, height=0.66)
    for place, value in enumerate(values):
        axis.annotate(
            f'{value:,}',
            (value, place),
            (4, 0),
            textcoords='offset points',
            va='center',
            fontsize=8,
        )
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(0, 1.06 * max(*values, 1))
    axis.set_xticks([])
    axis.tick_params(axis='y', length=0)
    axis.spines['bottom'].set_visible(False)


def _draw_profile(axis: Axes, names: Sequence[str], values: Sequence[int], mean: float) -> None:
    """One outline over the many classes, some of them named."""
    axis.stairs(values, np.arange(len(values) + 1) - 0.5, fill=True)
    axis.axhline(mean, color='C1', linewidth=1, label='mean')
    axis.legend(fontsize=8, loc='upper right')
    axis.set_ylabel('videos')
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.margins(x=0.01)
    step = -(-len(names) // _MOST_BARS)
    axis.set_xticks(
        range(0, len(names), step),
        [cut(name, 28) for name in names[::step]],
        rotation=60,
        ha='right',
        rotation_mode='anchor',
        fontsize=7,
    )
    axis.set_ylim(0, 1.12 * max(*values, 1))
