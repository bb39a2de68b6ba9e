"""Official tables of the Kinetics sets with made-up contents."""

import csv

from dist_jax.dataset.merging.kinetics import SETS, Inputs
from input_pipeline.kinetics import SYNONYMS


def youtube_id(name):
    return f'{name:-<11}'


def write_table(path, rows, split, columns=('split',)):
    """Writes rows (label, id, start, end); without labels if the first has None."""
    labels = rows[0][0] is not None
    with open(path, 'w', newline='') as file:
        writer = csv.writer(file)
        header = ['youtube_id', 'time_start', 'time_end', *columns]
        writer.writerow(['label', *header] if labels else header)
        for label, name, start, end in rows:
            row = [
                youtube_id(name),
                start,
                end,
                *({'split': split, 'is_cc': 0}[c] for c in columns),
            ]
            writer.writerow([label, *row] if labels else row)
    return str(path)


def write_tables(folder, tables, order=None):
    """Writes {'k400 train': rows} as each set has them: set -> Inputs; `order` shuffles rows."""
    folder.mkdir(exist_ok=True)
    found = {source: {} for source in SETS}
    for name, rows in tables.items():
        source, split = name.split()
        rows = order.sample(rows, len(rows)) if order else rows
        columns = ('split', 'is_cc') if source == 'k400' else ('split',)
        stated = 'validate' if (source, split) == ('k700', 'val') else split
        path = folder / f'{source}_{split}.csv'
        found[source][split] = (write_table(path, rows, stated, columns),)
    return {source: Inputs(**tables) for source, tables in found.items()}


def whole_sets():
    """Class names of the sets, made up around the 15 real pairs: 400, 600 and 700, 725 in all."""
    old, new = list(SYNONYMS), list(SYNONYMS.values())
    common = [f'class {k:03d}' for k in range(685)]
    gone = [f'gone {k}' for k in range(10)]  # not in k700
    return {
        'k400': old[:13] + gone[:6] + common[:381],
        'k600': old[12:] + new[:12] + gone + common[:575],
        'k700': new + common,
    }


def whole_tables():
    """One row for each class of each set and split."""
    return {
        f'{source} {split}': [
            (name, f'{source}{split[:2]}{k}', 0, 10) for k, name in enumerate(names)
        ]
        for source, names in whole_sets().items()
        for split in ('train', 'val', 'test')
    }
