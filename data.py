"""
The training clips: what a stage sees, and how it is kept on disk.

What is here, top to bottom:
  CLIPS                    the sizes of clips and crops, by model
  tensors                  bytes to what networks see and back; LR enlarged
  training clips           Clips: windows of shots, and camera moves over photographs, with LR of degradation.py;
                           Bank: such clips made once and kept on disk, from which training batches are cut
  what the stages use      training_bank, random_window, soften
  cached latents           LatentBank: clips degraded and encoded once
  python data.py prepare --film bbb.mp4 --stills DIR --out DIR   cuts the listed shots and photographs
  python data.py prepare --latents FILE --data DIR --model wan1.3b --vae DIR   degrades and encodes clips once
  python data.py prompts --encoder google/umt5-xxl --out prompts.safetensors   prompts of the real base, as tensors

A clip or a crop depends on (seed, epoch, index) alone, not on a worker, a rank, or the order of calls;
which latent frames of a batch are used (random_window) from torch's seed, which is set at every step.
Shapes: F frames, H x W pixels of HR, h = H/4 and w = W/4 of LR. On disk the colour axis is last, (F, H, W, 3) uint8
(media.py reads and writes it); networks see (B, 3, F, H, W) float32 in [-1, 1].
"""
import hashlib
import json
import math
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from tqdm import tqdm

import common
import degradation
import media
import model as M
from degradation import SCALE

CLIPS = {       # by model. size: px of a stored clip; crop: px of a training crop; window: latent frames trained on
    "tiny":    dict(frames=21, size=192, crop=96, window=5, strength="light"),
    "small":   dict(frames=21, size=256, crop=128, window=5, strength="light"),
    "wan1.3b": dict(frames=21, size=640, crop=640, window=6, strength="realbasicvsr"),
}
SOFT = 0.7, 0.8     # px: targets of the negative prompt are blurred by 0.7 + 0.8 u, u ~ U(0, 1) [ours]

# ---------------------------------------------------------------------------------------------- tensors


def to_tensor(frames, device="cpu"):
    """uint8 (F, H, W, 3), or several such, (B, F, H, W, 3) -> float32 (3, F, H, W), or (B, ...), in [-1, 1]."""
    return torch.from_numpy(np.array(frames)).to(device).movedim(-1, -4).float().div(127.5).sub(1)     # moved as bytes


def to_uint8(video):
    """float (3, F, H, W), or (1, 3, F, H, W), in [-1, 1] -> uint8 (F, H, W, 3), clamped and rounded (not truncated)."""
    if video.dim() == 5:
        video = video.squeeze(0)
    video = (video.detach().float() + 1).mul_(127.5).clamp_(0, 255).round_().byte()
    return video.permute(1, 2, 3, 0).cpu().numpy()


def upsample(lr, size):
    """LR (B, 3, F, h, w) -> (B, 3, F, H, W) with size = (H, W), bicubic; the same in training and inference."""
    b = lr.shape[0]
    x = F.interpolate(rearrange(lr, "B C F h w -> (B F) C h w"), size=tuple(size), mode="bicubic", align_corners=False)
    return rearrange(x.clamp_(-1, 1), "(B F) C H W -> B C F H W", B=b)


# ---------------------------------------------------------------------------------------------- training clips


def texture(picture):
    """Mean absolute gradient of uint8 (h, w, 3): how much there is to restore."""
    g = picture.mean(-1)
    return np.abs(np.diff(g, axis=0)).mean() + np.abs(np.diff(g, axis=1)).mean()


def pick(rng, places, score):
    """One of the places: mostly (p = 0.7) the one of best score, else the first, so that flat regions occur too."""
    return max(places, key=score) if rng.random() < 0.7 else places[0]


def sample(photo, xy):
    """Bicubic samples of uint8 (H, W, 3) at xy (F, S, S, 2), pixel i reaching from i to i + 1; (F, 3, S, S), 0..255."""
    n = xy.shape[0]
    low = np.maximum(np.floor(xy.amin((0, 1, 2)).numpy()).astype(int) - 2, 0)
    low = np.minimum(low, np.array(photo.shape[1::-1]) - 4)
    high = np.ceil(xy.amax((0, 1, 2)).numpy()).astype(int) + 3
    part = torch.from_numpy(np.array(photo[low[1]:max(high[1], low[1] + 4), low[0]:max(high[0], low[0] + 4)]))
    part = part.permute(2, 0, 1).float()[None]
    side = torch.tensor(part.shape[:1:-1])
    grid = (xy - torch.from_numpy(low)) * 2 / side - 1
    grid = rearrange(grid, "F y x c -> 1 (F y) x c")                   # all frames share the photograph
    out = F.grid_sample(part, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return rearrange(out, "1 c (F y) x -> F c y x", F=n)


def random_motion(rng, frames, speed):
    """A smooth move: shift (F, 2) px and angle (F,), about 0 in the middle of the clip, and log zoom (F,), which is 0
    where the picture is largest: photographs are soft enough, none is enlarged."""
    t = np.arange(frames) - (frames - 1) / 2
    way = rng.uniform(0, 2 * np.pi)
    shift = t[:, None] * rng.uniform(0, speed) * np.array([np.cos(way), np.sin(way)])
    shift = shift + (t ** 2 / frames)[:, None] * rng.uniform(-0.5, 0.5, 2)            # it speeds up or slows down
    shift = shift + rng.normal(0, 0.3, (frames, 2)) * (rng.random() < 0.3)            # a shaky hand
    zoom = t * rng.normal(0, 0.004)
    return shift, zoom - zoom.min(), rng.normal(0, 0.05) + t * rng.normal(0, 0.006)


def turn(xy, angle, zoom):
    """Rotate and scale positions (F, S, S, 2), frame by frame."""
    c, s = (torch.from_numpy(f(angle) * zoom).float()[:, None, None] for f in (np.cos, np.sin))
    return torch.stack([c * xy[..., 0] - s * xy[..., 1], s * xy[..., 0] + c * xy[..., 1]], -1)


def photo_clip(photos, rng, frames, size):
    """uint8 (F, size, size, 3): a camera move over photos[0]; in front of it one or two pieces that move differently.

    Without the pieces everything would move together, nothing would ever be hidden or come into view, and the
    network would learn that. Drawn at twice the size and averaged 2 x 2.
    """
    r = (torch.arange(2 * size) + 0.5) / 2 - size / 2                                       # px from the centre
    plane = torch.stack(torch.meshgrid(r, r, indexing="xy"), -1).expand(frames, -1, -1, -1)
    ground = photos[0]
    shift, zoom, angle = random_motion(rng, frames, speed=3.0)
    zoom = np.exp(zoom + rng.uniform(0, 0.25))
    room = [max(side / 2 - 0.6 * size * zoom.max(), 1) for side in ground.shape[1::-1]]
    places = [np.array(ground.shape[1::-1]) / 2 + rng.uniform(-1, 1, 2) * room for _ in range(3)]
    half = size // 2

    def score(c):
        x, y = (int(max(v, half)) - half for v in c)
        return texture(ground[y:y + size, x:x + size])
    centre = torch.from_numpy(pick(rng, places, score) + shift).float()[:, None, None]
    clip = sample(ground, turn(plane, angle, zoom) + centre)
    for _ in range(rng.integers(1, 3)):
        piece = photos[rng.integers(len(photos))]
        shift, zoom, angle = random_motion(rng, frames, speed=5.0)
        zoom = np.exp(zoom)
        where = rng.uniform(-0.45, 0.45, 2) * size + shift
        centre = torch.tensor([rng.uniform(0.3, 0.7) * side for side in piece.shape[1::-1]])
        radius = rng.uniform(0.1, 0.28) * size
        waves = [(k, rng.uniform(-0.25, 0.25) / k, rng.uniform(0, 6.3)) for k in (1, 2, 3, 5)]
        soft = rng.uniform(0.2, 0.8)
        # only the part of the plane that it can reach is drawn
        reach = 1.6 * radius / zoom.min() + 8 * soft
        low = np.floor(2 * (where.min(0) - reach) + size).astype(int).clip(0, 2 * size - 1)
        high = np.ceil(2 * (where.max(0) + reach) + size).astype(int).clip(low + 1, 2 * size)
        box = (..., slice(low[1], high[1]), slice(low[0], high[0]))
        # these coordinates move with the piece, and so do its edge and its texture
        local = turn(plane[:, box[1], box[2]] - torch.from_numpy(where).float()[:, None, None], angle, zoom)
        theta = torch.atan2(local[..., 1], local[..., 0])
        edge = radius * (1 + sum(a * torch.cos(k * theta + phase) for k, a, phase in waves))
        alpha = torch.sigmoid((edge - local.norm(dim=-1)) / soft)[:, None]
        clip[box] += alpha * (sample(piece, local + centre) - clip[box])
    clip = F.avg_pool2d(clip, 2).round().clamp(0, 255).byte()
    return clip.permute(0, 2, 3, 1).contiguous().numpy()


class Clips:
    """The training set of a folder; item `index` of `epoch` is a function of (seed, epoch, index) alone.

    With videos and photographs 60 % of the clips come from videos (every window of every shot equally likely), 40 %
    are camera moves over photographs. Before a clip is made `survey` must be called; it decodes every file.
    """

    def __init__(self, folder, frames, size, strength, seed=0):
        self.folder, self.frames, self.size, self.seed = Path(folder), frames, size, seed
        self.strength = degradation.STRENGTHS.get(strength, strength)
        self.load = lru_cache(32)(media.read_image)
        if not self.folder.is_dir():
            what = "a file" if self.folder.is_file() else "no such folder"
            raise SystemExit(f"{folder}: {what}; name a folder with videos or photographs by --data")
        self.files = sorted(path for path in self.folder.rglob("*") if not path.name.startswith(".")
                            and path.suffix.lower() in media.VIDEOS | media.IMAGES and path.is_file())
        if not self.files:
            raise SystemExit(f"{self.folder}: no video or photograph; name a folder with some by --data")

    def survey(self):
        """Find the shots of all videos and try all photographs. What cannot be used is skipped, with its name and the
        reason, and counted. Returns itself."""
        self.shots, self.photos, self.skipped = [], [], []       # shots: (path, start, end)
        for path in self.files:
            try:
                self._add(path)
            except ValueError as e:
                self.skipped.append(path)
                print(f"skipped: {e}")
        if self.skipped:
            print(f"{self.folder}: {len(self.skipped)} files skipped")
        if not self.shots and not self.photos:
            raise SystemExit(f"{self.folder}: no usable video or photograph; name a folder with some by --data")
        self.windows = np.array([end - start - self.frames + 1 for _, start, end in self.shots])
        return self

    def _add(self, path):
        video = path.suffix.lower() in media.VIDEOS
        if video:
            info = media.video_info(path)
            w, h = info["width"], info["height"]
        else:
            h, w, _ = self.load(path).shape                      # decoded whole: a header may promise too much
        if min(w, h) < self.size:
            raise ValueError(f"{path}: {w}x{h} is smaller than clips of {self.size} px")
        if not video:
            self.photos.append(path)
            return
        seen = media.survey(path)
        ends = pairwise([0, *seen["cuts"], seen["frames"]])
        shots = [(path, a, b) for a, b in ends if b - a >= self.frames]
        if not shots:
            raise ValueError(f"{path}: no shot of {self.frames} frames")
        self.shots += shots

    def stamp(self):
        """What the pixels of a clip are made from: code, seed, degradation, and name, size and time of every file."""
        files = [(str(p.relative_to(self.folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in self.files]
        return [common.code(sys.modules[__name__], degradation, media), self.seed, asdict(self.strength), files]

    def hr(self, rng):
        """One clip, uint8 (F, size, size, 3)."""
        if self.photos and (not self.shots or rng.random() >= 0.6):
            chosen = rng.permutation(len(self.photos))[:2]
            return photo_clip([self.load(self.photos[i]) for i in chosen], rng, self.frames, self.size)
        i = rng.choice(len(self.shots), p=self.windows / self.windows.sum())
        path, start, _ = self.shots[i]
        video = media.read_video(path, start + int(rng.integers(self.windows[i])), self.frames)
        room = [side - self.size for side in video.shape[1:3]]
        places = [tuple(rng.integers(0, r + 1) for r in room) for _ in range(3)]
        y, x = pick(rng, places, lambda p: texture(video[0, p[0]:p[0] + self.size, p[1]:p[1] + self.size]))
        return video[:, y:y + self.size, x:x + self.size]

    @degradation.one_thread()
    def clip(self, epoch, index):
        """(HR uint8 (F, size, size, 3), LR uint8 (F, size/4, size/4, 3))."""
        rng = np.random.default_rng([self.seed, epoch, index])
        hr = np.ascontiguousarray(self.hr(rng))
        return hr, degradation.degrade(hr / np.float32(255), rng, self.strength)


def shuffled(seed, n, epoch):
    """The order of n things in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def stream(seed, n, first, count):
    """Which of n things are items first..first+count-1 of an endless stream: each once per epoch, in a new order."""
    return [int(shuffled(seed, n, i // n)[i % n]) for i in range(first, first + count)]


def cut(rng, clip, crop):
    """The same random square of HR and LR, (F, crop, crop, 3) and (F, crop/4, crop/4, 3)."""
    y, x = rng.integers(0, (clip[0].shape[1] - crop) // SCALE + 1, 2)                 # in LR pixels
    sides = ((k, crop * k // SCALE) for k in (SCALE, 1))
    return [v[:, k * y:k * y + side, k * x:k * x + side] for v, (k, side) in zip(clip, sides, strict=True)]


def reserve(path, size):
    """Make a file of `size` bytes, or lengthen one, whose room on the disk is taken at once: a memory map that outgrows
    a full disk would end the process without a word."""
    before = os.path.getsize(path) if os.path.exists(path) else 0
    try:
        with open(path, "ab") as f:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(f.fileno(), 0, size)
            else:                                                       # macOS, Windows
                f.truncate(size)
    except OSError as error:
        if before:
            os.truncate(path, before)
        else:
            Path(path).unlink(missing_ok=True)
        raise SystemExit(f"{path}: {size / 1e9:.2g} GB cannot be written ({error.strerror}); make room, or take fewer "
                         "--clips") from None


class Bank:
    """n degraded clips made once and kept on disk, from which training crops are cut.

    Degrading costs more than a small network's training step; cutting a crop costs nothing. With several processes
    let one build it while the others wait.
    """

    def __init__(self, clips, n, cache_dir, crop):
        if n < 1:
            raise SystemExit("clips: at least 1")
        self.n, self.crop_size, self.seed = n, crop, clips.seed
        self.shapes = [(clips.frames, s, s, 3) for s in (clips.size, clips.size // SCALE)]
        key = json.dumps([n, self.shapes, clips.stamp()])
        self.path = Path(cache_dir) / f"bank-{common.digest(key)[:16]}.bin"
        row = sum(math.prod(s) for s in self.shapes)
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._build(clips.survey(), row)
        if self.path.stat().st_size != n * row:
            raise SystemExit(f"{self.path}: clips cut short; remove this file, it is made again")
        self.rows = np.memmap(self.path, np.uint8, "r", shape=(n, row))

    def _build(self, clips, row):
        with media.whole(self.path) as tmp:
            reserve(tmp, self.n * row)
            rows = np.memmap(tmp, np.uint8, "r+", shape=(self.n, row))

            def make(i):
                rows[i] = np.concatenate([x.ravel() for x in clips.clip(0, i)])
            with degradation.one_thread(), ThreadPoolExecutor(common.workers()) as pool:  # their threads inherit it
                list(tqdm(pool.map(make, range(self.n)), f"clips of {clips.folder}", self.n))
            rows.flush()

    def __len__(self):
        return self.n

    def whole(self, i):
        """Clip i as it is stored: (HR uint8 (F, size, size, 3), LR uint8 (F, size/4, size/4, 3))."""
        parts = np.split(self.rows[i], [math.prod(self.shapes[0])])
        return tuple(p.reshape(shape) for p, shape in zip(parts, self.shapes, strict=True))

    def crop(self, epoch, index):
        """(HR uint8 (F, crop, crop, 3), LR (F, crop/4, crop/4, 3)): each clip once per epoch, cut and flipped anew."""
        rng = np.random.default_rng([self.seed, epoch, index])
        out = []
        crops = cut(rng, self.whole(shuffled(self.seed, self.n, epoch)[index]), self.crop_size)
        flips = rng.random(4) < 0.5
        for v in crops:
            v = np.flip(v, tuple(np.flatnonzero(flips[:3])))
            out.append(np.ascontiguousarray(v.swapaxes(1, 2) if flips[3] else v))
        return tuple(out)

    def batch(self, first, count, device="cpu"):
        """Items first..first+count-1 of an endless stream: HR (count, 3, F, H, W), LR (.., h, w) in [-1, 1]."""
        with ThreadPoolExecutor(min(count, common.workers())) as pool:  # a GPU waits while crops are cut
            crops = pool.map(lambda i: self.crop(*divmod(i, self.n)), range(first, first + count))
        return tuple(to_tensor(x, device).contiguous() for x in zip(*crops, strict=True))

    def latents(self, vae, first, count, device, soft=None, u=None):
        """(z_hr, z_lr), (count, C, T, H, W), of such items. soft: (count,) bool, HR to blur first, by SOFT and u."""
        hr, lr = self.batch(first, count, device)
        z_lr = vae.encode(upsample(lr, hr.shape[-2:]))
        if soft is not None:
            hr = torch.where(soft.view(-1, 1, 1, 1, 1), soften(hr, SOFT[0] + SOFT[1] * u), hr)
        return vae.encode(hr), z_lr


# ---------------------------------------------------------------------------------------------- what the stages use


def clip_row(model):
    """The row of CLIPS of a model, if its numbers go together."""
    if model not in CLIPS:
        raise SystemExit(f"model {model}: add a row of CLIPS in data.py")
    row, tokens = CLIPS[model], 2 * M.vae_class(model).stride
    if row["frames"] % 4 != 1 or not 0 < row["window"] <= (row["frames"] + 3) // 4:
        raise SystemExit(f"CLIPS of {model}: frames 4k + 1, window at most k + 1")
    if row["crop"] % tokens or row["size"] % (2 * SCALE) or not 0 < row["crop"] <= row["size"]:
        raise SystemExit(f"CLIPS of {model}: crop a multiple of {tokens}, size of {2 * SCALE}, crop at most size")
    if row["strength"] not in degradation.STRENGTHS:
        raise SystemExit(f"CLIPS of {model}: strength one of {', '.join(degradation.STRENGTHS)}")
    return row


def crop_shape(model):
    """(T, H, W) of the latents that a network of this model is trained on: a window of a crop."""
    clip = clip_row(model)
    side = clip["crop"] // M.vae_class(model).stride
    return clip["window"], side, side


def clips_for(model, folder, seed=0):
    """The Clips of a folder in the sizes and the strength that this model trains on."""
    clip = clip_row(model)
    return Clips(folder, clip["frames"], clip["size"], clip["strength"], seed)


def footage(cfg):
    """A hash of what the clips of this Config of a stage are made from, Clips.stamp."""
    return common.digest(json.dumps(clips_for(cfg.model, cfg.data, cfg.seed).stamp()))[:16]


def training_bank(cfg, rank, latents=""):
    """The Bank of the folder cfg.data; or the LatentBank of the file `latents`, if one is named.

    Rank 0 builds a Bank while the others wait.
    """
    if latents:
        return LatentBank(latents, cfg.model, cfg.seed)
    clips = clips_for(cfg.model, cfg.data, cfg.seed)
    cache = Path(cfg.out).parent / "cache"
    if rank > 0:
        common.barrier()
    bank = Bank(clips, cfg.clips, cache, clip_row(cfg.model)["crop"])
    if rank == 0:
        common.barrier()
    return bank


def random_window(window, *latents):
    """The same random run of `window` latent frames of each, (B, C, T, H, W) -> (B, C, window, H, W).

    The first latent frame of a clip holds a single video frame; a model that sees runs from anywhere in a clip
    learns both kinds of first frame, and a long video can be cut in latent space.
    """
    first = int(torch.randint(latents[0].shape[2] - window + 1, ()))
    return tuple(z[:, :, first:first + window] for z in latents)


def soften(video, sigma):
    """Gaussian blur of standard deviation sigma (B,) pixels. video: (B, 3, F, H, W)."""
    x = torch.arange(-4.0, 5.0, device=video.device)
    kernel = torch.softmax(-x.square() / (2 * sigma[:, None].square()), dim=1)                  # (B, 9)
    flat = video.flatten(1, 2).transpose(0, 1)                                                  # (3F, B, H, W)
    flat = F.pad(flat, (4, 4, 4, 4), mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=len(video))
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=len(video))
    return flat.transpose(0, 1).unflatten(1, (3, -1))


@torch.no_grad()
def panel_batch(bank, vae, window, seed, device):
    """(z_hr, z_lr, eps) of four crops, the same whenever a run asks: what panels show, so that they can be compared."""
    torch.manual_seed(seed)
    z_hr, z_lr = random_window(window, *bank.latents(vae, 0, 4, device))
    return z_hr, z_lr, torch.randn_like(z_hr)


# ---------------------------------------------------------------------------------------------- cached latents


def fingerprint(vae):
    """A number that two video codes share only if their weights are the same."""
    return zlib.crc32(b"".join(x.float().cpu().numpy().tobytes() for x in vae.state_dict().values()))


def latent_shape(model):
    """Of a row of LatentBank: HR, LR and softened HR, (3, C, T, H, W)."""
    return 3, M.vae_class(model).channels, (clip_row(model)["frames"] - 1) // 4 + 1, *crop_shape(model)[1:]


class LatentBank:
    """Clips that were degraded and encoded once, by `data.py prepare --latents`: a large video code costs a quarter of
    a training step. FILE holds rows of (3, C, T, H, W) fp16, the latents of HR, LR and the softened HR; FILE.pt the
    code, the shape and how many rows are done. Unlike in Bank a clip is always the same crop, never flipped, and its
    softened HR has one strength of blur.
    """

    def __init__(self, path, model, seed=0):
        self.about = read_latents_about(path)
        if self.about["model"] != model:
            raise SystemExit(f"{path}: latents for the model {self.about['model']}, not {model}")
        if tuple(self.about["shape"]) != latent_shape(model):
            raise SystemExit(f"{path}: of clips of another size than CLIPS in data.py has; prepare them again")
        if self.about["done"] < self.about["count"]:
            raise SystemExit(f"{path}: {self.about['done']} of {self.about['count']} clips; the command that made it "
                             "goes on where it stopped")
        self.seed, self.checked = seed, None
        try:
            self.rows = np.memmap(path, np.float16, "r", shape=(self.about["count"], *self.about["shape"]))
        except (OSError, ValueError) as error:
            raise SystemExit(f"{path}: missing or cut short ({error}); make it again with data.py prepare "
                             "--latents") from None

    def __len__(self):
        return len(self.rows)

    def latents(self, vae, first, count, device, soft=None, u=None):
        """(z_hr, z_lr) of items first..first+count-1 of an endless stream; each clip once per epoch, in a new order."""
        if vae is not self.checked and fingerprint(vae) != self.about["vae_id"]:        # once: it reads all weights
            raise SystemExit("the latents were made with another video code than the checkpoint's: prepare them again")
        self.checked = vae
        rows = stream(self.seed, len(self), first, count)
        z_hr, z_lr, z_soft = (torch.from_numpy(self.rows[rows, k].astype(np.float32)).to(device) for k in range(3))
        if soft is not None:
            z_hr = torch.where(soft.view(-1, 1, 1, 1, 1), z_soft, z_hr)
        return z_hr, z_lr


def open_vae(model, path):
    """The video code of this model from a checkpoint of this project, or from Wan2.1's files."""
    vae = M.build_vae(model).eval().requires_grad_(False)
    if isinstance(vae, M.PatchVAE):
        M.fill(vae, M.read_checkpoint(path)["vae"], path)
    else:
        M.load_wan_vae(vae, path)
    return vae


def read_latents_about(path):
    """The dict beside a file of latents: model, shape, count, done, vae (its state dict), vae_id, source."""
    try:
        about = torch.load(f"{path}.pt", map_location="cpu", weights_only=True)
        return {k: about[k] for k in ("model", "shape", "count", "done", "vae", "vae_id", "source")}
    except Exception as error:
        why = "missing" if not os.path.exists(path) else f"{path}.pt, beside it, not readable ({type(error).__name__})"
        raise SystemExit(f"{path}: {why}; make latents with data.py prepare --latents") from None


@torch.no_grad()
def prepare_latents(path, folder, model, vae, count, device="cpu", save_every=0):
    """Degrade and encode `count` clips of a folder of media into a file for LatentBank; goes on where it stopped. From
    call to call count may be raised, or lowered to no less than what is done."""
    clip = clip_row(model)
    clips = clips_for(model, folder)
    about = {"model": model, "shape": latent_shape(model), "count": count, "done": 0,
             "vae": vae.state_dict(), "vae_id": fingerprint(vae), "source": json.dumps(clips.stamp())}
    row = 2 * math.prod(about["shape"])                     # bytes
    if Path(f"{path}.pt").exists():
        before = read_latents_about(path)
        if any(before[k] != about[k] for k in ("model", "shape", "vae_id", "source")):
            raise SystemExit(f"{path}: made with other settings, media, code or video code; name another file")
        if before["done"] > count:
            raise SystemExit(f"{path}: has {before['done']} clips already; --clips: that many, or more")
        if Path(path).is_file() and Path(path).stat().st_size >= before["done"] * row:
            about["done"] = before["done"]                  # if not, its rows are lost: start again
    elif Path(path).exists():
        raise SystemExit(f"{path} exists and is no file of latents: name another")

    if about["done"] < count:
        clips.survey()
    common.make_folder(Path(path).parent)
    common.put_state(f"{path}.pt", about)                   # first: a file without its note would be refused
    reserve(path, count * row)
    rows = np.memmap(path, np.float16, "r+", shape=(count, *about["shape"]))

    def make(i):
        rng = np.random.default_rng([0, i])
        return *cut(rng, clips.clip(0, i), clip["crop"]), SOFT[0] + SOFT[1] * rng.random()

    save_every = save_every or max(16, count // 100)        # the note has the video code in it: half a GB
    start, ahead = about["done"], 2 * common.workers()      # clips are made ahead: degrading takes longer than a GPU
    with ThreadPoolExecutor(common.workers(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        jobs = [pool.submit(make, i) for i in range(start, min(start + ahead, count))]
        try:
            for i in tqdm(range(start, count), f"latents of {folder}", initial=start, total=count):
                *pair, sigma = jobs.pop(0).result()
                if i + ahead < count:
                    jobs.append(pool.submit(make, i + ahead))
                hr, lr = (to_tensor(v, device)[None] for v in pair)
                videos = hr, upsample(lr, hr.shape[-2:]), soften(hr, torch.tensor([sigma], device=device).float())
                rows[i] = torch.cat([vae.encode(v) for v in videos]).half().cpu().numpy()
                if (i + 1) % save_every == 0 or i + 1 == count:
                    rows.flush()
                    about["done"] = i + 1
                    common.put_state(f"{path}.pt", about)
        finally:
            for job in jobs:
                job.cancel()


# ---------------------------------------------------------------------------------------------- prepare


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def prepare(film, stills, out, listed=Path(__file__).parent / "samples" / "media.json"):
    """Cut the listed shots and shrink the listed photographs into out/train, out/val and out/test.

    The film is soft at its own 1280x720 and sharp at 640x360; each photograph is shrunk to where it is sharp. stills: a
    folder of the photographs by their listed names, or with folders for the __ in these, as /usr/share has.
    """
    todo = json.loads(Path(listed).read_text())
    if not Path(film).is_file():
        raise SystemExit(f"{film}: no such file; samples/CREDITS.md says where the film comes from")
    if sha256(film) != todo["film"]["sha256"]:
        raise SystemExit(f"{film}: not the file that {listed} describes (sha256 differs)")
    for split in {item["split"] for item in (*todo["film"]["shots"], *todo["stills"])}:
        Path(out, split).mkdir(parents=True, exist_ok=True)
    for shot in tqdm(todo["film"]["shots"], "shots"):
        frames = media.read_video(film, shot["start"], shot["end"] - shot["start"], size=todo["film"]["size"])
        path = Path(out, shot["split"], f"bbb_{shot['shot']:03d}.mp4")
        media.write_video(path, frames, Fraction(todo["film"]["fps"]), crf=6)
    for still in tqdm(todo["stills"] if stills else [], "photographs"):
        path = Path(stills, still["name"])
        path = path if path.is_file() else Path(stills, *still["name"].split("__"))
        if not path.is_file() or sha256(path) != still["sha256"]:
            print(f"skipped: {path}: missing, or not the listed file")
            continue
        picture = Image.fromarray(media.read_image(path))
        size = [int(side / still["scale"]) for side in picture.size]
        name = Path(out, still["split"], Path(still["name"]).stem + ".jpg")
        picture.resize(size, Image.BOX).save(name, quality=97, subsampling=0)


# ---------------------------------------------------------------------------------------------- prompts

POSITIVE_PROMPT = (             # [ours]
    "A high quality, sharp video with rich natural detail, clear edges, realistic texture, true colours and stable "
    "motion, without noise, blur or compression artifacts.")
NEGATIVE_PROMPT = (             # [Wan], its usual one in English
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall "
    "gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, "
    "poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three "
    "legs, many people in the background, walking backwards")


@torch.no_grad()
def embed(texts, tokenizer, encoder, length):
    """The outputs of a text encoder, (n, length, dim): each text ends with </s>, then zeros. What is longer is cut."""
    rows = []
    for text in texts:          # one by one: padding would be masked, and its outputs replaced by zeros
        ids = tokenizer(" ".join(text.split()), truncation=True, max_length=length, return_tensors="pt").input_ids
        row = encoder(ids).last_hidden_state[0]
        rows.append(F.pad(row, (0, 0, 0, length - len(row))))
    return torch.stack(rows)


def write_prompts(encoder, out, positive=POSITIVE_PROMPT, negative=NEGATIVE_PROMPT, length=512):
    """Write the embeddings (3, length, dim) of "", positive and negative, as bf16: what model.read_prompts reads.

    encoder: folder or hub name of a UMT5 encoder and its tokenizer, or the folder of a pipeline that has both as
    text_encoder and tokenizer. Raises SystemExit in one line.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
        from transformers import AutoTokenizer, UMT5EncoderModel
    except ImportError:
        raise SystemExit("prompts need transformers and safetensors: pip install -r requirements-wan.txt") from None
    if not Path(out).absolute().parent.is_dir() or Path(out).is_dir():
        raise SystemExit(f"{out}: name a file in a folder that exists")
    pipeline = Path(encoder, "text_encoder").is_dir()
    if pipeline and not Path(encoder, "tokenizer").is_dir():
        raise SystemExit(f"{encoder}: has text_encoder/ but no tokenizer/; download that folder too")
    try:
        tokenizer = AutoTokenizer.from_pretrained(Path(encoder, "tokenizer") if pipeline else encoder)
        net, report = UMT5EncoderModel.from_pretrained(Path(encoder, "text_encoder") if pipeline else encoder,
                                                       dtype=torch.bfloat16, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise SystemExit(f"{encoder}: no UMT5 encoder with its tokenizer ({reason}); name its folder or hub name") \
            from None
    if report["missing_keys"]:
        raise SystemExit(f"{encoder}: not the weights of a UMT5 encoder; missing: {min(report['missing_keys'])} and "
                         f"{len(report['missing_keys']) - 1} more")
    prompts = embed(["", positive, negative], tokenizer, net, length)      # rows model.NULL, POSITIVE, NEGATIVE
    save_file({"prompts": prompts.bfloat16()}, out, {"null": "", "positive": positive, "negative": negative})


def main(argv=None):
    parser = common.command_line(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("prepare", help="cut the listed shots and photographs, or degrade and encode clips once")
    made.add_argument("--film", help="bbb.mp4")
    made.add_argument("--stills", help="folder of the photographs; without it only the film is cut")
    made.add_argument("--out", help="folder to write train/, val/ and test/ into")
    made.add_argument("--latents", help="instead: file to write latents into, for the --latents of the stages")
    made.add_argument("--data", default="samples/train", help="folder of videos and photographs (default %(default)s)")
    made.add_argument("--model", default="wan1.3b", choices=list(CLIPS), help="whose code (default %(default)s)")
    made.add_argument("--vae", help="wan1.3b: Wan2.1's video code, file or folder; else a checkpoint of this project")
    made.add_argument("--clips", type=int, default=2000, help="how many (default %(default)s)")
    made.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    text = commands.add_parser("prompts", help="turn the three prompts of the real base into tensors")
    text.add_argument("--encoder", required=True, help="UMT5: a folder, or a hub name such as google/umt5-xxl")
    text.add_argument("--out", required=True, help="prompts.safetensors")
    text.add_argument("--positive", default=POSITIVE_PROMPT, help="(default: %(default)r)")
    text.add_argument("--negative", default=NEGATIVE_PROMPT, help="(default: %(default)r)")
    made.error = text.error = parser.error
    args = parser.parse_args(argv)
    if args.command == "prepare" and args.latents:
        if not args.vae:
            parser.error("--latents needs --vae: the video code that encodes")
        if args.clips < 1:
            parser.error("--clips: at least 1")
        device = common.device_named(args.device)
        prepare_latents(args.latents, args.data, args.model, open_vae(args.model, args.vae).to(device), args.clips,
                        device=device)
    elif args.command == "prepare":
        if not (args.film and args.out):
            parser.error("--film and --out, or --latents")
        prepare(args.film, args.stills, args.out)
    else:
        write_prompts(args.encoder, args.out, args.positive, args.negative)


if __name__ == "__main__":
    with common.interruptible("the same command again; latents go on where they stopped"):
        main()
