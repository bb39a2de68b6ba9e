"""Side4Video in float64, by the formulas of the paper alone: what a recording should have been.

A second opinion for `check_parity`, on both the recordings and `dist_jax.models`, of which it uses
nothing: no scan, no fused products, no moved axes, no statistics or gradients written by hand. It
works on the tensors under their recorded names and in their recorded layout; gradients are
`jax.grad` of the loss.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from tools.parity.golden import Golden

Weights = dict[str, jax.Array]

# Compiling takes far longer than running, so it is not to do its best.
jit = functools.partial(
    jax.jit,
    compiler_options={
        'xla_backend_optimization_level': 0,
        'xla_llvm_disable_expensive_passes': True,
    },
)


def run(golden: Golden, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    """Everything that a file may record of a recognition network.

    Args:
      golden: its inputs, parameters and sizes.
      dtype: float64, or float32 to see what rounding does.

    Returns:
      Recorded name -> array in the recorded layout, gradients in full.
    """
    with jax.enable_x64(True):

        def section(name: str) -> Weights:
            return {key: jnp.asarray(x, dtype) for key, x in golden.section(name).items()}

        config, inputs = golden.config, golden.section('inputs')
        video, labels = jnp.asarray(inputs['video'], dtype), jnp.asarray(inputs['labels'])
        outputs = jit(lambda w, video: tower(w, video, config))(section('backbone'), video)

        def loss(params: Weights, fixed: tuple[Any, ...], train: bool) -> tuple[jax.Array, Any]:
            *given, labels = fixed
            seen, running = network(params, *given, config, train)
            seen['loss'] = cross_entropy(seen['logits'], labels, config['label_smoothing'])
            return seen['loss'], (seen, running)

        gradients = jit(jax.grad(loss, has_aux=True), static_argnums=2)
        fixed = section('buffers'), video, outputs, labels
        found: dict[str, Any] = {}
        for mode, name in (('eval', 'eval_grads'), ('train', 'grads')):
            grads, (seen, running) = gradients(section('params'), fixed, mode == 'train')
            seen |= {f'backbone_tokens/{i}': x for i, x in enumerate(outputs)}
            norms = {key: jnp.sqrt((x**2).sum()) for key, x in grads.items()}
            for place, values in (
                (mode, seen),
                (f'{mode}_buffers', running),
                (name, grads),
                (f'{name}_norm', norms),
            ):
                found |= {f'{place}/{key}': x for key, x in values.items()}
        return jax.device_get(found)


def linear(w: Weights, name: str, x: jax.Array) -> jax.Array:
    """Weight (out, in), with anything behind that is one; a bias if there is one."""
    weight = w[f'{name}.weight']
    return x @ weight.reshape(weight.shape[:2]).T + w.get(f'{name}.bias', 0)


def layer_norm(w: Weights, name: str, x: jax.Array, eps: float = 1e-5) -> jax.Array:
    """Over the channels."""
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + eps) * w[f'{name}.weight'] + w[f'{name}.bias']


def gelu(x: jax.Array) -> jax.Array:
    """The exact form."""
    return x * (1 + jax.scipy.special.erf(x / np.sqrt(2))) / 2


def softmax(x: jax.Array) -> jax.Array:
    """Over the last axis."""
    powers = jnp.exp(x - jax.lax.stop_gradient(x.max(-1, keepdims=True)))
    return powers / powers.sum(-1, keepdims=True)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, dim: int) -> jax.Array:
    """Heads of `dim` channels: queries (n, L, D), keys and values (n, M, D) -> (n, L, D)."""
    q, k, v = (rearrange(x, 'n l (h d) -> n h l d', d=dim) for x in (q, k, v))
    weights = softmax(q @ jnp.swapaxes(k, -1, -2) / np.sqrt(dim))
    return rearrange(weights @ v, 'n h l d -> n l (h d)')


def tower(w: Weights, video: jax.Array, config: dict[str, Any]) -> list[jax.Array]:
    """What every block of the image tower gives for a video: L of (B, T, 1 + N, D)."""
    is_eva = config['arch'] == 'eva'
    kernel = w['visual.patch_embed.proj.weight' if is_eva else 'visual.conv1.weight']
    p = config['patch_size']
    patches = rearrange(video, 'b t (h p) (w q) c -> (b t) (h w) (c p q)', p=p, q=p)
    x = patches @ kernel.reshape(len(kernel), -1).T
    if is_eva:
        x, token = x + w['visual.patch_embed.proj.bias'], w['visual.cls_token'][0]
        positions = w['visual.pos_embed'][0]
    else:
        token, positions = w['visual.class_embedding'][None], w['visual.positional_embedding']
    x = jnp.concatenate([jnp.broadcast_to(token, (len(x), *token.shape)), x], 1) + positions
    if not is_eva:
        x = layer_norm(w, 'visual.ln_pre', x)
    outputs = []
    for i in range(config['layers']):
        x = (eva_block if is_eva else clip_block)(w, i, x, config)
        outputs.append(x.reshape(*video.shape[:2], *x.shape[1:]))
    return outputs


def clip_block(w: Weights, i: int, x: jax.Array, config: dict[str, Any]) -> jax.Array:
    """One block of CLIP, (n, 1 + N, D)."""
    name = f'visual.transformer.resblocks.{i}.'
    qkv = layer_norm(w, f'{name}ln_1', x) @ w[f'{name}attn.in_proj_weight'].T
    qkv = jnp.split(qkv + w[f'{name}attn.in_proj_bias'], 3, axis=-1)
    heads = attend(*qkv, config['width'] // config['heads'])
    x = x + linear(w, f'{name}attn.out_proj', heads)
    hidden = linear(w, f'{name}mlp.c_fc', layer_norm(w, f'{name}ln_2', x))
    return x + linear(w, f'{name}mlp.c_proj', hidden / (1 + jnp.exp(-1.702 * hidden)))


def eva_block(w: Weights, i: int, x: jax.Array, config: dict[str, Any]) -> jax.Array:
    """One block of EVA, (n, 1 + N, D): norms before or behind its halves, sub-LN, SwiGLU, RoPE."""
    name = f'visual.blocks.{i}.'

    def norm(which: str, x: jax.Array) -> jax.Array:
        return layer_norm(w, name + which, x, eps=1e-6)

    def attention(x: jax.Array) -> jax.Array:
        if f'{name}attn.qkv.weight' in w:
            q, k, v = jnp.split(linear(w, f'{name}attn.qkv', x), 3, axis=-1)
        else:
            q, k, v = (linear(w, f'{name}attn.{letter}_proj', x) for letter in 'qkv')
        q, v = q + w[f'{name}attn.q_bias'], v + w[f'{name}attn.v_bias']
        if config['rope']:
            q, k = rotate(q, config), rotate(k, config)
        heads = attend(q, k, v, config['head_width'])
        heads = norm('attn.inner_attn_ln', heads) if config['subln'] else heads
        return linear(w, f'{name}attn.proj', heads)

    def mlp(x: jax.Array) -> jax.Array:
        if config['naiveswiglu']:
            gate = linear(w, f'{name}mlp.w1', x)
            hidden = gate / (1 + jnp.exp(-gate)) * linear(w, f'{name}mlp.w2', x)
        else:
            hidden = gelu(linear(w, f'{name}mlp.fc1', x))
        hidden = norm('mlp.ffn_ln', hidden) if config['subln'] else hidden
        return linear(w, f'{name}mlp.{"w3" if config["naiveswiglu"] else "fc2"}', hidden)

    if config['postnorm']:
        x = x + norm('norm1', attention(x))
        return x + norm('norm2', mlp(x))
    x = x + attention(norm('norm1', x))
    return x + mlp(norm('norm2', x))


def rotate(x: jax.Array, config: dict[str, Any]) -> jax.Array:
    """Queries or keys (n, 1 + N, D) of EVA, as complex numbers of neighbouring channels."""
    dim, grid = config['head_width'], config['image_size'] // config['patch_size']
    place = np.arange(grid) / grid * config['pt_hw_seq_len']
    angle = place[:, None] * 10000.0 ** (-np.arange(0, dim // 2, 2) / (dim // 2))
    row, column = (np.repeat(angle, grid, axis=0), np.tile(angle, (grid, 1)))
    angles = np.concatenate([row, column], axis=-1)
    cos, sin = (f(angles)[:, None].astype(x.dtype) for f in (np.cos, np.sin))
    pairs = rearrange(x[:, 1:], 'n l (h d two) -> n l h d two', d=dim // 2, two=2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([x[:, :1], turned.reshape(x[:, 1:].shape)], axis=1)


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Against (1 - smoothing) of the label and the rest over all classes, the mean over clips."""
    shifted = logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    log_p = shifted - jnp.log(jnp.exp(shifted).sum(-1, keepdims=True))
    right = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    return -((1 - smoothing) * right + smoothing * log_p.mean(-1)).mean()


def network(
    w: Weights,
    buffers: Weights,
    video: jax.Array,
    outputs: list[jax.Array],
    config: dict[str, Any],
    train: bool,
) -> tuple[Weights, Weights]:
    """The side network: what is recorded of it, and the running statistics behind it."""
    beside_eva, running = config['arch'] == 'eva', {}
    root = 'visual.' if beside_eva else 'visual.transformer.'
    blocks = root + ('side_blocks.' if beside_eva else 'side_transformer.')
    first, second = ('0', '2') if beside_eva else ('fc1', 'fc2')

    def batch_norm(name: str, x: jax.Array) -> jax.Array:
        mean, variance = buffers[f'{name}.running_mean'], buffers[f'{name}.running_var']
        if train:
            flat = x.reshape(-1, x.shape[-1])
            old, (mean, variance) = (mean, variance), (flat.mean(0), flat.var(0))
            unbiased = variance * len(flat) / (len(flat) - 1)
            running[f'{name}.running_mean'] = 0.9 * old[0] + 0.1 * mean
            running[f'{name}.running_var'] = 0.9 * old[1] + 0.1 * unbiased
        scaled = (x - mean) / jnp.sqrt(variance + 1e-5)
        return scaled * w[f'{name}.weight'] + w[f'{name}.bias']

    def over_time(x: jax.Array, kernel: list[jax.Array]) -> jax.Array:
        """Of frames t - 1, t and t + 1; frames outside of the clip are 0."""
        none = jnp.zeros_like(x[:, :1])
        before, after = jnp.concatenate([none, x[:, :-1]], 1), jnp.concatenate([x[:, 1:], none], 1)
        return sum(frames @ each for frames, each in zip((before, x, after), kernel, strict=True))

    def conv(name: str, x: jax.Array) -> jax.Array:
        x = linear(w, f'{name}.0', x)
        depthwise = w[f'{name}.1.weight'].reshape(-1, 3)
        x = over_time(x, [jnp.diag(each) for each in depthwise.T]) + w[f'{name}.1.bias']
        return linear(w, f'{name}.2', x)

    def attention(name: str, x: jax.Array) -> jax.Array:
        """(n, 1 + N, C), the class token first -> (n, N, C)."""
        if beside_eva:
            q, k, v = (linear(w, f'{name}.{letter}_proj', x) for letter in 'qkv')
        else:
            qkv = x @ w[f'{name}.in_proj_weight'].T + w[f'{name}.in_proj_bias']
            q, k, v = jnp.split(qkv, 3, axis=-1)
        heads = attend(q[:, 1:], k, v, 64)
        return linear(w, f'{name}.{"proj" if beside_eva else "out_proj"}', heads)

    def mlp(name: str, x: jax.Array) -> jax.Array:
        return linear(w, f'{name}.{second}', gelu(linear(w, f'{name}.{first}', x)))

    p, stem = config['patch_size'], w['visual.side_conv1.weight']
    patches = rearrange(video, 'b t (h p) (w q) c -> b t h w (c p q)', p=p, q=p)
    kernels = [rearrange(stem[:, :, t], 'o c p q -> (c p q) o') for t in range(3)]
    s = over_time(patches, kernels) + w['visual.side_conv1.bias']
    s = batch_norm('visual.side_pre_bn3d', s)
    seen = {'x_side/stem': s}
    positions = w[f'{root}side_spatial_position_embeddings']
    number = sum(name.startswith(f'{root}side_linears.') for name in w) // 2
    released = beside_eva and number == config['layers'] // 2
    every = 2 if released else config['layers'] // number
    for k in range(number):
        block, x = f'{blocks}{k}.', outputs[(k + 1) * every - 1]
        norm, project = f'{root}side_lns.{k}', f'{root}side_linears.{k}'
        if beside_eva:
            z = layer_norm(w, norm, linear(w, project, x))
        else:
            z = linear(w, project, layer_norm(w, norm, x))
        token, half = z[:, :, 0], s.shape[-1] // 2
        u = seen[f'x_mixed/{k}'] = 0.5 * s + 0.5 * z[:, :, 1:].reshape(s.shape)
        none = jnp.zeros_like(token[:, :1, :half])
        ahead = jnp.concatenate([token[:, 1:, :half], none], axis=1)
        behind = jnp.concatenate([none, token[:, :-1, half:]], axis=1)
        shifted = jnp.concatenate([ahead, behind], axis=-1)

        if beside_eva:
            moved = conv(f'{block}conv', u)
            u = u + batch_norm(f'{block}bn_1', moved)
        else:
            moved = conv(f'{block}conv', batch_norm(f'{block}bn_1', u))
            u = u + moved
        v = rearrange(u, 'b t h w c -> b t (h w) c') + positions
        v = rearrange(jnp.concatenate([shifted[:, :, None], v], 2), 'b t l c -> (b t) l c')
        if beside_eva:
            looked = attention(f'{block}attn', v).reshape(u.shape)
            u = u + layer_norm(w, f'{block}ln_1', looked)
            s = u + batch_norm(f'{block}bn_2', mlp(f'{block}mlp', u))
        else:
            looked = attention(f'{block}attn', layer_norm(w, f'{block}ln_1', v)).reshape(u.shape)
            u = u + looked
            s = u + mlp(f'{block}mlp', batch_norm(f'{block}bn_2', u))
        seen |= {f'cls_side/{k}': token, f'cls_shifted/{k}': shifted, f'conv_out/{k}': moved}
        seen |= {f'attn_out/{k}': looked, f'x_side/{k}': s}
    if not beside_eva:
        s = batch_norm('visual.side_post_bn', s)
    feature = s.mean((1, 2, 3))
    return seen | {'feature': feature, 'logits': linear(w, 'fc', feature)}, running
