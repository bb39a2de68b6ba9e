"""The command line of `dist_jax convert`; reading it takes neither jax nor time."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence

from dist_jax.paths import HUB
from input_pipeline import escape

PRECISIONS = ('float32', 'bfloat16', 'float16')
KINDS = (
    'dist',
    'evl',
    'side4video',
    'side4video_retrieval',
    'sts',
    'huggingface',
    'openai',
    'openclip',
    'eva',
    'eva_openclip',
)

DESCRIPTION = """\
Converts downloaded checkpoints into the form that training reads, and exports ours back.

CLIP (OpenAI, Hugging Face, OpenCLIP), EVA-02-CLIP (BAAI, OpenCLIP), DiST, EVL, Side4Video and STS
files become one orbax directory with parameters, geometry, activation and the hash of the source.
PyTorch is not needed and no code from a file is run; a file that holds more than tensors is refused
with the way out.
"""

EXAMPLES = """\
examples:
  # OpenAI's archive; activation and heads belong to it
  dist_jax convert ViT-B-16.pt clip_b16

  # of the Hugging Face Hub (hf://owner/name@revision/file), or a folder from there
  dist_jax convert hf://openai/clip-vit-base-patch16 clip_b16
  dist_jax convert clip-vit-base-patch16/ clip_b16 --precision bfloat16
  # OpenCLIP with open_clip_config.json beside the file, or with the activation said by hand
  dist_jax convert CLIP-ViT-B-16-laion2B/ clip_b16_laion
  dist_jax convert epoch_32.pt clip_b16_own --activation gelu

  # EVA-02-CLIP of the authors, or as OpenCLIP has it; 4.4 billion parameters go in half the width
  dist_jax convert EVA02_CLIP_L_psz14_s4B.pt eva02_l14
  dist_jax convert eva02_enormous_patch14_plus_clip_224/ eva02_e14_plus --precision bfloat16

  # DiST of the authors, there and back
  dist_jax convert DIST_K400_B16.pyth dist_k400
  dist_jax convert --export dist_k400 dist_k400.safetensors

  # EVL of the authors; the backbone is converted on its own
  dist_jax convert k400_vitb16_8f_dec4x768.pth evl_k400

  # Side4Video of the authors, recognition and retrieval (with its trained text tower); --backbone
  # tells whether the frozen backbone in the file is the converted one
  dist_jax convert k400_b16_8f.pt side4video_k400 --backbone clip_b16
  dist_jax convert msrvtt_b16.pt side4video_msrvtt --backbone clip_b16
  dist_jax convert --export side4video_k400 whole.safetensors --with_backbone --backbone clip_b16

  # STS of the authors, trained on images or on videos; config.init_from takes either
  dist_jax convert csn50_imagenet.pth.tar sts_csn50_imagenet
  dist_jax convert csn50_k400.pth sts_csn50_k400
  dist_jax convert --export sts_csn50_imagenet sts_csn50_imagenet.safetensors

  # a trained run under its authors' names; a CLIP of --config=fine_tune:ROW, in again as a backbone
  dist_jax convert --export runs/b16 mine.safetensors --step best
  dist_jax convert --export runs/clip4clip clip.safetensors
  dist_jax convert clip.safetensors clip_own --kind openai
"""


def parse(argv: Sequence[str]) -> argparse.Namespace | None:
    """The arguments; None, after a message on stderr, if there is no such source."""
    args = parser().parse_args(argv)
    if '://' not in args.source and not os.path.exists(os.path.expanduser(args.source)):
        text = f'error: {args.source}: no such file or folder{_hint(args.source)}'
        print(escape.lines(text), file=sys.stderr)
        return None
    return args


def _hint(source: str) -> str:
    """How to get what was named instead of a file."""
    if not re.fullmatch(r'[\w-][\w.-]*/[\w.-]+', source) or os.path.exists(source.split('/')[0]):
        return ''
    folder = source.split('/')[1]
    return (
        f'; if it is a model of the Hugging Face Hub, that is:\n  dist_jax convert {HUB}{source} '
        f"{folder.replace('-', '_')}   # after pip install 'dist_jax[hub]'"
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='dist_jax convert',
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'source', metavar='SOURCE', help='file or folder to convert, or hf://owner/name'
    )
    parser.add_argument('dest', metavar='DEST', help='directory (with --export: file) to write')
    parser.add_argument('--export', action='store_true', help='orbax -> safetensors')
    parser.add_argument(
        '--step', help="with --export of a run: a number or 'best'; the newest by default"
    )
    parser.add_argument(
        '--backbone',
        metavar='DIR',
        help='a converted backbone, to compare with the one in SOURCE, or to write beside it',
    )
    parser.add_argument(
        '--with_backbone',
        action='store_true',
        help='with --export: the frozen backbone too, as the files of the authors hold it',
    )
    parser.add_argument('--kind', default='auto', choices=('auto', *KINDS), help='naming')
    parser.add_argument(
        '--activation',
        choices=('quick_gelu', 'gelu'),
        help='OpenCLIP without open_clip_config.json: the activation of the towers',
    )
    parser.add_argument('--num_heads', type=int, metavar='N', help='heads of the image tower')
    parser.add_argument('--text_num_heads', type=int, metavar='N', help='heads of the text tower')
    parser.add_argument(
        '--precision',
        default='float32',
        choices=PRECISIONS,
        help='dtype that weights are stored in (default: float32); norms stay float32',
    )
    parser.add_argument('--name', help='name in the metadata (default: the published size)')
    parser.add_argument('--overwrite', action='store_true', help='replace DEST')
    return parser
