"""Stage II: dual-stream distillation. A one-step student follows two streams of gradient at once.

DMD moves the student's distribution towards the teacher's: a frozen "real" score model says where clean data lie, a
"fake" one, trained alongside on the student's outputs, says where the student's lie; their difference is the gradient.
RFS-GAN moves it towards real video: a small convolutional head reads the features of both score models.
Why both (the paper's reasons; README has what we found): DMD alone can be no better than its teacher, and is biased:
the real score was never trained on a student's outputs, and its clean estimates of these drift off HR. The GAN sees
real video, but alone it is unstable. Both streams see noised samples, where the two distributions overlap.

    gradient of     student     fake        head        real
    L_Diff          no_grad     trains      -           -
    L_D             no_grad     detached    trains      no_grad
    L_DMD           trains      detached    -           detached
    L_G             trains      passes on   passes on   passes on
    L_FM            trains      passes on   -           passes on

    -: takes no part.   no_grad: no graph is built.   detached: what it computes is a constant.
    passes on: carries gradient back to the student; its own weights take none.

In the student's update L_DMD, L_G and L_FM share one forward of each score model at z_t^S: its velocity is detached,
its features are not. L_FM alone needs another forward, of HR.

    python stage2_dual.py                                       # tiny, on a CPU
    torchrun --nproc_per_node=8 stage2_dual.py --preset small

Reads   out/<preset>/stage1/last.pt: cfg (real score, and where the fake score starts), student; stage I's teacher if
        real_score = "teacher".
Writes  out/<preset>/stage2/last.pt: student (averaged weights, read by stage III), net (its raw weights), fake, head,
        vae, and what --resume needs; log.jsonl, offsets.jsonl, panel.png, loss.png.

Differs from the paper: (1) L_DMD carries the factor 1/2 of DMD2, so that its gradient is the normalised difference
itself (dmd_half = False drops it); (2) before the first update of the student the fake score and the head get
aux_warmup of their own; (3) a sample whose mean |g| exceeds 10 is left out of L_DMD; (4) stage III reads averaged
weights. Left open there and settled here: the real score is the CFG-distilled model, one pass for a guided prediction;
logits are per patch; and all else below that is marked [ours] or with a source.
Only for comparison (ablate.py): regression in place of the streams, and a student that has not been through stage I.

Names: z_0 is the student's output here, z_hr the latent of HR (z_0 in stages 0 and I); eps_in the noise the student
starts from, eps the one that is added to z_0 at time t. Of velocities, estimates and features _real and _fake say
which score model's they are, of logits and features _hr and _s whose video's. head is the discriminator, net.head the
last layer of a DiT.
"""
import statistics
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import cost
import data
import health
import model as M

# ----------------------------------------------------------------------------
# constants: edit here, or override with --name value


@dataclass
class Config:
    model: str = "tiny"             # row of MODELS in model.py
    out: str = "out/tiny"           # folder of the run; this stage writes <out>/stage2
    data: str = "samples/train"     # folder of videos and photographs
    clips: int = 96                 # degraded clips kept on disk, from which crops are cut
    latents: str = ""               # file of data.py prepare --latents, used instead of data; "": none
    resume: bool = False            # continue from the last checkpoint
    seed: int = 0                   # of weights, clips and noise
    batch: int = 4                  # crops per process and pass
    accumulate: int = 1             # passes whose gradients add up to one update; the last is logged
    checkpointing: bool = False     # keep only the inputs of blocks, compute the rest twice: less memory
    dry_run: bool = False           # print what an iteration costs, in passes, FLOPs and memory, and stop
    streams: tuple = ("dmd", "gan")  # what teaches the student: dmd, gan [paper: both]; mse: z_0 against HR [DOVE]
    order: str = "joint"            # "joint", or "sequential": DMD in the first half, GAN in the second [paper: joint]
    features: str = "both"          # score models whose features the head reads: "both", "real", "fake" [paper: both]
    init: str = "stage1"            # where the student starts: "stage1" [paper], or "cfg", the CFG-distilled model
    steps: int = 40                 # student updates [not in the paper's summary; 2,000 to 4,000 at 1.3B: FastVideo]
    aux_warmup: int = 150           # auxiliary updates before the first of the student; 30 teach the head little [ours]
    aux_per_student: int = 3        # auxiliary updates (fake score, head) per student update [paper]
    w_dmd: float = 1.0              # weight of L_DMD [paper]
    w_gan: float = 0.1              # weight of L_G [paper]
    w_fm: float = 0.05              # weight of L_FM [paper]
    dmd_half: bool = True           # 1/2 in L_DMD [DMD2]; the paper writes none, which doubles L_DMD
    t_min: float = 0.02             # score times are t_min + (t_max - t_min) shift(u) [range: DMD2]
    t_max: float = 0.98             # [DMD2]; with 0.7 closer to HR from some bases, not from all [ours]
    shift: float = 1.0              # shift of the score times [ours; 5 at 1.3B: Self-Forcing]
    real_score: str = "cfg"         # "cfg": CFG-distilled, one pass; "teacher": stage 0, guided by cfg_w, two [ours]
    fm_norm: str = "mse"            # L_FM: "mse" [paper] or "l1" [SeedVR2]
    head_channels: int = 64         # width of the discriminator head [ours]
    pooled: bool = False            # one logit per clip [DMD2] instead of one per patch
    gan_same_noise: bool = True     # in L_D HR and the student's sample share t and eps, as in L_FM always [ours]
    lr: float = 2e-4                # of the student; 1e-4 is as good, 4e-4 unstable [ours; 2e-6 at 1.3B: CausVid]
    lr_fake: float = 2e-4           # fake score learning rate [ours]
    lr_head: float = 1e-3           # head learning rate [ours]
    ema: float = 0.95               # decay of the student's average [ours; 0.99 at 1.3B: Self-Forcing, from step 200]
    clip_norm: float = 1.0          # gradient norm at which each network is clipped [ours; 10 at 1.3B: DMD2]
    log_every: int = 5              # student updates between log lines
    save_every: int = 20            # student updates between checkpoints and panels


PRESETS = {                         # the first one is the default; its values replace those above
    "tiny":  dict(),
    "small": dict(model="small", out="out/small", clips=4000, batch=16, steps=1000, aux_warmup=200, head_channels=128,
                  lr=2e-5, lr_fake=4e-5, lr_head=1e-4, ema=0.99, log_every=10, save_every=100),
    "wan1.3b": dict(model="wan1.3b", out="out/wan1.3b", clips=2000, batch=1, accumulate=8, steps=2000, aux_warmup=200,
                    shift=5.0, head_channels=512, lr=2e-6, lr_fake=2e-6, lr_head=1e-5, ema=0.99, clip_norm=10.0,
                    checkpointing=True, log_every=10, save_every=25),
}

# ----------------------------------------------------------------------------
# the maths of this stage


def score_times(u, t_min, t_max, shift):
    """t = t_min + (t_max - t_min) shift(u), u: (B,) uniform. Clamping would put 9 % of them at t_max at shift 5."""
    return t_min + (t_max - t_min) * M.time_shift(u, shift)


def dmd_gradient(z_0, x_real, x_fake):
    """The DMD direction in z_0, normalised per sample: (x_fake - x_real) / mean |z_0 - x_real|, Eq. (8) of DMD.

    x_real, x_fake: (B, C, T, H, W) clean estimates of the two score models at the same z_t. Since x = z_t - t v this is
    t (v_real - v_fake) over the normaliser: in velocities the sign turns. Where it comes from: a score is the gradient
    of a log density, s = grad log p(z_t) = -(z_t - (1 - t) x) / t^2. The KL divergence of the student's distribution
    from the teacher's has the gradient E[(s_fake - s_real) dz_t/dtheta], with dz_t = (1 - t) dz_0: in z_0 it is
    x_fake - x_real with the weight ((1 - t) / t)^2, and the normaliser takes the place of that weight.
    Returns (g, keep): keep (B,) is 0 for a sample whose mean |g| exceeds 10 (a spike, no direction [ours]) or is not
    finite.
    """
    axes = (1, 2, 3, 4)
    scale = (z_0 - x_real).abs().mean(dim=axes, keepdim=True).clamp_min(1e-5)
    g = (x_fake - x_real) / scale
    keep = (g.abs().mean(dim=axes) < 10).float()                        # false for NaN as well
    return torch.nan_to_num(g, 0, 0, 0), keep                           # as 0 times inf would be NaN


def dmd_loss(z_0, g, keep, half=True):
    """L_DMD = 1/2 mean (z_0 - sg[z_0 - g])^2: a number whose gradient in z_0 is g / (elements of z_0).

    z_0: student output, with gradient. Its value is mean g^2 / 2 and says nothing about progress.
    """
    target = (z_0 - g).detach()                                         # the stop-gradient makes g the gradient
    loss = (M.bcast(keep, z_0) * (z_0 - target).square()).mean()
    return 0.5 * loss if half else loss


def hinge_d(logits_hr, logits_s):
    """L_D = E max(0, 1 - D(z_t^HR)) + E max(0, 1 + D(z_t^S)), the mean over patches taken after the hinge."""
    return F.relu(1 - logits_hr).mean() + F.relu(1 + logits_s).mean()


def hinge_g(logits_s):
    """L_G = -E D(z_t^S)."""
    return -logits_s.mean()


def fm_loss(f_s, f_hr, norm="mse"):
    """L_FM: distance of the student's score-model features from those of HR, (B, N, D) each, averaged over the list.

    Features are normalised over D, so a term of "mse" lies in [0, 4] and is 2 for unrelated ones. HR's are the target.
    """
    distance = F.mse_loss if norm == "mse" else F.l1_loss
    pairs = zip(f_s, f_hr, strict=True)
    return sum(distance(M.normalise(s), M.normalise(hr).detach()) for s, hr in pairs) / len(f_s)


# ----------------------------------------------------------------------------


def uses_scores(cfg):
    """Whether a stream needs the score models and the head; regression alone does not."""
    return bool({"dmd", "gan"} & set(cfg.streams))


def reads(cfg):
    """Whether the head reads the features of the real score model, and of the fake one."""
    return cfg.features != "fake", cfg.features != "real"


def check(cfg):
    common.check_fields(cfg, model=tuple(M.MODELS), order=("joint", "sequential"), features=("both", "real", "fake"),
                         real_score=("cfg", "teacher"), fm_norm=("mse", "l1"), init=("stage1", "cfg"))
    if not set(cfg.streams) <= {"dmd", "gan", "mse"} or not cfg.streams:
        raise SystemExit(f"streams {cfg.streams!r}: a tuple of dmd, gan, or both; mse for comparison")
    if cfg.order == "sequential" and set(cfg.streams) != {"dmd", "gan"}:
        raise SystemExit("order sequential needs both streams")
    if not 0 <= cfg.t_min < cfg.t_max <= 1:
        raise SystemExit(f"t_min {cfg.t_min}, t_max {cfg.t_max}: times between 0 and 1, the smaller first")


def main(cfg):
    check(cfg)
    if cfg.dry_run:
        return cost.report("stage II", cfg, passes(cfg))
    rank, world, device = common.setup()
    out_dir = f"{cfg.out}/stage2"
    if rank == 0:
        common.start_run(out_dir, cfg)
    autocast = common.autocast(device)

    # real: frozen score model; fake: trained score model, a multi-step model like real, from which it starts;
    # head: discriminator head on the features of both; ema: average of the student's weights, for use, never fed back
    source = f"{cfg.out}/stage1/last.pt"
    which = "student" if cfg.init == "stage1" else "cfg"
    student, vae, _ = M.load_checkpoint(source, which, device, cfg.model, finished=True)
    fake, _, _ = M.load_checkpoint(source, "cfg", device, cfg.model, finished=True)
    real = deepcopy(fake)
    if cfg.real_score == "teacher":
        teacher, stage1 = M.teacher_file(cfg), M.read_checkpoint(source)
        real = M.load_checkpoint(teacher, "ema", device, cfg.model, finished=True)[0]
        if stage1["source"] != common.contents(teacher):
            raise SystemExit(f"{teacher}: not the teacher that stage I was made from; run stage1_pd.py again")
    bank = data.training_bank(cfg, rank, cfg.latents)
    window, H, W = data.crop_shape(cfg.model)
    if common.precision(device) == torch.bfloat16:
        M.to_bf16(real)                                                 # frozen: nothing needs its fp32 weights
    ema = deepcopy(student)
    for net in (student, fake, real):
        net.checkpointing = cfg.checkpointing
    taps = M.tap_blocks(len(real.blocks))
    reads_real, reads_fake = reads(cfg)
    common.reseed(cfg.seed, "head")
    head = M.RFSHead(M.MODELS[cfg.model]["dim"], len(taps), cfg.head_channels, (window, H // 2, W // 2),
                     models=reads_real + reads_fake, pooled=cfg.pooled).to(device)
    for net in (student, fake):
        net.requires_grad_(True)
    # beta_1 = 0, as Self-Forcing; the head learns sooner with momentum (LOG.md, "why the head did not learn"). No
    # weight decay: at these rates it would move nothing
    opt_student = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.0, 0.999), weight_decay=0)
    opt_fake = torch.optim.AdamW(fake.parameters(), lr=cfg.lr_fake, betas=(0.0, 0.999), weight_decay=0)
    opt_head = torch.optim.AdamW(head.parameters(), lr=cfg.lr_head, betas=(0.9, 0.999), weight_decay=0)

    # in the file "student" is the average, which stage III and infer.py read, "net" what --resume goes on from
    saved = dict(student=ema, net=student, fake=fake, head=head, vae=vae,
                 opt_student=opt_student, opt_fake=opt_fake, opt_head=opt_head, source=common.contents(source))
    # the steps before 0 are the warm-up: auxiliary updates alone, until fake score and head know the student
    warmup = cfg.aux_warmup if uses_scores(cfg) else 0
    start = common.continue_from(f"{out_dir}/last.pt", cfg, saved, fresh=-warmup)
    student_ddp, fake_ddp, head_ddp = (common.parallel(net, world) for net in (student, fake, head))
    parts = world * cfg.accumulate

    backbones = [net for net, reads in ((real, reads_real), (fake, reads_fake)) if reads]

    def next_batch(step, k, part):
        """One part of the batch of a step's update k: latents of HR and LR, and the noise the student starts from.
        The auxiliary updates are k = 0, 1, ..., the student's is k = aux_per_student."""
        common.reseed(cfg.seed, "stage 2", step, k)
        per_step = 1 if step < 0 else cfg.aux_per_student + 1
        update = cfg.aux_warmup + step * per_step + k                   # updates so far: each has clips of its own
        pair = bank.latents(vae, (update * parts + part) * cfg.batch, cfg.batch, device)
        z_hr, z_lr = data.random_window(window, *pair)
        return z_hr, z_lr, common.draw(torch.randn, z_lr.shape, part, parts, device)

    def time_and_noise(z, part):
        """Score times, one per clip, and the noise that is added there. All losses of one update share them, so that
        student and HR differ by content alone (without gan_same_noise L_D draws anew for HR). Not eps_in: the score
        models know only noise that is independent of z_0."""
        u = common.draw(torch.rand, (len(z),), part, parts, device)
        return (score_times(u, cfg.t_min, cfg.t_max, cfg.shift),
                common.draw(torch.randn, z.shape, part, parts, device))

    def score(net, z_t, t, z_lr):
        """(velocity, features of the tapped blocks) of a score model."""
        with autocast:
            v, features = net(z_t, t, z_lr, M.prompt(z_t), taps)
        return v.float(), features

    @torch.no_grad()
    def features_of_hr(z_t, t, z_lr):
        """What the head and L_FM see of HR: no gradient is wanted there."""
        return [f for net in backbones for f in score(net, z_t, t, z_lr)[1]]

    bar = tqdm(range(start, cfg.steps), "stage II", initial=start + warmup, total=cfg.steps + warmup,
               disable=rank > 0, dynamic_ncols=True)
    head_trains = "gan" in cfg.streams                                  # "sequential": in DMD's half too
    warm = []                                                           # L_D over the warm-up
    for step in bar:
        active = set(cfg.streams)
        if cfg.order == "sequential":
            active = {"dmd"} if step < cfg.steps // 2 else {"gan"}
        gan = "gan" in active
        values = {}

        # 1) auxiliary updates: the fake score follows the student (L_Diff), the head tells it from HR (L_D)
        updates = 0 if not uses_scores(cfg) else 1 if step < 0 else cfg.aux_per_student
        for k in range(updates):
            for part, last in common.my_parts(rank, parts, world):      # this process's share of the batch
                z_hr, z_lr, eps_in = next_batch(step, k, part)
                with torch.no_grad(), autocast:                         # neither L_Diff nor L_D trains the student
                    z_0 = M.one_step(student, eps_in, z_lr)
                t, eps = time_and_noise(z_0, part)
                z_t = M.add_noise(z_0, eps, t)
                with common.accumulating(last, fake_ddp, head_ddp):
                    v_fake, f_fake = score(fake_ddp, z_t, t, z_lr)      # one forward for L_Diff and for L_D
                    loss_diff = F.mse_loss(v_fake, eps - z_0)
                    loss_d = torch.zeros((), device=device)
                    if head_trains:
                        t_hr, eps_hr = (t, eps) if cfg.gan_same_noise else time_and_noise(z_hr, part)
                        f_hr = features_of_hr(M.add_noise(z_hr, eps_hr, t_hr), t_hr, z_lr)
                        with torch.no_grad():
                            f_s = score(real, z_t, t, z_lr)[1] if reads_real else []
                        if reads_fake:
                            f_s = f_s + [f.detach() for f in f_fake]    # L_D trains the head, not the fake score
                        with autocast:                                  # HR and the student's sample as one batch
                            logits = head_ddp([torch.cat(pair) for pair in zip(f_hr, f_s, strict=True)])
                        logits_hr, logits_s = logits.float().chunk(2)
                        loss_d = hinge_d(logits_hr, logits_s)
                    ((loss_diff + loss_d) / cfg.accumulate).backward()  # different weights: one backward does both
            values = dict(diff=loss_diff, grad_norm_fake=common.clip_and_step(opt_fake, fake, cfg.clip_norm))
            if head_trains:
                common.clip_and_step(opt_head, head, cfg.clip_norm)
                values["d"] = loss_d
            for optimiser in (opt_fake, opt_head):
                optimiser.zero_grad()                                   # frees the gradients, but for DDP's buckets
        if step < 0:
            warm.append(loss_d.item())
            bar.set_postfix_str(f"warm-up: diff {loss_diff.item():.3g} d {warm[-1]:.3g}")
            if step == -1:                                              # the log's line 0: what the head has learnt
                learnt = common.mean(statistics.mean(warm[-30:]))
                if rank == 0:
                    if head_trains:
                        common.log_row(out_dir, "log.jsonl", 0, d_warmup=learnt)
                    common.save(f"{out_dir}/last.pt", cfg, "stage2", 0, cfg.steps, **saved)
            continue

        # 2) student update: L = w_dmd L_DMD + w_gan L_G + w_fm L_FM, all on one noised student sample
        #    (and |z_0 - z_hr|^2, if stream mse was asked for)
        for net in (fake, head):
            net.requires_grad_(False)                                   # they pass gradient on to z_0 but take none
        opt_student.zero_grad()
        done = step + 1
        logs = done % cfg.log_every == 0 or done == cfg.steps
        for part, last in common.my_parts(rank, parts, world):
            z_hr, z_lr, eps_in = next_batch(step, cfg.aux_per_student, part)
            with common.accumulating(last, student_ddp):
                with autocast:
                    z_0 = M.one_step(student_ddp, eps_in, z_lr)
                losses = {}                                             # already weighted, and so logged
                if "mse" in active:
                    losses["mse"] = F.mse_loss(z_0, z_hr)
                if uses_scores(cfg):
                    t, eps = time_and_noise(z_0, part)
                    z_t = M.add_noise(z_0, eps, t)
                    with torch.set_grad_enabled(gan and reads_real):    # a graph where the GAN reads the features
                        v_real, f_real = score(real, z_t, t, z_lr)
                    with torch.set_grad_enabled(gan and reads_fake):
                        v_fake, f_fake = score(fake, z_t, t, z_lr)
                    with torch.no_grad():                               # in the KL gradient both scores are constants
                        if cfg.real_score == "teacher":
                            with autocast:
                                v_neg = real(z_t, t, z_lr, M.prompt(z_t, M.AGAINST)).float()
                            v_real = M.guide(v_real, v_neg, stage1["config"]["cfg_w"])
                        x_real, x_fake = M.to_x0(z_t, v_real, t), M.to_x0(z_t, v_fake, t)
                        g, keep = dmd_gradient(z_0, x_real, x_fake)
                if "dmd" in active:
                    losses["dmd"] = cfg.w_dmd * dmd_loss(z_0, g, keep, cfg.dmd_half)
                if gan:
                    f_s = (f_real if reads_real else []) + (f_fake if reads_fake else [])
                    f_hr = features_of_hr(M.add_noise(z_hr, eps, t), t, z_lr)
                    with autocast:
                        losses["gan"] = cfg.w_gan * hinge_g(head(f_s).float())
                    losses["fm"] = cfg.w_fm * fm_loss(f_s, f_hr, cfg.fm_norm)
                if logs and last:
                    pull = health.loss_gradients(losses, z_0)
                (sum(losses.values()) / cfg.accumulate).backward()
        norm = common.clip_and_step(opt_student, student, cfg.clip_norm)
        common.ema_update(ema, student, cfg.ema)
        for net in (fake, head):
            net.requires_grad_(True)

        # 3) log, save, panel
        if logs:
            z_0 = z_0.detach()
            values |= dict(grad_norm=norm, detail=health.detail(z_0, z_lr, z_hr), **losses,
                           **{f"pull_{k}": v.norm() for k, v in pull.items()})
            if uses_scores(cfg):
                values |= health.dmd(z_0, x_real, x_fake, g, keep, pull.get("dmd", g))
                # lag: fake's error on the student's outputs over real's; at 1 it has learnt nothing of the student
                values |= dict(lag=health.ratio(v_fake, eps - z_0, v_real),
                               detail_real=health.detail(x_real, z_lr, z_hr))
            if {"dmd", "gan"} <= set(pull):
                values["dmd_gan_cosine"] = health.cosine(pull["dmd"], pull["gan"])
            values = {k: common.mean(v) for k, v in values.items()}
            if rank == 0:
                common.log(out_dir, bar, done, **values)
        if rank == 0 and (done % cfg.save_every == 0 or done == cfg.steps):
            common.save(f"{out_dir}/last.pt", cfg, "stage2", done, cfg.steps, **saved)
            z_hr, z_lr, eps_in = data.panel_batch(bank, vae, window, cfg.seed, device)
            with torch.no_grad():
                with autocast:
                    z_0 = M.one_step(ema, eps_in, z_lr)
                t = torch.full((len(z_0),), 0.5, device=device)
                z_t = M.add_noise(z_0, torch.randn_like(z_0), t)
                # of a guided teacher (real_score) panel and offsets show its pass under the prompt alone
                x_real, x_fake = (M.to_x0(z_t, score(net, z_t, t, z_lr)[0], t) for net in (real, fake))
            rows = health.spatial_offsets(lambda z_t, t, z_lr=z_lr: M.to_x0(z_t, score(real, z_t, t, z_lr)[0], t),
                                          z_0, z_hr, vae, torch.randn_like(z_0))    # not the noise that made z_0
            common.log_row(out_dir, "offsets.jsonl", done, px=rows)
            columns = {"LR": z_lr, "student": z_0, "real score's x0, t = 0.5": x_real, "fake score's x0": x_fake,
                       "HR, coded": z_hr}
            columns = {title: vae.decode(z) for title, z in columns.items()}
            common.panel(f"{out_dir}/panel.png", columns, health.stage2(
                out_dir, rows, health.detail(z_0, z_lr, z_hr).item(),
                [health.lattice(columns[k], vae.stride) for k in ("student", "HR, coded")]))
    common.cleanup()


# ----------------------------------------------------------------------------
# what a step costs


def passes(cfg):
    """DiT passes of an iteration, aux_per_student auxiliary updates and one of the student, for cost.py:
    {network: how it is kept and (forward alone, input gradient, full)}. With both streams 30 forwards' worth."""
    scores, gan = int(uses_scores(cfg)), "gan" in cfg.streams
    aux, guided = scores * cfg.aux_per_student, scores * (cfg.real_score == "teacher")
    real, fake = (int(gan and read) for read in reads(cfg))
    counts = {
        "student": ("trained", aux, 0, 1),      # forward alone in auxiliary updates, in full in its own
        "ema": ("average", 0, 0, 0),
        # in full in auxiliary updates. In the student's: forward, with input gradient if its features are read; they
        # are read of HR in every update
        "fake": ("trained", fake * (aux + 1) + (scores - fake), fake, aux),
        # the same, but in auxiliary updates forward alone, if its features are read; guided: AGAINST as well
        "real": ("frozen bf16", real * (2 * aux + 1) + (scores - real) + guided, real, 0)}
    return {name: (kept, *(cfg.accumulate * k for k in numbers)) for name, (kept, *numbers) in counts.items()}


if __name__ == "__main__":
    common.run(main, Config, PRESETS)
