"""Upscale a video, a picture, or a folder of either, in one network step.

    python infer.py samples/lr/apple.mp4 out.mp4                # with the student that ships
    python infer.py in.mov out.mkv --ckpt out/tiny/stage2/last.pt
    python infer.py frames/ upscaled/ --scale 2                 # numbered pictures are the frames of one clip
    python infer.py in.mp4 out.mp4 --ckpt weights/tiny_teacher.pt --part ema --steps 50 --w 0.5  # the slow teacher

INPUT    a video, a picture, a folder of videos, of pictures, or of the numbered frames of one clip (24 per second).
OUTPUT   .mp4 or .mov: H.264, tagged bt709. .mkv: FFV1, lossless. .png: a picture. No ending: a folder, of PNGs or
         of one output for each file of INPUT.

Frames out = frames in, at the same times, with the sound copied. Memory does not grow with the length: chunks of
frames overlap and are blended, and none reaches across a cut. OUTPUT appears when it is whole; what an interrupted
run has finished stays in a hidden folder beside it, for --resume.
"""
import itertools
import math
import re
import sys
import zlib
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from tqdm import tqdm

import common
import data
import media
import model as M

STUDENT = str(Path(__file__).parent / "weights" / "tiny_student.pt")
FPS = Fraction(24)          # of pictures that are the frames of a clip
TEMPERATURE = 0.9           # of a student's noise: less grain than at 1, as in training [as SRFlow; LOG.md, "a little
                            # less noise"]; of a teacher of many steps it makes a blur

# ----------------------------------------------------------------------------
# colour: the network may shift it, the input knows it. content, style: (B, 3, F, H, W)


def blur(x, dilation):
    """One level of the wavelet pyramid, [1, 2, 1] x [1, 2, 1] / 16 with holes. x: (n, c, H, W)."""
    kernel = torch.tensor([1.0, 2.0, 1.0], device=x.device)
    kernel = (kernel[:, None] * kernel / 16).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, [dilation] * 4, mode="replicate"), kernel, dilation=dilation, groups=x.shape[1])


def wavelet_color(content, style):
    """Details of content, low frequencies of style: 5 levels, holes of 1, 2, 4, 8, 16 pixels (StableSR).

    low(style) - low(content) = low(style - content), so one pyramid is enough. Its levels of 1, 2 and 4 are done as a
    mean over 8 x 8 pixels, those of 8 and 16 on these means, a 40th of the work. H, W: multiples of 8.
    """
    low = F.avg_pool2d(rearrange(style.float() - content, "B c F H W -> (B F) c H W"), 8)
    low = F.interpolate(blur(blur(low, 1), 2), scale_factor=8, mode="bilinear")
    return content + rearrange(low, "(B F) c H W -> B c F H W", B=len(content))


COLORS = {"wavelet": wavelet_color, "none": lambda content, style: content}

# ----------------------------------------------------------------------------
# one chunk of frames


def load(ckpt, part, device, tile=0, vae_dtype="fp32", vae_tiles=False):
    """`upscale` with the network and the video code of a checkpoint: a function of the frames and the options.

    tile: pixels of output that the network sees at once; 0: the crop it was trained on. Of Wan's video code, which
    takes the most memory: vae_dtype: "fp32", as Wan, or "bf16"; vae_tiles: see model.WanVAE.
    """
    net, vae, config = M.load_checkpoint(ckpt, part, device)
    window, side, _ = data.crop_shape(config["model"])
    if isinstance(vae, M.PatchVAE):
        if vae_tiles or vae_dtype != "fp32":
            raise SystemExit(f"{ckpt}: --vae_dtype and --vae_tiles are for Wan's video code; this model has another")
    else:
        if vae_dtype == "bf16":
            vae.compute_in(torch.bfloat16)
        if vae_tiles:
            vae.code.enable_tiling()
    side = tile // (2 * vae.stride) * 2 or side                         # tokens are 2 x 2 latents
    return partial(upscale, M.tiled(net, (window, side, side)), vae, window, device,
                   shift=config.get("shift", 1.0))     # of times; at one step without effect


def noise(shape, start, seed):
    """Noise (1, C, T, H, W) of a chunk whose first frame is number `start`: a latent frame's depends on its place in
    the film and on the seed alone, so chunks that overlap share it."""
    B, C, T, H, W = shape
    keys = [zlib.crc32(repr((seed, start + 4 * k)).encode()) for k in range(T)]
    return torch.stack([torch.randn(B, C, H, W, generator=torch.Generator().manual_seed(k)) for k in keys], dim=2)


@torch.no_grad()
def upscale(velocity, vae, window, device, lr, steps=1, w=0.0, temperature=1.0, seed=0, start=0, color="wavelet",
            scale=4, shift=1.0):
    """uint8 (F, h, w, 3) -> float (3, F, scale h, scale w) in [-1, 1], all in memory.

    window: latent frames that the network expects at least. steps: network steps; 1 for a student, many for a teacher,
    then w is the guidance weight and shift that of their times. temperature: what the noise is multiplied by; 1, as in
    training, or less, for less texture (SRFlow, 2006.14200). start: number of the first frame in its film, for the
    noise. color: a name in COLORS. scale: at most 4.
    """
    count, h, width = lr.shape[:3]
    video = data.to_tensor(lr, device)[None]                            # (1, 3, F, h, w)
    frames = max(4 * (window - 1) + 1, -(-(count - 1) // 4) * 4 + 1)    # 4 n + 1, at least one window
    video = torch.cat([video, video[:, :, -1:].expand(-1, -1, frames - count, -1, -1)], dim=2)
    side = 2 * vae.stride // 4                                          # of a token, 2 x 2 latents, in input pixels
    video = F.pad(video, (0, -width % side, 0, -h % side, 0, 0), mode="replicate")
    up = data.upsample(video, (4 * video.shape[3], 4 * video.shape[4]))
    z_lr = vae.encode(up)
    with common.autocast(device):
        eps = temperature * noise(z_lr.shape, start, seed).to(device)
        z = M.sample(velocity, eps, z_lr, steps, shift, w)
    out = vae.draw_onto(up, z_lr, z)
    for k in range(count):                                              # frame by frame: it takes less memory
        out[:, :, k:k + 1] = COLORS[color](out[:, :, k:k + 1], up[:, :, k:k + 1])
    out = out[0, :, :count, :4 * h, :4 * width]
    if scale != 4:
        out = F.interpolate(out.transpose(0, 1), size=(scale * h, scale * width), mode="bicubic", antialias=True)
        out = out.transpose(0, 1)
    return out


# ----------------------------------------------------------------------------
# a film of any length


@dataclass
class Film:
    """What is upscaled: frames() yields uint8 (h, w, 3). cuts: frames with which a new shot begins."""
    frames: callable
    count: int
    cuts: list
    fps: Fraction = FPS
    aspect: str = "1:1"         # of a pixel
    times: list = None          # seconds of each frame, if the rate varies
    begin: float = 0.0          # seconds at which the first frame is shown
    sound: Path = None          # file with the sound


def open_video(path):
    info, seen = media.video_info(path), media.survey(path)
    if seen["problem"]:
        print(f"{path}: damaged ({seen['problem']}); {seen['frames']} frames can be read", file=sys.stderr)
    if hdr := media.header(path)["hdr"]:
        print(f"{path}: HDR ({hdr}), tone-mapped: the output is SDR", file=sys.stderr)
    times = None if media.steady(seen["times"], info["fps"]) else seen["times"]
    return Film(lambda: media.stream(path), seen["frames"], seen["cuts"], info["fps"], info["aspect"], times,
                seen["times"][0], path)


def open_pictures(files):
    """The film of numbered pictures, all of one size. Its cuts are found as FFmpeg's scdet finds them."""
    cuts, before, last_change, size = [], None, 0.0, media.read_image(files[0]).shape
    for i, path in enumerate(files):
        picture = media.read_image(path)
        if picture.shape != size:
            raise ValueError(f"{path}: {picture.shape[1]}x{picture.shape[0]} differs from the first picture of its "
                             f"folder, {size[1]}x{size[0]}")
        small = np.asarray(Image.fromarray(picture).convert("L").resize((160, 90)), np.float32)
        change = 0.0 if before is None else np.abs(small - before).mean() / 2.55
        if min(change, abs(change - last_change)) >= 10:
            cuts.append(i)
        before, last_change = small, change
    return Film(lambda: map(media.read_image, files), len(files), cuts)


def frames_at_once(model):
    """The default of --chunk: 53, which four windows of tiny and small cover. Where a training clip is one window
    (wan1.3b) the network has only seen windows that begin a clip, so that each chunk is one such window."""
    clip = data.CLIPS[model]
    window = 4 * clip["window"] - 3
    return window if window == clip["frames"] else 53


def chunks(count, cuts, size, overlap):
    """[(start, end, keep, blend)]: frames start..end-1 are upscaled together, the first `keep` of them are then done;
    the first `blend` are shared with the chunk before. No chunk reaches across a cut.

    Chunks of a shot begin 4 k frames after it, so that their latent frames cover the same video frames.
    """
    parts = []
    for a, b in itertools.pairwise([0, *cuts, count]):
        step, start, blend = size - 1 - overlap, a, 0
        while start + size < b:
            parts.append((start, start + size, step, blend))
            start, blend = start + step, overlap + 1
        parts.append((start, b, b - start, blend))
    return parts


def upscale_film(film, unfinished, parts, upscaler, progress):
    """Upscale what `unfinished` does not have yet. upscaler: (uint8 (F, h, w, 3), start=n) -> float (3, F, H, W)."""
    missing = [i for i, (start, _, keep, _) in enumerate(parts) if not unfinished.has(start, keep)]
    if not missing:
        return
    first = missing[0] - (parts[missing[0]][3] > 0)     # the end of the one before is blended into it: once more
    at, have, tail = parts[first][0], [], None                          # have: the frames from number `at` on
    reader = itertools.islice(film.frames(), at, None)
    for start, end, keep, blend in parts[first:]:
        have = have[start - at:]
        have += itertools.islice(reader, end - start - len(have))
        at = start
        if len(have) < end - start:
            raise ValueError(f"{unfinished.target}: frame {start + len(have)} of its input cannot be read")
        out = upscaler(np.stack(have), start=start)
        if blend and tail is not None:
            weight = torch.arange(blend, device=out.device)[:, None, None] / blend      # the first frame is the old one
            out[:, :blend] = (1 - weight) * tail + weight * out[:, :blend]
        tail = out[:, keep:].clone()
        if not unfinished.has(start, keep):
            unfinished.write(start, data.to_uint8(out[:, :keep]), film.fps, film.aspect,
                             film.times and film.times[start:start + keep])
            progress.update(keep)


# ----------------------------------------------------------------------------
# files in, files out


def jobs(source, target, resume=False):
    """[(files of one input, output)] for INPUT and OUTPUT; ValueError if they do not fit."""
    source, target = Path(source), Path(target)
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if target.exists() and source.samefile(target):
        raise ValueError(f"{target}: the output is the input; name another")
    if target.suffix.lower() not in {".mp4", ".mov", ".mkv", ".png", ""}:
        raise ValueError(f"{target}: the output ends in .mp4, .mov, .mkv, .png, or in nothing for a folder")
    if target.exists() and target.is_dir() != (not target.suffix):
        raise ValueError(f"{target}: a {'folder; name a file in it' if target.is_dir() else 'file, not a folder'}")
    if target.is_symlink() and not target.exists():
        raise ValueError(f"{target}: a link to nothing; remove it, or name another output")
    if not source.is_dir():
        picture = source.suffix.lower() in media.IMAGES
        if target.suffix.lower() == ".png" and not picture:
            raise ValueError(f"{target}: one picture, but {source} is no picture; name a folder, .mp4 or .mkv")
        if picture and not target.suffix:
            target /= f"{source.stem}.png"
            if target.exists() and not resume:          # the user has not named this file
                raise ValueError(f"{target}: exists; name another folder")
        return [([source], target)]
    files = media.files_in(source, media.VIDEOS | media.IMAGES)
    if not files:
        raise ValueError(f"{source}: no videos or pictures in this folder")
    if others := sorted(p.name for p in source.iterdir() if p.name[0] != "." and p not in files):
        more = f" and {len(others) - 5} more" * (len(others) > 5)
        print(f"{source}: skipped, as no video or picture: {', '.join(others[:5])}{more}", file=sys.stderr)
    if media.numbered(files):
        if target.suffix.lower() == ".png" and len(files) > 1:
            raise ValueError(f"{target}: one picture for {len(files)} frames; name a folder, .mp4 or .mkv")
        numbers = [[int(x) for x in re.findall(r"\d+", path.stem)] for path in files]
        steps = [[y - x for x, y in zip(a, b, strict=True) if x != y] for a, b in itertools.pairwise(numbers)]
        if gaps := [path.name for path, step in zip(files[1:], steps, strict=True) if len(step) == 1 and step[0] > 1]:
            print(f"{source}: numbers are missing before {gaps[0]}; the pictures are taken as successive frames",
                  file=sys.stderr)
        return [(files, target)]
    for odd, others in ((files[0], files[1:]), (files[-1], files[:-1])):
        if len(others) > 1 and media.numbered(others):
            print(f"{source}: {len(files)} separate files, not a clip, as {odd.name} is not numbered like the others",
                  file=sys.stderr)
    if target.suffix:
        raise ValueError(f"{target}: {source} holds {len(files)} separate files; name a folder")
    outputs = [target / (p.stem + (".mp4" if p.suffix.lower() in media.VIDEOS else ".png")) for p in files]
    for i, path in enumerate(outputs):
        if path in outputs[:i]:
            first = files[outputs.index(path)].name
            raise ValueError(f"{files[i]}: its output {path} is also that of {first}; rename one")
        if path.exists() and not resume:
            raise ValueError(f"{path}: exists; name another folder, or add --resume to do only what is missing")
    return [([path], output) for path, output in zip(files, outputs, strict=True)]


def run(files, target, upscaler, args, stamp):
    """One job: a video, a picture, or the pictures of a clip."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{target}: not writable ({error.strerror}); name another output") from None
    if target.suffix.lower() == ".png":
        picture = media.read_image(files[0])
        media.write_image(target, data.to_uint8(upscaler(picture[None]))[0])
        return f"{target}: {args.scale * picture.shape[1]}x{args.scale * picture.shape[0]}"
    film = open_pictures(files) if files[0].suffix.lower() in media.IMAGES else open_video(files[0])
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target}: a folder that is not empty; name another")
    stamp = repr([[(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files], *stamp])
    parts = chunks(film.count, film.cuts, args.chunk, args.overlap)
    with media.Unfinished(target, stamp, args.resume) as unfinished:
        done = sum(keep for start, _, keep, _ in parts if unfinished.has(start, keep))
        with tqdm(total=film.count, initial=done, unit="frame", desc=target.name, dynamic_ncols=True) as progress:
            upscale_film(film, unfinished, parts, upscaler, progress)
        missing = unfinished.finish(film.fps, film.sound, film.begin, film.times)
    return f"{target}: {film.count} frames" + (f", without {missing}" if missing else "")


def arguments(argv):
    cli = common.command_line(__doc__)
    cli.add_argument("input"), cli.add_argument("output")
    cli.add_argument("--ckpt", default=STUDENT, help="checkpoint of any stage (default: the student that ships)")
    cli.add_argument("--part", default="student", help='network in it: student, or "ema" (stage 0), "cfg" (stage 1)')
    cli.add_argument("--scale", type=int, default=4, choices=[2, 3, 4], help="2 and 3: 4, then shrunk (default 4)")
    cli.add_argument("--steps", type=int, default=1, help="network steps (default 1; a teacher needs about 50)")
    cli.add_argument("--w", type=float, default=0.0, help="guidance weight of a multi-step teacher (default 0)")
    cli.add_argument("--temperature", type=float, help="what the noise is multiplied by; 1: as in training, less: less "
                     f"texture (default {TEMPERATURE}; 1 for more than one step)")
    cli.add_argument("--seed", type=int, default=0, help="of the noise")
    cli.add_argument("--tile", type=int, default=0, help="output pixels seen at once (default: as in training)")
    cli.add_argument("--vae_dtype", "--vae-dtype", choices=["fp32", "bf16"], default="fp32",
                     help="of Wan's video code; bf16: half the memory (default fp32, as Wan)")
    cli.add_argument("--vae_tiles", "--vae-tiles", action="store_true", help="Wan's video code in tiles: little memory")
    cli.add_argument("--chunk", type=int, help="frames in memory at once, 4k + 1 (default 53; of wan1.3b 21)")
    cli.add_argument("--overlap", type=int, help="frames blended between chunks, 4k (default 4; 0 if --chunk is short)")
    cli.add_argument("--color", choices=list(COLORS), default="wavelet", help="what keeps the input's colours")
    cli.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    cli.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    args = cli.parse_args(argv)
    if args.steps < 1:
        raise SystemExit(f"--steps {args.steps}: at least 1")
    if args.temperature is None:
        args.temperature = TEMPERATURE if args.steps == 1 else 1.0
    if args.chunk is None:
        args.chunk = frames_at_once(M.read_checkpoint(args.ckpt)["config"]["model"])
    if args.chunk % 4 != 1 or args.chunk < 5:
        raise SystemExit(f"--chunk {args.chunk}: 4k + 1, such as {max(5, args.chunk // 4 * 4 + 1)}")
    if args.overlap is None:
        args.overlap = min(4, (args.chunk - 3) // 8 * 4)
    if args.overlap % 4 or not 0 <= args.overlap <= (args.chunk - 3) // 2:
        raise SystemExit(f"--overlap {args.overlap}: 4k, and under half of --chunk {args.chunk}")
    if not math.isfinite(args.w):
        raise SystemExit(f"--w {args.w}: a number, such as 0.5")
    if not 0 <= args.temperature <= 2:
        raise SystemExit(f"--temperature {args.temperature}: from 0 to 2; 1 is that of training")
    if args.tile and args.tile < 32:
        raise SystemExit(f"--tile {args.tile}: at least 32")
    return args


def main(argv=None):
    args = arguments(argv)
    common.keep_memory()
    device, failed = common.device_named(args.device), 0
    try:
        todo = jobs(args.input, args.output, args.resume)
        upscaler = partial(load(args.ckpt, args.part, device, args.tile, args.vae_dtype, args.vae_tiles),
                           steps=args.steps, w=args.w, temperature=args.temperature, seed=args.seed, color=args.color,
                           scale=args.scale)
        stamp = [common.contents(args.ckpt), *(getattr(args, k) for k in (
            "part", "scale", "steps", "w", "temperature", "seed", "tile", "vae_dtype", "vae_tiles", "chunk", "overlap",
            "color")), device.type]
        for files, target in todo:
            if args.resume and target != Path(args.output) and target.exists():
                continue
            try:
                print(run(files, target, upscaler, args, stamp))
            except ValueError as error:
                if len(todo) == 1:
                    raise
                failed += 1
                print(error, file=sys.stderr)       # one bad file of a folder does not stop the others
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        model = M.read_checkpoint(args.ckpt)["config"]["model"]
        if M.vae_class(model) is M.WanVAE and not args.vae_tiles:       # what takes the most
            raise SystemExit("out of memory: try --vae_tiles") from None
        tile, window = max(32, (args.tile or data.CLIPS[model]["crop"]) // 2), 4 * data.CLIPS[model]["window"] - 3
        # less than a window is filled up to one, and where a clip is one window more than one was never trained on
        chunk = window if frames_at_once(model) == window else max(min(args.chunk, window), args.chunk // 8 * 4 + 1)
        advice = "it takes a larger machine" if (tile, chunk) == (args.tile, args.chunk) else (
            f"try --tile {tile} --chunk {chunk}")
        raise SystemExit(f"out of memory: {advice}") from None
    if failed:
        raise SystemExit(f"{failed} of {len(todo)} files were not upscaled")


if __name__ == "__main__":
    with common.interruptible("the same command with --resume goes on after the last whole chunk"):
        main()
