"""Training steps of DiST and EVL in plain PyTorch, as the papers describe them, and their time.

    PYTHON tools/gpu/torch_steps.py '{"model": "dist", ...}'

Needs torch alone, so that it may live in another environment than JAX. The sizes are those that
`tools.compare_gpu` reads from a row of configs/; it prints one line of JSON. Compute is bfloat16 by
autocast, attention is `scaled_dot_product_attention`, the frozen tower runs without gradients, and
parameters, their gradients and AdamW's moments are float32, as released code has it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Size:
    """What a step is measured at; see the configs for the names of a family's own fields."""

    model: str
    batch_size: int
    steps: int
    num_classes: int
    num_frames: int
    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    embed_dim: int
    options: dict

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def split(x: Tensor, heads: int) -> Tensor:
    """(N, L, C) -> (N, h, L, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split(y, self.heads) for y in self.qkv(self.ln_1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.c_proj(quick_gelu(self.c_fc(self.ln_2(x)))), q, k


class Tower(nn.Module):
    """CLIP's image tower: (N, 3, H, W) -> outputs, queries and keys of every block."""

    def __init__(self, size: Size):
        super().__init__()
        patch = size.patch_size
        self.conv = nn.Conv2d(3, size.width, patch, patch, bias=False)
        self.cls = nn.Parameter(torch.randn(size.width) * 0.02)
        self.positions = nn.Parameter(torch.randn(size.grid**2 + 1, size.width) * 0.02)
        self.ln_pre = nn.LayerNorm(size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.depth))

    def forward(self, frames: Tensor, wanted: range, attention: bool) -> list[tuple[Tensor, ...]]:
        x = self.conv(frames).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.to(x.dtype).expand(len(x), 1, -1), x], 1) + self.positions
        x, found = self.ln_pre(x), []
        for number, block in enumerate(self.blocks):
            x, q, k = block(x)
            if number in wanted:
                found.append((x, q, k) if attention else (x,))
        return found


def channels(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """A norm over the channels of (B, C, T, g, g)."""
    return norm(x.movedim(1, -1)).movedim(-1, 1)


class DistLayer(nn.Module):
    def __init__(self, size: Size, last: bool):
        super().__init__()
        o, self.alpha = size.options, size.options['alpha']
        s, c, k = o['temporal_dim'], o['integration_dim'], o['temporal_kernel']
        hidden = int(s * o['temporal_conv_mlp_ratio'])
        self.ln = nn.LayerNorm(s)
        self.conv_time = nn.Conv3d(s, hidden, (k, 1, 1), padding=(k // 2, 0, 0))
        self.conv_space = nn.Conv3d(hidden, s, (1, 3, 3), padding=(0, 1, 1))
        self.input = nn.Linear(size.width, c)
        self.to_integration = nn.Conv3d(s, c, (self.alpha, 1, 1), (self.alpha, 1, 1))
        self.cls = nn.Parameter(torch.randn(size.num_frames // self.alpha, c) * 0.02)
        self.to_temporal = nn.Linear(c, s)
        self.to_temporal.requires_grad_(not last)  # nobody reads that of the last layer
        ffn, narrow = (
            int(c * o['integration_mlp_ratio']),
            int(c * o['integration_temporal_mlp_ratio']),
        )
        self.ln_u, self.ln_t = nn.LayerNorm(c), nn.LayerNorm(c)
        self.ffn_in, self.ffn_out = nn.Linear(c, ffn), nn.Linear(ffn, c)
        self.time_in, self.time_out = nn.Linear(c, narrow), nn.Linear(narrow, c)
        self.time_conv = nn.Conv2d(narrow, narrow, (k, 1), padding=(k // 2, 0))

    def forward(self, x: Tensor, r: Tensor, tap: Tensor, last: bool) -> tuple[Tensor, ...]:
        y = self.conv_space(quick_gelu(self.conv_time(channels(self.ln, x))))
        x = quick_gelu(x + y)
        m = self.input(tap).view(r.shape) + r
        patches = self.to_integration(x).flatten(3).permute(0, 2, 3, 1)
        cls = self.cls[None, :, None].expand(len(x), -1, 1, -1).to(patches.dtype)
        u = m + torch.cat([cls, patches], 2)
        r = self.ffn_out(quick_gelu(self.ffn_in(self.ln_u(u))))
        time = self.time_in(self.ln_t(u)).movedim(-1, 1)
        r = r + self.time_out(quick_gelu(self.time_conv(time)).movedim(1, -1))
        if not last:
            back = self.to_temporal(m[:, :, 1:]).repeat_interleave(self.alpha, 1)
            x = x + back.permute(0, 3, 1, 2).reshape(x.shape)
        return x, r, u


class QueryAttention(nn.Module):
    """One query (N, C) over tokens (N, M, C)."""

    def __init__(self, width: int, heads: int, inner: int = 0):
        super().__init__()
        inner, self.heads = inner or width, heads
        self.q, self.k, self.v = (nn.Linear(width, inner) for _ in range(3))
        self.out = nn.Linear(inner, width)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        q, k, v = self.q(query)[:, None], self.k(tokens), self.v(tokens)
        found = F.scaled_dot_product_attention(*(split(x, self.heads) for x in (q, k, v)))
        return self.out(found.transpose(1, 2).flatten(1))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.dropout(quick_gelu(self.c_fc(x))))


class Pooling(nn.Module):
    def __init__(self, width: int, frames: int):
        super().__init__()
        self.space, self.time = (QueryAttention(width, width // 64) for _ in range(2))
        self.ln_space, self.ln_time = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ln_s, self.ln_a = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp_s, self.mlp_a = Mlp(width, 4 * width), Mlp(width, 4 * width)
        self.positions = nn.Parameter(torch.randn(frames, width) * 0.02)

    def forward(self, a: Tensor, s: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        s = s + self.space(self.ln_space(s), self.ln_space(tokens))
        s = s + self.mlp_s(self.ln_s(s))
        frames = s.view(len(a), -1, s.shape[-1]) + self.positions
        a = a + self.time(self.ln_time(a), self.ln_time(frames))
        return a + self.mlp_a(self.ln_a(a)), s


class Dist(nn.Module):
    """The trainable part; arXiv:2309.07911, section 3."""

    def __init__(self, size: Size):
        super().__init__()
        o, p = size.options, size.patch_size
        c, k = o['integration_dim'], o['temporal_patch']
        self.alpha, self.frames = o['alpha'], size.num_frames // o['alpha']
        self.stem = nn.Conv3d(3, o['temporal_dim'], (k, p, p), (1, p, p), (k // 2, 0, 0))
        taken = o['selected_layers'] or range(size.depth)
        self.wanted, self.attention = [n % size.depth for n in taken], False
        count = len(self.wanted)
        self.layers = nn.ModuleList(DistLayer(size, n == count - 1) for n in range(count))
        self.clip_query, self.frame_query = (nn.Parameter(torch.randn(c) * 0.02) for _ in range(2))
        pools = o['ada_pooling_layers']
        self.pools = nn.ModuleList(Pooling(c, self.frames) for _ in range(pools))
        self.from_frozen, self.ln_post = nn.Linear(size.width, c), nn.LayerNorm(c)
        self.proj = nn.Linear(c, size.embed_dim, bias=False)
        self.text = o['head'] == 'text'
        if self.text:
            text = F.normalize(torch.randn(size.num_classes, size.embed_dim), dim=-1)
            self.register_buffer('classes', text)
        else:
            self.head = nn.Linear(size.embed_dim, size.num_classes)

    def seen(self, video: Tensor) -> Tensor:
        return video[:, :: self.alpha]

    def forward(self, video: Tensor, taps: list[tuple[Tensor, ...]]) -> Tensor:
        x, batch = self.stem(video.transpose(1, 2)), len(video)
        width = self.clip_query.shape[0]
        r = x.new_zeros(batch, self.frames, taps[0][0].shape[1], width)
        for number, (layer, (tap,)) in enumerate(zip(self.layers, taps)):
            x, r, u = layer(x, r, tap, number == len(self.layers) - 1)
        tokens = (r + u).flatten(0, 1)
        a = self.clip_query.to(x.dtype).expand(batch, -1)
        s = self.frame_query.to(x.dtype).expand(len(tokens), -1)
        for pool in self.pools:
            a, s = pool(a, s, tokens)
        frozen = taps[-1][0][:, 0].view(batch, self.frames, -1).mean(1)
        v = self.proj(self.ln_post(a + self.from_frozen(frozen)))
        if self.text:
            return 100 * F.normalize(v.float(), dim=-1) @ self.classes.T
        return self.head(v)


class EvlLayer(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        o, width, grid = size.options, size.width, size.grid
        self.conv = nn.Conv1d(width, width, 3, padding=1, groups=width)
        self.positions = nn.Parameter(torch.zeros(size.num_frames, width))
        self.tables = nn.Parameter(torch.zeros(2, (2 * grid - 1) ** 2, width))
        place = torch.arange(grid)
        row, column = (x.flatten() for x in torch.meshgrid(place, place, indexing='ij'))
        offset = (row[:, None] - row + grid - 1) * (2 * grid - 1)
        self.register_buffer('offset', offset + column[:, None] - column + grid - 1)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attention = QueryAttention(width, o['num_heads'], o['qkv_dim'])
        self.mlp = Mlp(width, round(o['mlp_ratio'] * width), o['mlp_dropout'])

    def forward(self, x: Tensor, frozen: Tensor, maps: Tensor) -> Tensor:
        """x (B, C), frozen (B, T, L, C), maps (B, T, 2, N, N) of neighbouring frames."""
        batch, frames, length, width = frozen.shape
        time = frozen.permute(0, 2, 3, 1).reshape(-1, width, frames)
        moved = self.conv(time).view(batch, length, width, frames).permute(0, 3, 1, 2)
        memory = frozen + moved + self.positions[:, None]
        relative = torch.einsum('btsmn,smnc->btmc', maps, self.tables[:, self.offset].to(maps))
        memory = memory + F.pad(relative, (0, 0, 1, 0))
        memory = self.norms[2](memory).flatten(1, 2)
        x = x + self.attention(self.norms[0](x), memory)
        return x + self.mlp(self.norms[1](x))


def neighbour_maps(q: Tensor, k: Tensor, frames: int) -> Tensor:
    """(B*T, h, L, d) twice -> (B, T, 2, N, N): to the frame before and the one after."""
    q, k = (x[:, :, 1:].unflatten(0, (-1, frames)) for x in (q, k))
    maps = q.new_zeros(*q.shape[:2], 2, q.shape[3], q.shape[3])
    scale = q.shape[-1] ** -0.5
    maps[:, 1:, 0] = ((q[:, 1:] * scale) @ k[:, :-1].mT).softmax(-1).mean(2).to(maps)
    maps[:, :-1, 1] = ((q[:, :-1] * scale) @ k[:, 1:].mT).softmax(-1).mean(2).to(maps)
    return maps


class Evl(nn.Module):
    """The trainable part; arXiv:2208.03550, section 3."""

    def __init__(self, size: Size):
        super().__init__()
        o, self.frames = size.options, size.num_frames
        self.wanted = range(size.depth - o['depth'], size.depth)
        self.attention = True
        self.query = nn.Parameter(torch.zeros(size.width))
        self.layers = nn.ModuleList(EvlLayer(size) for _ in range(o['depth']))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, size.num_classes)
        self.dropout = nn.Dropout(o['head_dropout'])

    def seen(self, video: Tensor) -> Tensor:
        return video

    def forward(self, video: Tensor, taps: list[tuple[Tensor, ...]]) -> Tensor:
        x = self.query.expand(len(video), -1)
        for layer, (frozen, q, k) in zip(self.layers, taps):
            with torch.no_grad():
                maps = neighbour_maps(q, k, self.frames)
            x = layer(x, frozen.unflatten(0, (-1, self.frames)), maps)
        return self.head(self.dropout(self.norm(x)))


MODELS = {'dist': Dist, 'evl': Evl}


def measure(size: Size) -> dict[str, object]:
    """Seconds of steps, trainable parameters, and peak memory where there is a GPU."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    tower = Tower(size).to(device).eval().requires_grad_(False)
    net = MODELS[size.model](size).to(device).train()
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=device == 'cuda')
    shape = (size.batch_size, size.num_frames, 3, size.image_size, size.image_size)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    targets = F.one_hot(torch.arange(size.batch_size) % size.num_classes, size.num_classes)
    targets = targets.float().to(device)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))

    def step() -> Tensor:
        share = torch.rand((), device=device)
        video = clips.float()
        video = (video * share + video.flip(0) * (1 - share)) / 255  # mixup
        mixed = targets * share + targets.flip(0) * (1 - share)
        with torch.autocast(device, torch.bfloat16):
            video = ((video - mean) / std).bfloat16()
            with torch.no_grad():
                taps = tower(net.seen(video).flatten(0, 1), net.wanted, net.attention)
            loss = F.cross_entropy(net(video, taps).float(), mixed)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1e9)  # the norm is logged
        optimizer.step()
        return loss

    seconds = []
    for _ in range(size.steps + 3):
        started = time.monotonic()
        loss = step()
        if device == 'cuda':
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - started)
    if not torch.isfinite(loss):
        raise RuntimeError(f'loss is {loss.item()}')
    peak = torch.cuda.max_memory_allocated() if device == 'cuda' else None
    return {
        'device': torch.cuda.get_device_name() if device == 'cuda' else 'cpu',
        'version': f'torch {torch.__version__}',
        'parameters': sum(p.numel() for p in net.parameters()),
        'step_seconds': statistics.median(seconds[3:]),
        'peak_bytes': peak,
    }


if __name__ == '__main__':
    print(json.dumps(measure(Size(**json.loads(sys.argv[1])))))
