"""
The degradation that makes low-resolution (LR) clips of high-resolution (HR) ones: degrade().

RealBasicVSR's (arXiv 2111.12704), config of ckkelvinchan/RealBasicVSR at b908e083; its blur kernels are those of
Real-ESRGAN (arXiv 2107.10833), appendix and code. Two rounds of blur, resizing, noise, JPEG and a video codec, whose
parameters drift from frame to frame.

Shapes: n or F frames, H x W pixels. The operations take and return float32 (n, 3, H, W) in [0, 1]; degrade() takes HR
float32 (F, H, W, 3) in [0, 1] and returns LR uint8 (F, H/4, W/4, 3). All that is random comes from the numpy Generator
`rng`.

Differs from RealBasicVSR: (1) the bitrate of the codec is scaled with the number of pixels, so that big frames
suffer as much as small ones; (2) the HR is not sharpened unless usm=True, since "real" must be real video;
(3) "h264" and "libx264" of its list are one encoder here; (4) the presets tiny and small use LIGHT, milder ranges of
the same operations.
"""
import io
import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

import media

SCALE = 4           # HR is 4 times as wide as LR, as in the paper

# ----------------------------------------------------------------------------
# ranges


@dataclass(frozen=True)
class Strength:
    """Ranges of the degradation; the defaults are RealBasicVSR's. Pairs ((..), (..)): first and second round."""
    blur_prob: tuple = (1.0, 0.8)
    kernel: tuple = (7, 21)                                     # odd sizes, both ends included
    sigma: tuple = ((0.2, 3.0), (0.2, 1.5))                     # px
    resize_prob: tuple = ((0.2, 0.7, 0.1), (0.3, 0.4, 0.3))     # up, down, keep
    resize_scale: tuple = ((0.15, 1.5), (0.3, 1.2))
    resize_step: tuple = (0.015, 0.03)                          # per frame, like all steps
    noise_prob: tuple = (1.0, 1.0)
    gaussian: tuple = ((1.0, 30.0), (1.0, 25.0))                # sigma, in levels of 255; step 0.1
    poisson: tuple = ((0.05, 3.0), (0.05, 2.5))                 # scale; step 0.005
    gray_prob: float = 0.4                                      # the same noise in all three colours
    jpeg_prob: tuple = (1.0, 1.0)
    jpeg: tuple = (30, 95)                                      # quality; step 3
    video_prob: tuple = (1.0, 1.0)
    bitrate: tuple = (1e4, 1e5)                                 # bits per frame of 256 x 256
    sinc_prob: float = 0.8                                      # after the final resize
    sinc_cutoff: float = math.pi / 3                            # its lowest cut-off; pi is none
    usm: bool = False                                           # sharpen the HR first


REALBASICVSR = Strength()
# the same operations in the same order, milder: a small network needs something left to restore from [ours]
LIGHT = Strength(kernel=(7, 11), sigma=((0.2, 1.2), (0.2, 0.8)),
                 resize_scale=((0.8, 1.2), (0.8, 1.2)), noise_prob=(0.5, 0.5),
                 gaussian=((0.0, 6.0), (0.0, 4.0)), poisson=((0.01, 0.3), (0.01, 0.3)),
                 jpeg_prob=(0.5, 0.5), jpeg=(70, 95), video_prob=(0.5, 0.5), bitrate=(6e4, 6e5),
                 sinc_cutoff=2 * math.pi / 3)
STRENGTHS = {"light": LIGHT, "realbasicvsr": REALBASICVSR}

KERNELS = {"iso": 0.405, "aniso": 0.225, "generalized_iso": 0.108, "generalized_aniso": 0.027,
           "plateau_iso": 0.108, "plateau_aniso": 0.027, "sinc": 0.1}

# ----------------------------------------------------------------------------
# the operations


def walk(rng, bounds, step, n, first=None):
    """A parameter over n frames: drawn once, then a step of at most +-step per frame, kept in bounds; (n,)."""
    low, high = bounds
    values = [rng.uniform(low, high) if first is None else first]
    for move in rng.uniform(-step, step, n - 1):
        values.append(min(max(values[-1] + move, low), high))
    return np.array(values)


def gaussian_kernels(size, sigma_x, sigma_y, angle, beta, plateau=False):
    """(generalised) Gaussian exp(-q^beta / 2) or plateau 1 / (1 + q^beta), q = x^T Sigma^-1 x; (n, size, size)."""
    r = np.arange(size) - size // 2
    x, y = np.meshgrid(r, r)
    sigma_x, sigma_y, angle, beta = (p[:, None, None] for p in (sigma_x, sigma_y, angle, beta))
    c, s = np.cos(angle), np.sin(angle)
    u, v = c * x + s * y, -s * x + c * y
    q = ((u / sigma_x) ** 2 + (v / sigma_y) ** 2) ** beta
    kernel = 1 / (1 + q) if plateau else np.exp(-0.5 * q)
    return kernel / kernel.sum((1, 2), keepdims=True)


def sinc_kernels(size, omega):
    """The ideal circular low-pass with cutoff omega (pi: none): omega J1(omega r) / (2 pi r); (n, size, size)."""
    r = np.arange(size) - size // 2
    r = np.hypot(*np.meshgrid(r, r))[None]
    omega = omega[:, None, None]
    bessel = torch.special.bessel_j1(torch.from_numpy(omega * r)).numpy()
    kernel = omega * bessel / (2 * np.pi * np.maximum(r, 1e-9))
    kernel = np.where(r == 0, omega ** 2 / (4 * np.pi), kernel)         # the limit at r = 0
    return kernel / kernel.sum((1, 2), keepdims=True)


def random_kernels(rng, n, sizes, sigma, kinds=KERNELS):
    """One kind and one size for the whole clip, parameters that drift over its n frames; (n, k, k)."""
    kind = rng.choice(list(kinds), p=np.array(list(kinds.values())) / sum(kinds.values()))
    size = int(rng.choice(np.arange(sizes[0], sizes[1] + 1, 2)))
    if kind == "sinc":
        return sinc_kernels(size, walk(rng, (np.pi / (3 if size < 13 else 5), np.pi), 0.0628, n))
    sigma_x = walk(rng, sigma, 0.02, n)
    sigma_y = walk(rng, sigma, 0.02, n) if "aniso" in kind else sigma_x
    angle = walk(rng, (-np.pi, np.pi), 0.31416, n)
    beta = np.ones(n)
    if "generalized" in kind or "plateau" in kind:
        bounds, step = ((1.0, 2.0), 0.1) if "plateau" in kind else ((0.5, 4.0), 0.05)
        # as often below 1 (heavy tails) as above, which uniform in the range would not be
        part = (bounds[0], 1.0) if rng.random() < 0.5 else (1.0, bounds[1])
        beta = walk(rng, bounds, step, n, first=rng.uniform(*part))
    return gaussian_kernels(size, sigma_x, sigma_y, angle, beta, plateau="plateau" in kind)


def blur(x, kernels):
    """Filter frame i of x (n, 3, H, W) with kernels[i]; borders are mirrored."""
    n, c, h, w = x.shape
    k = torch.from_numpy(np.ascontiguousarray(kernels, np.float32))
    pad = k.shape[-1] // 2
    x = F.pad(x, [pad] * 4, mode="reflect" if pad < min(h, w) else "replicate")
    out = F.conv2d(rearrange(x, "n c h w -> c n h w"), k[:, None], groups=n)     # one group per frame
    return rearrange(out, "c n h w -> n c h w")


@lru_cache(256)
def area_matrix(n_in, n_out):
    """(n_out, n_in) weights: output i is the mean of the input over [i, i + 1) * n_in / n_out."""
    edges = torch.arange(n_out + 1, dtype=torch.float64) * n_in / n_out
    pixel = torch.arange(n_in, dtype=torch.float64)
    cover = torch.minimum(edges[1:, None], pixel + 1) - torch.maximum(edges[:-1, None], pixel)
    return (cover.clamp(min=0) * n_out / n_in).float()


def resize(x, size, mode):
    """(n, 3, H, W) -> (n, 3, *size); bilinear, bicubic (no antialias) and area as OpenCV defines them."""
    if x.shape[-2:] == size:
        return x
    if mode == "area" and size[0] <= x.shape[-2] and size[1] <= x.shape[-1]:
        return area_matrix(x.shape[-2], size[0]) @ x @ area_matrix(x.shape[-1], size[1]).T
    mode = "bilinear" if mode == "area" else mode                # so does OpenCV when it enlarges
    return F.interpolate(x, size=size, mode=mode, align_corners=False)


def random_resize(rng, x, prob, bounds, step):
    """Each frame to a size that drifts, then all to the size of the first; sizes are even, for 4:2:0 video."""
    mode = rng.choice(["bilinear", "area", "bicubic"])
    way = rng.choice(["up", "down", "keep"], p=prob)
    first = {"up": rng.uniform(1, bounds[1]), "down": rng.uniform(bounds[0], 1), "keep": 1.0}[way]
    h, w = x.shape[-2:]
    sizes = [tuple(max(2, 2 * int(side * s / 2)) for side in (h, w)) for s in walk(rng, bounds, step, len(x), first)]
    return torch.cat([resize(resize(f[None], s, mode), sizes[0], mode) for f, s in zip(x, sizes, strict=True)])


def gaussian_noise(rng, x, sigma, gray):
    """Add noise of sigma[i] (of 1) to frame i."""
    n, c, h, w = x.shape
    noise = rng.standard_normal((n, 1 if gray else c, h, w), dtype=np.float32)
    return x + torch.from_numpy(noise) * torch.from_numpy(sigma).float()[:, None, None, None]


def poisson_noise(rng, x, scale, gray):
    """Add scale[i] times shot noise to frame i, which must be in [0, 1]: on 0-255 it would be 16 times weaker."""
    noisy = []
    for frame, s in zip(x, scale, strict=True):
        clean = frame
        if gray:
            clean = (frame * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
        clean = (clean * 255).round().clamp(0, 255).byte().numpy()
        levels = 2.0 ** math.ceil(math.log2(np.count_nonzero(np.bincount(clean.ravel()))))
        clean = clean / np.float32(255)
        shot = rng.poisson(clean * levels) / levels - clean
        noisy.append(frame + torch.from_numpy((s * shot).astype(np.float32)))
    return torch.stack(noisy)


def random_noise(rng, x, gaussian, poisson, gray_prob):
    """Gaussian or Poisson noise, evenly; fresh in each frame, of a strength that drifts."""
    kind, gray = rng.choice(["gaussian", "poisson"]), rng.random() < gray_prob
    if kind == "gaussian":
        return gaussian_noise(rng, x, walk(rng, gaussian, 0.1, len(x)) / 255, gray)
    return poisson_noise(rng, x, walk(rng, poisson, 0.005, len(x)), gray)


def to_bytes(x):
    """(n, 3, H, W) in [0, 1] -> uint8 (n, H, W, 3)."""
    return (x * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def from_bytes(frames):
    """uint8 (n, H, W, 3) -> (n, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(frames)).permute(0, 3, 1, 2).float().div(255).contiguous()


def jpeg(x, quality):
    """Frame i through JPEG of quality[i]."""
    out = []
    for frame, q in zip(to_bytes(x), quality, strict=True):
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=int(round(q)))     # RGB in, 4:2:0 chroma as in OpenCV
        out.append(np.array(Image.open(file)))
    return from_bytes(np.stack(out))


def video_codec(x, codec, bitrate):
    """The clip through a video encoder and back; bitrate is in bits per frame.

    The stream runs at 1 frame per second, as RealBasicVSR opens it, so bits per second are bits per frame. FFmpeg
    drains the encoder when its input ends: as many frames come out as went in, none of them late. libx264 counts in
    thousands of bits, hence the lower bound.
    """
    n, _, h, w = x.shape
    frames = to_bytes(F.pad(x, [0, w % 2, 0, h % 2], mode="replicate"))      # 4:2:0 needs even sides
    raw, one = ["-f", "rawvideo", "-pix_fmt", "rgb24"], ["-threads", "1"]
    source = [*raw, "-s", f"{frames.shape[2]}x{frames.shape[1]}", "-framerate", "1", "-i", "-"]
    encoder = ["-c:v", codec, "-b:v", max(int(bitrate), 1000), "-pix_fmt", "yuv420p", "-f", "nut", "-"]
    stream = media.ffmpeg([*source, *one, *encoder], frames.tobytes())
    out = media.ffmpeg([*one, "-f", "nut", "-i", "-", "-fps_mode", "passthrough", *raw, "-"], stream)
    return from_bytes(np.frombuffer(out, np.uint8).reshape(frames.shape)[:, :h, :w])


def random_video_codec(rng, x, bitrate):
    """RealBasicVSR picks among libx264, h264 and mpeg4; the first two are one encoder."""
    codec = rng.choice(["libx264", "libx264", "mpeg4"])
    # differs: RealBasicVSR's bitrates suit its frames of about 256 x 256; scaled to the size at hand
    return video_codec(x, codec, rng.uniform(*bitrate) * x.shape[-2] * x.shape[-1] / 256 ** 2)


def sharpen(x):
    """Unsharp masking of Real-ESRGAN: kernel 51, sigma 8, weight 0.5, only where it changes over 10 levels."""
    eight = np.full(len(x), 8.0)
    kernels = gaussian_kernels(51, eight, eight, 0 * eight, np.ones(len(x)))
    residue = x - blur(x, kernels)
    mask = blur((residue.abs() * 255 > 10).float(), kernels)
    return x + mask * ((x + 0.5 * residue).clamp(0, 1) - x)


# ----------------------------------------------------------------------------


@contextmanager
def one_thread():
    """Torch on one thread. Several would sum in another order, and a codec turns such rounding into whole levels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def degrade(hr, rng, strength):
    """HR float32 (F, H, W, 3) in [0, 1] -> LR uint8 (F, H/4, W/4, 3), in the order of RealBasicVSR's list.

    rng: numpy Generator. strength: a Strength or its name. Parameters are drawn once per clip and drift per frame;
    discrete choices (kernel and its size, interpolation, kind of noise, codec) hold for the clip.
    """
    s = STRENGTHS.get(strength, strength)
    n, h, w, _ = hr.shape
    if h % SCALE or w % SCALE:
        raise ValueError(f"HR of {w}x{h} does not divide by {SCALE}: crop it first")
    x = torch.from_numpy(np.array(hr, np.float32)).permute(0, 3, 1, 2).contiguous()
    if s.usm:
        x = sharpen(x)
    for i in (0, 1):
        if rng.random() < s.blur_prob[i]:
            x = blur(x, random_kernels(rng, n, s.kernel, s.sigma[i]))
        x = random_resize(rng, x, s.resize_prob[i], s.resize_scale[i], s.resize_step[i])
        if rng.random() < s.noise_prob[i]:
            x = random_noise(rng, x, s.gaussian[i], s.poisson[i], s.gray_prob)
        if rng.random() < s.jpeg_prob[i]:
            x = jpeg(x, walk(rng, s.jpeg, 3, n))
        if i == 0 and rng.random() < s.video_prob[0]:
            x = random_video_codec(rng, x, s.bitrate)
    for step in rng.permutation(["codec", "resize"]):                   # the last two, in random order
        if step == "codec" and rng.random() < s.video_prob[1]:
            x = random_video_codec(rng, x, s.bitrate)
        if step == "resize":
            x = resize(x, (h // SCALE, w // SCALE), rng.choice(["bilinear", "area", "bicubic"]))
            if rng.random() < s.sinc_prob:
                k = rng.choice(np.arange(s.kernel[0], s.kernel[1] + 1, 2))
                x = blur(x, sinc_kernels(int(k), walk(rng, (s.sinc_cutoff, np.pi), 0.0628, n)))
    return to_bytes(x)
