"""Where a trained model looked: shares of attention, and pictures of them.

Weights are shown as multiples of an even share, 1 / (t * g * g): a patch at 1 got what it would get
if the query looked everywhere alike. Up to there a picture is greyish; above, it glows. All frames
of a view have one scale.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import cv2
import jax
import numpy as np
from jax.sharding import Mesh

from dist_jax import contact_sheet, drawing
from dist_jax.models.api import Model, Tree
from dist_jax.step import clips_of_views, jit_on_rows

if TYPE_CHECKING:
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from PIL.Image import Image

PathLike = str | os.PathLike[str]

LEAST_TOP = 2.0  # end of the scale at least, so that near-even attention looks even
ANIMATION_SIDE = 288  # pixels of the longer side of a frame in an animation, about
FRAMES_PER_SECOND = 4


def make_attention_step(
    model: Model, mesh: Mesh, variables: Tree | None = None, frozen: Tree | None = None
) -> Callable[[Tree, Tree, Tree], jax.Array]:
    """The jitted maps: (variables, frozen, batch) -> (B, V, t, g, g).

    The batch has `video` (B, V, T, H, W, 3) uint8.

    Args:
      model: of a family and with options that have `attention`.
      mesh: the devices; B is a multiple of the parts that it splits a batch into.
      variables: leaves with the shardings of this argument; None: every device holds all.
      frozen: likewise.
    """

    def step(variables: Tree, frozen: Tree, batch: Tree) -> jax.Array:
        video = batch['video']
        inputs = model.inputs(frozen, {'video': clips_of_views(model, video)})
        maps = model.attention(variables, inputs)
        return maps.reshape(*video.shape[:2], *maps.shape[1:])

    return jit_on_rows(step, mesh, variables, frozen)


def seen_frames(num_frames: int, num_maps: int) -> np.ndarray:
    """Which of the frames of a clip the maps belong to: int (t,), see `Model.attention`."""
    return np.arange(num_maps) * num_frames // num_maps


def overlay(frames: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Paints attention over frames, with one scale for all.

    Args:
      frames: (t, H, W, 3) uint8 RGB.
      maps: (t, g, g), shares of the attention.

    Returns:
      (t, H, W, 3) uint8 RGB.
    """
    multiples, top = maps * maps.size, _top(maps)
    height, width = frames.shape[1:3]
    painted = []
    for frame, multiple in zip(frames, multiples):
        smooth = cv2.resize(
            multiple.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC
        )
        painted.append(_paint(frame, (smooth - 1) / (top - 1)))
    return np.stack(painted)


def _top(maps: np.ndarray) -> float:
    """End of the scale, in even shares."""
    return max(float(maps.max()) * maps.size, LEAST_TOP)


def _paint(pixels: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 under a glow of strength (H, W); 0 and less is none, 1 and more is full."""
    import matplotlib

    strength = strength.clip(0, 1)
    grey = pixels.mean(-1, keepdims=True)
    dull = 0.7 * (0.15 * pixels + 0.85 * grey)
    glow = 255 * matplotlib.colormaps['inferno'](0.35 + 0.6 * strength)[..., :3]
    alpha = 0.9 * np.sqrt(strength)[..., None]
    return (dull + alpha * (glow - dull)).round().clip(0, 255).astype(np.uint8)


def write_sheet(path: PathLike, video: np.ndarray, maps: np.ndarray, name: str) -> None:
    """Writes a PNG of the frames that the backbone saw, with the attention over them.

    Args:
      path: file to write.
      video: (T, H, W, 3) uint8 RGB, one view.
      maps: (t, g, g), its shares of the attention.
      name: of the video, for the title.
    """
    with drawing.theme():
        _sheet(video, maps, name).savefig(path, dpi=110)


def _sheet(video: np.ndarray, maps: np.ndarray, name: str) -> Figure:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    numbers = seen_frames(len(video), len(maps))
    painted = overlay(video[numbers], maps)
    shown = contact_sheet.choose(len(maps))
    heights = (contact_sheet.height(len(shown), captions=True), 0.6)  # inches
    figure = Figure(figsize=(contact_sheet.WIDTH, sum(heights)), layout='constrained')
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.03, wspace=0.0, hspace=0.0)
    frames_part, scale_part = figure.subfigures(2, 1, height_ratios=heights)
    title = f'{name}: attention over {contact_sheet.count(len(shown), len(video))}'
    rest = 1 - float(maps.sum())
    if rest > 5e-4:
        title += f'; {_percent(rest)} of it on class tokens'
    captions = [_percent(share) for share in maps[shown].sum((1, 2))]
    contact_sheet.draw(frames_part, title, painted[shown], numbers[shown], captions)
    top = _top(maps)
    axis = scale_part.subplots()
    scale = ScalarMappable(Normalize(0, top), _legend_colours(top))
    scale_part.colorbar(scale, cax=axis, orientation='horizontal').set_label(
        'attention on a patch; 1 is an even share, as of a query that looks everywhere alike '
        '(under a frame: its sum)',
        fontsize=7.5,
    )
    axis.tick_params(labelsize=7.5)
    return figure


def _legend_colours(top: float) -> ListedColormap:
    """What `_paint` makes of a middle grey, from 0 to `top` even shares."""
    from matplotlib.colors import ListedColormap

    strength = (np.linspace(0, top, 256) - 1) / (top - 1)
    grey = np.full((1, 256, 3), 128, np.uint8)
    return ListedColormap(_paint(grey, strength[None])[0] / 255)


def write_animation(path: PathLike, video: np.ndarray, maps: np.ndarray) -> None:
    """Writes a GIF that repeats: each frame that the backbone saw, plain and with the attention.

    Args: as for `write_sheet`.
    """
    numbers = seen_frames(len(video), len(maps))
    scale = max(1, round(ANIMATION_SIDE / max(video.shape[1:3])))
    frames = np.stack(
        [
            cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
            for frame in video[numbers]
        ]
    )
    pictures = [
        _side_by_side(
            plain, painted, f'frame {number} of {len(video)}', f'{_percent(share)} of the attention'
        )
        for plain, painted, number, share in zip(
            frames, overlay(frames, maps), numbers, maps.sum((1, 2))
        )
    ]
    pictures[0].save(
        path,
        save_all=True,
        append_images=pictures[1:],
        duration=1000 // FRAMES_PER_SECOND,
        loop=0,
    )


def _side_by_side(plain: np.ndarray, painted: np.ndarray, left: str, right: str) -> Image:
    """Two frames (H, W, 3) with a line of text under each."""
    from PIL import Image, ImageDraw

    gap, foot = 6, 22
    height, width = plain.shape[:2]
    ink, paper = drawing.LIGHT['ink'], drawing.LIGHT['paper']
    picture = Image.new('RGB', (2 * width + gap, height + foot), paper)
    picture.paste(Image.fromarray(plain), (0, 0))
    picture.paste(Image.fromarray(painted), (width + gap, 0))
    font = drawing.font(13)
    draw = ImageDraw.Draw(picture)
    draw.text((2, height + 3), left, fill=ink, font=font)
    draw.text((width + gap + 2, height + 3), right, fill=ink, font=font)
    return picture


def _percent(share: float) -> str:
    return f'{100 * share:.1f} %'
