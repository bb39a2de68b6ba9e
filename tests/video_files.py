"""Writes small video files for the tests."""

from pathlib import Path

import av
import cv2
import numpy as np

HEIGHT, WIDTH = 48, 64


def pictures(
    num_frames: int, height: int = HEIGHT, width: int = WIDTH, seed: int = 0
) -> np.ndarray:
    """A camera drifting over coloured noise, (T, H, W, 3) uint8; every frame is different."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 24, 3), dtype=np.uint8)
    size = (width + 2 * num_frames, height)
    scene = cv2.resize(noise, size, interpolation=cv2.INTER_CUBIC)
    return np.stack([scene[:, 2 * k : 2 * k + width] for k in range(num_frames)])


def write_video(
    path: Path,
    frames: np.ndarray | None = None,
    codec: str = 'libx264',
    gop: int = 12,
    b_frames: int = 0,
    rotation: int = 0,
    pts: np.ndarray | None = None,
    muxer: dict[str, str] | None = None,
    fps: int = 30,
    **options: str,
) -> Path:
    """Encodes frames (default: 40 pictures); the suffix of the path decides the container."""
    frames = pictures(40) if frames is None else frames
    with av.open(str(path), 'w', options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], 'yuv420p'
        stream.codec_context.thread_count = 1
        stream.options = {'g': str(gop), 'bf': str(b_frames), **options}
        if rotation:
            stream.set_display_rotation(rotation)
        for k, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format='rgb24')
            if pts is not None:
                frame.pts = int(pts[k])
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_audio(path: Path) -> Path:
    """An mp4 with one second of silence and no video."""
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('aac', rate=16000)
        samples = np.zeros((1, 16000), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format='fltp', layout='mono')
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_without_frames(path: Path) -> Path:
    """An mp4 with a video stream that holds no frame."""
    with av.open(str(path), 'w', options={'movflags': 'empty_moov'}) as container:
        stream = container.add_stream('libx264', rate=30)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, 'yuv420p'
        container.start_encoding()
    return path


def decode_everything(path: Path) -> np.ndarray:
    """All frames in the plainest way."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format='rgb24') for f in container.decode(video=0)])


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by their names in it."""
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
