"""Run the arms of one ablation from the same stage I checkpoint, over several seeds, and say which arm beats which.

    python ablate.py streams                      # or streams-cfg, stages, features, ratio, init, dpo, edits
    python ablate.py streams --seeds 1 --steps 2 --max_clips 1 --out out/look     # a look, after a whole stage I
    python ablate.py streams --resume             # after Ctrl-C or a crash; also: only the tables again

Every arm is a call of the stages' own main, with the same clips, noise seed, later stages and number of student updates
in each stage that it has; what differs stands in ARMS. Arms of seed k train with seed k and are measured with noise
seed k, as evaluate.py does. What two arms share, of one ablation or of two, is trained once.

Reads   <out>/stage1/last.pt (trained first if it is not there), and what evaluate.py reads for a teacher.
Writes  <out>/ablate/NAME/: table.md; results.json (numbers per arm, seed and clip, every config, evaluate.py's stamp);
        a picture per clip (LR, arms, HR; seed 0); clips/, the outputs, lossless; a run folder ARM-seedK/ for each arm.

Differs from the paper: the joint row of its streams is its I + II + III row, and whether its other rows had stage III
is not said; here all arms go through it alike, or with --no-stage3 none. Regression is DOVE's, no row of the paper.
streams-cfg is not in the paper: the streams from a student that has not been through progressive distillation.
"""
import json
import math
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

import common
import data
import evaluate
import metrics
import model as M
import report
import stage1_pd as stage1
import stage2_dual as stage2
import stage3_dpo as stage3

# ----------------------------------------------------------------------------
# constants: the arms. An arm is what it changes in stage II and stage III; everything else is the preset's


@dataclass
class Arm:
    title: str
    two: dict = field(default_factory=dict)     # fields of stage2_dual.Config that differ
    three: dict = field(default_factory=dict)   # fields of stage3_dpo.Config that differ
    row: str = "stage3"                         # whose output is measured: a row of evaluate.sources
    skip: tuple = ()                            # (2,): stage III starts from stage I
    paper: tuple = ()                           # the paper's row, as in PAPER
    factors: dict = field(default_factory=dict)  # of fields of stage2_dual.Config: the preset's value is multiplied


PAPER = ("NIQE", "MUSIQ", "CLIP-IQA", "DOVER")  # columns of the paper's ablations, on its set AIGC60

ARMS = {
    "stages": {
        "teacher": Arm("teacher, {} steps", row="teacher50", paper=(4.31, 63.46, 0.4712, 87.98)),   # the paper's: 50
        "teacher1": Arm("teacher, 1 step", row="teacher1"),
        "I": Arm("stage I", row="stage1", paper=(5.45, 58.97, 0.408, 86.49)),
        "I+II": Arm("stage I + II", row="stage2", paper=(4.64, 63.36, 0.487, 88.01)),
        "I+III": Arm("stage I + III", skip=(2,), paper=(5.11, 60.22, 0.423, 87.63)),
        "I+II+III": Arm("stage I + II + III", paper=(4.42, 63.68, 0.489, 88.15)),
    },
    "streams": {
        "dmd": Arm("DMD only", dict(streams=("dmd",)), paper=(4.99, 61.46, 0.432, 87.38)),
        "gan": Arm("RFS-GAN only", dict(streams=("gan",)), paper=(5.32, 62.64, 0.427, 87.53)),
        "sequential": Arm("sequential", dict(order="sequential"), paper=(5.17, 62.76, 0.419, 87.67)),
        "joint": Arm("joint", paper=(4.42, 63.68, 0.489, 88.15)),
        "regression": Arm("regression", dict(streams=("mse",))),
    },
    "features": {
        "real": Arm("real features", dict(features="real")),
        "fake": Arm("fake features", dict(features="fake")),
        "both": Arm("both"),
    },
    "ratio": {f"aux{n}": Arm(f"{n} : 1", dict(aux_per_student=n)) for n in (1, 3, 5)},
    "init": {
        "stage1": Arm("from stage I"),
        "cfg": Arm("from multi-step", dict(init="cfg")),
        "stage1-slow": Arm("from stage I, lr x 0.5", factors=dict(lr=0.5)),     # these two are [ours]
        "cfg-slow": Arm("from multi-step, lr x 0.5", dict(init="cfg"), factors=dict(lr=0.5)),
    },
    "dpo": {
        "none": Arm("before DPO", row="stage2"),
        "uniform": Arm("t uniform"),
        "uniform-free": Arm("uniform, no anchor", three=dict(anchor=0.0)),
        "one": Arm("t = 1", three=dict(dpo_t="one")),
        "one-free": Arm("t = 1, no anchor", three=dict(dpo_t="one", anchor=0.0)),
        "own-noise": Arm("t = 1, own noise", three=dict(dpo_t="one", own_noise=True)),       # must do nothing
    },
    "edits": {                                                  # one line of stage2_dual.py each, to discuss [ours]
        "none": Arm("as it is"),
        "short-warmup": Arm("aux_warmup = 30", dict(aux_warmup=30)),
        "low-times": Arm("t_max = 0.7", dict(t_max=0.7)),
        "no-fm": Arm("w_fm = 0", dict(w_fm=0.0)),
        "own-hr-noise": Arm("gan_same_noise = False", dict(gan_same_noise=False)),
        "one-logit": Arm("pooled = True", dict(pooled=True)),
        "fast-fake": Arm("lr_fake x 5", factors=dict(lr_fake=5)),
        "twice-dmd": Arm("dmd_half = False", dict(dmd_half=False)),
        "guided-teacher": Arm('real_score = "teacher"', dict(real_score="teacher")),
        "l1": Arm('fm_norm = "l1"', dict(fm_norm="l1")),
        "fast-student": Arm("lr x 2", factors=dict(lr=2)),
    },
}
# the same streams where there is more to do: the one step of the CFG-distilled model is a blurred mean [ours]
ARMS["streams-cfg"] = {key: replace(arm, two=arm.two | {"init": "cfg"}, paper=())
                       for key, arm in ARMS["streams"].items() if key != "regression"}
STAGES = {2: stage2, 3: stage3}
SHOWN = ("psnr", "ssim", "niqe", "vmaf_neg", "temporal", "grid", "lattice")     # columns of evaluate.COLUMNS


def needs(arm):
    """The stages that an arm trains after stage I."""
    return tuple(n for n in {"stage2": (2,), "stage3": (2, 3)}.get(arm.row, ()) if n not in arm.skip)


def arms_of(args):
    """{key: Arm} of the ablation; with --no-stage3 an arm of stage II ends there (dpo and stages have none)."""
    arms = ARMS[args.name]
    if not args.stage3:
        arms = {k: replace(arm, row="stage2") if needs(arm) == (2, 3) else arm for k, arm in arms.items()}
    return {k: replace(arm, title=arm.title.replace("{}", str(args.teacher_steps))) for k, arm in arms.items()}


def given(args, *names):
    """{name: value} of the options that were given."""
    return {k: vars(args)[k] for k in names if vars(args)[k]}


def configs(args, arm, out, seed):
    """{2: Config of stage II, 3: of stage III} of the stages that the arm goes through, in the folder out."""
    found = {}
    for n, changes in ((2, arm.two), (3, arm.three)):
        if n in needs(arm):
            own = given(args, "steps", "data") | changes | dict(out=str(out), seed=seed, resume=True)
            try:
                found[n] = STAGES[n].Config(**STAGES[n].PRESETS[args.preset] | own)
                if n == 2:                                      # replace names a field that there is not
                    found[n] = replace(found[n], **{k: x * vars(found[n]).get(k, 1) for k, x in arm.factors.items()})
            except TypeError as error:
                raise SystemExit(f"arm {arm.title!r}: {str(error).split('.')[-1]}") from None
            STAGES[n].check(found[n])
    return found


def evaluation(args):
    """The Config of evaluate.py: its protocol, its degradation; the inputs are the same for all seeds."""
    own = given(args, "out", "frames", "teacher_steps", "max_clips", "clips")
    return evaluate.Config(**evaluate.PRESETS[args.preset] | own)


# ----------------------------------------------------------------------------
# statistics


def gain(metric, a, b, grid=1.0):
    """By how much value a is better than b: positive for higher PSNR, lower NIQE, a grid closer to that of HR."""
    direction = evaluate.COLUMNS[metric][1]
    return {"up": a - b, "down": b - a, "hr": abs(b - grid) - abs(a - grid)}[direction]


def compare(a, b, grid=1.0):
    """{metric: (mean, lo, hi)} of the gain of arm a over arm b and its 95 % interval, a paired bootstrap that draws
    seeds and clips again (the pigeonhole bootstrap, Owen 2007): what belongs to a seed or a clip moves all its pairs.

    a, b: {seed: {clip: {metric: number or None}}} with the same seeds and clips; grid: that of HR. A metric that one
    output lacks is nan. With 3 seeds and 4 clips of no difference at all 2 to 24 % of the intervals leave out 0,
    depending on what varies (simulated, LOG.md); with 1 seed 19 to 70 %.
    """
    seeds, clips, found = list(a), list(next(iter(a.values()))), {}
    rng = np.random.default_rng(0)
    k = rng.integers(len(seeds), size=(10_000, len(seeds), 1))
    c = rng.integers(len(clips), size=(10_000, 1, len(clips)))
    for m in SHOWN:
        gains = np.array([[math.nan if None in (a[seed][clip][m], b[seed][clip][m]) else
                           gain(m, a[seed][clip][m], b[seed][clip][m], grid) for clip in clips] for seed in seeds])
        lo, hi = np.percentile(gains[k, c].mean(axis=(1, 2)), (2.5, 97.5))
        found[m] = float(gains.mean()), float(lo), float(hi)
    return found


def sentence(a, b, found):
    """One line on a pair of arms. a, b: titles; found: what compare gives."""
    ahead, behind, level = [], [], []
    for metric, (mean, lo, hi) in found.items():
        heading, _, digits = evaluate.COLUMNS[metric]
        if math.isnan(mean):
            continue
        mean, lo, hi = (round(x, digits) + 0.0 for x in (mean, lo, hi))     # what is shown decides; + 0.0: no -0.0
        if hi < 0:                                                      # told as a gain of the better one
            behind.append(f"{heading}: {-mean:+.{digits}f} ({-hi:.{digits}f} to {-lo:.{digits}f})")
        else:
            (ahead if lo > 0 else level).append(f"{heading}: {mean:+.{digits}f} ({lo:.{digits}f} to {hi:.{digits}f})")
    parts = [f"{x} beats {y} in {', '.join(words)}" for x, y, words in ((a, b, ahead), (b, a, behind)) if words]
    if level:
        parts.append(f"no difference shown between {a} and {b} in {', '.join(level)}")
    return "; ".join(parts) or f"{a} and {b}: nothing that both have"


def spread(numbers):
    """{metric: (mean, s.d.)} over seeds of the mean over clips, nan where there is none. numbers: as in compare."""
    found = {}
    for m in SHOWN:
        means = [np.mean([math.nan if v[m] is None else v[m] for v in clips.values()]) for clips in numbers.values()]
        found[m] = float(np.mean(means)), float(np.std(means, ddof=1)) if len(means) > 1 else math.nan
    return found


# ----------------------------------------------------------------------------
# how long it takes


def tiles(model, frames, height, width):
    """How many tiles of training size a network sees of a clip of so many pixels, as infer.load cuts it."""
    stride, tile = M.vae_class(model).stride, data.crop_shape(model)
    sizes = (frames - 1) // 4 + 1, height // stride, width // stride
    return math.prod(len(M.tile_starts(n, k, o)) for n, k, o in zip(sizes, tile, M.overlaps(tile), strict=True))


def work(n, cfg):
    """What stage n computes, in forwards of cfg.batch crops: passes as in cost.py; the video code is left out."""
    def nominal(c):
        return sum(a + 2 * i + 3 * f for _, a, i, f in STAGES[n].passes(c).values())
    if n == 2:                                                  # the warm-up is auxiliary updates alone
        one_aux = nominal(replace(cfg, aux_per_student=2)) - nominal(replace(cfg, aux_per_student=1))
        return cfg.steps * nominal(cfg) + cfg.aux_warmup * one_aux
    clip = data.CLIPS[cfg.model]
    candidates = cfg.pairs * cfg.candidates * tiles(cfg.model, clip["frames"], clip["size"], clip["size"])
    return 2 * cfg.steps * nominal(cfg) + candidates / cfg.batch


@torch.no_grad()
def forward_seconds(path, cfg, device):
    """Seconds of one forward of cfg.batch training crops, the best of three."""
    net, vae, _ = M.load_checkpoint(path, "student", device)
    z, seconds = torch.zeros(cfg.batch, vae.channels, *data.crop_shape(cfg.model), device=device), []
    for _ in range(3):
        start = time.perf_counter()
        with common.autocast(device):
            M.one_step(net, z, z).sum().item()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def minutes(todo, key, calls, clips, base, pace, forward):
    """Minutes that an arm will take: by its own pace with an earlier seed, or the last arm's, or the bare forward's.
    todo: {stage: Config} still to be trained; calls: of the network, for each clip; base: Config whose model and batch
    `forward` was measured with; pace: as in train."""
    seconds = sum(work(n, cfg) * pace.get((n, key), pace.get(n, forward)) for n, cfg in todo.items())
    seen = sum(tiles(base.model, *clip["hr"].shape[:3]) for clip in clips)
    return (seconds + calls * seen / base.batch * forward + pace.get("score", 0)) / 60


# ----------------------------------------------------------------------------
# one arm


def finished(path):
    """Whether a checkpoint is there and its run came to its end."""
    if not os.path.exists(path):
        return False
    state = M.read_checkpoint(path)
    return state["step"] >= state["total"]


def link(source, target):
    """A relative link to a folder or file of another run; a copy where links are not to be had."""
    if os.path.lexists(target) or not os.path.exists(source):
        return
    try:
        os.symlink(os.path.relpath(source, Path(target).parent), target)
    except OSError:
        (shutil.copytree if os.path.isdir(source) else shutil.copyfile)(source, target)


def twin(run, about, n):
    """The folder of a finished stage n, of any arm of any ablation of this out, whose settings, seed, code and clips up
    to there are the same; None if there is none: what two ablations share is trained once. about: as in prepare."""
    def wanted(settings):
        return {k: v for k, v in settings.items() if int(k[len("stage")]) <= n}
    for note in sorted(run.parent.parent.glob("*/*-seed*/arm.json")):
        if (note.parent != run and wanted(json.loads(note.read_text())) == wanted(about)
                and finished(f"{note.parent}/stage{n}/last.pt")):
            return note.parent / f"stage{n}"


def judge(arms, key):
    """The first arm whose candidates for DPO come from the same stage II as this arm's and are ranked as they are."""
    def made_by(arm):
        return arm.two, arm.factors, arm.skip, *(arm.three.get(k) for k in ("candidates", "scorer"))
    return next(k for k, arm in arms.items() if 3 in needs(arm) and made_by(arm) == made_by(arms[key]))


def prepare(args, folder, arms, key, seed):
    """Make the run folder of an arm: links to what it shares with others, and a note of what it is made with."""
    run = folder / f"{key}-seed{seed}"
    cfgs = configs(args, arms[key], run, seed)
    run.mkdir(parents=True, exist_ok=True)
    about = {"stage1": common.contents(f"{args.out}/stage1/last.pt")}
    for n, cfg in cfgs.items():
        about |= {f"stage{n}.{k}": v for k, v in asdict(cfg).items() if k not in ("out", "resume")}
        about[f"stage{n}.code"] = common.code(STAGES[n], M, *[metrics] * (n == 3))
        about[f"stage{n}.clips"] = data.footage(cfg)                # and the code that degrades them
    about, note = json.loads(json.dumps(about)), run / "arm.json"      # tuples become lists, as they will be read
    before = json.loads(note.read_text()) if note.exists() else about
    changed = [k for k, v in about.items() if before.get(k) != v]
    if changed:
        raise SystemExit(f"{run}: made with another {', '.join(changed)}; set it back, or remove {folder}")
    common.put(note, json.dumps(about, indent=2))
    for name in ("stage0", "stage1"):
        link(f"{args.out}/{name}", run / name)
    if 2 in arms[key].skip:
        link(run / "stage1", run / "stage2")                    # whose student stage III reads
    for n in cfgs:
        if (stage := run / f"stage{n}").is_symlink() and not stage.exists():
            stage.unlink()                                      # into an ablation that was removed
        if same := twin(run, about, n):
            link(same, run / f"stage{n}")
    if 3 in cfgs and judge(arms, key) != key:                   # the same candidates, ranked once
        (run / "stage3").mkdir(exist_ok=True)
        link(folder / f"{judge(arms, key)}-seed{seed}" / "stage3" / "pairs", run / "stage3" / "pairs")
    return run, cfgs


def train(run, todo, key, pace):
    """Call main of the stages that are not finished. pace: {stage, or (stage, arm): seconds of a forward with all that
    goes on around it}, measured here for the arms to come."""
    for n, cfg in todo.items():
        whole, start = not os.path.exists(f"{run}/stage{n}/last.pt"), time.perf_counter()
        STAGES[n].main(cfg)
        if whole:                                               # of a half-done stage the time says little
            pace[n] = pace[n, key] = (time.perf_counter() - start) / work(n, cfg)


def measure(cfg, clips, folder, run, key, arm, seed, pace, device):
    """({clip: {metric: number or None}}, middle frames of the outputs, source) of an arm; numbers that are there and
    belong to the same output, truth and code are read."""
    source = evaluate.sources(replace(cfg, out=str(run)))[arm.row]
    if isinstance(source, str):
        raise SystemExit(source)
    source["sha256"] = data.sha256(source["path"])              # of this row alone: some are 40 GB
    (folder / "clips").mkdir(exist_ok=True)
    made = evaluate.outputs(key, source, clips, folder / "clips", seed, device)
    stamp = {"outputs": [common.digest(frames) for frames, _ in made], "code": common.code(evaluate, metrics),
             "truth": [common.digest(clip["hr"]) for clip in clips]}
    note = run / "numbers.json"
    about = json.loads(note.read_text()) if note.exists() else {}
    if about.get("stamp") != stamp:
        start = time.perf_counter()
        with ThreadPoolExecutor(common.workers()) as pool:
            scores = list(pool.map(partial(evaluate.score, key, source, cfg=cfg, extra={}), made, clips))
        numbers = {clip["name"]: values for clip, (values, _) in zip(clips, scores, strict=True)}
        about = evaluate.plain({"stamp": stamp, "numbers": numbers})
        common.put(note, json.dumps(about, indent=2))
        pace["score"] = time.perf_counter() - start
    return about["numbers"], [frames[len(frames) // 2][None] for frames, _ in made], source


# ----------------------------------------------------------------------------
# what is written


def table(name, arms, numbers, pairs, truth, cfg, clips, trained):
    """table.md: the arms, then a line for each pair of them. numbers: {arm: as in compare}; pairs: {(arm, arm): what
    compare gives}; truth: {metric: number}; trained: the commits of the code that trained them."""
    seeds, quoted = len(next(iter(numbers.values()))), any(arm.paper for arm in arms.values())
    heads = [evaluate.COLUMNS[m][0] + {"up": " (up)", "down": " (down)", "hr": " (as HR's)"}[evaluate.COLUMNS[m][1]]
             for m in SHOWN] + [f"paper: {x}" for x in PAPER if quoted]
    lines = [f"# Ablation: {name}", "",
             f"{len(clips)} clips of {cfg.clips}, {cfg.frames} frames each, {cfg.strength} degradation, seeds 0 to "
             f"{seeds - 1}; trained at commit {', '.join(trained) or '-'}, tabled at {common.commit()}. "
             "Mean over clips, then mean +- s.d. over seeds.", "",
             "| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for key, arm in arms.items():
        cells = []
        for m, (mean, sd) in spread(numbers[key]).items():
            digits = evaluate.COLUMNS[m][2]
            cells.append("-" if math.isnan(mean) else f"{mean:.{digits}f}" if math.isnan(sd) else
                         f"{mean:.{digits}f} +- {sd:.{digits}f}")
        cells += [str(x) for x in arm.paper or ["-"] * len(PAPER)] if quoted else []
        lines.append(f"| {arm.title} | " + " | ".join(cells) + " |")
    known = [f"{evaluate.COLUMNS[m][0]} {truth[m]:.{evaluate.COLUMNS[m][2]}f}" for m in ("niqe", "grid")
             if truth[m] is not None]
    lines += ["", f"The ground truth itself: {', '.join(known)}."] if known else []
    if quoted:
        lines += ["", "Columns `paper`: the paper's own metrics on its own data (AIGC60, a 1.3B model), as reported in "
                  "a summary of it, not comparable with the others."
                  + (" Its joint row is its I + II + III row." if name == "streams" else "")
                  + (" Its teacher takes 50 steps." if name == "stages" else "")]
    lines += ["", "Clip by clip and seed by seed, gain of the better arm and its 95 % interval, a bootstrap over "
              f"{seeds} seeds and {len(clips)} clips (so few that it is too narrow: see `compare` in ablate.py):", ""]
    lines += [f"- {sentence(arms[a].title, arms[b].title, found)}" for (a, b), found in pairs.items()]
    return "\n".join(lines) + "\n"


def write(args, folder, arms, numbers, truth, cfg, clips, about, rows, trained, device):
    """table.md and results.json of the seeds that are complete."""
    pairs = {(a, b): compare(numbers[a], numbers[b], truth["grid"] or 1.0) for a, b in combinations(arms, 2)}
    common.put(folder / "table.md", table(args.name, arms, numbers, pairs, truth, cfg, clips, trained))
    result = {"ablation": args.name, "arms": {}, "pairs": []}
    for key, arm in arms.items():
        over = spread(numbers[key])
        result["arms"][key] = {
            "title": arm.title, "changes": {
                "stage2": arm.two | {k: f"x {x}" for k, x in arm.factors.items()}, "stage3": arm.three,
                "skip": arm.skip},
            "configs": about[key],
            "paper": dict(zip(PAPER, arm.paper, strict=False)), "mean": {m: x for m, (x, _) in over.items()},
            "sd": {m: x for m, (_, x) in over.items()}, "seeds": {str(k): v for k, v in numbers[key].items()}}
    for (a, b), found in pairs.items():
        result["pairs"].append({"a": a, "b": b, "gain": {m: dict(zip(("mean", "lo", "hi"), x, strict=True))
                                                         for m, x in found.items()}})
    stamp = evaluate.make_stamp(cfg, clips, rows, device) | {"trained": trained}
    result |= {"ground_truth": truth, "options": vars(args), "stamp": stamp}
    common.put(folder / "results.json", json.dumps(evaluate.plain(result), indent=1, allow_nan=False))


# ----------------------------------------------------------------------------


def arguments(argv):
    cli = common.command_line(__doc__)
    cli.add_argument("name", choices=list(ARMS), help="which ablation")
    cli.add_argument("--preset", choices=list(stage2.PRESETS), default="tiny", help="scale of the stages")
    cli.add_argument("--out", help="folder of the run (default: the preset's)")
    cli.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0 on (default 3)")
    cli.add_argument("--steps", type=int, help="student updates of stage II, and of stage III (default: the preset's)")
    cli.add_argument("--data", help="folder of videos and photographs to train on (default: the preset's)")
    cli.add_argument("--clips", help="folder of videos to measure on (default: samples/val)")
    cli.add_argument("--frames", type=int, default=9, help="first frames of each, 4k + 1 (default 9)")
    cli.add_argument("--max_clips", "--max-clips", type=int, help="how many of them (default 4)")
    cli.add_argument("--teacher_steps", "--teacher-steps", type=int, default=8,
                     help="Euler steps of the multi-step teacher in `stages`, two network calls each (default 8)")
    cli.add_argument("--no-stage3", dest="stage3", action="store_false", help="arms end after stage II")
    cli.add_argument("--resume", action="store_true", help="go on; finished arms are not done again")
    args = cli.parse_args(argv)
    args.out = args.out or stage2.Config(**stage2.PRESETS[args.preset]).out
    for name in ("seeds", "steps", "frames", "max_clips", "teacher_steps"):
        least = 2 if name == "teacher_steps" else 1             # a single step is an arm of its own
        if vars(args)[name] is not None and vars(args)[name] < least:
            raise SystemExit(f"{name}: at least {least}")
    if not args.stage3 and args.name in ("stages", "dpo"):
        raise SystemExit(f"{args.name}: stage III is one of its arms")
    return args


def main(argv=None):
    args = arguments(argv)
    arms, folder, device = arms_of(args), Path(args.out, "ablate", args.name), common.device_named("auto")
    if folder.exists() and not args.resume:
        raise SystemExit(f"{folder} exists: add --resume to go on with it, or remove it")
    # a mistake in the last arm is told now
    planned = [stage_cfg for arm in arms.values() for stage_cfg in configs(args, arm, args.out, 0).values()]
    cfg = evaluation(args)
    clips = evaluate.read_clips(cfg)

    # 1) what all arms share: stage I, and the degraded clips of the whole run
    first = f"{args.out}/stage1/last.pt"
    if not finished(first):
        own = given(args, "data", "out") | dict(resume=True)
        stage1.main(stage1.Config(**stage1.PRESETS[args.preset] | own))
    if not folder.exists():
        data.training_bank(planned[0], 0)                       # before there is a folder: --data may name none
    folder.mkdir(parents=True, exist_ok=True)
    cache = Path(args.out).parent / "cache"
    cache.mkdir(exist_ok=True)
    link(cache, folder / "cache")
    truth = [evaluate.score("HR", None, (clip["hr"], math.nan), clip, cfg, {})[0] for clip in clips]
    truth = evaluate.plain(evaluate.mean_row(truth)[0])

    # 2) seed by seed every arm; a table after each seed
    base = stage2.Config(**stage2.PRESETS[args.preset])
    pace, forward = {}, forward_seconds(first, base, device)
    numbers, about, rows, shown, trained = {key: {} for key in arms}, {}, {}, {}, set()
    for seed in range(args.seeds):
        for key, arm in arms.items():
            run, cfgs = prepare(args, folder, arms, key, seed)
            todo = {n: c for n, c in cfgs.items() if not finished(f"{run}/stage{n}/last.pt")}
            if todo:
                data.training_bank(cfgs[min(cfgs)], 0)          # made here, so that no arm's time includes it
            if todo or not (run / "numbers.json").exists():
                calls = {"teacher50": 2 * args.teacher_steps, "teacher1": 2}.get(arm.row, 1)
                known = "" if set(todo) <= set(pace) else ", at least: what surrounds the network is not measured yet"
                print(f"{args.name}, seed {seed}, {arm.title}: about "
                      f"{minutes(todo, key, calls, clips, base, pace, forward):.1f} minutes{known}", flush=True)
            train(run, todo, key, pace)
            trained |= {json.loads((run / f"stage{n}/run.json").read_text())["commit"] for n in cfgs}
            found = measure(cfg, clips, folder, run, key, arm, seed, pace, device)
            numbers[key][seed], frames, rows[f"{key}, seed {seed}"] = found
            about.setdefault(key, {f"stage{n}": asdict(c) for n, c in cfgs.items()})
            if seed == 0:
                shown[key] = frames
        write(args, folder, arms, numbers, truth, cfg, clips, about, rows, sorted(trained), device)
        if seed == 0:
            titles = {key: arm.title for key, arm in arms.items()} | {"HR": "high resolution"}
            for i, clip in enumerate(clips):
                middle = {k: clip[k.lower()][len(clip["hr"]) // 2][None] for k in ("LR", "HR")}
                report.write_panel(folder / f"{clip['name']}.png",
                                   [middle | {key: shown[key][i] for key in arms}], titles)
    print((folder / "table.md").read_text())
    print(f"{folder}/table.md  {folder}/results.json  {folder}/*.png")


if __name__ == "__main__":
    with common.interruptible("add --resume to go on"):
        main()
