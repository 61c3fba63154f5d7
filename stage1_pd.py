"""Stage I: from the multi-step teacher to the one-step student that stage II starts from.

First CFG distillation: the guided velocity that took two passes is learnt in one. Then progressive distillation: a
student learns to do in one step what its teacher does in two, becomes the teacher, and so on from 64 steps to 1.

    python stage1_pd.py                                         # tiny, on a CPU
    torchrun --nproc_per_node=8 stage1_pd.py --preset small

Reads   out/<preset>/stage0/last.pt (ema), or weights/tiny_teacher.pt if there is none.
Writes  out/<preset>/stage1/last.pt: cfg (guided multi-step model, the real score of stage II), student (one step),
        vae, and what --resume needs; log.jsonl, panel.png, loss.png.

Differs from the paper: (1) the loss compares velocities. Comparing end points (pd_space = "z", the paper's) weighs a
step by its squared length: at shift 1 all weigh the same, at shift 5 the longest of 32 steps 470 times as much as the
shortest; (2) guidance is (1 + w) v(c) - w v(neg). A public summary of the paper lacks the second w, without
which c = neg would not give v(neg); (3) neg is the low-quality prompt (AGAINST in model.py), not no text: the
tiny teacher hardly tells none from the good one.
"""
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
    out: str = "out/tiny"           # folder of the run; this stage writes <out>/stage1
    data: str = "samples/train"     # folder of videos and photographs
    clips: int = 96                 # degraded clips kept on disk, from which crops are cut
    latents: str = ""               # file of data.py prepare --latents, used instead of data; "": none
    resume: bool = False            # continue from the last checkpoint
    seed: int = 0                   # of clips and noise
    batch: int = 4                  # crops per process and pass
    accumulate: int = 1             # passes whose gradients add up to one step; the last is logged
    checkpointing: bool = False     # keep only the inputs of blocks, compute the rest twice: less memory
    dry_run: bool = False           # print what a step costs, in passes, FLOPs and memory, and stop
    cfg_w: float = 0.5              # guidance weight, the usual scale is 1 + w; w = 1 adds grain [ours]
    cfg_steps: int = 60             # steps of CFG distillation [not in the paper's summary]
    cfg_lr: float = 1e-4            # its learning rate, linear to 0 [ours]
    pd_grid: tuple = (64, 32, 16, 8, 4, 2, 1)   # Euler steps of each teacher, and of the last student [paper]
    steps_per_phase: int = 60       # steps until the student becomes the teacher [paper: 500]
    pd_lr: float = 5e-4             # learning rate: pd_lr / sqrt(n) where the student has n steps, linear to 0 [ours]
    pd_space: str = "v"             # "v": compare velocities [Salimans & Ho]; "z": compare end points [paper]
    shift: float = 1.0              # time shift of all grids; they nest only if it never changes [Wan: 5 for 720p]
    log_every: int = 10             # steps between log lines
    save_every: int = 100           # steps between checkpoints; a panel at the end of most phases


PRESETS = {                         # the first one is the default; its values replace those above
    "tiny":  dict(),
    "small": dict(model="small", out="out/small", clips=4000, batch=16, cfg_steps=500, cfg_lr=5e-5,
                  steps_per_phase=500, pd_lr=1e-4, save_every=500),
    "wan1.3b": dict(model="wan1.3b", out="out/wan1.3b", clips=2000, batch=1, accumulate=8, cfg_w=2.0, cfg_steps=1000,
                    cfg_lr=1e-5, steps_per_phase=500, pd_lr=1e-5, shift=5.0, checkpointing=True, save_every=500),
}

# ----------------------------------------------------------------------------
# the maths of this stage


def cfg_target(velocity, z_t, t, w):
    """(v_cfg, v_c): the teacher's guided velocity and its conditional part. velocity: (z, t, which prompt) -> v.

    The second pass changes the text and keeps z_lr.
    """
    v_c = velocity(z_t, t, M.POSITIVE)
    v_neg = velocity(z_t, t, M.AGAINST)
    return M.guide(v_c, v_neg, w), v_c


def pd_times(u, n, shift):
    """(t, t', t'') for a student of n steps: the ends t, t'' of one of its steps, the teacher's time t' between them.

    u: (B,) uniform in [0, 1) chooses the step. Only grid points are trained, as in Salimans & Ho.
    """
    fine = M.time_grid(2 * n, shift).to(u.device)
    i = (u * n).long()                                                  # step i runs from fine[2i + 2] to fine[2i]
    return fine[2 * i + 2], fine[2 * i + 1], fine[2 * i]


def pd_target(velocity, z_t, t, t_mid, t_end):
    """The velocity that takes z_t to t_end in one step where the teacher takes two, v* = (z_t - z_t'') / (t - t'').

    velocity: the teacher, (z, t) -> v. Returns (v*, the teacher's velocity at z_t), both like z_t.
    """
    v = velocity(z_t, t)
    z_mid = z_t - M.bcast(t - t_mid, z_t) * v
    z_end = z_mid - M.bcast(t_mid - t_end, z_t) * velocity(z_mid, t_mid)
    return (z_t - z_end) / M.bcast(t - t_end, z_t), v


def pd_loss(v, target, t, t_end, space="v"):
    """L_PD: mean squared error of velocities, or, space = "z", of the end points z_t - (t - t'') v as in the paper."""
    error = (v - target).square()
    if space == "z":
        error = M.bcast(t - t_end, v).square() * error
    return error.mean()


# ----------------------------------------------------------------------------


def check(cfg):
    common.check_fields(cfg, model=tuple(M.MODELS), pd_space=("v", "z"))
    halves = all(a == 2 * b for a, b in zip(cfg.pd_grid, cfg.pd_grid[1:], strict=False))
    if len(cfg.pd_grid) < 2 or not halves or cfg.pd_grid[-1] != 1:
        raise SystemExit(f"pd_grid {cfg.pd_grid}: two numbers at least, each half the one before, the last one 1")
    if min(cfg.cfg_steps, cfg.steps_per_phase) < 1:
        raise SystemExit("cfg_steps and steps_per_phase: at least 1")


def main(cfg):
    check(cfg)
    if cfg.dry_run:
        return cost.report("stage I", cfg, passes(cfg))
    rank, world, device = common.setup()
    out_dir = f"{cfg.out}/stage1"
    if rank == 0:
        common.start_run(out_dir, cfg)
    autocast = common.autocast(device)

    # teacher: what the student imitates in this phase; guided: the student as CFG distillation left it (file: "cfg")
    source = M.teacher_file(cfg)
    teacher, vae, _ = M.load_checkpoint(source, "ema", device, cfg.model, finished=True)
    bank = data.training_bank(cfg, rank, cfg.latents)
    window = data.crop_shape(cfg.model)[0]                              # latent frames
    student = deepcopy(teacher).requires_grad_(True)
    student.checkpointing = cfg.checkpointing
    guided = deepcopy(teacher)
    optimiser = torch.optim.AdamW(student.parameters(), lr=cfg.cfg_lr, weight_decay=0)
    saved = dict(student=student, cfg=guided, teacher=teacher, vae=vae, optimiser=optimiser,
                 source=common.contents(source))
    start = common.continue_from(f"{out_dir}/last.pt", cfg, saved)
    ddp, parts = common.parallel(student, world), world * cfg.accumulate

    phases = len(cfg.pd_grid) - 1
    total = cfg.cfg_steps + phases * cfg.steps_per_phase
    bar = tqdm(range(start, total), "stage I", initial=start, total=total, disable=rank > 0, dynamic_ncols=True)
    for step in bar:
        # 1) first CFG distillation, then the phases of progressive distillation (PD); where one of these begins, the
        #    student is the new teacher, and the optimiser forgets
        in_cfg = step < cfg.cfg_steps
        if in_cfg:
            n, lr = 0, cfg.cfg_lr * (1 - step / cfg.cfg_steps)
        else:
            phase, k = divmod(step - cfg.cfg_steps, cfg.steps_per_phase)        # k: step of the phase
            if k == 0:
                teacher.load_state_dict(student.state_dict())
                if phase == 0:
                    guided.load_state_dict(student.state_dict())
                optimiser.state.clear()
            n = cfg.pd_grid[phase + 1]                                  # steps of this phase's student
            # the more steps, the less there is to learn, and the less Adam's noise may move the student
            lr = cfg.pd_lr / n ** 0.5 * (1 - k / cfg.steps_per_phase)
        for group in optimiser.param_groups:
            group["lr"] = lr

        # 2) one step towards the teacher: its guided velocity, or two of its steps in one
        optimiser.zero_grad()
        for part, last in common.my_parts(rank, parts, world):          # this process's share of the batch
            common.reseed(cfg.seed, "stage 1", step)
            pair = bank.latents(vae, (step * parts + part) * cfg.batch, cfg.batch, device)
            z_0, z_lr = data.random_window(window, *pair)
            u = common.draw(torch.rand, (cfg.batch,), part, parts, device)
            eps = common.draw(torch.randn, z_0.shape, part, parts, device)

            def velocity(z, t, which=M.POSITIVE, z_lr=z_lr):            # z_lr=z_lr: that of this part
                with autocast:
                    return teacher(z, t, z_lr, M.prompt(z, which)).float()

            with torch.no_grad():       # v_start: the teacher's own v at z_t, that of a student that has learnt nothing
                if in_cfg:
                    t = M.time_shift(u, cfg.shift)
                    z_t = M.add_noise(z_0, eps, t)
                    target, v_start = cfg_target(velocity, z_t, t, cfg.cfg_w)
                else:
                    t, t_mid, t_end = pd_times(u, n, cfg.shift)
                    z_t = M.add_noise(z_0, eps, t)                      # at n = 1 this is eps: HR plays no part
                    target, v_start = pd_target(velocity, z_t, t, t_mid, t_end)
            with common.accumulating(last, ddp):
                with autocast:
                    v = ddp(z_t, t, z_lr, M.prompt(z_t)).float()
                loss = F.mse_loss(v, target) if in_cfg else pd_loss(v, target, t, t_end, cfg.pd_space)
                (loss / cfg.accumulate).backward()
        norm = common.clip_and_step(optimiser, student, 1.0)

        # 3) log, save, panel
        done = step + 1
        ends = done == cfg.cfg_steps if in_cfg else k + 1 == cfg.steps_per_phase
        if done % cfg.log_every == 0 or ends:
            values = dict(loss=common.mean(loss), ratio=common.mean(health.ratio(v.detach(), target, v_start)))
            if in_cfg:                                                  # how far v_cfg is from v_c at all
                values["guidance"] = common.mean((target - v_start).square().mean() / v_start.square().mean())
            if rank == 0:
                common.log(out_dir, bar, done, **values, student_steps=n, grad_norm=norm.item())
        if rank == 0 and (done % cfg.save_every == 0 or ends):
            common.save(f"{out_dir}/last.pt", cfg, "stage1", done, total, **saved)
        if rank == 0 and ends and (in_cfg or n <= 8):                   # longer grids cost more than they tell
            z_0, z_lr, eps = data.panel_batch(bank, vae, window, cfg.seed, device)
            many, few = (8, 8) if in_cfg else (2 * n, n)                # the teacher's steps, the student's
            with torch.no_grad(), autocast:
                before = M.sample(teacher, eps, z_lr, many, cfg.shift)
                after = M.sample(student, eps, z_lr, few, cfg.shift)
            names = ("teacher", "CFG-distilled") if in_cfg else (f"teacher, {many} steps", f"student, {few}")
            common.panel(f"{out_dir}/panel.png", {"LR": vae.decode(z_lr), names[0]: vae.decode(before),
                         names[1]: vae.decode(after), "HR, coded": vae.decode(z_0)}, health.stage1(out_dir, done))
    common.cleanup()


# ----------------------------------------------------------------------------
# what a step costs


def passes(cfg):
    """DiT passes of a step, for cost.py: {network: how it is kept and (forward alone, input gradient, full)}."""
    return {"student": ("trained", 0, 0, cfg.accumulate), "teacher": ("frozen", 2 * cfg.accumulate, 0, 0),
            "CFG-distilled": ("frozen", 0, 0, 0)}


if __name__ == "__main__":
    common.run(main, Config, PRESETS)
