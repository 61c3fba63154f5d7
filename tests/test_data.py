"""data.py: tensors, clips, and the bank. Media are made on the spot."""
import dataclasses
import inspect
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import degradation
import media
import model as M
from tests.conftest import scene
from tests.test_degradation import NULL


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


# ---------------------------------------------------------------------------------------------- clips


def test_clips_are_functions_of_seed_epoch_index(folder):
    a, b = (data.Clips(folder, 5, 32, "light", seed=3).survey() for _ in range(2))
    keys = [(0, 0), (0, 1), (1, 0), (0, 7)]
    forth = {k: a.clip(*k) for k in keys}
    back = {k: b.clip(*k) for k in reversed(keys)}
    for k in keys:
        high, low = forth[k]
        assert high.shape == (5, 32, 32, 3) and low.shape == (5, 8, 8, 3) and high.dtype == low.dtype == np.uint8
        assert np.array_equal(high, back[k][0]) and np.array_equal(low, back[k][1])
    highs = [forth[k][0] for k in keys] + [data.Clips(folder, 5, 32, "light", seed=4).survey().clip(0, 0)[0]]
    assert all(not np.array_equal(x, y) for i, x in enumerate(highs) for y in highs[:i])


def test_windows_do_not_cross_a_cut(folder, monkeypatch):
    clips = data.Clips(folder, 5, 32, NULL).survey()
    assert [(p.name, a, b) for p, a, b in clips.shots] == [("cut.mkv", 0, 10), ("cut.mkv", 10, 22), ("one.mp4", 0, 9)]
    assert [p.name for p in clips.photos] == ["a.png", "b.jpg"]                # one of them in a subfolder
    windows, read = set(), media.read_video
    monkeypatch.setattr(media, "read_video", lambda p, s, n: windows.add((p.name, s, n)) or read(p, s, n))
    clips.photos = []
    for i in range(60):
        clips.hr(np.random.default_rng(i))
    starts = {s for name, s, _ in windows if name == "cut.mkv"}
    assert all(n == 5 for *_, n in windows) and starts <= {*range(0, 6), *range(10, 18)} and {0, 5} & starts
    assert len(starts) > 9


def test_every_window_of_every_shot_may_be_drawn(tmp_path, monkeypatch):
    """A shot of exactly one window, then one of eight."""
    media.write_video(tmp_path / "cut.mkv", np.concatenate([scene(1, 5), 255 - scene(2, 12)]), 24)
    clips, starts = data.Clips(tmp_path, 5, 64, NULL).survey(), []
    assert clips.windows.tolist() == [1, 8]
    monkeypatch.setattr(media, "read_video", lambda path, start, n: starts.append(start) or np.zeros((5, 64, 96, 3)))
    for seed in range(600):
        clips.hr(np.random.default_rng(seed))
    counts = [starts.count(start) / 600 for start in (0, *range(5, 13))]
    assert sum(counts) == 1 and min(counts) > 0.05 and max(counts) < 0.18      # one in nine each


def test_most_crops_are_the_richest_of_their_clip():
    rng = np.random.default_rng(0)
    drawn = [data.pick(rng, [1, 3, 2], lambda place: place) for _ in range(1000)]
    assert drawn.count(3) / 1000 == pytest.approx(0.7, abs=0.05) and drawn.count(2) == 0


def test_crops_come_from_everywhere_and_most_from_where_the_detail_is(folder, monkeypatch):
    """Each pixel says where it is; detail is at x >= 80, which a quarter of all crops would see."""
    frame = np.zeros((64, 96, 3), np.uint8)
    frame[..., 0], frame[..., 1] = np.mgrid[:64, :96]
    frame[:, 80:, 2] = np.random.default_rng(0).integers(0, 256, (64, 16))
    clips = data.Clips(folder, 5, 32, NULL).survey()
    clips.photos = []
    monkeypatch.setattr(media, "read_video", lambda path, start, n: np.stack([frame] * n))
    crops = [clips.hr(np.random.default_rng(seed)) for seed in range(300)]
    y, x = np.array([crop[0, 0, 0, :2] for crop in crops]).T
    assert (y.min(), y.max(), x.min(), x.max()) == (0, 32, 0, 64)
    assert np.mean(x > 48) == pytest.approx(0.7 * (1 - 0.75 ** 3) + 0.3 * 0.25, abs=0.08)


def test_both_kinds_of_sources_are_drawn(folder, monkeypatch):
    clips = data.Clips(folder, 5, 32, NULL).survey()
    drawn, grounds = [], []
    monkeypatch.setattr(data, "photo_clip", lambda photos, *a: grounds.append(photos[0].sum()) or drawn.append("photo"))
    monkeypatch.setattr(media, "read_video", lambda *a: drawn.append("video") or np.zeros((5, 64, 96, 3), np.uint8))
    for i in range(400):
        clips.hr(np.random.default_rng(i))
    assert abs(drawn.count("video") / 400 - 0.6) < 0.08
    assert 0.35 < grounds.count(max(grounds)) / len(grounds) < 0.65 and len(set(grounds)) == 2     # either photograph


def test_pieces_are_cut_from_the_middle_of_their_photograph():
    dark, bright = np.zeros((400, 400, 3), np.uint8), np.zeros((400, 400, 3), np.uint8)
    bright[80:320, 80:320] = 255
    assert max(data.photo_clip([dark, bright], np.random.default_rng(seed), 3, 48).mean() for seed in range(6)) > 5


def test_a_flat_photograph_stays_as_bright():
    """Samples between pixels are a little off a whole level: cut off, they would be one darker."""
    assert (data.photo_clip([np.full((120, 120, 3), 100, np.uint8)], np.random.default_rng(0), 3, 32) == 100).all()


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


def test_photographs_move_at_their_speed_and_are_never_enlarged(monkeypatch):
    steps, drift = [], []
    for seed in range(300):
        shift, zoom, _ = data.random_motion(np.random.default_rng(seed), 21, 3.0)
        steps.append(np.median(np.hypot(*np.diff(shift, axis=0).T)))
        drift.append(np.ptp(zoom) / 20)
    assert 1 < np.median(steps) < 2.2 and max(steps) < 4.5 and 0.001 < np.std(drift) < 0.004
    zooms, turn = [], data.turn
    monkeypatch.setattr(data, "turn", lambda xy, angle, zoom: zooms.append(zoom) or turn(xy, angle, zoom))
    for seed in range(40):
        data.photo_clip([scene(6, 1, 160, 200)[0]], np.random.default_rng(seed), 21, 32)
    assert min(z.min() for z in zooms) >= 1 and max(z.max() for z in zooms) > 1.2


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
    (tmp_path / "._good.mkv").write_bytes(b"what a Mac leaves beside a file: neither")
    clips = data.Clips(tmp_path, 5, 32, "light").survey()
    said = capsys.readouterr().out.splitlines()
    for name, reason in (("small.mkv", "96x24 is smaller"), ("short.mkv", "no shot of 5 frames"),
                         ("broken.mp4", "not readable"), ("broken.png", "not readable"),
                         ("cut_off.jpg", "not readable")):
        assert sum(name in line and reason in line for line in said) == 1, name
    assert len(clips.skipped) == 5 and "5 files skipped" in said[-1] and not any("notes" in line for line in said)
    assert len(clips.shots) == 1


def test_an_empty_folder_is_an_error(tmp_path):
    (tmp_path / "short").mkdir()
    media.write_video(tmp_path / "short/short.mkv", scene(0, 3), 24)
    for folder in (tmp_path / "short", tmp_path / "missing", tmp_path / "empty"):
        with pytest.raises(SystemExit, match="--data") as e:
            data.Clips(folder, 5, 32, "light").survey()
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert "\n" not in str(e.value)


# ---------------------------------------------------------------------------------------------- the bank


def test_an_empty_or_a_damaged_bank_is_told(folder, tmp_path):
    clips = data.Clips(folder, 5, 48, NULL)
    with pytest.raises(SystemExit, match="clips: at least 1"):
        data.Bank(clips, 0, tmp_path, 32)
    whole = data.Bank(clips, 1, tmp_path, 32).path
    os.truncate(whole, 100)
    with pytest.raises(SystemExit, match=f"{whole.name}: clips cut short; remove this file"):
        data.Bank(clips, 1, tmp_path, 32)


def test_clips_that_do_not_fit_on_the_disk_are_one_line(folder, tmp_path, monkeypatch):
    def full(fd, start, size):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setitem(data.CLIPS, "tiny", dict(frames=5, size=48, crop=32, window=2, strength="light"))
    code = M.PatchVAE()
    for make in (lambda: data.Bank(data.Clips(folder, 5, 48, NULL), 2, tmp_path / "cache", 32),
                 lambda: data.prepare_latents(tmp_path / "cache/latents", folder, "tiny", code, 2)):
        with pytest.raises(SystemExit, match=r"GB cannot be written \(No space left on device\); make room") as e:
            make()
        assert "\n" not in str(e.value) and not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".pt"]


@pytest.fixture(scope="module")
def bank(folder, tmp_path_factory):
    return data.Bank(data.Clips(folder, 5, 48, NULL), 6, tmp_path_factory.mktemp("bank"), 32)


def test_bank_holds_the_clips(folder, bank):
    clips = data.Clips(folder, 5, 48, NULL).survey()
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


def test_targets_that_are_asked_for_soft_are_soft_and_no_other(bank):
    hr, lr = bank.batch(0, 2)
    vae, u = M.PatchVAE(), torch.tensor([0.5, 0.0])
    vae.fit(hr)
    z_hr, z_lr = bank.latents(vae, 0, 2, "cpu", torch.tensor([False, True]), u)
    torch.testing.assert_close(z_lr, vae.encode(data.upsample(lr, hr.shape[-2:])))
    torch.testing.assert_close(z_hr[0], vae.encode(hr)[0])
    torch.testing.assert_close(z_hr[1], vae.encode(data.soften(hr, 0.7 + 0.8 * u))[1])
    assert not torch.equal(z_hr[1], vae.encode(hr)[1])


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
    monkeypatch.setattr(bank, "seed", bank.seed + 1)
    for i in range(6):
        bank.crop(0, i)
    assert sorted(Rows.visited[12:]) == list(range(6)) and Rows.visited[12:] != first


def test_cached_latents_come_once_an_epoch_in_an_order_of_the_seed():
    def order(seed, first, count):
        bank = object.__new__(data.LatentBank)
        bank.rows, bank.seed, bank.checked = np.arange(6, dtype=np.float16).reshape(6, 1, 1).repeat(3, 1), seed, "code"
        return bank.latents("code", first, count, "cpu")[0].flatten().tolist()
    seen = order(0, 0, 12)
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6)) and seen[:6] != seen[6:]
    assert order(0, 5, 3) == seen[5:8] and order(1, 0, 6) != seen[:6]


def test_windows_come_from_anywhere_in_a_clip_and_from_the_same_place_of_all():
    z = torch.arange(5.0).view(1, 1, 5, 1, 1)
    starts = set()
    for _ in range(100):
        a, b = data.random_window(2, z, z + 10)
        assert a.shape[2] == 2 and a[0, 0, 1] == a[0, 0, 0] + 1 and torch.equal(a + 10, b)
        starts.add(int(a[0, 0, 0]))
    assert starts == {0, 1, 2, 3} and torch.equal(data.random_window(5, z)[0], z)


def test_panels_show_the_same_noise_and_window_each_time():
    class Source:
        def latents(self, vae, first, count, device):
            z = torch.arange(8.0).view(1, 1, 8, 1, 1).expand(count, 16, 8, 2, 2)
            return z + first, z
    made = []
    for _ in range(4):
        torch.rand(3)                                        # whatever was drawn before
        made.append(data.panel_batch(Source(), None, 2, 5, "cpu"))
    assert all(torch.equal(a, b) for again in made[1:] for a, b in zip(made[0], again, strict=True))
    assert not torch.equal(made[0][2], data.panel_batch(Source(), None, 2, 6, "cpu")[2])


def test_batches_do_not_depend_on_ranks(bank):
    high, low = bank.batch(4, 4)                             # crosses from epoch 0 into epoch 1
    assert high.shape == (4, 3, 5, 32, 32) and low.shape == (4, 3, 5, 8, 8) and high.dtype == torch.float32
    halves = [bank.batch(4 + 2 * rank, 2) for rank in range(2)]
    assert torch.equal(high, torch.cat([h for h, _ in halves])) and torch.equal(low, torch.cat([x for _, x in halves]))
    assert torch.equal(high[2], data.to_tensor(bank.crop(1, 0)[0])) and high.min() >= -1 and high.max() <= 1


def test_an_edit_of_the_degradation_makes_other_clips(folder, tmp_path, monkeypatch):
    """As a reader edits it: in the file. A comment or a docstring makes none."""
    names = []
    for edit in ("", "    # why not\n", "    x = x * 0\n", '    """Why not."""\n'):
        source = Path(degradation.__file__).read_text()
        end = "    return to_bytes(x)\n"
        assert source.count(end) == 1
        (tmp_path / "edited.py").write_text(source.replace(end, edit + end))
        monkeypatch.setattr(inspect, "getsource", lambda m, of=inspect.getsource: (tmp_path / "edited.py").read_text()
                            if m is degradation else of(m))
        common.parsed.cache_clear()                         # as a new process would
        names.append(data.Bank(data.Clips(folder, 5, 32, NULL), 1, tmp_path, 32).path)
    assert names[0] == names[1] == names[3] != names[2]


def test_other_code_footage_or_sizes_make_other_clips(folder, tmp_path, monkeypatch):
    Image.fromarray(scene(4, 1, 64, 64)[0]).save(tmp_path / "a.png")

    def name(frames=5, size=32):
        return data.Bank(data.Clips(tmp_path, frames, size, NULL), 1, tmp_path / "cache", 32).path
    names = [name(), name(size=48), name(frames=9)]
    os.utime(tmp_path / "a.png", ns=(0, 0))                  # another picture of as many bytes
    names.append(name())
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    names.append(name())
    for module in (None, data, degradation, media):
        with monkeypatch.context() as patch:
            patch.setattr(common, "parsed", lambda m, edited=module: "edited" if m is edited else "as it was")
            names.append(name())
    assert len(set(names)) == len(names) == 9


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
    first = data.Bank(clips, 2, tmp_path, 32)
    for name in ("clip", "survey"):                          # nor is a file opened
        monkeypatch.setattr(data.Clips, name, lambda *a: pytest.fail("made again"))
    assert data.Bank(clips, 2, tmp_path, 16).path == first.path                # the crop is cut later
    monkeypatch.undo()
    others = [data.Bank(clips, 3, tmp_path, 32),
              data.Bank(data.Clips(folder, 5, 32, NULL, seed=1), 2, tmp_path, 32),
              data.Bank(data.Clips(folder, 5, 32, dataclasses.replace(NULL, sinc_prob=1)), 2, tmp_path, 32)]
    assert len({b.path for b in [first, *others]}) == 4
    monkeypatch.setattr(data.Clips, "clip", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        data.Bank(clips, 4, tmp_path, 32)
    assert len(list(tmp_path.iterdir())) == 4                # nothing is left of the one that failed


# ---------------------------------------------------------------------------------------------- prepare


def test_prepare_cuts_only_what_is_listed(tmp_path):
    film = scene(0, 12, 64, 96)
    media.write_video(tmp_path / "film.mkv", film, 24)
    (tmp_path / "a").mkdir()
    for name in ("p.png", "a/q.png"):
        Image.fromarray(scene(1, 1, 60, 90)[0]).save(tmp_path / name)
    listed = tmp_path / "list.json"
    todo = dict(film=dict(sha256=data.sha256(tmp_path / "film.mkv"), size=[48, 32], fps="24000/1001", shots=[
                    dict(shot=1, start=2, end=5, split="train"), dict(shot=7, start=8, end=12, split="val"),
                    dict(shot=9, start=0, end=2, split="test")]),
                stills=[dict(name=name, sha256=data.sha256(tmp_path / "p.png"), scale=1.5, split="train")
                        for name in ("p.png", "a__q.png", "b__q.png", "o.png")])         # b__q is nowhere, o another
    Image.fromarray(scene(2, 1, 60, 90)[0]).save(tmp_path / "o.png")
    listed.write_text(data.json.dumps(todo))
    data.prepare(tmp_path / "film.mkv", tmp_path, tmp_path / "out", listed)
    files = sorted(str(p.relative_to(tmp_path / "out")) for p in Path(tmp_path, "out").rglob("*.*"))
    assert files == ["test/bbb_009.mp4", "train/a__q.jpg", "train/bbb_001.mp4", "train/p.jpg", "val/bbb_007.mp4"]
    val = media.read_video(tmp_path / "out/val/bbb_007.mp4")
    assert val.shape == (4, 32, 48, 3)
    assert media.video_info(tmp_path / "out/val/bbb_007.mp4")["fps"] == Fraction(24000, 1001)
    assert abs(val - film[8:].reshape(4, 32, 2, 48, 2, 3).mean((2, 4))).mean() < 3
    assert media.read_image(tmp_path / "out/train/p.jpg").shape == (40, 60, 3)
    todo["film"]["sha256"] = "0" * 64
    listed.write_text(data.json.dumps(todo))
    with pytest.raises(SystemExit, match="sha256"):
        data.prepare(tmp_path / "film.mkv", tmp_path, tmp_path / "out", listed)
    with pytest.raises(SystemExit, match="none.mkv: no such file; samples/CREDITS.md"):
        data.prepare(tmp_path / "none.mkv", tmp_path, tmp_path / "out", listed)


def test_photographs_go_where_they_are_listed_and_are_averaged(tmp_path):
    (tmp_path / "film").touch()
    photo = np.random.default_rng(0).integers(0, 256, (20, 30, 1), np.uint8).repeat(2, 0).repeat(2, 1).repeat(3, 2)
    photo[1::2, 1::2] = photo[::2, ::2] // 2 + 64
    Image.fromarray(photo).save(tmp_path / "p.png")
    (tmp_path / "list.json").write_text(data.json.dumps(dict(
        film=dict(sha256=data.sha256(tmp_path / "film"), size=[48, 32], fps="24", shots=[]),
        stills=[dict(name="p.png", sha256=data.sha256(tmp_path / "p.png"), scale=2, split="val")])))
    data.prepare(tmp_path / "film", tmp_path, tmp_path / "out", tmp_path / "list.json")
    assert [p.name for p in tmp_path.glob("out/*/*")] == ["p.jpg"]
    made = media.read_image(tmp_path / "out/val/p.jpg")
    assert abs(made - photo.reshape(20, 2, 30, 2, 3).mean((1, 3))).mean() < 2
