"""--config=FILE:VARIANT and --config.FIELD=VALUE: a config from arguments, with helpful errors."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Collection, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from dist_jax.configs import base

NO_FAMILIES = ('__init__', 'base', 'inputs')  # of configs/: what families are made of
FIELDS = f'(fields and their meaning: {base.__file__})'


class UsageError(ValueError):
    """Wrong arguments; the message says which and what to do."""


def read_config(arguments: list[str], default: ConfigDict | None = None) -> ConfigDict:
    """The config that the arguments name, or `default`, with their overrides.

    Raises:
      UsageError: no config, no such file or variant, or a field that does not exist.
    """
    named = [_find_file(a) for a in arguments if a.startswith('--config=')]
    if '--config' in arguments or (not named and default is None):
        raise UsageError('pass --config=FILE:VARIANT, for example --config=dist:b16_8+16f_k400')
    try:
        config = _parsed(named, default)
    except _CONFIG_ERRORS as error:
        raise UsageError(_config_message(error)) from error
    for argument in arguments:
        if not argument.startswith('--config='):
            config = _with_field(config, argument)
    return config


_CONFIG_ERRORS = (AttributeError, KeyError, flags.Error, TypeError, ValueError, OSError)


def _parsed(arguments: list[str], default: ConfigDict | None) -> ConfigDict:
    """The config that ml_collections makes of arguments, from `default` unless they name a file."""
    values = flags.FlagValues()
    command_line = ['dist_jax', *arguments]
    if default is None or any(argument.startswith('--config=') for argument in arguments):
        config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=command_line)
    else:
        config_flags.DEFINE_config_dict(
            'config', default, flag_values=values, sys_argv=command_line
        )
    values(command_line)
    return values.config


def _config_message(error: Exception) -> str:
    text = str(error.args[0] if error.args else error).strip()
    if 'Traceback' in text:  # a config file that raised: the last line is its message
        text = text.splitlines()[-1].partition(': ')[2]
    return f'{text} {FIELDS}'


def _with_field(config: ConfigDict, argument: str) -> ConfigDict:
    """The config with one field set by --config.GROUP.FIELD=VALUE.

    Raises:
      UsageError: no such field, a group, or a value of another type.
    """
    name, equals, text = argument.removeprefix('--config.').partition('=')
    fields = base.flat(config)
    if name not in fields:
        members = [field for field in fields if field.startswith(f'{name}.')] if name else []
        if members:
            raise UsageError(
                f'--config.{name} is a group; set a field of it: '
                + ', '.join(f'--config.{field}' for field in members)
            )
        if name in base.RENAMED_FIELDS:
            raise UsageError(
                f'--config.{name} is now called --config.{base.RENAMED_FIELDS[name]}; runs that '
                'were started under the old name go on under the new one'
            )
        raise UsageError(no_field(name, fields, '--config.'))
    if not equals:
        raise UsageError(f'--config.{name} needs a value: {_expected(fields[name])}')
    try:
        changed = _parsed([argument], config)
        value = base.flat(changed)[name]
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if isinstance(fields[name], (float, list, tuple)) and not all(map(math.isfinite, numbers)):
            raise ValueError('not finite')
    except _CONFIG_ERRORS as error:
        raise UsageError(
            f'--config.{name}={text}: expected {_expected(fields[name])} {FIELDS}'
        ) from error
    return changed


def no_field(name: str, fields: Collection[str], before: str = '') -> str:
    """What is said of a field that does not exist; `before` stands before those that do."""
    close = closest(name, fields)
    hint = f'; did you mean {" or ".join(f"{before}{field}" for field in close)}?'
    return f'the config has no field {name!r}{hint if close else ""} {FIELDS}'


def closest(name: str, fields: Collection[str]) -> list[str]:
    """At most three fields that somebody who wrote `name` may have meant, the likeliest first."""
    group, _, last = name.rpartition('.')
    elsewhere = [field for field in fields if field.rpartition('.')[2] == last]
    if elsewhere:
        return elsewhere[:3]

    def likeness(field: str) -> float:
        own_group, _, own = field.rpartition('.')
        words = set(last.split('_')) <= set(own.split('_'))
        parts = 0.8 if words else difflib.SequenceMatcher(None, last, own).ratio()
        whole = difflib.SequenceMatcher(None, name, field).ratio()
        return max(whole, parts + 0.2 * (group == own_group))

    ranked = sorted(fields, key=likeness, reverse=True)
    best = likeness(ranked[0]) if ranked else 0
    return [field for field in ranked[:3] if likeness(field) >= max(0.7, best - 0.1)]


def _expected(value: Any) -> str:
    """The type of a field in words, with its value as the example."""
    if isinstance(value, (tuple, list)):
        return f'numbers in brackets, such as {tuple(value) or (256,)}'
    if isinstance(value, bool):
        return 'true or false'
    kinds = {int: 'a whole number', float: 'a number'}
    return f'{kinds.get(type(value), "text")}, such as {value}'


def _find_file(argument: str) -> str:
    """Finds 'configs/dist.py' and 'dist' from any folder: beside the packages, if not here."""
    path, colon, variant = argument.removeprefix('--config=').partition(':')
    if not os.path.isfile(path):
        folder = os.path.dirname(os.path.abspath(base.__file__))
        beside = [os.path.join(os.path.dirname(folder), path), os.path.join(folder, f'{path}.py')]
        found = list(filter(os.path.isfile, beside))
        if not found or path in NO_FAMILIES:
            known = sorted(name[:-3] for name in os.listdir(folder) if name.endswith('.py'))
            names = [name for name in known if name not in NO_FAMILIES]
            close = difflib.get_close_matches(os.path.basename(path).removesuffix('.py'), names, 1)
            hint = f'; did you mean {close[0]}?' if close else f'; there are {", ".join(names)}'
            raise UsageError(f'--config: no file {path}{hint}')
        path = found[0]
    return f'--config={path}{colon}{variant}'


def named_fields(arguments: Sequence[str]) -> dict[str, str]:
    """'group.field' -> text, of the fields that arguments set."""
    pairs = (a.removeprefix('--config.').partition('=') for a in arguments)
    return {name: text for name, _, text in pairs if not name.startswith('--')}
