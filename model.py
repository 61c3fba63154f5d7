"""The networks of DUO-VSR and what their outputs mean.

    CONVENTIONS (each has a test)
    time        t in [0, 1]; t = 1 is pure noise; the time embedding is that of 1000 t
    path        z_t = (1 - t) z_0 + t eps
    velocity    v = eps - z_0, so that z_0 = z_t - t v and eps = z_t + (1 - t) v
    student     z_0 = eps - v(eps, t = 1, z_lr, c): one Euler step from noise to data
    guidance    v_cfg = (1 + w) v(c) - w v(neg), neg the prompt AGAINST; w = 0: none (the usual scale is 1 + w)
    shift       time_shift(u, s) = s u / (1 + (s - 1) u)

    SHAPES
    B batch   C latent channels   T latent frames   H, W latent rows, columns   F = 4 (T - 1) + 1 video frames
    N tokens = T * H/2 * W/2      D model width     h heads                     K = D / h
    latents (B, C, T, H, W)   video (B, 3, F, p H, p W) in [-1, 1], p the stride   tokens (B, N, D)   t (B,)

    NAMES
    cfg is the Config of a run; cfg_w, cfg_steps, cfg_target and the part "cfg" are of classifier-free guidance
    lr, and lr_fake, lr_head, pd_lr, cfg_lr, are learning rates; z_lr, lr_noise and the lr of a clip are low resolution

DiT is the Wan2.1 block at every size, under Wan's own parameter names (Wan-Video/Wan2.1, wan/modules/model.py), with
twice the input channels: the noisy latent and the latent of the upsampled low-resolution video, [z_t, z_lr].
At the presets tiny and small a few convolutions (Predictor) first turn z_lr into a guess of z_0, and the output is
added to a velocity that needs no network (linear_velocity).

To read the stages it is enough to get to RFSHead; below it are tiling, the video codes, and loading.
"""
import functools
import itertools
import math
import os
import re
import threading
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

NULL, POSITIVE, NEGATIVE = 0, 1, 2      # prompt ids: no text, high quality, low quality
AGAINST = NEGATIVE                      # neg, what guidance moves away from [ours]; the paper's: NULL, no text

# learned: prompts are parameters; otherwise they are read from a file
# predictor: width of the Predictor, whose guess takes the place of z_lr; 0: none, and no linear_velocity
# rope: base of the rotary frequencies. A short head has few: 10000 would leave it 1, 0.16, 0.03, ... radians a token
MODELS = {
    "tiny":    dict(dim=128, layers=6, heads=4, ffn=512, text_dim=64, prompt_len=4, learned=True,        # 1.93 M
                    predictor=48, rope=100),
    "small":   dict(dim=512, layers=12, heads=8, ffn=2048, text_dim=256, prompt_len=8, learned=True,     # 53.48 M
                    predictor=96, rope=100),
    "wan1.3b": dict(dim=1536, layers=30, heads=12, ffn=8960, text_dim=4096, prompt_len=512, learned=False),  # 1419.10 M
}

# ----------------------------------------------------------------------------
# flow matching: the conventions of sign, time and guidance (elsewhere: v = eps - z_0, and pd_target's Euler steps)


def bcast(t, like):
    """t: (B,) viewed as (B, 1, 1, ...), to multiply a tensor shaped like `like`."""
    return t.view(-1, *[1] * (like.ndim - 1))


def add_noise(z_0, eps, t):
    """z_t = (1 - t) z_0 + t eps, the flow-matching path. t: (B,) in [0, 1]."""
    t = bcast(t, z_0)
    return (1 - t) * z_0 + t * eps


def to_x0(z_t, v, t):
    """The clean latent that velocity v at z_t points to: z_0 = z_t - t v."""
    return z_t - bcast(t, z_t) * v


def time_shift(u, s):
    """s u / (1 + (s - 1) u): moves times in [0, 1] towards noise for s > 1; 0 and 1 stay (SD3, Wan)."""
    return s * u / (1 + (s - 1) * u)


def time_grid(steps, shift):
    """The steps + 1 times of an Euler sampler, from 0 (data) to 1 (noise). Grids of N and 2N steps nest."""
    return time_shift(torch.arange(steps + 1, dtype=torch.float64) / steps, shift).float()


def guide(v_c, v_neg, w):
    """Classifier-free guidance, v_cfg = (1 + w) v(c) - w v(neg). Where both branches are equal it is v(c) for any w."""
    return (1 + w) * v_c - w * v_neg


def euler(velocity, eps, steps, shift):
    """Integrate dz/dt = velocity(z, t) from t = 1 to t = 0 over time_grid(steps, shift). eps: (B, ...). Returns z_0."""
    z, grid = eps, time_grid(steps, shift).to(eps.device)
    for i in range(steps, 0, -1):
        t = grid[i].expand(len(z))
        z = z - (grid[i] - grid[i - 1]) * velocity(z, t)
    return z


def prompt(z, which=POSITIVE):
    """(B,) prompt ids, one for each sample of z."""
    return torch.full((len(z),), which, dtype=torch.long, device=z.device)


def sample(net, eps, z_lr, steps, shift, w=0.0):
    """The multi-step sampler: `steps` Euler steps under the positive prompt, guided where w > 0. Returns z_0."""
    def velocity(z, t):
        v_c = net(z, t, z_lr, prompt(z)).float()                        # fp32: guidance subtracts, bf16 loses digits
        if not w:
            return v_c
        return guide(v_c, net(z, t, z_lr, prompt(z, AGAINST)).float(), w)
    return euler(velocity, eps, steps, shift)


def one_step(net, eps, z_lr):
    """The one-step student: z_0 = eps - v(eps, t = 1, z_lr, c). Gradient flows. eps, z_lr: (B, C, T, H, W)."""
    return eps - net(eps, torch.ones(len(eps), device=eps.device), z_lr, prompt(eps)).float()


def linear_velocity(z_t, t, z_lr, variance):
    """E[v | z_t, z_lr] if z_0 - z_lr were white Gaussian noise of this variance, (C,): the part that needs no network.

    A small network has to copy eps to its output, v = eps - z_0, and what it fails to copy stays in z_0 as grain. With
    this added it only learns the rest: at t = 1 this is z_t - z_lr, so the one step starts from z_0 = z_lr (the guess,
    where there is one); at t = 0 it is -z_t. The skip connection of EDM (Karras et al. 2022), for flow matching given
    z_lr.
    """
    t, variance = bcast(t, z_t), variance.view(1, -1, 1, 1, 1)
    # with r = z_0 - z_lr: v = eps - r - z_lr, and z_t - (1 - t) z_lr = (1 - t) r + t eps =: y, so E[v | y] = k y - z_lr
    # where k = Cov(eps - r, y) / Var(y)
    k = (t - (1 - t) * variance) / (t.square() + (1 - t).square() * variance)
    return k * (z_t - (1 - t) * z_lr) - z_lr


# ----------------------------------------------------------------------------
# the transformer


def sinusoid(t, dim=256):
    """(B,) -> (B, dim): [cos(t w_i), sin(t w_i)], w_i = 10000^(-2i/dim). In float64, as Wan: t goes up to 1000."""
    w = 10000 ** (-torch.arange(dim // 2, dtype=torch.float64, device=t.device) / (dim // 2))
    angle = t.double()[:, None] * w
    return torch.cat([angle.cos(), angle.sin()], dim=1).float()


@functools.lru_cache(maxsize=16)
def rope_table(T, H, W, K, base, device):
    """(T*H*W, K/2) unit complex numbers. K is split into parts for time, height and width, K - 4 (K // 6), 2 (K // 6)
    and 2 (K // 6) (44 + 42 + 42 at K = 128), each with a full spectrum of its own, base^(-2i/k) radians a token, at
    integer positions."""
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in (T, H, W)))       # (T*H*W, 3)
    sizes = K - 4 * (K // 6), 2 * (K // 6), 2 * (K // 6)
    angle = torch.cat([torch.outer(place, base ** (-torch.arange(0, k, 2, dtype=torch.float64) / k))
                       for place, k in zip(places.T, sizes, strict=True)], dim=1)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64).to(device)


def rotate(x, table):
    """Rotary embedding: interleaved pairs (x[2j], x[2j+1]) turned as complex numbers. x: (B, N, h, K)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table[:, None]).flatten(-2).type_as(x)


def modulate(x, shift, scale):
    """x (1 + scale) + shift, in one pass over x."""
    return torch.addcmul(shift, x, 1 + scale)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the whole last axis; for q and k that is all heads together."""
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps).type_as(x)


class Attention(nn.Module):
    """Softmax attention of x over `context` (itself by default), q and k RMS-normed over the full width D."""
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def forward(self, x, context=None, table=None):
        context = x if context is None else context
        q = self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))              # (B, N, h, K)
        k = self.norm_k(self.k(context)).unflatten(-1, (self.heads, -1))        # (B, M, h, K)
        v = self.v(context).unflatten(-1, (self.heads, -1))
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One Wan block: self-attention and FFN under AdaLN modulation, cross-attention to the prompt in between."""
    def __init__(self, dim, heads, ffn):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.self_attn = Attention(dim, heads)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)                                # Wan's numbering: 1, 3, 2
        self.cross_attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn), nn.GELU(approximate="tanh"), nn.Linear(ffn, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim ** 0.5)

    def forward(self, x, e0, text, table):
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + e0).chunk(6, dim=1)   # (B, 1, D) each
        x = torch.addcmul(x, gate1, self.self_attn(modulate(self.norm1(x), shift1, scale1), table=table))
        x = x + self.cross_attn(self.norm3(x), text)
        return torch.addcmul(x, gate2, self.ffn(modulate(self.norm2(x), shift2, scale2)))      # x + gate2 * ffn


class Head(nn.Module):
    """The last layer of a DiT: tokens to patches of velocity, modulated by time."""
    def __init__(self, dim, out):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.head = nn.Linear(dim, out)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim ** 0.5)

    def forward(self, x, e):
        shift, scale = (self.modulation + e[:, None]).chunk(2, dim=1)
        return self.head(modulate(self.norm(x), shift, scale))


class Predictor(nn.Module):
    """A first guess of z_0, from which the transformer goes on (predict and refine, Whang et al. 2022): z_lr + R(z_lr),
    R a small convolutional network that starts at 0 (EDSR's blocks, Lim et al. 2017). (B, C, T, H, W), like z_lr.

    A token of [z_t, z_lr] is 128 numbers, half of them noise, and a narrow transformer does not learn through them what
    a few convolutions learn of z_lr in minutes (LOG.md, "a first guess by convolutions").
    """

    def __init__(self, channels, width, depth=3):
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, channels, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
                                                  nn.Conv2d(width, width, 3, padding=1)) for _ in range(depth))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, z_lr):
        x = self.first(rearrange(z_lr, "B C T H W -> (B T) C H W"))
        for block in self.blocks:
            x = x + block(x)
        return z_lr + rearrange(self.last(x), "(B T) C H W -> B C T H W", B=len(z_lr))


class DiT(nn.Module):
    """The velocity v(z_t, t, z_lr, c) of a video diffusion transformer with Wan2.1's block and parameter names."""

    def __init__(self, dim, layers, heads, ffn, text_dim, prompt_len, learned, predictor=0, rope=10000,
                 channels=16):
        super().__init__()
        self.rope = rope                                                # base of the rotary frequencies
        self.checkpointing = False                                      # keep block inputs, compute the rest twice
        self.predictor = Predictor(channels, predictor) if predictor else None
        # E (z_0 - z_lr)^2 of each channel, for linear_velocity: stage 0 measures it before the Predictor has learnt
        self.register_buffer("residual", torch.full((channels,), 0.5) if predictor else None)
        self.patch_embedding = nn.Conv3d(2 * channels, dim, (1, 2, 2), stride=(1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, heads, ffn) for _ in range(layers))
        self.head = Head(dim, 4 * channels)
        prompts = torch.randn(3, prompt_len, text_dim)                  # rows NULL, POSITIVE, NEGATIVE
        if learned:
            self.prompts = nn.Parameter(prompts)
        else:
            self.register_buffer("prompts", prompts)
        self.init_weights()

    def init_weights(self):
        """Wan's initialisation, and zeros for the input columns of z_lr, which fresh blocks ignore."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (self.text_embedding[0], self.text_embedding[2], self.time_embedding[0], self.time_embedding[2]):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        with torch.no_grad():
            self.patch_embedding.weight[:, self.patch_embedding.in_channels // 2:] = 0
        nn.init.zeros_(self.head.head.weight)                           # a fresh model adds nothing

    def forward(self, z, t, z_lr, text, taps=()):
        """Velocity at z_t. With `taps` (block indices), also the outputs of those blocks, each (B, N, D).

        z, z_lr: (B, C, T, H, W), H and W even. t: (B,) in [0, 1]. text: (B,) prompt ids, or embeddings
        (B, prompt_len, text_dim). Returns v like z, or (v, [features]).
        """
        start = z_lr if self.predictor is None else self.predictor(z_lr)        # a guess of z_0, where there is one
        context = self.prompts[text] if text.dtype == torch.long else text
        context = self.text_embedding(context)                          # (B, prompt_len, D); padding is attended to
        with torch.autocast("cuda" if z.is_cuda else "cpu", enabled=False):     # time in fp32: it scales everything
            e = self.time_embedding(sinusoid(1000 * t))                 # (B, D)
            e0 = self.time_projection(e).unflatten(1, (6, -1))          # (B, 6, D)
        x = self.patch_embedding(torch.cat([z, start], dim=1))          # (B, D, T, H/2, W/2)
        T, H, W = x.shape[2:]                                           # of tokens
        x = rearrange(x, "B D T H W -> B (T H W) D").float().contiguous()       # the residual stream stays fp32
        table = rope_table(T, H, W, x.shape[-1] // self.blocks[0].self_attn.heads, self.rope, x.device)
        features = []
        for i, block in enumerate(self.blocks):
            if self.checkpointing and torch.is_grad_enabled():          # a reentrant one needs an input with gradient
                x = checkpoint(block, x, e0, context, table, use_reentrant=False)
            else:
                x = block(x, e0, context, table)
            if i in taps:
                features.append(x)
        with torch.autocast("cuda" if z.is_cuda else "cpu", enabled=False):     # in fp32: the velocity is not rounded
            v = self.head(x, e)
        v = rearrange(v, "B (T H W) (p q C) -> B C T (H p) (W q)", T=T, H=H, W=W, p=2, q=2)
        if self.residual is not None:
            v = v + linear_velocity(z, t, start, self.residual)
        return (v, features) if taps else v


def to_bf16(net):
    """Convert the linear layers of a frozen net's blocks, nearly all of it, to bf16, in which autocast computes."""
    for module in net.blocks.modules():
        if isinstance(module, nn.Linear):
            module.bfloat16()
    return net


def compile_blocks(net):
    """torch.compile of the blocks, nearly all of a DiT. They share their code, so it is compiled once."""
    for block in net.blocks:
        block.compile()


class LoRA(nn.Module):
    """Low-rank adapters of all linear layers in the blocks of a frozen DiT (Hu et al. 2021): y + up(down(x)).

    up starts at 0. The adapters become net.lora, where DDP finds them; `merged` is the net without them. In bf16 what
    is far smaller than y is rounded away: the first updates hardly show in the output, though the gradient is right.
    """

    def __init__(self, net, rank):
        super().__init__()
        layers = {name: layer for name, layer in net.blocks.named_modules() if isinstance(layer, nn.Linear)}
        self.names = list(layers)
        self.down = nn.ModuleList(nn.Linear(x.in_features, rank, bias=False) for x in layers.values())
        self.up = nn.ModuleList(nn.Linear(rank, x.out_features, bias=False) for x in layers.values())
        for layer, down, up in zip(layers.values(), self.down, self.up, strict=True):
            nn.init.zeros_(up.weight)
            layer.register_forward_hook(lambda layer, inputs, y, down=down, up=up: y + up(down(inputs[0])))
        self.to(net.head.head.weight.device)
        net.requires_grad_(False)
        net.lora = self


@torch.no_grad()
def merged(net):
    """The state dict of a DiT with its adapters, if it has any, added to its weights: what a plain DiT loads."""
    state = {name: x for name, x in net.state_dict().items() if not name.startswith("lora.")}
    if hasattr(net, "lora"):
        for name, down, up in zip(net.lora.names, net.lora.down, net.lora.up, strict=True):
            state[f"blocks.{name}.weight"] = state[f"blocks.{name}.weight"] + up.weight @ down.weight
    return state


def tap_blocks(layers):
    """Block indices at 0.45, 0.72 and all of the depth: 2, 3, 5 of 6; 13, 21, 29 of 30 (those of Self-Forcing)."""
    return tuple(sorted({max(0, int(f * layers + 0.5) - 1) for f in (0.45, 0.72, 1.0)}))


def normalise(feature):
    """LayerNorm over the width without parameters: features of all depths get the same scale. (B, N, D)."""
    return F.layer_norm(feature.float(), feature.shape[-1:])


class RFSHead(nn.Module):
    """The convolutional discriminator head of RFS-GAN on features of the real and the fake score model.

    dim: width D of one feature. taps: how many features there are of each model. grid: (T, H/2, W/2) token grid.
    models: 2 for real and fake, 1 for one of them. pooled: one logit per clip instead of one per patch (as DMD2).
    The last convolution starts at 0, so all logits start at 0 and the hinge loss at exactly 2. No GroupNorm between its
    layers [ours]: it would divide by how strong a feature is over the clip, which first tells HR from a student
    (`normalise` is per token, and keeps the shares of its features).
    """

    def __init__(self, dim, taps, channels, grid, models=2, pooled=False):
        super().__init__()
        self.grid, layers, size = grid, [], min(grid[1:])
        # a convolution over single tokens is a matrix product; as one it takes half the time on a CPU
        self.project = nn.Linear(models * taps * dim, channels)
        for _ in range(2):
            layers.append(nn.LeakyReLU(0.2))
            if size >= 4:                                               # halve the token grid, keep time
                layers.append(nn.Conv3d(channels, channels, (3, 4, 4), stride=(1, 2, 2), padding=1))
                size //= 2
            else:                                                       # a side under 4 is left as it is
                layers.append(nn.Conv3d(channels, channels, 3, padding=1))
        layers.append(nn.LeakyReLU(0.2))
        if pooled:
            layers.append(nn.AdaptiveAvgPool3d(1))
        layers.append(nn.Conv3d(channels, 1, 1))
        nn.init.zeros_(layers[-1].weight)
        nn.init.zeros_(layers[-1].bias)
        self.layers = nn.Sequential(*layers)

    def forward(self, features):
        """features: list of (B, N, D), the real model's taps, then the fake's. Returns logits of patches, (B, T, y, x),
        or, pooled, of clips, (B, 1, 1, 1)."""
        x = self.project(torch.cat([normalise(f) for f in features], dim=-1))   # depths and models differ in norm
        T, H, W = self.grid
        return self.layers(rearrange(x, "B (T H W) D -> B D T H W", T=T, H=H, W=W)).squeeze(1)


# ----------------------------------------------------------------------------
# latents larger than the network was trained on


def overlaps(tile):
    """How many latents neighbouring tiles share in T, H, W: 2, 4, 4, or less where tiles are small. Without overlap
    in time the texture jumps where one window ends and the next begins (LOG.md, "the pop between windows")."""
    return [min(o, k // 4 * 2) for o, k in zip((2, 4, 4), tile, strict=True)]


def tile_starts(n, tile, overlap):
    """Where tiles of this length start so that they cover 0..n, neighbours sharing at least `overlap`."""
    if n <= tile:
        return [0]
    return [*range(0, n - tile, tile - overlap), n - tile]


def tile_weight(n, overlap, device):
    """(n,) trapezoid: 1 inside, falling towards both ends over `overlap`, never 0."""
    i = torch.arange(n, device=device)
    return ((1 + torch.minimum(i, n - 1 - i)) / (overlap + 1)).clamp_max(1.0)


def tiled(net, tile, at_once=4):
    """A velocity function (z, t, z_lr, text) for latents of any size: net on overlapping tiles, blended.

    tile: (T, H, W) in latent pixels, H and W even. The noise is in z, so tiles that overlap see the same.
    at_once: tiles per forward pass.
    """
    overlap = overlaps(tile)

    def velocity(z, t, z_lr, text):
        sizes = [min(n, k) for n, k in zip(z.shape[2:], tile, strict=True)]
        starts = [tile_starts(n, k, o) for n, k, o in zip(z.shape[2:], tile, overlap, strict=True)]
        boxes = [(..., *(slice(a, a + k) for a, k in zip(corner, sizes, strict=True)))
                 for corner in itertools.product(*starts)]
        if len(boxes) == 1:
            return net(z, t, z_lr, text).float()
        ramps = [tile_weight(k, o, z.device) for k, o in zip(sizes, overlap, strict=True)]
        weight = ramps[0][:, None, None] * ramps[1][:, None] * ramps[2]
        out, total = torch.zeros_like(z), torch.zeros(z.shape[2:], device=z.device)
        for i in range(0, len(boxes), at_once):
            group = boxes[i:i + at_once]
            v = net(torch.cat([z[b] for b in group]), t.repeat(len(group)), torch.cat([z_lr[b] for b in group]),
                    text.repeat(len(group))).float()
            for box, part in zip(group, v.chunk(len(group)), strict=True):
                out[box] += weight * part
                total[box] += weight
        return out / total
    return velocity


# ----------------------------------------------------------------------------
# the video code


class PatchVAE(nn.Module):
    """A linear video code: PCA of 4 x 4 x 4 pixel patches that overlap, in closed form; nothing in it is trained.

    The first frame is repeated to fill its patch, so F = 4 (T - 1) + 1. Patches that only touch would show as a grid:
    what a network adds in one does not continue in the next. So before the PCA the two pixels on either side of every
    border are mixed by a rotation (`lap`), and each latent draws a patch of 8 x 8 pixels that fades out: a lapped
    orthogonal transform (Malvar 1990; as a filter before the blocks, Tran, Liang and Tu 2003). The decoder rotates
    back a little further than the encoder did, which smooths what neighbouring patches disagree on. In time patches
    only touch; `draw_onto` smooths there.
    Latents have mean square 1 over all channels; a channel's standard deviation goes as the square root of that of its
    principal component. `fit` must be called, or weights be loaded, before use.
    """
    stride, channels = 4, 16
    angles = 0.5, 0.6   # radians, of the encoder and the decoder (JPEG XR: pi / 8): LOG.md, "patches that overlap"

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(192))
        self.register_buffer("basis", torch.zeros(192, 16))
        self.register_buffer("scale", torch.ones(16))

    def lap(self, video, angle):
        """Turn the four pixels a, b | c, d around every patch border, along height, then width, in place: a + d and
        b + c stay, (a - d, b - c) is rotated by `angle`. An orthogonal map; -angle undoes it."""
        c, s = math.cos(angle), math.sin(angle)
        for axis in (-2, -1):
            inner = video.narrow(axis, 2, video.shape[axis] - 4)
            first, second, third, fourth = inner.unflatten(axis, (-1, 4)).unbind(axis)
            u, v = (first - fourth) / 2, (second - third) / 2
            du, dv = (c - 1) * u - s * v, s * u + (c - 1) * v
            first += du
            fourth -= du
            second += dv
            third -= dv
        return video

    def patches(self, video):
        """(B, 3, F, 4H, 4W) -> T times (B, H, W, 192), one latent frame after another: all at once would take several
        times the memory of the video."""
        if (video.shape[2] - 1) % 4 or video.shape[3] % 4 or video.shape[4] % 4:
            raise ValueError(f"video {tuple(video.shape)}: F must be 4 n + 1, height and width multiples of 4")
        for k in range(0, video.shape[2], 4):
            group = video[:, :, k - 3:k + 1] if k else video[:, :, :1].expand(-1, -1, 4, -1, -1)
            group = self.lap(group.clone(memory_format=torch.contiguous_format), self.angles[0])
            yield rearrange(group, "B c f (H p) (W q) -> B H W (c f p q)", p=4, q=4)

    def fit(self, videos):
        """Principal components of the patches of videos (B, 3, F, 4H, 4W), in closed form."""
        x = torch.stack(list(self.patches(videos)), dim=1).flatten(0, 3).double()
        self.mean.copy_(x.mean(0))
        variance, vectors = torch.linalg.eigh(torch.cov(x.T))           # ascending
        std = variance[-16:].flip(0).clamp_min(1e-8).sqrt()
        vectors = vectors[:, -16:].flip(1)
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        self.basis.copy_(vectors * largest.sign())                      # an eigenvector has no sign of its own
        share = std ** 0.5
        self.scale.copy_(std / (share / share.square().mean().sqrt()))  # latent std = share, mean square 1

    def encode(self, video):
        """(B, 3, F, 4H, 4W) in [-1, 1] -> (B, 16, T, H, W)."""
        mean = self.mean @ self.basis
        z = [(x @ self.basis - mean) / self.scale for x in self.patches(video)]
        return rearrange(z, "T B H W C -> B C T H W")

    def decode(self, z):
        """(B, 16, T, H, W) -> (B, 3, F, 4H, 4W)."""
        return torch.cat(list(self.draw(z, self.mean)), dim=2)

    def draw(self, z, mean):
        """What z adds to this mean patch (192,): for each latent frame its 4 frames, or 1, (B, 3, 1 or 4, 4H, 4W)."""
        B, _, T, H, W = z.shape
        for k in range(T):
            x = torch.addmm(mean, rearrange(z[:, :, k], "B C H W -> (B H W) C") * self.scale, self.basis.T)
            x = rearrange(x, "(B H W) (c f p q) -> B c f (H p) (W q)", B=B, H=H, W=W, c=3, f=4, p=4, q=4)
            yield self.lap((x if k else x[:, :, 3:]).contiguous(), -self.angles[1])

    def draw_onto(self, video, z, z_0):
        """video, whose latent is z, changed as the latent changes from z to z_0: what has no latent stays in it.

        This is video + decode(z_0) - decode(z), as the code is linear; but where one latent's frames end and the next
        one's begin, each side takes a quarter of the jump and half of it is left (LOG.md, "every fourth frame").
        """
        out, end, last = torch.empty_like(video), 0, None
        for change in self.draw(z_0 - z, torch.zeros_like(self.mean)):
            start, end = end, end + change.shape[2]
            torch.add(video[:, :, start:end], change, out=out[:, :, start:end])
            if start:
                quarter = (change[:, :, 0] - last) / 4
                out[:, :, start - 1] += quarter
                out[:, :, start] -= quarter
            last = change[:, :, -1]
        return out


class WanVAE(nn.Module):
    """The video code of Wan2.1, diffusers' AutoencoderKLWan, behind PatchVAE's interface: 8 x 8 pixels, 4 frames.

    Latents are (posterior mean - mean) / std of each channel, as Wan's transformer expects them. `dtype` is what it
    computes in, under autocast too; videos and latents are float32 outside. After code.enable_tiling() it works in
    windows of 256 pixels every 192, blended: less memory, and not quite the same numbers. `config` overrides the sizes
    of diffusers' module. Nothing in it is trained; load_wan_vae, or a checkpoint, fills it.
    """
    stride, channels = 8, 16
    MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
    STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)

    def __init__(self, dtype=torch.float32, **config):
        super().__init__()
        try:
            from diffusers import AutoencoderKLWan
        except ImportError:
            raise SystemExit("Wan's video code needs diffusers: pip install -r requirements-wan.txt") from None
        self.alone = threading.Lock()                                   # diffusers' module keeps a clip's last frames
        self.register_buffer("mean", torch.tensor(self.MEAN).view(1, 16, 1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.STD).view(1, 16, 1, 1, 1), persistent=False)
        self.code = AutoencoderKLWan(**config).requires_grad_(False)
        self.compute_in(dtype)
        self.code.enable_slicing()                                      # one clip after another: a panel has four

    def compute_in(self, dtype):
        """Convert the weights, in the memory layout that 3D convolutions are fastest in."""
        self.dtype = dtype
        for p in self.code.parameters():                                # 5 axes: the weight of a 3D convolution
            p.data = p.data.to(dtype, memory_format=torch.channels_last_3d if p.ndim == 5 else torch.preserve_format)

    def encode(self, video):
        """(B, 3, F, 8H, 8W) in [-1, 1] -> (B, 16, T, H, W)."""
        if (video.shape[2] - 1) % 4 or video.shape[3] % 8 or video.shape[4] % 8:
            raise ValueError(f"video {tuple(video.shape)}: F must be 4 n + 1, height and width multiples of 8")
        with self.alone, torch.autocast(video.device.type, enabled=False):
            z = self.code.encode(video.to(self.dtype)).latent_dist.mean
        return (z.float() - self.mean) / self.std

    def decode(self, z):
        """(B, 16, T, H, W) -> (B, 3, F, 8H, 8W), clamped to [-1, 1]."""
        with self.alone, torch.autocast(z.device.type, enabled=False):
            return self.code.decode((z.float() * self.std + self.mean).to(self.dtype)).sample.float()

    def draw_onto(self, video, z, z_0):
        """decode(z_0): this code is not linear, so nothing of `video`, whose latent is z, can be kept beside it."""
        return self.decode(z_0)


# ----------------------------------------------------------------------------
# building and loading


def build(name):
    """A fresh DiT of this size. Raises SystemExit with the known names."""
    if name not in MODELS:
        raise SystemExit(f"model {name!r} is unknown; MODELS in model.py has {', '.join(MODELS)}")
    return DiT(**MODELS[name])


def vae_class(name):
    """The video code of the model of this name in MODELS: PatchVAE or WanVAE."""
    return WanVAE if name.startswith("wan") else PatchVAE


def build_vae(name):
    """The video code, without weights, that belongs to the model of this name in MODELS."""
    return vae_class(name)()


STAGES = "stage0_teacher.py", "stage1_pd.py", "stage2_dual.py", "stage3_dpo.py"       # write <out>/stage0, ...


def read_checkpoint(path):
    """The dict in a checkpoint file, on the CPU. Raises SystemExit with one line if it is missing or no checkpoint."""
    if not os.path.isfile(path):
        writer = re.search(r"stage([0-3]).last\.pt$", str(path))
        first = f"run {STAGES[int(writer[1])]} first, or name another --out" if writer else "name another file"
        raise SystemExit(f"{path}: no such checkpoint; {first}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)      # ranks share what is read
        state["config"]["model"], state["stage"], state["vae"], state["total"]     # a KeyError where one is missing
    except Exception as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else "torch.load cannot read it: cut short?"
        raise SystemExit(f"{path}: not a checkpoint of this project ({reason}); remove it, or name another") from None
    return state


def load_checkpoint(path, part="student", device="cpu", model=None, finished=False):
    """One network of a checkpoint and the video code in it, ready for inference.

    part: name of the state dict, such as "student", "ema" (stage 0) or "cfg" (stage 1). model, finished: refuse another
    model than this, and the checkpoint of a run that was interrupted, as the next stage must.
    Returns (net, vae, config), config the dict that its run was made with.
    """
    state = read_checkpoint(path)
    if finished and state["step"] < state["total"]:
        raise SystemExit(f"{path}: unfinished, step {state['step']} of {state['total']}; finish it with --resume")
    if model and state["config"]["model"] != model:
        raise SystemExit(f"{path}: of the model {state['config']['model']}, not {model}; use its --preset, or name "
                         "another --out")
    if not isinstance(state.get(part), dict) or "head.head.weight" not in state[part]:
        nets = [k for k, v in state.items() if isinstance(v, dict) and "head.head.weight" in v]
        raise SystemExit(f"{path}: a {state['stage']} checkpoint without {part!r}; it has {', '.join(nets)} (infer.py: "
                         "--part)")
    with torch.device("meta"):                                          # without drawing weights that are replaced
        net = build(state["config"]["model"])
    net, vae = net.to_empty(device=device), build_vae(state["config"]["model"])
    fill(net, state[part], f"{path}, {part!r}")
    fill(vae, state["vae"], f"{path}, 'vae'")
    return net.eval().requires_grad_(False), vae.to(device).eval().requires_grad_(False), state["config"]


WAN_NAMES = (           # diffusers' names -> Wan's, replaced in this order; diffusers numbers the norms as they come
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("attn1.", "self_attn."), ("attn2.", "cross_attn."), (".to_out.0.", ".o."), (".to_", "."), (".norm2.", ".norm3."),
    ("ffn.net.0.proj.", "ffn.0."), ("ffn.net.2.", "ffn.2."), ("proj_out.", "head.head."),
)


def wan_name(key):
    """The name that a parameter of diffusers' WanTransformer3DModel has in Wan's own files."""
    for theirs, ours in WAN_NAMES:
        key = key.replace(theirs, ours)
    return "head.modulation" if key == "scale_shift_table" else key.replace("scale_shift_table", "modulation")


WAN_VAE_NAMES = (       # Wan's names -> diffusers', as regular expressions replaced in this order
    (r"^conv1\.", "quant_conv."), (r"^conv2\.", "post_quant_conv."), (r"coder\.conv1\.", "coder.conv_in."),
    (r"\.head\.0\.", ".norm_out."), (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."), (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."), (r"\.residual\.2\.", ".conv1."), (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."), (r"\.shortcut\.", ".conv_shortcut."), (r"\.downsamples\.", ".down_blocks."),
)


def wan_vae_name(key):
    """The name that a tensor of Wan2.1_VAE.pth has in diffusers' AutoencoderKLWan."""
    for theirs, ours in WAN_VAE_NAMES:
        key = re.sub(theirs, ours, key)
    parts = "resnets.0", "resnets.1", "resnets.2", "upsamplers.0"       # of a decoder block: numbered through by Wan
    return re.sub(r"upsamples\.(\d+)", lambda m: f"up_blocks.{int(m[1]) // 4}.{parts[int(m[1]) % 4]}", key)


def read_tensors(path, part=None):
    """All tensors of a .safetensors file, of a torch.save'd state dict (.pth, .pt), or of a folder of the former
    (diffusers' shards). part: the subfolder of a whole pipeline. SystemExit in one line."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise SystemExit(f"{path}: needs safetensors: pip install -r requirements-wan.txt") from None
    path = Path(path)
    if part and (path / part).is_dir():
        path = path / part
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise SystemExit(f"{path}: no weights there; name a .safetensors file, or a folder that has some")
    tensors = {}
    for file in files:
        kind = "torch.save" if file.suffix in (".pth", ".pt") else "safetensors"
        try:
            tensors |= torch.load(file, map_location="cpu", weights_only=True) if kind == "torch.save" else \
                load_file(file)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
            raise SystemExit(f"{file}: not readable as {kind} ({reason})") from None
    if not all(isinstance(x, torch.Tensor) for x in tensors.values()):
        raise SystemExit(f"{path}: not a plain state dict; it has {', '.join(map(str, tensors))[:100]}")
    return tensors


def fill(net, found, path, given=()):
    """Copy the tensors `found` into net, strictly; those named in `given` it has already. Raises SystemExit naming
    the first keys that are missing, unexpected or misshapen."""
    wanted = {key: x for key, x in net.state_dict().items() if key not in given}
    wrong = {"missing": wanted.keys() - found.keys(), "unexpected": found.keys() - wanted.keys(),
             "of another shape": {k for k in wanted.keys() & found.keys() if wanted[k].shape != found[k].shape}}
    if any(wrong.values()):
        raise SystemExit(f"{path}: not the weights of this model, but of another preset? " + ", ".join(
            f"{what}: {min(keys)} and {len(keys) - 1} more" for what, keys in wrong.items() if keys))
    net.load_state_dict(found, strict=False)


def load_wan(net, path):
    """Fill a DiT with the weights of Wan2.1: the original file or diffusers' folder, told apart by their keys.

    The 16 input channels become 32: the columns of z_lr start at zero, so that the network is at first exactly Wan.
    Prompts are not in these files (read_prompts). Raises SystemExit with the first keys that do not fit.
    """
    found = {key.removeprefix("model.diffusion_model."): x for key, x in read_tensors(path, "transformer").items()}
    if any(key.startswith("condition_embedder.") for key in found):
        found = {wan_name(key): x for key, x in found.items()}
    first, wide = found.get("patch_embedding.weight"), net.patch_embedding.in_channels
    if first is not None and first.ndim == 5 and 2 * first.shape[1] == wide:
        found["patch_embedding.weight"] = torch.cat([first, torch.zeros_like(first)], dim=1)
    fill(net, found, path, given=("prompts",))


def load_wan_vae(vae, path):
    """Fill a WanVAE: the original Wan2.1_VAE.pth (or .safetensors), or diffusers' folder, told apart by their keys.

    path may be the folder of a whole pipeline, of either kind. Raises SystemExit with the first keys that do not fit.
    """
    original = Path(path, "Wan2.1_VAE.pth")
    found = read_tensors(original if original.is_file() else path, "vae")
    if "encoder.conv1.weight" in found:
        found = {wan_vae_name(key): x for key, x in found.items()}
    fill(vae.code, found, path)


def read_prompts(path, shape=(3, 512, 4096)):
    """The embeddings NULL, POSITIVE, NEGATIVE that `data.py prompts` wrote, float32. shape: that of net.prompts."""
    prompts = read_tensors(path).get("prompts")
    if prompts is None or prompts.shape != torch.Size(shape):
        found = "no prompts" if prompts is None else f"prompts {tuple(prompts.shape)}"
        raise SystemExit(f"{path}: {found}, the model wants {tuple(shape)}; write them with python data.py prompts")
    return prompts.float()


def export(source, part, target):
    """Write one network of a checkpoint, in fp16, and its video code to a small file that load_checkpoint reads."""
    state = read_checkpoint(source)
    kept = {k: state[k] for k in ("stage", "config", "step", "total", "vae")}
    torch.save(kept | {part: {k: x.half() for k, x in state[part].items()}}, target)


def teacher_file(cfg):
    """The stage 0 checkpoint of this run; without one, the teacher that ships for the preset tiny."""
    trained = f"{cfg.out}/stage0/last.pt"
    if cfg.model == "tiny" and not os.path.exists(trained):
        return os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights", "tiny_teacher.pt")
    return trained
