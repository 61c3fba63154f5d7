"""data.py: video in and out, the degradation step by step, clips, and the bank. Media are made on the spot."""
import dataclasses
import inspect
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import media

# nothing but the final resize; the codec, noise, JPEG and blurs never happen
NULL = dataclasses.replace(data.LIGHT, blur_prob=(0, 0), resize_prob=((0, 0, 1), (0, 0, 1)), resize_step=(0, 0),
                           noise_prob=(0, 0), jpeg_prob=(0, 0), video_prob=(0, 0), sinc_prob=0)


def scene(seed, frames=8, h=64, w=96, speed=2):
    """A smooth random picture that moves `speed` px per frame to the left, uint8 (F, h, w, 3)."""
    wide = w + speed * frames
    coarse = np.random.default_rng(seed).random((1, 3, h // 8, wide // 8), dtype=np.float32)
    coarse = 0.7 * coarse.mean(1, keepdims=True) + 0.3 * coarse              # video halves the resolution of colour
    coarse = 0.5 + 1.5 * (coarse - 0.5)
    wide = torch.nn.functional.interpolate(torch.from_numpy(coarse), size=(h, wide), mode="bicubic")[0].clamp(0, 1)
    wide = (wide * 255).byte().permute(1, 2, 0).numpy()
    return np.stack([wide[:, speed * i:speed * i + w] for i in range(frames)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two videos (one has a hard cut at 10) and two photographs, one of them in a subfolder."""
    folder = tmp_path_factory.mktemp("media")
    media.write_video(folder / "cut.mkv", np.concatenate([scene(1, 10), 255 - scene(2, 12)]), 24)
    media.write_video(folder / "one.mp4", scene(3, 9), 24)
    (folder / "more").mkdir()
    for seed, name in (4, "a.png"), (5, "more/b.jpg"):
        Image.fromarray(scene(seed, 1, 120, 160)[0]).save(folder / name)
    return folder


def hr(seed=0, frames=5, size=64):
    return scene(seed, frames, size, size) / np.float32(255)


def test_tensor_round_trip_and_rounding():
    x = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    x[..., 1] = x[:, ::-1, :, 1]                             # colours are not exchanged
    t = data.to_tensor(x)
    assert t.shape == (3, 1, 16, 16) and t.min() == -1 and t.max() == 1
    assert np.array_equal(data.to_uint8(t), x) and np.array_equal(data.to_uint8(t[None]), x)
    level = torch.tensor([99.6, 99.4, -30.0, 300.0]).div(127.5).sub(1)
    got = data.to_uint8(level.view(1, 1, 1, 4).expand(3, 1, 1, 4))
    assert got[0, 0, :, 0].tolist() == [100, 99, 0, 255]


def test_upsample():
    assert torch.equal(data.upsample(torch.full((2, 3, 4, 5, 6), 0.25), (20, 24)), torch.full((2, 3, 4, 20, 24), 0.25))
    step = torch.ones(1, 3, 2, 8, 8)
    step[..., :4] = -1
    assert data.upsample(step, (32, 32)).abs().max() == 1    # bicubic overshoots, the result must not
    ramp = torch.linspace(-0.5, 0.5, 8).expand(1, 3, 2, 8, 8)
    up = data.upsample(ramp, (32, 32))[0, 0, 0, 0]           # pixel centres: align_corners would give -0.5 + i / 31
    assert torch.allclose(up[8:24], -0.5 + ((torch.arange(8, 24) + 0.5) / 4 - 0.5) / 7, atol=0.01)


# ---------------------------------------------------------------------------------------------- degradation


def test_kernels():
    n, one = 4, np.ones(4)
    for plateau in (False, True):
        k = data.gaussian_kernels(9, 1.5 * one, 1.5 * one, 0.7 * one, 0.8 * one, plateau)
        assert np.allclose(k, k.swapaxes(1, 2)) and np.allclose(k, np.rot90(k, 1, (1, 2)))
        k = data.gaussian_kernels(9, 2 * one, 0.5 * one, 0 * one, one, plateau)
        assert (k[:, 4, 6] > 2 * k[:, 6, 4]).all()           # sigma_x is along x
    k = data.gaussian_kernels(21, 2 * one, 2 * one, 0 * one, one)
    r = np.arange(21) - 10
    assert np.allclose((k.sum(1) * r ** 2).sum(1), 4, atol=1e-3)               # its variance is sigma^2
    k = data.sinc_kernels(21, np.pi / 3 * one)
    assert np.allclose(k, np.rot90(k, 1, (1, 2)))
    # a low-pass: passes a slow wave, stops one beyond its cutoff
    response = abs(np.fft.fft(k.sum(1), 42))[0]
    assert response[2] > 0.9 and response[16] < 0.1
    assert abs(np.fft.fft(data.sinc_kernels(21, 2 * np.pi / 3 * one).sum(1), 42))[0, 10] > 0.8             # of omega
    for seed in range(40):
        k = data.random_kernels(np.random.default_rng(seed), n, (7, 21), (0.2, 3))
        assert k.shape[0] == n and k.shape[1] in range(7, 22, 2) and np.allclose(k.sum((1, 2)), 1)


def test_one_kernel_type_per_clip_with_the_listed_probabilities(monkeypatch):
    made = []
    monkeypatch.setattr(data, "sinc_kernels", lambda size, omega: made.append(("sinc", len(omega))))
    monkeypatch.setattr(data, "gaussian_kernels", lambda *a, plateau: made.append((plateau, len(a[1]))))
    rng = np.random.default_rng(0)
    for _ in range(2000):
        data.random_kernels(rng, 6, (7, 21), (0.2, 3))
    assert len(made) == 2000 and all(n == 6 for _, n in made)                  # one call makes the whole clip
    assert abs(np.mean([kind == "sinc" for kind, _ in made]) - 0.1) < 0.02
    assert abs(np.mean([kind is True for kind, _ in made]) - 0.135) < 0.02


def test_beta_is_below_one_half_of_the_time(monkeypatch):
    firsts = []
    monkeypatch.setattr(data, "gaussian_kernels", lambda size, sx, sy, angle, beta, plateau: firsts.append(beta[0]))
    rng = np.random.default_rng(0)
    for _ in range(600):
        data.random_kernels(rng, 2, (7, 21), (0.2, 3), {"generalized_iso": 1})
    assert abs(np.mean(np.array(firsts) < 1) - 0.5) < 0.06                     # uniform in [0.5, 4] gives 0.14


def test_walk_is_bounded():
    rng = np.random.default_rng(0)
    walks = np.stack([data.walk(rng, (0.2, 0.5), 0.02, 50) for _ in range(50)])
    assert walks.shape == (50, 50) and walks.min() >= 0.2 and walks.max() <= 0.5
    steps = abs(np.diff(walks, axis=1))
    assert 0.018 < steps.max() <= 0.02 + 1e-12 and steps.mean() > 0.005        # it moves, but not further
    assert walks[:, 0].std() > 0.05
    assert data.walk(rng, (0, 1), 0.1, 3, first=0.7)[0] == 0.7


def test_blur_each_frame_by_its_kernel():
    x = torch.zeros(2, 3, 15, 15)
    x[:, :, 7, 7] = 1
    kernels = np.random.default_rng(0).random((2, 5, 5))
    got = data.blur(x, kernels)
    for i in range(2):                                       # the answer to an impulse is the kernel, mirrored
        assert np.allclose(got[i, 1, 5:10, 5:10].numpy(), kernels[i, ::-1, ::-1], atol=1e-6)
    assert np.allclose(data.blur(torch.full((1, 3, 4, 4), 0.3), np.full((1, 21, 21), 1 / 441)), 0.3)


def test_resize_modes():
    x = torch.rand(2, 3, 12, 15, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(data.resize(x, (4, 5), "area"), torch.nn.functional.avg_pool2d(x, 3), atol=1e-6)
    uneven = data.resize(x, (5, 7), "area")
    assert uneven.shape[-2:] == (5, 7) and torch.allclose(uneven.mean((2, 3)), x.mean((2, 3)), atol=1e-6)
    want = (x[..., :2, :].sum(-2) + 0.4 * x[..., 2, :]) / 2.4                  # the third row belongs to two of them
    assert torch.allclose(data.resize(x, (5, 15), "area")[..., 0, :], want, atol=1e-6)
    for mode in ("bilinear", "bicubic", "area"):
        assert data.resize(x, (24, 30), mode).shape[-2:] == (24, 30)


def test_poisson_noise_in_units_of_one():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.random((1, 3, 256, 256), dtype=np.float32))
    x = (x * 255).round() / 255
    for gray in (False, True):
        noise = (data.poisson_noise(rng, x, np.ones(1), gray) - x) * 255
        assert gray or abs(noise.std().item() - 11.3) < 0.3  # 0.7 if it were on 0..255
        assert abs(noise.mean().item()) < 0.3
        assert gray == torch.allclose(noise[:, 0], noise[:, 1], atol=1e-3)
    half = (data.poisson_noise(rng, x, np.full(1, 0.5), False) - x) * 255
    assert abs(half.std().item() - 5.65) < 0.2


def test_gaussian_noise():
    rng, x = np.random.default_rng(0), torch.full((2, 3, 128, 128), 0.5)
    noise = data.gaussian_noise(rng, x, np.array([5, 20]) / 255, False) - x
    assert abs(noise[0].std() * 255 - 5) < 0.2 and abs(noise[1].std() * 255 - 20) < 0.5
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.05   # fresh in each frame
    gray = data.gaussian_noise(rng, x, np.array([5, 5]) / 255, True) - x
    assert torch.allclose(gray[:, 0], gray[:, 2]) and not torch.allclose(noise[:, 0], noise[:, 2])


def test_jpeg_channels_and_quality():
    red = torch.zeros(2, 3, 32, 32)
    red[:, 0] = 1
    assert (data.jpeg(red, [95, 95]) - red).abs().max() < 0.03
    # chroma is what 4:2:0 blurs: a fine red/blue pattern must keep its luma (Rec. 601) better than its colour
    x = torch.from_numpy(hr(0, 2)).permute(0, 3, 1, 2)
    error = [(data.jpeg(x, [q, q]) - x).square().mean().item() for q in (20, 60, 95)]
    assert error[0] > 1.5 * error[1] > 2 * error[2]
    mixed = data.jpeg(x[:1].expand(2, -1, -1, -1), [20, 95])
    assert (mixed[0] - x[0]).square().mean() > (mixed[1] - x[0]).square().mean()


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_codec_is_flushed_and_not_shifted_in_time(codec):
    level = np.random.default_rng(0).permutation(np.linspace(0.1, 0.9, 16))    # each frame has its own brightness
    x = torch.from_numpy(level).float()[:, None, None, None].expand(16, 3, 64, 64).contiguous()
    out = data.video_codec(x, codec, 50_000).mean((1, 2, 3)).numpy()
    assert len(out) == 16 and abs(out - level).max() < 0.06
    a, b = level - level.mean(), out - out.mean()
    assert np.argmax([np.dot(a, np.roll(b, lag)) for lag in range(-5, 6)]) == 5
    static = torch.from_numpy(hr(0, 1, 64)).permute(0, 3, 1, 2).expand(7, -1, -1, -1)
    assert (data.video_codec(static, codec, 50_000) - static).abs().mean() < 0.05              # nor in space


def test_codec_spends_the_bitrate_and_takes_any_size():
    x = torch.from_numpy(scene(0, 12, 96, 96) / np.float32(255)).permute(0, 3, 1, 2).contiguous()
    x = (x + 0.1 * torch.randn(12, 1, 96, 96, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    error = [(data.video_codec(x, "libx264", b) - x).square().mean() for b in (3_000, 30_000, 300_000)]
    assert error[0] > 1.2 * error[1] and error[1] > 1.2 * error[2]
    assert data.video_codec(x[:, :, :33, :47], "libx264", 10_000).shape == (12, 3, 33, 47)
    assert data.video_codec(x[:, :, :8, :8], "libx264", 10).shape == (12, 3, 8, 8)


def test_bitrate_follows_the_number_of_pixels(monkeypatch):
    asked = []
    monkeypatch.setattr(data, "video_codec", lambda x, codec, bitrate: asked.append((codec, bitrate)) or x)
    for side in (256, 128):
        data.random_video_codec(np.random.default_rng(1), torch.zeros(1, 3, side, side), (1e4, 1e5))
    (codec, big), (same, small) = asked
    assert codec == same and big == pytest.approx(4 * small) and 1e4 <= big <= 1e5


@pytest.mark.parametrize("strength", ["light", "realbasicvsr"])
def test_degrade(monkeypatch, strength):
    sizes, codec = [], data.random_video_codec
    monkeypatch.setattr(data, "random_video_codec", lambda rng, x, b: sizes.append(x.shape) or codec(rng, x, b))
    x = hr(0, 5, 64)
    keep = x.copy()
    made = [data.degrade(x, np.random.default_rng(seed), strength) for seed in (0, 1, 2, 3, 0)]
    for lr in made:
        assert lr.shape == (5, 16, 16, 3) and lr.dtype == np.uint8
    assert np.array_equal(made[0], made[4]) and not np.array_equal(made[0], made[1])
    assert np.array_equal(x, keep)                           # the HR itself stays as it was
    assert sizes and all(h % 2 == 0 and w % 2 == 0 and n == 5 for n, _, h, w in sizes)
    with pytest.raises(ValueError, match="crop it"):
        data.degrade(hr(0, 2, 64)[:, :62], np.random.default_rng(0), strength)


def test_lr_does_not_depend_on_the_number_of_threads(tmp_path):
    x, made, banks = hr(0, 5, 256), [], []
    samples = data.Clips("samples/train", 5, 96, "light")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            # these two did depend on it, on an Intel Xeon
            made.append([data.degrade(x, np.random.default_rng(seed), name)
                         for name, seed in (("light", 0), ("realbasicvsr", 2))])
            banks.append(data.Bank(samples, 2, tmp_path / str(threads), 96, progress=False))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    assert all(np.array_equal(a, b) for a, b in zip(*made, strict=True))
    assert np.array_equal(banks[0].rows, banks[1].rows)


def test_random_resize_is_even_and_one_size():
    x = torch.rand(6, 3, 50, 38)
    seen = set()
    for seed in range(30):
        out = data.random_resize(np.random.default_rng(seed), x, (0.3, 0.4, 0.3), (0.15, 1.5), 0.03)
        assert out.shape[:2] == (6, 3) and out.shape[2] % 2 == 0 and out.shape[3] % 2 == 0
        seen.add(out.shape[2])
    assert min(seen) < 30 and max(seen) > 60


def test_order_of_operations(monkeypatch):
    """The list of RealBasicVSR from top to bottom; only its last two may change places."""
    log = []
    names = ("blur", "random_resize", "random_noise", "jpeg", "random_video_codec", "resize")
    operations = {name: getattr(data, name) for name in names}
    for name in names:
        def spy(*a, name=name, real=operations[name]):
            inside = log and log[-1] == "("                  # random_resize calls resize
            log.append("(" if name == "random_resize" else None if inside else name)
            out = real(*a)
            if name == "random_resize":
                del log[log.index("("):]
                log.append(name)
            return out
        monkeypatch.setattr(data, name, spy)
    always = dataclasses.replace(data.REALBASICVSR, blur_prob=(1, 1), sinc_prob=1)
    ends = set()
    for seed in range(6):
        log.clear()
        data.degrade(hr(0, 2, 32), np.random.default_rng(seed), always)
        steps = [s for s in log if s]
        first = ["blur", "random_resize", "random_noise", "jpeg"]
        assert steps[:9] == [*first, "random_video_codec", *first]
        ends.add(tuple(steps[9:]))
    assert ends == {("random_video_codec", "resize", "blur"), ("resize", "blur", "random_video_codec")}


def test_null_degradation_is_the_downscale():
    x = hr(0, 3, 64)
    lr = data.degrade(x, np.random.default_rng(0), NULL)
    area = x.reshape(3, 16, 4, 16, 4, 3).mean((2, 4)) * 255
    assert abs(lr - area).mean() < 3                         # of the three interpolations, or a shift would show
    shifted = np.roll(area, 1, 2)
    assert abs(lr - shifted).mean() > 3 * abs(lr - area).mean()


def test_sharpening_is_off_unless_asked():
    x = hr(0, 1, 64)
    soft, sharp = (data.degrade(x, np.random.default_rng(0), dataclasses.replace(NULL, usm=u)) for u in (False, True))
    assert sharp.astype(float).std() > 1.02 * soft.astype(float).std()
    assert not data.LIGHT.usm and not data.REALBASICVSR.usm


# ---------------------------------------------------------------------------------------------- clips


def test_clips_are_functions_of_seed_epoch_index(folder):
    a, b = (data.Clips(folder, 5, 32, "light", seed=3) for _ in range(2))
    keys = [(0, 0), (0, 1), (1, 0), (0, 7)]
    forth = {k: a.clip(*k) for k in keys}
    back = {k: b.clip(*k) for k in reversed(keys)}
    for k in keys:
        high, low = forth[k]
        assert high.shape == (5, 32, 32, 3) and low.shape == (5, 8, 8, 3) and high.dtype == low.dtype == np.uint8
        assert np.array_equal(high, back[k][0]) and np.array_equal(low, back[k][1])
    highs = [forth[k][0] for k in keys] + [data.Clips(folder, 5, 32, "light", seed=4).clip(0, 0)[0]]
    assert all(not np.array_equal(x, y) for i, x in enumerate(highs) for y in highs[:i])
    assert len(a) == 10 // 5 + 12 // 5 + 9 // 5 + 2


def test_windows_do_not_cross_a_cut(folder, monkeypatch):
    clips = data.Clips(folder, 5, 32, NULL)
    assert [(p.name, a, b) for p, a, b in clips.shots] == [("cut.mkv", 0, 10), ("cut.mkv", 10, 22), ("one.mp4", 0, 9)]
    windows, read = set(), media.read_video
    monkeypatch.setattr(media, "read_video", lambda p, s, n: windows.add((p.name, s, n)) or read(p, s, n))
    clips.photos = []
    for i in range(60):
        clips.hr(np.random.default_rng(i))
    starts = {s for name, s, _ in windows if name == "cut.mkv"}
    assert all(n == 5 for *_, n in windows) and starts <= {*range(0, 6), *range(10, 18)} and {0, 5} & starts
    assert len(starts) > 9


def test_both_kinds_of_sources_are_drawn(folder, monkeypatch):
    clips = data.Clips(folder, 5, 32, NULL)
    drawn = []
    monkeypatch.setattr(data, "photo_clip", lambda *a: drawn.append("photo"))
    monkeypatch.setattr(media, "read_video", lambda *a: drawn.append("video") or np.zeros((5, 64, 96, 3), np.uint8))
    for i in range(400):
        clips.hr(np.random.default_rng(i))
    assert abs(drawn.count("video") / 400 - 0.6) < 0.08


def test_photographs_move_and_have_layers():
    photo = scene(6, 1, 160, 200)[0]
    bright = np.full((160, 200, 3), 255, np.uint8)
    dark = photo // 2                                        # at most 127, so that white can only be a piece
    covered = []
    for seed in range(6):
        clip = data.photo_clip([dark, bright], np.random.default_rng(seed), 7, 48)
        assert clip.shape == (7, 48, 48, 3) and clip.dtype == np.uint8
        assert abs(np.diff(clip.astype(int), axis=0)).mean((1, 2, 3)).min() > 0.1             # every frame moves
        covered.append((clip[..., 0] > 200).mean())
        soft = (clip[..., 0] > 150) & (clip[..., 0] < 230)
        assert covered[-1] == 0 or soft.any()                # the edge of a piece is soft
    assert max(covered) > 0.03 and max(covered) < 0.8


def test_motion_of_photographs_is_exact(monkeypatch):
    """A pan by 3 px per frame shows the photograph 3 px further on, and no piece hides it."""
    pan = (np.stack([3.0 * np.arange(-2, 3), np.zeros(5)], 1), np.zeros(5), np.zeros(5))
    monkeypatch.setattr(data, "random_motion", lambda rng, frames, speed: pan)

    class Fixed:
        """A generator that draws the middle of every range, and no piece at all."""
        def uniform(self, low, high, n=None):
            return np.full(n, 0.0) if n else (0.0 if low == 0 else (low + high) / 2)

        def random(self):
            return 0.5

        def integers(self, *a):
            return 0
    photo = scene(7, 1, 128, 160)[0]
    clip = data.photo_clip([photo], Fixed(), 5, 32).astype(int)
    for i in range(4):
        assert abs(clip[i + 1][:, :-3] - clip[i][:, 3:]).max() <= 1
    want = photo[48:80, 64:96].astype(int)
    assert abs(clip[2] - want).mean() < 4 < abs(np.roll(clip[2], 1, 1) - want).mean()


def test_photographs_turn_and_zoom(monkeypatch):
    """Frame 1 of a clip turned by 90 degrees is frame 0 turned; at a zoom of 2 it shows twice as much."""
    photo = scene(8, 1, 160, 160)[0]
    r = (torch.arange(64) + 0.5) / 2 - 16
    plane = torch.stack(torch.meshgrid(r, r, indexing="xy"), -1).expand(3, -1, -1, -1)
    xy = data.turn(plane, np.array([0, np.pi / 2, 0]), np.array([1, 1, 2.0])) + 80
    seen = torch.nn.functional.avg_pool2d(data.sample(photo, xy), 2).permute(0, 2, 3, 1).numpy()
    assert abs(seen[1] - np.rot90(seen[0])).max() < 1e-2 or abs(seen[1] - np.rot90(seen[0], -1)).max() < 1e-2
    assert abs(seen[0] - photo[64:96, 64:96]).mean() < 4
    assert abs(seen[2] - photo[48:112, 48:112].reshape(32, 2, 32, 2, 3).mean((1, 3))).mean() < 4


def test_bad_files_are_skipped_with_their_reason(tmp_path, capsys):
    media.write_video(tmp_path / "good.mkv", scene(0, 6), 24)
    media.write_video(tmp_path / "small.mkv", scene(0, 6, 24, 96), 24)
    media.write_video(tmp_path / "short.mkv", scene(0, 3), 24)
    (tmp_path / "broken.mp4").write_bytes(b"no video at all" * 100)
    (tmp_path / "broken.png").write_bytes(b"no picture at all")
    Image.fromarray(scene(0, 1, 200, 200)[0]).save(tmp_path / "cut_off.jpg")
    whole = (tmp_path / "cut_off.jpg").read_bytes()
    (tmp_path / "cut_off.jpg").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "notes.txt").write_text("not media: not even mentioned")
    clips = data.Clips(tmp_path, 5, 32, "light")
    said = capsys.readouterr().out.splitlines()
    for name, reason in (("small.mkv", "96x24 is smaller"), ("short.mkv", "no shot of 5 frames"),
                         ("broken.mp4", "not readable"), ("broken.png", "not readable"),
                         ("cut_off.jpg", "not readable")):
        assert sum(name in line and reason in line for line in said) == 1, name
    assert len(clips.skipped) == 5 and "5 files skipped" in said[-1] and not any("notes" in line for line in said)
    assert len(clips.shots) == 1


def test_an_empty_folder_is_an_error(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(SystemExit, match="--data") as e:
            data.Clips(folder, 5, 32, "light")
        assert "\n" not in str(e.value)


# ---------------------------------------------------------------------------------------------- the bank


def test_an_empty_or_a_damaged_bank_is_told(folder, tmp_path):
    clips = data.Clips(folder, 5, 48, NULL)
    with pytest.raises(SystemExit, match="clips: at least 1"):
        data.Bank(clips, 0, tmp_path, 32)
    whole = data.Bank(clips, 1, tmp_path, 32, progress=False).path
    os.truncate(whole, 100)
    with pytest.raises(SystemExit, match=f"{whole.name}: clips cut short; remove this file"):
        data.Bank(clips, 1, tmp_path, 32)


@pytest.fixture(scope="module")
def bank(folder, tmp_path_factory):
    return data.Bank(data.Clips(folder, 5, 48, NULL), 6, tmp_path_factory.mktemp("bank"), 32, progress=False)


def test_bank_holds_the_clips(folder, bank):
    clips = data.Clips(folder, 5, 48, NULL)
    for i in (0, 5):
        assert np.array_equal(bank.rows[i], np.concatenate([x.ravel() for x in clips.clip(0, i)]))
    assert len(bank) == 6


def test_crops_of_hr_and_lr_belong_together(bank):
    differ = set()
    for index in range(6):
        for epoch in range(4):
            high, low = bank.crop(epoch, index)
            assert high.shape == (5, 32, 32, 3) and low.shape == (5, 8, 8, 3)
            area = high.reshape(5, 8, 4, 8, 4, 3).mean((2, 4))
            error = abs(low - area).mean()
            for other in (area[::-1], area[:, ::-1], area[:, :, ::-1], area.swapaxes(1, 2), np.roll(area, 1, 1)):
                assert error <= abs(low - other).mean()
            assert error < 6                                 # not an area mean, but near one
            differ.add(high.tobytes())
    assert len(differ) == 24                                 # each visit sees another crop or flip
    again = bank.crop(2, 3)
    assert all(np.array_equal(a, b) for a, b in zip(again, bank.crop(2, 3), strict=True))


def test_an_epoch_visits_every_clip_once(bank, monkeypatch):
    class Rows:
        """Notes which row is asked for."""
        visited = []

        def __getitem__(self, i):
            self.visited.append(int(i))
            return np.zeros(5 * (48 * 48 + 12 * 12) * 3, np.uint8)
    monkeypatch.setattr(bank, "rows", Rows())
    for i in range(12):
        bank.crop(*divmod(i, 6))
    first, second = Rows.visited[:6], Rows.visited[6:]
    assert sorted(first) == sorted(second) == list(range(6)) and first != second


def test_batches_do_not_depend_on_ranks(bank):
    high, low = bank.batch(4, 4)                             # crosses from epoch 0 into epoch 1
    assert high.shape == (4, 3, 5, 32, 32) and low.shape == (4, 3, 5, 8, 8) and high.dtype == torch.float32
    halves = [bank.batch(4 + 2 * rank, 2) for rank in range(2)]
    assert torch.equal(high, torch.cat([h for h, _ in halves])) and torch.equal(low, torch.cat([x for _, x in halves]))
    assert torch.equal(high[2], data.to_tensor(bank.crop(1, 0)[0])) and high.min() >= -1 and high.max() <= 1


def test_an_edit_of_the_degradation_makes_other_clips(folder, tmp_path, monkeypatch):
    """As a reader edits it: in the file. A comment makes none."""
    names = []
    for edit in ("", "    # why not\n", "    x = x * 0\n"):
        source = Path(data.__file__).read_text()
        end = "    return to_bytes(x)\n"
        assert source.count(end) == 1
        (tmp_path / "edited.py").write_text(source.replace(end, edit + end))
        monkeypatch.setattr(inspect, "getsource", lambda m, of=inspect.getsource: (tmp_path / "edited.py").read_text()
                            if m is data else of(m))
        names.append(data.Bank(data.Clips(folder, 5, 32, NULL), 1, tmp_path, 32, progress=False).path)
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize("changes, words", [
    (dict(frames=16), "frames 4k"), (dict(window=9), "window at most"), (dict(crop=100), "crop a multiple of 8"),
    (dict(size=64), "crop at most size"), (dict(strength="x"), "strength one of light")])
def test_clips_that_do_not_fit_are_refused(monkeypatch, changes, words):
    monkeypatch.setitem(data.CLIPS, "tiny", data.CLIPS["tiny"] | changes)
    with pytest.raises(SystemExit, match=words):
        data.clip_row("tiny")
    with pytest.raises(SystemExit, match="nano: add a row of CLIPS"):
        data.clip_row("nano")


def test_bank_is_made_once_and_for_these_settings(folder, tmp_path, monkeypatch):
    clips = data.Clips(folder, 5, 32, NULL)
    first = data.Bank(clips, 2, tmp_path, 32, progress=False)
    monkeypatch.setattr(data.Clips, "clip", lambda *a: pytest.fail("made again"))
    assert data.Bank(clips, 2, tmp_path, 16, progress=False).path == first.path                # the crop is cut later
    monkeypatch.undo()
    others = [data.Bank(clips, 3, tmp_path, 32, progress=False),
              data.Bank(clips, 2, tmp_path, 32, epoch=1, progress=False),
              data.Bank(data.Clips(folder, 5, 32, NULL, seed=1), 2, tmp_path, 32, progress=False),
              data.Bank(data.Clips(folder, 5, 32, dataclasses.replace(NULL, sinc_prob=1)), 2, tmp_path, 32,
                        progress=False)]
    assert len({b.path for b in [first, *others]}) == 5
    monkeypatch.setattr(data.Clips, "clip", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        data.Bank(clips, 4, tmp_path, 32, progress=False)
    assert len(list(tmp_path.iterdir())) == 5                # nothing is left of the one that failed


# ---------------------------------------------------------------------------------------------- prepare


def test_prepare_cuts_only_what_is_listed(tmp_path):
    film = scene(0, 12, 64, 96)
    media.write_video(tmp_path / "film.mkv", film, 24)
    Image.fromarray(scene(1, 1, 60, 90)[0]).save(tmp_path / "p.png")
    listed = tmp_path / "list.json"
    todo = dict(film=dict(sha256=data.sha256(tmp_path / "film.mkv"), size=[48, 32], fps="24", shots=[
                    dict(shot=1, start=2, end=5, split="train"), dict(shot=7, start=8, end=12, split="val")]),
                stills=[dict(name="p.png", sha256=data.sha256(tmp_path / "p.png"), scale=1.5, split="train")])
    listed.write_text(data.json.dumps(todo))
    data.prepare(tmp_path / "film.mkv", tmp_path, tmp_path / "out", listed)
    files = sorted(str(p.relative_to(tmp_path / "out")) for p in Path(tmp_path, "out").rglob("*.*"))
    assert files == ["train/bbb_001.mp4", "train/p.jpg", "val/bbb_007.mp4"]
    val = media.read_video(tmp_path / "out/val/bbb_007.mp4")
    assert val.shape == (4, 32, 48, 3)
    assert abs(val - film[8:].reshape(4, 32, 2, 48, 2, 3).mean((2, 4))).mean() < 3
    assert media.read_image(tmp_path / "out/train/p.jpg").shape == (40, 60, 3)
    todo["film"]["sha256"] = "0" * 64
    listed.write_text(data.json.dumps(todo))
    with pytest.raises(SystemExit, match="sha256"):
        data.prepare(tmp_path / "film.mkv", tmp_path, tmp_path / "out", listed)
    with pytest.raises(SystemExit, match="none.mkv: no such file; samples/CREDITS.md"):
        data.prepare(tmp_path / "none.mkv", tmp_path, tmp_path / "out", listed)
