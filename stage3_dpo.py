"""Stage III: preference fine-tuning. The student learns to prefer what a quality scorer prefers among its own outputs.

Several outputs of the stage II student for each LR clip (they differ in their noise) are ranked by a video quality
scorer; the best and the worst make a pair, and DPO moves the student from the worst towards the best.

    python stage3_dpo.py                                        # tiny, on a CPU
    torchrun --nproc_per_node=8 stage3_dpo.py --preset small

Reads   out/<preset>/stage2/last.pt: student.
Writes  out/<preset>/stage3/pairs/*.pt, the ranked pairs, used again if they are there; pairs.json, pairs.png show them;
        out/<preset>/stage3/last.pt: student, vae, and what --resume needs; log.jsonl, held.jsonl, panel.png, loss.png.

Differs from the paper: (1) the scorer is an offline proxy: NIQE, flicker (so neither can judge this stage), and
consistency with LR, with no credit above 30 dB, which most outputs reach. DOVER or a pyiqa metric is used if it is
installed and named; these do not check a winner against LR; (2) an anchor to the stage II student is
added (anchor = 0: none): at t = 1 dpo_inside is linear in the student's output, and the loss falls for ever along
winner - loser; (3) only the pairs with the larger margins are used (keep): with the proxy those on which its measures
agree most; (4) some are held out, to see whether the preference carries over.
Left open there and settled here: winner and loser share fresh noise and one time. With each candidate's own noise
the reference reproduces both at t = 1, and the gradient is 0 (own_noise). The time is uniform, as the z_t of the
formula suggests, though the student only ever runs at t = 1 (dpo_t = "one": there alone). No time under 1 has been
trained since the last phase but one of stage I (there one alone: 1/2, or 5/6 at shift 5); what is learnt at such times
reaches t = 1 through the weights that all times share.
"""
import json
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import cost
import data
import health
import metrics
import model as M

# ----------------------------------------------------------------------------
# constants: edit here, or override with --name value


@dataclass
class Config:
    model: str = "tiny"             # row of MODELS in model.py
    out: str = "out/tiny"           # folder of the run; this stage writes <out>/stage3
    data: str = "samples/train"     # folder of videos and photographs
    clips: int = 96                 # degraded clips kept on disk
    resume: bool = False            # continue from the last checkpoint
    seed: int = 0                   # of clips and noise
    batch: int = 8                  # pairs per process and pass
    accumulate: int = 1             # passes whose gradients add up to one step; the last is logged
    checkpointing: bool = False     # keep only the inputs of blocks, compute the rest twice: less memory
    dry_run: bool = False           # print what a step costs, in passes, FLOPs and memory, and stop
    lora: int = 0                   # rank of the adapters that are trained alone; 0: all weights [VideoAlign: 64]
    pairs: int = 48                 # pairs made, clip after clip, then again with other noise [paper: 2,000]
    candidates: int = 4             # outputs per LR clip [not in the paper's summary]
    scorer: str = "proxy"           # "proxy", "dover", "pyiqa:<metric>" [paper: DOVER]; only "proxy" looks at LR
    keep: float = 0.5               # share of the pairs kept, those with the largest margins [ours]
    held: int = 8                   # pairs held out, at most half; no other pair of their clips is used [ours]
    steps: int = 60                 # optimiser steps [paper: 1,000]
    lr: float = 5e-5                # learning rate, linear to 0; higher or constant ones weave more of a lattice [ours]
    dpo_t: str = "uniform"          # t ~ U(0, 1) [VideoAlign; the formula has a z_t]; "one": t = 1 [ours]
    dpo_beta: float = 0.0           # beta of the mean-reduced loss; 0: 2 / (alpha median |winner - loser|^2) [ours]
    beta_mode: str = "constant"     # "constant", or "flow": beta (1 - t)^2, which is 0 at t = 1 [VideoAlign]
    anchor: float = 1.0             # times beta / (4 alpha), on |v - v_ref|^2; 0: none [ours]
    alpha: float = 2.0              # at t = 1 the output moves by alpha E[winner - loser | LR] or less, about [ours]
    own_noise: bool = False         # replay each candidate's own noise: at t = 1 this teaches nothing
    log_every: int = 5              # steps between log lines
    save_every: int = 20            # steps between checkpoints and panels


PRESETS = {                         # the first one is the default; its values replace those above
    "tiny":  dict(),
    "small": dict(model="small", out="out/small", clips=4000, pairs=400, candidates=6, held=32, steps=300,
                  lr=2e-6, alpha=0.25, save_every=100),
    "wan1.3b": dict(model="wan1.3b", out="out/wan1.3b", clips=2000, batch=1, accumulate=4, pairs=4000, held=32,
                    steps=1000, lr=5e-6, lora=64, checkpointing=True, alpha=0.25, save_every=100),
}

# ----------------------------------------------------------------------------
# the maths of this stage


def squared_error(v, target):
    """Mean squared error per sample, (B,). Means, not sums: with sums beta would grow with the size of the video."""
    return (v - target).square().mean(dim=(1, 2, 3, 4))


def paired(net, z_w, z_l, eps_w, eps_l, t, z_lr):
    """A net's velocities (2B, C, T, H, W) at winners and losers noised to times t, (B,), and their errors (e_w, e_l).

    At t = 1 with shared noise both enter as the same z_t = eps, and only their targets differ.
    """
    z_t = torch.cat([M.add_noise(z_w, eps_w, t), M.add_noise(z_l, eps_l, t)])
    v = net(z_t, t.repeat(2), z_lr.repeat(2, 1, 1, 1, 1), M.prompt(z_t)).float()
    return v, squared_error(v, torch.cat([eps_w - z_w, eps_l - z_l])).chunk(2)


def dpo_inside(e_w, e_w_ref, e_l, e_l_ref, beta):
    """-(beta / 2) ((e_w - e_w^ref) - (e_l - e_l^ref)), the implicit reward margin of Diffusion-DPO. All (B,).

    Positive where, against the reference, the winner's error has fallen more, or risen less, than the loser's.
    """
    return -beta / 2 * ((e_w - e_w_ref) - (e_l - e_l_ref))


def dpo_loss(inside, apart=0.0, lam=0.0):
    """L_DPO = -E log sigmoid(inside), the mean taken after the logarithm, ln 2 at the start; plus the anchor [ours],
    lam times apart = |v - v_ref|^2, which at t = 1 is that of the clean estimates, |x - x_ref|^2."""
    return -F.logsigmoid(inside).mean() + lam * apart


def choose_beta(distance, alpha):
    """beta with which, at t = 1, moving by alpha (winner - loser) makes inside 2: 2 / (alpha median |z_w - z_l|^2)."""
    return 2 / (alpha * distance.median().clamp_min(1e-8).item())


def beta_at(beta, t, mode):
    """beta_t: beta, or, mode = "flow", beta (1 - t)^2, with which errors of velocities count as those of noise do."""
    return beta * (1 - t).square() if mode == "flow" else beta


def rank_pair(scores):
    """(index of the best, index of the worst, their margin)."""
    best, worst = int(np.argmax(scores)), int(np.argmin(scores))
    return best, worst, float(scores[best] - scores[worst])


# ----------------------------------------------------------------------------
# the pairs


def make_scorer(name):
    """A function (candidates: list of uint8 (F, H, W, 3), lr: uint8 (F, h, w, 3)) -> scores, higher is better.

    name: one that `check` knows. Raises SystemExit naming what is missing if the scorer is not there.
    """
    if name == "proxy":
        return lambda candidates, lr: metrics.proxy_rank(candidates, lr)[0]
    try:
        measure, sign = metrics.learned_metric(name.removeprefix("pyiqa:"))
    except Exception as error:                                          # not ours: it fails in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SystemExit(f"scorer {name}: {reason}; or use --scorer proxy") from None
    return lambda candidates, lr: np.array([sign * measure(c) for c in candidates])


@torch.no_grad()
def make_pair(i, student, vae, bank, cfg, scorer, device):
    """Pair i, the best and the worst of several outputs for one LR clip: {"win", "lose", "lr": latents (C, T, H, W),
    "noise": of winner and loser (2, C, T, H, W), all fp16; "distance": mean (win - lose)^2; "record": for people}.

    Whole stored clips are judged, not crops: a scorer needs to see something.
    """
    common.reseed(cfg.seed, "candidates", i)
    velocity = M.tiled(student, data.crop_shape(cfg.model))
    hr, lr = bank.whole(i % len(bank))
    up = data.upsample(data.to_tensor(lr, device)[None], hr.shape[1:3])
    z_lr = vae.encode(up)
    eps = torch.randn(cfg.candidates, *z_lr.shape[1:], device=device)
    with common.autocast(device):
        z = torch.cat([M.one_step(velocity, e[None], z_lr) for e in eps])
    scores = scorer([data.to_uint8(vae.draw_onto(up, z_lr, x[None])) for x in z], lr)  # as infer.py --color none
    if not np.isfinite(scores).all():
        raise SystemExit(f"scorer {cfg.scorer}: no score for an output of clip {i % len(bank)}; use another")
    best, worst, margin = rank_pair(scores)
    win, lose, z_lr, noise = (x.half().cpu() for x in (z[best], z[worst], z_lr[0], eps[[best, worst]]))
    return {"win": win, "lose": lose, "lr": z_lr, "noise": noise,
            "distance": (win.float() - lose.float()).square().mean().item(),
            "record": {"clip": i % len(bank), "scores": [round(float(s), 4) for s in scores], "winner": best,
                       "loser": worst, "margin": round(margin, 4)}}


def read_pair(path):
    return torch.load(path, weights_only=True, mmap=True)               # mmap: of a large file only what is used


def usable(path, stamp):
    """Whether a pair is there, whole, and made from the same student with the same settings."""
    try:
        return read_pair(path)["stamp"] == stamp
    except Exception:
        return False


def spread(order, count):
    """`count` items of `order`, or all if there are fewer: the middle one of each of `count` equal parts."""
    count = min(count, len(order))
    return [order[(2 * i + 1) * len(order) // (2 * count)] for i in range(count)]


def set_aside(order, clips, held):
    """(pairs to train on, pairs held out): `held` pairs spread over `order`, at most half, whose clips are not trained
    on either; none if nothing would be left to train on. clips[i]: of pair i."""
    aside = spread(order, min(held, len(order) // 2))
    taken = {clips[i] for i in aside}
    rest = [i for i in order if clips[i] not in taken]
    return (rest, aside) if rest else (order, [])


# ----------------------------------------------------------------------------


def check(cfg):
    common.check_fields(cfg, model=tuple(M.MODELS), dpo_t=("one", "uniform"), beta_mode=("constant", "flow"))
    if cfg.candidates < 2 or cfg.pairs < 1 or cfg.alpha <= 0 or cfg.lora < 0 or cfg.held < 0:
        raise SystemExit("candidates: at least 2; pairs: at least 1; alpha: above 0; lora, held: 0 or more")
    if cfg.dpo_t == "one" and cfg.beta_mode == "flow":
        raise SystemExit("beta_mode flow is 0 at t = 1: not with dpo_t one")
    if cfg.scorer not in ("proxy", "dover") and not cfg.scorer.startswith("pyiqa:"):
        raise SystemExit(f"scorer {cfg.scorer!r}: proxy, dover, or pyiqa:<metric>")


def main(cfg):
    check(cfg)
    if cfg.dry_run:
        return cost.report("stage III", cfg, passes(cfg), clips=2)
    rank, world, device = common.setup()
    out_dir = f"{cfg.out}/stage3"
    if rank == 0:
        common.start_run(out_dir, cfg)
    autocast = common.autocast(device)

    # the student and its frozen reference: where it starts
    source = f"{cfg.out}/stage2/last.pt"
    student, vae, _ = M.load_checkpoint(source, "student", device, cfg.model, finished=True)
    bank = data.training_bank(cfg, rank)
    reference = deepcopy(student)
    student.requires_grad_(True)
    student.checkpointing = cfg.checkpointing
    if cfg.lora:
        common.reseed(cfg.seed, "adapters")
        M.LoRA(student, cfg.lora)
    optimiser = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=cfg.lr, weight_decay=0)
    # all that a pair depends on; the name of the bank is a hash of its clips' settings, files and code
    stamp = repr([common.contents(source), bank.path.name, cfg.candidates, cfg.scorer, cfg.seed,
                  common.code(metrics, M, make_pair, rank_pair)])
    saved = dict(vae=vae, optimiser=optimiser, source=stamp) | \
        ({"lora": student.lora} if cfg.lora else {"student": student})
    start = common.continue_from(f"{out_dir}/last.pt", cfg, saved)

    # every process makes its share of the pairs; those made before from the same student are used again
    paths = [f"{out_dir}/pairs/{i:05d}.pt" for i in range(cfg.pairs)]
    common.make_folder(f"{out_dir}/pairs")
    missing = [i for i in range(rank, cfg.pairs, world) if not usable(paths[i], stamp)]
    scorer = make_scorer(cfg.scorer) if missing else None
    for i in tqdm(missing, "candidates", disable=rank > 0, dynamic_ncols=True):
        pair = make_pair(i, reference, vae, bank, cfg, scorer, device)
        common.put_state(paths[i], {"stamp": stamp} | pair)
    del scorer                                                          # it may be a large network
    common.barrier()
    pairs = [read_pair(path) for path in paths]
    order = sorted(range(cfg.pairs), key=lambda i: -pairs[i]["record"]["margin"])
    clips = [pair["record"]["clip"] for pair in pairs]
    trained, aside = set_aside(order[:max(1, round(cfg.keep * cfg.pairs))], clips, cfg.held)
    kept, held = [pairs[i] for i in trained], [pairs[i] for i in aside]
    if rank == 0:
        records = [pair["record"] | {"trained": i in trained, "held": i in aside} for i, pair in enumerate(pairs)]
        common.put(f"{out_dir}/pairs.json", json.dumps({"scorer": cfg.scorer, "pairs": records}, indent=1))
        show_pairs(f"{out_dir}/pairs.png", kept[:4], vae, device)
    distance = torch.tensor([pair["distance"] for pair in kept])
    # alpha bounds how far the output moves, in units of (w - l). At t = 1 DPO pulls by sigmoid(-inside) beta (w - l),
    # the anchor back by 2 lam (x - x_ref), and they balance at alpha (w - l) or before. Where winner and loser are two
    # inputs (t < 1, own_noise) DPO can also win by spoiling the loser alone: moving its velocity by D raises its error
    # by |D|^2 on average, which lowers L_DPO by beta/4 |D|^2 at first, and costs beta/(8 alpha) |D|^2 of anchor. With
    # alpha < 1/2 (small, wan1.3b) the anchor wins from the start; at tiny's 2 the loser drifts until sigmoid(-inside)
    # is small
    beta = cfg.dpo_beta or choose_beta(distance, cfg.alpha)
    lam = cfg.anchor * beta / (4 * cfg.alpha)

    ddp, parts = common.parallel(student, world), world * cfg.accumulate
    window, size, _ = data.crop_shape(cfg.model)

    def next_batch(step, part):
        """(winner, loser, LR, the two noises) of some pairs, one random window of each: (B, C, T, H, W)."""
        rows = data.stream(cfg.seed, len(kept), (step * parts + part) * cfg.batch, cfg.batch)
        T, H, W = kept[0]["win"].shape[1:]
        u = common.draw(torch.rand, (cfg.batch, 3), part, parts, "cpu")
        batch = []
        for row, (a, b, c) in zip(rows, u.tolist(), strict=True):
            f, y, x = int(a * (T - window + 1)), int(b * (H - size + 1)), int(c * (W - size + 1))
            box = (..., slice(f, f + window), slice(y, y + size), slice(x, x + size))
            batch.append([kept[row][k][box] for k in ("win", "lose", "lr", "noise")])
        return [torch.stack(x).float().to(device) for x in zip(*batch, strict=True)]

    # does the student prefer the winner? asked of the pairs held out, and of as many (or all) of those trained on
    measured = {}
    if held and rank == 0 and start < cfg.steps:
        measured = {"trained": spread(kept, len(held)), "held": held}

    def gaps(net):
        with autocast:
            return {name: error_gaps(net, some, window, size, cfg.seed, device) for name, some in measured.items()}
    gaps_ref = gaps(reference)

    bar = tqdm(range(start, cfg.steps), "stage III", initial=start, total=cfg.steps, disable=rank > 0,
               dynamic_ncols=True)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = cfg.lr * (1 - step / cfg.steps)
        optimiser.zero_grad()
        for part, last in common.my_parts(rank, parts, world):          # this process's share of the batch
            common.reseed(cfg.seed, "stage 3", step)

            # 1) a batch of pairs; the noise and the time are shared by winner and loser
            z_w, z_l, z_lr, noise = next_batch(step, part)
            eps_w = eps_l = common.draw(torch.randn, z_w.shape, part, parts, device)
            if cfg.own_noise:
                eps_w, eps_l = noise[:, 0], noise[:, 1]
                # a pair was made on its whole clip; of this window alone the reference makes something else
                with torch.no_grad(), autocast:
                    z_w, z_l = (M.one_step(reference, e, z_lr) for e in (eps_w, eps_l))
            u = common.draw(torch.rand, (cfg.batch,), part, parts, device)
            t = torch.ones_like(u) if cfg.dpo_t == "one" else u

            # 2) one DPO step: errors of student and reference on winner and loser, in velocities
            with common.accumulating(last, ddp):
                with autocast:
                    v, (e_w, e_l) = paired(ddp, z_w, z_l, eps_w, eps_l, t, z_lr)
                    with torch.no_grad():
                        v_ref, (e_w_ref, e_l_ref) = paired(reference, z_w, z_l, eps_w, eps_l, t, z_lr)
                inside = dpo_inside(e_w, e_w_ref, e_l, e_l_ref, beta_at(beta, t, cfg.beta_mode))
                apart = (v - v_ref).square().mean()
                (dpo_loss(inside, apart, lam) / cfg.accumulate).backward()
        norm = common.clip_and_step(optimiser, student, 1.0)

        # 3) log, save, panel
        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.steps:
            drift = M.bcast(t.repeat(2), v) * (v - v_ref)               # x_ref - x, as x = z_t - t v
            values = dict(dpo=dpo_loss(inside), accuracy=(inside > 0).float().mean(), inside=inside.mean(),
                          winner_error=e_w.mean(), winner_change=(e_w - e_w_ref).mean(),
                          loser_error=e_l.mean(), loser_change=(e_l - e_l_ref).mean(),
                          drift=drift.square().mean() / (z_w - z_l).square().mean(), grad_norm=norm)
            values = {k: common.mean(x) for k, x in values.items()}
            if rank == 0:
                common.log(out_dir, bar, done, **values, beta=beta)
        if rank == 0 and (done % cfg.save_every == 0 or done == cfg.steps):
            common.save(f"{out_dir}/last.pt", cfg, "stage3", done, cfg.steps,
                        **saved | {"student": M.merged(student)})
            with torch.no_grad(), autocast:
                before, after = (M.one_step(net, eps_w, z_lr) for net in (reference, student))
            shares = {name: preferred(found, gaps_ref[name]) for name, found in gaps(student).items()}
            common.log_row(out_dir, "held.jsonl", done, pairs=len(held), **shares)
            common.panel(f"{out_dir}/panel.png", {
                "LR": vae.decode(z_lr), "loser": vae.decode(z_l), "winner": vae.decode(z_w),
                "before DPO": vae.decode(before), "after": vae.decode(after)},
                health.stage3(out_dir, len(held), **shares))
    common.cleanup()


# ----------------------------------------------------------------------------
# what a step costs, and what it learns of pairs held out


def passes(cfg):
    """DiT passes of a step, of winner and loser together, for cost.py: {network: how it is kept and (forward alone,
    input gradient, full)}. Adapters need no gradient of the weights that they adapt."""
    n = cfg.accumulate
    return {"student": ("adapted", 0, n, 0) if cfg.lora else ("trained", 0, 0, n), "reference": ("frozen", n, 0, 0)}


@torch.no_grad()
def error_gaps(net, pairs, window, size, seed, device, times=(0.5, 1.0)):
    """{t: e_l - e_w of each of these pairs, (n,)}, in one window of each, with the same noise at every call."""
    gaps = {}
    for t in times:
        common.reseed(seed, "held out")
        found = []
        for pair in pairs:
            z_w, z_l, z_lr = (pair[k][None, :, :window, :size, :size].float().to(device) for k in ("win", "lose", "lr"))
            eps = torch.randn_like(z_w)
            e_w, e_l = paired(net, z_w, z_l, eps, eps, torch.full((1,), t, device=device), z_lr)[1]
            found.append((e_l - e_w).item())
        gaps[t] = np.array(found)
    return gaps


def preferred(gaps, gaps_ref):
    """{t: share of pairs whose e_l - e_w the student has raised over its reference's}; both as from `error_gaps`.

    1/2 is chance. Above it of pairs trained on: it learns; of pairs held out: what it learns carries over.
    """
    return {t: float(np.mean(gaps[t] > gaps_ref[t])) for t in gaps}


def show_pairs(path, pairs, vae, device):
    """pairs.png: the middle frame of LR, loser, winner of some pairs, and where they differ (x 4)."""
    lr, lose, win = (torch.cat([vae.decode(p[k][None].float().to(device)) for p in pairs])
                     for k in ("lr", "lose", "win"))
    common.panel(path, {"LR": lr, "loser": lose, "winner": win, "4 (winner - loser)": 4 * (win - lose)})


if __name__ == "__main__":
    common.run(main, Config, PRESETS)
