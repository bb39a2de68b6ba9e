"""The `dist_jax` command: one entry point for everything a user runs.

Each command reads its own arguments; fields of a config are set with --config.FIELD=VALUE as in
other ml_collections programs.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import logging
import os
import platform
import re
import sys
import threading
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import absl.logging

from dist_jax import ending, pod
from dist_jax.commands import (
    check,
    convert,
    dataset,
    demo,
    doctor,
    evaluate,
    export,
    features,
    index,
    plan,
    predict,
    push,
    search,
    serve,
    train,
    verify,
)
from dist_jax.config_arguments import UsageError
from input_pipeline import escape

EXAMPLES = """\
examples:
  dist_jax demo
      make the built-in clips, train DiST and a frame-only baseline on them, compare
  dist_jax convert ViT-B-16.pt clip_b16
      turn CLIP weights into the backbone
  dist_jax check --list train.txt --root /data/k400
      read every video of a list beforehand
  dist_jax train --config=dist:b16_8+16f_k400 --workdir=runs/b16 \\
      --config.backbone.checkpoint=clip_b16 --config.data.root=/data/k400 \\
      --config.data.train_list=train.txt --config.data.val_list=val.txt \\
      --config.data.label_map=labels.txt
      train; the same command continues a run that was stopped
  dist_jax evaluate --workdir=runs/b16
      test accuracy, per class
  dist_jax predict --workdir=runs/b16 video.mp4
      top-5 of single videos, with a picture
  dist_jax features --workdir=runs/b16 videos/ --out features
      a vector for each video
  dist_jax train --config=side4video_retrieval:demo --workdir=runs/retrieval
      learn to match videos with sentences, here on built-in clips
  dist_jax index videos/ --out videos.index --backbone=clip_b16
  dist_jax search videos.index 'a red square moves left'
      find moments of the videos in a folder
  dist_jax push runs/b16 owner/name
      the trained model to the Hugging Face Hub, with a card
  dist_jax export --workdir=runs/b16 --out b16_bundle
      a program in StableHLO with its weights, for machines without this package
  dist_jax plan --config=dist:b16_8+16f_k400 --topology=v4:2x2x2
      memory and time of a step on a TPU that is not here

`dist_jax help COMMAND` explains a command.
"""


COMMANDS: dict[str, ModuleType] = {
    'demo': demo,
    'train': train,
    'evaluate': evaluate,
    'predict': predict,
    'features': features,
    'index': index,
    'search': search,
    'convert': convert,
    'push': push,
    'export': export,
    'verify': verify,
    'serve': serve,
    'plan': plan,
    'doctor': doctor,
    'check': check,
    'dataset': dataset,
}
# Commands that continue where they were stopped.
CONTINUED = ('demo', 'train', 'features', 'index', 'dataset')

# Errors whose message is enough.
KNOWN_ERRORS = (UsageError, ValueError, OSError, RuntimeError, FloatingPointError)
# As XLA says it, of CPUs and of TPUs.
_OUT_OF_MEMORY = re.compile('RESOURCE_EXHAUSTED.*out of memory', re.IGNORECASE | re.DOTALL)
_LESS_MEMORY = (
    'Training takes less with more accumulation, evaluation with a smaller eval.batch_size, '
    'eval.num_clips, eval.num_crops or eval.image_size, which a run may change.'
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] == 'help' and len(argv) > 1:
        argv = [*argv[1:], '--help']
    if not argv or argv[0] in ('-h', '--help', 'help'):
        print(_overview())
        return 0 if argv else 2
    if argv[0] in ('--version', 'version'):
        print(_version())
        return 0
    if argv[0] not in COMMANDS:
        close = difflib.get_close_matches(argv[0], COMMANDS, 1)
        hint = f' Did you mean {close[0]!r}?' if close else ''
        _complain(f'dist_jax: no command {argv[0]!r}.{hint} There are: {", ".join(COMMANDS)}')
        return 2
    # Orbax tells every step of a save at INFO, through absl; our own messages are the run's.
    absl.logging.set_verbosity(absl.logging.WARNING)
    handler = logging.StreamHandler()
    handler.setFormatter(escape.LogFormatter('%(message)s'))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger('dist_jax').setLevel(logging.INFO)
    # Of the writes of a save that fail, orbax raises one; asyncio and the threads of tensorstore
    # would print each of the others.
    logging.getLogger('asyncio').setLevel(logging.CRITICAL)
    sys.excepthook = _print_of_main_thread
    ending.listen(continues=argv[0] in CONTINUED)
    try:
        return pod.leave(COMMANDS[argv[0]].run(argv[1:]))
    except BaseException as error:
        brief = ending.full_disk(error, [a.partition('=')[2] or a for a in argv])
        if isinstance(error, KeyboardInterrupt):
            brief = 'Ctrl-C'
        elif isinstance(error, ending.AgainError):
            brief = str(error)
        known = brief or isinstance(error, KNOWN_ERRORS)
        known = known and not os.environ.get('DIST_JAX_TRACEBACK')
        if not known and pod.current() is None:
            raise
        code = ending.WRONG if isinstance(error, UsageError) else ending.code_of(error)
        text = f'dist_jax {argv[0]}: {brief or error}' if known else traceback.format_exc()
        if known and not brief and not isinstance(error, UsageError):
            if _OUT_OF_MEMORY.search(text):
                text += f'\n{_LESS_MEMORY}'
            text += '\n(set DIST_JAX_TRACEBACK=1 for where it came from)'
        if pod.current() is None:
            _complain(text)
        return pod.leave(code, error, text)
    finally:
        ending.stop_listening()


def _print_of_main_thread(*error: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        sys.__excepthook__(*error)


def _complain(text: str) -> None:
    print(escape.lines(text), file=sys.stderr)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = '\n'.join(f'  {name:{width}}  {module.SUMMARY}' for name, module in COMMANDS.items())
    return (
        'Video models that are made of image models.\n\n'
        f'usage: dist_jax COMMAND ...\n\ncommands:\n{rows}\n\n{EXAMPLES}'
    )


def _version() -> str:
    """What a report of a mistake should begin with."""
    found = []
    for name in ('dist_jax', 'jax', 'libtpu'):
        try:
            found.append(f'{name} {importlib.metadata.version(name)}')
        except importlib.metadata.PackageNotFoundError:
            found.append(f'{name} not installed')
    return f'{", ".join(found)}, Python {platform.python_version()}, {os.path.dirname(__file__)}'


if __name__ == '__main__':
    sys.exit(main())
