"""Convolutions over frames against the released code's results and their definitions in numpy."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dist_jax.models.conv3d import MODES, conv3d, sts_conv3d

GOLDEN = Path(__file__).parent.parent / 'golden' / 'sts_conv.safetensors'
CASES = ('t', 't_T1', 'st_s1', 'st_s1_T1', 'st_s1_odd_hw')
STRIDED = ('st_s2', 'st_s2_T1', 'st_s2_w6', 'st_s2_tiny')
TEMPORAL, DEPTHWISE = (3, 1, 1), (3, 3, 3)
WITH_LABELS = (0, 2, 3, 4, 1)  # (B, C, T, H, W) -> (B, T, H, W, C); kernels alike


@pytest.fixture(scope='module')
def golden():
    return load_file(GOLDEN)


def arrays(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def with_gradients(function, x, kernel, cotangent=None):
    """The result, and the gradients to both by a cotangent that is the result itself if None."""

    def run(x, kernel, cotangent):
        y, transpose = jax.vjp(function, x, kernel)
        return y, *transpose(y if cotangent is None else cotangent.astype(y.dtype))

    return [np.asarray(one) for one in jax.jit(run)(x, kernel, cotangent)]


separable = jax.jit(sts_conv3d, static_argnums=(2, 3))


def naive(x, kernel, stride):
    """Zero-padded cross-correlation with a kernel (kt, kh, kw, in, out), or of groups."""
    b, t, h, w, c = x.shape
    kt, kh, kw, _, out = kernel.shape
    y = np.zeros((b, t, -(-h // stride), -(-w // stride), out))
    pads = [(0, 0), *((size // 2, size // 2) for size in (kt, kh, kw)), (0, 0)]
    padded = np.pad(x, pads)
    for d, i, j in np.ndindex(kt, kh, kw):
        window = padded[:, d : d + t, i : i + h : stride, j : j + w : stride]
        y += window * kernel[d, i, j, 0] if c == out else window @ kernel[d, i, j]
    return y


def flat_line(frame, taps, stride, out_shape):
    """y[q] = sum_j taps[j] flat[stride^2 q + j - len // 2] of an (H, W, C), 0 beyond its ends."""
    flat = frame.reshape(-1, frame.shape[-1])
    y = np.zeros((np.prod(out_shape), frame.shape[-1]))
    for q, j in itertools.product(range(len(y)), range(len(taps))):
        place = stride * stride * q + j - len(taps) // 2
        if 0 <= place < len(flat):
            y[q] += taps[j] * flat[place]
    return y.reshape(*out_shape, -1)


def short_line(frame, taps, stride, out_shape):
    """The same along each row, with zeros beyond its ends and a true stride."""
    y = np.zeros((*out_shape, frame.shape[-1]))
    for h, w, j in itertools.product(*map(range, out_shape), range(len(taps))):
        place = stride * w + j - len(taps) // 2
        if 0 <= place < frame.shape[1]:
            y[h, w] += taps[j] * frame[stride * h, place]
    return y


def naive_sts(x, kernel, stride, mode):
    """By the formulas of the paper's code, one frame at a time."""
    b, t, h, w, _ = x.shape
    out, h_out, w_out = kernel.shape[-1], -(-h // stride), -(-w // stride)
    half = (out + 1) // 2
    line = flat_line if mode == 'official' else short_line
    if kernel.shape[:3] == DEPTHWISE:
        y = naive(x, kernel, stride)
        y[..., :half] = naive(x[..., :half], kernel[1:2, ..., :half], stride)
        first, _, last = kernel[..., :half].reshape(3, 9, half)
        for frame in np.ndindex(b, t):
            one = x[frame][..., :half]
            turned = line(one.swapaxes(0, 1), last, stride, (w_out, h_out)).swapaxes(0, 1)
            y[frame][..., :half] += line(one, first, stride, (h_out, w_out)) + turned
        return y
    quarter = (half + 1) // 2
    taps = kernel[:, 0, 0]
    y = np.zeros((b, t, h, w, out))
    for c in range(out):
        products = x[..., None, :] * taps[..., c]  # (B, T, H, W, 3, in)
        for frame in np.ndindex(b, t):
            own = products[frame].sum(-1)
            if c < quarter:
                y[frame][..., c] = pick(own, line)
            elif c < half:
                y[frame][..., c] = pick(own.swapaxes(0, 1), line).swapaxes(0, 1)
            else:
                batch, time = frame
                for d in range(3):
                    if 0 <= time + d - 1 < t:
                        y[frame][..., c] += products[batch, time + d - 1, :, :, d].sum(-1)
    return y


def pick(own, line):
    """Sum over taps of what the place that many before or behind makes of it."""
    shifted = (line(own[..., d : d + 1], np.eye(3)[d][:, None], 1, own.shape[:2]) for d in range(3))
    return sum(shifted)[..., 0]


@pytest.mark.parametrize('case', CASES + STRIDED)
def test_released_results_and_gradients(golden, case):
    stride = 2 if case in STRIDED else 1
    order = (2, 3, 4, 1, 0)
    names = (f'inputs/{case}/x', f'params/{case}/weight', f'inputs/{case}/cot')
    x, kernel, cotangent = (golden[name].astype(np.float64) for name in names)
    given = x.transpose(WITH_LABELS), kernel.transpose(order), cotangent.transpose(WITH_LABELS)
    wanted = [
        golden[f'outputs/{case}/y'].transpose(WITH_LABELS),
        golden[f'grads/{case}/x'].transpose(WITH_LABELS),
        golden[f'grads/{case}/weight'].transpose(order),
    ]

    def function(x, kernel):
        return sts_conv3d(x, kernel, stride)

    # The tool that checks recordings does it in float64.
    found = with_gradients(function, *(one.astype(np.float32) for one in given))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1, np.abs(other).max()))


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize(
    ('size', 'channels', 'out', 'kernel_size', 'stride'),
    [
        ((3, 5, 4), 3, 7, TEMPORAL, 1),
        ((2, 1, 3), 2, 6, TEMPORAL, 1),
        ((3, 6, 5), 5, 5, DEPTHWISE, 1),
        ((2, 3, 2), 3, 3, DEPTHWISE, 1),
        ((2, 6, 10), 3, 3, DEPTHWISE, 2),
    ],
)
def test_definition(mode, size, channels, out, kernel_size, stride):
    grouped = 1 if kernel_size == DEPTHWISE else channels
    x, kernel = arrays(0, (2, *size, channels), (*kernel_size, grouped, out))
    with jax.enable_x64(True):
        y = separable(x, kernel, stride, mode)
    np.testing.assert_allclose(y, naive_sts(x, kernel, stride, mode), atol=1e-12)


def test_strided_clean_lines_may_have_odd_sizes():
    x, kernel = arrays(1, (1, 2, 5, 7, 3), (*DEPTHWISE, 1, 3))
    with jax.enable_x64(True):
        y = separable(x, kernel, 2, 'clean')
    np.testing.assert_allclose(y, naive_sts(x, kernel, 2, 'clean'), atol=1e-12)


@pytest.mark.parametrize('size', [(6, 5), (5, 6)])
def test_strided_official_lines_must_have_even_sizes(size):
    x, kernel = jnp.zeros((1, 2, *size, 4)), jnp.zeros((*DEPTHWISE, 1, 4))
    with pytest.raises(ValueError, match=r'frames of \d x \d: .*data\.image_size'):
        jax.eval_shape(lambda x, kernel: sts_conv3d(x, kernel, 2), x, kernel)


@pytest.mark.parametrize(
    ('shape', 'kernel_shape', 'stride', 'time_stride'),
    [
        ((2, 3, 5, 4, 3), (1, 1, 1, 3, 5), 1, 1),
        ((2, 3, 5, 4, 3), (1, 1, 1, 3, 5), 2, 1),
        ((2, 3, 7, 6, 3), (1, 3, 3, 3, 4), 2, 1),
        ((1, 3, 9, 8, 3), (3, 7, 7, 3, 4), 2, 1),
        ((1, 8, 3, 2, 3), (5, 1, 1, 3, 6), 1, 4),
        ((2, 3, 5, 4, 3), (3, 3, 3, 1, 3), 1, 1),
        ((2, 3, 5, 7, 3), (3, 3, 3, 1, 3), 2, 1),
        ((2, 6, 3, 2, 3), (5, 1, 1, 1, 3), 1, 1),
    ],
)
def test_plain_definition_and_gradients_of_both_forms(shape, kernel_shape, stride, time_stride):
    """What an accelerator runs has the gradients of what the CPU runs."""
    x, kernel = arrays(2, shape, kernel_shape)

    taken = []

    def elsewhere(*args, default, cpu):
        taken.append(default)
        return default(*args)

    def function(x, kernel):
        # Not the function that is traced once for each shape.
        return conv3d.__wrapped__(x, kernel, stride, time_stride)

    with jax.enable_x64(True):
        found = with_gradients(function, x, kernel)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.lax, 'platform_dependent', elsewhere)
            others = with_gradients(lambda x, kernel: function(x, kernel), x, kernel)
    assert taken
    np.testing.assert_allclose(found[0], naive(x, kernel, stride)[:, ::time_stride], atol=1e-12)
    for one, other in zip(found, others, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-11)


@pytest.mark.parametrize('kernel_shape', [(*TEMPORAL, 5, 8), (*DEPTHWISE, 1, 5)])
def test_one_frame_meets_the_centre_taps(kernel_shape):
    x, kernel = arrays(3, (2, 1, 4, 6, 5), kernel_shape)
    half = (kernel_shape[-1] + 1) // 2
    with jax.enable_x64(True):
        plain, _, to_kernel = with_gradients(conv3d, x, kernel)
        frame = np.asarray(separable(x, kernel))
    np.testing.assert_allclose(plain, naive(x, kernel[1:2], 1), atol=1e-12)
    assert not to_kernel[::2].any()
    assert to_kernel[1].all()
    np.testing.assert_allclose(frame[..., half:], plain[..., half:], atol=1e-12)
    # Appearance is that of any frame of a longer clip.
    longer = np.concatenate([x[:, :, ::-1], x, x], 1)
    with jax.enable_x64(True):
        beside = separable(longer, kernel)
    np.testing.assert_allclose(frame[:, 0, ..., :half], beside[:, 1, ..., :half], atol=1e-12)


@pytest.mark.parametrize(
    ('function', 'kernel_shape', 'roundings'),
    [
        (conv3d, (*TEMPORAL, 64, 8), 1),
        (conv3d, (*DEPTHWISE, 1, 64), 1),
        (sts_conv3d, (*TEMPORAL, 64, 8), 1),
        (sts_conv3d, (*DEPTHWISE, 1, 64), 2),  # of a filter, of two lines, of sums
    ],
)
def test_bfloat16_is_summed_in_float32(function, kernel_shape, roundings):
    given = [one.astype(jnp.bfloat16) for one in arrays(4, (2, 4, 6, 6, 64), kernel_shape)]
    given.append(np.ones((2, 4, 6, 6, kernel_shape[-1])))
    found = with_gradients(function, *given)
    wanted = with_gradients(function, *(one.astype(np.float32) for one in given))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == jnp.bfloat16
        largest = 0 if roundings == 1 else np.abs(other).max()
        tolerance = 1e-5 + roundings * 2**-8 * np.maximum(np.abs(other), largest)
        assert (np.abs(one.astype(np.float32) - other) <= tolerance).all()
