"""Plumbing shared by every script. Nothing in this file comes from the paper, and importing it does nothing."""
import argparse
import ast
import contextlib
import ctypes
import datetime
import functools
import glob
import hashlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from dataclasses import asdict, fields

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# ----------------------------------------------------------------------------
# configuration


def command_line(description):
    """An argument parser without abbreviations that answers a mistake with one line, not with the whole usage."""
    cli = argparse.ArgumentParser(allow_abbrev=False, description=description,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.error = lambda message: sys.exit(f"{cli.prog}: {message}; see --help")
    return cli


def parse_config(Config, presets, argv=None):
    """Build a Config. Later wins: field defaults < --preset NAME < --field VALUE.

    The trailing comment of a field is its --help text. Unknown flags and values of the wrong type stop the script.
    """
    comments = dict(re.findall(r"^    (\w+):.*?#\s*(.*)$", inspect.getsource(Config), re.M))
    cli = command_line(sys.modules[Config.__module__].__doc__)
    cli.add_argument("--preset", choices=list(presets), default=next(iter(presets)), help="scale of the run")
    for f in fields(Config):
        note = f"{comments.get(f.name, '')} (default {f.default!r})".replace("%", "%%")
        names = dict.fromkeys([f"--{f.name}", f"--{f.name.replace('_', '-')}"])     # either way of writing it
        if isinstance(f.default, bool):
            cli.add_argument(*names, action=argparse.BooleanOptionalAction, help=note)
        elif isinstance(f.default, tuple):
            cli.add_argument(*names, nargs="+", type=type(f.default[0]), help=note)
        else:
            cli.add_argument(*names, type=f.type, help=note)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(cli.parse_args(argv)).items() if v is not None}
    return Config(**(presets[given.pop("preset")] | given))


def run(main, Config, presets):
    """main with the constants of the command line."""
    cfg = parse_config(Config, presets)
    with interruptible("add --resume to go on from the last checkpoint"):
        main(cfg)


@contextlib.contextmanager
def interruptible(advice):
    """Ctrl-C inside prints one line and ends the process at once, and a shell script around it."""
    try:
        yield
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"\ninterrupted; {advice}", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)


LEAST = dict(batch=1, accumulate=1, steps=1, aux_per_student=0, aux_warmup=0, log_every=1, save_every=1, seed=0)


def check_fields(cfg, **choices):
    """Raise SystemExit with the possible values if a field is none of them, or a number too small."""
    for name, least in LEAST.items():
        if vars(cfg).get(name, least) < least:
            raise SystemExit(f"{name} {vars(cfg)[name]}: at least {least}")
    if vars(cfg).get("shift", 1) <= 0:
        raise SystemExit(f"shift {cfg.shift}: above 0; at 1 times stay as they are")
    for name, values in choices.items():
        if vars(cfg)[name] not in values:
            raise SystemExit(f"{name} {vars(cfg)[name]!r}: one of {', '.join(values)}")


# ----------------------------------------------------------------------------
# processes, devices, seeds


def setup():
    """Join the process group that torchrun describes, if any. Returns (rank, world, device)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= count:
            raise SystemExit(f"more processes than GPUs: --nproc_per_node={count}; or CUDA_VISIBLE_DEVICES= for CPUs")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        # the others may wait long: rank 0 degrades the clips, and each is done with its candidates at another time
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=12))
    return rank, world, device


def device_named(name):
    """The torch device of --device; "auto": a GPU if there is one. SystemExit if it is not available, or under
    torchrun, which only the stages can use."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SystemExit("several processes would do the same work: leave out torchrun, which is for stages")
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"--device {name}: not available ({str(error).splitlines()[0]})") from None
    return device


def precision(device):
    """What large products are computed in: bf16 on a GPU; on a CPU fp32, as everywhere else."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(device) == torch.bfloat16)


def memory():
    """{"memory_gb": the peak of GPU memory since the last call}, to compare with --dry-run; {} on a CPU."""
    if not torch.cuda.is_available():
        return {}
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return {"memory_gb": peak / 1e9}


def keep_memory():
    """Let glibc keep what is freed for what is needed next. By default it gives back arrays of a megabyte and more,
    and getting fresh pages from the kernel for every array costs a third of the time of upscaling a film."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3                         # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:                                                         # macOS and musl have none
        mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2 ** 30) or mallopt(M_MMAP_THRESHOLD, 2 ** 25)        # glibc < 2.35: up to 32 MB


def cleanup():
    """Wait for rank 0, which may still be writing, then leave the process group: torchrun ends a node that has waited
    five minutes for another.

    gloo aborts the process if one of its threads still holds a tensor when Python exits. There is nothing to wait for,
    so it gets half a second.
    """
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.5)


def workers():
    """How many threads to start: the CPUs of this process, at most 32, as making a clip of 640 px takes a GB."""
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())   # macOS has none
    return min(32, len(mine))


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if dist.is_initialized():
        dist.barrier()


def reseed(*key):
    """Seed torch from a key such as (seed, "stage 1", step), the same on every rank.

    Called at the top of every step, so a resumed run draws what the unbroken run would have drawn.
    """
    torch.manual_seed(zlib.crc32(repr(key).encode()))


def draw(sampler, shape, part, parts, device):
    """The rows of this part, (B, ...), of one draw for the whole batch. sampler: torch.rand or torch.randn.

    A batch has a part for each process and each accumulated pass, parts = world * accumulate, and all draw from the
    seed that they share: two parts with batch B train on what one with 2B would, and no two see the same noise.
    """
    n = shape[0]
    return sampler((parts * n, *shape[1:]), device=device)[part * n:(part + 1) * n].clone()      # frees the others


def my_parts(rank, parts, world):
    """[(part, last)] of the parts of a batch (see `draw`) that this process computes; last: whether it is its last."""
    return [(part, part + world >= parts) for part in range(rank, parts, world)]


def accumulating(last, *networks):
    """A context for one of several passes whose gradients add up: DDP averages over processes only in the last."""
    stack = contextlib.ExitStack()
    for net in networks:
        if hasattr(net, "no_sync") and not last:
            stack.enter_context(net.no_sync())
    return stack


def parallel(net, world):
    """net in DistributedDataParallel, if there are several processes."""
    return DistributedDataParallel(net, gradient_as_bucket_view=True) if world > 1 else net


def mean(value):
    """A number averaged over all ranks."""
    value = torch.as_tensor(value).detach().float().clone()
    if dist.is_initialized():
        value = value.to("cuda" if dist.get_backend() == "nccl" else "cpu")     # nccl reduces nothing on the CPU
        dist.all_reduce(value)
        value /= world_size()
    return value.item()


def clip_and_step(optimiser, net, max_norm):
    """Clip the gradient norm of net, then step; a step whose gradient is not finite is left out. Returns the norm."""
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm)
    if torch.isfinite(norm):                    # the same on all ranks: gradients are averaged already
        optimiser.step()
    return norm


def ema_update(ema, net, decay):
    """ema <- decay * ema + (1 - decay) * net, parameter by parameter."""
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


# ----------------------------------------------------------------------------
# checkpoints and logs (call save, start_run, log, log_row and panel on rank 0 only)


def put(path, text):
    """Write a text file that is there whole or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(f"{path}.tmp", path)


def put_state(path, state):
    """torch.save a dict that is there whole or not at all."""
    try:
        torch.save(state, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:                            # RuntimeError: torch.save's, of a full disk
        if "CUDA" in str(error):
            raise
        if os.path.exists(f"{path}.tmp"):
            os.remove(f"{path}.tmp")
        raise SystemExit(f"{path}: cannot be written, is the disk full? ({str(error).splitlines()[0]})") from None


def save(path, cfg, stage, step, total, /, **saved):
    """Write {stage, config, step, total, samples, a state dict per part}. Positional, as stage I has a part "cfg"."""
    state = {k: p.state_dict() if hasattr(p, "state_dict") else p for k, p in saved.items()}
    put_state(path, {"stage": stage, "config": asdict(cfg), "step": step, "total": total, "samples": samples(cfg),
                     **state})


def continue_from(path, cfg, saved, fresh=0):
    """With cfg.resume, fill what is saved from the checkpoint of the interrupted run. Returns its step, or `fresh`.

    Refused: a run whose "source" is another checkpoint of the stage before, or (by start_run) one with other constants:
    its numbers would belong to neither.
    """
    if not cfg.resume or not os.path.exists(path):
        return fresh
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # cpu: else all ranks share GPU 0
    if state.get("source", saved.get("source")) != saved.get("source"):
        raise SystemExit(f"{path}: made from another checkpoint of the stage before, or from other clips (an edit "
                         "of their code makes others); remove it to start again, or name another --out")
    for name, part in saved.items():
        if name == "source":
            continue
        try:
            part.load_state_dict(state[name])
        except (KeyError, RuntimeError, ValueError) as error:
            why = str(error).splitlines()[-1].strip()[:100]
            raise SystemExit(f"{path}: cannot continue, {name!r} does not fit ({why}); name another --out, or remove "
                             "the file") from None
    step, total, end = state["step"], state["total"], vars(cfg).get("steps", state["total"])
    if end < step:
        raise SystemExit(f"{path}: at step {step}, beyond --steps {end}; --steps {step} ends it there")
    if end == step < total and int(os.environ.get("RANK", 0)) == 0:     # it is to end where it is
        put_state(path, state | {"total": step})
        print(f"{path}: finished, at step {step} instead of {total}")
    return step


def samples(cfg):
    """How many a step sees, over all passes and processes: what a resumed run has to keep."""
    return cfg.batch * cfg.accumulate * world_size()


def make_folder(path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"{path}: cannot be made ({error.strerror}); name another --out") from None


def start_run(out_dir, cfg):
    """Make out_dir and write run.json (config, command, commit, versions), unless another run is there.

    Lines of its logs after the checkpoint belong to steps that will be done again: they are dropped.
    """
    last = f"{out_dir}/last.pt"
    if os.path.exists(last) and not cfg.resume:
        raise SystemExit(f"{last} exists: add --resume to continue it, or name another --out")
    state = {"step": -1, "total": 1, "config": {}, "samples": samples(cfg)}    # before line 0, that of a warm-up
    try:
        if os.path.exists(last):        # mmap: only the small parts are wanted, not the gigabytes behind them
            state = torch.load(last, map_location="cpu", weights_only=True, mmap=True)
        step, before, seen = (state[k] for k in ("step", "config", "samples"))
    except Exception as error:
        raise SystemExit(f"{last}: cannot be read ({type(error).__name__}); remove it, or name another --out") from None
    # these may change on --resume; with other steps the rates of stages 0 and III change
    free = {"resume", "steps", "log_every", "save_every", "out", "data", "latents", "checkpointing", "compile",
            "batch", "accumulate"}
    if vars(cfg).get("order") == "sequential":                          # DMD's half would have another end
        free.remove("steps")
    changed = [k for k, v in asdict(cfg).items() if k not in free and before.get(k, v) != v]
    if seen != samples(cfg):
        changed.append(f"batch x accumulate x processes ({seen} samples a step)")
    if changed:
        raise SystemExit(f"{last}: made with another {', '.join(changed)}; set it back, or name another --out")
    make_folder(out_dir)
    about = {"config": asdict(cfg), "argv": sys.argv, "commit": commit(), "torch": torch.__version__,
             "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    if step < vars(cfg).get("steps", state["total"]):                   # what has ended keeps its own
        put(f"{out_dir}/run.json", json.dumps(about, indent=2))
    for name in glob.glob("*.jsonl", root_dir=out_dir):
        kept = [line for line in read_log(out_dir, name) if line["step"] <= step]
        put(f"{out_dir}/{name}", "".join(json.dumps(line) + "\n" for line in kept))


@functools.cache                # once: a run goes on with the code that it has read, whatever is edited meanwhile
def parsed(module):
    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):               # without docstrings
            node.body = [x for x in node.body if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))]
    return ast.dump(tree)


def digest(*parts):
    """A hash of strings and of the bytes of arrays, one after the other."""
    h = hashlib.sha256()
    for part in parts:
        h.update(part.encode() if isinstance(part, str) else part.tobytes())
    return h.hexdigest()


def code(*modules):
    """A hash of what modules do, comments and docstrings left out: results of other code are made again."""
    return digest(*map(parsed, modules))[:16]


def contents(path):
    """A hash of the CRC-32s that torch.save wrote of a checkpoint's tensors: 40 GB need not be read."""
    with zipfile.ZipFile(path) as parts:                                # <name of the file>/data/0, ...
        listed = [(part.filename.partition("/")[2], part.file_size, part.CRC) for part in parts.infolist()]
    return digest(repr(listed))


def commit():
    """The commit of this code, with -dirty where it was edited; "unknown" without git."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                             cwd=os.path.dirname(os.path.abspath(__file__)))
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def log(out_dir, bar, step, **values):
    """One JSON line in out_dir/log.jsonl and the same numbers behind the progress bar; on a GPU also the peak memory
    since the last line or panel, that of steps (but for the first line)."""
    values |= memory()
    values = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
    log_row(out_dir, "log.jsonl", step, **values)
    bar.set_postfix_str(" ".join(f"{k} {v:.3g}" for k, v in values.items()))


def read_log(out_dir, name="log.jsonl"):
    """The lines of a log as dicts; a line cut short by a kill is skipped."""
    lines = []
    if os.path.exists(f"{out_dir}/{name}"):
        for line in open(f"{out_dir}/{name}"):
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return lines


def log_row(out_dir, name, step, **values):
    """One JSON line in out_dir/name."""
    with open(f"{out_dir}/{name}", "a") as f:
        f.write(json.dumps({"step": step, **values}) + "\n")


def panel(path, columns, verdicts=()):
    """A PNG of the middle frames of some clips, and loss.png, every number of log.jsonl over the step, if there is one.

    columns: {title: video (B, 3, F, H, W) in [-1, 1]}. verdicts: lines of text below.
    """
    from matplotlib.figure import Figure

    rows = min(4, len(next(iter(columns.values()))))
    fig = Figure((2.2 * len(columns), 2.2 * rows + 0.5 + 0.22 * len(verdicts)), layout="constrained")
    axes = fig.subplots(rows, len(columns), squeeze=False)
    for column, (title, video) in enumerate(columns.items()):
        for row in range(rows):
            frame = video[row, :, video.shape[2] // 2].detach().float().cpu()
            axes[row][column].imshow((frame.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy(), interpolation="nearest")
            axes[row][column].axis("off")
        axes[0][column].set_title(title, fontsize=9)
    fig.supxlabel("\n".join(verdicts) or " ", fontsize=8, ha="left", x=0.01)
    fig.savefig(path, dpi=110)

    memory()                                                            # the panel's is not a step's
    lines = read_log(os.path.dirname(path))
    if not lines:                                                       # such as pairs.png, before the first step
        return
    names = [k for k in dict.fromkeys(k for line in lines for k in line) if k != "step"]
    rows = -(-len(names) // 4) or 1
    fig = Figure((13, 2.4 * rows), layout="constrained")
    for axis, name in zip(fig.subplots(rows, 4, squeeze=False).flat, names, strict=False):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), "." if len(points) == 1 else "-", linewidth=0.9)
        axis.set_title(name, fontsize=9)
    fig.savefig(os.path.join(os.path.dirname(path), "loss.png"), dpi=90)
