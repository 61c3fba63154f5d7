"""The loops themselves, on networks and clips small enough for seconds: who moves, who gets whose gradient, resume."""
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import common
import data
import degradation
import health
import media
import metrics
import model as M
import stage0_teacher as stage0
import stage1_pd as stage1
import stage2_dual as stage2
import stage3_dpo as stage3
from tests.conftest import ROOT

SMALL_MODEL = dict(dim=32, layers=3, heads=2, ffn=64, text_dim=8, prompt_len=2, learned=True, predictor=4)
SMALL_CLIP = dict(frames=9, size=48, crop=32, window=2, strength="light")


def constants(out, footage):
    """The fields that make every stage take a second."""
    scale = dict(out=str(out), data=str(footage), clips=3, batch=2, log_every=1, save_every=2)
    return {stage0: stage0.Config(**scale, steps=4, warmup=2),
            stage1: stage1.Config(**scale, cfg_steps=2, steps_per_phase=2, pd_grid=(4, 2, 1)),
            # a slow head: behind its zero layer gradients begin at rounding level, and Adam steps by their signs
            stage2: stage2.Config(**scale, steps=4, aux_warmup=2, lr_head=1e-4),
            stage3: stage3.Config(**scale, steps=4, pairs=3, keep=1.0, candidates=2, lr=1e-3)}


def shrink():
    M.MODELS["tiny"], data.CLIPS["tiny"] = SMALL_MODEL, SMALL_CLIP


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    """A video of textured rectangles that move, 24 frames of 64 x 64."""
    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    world = np.kron(rng.integers(0, 256, (30, 30, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    frames = np.stack([world[i:i + 64, 2 * i:2 * i + 64] for i in range(24)])
    media.write_video(folder / "clip.mkv", frames, 24)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(M.MODELS, "tiny", SMALL_MODEL)
    monkeypatch.setitem(data.CLIPS, "tiny", SMALL_CLIP)
    monkeypatch.setattr(common, "panel", lambda *args: None)    # plots cost more than all the rest


@pytest.fixture(scope="module")
def chain(tmp_path_factory, footage):
    """All stages run once, one after the other; their configs."""
    kept = M.MODELS["tiny"], data.CLIPS["tiny"]
    shrink()
    configs = constants(tmp_path_factory.mktemp("run") / "tiny", footage)
    for stage, cfg in configs.items():
        stage.main(cfg)
    M.MODELS["tiny"], data.CLIPS["tiny"] = kept
    return configs


def checkpoint(cfg, stage):
    return torch.load(f"{cfg.out}/{stage}/last.pt", weights_only=True)


def moved(a, b):
    return any(not torch.equal(a[k], b[k]) for k in a)


def fork(chain, stage, tmp_path, upto, **changes):
    """A config that continues the chain's checkpoints before `stage` in a folder of its own."""
    cfg = type(chain[stage])(**vars(chain[stage]) | changes)
    os.makedirs(tmp_path / "tiny", exist_ok=True)
    for name in upto:
        if not os.path.exists(tmp_path / "tiny" / name):
            os.symlink(f"{cfg.out}/{name}", tmp_path / "tiny" / name)
    if not os.path.exists(tmp_path / "cache"):
        os.symlink(os.path.join(os.path.dirname(cfg.out), "cache"), tmp_path / "cache")
    cfg.out = str(tmp_path / "tiny")
    return cfg


def uniform_numbers_are(value, monkeypatch):
    """All that the loops draw from now on, and with it their times; noise is drawn as ever."""
    draw = common.draw
    monkeypatch.setattr(common, "draw", lambda sampler, shape, *rest: torch.full(shape, value) if sampler is torch.rand
                        else draw(sampler, shape, *rest))


def gradients_at(monkeypatch, stage, loss):
    """The gradients that reach this loss of the stage, pass by pass, from now on."""
    original, passed_on = getattr(stage, loss), []

    def spied(*args):
        value = original(*args)
        if value.requires_grad:
            value.register_hook(passed_on.append)
        return value
    monkeypatch.setattr(stage, loss, spied)
    return passed_on


def pairs_made(monkeypatch):
    """The numbers of the pairs of stage III that are written from now on."""
    made, put = [], common.put_state

    def spy(path, state):
        if "distance" in state:
            made.append(int(os.path.basename(path)[:-3]))
        put(path, state)
    monkeypatch.setattr(common, "put_state", spy)
    return made


def test_every_stage_writes_what_the_next_one_reads(chain):
    for k, (_stage, cfg) in enumerate(chain.items()):
        folder = f"{cfg.out}/stage{k}"
        for name in ("last.pt", "log.jsonl", "run.json", "panel.png", "loss.png"):
            assert os.path.getsize(f"{folder}/{name}") > 0, (k, name)
        lines = [json.loads(x) for x in open(f"{folder}/log.jsonl")]
        assert all(math.isfinite(v) for line in lines for v in line.values())
        assert json.load(open(f"{folder}/run.json"))["config"]["batch"] == 2
    s0, s1, s2, s3 = (checkpoint(cfg, f"stage{k}") for k, cfg in enumerate(chain.values()))
    assert moved(s0["ema"], s1["cfg"]) and moved(s1["cfg"], s1["student"])
    assert moved(s1["student"], s2["student"]) and moved(s2["student"], s3["student"])
    assert not moved(s0["vae"], s3["vae"])


def test_stage0_goes_on_from_a_checkpoint(chain, tmp_path):
    """--init takes the averaged weights and the video code over; warm-up starts from almost no learning rate."""
    source = f"{chain[stage0].out}/stage0/last.pt"
    cfg = fork(chain, stage0, tmp_path, [], init=source, steps=1, warmup=10**6)
    stage0.main(cfg)
    old, new = checkpoint(chain[stage0], "stage0"), checkpoint(cfg, "stage0")
    assert not moved(old["vae"], new["vae"])
    assert all((old["ema"][k] - new["net"][k]).abs().max() < 1e-6 for k in old["ema"])


@pytest.mark.parametrize("stage, loss, steps", [
    (stage0, "flow_loss", 4), (stage1, "pd_loss", 6), (stage3, "dpo_loss", 4)])
def test_a_stage_steps_down_the_mean_of_its_loss(chain, tmp_path, monkeypatch, stage, loss, steps):
    """Of all passes of a step, in sign and size."""
    upto = ["stage0", "stage1", "stage2"][:list(chain).index(stage)]
    cfg, passed_on = fork(chain, stage, tmp_path, upto, accumulate=2), gradients_at(monkeypatch, stage, loss)
    guided = gradients_at(monkeypatch, torch.nn.functional, "mse_loss") if stage is stage1 else []
    stage.main(cfg)
    passed_on += guided                                         # of CFG distillation
    assert len(passed_on) == 2 * steps and all(torch.equal(g, torch.full_like(g, 0.5 / g.numel())) for g in passed_on)


def test_stage0_measures_the_residual(chain, tmp_path):
    """The presets' linear velocity gets the mean square of z_hr - z_lr, channel by channel; all stages load it."""
    cfg = fork(chain, stage0, tmp_path, [], steps=1)
    stage0.main(cfg)
    net, vae, _ = M.load_checkpoint(f"{cfg.out}/stage0/last.pt", "ema")
    bank = data.training_bank(cfg, 0)
    hr, lr = bank.batch(0, 3)
    residual = vae.encode(hr) - vae.encode(data.upsample(lr, hr.shape[-2:]))
    torch.testing.assert_close(net.residual, residual.square().mean((0, 2, 3, 4)), rtol=0.2, atol=0.01)


def test_stage0_teaches_the_first_guess(chain, tmp_path, monkeypatch):
    """Its loss, known for a guess of z_lr and 0 for a right one, is added to L_flow; softened targets do not count."""
    net, (z_0, z_lr) = M.build("tiny"), torch.randn(2, 3, 16, 2, 4, 4)
    torch.testing.assert_close(stage0.guess_loss(net, z_0, z_lr), (z_lr - z_0).square().mean((1, 2, 3, 4)))
    assert not stage0.guess_loss(net, z_lr, z_lr).any()
    for negative, share in ((0.0, 0.5), (1.0, 0.0)):
        cfg = fork(chain, stage0, tmp_path / str(negative), [], steps=1, accumulate=2, negative=negative)
        passed_on = gradients_at(monkeypatch, stage0, "guess_loss")
        stage0.main(cfg)
        assert len(passed_on) == 2 and all(torch.equal(g, torch.full_like(g, share / g.numel())) for g in passed_on)


def test_stage0_logs_the_guess_of_sharp_targets(chain, tmp_path, monkeypatch):
    cfg = fork(chain, stage0, tmp_path, [], steps=1, batch=8, negative=0.5, log_every=1)
    guess_loss, draw_prompts, losses, softened = stage0.guess_loss, stage0.draw_prompts, [], []
    monkeypatch.setattr(stage0, "guess_loss", lambda *args: (losses.append(guess_loss(*args)), losses[-1])[1])
    monkeypatch.setattr(stage0, "draw_prompts", lambda *args: (softened.append(draw_prompts(*args)), softened[-1])[1])
    stage0.main(cfg)
    soft = softened[0][1]
    assert soft.any() and not soft.all()
    assert common.read_log(f"{cfg.out}/stage0")[-1]["guess"] == pytest.approx(losses[0][~soft].mean().item(), rel=1e-4)


def test_stage0_passes_on_its_constants(chain, tmp_path, monkeypatch):
    """With a noise of ones and the same uniform numbers for all: z_lr a fifth on its way to 1, t = 0.5 shifted by 5;
    the prompt is dropped, z_lr is not."""
    uniform = torch.tensor([0.9, 0.8, 0.3, 0.4, 0.5])           # negative, drop, soft, lr, t
    monkeypatch.setattr(common, "draw", lambda sampler, shape, *rest: uniform.expand(shape) if sampler is torch.rand
                        else torch.ones(shape))
    cfg = fork(chain, stage0, tmp_path, [], steps=3, save_every=3, lr_noise=0.5, shift=5.0, ema=0.15, text_drop=0.85)
    pairs, soft, asked, steps, decays = [], [], [], [], []
    window, latents, loss = data.random_window, data.Bank.latents, stage0.flow_loss
    step, average = common.clip_and_step, common.ema_update
    monkeypatch.setattr(data, "random_window", lambda *args: (pairs.append(window(*args)), pairs[-1])[1])
    monkeypatch.setattr(data.Bank, "latents", lambda *args: (soft.extend(args[6:]), latents(*args))[1])
    monkeypatch.setattr(stage0, "flow_loss", lambda *args: (asked.append(args), loss(*args))[1])
    monkeypatch.setattr(common, "clip_and_step", lambda optimiser, net, norm: (
        steps.append((norm, optimiser.param_groups[0]["weight_decay"])), step(optimiser, net, norm))[1])
    monkeypatch.setattr(common, "ema_update", lambda *args: (decays.append(args[2]), average(*args))[1])
    stage0.main(cfg)
    assert len(asked) == 3 and decays == pytest.approx([0.1, 0.15, 0.15]) and steps == [(1.0, 0.01)] * 3
    assert len(soft) == 3 and all(torch.equal(u, torch.full((2,), 0.3)) for u in soft)
    for (_, z_0, z_lr, text, t, eps), (hr, lr) in zip(asked, pairs, strict=False):
        assert torch.equal(z_0, hr) and (text == M.NULL).all() and (eps == 1).all()
        torch.testing.assert_close(z_lr, 0.8 * lr + 0.2)
        torch.testing.assert_close(t, torch.full((2,), 5 * 0.5 / (1 + 4 * 0.5)))


@pytest.mark.parametrize("stage", [stage0, stage1, stage2, stage3])
def test_every_seed_step_and_pair_draws_noise_of_its_own(chain, tmp_path, monkeypatch, stage):
    drawn, draw = [], common.draw

    def spied(*args):
        drawn.append(draw(*args))
        return drawn[-1]
    monkeypatch.setattr(common, "draw", spied)
    for seed in (0, 1):
        before = ["stage0", "stage1", "stage2"][:list(chain).index(stage)]
        cfg = fork(chain, stage, tmp_path / str(seed), before, seed=seed)
        stage.main(cfg)
        if stage is stage3:
            for i in range(cfg.pairs):
                drawn += stage3.read_pair(f"{cfg.out}/stage3/pairs/{i:05d}.pt")["noise"].float()
    assert len(drawn) > 8 and len({tuple(x.flatten()[:6].tolist()) for x in drawn}) == len(drawn)


def test_another_seed_is_another_run_of_stage0(chain, tmp_path, monkeypatch):
    """Other clips, weights, noise."""
    seen, loss = [], stage0.flow_loss
    monkeypatch.setattr(stage0, "flow_loss", lambda net, z_0, z_lr, text, t, eps: (
        seen.append((z_0, t, eps, next(net.parameters()).detach().clone())), loss(net, z_0, z_lr, text, t, eps))[1])
    for seed in (0, 1):
        stage0.main(fork(chain, stage0, tmp_path / str(seed), [], steps=1, seed=seed))
    assert len(seen) == 2 and not any(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_stage1_phases(chain, tmp_path, monkeypatch):
    """CFG distillation first, then the grid; the teacher is the last student; Adam starts afresh in each phase."""
    cfg = fork(chain, stage1, tmp_path, ["stage0"])
    seen, times, saved, save = [], stage1.pd_times, {}, common.save

    def spied_save(path, cfg, stage, step, total, /, **parts):
        save(path, cfg, stage, step, total, **parts)
        saved[step] = checkpoint(cfg, "stage1")
    monkeypatch.setattr(stage1, "pd_times", lambda u, n, s: (seen.append(n), times(u, n, s))[1])
    monkeypatch.setattr(common, "save", spied_save)
    stage1.main(cfg)
    assert seen == [2, 2, 1, 1]
    assert {int(s["step"]) for s in saved[6]["optimiser"]["state"].values()} == {2}
    assert not moved(saved[2]["student"], saved[6]["cfg"])      # what CFG distillation left
    assert not moved(saved[4]["student"], saved[6]["teacher"])  # the last phase's teacher is the student before it
    assert moved(saved[2]["student"], saved[4]["student"]) and moved(saved[4]["student"], saved[6]["student"])


def test_stage1_passes_on_its_constants(chain, tmp_path, monkeypatch):
    """The guidance weight, the space of the loss, the shift of its times, and rates that fall to 0 in each phase, and
    with more steps."""
    cfg = fork(chain, stage1, tmp_path, ["stage0"], pd_space="z", cfg_w=0.7, cfg_lr=1e-3, pd_lr=2e-3, shift=5.0)
    weights, spaces, rates, shifts = [], [], [], []
    target, loss, step, times = stage1.cfg_target, stage1.pd_loss, common.clip_and_step, stage1.pd_times
    uniform_numbers_are(0.5, monkeypatch)
    monkeypatch.setattr(stage1, "cfg_target", lambda v, z, t, w: (weights.append((w, *t.tolist())),
                                                                  target(v, z, t, w))[1])
    monkeypatch.setattr(stage1, "pd_times", lambda u, n, shift: (shifts.append(shift), times(u, n, shift))[1])
    monkeypatch.setattr(stage1, "pd_loss", lambda *args: (spaces.append(args[-1]), loss(*args))[1])
    monkeypatch.setattr(common, "clip_and_step", lambda optimiser, *args: (
        rates.append(optimiser.param_groups[0]["lr"]), step(optimiser, *args))[1])
    stage1.main(cfg)
    shifted = 5 * 0.5 / (1 + 4 * 0.5)
    assert weights == [pytest.approx((0.7, shifted, shifted))] * 2 and spaces == ["z"] * 4
    assert shifts == [5.0] * 4
    assert rates == pytest.approx([1e-3, 5e-4, 2e-3 / 2 ** 0.5, 1e-3 / 2 ** 0.5, 2e-3, 1e-3])


def test_stage1_asks_against_nothing_but_in_cfg_distillation(chain, tmp_path, monkeypatch):
    cfg, asked, prompt = fork(chain, stage1, tmp_path, ["stage0"]), [], M.prompt
    monkeypatch.setattr(M, "prompt", lambda z, which=M.POSITIVE: (asked.append(which), prompt(z, which))[1])
    stage1.main(cfg)
    assert asked.count(M.AGAINST) == cfg.cfg_steps and set(asked) == {M.POSITIVE, M.AGAINST}


def test_softened_targets_go_with_the_negative_prompt(chain, tmp_path, monkeypatch):
    cfg = fork(chain, stage0, tmp_path, [], steps=2, batch=8, negative=0.5, text_drop=0.0)
    softened, prompts, latents, loss = [], [], data.Bank.latents, stage0.flow_loss

    def spied(self, vae, first, count, device, soft=None, u=None):
        softened.append(soft)
        return latents(self, vae, first, count, device, soft, u)
    monkeypatch.setattr(data.Bank, "latents", spied)
    monkeypatch.setattr(stage0, "flow_loss", lambda net, z, z_lr, text, *args: (
        prompts.append(text), loss(net, z, z_lr, text, *args))[1])
    stage0.main(cfg)
    softened = [x for x in softened if x is not None]           # not those that set the network up, nor the panel's
    assert len(softened) == len(prompts) == 2
    for soft, text in zip(softened, prompts, strict=True):
        assert torch.equal(soft, text == M.NEGATIVE) and soft.any() and (text[~soft] == M.POSITIVE).all()


def spy_networks(monkeypatch, head_starts_at_0=True):
    """The networks that a stage II run trains, caught when they are made: student, head, and as cfg the fake score."""
    nets, load, init = {}, M.load_checkpoint, M.RFSHead.__init__

    def loader(path, part, device, model, finished):
        out = load(path, part, device, model, finished)
        nets[part] = out[0]
        return out

    def remember(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if not head_starts_at_0:                                # a zero last layer hides everything before it
            torch.nn.init.normal_(self.layers[-1].weight)
        nets["head"] = self
    monkeypatch.setattr(M, "load_checkpoint", loader)
    monkeypatch.setattr(M.RFSHead, "__init__", remember)
    return nets


def test_stage2_counts_and_who_moves(chain, tmp_path):
    cfg = fork(chain, stage2, tmp_path, ["stage0", "stage1"], steps=5, save_every=1)
    before = checkpoint(cfg, "stage1")
    stage2.main(cfg)
    state = checkpoint(cfg, "stage2")
    counts = {k: {int(s["step"]) for s in state[f"opt_{k}"]["state"].values()} for k in ("student", "fake", "head")}
    assert counts == {"student": {5}, "fake": {2 + 3 * 5}, "head": {2 + 3 * 5}}
    assert moved(before["student"], state["net"]) and moved(before["cfg"], state["fake"])
    assert moved(state["net"], state["student"])                # the average is not the network


@pytest.mark.parametrize("stage, name", [(stage0, "ema"), (stage2, "student")])
def test_what_the_next_stage_reads_is_the_average(chain, tmp_path, monkeypatch, stage, name):
    number, used, update = list(chain).index(stage), [], common.ema_update
    cfg = fork(chain, stage, tmp_path, ["stage0", "stage1"][:number])
    monkeypatch.setattr(common, "ema_update", lambda *args: (used.append(args[:2]), update(*args))[1])
    stage.main(cfg)
    state, (average, net) = checkpoint(cfg, f"stage{number}"), used[-1]
    assert not moved(average.state_dict(), state[name]) and not moved(net.state_dict(), state["net"])
    assert moved(state["net"], state[name])


def run_spied(chain, tmp_path, monkeypatch, **changes):
    """One stage II run. At each student update: gradients of the fake score and the head, before and after backward."""
    cfg = fork(chain, stage2, tmp_path, ["stage0", "stage1"], steps=2, aux_warmup=4, **changes)
    nets, events = spy_networks(monkeypatch), []
    before, update = stage2.dmd_gradient, stage2.common.ema_update

    def gradients():
        return [None if p.grad is None else p.grad.clone() for n in (nets["cfg"], nets["head"]) for p in n.parameters()]

    def at_gradient(*args):
        events.append(gradients())
        return before(*args)

    def at_update(average, net, decay):                         # the first thing after the student's step
        events.append(gradients())
        frozen = not any(p.requires_grad for n in (nets["cfg"], nets["head"]) for p in n.parameters())
        events.append((frozen, sum(p.grad.abs().sum().item() for p in net.parameters())))
        return update(average, net, decay)
    monkeypatch.setattr(stage2, "dmd_gradient", at_gradient)
    monkeypatch.setattr(stage2.common, "ema_update", at_update)
    real = {}
    copy = stage2.deepcopy
    monkeypatch.setattr(stage2, "deepcopy", lambda x: real.setdefault(len(real), copy(x)))
    stage2.main(cfg)
    state = torch.load(f"{chain[stage1].out}/stage1/last.pt", weights_only=True)["cfg"]
    weights = real[0].state_dict()                              # the first copy is the real score
    assert not moved(state, weights) and all(p.grad is None for p in real[0].parameters())
    return events


@pytest.mark.parametrize("changes", [
    dict(streams=("gan",), w_fm=0.0), dict(streams=("gan",), w_gan=0.0), dict(streams=("dmd",)), dict(),
    dict(streams=("gan",), features="real"), dict(streams=("gan",), features="fake")])
def test_student_update_belongs_to_the_student_alone(chain, tmp_path, monkeypatch, changes):
    """Each stream reaches the student through each model (a detached one would not); no other gradient moves."""
    events = run_spied(chain, tmp_path, monkeypatch, **changes)
    for before, after, (frozen, pulled) in zip(events[::3], events[1::3], events[2::3], strict=True):
        assert frozen and pulled > 0
        for a, b in zip(before, after, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_auxiliary_losses_stay_apart(chain, tmp_path, monkeypatch):
    """L_D alone must leave the fake score without gradient: its features reach the head detached."""
    cfg = fork(chain, stage2, tmp_path, ["stage0", "stage1"], steps=1, aux_warmup=2)
    nets, sums, hinge, values = spy_networks(monkeypatch, head_starts_at_0=False), [], stage2.hinge_d, []

    def spied(real, fake):
        loss = hinge(real, fake)
        values.append(loss.item())
        groups = [list(nets[name].parameters()) for name in ("cfg", "head", "student")]
        grads = [torch.autograd.grad(loss, g, retain_graph=True, allow_unused=True) for g in groups]
        sums.append([sum(x.abs().sum().item() for x in g if x is not None) for g in grads])
        return loss
    monkeypatch.setattr(stage2, "hinge_d", spied)
    stage2.main(cfg)
    assert len(sums) == 2 + 3
    for fake, head, student in sums:
        assert fake == 0 and student == 0 and head > 0
    start, line = common.read_log(f"{cfg.out}/stage2")
    assert start == {"step": 0, "d_warmup": pytest.approx(sum(values[:2]) / 2, rel=1e-4)}
    assert line["d"] == pytest.approx(values[-1], rel=1e-4) != start["d_warmup"]                # of the warm-up alone


def test_each_network_steps_down_its_own_losses(chain, tmp_path, monkeypatch):
    """In sign and size: the fake score's gradient is L_Diff's, the head's L_D's, the student's that of all three."""
    cfg = fork(chain, stage2, tmp_path, ["stage0", "stage1"], steps=2, aux_warmup=1, w_dmd=0.7, w_gan=0.5, w_fm=0.9)
    nets, want = spy_networks(monkeypatch, head_starts_at_0=False), {}
    checked, step = [], common.clip_and_step

    def spy(module, function, name, weight=1.0):
        original = getattr(module, function)

        def spied(*args):
            loss = original(*args)
            if function != "mse_loss" or args[0].ndim == 5:     # L_FM, of features, is a mean square too
                parameters = list(nets[name].parameters())
                grads = torch.autograd.grad(weight * loss, parameters, retain_graph=True, allow_unused=True)
                grads = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)]
                want[name] = [a + b for a, b in zip(want.get(name, [0] * len(grads)), grads, strict=True)]
            return loss
        monkeypatch.setattr(module, function, spied)
    spy(stage2.F, "mse_loss", "cfg")                            # the fake score starts as the CFG-distilled model
    spy(stage2, "hinge_d", "head")
    for function, weight in (("dmd_loss", cfg.w_dmd), ("hinge_g", cfg.w_gan), ("fm_loss", cfg.w_fm)):
        spy(stage2, function, "student", weight)

    def compare(optimiser, net, max_norm):
        name = next(k for k, v in nets.items() if v is net)
        for p, grad in zip(net.parameters(), want.pop(name), strict=True):
            torch.testing.assert_close(torch.zeros_like(p) if p.grad is None else p.grad, grad, rtol=1e-3, atol=1e-7)
        checked.append(name)
        return step(optimiser, net, max_norm)
    monkeypatch.setattr(common, "clip_and_step", compare)
    stage2.main(cfg)
    assert Counter(checked) == {"cfg": 1 + 3 * 2, "head": 1 + 3 * 2, "student": 2}


def test_weights_multiply_the_losses(chain, tmp_path):
    """L = w_dmd L_DMD + w_gan L_G + w_fm L_FM: other weights, the same first losses times other numbers."""
    want, logs = dict(w_dmd=2.0, w_gan=0.3, w_fm=0.4), []
    for k, weights in enumerate((dict(w_dmd=1.0, w_gan=1.0, w_fm=1.0), want, dict.fromkeys(want, 0.0))):
        cfg = fork(chain, stage2, tmp_path / str(k), ["stage0", "stage1"], steps=1, aux_warmup=2, ema=0.0, **weights)
        stage2.main(cfg)
        logs.append(common.read_log(f"{cfg.out}/stage2")[-1])
    for name, weight in want.items():
        name = name.removeprefix("w_")
        assert logs[0][name] != 0 and logs[1][name] == pytest.approx(weight * logs[0][name], rel=1e-4)
        assert logs[1][f"pull_{name}"] == pytest.approx(weight * logs[0][f"pull_{name}"], rel=1e-4)
    first = torch.load(f"{cfg.out}/stage1/last.pt", weights_only=True)["student"]
    assert not moved(first, checkpoint(cfg, "stage2")["student"])      # of no loss nothing is learnt


def test_streams_share_one_noised_sample_and_the_pair_its_noise(chain, tmp_path, monkeypatch):
    """HR and student sample get the same t and eps; the noise differs from the one that made the sample."""
    cfg = fork(chain, stage2, tmp_path, ["stage0", "stage1"], steps=2)
    noised, made, add, one = [], [], M.add_noise, M.one_step

    def spied_add(z, eps, t):
        noised.append((eps, t))
        return add(z, eps, t)

    def spied_one(net, eps, z_lr):
        made.append(eps)
        return one(net, eps, z_lr)
    monkeypatch.setattr(M, "add_noise", spied_add)
    monkeypatch.setattr(M, "one_step", spied_one)
    stage2.main(cfg)
    updates = cfg.aux_warmup + 4 * cfg.steps
    assert len(noised) == 2 * updates + 7 and len(made) == updates + 1      # the last ones are the panel's
    assert not any(torch.equal(eps, made[-1]) for eps, _ in noised[-6:])    # offsets: not by the noise of the sample
    noised, made = noised[:-7], made[:-1]
    for k, (first, second) in enumerate(zip(noised[::2], noised[1::2], strict=True)):
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
        assert not torch.equal(first[0], made[k]) and (k == 0 or not torch.equal(first[1], noised[2 * k - 2][1]))


def test_hr_can_have_noise_of_its_own_in_the_heads_loss_alone(chain, tmp_path, monkeypatch):
    cfg = fork(chain, stage2, tmp_path, ["stage0", "stage1"], steps=1, gan_same_noise=False)
    noised, add = [], M.add_noise
    monkeypatch.setattr(M, "add_noise", lambda z, eps, t: (noised.append((eps, t)), add(z, eps, t))[1])
    stage2.main(cfg)
    auxiliary = cfg.aux_warmup + cfg.aux_per_student
    pairs = list(zip(noised[::2], noised[1::2], strict=False))[:auxiliary + 1]              # without the panel's
    same = [[torch.equal(a, b) for a, b in zip(*pair, strict=True)] for pair in pairs]
    assert same == [[False, False]] * auxiliary + [[True, True]]                            # L_D, then L_FM


def test_stage2_passes_on_its_constants(chain, tmp_path, monkeypatch):
    """Rates, momentum and the clipping of each network, times, and how losses and the head are made."""
    cfg = fork(chain, stage2, tmp_path, ["stage0", "stage1"], steps=1, aux_warmup=0, aux_per_student=1, lr=1e-3,
               lr_fake=2e-3, lr_head=3e-3, clip_norm=0.5, ema=0.7, t_min=0.1, t_max=0.8, shift=5.0, dmd_half=False,
               fm_norm="l1", pooled=True, head_channels=8)
    nets, seen = spy_networks(monkeypatch), []
    uniform_numbers_are(0.5, monkeypatch)

    def spy(where, name, keep):
        original = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *args: (seen.append((name, *keep(*args))), original(*args))[1])

    def of_update(optimiser, net, norm):
        group, = optimiser.param_groups
        assert {id(p) for p in group["params"]} == {id(p) for p in net.parameters()}
        return next(k for k, x in nets.items() if x is net), *(group[k] for k in ("lr", "betas", "weight_decay")), norm
    spy(common, "clip_and_step", of_update)
    spy(common, "ema_update", lambda average, net, decay: (decay,))
    spy(stage2, "dmd_loss", lambda *args: (args[-1],))
    spy(stage2, "fm_loss", lambda *args: (args[-1],))
    spy(M, "add_noise", lambda z, eps, t: t.tolist())
    stage2.main(cfg)
    times = [t for name, *times in seen if name == "add_noise" for t in times][:8]      # without the panel's
    assert times == pytest.approx([0.1 + 0.7 * 5 * 0.5 / (1 + 4 * 0.5)] * 8)
    assert [x for x in seen if x[0] != "add_noise"] == [
        ("clip_and_step", "cfg", 2e-3, (0.0, 0.999), 0, 0.5), ("clip_and_step", "head", 3e-3, (0.9, 0.999), 0, 0.5),
        ("dmd_loss", False), ("fm_loss", "l1"), ("clip_and_step", "student", 1e-3, (0.0, 0.999), 0, 0.5),
        ("ema_update", 0.7)]
    head = nets["head"]
    assert head.project.out_features == 8 and isinstance(head.layers[-2], torch.nn.AdaptiveAvgPool3d)


def test_equal_score_models_move_no_student(chain, tmp_path):
    """At the start fake is real; a guided real score is another."""
    for k, (real_score, still) in enumerate((("cfg", True), ("teacher", False))):
        cfg = fork(chain, stage2, tmp_path / str(k), ["stage0", "stage1"], steps=1, aux_warmup=0, aux_per_student=0,
                   streams=("dmd",), real_score=real_score)
        stage2.main(cfg)
        line, = common.read_log(f"{cfg.out}/stage2")
        assert [line[key] == 0 for key in ("dmd", "g_mean", "grad_norm")] == [still] * 3


def test_the_loop_feeds_its_losses(chain, tmp_path, monkeypatch):
    """L_Diff's target is eps - z_0 of the noised sample; dmd_gradient gets the real estimate, then the fake one."""
    cfg = fork(chain, stage2, tmp_path, ["stage0", "stage1"], steps=2, lr_fake=1e-2)
    nets, noised, conditions, checks = spy_networks(monkeypatch), [], [], []
    add, one, mse, gradient = M.add_noise, M.one_step, torch.nn.functional.mse_loss, stage2.dmd_gradient
    monkeypatch.setattr(M, "add_noise", lambda z, e, t: (noised.append((z.detach(), e, t)), add(z, e, t))[1])
    monkeypatch.setattr(M, "one_step", lambda net, e, z_lr: (conditions.append(z_lr), one(net, e, z_lr))[1])

    def spied_mse(a, b):
        if a.ndim == 5:                                         # L_Diff; the features of L_FM have three axes
            z, e, _ = noised[-1]
            assert torch.equal(b, e - z)
            checks.append("diff")
        return mse(a, b)

    def spied_gradient(z_0, x_real, x_fake):
        z, e, t = noised[-1]
        z_t = add(z, e, t)
        want = M.to_x0(z_t, nets["cfg"](z_t, t, conditions[-1], M.prompt(z_t)), t)
        torch.testing.assert_close(x_fake, want)
        assert (x_real - want).abs().max() > 1e-4 and torch.equal(z_0, z)
        checks.append("dmd")
        return gradient(z_0, x_real, x_fake)
    monkeypatch.setattr(stage2.F, "mse_loss", spied_mse)
    monkeypatch.setattr(stage2, "dmd_gradient", spied_gradient)
    stage2.main(cfg)
    assert checks.count("diff") == 2 + 3 * 2 and checks.count("dmd") == 2


def test_the_head_tells_hr_from_the_student_and_the_student_seeks_its_favour(chain, tmp_path, monkeypatch):
    """Which logits L_D takes for HR's, and the sign of L_G; the head is the mean of the real score's features here."""
    cfg = fork(chain, stage2, tmp_path, ["stage0", "stage1"], steps=2)
    real = M.load_checkpoint(f"{cfg.out}/stage1/last.pt", "cfg")[0]
    noised, conditions, add, one = [], [], M.add_noise, M.one_step
    monkeypatch.setattr(M, "add_noise", lambda z, e, t: (noised.append((add(z, e, t).detach(), t)), add(z, e, t))[1])
    monkeypatch.setattr(M, "one_step", lambda net, e, z_lr: (conditions.append(z_lr), one(net, e, z_lr))[1])

    def mean_feature(features):
        return features[0].mean((1, 2))[:, None]
    monkeypatch.setattr(M.RFSHead, "forward", lambda self, features: mean_feature(features) + 0 * sum(
        p.sum() for p in self.parameters()))

    def logits(z_t, t):
        with torch.no_grad():
            return mean_feature(real(z_t, t, conditions[-1], M.prompt(z_t), M.tap_blocks(len(real.blocks)))[1])
    hinge_d, hinge_g, calls = stage2.hinge_d, stage2.hinge_g, []

    def spied_d(of_hr, of_student):
        torch.testing.assert_close(of_student, logits(*noised[-2]))
        torch.testing.assert_close(of_hr, logits(*noised[-1]))
        assert not torch.allclose(of_hr, of_student)
        calls.append(None)
        return hinge_d(of_hr, of_student)

    def spied_g(of_student):
        torch.testing.assert_close(of_student, logits(*noised[-2]))
        calls.append(of_student.mean().item())
        return hinge_g(of_student)
    monkeypatch.setattr(stage2, "hinge_d", spied_d)
    monkeypatch.setattr(stage2, "hinge_g", spied_g)
    stage2.main(cfg)
    means = [x for x in calls if x is not None]
    assert len(calls) == cfg.aux_warmup + 4 * cfg.steps
    for line, mean in zip(common.read_log(f"{cfg.out}/stage2")[1:], means, strict=True):
        assert line["gan"] == pytest.approx(-cfg.w_gan * mean, rel=1e-4) and abs(mean) > 1e-4


def test_the_teacher_as_real_score_is_guided(chain, tmp_path, monkeypatch):
    cfg = fork(chain, stage2, tmp_path, ["stage0", "stage1"], steps=1, aux_warmup=0, real_score="teacher")
    state = checkpoint(cfg, "stage1")
    os.remove(tmp_path / "tiny" / "stage1")
    os.makedirs(tmp_path / "tiny" / "stage1")
    state["config"]["cfg_w"] = 0.7                              # the guidance is the one that stage I distilled
    torch.save(state, tmp_path / "tiny" / "stage1" / "last.pt")
    teacher = M.load_checkpoint(f"{cfg.out}/stage0/last.pt", "ema")[0]
    conditions, one, noised, add, calls, guide = [], M.one_step, [], M.add_noise, [], M.guide
    monkeypatch.setattr(M, "one_step", lambda net, e, z_lr: (conditions.append(z_lr), one(net, e, z_lr))[1])
    monkeypatch.setattr(M, "add_noise", lambda z, e, t: (noised.append((add(z, e, t).detach(), t)), add(z, e, t))[1])

    def spied(v_c, v_neg, w):
        z_t, t = noised[-1]
        for v, which in ((v_c, M.POSITIVE), (v_neg, M.AGAINST)):
            torch.testing.assert_close(v, teacher(z_t, t, conditions[-1], M.prompt(z_t, which)))
        assert w == 0.7 and not torch.allclose(v_c, v_neg)
        calls.append(1)
        return guide(v_c, v_neg, w)
    monkeypatch.setattr(M, "guide", spied)
    stage2.main(cfg)
    assert calls
    # of another teacher than stage I's it would be biased
    torch.save(state | {"source": "another"}, tmp_path / "tiny" / "stage1" / "last.pt")
    shutil.rmtree(tmp_path / "tiny" / "stage2")
    with pytest.raises(SystemExit, match="not the teacher that stage I was made from"):
        stage2.main(cfg)


@pytest.mark.parametrize("changes", [dict(order="sequential"), dict(features="real"), dict(features="fake"),
                                     dict(real_score="teacher"), dict(fm_norm="l1", pooled=True),
                                     dict(gan_same_noise=False, dmd_half=False), dict(init="cfg")])
def test_stage2_options_run(chain, tmp_path, changes):
    cfg = fork(chain, stage2, tmp_path, ["stage0", "stage1"], steps=2, **changes)
    stage2.main(cfg)
    *warm, first, last = common.read_log(f"{cfg.out}/stage2")
    assert [line["step"] for line in (*warm, first, last)] == [*[0] * ("gan" in cfg.streams), 1, 2]
    assert all(math.isfinite(v) for line in (*warm, first, last) for v in line.values())
    if changes.get("order"):
        assert "dmd" in first and "gan" not in first and "gan" in last and "dmd" not in last


def test_regression_has_the_gradient_of_the_mean_squared_error(chain, tmp_path, monkeypatch):
    """streams mse: the student's first gradient is that of mean (z_0 - z_0^HR)^2; fake score and head stay as made."""
    cfg = fork(chain, stage2, tmp_path, ["stage0", "stage1"], steps=2, streams=("mse",), clip_norm=1e9)
    pairs, noises, found, run, one = [], [], [], data.random_window, M.one_step
    monkeypatch.setattr(data, "random_window", lambda *args: pairs.append(run(*args)) or pairs[-1])
    monkeypatch.setattr(M, "one_step", lambda net, eps, z_lr: (noises.append(eps), one(net, eps, z_lr))[1])
    update = common.ema_update

    def at_update(average, net, decay):
        found.append([p.grad.clone() for p in net.parameters()])
        return update(average, net, decay)
    monkeypatch.setattr(common, "ema_update", at_update)
    stage2.main(cfg)
    student = M.load_checkpoint(f"{cfg.out}/stage1/last.pt", "student")[0].requires_grad_(True)
    z_hr, z_lr = pairs[0]                                       # without score models there is no warm-up before it
    error = student(noises[0], torch.ones(len(z_lr)), z_lr, M.prompt(z_lr)) - (noises[0] - z_hr)    # v - v of HR
    error.square().mean().backward()
    assert sum(g.abs().sum() for g in found[0]) > 0
    for g, p in zip(found[0], student.parameters(), strict=True):
        torch.testing.assert_close(g, torch.zeros_like(p) if p.grad is None else p.grad, rtol=1e-4, atol=1e-6)
    state, lines = checkpoint(cfg, "stage2"), common.read_log(f"{cfg.out}/stage2")
    assert not moved(checkpoint(cfg, "stage1")["cfg"], state["fake"]) and not state["opt_head"]["state"]
    assert lines[0]["mse"] == pytest.approx(error.square().mean().item(), rel=1e-4) and "diff" not in lines[0]


def test_without_stage1_the_student_starts_from_the_cfg_distilled_model(chain, tmp_path):
    cfg = fork(chain, stage2, tmp_path, ["stage0", "stage1"], steps=1, lr=0.0, init="cfg")
    stage2.main(cfg)
    first, state = checkpoint(cfg, "stage1"), checkpoint(cfg, "stage2")
    assert not moved(first["cfg"], state["net"]) and moved(first["student"], state["net"])


def test_dpo_starts_at_ln_2_and_pairs_are_reused(chain, tmp_path, monkeypatch):
    cfg = fork(chain, stage3, tmp_path, ["stage0", "stage1", "stage2"])
    stage3.main(cfg)
    assert json.loads(open(f"{cfg.out}/stage3/log.jsonl").readline())["dpo"] == pytest.approx(math.log(2), abs=1e-6)
    records = json.load(open(f"{cfg.out}/stage3/pairs.json"))["pairs"]
    assert len(records) == 3 and sum(r["trained"] for r in records) == 2 and sum(r["held"] for r in records) == 1
    assert not any(r["trained"] and r["held"] for r in records)
    for r in records:
        assert r["scores"][r["winner"]] == max(r["scores"]) and r["scores"][r["loser"]] == min(r["scores"])
    again = pairs_made(monkeypatch)
    was = stage3.read_pair(f"{cfg.out}/stage3/pairs/00001.pt")["win"].clone()
    os.remove(f"{cfg.out}/stage3/pairs/00001.pt")               # as if stopped before it was made
    cfg.steps, cfg.resume = 6, True
    stage3.main(cfg)
    assert again == [1] and torch.equal(stage3.read_pair(f"{cfg.out}/stage3/pairs/00001.pt")["win"], was)
    assert checkpoint(cfg, "stage3")["step"] == 6
    os.remove(f"{cfg.out}/stage3/last.pt")
    cfg.keep = 0.3                                              # the list of pairs is always that of this run
    stage3.main(cfg)
    records = json.load(open(f"{cfg.out}/stage3/pairs.json"))["pairs"]
    assert again == [1] and sum(r["trained"] for r in records) == 1 and not any(r["held"] for r in records)


def test_a_scorer_without_a_score_is_one_line(chain, tmp_path, monkeypatch):
    cfg = fork(chain, stage3, tmp_path, ["stage0", "stage1", "stage2"])
    monkeypatch.setattr(stage3, "make_scorer", lambda name: lambda candidates, lr: np.array([math.nan, 1.0, 2.0, 0.0]))
    with pytest.raises(SystemExit, match="scorer proxy: no score for an output of clip 0; use another"):
        stage3.main(cfg)


@pytest.mark.parametrize("changes, zero", [(dict(dpo_t="one"), False), (dict(), False), (dict(anchor=0.0), False),
                                           (dict(dpo_t="one", own_noise=True, anchor=0.0), True)])
def test_dpo_variants(chain, tmp_path, monkeypatch, changes, zero):
    """Own noise teaches nothing at t = 1: the first gradient is zero, up to rounding."""
    cfg = fork(chain, stage3, tmp_path, ["stage0", "stage1", "stage2"], steps=1, held=0, **changes)
    seen, add_noise = [], M.add_noise
    monkeypatch.setattr(M, "add_noise", lambda z, eps, t: seen.append((eps, t)) or add_noise(z, eps, t))
    stage3.main(cfg)
    norm = json.loads(open(f"{cfg.out}/stage3/log.jsonl").readline())["grad_norm"]
    reference = json.loads(open(f"{chain[stage3].out}/stage3/log.jsonl").readline())["grad_norm"]
    assert norm < 0.05 * reference if zero else norm > 0.05 * reference
    (eps_w, t_w), (eps_l, t_l) = seen[:2]                       # of winner and loser
    assert all(torch.equal(a, b) for x, y in zip(seen[:2], seen[2:4], strict=True) for a, b in zip(x, y, strict=True))
    assert torch.equal(t_w, t_l) and torch.equal(eps_w, eps_l) != cfg.own_noise
    assert (t_w == 1).all() if cfg.dpo_t == "one" else 0 < t_w.min() < t_w.max() < 1


@pytest.mark.parametrize("given, mode", [(7.0, "flow"), (0.0, "constant")])
def test_stage3_passes_on_its_constants(chain, tmp_path, monkeypatch, given, mode):
    """The rate, linear to 0, and a beta that is given or chosen from the pairs, as it is at each time."""
    cfg = fork(chain, stage3, tmp_path, ["stage0", "stage1", "stage2"], steps=2, held=0, lr=3e-4, dpo_beta=given,
               beta_mode=mode)
    betas, times, rates = [], [], []
    inside, paired, step = stage3.dpo_inside, stage3.paired, common.clip_and_step
    monkeypatch.setattr(stage3, "dpo_inside", lambda *args: (betas.append(args[-1]), inside(*args))[1])
    monkeypatch.setattr(stage3, "paired", lambda *args: (times.append(args[5]), paired(*args))[1])
    monkeypatch.setattr(common, "clip_and_step", lambda optimiser, net, norm: (
        rates.append((optimiser.param_groups[0]["lr"], optimiser.param_groups[0]["weight_decay"], norm)),
        step(optimiser, net, norm))[1])
    stage3.main(cfg)
    if given:
        torch.testing.assert_close(betas[0], 7 * (1 - times[0]).square())
    else:
        pairs = [stage3.read_pair(f"{cfg.out}/stage3/pairs/{i:05d}.pt") for i in range(cfg.pairs)]
        distance = torch.tensor([pair["distance"] for pair in pairs])
        assert betas == 2 * [pytest.approx(2 / (cfg.alpha * distance.median().item()))]
    assert rates == [(pytest.approx(lr), 0, 1.0) for lr in (3e-4, 1.5e-4)]


def test_own_noise_teaches_nothing_to_a_student_that_looks_around(chain, tmp_path):
    """Of what it made of a clip a window is not what it makes of that window: its candidates are made again there."""
    state, norms = checkpoint(chain[stage2], "stage2"), {}
    torch.manual_seed(0)
    state["student"]["head.head.weight"].normal_(std=0.1)       # four steps of a toy use nothing but the pixel itself
    for own in (False, True):
        cfg = fork(chain, stage3, tmp_path / str(own), ["stage0", "stage1"], steps=1, held=0, dpo_t="one", anchor=0.0,
                   own_noise=own)
        os.makedirs(f"{cfg.out}/stage2")
        torch.save(state, f"{cfg.out}/stage2/last.pt")
        stage3.main(cfg)
        norms[own] = common.read_log(f"{cfg.out}/stage3")[0]["grad_norm"]
    assert norms[True] < 1e-4 * norms[False]


def test_pairs_held_out_are_measured_and_not_trained_on(chain, tmp_path, monkeypatch):
    cfg = fork(chain, stage3, tmp_path, ["stage0", "stage1", "stage2"], batch=3)
    read, measured = stage3.read_pair, []
    monkeypatch.setattr(stage3, "set_aside", lambda order, clips, held: ([0, 1], [2]))
    monkeypatch.setattr(stage3, "read_pair", lambda path: read(path) | (
        {"win": read(path)["win"] * math.nan} if path.endswith("00002.pt") else {}))
    monkeypatch.setattr(stage3, "error_gaps", lambda net, pairs, *args: measured.append(pairs))
    monkeypatch.setattr(stage3, "preferred", lambda gaps, before: {1.0: 0.25})
    stage3.main(cfg)
    del measured[:2]                                            # of the reference, once
    assert [[pair["win"].isnan().all().item() for pair in some] for some in measured] == [[False], [True]] * 2
    assert all(math.isfinite(line["dpo"]) for line in common.read_log(f"{cfg.out}/stage3"))
    assert common.read_log(f"{cfg.out}/stage3", "held.jsonl") == [
        {"step": step, "pairs": 1, "trained": {"1.0": 0.25}, "held": {"1.0": 0.25}} for step in (2, 4)]


def test_the_anchor_is_on_velocities_at_all_times(chain, tmp_path, monkeypatch):
    """Held by t times that, as clean estimates are, the student would run off near t = 0. The log tells of these."""
    cfg = fork(chain, stage3, tmp_path, ["stage0", "stage1", "stage2"], steps=1, held=0, anchor=0.7, alpha=3.0)
    paired, loss, held, asked = stage3.paired, stage3.dpo_loss, [], []

    def moved_by_2(net, *args):
        asked[:] = args
        v, errors = paired(net, *args)
        return (v + 2 if torch.is_grad_enabled() else v), errors
    monkeypatch.setattr(stage3, "paired", moved_by_2)
    monkeypatch.setattr(stage3, "dpo_loss", lambda inside, *args: held.extend(args) or loss(inside, *args))
    stage3.main(cfg)
    apart, lam = held
    assert apart.item() == pytest.approx(4, abs=1e-4)
    line, = common.read_log(f"{cfg.out}/stage3")
    z_w, z_l, t = asked[0], asked[1], asked[4]
    assert line["drift"] == pytest.approx((4 * t.square().mean() / (z_w - z_l).square().mean()).item(), rel=1e-3)
    assert float(f"{lam * 4 * 3.0 / 0.7:.6g}") == line["beta"]  # lam = anchor beta / (4 alpha), as logged


@pytest.mark.parametrize("own, names", [(False, ("lr", "win", "lose")), (True, ("lr", "noise"))])
def test_stage3_trains_on_the_same_window_of_all_that_a_pair_has(chain, tmp_path, monkeypatch, own, names):
    """Pair after pair, windows from anywhere in them: 2 of 3 latent frames, 8 of 12 rows and columns."""
    cfg = fork(chain, stage3, tmp_path, ["stage0", "stage1", "stage2"], steps=12, accumulate=2, held=0,
               dpo_t="one", own_noise=own)
    paired, seen = stage3.paired, []
    monkeypatch.setattr(stage3, "paired", lambda net, *args: (seen.append(args), paired(net, *args))[1])
    stage3.main(cfg)
    pairs = [stage3.read_pair(f"{cfg.out}/stage3/pairs/{i:05d}.pt") for i in range(cfg.pairs)]
    pairs.sort(key=lambda pair: -pair["record"]["margin"])
    places, count = [], 0
    for z_w, z_l, eps_w, eps_l, _, z_lr in seen[::2]:                   # the student's call, then the reference's
        given = {"win": z_w, "lose": z_l, "lr": z_lr, "noise": torch.stack([eps_w, eps_l], dim=1)}
        for window in zip(*(given[name] for name in names), strict=True):
            pair = pairs[data.shuffled(cfg.seed, len(pairs), count // len(pairs))[count % len(pairs)]]
            places += [(t, y, x) for t in range(2) for y in range(5) for x in range(5) if all(
                torch.equal(z, pair[k][..., t:t + 2, y:y + 8, x:x + 8].float())
                for z, k in zip(window, names, strict=True))]
            count += 1
            assert len(places) == count
    assert count == cfg.steps * 2 * cfg.batch and [set(axis) for axis in zip(*places, strict=True)] == [
        set(range(2)), set(range(5)), set(range(5))]


def test_the_noise_of_a_pair_makes_its_winner_then_its_loser(chain):
    """From the whole clip, by the student of stage II."""
    out = chain[stage3].out
    pair = stage3.read_pair(f"{out}/stage3/pairs/00000.pt")
    student, _, config = M.load_checkpoint(f"{out}/stage2/last.pt", "student")
    velocity = M.tiled(student, data.crop_shape(config["model"]))
    made = [M.one_step(velocity, eps[None].float(), pair["lr"][None].float())[0] for eps in pair["noise"]]
    for z, own, other in zip(made, ("win", "lose"), ("lose", "win"), strict=True):
        assert (z - pair[own].float()).square().mean() < 0.01 * (z - pair[other].float()).square().mean()


def test_dpo_moves_towards_the_winner(chain, tmp_path):
    cfg = fork(chain, stage3, tmp_path, ["stage0", "stage1", "stage2"], steps=30, anchor=0.0)
    stage3.main(cfg)
    records = json.load(open(f"{cfg.out}/stage3/pairs.json"))["pairs"]
    pairs = [stage3.read_pair(f"{cfg.out}/stage3/pairs/{i:05d}.pt") for i, r in enumerate(records) if r["trained"]]
    box = (..., slice(0, 2), slice(0, 8), slice(0, 8))
    win, lose, z_lr = (torch.stack([p[k][box] for p in pairs]).float() for k in ("win", "lose", "lr"))
    nets = [M.load_checkpoint(f"{cfg.out}/stage{k}/last.pt", "student")[0] for k in (2, 3)]
    eps = torch.randn_like(z_lr)
    before, after = (M.one_step(net, eps, z_lr) for net in nets)
    assert ((after - before) * (win - lose)).mean() > 0
    held = fork(chain, stage3, tmp_path / "held", ["stage0", "stage1", "stage2"], steps=30, anchor=100.0)
    stage3.main(held)
    free, anchored = (common.read_log(f"{c.out}/stage3")[-1]["drift"] for c in (cfg, held))
    assert anchored < 0.5 * free


def test_log_lines_after_the_checkpoint_are_done_again(chain, tmp_path, monkeypatch):
    """Killed between a checkpoint and later log lines: the resumed log has every step once."""
    cfg = fork(chain, stage2, tmp_path, ["stage0", "stage1"])
    log = common.log

    def log_then_die(out_dir, bar, step, **values):
        log(out_dir, bar, step, **values)
        if step == 3:
            raise KeyboardInterrupt
    monkeypatch.setattr(common, "log", log_then_die)
    with pytest.raises(KeyboardInterrupt):
        stage2.main(cfg)
    monkeypatch.setattr(common, "log", log)
    cfg.resume = True
    stage2.main(cfg)
    assert [line["step"] for line in common.read_log(f"{cfg.out}/stage2")] == [0, 1, 2, 3, 4]


def test_a_run_of_other_constants_is_not_continued(chain, tmp_path):
    cfg = fork(chain, stage3, tmp_path, ["stage0", "stage1", "stage2", "stage3"], resume=True, lr=1e-2)
    with pytest.raises(SystemExit, match="made with another lr; "):
        stage3.main(cfg)


@pytest.mark.parametrize("stage, k, other", [(stage1, 1, "stage"), (stage2, 2, "stage"), (stage3, 3, "stage"),
                                             (stage3, 3, "clips")])
def test_a_run_from_another_checkpoint_is_not_continued(chain, tmp_path, footage, stage, k, other):
    """The stage before was trained again, or the clips of the pairs are others: a half would belong to neither."""
    cfg = fork(chain, stage, tmp_path, [f"stage{n}" for n in range(k - 1)], resume=True)
    for n in (k - 1, k):
        shutil.copytree(f"{chain[stage].out}/stage{n}", f"{cfg.out}/stage{n}")
    if other == "clips":                                        # of files of another time
        cfg.data = str(shutil.copytree(footage, tmp_path / "footage", copy_function=shutil.copyfile))
    else:
        before = f"{cfg.out}/stage{k - 1}/last.pt"
        state = torch.load(before, weights_only=True)
        torch.save(state | {"total": state["total"] - 1}, before)
    names = ["last.pt", "log.jsonl"] + ["pairs/00000.pt"] * (stage is stage3)
    kept = {name: open(f"{cfg.out}/stage{k}/{name}", "rb").read() for name in names}
    with pytest.raises(SystemExit, match="made from another checkpoint of the stage before"):
        stage.main(cfg)
    for name in names:
        assert open(f"{cfg.out}/stage{k}/{name}", "rb").read() == kept[name]


@pytest.mark.parametrize("stage, k", [(stage0, 0), (stage1, 1), (stage2, 2), (stage3, 3)])
def test_a_network_of_another_size_is_refused(chain, tmp_path, monkeypatch, stage, k):
    """It would train to the end under the wrong name, and only the next stage would notice."""
    for row in (M.MODELS, data.CLIPS):
        monkeypatch.setitem(row, "small", row["tiny"])
    init = dict(init=f"{chain[stage0].out}/stage0/last.pt") if stage is stage0 else {}
    cfg = fork(chain, stage, tmp_path, [f"stage{n}" for n in range(k)], model="small", **init)
    with pytest.raises(SystemExit, match="last.pt: of the model tiny, not small; use its --preset"):
        stage.main(cfg)


def test_a_run_of_other_samples_a_step_is_not_continued(chain, tmp_path, monkeypatch):
    """Batch, passes and processes may change, their product may not: clips and noise depend on it."""
    cfg = fork(chain, stage2, tmp_path, ["stage0", "stage1"])
    shutil.copytree(f"{chain[stage2].out}/stage2", f"{cfg.out}/stage2")
    cfg.resume, cfg.batch = True, 4
    with pytest.raises(SystemExit, match=r"made with another batch x accumulate x processes \(2 samples a step\)"):
        stage2.main(cfg)
    cfg.batch, cfg.accumulate, cfg.steps = 1, 2, 5
    stage2.main(cfg)
    assert checkpoint(cfg, "stage2")["step"] == 5
    monkeypatch.setattr(common, "world_size", lambda: 2)
    with pytest.raises(SystemExit, match="made with another batch x accumulate x processes"):
        stage2.main(cfg)


def test_a_run_can_end_at_its_last_checkpoint(chain, tmp_path, capsys):
    cfg = fork(chain, stage2, tmp_path, ["stage0", "stage1"])
    shutil.copytree(f"{chain[stage2].out}/stage2", f"{cfg.out}/stage2")
    path = f"{cfg.out}/stage2/last.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"total": 9}, path)
    with pytest.raises(SystemExit, match="unfinished, step 4 of 9"):
        M.load_checkpoint(path, finished=True)
    cfg.resume, cfg.steps = True, 3                             # not by a forgotten flag
    with pytest.raises(SystemExit, match="at step 4, beyond --steps 3; --steps 4 ends it there"):
        stage2.main(cfg)
    cfg.steps = 4
    stage2.main(cfg)
    assert "finished, at step 4 instead of 9" in capsys.readouterr().out
    assert_equal(torch.load(path, weights_only=True), state, "stage2")
    M.load_checkpoint(path, finished=True)


def test_ctrl_c_is_one_line_with_the_remedy(tmp_path):
    """And the process dies of the signal, so that a shell script around it stops as well."""
    code = ("import sys; sys.argv = ['x']; import common, stage1_pd as s, _thread, signal\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"       # a job in the background would ignore it
            "common.run(lambda cfg: _thread.interrupt_main() or [i for i in range(10**9)], s.Config, s.PRESETS)")
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert child.stderr.strip() == "interrupted; add --resume to go on from the last checkpoint"
    assert child.returncode == -signal.SIGINT


@pytest.mark.parametrize("script", ["ablate", "data", "evaluate", "infer"])
def test_ctrl_c_ends_the_other_scripts_likewise(script):
    code = ("import common, runpy, signal\n"
            "def stop(*args): raise KeyboardInterrupt\n"
            f"common.command_line = stop; runpy.run_path({script + '.py'!r}, run_name='__main__')")
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert child.stderr.startswith("\ninterrupted; ") and child.stderr.count("\n") == 2
    assert child.returncode == -signal.SIGINT


def test_a_new_run_keeps_no_row_of_an_old_one(tmp_path):
    """Of any log: one whose checkpoint was removed to start again, or that was stopped after its last checkpoint."""
    cfg = stage2.Config()
    for name in ("log.jsonl", "offsets.jsonl"):
        (tmp_path / name).write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3, "cut sh')
    torch.save({"step": 1, "total": 9, "config": {}, "samples": common.samples(cfg)}, tmp_path / "last.pt")
    cfg.resume = True
    common.start_run(str(tmp_path), cfg)
    both = [common.read_log(tmp_path, name) for name in ("log.jsonl", "offsets.jsonl")]
    assert both == [[{"step": 0}, {"step": 1}]] * 2
    (tmp_path / "last.pt").unlink()
    common.start_run(str(tmp_path), cfg)
    assert not common.read_log(tmp_path) and not common.read_log(tmp_path, "offsets.jsonl")


@pytest.mark.parametrize("stage", [stage0, stage1, stage2, stage3])
def test_a_run_goes_on_with_its_own_constants_alone(tmp_path, stage):
    """All but those that change no number of a step, or say for how long, from where and to where."""
    cfg, free = stage.Config(), "steps log_every save_every out data latents checkpointing compile".split()
    common.save(tmp_path / "last.pt", cfg, "stage", 1, 9)
    with pytest.raises(SystemExit, match="last.pt exists: add --resume to continue it, or name another --out"):
        common.start_run(tmp_path, cfg)
    cfg.resume = True
    for name, value in vars(cfg).items():
        other = not value if isinstance(value, bool) else value + type(value)("1")
        changed = replace(cfg, **{name: other})
        if name in free:
            common.start_run(tmp_path, changed)
        elif name not in ("batch", "accumulate", "resume"):     # the product of the first two counts
            with pytest.raises(SystemExit, match=f"made with another {name};"):
                common.start_run(tmp_path, changed)


def test_the_halves_of_a_sequential_run_keep_their_ends(tmp_path):
    cfg = stage2.Config(order="sequential", resume=True)
    common.save(tmp_path / "last.pt", cfg, "stage2", 1, cfg.steps)
    common.start_run(tmp_path, cfg)
    with pytest.raises(SystemExit, match="made with another steps;"):
        common.start_run(tmp_path, replace(cfg, steps=cfg.steps + 2))


def first_and_last(scores):
    return 0, len(scores) - 1, 1.0


@pytest.mark.parametrize("older", ["student", "code"])
def test_pairs_of_an_older_student_or_code_are_made_again(chain, tmp_path, monkeypatch, older):
    cfg = fork(chain, stage3, tmp_path, ["stage0", "stage1"])
    for n in (2, 3):
        shutil.copytree(f"{chain[stage3].out}/stage{n}", f"{cfg.out}/stage{n}")
    state, scale = checkpoint(cfg, "stage2"), 1.1 if older == "student" else 1
    torch.save(state | {"student": {k: scale * v for k, v in state["student"].items()}}, f"{cfg.out}/stage2/last.pt")
    if older == "code":
        monkeypatch.setattr(stage3, "rank_pair", first_and_last)        # as if edited
    os.remove(f"{cfg.out}/stage3/last.pt")
    made = pairs_made(monkeypatch)
    stage3.main(cfg)
    assert made == [0, 1, 2]
    os.truncate(f"{cfg.out}/stage3/pairs/00002.pt", 100)        # a damaged one is as good as none
    cfg.resume, cfg.steps = True, 5
    stage3.main(cfg)
    assert made == [0, 1, 2, 2]


def test_an_unfinished_stage_is_not_built_upon(chain, tmp_path):
    cfg = fork(chain, stage2, tmp_path, ["stage0"])
    state = checkpoint(chain[stage1], "stage1") | {"step": 3}
    os.makedirs(tmp_path / "tiny" / "stage1")
    torch.save(state, tmp_path / "tiny" / "stage1" / "last.pt")
    with pytest.raises(SystemExit, match="unfinished, step 3 of 6"):
        stage2.main(cfg)


def kill(stage, cfg, stop, monkeypatch):
    """Run a stage up to its first checkpoint at step `stop` or later, and no further."""
    save = common.save

    def save_then_die(path, cfg, name, step, total, /, **parts):
        save(path, cfg, name, step, total, **parts)
        if step >= stop:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "save", save_then_die)
        stage.main(cfg)


@pytest.mark.parametrize("stage, k, stop", [(stage0, 0, 2), (stage1, 1, 4), (stage2, 2, 0), (stage2, 2, 2),
                                            (stage3, 3, 2)])
def test_stopped_and_resumed_is_bit_equal(chain, tmp_path, monkeypatch, stage, k, stop):
    """Killed after a checkpoint and resumed: every tensor of the last checkpoint equals the unbroken run's."""
    cfg = fork(chain, stage, tmp_path, [f"stage{i}" for i in range(k)])
    kill(stage, cfg, stop, monkeypatch)
    with pytest.raises(SystemExit, match="--resume"):
        stage.main(cfg)                                         # never over an existing run
    assert checkpoint(cfg, f"stage{k}")["step"] == stop         # 0: the warm-up of stage II is over
    cfg.resume = True
    stage.main(cfg)
    whole, resumed = checkpoint(chain[stage], f"stage{k}"), checkpoint(cfg, f"stage{k}")
    assert whole["step"] == resumed["step"]
    assert_equal({x: whole[x] for x in whole if x not in ("config",)}, resumed)
    steps = [json.loads(x)["step"] for x in open(f"{cfg.out}/stage{k}/log.jsonl")]
    assert steps == sorted(set(steps))                          # no line twice
    assert common.read_log(f"{cfg.out}/stage{k}") == common.read_log(f"{chain[stage].out}/stage{k}")


def assert_equal(a, b, where=""):
    if isinstance(a, dict):
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    elif torch.is_tensor(a):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


# ----------------------------------------------------------------------------
# runs that are broken on purpose, and what the panel says of them


def said_of(chain, tmp_path, **changes):
    cfg = fork(chain, stage2, tmp_path, ["stage0", "stage1"], **changes)
    stage2.main(cfg)
    return "\n".join(health.stage2(f"{cfg.out}/stage2"))


BROKEN = {"flipped": "a sign is flipped", "flipped loss": "a sign is flipped", "raw": "not normalised",
          "detached": "features detached", "no fake": "no auxiliary updates",
          "frozen fake": "no better than the real one", "no stage I": "was stage I run", "fast": "unstable"}


def test_a_sound_run_is_not_flagged(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(health, "BLURRED", 0.0)                         # four steps of a toy draw no detail
    shown = []
    monkeypatch.setattr(common, "panel", lambda path, columns, words: shown.append(words))
    words = said_of(chain, tmp_path, aux_warmup=60, lr_fake=2e-3)
    assert "\n".join(shown[-1]).startswith(words) and "off HR" in shown[-1][-1]       # what the panel shows
    assert not any(flag in words for flag in BROKEN.values()), words


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_run_is_flagged(chain, tmp_path, monkeypatch, how):
    sound, changes = stage2.dmd_gradient, dict(aux_warmup=60, lr_fake=2e-3)
    if how == "flipped":
        monkeypatch.setattr(stage2, "dmd_gradient", lambda *x: (-sound(*x)[0], sound(*x)[1]))
    elif how == "flipped loss":
        monkeypatch.setattr(stage2, "dmd_loss", lambda z, g, *x, plain=stage2.dmd_loss: plain(z, -g, *x))
    elif how == "raw":
        def raw(z, real, fake):                                         # of a trained student the normaliser is small
            return 0.2 * (fake - real), sound(z, real, fake)[1]
        monkeypatch.setattr(stage2, "dmd_gradient", raw)
    elif how == "detached":
        forward = M.RFSHead.forward
        monkeypatch.setattr(M.RFSHead, "forward", lambda head, f: forward(head, [x.detach() for x in f]))
    elif how == "no fake":
        changes["aux_per_student"] = 0
    elif how == "frozen fake":
        changes = dict(aux_warmup=1, lr_fake=0.0)
    elif how == "fast":
        changes["lr"] = 0.1
    else:                                                               # the one step of a multi-step model is a mean
        def add_a_tenth(net, eps, z_lr, plain=M.one_step):
            return z_lr + 0.1 * (plain(net, eps, z_lr) - z_lr)
        monkeypatch.setattr(M, "one_step", add_a_tenth)
    assert BROKEN[how] in said_of(chain, tmp_path, **changes)


def test_the_log_and_the_offsets_are_of_what_they_say(chain, tmp_path, monkeypatch):
    """Norms and cosine of known gradients of the streams; offsets of the real score, between student sample and HR."""
    def known(losses, z_0):
        a, b = torch.zeros_like(z_0), torch.zeros_like(z_0)
        a.view(-1)[0] = b.view(-1)[0] = 3
        b.view(-1)[1] = 4
        return {"dmd": a, "gan": b, "fm": torch.zeros_like(z_0)}
    seen = []
    monkeypatch.setattr(health, "loss_gradients", known)
    monkeypatch.setattr(health, "spatial_offsets", lambda *args: seen.append(args) or [])
    plain, shown = health.stage2, []
    monkeypatch.setattr(health, "stage2", lambda *args: shown.append(args[2:]) or plain(*args))
    cfg = fork(chain, stage2, tmp_path, ["stage0", "stage1"])
    stage2.main(cfg)
    for line in common.read_log(f"{cfg.out}/stage2")[1:]:
        assert (line["pull_dmd"], line["pull_gan"], line["pull_fm"]) == (3, 5, 0)
        assert line["dmd_gan_cosine"] == pytest.approx(0.6)
    draw, z_0, z_hr, vae, noise = seen[-1]
    bank, window = data.training_bank(cfg, 0), data.crop_shape(cfg.model)[0]
    want_hr, z_lr, eps = data.panel_batch(bank, vae, window, cfg.seed, torch.device("cpu"))
    student = M.load_checkpoint(f"{cfg.out}/stage2/last.pt", "student")[0]
    real = M.load_checkpoint(f"{cfg.out}/stage1/last.pt", "cfg")[0]
    t = torch.full((len(eps),), 0.3)
    assert torch.equal(z_hr, want_hr) and not torch.equal(noise, eps)
    videos = [np.concatenate([data.to_uint8(v) for v in vae.decode(z)]) for z in (z_0, z_hr)]
    assert shown[-1] == (health.detail(z_0, z_lr, z_hr).item(), [metrics.lattice(v) for v in videos])
    with torch.no_grad():
        assert torch.equal(z_0, M.one_step(student, eps, z_lr))
        torch.testing.assert_close(draw(noise, t), M.to_x0(noise, real(noise, t, z_lr, M.prompt(noise)), t))


FINE2 = dict(g_mean=1.0, g_cosine=0.9, g_want=1.0, skipped=0.0, lag=0.9, detail=0.9, detail_real=0.9, d=1.5, diff=0.1,
             pull_gan=1.0, pull_dmd=2.0, gan=-0.01)
FINE3 = dict(accuracy=0.8, inside=0.1, drift=0.01, winner_change=-0.01, loser_change=0.01, winner_error=0.3,
             loser_error=0.3)
CASES2 = [
    (dict(), "healthy", "raise|lower|flipped|noise|lattice"),
    (dict(g_mean=0.05, g_want=0.05), "equals the real one", "spikes"),
    (dict(g_mean=4.0, g_want=4.0), "spikes; lower lr", "equals"), (dict(g_cosine=-0.1), "sign is flipped", "noise"),
    (dict(g_want=3.0), "not normalised", "flipped"), (dict(skipped=0.1), "10% of samples skipped", "spikes; lower lr"),
    (dict(lag=1.0), "no better than the real one", "no auxiliary"), (dict(detail=0.5), "a mean, not a sample", "noise"),
    (dict(detail=1.3), "130% of HR's detail: noise", "a mean"),
    (dict(detail_real=0.5), "blurred; lower t_max", "noise"),
    (dict(detail=0.3, detail_real=0.3), "was stage I run", "t_max"),
    (dict(d=0.2), "head has won; lower lr_head", "learnt"),
    (dict(d=1.97), "not learnt yet; raise aux_warmup", "has won|keeps up"),
    (dict(d=1.97, d_warmup=1.8), "keeps up with the head, as in most runs (1.80 after", "raise aux_warmup"),
    (dict(pull_gan=0.0), "features detached", "most runs"), (dict(pull_gan=0.0, gan=0.0), "healthy", "detached"),
    (dict(g_want=0.0, g_mean=0.0), "equals the real one", "not normalised"),
    (dict(d=2.5, d_warmup=1.8), "misleads the head (1.80 after", "most runs"),
    (dict(pull_gan=5.0), "the GAN pulls 2.5 times as hard as DMD", "detached"),
    (dict(pull_dmd=0.0), "healthy", "times as hard")]
CASES3 = [
    (dict(), "0.80, inside 0.1 on the pairs it trains on: it learns them", "raise|lower"),
    (dict(accuracy=0.5), "look alike to it; raise lr", "too far"),
    (dict(drift=0.3, accuracy=0.5), "too far; raise anchor", "raise lr"),
    (dict(winner_change=0.02, loser_change=0.02), "likelihood drop", "raise lr"),
    (dict(winner_change=0.02, loser_change=0.001), "it learns", "likelihood drop")]


@pytest.mark.parametrize("verdicts, fine, changes, word, absent", [
    *((health.stage2, FINE2, *case) for case in CASES2), *((health.stage3, FINE3, *case) for case in CASES3)])
def test_verdicts_say_what_the_numbers_mean(tmp_path, verdicts, fine, changes, word, absent):
    with open(tmp_path / "log.jsonl", "w") as f:
        f.writelines(json.dumps({"step": k} | fine | changes) + "\n" for k in range(8))
    words = "\n".join(verdicts(tmp_path))
    assert word in words and not re.search(absent, words), words


def test_the_verdict_on_pairs_held_out(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1} | FINE3) + "\n")
    for count, at_1, said in ((8, 0.875, "it carries over"), (8, 0.75, "not shown to carry over"), (4, 1.0, "too few")):
        numbers, words = health.stage3(tmp_path, count, {0.5: 1.0, 1.0: 0.9}, {0.5: 1.0, 1.0: at_1})[-2:]
        assert f"1.00 / 1.00 at t = 0.5, 0.90 / {at_1:.2f} at t = 1; chance: 0.5 +- 0." in numbers and said in words
    assert "held out" not in "".join(health.stage3(tmp_path))


def test_a_run_that_changes_its_device_keeps_its_verdicts(tmp_path):
    """On a GPU the lines of the log have the memory, too."""
    for verdicts, fine in ((health.stage2, FINE2), (health.stage3, FINE3)):
        for more in (({"memory_gb": 1.0}, {}), ({}, {"memory_gb": 1.0})):
            (tmp_path / "log.jsonl").write_text("".join(json.dumps({"step": 1} | fine | x) + "\n" for x in more))
            assert verdicts(tmp_path)


def test_verdicts_on_what_changes_over_a_run(tmp_path):
    """Eight lines, as the preset tiny writes: the loss of the fake score grows."""
    for ratio, flagged in ((1.0, False), (1.6, False), (2.5, True)):
        with open(tmp_path / "log.jsonl", "w") as f:
            lines = [{"step": k} | FINE2 | dict(diff=0.1 * (ratio if k > 3 else 1)) for k in range(8)]
            f.writelines(json.dumps(line) + "\n" for line in lines)
        assert ("lags behind the student" in "\n".join(health.stage2(tmp_path))) == flagged
    for shown, flagged in ((1.4, False), (1.6, True)):                  # log lines are of one batch each and miss it
        assert ("1.6 times HR's detail: grain" in "\n".join(health.stage2(tmp_path, (), shown))) == flagged
    for woven, flagged in (((6.0, 3.0), False), ((7.0, 3.0), True), ((7.0, 0.0), False)):
        words = "\n".join(health.stage2(tmp_path, (), 0, woven))
        assert ("of smooth areas, HR's 3 %: raise aux_per_student" in words) == flagged == ("lattice" in words)
    for gone, said in (("pull_dmd", "HR's 3 %: the GAN without DMD beside it weaves one"), ("pull_gan", "HR's 3 %")):
        fine = {k: v for k, v in FINE2.items() if k != gone}            # one stream alone
        (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1} | fine) + "\n")
        words = health.stage2(tmp_path, (), 0, (7.0, 3.0))
        assert said in words[-1] and "raise" not in "".join(words)
    pulls = [1.0] * 6 + [100.0] * 2                                     # two batches of eight do not make a verdict
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"step": k} | FINE2 | dict(pull_gan=x)) + "\n"
                                                for k, x in enumerate(pulls)))
    assert "pulls 0.5 times as hard" in "\n".join(health.stage2(tmp_path))
    rows = [{"t": t, "student": s, "hr": 0.1} for t, s in ((0.1, 0.5), (0.5, 0.3), (0.9, None))]
    words = "\n".join(health.stage2(tmp_path, rows))
    assert "t = 0.1: 0.50 / 0.10 px, t = 0.5: 0.30 / 0.10 px" in words and words.count("raise w_gan") == 1
    lines = [{"step": 10, "ratio": 0.2, "guidance": 1e-5}, {"step": 20, "ratio": 0.8}, {"step": 30, "ratio": 0.5}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    said = {k: "\n".join(health.stage1(tmp_path, k)) for k in (10, 20, 30)}
    assert "(good)" in said[10] and "nothing to teach; raise cfg_w" in said[10] and "train it longer" in said[20]
    assert "good" not in said[30] and "longer" not in said[30]


@pytest.mark.parametrize("losses, word", [([1.0] * 8, "too few"), ([1.0] * 40, "settled"),
                                          ([1.0] * 20 + [0.2, 1.4] * 5 + [0.5, 1.7] * 5, "level"),
                                          ([1.0] * 30 + [2.0] * 10, "rises"),
                                          ([1 / (k + 1) for k in range(40)], "still falls")])
def test_the_teachers_panel_says_how_training_goes(tmp_path, losses, word):
    with open(tmp_path / "log.jsonl", "w") as f:
        f.writelines(json.dumps({"step": k, "loss": x}) + "\n" for k, x in enumerate(losses))
    assert word in health.stage0(tmp_path)[0]


def test_spatial_offset_is_the_shift_of_what_the_real_score_draws():
    """A real score that moves a student's sample by one latent, 4 px, and leaves HR where it is."""
    torch.manual_seed(0)
    video = torch.nn.functional.interpolate(torch.rand(2 * 5, 3, 24, 24), scale_factor=4, mode="bicubic").clamp(0, 1)
    video = (2 * video - 1).unflatten(0, (2, 5)).transpose(1, 2)
    vae = M.PatchVAE()
    vae.fit(video)
    z = vae.encode(video)
    rows = health.spatial_offsets(lambda z_t, t: z if torch.equal(z_t, z) else z.roll(1, -1), 0 * z, z, vae, z, (0.0,))
    assert rows[0]["t"] == 0 and rows[0]["student"] == pytest.approx(4, abs=0.1) and rows[0]["hr"] < 0.01


# ----------------------------------------------------------------------------
# what large models need


def count_passes(patch):
    """{id of a network: [forwards without a graph, with one to the input alone, with one to the weights]}, filled as
    networks run: whether a forward is differentiated is asked where it happens, not where it is meant to."""
    counts, forward = {}, M.DiT.forward

    def counted(net, z, *args, **kwargs):
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in net.parameters())
        to_input = torch.is_grad_enabled() and z.requires_grad
        kind = 2 if trains else 1 if to_input else 0
        counts.setdefault(net, [0, 0, 0])[kind] += len(z)
        return forward(net, z, *args, **kwargs)
    patch.setattr(M.DiT, "forward", counted)
    return counts


class Enough(Exception):
    """Raised where the panel would begin: its forwards are not the step's."""


def enough(*args):
    raise Enough


STAGE2_ARMS = [dict(), dict(features="real"), dict(features="fake"), dict(streams=("dmd",)), dict(streams=("gan",)),
               dict(real_score="teacher"), dict(aux_per_student=1), dict(accumulate=2), dict(streams=("mse",)),
               dict(streams=("mse",), real_score="teacher"), dict(streams=("mse", "gan")), dict(init="cfg")]


@pytest.mark.parametrize("changes", STAGE2_ARMS)
def test_stage2_makes_the_passes_it_announces(chain, tmp_path, monkeypatch, changes):
    """Counted in one iteration: 30 forwards' worth with both streams, nothing differentiated that need not be."""
    cfg = fork(chain, stage2, tmp_path, ["stage0", "stage1"], steps=1, aux_warmup=0, log_every=10**6,
               save_every=10**6, **changes)
    monkeypatch.setattr(data, "panel_batch", enough)
    counts = count_passes(monkeypatch)
    with pytest.raises(Enough):
        stage2.main(cfg)
    want = {name: list(numbers) for name, (_, *numbers) in stage2.passes(cfg).items() if any(numbers)}
    assert sorted([n // cfg.batch for n in c] for c in counts.values()) == sorted(want.values())
    total = sum(a + 2 * i + 3 * f for a, i, f in want.values())
    assert total == {0: 30}.get(len(changes), 3 if changes.get("streams") == ("mse",) else total)


@pytest.mark.parametrize("stage, changes", [
    (stage0, dict(steps=1)), (stage0, dict(steps=1, accumulate=3)), (stage1, dict(cfg_steps=1)),
    (stage3, dict(steps=1, held=0)), (stage3, dict(steps=1, held=0, lora=2))])
def test_other_stages_make_the_passes_they_announce(chain, tmp_path, monkeypatch, stage, changes):
    cfg = fork(chain, stage, tmp_path, ["stage0", "stage1", "stage2"][:[stage0, stage1, None, stage3].index(stage)],
               log_every=10**6, save_every=10**6, **changes)
    counts = {}

    def start_counting(*args):                                          # the candidates' forwards are not the step's
        counts.update(new=count_passes(monkeypatch))
        monkeypatch.setattr(M, "one_step", enough)
    monkeypatch.setattr(stage3, "show_pairs", start_counting)
    if stage is not stage3:
        counts["new"] = count_passes(monkeypatch)
        monkeypatch.setattr(data, "panel_batch", enough)
    with pytest.raises(Enough):
        stage.main(cfg)
    samples = cfg.batch * (2 if stage is stage3 else 1)
    found = sorted([n // samples for n in c] for c in counts["new"].values())
    want = sorted(list(numbers) for _, *numbers in stage.passes(cfg).values() if any(numbers))
    if "lora" in changes:                                               # the adapters are the weights that it counts
        want = sorted([a, 0, i + f] for a, i, f in want)
    assert found == want


@pytest.mark.parametrize("number, stage", [*enumerate((stage0, stage1, stage2, stage3))])
def test_dry_run_tells_the_size_of_a_checkpoint(chain, capsys, number, stage):
    """Without what it does not count: the video code and the head."""
    def size(part):
        return part.nbytes if torch.is_tensor(part) else sum(map(size, part.values())) if isinstance(part, dict) else 0
    state = checkpoint(chain[stage], f"stage{number}")
    want = sum(size(part) for name, part in state.items() if name not in ("vae", "head", "opt_head"))
    stage.main(replace(chain[stage], dry_run=True))
    said = re.search(r"A checkpoint takes about (\S+) GB", capsys.readouterr().out)[1]
    assert float(said) * 1e9 == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize("stage", [stage0, stage1, stage2, stage3])
def test_accumulated_passes_train_as_one_large_batch(chain, tmp_path, monkeypatch, stage):
    upto, ends, norms = ["stage0", "stage1", "stage2"], [], []
    for name, batch, passes in (("whole", 2, 1), ("parts", 1, 2)):
        cfg = fork(chain, stage, tmp_path / name, upto[:list(chain).index(stage)], batch=batch, accumulate=passes)
        monkeypatch.setattr(data, "panel_batch", enough)
        monkeypatch.setattr(common, "panel", lambda *args: None)
        try:
            stage.main(cfg)
        except Enough:
            pass
        number = list(chain).index(stage)
        ends.append(checkpoint(cfg, f"stage{number}"))
        lines = common.read_log(f"{cfg.out}/stage{number}")
        norms.append([line[k] for line in lines for k in ("grad_norm", "grad_norm_fake") if k in line])
    assert norms[1] == pytest.approx(norms[0], rel=5e-3)                # Adam would not see a wrong scale
    for part in {"net", "student", "fake"} & set(ends[0]):
        one, two = (torch.cat([x.flatten() for x in end[part].values()]) for end in ends)
        assert (one - two).norm() < 1e-3 * one.norm(), part


@pytest.mark.parametrize("stage", [stage0, stage1, stage2])
def test_every_pass_of_a_stage_sees_clips_of_its_own(chain, tmp_path, monkeypatch, stage):
    """One batch after the other, in the warm-up as well."""
    cfg = fork(chain, stage, tmp_path, ["stage0", "stage1"][:list(chain).index(stage)], accumulate=2)
    firsts, latents = [], data.Bank.latents

    def spied(self, vae, first, count, *rest):
        firsts.append((first, count))
        return latents(self, vae, first, count, *rest)
    monkeypatch.setattr(data.Bank, "latents", spied)
    stage.main(cfg)
    firsts = [first for first, count in firsts if count == cfg.batch]              # panels take four
    steps = {stage0: 4, stage1: 6, stage2: 2 + 4 * 4}[stage]
    assert firsts == [k * cfg.batch for k in range(2 * steps)]


def test_checkpointing_changes_memory_not_numbers(chain, tmp_path, monkeypatch):
    """And it is used, in every stage, by every block of every network that is under grad."""
    checkpointed = Counter()

    def spy(block, *args, **how):
        checkpointed[id(block)] += 1
        return torch.utils.checkpoint.checkpoint(block, *args, **how)
    monkeypatch.setattr(M, "checkpoint", spy)
    blocks = M.MODELS["tiny"]["layers"]
    for k, stage, parts, networks in ((0, stage0, ("net", "ema"), 1), (1, stage1, ("student", "cfg"), 1),
                                      (2, stage2, ("net", "fake", "head"), 3), (3, stage3, ("student",), 1)):
        cfg = fork(chain, stage, tmp_path / str(k), [f"stage{i}" for i in range(k)], checkpointing=True)
        checkpointed.clear()
        stage.main(cfg)
        assert len(checkpointed) == networks * blocks, stage
        plain, again = (checkpoint(c, f"stage{k}") for c in (chain[stage], cfg))
        for part in parts:
            assert_equal(plain[part], again[part], part)


def test_dpo_through_adapters(chain, tmp_path, monkeypatch):
    """The adapters alone are trained and kept; the student that is written is a plain network that has moved."""
    cfg = fork(chain, stage3, tmp_path, ["stage0", "stage1", "stage2"], lora=2, steps=4, save_every=2, lr=1e-2)
    kill(stage3, cfg, 2, monkeypatch)
    half = checkpoint(cfg, "stage3")
    assert set(half["student"]) == set(checkpoint(chain[stage3], "stage3")["student"])
    assert moved(half["student"], checkpoint(cfg, "stage2")["student"]) and "net" not in half
    assert len(half["optimiser"]["state"]) == len(half["lora"])
    cfg.resume = True
    stage3.main(cfg)
    M.load_checkpoint(f"{cfg.out}/stage3/last.pt", finished=True)
    whole = fork(chain, stage3, tmp_path / "whole", ["stage0", "stage1", "stage2"], lora=2, steps=4, lr=1e-2)
    stage3.main(whole)
    assert_equal(checkpoint(whole, "stage3")["student"], checkpoint(cfg, "stage3")["student"])


def test_a_finished_run_keeps_its_notes(chain, tmp_path, monkeypatch):
    cfg = fork(chain, stage1, tmp_path, ["stage0"])
    stage1.main(cfg)
    monkeypatch.setattr(common, "commit", lambda: "later")
    cfg.resume = True
    stage1.main(cfg)
    assert json.load(open(f"{cfg.out}/stage1/run.json"))["commit"] != "later"


def test_stages_train_on_cached_latents(chain, tmp_path, footage, monkeypatch):
    """Encoded once, interrupted and gone on with, the latents are those of the clips; every stage takes them."""
    vae = M.load_checkpoint(f"{chain[stage0].out}/stage0/last.pt", "ema")[1]
    path = str(tmp_path / "latents.bin")
    data.main(["prepare", "--latents", path, "--data", str(footage), "--model", "tiny", "--clips", "5",
               "--vae", f"{chain[stage0].out}/stage0/last.pt"])
    whole = np.fromfile(path, np.float16)
    about = data.read_latents_about(path)
    encode, calls = vae.encode, []

    def until(n):
        def spy(video):
            calls.append(1)
            if len(calls) > n:
                raise KeyboardInterrupt
            return encode(video)
        calls.clear()
        return spy
    for lost in (lambda: (os.remove(path), os.remove(f"{path}.pt")), lambda: os.remove(path),
                 lambda: os.truncate(path, 100)):                       # what lost its rows is made again, whole
        lost()
        monkeypatch.setattr(vae, "encode", until(6))                    # killed in the third clip, three videos each
        with pytest.raises(KeyboardInterrupt):
            data.prepare_latents(path, footage, "tiny", vae, 5, save_every=1)
        with pytest.raises(SystemExit, match="2 of 5 clips"):
            data.LatentBank(path, "tiny")
        monkeypatch.setattr(vae, "encode", until(9))                    # the three that are left, not one more
        data.prepare_latents(path, footage, "tiny", vae, 5)
        assert np.array_equal(np.fromfile(path, np.float16), whole)
    os.remove(path)
    monkeypatch.setattr(vae, "encode", encode)
    with pytest.raises(SystemExit, match="has 5 clips already; --clips: that many, or more"):
        data.prepare_latents(path, footage, "tiny", vae, 3)
    os.remove(f"{path}.pt")
    data.prepare_latents(path, footage, "tiny", vae, 3)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="make room"):
        patch.setattr(os, "posix_fallocate", lambda fd, start, size: os.truncate(fd, size) or os.write(-1, b""))
        data.prepare_latents(path, footage, "tiny", vae, 5)
    data.prepare_latents(path, footage, "tiny", vae, 3)                 # a full disk: the three are there
    assert np.array_equal(np.fromfile(path, np.float16), whole[:len(whole) // 5 * 3])
    assert len(data.LatentBank(path, "tiny")) == 3
    monkeypatch.setattr(vae, "encode", until(6))                        # two more, not one of the three again
    data.prepare_latents(path, footage, "tiny", vae, 5)
    assert np.array_equal(np.fromfile(path, np.float16), whole)
    monkeypatch.setattr(vae, "encode", encode)
    assert data.read_latents_about(path)["done"] == about["done"] == 5
    hr, lr = data.Clips(footage, 9, 48, "light").survey().clip(0, 3)
    rng = np.random.default_rng([0, 3])
    y, x = rng.integers(0, 5, 2)
    sigma = torch.tensor([0.7 + 0.8 * rng.random()])
    hr, lr = hr[:, 4 * y:4 * y + 32, 4 * x:4 * x + 32], lr[:, y:y + 8, x:x + 8]
    hr = data.to_tensor(hr)[None]
    want = vae.encode(hr), vae.encode(data.upsample(data.to_tensor(lr)[None], (32, 32)))
    bank = data.LatentBank(path, "tiny")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="clips of another size than CLIPS"):
        patch.setitem(data.CLIPS, "tiny", SMALL_CLIP | dict(crop=16))
        data.training_bank(chain[stage0], 0, path)
    got = bank.latents(vae, 0, 5, "cpu")
    k = int((got[0] - want[0]).abs().flatten(1).amax(1).argmin())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a[k], b[0], atol=2e-2, rtol=2e-3)
    soft = bank.latents(vae, 0, 5, "cpu", torch.tensor([True, False, True, False, False]))
    assert [torch.equal(a, b) for a, b in zip(soft[0], got[0], strict=True)] == [False, True, False, True, True]
    soft = bank.latents(vae, 0, 5, "cpu", torch.ones(5, dtype=torch.bool))[0]
    torch.testing.assert_close(soft[k], vae.encode(data.soften(hr, sigma))[0], atol=2e-2, rtol=2e-3)
    for k, stage in enumerate((stage0, stage1, stage2)):
        cfg = fork(chain, stage, tmp_path, [], latents=path, data="nowhere")
        stage.main(cfg)
        assert checkpoint(cfg, f"stage{k}")["step"] > 0
    other = M.PatchVAE()
    other.fit(torch.rand(1, 3, 5, 32, 32))
    with pytest.raises(SystemExit, match="another video code"):
        bank.latents(other, 0, 1, "cpu")
    with pytest.raises(SystemExit, match="other settings"):
        data.prepare_latents(path, footage, "tiny", other, 5)
    with pytest.raises(SystemExit, match="missing; make latents"):
        data.LatentBank(str(tmp_path / "nothing.bin"), "tiny")
    (tmp_path / "alone.bin").touch()
    with pytest.raises(SystemExit, match="beside it, not readable"):
        data.LatentBank(str(tmp_path / "alone.bin"), "tiny")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="other settings, media"):
        patch.setitem(degradation.STRENGTHS, "light", replace(degradation.LIGHT, kernel=(7, 7)))
        data.prepare_latents(path, footage, "tiny", vae, 5)
    with pytest.raises(SystemExit, match="cannot be written"):
        data.prepare_latents("/proc/latents.bin", footage, "tiny", vae, 5)
    with pytest.raises(SystemExit):
        data.main(["prepare", "--latents", str(tmp_path / "none.bin"), "--vae", "x", "--clips", "0"])
    (tmp_path / "film.mkv").write_bytes(b"film")
    with pytest.raises(SystemExit, match="is no file of latents"):
        data.prepare_latents(str(tmp_path / "film.mkv"), footage, "tiny", vae, 5)
    os.truncate(path, 100)
    with pytest.raises(SystemExit, match="cut short"):
        data.LatentBank(path, "tiny")
    torch.save({"a": 1}, f"{path}.pt")
    with pytest.raises(SystemExit, match="not readable"):
        data.LatentBank(path, "tiny")


@pytest.mark.parametrize("stage", [stage0, stage1, stage2, stage3])
def test_a_step_of_no_passes_is_refused(chain, tmp_path, stage):
    cfg = fork(chain, stage, tmp_path, [], accumulate=0)
    with pytest.raises(SystemExit, match="accumulate 0: at least 1"):
        stage.main(cfg)


@pytest.mark.parametrize("stage, field, value, words", [
    (stage0, "steps", 0, "at least 1"), (stage1, "shift", 0.0, "above 0"),
    (stage2, "aux_per_student", -1, "at least 0"), (stage2, "aux_warmup", -5, "at least 0"),
    (stage3, "seed", -1, "at least 0")])
def test_numbers_that_no_run_can_have_are_refused(chain, tmp_path, stage, field, value, words):
    cfg = fork(chain, stage, tmp_path, [], **{field: value})
    with pytest.raises(SystemExit, match=f"{field} {value}: {words}"):
        stage.main(cfg)


def test_checkpointing_may_change_on_resume(chain, tmp_path):
    """It changes no number, and is what one turns on after running out of memory."""
    cfg = fork(chain, stage2, tmp_path, ["stage0", "stage1"], steps=2)
    stage2.main(cfg)
    cfg.steps, cfg.resume, cfg.checkpointing = 4, True, True
    stage2.main(cfg)
    assert_equal(checkpoint(chain[stage2], "stage2")["net"], checkpoint(cfg, "stage2")["net"])
    cfg.w_gan = 0.3
    with pytest.raises(SystemExit, match="another w_gan"):
        stage2.main(cfg)


# ----------------------------------------------------------------------------
# real processes

CHILD = """
import sys; sys.path.insert(0, {root!r})
import torch; torch.set_num_threads(1)
from tests.test_stages import *
shrink()
configs = constants({out!r}, {footage!r})
end, common.cleanup = common.cleanup, lambda: None              # a group cannot be made twice in one process
DDP, wrapped = common.DistributedDataParallel, []

def spy(net, **how):
    wrapped.append(DDP(net, **how))
    return wrapped[-1]
common.DistributedDataParallel = spy
for stage, cfg in configs.items():
    cfg.batch, cfg.accumulate, cfg.resume = {batch}, {accumulate}, {resume}
    stage.main(cfg)
    common.barrier()                                            # real stages begin when all of the last one have ended
    if torch.distributed.is_initialized():                      # of stage II student, fake score and head
        assert len(wrapped) == (3 if stage is stage2 else 1) and not any(x.find_unused_parameters for x in wrapped)
    wrapped.clear()
end()
"""


def start(tmp_path, footage, name, batch=2, accumulate=1, resume=False, processes=1):
    code = CHILD.format(root=ROOT, out=str(tmp_path / name / "tiny"), footage=str(footage), batch=batch,
                        accumulate=accumulate, resume=resume)
    (tmp_path / f"{name}.py").write_text(code)
    head = [sys.executable]
    if processes > 1:
        head += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen([*head, str(tmp_path / f"{name}.py")], stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("passes", [1, 2])
def test_two_processes_train_as_one_with_the_whole_batch(tmp_path, footage, passes):
    two = start(tmp_path, footage, "two", batch=1, accumulate=passes, processes=2)
    err = two.communicate()[1]
    assert two.returncode == 0, err[-3000:]
    shrink()
    for stage, cfg in constants(tmp_path / "one" / "tiny", footage).items():
        cfg.batch = 2 * passes
        stage.main(cfg)
    for k in range(4):
        folders = [tmp_path / name / "tiny" / f"stage{k}" for name in ("one", "two")]
        logs = [[json.loads(x) for x in open(folder / "log.jsonl")] for folder in folders]
        assert len(logs[0]) == len(logs[1]) > 0
        for a, b in zip(*logs, strict=True) if passes == 1 else ():    # of several passes the last one is logged
            for key in {"loss", "diff", "d", "dmd", "gan", "fm", "dpo"} & set(a):
                assert b[key] == pytest.approx(a[key], rel=2e-3, abs=2e-5), (k, a["step"], key)
        parts = [torch.load(folder / "last.pt", weights_only=True) for folder in folders]
        # not the head: its first steps follow the signs of rounding errors
        for name in {"net", "student", "fake"} & set(parts[0]):
            one, two = (torch.cat([x.flatten() for x in p[name].values()]) for p in parts)
            assert (one - two).norm() < 1e-3 * one.norm(), (k, name)
        if k:                                                   # and the two end closer than the stage has moved
            one, two = (torch.cat([x.flatten() for x in p["student"].values()]) for p in parts)
            before = torch.load(tmp_path / "one" / "tiny" / f"stage{k - 1}" / "last.pt", weights_only=True)
            before = torch.cat([x.flatten() for x in before["ema" if k == 1 else "student"].values()])
            assert (one - two).norm() < 0.1 * (one - before).norm(), k


@pytest.mark.slow
def test_killed_at_a_random_moment_and_resumed_is_bit_equal(chain, tmp_path, footage):
    """SIGKILL, three times, wherever the run happens to be; --resume each time; the end is the unbroken run's."""
    rng = np.random.default_rng()
    for _ in range(3):
        child = start(tmp_path, footage, "killed", resume=True)
        time.sleep(rng.uniform(4, 9))
        child.send_signal(signal.SIGKILL)
        child.wait()
    child = start(tmp_path, footage, "killed", resume=True)
    err = child.communicate()[1]
    assert child.returncode == 0, err[-3000:]
    for k, cfg in enumerate(chain.values()):
        whole = checkpoint(cfg, f"stage{k}")
        killed = torch.load(tmp_path / "killed" / "tiny" / f"stage{k}" / "last.pt", weights_only=True)
        assert_equal({x: whole[x] for x in whole if x not in ("config", "source")}, killed, f"stage{k}")


@pytest.mark.slow
def test_two_nodes_of_two_processes_train_as_one(chain, tmp_path, footage):
    """README's command for several nodes: two agents meet at an address, four processes make a batch of 4."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "node.py"
    script.write_text(CHILD.format(root=ROOT, out=str(tmp_path / "four" / "tiny"), footage=str(footage), batch=1,
                                   accumulate=1, resume=False))
    agents = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d",
         f"--rdzv_endpoint=127.0.0.1:{port}", str(script)], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for agent in agents:
        err = agent.communicate(timeout=400)[1]
        assert agent.returncode == 0, err[-3000:]
    shrink()
    for stage, cfg in constants(tmp_path / "one" / "tiny", footage).items():
        cfg.batch = 4
        stage.main(cfg)
    for k in range(4):
        logs = [common.read_log(str(tmp_path / name / "tiny" / f"stage{k}")) for name in ("one", "four")]
        for a, b in zip(*logs, strict=True):
            for key in {"loss", "diff", "d", "dmd", "gan", "fm", "dpo"} & set(a):
                assert b[key] == pytest.approx(a[key], rel=5e-3, abs=5e-5), (k, a["step"], key)
