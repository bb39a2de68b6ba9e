"""What the commands share in reading their arguments."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import NoReturn

from dist_jax import paths, pod, times
from dist_jax.config_arguments import UsageError, closest, named_fields
from dist_jax.configs import base


class _Parser(argparse.ArgumentParser):
    """Says of an unknown option which one, or which field of the config, it may have meant."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r'unrecognized arguments: (--[\w.]+)', message)
        if unknown:
            close = difflib.get_close_matches(unknown[1], self._option_string_actions, 1, 0.8)
            if not close and '--config' in self._option_string_actions:
                name, fields = unknown[1].removeprefix('--'), base.flat(base.get_config())
                close = [name] if name in fields else closest(name, fields)
                close = [f'--config.{field}' for field in close]
            message += f'; did you mean {" or ".join(close)}?' if close else ''
        super().error(message)


def make_parser(command: str, text: str, examples: str) -> argparse.ArgumentParser:
    """A parser without arguments.

    Args:
      command: its name.
      text: what it does, a sentence.
      examples: printed below the options as it stands.
    """
    return _Parser(
        prog=f'dist_jax {command}',
        description=text,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def length(text: str) -> float:
    """Seconds, as the type of an argument; see `times.seconds`.

    Raises:
      argparse.ArgumentTypeError: it is no length of time.
    """
    try:
        return times.seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(arguments of the command, arguments about the config)."""
    rest, config = [], []
    position = 0
    while position < len(argv):
        argument = argv[position]
        name = argument.partition('=')[0]
        if name == '--config' or name.startswith('--config.'):
            config.append(argument)
            follows = argv[position + 1 : position + 2]
            if '=' not in argument and follows and not follows[0].startswith('--'):
                position += 1
                config[-1] += f'={argv[position]}'
        else:
            rest.append(argument)
        position += 1
    # The file comes first, in whatever order the arguments were given: its fields are set after.
    return rest, sorted(config, key=lambda argument: not argument.startswith('--config='))


def model_folder(name: str, config_arguments: Sequence[str]) -> str:
    """The folder of a run or of a release; what lies on the Hub is fetched.

    Args:
      name: see `paths.check_model`.
      config_arguments: may say where the backbone is, which is then not fetched.

    Raises:
      ValueError: no such release.
      ConnectionError: the Hub cannot be reached, and this was not fetched before.
    """
    if not name.startswith(paths.HUB):
        return name
    from dist_jax.hub import client

    own = named_fields(config_arguments).get('backbone.checkpoint')
    return os.fspath(client.fetch_release(name, with_backbone=not own).path)


@contextlib.contextmanager
def wrong_usage() -> Iterator[None]:
    """What a look at the arguments finds is for the user to mend; its traceback helps nobody."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def start_jax() -> None:
    """Joins the other hosts of a pod, if this is one of several."""
    pod.join()
    import jax

    if os.environ.get('TPU_SKIP_MDS_QUERY') == '1':
        # jax saw no TPU; libtpu may be here as a compiler and need not look for one at length.
        from dist_jax.plan import topology

        for name, value in topology.ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    where = f'{count} devices: {kind}' if count > 1 else f'device: {kind}'
    if jax.process_count() > 1:
        where = f'process {jax.process_index()} of {jax.process_count()}, {where}'
    logging.getLogger('dist_jax').info('%s', where)
    if pod.has_tpu() and jax.default_backend() == 'cpu':
        logging.getLogger('dist_jax').warning(
            'this machine has TPU chips that jax does not use; see `dist_jax doctor`'
        )
