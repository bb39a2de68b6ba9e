"""A model as a folder that runs without this package."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence

from dist_jax import paths
from dist_jax.commands.arguments import make_parser, model_folder, split, start_jax, wrong_usage
from dist_jax.config_arguments import UsageError, named_fields, read_config
from dist_jax.configs import base
from input_pipeline.escape import terminal

SUMMARY = 'a model as a folder that runs without this package: StableHLO or ONNX'
HELP = """\
examples:
  dist_jax export --workdir=runs/b16 --out b16_bundle
  dist_jax export --workdir=runs/b16 --step=best --out b16_bundle --config.eval.num_clips=1
      of one view a video, not of as many as the run is tested with
  dist_jax export --workdir=runs/b16 --labels=my_classes.txt --out b16_bundle
      for other class names, one a line (text head only)
  dist_jax export --config=dist:b16_8+16f_k400 --config.init_from=dist_b16 \\
      --config.backbone.checkpoint=clip_b16 --labels=k400_labels.txt --out bundle
      the authors' weights, after `dist_jax convert`
  dist_jax export --backbone=clip_b16 --labels=my_classes.txt --out clip_bundle
      CLIP with class names, nothing trained; without --labels its embedding alone

Then: dist_jax verify b16_bundle, or on a machine without this package: python b16_bundle/verify.py

The program takes uint8 frames and gives probabilities and an embedding. It is for CPU, CUDA and TPU
(StableHLO), or for onnxruntime (--format=onnx, extra `onnx`). docs/guides/export.md
describes the folder.
"""


def parser() -> argparse.ArgumentParser:
    found = make_parser('export', 'Write a program, its weights, and a check of both.', HELP)
    found.add_argument('--out', required=True, metavar='BUNDLE', help='folder to make')
    found.add_argument(
        '--workdir', default='', help='folder of the run, or a release of one: hf://owner/name'
    )
    found.add_argument('--step', help="its checkpoint: a number or 'best'; the newest by default")
    found.add_argument(
        '--backbone', default='', metavar='FOLDER', help='converted CLIP, in place of a run'
    )
    found.add_argument(
        '--labels',
        default='',
        metavar='FILE',
        help='class names; two files, separated by a comma, for two heads',
    )
    found.add_argument(
        '--batch_size', type=int, default=0, help='videos that it takes at once; 0: any number'
    )
    found.add_argument('--format', default='stablehlo', help='stablehlo or onnx (%(default)s)')
    found.add_argument(
        '--config',
        metavar='FILE:VARIANT',
        help="the experiment, if not the run's own; --config.FIELD=VALUE sets a field",
    )
    return found


def run(argv: Sequence[str]) -> int:
    rest, config_arguments = split(argv)
    arguments = parser().parse_args(rest)
    with wrong_usage():
        _check(arguments, config_arguments)
    start_jax()
    import dist_jax
    from dist_jax import trained
    from dist_jax.bundles import export
    from dist_jax.trained import load_trained
    from dist_jax.video_model import VideoModel
    from input_pipeline.label_maps import read_label_map

    labels = None
    if arguments.labels:
        labels = tuple(read_label_map(name).names for name in arguments.labels.split(','))
    if arguments.backbone:
        plain = read_config(config_arguments, base.get_config())
        fields = {name: base.flat(plain)[name] for name in named_fields(config_arguments)}
        names = None if labels is None else labels[0]
        model = dist_jax.load(arguments.backbone, labels=names, overrides=fields)
    else:
        workdir, step = model_folder(arguments.workdir, config_arguments), arguments.step
        config = read_config(
            config_arguments, trained.saved_config(workdir, step) if workdir else None
        )
        with tempfile.TemporaryDirectory() as made:  # where the backbone of this package is put
            model = VideoModel(load_trained(config, workdir, step, labels, made), config)
    try:
        made = export.run(
            model, arguments.out, batch_size=arguments.batch_size, form=arguments.format
        )
    except ImportError as error:
        raise UsageError(str(error)) from error
    print(f'{terminal(arguments.out)}: {made["bytes"] / 1e6:,.1f} MB, {made["seconds"]:.1f} s')
    for name, error in made['errors'].items():
        print(f'  {name}: largest error of the golden clip {error:.1e}')
    print(f'check it anywhere: python {terminal(os.path.join(arguments.out, "verify.py"))}')
    return 0


def _check(arguments: argparse.Namespace, config_arguments: Sequence[str]) -> None:
    """Raises ValueError for what can be told without reading a model."""
    from dist_jax.bundles.verify import PROGRAMS

    named = any(argument.startswith('--config=') for argument in config_arguments)
    if arguments.format not in PROGRAMS:
        raise ValueError(f'--format={arguments.format} is not one of {", ".join(PROGRAMS)}')
    if not 0 <= arguments.batch_size <= 4096:
        raise ValueError(f'--batch_size={arguments.batch_size} must be 1 to 4096, or 0 for any')
    if '://' in arguments.out:
        raise ValueError(f'--out={arguments.out}: a bundle is a local folder')
    if sum((bool(arguments.workdir), bool(arguments.backbone), named)) != 1:
        raise ValueError(
            'pass one of --workdir=RUN, --backbone=FOLDER for CLIP as it is, and '
            '--config=FILE:VARIANT with --config.init_from=CONVERTED'
        )
    if arguments.step and not arguments.workdir:
        raise ValueError('--step goes with --workdir')
    if named and not arguments.labels:
        raise ValueError(
            'nothing says what the classes of a converted network are: pass --labels=FILE, the '
            'names that its authors trained it on, in their order'
        )
    for name in filter(None, arguments.labels.split(',')):
        if not os.path.exists(name):
            raise ValueError(f'--labels: no file {name}')
    if arguments.workdir:
        paths.check_model(arguments.workdir)
    paths.check_backbone(arguments.backbone)
    paths.check_inputs(named_fields(config_arguments), ())
