"""Quality measures for video, in numpy and torch; VMAF comes from the FFmpeg inside imageio-ffmpeg.

Frames are uint8 arrays (F, H, W, 3), RGB. A clip's number is the mean over its frames. No border is cropped:
a method that shifts or crops its output pays for it here.

The paper's table has no-reference scores only (NIQE, MUSIQ, CLIP-IQA, DOVER). Of those only NIQE runs without
downloads, and it over-rates over-sharpening, as most of them do. So read it beside a full-reference score
(VMAF-NEG, SSIM) and beside the pictures.
"""
import functools
import json
import math
import os
import subprocess
import tempfile

import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

NIQE_PARAMS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights", "niqe_pris_params.npz")


# ----------------------------------------------------------------------------
# helpers


def luma(frames):
    """Y of BT.601 in [16, 235], float32 and not rounded: (F, H, W, 3) -> (F, H, W). As MATLAB and BasicSR."""
    return frames.astype(np.float32) @ np.float32([65.481, 128.553, 24.966]) / 255 + 16


def planes(frames):
    """uint8 (F, H, W, 3) -> float tensor (F, 3, H, W), still 0..255."""
    return torch.from_numpy(rearrange(frames, "F H W c -> F c H W").astype(np.float32))


def pixels(x):
    """The inverse of planes, rounded and clipped."""
    return rearrange(x.round().clamp(0, 255).byte(), "F c H W -> F H W c").numpy()


def same_size(a, b):
    if a.shape != b.shape:      # a silent crop to the common part would hide a shift or a lost frame
        raise ValueError(f"clips of different size cannot be compared: {a.shape} and {b.shape} (F, H, W, 3)")


def downscale(x, size):
    """Antialiased bicubic as MATLAB's imresize: (N, C, H, W) float -> (N, C, *size), a whole factor less."""
    scale = x.shape[-1] // size[1]
    if x.shape[-2:] != (size[0] * scale, size[1] * scale):
        raise ValueError(f"{tuple(x.shape[-2:])} is no whole multiple of {tuple(size)}")
    # MATLAB mirrors the image at its border (edge pixel twice), torch cuts the kernel off: mirror it first
    rows, cols = (np.pad(np.arange(n), 4 * scale, mode="symmetric") for n in x.shape[-2:])
    x = x[..., rows, :][..., cols]
    x = F.interpolate(x, scale_factor=1 / scale, mode="bicubic", antialias=True)
    return x[..., 4:-4, 4:-4]


# ----------------------------------------------------------------------------
# full reference


def psnr(a, b, channel="rgb"):
    """Peak signal-to-noise ratio, 10 log10(255^2 / MSE) in dB, per frame, then averaged; equal frames: 100.

    channel: "rgb" (one MSE over all three) or "y" (see luma). Above 40 dB one sees no difference.
    """
    same_size(a, b)
    error = luma(a) - luma(b) if channel == "y" else np.subtract(a, b, dtype=np.int16).astype(np.float32)
    mse = np.square(error).reshape(len(a), -1).mean(axis=1, dtype=np.float64)
    return float(np.mean(10 * np.log10(255**2 / np.maximum(mse, 255**2 * 1e-10))))     # one equal frame is not inf


def ssim(a, b):
    """Structural similarity on Y, Wang et al. 2004: Gaussian 11x11 of sigma 1.5, valid region; 1 is equal.

    The original: no downscaling first, C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2. Frames under 11 pixels: nan.
    """
    same_size(a, b)
    if min(a.shape[1:3]) < 11:
        return math.nan
    window = torch.exp(-(torch.arange(11.0, dtype=torch.float64) - 5)**2 / (2 * 1.5**2))
    window = window / window.sum()

    def blur(x):                                                # (F, 1, H, W) -> (F, 1, H - 10, W - 10)
        return F.conv2d(F.conv2d(x, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    scores = []
    for x, y in zip(luma(a), luma(b), strict=True):             # frame by frame: memory of one frame
        x, y = torch.from_numpy(x).double()[None, None], torch.from_numpy(y).double()[None, None]
        mu_x, mu_y = blur(x), blur(y)
        var_x, var_y, cov = blur(x * x) - mu_x**2, blur(y * y) - mu_y**2, blur(x * y) - mu_x * mu_y
        c1, c2 = (0.01 * 255)**2, (0.03 * 255)**2
        s = (2 * mu_x * mu_y + c1) * (2 * cov + c2) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))
        scores.append(s.mean().item())
    return float(np.mean(scores))


def vmaf(a, b):
    """VMAF v0.6.1 and VMAF-NEG of clip a against the reference b -> {"vmaf": 0..100, "vmaf_neg": 0..100}.

    Netflix's libvmaf, on Y (BT.709). NEG (no enhancement gain) gives no credit for sharpening beyond the
    reference; VMAF does. Made for 1080p seen from three picture heights: on small clips only the order means
    something. Equal clips score 97 to 100; frames under 24 pixels: nan.
    """
    same_size(a, b)
    if min(a.shape[1:3]) < 24:
        return {"vmaf": math.nan, "vmaf_neg": math.nan}
    models = r"version=vmaf_v0.6.1\:name=vmaf|version=vmaf_v0.6.1neg\:name=vmaf_neg"
    to_yuv = "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd,format=yuv444p"
    graph = (f"[0]{to_yuv}[a];[1]{to_yuv}[b];"
             f"[a][b]libvmaf=model='{models}':log_fmt=json:log_path=log.json:n_threads=1")
    with tempfile.TemporaryDirectory() as folder:               # also FFmpeg's: log.json lands there
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-v", "error"]
        for name, frames in (("a.rgb", a), ("b.rgb", b)):
            np.ascontiguousarray(frames).tofile(os.path.join(folder, name))
            command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{a.shape[2]}x{a.shape[1]}", "-r", "24"]
            command += ["-i", name]
        done = subprocess.run([*command, "-lavfi", graph, "-f", "null", "-"], cwd=folder,
                              capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"libvmaf failed on clips of {a.shape}: {done.stderr.strip()[-500:]}")
        with open(os.path.join(folder, "log.json")) as f:
            log = json.load(f)
    assert len(log["frames"]) == len(a), f"libvmaf scored {len(log['frames'])} of {len(a)} frames"
    return {name: float(log["pooled_metrics"][name]["mean"]) for name in ("vmaf", "vmaf_neg")}


def temporal(a, b):
    """Temporal-difference error: mean |(a[t+1] - a[t]) - (b[t+1] - b[t])| in grey levels of Y. 0 is best.

    It sees flicker and wrong motion, and no constant error. One frame: nan. Source: as in DOVE's evaluation.
    """
    same_size(a, b)
    if len(a) < 2:
        return math.nan
    return float(np.abs(np.diff(luma(a) - luma(b), axis=0)).mean())


def shift(a, b):
    """How far clip a lies from clip b, (dy, dx) in pixels, right and down positive; to 0.1 px on textured frames.

    Phase correlation of Y over all frames: its peak gives whole pixels; then, with these undone, the slope of the phase
    below a tenth of the sampling rate, weighted by energy, the rest. Higher up a block grid would answer.
    """
    same_size(a, b)
    a, b = luma(a), luma(b)

    def spectrum(a, b):
        window = np.hanning(a.shape[1])[:, None] * np.hanning(a.shape[2])
        return sum(np.fft.fft2((x - x.mean()) * window) * np.fft.fft2((y - y.mean()) * window).conj()
                   for x, y in zip(a, b, strict=True))

    cross = spectrum(a, b)
    if np.abs(cross).max() < 1e-3 * cross.size:
        return math.nan, math.nan                               # nothing to hold on to
    peak = np.fft.ifft2(cross / (np.abs(cross) + 1e-6 * np.abs(cross).max())).real
    whole = np.array(np.unravel_index(peak.argmax(), peak.shape))
    whole = np.where(whole > np.array(peak.shape) / 2, whole - peak.shape, whole)
    for _ in range(2):                                          # twice: the peak may be one off
        (y, x), (H, W) = whole, a.shape[1:]
        there, here = (v[:, max(0, p):H + min(0, p), max(0, q):W + min(0, q)] for v, p, q in ((a, y, x), (b, -y, -x)))
        cross = spectrum(there, here)
        u, v = np.meshgrid(*map(np.fft.fftfreq, cross.shape), indexing="ij")
        low = (np.hypot(u, v) < 0.1) & (np.hypot(u, v) > 0)
        lines, weight = np.stack([u[low], v[low]], 1) * -2 * np.pi, np.abs(cross[low]) ** 0.5
        rest = np.linalg.lstsq(lines * weight[:, None], np.angle(cross[low]) * weight, rcond=None)[0]
        found, whole = whole + rest, whole + np.round(rest).astype(int)
    return tuple(float(s) for s in found)


def unshift(a, b, by):
    """(a moved back by (dy, dx), b), both without the border that this makes up; None if that is all of them."""
    y, x = (int(np.ceil(abs(s))) + 4 for s in by)
    if 2 * y >= a.shape[1] or 2 * x >= a.shape[2]:
        return None
    u, v = np.fft.fftfreq(a.shape[1])[:, None], np.fft.fftfreq(a.shape[2])
    phase = np.exp(2j * np.pi * (u * by[0] + v * by[1]))[None, :, :, None]
    moved = np.fft.ifft2(np.fft.fft2(a.astype(np.float32), axes=(1, 2)) * phase, axes=(1, 2)).real
    return np.round(moved).clip(0, 255).astype(np.uint8)[:, y:-y, x:-x], b[:, y:-y, x:-x]


def levels(a, b):
    """(gain, offset) of the least squares fit Y_a = gain Y_b + offset, Y in 0..255: (1, 0) where the range is right.

    (0.86, 16) is full-range video squeezed into 16..235 and not stretched again, (1.16, -19) the reverse.
    """
    x, y = ((luma(v)[:, ::4, ::4].ravel() - 16) / 219 * 255 for v in (b, a))
    gain = float(np.cov(x, y)[0, 1] / max(np.var(x, ddof=1), 1e-6))
    return gain, float(y.mean() - gain * x.mean())


# ----------------------------------------------------------------------------
# no reference


def flicker(frames, reach=3, block=8):
    """Change over time that no straight motion explains, in grey levels of Y; under three frames: nan.

    Mean over blocks of the least |x[t-1](p - d) - 2 x[t](p) + x[t+1](p + d)| / 2, for d of up to reach
    pixels a frame. A steady fade or pan gives 0, a value that jumps back and forth by d gives d. Fast and
    non-integer motion leave a rest, so compare only outputs for the same input.
    """
    if len(frames) < 3:
        return math.nan
    y = torch.from_numpy(luma(frames))
    H, W = (side // block * block for side in y.shape[1:])
    wide, least = F.pad(y[:, None], (reach,) * 4, mode="replicate")[:, 0], []
    for t in range(1, len(y) - 1):                              # frame by frame: fits the processor's cache
        best = torch.full((H // block, W // block), torch.inf)
        for dy, dx in np.ndindex(2 * reach + 1, 2 * reach + 1):     # in padded frames 0 is a shift of -reach
            before = wide[t - 1, 2 * reach - dy:, 2 * reach - dx:][:H, :W]
            after = wide[t + 1, dy:, dx:][:H, :W]
            error = (before + after - 2 * y[t, :H, :W]).abs_()
            best = torch.minimum(best, error.view(H // block, block, -1, block).sum((1, 3)))
        least.append(best.mean().item() / block**2)
    return float(np.mean(least)) / 2


def grid(frames, period=(4, 8)):
    """Visible block grid: mean |jump| of Y across block borders over the mean inside blocks; 1.0 is no grid.

    period: block sizes to look for, in pixels (4 = the patch code, 8 = codecs); blocks start at the corner.
    The largest ratio over the periods and the two axes. Read it beside the ground truth's: bicubic x4 has up
    to 1.2, since its kernel too repeats every 4 pixels.
    """
    y, ratios = luma(frames), []
    for axis in (1, 2):
        jump = np.abs(np.diff(y, axis=axis)).mean(axis=(0, 3 - axis), dtype=np.float64)   # (H - 1,), (W - 1,)
        for p in period:
            border = np.arange(1, len(jump) + 1) % p == 0       # jump[i] lies between pixels i and i + 1
            if border.any() and not border.all():
                ratios.append((jump[border].mean() + 1e-3) / (jump[~border].mean() + 1e-3))   # flat clip: 1
    return float(max(ratios, default=math.nan))


def lattice(frames, period=8):
    """A fine pattern that every token repeats at the same place: its share of the detail of smooth areas, percent.

    Detail: Y less its mean with the pixels two away, cut off at 6 levels, so that strong edges do not count. The
    pattern: its mean over all blocks of `period` pixels and all frames. Video has 1 to 2, which is chance.
    """
    y = luma(frames)
    around = sum(np.roll(y, step, axis) for step in (2, -2) for axis in (1, 2))
    detail = np.clip(y - (4 * y + around) / 8, -6, 6)
    h, w = (side // period * period for side in y.shape[1:])
    tile = rearrange(detail[:, :h, :w], "F (n p) (m q) -> (F n m) p q", p=period, q=period).mean(0, dtype=np.float64)
    return float(100 * tile.std() / max(detail.std(), 1e-6))


def seam(frames, period):
    """Visible borders of tiles: mean |jump| of Y across them over the mean 8 pixels away; 1.0 is no seam.

    period: pixels from one tile to the next. A grid of 8 pixels, of the network's tokens or of a codec, cancels.
    nan: no border lies in the frame.
    """
    y, ratios = luma(frames), []
    for axis in (1, 2):
        jump = np.abs(np.diff(y, axis=axis)).mean(axis=(0, 3 - axis), dtype=np.float64)
        at = np.arange(period - 1, len(jump) - 8, period)           # jump[i] lies between pixels i and i + 1
        if len(at):
            ratios.append((jump[at].mean() + 1e-3) / ((jump[at - 8].mean() + jump[at + 8].mean()) / 2 + 1e-3))
    return float(max(ratios, default=math.nan))


def chunk_jump(frames, step):
    """Mean |change| of Y into frames step, 2 step, ... over the mean of all other changes; 1 is no jump.

    step: frames between the starts of chunks, chunk - 1 - overlap in infer.py. nan: there is no such frame.
    """
    change = np.abs(np.diff(luma(frames), axis=0)).mean((1, 2), dtype=np.float64)
    at = np.arange(1, len(frames)) % step == 0
    if not at.any() or at.all():
        return math.nan
    return float((change[at].mean() + 1e-3) / (change[~at].mean() + 1e-3))


def lr_consistency(sr, lr):
    """PSNR in dB (RGB) between lr (F, h, w, 3) and the antialiased bicubic downscale of sr (F, s h, s w, 3).

    High: sr shows what the input shows. Very high is no merit: it repeats the input's noise and blur too.
    """
    return psnr(pixels(downscale(planes(sr), lr.shape[1:3])), lr)


# ----------------------------------------------------------------------------
# NIQE, Mittal, Soundararajan and Bovik 2013, "Making a completely blind image quality analyzer"


@functools.cache
def niqe_params():
    """The pristine model that BasicSR ships (Apache-2.0): mu (36,), cov (36, 36), window (7, 7)."""
    if not os.path.exists(NIQE_PARAMS):
        raise SystemExit(f"{NIQE_PARAMS} is missing: `git checkout -- weights` brings it back")
    p = np.load(NIQE_PARAMS)
    return p["mu_pris_param"].ravel(), p["cov_pris_param"], p["gaussian_window"]


@functools.cache
def aggd_tables():
    """(alpha, r, lgamma(1/alpha), lgamma(2/alpha), lgamma(3/alpha)) over the shapes that the fit may take."""
    alpha = np.arange(0.2, 10.001, 0.001)
    g1, g2, g3 = (torch.lgamma(torch.from_numpy(k / alpha)).numpy() for k in (1, 2, 3))
    return alpha, np.exp(2 * g2 - g1 - g3), g1, g2, g3          # r grows with alpha


def fit_aggd(x):
    """Moment fit of an asymmetric generalised Gaussian to each row of a tensor (N, P) -> (N, 4).

    The four: shape alpha, mean, left and right scale. A row without negative or without positive values has
    no fit: alpha is then the smallest, the rest nan.
    """
    left, right = x.clamp(max=0).square().sum(1).double(), x.clamp(min=0).square().sum(1).double()
    left, right = (left / (x < 0).sum(1)).sqrt().numpy(), (right / (x > 0).sum(1)).sqrt().numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        g = left / right
        r = (x.abs().mean(1).double()**2 / x.square().mean(1).double()).numpy()
        r = r * (g**3 + 1) * (g + 1) / (g**2 + 1)**2
    alpha, table, g1, g2, g3 = aggd_tables()
    i = np.clip(np.searchsorted(table, r), 1, len(table) - 1)   # r grows, so the nearest is i or i - 1
    i = np.where(r - table[i - 1] <= table[i] - r, i - 1, i)
    i = np.where(np.isnan(r), 0, i)
    left, right = left * np.exp((g1[i] - g3[i]) / 2), right * np.exp((g1[i] - g3[i]) / 2)
    return np.stack([alpha[i], (right - left) * np.exp(g2[i] - g1[i]), left, right], axis=1)


def niqe_features(frame, block=96):
    """18 statistics at two scales of each whole block of one frame: (H, W, 3) -> (blocks, 36)."""
    window = torch.from_numpy(niqe_params()[2].sum(0))          # (7,): the 7x7 window is its outer product
    y = torch.from_numpy(luma(frame[None]).round())             # (1, H, W), rounded as MATLAB does
    y = y[:, :y.shape[1] // block * block, :y.shape[2] // block * block]
    if y.numel() == 0:
        return np.zeros((0, 36))
    scales = []
    for size in (block, block // 2):
        # local mean and contrast taken away; filtered in double and stored in single, so that a flat area
        # gives exactly zero and drops out, instead of statistics of rounding noise
        both = F.pad(torch.stack([y, y * y]).double(), (3, 3, 3, 3), mode="replicate")
        mu, mu_2 = F.conv2d(F.conv2d(both, window.view(1, 1, 7, 1)), window.view(1, 1, 1, 7)).float()
        x = (y - mu) / ((mu_2 - mu * mu).abs().sqrt() + 1)
        x = rearrange(x, "1 (n p) (m q) -> (m n) p q", p=size, q=size)
        alpha, _, left, right = fit_aggd(x.flatten(1)).T
        features = [np.stack([alpha, (left + right) / 2], axis=1)]
        for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):         # products of neighbours in four directions
            features.append(fit_aggd((x * torch.roll(x, shift, (1, 2))).flatten(1)))
        scales.append(np.concatenate(features, axis=1))         # (blocks, 18)
        y = downscale(y[None] / 255, (y.shape[1] // 2, y.shape[2] // 2))[0] * 255
    return np.concatenate(scales, axis=1)


def niqe_distance(features):
    """Distance of the Gaussian fitted to features (blocks, 36) to the pristine one; under two blocks: nan."""
    mu, cov, _ = niqe_params()
    whole = features[~np.isnan(features).any(axis=1)]
    if len(whole) < 2:
        return math.nan
    d = mu - np.nanmean(features, axis=0)
    return float(np.sqrt(d @ np.linalg.pinv((cov + np.cov(whole, rowvar=False)) / 2) @ d))


def niqe(frames):
    """NIQE of each frame: (F, H, W, 3) -> (F,). Lower is better; photographs 2 to 4, blur 7 and more.

    Y of BT.601, no border cropped, blocks of 96: equal to BasicSR's calculate_niqe. A frame with under two
    usable blocks has no NIQE: nan. It knows photographs: rendered film, flat skies and over-sharpened texture
    fool it.
    """
    return np.array([niqe_distance(niqe_features(frame)) for frame in frames])


# ----------------------------------------------------------------------------
# statistics and ranking


def bootstrap_mean(values, seed=0):
    """Mean of values and its 95 % bootstrap interval (10,000 resamples) -> (mean, lo, hi). nan is left out.

    Pass one number per clip; for "A beats B" pass the differences, clip by clip.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return math.nan, math.nan, math.nan
    picks = np.random.default_rng(seed).integers(len(values), size=(10_000, len(values)))
    lo, hi = np.percentile(values[picks].mean(axis=1), (2.5, 97.5))
    return float(values.mean()), float(lo), float(hi)


def dover(technical, aesthetic):
    """DOVER's fused score, 0 to 100, of its two raw outputs (in the order of its dover.yml: technical first).

    The formula of evaluate_one_video.py (VQAssessment/DOVER). Its evaluate_a_set_of_videos.py swaps the two, so that
    published numbers lie on several scales; this one gives the mean video of its database 50.
    """
    x = 0.6104 * (technical - 0.1107) / 0.07355 + 0.3896 * (aesthetic + 0.08285) / 0.03774
    return 100 / (1 + float(np.exp(-x)))


def learned_metric(name):
    """A measure that others trained, not installed with this: "dover", or one of pyiqa by its name there.

    Returns (function (frames (F, H, W, 3), hr or None) -> number, +1 if higher is better or -1). The number is a mean
    over frames, nan if the measure needs a missing hr. For DOVER the user writes a module dover_scorer.py around it
    whose raw(frames) returns (technical, aesthetic). ImportError says what is missing.
    """
    if name == "dover":
        try:
            from dover_scorer import raw
        except ImportError as error:
            raise ImportError(f"write dover_scorer.py with raw(frames) -> (technical, aesthetic) ({error})") from None
        return lambda frames, hr=None: dover(*raw(frames)), 1
    try:
        import pyiqa
    except ImportError:
        raise ImportError("pyiqa is not installed: pip install pyiqa (non-commercial licence)") from None
    metric = pyiqa.create_metric(name)

    def measure(frames, hr=None):
        x, y = (torch.from_numpy(v).permute(0, 3, 1, 2) / 255 if v is not None else None for v in (frames, hr))
        if metric.metric_mode != "FR":
            return float(np.mean([metric(a[None]).item() for a in x]))
        return math.nan if y is None else float(np.mean([metric(a[None], b[None]).item()
                                                         for a, b in zip(x, y, strict=True)]))
    return measure, -1 if metric.lower_better else 1


NIQE_BEST = 4.0         # [ours] three of four sharp shots of the sample film have more
LR_ENOUGH = 30.0        # [ours] dB; ground truth has 28 to 41 against its own light degradation, outputs have more


def z_score(x, floor):
    """(x - mean) / max(s.d., floor): differences below floor stay small. All 0 where x has a nan."""
    x = np.asarray(x, dtype=np.float64)
    return np.zeros(len(x)) if np.isnan(x).any() else (x - x.mean()) / max(x.std(), floor)


def proxy_rank(candidates, lr):
    """Rank outputs for one input without ground truth -> (scores (n,), parts: dict of (n,) arrays).

    candidates: list of frames (F, s h, s w, 3). lr: (F, h, w, 3). Higher is better. A proxy for taste, not
    taste: three measures that oppose each other, z-scored within this group and added, so that only
    candidates of one lr can be compared:
      niqe            natural texture; no credit below NIQE_BEST, where invented texture wins
      flicker         per spatial contrast, so that blur gains nothing; 1 = as the upsampled input
      lr_consistency  dB; no credit above LR_ENOUGH, where a candidate repeats the input's noise
    parts has these three and their z-scores z_niqe, z_flicker, z_lr_consistency, signed so that higher is
    better; their sum is the score.
    """
    h, w = candidates[0].shape[1:3]
    up = pixels(F.interpolate(planes(lr), (h, w), mode="bicubic"))
    # one NIQE for all frames together, and smaller blocks in small frames: training clips have few blocks
    block = next((b for b in (96, 48) if (h // b) * (w // b) >= 8), 32)

    def clip_niqe(frames):
        return niqe_distance(np.concatenate([niqe_features(frame, block) for frame in frames]))

    def relative_flicker(frames):
        contrast = np.abs(np.diff(luma(frames), axis=2)).mean()
        return flicker(frames) / (contrast + 0.1)               # + 0.1: flat clips

    base = relative_flicker(up) + 1e-3
    parts = {"niqe": np.array([np.maximum(clip_niqe(c), NIQE_BEST) for c in candidates]),
             "flicker": np.array([(relative_flicker(c) + 1e-3) / base for c in candidates]),
             "lr_consistency": np.array([min(lr_consistency(c, lr), LR_ENOUGH) for c in candidates])}
    parts |= {"z_niqe": -z_score(parts["niqe"], 0.1),
              "z_flicker": -z_score(np.log(parts["flicker"]), 0.05),
              "z_lr_consistency": z_score(parts["lr_consistency"], 0.2)}
    return parts["z_niqe"] + parts["z_flicker"] + parts["z_lr_consistency"], parts
