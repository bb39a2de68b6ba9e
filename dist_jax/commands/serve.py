"""A web server for one model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from dist_jax import paths
from dist_jax.commands.arguments import make_parser, model_folder, split, start_jax, wrong_usage
from dist_jax.config_arguments import UsageError, named_fields, read_config

SUMMARY = 'a page to drop videos on, and the same as JSON, for a run or a bundle'
HELP = """\
examples:
  dist_jax serve runs/b16
  dist_jax serve b16_bundle --port=9000
      a bundle of `dist_jax export`
  curl -F video=@clip.mp4 http://127.0.0.1:8000/predict

Needs the extra `serve`. It listens to this machine alone, unless --host says otherwise: it has no
accounts and no TLS, so put it behind a server that has. docs/guides/export.md describes its limits.
"""


def parser() -> argparse.ArgumentParser:
    found = make_parser('serve', 'Serve a model over HTTP.', HELP)
    found.add_argument(
        'model',
        metavar='RUN|BUNDLE',
        help='folder of a run, of a release (or hf://owner/name), or of a bundle',
    )
    found.add_argument('--step', help="of a run: a number or 'best'; the newest by default")
    found.add_argument('--host', default='127.0.0.1', help='address to listen at (%(default)s)')
    found.add_argument('--port', type=int, default=8000, help='(%(default)s)')
    found.add_argument(
        '--most_mb', type=float, default=64, help='of an upload, in millions of bytes (%(default)s)'
    )
    found.add_argument(
        '--decoders', type=int, default=2, help='videos decoded at a time (%(default)s)'
    )
    found.add_argument('--config', metavar='', help='--config.FIELD=VALUE sets a field of the run')
    return found


def run(argv: Sequence[str]) -> int:
    rest, config_arguments = split(argv)
    arguments = parser().parse_args(rest)
    folder = arguments.model
    is_bundle = os.path.exists(os.path.join(folder, 'bundle.json'))
    with wrong_usage():
        if not 0 < arguments.port < 1 << 16:
            raise ValueError(f'--port={arguments.port} must be 1 to 65535')
        if not 0 < arguments.most_mb <= 1 << 20:
            raise ValueError(f'--most_mb={arguments.most_mb} must be above 0')
        if not 1 <= arguments.decoders <= 256:
            raise ValueError(f'--decoders={arguments.decoders} must be 1 to 256')
        if is_bundle and (arguments.step or config_arguments):
            raise ValueError(f'{folder} is a bundle: --step and --config go with a run')
        if not is_bundle:
            paths.check_model(folder)
        paths.check_inputs(named_fields(config_arguments), ())
    try:
        from dist_jax.bundles import serve
    except ImportError as error:
        raise UsageError(
            f"{error}; the server needs an extra: pip install 'dist_jax[serve]'"
        ) from error
    start_jax()
    if is_bundle:
        served = serve.of_bundle(folder)
    else:
        from dist_jax import trained
        from dist_jax.video_model import VideoModel

        workdir = model_folder(folder, config_arguments)
        config = read_config(config_arguments, trained.saved_config(workdir, arguments.step))
        model = VideoModel(trained.load_trained(config, workdir, arguments.step), config)
        served = serve.of_model(model, folder)
    limits = serve.Limits(
        upload_bytes=int(arguments.most_mb * 1e6),
        decoders=arguments.decoders,
        waiting=4 * arguments.decoders,
    )
    return serve.run(served, arguments.host, arguments.port, limits)
