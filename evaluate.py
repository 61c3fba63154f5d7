"""Measure what each stage changes, or any outputs: every row of the table has the same low-resolution clips.

    python evaluate.py                                          # after the stages, or with the shipped weights
    python evaluate.py --pred OUTPUTS --gt TRUTH --lr INPUTS --out DIR      # files, or folders with the same names

Reads   the videos under --clips; <out>/stage0..3/last.pt; weights/ where a stage was not run (see sources).
        With --pred: videos, pictures, or folders of frames; GT/ and LQ/ folders as DOVE publishes them, too.
Writes  <out>/report/metrics.json (numbers per clip and row, some per frame, and the stamp: how they were made),
        report.html (one file to open in a browser), panel.png, and clips/: every output as lossless video, used again
        as long as the checkpoint, the input, the settings and the code are the same.

A number is the mean over clips of the mean over frames, on 8-bit frames; nothing is resized or cut to fit. Outputs of
another size or length than their ground truth are refused; a shift, a wrong range and a lossy file are named. The
paper's test sets are not used; its learned no-reference scores need --extra and what metrics.py names.
"""
import json
import math
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from tqdm import tqdm

import common
import data
import degradation
import infer
import media
import metrics
import model as M
import report

# ----------------------------------------------------------------------------
# constants: edit here, or override with --name value


@dataclass
class Config:
    out: str = "out/tiny"           # folder of the run: reads <out>/stage*, writes <out>/report
    clips: str = "samples/val"      # folder of videos that no stage has trained on
    frames: int = 17                # first frames of each clip, 4k + 1
    max_clips: int = 4              # clips used, spread over the sorted folder
    strength: str = "light"         # degradation that makes the input: a name in degradation.STRENGTHS
    teacher_steps: int = 50         # Euler steps of the multi-step teacher
    cfg_w: float = -1.0             # its guidance, 0: none, one call a step; -1: stage I's, 0.5 for weights that ship
    seed: int = 0                   # of the degradation and of the noise
    seeds: int = 1                  # noise seeds, from `seed` on; the table then has means over them
    teacher: str = "weights/tiny_teacher.pt"    # read if <out>/stage0 was not run; "" is none
    student: str = "weights/tiny_student.pt"    # read as stage III if no stage was run; "" is none
    pred: str = ""                  # outputs to measure, a file or a folder; "": the stages
    gt: str = ""                    # their ground truth, if there is any
    lr: str = ""                    # their inputs, if there are any
    seam: int = 80                  # pixels from tile to tile, for the column `seam` [infer.py: 80, at tiny]
    chunk: int = 48                 # frames from chunk to chunk, for the column `chunk` [infer.py: 53 - 1 - 4]
    extra: bool = False             # MUSIQ, CLIP-IQA, LPIPS, DISTS of pyiqa, and DOVER, where they are installed


PRESETS = {                         # the first one is the default
    "tiny":  dict(),
    "small": dict(out="out/small", teacher="", student="", seam=112),
    "wan1.3b": dict(out="out/wan1.3b", teacher="", student="", seam=608, chunk=16, strength="realbasicvsr"),
}

ROWS = {                            # in the order of the table
    "bicubic":  "bicubic",
    "teacher50": "teacher, {} steps",           # of --teacher_steps
    "teacher1": "teacher, 1 step",
    "stage1":   "stage I",
    "stage2":   "stage I + II",
    "stage3":   "stage I + II + III",
    "infer":    "the same, by infer.py",        # which starts from less noise
    "HR":       "ground truth",
}
EXTRA = {                           # with --extra, of pyiqa and of DOVER: heading, direction, digits, as below
    "musiq":          ("MUSIQ", "up", 2),
    "clipiqa":        ("CLIP-IQA", "up", 3),
    "lpips":          ("LPIPS", "down", 3),
    "dists":          ("DISTS", "down", 3),
    "dover":          ("DOVER", "up", 2),
}
COLUMNS = {                         # metric: (heading, direction in which it gets better (hr: towards HR's), digits)
    "psnr":           ("PSNR", "up", 2),
    "psnr_y":         ("PSNR-Y", "up", 2),
    "ssim":           ("SSIM", "up", 4),
    "niqe":           ("NIQE", "down", 2),
    "vmaf":           ("VMAF", "up", 1),
    "vmaf_neg":       ("VMAF-NEG", "up", 1),
    "temporal":       ("temporal", "down", 2),
    "temporal_ratio": ("temporal/HR", "down", 2),
    "flicker":        ("flicker", "", 2),       # neither way: blur has less than the truth
    "grid":           ("grid", "hr", 3),
    "lattice":        ("lattice %", "down", 1),
    "seam":           ("seam", "hr", 3),
    "chunk":          ("chunk", "hr", 2),
    "lr_consistency": ("LR PSNR", "", 2),       # very high repeats the input's noise
    "shift":          ("shift px", "", 2),
    "psnr_aligned":   ("PSNR al.", "up", 2),
    "ssim_aligned":   ("SSIM al.", "up", 4),
    **EXTRA,
    "calls":          ("calls", "down", 0),
    "seconds":        ("seconds", "down", 1),
}


# ----------------------------------------------------------------------------
# what makes each row


def sources(cfg):
    """{row: dict(path, part, steps, w, temperature)} of the rows that a network makes; a string: why a row has none."""
    stage = [f"{cfg.out}/stage{n}/last.pt" for n in range(4)]
    teacher = next((p for p in (stage[0], cfg.teacher) if os.path.isfile(p)), None)
    rows, w = {}, cfg.cfg_w
    if w < 0:
        w = M.read_checkpoint(stage[1])["config"].get("cfg_w", 0.5) if os.path.isfile(stage[1]) else 0.5
    for row, steps in (("teacher50", cfg.teacher_steps), ("teacher1", 1)):
        rows[row] = (dict(path=teacher, part="ema", steps=steps, w=w) if teacher else
                     f"no {stage[0]}: run {M.STAGES[0]}" + f"; and no {cfg.teacher}" * bool(cfg.teacher))
    for n in (1, 2, 3):
        rows[f"stage{n}"] = (dict(path=stage[n], part="student", steps=1, w=0.0) if os.path.isfile(stage[n]) else
                             f"no {stage[n]}: run {M.STAGES[n]}")
    # the shipped student stands in only where nothing was trained: else its row would look like part of this run
    if not any(map(os.path.isfile, stage)) and os.path.isfile(cfg.student):
        rows["stage3"] = dict(path=cfg.student, part="student", steps=1, w=0.0)
    rows = {k: row if isinstance(row, str) else row | dict(temperature=1.0) for k, row in rows.items()}
    last = rows["stage3"]
    return rows | {"infer": last if isinstance(last, str) else last | dict(temperature=infer.TEMPERATURE)}


def read_clips(cfg):
    """The clips, as a list of dicts: name, fps, hr (F, H, W, 3), lr (F, H/4, W/4, 3), both uint8."""
    if cfg.frames % 4 != 1 or cfg.frames < 1:
        raise SystemExit(f"--frames {cfg.frames}: take 4k + 1, such as {max(1, cfg.frames // 4 * 4 + 1)}")
    if cfg.strength not in degradation.STRENGTHS:
        raise SystemExit(f"--strength {cfg.strength}: one of {', '.join(degradation.STRENGTHS)}")
    folder = Path(cfg.clips)
    paths = media.files_in(folder, media.VIDEOS) if folder.is_dir() else []
    if not paths:
        raise SystemExit(f"{folder}: no videos in this folder; name one that has some by --clips")
    if len({path.stem for path in paths}) < len(paths):
        raise SystemExit(f"{folder}: videos of one name and two endings; rename or move one")
    paths = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, cfg.max_clips).round().astype(int))]
    clips = []
    for i, path in enumerate(paths):
        try:
            hr, fps = media.read_video(path, 0, cfg.frames), media.video_info(path)["fps"]
        except ValueError as error:
            raise SystemExit(f"{error}; remove it or repair it") from None
        H, W = (side // 16 * 16 for side in hr.shape[1:3])
        if len(hr) < cfg.frames or not H or not W:
            raise SystemExit(f"{path}: {len(hr)} frames of {hr.shape[2]}x{hr.shape[1]}; needed are {cfg.frames} "
                             "(--frames) of at least 16x16")
        hr = np.ascontiguousarray(hr[:, :H, :W])
        lr = degradation.degrade(hr / np.float32(255), np.random.default_rng([cfg.seed, i]), cfg.strength)
        clips.append(dict(name=path.stem, path=path, fps=fps, hr=hr, lr=lr))
    return clips


# ----------------------------------------------------------------------------
# outputs, kept from run to run


def kept(path, stamp):
    """(frames, seconds) of an earlier run from path, a lossless video, if it is whole and has this stamp; else None."""
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        if about["stamp"] == stamp:
            frames = media.read_video(path)
            return (frames, about["seconds"]) if list(frames.shape) == about["shape"] else None
    except (OSError, ValueError, KeyError, TypeError):                  # not there, or damaged: made again
        return None


def keep(path, stamp, frames, seconds, fps):
    """The stamp goes last and the old one first: a run that is stopped leaves no video with a wrong stamp."""
    note = path.with_suffix(".json")
    note.unlink(missing_ok=True)
    write_clip(path, frames, fps)
    common.put(note, json.dumps({"seconds": seconds, "shape": frames.shape, "stamp": stamp}, indent=2))


def write_clip(path, frames, fps):
    try:
        media.write_video(path, frames, fps)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def upscale_bicubic(lr, scale=4):
    h, w = lr.shape[1:3]
    return data.to_uint8(data.upsample(data.to_tensor(lr)[None], (scale * h, scale * w)))


def outputs(row, source, clips, folder, seed, device):
    """[(frames, seconds)] of one row, one per clip. source: see sources(), None for rows without a network."""
    if row == "HR":
        return [(clip["hr"], math.nan) for clip in clips]
    settings = {"row": row, "code": common.code(M, infer, data)}        # everything that the frames depend on
    if source:
        settings |= {k: source[k] for k in ("part", "steps", "w", "temperature", "sha256")}
        settings |= {"seed": seed, "device": device.type}
    targets = []
    for clip in clips:
        name = f"{clip['name']}_{row}" + (f"_seed{seed}" if source and seed else "")
        targets.append((folder / f"{name}.mkv", settings | {"lr": common.digest(clip["lr"])}))
    results = [kept(*target) for target in targets]
    missing = [i for i, result in enumerate(results) if result is None]
    upscaler = infer.load(source["path"], source["part"], device) if source and missing else None
    # on a CPU a clip per core: two clips on one thread each are sooner done than one after the other on two
    workers = min(common.workers(), len(missing) or 1) if device.type == "cpu" else 1
    threads = torch.get_num_threads()

    def make_clip(i):
        torch.set_num_threads(max(1, threads // workers))
        clip, start = clips[i], time.perf_counter()
        frames = upscale_bicubic(clip["lr"]) if source is None else data.to_uint8(
            upscaler(clip["lr"], seed=seed, **{k: source[k] for k in ("steps", "w", "temperature")}))
        results[i] = frames, time.perf_counter() - start
        keep(*targets[i], *results[i], clip["fps"])
    pool = ThreadPoolExecutor(workers)
    try:
        list(tqdm(pool.map(make_clip, missing), f"{row:10}", len(missing), leave=False))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)                  # Ctrl-C waits for no clip: one takes minutes
    return results


# ----------------------------------------------------------------------------
# numbers


def score(row, source, output, clip, cfg, extra):
    """({metric: number, or nan where it has none}, {metric: list over frames}) of one output (frames, seconds).

    Names as in COLUMNS. clip: dict with hr and lr, either may be None. extra: {column: function (frames, hr) -> float}.
    """
    (frames, seconds), hr, lr, nan = output, clip["hr"], clip["lr"], math.nan
    values, curves = dict.fromkeys(COLUMNS, nan), {"niqe": list(metrics.niqe(frames))}
    if row != "HR" and hr is not None:                          # a clip against itself says nothing
        moves = metrics.temporal(hr, np.broadcast_to(hr[:1], hr.shape))     # the truth's own change over time
        pairs = [(frames[t:t + 1], hr[t:t + 1]) for t in range(len(hr))]
        curves |= {"psnr": [metrics.psnr(*p) for p in pairs], "ssim": [metrics.ssim(*p) for p in pairs]}
        curves["temporal"] = [metrics.temporal(frames[t - 1:t + 1], hr[t - 1:t + 1]) for t in range(1, len(hr))]
        values |= {"psnr_y": metrics.psnr(frames, hr, "y"), **metrics.vmaf(frames, hr)}
        dy, dx = metrics.shift(frames, hr)
        values["shift"] = math.hypot(dy, dx)
        moved = values["shift"] > 0.1
        aligned = metrics.unshift(frames, hr, (dy, dx)) if moved else None
        for k, measure in (("psnr", metrics.psnr), ("ssim", metrics.ssim)):
            values[f"{k}_aligned"] = measure(*aligned) if aligned else nan if moved else float(np.mean(curves[k]))
        values["temporal_ratio"] = float(np.mean(curves["temporal"])) / moves if moves > 0 else nan
    if row != "HR":
        values |= {"seconds": seconds, "calls": source["steps"] * (2 if source["w"] else 1) if source else nan}
    values |= {"flicker": metrics.flicker(frames), "grid": metrics.grid(frames),
               "lattice": metrics.lattice(frames),
               "seam": metrics.seam(frames, cfg.seam), "chunk": metrics.chunk_jump(frames, cfg.chunk)}
    if lr is not None:
        values["lr_consistency"] = metrics.lr_consistency(frames, lr)
    values |= {name: measure(frames, hr) for name, measure in extra.items()}
    return values | {k: float(np.mean(v)) if v else nan for k, v in curves.items()}, curves


def extra_metrics(wanted):
    """({column: function (frames, hr or None) -> float}, {column: why there is none}) of the columns in EXTRA."""
    if not wanted:
        return {}, dict.fromkeys(EXTRA, "not asked for: --extra")
    found, absent = {}, {}

    def guarded(name, function):
        """function, which is not ours and fails in many ways: then nan, and the reason is kept."""
        def call(*args):
            try:
                return function(*args)
            except Exception as error:
                absent[name] = (str(error) or type(error).__name__).splitlines()[0][:160]
                return math.nan
        return call
    for name in EXTRA:
        made = guarded(name, metrics.learned_metric)(name)
        if name not in absent:
            found[name] = guarded(name, made[0])
    return found, absent


def mean_row(values):
    """Mean of each metric over clips, and its 95 % bootstrap interval: two dicts. values: one dict per clip."""
    triples = {k: metrics.bootstrap_mean([v[k] for v in values]) for k in COLUMNS}
    return {k: t[0] for k, t in triples.items()}, {k: t[1:] for k, t in triples.items()}


def plain(x):
    """x with every nan or inf as None, which JSON has, and floats cut to six digits."""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [plain(v) for v in x]
    if isinstance(x, float | np.floating):
        return float(f"{x:.6g}") if math.isfinite(x) else None
    return x


def make_stamp(cfg, clips, rows, device):
    """What someone needs to make the same numbers, or to see why theirs differ."""
    ffmpeg = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-version"], capture_output=True, text=True)
    about = [{"name": c["path"].name, "sha256": data.sha256(c["path"]) if c["path"].is_file() else None,
              **{f"{k}_file": str(c[f"{k}_file"]) for k in ("hr", "lr") if c.get(f"{k}_file")},
              "frames": f"0..{len(c.get('pred', c['hr'])) - 1}", "size": c.get("pred", c["hr"]).shape[2:0:-1],
              **{f"{k}_sha256": common.digest(c[k]) for k in ("pred", "hr", "lr") if c.get(k) is not None}}
             for c in clips]
    seeds = [f"{cfg.seed}, clip {i}" for i in range(len(clips))]
    made_here = {"degradation": {"strength": cfg.strength, "seed": seeds},
                 "checkpoints": {row: source for row, source in rows.items() if isinstance(source, dict)},
                 "crop": "height and width to multiples of 16, right and bottom cut; no border left out"}
    return {
        "clips": about, **({"crop": "none; no border left out"} if cfg.pred else made_here),
        "channel": {k: "RGB" if k in ("psnr", "psnr_aligned", "lr_consistency", *EXTRA) else
                    "Y of BT.709" if k in ("vmaf", "vmaf_neg") else "Y of BT.601"
                    for k in COLUMNS if k not in ("calls", "seconds")},
        "range": "8 bits, 0..255; PSNR of a frame: at most 100 dB",
        "alignment": "columns named aligned only: moved back by the measured shift, its border cut",
        "mean": "over frames, then over seeds, then over clips; intervals: 95 %, bootstrap over clips",
        "config": asdict(cfg),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                     "ffmpeg": ffmpeg.stdout.split()[2],
                     "pyiqa": next((x.version for x in metadata.distributions(name="pyiqa")), None)},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "commit": common.commit(),
        "command": " ".join(sys.argv),
    }


def table(rows, titles):
    """The rows as aligned text, without empty columns; a row that was not made is a dash with its reason."""
    columns = {k: v for k, v in COLUMNS.items() if any(values[k] is not None for values in rows.values())}
    cells = {row: ["-" if values[k] is None else f"{values[k]:.{digits}f}" for k, (_, _, digits) in columns.items()]
             for row, values in rows.items()}
    headings, first = [heading for heading, _, _ in columns.values()], max(map(len, titles.values()))
    wide = [max(map(len, column)) for column in zip(headings, *cells.values(), strict=True)]

    def line(title, cells):
        return "  ".join([title.ljust(first), *map(str.rjust, cells, wide)])
    return "\n".join([line("", headings), *(
        f"{line(titles[row], ['-'])}  {values['reason']}" if "reason" in values else line(titles[row], cells[row])
        for row, values in rows.items())])


# ----------------------------------------------------------------------------
# outputs of somebody else


def named(root, *inside):
    """{name: path} of the videos, pictures and folders of frames under root, itself one if its pictures are numbered.
    One of the folders `inside` goes first.

    DOVE's data sets have GT-Video/ (lossless) beside GT/ (frames), LQ-Video/ beside LQ/.
    """
    root = next((Path(root, d) for d in inside if Path(root, d).is_dir()), Path(root))
    if not root.exists():
        raise SystemExit(f"{root}: no such file or folder")
    if not root.is_dir():
        return {root.stem: root}
    files = media.files_in(root, media.VIDEOS | media.IMAGES)
    if files and media.numbered(files):
        return {root.resolve().name: root}                      # the frames of one clip, as for infer.py
    found = {}
    for path in [*files, *(p for p in sorted(root.iterdir()) if p.is_dir() and media.files_in(p, media.IMAGES))]:
        name = path.name if path.is_dir() else path.stem
        if name in found:
            raise SystemExit(f"{path}: {found[name].name} has the same name; which one is meant? Move one away")
        found[name] = path
    if not found:
        raise SystemExit(f"{root}: no videos, pictures or folders of frames")
    return found


def read_frames(path):
    """(frames uint8 (F, H, W, 3), whether a codec may have changed them) of a video, a picture or a frame folder."""
    files = media.files_in(path, media.IMAGES) if path.is_dir() else [path]
    lossy = any(p.suffix.lower() not in {".png", ".bmp"} for p in files)
    try:
        if files[0].suffix.lower() not in media.IMAGES:
            return media.read_video(path), not media.header(path)["lossless"]
        frames = [media.read_image(p) for p in files]
    except ValueError as error:
        raise SystemExit(f"{error}; remove it or repair it") from None
    if len({x.shape for x in frames}) > 1:
        raise SystemExit(f"{path}: frames of several sizes; one clip has one")
    return np.stack(frames), lossy


def differences(pred, hr):
    """What is wrong with an output as a whole, in words: another clip, another range, moved."""
    dy, dx = metrics.shift(pred, hr)
    moved = math.hypot(dy, dx) > 0.25
    aligned = metrics.unshift(pred, hr, (dy, dx)) if moved else None
    gain, offset = metrics.levels(*aligned or (pred, hr))
    if not 0.5 < gain < 2 and hr.std() > 1:
        return [f"its brightness goes with {gain:.2f} x that of its truth: is it the same clip?"]
    squeezed = hr.std() > 1 and not 0.93 < gain < 1.08 and (gain < 1) == (offset > 0)
    return ([f"brightness is {gain:.2f} x truth {offset:+.0f}: full for video range?"] if squeezed else []) + (
        [f"{dx:+.1f} px right, {dy:+.1f} px down of its truth; see the aligned scores"] if moved else [])


def read_outputs(cfg):
    """(clips as in read_clips, with pred, and hr or lr None where not given; warnings)."""
    paths, truths, inputs = named(cfg.pred), {}, {}
    if cfg.gt:
        truths = named(cfg.gt, "GT-Video", "GT")
    if cfg.lr:
        inputs = named(cfg.lr, "LQ-Video", "LQ")
    if len(paths) == 1:                                         # one output: the other files may have other names
        truths, inputs = (dict(zip(paths, x.values(), strict=False)) if len(x) == 1 else x for x in (truths, inputs))
    clips, unused = [], sorted(set(truths) - set(paths))
    warnings = [f"{cfg.gt}: nothing was made of {', '.join(unused)}; the means are over the others"] if unused else []
    for name, path in paths.items():
        for root, others in ((cfg.gt, truths), (cfg.lr, inputs)):
            if root and name not in others:
                raise SystemExit(f"{root}: nothing named {name}, which {cfg.pred} has")
        files = [path, truths.get(name), inputs.get(name)]
        (pred, _), (hr, _), (lr, _) = read = [read_frames(p) if p else (None, False) for p in files]
        if min(pred.shape[1:3]) < 16:
            raise SystemExit(f"{path}: {pred.shape[2]}x{pred.shape[1]}; needed are at least 16x16")
        for other, what in ((hr, "ground truth"), (lr, "input")):
            if other is not None and len(other) != len(pred):
                raise SystemExit(f"{path}: {len(pred)} frames, its {what} has {len(other)}; compare whole clips")
        if hr is not None and hr.shape != pred.shape:
            raise SystemExit(f"{path}: {pred.shape[2]}x{pred.shape[1]}, its ground truth {hr.shape[2]}x{hr.shape[1]}; "
                             "nothing is cut to fit")
        if lr is not None and ((scale := pred.shape[1] // lr.shape[1]) < 1 or
                               (scale * lr.shape[1], scale * lr.shape[2]) != pred.shape[1:3]):
            raise SystemExit(f"{path}: {pred.shape[2]}x{pred.shape[1]} is no multiple of its input, "
                             f"{lr.shape[2]}x{lr.shape[1]}; give the input that it was made of")
        warnings += [f"{p}: a lossy file; the scores include what its codec lost"
                     for p, (_, lossy) in zip(files[:2], read[:2], strict=True) if lossy]
        if hr is not None:
            warnings += [f"{path}: {what}" for what in differences(pred, hr)]
        clips.append(dict(name=name, path=path, hr=hr, lr=lr, pred=pred, hr_file=files[1], lr_file=files[2]))
    return clips, warnings


# ----------------------------------------------------------------------------


def make(cfg, device):
    """(clips, {row: [[(frames, seconds) per clip] per seed]}, sources of the rows, titles of the rows, warnings)."""
    if cfg.pred:
        clips, warnings = read_outputs(cfg)
        made = {"pred": [[(c["pred"], math.nan) for c in clips]]}
        if cfg.lr:
            made = {"bicubic": [[(upscale_bicubic(c["lr"], c["pred"].shape[1] // c["lr"].shape[1]), math.nan)
                                 for c in clips]]} | made
        if cfg.gt:
            made["HR"] = [[(c["hr"], math.nan) for c in clips]]
        return clips, made, {}, {row: (ROWS | {"pred": "output"})[row] for row in made}, warnings
    rows, warnings = sources(cfg), []
    networks = [source for source in rows.values() if isinstance(source, dict)]
    hashes = {path: data.sha256(path) for path in dict.fromkeys(source["path"] for source in networks)}
    for source in networks:
        source["sha256"] = hashes[source["path"]]
    for path in hashes:
        state = M.read_checkpoint(path)
        if state["step"] < state["total"]:
            warnings.append(f"{path}: unfinished, step {state['step']} of {state['total']}")
    teacher = rows["teacher1"]["path"] if isinstance(rows["teacher1"], dict) else ""
    for before, path in pairwise([teacher, *(f"{cfg.out}/stage{n}/last.pt" for n in (1, 2, 3))]):
        made_from = M.read_checkpoint(path).get("source") if os.path.isfile(path) else None     # an export names none
        if made_from is not None and os.path.isfile(before) and common.contents(before) not in made_from:
            warnings.append(f"{path}: made from another {before} than the one that is there")
    if isinstance(rows["stage3"], dict) and rows["stage3"]["path"] != f"{cfg.out}/stage3/last.pt":
        warnings.append(f"{cfg.out} holds no stage: the row {ROWS['stage3']} is of {cfg.student}")
    clips = read_clips(cfg)
    folder = Path(cfg.out, "report", "clips")
    folder.mkdir(exist_ok=True)
    for clip in clips:
        write_clip(folder / f"{clip['name']}_LR.mkv", clip["lr"], clip["fps"])
    made = {}
    for row in ROWS:
        source = rows.get(row)
        if not isinstance(source, str):
            seeds = range(cfg.seed, cfg.seed + (cfg.seeds if source else 1))
            made[row] = [outputs(row, source, clips, folder, seed, device) for seed in seeds]
    return clips, made, rows, {row: title.format(cfg.teacher_steps) for row, title in ROWS.items()}, warnings


def main(cfg):
    if cfg.seam < 16 or min(cfg.chunk, cfg.seeds, cfg.max_clips) < 1:
        raise SystemExit("--seam: 16 pixels at least; --chunk, --seeds, --max_clips: 1 at least")
    if cfg.teacher_steps < 2:
        raise SystemExit("--teacher_steps: 2 at least; a single step has a row of its own")
    common.check_fields(cfg)
    if (cfg.gt or cfg.lr) and not cfg.pred:
        raise SystemExit("--gt and --lr belong to outputs: name these with --pred")
    for path, usual in ((cfg.teacher, Config.teacher), (cfg.student, Config.student)):
        if path not in ("", usual) and not os.path.isfile(path):
            raise SystemExit(f"{path}: no such checkpoint; name another file")
    if cfg.pred and any(Path(cfg.out).glob("stage*/last.pt")):
        raise SystemExit(f"{cfg.out} holds stages, whose report this one would replace: name another --out")
    device = common.device_named("auto")
    common.keep_memory()
    out = Path(cfg.out, "report")
    common.make_folder(out)
    # 1) every row upscales every clip
    clips, made, rows, titles, warnings = make(cfg, device)
    extra, absent = extra_metrics(cfg.extra)

    # 2) numbers; a row that could not be made has none, and says why
    result = {"rows": {}, "intervals": {}, "over_seeds": {}, "per_clip": {clip["name"]: {} for clip in clips},
              "per_frame": {clip["name"]: {} for clip in clips}, "warnings": warnings, "absent": absent}
    for row in tqdm(titles, "measuring", leave=False):
        if row not in made:
            result["rows"][row] = dict.fromkeys(COLUMNS) | {"reason": rows[row]}
            continue
        seeds = []
        for output in made[row]:
            with ThreadPoolExecutor(common.workers()) as pool:  # numpy, torch and FFmpeg work side by side
                seeds.append(list(pool.map(partial(score, row, rows.get(row), cfg=cfg, extra=extra), output, clips)))
        values = [{k: float(np.mean([seed[i][0][k] for seed in seeds])) for k in COLUMNS} for i in range(len(clips))]
        result["rows"][row], result["intervals"][row] = mean_row(values)
        means = [mean_row([v for v, _ in seed])[0] for seed in seeds]
        result["over_seeds"][row] = {k: float(np.std([m[k] for m in means], ddof=1)) if len(means) > 1 else math.nan
                                     for k in COLUMNS}
        for clip, value, (_, curves) in zip(clips, values, seeds[0], strict=True):
            result["per_clip"][clip["name"]][row] = value
            result["per_frame"][clip["name"]][row] = curves
    warnings += [f"no {COLUMNS[k][0]}: {why}" for k, why in absent.items() if cfg.extra]
    stamp = make_stamp(cfg, clips, rows, device)
    for about, clip in zip(stamp["clips"], clips, strict=True):
        about["shift"] = {row: values["shift"] for row, values in result["per_clip"][clip["name"]].items()}
    result = plain(result | {"stamp": stamp})
    common.put(out / "metrics.json", json.dumps(result, indent=2, allow_nan=False))
    print("".join(f"warning: {w}\n" for w in warnings), end="")
    print(table(result["rows"], titles))

    # 3) pictures
    shown = [({"LR": clip["lr"]} if clip["lr"] is not None else {}) | {row: made[row][0][i][0] for row in made}
             for i, clip in enumerate(clips)]
    names = [clip["name"] for clip in clips]
    report.write_panel(out / "panel.png", shown, titles)
    report.write_html(out / "report.html", names, shown, titles, COLUMNS, result)
    print(f"{out}/report.html  {out}/panel.png  {out}/metrics.json")


if __name__ == "__main__":
    with common.interruptible("the clips that are done are kept; the same command makes the others"):
        main(common.parse_config(Config, PRESETS))
