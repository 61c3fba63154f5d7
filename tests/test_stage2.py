"""Stage II against closed forms: the DMD gradient, the GAN losses, and who receives whose gradient."""
import pytest
import torch

import model as M
import stage2_dual as stage2
from tests.test_maths import exact_velocity, posterior_mean, tiny_net


def clip(*values, n=16):
    """One 'sample' per value, filled with it: (B, 1, 1, 1, n)."""
    return torch.tensor(values).view(-1, 1, 1, 1, 1).expand(-1, 1, 1, 1, n).clone()


def test_dmd_gradient_points_from_fake_to_real():
    z, t = torch.tensor([0.7]).view(1, 1, 1, 1, 1), torch.tensor([0.5])
    x_real = M.to_x0(z, exact_velocity(z, t, m=0.0), t)
    x_fake = M.to_x0(z, exact_velocity(z, t, m=2.0), t)
    g, keep = stage2.dmd_gradient(clip(2.0, n=1), x_real, x_fake)
    assert g.item() == pytest.approx(1.0 / 1.3) and keep.item() == 1
    assert (x_fake - x_real).item() == pytest.approx(1.0)


def test_dmd_loss_has_the_gradient_g_over_n():
    z_0 = torch.randn(2, 4, 1, 4, 4, requires_grad=True)
    g = torch.randn_like(z_0)
    loss = stage2.dmd_loss(z_0, g, torch.ones(2))
    loss.backward()
    torch.testing.assert_close(z_0.grad, g / g.numel())
    assert loss.item() == pytest.approx(0.5 * g.square().mean().item(), rel=1e-4)
    z_0.grad = None
    stage2.dmd_loss(z_0, g, torch.ones(2), half=False).backward()
    torch.testing.assert_close(z_0.grad, 2 * g / g.numel())


def test_dmd_in_fp32_loses_nothing():
    grads = []
    z_0, x_real, x_fake = torch.randn(3, 2, 4, 1, 4, 4).double()
    for dtype in (torch.float32, torch.float64):
        z = z_0.to(dtype).requires_grad_()
        g, keep = stage2.dmd_gradient(z.detach(), x_real.to(dtype), x_fake.to(dtype))
        stage2.dmd_loss(z, g, keep.to(dtype)).backward()
        grads.append(z.grad.double())
    assert ((grads[0] - grads[1]).norm() / grads[1].norm()).item() < 1e-6


def test_dmd_normaliser_is_per_sample():
    z_0, x_real, x_fake = clip(1.0, 10.0), clip(0.0, 0.0), clip(0.5, 0.5)
    g, _ = stage2.dmd_gradient(z_0, x_real, x_fake)
    torch.testing.assert_close(g, clip(0.5, 0.05))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_spikes_and_nan_are_skipped(bad):
    z_0 = clip(1.0, 1.0, 1.0, 1.0).requires_grad_()
    g, keep = stage2.dmd_gradient(z_0.detach(), clip(0.0, 0.99, bad, 0.0), clip(0.5, 2.0, 1.0, bad))
    assert keep.tolist() == [1, 0, 0, 0]
    stage2.dmd_loss(z_0, g, keep).backward()
    assert z_0.grad[0].abs().sum() > 0 and z_0.grad[1:].abs().sum() == 0 and torch.isfinite(z_0.grad).all()


@pytest.mark.parametrize("t, shift, norm, ratio", [(.25, .2, .3011, .664), (.5, 1.0, 1.0507, .952),
                                                   (.75, 1.8, 1.8202, .989)])
def test_dmd_mean_shift_of_gaussians(t, shift, norm, ratio):
    """Student N(2, 1), real N(0, 1), exact scores: E[x_fake - x_real] = 2 t^2 / (t^2 + (1 - t)^2)."""
    n, t = 400_000, torch.tensor([t])
    z_0, eps = 2 + torch.randn(1, 1, 1, 1, n), torch.randn(1, 1, 1, 1, n)
    z_t = M.add_noise(z_0, eps, t)
    x_real, x_fake = posterior_mean(z_t, t, 0.0, 1.0), posterior_mean(z_t, t, 2.0, 1.0)
    assert (x_fake - x_real).mean().item() == pytest.approx(shift, abs=0.01)
    assert (z_0 - x_real).abs().mean().item() == pytest.approx(norm, abs=0.01)
    g, _ = stage2.dmd_gradient(z_0, x_real, x_fake)
    assert g.mean().item() == pytest.approx(ratio, abs=0.01)


def test_dmd_spreads_a_collapsed_student():
    z, t = torch.randn(1, 1, 1, 1, 8), torch.tensor([0.5])
    x_fake, x_real = posterior_mean(z, t, 0.0, 0.5), posterior_mean(z, t, 0.0, 1.0)
    torch.testing.assert_close(x_fake - x_real, -0.6 * z)               # a step against it pushes outwards
    g, _ = stage2.dmd_gradient(z, x_real, x_fake)
    assert (torch.sign(-g) == torch.sign(z)).all()


@pytest.mark.parametrize("sign, converges", [(1, True), (-1, False)])
def test_dmd_with_exact_scores_finds_the_data(sign, converges):
    """Student a + b eps, exact scores of itself and of data N(0, 1): a -> 0, |b| -> 1; with the wrong sign a grows."""
    a, b = (torch.tensor(x, requires_grad=True) for x in (3.0, 0.2))
    optimiser = torch.optim.Adam([a, b], lr=0.02)
    for _ in range(1500):
        z_0 = a + b * torch.randn(4, 1, 1, 1, 1024)
        t = stage2.score_times(torch.rand(4), 0.02, 0.98, 1.0)
        with torch.no_grad():
            z_t = M.add_noise(z_0, torch.randn_like(z_0), t)
            g, keep = stage2.dmd_gradient(z_0, posterior_mean(z_t, t, 0.0, 1.0),
                                          posterior_mean(z_t, t, a.item(), b.item()))
        optimiser.zero_grad()
        stage2.dmd_loss(z_0, sign * g, keep).backward()
        optimiser.step()
        if abs(a.item()) > 6:
            break
    if converges:
        assert abs(a.item()) < 0.1 and abs(abs(b.item()) - 1) < 0.1
    else:
        assert abs(a.item()) > 4


def test_score_times_have_no_atoms():
    u = torch.rand(200_000)
    for shift in (1.0, 5.0, 8.0):
        t = stage2.score_times(u, 0.02, 0.98, shift)
        assert t.min() >= 0.02 and t.max() <= 0.98
        assert (t == t.max()).sum() <= 3
    t = stage2.score_times(u, 0.02, 0.98, 1.0)
    assert t.mean().item() == pytest.approx(0.5, abs=0.005) and (t > 0.975).float().mean() < 0.015
    assert stage2.score_times(torch.tensor([0.5]), 0.0, 1.0, 5.0).item() == pytest.approx(5 / 6)


# ----------------------------------------------------------------------------
# GAN and feature matching


def test_hinge_values():
    zero = torch.zeros(2, 3, 4, 4)
    assert stage2.hinge_d(zero, zero).item() == 2.0 and stage2.hinge_g(zero).item() == 0.0
    wide = torch.tensor([[-3.0, 3.0]])                                  # hinge first, mean over patches afterwards
    assert stage2.hinge_d(wide, -wide).item() == 4.0
    assert stage2.hinge_d(torch.full((2,), 1.5), torch.full((2,), -1.5)).item() == 0.0


def test_generator_gradient_through_the_noising():
    z_0 = torch.zeros(2, 1, 1, 1, 1, requires_grad=True)
    stage2.hinge_g(M.add_noise(z_0, torch.randn_like(z_0), torch.full((2,), 0.5))).backward()
    assert z_0.grad.flatten().tolist() == [-0.25, -0.25]


def test_feature_matching_values():
    f = [torch.randn(2, 200, 64) for _ in range(3)]
    assert stage2.fm_loss(f, f).item() == 0
    assert stage2.fm_loss(f, [torch.randn(2, 200, 64) for _ in f]).item() == pytest.approx(2, abs=0.05)
    assert stage2.fm_loss(f, [-x for x in f]).item() == pytest.approx(4, abs=1e-3)
    assert stage2.fm_loss(f, [5 * x + 1 for x in f]).item() == pytest.approx(0, abs=1e-6)    # scale-free
    real = [x.clone().requires_grad_() for x in f]
    fake = [torch.randn(2, 200, 64, requires_grad=True) for _ in f]
    stage2.fm_loss(fake, real).backward()
    assert all(x.grad is None for x in real) and all(x.grad.abs().sum() > 0 for x in fake)   # HR is the target


# The ownership of gradients and the sharing of noise are properties of main's loop: they are tested on the loop
# itself, in test_stages.py, by spying on the losses while it runs.


def test_equal_scores_give_no_gradient_and_guidance_does():
    net = tiny_net()
    z_0, eps, z_lr = torch.randn(3, 2, 16, 1, 4, 4)
    t = torch.tensor([0.3, 0.7])
    z_t = M.add_noise(z_0, eps, t)
    v = net(z_t, t, z_lr, M.prompt(z_t))
    x = M.to_x0(z_t, v, t)
    assert stage2.dmd_gradient(z_0, x, x)[0].abs().max() == 0
    guided = M.guide(v, net(z_t, t, z_lr, M.prompt(z_t, M.AGAINST)), 1.0)
    assert stage2.dmd_gradient(z_0, M.to_x0(z_t, guided, t), x)[0].abs().max() > 1e-3


@pytest.mark.parametrize("changes, words", [
    (dict(order="both"), "joint, sequential"), (dict(features="none"), "both, real"),
    (dict(streams=("vgg",)), "dmd, gan"), (dict(t_max=2.0), "t_max 2.0: times between"),
    (dict(t_min=0.99), "smaller first"),
    (dict(real_score="x"), "cfg, teacher"), (dict(order="sequential", streams=("dmd",)), "needs both")])
def test_bad_constants_are_refused(changes, words):
    with pytest.raises(SystemExit, match=words):
        stage2.check(stage2.Config(**changes))
