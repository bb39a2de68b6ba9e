"""The `dist_jax` command: one entry point for everything a user runs.

Each command reads its own arguments; fields of a config are set with --config.FIELD=VALUE as in
other ml_collections programs.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.metadata
import logging
import os
import platform
import re
import shlex
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import absl.logging
from ml_collections import ConfigDict

from configs import base
from dist_jax import convert_arguments, ending, paths, pod
from dist_jax.config_arguments import UsageError, closest, named_fields, read_config
from input_pipeline import escape

EXAMPLES = """\
examples:
  dist_jax demo
      make the built-in clips, train DiST and a frame-only baseline on them, compare
  dist_jax convert ViT-B-16.pt clip_b16
      turn CLIP weights into the backbone
  dist_jax check --list train.txt --root /data/k400
      read every video of a list beforehand
  dist_jax train --config=configs/dist.py:b16_8+16f_k400 --workdir=runs/b16 \\
      --config.backbone.checkpoint=clip_b16 --config.data.root=/data/k400 \\
      --config.data.train_list=train.txt --config.data.val_list=val.txt \\
      --config.data.label_map=labels.txt
      train; the same command continues a run that was stopped
  dist_jax evaluate --workdir=runs/b16
      test accuracy, per class
  dist_jax predict --workdir=runs/b16 video.mp4
      top-5 of single videos, with a picture
  dist_jax train --config=configs/side4video_retrieval.py:demo --workdir=runs/retrieval
      learn to match videos with sentences, here on built-in clips
  dist_jax index videos/ --out videos.index --backbone=clip_b16
  dist_jax search videos.index 'a red square moves left'
      find moments of the videos in a folder
  dist_jax plan --config=configs/dist.py:b16_8+16f_k400 --topology=v4:2x2x2
      memory and time of a step on a TPU that is not here

`dist_jax help COMMAND` explains a command.
"""

TRAIN_HELP = """\
examples:
  dist_jax train --config=configs/dist.py:demo --workdir=runs/demo
  dist_jax train --config=configs/dist.py:b16_8+16f_ssv2 --workdir=runs/ssv2 \\
      --config.backbone.checkpoint=clip_b16 --config.data.root=/data/ssv2 \\
      --config.data.train_list=train.json --config.data.val_list=validation.json \\
      --config.data.label_map=labels.json --config.batch_size=64

A run that was stopped, even by SIGKILL, is continued by the same command. Every host of a pod runs
the same command.
"""

DEMO_HELP = """\
examples:
  dist_jax demo
  dist_jax demo --workdir=/tmp/demo --num_steps=50

Makes H.264 clips whose classes differ only in motion; a classifier on the mean of frozen frames
stays at chance on them, DiST does not. The frozen backbone is asked by words alone, too, for what
is seen. Ends with filmstrips.png: what DiST says of six clips. Started again, it continues.
"""

EVALUATE_HELP = """\
examples:
  dist_jax evaluate --workdir=runs/b16
  dist_jax evaluate --workdir=runs/b16 --step=best
  dist_jax evaluate --workdir=runs/b16 --config.eval.num_crops=3 --config.eval.allow_bad_videos=true
  dist_jax evaluate --workdir=runs/b16 --output=runs/b16/ucf101 \\
      --config.data.name=ucf101 --config.data.root=/data/ucf101 \\
      --config.data.val_list=testlist01.txt --config.data.label_map=classInd.txt \\
      --config.eval.fusion=0.5
      zero-shot on another label set, averaged with the frozen CLIP
  dist_jax evaluate --config=configs/dist.py:b16_8+16f_k400 --config.init_from=dist_b16 \\
      --config.backbone.checkpoint=clip_b16 --config.data.val_list=val.txt ...
      the authors' weights, after `dist_jax convert`
  dist_jax evaluate --config=configs/zero_shot.py:b16_8f_k400 --output=runs/zero_shot \
      --config.backbone.checkpoint=clip_b16 --config.data.val_list=val.txt ...
      CLIP with the class names, nothing trained

Without --config, the config comes from the run.
"""

PREDICT_HELP = """\
examples:
  dist_jax predict --workdir=runs/b16 video.mp4
  dist_jax predict --workdir=runs/b16 --output=pictures --json=top5.json videos/
      every video in a folder
  dist_jax predict --workdir=runs/b16 --labels=my_classes.txt --config.eval.fusion=0.5 video.mp4
      choose among other class names, one a line, averaged with the frozen CLIP (text head only)
  dist_jax predict --workdir=runs/b16 --attention video.mp4
      where the model's query looked, as a sheet of frames and as an animation

Needs the run and its backbone, not the training data; if the backbone has moved, pass
--config.backbone.checkpoint=FOLDER. Exit code 1: a video could not be read.
"""

INDEX_HELP = """\
examples:
  dist_jax index videos/ --out videos.index --backbone=clip_b16
      with CLIP as it is, after `dist_jax convert ViT-B-16.pt clip_b16`
  dist_jax index videos/ --out videos.index --workdir=runs/msrvtt --step=best
      with a trained retrieval run
  dist_jax index films/ --out films.index --backbone=clip_b16 --window=4 --stride=2
  dist_jax index clips/ --out clips.index --backbone=clip_b16 --window=0
      short clips: each as one window

Then: dist_jax search videos.index 'a red square moves left'

Takes the videos of all depths (hidden files are left out). Stopped at any moment, the same command
goes on where it was, to the same file; started again later, it embeds what is new or changed (by
size and time of change), forgets what is gone and tries again what it could not read. Such videos
are listed at the end and in the index. Exit code 1: none could be read. docs/search.md describes
the file.
"""

SEARCH_HELP = """\
examples:
  dist_jax search videos.index 'a red square moves left'
  dist_jax search videos.index 'a dog jumps into water' --top=20 --json=hits.json
  dist_jax search videos.index 'two people shake hands' --all_windows
      several moments of one video, too
  dist_jax search videos.index --video=query.mp4
      what looks like another video
  dist_jax search /mnt/videos.index 'a goal' --folder=/mnt/videos --backbone=/mnt/clip_b16
      the videos and the model have moved

Finds the run or the backbone that made the index where it was; it must have the same weights.
Writes a picture of the hits, with times. A sentence loads only the text side of the model.
"""

DOCTOR_HELP = """\
examples:
  dist_jax doctor
  dist_jax doctor --config=configs/dist.py:b16_8+16f_k400 --workdir=gs://bucket/run --devices=16 ...
      on every host, with the arguments of `train`

Versions, devices, code and config of all hosts, a workdir that all can write to, the backbone, and
some videos of the lists. Several hosts do this before they train. Exit code 1: a check failed.
"""

PLAN_HELP = """\
examples:
  dist_jax plan --topology=v4:2x2x2 --config=configs/dist.py:b16_8+16f_k400 --config.batch_size=256
  dist_jax plan --topology=v5e:4x4 --search_batch --config=configs/dist.py:l14_32+64f_k400 \\
      --config.batch_size=128 --json=plan.json --plot=plan.png
  dist_jax plan --topology=v4:2x2x1 --config.batch_size=64 --plot=remat.png --compare \\
      configs/dist.py:b16_8+16f_k400 'configs/dist.py:b16_8+16f_k400 config.model.remat=False'
  dist_jax plan --topology=v4:2x2x1 --config=configs/dist.py:b16_8+16f_k400 \\
      --config.batch_size=16 --gradients frozen through_backbone full
      what keeping the backbone frozen saves

Compiles the steps that `train` and `evaluate` would run, for a TPU, on this machine: no TPU, no
weights, no data, no network. batch_size counts the clips of all chips.

memory   of a chip, by kind, as the compiler places it, and the batches that wait beside the
         program's own. Reliable: what does not fit here does not fit there.
cycles   the compiler's own estimates, bodies of loops times their turns. A kernel of one's own
         counts by the larger of its compiled v4 schedule (other chips: the same share of the peak)
         and of the bytes it moves over the bandwidth of the HBM. A collective takes its bytes over
         the bandwidth of all links of a chip, as a ring; one in two halves is waited for as long
         as that is more than what runs between them ("on some": if it had those of one
         dimension of the torus). Copies that run beside the products count nothing, nor does what
         slices send each other. Nothing here was measured: read it next to the calibration, and
         to compare.
MFU      model FLOPs (products of the model, each once, none recomputed) over time and peak.

Compiled programs are kept in --cache. A program takes minutes on two cores.
"""


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
        argv = [argv[1], '--help']
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
        return pod.leave(COMMANDS[argv[0]][0](argv[1:]))
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
    rows = '\n'.join(f'  {name:{width}}  {text}' for name, (_, text) in COMMANDS.items())
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


def _parser(command: str, text: str, examples: str) -> argparse.ArgumentParser:
    return _Parser(
        prog=f'dist_jax {command}',
        description=text,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
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


@contextlib.contextmanager
def _wrong_usage() -> Iterator[None]:
    """What a look at the arguments finds is for the user to mend; its traceback helps nobody."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def _start_jax() -> None:
    """Joins the other hosts of a pod, if this is one of several."""
    pod.join()
    import jax

    if os.environ.get('TPU_SKIP_MDS_QUERY') == '1':
        # jax saw no TPU; libtpu may be here as a compiler and need not look for one at length.
        from dist_jax.plan import topology

        for name, value in topology.ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    logging.getLogger('dist_jax').info(
        'process %d of %d, %d devices: %s',
        jax.process_index(),
        jax.process_count(),
        jax.device_count(),
        jax.devices()[0].device_kind,
    )
    if pod.has_tpu() and jax.default_backend() == 'cpu':
        logging.getLogger('dist_jax').warning(
            'this machine has TPU chips that jax does not use; see `dist_jax doctor`'
        )


def _train(argv: Sequence[str]) -> int:
    parser = _parser('train', 'Train a model, or continue a run.', TRAIN_HELP)
    parser.add_argument('--workdir', required=True, help='folder of the run')
    parser.add_argument(
        '--skip_checks', action='store_true', help='on several hosts: no `doctor` before the start'
    )
    parser.add_argument(
        '--config',
        metavar='FILE:VARIANT',
        help='the experiment; --config.FIELD=VALUE sets a field',
    )
    rest, config_arguments = _split(argv)
    arguments = parser.parse_args(rest)
    config = read_config(config_arguments)
    with _wrong_usage():
        paths.check_training_inputs(base.flat(config))
    _start_jax()
    from dist_jax import doctor, train
    from dist_jax.reports import console

    if pod.current() is not None and not arguments.skip_checks:
        doctor.check_before_training(config, arguments.workdir)

    summary = train.train(config, arguments.workdir)
    console.print_summary(arguments.workdir, summary)
    return pod.AGAIN if summary.get('interrupted') else 0


def _evaluate(argv: Sequence[str]) -> int:
    parser = _parser('evaluate', 'Measure the accuracy of a trained model.', EVALUATE_HELP)
    parser.add_argument('--workdir', default='', help='folder of the run')
    parser.add_argument(
        '--step', help="checkpoint to evaluate: a number or 'best'; the newest by default"
    )
    parser.add_argument('--output', default='', help='folder of the report; the run by default')
    parser.add_argument(
        '--config',
        metavar='FILE:VARIANT',
        help="the experiment, if not the run's own; --config.FIELD=VALUE sets a field",
    )
    rest, config_arguments = _split(argv)
    arguments = parser.parse_args(rest)
    with _wrong_usage():
        if arguments.workdir:
            paths.check_run(arguments.workdir)
        root = paths.saved_root(arguments.workdir) if arguments.workdir else ''
        paths.check_inputs(named_fields(config_arguments), ('val',), root)
    from dist_jax import evaluate, trained
    from dist_jax.reports import console

    workdir, step = arguments.workdir, arguments.step
    default = trained.saved_config(workdir, step) if workdir else None
    config = read_config(config_arguments, default)
    _start_jax()
    console.print_evaluation(*evaluate.run(config, workdir, step, arguments.output))
    return 0


def _predict(argv: Sequence[str]) -> int:
    parser = _parser('predict', 'Top-5 of single videos, with a picture of each.', PREDICT_HELP)
    parser.add_argument(
        'videos', nargs='+', metavar='VIDEO', help='videos or pictures, and folders of them'
    )
    parser.add_argument('--workdir', required=True, help='folder of the run')
    parser.add_argument(
        '--step', help="checkpoint to use: a number or 'best'; the newest by default"
    )
    parser.add_argument(
        '--output', default='', help='folder of the pictures; WORKDIR/predictions by default'
    )
    parser.add_argument(
        '--labels', default='', metavar='FILE', help='other class names; text head only'
    )
    parser.add_argument('--json', default='', metavar='FILE', help='write the top-5 as JSON')
    parser.add_argument(
        '--attention', action='store_true', help="also draw where the model's query looked"
    )
    rest, config_arguments = _split(argv)
    arguments = parser.parse_args(rest)
    with _wrong_usage():
        paths.check_run(arguments.workdir)
        paths.check_inputs(named_fields(config_arguments), ())
        videos = paths.find_videos(arguments.videos)
    if arguments.labels and not os.path.exists(arguments.labels):
        raise UsageError(f'--labels: no file {arguments.labels}')
    from dist_jax import predict, trained

    config = read_config(config_arguments, trained.saved_config(arguments.workdir, arguments.step))
    _start_jax()
    return predict.run(
        config,
        arguments.workdir,
        arguments.step,
        videos,
        arguments.output,
        arguments.labels,
        arguments.json,
        arguments.attention,
    )


def _index(argv: Sequence[str]) -> int:
    parser = _parser('index', 'Embed the videos of a folder, to search them.', INDEX_HELP)
    parser.add_argument('folder', metavar='FOLDER', help='its videos, in all depths')
    parser.add_argument('--out', required=True, metavar='FILE', help='the index')
    parser.add_argument('--workdir', default='', help='folder of a retrieval run')
    parser.add_argument('--step', help="its checkpoint: a number or 'best'; the newest by default")
    parser.add_argument(
        '--backbone',
        default='',
        metavar='FOLDER',
        help='converted CLIP, in place of a run',
    )
    parser.add_argument(
        '--window', type=float, default=8, help='seconds; 0: a video is one (%(default)s)'
    )
    parser.add_argument(
        '--stride', type=float, help='seconds from one start to the next; half a window by default'
    )
    parser.add_argument(
        '--num_frames', type=int, help='of a window, for --backbone (8); a run has its own'
    )
    parser.add_argument(
        '--dtype', help='computes with float32 or bfloat16, for --backbone (float32)'
    )
    parser.add_argument('--batch_size', type=int, default=8, help='windows of a step (%(default)s)')
    parser.add_argument(
        '--config',
        metavar='',
        help='--config.FIELD=VALUE sets a field of the run, where things lie',
    )
    rest, config_arguments = _split(argv)
    arguments = parser.parse_args(rest)
    workdir = arguments.workdir
    with _wrong_usage():
        if bool(workdir) == bool(arguments.backbone):
            raise ValueError(
                'pass --workdir=RUN for a retrieval run, or --backbone=FOLDER for CLIP as it is, '
                'which `dist_jax convert` makes'
            )
        if workdir:
            paths.check_run(workdir)
            if arguments.num_frames is not None or arguments.dtype:
                raise ValueError('--num_frames and --dtype go with --backbone; a run has its own')
        elif config_arguments or arguments.step:
            raise ValueError('--step and --config go with --workdir')
        if arguments.batch_size < 1:
            raise ValueError(f'--batch_size={arguments.batch_size} must be at least 1')
        paths.check_inputs(named_fields(config_arguments), ())
        paths.check_backbone(arguments.backbone)
        names, others = paths.videos_below(arguments.folder)
    from dist_jax import index, index_model, trained
    from input_pipeline.windows import WindowReader

    if workdir:
        saved = trained.saved_config(workdir, arguments.step)
        config = read_config(config_arguments, saved)
        model = index_model.of_run(config, workdir, arguments.step)
    else:
        num_frames = 8 if arguments.num_frames is None else arguments.num_frames
        with _wrong_usage():
            model = index_model.of_backbone(
                arguments.backbone, num_frames, arguments.dtype or 'float32'
            )
    stride = arguments.window / 2 if arguments.stride is None else arguments.stride
    with _wrong_usage():
        reader = WindowReader(model.views, arguments.window, stride)
    _start_jax()
    request = index.Request(
        arguments.folder, names, others, arguments.out, reader, arguments.batch_size
    )
    return index.run(request, model)


def _search(argv: Sequence[str]) -> int:
    parser = _parser('search', 'Find moments of videos by words, or by a video.', SEARCH_HELP)
    parser.add_argument('index', metavar='INDEX', help='a file of `dist_jax index`')
    parser.add_argument('sentence', nargs='?', default='', help='what is to be seen')
    parser.add_argument('--video', default='', metavar='FILE', help='in place of a sentence')
    parser.add_argument('--top', type=int, default=5, help='hits (%(default)s)')
    parser.add_argument(
        '--all_windows', action='store_true', help='several of one video, not the best of each'
    )
    parser.add_argument(
        '--output', default='', metavar='FILE.png', help='the picture; INDEX.png by default'
    )
    parser.add_argument('--dark', action='store_true', help='the picture on dark paper')
    parser.add_argument('--json', default='', metavar='FILE', help='write the hits as JSON')
    parser.add_argument('--folder', default='', help='of the videos, if they have moved')
    parser.add_argument('--workdir', default='', metavar='FOLDER', help='the run, if it has moved')
    parser.add_argument('--backbone', default='', metavar='FOLDER', help='if it has moved')
    arguments = parser.parse_intermixed_args(argv)  # options may stand before the sentence
    with _wrong_usage():
        if bool(arguments.sentence.strip()) == bool(arguments.video):
            raise ValueError('say what to look for: a sentence in quotes, or --video=FILE')
        if arguments.top < 1:
            raise ValueError(f'--top={arguments.top} must be at least 1')
        for name in (arguments.index, arguments.video, arguments.folder):
            if name and not os.path.exists(name):
                raise ValueError(f'no file or folder {name}')
        for name in filter(None, (arguments.output, arguments.json)):
            for read in filter(None, (arguments.index, arguments.video)):
                if os.path.exists(name) and os.path.samefile(name, read):
                    raise ValueError(f'{name} is what is searched: write to another file')
        if arguments.workdir:
            paths.check_run(arguments.workdir)
        paths.check_backbone(arguments.backbone)
    from dist_jax import index_file

    found = index_file.read(arguments.index)
    _start_jax()
    from dist_jax import index_model, search

    request = search.Request(
        arguments.sentence,
        arguments.video,
        arguments.top,
        arguments.all_windows,
        arguments.folder,
        arguments.output or f'{arguments.index}.png',
        arguments.dark,
        arguments.json,
    )
    model = index_model.of_index(found, arguments.workdir, arguments.backbone)
    return search.run(found, model, request)


def _demo(argv: Sequence[str]) -> int:
    parser = _parser('demo', 'Train DiST and a frame-only baseline on built-in clips.', DEMO_HELP)
    parser.add_argument('--workdir', default='runs/demo', help='folder of both runs (%(default)s)')
    parser.add_argument('--num_steps', type=int, default=0, help="of each; the configs' by default")
    arguments = parser.parse_args(argv)
    _start_jax()
    from dist_jax import demo
    from dist_jax.reports import console

    summary = demo.run_demo(arguments.workdir, arguments.num_steps)
    console.print_comparison(arguments.workdir, summary, demo.comparison(summary), demo.FILES)
    return pod.AGAIN if summary.get('interrupted') else 0


def _convert(argv: Sequence[str]) -> int:
    arguments = convert_arguments.parse(argv)
    if arguments is None:  # No such file: said before jax is imported.
        return 2
    from dist_jax import convert

    return convert.run(arguments)


def _check(argv: Sequence[str]) -> int:
    from input_pipeline import check

    return check.main(list(argv))


def _plan(argv: Sequence[str]) -> int:
    parser = _parser('plan', 'Memory and time of a step on a TPU that is not here.', PLAN_HELP)
    parser.add_argument('--topology', required=True, metavar='CHIP:SHAPE', help='as in v4:4x4x8')
    parser.add_argument('--num_slices', type=int, default=1, help='slices of it (%(default)s)')
    parser.add_argument(
        '--compare',
        nargs='+',
        default=[],
        metavar='CONFIG',
        help="configs side by side: 'FILE:VARIANT config.FIELD=VALUE ... gradients=full'",
    )
    parser.add_argument(
        '--gradients',
        nargs='+',
        default=['frozen'],
        metavar='HOW',
        help='frozen, through_backbone or full; several: side by side (%(default)s)',
    )
    parser.add_argument('--search_batch', action='store_true', help='largest batch that fits')
    parser.add_argument('--no_eval', action='store_true', help='leave the eval step out')
    parser.add_argument('--json', default='', metavar='FILE', help='write the figures')
    parser.add_argument('--plot', default='', metavar='FILE.png', help='draw them')
    parser.add_argument('--cache', metavar='DIR', help="compiled programs; '' for none")
    parser.add_argument(
        '--config',
        metavar='FILE:VARIANT',
        help='the experiment; --config.FIELD=VALUE sets a field (of all compared)',
    )
    rest, config_arguments = _split(argv)
    arguments = parser.parse_args(rest)
    from dist_jax.plan import topology

    asked = topology.parse_topology(arguments.topology, arguments.num_slices)
    wanted = _wanted_plans(arguments.compare, arguments.gradients, config_arguments)
    topology.prepare_environment()
    from dist_jax.plan import cache, command

    folder = cache.default_folder() if arguments.cache is None else arguments.cache
    options = command.Options(
        # Compared are train steps.
        evaluate=not arguments.no_eval and len(wanted) == 1,
        search_batch=arguments.search_batch,
        cache=folder,
    )
    requests = [command.Request(*one) for one in wanted]
    return command.run(requests, asked, options, arguments.json, arguments.plot)


def _wanted_plans(
    compare: Sequence[str], gradients: Sequence[str], config_arguments: list[str]
) -> list[tuple[str, ConfigDict, str]]:
    """(label, config, gradients) of every plan that the arguments ask for."""
    named = [a for a in config_arguments if a.startswith('--config=')]
    common = [a for a in config_arguments if not a.startswith('--config=')]
    if named and compare:
        raise UsageError('pass --config or --compare, not both')
    wanted = []
    for text in compare or [' '.join(a.removeprefix('--config=') for a in named)]:
        file, *settings = shlex.split(text) or ['']
        fields, own = [], []
        for setting in settings:
            name, equals, value = setting.removeprefix('--').partition('=')
            if name == 'gradients':
                own.append(value)
            elif name.startswith('config.') and equals:
                fields.append(f'--{name}={value}')
            else:
                raise UsageError(
                    f'--compare: cannot read {setting!r}; write config.FIELD=VALUE or gradients=HOW'
                )
        base = [f'--config={file}'] if file else []
        for how in own or gradients:
            label = os.path.basename(file).replace('.py:', ' ').removesuffix('.py')
            for field in fields:
                label += f' {field.removeprefix("--config.").rpartition(".")[2]}'
            label += '' if how == 'frozen' else f' {how}'
            wanted.append((label, read_config([*base, *common, *fields]), how))
    return wanted


def _doctor(argv: Sequence[str]) -> int:
    parser = _parser('doctor', 'Check this machine, or all hosts of a pod.', DOCTOR_HELP)
    parser.add_argument('--workdir', default='', help='folder of the run')
    parser.add_argument('--devices', type=int, default=0, help='expected, over all hosts')
    parser.add_argument(
        '--config',
        metavar='FILE:VARIANT',
        help='the experiment; --config.FIELD=VALUE sets a field',
    )
    rest, config_arguments = _split(argv)
    arguments = parser.parse_args(rest)
    config = read_config(config_arguments) if config_arguments else None
    _start_jax()
    import jax

    from dist_jax import doctor

    checks = doctor.run(doctor.Request(config, arguments.workdir, arguments.devices))
    if jax.process_index() == 0:
        doctor.print_table(checks)
    return int(any(check.state == doctor.FAILED for check in checks))


# Command -> (function of its arguments, one line for the overview).
COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    'demo': (_demo, 'make clips, train DiST and a frame-only baseline, compare'),
    'train': (_train, 'train a model, or continue a run'),
    'evaluate': (_evaluate, 'accuracy on a list, per class; zero-shot on another label set'),
    'predict': (_predict, 'top-5 of single videos, with a picture of each'),
    'index': (_index, 'embed the videos of a folder, to search them'),
    'search': (_search, 'find moments of the videos of an index by words, or by a video'),
    'convert': (_convert, "turn CLIP or the authors' weights into ours, or ours into theirs"),
    'plan': (_plan, 'memory and time of a step on a TPU that is not here'),
    'doctor': (_doctor, 'check this machine, or all hosts of a pod, before a run'),
    'check': (_check, 'read every video of a list and report what cannot be read'),
}

CONTINUED = ('demo', 'train', 'index')  # commands that continue where they were stopped


if __name__ == '__main__':
    sys.exit(main())
