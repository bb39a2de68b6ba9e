"""Writes the built-in motion clips data set and a contact sheet of it.

python -m tools.make_motion_clips --out data/motion_clips
python -m tools.make_motion_clips --out /tmp/small --num_train 100 --num_val 20 --seed 1
"""

import argparse
import inspect
import sys
from pathlib import Path

from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from input_pipeline import motion_clips
from input_pipeline.escape import Console

COLUMNS = 16  # frames of a clip on the contact sheet


def draw_contact_sheet(out_dir: Path, meta: dict) -> Path:
    """Draws frames of one validation clip per class.

    Args:
      out_dir: folder of the data set.
      meta: arguments of `motion_clips.generate`.

    Returns:
      The PNG that was written, OUT/contact_sheet.png.
    """
    classes = motion_clips.CLASS_NAMES[: meta['num_val']]
    num_frames, size = meta['num_frames'], meta['size']
    shown = range(0, num_frames, max(1, num_frames // COLUMNS))
    height = 0.4 + 1.4 * len(classes)
    figure = Figure(figsize=(1.2 * len(shown), height))
    axes = figure.subplots(len(classes), len(shown), squeeze=False)
    for label, row in enumerate(axes):
        plan = motion_clips.plan_clip(meta['seed'], 'val', label, num_frames, size, label)
        frames = motion_clips.render_clip(plan, size)
        for k, axis in zip(shown, row):
            axis.imshow(frames[k])
            axis.set_axis_off()
        row[0].set_title(f'{label}  {classes[label]}', loc='left', fontsize=9)
    figure.suptitle(f'frames {shown[0]}, {shown[1]} .. {shown[-1]} of {num_frames}', fontsize=9)
    figure.tight_layout(pad=0.3, rect=(0, 0, 1, 1 - 0.3 / height))
    path = out_dir / 'contact_sheet.png'
    figure.savefig(path, dpi=110)
    return path


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m tools.make_motion_clips',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = {k: p.default for k, p in inspect.signature(motion_clips.generate).parameters.items()}
    parser.add_argument('--out', required=True, metavar='DIR', help='folder to create')
    for name, text in {
        'num_train': 'training clips',
        'num_val': 'validation clips',
        'size': 'frame height and width in pixels, a multiple of 8',
        'num_frames': 'frames per clip, a multiple of 4',
        'fps': 'frames per second',
        'seed': 'seed of all draws',
        'num_threads': 'clips written at the same time',
    }.items():
        flags = [f'--{name}'] + (['--frames'] if name == 'num_frames' else [])
        text += ' (default %(default)s)'
        parser.add_argument(*flags, dest=name, type=int, default=default[name], help=text)
    arguments = vars(parser.parse_args(argv))
    out_dir = Path(arguments.pop('out'))

    console = Console()
    columns = (
        TextColumn('clips'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task('clips', total=None)
            written = motion_clips.generate(
                out_dir,
                **arguments,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
    except (ValueError, OSError) as error:
        console.print(f'error: {error}', style='red', soft_wrap=True)
        return 1
    sheet = draw_contact_sheet(out_dir, arguments)
    what = 'wrote' if written else 'found a complete set in'
    console.print(f'{what} {out_dir}: train.txt, val.txt, labels.txt; see {sheet}', soft_wrap=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
