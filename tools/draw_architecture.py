"""Draws DiST as an SVG: three branches, what is frozen, what is trained, and the shapes.

python -m tools.draw_architecture
python -m tools.draw_architecture --variant l14_32+64f_k400 --out l14.svg
"""

# ruff: noqa: RUF001 - the multiplication signs are meant
from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from dist_jax.configs import dist as dist_config
from dist_jax.models.frozen import TOWER
from dist_jax.models.params import count
from dist_jax.plan import compiling
from input_pipeline.datasets import DATASETS

DEFAULT_OUT = Path(__file__).parent.parent / 'docs' / 'architecture.svg'

# The picture brings its own paper, so it reads the same on a white and on a dark page.
PAPER, INK, DIM, LINES = '#fbfcfd', '#1c2128', '#57606a', '#8c959f'
KINDS = {'frozen': ('#dcebfa', '#2f6fad'), 'trained': ('#fde7d3', '#c2571a')}  # fill, edge
WIDTH, HEIGHT = 960, 846


@dataclasses.dataclass(frozen=True)
class Figures:
    """The numbers that the picture shows.

    Attributes:
      name: of the backbone, as people write it.
      num_frames: T, of the clip.
      alpha: the backbone sees every alpha-th frame.
      image_size: pixels.
      patch_size: pixels.
      layers: layers that are read.
      width: W, of the backbone.
      embed_dim: E, of the joint space with text.
      integration_dim: C.
      temporal_dim: S.
      temporal_patch: frames of the stem's kernel.
      temporal_kernel: frames of the other temporal kernel.
      pooling: blocks of the adaptive pooling.
      num_classes: of the data set.
      trained: trainable parameters.
      frozen: parameters of the frozen image tower.
    """

    name: str
    num_frames: int
    alpha: int
    image_size: int
    patch_size: int
    layers: int
    width: int
    embed_dim: int
    integration_dim: int
    temporal_dim: int
    temporal_patch: int
    temporal_kernel: int
    pooling: int
    num_classes: int
    trained: int
    frozen: int


def collect(variant: str) -> Figures:
    """Reads the numbers off a row of `configs/dist.py`; counts without any weights.

    Raises:
      ValueError: no such row, or one with several heads.
    """
    config = dist_config.get_config(variant)
    num_classes = DATASETS[config.data.name].num_classes
    if not isinstance(num_classes, int) or config.model.head != 'text':
        raise ValueError(f'{variant} has no single text head; draw a variant that has')
    parts = compiling.assemble(config)
    data, spec = config.data, parts.backbone.spec
    return Figures(
        name='ViT-' + config.backbone.name.removeprefix('vit_')[0].upper() + f'/{spec.patch_size}',
        num_frames=data.num_frames,
        alpha=config.model.alpha,
        image_size=data.image_size,
        patch_size=spec.patch_size,
        layers=len(config.model.selected_layers) or spec.depth,
        width=spec.width,
        embed_dim=spec.embed_dim,
        integration_dim=config.model.integration_dim,
        temporal_dim=config.model.temporal_dim,
        temporal_patch=config.model.temporal_patch,
        temporal_kernel=config.model.temporal_kernel,
        pooling=config.model.ada_pooling_layers,
        num_classes=num_classes,
        trained=count(parts.abstract_variables()['params']),
        frozen=count(parts.abstract_frozen()[TOWER]),
    )


class _Canvas:
    """SVG elements; arrows lie under boxes, and a later arrow interrupts what it crosses."""

    def __init__(self) -> None:
        self._arrows: list[str] = []
        self._elements: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: float = 13,
        colour: str = INK,
        anchor: str = 'middle',
        weight: str = 'normal',
    ) -> None:
        self._elements.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}" '
            f'text-anchor="{anchor}" font-weight="{weight}">{escape(words)}</text>'
        )

    def rectangle(
        self, x: float, y: float, width: float, height: float, fill: str, edge: str, dash: str = ''
    ) -> None:
        dashes = f' stroke-dasharray="{dash}"' if dash else ''
        self._elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" '
            f'fill="{fill}" stroke="{edge}" stroke-width="1.5"{dashes}/>'
        )

    def box(self, x: float, y: float, width: float, height: float, kind: str, *lines: str) -> None:
        """A part of the model: a title line, then smaller lines."""
        fill, edge = KINDS.get(kind, ('#eef1f4', LINES))
        self.rectangle(x, y, width, height, fill, edge)
        top = y + height / 2 - 8.5 * (len(lines) - 1) + 4.5
        for i, line in enumerate(lines):
            centre = x + width / 2
            if i:
                self.text(centre, top + 17 * i, line, 12, DIM)
            else:
                self.text(centre, top, line, 13.5, INK, weight='600')

    def arrow(self, *points: tuple[float, float], kind: str = 'trained') -> None:
        """A line with corners and a head."""
        path = 'M' + ' L'.join(f'{x:g} {y:g}' for x, y in points)
        colour = KINDS[kind][1] if kind in KINDS else LINES
        self._arrows.append(
            f'<path d="{path}" fill="none" stroke="{PAPER}" stroke-width="7"/>'
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.8" '
            f'marker-end="url(#{kind})"/>'
        )

    def render(self, title: str) -> str:
        heads = ''.join(
            f'<marker id="{kind}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="{colour}"/>'
            '</marker>'
            for kind, colour in [(k, edge) for k, (_, edge) in KINDS.items()] + [('plain', LINES)]
        )
        body = '\n'.join(self._arrows + self._elements)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'width="{WIDTH}" height="{HEIGHT}" role="img" '
            'font-family="Helvetica, Arial, \'DejaVu Sans\', sans-serif">\n'
            f'<title>{escape(title)}</title>\n<defs>{heads}</defs>\n'
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="14" fill="{PAPER}"/>\n'
            f'{body}\n</svg>\n'
        )


def draw(f: Figures) -> str:
    """The picture as SVG text; the same numbers give the same bytes."""
    canvas = _Canvas()
    seen = f.num_frames // f.alpha
    grid = f.image_size // f.patch_size
    tokens = 1 + grid * grid
    space = f'B·{seen} × {tokens}'
    time = f'B × {f.num_frames} × {grid} × {grid} × {f.temporal_dim}'

    # Lanes: frozen backbone, integration, temporal encoder.
    left, middle, right = (30, 250), (350, 272), (690, 240)
    centre = [x + width / 2 for x, width in (left, middle, right)]

    title = f'DiST with CLIP {f.name}, {seen} + {f.num_frames} frames'
    canvas.text(30, 36, title, 18, anchor='start', weight='600')
    for x, kind, words in (
        (478, 'frozen', f'frozen: image tower {f.frozen / 1e6:.1f} M'),
        (718, 'trained', f'trained: {f.trained / 1e6:.1f} M parameters'),
    ):
        fill, edge = KINDS[kind]
        canvas.rectangle(x, 21, 18, 18, fill, edge)
        canvas.text(x + 26, 35, words, 13, anchor='start')

    shape = f'B × {f.num_frames} × {f.image_size} × {f.image_size} × 3'
    canvas.box(30, 58, 900, 36, 'plain', f'video  {shape}, uint8')
    canvas.arrow((centre[0], 94), (centre[0], 130), kind='frozen')
    canvas.text(
        centre[0] + 10, 116, f'{seen} frames, every {_ordinal(f.alpha)}', 12, DIM, anchor='start'
    )
    canvas.arrow((centre[2], 94), (centre[2], 130))
    canvas.text(centre[2] + 10, 116, f'all {f.num_frames} frames', 12, DIM, anchor='start')

    p = f.patch_size
    canvas.box(
        left[0],
        130,
        left[1],
        50,
        'frozen',
        'spatial encoder',
        f'CLIP: patches {p} × {p}, positions',
    )
    canvas.box(
        right[0],
        130,
        right[1],
        50,
        'trained',
        'temporal encoder',
        f'conv {f.temporal_patch} × {p} × {p}, stride 1 × {p} × {p}',
    )
    canvas.text(centre[1], 151, 'integration branch', 13.5, weight='600')
    canvas.text(centre[1], 168, 'R = 0', 12, DIM)

    # The repeated layer.
    canvas.rectangle(16, 208, 928, 346, 'none', LINES, '7 5')
    canvas.text(30, 229, f'layer i = 1 … {f.layers}', 13, DIM, anchor='start', weight='600')
    canvas.arrow((centre[0], 180), (centre[0], 246), kind='frozen')
    canvas.arrow((centre[1], 176), (centre[1], 246))
    canvas.arrow((centre[2], 180), (centre[2], 246))

    canvas.box(left[0], 246, left[1], 64, 'frozen', 'CLIP block i → F', f'{space} × {f.width}')
    canvas.box(
        middle[0], 246, middle[1], 64, 'trained', 'M = F·W + R', f'{space} × {f.integration_dim}'
    )
    k = f.temporal_kernel
    canvas.box(
        right[0],
        246,
        right[1],
        64,
        'trained',
        'X = X + convs (LN X)',
        f'{k} × 1 × 1, then 1 × 3 × 3',
        time,
    )
    canvas.box(
        middle[0], 366, middle[1], 64, 'trained', 'U = M + [ class, X ]', 'a class vector per frame'
    )
    canvas.box(
        middle[0],
        468,
        middle[1],
        64,
        'trained',
        'R = FFN(LN U) + TFFN(LN U)',
        'per token;  along time',
    )
    canvas.box(
        right[0], 468, right[1], 64, 'trained', 'X = X + M·W', f'each frame of M {f.alpha} times'
    )

    canvas.arrow((left[0] + left[1], 278), (middle[0], 278), kind='frozen')
    canvas.text(315, 268, 'no gradient', 11, DIM)
    canvas.arrow((centre[1], 310), (centre[1], 366))
    canvas.arrow((centre[1], 430), (centre[1], 468))
    canvas.arrow((centre[2], 310), (centre[2], 468))
    edge = middle[0] + middle[1]
    canvas.arrow((edge, 290), (656, 290), (656, 500), (right[0], 500))
    canvas.arrow((centre[2], 398), (edge, 398))
    canvas.text(centre[2] + 10, 394, f'conv {f.alpha} × 1 × 1', 12, DIM, anchor='start')
    canvas.text(centre[2] + 10, 410, f'stride {f.alpha} in time', 12, DIM, anchor='start')

    # What comes after the last layer.
    canvas.arrow((centre[0], 310), (centre[0], 596), kind='frozen')
    canvas.text(centre[0] + 10, 578, 'class tokens of the last', 12, DIM, anchor='start')
    canvas.arrow((centre[1], 532), (centre[1], 596))
    canvas.text(centre[1] + 10, 578, 'Z = R + U of the last', 12, DIM, anchor='start')
    canvas.box(
        left[0],
        596,
        left[1],
        64,
        'trained',
        'mean over frames, F·W',
        f'B × {f.integration_dim}',
    )
    canvas.box(
        middle[0],
        596,
        middle[1],
        64,
        'trained',
        f'adaptive pooling, {f.pooling} blocks',
        'a query per frame, then one per clip',
        f'B × {f.integration_dim}',
    )
    canvas.box(
        right[0],
        596,
        right[1],
        64,
        'frozen',
        'CLIP text tower',
        f'{f.num_classes} class names, once',
        'before training',
    )
    canvas.box(middle[0], 694, middle[1], 50, 'trained', 'v = LN(sum) · P', f'B × {f.embed_dim}')
    canvas.arrow((centre[1], 660), (centre[1], 694))
    canvas.arrow((centre[0], 660), (centre[0], 719), (middle[0], 719))
    canvas.box(
        middle[0],
        778,
        middle[1],
        50,
        'plain',
        'cosine × exp(logit scale)',
        f'logits B × {f.num_classes}',
    )
    canvas.arrow((centre[1], 744), (centre[1], 778))
    canvas.arrow((centre[2], 660), (centre[2], 803), (edge, 803), kind='frozen')
    canvas.text(centre[2] + 10, 736, f'{f.num_classes} × {f.embed_dim}', 12, DIM, anchor='start')
    return canvas.render(title)


def _ordinal(number: int) -> str:
    return {1: 'single', 2: '2nd', 3: '3rd'}.get(number, f'{number}th')


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m tools.draw_architecture',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--out', type=Path, default=DEFAULT_OUT, metavar='FILE')
    parser.add_argument(
        '--variant', default='b16_8+16f_k400', help='row of configs/dist.py (default %(default)s)'
    )
    arguments = parser.parse_args(argv)
    try:
        picture = draw(collect(arguments.variant))
    except ValueError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_bytes(picture.encode())
    print(arguments.out)
    return 0


if __name__ == '__main__':
    sys.exit(main())
