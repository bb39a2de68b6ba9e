"""Measures the input pipeline in clips per second, beside what published code does.

  python -m tools.benchmark_input
  python -m tools.benchmark_input --json figures.json --plot figures.png
  python -m tools.benchmark_input --list k400/train.txt --root /data/k400
  python -m tools.benchmark_input --quick
  python -m tools.benchmark_input --images
  python -m tools.benchmark_input --images --list imagenet/train

All pipelines read the same videos and the same frames in the same run, in turns, on one thread,
with the training recipe of DiST B/16 8+16. Their figures are clips per second of CPU time, which is
clips per second and core. The published style decodes every frame with PyAV, converts all of them
to RGB and transforms the chosen ones in float32. Scaling over processes and threads is wall clock:
run on an idle machine. decord comes with the benchmark extra, torchcodec with an extra of its own
name and FFmpeg's shared libraries; without them their rows are left out.

With --images: JPEG pictures of 500 x 375 and 110 kB, or those of a list, with the recipe of STS on
ImageNet, beside Pillow and numpy in float32 as torchvision and timm do, on the same draws.
"""

import argparse
import collections
import dataclasses
import functools
import importlib.util
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import cv2
import jax
import numpy as np
from rich.progress import Progress
from rich.table import Table

from dist_jax.configs import base, dist
from dist_jax.configs.inputs import INPUTS
from dist_jax.models import clip, sts
from dist_jax.recipe import train_reader
from input_pipeline import sampling
from input_pipeline.batches import Readers
from input_pipeline.decode import VideoReader
from input_pipeline.encode import transcode
from input_pipeline.escape import Console
from input_pipeline.pipeline import TrainReader, record_rng, train_batches
from input_pipeline.randaugment import RandAugment
from input_pipeline.sources import open_source
from input_pipeline.transforms import RandomResizedCrop, apply
from input_pipeline.video_list import Record, VideoList
from tools.benchmarking import images

try:
    import decord
except ImportError:
    decord = None
# Imported where it is used: reader processes, which import this module, do without torch.
TORCHCODEC = importlib.util.find_spec('torchcodec') is not None

WIDTH, HEIGHT, FPS = 340, 256, 30
CONFIG = 'b16_8+16f_k400'
# What `transcode` makes of the files: short side 256, and key frame interval, crf, codec.
TRANSCODED = {
    'MPEG-4': (8, 3, 'mpeg4'),
    'GOP 8': (8, 23, 'h264'),
    'GOP 16': (16, 23, 'h264'),
    'JPEG': (1, 4, 'jpeg'),
}
DEFAULT = 'MPEG-4'  # the one that "transcoded" means in the figures, and that others read too
# A Cloud TPU v4 host, and what the compiled step of DiST B/16 8+16 asks (docs/performance.md).
HOST_CPUS, HOST_CHIPS, CLIPS_PER_CHIP = 240, 4, 180
SEEK_MODES = ('exact', 'approximate')  # of torchcodec
MEMORY_BATCH = 2  # clips of a batch while memory is watched


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    videos: int
    seconds: int  # of a video
    repeats: int  # draws of each video
    clips: int  # of a scaling run
    runs: int  # scaling runs of a kind, the best counts
    batches: int  # while memory is watched
    records: int  # of a long list


FULL = Sizes(videos=8, seconds=10, repeats=4, clips=160, runs=5, batches=2000, records=658_340)
QUICK = Sizes(videos=2, seconds=2, repeats=1, clips=16, runs=1, batches=40, records=5000)


def write_video(path: Path, seed: int, seconds: int = 10) -> None:
    """Writes a camera drifting over a noise landscape with sensor noise: H.264, GOP 250."""
    rng = np.random.default_rng(seed)
    length = FPS * seconds
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


# The pipelines: (path, rng, recipe) -> clip.


def draw_frames(total: int, rng: np.random.Generator, recipe: TrainReader) -> np.ndarray:
    """The frames that the recipe draws first; it cuts the whole video in parts."""
    choose = sampling.PROTOCOLS[recipe.sampling].train
    return choose(total, recipe.num_frames, rng, recipe.interval, sampling.REFERENCE_FPS)


def read_ours(path: str, rng: np.random.Generator, recipe: TrainReader) -> np.ndarray:
    """(T, H, W, 3) uint8."""
    return recipe.read(Record(path, 0, ''), rng)[0][0]


def read_decord(path: str, rng: np.random.Generator, recipe: TrainReader) -> np.ndarray:
    """decord on one thread, by its own choice of how to get to the frames; our transforms."""
    video = decord.VideoReader(path, num_threads=1)
    frames = video.get_batch(draw_frames(len(video), rng, recipe)).asnumpy()
    return apply(recipe.transforms, frames, 0, rng.spawn(1)[0])[0]


def open_torchcodec(path: str, seek_mode: str) -> Any:
    """torchcodec on one thread; 'exact' looks at all packets first, 'approximate' at the header."""
    import torch
    from torchcodec.decoders import VideoDecoder

    torch.set_num_threads(1)
    return VideoDecoder(path, dimension_order='NHWC', num_ffmpeg_threads=1, seek_mode=seek_mode)


def read_torchcodec(
    path: str, rng: np.random.Generator, recipe: TrainReader, seek_mode: str
) -> np.ndarray:
    """torchcodec on one thread, by its own choice of how to get to the frames; our transforms."""
    video = open_torchcodec(path, seek_mode)
    frames = video.get_frames_at(draw_frames(len(video), rng, recipe).tolist()).data.numpy()
    return apply(recipe.transforms, frames, 0, rng.spawn(1)[0])[0]


@functools.cache
def num_frames(path: str) -> int:
    """Frames of a video; known before anything is measured."""
    with VideoReader(path) as video:
        return video.num_frames


def decode_all(path: str, wanted: np.ndarray) -> np.ndarray:
    """Decodes and converts every frame of a video, (T, h, w, 3) uint8 of them are kept.

    Published code keeps all of them until it picks; that costs up to as much again, by how dear
    fresh memory is on the machine.
    """
    kept = {}
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = 'NONE'
        for number, frame in enumerate(container.decode(stream)):
            picture = frame.to_ndarray(format='rgb24', threads=1)
            if number in wanted:
                kept[number] = picture
    return np.stack([kept[number] for number in wanted])


def read_published_style(path: str, rng: np.random.Generator, recipe: TrainReader) -> np.ndarray:
    """Everything decoded, then crop, flip, grey and normalisation in float32: (T, H, W, 3)."""
    frames = decode_all(path, draw_frames(num_frames(path), rng, recipe)).astype(np.float32) / 255
    draws = rng.spawn(1)[0]
    crop = next(t for t in recipe.transforms if isinstance(t, RandomResizedCrop))
    top, left, height, width = crop.draw_box(*frames.shape[1:3], draws)
    size = (recipe.image_size, recipe.image_size)
    boxes = frames[:, top : top + height, left : left + width]
    video = np.stack([cv2.resize(box, size, interpolation=cv2.INTER_LINEAR) for box in boxes])
    if draws.random() < 0.5:
        video = np.ascontiguousarray(video[:, :, ::-1])
    if draws.random() < 0.2:
        grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in video])
        video = np.repeat(grey[..., None], 3, -1)
    mean, std = (np.array(values, np.float32) for values in (clip.PIXELS.mean, clip.PIXELS.std))
    return (video - mean) / std


def check_agreement(paths: list[str], recipe: TrainReader) -> None:
    """Raises RuntimeError unless all decoders give the same frames but for rounding."""
    for number, path in enumerate(paths):
        with VideoReader(path) as video:
            wanted = draw_frames(video.num_frames, record_rng(0, 0, number), recipe)
            found = {'ours': video.frames(wanted)}
        if decord is not None:
            found['decord'] = decord.VideoReader(path, num_threads=1).get_batch(wanted).asnumpy()
        if TORCHCODEC:
            for mode in SEEK_MODES:
                chosen = open_torchcodec(path, mode).get_frames_at(wanted.tolist())
                found[f'torchcodec, {mode}'] = chosen.data.numpy()
        for name, frames in found.items():
            if np.abs(frames.astype(np.int16) - decode_all(path, wanted)).mean() > 1:
                raise RuntimeError(f'{name} and PyAV disagree on {path}, frames {wanted}')


def measure_pipelines(
    pipelines: Mapping[str, Callable[[int, np.random.Generator], object]],
    num_files: int,
    repeats: int,
    tick: Callable[[], None],
) -> dict[str, float]:
    """Files per second of CPU time of every pipeline, which take turns at every draw."""
    seconds = dict.fromkeys(pipelines, 0.0)
    for repeat in range(-1, repeats):  # the first round brings files and code into memory
        for number in range(num_files):
            for name, read in pipelines.items():
                rng = record_rng(0, max(repeat, 0), number)
                start = time.process_time()
                read(number, rng)
                if repeat >= 0:
                    seconds[name] += time.process_time() - start
            tick()
    return {name: repeats * num_files / spent for name, spent in seconds.items()}


def video_pipelines(
    files: dict[str, list[str]], recipe: TrainReader
) -> dict[str, Callable[[int, np.random.Generator], object]]:
    """What is measured on videos: (number of the file, rng) -> a clip."""
    readers = {'ours': (read_ours, files)}
    if decord is not None:
        readers['decord'] = (read_decord, ('original', DEFAULT))
    if TORCHCODEC:
        for mode in SEEK_MODES:
            read = functools.partial(read_torchcodec, seek_mode=mode)
            readers[f'torchcodec {mode}'] = (read, files)
    pipelines = {
        'published style': (read_published_style, 'original'),
        f'published style, {DEFAULT}': (read_published_style, DEFAULT),
    }
    for name, (read, kinds) in readers.items():
        pipelines |= {f'{name}, {kind}': (read, kind) for kind in kinds}
    return {
        name: lambda number, rng, read=read, kind=kind: read(files[kind][number], rng, recipe)
        for name, (read, kind) in pipelines.items()
    }


def measure_stages(
    paths: list[str], recipe: TrainReader, repeats: int, tick: Callable[[], None]
) -> dict[str, float]:
    """Milliseconds of CPU time of a clip by stage; the transfer copies to the device of JAX."""
    spent: dict[str, float] = collections.defaultdict(float)
    clips = np.zeros((len(paths), *recipe.shape), np.uint8)
    jax.block_until_ready(jax.device_put(clips, may_alias=False))
    clock = time.process_time

    def timed(stage: str, work: Callable[[], object]) -> object:
        start = clock()
        result = work()
        spent[stage] += clock() - start
        return result

    for repeat in range(repeats):
        for number, path in enumerate(paths):
            rng = record_rng(0, repeat, number)
            content = timed('read', Path(path).read_bytes)
            video = timed('open', functools.partial(VideoReader, content))
            with video:
                indices = draw_frames(video.num_frames, rng, recipe)
                frames = timed('decode', functools.partial(video.frames, indices))
            child = rng.spawn(1)[0]
            made = timed('transform', lambda f=frames, c=child: apply(recipe.transforms, f, 0, c))
            timed('batch', lambda k=number, m=made: np.copyto(clips[k], m[0]))
            tick()
        timed('transfer', lambda: jax.block_until_ready(jax.device_put(clips, may_alias=False)))
    return {stage: 1e3 * total / repeats / len(paths) for stage, total in spent.items()}


def clip_rate(
    source: VideoList, recipe: TrainReader, workers: int, threads: int, clips: int
) -> tuple[float, float]:
    """Clips a second of wall clock, and CPU milliseconds of this process for a clip."""
    batch_size, first = 4 * recipe.repeats, 4
    batches = train_batches(
        source,
        recipe,
        batch_size=batch_size,
        seed=0,
        num_steps=first + clips // batch_size,
        readers=Readers(threads, workers, buffer_size=2),
    )
    for _ in range(first):
        next(batches)
    start, busy = time.perf_counter(), time.process_time()
    count = sum(len(batch['mask']) for batch in batches)
    spent = time.perf_counter() - start
    batches.close()
    return count / spent, 1e3 * (time.process_time() - busy) / count


def measure_scaling(
    source: VideoList, recipe: TrainReader, sizes: Sizes, tick: Callable[[], None]
) -> tuple[dict[str, float], float]:
    """Best rate of each way to read, and what a clip from processes costs the trainer (CPU ms)."""
    ways = {f'{n} workers': (n, 0) for n in (1, 2)} | {f'{n} threads': (0, n) for n in (1, 2)}
    rates = dict.fromkeys(ways, 0.0)
    cost = math.inf
    for _ in range(sizes.runs):
        for way, (workers, threads) in ways.items():
            rate, busy = clip_rate(source, recipe, workers, threads, sizes.clips)
            rates[way] = max(rates[way], rate)
            cost = min(cost, busy) if workers else cost
            tick()
    return rates, cost


def resident_mib(pids: list[int], kinds: tuple[str, ...] = ('Pss_Anon:', 'Pss_Shmem:')) -> float:
    """Resident memory of processes without the code that they map from files.

    What they share counts once: the kernel's Pss. Code would count by how many other processes of
    the machine use the same libraries at the moment.
    """
    total = 0
    for pid in pids:
        lines = Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith(kinds))
    return total / 1024


def measure_memory(
    source: VideoList, recipe: TrainReader, num_batches: int, tick: Callable[[], None]
) -> list[float]:
    """Memory of this process and two workers after every fortieth part of the batches."""
    batches = train_batches(
        source,
        recipe,
        batch_size=MEMORY_BATCH,
        seed=0,
        num_steps=2 * num_batches,  # the workers do not end before the last look
        readers=Readers(num_workers=2),
    )
    found = []
    for done in range(1, num_batches + 1):
        next(batches)
        if done % max(num_batches // 40, 1) == 0:
            found.append(resident_mib([os.getpid(), *batches.worker_pids]))
            tick()
    batches.close()
    return found


def memory_growth(found: list[float]) -> float:
    """MiB from the second fifth of the run to the last."""
    fifth = max(len(found) // 5, 1)
    return float(np.median(found[-fifth:]) - np.median(found[fifth : 2 * fifth]))


def measure_list(num_records: int) -> dict[str, dict[str, float]]:
    """What a list costs a reader process: one of a single record, and a long one.

    The files of the list are not there: what is left is starting, and finding records.
    """
    found = {}
    for name, count in {'one record': 1, 'long list': num_records}.items():
        records = [
            Record(
                f'/data/train/class {k % 710:03d}/{k:011x}_{k % 300:06d}.mp4', k % 710, f'{k:011x}'
            )
            for k in range(count)
        ]
        source = VideoList(records, tuple(map(str, range(710))))
        del records
        batches = train_batches(
            source,
            TrainReader(1, 8),
            batch_size=1,
            seed=0,
            num_steps=1000,
            readers=Readers(num_workers=1),
        )
        for _ in range(100):
            next(batches)
        (pid,) = batches.worker_pids
        times = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[11:13]
        found[name] = {
            'records': count,
            'cpu_seconds': sum(map(int, times)) / os.sysconf('SC_CLK_TCK'),
            'own_mib': resident_mib([pid], ('Pss_Anon:',)),
            'shared_mib': resident_mib([pid], ('Pss_Shmem:',)),
        }
        batches.close()
    return found


def quality(paths: list[str], originals: list[str]) -> dict[str, float]:
    """Kilobytes of a video, and mean PSNR against the original in dB."""
    errors = []
    for path, original in zip(paths, originals):
        with VideoReader(path) as video, VideoReader(original) as other:
            wanted = np.arange(0, video.num_frames, 5)
            difference = video.frames(wanted).astype(np.float32) - other.frames(wanted)
        errors.append(10 * np.log10(255**2 / np.mean(difference**2)))
    kilobytes = np.mean([os.path.getsize(path) for path in paths]) / 1e3
    return {'kilobytes': float(kilobytes), 'psnr_db': float(np.mean(errors))}


def host_needs(clips_per_core: float, scaling: float, trainer_ms: float) -> dict[str, float]:
    """What feeding a v4 host takes, if its cores are like this one.

    Two of its CPUs are threads of one core; the low figure takes them for half a core each.
    """
    needed = HOST_CHIPS * CLIPS_PER_CHIP
    workers = needed / (clips_per_core * scaling / 2)
    return {
        'needed_clips_per_s': needed,
        'workers': math.ceil(workers),
        'workers_at_half_speed': math.ceil(2 * workers),
        'cpus': HOST_CPUS,
        'trainer_cores': needed * trainer_ms / 1e3,
    }


def find_files(
    arguments: argparse.Namespace, count: int, write: Callable[[int], Path]
) -> Iterator[str]:
    """Paths of the original files: those of the list, spread over it, or generated."""
    if arguments.list:
        source = open_source(arguments.list, root=arguments.root)
        numbers = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)
        yield from (source[k].path for k in numbers.tolist())
        return
    yield from (str(write(k)) for k in range(count))


def start_figures() -> dict:
    """The machine, and what else it does."""
    load = os.getloadavg()
    return {'machine': platform.processor(), 'cpus': os.cpu_count(), 'load_before': load}


def measure(
    arguments: argparse.Namespace, sizes: Sizes, ticker: Callable[[str, int], Callable[[], None]]
) -> dict:
    """All figures of videos."""
    recipe = train_reader(dist.get_config(CONFIG), clip.PIXELS)
    figures = start_figures()

    with tempfile.TemporaryDirectory() as folder:
        tick = ticker('writing videos', sizes.videos)
        files: dict[str, list[str]] = collections.defaultdict(list)

        def write(number: int) -> Path:
            path = Path(folder) / f'original_{number}.mp4'
            write_video(path, number, sizes.seconds)
            return path

        for number, path in enumerate(find_files(arguments, sizes.videos, write)):
            files['original'].append(path)
            for kind, (interval, crf, codec) in TRANSCODED.items():
                name = Path(folder) / f'{kind}_{number}.mp4'
                name.write_bytes(transcode(path, HEIGHT, interval, crf, codec))
                files[kind].append(str(name))
            tick()
        originals, num_videos = files['original'], len(files['original'])
        for paths in files.values():
            check_agreement(paths, recipe)
        figures['files'] = {
            kind: quality(files[kind], originals) for kind in files if kind != 'original'
        }
        figures['files']['original'] = {
            'kilobytes': np.mean([os.path.getsize(path) for path in originals]) / 1e3
        }

        rounds = num_videos * (sizes.repeats + 1)
        rates = measure_pipelines(
            video_pipelines(files, recipe), num_videos, sizes.repeats, ticker('pipelines', rounds)
        )
        rounds = num_videos * sizes.repeats * len(files)
        tick = ticker('stages', rounds)
        figures['stage_ms'] = {
            kind: measure_stages(paths, recipe, sizes.repeats, tick)
            for kind, paths in files.items()
        }
        sources = {
            kind: VideoList([Record(path, 0, path) for path in files[kind]], ('0',))
            for kind in ('original', DEFAULT)
        }
        figures['scaling'] = {}
        tick = ticker('workers and threads', 4 * sizes.runs * len(sources))
        for kind, source in sources.items():
            wall, trainer_ms = measure_scaling(source, recipe, sizes, tick)
            figures['scaling'][kind] = wall | {'trainer_ms_per_clip': trainer_ms}
        found = measure_memory(sources[DEFAULT], recipe, sizes.batches, ticker('memory', 40))
    wall = figures['scaling']['original']
    figures |= {
        'clips_per_s': rates,
        'frames_per_s': {name: recipe.num_frames * rate for name, rate in rates.items()},
        'published_style_clips_per_s': rates['published style'],
        'ours_original_clips_per_s': rates['ours, original'],
        'ours_transcoded_clips_per_s': rates[f'ours, {DEFAULT}'],
        'original_ratio': rates['ours, original'] / rates['published style'],
        'transcoded_ratio': rates[f'ours, {DEFAULT}'] / rates['published style'],
        'two_worker_scaling': wall['2 workers'] / wall['1 workers'],
        'two_thread_scaling': wall['2 threads'] / wall['1 threads'],
        'rss_mib': found,
        'rss_growth_mib': memory_growth(found),
        'memory_batches': sizes.batches,
        'list': measure_list(sizes.records),
        'load_after': os.getloadavg(),
    }
    figures['v4_host'] = {
        kind: host_needs(
            rates[f'ours, {kind}'],
            min(figures['two_worker_scaling'], 2.0),
            figures['scaling'][DEFAULT]['trainer_ms_per_clip'],
        )
        for kind in ('original', *TRANSCODED)
    }
    return figures


def image_pipelines(
    paths: list[str], recipe: TrainReader
) -> dict[str, tuple[int, Callable[[int, np.random.Generator], object]]]:
    """What is measured on pictures: clips of a read, and (number of the file, rng) -> clips."""
    plain = tuple(t for t in recipe.transforms if not isinstance(t, RandAugment))
    one = dataclasses.replace(recipe, repeats=1)
    made = {
        'Pillow, float32': (images.read_with_pillow, one),
        'ours': (read_ours, recipe),
        'ours, one clip a picture': (read_ours, one),
        'ours, one clip, by FFmpeg': (read_ours, dataclasses.replace(one, jpeg_decoder='ffmpeg')),
        'Pillow, float32, no RandAugment': (
            images.read_with_pillow,
            dataclasses.replace(one, transforms=plain),
        ),
        'ours, no RandAugment': (read_ours, dataclasses.replace(recipe, transforms=plain)),
    }
    return {
        name: (
            reader.repeats,
            lambda number, rng, read=read, reader=reader: read(paths[number], rng, reader),
        )
        for name, (read, reader) in made.items()
    }


def check_pictures(paths: list[str], recipe: TrainReader) -> None:
    """Raises RuntimeError unless both pipelines make the same pixels, but for RandAugment."""
    plain = tuple(t for t in recipe.transforms if not isinstance(t, RandAugment))
    reader = dataclasses.replace(recipe, transforms=plain, repeats=1)
    for number, path in enumerate(paths):
        theirs = images.augment_with_pillow(path, record_rng(0, 0, number).spawn(1)[0], reader)
        if not np.array_equal(read_ours(path, record_rng(0, 0, number), reader)[0], theirs):
            raise RuntimeError(f'Pillow and this pipeline make other pixels of {path}')


def measure_images(
    arguments: argparse.Namespace, sizes: Sizes, ticker: Callable[[str, int], Callable[[], None]]
) -> dict:
    """All figures of pictures."""
    config = base.get_config()
    config.update_from_flattened_dict(INPUTS['sts_imagenet'] | {'data.name': 'imagenet1k'})
    recipe = train_reader(config, sts.PIXELS)
    figures = start_figures()
    with tempfile.TemporaryDirectory() as folder:

        def write(number: int) -> Path:
            path = Path(folder) / f'{number}.JPEG'
            images.write_picture(path, number)
            return path

        paths = list(find_files(arguments, 2 * sizes.videos, write))
        if not arguments.list:  # lists may hold pictures that lie on their side
            check_pictures(paths, recipe)
        figures['kilobytes'] = np.mean([os.path.getsize(path) for path in paths]) / 1e3
        made = image_pipelines(paths, recipe)
        repeats = 4 * sizes.repeats
        rates = measure_pipelines(
            {name: read for name, (_, read) in made.items()},
            len(paths),
            repeats,
            ticker('pipelines', len(paths) * (repeats + 1)),
        )
        rates = {name: made[name][0] * rate for name, rate in rates.items()}
        source = VideoList([Record(path, 0, path) for path in paths], ('0',))
        longer = dataclasses.replace(sizes, clips=8 * sizes.clips)  # they are cheap
        tick = ticker('workers and threads', 4 * sizes.runs)
        wall, trainer_ms = measure_scaling(source, recipe, longer, tick)
    theirs, plain = rates['Pillow, float32'], rates['Pillow, float32, no RandAugment']
    return figures | {
        'clips_per_s': rates,
        'ratio': rates['ours'] / theirs,
        'one_clip_ratio': rates['ours, one clip a picture'] / theirs,
        'no_rand_augment_ratio': rates['ours, no RandAugment'] / plain,
        'scaling': {'pictures': wall | {'trainer_ms_per_clip': trainer_ms}},
        'two_worker_scaling': wall['2 workers'] / wall['1 workers'],
        'two_thread_scaling': wall['2 threads'] / wall['1 threads'],
        'load_after': os.getloadavg(),
    }


def show_images(figures: dict, console: Console) -> None:
    """Prints the figures of pictures as tables."""
    rates = figures['clips_per_s']
    plain = rates['Pillow, float32, no RandAugment']
    title = f'pictures of {figures["kilobytes"]:.0f} kB, one core'
    table = Table('pipeline', 'clips/s', 'ms', 'of Pillow, float32', title=title)
    for name, rate in rates.items():
        theirs = plain if name.endswith('no RandAugment') else rates['Pillow, float32']
        table.add_row(name, f'{rate:.0f}', f'{1e3 / rate:.2f}', f'{rate / theirs:.2f}x')
    console.print(table)
    show_scaling(figures, console)


def show_scaling(figures: dict, console: Console) -> None:
    """Prints what processes and threads bring."""
    ways = [f'{n} {kind}' for kind in ('workers', 'threads') for n in (1, 2)]
    table = Table('file', *ways, 'trainer ms', title='clips/s, wall clock')
    for kind, row in figures['scaling'].items():
        table.add_row(
            kind, *(f'{row[way]:.1f}' for way in ways), f'{row["trainer_ms_per_clip"]:.2f}'
        )
    console.print(table)
    console.print(
        f'2 workers give {figures["two_worker_scaling"]:.2f}x of one, 2 threads '
        f'{figures["two_thread_scaling"]:.2f}x of one (load average '
        f'{figures["load_before"][0]:.1f} before, {figures["load_after"][0]:.1f} after).'
    )


def show(figures: dict, console: Console) -> None:
    """Prints the figures as tables."""
    published = figures['published_style_clips_per_s']
    table = Table('pipeline, one core', 'clips/s', 'frames/s', 'of published style')
    for name, rate in figures['clips_per_s'].items():
        frames = figures['frames_per_s'][name]
        table.add_row(name, f'{rate:.1f}', f'{frames:.0f}', f'{rate / published:.2f}x')
    console.print(table)

    stages = list(next(iter(figures['stage_ms'].values())))
    table = Table('file', *stages, 'kB', 'PSNR', title='CPU ms of a clip by stage')
    for kind, row in figures['stage_ms'].items():
        file = figures['files'][kind]
        psnr = f'{file["psnr_db"]:.1f}' if 'psnr_db' in file else ''
        cells = [f'{row[stage]:.2f}' for stage in stages]
        table.add_row(kind, *cells, f'{file["kilobytes"]:.0f}', psnr)
    console.print(table)

    show_scaling(figures, console)
    console.print(
        f'Memory grew by {figures["rss_growth_mib"]:.1f} MiB over '
        f'{figures["memory_batches"]} batches, from {figures["rss_mib"][0]:.0f} MiB.',
    )
    short, long = figures['list'].values()
    console.print(
        f'A list of {long["records"]} records costs a reader process '
        f'{long["cpu_seconds"] - short["cpu_seconds"]:.2f} s of CPU and '
        f'{long["own_mib"] - short["own_mib"]:.1f} MiB; all share '
        f'{long["shared_mib"]:.0f} MiB or more.',
        highlight=False,
    )
    for kind, host in figures['v4_host'].items():
        console.print(
            f'a v4 host needs {host["needed_clips_per_s"]} clips/s: {kind}, '
            f'{host["workers"]} workers on cores like this, {host["workers_at_half_speed"]} on '
            f'half as fast ones; it has {host["cpus"]} CPUs',
        )


def plot(figures: dict, path: str) -> None:
    """Draws rates and stages as bars into a PNG."""
    from matplotlib.figure import Figure

    rates = dict(sorted(figures['clips_per_s'].items(), key=lambda item: item[1]))
    figure = Figure(figsize=(11, 1.2 + 0.25 * len(rates)), layout='constrained')
    left, right = figure.subplots(1, 2)
    colours = ['#3b6fb6' if name.startswith('ours') else '#b0b0b0' for name in rates]
    bars = left.barh(list(rates), list(rates.values()), color=colours)
    left.bar_label(bars, fmt='%.0f', padding=3)
    left.set_xlabel('clips per second and core')
    left.set_xlim(0, 1.12 * max(rates.values()))
    left.set_title('16 frames, training recipe of DiST', fontsize=10)
    kinds = list(figures['stage_ms'])[::-1]
    start = np.zeros(len(kinds))
    for stage in figures['stage_ms'][kinds[0]]:
        width = np.array([figures['stage_ms'][kind][stage] for kind in kinds])
        right.barh(kinds, width, left=start, label=stage)
        start += width
    right.set_xlabel('CPU milliseconds of a clip')
    right.set_title('stages of our pipeline', fontsize=10)
    right.legend(fontsize=8, loc='lower left', bbox_to_anchor=(0.36, 0.0), ncols=2)
    for axes in (left, right):
        axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m tools.benchmark_input',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--images', action='store_true', help='measure pictures, not videos')
    parser.add_argument('--list', help='measure files of this list (default: generate some)')
    parser.add_argument('--root', default='', help='folder the paths of the list start from')
    parser.add_argument('--quick', action='store_true', help='seconds instead of minutes')
    parser.add_argument('--json', metavar='FILE', help='also write the figures there')
    parser.add_argument('--plot', metavar='FILE', help='also draw them, as PNG (of videos)')
    arguments = parser.parse_args(argv)
    if arguments.images and arguments.plot:
        parser.error('--plot is for videos')
    run, report = (measure_images, show_images) if arguments.images else (measure, show)
    console = Console()
    try:
        # Drawn between measurements, not by a thread that would be measured too.
        with Progress(console=console, auto_refresh=False) as progress:

            def ticker(what: str, total: int) -> Callable[[], None]:
                task = progress.add_task(what, total=total)
                return lambda: progress.update(task, advance=1, refresh=True)

            figures = run(arguments, QUICK if arguments.quick else FULL, ticker)
    except ValueError as error:
        console.print(f'error: {error}', style='red', soft_wrap=True)
        return 2
    report(figures, console)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + '\n', encoding='utf-8')
    if arguments.plot:
        plot(figures, arguments.plot)
    return 0


if __name__ == '__main__':
    sys.exit(main())
