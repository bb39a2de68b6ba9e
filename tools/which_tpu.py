"""Which TPU a row of configs/ needs: fits, largest batch, estimated hours, as docs/which_tpu.md.

    nice -n 19 python -m tools.which_tpu                 # all rows; goes on where it was stopped
    nice -n 19 python -m tools.which_tpu --rows dist:b16_8+16f_k400 evl:b16_8f_k400
    python -m tools.which_tpu --table                    # the table of what is known, no compiling

Compiles training steps as `dist_jax plan` does, and keeps every trial in docs/which_tpu.json. Rows
that train the same program on other data, or by another rate, share trials; so do slices of one
kind of chip where every chip has all weights: a program of one chip stands for each of them. Frozen
towers that take more than a third of a chip are split over the slice (mesh.fsdp), which is compiled
as it is. Memory grows about linearly with the clips of a chip, so two or three programs find the
largest batch. A program takes minutes on two cores. Trials are of one version of the compiler and
of the models: with another, begin anew without the file.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dist_jax.configs import (
    attentive_probe,
    base,
    dist,
    evl,
    fine_tune,
    frame_mean,
    side4video,
    side4video_retrieval,
    sts,
)
from dist_jax.json_file import write_json
from dist_jax.plan import search, topology
from dist_jax.plan.cache import default_folder

DOCS = Path(__file__).parents[1] / 'docs'
FAMILIES = (
    dist,
    evl,
    side4video,
    side4video_retrieval,
    sts,
    frame_mean,
    attentive_probe,
    fine_tune,
)
SMALL = ('demo', 'demo_images', 'world', 'world_images', 'pictures')
# As Cloud TPU sells them: v4 counts cores, two a chip.
TARGETS = {
    'v5e-1': 'v5e:1x1',
    'v5e-4': 'v5e:2x2',
    'v5e-8': 'v5e:2x4',
    'v6e-8': 'v6e:2x4',
    'v4-8': 'v4:2x2x1',
    'v4-32': 'v4:2x2x4',
}
ONE_CHIP = {'v5e': 'v5e:1x1', 'v6e': 'v6e:1x1', 'v4': 'v4:1x1x1'}
# Training examples (sentences of a video count each), from the papers of the sets and their lists.
EXAMPLES = {
    'kinetics400': 240_436,
    'kinetics600': 366_006,
    'kinetics700': 536_000,  # about: it has editions
    'kinetics710': 658_340,
    'something_v1': 86_017,
    'something_v2': 168_913,
    'epic_kitchens': 67_217,
    'imagenet1k': 1_281_167,
    'msrvtt': 180_000,
    'msvd': 48_774,
    'vatex': 259_910,
}
# Fields that a program does not depend on.
APART = (
    'seed',
    'init_',
    'num_epochs',
    'num_steps',
    'batch_size',
    'accumulation',
    'data.',
    'eval.',
    'mesh.',
    'checkpoint.',
    'log.',
    'backbone.checkpoint',
    'batch_norm.',
    'optimizer.',
    'mixing.',
)
BUT = ('data.num_frames', 'data.image_size', 'optimizer.name', 'optimizer.ema_decay')
FIRST = 8  # clips of a chip to begin with
CLOSE = 0.15  # of the limit, or of the largest batch: near enough
SHARE = 3  # a frozen tower of more than a third of a chip is split


def rows() -> dict[str, ConfigDict]:
    """'dist:b16_8+16f_k400' -> config, of all rows that are trained on real data."""
    return {
        f'{family.__name__.rpartition(".")[2]}:{row}': family.get_config(row)
        for family in FAMILIES
        for row in family.VARIANTS
        if row not in SMALL
    }


def program_of(config: ConfigDict) -> str:
    """A name of the program that a row trains: equal for rows that differ in data and rates."""
    fields = base.flat(config)
    kept = {
        name: value
        for name, value in fields.items()
        if name in BUT or not any(name.startswith(prefix) for prefix in APART)
    }
    kept['mixed'] = config.mixing.probability > 0
    return hashlib.sha256(repr(sorted(kept.items())).encode()).hexdigest()[:12]


def first_rows() -> dict[str, str]:
    """Each row -> the first row of the same program, under which its trials are kept."""
    firsts, found = {}, {}
    for name, config in rows().items():
        found[name] = firsts.setdefault(program_of(config), name)
    return found


def clips_of(config: ConfigDict) -> float:
    """Clips (of retrieval: pairs) of a whole training."""
    if config.num_steps:
        return config.num_steps * config.batch_size
    repeats = config.data.repeats if config.data.repeats_extend_epoch else 1
    return config.num_epochs * EXAMPLES[config.data.name] * repeats


def asked(config: ConfigDict, clips: int, fsdp: int) -> ConfigDict:
    """The row with so many clips in a step, whole, and each chip's statistics its own."""
    found = copy.deepcopy(config)
    found.batch_size, found.accumulation = clips, 1
    found.batch_norm.groups, found.mesh.fsdp = 1, fsdp
    found.data.repeats = 1
    return found


def trials(
    plan: Callable[[ConfigDict], dict[str, Any]],
    config: ConfigDict,
    chips: int,
    known: list[dict[str, Any]],
    save: Callable[[], None],
) -> None:
    """Fills `known` with trials until the largest batch of a chip is found."""

    def attempt(size: int) -> search.Trial:
        found = next((one for one in known if one['clips'] == size), None)
        if found is None:
            figures = plan(asked(config, size * chips, chips))
            keys = ('fits', 'hbm_bytes_needed', 'hbm_bytes_limit', 'estimated_seconds')
            found = {'clips': size} | {key: figures[key] for key in keys}
            known.append(found)
            save()
        return search.Trial(size, found['fits'], found['hbm_bytes_needed'])

    attempt(FIRST)  # says the limit
    limit = known[0]['hbm_bytes_limit']
    for most in (3, 4):  # the third is where a line through two meets the limit
        search.largest_fitting(attempt, FIRST, limit, tolerance=CLOSE, most=most)
        needed = max((one['hbm_bytes_needed'] for one in known if one['fits']), default=0)
        if needed > limit * (1 - CLOSE):
            break


def planners(folder: str) -> Callable[[str], Callable[[ConfigDict], dict[str, Any]]]:
    """Topology -> config -> its plan; a topology is described to the compiler once."""
    return functools.lru_cache(None)(lambda name: planner(name, folder))


def planner(name: str, folder: str) -> Callable[[ConfigDict], dict[str, Any]]:
    from dist_jax.plan import command

    made = command.Planner(topology.parse_topology(name), folder)
    options = command.Options(evaluate=False)
    return lambda config: made.plan(command.Request(name, config), options)


def split_over(config: ConfigDict, chip: str) -> bool:
    """Whether the frozen weights take so much of a chip that a slice should share them."""
    from dist_jax.models.frozen import TOWER
    from dist_jax.models.params import count
    from dist_jax.plan import compiling
    from dist_jax.plan.chips import CHIPS

    frozen = compiling.assemble(config).abstract_frozen()
    return TOWER in frozen and 2 * count(frozen[TOWER]) > CHIPS[chip].hbm_bytes / SHARE


def topologies(config: ConfigDict, targets: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    """(target, topology that is compiled for it, chips that share the weights)."""
    for target in targets:
        whole = topology.parse_topology(TARGETS[target])
        if split_over(config, whole.chip.name) and whole.num_chips > 1:
            yield target, whole.name, whole.num_chips
        else:
            yield target, ONE_CHIP[whole.chip.name], 1


def compute(names: Sequence[str], targets: Sequence[str], folder: str, path: Path) -> None:
    known, found = read(path), rows()
    plan_for = planners(folder)
    firsts = first_rows()
    for first in dict.fromkeys(firsts[name] for name in names or found):
        place = known.setdefault(first, {'targets': {}, 'trials': {}})
        for target, compiled, chips in topologies(found[first], targets):
            print(f'{first} for {target}, as {compiled}', flush=True)
            place['targets'][target] = compiled
            own = place['trials'].setdefault(compiled, [])
            trials(plan_for(compiled), found[first], chips, own, lambda: write_json(path, known))
            place['done'] = sorted({*place.get('done', ()), compiled})
            write_json(path, known)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}


def cell(found: list[dict[str, Any]], chips: int, clips: float) -> str:
    """'largest batch, hours' of a target; 'no' where not even one clip a chip fits."""
    fitting = [one for one in found if one['fits']]
    if not fitting:
        return 'no'
    best = max(fitting, key=lambda one: one['clips'])
    seconds = clips / (best['clips'] * chips) * best['estimated_seconds']
    hours = seconds / 3600
    return f'{best["clips"] * chips:,} · {hours:,.{0 if hours >= 10 else 1}f} h'


def table(known: dict[str, Any]) -> str:
    out = ["| row | recipe's batch | " + ' | '.join(TARGETS) + ' |']
    out.append('|---|---|' + '---|' * len(TARGETS))
    firsts = first_rows()
    for name, config in rows().items():
        place = known.get(firsts[name])
        if place is None:
            continue
        cells = []
        for target, text in TARGETS.items():
            compiled, chips = place['targets'].get(target), topology.parse_topology(text).num_chips
            done = compiled in place.get('done', ())
            cells.append(cell(place['trials'][compiled], chips, clips_of(config)) if done else '')
        out.append(f'| `{name}` | {config.batch_size:,} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(out)


PAGE = """\
# Which TPU do I need

The largest batch that fits, and the hours that the row's whole training would take, by
`dist_jax plan`: nothing here ran on a TPU. Memory is the compiler's own; batches are within 15 % of
the largest. Hours are its cycles for the training steps alone, at that batch; waiting for videos,
evaluation and what chips send each other come on top. A recipe with a larger batch than fits wants
`accumulation`, one with a smaller batch leaves chips waiting. `no`: not one clip a chip.

{share} of {all} programs are planned so far, by jax 0.10.2 and libtpu 0.0.42.1;
`python -m tools.which_tpu` does the others. Rows of one program share its figures. Towers of more
than a third of a chip are split over the slice, with `mesh.fsdp` as large as it; all others lie
whole on every chip.

{table}

Hours are of {examples}.
"""


def page(known: dict[str, Any]) -> str:
    used = sorted({config.data.name for config in rows().values()})
    return PAGE.format(
        share=len(known),
        all=len(set(first_rows().values())),
        table=table(known),
        examples=', '.join(f'{name} {EXAMPLES[name]:,}' for name in used) + ' training examples',
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m tools.which_tpu',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--rows', nargs='+', default=[], metavar='FILE:ROW', help='only these')
    parser.add_argument('--targets', nargs='+', default=[*TARGETS], choices=TARGETS)
    parser.add_argument('--table', action='store_true', help='write the table of what is known')
    parser.add_argument('--cache', default=default_folder(), help='compiled programs (%(default)s)')
    arguments = parser.parse_args(argv)
    unknown = set(arguments.rows) - set(rows())
    if unknown:
        parser.error(f'no row {sorted(unknown)}; there are {", ".join(rows())}')
    logging.basicConfig(level=logging.WARNING, format='%(message)s')
    logging.getLogger('dist_jax').setLevel(logging.INFO)
    path = DOCS / 'which_tpu.json'
    if not arguments.table:
        topology.prepare_environment()
        compute(arguments.rows, arguments.targets, arguments.cache, path)
    (DOCS / 'which_tpu.md').write_text(page(read(path)), encoding='utf-8')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
