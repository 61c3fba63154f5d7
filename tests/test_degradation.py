"""degradation.py, step by step, against what each operation must do. Pictures are made on the spot."""
import dataclasses
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

import data
import degradation
import media
from tests.conftest import scene

# nothing but the final resize; the codec, noise, JPEG and blurs never happen
NULL = dataclasses.replace(degradation.LIGHT, blur_prob=(0, 0), resize_prob=((0, 0, 1), (0, 0, 1)), resize_step=(0, 0),
                           noise_prob=(0, 0), jpeg_prob=(0, 0), video_prob=(0, 0), sinc_prob=0)


def hr(seed=0, frames=5, size=64):
    return scene(seed, frames, size, size) / np.float32(255)


def test_kernels():
    n, one = 4, np.ones(4)
    for plateau in (False, True):
        k = degradation.gaussian_kernels(9, 1.5 * one, 1.5 * one, 0.7 * one, 0.8 * one, plateau)
        assert np.allclose(k, k.swapaxes(1, 2)) and np.allclose(k, np.rot90(k, 1, (1, 2)))
        k = degradation.gaussian_kernels(9, 2 * one, 0.5 * one, 0 * one, one, plateau)
        assert (k[:, 4, 6] > 2 * k[:, 6, 4]).all()           # sigma_x is along x
    k = degradation.gaussian_kernels(21, 2 * one, 2 * one, 0 * one, one)
    r = np.arange(21) - 10
    assert np.allclose((k.sum(1) * r ** 2).sum(1), 4, atol=1e-3)               # its variance is sigma^2
    k = degradation.sinc_kernels(21, np.pi / 3 * one)
    assert np.allclose(k, np.rot90(k, 1, (1, 2)))
    # a low-pass: passes a slow wave, stops one beyond its cutoff
    response = abs(np.fft.fft(k.sum(1), 42))[0]
    assert response[2] > 0.9 and response[16] < 0.1
    assert abs(np.fft.fft(degradation.sinc_kernels(21, 2 * np.pi / 3 * one).sum(1), 42))[0, 10] > 0.8      # of omega
    for seed in range(40):
        k = degradation.random_kernels(np.random.default_rng(seed), n, (7, 21), (0.2, 3))
        assert k.shape[0] == n and k.shape[1] in range(7, 22, 2) and np.allclose(k.sum((1, 2)), 1)


def test_beta_is_an_exponent():
    two = np.full(1, 2.0)
    for plateau, want in ((False, np.exp(-8)), (True, 1 / 17)):         # 4 px are two sigma: q = 4, to the power of 2
        k = degradation.gaussian_kernels(9, two, two, 0 * two, two, plateau)[0]
        assert k[4, 8] / k[4, 4] == pytest.approx(want)


def test_kinds_are_as_long_as_wide_unless_they_say_otherwise(monkeypatch):
    seen, kinds = [], [kind for kind in degradation.KERNELS if kind != "sinc"]
    monkeypatch.setattr(degradation, "gaussian_kernels", lambda size, x, y, *a, plateau: seen.append((x == y).all()))
    for kind in kinds:
        degradation.random_kernels(np.random.default_rng(0), 3, (7, 7), (0.2, 3), {kind: 1})
    assert seen == ["aniso" not in kind for kind in kinds]


def test_parameters_of_kernels_stay_in_their_ranges_and_drift(monkeypatch):
    """Those of Real-ESRGAN: a small sinc filter cuts off later, a plateau has another beta than a Gaussian."""
    seen = defaultdict(list)
    monkeypatch.setattr(degradation, "sinc_kernels", lambda size, omega: seen[f"sinc {size}"].append(omega))
    monkeypatch.setattr(degradation, "gaussian_kernels", lambda size, x, y, angle, beta, plateau: (
        seen["sigma"].append(x), seen[f"plateau {plateau}"].append(beta)))
    for seed in range(100):
        for kind, size in (("sinc", 11), ("sinc", 13), ("generalized_iso", 7), ("plateau_iso", 7)):
            degradation.random_kernels(np.random.default_rng(seed), 5, (size, size), (0.2, 3), {kind: 1})
    for name, low, high, step in (
            ("sinc 11", np.pi / 3, np.pi, 0.0628), ("sinc 13", np.pi / 5, np.pi, 0.0628), ("sigma", 0.2, 3, 0.02),
            ("plateau False", 0.5, 4, 0.05), ("plateau True", 1, 2, 0.1)):
        values = np.stack(seen[name])
        near = (high - low) / 20
        assert low <= values.min() < low + near and high - near < values.max() <= high, name
        assert 0.9 * step < abs(np.diff(values)).max() <= step + 1e-9, name


def test_one_kernel_type_per_clip_with_the_listed_probabilities(monkeypatch):
    made = []
    monkeypatch.setattr(degradation, "sinc_kernels", lambda size, omega: made.append(("sinc", len(omega))))
    monkeypatch.setattr(degradation, "gaussian_kernels", lambda *a, plateau: made.append((plateau, len(a[1]))))
    rng = np.random.default_rng(0)
    for _ in range(2000):
        degradation.random_kernels(rng, 6, (7, 21), (0.2, 3))
    assert len(made) == 2000 and all(n == 6 for _, n in made)                  # one call makes the whole clip
    assert abs(np.mean([kind == "sinc" for kind, _ in made]) - 0.1) < 0.02
    assert abs(np.mean([kind is True for kind, _ in made]) - 0.135) < 0.02


def test_beta_is_below_one_half_of_the_time(monkeypatch):
    firsts = []
    monkeypatch.setattr(degradation, "gaussian_kernels", lambda *a, plateau: firsts.append(a[4][0]))
    rng = np.random.default_rng(0)
    for _ in range(600):
        degradation.random_kernels(rng, 2, (7, 21), (0.2, 3), {"generalized_iso": 1})
    assert abs(np.mean(np.array(firsts) < 1) - 0.5) < 0.06                     # uniform in [0.5, 4] gives 0.14


def test_walk_is_bounded():
    rng = np.random.default_rng(0)
    walks = np.stack([degradation.walk(rng, (0.2, 0.5), 0.02, 50) for _ in range(50)])
    assert walks.shape == (50, 50) and walks.min() >= 0.2 and walks.max() <= 0.5
    steps = abs(np.diff(walks, axis=1))
    assert 0.018 < steps.max() <= 0.02 + 1e-12 and steps.mean() > 0.005        # it moves, but not further
    assert walks[:, 0].std() > 0.05
    assert degradation.walk(rng, (0, 1), 0.1, 3, first=0.7)[0] == 0.7


def test_blur_each_frame_by_its_kernel():
    x = torch.zeros(2, 3, 15, 15)
    x[:, :, 7, 7] = 1
    kernels = np.random.default_rng(0).random((2, 5, 5))
    got = degradation.blur(x, kernels)
    for i in range(2):                                       # the answer to an impulse is the kernel, mirrored
        assert np.allclose(got[i, 1, 5:10, 5:10].numpy(), kernels[i, ::-1, ::-1], atol=1e-6)
    assert np.allclose(degradation.blur(torch.full((1, 3, 4, 4), 0.3), np.full((1, 21, 21), 1 / 441)), 0.3)
    kernel = np.zeros((1, 5, 5))
    kernel[0, 2, 0] = 1                                      # looks two pixels to the left, over the border in a mirror
    row = torch.arange(8.0).expand(1, 3, 8, 8)
    assert degradation.blur(row, kernel)[0, 0, 0].tolist() == [2, 1, 0, 1, 2, 3, 4, 5]


def test_resize_modes():
    x = torch.rand(2, 3, 12, 15, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(degradation.resize(x, (4, 5), "area"), torch.nn.functional.avg_pool2d(x, 3), atol=1e-6)
    uneven = degradation.resize(x, (5, 7), "area")
    assert uneven.shape[-2:] == (5, 7) and torch.allclose(uneven.mean((2, 3)), x.mean((2, 3)), atol=1e-6)
    want = (x[..., :2, :].sum(-2) + 0.4 * x[..., 2, :]) / 2.4                  # the third row belongs to two of them
    assert torch.allclose(degradation.resize(x, (5, 15), "area")[..., 0, :], want, atol=1e-6)
    for mode in ("bilinear", "bicubic", "area"):
        assert degradation.resize(x, (24, 30), mode).shape[-2:] == (24, 30)


def test_bytes_are_rounded():
    """Cut off, each of the five conversions of a clip would make it half a level darker."""
    x = torch.tensor([0.6, 1.4, 99.6, 254.7]).div(255).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert degradation.to_bytes(x)[0, 0, :, 0].tolist() == [1, 1, 100, 255]
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    back = degradation.from_bytes(levels)
    assert np.array_equal(degradation.to_bytes(back), levels) and back.max() == 1


def test_poisson_noise_in_units_of_one():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.random((1, 3, 256, 256), dtype=np.float32))
    x = (x * 255).round() / 255
    for gray in (False, True):
        noise = (degradation.poisson_noise(rng, x, np.ones(1), gray) - x) * 255
        assert gray or abs(noise.std().item() - 11.3) < 0.3  # 0.7 if it were on 0..255
        assert abs(noise.mean().item()) < 0.3
        assert gray == torch.allclose(noise[:, 0], noise[:, 1], atol=1e-3)
    half = (degradation.poisson_noise(rng, x, np.full(1, 0.5), False) - x) * 255
    assert abs(half.std().item() - 5.65) < 0.2


def test_shot_noise_has_as_many_levels_as_the_picture_and_grey_is_luma():
    """In a flat picture of value x there is one level, and the variance is x: of a colour alone, its share of luma."""
    for channel, luma in enumerate((0.299, 0.587, 0.114)):
        x = torch.zeros(1, 3, 256, 256)
        x[:, channel] = 1
        noise = degradation.poisson_noise(np.random.default_rng(0), x, np.ones(1), True) - x
        assert noise.var().item() == pytest.approx(luma, rel=0.03)


def test_gaussian_noise():
    rng, x = np.random.default_rng(0), torch.full((2, 3, 128, 128), 0.5)
    noise = degradation.gaussian_noise(rng, x, np.array([5, 20]) / 255, False) - x
    assert abs(noise[0].std() * 255 - 5) < 0.2 and abs(noise[1].std() * 255 - 20) < 0.5
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.05   # fresh in each frame
    gray = degradation.gaussian_noise(rng, x, np.array([5, 5]) / 255, True) - x
    assert torch.allclose(gray[:, 0], gray[:, 2]) and not torch.allclose(noise[:, 0], noise[:, 2])


def test_the_strength_of_gaussian_noise_is_drawn_in_grey_levels():
    x = torch.full((1, 3, 64, 64), 0.5)
    noise = [255 * (degradation.random_noise(np.random.default_rng(seed), x, (10, 10), (0, 0), 0.4) - x)
             for seed in range(400)]
    noise = [n for n in noise if n.abs().max() > 0]                     # the others are Poisson's, of strength 0
    assert noise[0].std().item() == pytest.approx(10, rel=0.05) and 150 < len(noise) < 250
    gray = [bool((n[:, 0] == n[:, 1]).all()) for n in noise]            # the same in all colours
    assert np.mean(gray) == pytest.approx(0.4, abs=0.1)


def test_jpeg_channels_and_quality():
    red = torch.zeros(2, 3, 32, 32)
    red[:, 0] = 1
    assert (degradation.jpeg(red, [95, 95]) - red).abs().max() < 0.03
    # chroma is what 4:2:0 blurs: a fine red/blue pattern must keep its luma (Rec. 601) better than its colour
    x = torch.from_numpy(hr(0, 2)).permute(0, 3, 1, 2)
    error = [(degradation.jpeg(x, [q, q]) - x).square().mean().item() for q in (20, 60, 95)]
    assert error[0] > 1.5 * error[1] > 2 * error[2]
    mixed = degradation.jpeg(x[:1].expand(2, -1, -1, -1), [20, 95])
    assert (mixed[0] - x[0]).square().mean() > (mixed[1] - x[0]).square().mean()


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_codec_is_flushed_and_not_shifted_in_time(codec):
    level = np.random.default_rng(0).permutation(np.linspace(0.1, 0.9, 16))    # each frame has its own brightness
    x = torch.from_numpy(level).float()[:, None, None, None].expand(16, 3, 64, 64).contiguous()
    out = degradation.video_codec(x, codec, 50_000).mean((1, 2, 3)).numpy()
    assert len(out) == 16 and abs(out - level).max() < 0.06
    a, b = level - level.mean(), out - out.mean()
    assert np.argmax([np.dot(a, np.roll(b, lag)) for lag in range(-5, 6)]) == 5
    static = torch.from_numpy(hr(0, 1, 64)).permute(0, 3, 1, 2).expand(7, -1, -1, -1)
    assert (degradation.video_codec(static, codec, 50_000) - static).abs().mean() < 0.05              # nor in space


def test_codec_spends_the_bitrate_and_takes_any_size():
    x = torch.from_numpy(scene(0, 12, 96, 96) / np.float32(255)).permute(0, 3, 1, 2).contiguous()
    x = (x + 0.1 * torch.randn(12, 1, 96, 96, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    error = [(degradation.video_codec(x, "libx264", b) - x).square().mean() for b in (3_000, 30_000, 300_000)]
    assert error[0] > 1.2 * error[1] and error[1] > 1.2 * error[2]
    assert degradation.video_codec(x[:, :, :33, :47], "libx264", 10_000).shape == (12, 3, 33, 47)
    assert degradation.video_codec(x[:, :, :8, :8], "libx264", 10).shape == (12, 3, 8, 8)


def test_bitrate_follows_the_number_of_pixels(monkeypatch):
    asked = []
    monkeypatch.setattr(degradation, "video_codec", lambda x, codec, bitrate: asked.append((codec, bitrate)) or x)
    for side in (256, 128):
        degradation.random_video_codec(np.random.default_rng(1), torch.zeros(1, 3, side, side), (1e4, 1e5))
    (codec, big), (same, small) = asked
    assert codec == same and big == pytest.approx(4 * small) and 1e4 <= big <= 1e5


def test_the_bitrate_is_that_of_a_frame(monkeypatch):
    """At 25 frames per second it would be 25 times less."""
    sizes, ffmpeg = [], media.ffmpeg
    monkeypatch.setattr(media, "ffmpeg", lambda args, stdin: sizes.append(len(stdin)) or ffmpeg(args, stdin))
    x = torch.rand(8, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    degradation.video_codec(x, "libx264", 100_000)
    assert 8 * sizes[1] / 8 == pytest.approx(100_000, rel=0.3)          # 8 bits a byte, 8 frames


def test_two_of_three_clips_are_coded_by_libx264(monkeypatch):
    codecs, rng = [], np.random.default_rng(0)
    monkeypatch.setattr(degradation, "video_codec", lambda x, codec, bitrate: codecs.append(codec))
    for _ in range(600):
        degradation.random_video_codec(rng, torch.zeros(1, 3, 8, 8), (1e4, 1e5))
    assert codecs.count("libx264") / 600 == pytest.approx(2 / 3, abs=0.05) and codecs.count("mpeg4") > 150


@pytest.mark.parametrize("strength", ["light", "realbasicvsr"])
def test_degrade(monkeypatch, strength):
    sizes, codec = [], degradation.random_video_codec
    monkeypatch.setattr(degradation, "random_video_codec", lambda rng, x, b: sizes.append(x.shape) or codec(rng, x, b))
    x = hr(0, 5, 64)
    keep = x.copy()
    made = [degradation.degrade(x, np.random.default_rng(seed), strength) for seed in (0, 1, 2, 3, 0)]
    for lr in made:
        assert lr.shape == (5, 16, 16, 3) and lr.dtype == np.uint8
    assert np.array_equal(made[0], made[4]) and not np.array_equal(made[0], made[1])
    assert np.array_equal(x, keep)                           # the HR itself stays as it was
    assert sizes and all(h % 2 == 0 and w % 2 == 0 and n == 5 for n, _, h, w in sizes)
    with pytest.raises(ValueError, match="crop it"):
        degradation.degrade(hr(0, 2, 64)[:, :62], np.random.default_rng(0), strength)


def test_lr_does_not_depend_on_the_number_of_threads(tmp_path):
    x, made, banks = hr(0, 5, 256), [], []
    samples = data.Clips("samples/train", 5, 96, "light")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            # these two did depend on it, on an Intel Xeon
            made.append([degradation.degrade(x, np.random.default_rng(seed), name)
                         for name, seed in (("light", 0), ("realbasicvsr", 2))])
            banks.append(data.Bank(samples, 2, tmp_path / str(threads), 96))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    assert all(np.array_equal(a, b) for a, b in zip(*made, strict=True))
    assert np.array_equal(banks[0].rows, banks[1].rows)


def test_random_resize_is_even_and_one_size():
    x = torch.rand(6, 3, 50, 38)
    seen = set()
    for seed in range(30):
        out = degradation.random_resize(np.random.default_rng(seed), x, (0.3, 0.4, 0.3), (0.15, 1.5), 0.03)
        assert out.shape[:2] == (6, 3) and out.shape[2] % 2 == 0 and out.shape[3] % 2 == 0
        seen.add(out.shape[2])
    assert min(seen) < 30 and max(seen) > 60

    def heights(*prob):
        return [degradation.random_resize(np.random.default_rng(seed), x[:1], prob, (0.5, 1.5), 0).shape[2]
                for seed in range(20)]
    up, down = heights(1, 0, 0), heights(0, 1, 0)
    assert 50 <= min(up) and max(up) > 60 and max(down) <= 50 and min(down) < 40 and set(heights(0, 0, 1)) == {50}


def test_each_round_has_its_own_ranges(monkeypatch):
    s, seen = dataclasses.replace(degradation.REALBASICVSR, blur_prob=(1, 1), sinc_prob=0, video_prob=(0, 0)), []
    monkeypatch.setattr(degradation, "random_kernels", lambda rng, n, *a: seen.append(a) or np.ones((n, 1, 1)))
    for name in ("random_resize", "random_noise"):
        monkeypatch.setattr(degradation, name, lambda rng, x, *a: seen.append(a) or x)
    degradation.degrade(hr(0, 2, 32), np.random.default_rng(0), s)
    assert seen == [arguments for i in (0, 1) for arguments in (
        (s.kernel, s.sigma[i]), (s.resize_prob[i], s.resize_scale[i], s.resize_step[i]),
        (s.gaussian[i], s.poisson[i], s.gray_prob))]


@pytest.mark.parametrize("field", ["blur", "noise", "jpeg", "video"])
def test_each_operation_of_each_round_has_its_own_probability(monkeypatch, field):
    count = Counter()
    for name in ("blur", "noise", "jpeg", "video"):
        function = {"noise": "random_noise", "video": "random_video_codec"}.get(name, name)
        monkeypatch.setattr(degradation, function, lambda *args, name=name: (
            count.update([name]), next(x for x in args if torch.is_tensor(x)))[1])
    for chances in ((1, 0), (0, 1)):
        degradation.degrade(hr(0, 1, 16), np.random.default_rng(0), dataclasses.replace(
            NULL, **{f"{field}_prob": chances}))
        assert count.pop(field) == 1 and not count


def test_quality_and_size_drift_within_a_clip(monkeypatch):
    qualities, sizes, resize = [], [], degradation.resize
    monkeypatch.setattr(degradation, "jpeg", lambda x, quality: qualities.append(quality) or x)
    s = dataclasses.replace(NULL, jpeg_prob=(1, 1), jpeg=(30, 95))
    for seed in range(20):
        degradation.degrade(hr(0, 5, 16), np.random.default_rng(seed), s)
    assert 2.5 < abs(np.diff(np.stack(qualities))).max() <= 3
    monkeypatch.setattr(degradation, "resize", lambda x, size, mode: sizes.append(size[0]) or resize(x, size, mode))
    degradation.random_resize(np.random.default_rng(0), torch.zeros(30, 3, 100, 8), (0, 1, 0), (0.15, 1.5), 0.03)
    assert 0 < abs(np.diff(sizes[::2])).max() <= 4           # 3 px, and sizes are even


def test_the_last_filter_and_the_last_resize_are_those_of_the_strength(monkeypatch):
    omegas, modes, resize = [], set(), degradation.resize
    monkeypatch.setattr(degradation, "sinc_kernels", lambda k, omega: omegas.append((k, *omega)) or np.ones((2, 1, 1)))
    monkeypatch.setattr(degradation, "resize", lambda x, size, mode: (
        modes.add(mode) if size == (4, 4) else None, resize(x, size, mode))[1])
    for seed in range(40):
        degradation.degrade(hr(0, 2, 16), np.random.default_rng(seed), dataclasses.replace(
            NULL, sinc_prob=1, sinc_cutoff=3.0, kernel=(9, 13)))
    sizes, *values = np.array(omegas).T
    assert set(sizes) == {9, 11, 13} and 3 <= np.min(values) < 3.02 and 3.1 < np.max(values) <= np.pi
    assert modes == {"bilinear", "area", "bicubic"}


def test_order_of_operations(monkeypatch):
    """The list of RealBasicVSR from top to bottom; only its last two may change places."""
    log = []
    names = ("blur", "random_resize", "random_noise", "jpeg", "random_video_codec", "resize")
    operations = {name: getattr(degradation, name) for name in names}
    for name in names:
        def spy(*a, name=name, real=operations[name]):
            inside = log and log[-1] == "("                  # random_resize calls resize
            log.append("(" if name == "random_resize" else None if inside else name)
            out = real(*a)
            if name == "random_resize":
                del log[log.index("("):]
                log.append(name)
            return out
        monkeypatch.setattr(degradation, name, spy)
    always = dataclasses.replace(degradation.REALBASICVSR, blur_prob=(1, 1), sinc_prob=1)
    ends = set()
    for seed in range(6):
        log.clear()
        degradation.degrade(hr(0, 2, 32), np.random.default_rng(seed), always)
        steps = [s for s in log if s]
        first = ["blur", "random_resize", "random_noise", "jpeg"]
        assert steps[:9] == [*first, "random_video_codec", *first]
        ends.add(tuple(steps[9:]))
    assert ends == {("random_video_codec", "resize", "blur"), ("resize", "blur", "random_video_codec")}


def test_null_degradation_is_the_downscale():
    x = hr(0, 3, 64)
    lr = degradation.degrade(x, np.random.default_rng(0), NULL)
    area = x.reshape(3, 16, 4, 16, 4, 3).mean((2, 4)) * 255
    assert abs(lr - area).mean() < 3                         # of the three interpolations, or a shift would show
    shifted = np.roll(area, 1, 2)
    assert abs(lr - shifted).mean() > 3 * abs(lr - area).mean()


def test_sharpening_is_off_unless_asked():
    x = hr(0, 1, 64)
    soft, sharp = (degradation.degrade(x, np.random.default_rng(0), dataclasses.replace(NULL, usm=usm))
                   for usm in (False, True))
    assert sharp.astype(float).std() > 1.02 * soft.astype(float).std()
    assert not degradation.LIGHT.usm and not degradation.REALBASICVSR.usm


@pytest.mark.parametrize("strength", ["light", "realbasicvsr"])
def test_a_wide_clip_stays_wide(strength):
    lr = degradation.degrade(scene(0, 2, 32, 64) / np.float32(255), np.random.default_rng(0), strength)
    assert lr.shape == (2, 8, 16, 3)


def test_sharpening_leaves_faint_detail_and_adds_half_of_the_rest():
    x = torch.full((1, 3, 64, 64), 0.3)
    x[..., 32:] += 16 / 255                                  # 8 levels from the mean on either side
    assert torch.equal(degradation.sharpen(x), x)
    x[..., 32:] += 84 / 255
    gain = 255 * (degradation.sharpen(x) - x).abs().max().item()
    assert 15 < gain < 25                                    # half of 50, where the mask is 1


def test_the_ranges_are_the_published_ones():
    """RealBasicVSR's config; the large preset trains on it, the small ones on milder ranges."""
    assert dataclasses.asdict(degradation.REALBASICVSR) == dict(
        blur_prob=(1, 0.8), kernel=(7, 21), sigma=((0.2, 3), (0.2, 1.5)), noise_prob=(1, 1),
        resize_prob=((0.2, 0.7, 0.1), (0.3, 0.4, 0.3)), resize_scale=((0.15, 1.5), (0.3, 1.2)),
        resize_step=(0.015, 0.03),
        gaussian=((1, 30), (1, 25)), poisson=((0.05, 3), (0.05, 2.5)), gray_prob=0.4, jpeg_prob=(1, 1), jpeg=(30, 95),
        video_prob=(1, 1), bitrate=(1e4, 1e5), sinc_prob=0.8, sinc_cutoff=np.pi / 3, usm=False)
    assert degradation.KERNELS == dict(iso=0.405, aniso=0.225, generalized_iso=0.108, generalized_aniso=0.027,
                                       plateau_iso=0.108, plateau_aniso=0.027, sinc=0.1)
    assert {name: row["strength"] for name, row in data.CLIPS.items()} == {
        "tiny": "light", "small": "light", "wan1.3b": "realbasicvsr"}
