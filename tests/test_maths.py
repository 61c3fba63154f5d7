"""Conventions of model.py and the maths of stage 0, against closed forms."""
import math

import pytest
import torch

import data
import model as M
import stage0_teacher as stage0


def posterior_mean(z, t, m, s):
    """E[z_0 | z_t] for scalar data N(m, s^2): the exact clean estimate of a Gaussian model."""
    t = M.bcast(t, z)
    return m + (1 - t) * s**2 / ((1 - t)**2 * s**2 + t**2) * (z - (1 - t) * m)


def exact_velocity(z, t, m=0.0, s=1.0):
    return (z - posterior_mean(z, t, m, s)) / M.bcast(t, z)


def to_eps(z_t, v, t):
    return z_t + (1 - M.bcast(t, z_t)) * v


def test_conversions_are_one_convention():
    z_0, eps = torch.randn(2, 3, 4, 2, 8, 8)
    for t in (0.1, 0.5, 0.9):
        t = torch.full((3,), t)
        z_t = M.add_noise(z_0, eps, t)
        v = torch.randn_like(z_t)                   # any v, not only the true one
        again = M.add_noise(M.to_x0(z_t, v, t), to_eps(z_t, v, t), t)
        torch.testing.assert_close(again, z_t, atol=1e-6, rtol=0)
        torch.testing.assert_close(M.to_x0(z_t, eps - z_0, t), z_0, atol=1e-6, rtol=0)
        torch.testing.assert_close(to_eps(z_t, eps - z_0, t), eps, atol=1e-6, rtol=0)


def test_ends_of_the_path():
    z_0, eps = torch.randn(2, 1, 4)
    assert torch.equal(M.add_noise(z_0, eps, torch.zeros(1)), z_0)
    assert torch.equal(M.add_noise(z_0, eps, torch.ones(1)), eps)


def test_velocity_and_x0_differ_in_sign():
    z, t = torch.tensor([0.7]), torch.tensor([0.5])
    v_fake, v_real = exact_velocity(z, t, m=2.0), exact_velocity(z, t, m=0.0)
    x_fake, x_real = M.to_x0(z, v_fake, t), M.to_x0(z, v_real, t)
    assert x_fake.item() == pytest.approx(1.7) and x_real.item() == pytest.approx(0.7)
    assert (v_fake - v_real).item() == pytest.approx(-2.0)
    torch.testing.assert_close(x_fake - x_real, t * (v_real - v_fake))


@pytest.mark.parametrize("w, expected", [(0, 2.0), (1, 3.6), (2, 5.2)])
def test_guidance(w, expected):
    v_c, v_neg = torch.tensor(2.0), torch.tensor(0.4)
    assert M.guide(v_c, v_neg, w).item() == pytest.approx(expected)
    assert M.guide(v_c, v_c, w).item() == 2.0


def test_guidance_of_gaussians_moves_the_mean():
    z, t = torch.tensor([0.7]), torch.tensor([0.5])
    v = M.guide(exact_velocity(z, t, m=1.0), exact_velocity(z, t, m=0.0), w=1)
    assert M.to_x0(z, v, t).item() == pytest.approx(1.7)
    torch.testing.assert_close(v, exact_velocity(z, t, m=2.0))                          # N((1 + w) m, 1)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_time_grids_nest(shift):
    for n in (64, 32, 16, 8, 4, 2):
        fine, coarse = M.time_grid(n, shift), M.time_grid(n // 2, shift)
        assert torch.equal(fine[::2], coarse) and fine[0] == 0 and fine[-1] == 1
    assert M.time_shift(0.5, 5.0) == pytest.approx(5 / 6)


@pytest.mark.parametrize("steps, shift, gain", [(1, 1, 0), (2, 1, .5), (4, 1, .72), (64, 1, .9801),
                                                (2, 5, .1923), (4, 5, .4793), (64, 5, .9610)])
def test_euler_gain_on_exact_gaussian(steps, shift, gain):
    eps = torch.tensor([1.0])
    assert M.euler(exact_velocity, eps, steps, shift).item() == pytest.approx(gain, abs=6e-5)


def test_one_step_is_one_euler_step():
    net = tiny_net()
    eps, z_lr = torch.randn(2, 2, 16, 1, 4, 4)
    torch.testing.assert_close(M.one_step(net, eps, z_lr), M.sample(net, eps, z_lr, 1, shift=1.0))


def tiny_net(**changes):
    """A DiT of random weights, the zero-initialised ones included."""
    net = M.DiT(**dict(dim=32, layers=2, heads=2, ffn=64, text_dim=8, prompt_len=2, learned=True) | changes)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


def test_sample_guides_against_the_other_prompt():
    """With w the sampler must call the network twice a step, the second time with the other text and the same z_lr."""
    calls = []

    def net(z, t, z_lr, text):
        calls.append((text.tolist(), z_lr))
        return torch.full_like(z, 1.0 if text[0] == M.POSITIVE else 0.4)
    eps, z_lr = torch.randn(2, 1, 4, 1, 2, 2)
    out = M.sample(net, eps, z_lr, steps=4, shift=1.0, w=2.0)
    torch.testing.assert_close(out, eps - 2.2)
    assert [c[0] for c in calls] == [[M.POSITIVE], [M.AGAINST]] * 4 and all(c[1] is z_lr for c in calls)


# ----------------------------------------------------------------------------
# stage 0


def test_flow_loss_is_zero_for_the_true_velocity_and_known_for_none():
    z_0, eps, z_lr = torch.randn(3, 2, 4, 1, 4, 4)
    t, text = torch.rand(2), M.prompt(z_0)

    def truth(z, t, z_lr, text):
        return eps - z_0
    assert stage0.flow_loss(truth, z_0, z_lr, text, t, eps).abs().max() == 0
    loss = stage0.flow_loss(lambda z, *_: torch.zeros_like(z), z_0, z_lr, text, t, eps)
    torch.testing.assert_close(loss, (eps - z_0).square().mean((1, 2, 3, 4)))


def test_network_is_asked_at_the_noised_latent():
    z_0, eps, z_lr = torch.randn(3, 2, 4, 1, 4, 4)
    t = torch.tensor([0.25, 1.0])

    def net(z, time, lr, text):
        assert torch.equal(z, M.add_noise(z_0, eps, t)) and torch.equal(time, t) and lr is z_lr
        return z
    stage0.flow_loss(net, z_0, z_lr, M.prompt(z_0), t, eps)


def test_prompts_are_dropped_and_targets_softened_at_their_rates():
    u = torch.rand(2, 10_000)
    text, soft = stage0.draw_prompts(u[0], u[1], negative=0.25, text_drop=0.1)
    assert 0.08 < (text == M.NULL).float().mean() < 0.12
    assert 0.23 < soft.float().mean() < 0.27
    kept = text != M.NULL
    assert torch.equal(text[kept] == M.NEGATIVE, soft[kept])
    assert 0.2 < soft[~kept].float().mean() < 0.3           # dropping is independent of the quality


def test_soften_is_the_gaussian_of_its_sigma():
    video = torch.zeros(2, 3, 1, 33, 33)
    video[:, :, :, 16, 16] = 1
    sigma = torch.tensor([0.8, 1.5])
    out = data.soften(video, sigma)
    x = torch.arange(33) - 16.0
    for i in range(2):
        assert out[i].sum().item() == pytest.approx(3, abs=1e-3)
        spread = (out[i, 0, 0].sum(0) * x.square()).sum().sqrt().item()
        assert spread == pytest.approx(sigma[i].item(), rel=0.05)
    flat = torch.ones(2, 3, 1, 6, 6)
    torch.testing.assert_close(data.soften(flat, sigma), flat)          # borders do not darken


def test_learning_rate_warms_up_and_ends_at_zero():
    cfg = stage0.Config(steps=1000, warmup=100, lr=1.0, decay=0.3)
    assert [stage0.learning_rate(s, cfg) for s in (0, 99, 500, 700)] == pytest.approx([0.01, 1, 1, 1])
    assert stage0.learning_rate(850, cfg) == pytest.approx(0.5) and stage0.learning_rate(999, cfg) < 0.01


def test_posterior_mean_helper_is_right():
    """The Gaussian helper above carries many tests: check it by Monte Carlo."""
    z_0, eps = 2 + 0.5 * torch.randn(400_000), torch.randn(400_000)
    t = torch.tensor([0.4])
    z_t = M.add_noise(z_0, eps, t)
    near = (z_t - 1.1).abs() < 0.05
    assert z_0[near].mean().item() == pytest.approx(posterior_mean(torch.tensor([1.1]), t, 2.0, 0.5).item(), abs=0.02)
    assert math.isclose(posterior_mean(torch.tensor([1.1]), torch.zeros(1), 2.0, 0.5).item(), 1.1, abs_tol=1e-6)
