"""Measure what each stage changes: every row of the table upscales the same low-resolution clips.

    python evaluate.py                                          # after the stages, or with the shipped weights

Reads   the videos under --clips; <out>/stage0..3/last.pt; weights/ where a stage was not run (see sources).
Writes  <out>/report/metrics.json (numbers, and the stamp that says how they were made), report.html (one file to
        open in a browser), panel.png, and clips/: every output as lossless video, used again as long as the
        checkpoint, the input, the settings and the code are the same.

A number is the mean over clips of the mean over frames, on 8-bit frames that no codec has touched; nothing is
resized or cut to fit. The paper's test sets and its learned no-reference scores are not used here (see metrics.py).
"""
import hashlib
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
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from tqdm import tqdm

import common
import data
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
    strength: str = "light"         # degradation that makes the input: a name in data.STRENGTHS
    teacher_steps: int = 50         # Euler steps of the multi-step teacher
    cfg_w: float = 2.0              # its guidance weight; costs a second network call per step unless 0
    seed: int = 0                   # of the degradation and of the noise
    teacher: str = "weights/tiny_teacher.pt"    # read if <out>/stage0 was not run; "" is none
    student: str = "weights/tiny_student.pt"    # read as stage III if no stage was run; "" is none


PRESETS = {                         # the first one is the default
    "tiny":  dict(),
    "small": dict(out="out/small", teacher="", student=""),
}

ROWS = {                            # in the order of the table
    "bicubic":  "bicubic",
    "teacher50": "teacher, {} steps",           # of --teacher_steps
    "teacher1": "teacher, 1 step",
    "stage1":   "stage I",
    "stage2":   "stage I + II",
    "stage3":   "stage I + II + III",
    "HR":       "ground truth",
}
COLUMNS = {                         # metric: (heading, direction in which it gets better, digits)
    "psnr":           ("PSNR", "up", 2),
    "psnr_y":         ("PSNR-Y", "up", 2),
    "ssim":           ("SSIM", "up", 4),
    "niqe":           ("NIQE", "down", 2),
    "vmaf":           ("VMAF", "up", 1),
    "vmaf_neg":       ("VMAF-NEG", "up", 1),
    "temporal":       ("temporal", "down", 2),
    "temporal_ratio": ("temporal/HR", "down", 2),
    "flicker":        ("flicker", "", 2),       # neither way: blur has less than the truth
    "grid":           ("grid", "one", 3),
    "lr_consistency": ("LR PSNR", "", 2),       # very high repeats the input's noise
    "calls":          ("calls", "down", 0),
    "seconds":        ("seconds", "down", 1),
}


# ----------------------------------------------------------------------------
# what makes each row


def sources(cfg):
    """{row: dict(path, part, steps, w)} for the rows that a network makes; a string is why a row has none."""
    stage = [f"{cfg.out}/stage{n}/last.pt" for n in range(4)]
    teacher = next((p for p in (stage[0], cfg.teacher) if os.path.isfile(p)), None)
    rows = {}
    for row, steps in (("teacher50", cfg.teacher_steps), ("teacher1", 1)):
        rows[row] = (dict(path=teacher, part="ema", steps=steps, w=cfg.cfg_w) if teacher else
                     f"no {stage[0]}: run stage0_teacher.py")
    for n, script in ((1, "stage1_pd.py"), (2, "stage2_dual.py"), (3, "stage3_dpo.py")):
        rows[f"stage{n}"] = (dict(path=stage[n], part="student", steps=1, w=0.0) if os.path.isfile(stage[n]) else
                             f"no {stage[n]}: run {script}")
    # the shipped student stands in only where nothing was trained: else its row would look like part of this run
    if not any(map(os.path.isfile, stage)) and os.path.isfile(cfg.student):
        rows["stage3"] = dict(path=cfg.student, part="student", steps=1, w=0.0)
    return rows


def read_clips(cfg):
    """The clips, as a list of dicts: name, fps, hr (F, H, W, 3), lr (F, H/4, W/4, 3), both uint8."""
    if cfg.frames % 4 != 1:
        raise SystemExit(f"--frames {cfg.frames}: take 4k + 1, such as {cfg.frames // 4 * 4 + 1}")
    if cfg.strength not in data.STRENGTHS:
        raise SystemExit(f"--strength {cfg.strength}: one of {', '.join(data.STRENGTHS)}")
    folder = Path(cfg.clips)
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in media.VIDEOS and p.name[0] != ".")
    if not paths:
        raise SystemExit(f"{folder}: no videos in this folder; name one that has some by --clips")
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
        lr = data.degrade(hr / np.float32(255), np.random.default_rng([cfg.seed, i]), data.STRENGTHS[cfg.strength])
        clips.append(dict(name=path.stem, path=path, fps=fps, hr=hr, lr=lr))
    return clips


# ----------------------------------------------------------------------------
# outputs, kept from run to run


def sha256(*parts):
    """Of the bytes of arrays and strings, one after the other."""
    h = hashlib.sha256()
    for part in parts:
        h.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part))
    return h.hexdigest()


def kept(path, stamp):
    """(frames, seconds) of an earlier run from path, a lossless video, if its stamp is the same; else None."""
    note = path.with_suffix(".json")
    if path.exists() and note.exists():
        about = json.loads(note.read_text())
        if about["stamp"] == stamp:
            return media.read_video(path), about["seconds"]
    return None


def keep(path, stamp, frames, seconds, fps):
    """The stamp goes last and the old one first: a run that is stopped leaves no video with a wrong stamp."""
    note = path.with_suffix(".json")
    note.unlink(missing_ok=True)
    media.write_video(path, frames, fps)
    note.write_text(json.dumps({"seconds": seconds, "stamp": stamp}, indent=2))


def upscale_bicubic(lr):
    h, w = lr.shape[1:3]
    return data.to_uint8(data.upsample(data.to_tensor(lr)[None], (4 * h, 4 * w)))


def outputs(row, source, clips, folder, cfg, device):
    """[(frames, seconds)] of one row, one per clip. source: see sources(), None for rows without a network."""
    if row == "HR":
        return [(clip["hr"], math.nan) for clip in clips]
    code = sha256(*[Path(module.__file__).read_text() for module in (M, infer, data)])
    settings = {"row": row, "code": code}                       # everything that the frames depend on
    if source:
        settings |= {k: source[k] for k in ("part", "steps", "w", "sha256")}
        settings |= {"seed": cfg.seed, "device": device.type}
    upscaler, results = None, []
    for clip in tqdm(clips, f"{row:10}", leave=False):
        path, stamp = folder / f"{clip['name']}_{row}.mkv", settings | {"lr": sha256(clip["lr"])}
        result = kept(path, stamp)
        if result is None:
            if source and upscaler is None:
                upscaler = infer.load(source["path"], source["part"], device)
            start = time.perf_counter()
            frames = upscale_bicubic(clip["lr"]) if source is None else data.to_uint8(
                upscaler(clip["lr"], steps=source["steps"], w=source["w"], seed=cfg.seed))
            result = frames, time.perf_counter() - start
            keep(path, stamp, *result, clip["fps"])
        results.append(result)
    return results


# ----------------------------------------------------------------------------
# numbers


def score(row, source, output, clip):
    """{metric: number, or nan where it has none} of one output (frames, seconds). Names as in COLUMNS."""
    (frames, seconds), hr, nan = output, clip["hr"], math.nan
    values = dict.fromkeys(COLUMNS, nan)
    if row != "HR":                                             # a clip against itself says nothing
        moves = metrics.temporal(hr, np.broadcast_to(hr[:1], hr.shape))     # the truth's own change over time
        values |= {"psnr": metrics.psnr(frames, hr), "psnr_y": metrics.psnr(frames, hr, "y"),
                   "ssim": metrics.ssim(frames, hr), **metrics.vmaf(frames, hr),
                   "temporal": metrics.temporal(frames, hr), "seconds": seconds,
                   "calls": source["steps"] * (2 if source["w"] else 1) if source else 0}
        values["temporal_ratio"] = values["temporal"] / moves if moves else nan
    return values | {"niqe": float(np.mean(metrics.niqe(frames))), "flicker": metrics.flicker(frames),
                     "grid": metrics.grid(frames), "lr_consistency": metrics.lr_consistency(frames, clip["lr"])}


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
    return {
        "clips": [{"name": c["path"].name, "sha256": data.sha256(c["path"]), "frames": f"0..{cfg.frames - 1}",
                   "size": [c["hr"].shape[2], c["hr"].shape[1]], "lr_sha256": sha256(c["lr"])} for c in clips],
        "crop": "height and width to multiples of 16, right and bottom cut; no border left out, no alignment",
        "channel": "psnr, lr_consistency: RGB; vmaf: Y of BT.709; all others: Y of BT.601",
        "mean": "over frames, then over clips",
        "degradation": {"strength": cfg.strength, "seed": [f"{cfg.seed}, clip {i}" for i in range(len(clips))]},
        "checkpoints": {row: source for row, source in rows.items() if isinstance(source, dict)},
        "config": asdict(cfg),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                     "ffmpeg": ffmpeg.stdout.split()[2]},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "commit": common.commit(),
        "command": " ".join(sys.argv),
    }


def table(rows, titles):
    """The rows as aligned text; a row that was not made is a dash with its reason."""
    lines = [["", *(heading for heading, _, _ in COLUMNS.values())]]
    for row, values in rows.items():
        cells = ["-" if values[k] is None else f"{values[k]:.{digits}f}" for k, (_, _, digits) in COLUMNS.items()]
        lines.append([titles[row], *cells] if "reason" not in values else [titles[row], "-", values["reason"]])
    wide = [max(len(line[i]) for line in lines if len(line) == len(lines[0])) for i in range(len(lines[0]))]
    wide[0] = max(map(len, titles.values()))
    return "\n".join("  ".join([line[0].ljust(wide[0]), *map(str.rjust, line[1:], wide[1:])]) if len(line) > 3 else
                     f"{line[0].ljust(wide[0])}  {line[1].rjust(wide[1])}  {line[2]}" for line in lines)


# ----------------------------------------------------------------------------


def main(cfg):
    device = common.setup()[2]
    rows = sources(cfg)
    for source in rows.values():
        if isinstance(source, dict):
            source["sha256"] = data.sha256(source["path"])
    clips = read_clips(cfg)
    out = Path(cfg.out, "report")
    folder = out / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    for clip in clips:
        media.write_video(folder / f"{clip['name']}_LR.mkv", clip["lr"], clip["fps"])

    # 1) every row upscales every clip
    made = {}
    for row in ROWS:
        source = rows.get(row)
        if not isinstance(source, str):
            made[row] = outputs(row, source, clips, folder, cfg, device)

    # 2) numbers; a row that could not be made has none, and says why
    result = {"rows": {}, "intervals": {}, "per_clip": {clip["name"]: {} for clip in clips}}
    for row in tqdm(ROWS, "measuring", leave=False):
        if row not in made:
            result["rows"][row] = dict.fromkeys(COLUMNS) | {"reason": rows[row]}
            continue
        with ThreadPoolExecutor(os.cpu_count()) as pool:        # numpy, torch and FFmpeg work side by side
            values = list(pool.map(partial(score, row, rows.get(row)), made[row], clips))
        result["rows"][row], result["intervals"][row] = mean_row(values)
        for clip, value in zip(clips, values, strict=True):
            result["per_clip"][clip["name"]][row] = value
    result = plain(result | {"stamp": make_stamp(cfg, clips, rows, device)})
    (out / "metrics.json").write_text(json.dumps(result, indent=2, allow_nan=False))
    titles = {row: title.format(cfg.teacher_steps) for row, title in ROWS.items()}
    print(table(result["rows"], titles))

    # 3) pictures
    shown = [{"LR": clip["lr"], **{row: made[row][i][0] for row in made}} for i, clip in enumerate(clips)]
    names = [clip["name"] for clip in clips]
    report.write_panel(out / "panel.png", names, shown, titles)
    report.write_html(out / "report.html", names, shown, titles, COLUMNS, result)
    print(f"{out}/report.html  {out}/panel.png  {out}/metrics.json")


if __name__ == "__main__":
    main(common.parse_config(Config, PRESETS))
