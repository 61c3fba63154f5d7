"""Known answers for metrics.py. The BasicSR numbers are BasicSR 1.4.2's own code, run on the same arrays."""
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import metrics

# images are named by the arguments of texture(): seed, height, width
BASICSR = {"niqe": {(0, 200, 310): 8.34407, (1, 300, 420): 8.34166, (2, 96, 200): 10.00100},
           "niqe_flat": 6.89139, "psnr": 20.473448, "psnr_y": 25.213621, "ssim": 0.856937}


def texture(seed, h, w):
    """Noise of all scales, (h, w, 3) uint8: the same bits on every machine (no transcendental functions)."""
    rng, x = np.random.default_rng(seed), np.zeros((h, w, 3))
    for size in (1, 2, 4, 8, 16, 32):
        blocks = rng.integers(-12, 13, (h // size + 1, w // size + 1, 3)) * (1 + size / 8)
        x += np.kron(blocks, np.ones((size, size, 1)))[:h, :w]
    return np.clip(128 + x, 0, 255).astype(np.uint8)


def resample(frames, scale):
    """Each frame through PIL's antialiased bicubic."""
    size = (int(frames.shape[2] * scale), int(frames.shape[1] * scale))
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.BICUBIC)) for f in frames])


def add(frames, noise):
    return np.clip(frames.astype(np.float64) + noise, 0, 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def pan():
    """A camera move of two pixels a frame over texture, drawn at twice the size: (9, 192, 288, 3)."""
    wide = resample(texture(3, 400, 640)[None], 0.5)[0]
    return np.stack([wide[2:194, 2 * t:2 * t + 288] for t in range(9)])


# ----------------------------------------------------------------------------
# full reference


def test_psnr_of_a_constant_offset():
    a = np.full((2, 16, 16, 3), 100, np.uint8)
    assert metrics.psnr(a, a + 5) == pytest.approx(20 * np.log10(255 / 5), abs=1e-5)
    # five levels of grey are 5 * 219 / 255 of Y
    assert metrics.psnr(a, a + 5, "y") == pytest.approx(20 * np.log10(255 / (5 * 219 / 255)), abs=1e-3)
    assert metrics.psnr(a, a) == pytest.approx(100)


def test_psnr_is_the_mean_over_frames_and_rgb_is_not_y():
    a = np.full((2, 16, 16, 3), 100, np.uint8)
    b = a.copy()
    b[0] += 5
    b[1] += 50
    assert metrics.psnr(a, b) == pytest.approx(10 * np.log10(255 / 5 * 255 / 50), abs=1e-4)
    blue = a.copy()
    blue[..., 2] += 30                                          # Y hardly sees blue
    assert metrics.psnr(a, blue, "y") > metrics.psnr(a, blue) + 10


def test_ssim_and_psnr_equal_basicsr():
    a, b = texture(0, 200, 310)[None], texture(0, 200, 310)[None] // 2 + 60
    assert metrics.psnr(a, b) == pytest.approx(BASICSR["psnr"], abs=1e-4)
    assert metrics.psnr(a, b, "y") == pytest.approx(BASICSR["psnr_y"], abs=1e-4)
    assert metrics.ssim(a, b) == pytest.approx(BASICSR["ssim"], abs=1e-5)
    assert metrics.ssim(a, a) == pytest.approx(1, abs=1e-12)
    assert np.isnan(metrics.ssim(a[:, :8, :8], a[:, :8, :8]))


def test_ssim_of_flat_frames_is_its_luminance_term():
    a = np.zeros((2, 11, 16, 3), np.uint8)
    b = a.copy()
    b[1] = 20
    x, y, c1 = 16, 16 + 20 * 219 / 255, (0.01 * 255) ** 2
    second = (2 * x * y + c1) / (x * x + y * y + c1)
    assert metrics.ssim(a, b) == pytest.approx((1 + second) / 2, abs=1e-6)         # the first frames are equal


def test_vmaf_order_and_neg(pan):
    blurred = resample(resample(pan, 0.25), 4)
    same, worse = metrics.vmaf(pan, pan), metrics.vmaf(blurred, pan)
    assert same["vmaf"] > 95 and same["vmaf_neg"] > 95
    assert worse["vmaf"] < same["vmaf"] - 20
    soft = resample(resample(pan, 0.5), 2)
    sharpened = add(soft, 2.0 * (soft.astype(float) - resample(resample(soft, 0.25), 4)))
    score = metrics.vmaf(sharpened, pan)
    assert score["vmaf_neg"] < score["vmaf"] - 1                # NEG gives no credit for enhancement
    assert np.isnan(metrics.vmaf(pan[:, :16, :16], pan[:, :16, :16])["vmaf"])


def test_temporal_sees_change_over_time_only(pan):
    assert metrics.temporal(pan, pan) == 0                      # the truth's own motion is no error
    still = np.full((4, 8, 8, 3), 100, np.uint8)
    assert metrics.temporal(still + 20, still) == 0             # a constant error is none over time
    jumping = still.copy()
    jumping[1::2] += 10                                         # 100 110 100 110: each step is off by 10
    assert metrics.temporal(jumping, still) == pytest.approx(10 * 219 / 255, abs=1e-3)
    assert np.isnan(metrics.temporal(still[:1], still[:1]))


def test_lr_consistency_known_answers(pan):
    lr = resample(pan, 0.25)
    assert metrics.lr_consistency(pan, lr) > 45                 # PIL's bicubic, but for rounding and borders
    assert metrics.lr_consistency(add(pan, 20), lr) == pytest.approx(20 * np.log10(255 / 20), abs=0.5)
    with pytest.raises(ValueError, match="multiple"):
        metrics.lr_consistency(pan[:, :-1], lr)


@pytest.mark.parametrize("measure", [metrics.psnr, metrics.ssim, metrics.vmaf, metrics.temporal])
def test_other_size_is_refused(measure):
    a = np.zeros((2, 32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="different size"):
        measure(a, a[:, :30])
    with pytest.raises(ValueError, match="different size"):
        measure(a, a[:1])


@pytest.mark.parametrize("by", [(0, 0), (3, -4), (-1, 2), (0.5, -0.3), (1.7, 2.2), (-0.25, 0)])
def test_shift_is_found_and_undone(pan, by):
    """Drawn at ten times the size, moved there, shrunk: what a sampled camera would have seen."""
    fine = np.kron(texture(5, 60, 80), np.ones((20, 20, 1))).astype(np.uint8)       # 1200 x 1600, blocks of 2 px
    dy, dx = (round(10 * s) for s in by)
    moved = np.roll(fine, (dy, dx), (0, 1))
    b, a = (np.stack([np.asarray(Image.fromarray(x).resize((160, 120), Image.BICUBIC))] * 2) for x in (fine, moved))
    assert metrics.shift(a, b) == pytest.approx(by, abs=0.1)
    noisy = add(a, np.random.default_rng(0).normal(0, 5, a.shape))
    assert metrics.shift(noisy, b) == pytest.approx(by, abs=0.1)
    if any(by):
        assert metrics.psnr(*metrics.unshift(a, b, by)) > metrics.psnr(a, b) + 5
    flat = np.full((2, 32, 32, 3), 7, np.uint8)
    assert np.isnan(metrics.shift(flat, flat)).all()
    assert metrics.unshift(a, b, (56.0, 0.0)) is None           # of 120 rows nothing would be left


def test_levels_name_the_range(pan):
    assert metrics.levels(pan, pan) == pytest.approx((1, 0), abs=1e-3)
    squeezed = (pan * (219 / 255) + 16).round().astype(np.uint8)
    assert metrics.levels(squeezed, pan) == pytest.approx((219 / 255, 16), abs=0.3)


def test_chunk_jump():
    still = np.stack([texture(0, 32, 32)] * 25).astype(int)
    frames = still + (np.arange(25) % 2)[:, None, None, None]                       # every change is one level
    assert metrics.chunk_jump(frames.astype(np.uint8), 12) == pytest.approx(1, abs=0.01)
    frames = frames + 4 * (np.arange(25) // 12 % 2)[:, None, None, None]            # and four more at 12 and 24
    assert metrics.chunk_jump(frames.astype(np.uint8), 12) > 2.5
    assert np.isnan(metrics.chunk_jump(still[:12].astype(np.uint8), 12))


# ----------------------------------------------------------------------------
# no reference


def test_flicker_known_answers():
    fade = np.stack([np.full((8, 8, 3), 100 + 10 * t, np.uint8) for t in range(5)])
    assert metrics.flicker(fade) == pytest.approx(0, abs=1e-4)
    jumping = np.stack([np.full((8, 8, 3), 100 + 10 * (t % 2), np.uint8) for t in range(5)])
    assert metrics.flicker(jumping) == pytest.approx(10 * 219 / 255, abs=1e-3)
    assert metrics.flicker(fade[:3]) == pytest.approx(0, abs=1e-4) and np.isnan(metrics.flicker(fade[:2]))
    for place in (1, 3):                                        # a single jump: 10, and 5 beside it, of three frames
        once = np.full((5, 8, 8, 3), 100, np.uint8)
        once[place] += 10
        assert metrics.flicker(once) == pytest.approx(15 / 3 * 219 / 255, abs=1e-3)


@pytest.mark.parametrize("dy, dx", [(3, 3), (3, -3), (-3, 3), (-3, -3), (4, 0), (0, -4)])
def test_flicker_forgives_three_pixels_a_frame_and_not_four(dy, dx):
    world = np.random.default_rng(0).integers(90, 110, (128, 128, 1)).repeat(3, -1).astype(np.uint8)
    pan = np.stack([world[16 + dy * t:112 + dy * t, 16 + dx * t:112 + dx * t] for t in range(3)])
    assert (metrics.flicker(pan) < 0.5) == (max(abs(dy), abs(dx)) == 3)     # what is left comes in at the border


def test_flicker_forgives_motion_but_not_noise(pan):
    noise = np.random.default_rng(0).normal(0, 4, pan.shape)
    assert metrics.flicker(pan) < 0.3                           # what is left comes in at the border
    assert metrics.flicker(add(pan, noise)) > 1
    assert metrics.flicker(pan[:, :, ::-1].swapaxes(1, 2)) < 0.3


@pytest.mark.parametrize("period", [4, 8])
def test_grid_sees_blocks(period):
    rng = np.random.default_rng(0)
    x = rng.integers(90, 110, (3, 256, 256, 1)).repeat(3, -1).astype(np.uint8)
    assert metrics.grid(x) == pytest.approx(1, abs=0.02)
    board = np.kron(np.indices((256 // period, 256 // period)).sum(0) % 2, np.ones((period, period)))
    blocky = add(x, 12 * board[None, :, :, None])
    assert metrics.grid(blocky) > 1.3
    assert metrics.grid(blocky[:, 2:, 2:]) < metrics.grid(blocky)       # borders are counted from the corner
    stripes = add(x, 12 * (np.arange(256) // period % 2)[None, :, None, None])
    assert metrics.grid(stripes) > 1.3                                  # one axis is enough
    assert metrics.grid(np.full((1, 32, 32, 3), 7, np.uint8)) == pytest.approx(1)


def test_lattice_is_the_share_of_what_every_token_repeats():
    wave = np.sin(2 * np.pi * np.arange(128) / 4)                       # two pixels away it is its negative
    noise = np.random.default_rng(0).normal(128, 2, (8, 96, 128, 1)).repeat(3, 3)
    x, both = (v.round().astype(np.uint8) for v in (noise, noise + 2 * wave[None, None, :, None]))
    assert metrics.lattice(x) < 4                                       # chance, 100 / sqrt(8 * 12 * 16) = 2.6
    # detail: of the wave 1/2, (4 w - 2 w + 2 w) / 8 taken away; of noise 1/2 and a sixteenth of each of 4 neighbours
    wave, grain = 0.5 * 2 / 2 ** 0.5, 2 * (0.5 ** 2 + 4 / 64) ** 0.5
    want = 100 * wave / (wave ** 2 + grain ** 2) ** 0.5
    assert metrics.lattice(both) == pytest.approx(want, rel=0.05)
    assert metrics.lattice(both[:, 3:, 5:]) == pytest.approx(want, rel=0.05)    # wherever blocks begin
    assert metrics.lattice(np.full((2, 32, 32, 3), 7, np.uint8)) == 0
    alone = np.tile(np.uint8([128, 130, 128, 126] * 8)[None, None, :, None], (2, 32, 1, 3))
    assert metrics.lattice(alone) == pytest.approx(100)
    alone[0, 9, 9] = 255                                                # a strong edge hardly counts
    assert metrics.lattice(alone) > 80


def test_seam_sees_tiles_and_not_the_grid_of_tokens():
    rng = np.random.default_rng(0)
    x = rng.integers(90, 110, (3, 256, 256, 1)).repeat(3, -1).astype(np.uint8)
    grid = add(x, 12 * (np.arange(256) // 8 % 2)[None, None, :, None])
    assert metrics.grid(grid) > 1.3 and metrics.seam(grid, 80) == pytest.approx(1, abs=0.05)
    assert metrics.seam(add(grid, 20 * (np.arange(256) // 80 % 2)[None, :, None, None]), 80) > 1.3
    busier = x.copy()
    busier[:, :, 128:] = rng.integers(60, 140, (3, 256, 128, 1))            # content may change from place to place
    assert metrics.seam(busier, 80) == pytest.approx(1, abs=0.05)
    assert np.isnan(metrics.seam(x[:, :80, :80], 80))
    assert metrics.seam(x[:, :165, :165], 80) == pytest.approx(1, abs=0.05)     # its second border is too near the edge


@pytest.mark.parametrize("image", BASICSR["niqe"])
def test_niqe_equals_basicsr(image):
    assert metrics.niqe(texture(*image)[None])[0] == pytest.approx(BASICSR["niqe"][image], abs=0.01)


def test_niqe_flat_blocks_and_small_frames():
    flat = texture(1, 300, 420)
    flat[:110, :220] = 10, 200, 31                              # two blocks without texture, Y not a whole number
    assert metrics.niqe(flat[None])[0] == pytest.approx(BASICSR["niqe_flat"], abs=0.01)
    assert np.isnan(metrics.niqe(flat[None, :96, :96])[0])      # one block has no covariance
    assert np.isnan(metrics.niqe(flat[None, :64, :64])[0])


def test_niqe_is_per_frame_and_in_order():
    frames = np.stack([texture(s, 200, 310) for s in (0, 5)])
    forward, backward = metrics.niqe(frames), metrics.niqe(frames[::-1])
    assert forward.shape == (2,) and forward[0] != forward[1]
    assert np.array_equal(forward, backward[::-1])


# ----------------------------------------------------------------------------
# statistics and ranking


def test_bootstrap_mean():
    values = np.random.default_rng(0).normal(3, 1, 400)
    mean, lo, hi = metrics.bootstrap_mean(values, seed=1)
    assert mean == pytest.approx(values.mean())
    assert hi - lo == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)      # the normal approximation
    assert metrics.bootstrap_mean(values, seed=1) == (mean, lo, hi)
    assert metrics.bootstrap_mean([1.0, np.nan, 3.0])[0] == 2
    assert all(np.isnan(metrics.bootstrap_mean([np.nan])))


def test_dover_uses_the_formula_it_names(monkeypatch):
    for technical, aesthetic, one_video, swapped in ((0.1107, -0.08285, 50.0, 59.7), (0.17, -0.05, 69.7, 78.2),
                                                     (0.20, -0.03, 78.4, 85.2)):
        assert metrics.dover(technical, aesthetic) == pytest.approx(one_video, abs=0.1)
        assert metrics.dover(technical, aesthetic) < swapped - 5
    monkeypatch.setitem(sys.modules, "dover_scorer", SimpleNamespace(raw=lambda frames: (0.17, -0.05)))
    score, sign = metrics.learned_metric("dover")
    assert score(np.zeros((2, 8, 8, 3), np.uint8)) == pytest.approx(69.7, abs=0.1) and sign == 1


def test_proxy_rank_prefers_sharp_and_steady(pan):
    rng = np.random.default_rng(0)
    lr = resample(pan, 0.25)
    candidates = {"good": add(pan, rng.normal(0, 1, pan.shape[1:])), "blurred": resample(lr, 4),
                  "flickering": add(pan, rng.normal(0, 14, pan.shape)),
                  "other colours": add(pan, (30, 0, -30))}
    scores, parts = metrics.proxy_rank(list(candidates.values()), lr)
    names = list(candidates)
    assert names[int(np.argmax(scores))] == "good"
    # each damage is what its own measure likes least
    for measure, damage in (("z_niqe", "blurred"), ("z_flicker", "flickering"), ("z_lr_consistency", "other colours")):
        assert names[int(np.argmin(parts[measure]))] == damage
    assert names[int(np.argmax(parts["flicker"]))] == "flickering"
    assert parts["niqe"][names.index("blurred")] > parts["niqe"][0]
    np.testing.assert_allclose(scores, parts["z_niqe"] + parts["z_flicker"] + parts["z_lr_consistency"])
    # values follow their candidates, whatever the order
    again, _ = metrics.proxy_rank(list(candidates.values())[::-1], lr)
    np.testing.assert_allclose(again[::-1], scores)


def test_proxy_rank_takes_flicker_per_spatial_contrast():
    still, noise = texture(3, 192, 288) - 128.0, np.random.default_rng(0).normal(0, 4, (3, 192, 288, 3))
    both = [add(128 + gain * still, noise) for gain in (0.5, 1)]
    contrast = [np.abs(np.diff(metrics.luma(x), axis=2)).mean() for x in both]
    _, parts = metrics.proxy_rank(both, resample(both[1], 0.25))
    assert parts["flicker"][0] / parts["flicker"][1] == pytest.approx(contrast[1] / contrast[0], rel=0.02)


def test_proxy_rank_of_equal_or_tiny_candidates(pan):
    lr = resample(pan, 0.25)
    scores, parts = metrics.proxy_rank([pan, pan.copy()], lr)
    np.testing.assert_allclose(scores, 0, atol=1e-9)            # no margin out of nothing
    assert (parts["lr_consistency"] == metrics.LR_ENOUGH).all()
    tiny = pan[:1, :32, :32]                                    # no NIQE, no flicker: lr_consistency decides
    scores, parts = metrics.proxy_rank([add(tiny, 40), tiny], lr[:1, :8, :8])
    assert np.isnan(parts["niqe"]).all() and scores[1] > scores[0]
