"""Stage I against closed forms: CFG target, progressive-distillation target, composition of perfect students."""
from copy import deepcopy

import pytest
import torch

import health
import model as M
import stage1_pd as stage1
from tests.test_maths import exact_velocity


def test_cfg_target_uses_both_prompts():
    def velocity(z, t, which):
        return torch.full_like(z, {M.POSITIVE: 1.0, M.AGAINST: 0.4}[which])
    z = torch.randn(2, 4, 1, 2, 2)
    v_cfg, v_c = stage1.cfg_target(velocity, z, torch.rand(2), w=2.0)
    torch.testing.assert_close(v_cfg, torch.full_like(z, 2.2))
    torch.testing.assert_close(v_c, torch.full_like(z, 1.0))


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("n", [32, 4, 1])
def test_pd_times_are_one_student_step_and_two_teacher_steps(n, shift):
    u = torch.linspace(0, 1 - 1e-6, 1000)
    t, t_mid, t_end = stage1.pd_times(u, n, shift)
    grid, fine = M.time_grid(n, shift), M.time_grid(2 * n, shift)
    assert set(t.tolist()) == set(grid[1:].tolist()) and set(t_end.tolist()) == set(grid[:-1].tolist())
    assert set(t_mid.tolist()) == set(fine[1::2].tolist())
    assert (t > t_mid).all() and (t_mid > t_end).all()


def test_last_phase_starts_from_noise_alone():
    t, t_mid, t_end = stage1.pd_times(torch.rand(8), 1, 1.0)
    assert t.eq(1).all() and t_mid.eq(0.5).all() and t_end.eq(0).all()
    z_0, eps = torch.randn(2, 8, 4, 1, 2, 2)
    assert torch.equal(M.add_noise(z_0, eps, t), M.add_noise(z_0.flip(0), eps, t))


def test_pd_target_is_the_weighted_mean_of_two_teacher_velocities():
    seen = []

    def velocity(z, t):
        seen.append((z, t, torch.randn_like(z)))
        return seen[-1][2]
    z_t = torch.randn(3, 4, 1, 2, 2)
    t, t_mid, t_end = torch.tensor([[1.0, .75, .5], [.8, .7, .4], [.3, .1, 0]]).T.contiguous()
    v, first = stage1.pd_target(velocity, z_t, t, t_mid, t_end)
    (z1, t1, v1), (z2, t2, v2) = seen
    b = [M.bcast(x, z_t) for x in (t, t_mid, t_end)]
    torch.testing.assert_close(v, ((b[0] - b[1]) * v1 + (b[1] - b[2]) * v2) / (b[0] - b[2]))
    torch.testing.assert_close(z2, z_t - (b[0] - b[1]) * v1)            # the second step starts where the first ends
    torch.testing.assert_close(z_t - (b[0] - b[2]) * v, z2 - (b[1] - b[2]) * v2)
    assert torch.equal(t1, t) and torch.equal(t2, t_mid) and torch.equal(z1, z_t) and torch.equal(first, v1)


def test_pd_target_of_a_constant_teacher_is_that_constant():
    z_t = torch.randn(2, 4, 1, 2, 2)
    times = torch.tensor([[.9, .5], [.7, .3], [.2, 0]])
    target, _ = stage1.pd_target(lambda z, t: torch.full_like(z, 0.3), z_t, *times)
    torch.testing.assert_close(target, torch.full_like(z_t, 0.3))


def test_pd_loss_spaces():
    v, target, z_t = torch.randn(3, 2, 4, 1, 2, 2).double()             # to cancel z_t to the last digits
    t, t_end = torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.25])
    per_sample = (v - target).square().mean((1, 2, 3, 4))
    assert stage1.pd_loss(v, target, t, t_end).item() == pytest.approx(per_sample.mean().item())
    a, b = (z_t - M.bcast(t - t_end, v) * x for x in (v, target))       # any z_t: it cancels
    assert stage1.pd_loss(v, target, t, t_end, "z").item() == pytest.approx((a - b).square().mean().item())
    t, _, t_end = stage1.pd_times((torch.arange(32) + 0.5) / 32, 32, 5.0)
    weight = (t - t_end).square()                                       # of the steps of the first student
    assert (weight.max() / weight.min()).item() == pytest.approx(469, rel=0.001)


def test_student_of_the_exact_two_step_teacher():
    """Data N(0, 1): the best linear one-step student is v = 0.5 eps, and its output has gain 0.5."""
    z = torch.randn(10_000, 1)
    times = stage1.pd_times(torch.zeros(len(z)), 1, 1.0)
    target, _ = stage1.pd_target(exact_velocity, z, *times)
    w = (target * z).sum() / z.square().sum()
    assert w.item() == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("shift, gain", [(1.0, 0.9801), (5.0, 0.9610)])
def test_perfect_students_compose_to_the_64_step_sampler(shift, gain):
    """Data N(0, 1), velocities v = a(t) z: with each phase solved exactly the last step gives the 64-step output."""
    a = {t.item(): exact_velocity(torch.ones(1), t[None]).item() for t in M.time_grid(64, shift)[1:]}
    for n in (32, 16, 8, 4, 2, 1):
        u = (torch.arange(n) + 0.5) / n
        t, t_mid, t_end = stage1.pd_times(u, n, shift)

        def teacher(z, t, a=a):
            return z * torch.tensor([a[x.item()] for x in t])[:, None]
        target, _ = stage1.pd_target(teacher, torch.ones(n, 1), t, t_mid, t_end)
        a = dict(zip(t.tolist(), target[:, 0].tolist(), strict=True))
    assert 1 - a[1.0] == pytest.approx(gain, abs=1e-4)


def test_a_trained_student_does_in_one_step_what_its_teacher_does_in_many():
    """Data at -1 and 1, each +- 0.2: one Euler step of the exact velocity ends at their mean, 0, off by 1."""
    torch.manual_seed(0)

    def exact(z, t):
        a, t = M.bcast(1 - t, z), M.bcast(t, z)
        mean = torch.tanh(a * z / ((0.2 * a) ** 2 + t ** 2))            # of the centres, given z_t
        z_0 = mean + 0.2 ** 2 * a / ((0.2 * a) ** 2 + t ** 2) * (z - a * mean)
        return (z - z_0) / t

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(5, 128), torch.nn.SiLU(), torch.nn.Linear(128, 128),
                                              torch.nn.SiLU(), torch.nn.Linear(128, 1))

        def forward(self, z, t):
            t = M.bcast(t, z)
            return self.layers(torch.cat([z, t, z * t, torch.sin(3 * z), torch.cos(3 * z)], dim=1))

    def train(net, teacher, n, steps, lr):
        """Towards the teacher's velocity (n = 0), or as a student of n steps of a teacher of twice as many."""
        optimiser = torch.optim.Adam(net.parameters(), lr)
        for k in range(steps):
            z_0 = torch.randint(2, (512, 1)) * 2 - 1 + 0.2 * torch.randn(512, 1)
            u = torch.rand(512)
            t, t_mid, t_end = stage1.pd_times(u, n, 1.0) if n else (u, None, None)
            z_t = M.add_noise(z_0, torch.randn(512, 1), t)
            with torch.no_grad():
                target = stage1.pd_target(teacher, z_t, t, t_mid, t_end)[0] if n else teacher(z_t, t)
            optimiser.param_groups[0]["lr"] = lr * (1 - k / steps)
            optimiser.zero_grad()
            stage1.pd_loss(net(z_t, t), target, t, t_end).backward()
            optimiser.step()

    noise = torch.randn(2000, 1)

    @torch.no_grad()
    def output(velocity, n):
        z, grid = noise, M.time_grid(n, 1.0).flip(0)
        for t, t_end in zip(grid, grid[1:], strict=False):
            z = z - (t - t_end) * velocity(z, t.expand(len(z)))
        return z
    goal, student = output(exact, 64), Net()
    train(student, exact, 0, 300, 3e-3)
    for n in (16, 8, 4, 2, 1):
        train(student, deepcopy(student), n, 150, 2e-3)
    errors = [(output(velocity, 1) - goal).abs().mean().item() for velocity in (exact, student)]
    assert errors[0] > 0.9 and errors[1] < errors[0] / 5


def test_ratio_starts_at_one():
    start, target = torch.randn(2, 4, 4)
    assert health.ratio(start, target, start) == 1 and health.ratio(target, target, start) == 0


@pytest.mark.parametrize("changes, words", [
    (dict(pd_grid=(64, 32, 8, 1)), "half"), (dict(pd_grid=(4, 2)), "last one 1"), (dict(pd_grid=(1,)), "two numbers"),
    (dict(pd_space="x"), "one of v, z")])
def test_bad_constants_are_refused(changes, words):
    with pytest.raises(SystemExit, match=words):
        stage1.check(stage1.Config(**changes))
