"""Reads damaged videos through reader processes and counts what becomes of them.

  python -m tools.fuzz_decode
  python -m tools.fuzz_decode --files 2000 --seed 1 --json fuzz.json
  python -m tools.fuzz_decode --seeds videos/ --keep crashers/

Small videos in many containers and codecs and some pictures are written (or taken from --seeds)
and damaged: flipped bits, cut ends, chunks removed, doubled or moved, sizes and counts of boxes
changed, headers put before the rest of another file; text and noise are among them. Each file is a
record of a training stream. The exit code is 0 if every record came out, in its place, read or with
its reason; files over which a process crashed or hung are kept for a look with --keep. The figures
name the most memory that a reader process had, and the longest wait for a batch.
"""

import argparse
import collections
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
from rich.progress import Progress
from rich.table import Table

from input_pipeline import decode, workers
from input_pipeline.batches import Readers
from input_pipeline.escape import Console
from input_pipeline.pipeline import TrainReader, train_batches
from input_pipeline.transforms import RandomResizedCrop
from input_pipeline.video_list import Record, VideoList

BATCH_SIZE = 8
# Names of boxes and elements whose sizes and counts are worth lying about.
BOXES = (b'ftyp', b'moov', b'mvhd', b'trak', b'tkhd', b'edts', b'elst', b'mdia', b'mdhd', b'minf')
BOXES += (b'stbl', b'stsd', b'avc1', b'avcC', b'stts', b'ctts', b'stss', b'stsc', b'stsz', b'stco')
BOXES += (b'mdat', b'moof', b'tfhd', b'trun', b'RIFF', b'avih', b'strh', b'strf', b'idx1', b'movi')
BOXES += (b'stz2', b'IHDR', b'\xff\xc0')
BOXES += (b'\x1a\x45\xdf\xa3', b'\x18\x53\x80\x67', b'\x16\x54\xae\x6b', b'\x1f\x43\xb6\x75')

# file name -> codec, options of the encoder and of the muxer.
SEEDS = {
    'long.mp4': ('libx264', {'g': '250', 'bf': '3'}, {}),
    'short.mp4': ('libx264', {'g': '8', 'bf': '0'}, {'movflags': 'faststart'}),
    'parts.mp4': ('libx264', {'g': '8'}, {'movflags': 'frag_keyframe+empty_moov'}),
    'hevc.mp4': ('libx265', {'g': '12', 'x265-params': 'log-level=none:pools=none'}, {}),
    'mpeg4.mp4': ('mpeg4', {'g': '12', 'bf': '2'}, {}),
    'jpeg.mp4': ('mjpeg', {}, {}),
    'vp9.webm': ('libvpx-vp9', {'g': '12', 'cpu-used': '8'}, {}),
    'vp8.webm': ('libvpx', {'g': '12', 'cpu-used': '8'}, {}),
    'h264.mkv': ('libx264', {'g': '12', 'bf': '2'}, {}),
    'mpeg4.avi': ('mpeg4', {'g': '12'}, {}),
    'h264.avi': ('libx264', {'g': '12', 'bf': '2'}, {}),
    'h264.ts': ('libx264', {'g': '12'}, {}),
    'mpeg2.mpg': ('mpeg2video', {'g': '12'}, {}),
}


# file name -> height and width of a picture.
PICTURES = {'picture.png': (48, 64), 'picture.jpg': (48, 64), 'strip.png': (10, 20_000)}


def write_picture(path: Path, height: int, width: int) -> None:
    """Writes smooth noise."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC))


def write_seed(path: Path, codec: str, options: dict[str, str], muxer: dict[str, str]) -> None:
    """Writes 30 small frames of drifting noise."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 24, 3), dtype=np.uint8)
    scene = cv2.resize(noise, (96 + 60, 64), interpolation=cv2.INTER_CUBIC)
    with av.open(str(path), 'w', options=muxer) as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.width, stream.height = 96, 64
        stream.pix_fmt = 'yuvj420p' if codec == 'mjpeg' else 'yuv420p'
        stream.codec_context.thread_count = 1
        for k in range(30):
            picture = np.ascontiguousarray(scene[:, 2 * k : 2 * k + 96])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format='rgb24')))
        container.mux(stream.encode(None))


# The mutations: (bytes of a file, those of another, rng) -> bytes.


def flip_bits(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """One to a hundred bits, anywhere or close to each other."""
    flipped = np.frombuffer(data, np.uint8).copy()
    start = rng.integers(len(data)) if rng.random() < 0.5 else 0
    places = rng.integers(start, min(len(data), start + 256) if start else len(data), 100)
    for place in places[: rng.integers(1, 101)]:
        flipped[place] ^= 1 << rng.integers(8)
    return flipped.tobytes()


def cut(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """The end is missing."""
    return data[: rng.integers(1, len(data))]


def _chunk(data: bytes, rng: np.random.Generator) -> tuple[int, int]:
    start = int(rng.integers(len(data)))
    return start, start + int(rng.integers(1, max(2, len(data) // 4)))


def remove(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """A part is missing."""
    start, end = _chunk(data, rng)
    return data[:start] + data[end:]


def double(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """A part comes twice."""
    start, end = _chunk(data, rng)
    return data[:end] + data[start:end] + data[end:]


def move(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """A part lies somewhere else."""
    start, end = _chunk(data, rng)
    rest, place = data[:start] + data[end:], int(rng.integers(len(data)))
    return rest[:place] + data[start:end] + rest[place:]


def lie(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Sizes before the names of boxes, or numbers behind them, are others."""
    changed = bytearray(data)
    places = [data.find(name) for name in BOXES if name in data]
    for place in rng.permutation(places)[: rng.integers(1, 4)].tolist():
        at = place - 4 if rng.random() < 0.5 else place + 4 + 4 * int(rng.integers(6))
        value = int(rng.choice([0, 1, 7, 8, 2**16, 2**31 - 1, 2**31, 2**32 - 1, len(data)]))
        if rng.random() < 0.3:
            value = int(rng.integers(2**32))
        if 0 <= at <= len(data) - 4:
            changed[at : at + 4] = value.to_bytes(4, 'big')
    return bytes(changed)


def splice(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """The beginning of one file and the rest of another."""
    end = int(rng.integers(8, min(len(data), 4096)))
    return data[:end] + other[end if rng.random() < 0.5 else 0 :]


def blank(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """A part is zeros or noise."""
    start, end = _chunk(data, rng)
    end = min(end, len(data))
    filler = rng.bytes(end - start) if rng.random() < 0.5 else bytes(end - start)
    return data[:start] + filler + data[end:]


def write_text(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """No video at all: words, a playlist or noise, perhaps after the first bytes of a video."""
    words = rng.choice(['#EXTM3U', 'ffconcat', 'version 1.0', 'file', '/etc/passwd', '\n', '<xml>'])
    text = b' '.join([str(words).encode(), rng.bytes(int(rng.integers(200)))] * 3)
    return data[: int(rng.integers(1, 64))] + text if rng.random() < 0.5 else text


MUTATIONS: dict[str, Callable[[bytes, bytes, np.random.Generator], bytes]] = {
    'flipped bits': flip_bits,
    'cut off': cut,
    'part removed': remove,
    'part doubled': double,
    'part moved': move,
    'sizes of boxes': lie,
    'spliced': splice,
    'part overwritten': blank,
    'text and noise': write_text,
}


def write_files(
    folder: Path, seeds: list[Path], count: int, seed: int
) -> tuple[list[Record], list[str]]:
    """Writes damaged files; the records and, for each, 'mutation of suffix'."""
    contents = [path.read_bytes() for path in seeds]
    records, origins = [], []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        name = list(MUTATIONS)[number % len(MUTATIONS)]
        first, second = rng.integers(len(seeds), size=2)
        path = folder / f'{number:05d}{seeds[first].suffix}'
        path.write_bytes(MUTATIONS[name](contents[first], contents[second], rng))
        records.append(Record(str(path), 0, path.name))
        origins.append(name)
    return records, origins


def fuzz(
    records: list[Record], num_workers: int, timeout: float, tick: Callable[[int], None]
) -> tuple[list[str], dict[str, float]]:
    """Reads every record once; its error ('' where it was read), and figures of all.

    Raises:
      RuntimeError: if a record did not come out in its place, or a batch is wrong.
    """
    reader = TrainReader(8, 64, transforms=(RandomResizedCrop(64),), max_pixels=2**20)
    num_steps = -(-len(records) // BATCH_SIZE)
    batches = train_batches(
        VideoList(records, ('0',)),
        reader,
        batch_size=BATCH_SIZE,
        seed=0,
        num_steps=num_steps,
        readers=Readers(num_workers=num_workers, record_timeout=timeout),
        shuffle=False,
    )
    errors = []
    figures = {'peak_mib': 0.0, 'longest_wait_s': 0.0}
    since = time.monotonic()
    for batch in batches:
        waited = time.monotonic() - since
        figures['longest_wait_s'] = max(figures['longest_wait_s'], waited)
        figures['peak_mib'] = max(figures['peak_mib'], *map(peak_mib, batches.worker_pids), 0.0)
        for error, mask, video in zip(batch['error'], batch['mask'], batch['video']):
            if bool(error) != (mask == 0) or (error and video.any()):
                raise RuntimeError(f'record {len(errors)} is both read and not: {error!r}')
            errors.append(str(error))
        tick(len(batch['error']))
        since = time.monotonic()
    if len(errors) != num_steps * BATCH_SIZE:
        raise RuntimeError(f'{len(errors)} of {num_steps * BATCH_SIZE} records came out')
    return errors[: len(records)], figures | {'restarts': batches.num_restarts}


def peak_mib(pid: int) -> float:
    """Most resident memory that a process had so far; 0 if it is gone."""
    try:
        status = Path(f'/proc/{pid}/status').read_text()
    except OSError:
        return 0.0
    return int(status.partition('VmHWM:')[2].split()[0] if 'VmHWM:' in status else 0) / 1024


def count_kinds(errors: list[str], origins: list[str]) -> dict[str, collections.Counter]:
    """Mutation -> how many were read, and how many of each kind of failure.

    Raises:
      RuntimeError: if a failure is of no known kind.
    """
    counts: dict[str, collections.Counter] = {name: collections.Counter() for name in MUTATIONS}
    for error, origin in zip(errors, origins, strict=True):
        kind = error.partition(': ')[0] or 'read'
        if kind not in ('read', *decode.KINDS, *workers.KINDS):
            raise RuntimeError(f'a failure of no known kind: {error!r}')
        counts[origin][kind] += 1
    return counts


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m tools.fuzz_decode',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--files', type=int, default=2000, help='damaged files (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of the damage (%(default)s)')
    parser.add_argument('--seeds', metavar='DIR', help='videos to damage (default: written)')
    parser.add_argument('--workers', type=int, default=2, help='processes (%(default)s)')
    parser.add_argument('--timeout', type=float, default=10, help='seconds a file (%(default)s)')
    parser.add_argument('--keep', metavar='DIR', help='keep files that crash or hang a process')
    parser.add_argument('--json', metavar='FILE', help='also write the figures there')
    arguments = parser.parse_args(argv)
    console = Console()
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress:
        task = progress.add_task('damaged files', total=arguments.files)
        if arguments.seeds:
            seeds = sorted(path for path in Path(arguments.seeds).iterdir() if path.is_file())
        else:
            for name, how in SEEDS.items():
                write_seed(Path(folder) / name, *how)
            for name, size in PICTURES.items():
                write_picture(Path(folder) / name, *size)
            seeds = [Path(folder) / name for name in (*SEEDS, *PICTURES)]
        damaged = Path(folder) / 'damaged'
        damaged.mkdir()
        records, origins = write_files(damaged, seeds, arguments.files, arguments.seed)
        start = time.monotonic()
        errors, figures = fuzz(
            records, arguments.workers, arguments.timeout, lambda n: progress.advance(task, n)
        )
        seconds = time.monotonic() - start
        for record, error in zip(records, errors):
            if error.startswith(workers.KINDS):
                console.print(f'{Path(record.path).name}: {error}')
                if arguments.keep:
                    Path(arguments.keep).mkdir(parents=True, exist_ok=True)
                    kept = Path(arguments.keep) / Path(record.path).name
                    kept.write_bytes(Path(record.path).read_bytes())
    counts = count_kinds(errors, origins)
    total = sum(counts.values(), collections.Counter())
    table = Table('damage', 'files', 'read', 'not read')
    for name, row in [*counts.items(), ('all', total)]:
        table.add_row(name, *map(str, (row.total(), row['read'], row.total() - row['read'])))
    console.print(table)
    kinds = ', '.join(f'{count} {kind}' for kind, count in total.most_common())
    console.print(
        f'{len(errors)} files in {seconds:.0f} s: {kinds}; {figures["restarts"]} reader processes '
        f'were replaced, none had more than {figures["peak_mib"]:.0f} MiB; the longest wait for a '
        f'batch of {BATCH_SIZE} was {figures["longest_wait_s"]:.1f} s',
        soft_wrap=True,
    )
    if arguments.json:
        figures |= {
            'files': len(errors),
            'seconds': seconds,
            'kinds': total,
            'kinds_by_damage': counts,
        }
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + '\n', encoding='utf-8')
    return 0


if __name__ == '__main__':
    sys.exit(main())
