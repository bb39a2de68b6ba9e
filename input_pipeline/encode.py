"""From a video to the bytes of a smaller one that is cheap to read at random.

Frames keep their times and are turned upright; sound and all else is left behind. The same input
gives the same bytes: encoders run on one thread and write no date and no version.
"""

import contextlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from input_pipeline.decode import MAX_PIXELS, DecodeError, VideoReader, turn

# Seconds: 30, 25, 24, 60 and 30000/1001, 24000/1001 frames a second are whole numbers of it.
_TIME_BASE = Fraction(1, 360000)
# Chosen for reading, see docs/performance.md: run lengths in place of arithmetic coding, no filter
# and no weights halve the time for a quarter more bytes ('fastdecode'); no frame waits for a later
# one, one reference frame, key frames where they are expected and nowhere else. No macroblock tree:
# with it, one file in a hundred came out differently when the same process encoded it again (x264
# core 165; 300 of 300 were the same without it).
_H264 = {
    'preset': 'medium',
    'tune': 'fastdecode',
    'bf': '0',
    'refs': '1',
    'sc_threshold': '0',
    'mbtree': '0',
    'threads': '1',
}
# Coefficients by plain tables, blocks of 8 x 8, no filter: decodes in two thirds of the time of the
# above. Key frames where they are expected and nowhere else.
_MPEG4 = {'bf': '0', 'sc_threshold': '1000000000', 'flags': '+bitexact', 'threads': '1'}
_MUXER = {'fflags': '+bitexact'}
_TIMESCALE = {'video_track_timescale': str(_TIME_BASE.denominator)}
_TO_WATCH = {'preset': 'veryfast', 'crf': '23'}
CODECS = ('h264', 'mpeg4', 'jpeg')
# Where nobody says; of h264 and mpeg4 about the same PSNR.
USUAL_CRF = {'h264': 23, 'mpeg4': 3, 'jpeg': 4}
CRF_RANGE = {'h264': (0, 51), 'mpeg4': (2, 31), 'jpeg': (2, 31)}
_ENCODERS = {'h264': 'libx264', 'mpeg4': 'mpeg4', 'jpeg': 'mjpeg'}
# JPEG and MPEG-4 know one range and one matrix; H.264 keeps what the video has.
_COLOURS = {
    'jpeg': {'dst_colorspace': Colorspace.ITU601, 'dst_color_range': ColorRange.JPEG},
    'mpeg4': {'dst_colorspace': Colorspace.ITU601, 'dst_color_range': ColorRange.MPEG},
}
# MPEG-4 has too few bits for the parts of a second: its frames are numbered, and the times of the
# container, which readers go by, are set afterwards.
_NUMBERED = ('mpeg4',)
_NUMBER = Fraction(1, 30)


def transcode(
    source: str | bytes | VideoReader,
    short_side: int,
    keyframe_interval: int,
    crf: int,
    codec: str = 'h264',
    *,
    start: float | None = None,
    end: float | None = None,
    max_pixels: int = MAX_PIXELS,
) -> bytes:
    """Encodes a video, or a part of one, anew.

    Args:
      source: path, the bytes of a file, or an open video; an open one stays open.
      short_side: pixels of the short side; a smaller video keeps its size. Sides become even.
      keyframe_interval: frames from key frame to key frame; of no meaning for 'jpeg'.
      crf: quality, lower is better: x264's constant rate factor, 0 to 51; for 'mpeg4' and 'jpeg'
        the quantiser scale of FFmpeg, 2 to 31.
      codec: one of `CODECS`; 'mpeg4' is MPEG-4 part 2, which is cheaper to decode than H.264;
        'jpeg' makes every frame a key frame (motion JPEG).
      start: seconds after the first frame where the part begins; None means the beginning.
      end: seconds where it ends, not included; None means the end.
      max_pixels: larger frames are refused.

    Returns:
      An mp4 file.

    Raises:
      DecodeError: if a frame cannot be read or encoded.
      ValueError: if an argument is out of range.
    """
    check_options(short_side, keyframe_interval, crf, codec)
    if not isinstance(source, VideoReader):
        with VideoReader(source, max_pixels) as video:
            return transcode(video, short_side, keyframe_interval, crf, codec, start=start, end=end)
    try:
        return _encode(source, short_side, keyframe_interval, crf, codec, start, end)
    except av.FFmpegError as error:  # of the encoder; the reader has errors of its own
        raise DecodeError(source.path, 'corrupt', f'cannot be encoded: {error}') from error


def check_options(short_side: int, keyframe_interval: int, crf: int, codec: str) -> None:
    """Raises ValueError if `transcode` could not use these arguments."""
    if codec not in CODECS:
        raise ValueError(f'codec={codec!r} must be one of {", ".join(CODECS)}')
    if short_side < 2:
        raise ValueError(f'short_side={short_side} must be at least 2 pixels')
    if keyframe_interval < 1:
        raise ValueError(f'keyframe_interval={keyframe_interval} must be at least 1 frame')
    low, high = CRF_RANGE[codec]
    if not low <= crf <= high:
        raise ValueError(f'crf={crf} must be in {low} to {high} for codec {codec}')


def _encode(
    video: VideoReader,
    short_side: int,
    keyframe_interval: int,
    crf: int,
    codec: str,
    start: float | None,
    end: float | None,
) -> bytes:
    first, count = video.frame_range(start, end)
    seconds = video.times[first : first + count] - video.times[first]
    ticks = np.rint(seconds / float(_TIME_BASE)).astype(np.int64)
    file = io.BytesIO()
    reformatter = VideoReformatter()
    stream = None
    numbered = codec in _NUMBERED
    rate = 1 / _NUMBER if numbered else Fraction(video.fps).limit_denominator(1001)
    time_base = _NUMBER if numbered else _TIME_BASE
    options = _MUXER | _TIMESCALE if numbered else _MUXER
    with av.open(file, 'w', format='mp4', options=options) as container:
        for number, decoded in enumerate(video.decoded(first, count)):
            frame = _shrunk(video, reformatter, decoded, short_side, codec)
            if stream is None:
                stream = container.add_stream(
                    _ENCODERS[codec],
                    rate=rate,
                    options=_encoder_options(keyframe_interval, crf, codec),
                )
                context = stream.codec_context
                context.time_base = time_base
                context.thread_count = 1
                context.width, context.height = frame.width, frame.height
                context.pix_fmt = frame.format.name
                context.color_range, context.colorspace = frame.color_range, frame.colorspace
            if (frame.width, frame.height) != (context.width, context.height):
                sizes = f'{context.width} x {context.height} and {frame.width} x {frame.height}'
                raise DecodeError(video.path, 'corrupt', f'frames of different sizes: {sizes}')
            frame.pts, frame.time_base = number if numbered else ticks[number].item(), time_base
            container.mux(_timed(stream.encode(frame), ticks, numbered))
        container.mux(_timed(stream.encode(None), ticks, numbered))
    return file.getvalue()


def _timed(packets: list[av.Packet], ticks: np.ndarray, numbered: bool) -> list[av.Packet]:
    """Packets of numbered frames with the times of these, (N,) in units of `_TIME_BASE`."""
    for packet in packets if numbered else ():
        packet.pts = packet.dts = ticks[packet.pts].item()
        packet.time_base = _TIME_BASE
    return packets


def _encoder_options(keyframe_interval: int, crf: int, codec: str) -> dict[str, str]:
    if codec == 'jpeg':
        return {'qmin': str(crf), 'qmax': str(crf), 'flags': '+bitexact', 'threads': '1'}
    interval = str(keyframe_interval)
    if codec == 'mpeg4':
        return _MPEG4 | {'qmin': str(crf), 'qmax': str(crf), 'g': interval}
    return _H264 | {'crf': str(crf), 'g': interval, 'keyint_min': interval}


def _shrunk(
    video: VideoReader,
    reformatter: VideoReformatter,
    decoded: av.VideoFrame,
    short_side: int,
    codec: str,
) -> av.VideoFrame:
    """The frame at its new size, upright, as 4:2:0."""
    scale = min(1.0, short_side / min(decoded.width, decoded.height))
    width, height = (
        max(2, 2 * round(side * scale / 2)) for side in (decoded.width, decoded.height)
    )
    try:
        frame = reformatter.reformat(
            decoded,
            width,
            height,
            'yuvj420p' if codec == 'jpeg' else 'yuv420p',
            interpolation='BICUBIC',
            threads=1,
            **_COLOURS.get(codec, {}),
        )
    except (av.FFmpegError, ValueError) as error:
        raise DecodeError(video.path, 'corrupt', f'cannot be scaled: {error}') from error
    planes = [_plane(frame, k) for k in range(3)]
    matrix = video.display_matrix(decoded)
    turned = [turn(plane, matrix) for plane in planes]
    if all(before is after for before, after in zip(planes, turned)):
        return frame
    upright = av.VideoFrame(turned[0].shape[1], turned[0].shape[0], frame.format.name)
    upright.color_range, upright.colorspace = frame.color_range, frame.colorspace
    for k, plane in enumerate(turned):
        rows = np.zeros((plane.shape[0], upright.planes[k].line_size), np.uint8)
        rows[:, : plane.shape[1]] = plane
        upright.planes[k].update(rows)
    return upright


def _plane(frame: av.VideoFrame, number: int) -> np.ndarray:
    plane = frame.planes[number]
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    return rows[: plane.height, : plane.width]


def write_pictures(
    path: str | os.PathLike, pictures: Iterable[tuple[float, np.ndarray]], fps: float
) -> int:
    """Encodes pictures as they come into an H.264 mp4 file; none waits in memory.

    Args:
      path: the file to write.
      pictures: (seconds, (H, W, 3) uint8 RGB), times increasing, H and W even and all the same.
      fps: frames per second, about.

    Returns:
      How many there were; without any, there is no file.
    """
    rate = max(Fraction(fps).limit_denominator(1001), Fraction(1, 1001))
    count = 0
    with contextlib.ExitStack() as stack:
        for seconds, picture in pictures:
            if not count:
                options = _MUXER | {'movflags': 'faststart'}
                container = av.open(os.fspath(path), 'w', format='mp4', options=options)
                stack.enter_context(container)
                stream = container.add_stream('libx264', rate=rate, options=_TO_WATCH)
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = 'yuv420p'
                stream.codec_context.time_base = _TIME_BASE
            frame = av.VideoFrame.from_ndarray(picture, format='rgb24')
            frame.pts, frame.time_base = round(seconds / _TIME_BASE), _TIME_BASE
            container.mux(stream.encode(frame))
            count += 1
        if count:
            container.mux(stream.encode(None))
    return count


def join_jpegs(pictures: Sequence[bytes] | Iterator[bytes], fps: float) -> bytes:
    """Puts JPEG pictures into a video file as they are.

    Args:
      pictures: the bytes of JPEG files, in order of time, all of one size.
      fps: frames per second.

    Returns:
      A motion JPEG mp4 file.

    Raises:
      ValueError: if there is no picture, or the first is not a JPEG.
    """
    rate = Fraction(fps).limit_denominator(1001)
    file = io.BytesIO()
    stream = None
    with av.open(file, 'w', format='mp4', options=_MUXER) as container:
        for number, picture in enumerate(pictures):
            if stream is None:
                stream = _jpeg_stream(container, picture, rate)
            packet = av.Packet(picture)
            packet.stream = stream
            packet.time_base = 1 / rate
            packet.pts = packet.dts = number
            packet.duration = 1
            packet.is_keyframe = True
            container.mux(packet)
        if stream is None:
            raise ValueError('no pictures')
    return file.getvalue()


def _jpeg_stream(
    container: av.container.OutputContainer, picture: bytes, rate: Fraction
) -> av.VideoStream:
    with VideoReader(picture, name='the first picture') as first:
        decoded = next(first.decoded())
    stream = container.add_stream('mjpeg', rate=rate)
    context = stream.codec_context
    context.width, context.height, context.pix_fmt = (
        decoded.width,
        decoded.height,
        decoded.format.name,
    )
    context.time_base = 1 / rate
    return stream
