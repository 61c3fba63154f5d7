"""Stage 0: the multi-step teacher, a flow-matching video super-resolution model.

The paper starts from such a model and does not describe its training; this one follows SeedVR where it can.

    python stage0_teacher.py                                    # tiny, on a CPU
    torchrun --nproc_per_node=8 stage0_teacher.py --preset small
    python stage0_teacher.py --init weights/tiny_teacher.pt --data FOLDER       # more training, on your own footage
    torchrun --nproc_per_node=8 stage0_teacher.py --preset wan1.3b --weights WAN --vae WAN --prompts prompts.safetensors

Reads   the videos and photographs under --data; the checkpoint --init, if one is named.
Writes  out/<preset>/stage0/last.pt: net, ema (the teacher that stage I reads), vae, optimiser; run.json, log.jsonl,
        panel.png, loss.png.

Differs from the paper: (1) tiny and small are trained from scratch, with a linear patch code in place of its video VAE,
and go on from a first guess of z_0 by a few convolutions, which have a loss of their own; (2) three prompts, none,
"high quality" and "low quality", learned at tiny and small, embeddings of UMT5 at wan1.3b, in place of captions; the
targets of "low quality" clips are blurred, so that classifier-free guidance has a direction (as SUPIR does with
images); (3) tiny and small see a light degradation, LIGHT in degradation.py.
"""
from copy import deepcopy
from dataclasses import dataclass

import torch
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
    out: str = "out/tiny"           # folder of the run; this stage writes <out>/stage0
    data: str = "samples/train"     # folder of videos and photographs
    clips: int = 256                # degraded clips kept on disk, from which crops are cut
    latents: str = ""               # file of data.py prepare --latents, used instead of data; "": none
    init: str = ""                  # checkpoint whose ema and video code to start from; "": from scratch
    weights: str = ""               # Wan2.1's transformer: file or folder, either layout; "random": none (wan1.3b)
    vae: str = ""                   # Wan2.1's video code: file or folder, either layout; "random": none (wan1.3b)
    prompts: str = ""               # file of data.py prompts; "random": none (wan1.3b)
    resume: bool = False            # continue from the last checkpoint
    seed: int = 0                   # of weights, clips and noise
    batch: int = 8                  # crops per process and pass
    accumulate: int = 1             # passes whose gradients add up to one step; the last is logged
    checkpointing: bool = False     # keep only the inputs of blocks, compute the rest twice: less memory
    compile: bool = False           # torch.compile of the blocks: 1.25 times as fast on a CPU with g++, after 20 s
    dry_run: bool = False           # print what a step costs, in passes, FLOPs and memory, and stop
    steps: int = 5_500              # optimiser steps
    lr: float = 1e-3                # AdamW learning rate after warm-up [ours]
    warmup: int = 200               # steps from 0 to lr
    decay: float = 0.3              # last share of the steps, in which lr falls to 0
    ema: float = 0.999              # decay of the averaged weights; at first (step + 1) / (step + 10) [SeedVR: 0.9998]
    text_drop: float = 0.1          # share of clips that get the prompt NULL, for AGAINST = NULL; z_lr is never dropped
    negative: float = 0.25          # share of clips with softened target and the negative prompt [SUPIR]
    lr_noise: float = 0.1           # z_lr <- (1 - a) z_lr + a n, a ~ U(0, lr_noise) [SeedVR: 0.25]
    shift: float = 1.0              # of the training times, uniform at 1 [SeedVR: 5 for large videos, logit-normal]
    log_every: int = 20             # steps between log lines
    save_every: int = 500           # steps between checkpoints and panels


PRESETS = {                         # the first one is the default; its values replace those above
    "tiny":  dict(),
    "small": dict(model="small", out="out/small", clips=4000, batch=16, lr=3e-4, warmup=1000),
    "wan1.3b": dict(model="wan1.3b", out="out/wan1.3b", clips=2000, batch=1, accumulate=8, steps=10_000, lr=2e-5,
                    lr_noise=0.25, shift=5.0, ema=0.9998, checkpointing=True),
}

# ----------------------------------------------------------------------------
# the maths of this stage


def flow_loss(net, z_0, z_lr, text, t, eps):
    """Flow-matching loss E ||v(z_t, t, z_lr, c) - (eps - z_0)||^2 per sample, (B,). z_0, z_lr, eps: (B, C, T, H, W)."""
    v = net(M.add_noise(z_0, eps, t), t, z_lr, text).float()
    return (v - (eps - z_0)).square().mean(dim=(1, 2, 3, 4))


def guess_loss(net, z_0, z_lr):
    """E ||g(z_lr) - z_0||^2 per sample, (B,), of the first guess g: least for g(z_lr) = E[z_0 | z_lr].
    Where the network makes none (wan1.3b), 0."""
    if net.predictor is None:
        return z_0.new_zeros(len(z_0))
    return (net.predictor(z_lr).float() - z_0).square().mean(dim=(1, 2, 3, 4))


def draw_prompts(u_negative, u_drop, negative, text_drop):
    """Prompt ids (B,) and which targets to soften (B,) bool, from uniform numbers (B,).

    A dropped prompt keeps its clip's target: NULL learns the mixture of both qualities.
    """
    soft = u_negative < negative
    text = torch.where(soft, M.NEGATIVE, M.POSITIVE)
    return torch.where(u_drop < text_drop, M.NULL, text), soft


def learning_rate(step, cfg):
    """Linear warm-up, constant, linear decay to 0 over the last share of the steps."""
    return cfg.lr * min(1, (step + 1) / max(1, cfg.warmup), (cfg.steps - step) / max(1, cfg.decay * cfg.steps))


# ----------------------------------------------------------------------------


def start_networks(cfg, bank, device):
    """(network, video code) to start from: a checkpoint, Wan2.1, or a fresh network and a code that suits the clips."""
    if cfg.init:
        net, vae, _ = M.load_checkpoint(cfg.init, "ema", device, cfg.model)
        return net.requires_grad_(True), vae
    common.reseed(cfg.seed, "weights")
    net, vae = M.build(cfg.model).to(device), M.build_vae(cfg.model)
    if isinstance(bank, data.LatentBank):
        vae.load_state_dict(bank.about["vae"])
    elif isinstance(vae, M.PatchVAE):                                   # the same data give the same code on every rank
        vae.fit(bank.batch(0, min(64, len(bank)))[0])
    elif cfg.vae != "random":
        M.load_wan_vae(vae, cfg.vae)
    vae.to(device).requires_grad_(False)
    if not M.MODELS[cfg.model]["learned"]:
        if cfg.weights != "random":
            M.load_wan(net, cfg.weights)
        if cfg.prompts != "random":
            net.prompts.copy_(M.read_prompts(cfg.prompts, net.prompts.shape))
    if net.residual is not None:                                        # of z_hr - z_lr, for model.linear_velocity
        z_hr, z_lr = bank.latents(vae, 0, min(64, len(bank)), device)
        net.residual.copy_((z_hr - z_lr).square().mean(dim=(0, 2, 3, 4)))
    return net, vae


def check(cfg):
    """Every file that is needed is named, and none that would not be read."""
    from_wan = not M.MODELS[cfg.model]["learned"] and not cfg.init
    wanted = [name for name in ("weights", "vae", "prompts") if from_wan and not (name == "vae" and cfg.latents)]
    if unread := [name for name in ("weights", "vae", "prompts") if vars(cfg)[name] and name not in wanted]:
        why = "--init has it" if cfg.init else "--latents has it" if from_wan else f"{cfg.model} starts from scratch"
        raise SystemExit(f"--{', --'.join(unread)}: not read here ({why}); leave it out")
    if missing := [name for name in wanted if not vars(cfg)[name]]:
        raise SystemExit(f"{cfg.model} starts from Wan2.1: name --{', --'.join(missing)} (docs/wan.md)")
    if cfg.init:
        M.read_checkpoint(cfg.init)                                     # now, not after the clips are made


def main(cfg):
    common.check_fields(cfg, model=tuple(M.MODELS))
    if cfg.dry_run:
        return cost.report("stage 0", cfg, passes(cfg))
    check(cfg)
    rank, world, device = common.setup()
    out_dir = f"{cfg.out}/stage0"
    if rank == 0:
        common.start_run(out_dir, cfg)
    bank = data.training_bank(cfg, rank, cfg.latents)
    window = data.crop_shape(cfg.model)[0]                              # latent frames
    autocast = common.autocast(device)

    # networks, then resume, then DDP: nothing is loaded into a wrapper
    net, vae = start_networks(cfg, bank, device)
    net.checkpointing = cfg.checkpointing
    ema = deepcopy(net).requires_grad_(False)
    optimiser = torch.optim.AdamW(net.parameters(), lr=cfg.lr, weight_decay=0.01)
    saved = dict(net=net, ema=ema, vae=vae, optimiser=optimiser)
    start = common.continue_from(f"{out_dir}/last.pt", cfg, saved)
    if cfg.compile:
        M.compile_blocks(net)
    ddp, parts = common.parallel(net, world), world * cfg.accumulate

    bar = tqdm(range(start, cfg.steps), "stage 0", initial=start, total=cfg.steps, disable=rank > 0, dynamic_ncols=True)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, cfg)
        optimiser.zero_grad()
        for part, last in common.my_parts(rank, parts, world):          # this process's share of the batch
            common.reseed(cfg.seed, "stage 0", step)
            B = cfg.batch

            # 1) a batch: softened targets go with the negative prompt, some prompts are dropped, z_lr gets some noise
            u_negative, u_drop, u_soft, u_lr, u_t = common.draw(torch.rand, (B, 5), part, parts, device).T
            text, soft = draw_prompts(u_negative, u_drop, cfg.negative, cfg.text_drop)     # data.soften blurs them
            pair = bank.latents(vae, (step * parts + part) * B, B, device, soft, u_soft)
            z_0, z_lr = data.random_window(window, *pair)
            a = M.bcast(cfg.lr_noise * u_lr, z_lr)
            z_lr = (1 - a) * z_lr + a * common.draw(torch.randn, z_lr.shape, part, parts, device)

            # 2) one flow-matching step
            t = M.time_shift(u_t, cfg.shift)
            eps = common.draw(torch.randn, z_0.shape, part, parts, device)
            with common.accumulating(last, ddp):
                with autocast:
                    losses = flow_loss(ddp, z_0, z_lr, text, t, eps)
                    # the guess sees no prompt, so it learns sharp targets alone; not by ddp: one backward sums both
                    guess = ~soft * guess_loss(net, z_0, z_lr)
                ((losses + guess).mean() / cfg.accumulate).backward()
        norm = common.clip_and_step(optimiser, net, 1.0)
        common.ema_update(ema, net, min(cfg.ema, (step + 1) / (step + 10)))

        # 3) log, panel, save
        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.steps:
            values = {"loss": common.mean(losses.mean())}
            if net.predictor is not None:
                values["guess"] = common.mean(guess.sum()) / max(common.mean((~soft).sum()), 1e-9)
            if rank == 0:
                common.log(out_dir, bar, done, **values, grad_norm=norm.item(), lr=learning_rate(step, cfg))
        if rank == 0 and (done % cfg.save_every == 0 or done == cfg.steps):
            common.save(f"{out_dir}/last.pt", cfg, "stage0", done, cfg.steps, **saved)
            z_0, z_lr, eps = data.panel_batch(bank, vae, window, cfg.seed, device)
            with torch.no_grad(), autocast:
                shown = {} if ema.predictor is None else {"first guess": ema.predictor(z_lr).float()}
                for title, steps, w in (("1 step", 1, 0), ("8 steps", 8, 0), ("8 steps, w = 0.5", 8, 0.5)):
                    shown[title] = M.sample(ema, eps, z_lr, steps, cfg.shift, w)
            columns = {title: vae.decode(z) for title, z in {"LR": z_lr, **shown, "HR, coded": z_0}.items()}
            common.panel(f"{out_dir}/panel.png", columns, health.stage0(out_dir))
    common.cleanup()


# ----------------------------------------------------------------------------
# what a step costs


def passes(cfg):
    """DiT passes of a step, for cost.py: {network: how it is kept and (forward alone, input gradient, full)}."""
    return {"net": ("trained", 0, 0, cfg.accumulate), "ema": ("average", 0, 0, 0)}


if __name__ == "__main__":
    common.run(main, Config, PRESETS)
