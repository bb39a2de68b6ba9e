"""Draws what the demo's DiST says of six clips as an animation, for the top of the README.

python -m tools.draw_demo --workdir=runs/demo --out docs/demo.gif

The clips are those of `filmstrips.png`, plain and under the attention of the query, with what DiST
says and what is true. They play as fast as they were taken, again and again.
"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dist_jax import drawing, filmstrips, recipe, trained
from dist_jax.drawing import LIGHT, cut
from dist_jax.filmstrips import Clip
from input_pipeline.pipeline import open_video
from input_pipeline.video_list import Record

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

# Pixels.
SIDE = 140  # of a frame
COLUMNS = 3
GAP, SEAM, MARGIN = 14, 2, 10  # between clips, between a frame and its attention, around all
FIRST, SECOND = 16, 13  # letters of the two lines above a clip
LINE, HEAD, SPACE = 21, 42, 12  # heights: of the first line, of both, below a clip

REST = 1000  # milliseconds on the last frame
COLOURS = (128, 96, 64, 48, 32)  # of the palette
MOST_BYTES = 1_500_000
THINNED = 8  # every so many pixels of a row and of a column choose the palette


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workdir', default='runs/demo', help='of the demo (%(default)s)')
    parser.add_argument('--out', default='docs/demo.gif', help='file to write (%(default)s)')
    arguments = parser.parse_args(argv)
    try:
        config = trained.saved_config(arguments.workdir)
        model = trained.load_trained(config, arguments.workdir, None)
        clips = filmstrips.tell(model, config, recipe.open_split(config, 'val'))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, clips)
    print(f'{out}: {out.stat().st_size / 1e6:.2f} MB, {len(clips)} clips')
    return 0


def write(path: Path, clips: Sequence[Clip]) -> None:
    """Writes a GIF of the clips, which repeats, in the most colours that fit MOST_BYTES."""
    pictures = draw(clips)
    durations = [_seconds(clip) / len(pictures) for clip in clips]
    times = [round(1000 * sum(durations) / len(clips))] * len(pictures)
    times[-1] = REST
    for colours in COLOURS:
        palette = _palette(pictures, colours)
        first, *others = [picture.quantize(palette=palette, dither=0) for picture in pictures]
        file = io.BytesIO()
        first.save(file, format='GIF', save_all=True, append_images=others, duration=times, loop=0)
        if len(file.getvalue()) <= MOST_BYTES:
            break
    path.write_bytes(file.getvalue())


def _seconds(clip: Clip) -> float:
    """The duration of the video of a clip."""
    with open_video(Record(clip.path, 0, clip.path)) as video:
        return video.duration


def _palette(pictures: Sequence[Image], colours: int) -> Image:
    """Colours that serve all pictures: those of the texts, and the best for the rest."""
    from PIL import Image, ImageColor

    width, height = (side // THINNED for side in pictures[0].size)
    sheet = Image.new('RGB', (width, height * len(pictures)))
    for i, picture in enumerate(pictures):
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (0, i * height))
    texts = [LIGHT['paper'], LIGHT['ink'], *LIGHT['cycle'][1:]]
    values = [value for text in texts for value in ImageColor.getrgb(text)]
    found = sheet.quantize(colours - len(texts), method=Image.Quantize.MEDIANCUT, kmeans=1)
    palette = Image.new('P', (1, 1))
    palette.putpalette(values + found.getpalette())
    return palette


def draw(clips: Sequence[Clip]) -> list[Image]:
    """The frames of the animation, RGB."""
    from PIL import Image, ImageDraw

    rows = [filmstrips.frames(clip, SIDE) for clip in clips]
    tile = max(map(len, rows)) * (SIDE + SEAM) - SEAM
    down = HEAD + SIDE + SPACE
    size = (
        2 * MARGIN + COLUMNS * (tile + GAP) - GAP,
        2 * MARGIN + -(-len(clips) // COLUMNS) * down - SPACE,
    )
    places = [
        (MARGIN + i % COLUMNS * (tile + GAP), MARGIN + i // COLUMNS * down)
        for i in range(len(clips))
    ]
    paper = Image.new('RGB', size, LIGHT['paper'])
    pen = ImageDraw.Draw(paper)
    for clip, place in zip(clips, places):
        _write_texts(pen, place, tile, clip)
    pictures = []
    for k in range(len(clips[0].video)):
        picture = paper.copy()
        for own, (x, y) in zip(rows, places):
            for j, frames in enumerate(own):
                at = (x + j * (SIDE + SEAM), y + HEAD)
                picture.paste(Image.fromarray(frames[k]), at)
        pictures.append(picture)
    return pictures


def _write_texts(pen: ImageDraw, place: tuple[int, int], width: int, clip: Clip) -> None:
    """What was said, in its colour, and what is true."""
    x, y = place
    colour = LIGHT['cycle'][2 if clip.right else 1]
    bold, normal = drawing.font(FIRST, bold=True), drawing.font(SECOND)
    pen.text((x, y), _cut(clip.verdict, bold, width), fill=colour, font=bold)
    style = {'fill': LIGHT['ink'], 'font': normal}
    room = width - normal.getlength(f' {clip.sure}')
    pen.text((x, y + LINE), _cut(clip.true, normal, room), **style)
    pen.text((x + width, y + LINE), clip.sure, anchor='ra', **style)


def _cut(text: str, font: FreeTypeFont, width: float) -> str:
    """As much of a text as fits."""
    letters = itertools.count(len(text), -1)
    return next(found for n in letters if font.getlength(found := cut(text, n)) <= width)


if __name__ == '__main__':
    sys.exit(main())
