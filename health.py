"""How a run fares, in plain words: the lines under its panel.png, and the numbers in its log that they rest on.

Nothing here trains anything; stageN is of stage N. Thresholds are ours, chosen on runs of the preset tiny; how those of
stage II do on 164 of them is in LOG.md, "what the verdicts are worth".
"""
import math
import statistics

import numpy as np
import torch
import torch.nn.functional as F

import common
import data
import metrics
import model as M


def means(lines):
    """{name: mean over these lines of a log} of what the last of them has."""
    return {k: sum(line.get(k, 0) for line in lines) / len(lines) for k in lines[-1]}


# ----------------------------------------------------------------------------
# stages 0 and I


def stage0(out_dir):
    """What the log says, in plain words: whether the loss still falls, by the means of its last two quarters. A line is
    one batch, at its own times: changes under two standard errors are not told apart from chance."""
    losses = [line["loss"] for line in common.read_log(out_dir)]
    quarter = len(losses) // 4
    if quarter < 5:
        return ["too few log lines to say how training goes"]
    last = torch.tensor(losses[-2 * quarter:]).view(2, -1)
    (before, now), noise = last.mean(dim=1).tolist(), 2 * (last.var(dim=1).sum() / quarter).sqrt().item()
    if abs(now - before) < noise:
        return [f"the loss is level, {before:.3f} to {now:.3f}, within what batches scatter (+- {noise:.3f})"]
    if now > 1.1 * before:
        return [f"the loss rises, {before:.3f} to {now:.3f}: lower lr"]
    if now > 0.97 * before:
        return [f"the loss has settled at {now:.3f}: let lr fall (decay), or take a larger model"]
    return [f"the loss still falls, {before:.3f} to {now:.3f}: train longer"]


def ratio(prediction, target, start):
    """||prediction - target||^2 / ||start - target||^2: 1 when nothing is learnt yet, good under 0.3."""
    return (prediction - target).square().mean() / (start - target).square().mean().clamp_min(1e-12)


def stage1(out_dir, step):
    """What the last log line says, in plain words."""
    last = [line for line in common.read_log(out_dir) if line["step"] <= step][-1]
    words = [f"step {step}: the error is {last['ratio']:.2f} of what it was at the start of the phase"
             + (" (good)" if last["ratio"] < 0.3 else "; train it longer" if last["ratio"] > 0.7 else "")]
    if last.get("guidance", 1) < 1e-4:
        words.append("guidance hardly moves the velocity: CFG distillation has nothing to teach; raise cfg_w")
    return words


# ----------------------------------------------------------------------------
# stage II: numbers


def loss_gradients(losses, z_0):
    """What each loss asks of the student's output: {name: d loss / d z_0}; zeros for one that does not reach it."""
    found = {}
    for name, loss in losses.items():
        g = torch.autograd.grad(loss, z_0, retain_graph=True, allow_unused=True)[0] if loss.requires_grad else None
        found[name] = torch.zeros_like(z_0) if g is None else g
    return found


def cosine(a, b):
    """Of two tensors as vectors; 0 if one of them is 0."""
    return F.cosine_similarity(a.flatten(), b.flatten(), dim=0)


def dmd(z_0, x_real, x_fake, g, keep, pull):
    """Numbers for verdicts on dmd_gradient, for those who edit it. g_want: mean |g| computed anew. g_cosine: of pull,
    what reaches the student (or would), with x_fake - x_real; below 0 a sign is flipped."""
    direction, axes = x_fake - x_real, (1, 2, 3, 4)
    want = direction.abs().mean(axes) / (z_0 - x_real).abs().mean(axes).clamp_min(1e-5)
    return dict(skipped=1 - keep.mean(), g_mean=g.abs().mean(), g_want=want.mean(), g_cosine=cosine(pull, direction))


def detail(z, z_lr, z_hr):
    """How much z adds to z_lr, as a share of what HR adds: under 1 is blur, over 1 noise."""
    return ((z - z_lr).square().mean() / (z_hr - z_lr).square().mean()).sqrt()


def lattice(videos, stride):
    """metrics.lattice of clips (B, 3, F, H, W), taken together: a token has 2 x 2 latents of `stride` pixels."""
    return metrics.lattice(np.concatenate([data.to_uint8(v) for v in videos]), 2 * stride)


@torch.no_grad()
def spatial_offsets(predict, z_0, z_hr, vae, eps, times=(0.2, 0.5, 0.8)):
    """How far the real score's clean estimates lie from HR, px, median over clips: [{"t", "student", "hr"}], starting
    from the student's sample, noised, and from HR, noised. predict: (z_t, t) -> x_0. A first number that is larger is
    in the paper's Fig. 2 the bias of the real score; how far the student's sample is off itself is in it, too."""
    truth, rows = [data.to_uint8(v) for v in vae.decode(z_hr)], []
    for time in times:
        t, row = torch.full((len(z_hr),), time, device=z_hr.device), {"t": time}
        for name, z in (("student", z_0), ("hr", z_hr)):
            videos = vae.decode(predict(M.add_noise(z, eps, t), t))
            offsets = [math.hypot(*metrics.shift(data.to_uint8(v), hr)) for v, hr in zip(videos, truth, strict=True)]
            offsets = [x for x in offsets if math.isfinite(x)]          # a crop without texture has none
            row[name] = round(statistics.median(offsets), 3) if offsets else None   # median: some match elsewhere
        rows.append(row)
    return rows


# ----------------------------------------------------------------------------
# stage II: words

BLURRED, NOISY = 0.6, 1.2           # shares of the detail of HR at which verdicts speak of blur and of noise [ours]
UNSTABLE = 2.5                      # and, in any one line, of an unstable student [ours]
GRAIN = 1.5                         # and, on the panel, of grain: five collapsed runs had 1.8, all others 1.4 at most
WOVEN = 2.1                         # times HR's lattice: where the GAN was left alone 2.3 at least, elsewhere in
                                    # `streams` 2.0 at most


def head_verdict(loss_d, warm):
    """What L_D says of the head: it is 0 where HR and student are told apart for sure, 2 where they are not at all.
    warm: L_D at the end of the warm-up."""
    if loss_d < 0.3:
        return "the head has won; lower lr_head"
    if loss_d <= 1.95:
        return "healthy"
    if warm > 1.95:
        return "the head has not learnt yet; raise aux_warmup"
    does = "misleads the head" if loss_d > 2.3 else "keeps up with the head, as in most runs"
    return f"the student {does} ({warm:.2f} after the warm-up)"


def stage2(out_dir, offsets=(), shown=0.0, woven=(0.0, 1.0)):
    """What the latest log lines, the spatial offsets, `detail` on the panel, and `lattice` there, of the student and of
    HR, say, in plain words."""
    lines = common.read_log(out_dir)
    warm = next((line["d_warmup"] for line in lines if "d_warmup" in line), 2)
    lines = [line for line in lines if line["step"]][-20:]              # without the warm-up's
    if not lines:
        return []
    if "pull_gan" in lines[-1]:                                         # sequential: its second half alone
        lines = [line for line in lines if "pull_gan" in line]
    last = means(lines)
    if "g_mean" not in last:                                            # regression alone
        return [f"mean squared error {last['mse']:.3g}: regression alone, without score models"]
    words = [f"mean |g| of DMD {last['g_mean']:.2f}: " + ("healthy" if 0.1 < last["g_mean"] < 3 else
             "the fake score equals the real one" if last["g_mean"] <= 0.1 else "spikes; lower lr")]
    if last["g_cosine"] < 0:
        words.append("DMD moves the student from the real score's x0 to the fake one's: a sign is flipped")
    if last["g_want"] > 1e-6 and not 0.5 < last["g_mean"] / last["g_want"] < 2:
        words.append(f"g is not normalised: (x_fake - x_real) / mean |z_0 - x_real| would be {last['g_want']:.2g}")
    if last["skipped"] > 0.05:
        words.append(f"{last['skipped']:.0%} of samples skipped as spikes: see the real score's x0")
    if "diff" not in last:
        words.append("no auxiliary updates: the fake score stands still; raise aux_per_student")
    elif last["lag"] > 0.99:
        words.append("the fake score knows the student no better than the real one: raise aux_per_student or lr_fake")
    if last["detail"] < BLURRED:
        words.append(f"the student adds {last['detail']:.0%} of HR's detail: a mean, not a sample; was stage I run?")
    elif last["detail_real"] < BLURRED:                                 # of a blurred student it sees no more
        words.append(f"the real score's x0 has {last['detail_real']:.0%} of HR's detail: blurred; lower t_max")
    if last["detail"] > NOISY:
        words.append(f"the student adds {last['detail']:.0%} of HR's detail: noise; train longer, or lower cfg_w")
    if (most := max(line["detail"] for line in lines)) > UNSTABLE:
        words.append(f"the student once added {most:.1f} times HR's detail: unstable, or HR has none; lower lr")
    if shown > GRAIN:
        words.append(f"here the student adds {shown:.1f} times HR's detail: grain; was stage I run? or lower lr")
    if "pull_gan" in last and "d" in last:                              # without auxiliary updates there is no d
        words.append(f"hinge L_D {last['d']:.2f}: {head_verdict(last['d'], warm)}")
        if last["pull_gan"] == 0 and last["d"] != 2 and last["gan"]:    # at first the head is 0, and L_D exactly 2
            words.append("L_G does not reach the student: are the features detached?")
        if pulls := [line["pull_gan"] / line["pull_dmd"] for line in lines if line.get("pull_dmd")]:
            words.append(f"the GAN pulls {statistics.median(pulls):.1f} times as hard as DMD")  # lines scatter widely
    diffs = [line["diff"] for line in lines if "diff" in line]
    early, late = (sum(x) / max(1, len(x)) for x in (diffs[:len(diffs) // 2], diffs[len(diffs) // 2:]))
    if len(diffs) >= 6 and late > 2 * early:                            # the mean of four varies by a third
        words.append("the fake score lags behind the student: raise aux_per_student or lr_fake")
    if woven[0] > WOVEN * woven[1] > 0:
        advice = ""
        if "pull_gan" in last:
            advice = ": raise aux_per_student" if "pull_dmd" in last else ": the GAN without DMD beside it weaves one"
        words.append(f"a lattice of the period of a token is {woven[0]:.0f} % of the detail of smooth areas, HR's "
                     f"{woven[1]:.0f} %{advice}")
    offsets = [row for row in offsets if None not in row.values()]
    if offsets:
        words.append("real score's x0 off HR, from the student's sample / from HR: " + ", ".join(
            f"t = {row['t']}: {row['student']:.2f} / {row['hr']:.2f} px" for row in offsets))
    for row in offsets:
        if row["student"] > row["hr"] + 0.3:
            words.append(f"at t = {row['t']} the real score draws the student's sample {row['student']:.1f} px off HR, "
                         f"HR itself {row['hr']:.1f} px: raise w_gan, which sees where HR's detail lies")
    return words


# ----------------------------------------------------------------------------
# stage III

FAR = 0.25      # drift, as a share of |winner - loser|^2, at which a verdict speaks of it [ours]


def stage3(out_dir, count=0, trained=None, held=None):
    """What the latest log lines say, in plain words; and `preferred` of pairs trained on and of `count` held out."""
    lines = common.read_log(out_dir)[-10:]
    if not lines:
        return []
    last = means(lines)
    if last["drift"] > FAR:
        return [f"drift {last['drift']:.2f} of |winner - loser|^2: too far; raise anchor, lower alpha or stop earlier"]
    words = [f"implicit accuracy {last['accuracy']:.2f}, inside {last['inside']:.2g} on the pairs it trains on: " + (
             "it learns them" if last["accuracy"] > 0.6 else "winners and losers look alike to it; raise lr")]
    if count:
        noise = 0.5 * count ** -0.5                                     # standard deviation of a share by chance
        words += ["winners preferred of pairs trained on / held out: " + ", ".join(
            f"{trained[t]:.2f} / {held[t]:.2f} at t = {t:g}" for t in held) + f"; chance: 0.5 +- {noise:.2f}",
            "too few are held out to tell whether it carries over" if count < 5 else
            "at t = 1, where the student runs, it " + (
                "carries over" if held[1.0] > 0.5 + 2 * noise else "is not shown to carry over")]
    if min(last[f"{k}_change"] / max(last[f"{k}_error"], 1e-9) for k in ("winner", "loser")) > 0.05:
        words.append("both winner and loser error rise: the usual likelihood drop of DPO; raise anchor")
    return words
