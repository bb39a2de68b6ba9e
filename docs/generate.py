"""What the references of the site are generated from: the config files and the commands' parsers.

python docs/generate.py OUT     # the pages as Markdown, to look at
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import io
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from dist_jax import main
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
    zero_shot,
)

FAMILIES = (
    dist,
    evl,
    side4video,
    side4video_retrieval,
    sts,
    zero_shot,
    frame_mean,
    attentive_probe,
    fine_tune,
)
# Columns of a family's table: heading -> fields.
COLUMNS = {
    'backbone': ('backbone.name',),
    'data set': ('data.name',),
    'frames': ('data.num_frames',),
    'pixels': ('data.image_size',),
    'batch': ('batch_size',),
    'epochs or steps': ('num_epochs', 'num_steps'),
    'peak rate': ('optimizer.peak_lr',),
    'views': ('eval.num_clips', 'eval.num_crops'),
}
# Rows for minutes on two cores.
SMALL = ('demo', 'demo_images', 'world', 'world_images', 'pictures')


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a config as a file writes it: 'group.name', its comment, whether it is a group."""

    name: str
    comment: str
    group: bool


def fields(function: Any) -> list[Field]:
    """The assignments to `config...` in a function, in order, each with the comment beside it or
    in the lines above."""
    source = inspect.getsource(function)
    comments, lines = {}, source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip('# ')
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
            continue
        name = ast.unparse(node.targets[0]).removeprefix('config.')
        above, line = [], node.lineno - 1
        while line and lines[line - 1].lstrip().startswith('#'):
            above.insert(0, comments[line])
            line -= 1
        beside = [comments[n] for n in range(node.lineno, node.end_lineno + 1) if n in comments]
        group = isinstance(node.value, ast.Call)
        found.append((node.lineno, Field(name, ' '.join([*above, *beside]), group)))
    return [field for _, field in sorted(found, key=lambda pair: pair[0])]


def allowed(name: str) -> str:
    """What `base.check` lets a field be, in words; '' where it asks nothing."""
    if name in base.CHOICES:
        return f'One of {", ".join(f"`{choice}`" for choice in base.CHOICES[name])}.'
    if name in base.BELOW_ONE:
        return 'At least 0, below 1.'
    low, high = base.BOUNDS.get(name, (None, None))
    high = base.MOST.get(name) if high is None else high
    if name in base.POSITIVE:
        return f'Above 0, at most {high:,}.' if high is not None else 'Above 0.'
    if low is not None and high is not None:
        return f'{low} to {high:,}.'
    if low is not None:
        return f'At least {low}.'
    return f'At most {high:,}.' if high is not None else ''


# What is code in a comment or a help text: options, quoted values, names of fields.
CODE = re.compile(
    r"`[^`]+`|(?<![\w-])--[a-z][\w.-]*(?:=[\w.'\"(),-]+)?|(?<!\w)'[^' ]*'(?!\w)|"
    + '|'.join(
        rf'(?<![\w.-]){re.escape(name)}(?![\w-]|\.\w)'
        for name in base.flat(base.get_config())
        if '.' in name or '_' in name
    )
)


def plain(text: str) -> str:
    """A comment or help text as Markdown that shows it letter by letter."""
    found, end = [], 0
    for code in CODE.finditer(text):
        found += [_escaped(text[end : code.start()]), f'`{code[0].strip("`")}`']
        end = code.end()
    return ''.join([*found, _escaped(text[end:])])


def _escaped(text: str) -> str:
    return re.sub(r'([\\*<>\[\]|`]|(?<!\w)_|_(?!\w))', r'\\\1', text)


def sentence(text: str) -> str:
    """The same, with a capital, unless it begins with a value, and a full stop."""
    text = plain(text.strip())
    if not re.match(r'\S+[:,]|\S+ \(', text):
        text = text[:1].upper() + text[1:]
    return text if not text or text.endswith(('.', ':')) else f'{text}.'


def field_entries(found: Sequence[Field], values: dict[str, Any], prefix: str) -> Iterator[str]:
    for field in found:
        if field.group:
            continue
        if not field.comment:
            raise ValueError(f'{field.name} has no comment in its config file: say what it is')
        text = ' '.join(filter(None, (sentence(field.comment), allowed(field.name))))
        yield f'({prefix}-{field.name.replace(".", "-")})=\n'
        yield f'`{field.name}` = `{values[field.name]!r}`\n: {text}\n'


def config_page() -> str:
    """All shared fields, then of each family its fields and rows."""
    shared, values = fields(base.get_config), base.flat(base.get_config())
    out = ['## Shared fields\n', '### Of a run\n']
    group = ''
    for field in shared:
        if field.group and field.name != 'config':
            group = field.name
            out.append(f'### `{group}`\n')
            if field.comment:
                out.append(f'{sentence(field.comment)}\n')
        elif not field.group:
            out.extend(field_entries([field], values, 'config'))
    for family in FAMILIES:
        out.append(family_section(family, values))
    return '\n'.join(out)


def family_section(module: ModuleType, shared: dict[str, Any]) -> str:
    """Its own fields, what all of its rows set, and a table of the rows."""
    name = module.__name__.rpartition('.')[2]
    rows = {row: base.flat(module.get_config(row)) for row in module.VARIANTS}
    default = inspect.signature(module.get_config).parameters['variant'].default
    functions = [
        function
        for function in (module.get_config, getattr(module, 'retrieval', None))
        if function is not None
    ]
    found = [field for function in functions for field in fields(function)]
    own = {
        field.name: field
        for field in reversed(found)  # of a field that is set twice, as it is set first
        if field.name not in shared and field.name.startswith(('model.', 'task.'))
    }
    values = {key: value for row in rows.values() for key, value in row.items()} | rows[default]
    title = inspect.getdoc(module).splitlines()[0].split(': `')[0].rstrip('.')
    out = [
        f'## `{name}`\n',
        f'{sentence(title)} Without a row, `--config={name}` is `{default}`.\n',
    ]
    out += field_entries([*own.values()][::-1], values, f'config-{name}')
    full = {row: found for row, found in rows.items() if row not in SMALL}
    same = {
        field: value
        for field, value in rows[default].items()
        if shared.get(field, value) != value
        and all(found[field] == value for found in full.values())
    }
    used = {field for column in COLUMNS.values() for field in column}
    used.add('model.family')
    common = [f'`{key}={value!r}`' for key, value in sorted(same.items()) if key not in used]
    if common:
        text = ',\n'.join(common)
        out.append(f'Of the shared fields, all rows but the small ones set\n{text}.\n')
    out.append('| row | ' + ' | '.join(COLUMNS) + ' |')
    out.append('|---|' + '---|' * len(COLUMNS))
    out += [row_line(row, found) for row, found in rows.items()]
    return '\n'.join([*out, ''])


def row_line(row: str, found: dict[str, Any]) -> str:
    steps = f'{found["num_steps"]:,} steps' if found['num_steps'] else f'{found["num_epochs"]:g}'
    cells = {
        'backbone': found['backbone.name'] or '-',
        'data set': found['data.name'],
        'epochs or steps': steps,
        'peak rate': f'{found["optimizer.peak_lr"]:g}',
        'views': f'{found["eval.num_clips"]} x {found["eval.num_crops"]}',
    }
    texts = (str(cells.get(name, found[of[0]])) for name, of in COLUMNS.items())
    return f'| `{row}` | ' + ' | '.join(plain(text) for text in texts) + ' |'


def command_page() -> str:
    """A section for each command, one below for each part of it."""
    out = []
    for name, module in main.COMMANDS.items():
        out += [f'## `{name}`\n', *parser_entries(module.parser())]
        for part in getattr(module, 'PARTS', {}):
            out += [f'### `{name} {part}`\n', *parser_entries(module.parser(part))]
    return '\n'.join(out)


def parser_entries(parser: argparse.ArgumentParser) -> Iterator[str]:
    head, *rest = parser.description.split('\n\n')
    parser.formatter_class = functools.partial(argparse.RawDescriptionHelpFormatter, width=88)
    usage = parser.format_usage().replace(f'\n{" " * len("usage: ")}', '\n')
    yield f'{sentence(head)}\n'
    yield f'```text\n{usage.removeprefix("usage: ").strip()}\n```\n'
    yield from (f'```text\n{block}\n```\n' for block in rest)
    formatter = parser._get_formatter()
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.help != argparse.SUPPRESS]
        actions = [a for a in actions if not isinstance(a, argparse._HelpAction)]
        if not actions:
            continue
        if group.title not in ('options', 'positional arguments'):
            yield f'**{plain(group.title)}.** {sentence(group.description or "")}\n'
        for action in actions:
            text = sentence(formatter._expand_help(action)) if action.help else 'Required.'
            yield f'`{formatter._format_action_invocation(action)}`\n: {text}\n'
    for block in (parser.epilog or '').strip('\n').split('\n\n'):
        if block.startswith('examples:\n'):
            yield f'```sh\n{examples(block.partition(chr(10))[2])}\n```\n'
        elif re.search(r'^ ', block, re.MULTILINE):
            yield f'```text\n{block}\n```\n'
        elif block:
            yield f'{plain(block)}\n'


def examples(block: str) -> str:
    """Commands, each with what stands indented below it as a comment above."""
    found: list[tuple[list[str], list[str]]] = []  # lines of the comment, of the command
    for line in textwrap.dedent(block).splitlines():
        goes_on = bool(found) and found[-1][1][-1].endswith('\\')
        if goes_on:
            found[-1][1].append(line)
        elif line.startswith(' '):
            found[-1][0].append(f'# {line.strip()}')
        elif found and not found[-1][0]:
            found[-1][1].append(line)
        else:
            found.append(([], [line]))
    return '\n\n'.join('\n'.join([*comment, *command]) for comment, command in found)


def write(out: Path) -> None:
    """The pages; those that are as they were stay, so that Sphinx reads the others only."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in {'fields.md': config_page(), 'commands.md': command_page()}.items():
        path = out / name
        if not path.exists() or path.read_text(encoding='utf-8') != text:
            path.write_text(text, encoding='utf-8')


if __name__ == '__main__':
    write(Path(sys.argv[1]))
