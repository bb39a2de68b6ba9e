"""Trains the small CLIP that comes with the package, as it was trained for it.

Both towers learn from random weights, single frames and what they show (`configs/fine_tune.py:
pictures`, CLIP's own loss over the batch), and go out as safetensors in float16 under OpenAI's
names. Then the written file is tested as any backbone is: class texts against the frames of test
clips, each by itself and the mean of eight, in 30 looks that were seen and in 6 that never were.

python -m tools.pretrain_tiny_clip --out runs/tiny_clip
python -m tools.pretrain_tiny_clip --out runs/tiny_clip --install     # in place of the shipped one
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from safetensors.numpy import save_file

from dist_jax import convert, evaluate, recipe, shipped, train
from dist_jax.configs import fine_tune, zero_shot
from input_pipeline.escape import Console

# What it is asked: list, class names, frames of a clip.
TESTS = {
    'looks': ('looks_test.txt', 'looks_labels.txt'),
    'new_looks': ('looks_new.txt', 'looks_new_labels.txt'),
}
FRAMES = (1, 8)


def pretrain(out: Path, seed: int = 0) -> Path:
    """Trains it, or goes on with it, and writes OUT/tiny_clip.safetensors.

    Args:
      out: folder of the run.
      seed: of everything that is drawn but the pictures.

    Returns:
      The file; float16.
    """
    config = fine_tune.get_config('pictures')
    config.seed = seed
    train.train(config, str(out / 'run'))
    whole, target = out / 'float32.safetensors', out / shipped.FILE.name
    tensors = convert.export(out / 'run', whole, overwrite=True)
    save_file({name: np.asarray(x, np.float16, order='C') for name, x in tensors.items()}, target)
    whole.unlink()
    return target


def accuracies(file: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Zero-shot accuracies of a file.

    Args:
      file: of weights.
      out: folder for conversion, clips and reports.

    Returns:
      'looks_1_frames' and so on -> `of`, `frames`, `top1`, `classes`, `clips`.
    """
    backbone = out / 'converted'
    shutil.rmtree(backbone, ignore_errors=True)
    shipped.write(backbone, file)
    found = {}
    for name, (split, labels) in TESTS.items():
        for frames in FRAMES:
            config = zero_shot.get_config('world')
            config.data.name = 'motion_world_looks'
            config.backbone.checkpoint = str(backbone)
            config.data.num_frames = frames
            recipe.prepare_builtin_data(config, str(out))
            root = Path(config.data.root)
            # Of other classes than the set has.
            config.data.update(name='custom', list_format='kinetics')
            config.data.update(val_list=str(root / split), label_map=str(root / labels))
            stored, _ = evaluate.run(config, '', None, str(out / f'{name}_{frames}'))
            found[f'{name}_{frames}_frames'] = {
                'of': name,
                'frames': frames,
                'top1': stored['top1'],
                'classes': len((root / labels).read_text().splitlines()),
                'clips': stored['num_videos'],
            }
    return found


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m tools.pretrain_tiny_clip',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--out', required=True, type=Path, metavar='DIR', help='folder of the run')
    parser.add_argument('--seed', type=int, default=0, help='of all draws (default %(default)s)')
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        '--install', action='store_true', help=f'copy the result to {shipped.FILE.parent.name}/'
    )
    either.add_argument(
        '--shipped', action='store_true', help='train nothing: test the file in the package'
    )
    arguments = parser.parse_args(argv)
    file = shipped.FILE if arguments.shipped else pretrain(arguments.out, arguments.seed)
    found = accuracies(file, arguments.out)
    (arguments.out / 'accuracies.json').write_text(json.dumps(found, indent=1) + '\n')
    table = Table('clips', 'frames of each', 'classes', 'chance', 'top-1', title='zero-shot')
    for figures in found.values():
        chance, top1 = 1 / figures['classes'], figures['top1']
        clips = f'{figures["clips"]} {figures["of"]}'
        row = (clips, str(figures['frames']), str(figures['classes']))
        table.add_row(*row, f'{chance:.1%}', f'{top1:.1%}')
    console = Console()
    console.print(table)
    if arguments.install:
        shutil.copyfile(file, shipped.FILE)
        console.print(f'copied to {shipped.FILE}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
