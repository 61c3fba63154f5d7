"""Upscale a video (or an image, or a folder of frames) four times, in one network step.

    python infer.py samples/lr/NAME.mp4 out.mp4                 # with the student that ships
    python infer.py in.mp4 out.mkv --ckpt out/tiny/stage2/last.pt
    python infer.py in.mp4 out.mp4 --ckpt weights/tiny_teacher.pt --part ema --steps 50 --w 2    # the slow teacher

Frames out = frames in, at the same frame rate. The whole clip is held in memory.
"""
import argparse
import os
import sys

import torch
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

import data
import model as M

STUDENT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights", "tiny_student.pt")


def blur(video, dilation):
    """One level of the wavelet pyramid: [1, 2, 1] x [1, 2, 1] / 16 with holes. video: (B, 3, F, H, W)."""
    x = rearrange(video, "B c F H W -> (B F) c H W")
    kernel = torch.tensor([1.0, 2.0, 1.0], device=x.device)
    kernel = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3)
    x = F.conv2d(F.pad(x, [dilation] * 4, mode="replicate"), kernel, dilation=dilation, groups=3)
    return rearrange(x, "(B F) c H W -> B c F H W", B=len(video))


def wavelet_color(content, style, levels=5):
    """The high frequencies of content on the low ones of style (StableSR), in fp32. Both (B, 3, F, H, W)."""
    low_content, low_style = content.float(), style.float()
    for i in range(levels):
        low_content, low_style = blur(low_content, 2 ** i), blur(low_style, 2 ** i)
    return content - low_content + low_style


@torch.no_grad()
def upscale(net, vae, lr, steps=1, w=0.0, seed=0, tile=24, window=3, color="wavelet", progress=False):
    """uint8 (F, h, w, 3) -> uint8 (F, 4h, 4w, 3).

    steps: network steps; 1 for a student, many for a teacher, then w is the guidance weight. The noise depends on seed
    and size alone. tile, window: latent rows (and columns) and frames of one network call, as in training.
    color: "wavelet" takes the low frequencies from the input, "none" leaves them as the network made them.
    """
    device = next(net.parameters()).device
    F_in, h, width = lr.shape[:3]
    video = data.to_tensor(lr)[None].to(device)                         # (1, 3, F, h, w)
    frames = max(4 * (window - 1) + 1, -(-(F_in - 1) // 4) * 4 + 1)     # 4 n + 1, at least one window
    video = torch.cat([video, video[:, :, -1:].expand(-1, -1, frames - F_in, -1, -1)], dim=2)
    odd = (0, width % 2, 0, h % 2, 0, 0)                                # tokens are 2 x 2 latents: pad to even sides
    video = F.pad(video, odd, mode="replicate")
    up = data.upsample(video, (4 * video.shape[3], 4 * video.shape[4]))
    z_lr = vae.encode(up)
    eps = torch.randn(z_lr.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    velocity = M.tiled(net, (window, tile, tile))
    bar = tqdm(total=steps * (2 if w else 1), desc="network steps", disable=not progress, dynamic_ncols=True)

    def counted(z, t, z_lr, text):
        v = velocity(z, t, z_lr, text)
        bar.update()
        return v
    with bar, torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        z = M.sample(counted, eps, z_lr, steps, w=w)
    out = vae.decode(z)
    if color == "wavelet":
        out = wavelet_color(out, up)
    return data.to_uint8(out[:, :, :F_in, :4 * h, :4 * width])


def main(argv=None):
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                  allow_abbrev=False)
    cli.error = lambda message: sys.exit(f"{cli.prog}: {message}; see --help")
    cli.add_argument("input", help="video, image, or folder of frames")
    cli.add_argument("output", help="video: .mp4 (H.264) or .mkv (lossless)")
    cli.add_argument("--ckpt", default=STUDENT, help="checkpoint of any stage (default: the student that ships)")
    cli.add_argument("--part", default="student", help='network in it: student, or "ema" (stage 0), "cfg" (stage 1)')
    cli.add_argument("--steps", type=int, default=1, help="network steps (default 1; a teacher needs about 50)")
    cli.add_argument("--w", type=float, default=0.0, help="guidance weight of a multi-step teacher (default 0)")
    cli.add_argument("--seed", type=int, default=0, help="of the noise")
    cli.add_argument("--color", choices=["wavelet", "none"], default="wavelet", help="low frequencies from the input")
    args = cli.parse_args(argv)
    if os.path.abspath(args.input) == os.path.abspath(args.output):
        raise SystemExit(f"{args.output}: the output is the input; name another file")
    if os.path.splitext(args.output)[1] not in (".mp4", ".mkv"):
        raise SystemExit(f"{args.output}: the output must end in .mp4 or .mkv")
    if args.steps < 1:
        raise SystemExit(f"--steps {args.steps}: at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, vae, info = M.load_checkpoint(args.ckpt, args.part, device)
    clip = data.CLIPS[info["config"]["model"]]
    try:
        lr, fps = data.read_frames(args.input)
        out = upscale(net, vae, lr, args.steps, args.w, args.seed, clip["crop"] // vae.stride, clip["window"],
                      args.color, progress=True)
        data.write_video(args.output, out, fps)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    print(f"{args.output}: {len(out)} frames of {out.shape[2]}x{out.shape[1]}")


if __name__ == "__main__":
    main()
