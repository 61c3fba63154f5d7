"""Stage III against closed forms: the DPO loss, its gradient at t = 1, its anchor."""
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import model as M
import stage3_dpo as stage3


def one(x):
    return torch.tensor([[[[list(x)]]]], dtype=torch.float32)           # (1, 1, 1, 1, n)


def inside_of(x, x_ref, win, lose, eps, beta):
    """What `paired` and `dpo_inside` make of a student whose clean estimate at t = 1 is x, and a reference's x_ref."""
    (e_w, e_l), (e_w_ref, e_l_ref) = (
        stage3.paired(lambda z, *_, x=x: z - x, win, lose, eps, eps, torch.ones(1), win)[1] for x in (x, x_ref))
    return stage3.dpo_inside(e_w, e_w_ref, e_l, e_l_ref, beta)


def test_both_of_a_pair_are_measured_against_their_own_velocities():
    z_w, z_l, eps_w, eps_l, z_lr = torch.randn(5, 2, 4, 1, 2, 2)
    t, off = torch.tensor([0.3, 0.8]), torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1, 1, 1)

    def net(z_t, times, condition, text):
        torch.testing.assert_close(z_t, torch.cat([M.add_noise(z_w, eps_w, t), M.add_noise(z_l, eps_l, t)]))
        assert torch.equal(times, torch.cat([t, t])) and torch.equal(condition, torch.cat([z_lr, z_lr]))
        assert text.tolist() == [M.POSITIVE] * 4
        return torch.cat([eps_w - z_w, eps_l - z_l]) + off
    v, (e_w, e_l) = stage3.paired(net, z_w, z_l, eps_w, eps_l, t, z_lr)
    torch.testing.assert_close(v - off, torch.cat([eps_w - z_w, eps_l - z_l]))
    torch.testing.assert_close(torch.cat([e_w, e_l]), torch.tensor([1.0, 4, 9, 16]))


def test_dpo_starts_at_ln_2():
    e = torch.rand(4)
    loss = stage3.dpo_loss(stage3.dpo_inside(e, e, 2 * e, 2 * e, 500.0))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_dpo_at_t_1_is_an_inner_product():
    x_ref, win, lose = one([0, 0, 0, 0]), one([1, 0, 0, 0]), one([0, 0, 0, 0])
    x = one([0.1, 0, 0, 0])
    inside = inside_of(x, x_ref, win, lose, torch.randn(1, 1, 1, 1, 4), 100.0)
    assert inside.item() == pytest.approx(2.5, abs=1e-4)                # beta <delta, d> / N
    assert stage3.dpo_loss(inside).item() == pytest.approx(0.07889, abs=1e-4)


def test_dpo_sign_turns_with_the_pair():
    x, x_ref, win, lose, eps = (torch.randn(1, 4, 1, 2, 2) for _ in range(5))
    a, b = inside_of(x, x_ref, win, lose, eps, 10.0), inside_of(x, x_ref, lose, win, eps, 10.0)
    torch.testing.assert_close(a, -b)


def test_mean_of_logs_not_log_of_the_mean():
    inside = torch.tensor([-5.0, 5.0])
    assert stage3.dpo_loss(inside).item() == pytest.approx((5.00672 + 0.00672) / 2, abs=1e-4)


def gradient(w, eps_w, eps_l, shared, beta):
    """d loss / d W of the student x = W eps, v = eps - x; winner and loser are its outputs for eps_w and eps_l."""
    weight = torch.tensor(w, requires_grad=True)
    z_w, z_l = one([w * eps_w]), one([w * eps_l])
    e_w, e_l = (one([eps_w]), one([eps_l])) if shared is None else (one([shared]), one([shared]))
    errors = [stage3.squared_error((1 - weight) * e, e - z) for e, z in ((e_w, z_w), (e_l, z_l))]
    ref = [x.detach() for x in errors]
    stage3.dpo_loss(stage3.dpo_inside(errors[0], ref[0], errors[1], ref[1], beta)).backward()
    return weight.grad.item()


def test_own_noise_teaches_nothing_and_shared_noise_does():
    assert gradient(0.7, 1.3, -0.4, None, 100.0) == pytest.approx(0.0, abs=1e-4)
    assert gradient(0.7, 1.3, -0.4, 0.9, 100.0) == pytest.approx(-53.55, abs=0.01)


def test_flow_beta_is_zero_at_the_student_s_time():
    e = torch.rand(4, requires_grad=True)
    assert stage3.beta_at(500.0, torch.tensor(0.2), "flow").item() == pytest.approx(320)
    beta = stage3.beta_at(500.0, torch.ones(4), "flow")
    loss = stage3.dpo_loss(stage3.dpo_inside(e, torch.zeros(4), -e, torch.zeros(4), beta))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2)) and e.grad.abs().max() == 0


@pytest.mark.parametrize("anchor, expected", [(500.0, 0.015675), (0.0, None)])
def test_anchor_gives_the_loss_a_minimum(anchor, expected):
    """One pixel, winner - loser = 0.1, beta = 500: with the anchor delta settles, without it passes the winner."""
    delta = torch.zeros(1, 1, 1, 1, 1, requires_grad=True)
    win, lose, zero = one([0.1]), one([0.0]), one([0.0])
    optimiser = torch.optim.SGD([delta], lr=2e-4)
    for _ in range(1000):
        loss = stage3.dpo_loss(inside_of(delta, zero, win, lose, zero, 500.0), delta.square().mean(), anchor)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    if expected:
        assert delta.item() == pytest.approx(expected, abs=2e-5)
    else:
        assert delta.item() > 0.1


def test_beta_makes_an_anchored_move_count_as_two():
    d = torch.tensor([0.01, 0.02, 0.5])
    beta = stage3.choose_beta(d, alpha=0.25)
    assert beta == pytest.approx(2 / (0.25 * 0.02))
    x_ref, win, lose = one([0.0, 0.0]), one([0.2, 0.0]), one([0.0, 0.0])         # |d|^2 = 0.02
    x = 0.25 * (win - lose)
    assert inside_of(x, x_ref, win, lose, x_ref, beta).item() == pytest.approx(2.0, abs=1e-4)


@pytest.mark.parametrize("alpha, holds", [(0.25, True), (0.49, True), (0.51, False), (4.0, False)])
def test_own_noise_is_a_saddle_that_an_anchor_below_one_half_holds(alpha, holds):
    """The student moves by 0.01 on the loser's noise alone, whose candidate the reference returns exactly."""
    beta, zero = 50.0, torch.zeros(1, dtype=torch.double)
    e_l = torch.full((1,), 0.01 ** 2, dtype=torch.double)
    lam = beta / (4 * alpha)
    moved = stage3.dpo_loss(stage3.dpo_inside(zero, zero, e_l, zero, beta), torch.cat([zero, e_l]).mean(), lam)
    assert (moved.item() > math.log(2)) == holds


def test_set_aside_spreads_over_the_margins_and_takes_at_most_half():
    clips = [*range(24)]
    assert stage3.set_aside([*range(24)], clips, 8) == ([i for i in range(24) if i % 3 != 1], [*range(1, 24, 3)])
    assert all(len(stage3.set_aside([*range(n)], [*range(n)], held)[1]) == held
               for n, held in ((23, 8), (18, 8), (16, 8), (200, 32)))
    assert len(stage3.set_aside([*range(10)], clips, 8)[1]) == 5
    assert stage3.set_aside([4, 2, 7], clips, 8) == ([4, 7], [2]) and stage3.set_aside([4], clips, 8) == ([4], [])
    assert stage3.set_aside([4, 2, 7], clips, 0) == ([4, 2, 7], [])


def test_no_clip_of_a_pair_held_out_is_trained_on():
    assert stage3.set_aside([0, 1, 2, 3, 4], [7, 8, 8, 7, 9], 1) == ([0, 3, 4], [2])        # pair 1 is of clip 8, too
    assert stage3.set_aside([0, 1, 2], [7, 7, 7], 1) == ([0, 1, 2], [])


@pytest.mark.parametrize("towards, share", [(1, 1.0), (-1, 0.0), (0, 0.0)])
def test_preferred_counts_pairs_whose_winner_came_nearer(towards, share):
    """Students that move their clean estimate along winner - loser, or against it, at every time, by a tenth."""
    torch.manual_seed(0)
    win, lose, lr = torch.randn(3, 16, 2, 8, 8)
    pairs = [{"win": win, "lose": lose, "lr": lr}, {"win": win.flip(-1), "lose": lose.flip(-1), "lr": lr.flip(-1)}]

    def net(move):
        def velocity(z_t, t, z_lr, text):                       # of both pairs: the one whose LR this is
            d = next(p["win"] - p["lose"] for p in pairs if torch.equal(p["lr"][:, :, :4, :4], z_lr[0]))
            return z_lr - move * d[:, :, :4, :4]
        return velocity
    found = stage3.preferred(*(stage3.error_gaps(net(move), pairs, 2, 4, 0, "cpu") for move in (0.1 * towards, 0)))
    assert found == {0.5: share, 1.0: share}


def test_rank_pair():
    assert stage3.rank_pair(np.array([0.1, 3.0, -2.0, 1.0])) == (1, 2, 5.0)


def test_absent_scorers_are_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    monkeypatch.setitem(sys.modules, "dover_scorer", None)
    for name, words in (("dover", "dover_scorer"), ("pyiqa:musiq", "pip install pyiqa")):
        with pytest.raises(SystemExit, match=f"scorer {name}: .*{words}.*; or use --scorer proxy"):
            stage3.make_scorer(name)


@pytest.mark.parametrize("lower, best", [(False, 1), (True, 0)])
def test_a_scorer_of_pyiqa_ranks_by_the_direction_of_its_metric(monkeypatch, lower, best):
    def brightness(x):
        return x.mean()
    brightness.metric_mode, brightness.lower_better = "NR", lower
    monkeypatch.setitem(sys.modules, "pyiqa", SimpleNamespace(create_metric=lambda name: brightness))
    dark, bright = (np.full((2, 8, 8, 3), value, np.uint8) for value in (51, 102))
    scores = stage3.make_scorer("pyiqa:brightness")([dark, bright], None)
    assert stage3.rank_pair(scores)[0] == best and np.abs(scores) == pytest.approx([0.2, 0.4], abs=1e-6)


@pytest.mark.parametrize("changes, words", [(dict(dpo_t="two"), "one, uniform"), (dict(beta_mode="x"), "constant"),
                                            (dict(candidates=1), "at least 2"), (dict(scorer="vmaf"), "proxy, dover"),
                                            (dict(dpo_t="one", beta_mode="flow"), "0 at t = 1")])
def test_bad_constants_are_refused(changes, words):
    with pytest.raises(SystemExit, match=words):
        stage3.check(stage3.Config(**changes))


def test_reference_and_student_agree_at_first():
    """dropout-free networks: the first loss of a run is exactly ln 2 (checked on the loop in test_stages.py)."""
    assert not any(isinstance(m, torch.nn.Dropout) for m in M.build("tiny").modules())
