"""Measures decoding and the training pipeline in clips per second, beside decord and plain PyAV.

  python -m tools.benchmark_input
  python -m tools.benchmark_input --clips 8 --repeats 2 --json figures.json
  python -m tools.benchmark_input --list k400/train.txt --root /data/k400

All decoders read the same files and the same frames in the same run, in turns, on one thread;
figures are clips per second of CPU time, which is clips per second and core. The pipeline figures
are wall clock: run on an idle machine. decord comes with the benchmark extra; without it its row is
left out.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from input_pipeline import sampling
from input_pipeline.decode import VideoReader
from input_pipeline.pipeline import TrainReader, train_batches
from input_pipeline.sources import open_source
from input_pipeline.transforms import Flip, Grayscale, RandomResizedCrop
from input_pipeline.video_list import Record, VideoList

try:
    import decord
except ImportError:
    decord = None

WIDTH, HEIGHT, FPS, SECONDS = 340, 256, 30, 10


def write_video(path: Path, seed: int) -> None:
    """Writes 10 s of a camera drifting over a noise landscape with sensor noise: H.264, 250 GOP."""
    rng = np.random.default_rng(seed)
    length = FPS * SECONDS
    noise = rng.integers(0, 256, (50, 90, 3), dtype=np.uint8)
    scene = cv2.resize(noise, (WIDTH + 2 * length, HEIGHT + 100), interpolation=cv2.INTER_CUBIC)
    grain = rng.normal(0, 4, (4, HEIGHT, WIDTH, 3))
    with av.open(str(path), 'w', format='mp4') as container:
        stream = container.add_stream('libx264', rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, 'yuv420p'
        stream.options = {'preset': 'fast', 'crf': '23'}
        for k in range(length):
            top = int(50 + 49 * np.sin(k / 40))
            view = scene[top : top + HEIGHT, 2 * k : 2 * k + WIDTH] + grain[k % 4]
            picture = np.clip(view, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format='rgb24')))
        container.mux(stream.encode(None))


def read_ours(path: str, indices: np.ndarray) -> np.ndarray:
    """The frames through `input_pipeline.decode`."""
    with VideoReader(path) as video:
        return video.frames(indices)


def read_decord(path: str, indices: np.ndarray) -> np.ndarray:
    """The frames through decord, one thread, its own choice of how to get there."""
    return decord.VideoReader(path, num_threads=1).get_batch(indices).asnumpy()


def read_all(path: str, indices: np.ndarray) -> np.ndarray:
    """Decodes and converts every frame with PyAV, then picks."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = 'NONE'
        return np.stack(
            [frame.to_ndarray(format='rgb24', threads=1) for frame in container.decode(stream)]
        )[indices]


def measure_decoders(source: VideoList, num_frames: int, repeats: int) -> dict[str, float]:
    """Clips per second of CPU time for each decoder, on a training draw of each video.

    Raises:
      RuntimeError: if two decoders disagree by more than rounding.
    """
    readers: dict[str, Callable] = {'ours': read_ours, 'pyav_all': read_all}
    if decord is not None:
        readers['decord'] = read_decord
    seconds = dict.fromkeys(readers, 0.0)
    for repeat in track(range(repeats), 'decoders'):
        for number in range(len(source)):
            path = source[number].path
            with VideoReader(path) as video:
                total = video.num_frames
            rng = np.random.default_rng([repeat, number])
            indices = sampling.segment_train(total, num_frames, rng)
            clips = {}
            for name, read in readers.items():
                start = time.process_time()
                clips[name] = read(path, indices)
                seconds[name] += time.process_time() - start
            for name, clip in clips.items():
                if np.abs(clip.astype(np.int16) - clips['ours']).mean() > 1:
                    raise RuntimeError(f'{name} and ours disagree on {path}, frames {indices}')
    return {name: repeats * len(source) / spent for name, spent in seconds.items()}


def measure_pipeline(source: VideoList, num_frames: int, threads: int, steps: int) -> float:
    """Clips per second of the training pipeline with all transforms, wall clock."""
    transforms = (RandomResizedCrop(224), Flip(), Grayscale())
    reader = TrainReader(num_frames, 224, transforms=transforms)
    for num_steps in (2, steps):  # the first run brings files into memory
        start = time.perf_counter()
        batches = train_batches(
            source, reader, batch_size=4, seed=0, num_steps=num_steps, num_threads=threads
        )
        clips = sum(int(batch['mask'].sum()) for batch in batches)
        batches.close()
    return clips / (time.perf_counter() - start)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m tools.benchmark_input',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--list', help='measure these videos (default: generate some)')
    parser.add_argument('--root', default='', help='folder the paths of the list start from')
    parser.add_argument('--clips', type=int, default=8, help='videos (default %(default)s)')
    parser.add_argument('--frames', type=int, default=16, help='per clip (default %(default)s)')
    parser.add_argument('--repeats', type=int, default=3, help='draws of each video')
    parser.add_argument('--steps', type=int, default=24, help='batches of 4 for the pipeline')
    parser.add_argument('--json', metavar='FILE', help='also write the figures there')
    arguments = parser.parse_args(argv)
    console = Console()

    with tempfile.TemporaryDirectory() as folder:
        if arguments.list:
            source = open_source(arguments.list, root=arguments.root)
            records = [source[k] for k in range(min(arguments.clips, len(source)))]
        else:
            records = [
                Record(f'{folder}/{k}.mp4', 0, str(k)) for k in range(max(arguments.clips, 1))
            ]
            for k, record in enumerate(track(records, 'writing videos')):
                write_video(Path(record.path), k)
        source = VideoList(records, ('0',))
        decoders = measure_decoders(source, arguments.frames, arguments.repeats)
        pipeline = {
            threads: measure_pipeline(source, arguments.frames, threads, arguments.steps)
            for threads in (1, 2)
        }

    table = Table('what', 'clips/s', 'ratio', title=f'{arguments.frames} frames per clip')
    labels = {'ours': 'decode, ours', 'decord': 'decode, decord', 'pyav_all': 'decode all, PyAV'}
    for name, label in labels.items():
        if name in decoders:
            ratio = f'{decoders["ours"] / decoders[name]:.2f}x slower' if name != 'ours' else ''
            table.add_row(f'{label} (per core)', f'{decoders[name]:.1f}', ratio)
    for threads, rate in pipeline.items():
        ratio = f'{rate / pipeline[1]:.2f}x of one' if threads > 1 else ''
        table.add_row(f'train pipeline, {threads} thread(s)', f'{rate:.1f}', ratio)
    console.print(table)
    if arguments.json:
        figures = {f'{name}_clips_per_s_per_core': rate for name, rate in decoders.items()}
        figures |= {f'pipeline_{n}_threads_clips_per_s': rate for n, rate in pipeline.items()}
        figures['two_thread_scaling'] = pipeline[2] / pipeline[1]
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + '\n', encoding='utf-8')
    return 0


if __name__ == '__main__':
    sys.exit(main())
