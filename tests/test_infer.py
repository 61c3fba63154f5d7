"""Tiles, colour and infer.py itself."""
import inspect
import itertools
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import infer
import media
import metrics
import model as M
from tests.conftest import ROOT, scene
from tests.test_maths import tiny_net

NTSC = infer.Fraction(24000, 1001)


def identity(z, t, z_lr, text):
    """A 'network' whose one-step output is z_lr: v = eps - z_lr."""
    return z - z_lr


@pytest.mark.parametrize("size", [(3, 24, 24), (3, 26, 24), (1, 50, 64), (5, 24, 70), (7, 12, 44)])
def test_tiles_cover_everything_and_blend_to_one(size):
    z, z_lr = torch.randn(2, 1, 4, *size)
    constant = M.tiled(lambda z, *_: torch.ones_like(z), (3, 24, 24))
    torch.testing.assert_close(constant(z, torch.ones(1), z_lr, M.prompt(z)), torch.ones_like(z))
    blended = M.tiled(identity, (3, 24, 24))(z, torch.ones(1), z_lr, M.prompt(z))
    torch.testing.assert_close(blended, z - z_lr, atol=1e-6, rtol=0)     # one noise volume: tiled equals untiled


def test_tiles_fade_into_each_other():
    """Two tiles with answers 0 and 1: a ramp where they overlap, no step."""
    answers = iter((0.0, 1.0))
    z = torch.randn(1, 1, 1, 24, 44)
    out = M.tiled(lambda z, *_: torch.full_like(z, next(answers)), (1, 24, 24), at_once=1)(z, torch.ones(1), z,
                                                                                           M.prompt(z))
    torch.testing.assert_close(out[0, 0, 0, 0, 19:25], torch.tensor([0, 0.2, 0.4, 0.6, 0.8, 1]))


def test_tiles_are_the_size_that_was_trained_and_overlap():
    seen = []

    def net(z, t, z_lr, text):
        seen.append(z.shape)
        return z
    z = torch.randn(1, 4, 5, 60, 30)
    M.tiled(net, (3, 24, 24), at_once=4)(z, torch.ones(1), z, M.prompt(z))              # in time: 0..2, 2..4
    assert all(s[1:] == (4, 3, 24, 24) and s[0] <= 4 for s in seen) and sum(s[0] for s in seen) == 2 * 3 * 2
    assert M.tile_starts(60, 24, 4) == [0, 20, 36] and M.tile_starts(24, 24, 4) == [0]


def test_windows_fade_into_each_other_in_time():
    """As they would jump otherwise: windows of 5 latents share 2; the second of three begins at latent 3."""
    answers, z = iter((0.0, 1.0, 2.0)), torch.randn(1, 1, 10, 8, 8)
    out = M.tiled(lambda z, *_: torch.full_like(z, next(answers)), (5, 8, 8), at_once=1)(z, torch.ones(1), z,
                                                                                        M.prompt(z))
    assert M.tile_starts(10, 5, M.overlaps((5, 8, 8))[0]) == [0, 3, 5]
    ramp = out[0, 0, :, 0, 0]
    assert (ramp[:3] == 0).all() and ramp[3:5].tolist() == pytest.approx([1 / 3, 2 / 3]) and ramp[-1] == 2
    assert (ramp.diff() >= 0).all() and ramp.diff().max() < 0.6
    assert M.overlaps((5, 24, 24)) == [2, 4, 4] and M.overlaps((3, 8, 4)) == [0, 4, 2]


@pytest.mark.parametrize("model, frames", [("tiny", 53), ("small", 53), ("wan1.3b", 21)])
def test_the_network_sees_such_windows_as_it_was_trained_on(model, frames):
    """Of a chunk only the first window begins with the latent of a single frame: training must have had others, too."""
    clip = data.CLIPS[model]
    assert infer.frames_at_once(model) == frames and frames % 4 == 1
    windows = len(M.tile_starts((frames - 1) // 4 + 1, clip["window"], 2))
    assert windows == 1 or (clip["frames"] - 1) // 4 + 1 > clip["window"]
    preset = evaluate.Config(**evaluate.PRESETS[model])
    assert preset.chunk == frames - 5 and infer.arguments(["a", "b", "--chunk", str(frames)]).overlap == 4


def test_batch_of_tiles_keeps_samples_apart():
    z = torch.randn(2, 4, 3, 40, 24)
    t = torch.tensor([0.2, 0.9])

    def net(z, t, z_lr, text):
        return M.bcast(t, z) + torch.zeros_like(z)
    out = M.tiled(net, (3, 24, 24))(z, t, z, M.prompt(z))
    torch.testing.assert_close(out, M.bcast(t, z).expand_as(z))


def test_wavelet_colour():
    x = torch.rand(1, 3, 2, 40, 48) * 2 - 1
    torch.testing.assert_close(infer.wavelet_color(x, x), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(infer.wavelet_color(x, x + 0.1), x + 0.1, atol=1e-5, rtol=0)
    fine = torch.zeros_like(x)
    fine[..., ::2] = 0.2                                    # the high frequencies come from the content
    flat = torch.zeros_like(x)
    assert infer.wavelet_color(fine, flat).std() > 0.09 and abs(infer.wavelet_color(fine, flat).mean()) < 0.01
    style = torch.nn.functional.interpolate(torch.randn(1, 3, 6, 6), 192, mode="bicubic")
    low = style
    for holes in (1, 2, 4, 8, 16):                          # as published, every level at full size
        low = infer.blur(low, holes)
    ours = infer.wavelet_color(torch.zeros(1, 3, 1, 192, 192), style[:, :, None])[:, :, 0]
    error = (ours - low).abs() / low.std()
    assert error.mean() < 0.02 and error[..., 40:-40, 40:-40].max() < 0.1


@pytest.fixture
def checkpoint(tmp_path):
    vae = M.PatchVAE()
    vae.fit(torch.nn.functional.interpolate(torch.randn(2, 3, 3, 8, 8), (9, 32, 32), mode="trilinear"))
    net = M.build("tiny")
    state = {"stage": "stage1", "config": {"model": "tiny"}, "step": 1, "total": 1, "student": net.state_dict(),
             "vae": vae.state_dict()}
    torch.save(state, tmp_path / "student.pt")
    return str(tmp_path / "student.pt")


def test_teacher_is_sampled_at_the_times_it_was_distilled_at(checkpoint, monkeypatch):
    """Stage I distils the sampler of its own shift; the rows that stand for the teacher must be that sampler."""
    state, seen = torch.load(checkpoint, weights_only=True), []
    torch.save(state | {"config": {"model": "tiny", "shift": 5.0}}, checkpoint)
    velocity = M.DiT.forward
    monkeypatch.setattr(M.DiT, "forward", lambda net, z, t, *a: seen.append(t[0].item()) or velocity(net, z, t, *a))
    infer.load(checkpoint, "student", torch.device("cpu"))(np.zeros((1, 12, 12, 3), np.uint8), steps=2)
    assert seen == pytest.approx([1, 5 / 6])                            # 1/2 shifted by 5


@pytest.mark.parametrize("frames, h, w, scale", [(1, 12, 12, 4), (5, 11, 14, 3), (10, 12, 9, 2)])
def test_upscale_keeps_frames_and_multiplies_the_size(frames, h, w, scale):
    lr = np.random.default_rng(0).integers(0, 256, (frames, h, w, 3), dtype=np.uint8)
    net, vae = tiny_net(), M.PatchVAE()
    vae.fit(torch.randn(1, 3, 9, 16, 16))

    def run(lr=lr, **options):
        out = infer.upscale(M.tiled(net, (3, 24, 24)), vae, 3, torch.device("cpu"), lr, scale=scale, **options)
        return data.to_uint8(out)
    assert run().shape == (frames, scale * h, scale * w, 3)
    assert np.array_equal(run(), run(lr[[*range(frames), -1]])[:frames])        # what is filled up is the last frame
    assert not np.array_equal(run(), run(seed=1)) and not np.array_equal(run(), run(start=4))


@pytest.mark.parametrize("color", infer.COLORS)
def test_where_the_network_changes_nothing_upscaling_is_bicubic(color):
    """Each pixel stays at its place, whatever was filled up, and each frame keeps its own colours."""
    lr, vae = np.random.default_rng(0).integers(0, 256, (6, 11, 13, 3), dtype=np.uint8), M.PatchVAE()
    vae.fit(torch.randn(1, 3, 9, 16, 16))
    out = infer.upscale(M.tiled(identity, (3, 24, 24)), vae, 3, torch.device("cpu"), lr, color=color)
    assert abs(data.to_uint8(out).astype(int) - evaluate.upscale_bicubic(lr)).max() <= 1


def test_shrinking_takes_away_what_would_alias():
    vae = M.PatchVAE()
    vae.draw_onto = lambda up, z_lr, z: torch.randn_like(up)
    lr = np.zeros((1, 40, 40, 3), np.uint8)
    out = infer.upscale(M.tiled(identity, (3, 24, 24)), vae, 3, torch.device("cpu"), lr, color="none", scale=2)
    assert out.std() < 0.5                                  # a mean of four pixels, where one would have 0.7 and more


def test_tiles_are_given_in_pixels_and_are_whole_tokens(checkpoint, monkeypatch):
    seen = []
    monkeypatch.setattr(M, "tiled", lambda net, window: seen.append(window) or net)
    for tile in (0, 64, 44):                                                    # 0: as in training, 96
        infer.load(checkpoint, "student", torch.device("cpu"), tile)
    assert seen == [(5, 24, 24), (5, 16, 16), (5, 10, 10)]


def test_noise_belongs_to_a_place_in_the_film():
    whole, part = infer.noise((1, 2, 5, 3, 3), 8, 0), infer.noise((1, 2, 3, 3, 3), 16, 0)
    assert torch.equal(whole[:, :, 2:], part) and abs(whole.std() - 1) < 0.2
    assert not torch.equal(whole, infer.noise((1, 2, 5, 3, 3), 8, 1))


def test_temperature_multiplies_the_noise():
    seen, vae = [], M.PatchVAE()

    def net(z, t, z_lr, text):
        seen.append(z)
        return identity(z, t, z_lr, text)
    for temperature in (1.0, 0.9, 0.0):
        infer.upscale(net, vae, 1, torch.device("cpu"), np.zeros((1, 16, 16, 3), np.uint8), temperature=temperature)
    assert torch.equal(seen[0], infer.noise(seen[0].shape, 0, 0)) and not seen[2].any()
    torch.testing.assert_close(seen[1], 0.9 * seen[0])


def test_a_lower_temperature_is_for_one_step_alone():
    usual = [infer.arguments(["in", "out", "--chunk", "17", *more]).temperature for more in ([], ["--steps", "8"])]
    assert usual == [infer.TEMPERATURE, 1]                  # less makes a blur of many steps


@pytest.mark.parametrize("count, cuts", [(1, []), (17, []), (18, []), (100, [1, 40, 57, 99])])
def test_chunks_keep_every_frame_once_and_stay_within_shots(count, cuts):
    parts = infer.chunks(count, cuts, 17, 4)
    kept = [i for start, _, keep, _ in parts for i in range(start, start + keep)]
    assert kept == list(range(count))
    assert all(a[1] < b[1] for a, b in itertools.pairwise(parts))               # each adds something
    edges = [0, *cuts, count]
    for start, end, keep, blend in parts:
        a = max(x for x in edges if x <= start)
        assert end <= min(x for x in edges if x > start) and 0 < end - start <= 17 and (start - a) % 4 == 0
        assert blend == (5 if start > a else 0) and keep <= end - start


# ---------------------------------------------------------------------------- files; the network is a plain enlargement


def enlarge(lr, steps=1, w=0.0, temperature=1.0, seed=0, start=0, color="none", scale=4):
    """Stands in for infer.upscale: every pixel scale x scale times."""
    return data.to_tensor(lr.repeat(scale, 1).repeat(scale, 2))


@pytest.fixture
def plain(monkeypatch):
    """main() with `enlarge` for a network; returns the numbers of frames it was given."""
    calls = []

    def load(ckpt, part, device, *options):
        return lambda lr, **options: calls.append(len(lr)) or enlarge(lr, **options)
    monkeypatch.setattr(infer, "load", load)
    return calls


def film(path, frames, fps=NTSC, sound=False, extra=()):
    """A clip on disk, lossless, with a second of sound if asked."""
    media.write_video(path.with_suffix(".mkv"), frames, fps)
    args = ["-y", "-i", path.with_suffix(".mkv")]
    args += ["-f", "lavfi", "-i", f"sine=d={len(frames) / float(fps):.3f}", "-c:a", "aac"] if sound else []
    media.ffmpeg([*args, "-c:v", "libx264", "-crf", "4", *extra, path])
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_frames_rate_and_sound_are_kept(plain, tmp_path, suffix):
    source, target = film(tmp_path / "in.mp4", scene(0, 40), sound=True), tmp_path / f"out{suffix}"
    infer.main([str(source), str(target), "--chunk", "17"])
    info, seen, before = media.video_info(target), media.survey(target), media.survey(source)
    assert (info["width"], info["height"], info["fps"]) == (384, 256, NTSC) and seen["frames"] == 40
    np.testing.assert_allclose(seen["times"], before["times"], atol=6e-4)       # Matroska counts in milliseconds
    assert max(plain) == 17                                                     # never the whole film
    packets = [media.ffmpeg(["-i", p, "-map", "0:a", "-c", "copy", "-f", "streamhash", "-"]) for p in (source, target)]
    assert packets[0] == packets[1]                                             # the sound is copied, not coded again
    want = media.read_video(source).repeat(4, 1).repeat(4, 2).astype(int)
    assert abs(media.read_video(target) - want).mean() < (0.01 if suffix == ".mkv" else 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({"in.mkv", "in.mp4", target.name})
    said = subprocess.run(media.command(["-v", "info", "-i", target]), capture_output=True).stderr
    assert (b"yuv420p(tv, bt709, progressive" if suffix == ".mp4" else b"ffv1") in said


def test_a_film_that_begins_late_keeps_its_start(plain, tmp_path):
    film(tmp_path / "in.mp4", scene(0, 20), sound=True)
    media.ffmpeg(["-i", tmp_path / "in.mp4", "-itsoffset", "0.54", "-i", tmp_path / "in.mp4", "-map", "1:v",
                  "-map", "0:a", "-c", "copy", tmp_path / "late.mp4"])
    infer.main([str(tmp_path / "late.mp4"), str(tmp_path / "out.mp4"), "--chunk", "17"])
    before, after = (media.survey(tmp_path / name)["times"] for name in ("late.mp4", "out.mp4"))
    assert before[0] == pytest.approx(0.54, abs=1e-3)
    np.testing.assert_allclose(after, before, atol=1e-4)


def test_sound_that_does_not_fit_is_coded_again(plain, tmp_path):
    media.write_video(tmp_path / "in.mkv", scene(0, 6), 24)
    media.ffmpeg(["-i", tmp_path / "in.mkv", "-f", "lavfi", "-i", "sine=d=0.25", "-c:v", "copy", "-c:a", "wmav2",
                  tmp_path / "sound.mkv"])
    infer.main([str(tmp_path / "sound.mkv"), str(tmp_path / "out.mp4")])
    assert media.ffmpeg(["-i", tmp_path / "out.mp4", "-map", "0:a", "-f", "s16le", "-"])


def test_every_track_of_sound_is_kept(plain, tmp_path, capsys):
    media.write_video(tmp_path / "in.mkv", scene(0, 6), 24)
    media.ffmpeg(["-i", tmp_path / "in.mkv", *["-f", "lavfi", "-i", "sine=d=0.25"] * 2, *"-map 0 -map 1 -map 2".split(),
                  "-c:v", "libx264", "-c:a", "aac", tmp_path / "both.mov"])
    infer.main([str(tmp_path / "both.mov"), str(tmp_path / "out.mp4")])
    assert "without" not in capsys.readouterr().out
    assert media.ffmpeg(["-i", tmp_path / "out.mp4", "-map", "0:a:1", "-f", "s16le", "-"])


def test_sound_that_nothing_can_read_is_left_out_and_said_to_be(plain, tmp_path, capsys):
    """As the second track of some phones, in a codec of their own."""
    media.write_video(tmp_path / "in.mkv", scene(0, 6), 24)
    media.ffmpeg(["-i", tmp_path / "in.mkv", *["-f", "lavfi", "-i", "sine=d=0.25"] * 2, *"-map 0 -map 1 -map 2".split(),
                  "-c:v", "libx264", "-c:a", "aac", tmp_path / "both.mov"])
    whole = (tmp_path / "both.mov").read_bytes()
    last = whole.rindex(b"stsd")                                                # where the last track is described
    def spoilt(track):
        return track.replace(b"mp4a", b"apac").replace(b"esds", b"free")
    second, none = whole[:last] + spoilt(whole[last:]), spoilt(whole)
    for name, content, missing in (("second", second, "all sound but its first track"), ("none", none, "its sound")):
        (tmp_path / f"{name}.mov").write_bytes(content)
        infer.main([str(tmp_path / f"{name}.mov"), str(tmp_path / f"{name}.mp4")])
        assert f"{name}.mp4: 6 frames, without {missing} (" in capsys.readouterr().out
        assert media.survey(tmp_path / f"{name}.mp4")["frames"] == 6
    assert media.ffmpeg(["-i", tmp_path / "second.mp4", "-map", "0:a", "-f", "s16le", "-"])


@pytest.mark.parametrize("name", ["a#b.mp4", "what? 100% it's.mkv", "file:x.mp4", "caf\udce9.mp4"])
def test_any_name_will_do(plain, tmp_path, name):
    media.write_video(tmp_path / "in.mkv", scene(0, 20), 24)
    (tmp_path / "d#r ?").mkdir()
    infer.main([str(tmp_path / "in.mkv"), str(tmp_path / "d#r ?" / name), "--chunk", "17"])
    assert media.survey(tmp_path / "d#r ?" / name)["frames"] == 20


def test_a_link_to_a_folder_is_filled_and_what_cannot_be_an_output_is_refused_at_once(plain, tmp_path, capsys):
    media.write_video(tmp_path / "in.mkv", scene(0, 3), 24)
    (tmp_path / "big").mkdir(), (tmp_path / "up").symlink_to(tmp_path / "big")
    infer.main([str(tmp_path / "in.mkv"), str(tmp_path / "up")])
    assert [p.name for p in media.files_in(tmp_path / "big", {".png", ".txt"})] == [f"{i:06d}.png" for i in (1, 2, 3)]
    (tmp_path / "film.mp4").mkdir(), (tmp_path / "LICENSE").write_text("mine"), (tmp_path / "old").symlink_to("gone")
    plain.clear()
    for name, words in (("film.mp4", "a folder; name a file in it"), ("LICENSE", "a file, not a folder"),
                        ("old", "a link to nothing")):
        with pytest.raises(SystemExit, match=f"{name}: {words}"):
            infer.main([str(tmp_path / "in.mkv"), str(tmp_path / name)])
    assert not plain and (tmp_path / "LICENSE").read_text() == "mine"


def test_what_is_left_out_of_a_folder_is_said(plain, tmp_path, capsys):
    for folder in ("mixed", "frames"):
        (tmp_path / folder).mkdir()
    media.write_video(tmp_path / "mixed/a.mkv", scene(0, 3), 24)
    (tmp_path / "mixed/list.txt").write_text("a"), (tmp_path / "mixed/.hidden").write_text("b")
    (tmp_path / "mixed/old.mp4").mkdir()                                            # a folder, whatever its name
    infer.main([str(tmp_path / "mixed"), str(tmp_path / "out")])
    assert "mixed: skipped, as no video or picture: list.txt, old.mp4\n" in capsys.readouterr().err
    for i in (8, 9, 10, 12):
        Image.fromarray(scene(0, 1)[0]).save(tmp_path / f"frames/shot2_{i}.png")
    infer.main([str(tmp_path / "frames"), str(tmp_path / "film.mkv")])
    assert "numbers are missing before shot2_12.png; the pictures are taken as successive" in capsys.readouterr().err
    for i in (1, 2):                                                            # two numbers count: nothing is missing
        Image.fromarray(scene(0, 1)[0]).save(tmp_path / f"mixed/f_{i}_t{33 * i}.png")
    (tmp_path / "mixed/a.mkv").unlink()
    infer.main([str(tmp_path / "mixed"), str(tmp_path / "two.mkv")])
    err = capsys.readouterr().err
    assert "missing" not in err and "separate" not in err
    for name in ("cover", "poster"):                                            # first, and last, of the sorted names
        Image.fromarray(scene(0, 1)[0]).save(tmp_path / f"mixed/{name}.png")
        infer.main([str(tmp_path / "mixed"), str(tmp_path / name)])
        said = f"mixed: 3 separate files, not a clip, as {name}.png is not numbered like the others\n"
        assert said in capsys.readouterr().err and len(list((tmp_path / name).iterdir())) == 3
        (tmp_path / f"mixed/{name}.png").unlink()


def test_times_that_vary_are_kept(plain, tmp_path):
    source = tmp_path / "vfr.mp4"
    film(tmp_path / "cfr.mp4", scene(0, 60), 30)
    media.ffmpeg(["-i", tmp_path / "cfr.mp4", "-vf", r"select='not(mod(n\,3))+lt(n\,20)'", "-fps_mode", "vfr", source])
    before = media.survey(source)["times"]
    assert not media.steady(before, media.video_info(source)["fps"])
    for chunk in ("17", "57"):                                                  # several pieces, and one
        infer.main([str(source), str(tmp_path / f"{chunk}.mp4"), "--chunk", chunk])
        np.testing.assert_allclose(media.survey(tmp_path / f"{chunk}.mp4")["times"], before, atol=2e-3)
    times = [(i + i % 3 / 4) / 30 for i in range(400)]                          # FFmpeg nests no more than 100 ifs
    media.encode(tmp_path / "long.mp4", [np.zeros((16, 16, 3), np.uint8)] * 400, 30, times=times)
    np.testing.assert_allclose(media.survey(tmp_path / "long.mp4")["times"], times, atol=1e-4)


@pytest.mark.parametrize("scale, h, w", [(2, 33, 47), (3, 32, 48), (4, 31, 33)])
def test_every_size_and_scale(plain, tmp_path, scale, h, w):
    media.write_video(tmp_path / "in.mkv", scene(0, 3, 64, 64)[:, :h, :w], 24)
    infer.main([str(tmp_path / "in.mkv"), str(tmp_path / "out.mp4"), "--scale", str(scale)])
    assert media.read_video(tmp_path / "out.mp4").shape == (3, scale * h, scale * w, 3)


def test_phone_video_is_turned_and_ten_bits_are_rounded(plain, tmp_path):
    film(tmp_path / "in.mp4", np.full((3, 32, 48, 3), 100, np.uint8), extra=["-pix_fmt", "yuv420p10le"])
    media.ffmpeg(["-display_rotation", "90", "-i", tmp_path / "in.mp4", "-c", "copy", tmp_path / "phone.mp4"])
    infer.main([str(tmp_path / "phone.mp4"), str(tmp_path / "out.mkv")])
    out = media.read_video(tmp_path / "out.mkv")
    assert out.shape == (3, 192, 128, 3) and abs(out.mean() - 100) < 0.6        # truncation would be off by one


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_pixels_that_are_not_square_stay_so(plain, tmp_path, suffix):
    media.encode(tmp_path / "in.mkv", scene(0, 3), 24, aspect="16:11")
    assert media.video_info(tmp_path / "in.mkv")["aspect"] == "16:11"
    infer.main([str(tmp_path / "in.mkv"), str(tmp_path / f"out{suffix}")])
    assert media.video_info(tmp_path / f"out{suffix}")["aspect"] == "16:11"


def test_constants_survive_exactly(plain, tmp_path):
    frames = np.stack([np.full((16, 16, 3), v, np.uint8) for v in (0, 1, 127, 128, 254, 255)])
    media.write_video(tmp_path / "in.mkv", frames, 24)
    infer.main([str(tmp_path / "in.mkv"), str(tmp_path / "out.mkv")])
    assert np.array_equal(media.read_video(tmp_path / "out.mkv"), frames.repeat(4, 1).repeat(4, 2))


def test_a_cut_never_blends(tmp_path, monkeypatch):
    """Each chunk's output is its own number; where chunks of one shot overlap it ramps, at the cut it jumps."""
    frames = np.concatenate([scene(1, 30), 255 - scene(2, 30)])
    media.write_video(tmp_path / "in.mkv", frames, 24)
    starts = []

    def level(lr, start=0, **options):
        starts.append((start, len(lr)))
        return torch.full((3, len(lr), 16, 16), len(starts) / 10)
    monkeypatch.setattr(infer, "load", lambda *a: level)
    infer.main([str(tmp_path / "in.mkv"), str(tmp_path / "out.mkv"), "--chunk", "17"])
    assert starts == [(0, 17), (12, 17), (24, 6), (30, 17), (42, 17), (54, 6)]
    shown = media.read_video(tmp_path / "out.mkv")[:, 0, 0, 0]
    want = [data.to_uint8(torch.full((3, 1, 1, 1), n / 10))[0, 0, 0, 0] for n in range(7)]
    assert list(shown[[0, 12, 29, 30, 59]]) == [want[1], want[1], want[3], want[4], want[6]]
    assert (np.diff(shown[:30].astype(int)) >= 0).all()
    ramp = [data.to_uint8(torch.full((3, 1, 1, 1), 0.1 + 0.02 * i))[0, 0, 0, 0] for i in range(6)]
    assert list(shown[12:18]) == ramp and list(shown[18:24]) == [want[2]] * 6


def test_cuts_in_a_folder_of_pictures(plain, tmp_path):
    (tmp_path / "frames").mkdir()
    for i, x in enumerate(np.concatenate([scene(1, 9), 255 - scene(2, 8)])):
        Image.fromarray(x).save(tmp_path / f"frames/{i}.png")
    assert infer.open_pictures(media.files_in(tmp_path / "frames", {".png"})).cuts == [9]
    infer.main([str(tmp_path / "frames"), str(tmp_path / "out.mkv")])
    assert plain == [9, 8]
    for i in range(4):                                                          # a strobe is one change of scene
        Image.fromarray(np.full((16, 16, 3), i % 2 * 255, np.uint8)).save(tmp_path / f"{i}.png")
    assert infer.open_pictures(media.files_in(tmp_path, {".png"})).cuts == [1]


def test_options_reach_the_network(tmp_path, monkeypatch):
    media.write_video(tmp_path / "in.mkv", scene(0, 3), 24)
    given = []

    def load(ckpt, part, device, tile, vae_dtype, vae_tiles):
        def upscaler(lr, **options):
            given.append(((ckpt, part, str(device), tile), options))
            return enlarge(lr, scale=options["scale"])
        return upscaler
    monkeypatch.setattr(infer, "load", load)
    infer.main([str(tmp_path / "in.mkv"), str(tmp_path / "out.mkv"), "--ckpt", f"{ROOT}/weights/tiny_teacher.pt",
                *"--part ema --chunk 17 --seed 3 --steps 2 --w 0.5 --temperature 0.8 --color none --scale 2".split(),
                *"--tile 64 --device cpu".split()])
    assert given == [((f"{ROOT}/weights/tiny_teacher.pt", "ema", "cpu", 64),
                      dict(start=0, steps=2, w=0.5, temperature=0.8, seed=3, color="none", scale=2))]
    usual = vars(infer.arguments(["in", "out", "--chunk", "17"]))               # what evaluate.py measures
    usual["temperature"] = 1.0                                                  # of all rows but one
    defaults = inspect.signature(infer.upscale).parameters
    assert all(defaults[k].default == usual[k] for k in given[0][1].keys() - {"start"})


def test_names_with_a_colon_and_deep_or_turned_pictures(plain, tmp_path):
    media.write_video(tmp_path / "12:30.mkv", scene(0, 3), 24)
    infer.main([str(tmp_path / "12:30.mkv"), str(tmp_path / "13:00.mp4")])
    assert media.survey(tmp_path / "13:00.mp4")["frames"] == 3
    Image.fromarray(np.full((16, 16), 127 * 257, np.uint16)).save(tmp_path / "deep.png")
    assert (media.read_image(tmp_path / "deep.png") == 127).all()
    exif = Image.Exif()
    exif[0x112] = 6                                                             # to be turned by 90 degrees
    Image.fromarray(scene(0, 1)[0]).save(tmp_path / "turned.png", exif=exif)
    infer.main([str(tmp_path / "turned.png"), str(tmp_path / "up.png")])
    assert np.array_equal(media.read_image(tmp_path / "up.png"), np.rot90(scene(0, 1)[0], -1).repeat(4, 0).repeat(4, 1))


def test_folders(plain, tmp_path):
    frames = scene(0, 12)
    (tmp_path / "frames").mkdir()
    for i, x in enumerate(frames):
        Image.fromarray(x).save(tmp_path / f"frames/f{i + 1}.png")              # f10 comes after f9
    infer.main([str(tmp_path / "frames"), str(tmp_path / "up"), "--scale", "2"])
    back = np.stack([media.read_image(p) for p in media.files_in(tmp_path / "up", {".png"})])
    assert np.array_equal(back, frames.repeat(2, 1).repeat(2, 2)) and max(plain) == 12      # one clip
    infer.main([str(tmp_path / "up"), str(tmp_path / "up.mkv"), "--scale", "2"])
    assert len(media.read_video(tmp_path / "up.mkv")) == 12

    (tmp_path / "mixed").mkdir()                                                # separate files: one output each
    Image.fromarray(frames[0]).save(tmp_path / "mixed/cat.jpg")
    media.write_video(tmp_path / "mixed/walk.mkv", frames[:3], 24)
    (tmp_path / "mixed/broken.mp4").write_bytes(b"not a video")
    with pytest.raises(SystemExit, match="1 of 3"):
        infer.main([str(tmp_path / "mixed"), str(tmp_path / "done")])
    assert sorted(p.name for p in (tmp_path / "done").iterdir()) == ["cat.png", "walk.mp4"]
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "done").iterdir()}
    with pytest.raises(SystemExit, match="cat.png: exists"):                    # no file of a folder is written over
        infer.main([str(tmp_path / "mixed"), str(tmp_path / "done")])
    (tmp_path / "done/walk.mp4").unlink()
    with pytest.raises(SystemExit, match="1 of 3"):                             # --resume makes what is missing
        infer.main([str(tmp_path / "mixed"), str(tmp_path / "done"), "--resume"])
    assert (tmp_path / "done/cat.png").stat().st_mtime_ns == before["cat.png"] and (tmp_path / "done/walk.mp4").exists()
    Image.fromarray(frames[0]).save(tmp_path / "mixed/cat.png")
    with pytest.raises(SystemExit, match="also that of cat.jpg"):
        infer.main([str(tmp_path / "mixed"), str(tmp_path / "again")])


def test_one_picture(plain, tmp_path):
    Image.fromarray(scene(0, 1)[0]).save(tmp_path / "a.png")
    for target in ("b.png", "c.mp4", "d"):
        infer.main([str(tmp_path / "a.png"), str(tmp_path / target)])
    assert media.read_image(tmp_path / "b.png").shape == media.read_image(tmp_path / "d/a.png").shape == (256, 384, 3)
    with pytest.raises(SystemExit, match="a.png: exists"):                      # not named by the user: kept
        infer.main([str(tmp_path / "a.png"), str(tmp_path / "d")])
    before = len(plain)
    infer.main([str(tmp_path / "a.png"), str(tmp_path / "d"), "--resume"])      # is done
    assert len(plain) == before
    infer.main([str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--resume"])  # named by the user: made again
    assert len(plain) == before + 1
    assert len(media.read_video(tmp_path / "c.mp4")) == 1
    kept = (tmp_path / "a.png").read_bytes()
    for folder in (tmp_path, tmp_path / "d"):                                   # a.png beside the input; made before
        with pytest.raises(SystemExit, match="a.png: exists"):
            infer.main([str(tmp_path / "a.png"), str(folder)])
    assert (tmp_path / "a.png").read_bytes() == kept


@pytest.mark.parametrize("target", ["out.mp4", "out.mkv", "out"])
def test_a_killed_run_is_resumed_to_the_same_bytes(checkpoint, tmp_path, monkeypatch, target):
    state = torch.load(checkpoint, weights_only=True)
    torch.nn.init.normal_(state["student"]["head.head.weight"], std=0.2)        # else chunks agree where they meet
    torch.save(state, checkpoint)
    frames = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    media.write_video(tmp_path / "in.mkv", frames, 24)
    command = [str(tmp_path / "in.mkv"), str(tmp_path / target), "--ckpt", checkpoint, "--chunk", "17"]
    infer.main(command)

    def frozen(path):
        files = media.files_in(path, {".png"}) if path.is_dir() else [path]
        return [p.read_bytes() for p in files] if path.is_dir() else media.ffmpeg(
            ["-i", path, "-map", "0:v", "-c", "copy", "-f", "rawvideo", "-"])
    whole = frozen(tmp_path / target)
    (tmp_path / target).rename(tmp_path / "whole")

    written, write = [], media.Unfinished.write

    def stop_at_three(self, *args):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(args[0])
        write(self, *args)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(media.Unfinished, "write", stop_at_three)
        infer.main(command)
    assert len(written) == 2
    assert not (tmp_path / target).exists()
    with pytest.raises(SystemExit, match="add --resume"):
        infer.main(command)
    with pytest.raises(SystemExit, match="another input"):
        infer.main([*command, "--resume", "--seed", "1"])
    made = []
    monkeypatch.setattr(media.Unfinished, "write", lambda self, *a: made.append(a[0]) or write(self, *a))
    infer.main([*command, "--resume"])
    assert frozen(tmp_path / target) == whole and not set(made) & set(written)
    assert not list(tmp_path.glob(".*"))


def test_pieces_of_another_input_checkpoint_or_setting_are_refused(plain, checkpoint, tmp_path, monkeypatch):
    media.write_video(tmp_path / "in.mkv", scene(0, 3, 16, 16), 24)
    command = [str(tmp_path / "in.mkv"), str(tmp_path / "out.mkv"), "--ckpt", checkpoint, "--chunk", "17", "--resume"]
    with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
        m.setattr(media.Unfinished, "finish", lambda *args: 1 / 0)
        infer.main(command)

    def refused(*more):
        with pytest.raises(SystemExit, match="another input, checkpoint or setting; remove that folder"):
            infer.main([*command, *more])
    for more in ("--part ema", "--scale 2", "--steps 2", "--w 0.5", "--seed 1", "--tile 64", "--vae_dtype bf16",
                 "--vae_tiles", "--chunk 21", "--overlap 0", "--color none", f"--ckpt {infer.STUDENT}"):
        refused(*more.split())
    os.utime(tmp_path / "in.mkv", (1, 1))
    refused()


CHILD = """
import sys; sys.path.insert(0, {root!r})
import os, re, signal, torch; torch.set_num_threads(1)
import infer, media; from tests.test_infer import enlarge
infer.load = lambda *a: enlarge
infer.common.keep_memory = lambda: None
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_memory_does_not_grow_with_the_film(tmp_path):
    """Peak memory of one process after a film of 100 frames and after one of 1000: under 1 MB per 100 frames more."""
    code = CHILD.format(root=ROOT) + """
for count in (100, 1000):
    infer.main([f"{sys.argv[1]}/{count}.mp4", f"{sys.argv[1]}/out{count}.mp4", "--chunk", "17"])
    print("peak", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
    for count in (100, 1000):                               # held, the inputs would be 17 MB, the outputs 280
        tile = scene(0, 1, 80, 80)[0]
        media.write_video(tmp_path / f"{count}.mp4", (np.roll(tile, 3 * i, 1) for i in range(count)), 24)
    given_back = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_ARENA_MAX="1")     # else malloc keeps some
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True,
                          env=given_back)
    peaks = [int(kb) / 1024 for kb in re.findall(r"peak (\d+)", done.stdout)]
    assert media.survey(tmp_path / "out1000.mp4")["frames"] == 1000
    assert peaks[1] - peaks[0] < 9


@pytest.mark.parametrize("target", ["out.mkv", "out"])
def test_a_run_that_is_killed_while_it_writes(plain, tmp_path, target):
    """SIGKILL with a half-written file on disk; then --resume; nothing of it is left."""
    media.write_video(tmp_path / "in.mkv", scene(0, 30, 16, 16), 24)
    code = CHILD.format(root=ROOT) + """
replace, done = os.replace, []
def die(*args):
    done.append(args)
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*args)
media.os.replace = die
infer.main(sys.argv[1:])
"""
    command = [str(tmp_path / "in.mkv"), str(tmp_path / target), "--chunk", "17"]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True)
    assert done.returncode == -9 and list(tmp_path.glob(f".{target}.unfinished/.*.*"))
    infer.main([*command, "--resume"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mkv", target]
    files = sorted((tmp_path / target).iterdir()) if target == "out" else []
    shown = np.stack([media.read_image(p) for p in files]) if files else media.read_video(tmp_path / target)
    assert np.array_equal(shown, scene(0, 30, 16, 16).repeat(4, 1).repeat(4, 2))


def test_two_runs_do_not_write_the_same_output(plain, tmp_path):
    media.write_video(tmp_path / "in.mkv", scene(0, 3), 24)
    with media.Unfinished(tmp_path / "out.mkv", "another run", resume=False):
        for more in ([], ["--resume"]):
            with pytest.raises(SystemExit, match="another run is writing it"):
                infer.main([str(tmp_path / "in.mkv"), str(tmp_path / "out.mkv"), *more])
    infer.main([str(tmp_path / "in.mkv"), str(tmp_path / "out.mkv")])


def test_real_checkpoint_from_file_to_file(checkpoint, tmp_path):
    media.write_video(tmp_path / "in.mkv", scene(0, 7, 16, 24), NTSC)
    infer.main([str(tmp_path / "in.mkv"), str(tmp_path / "out.mkv"), "--ckpt", checkpoint, "--color", "none"])
    assert media.read_video(tmp_path / "out.mkv").shape == (7, 64, 96, 3)


def test_tiles_leave_no_trace_in_a_file(checkpoint, tmp_path):
    """A fresh network returns z_lr: through files, tiles of 64 px and one tile for all give the same pictures."""
    media.write_video(tmp_path / "in.mkv", scene(0, 3, 60, 44), NTSC)
    for tile in ("64", "400"):
        infer.main([str(tmp_path / "in.mkv"), str(tmp_path / f"{tile}.mkv"), "--ckpt", checkpoint, "--tile", tile])
    tiled, whole = (media.read_video(tmp_path / f"{tile}.mkv") for tile in ("64", "400"))
    assert tiled.shape == (3, 240, 176, 3) and whole.std() > 5
    assert metrics.psnr(tiled, whole) > 40


def test_the_student_that_ships_leaves_no_seams(tmp_path):
    """On a real clip, where tiles meet the picture changes no more than beside it."""
    lr = media.read_video(f"{ROOT}/samples/lr/apple.mp4")[:5]
    upscaler = infer.load(infer.STUDENT, "student", torch.device("cpu"))
    out = data.to_uint8(upscaler(lr))
    assert out.shape == (5, 4 * lr.shape[1], 4 * lr.shape[2], 3)
    assert metrics.seam(out, 80) <= 1.05 < metrics.seam(evaluate.upscale_bicubic(lr), 80)      # the clip's own borders


def test_commands_of_the_readme(plain, tmp_path, monkeypatch):
    """Each command of "Upscale your video" runs as it stands there."""
    section = open(f"{ROOT}/README.md").read().split("## Upscale your video")[1].split("\n## ")[0]
    commands = re.findall(r"^    python infer\.py (.*?)(?:\s+#.*)?$", section, re.M)
    assert len(commands) >= 6
    for folder in ("frames", "videos"):
        (tmp_path / "files" / folder).mkdir(parents=True)
    files = tmp_path / "files"
    film(files / "in.mp4", scene(0, 3), sound=True), film(files / "in.mov", scene(1, 3))
    film(files / "videos/a.mp4", scene(2, 2))
    os.remove(files / "videos/a.mkv")                       # two files of one name would want one output
    for name in ("photo.jpg", "frames/1.png", "frames/2.png"):
        media.write_image(files / name, scene(0, 1)[0])
    (files / "out/tiny/stage3").mkdir(parents=True)
    shutil.copyfile(infer.STUDENT, files / "out/tiny/stage3/last.pt")
    for i, command in enumerate(commands):
        monkeypatch.chdir(shutil.copytree(files, tmp_path / str(i)))
        infer.main(command.split())
        assert os.path.exists(command.split()[1]), command


def test_mistakes_get_one_line(checkpoint, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    media.write_video(tmp_path / "in.mkv", scene(0, 2), 24)
    media.ffmpeg(["-f", "lavfi", "-i", "sine=d=0.1", tmp_path / "sound.mp4"])
    (tmp_path / "empty").mkdir(), (tmp_path / "full").mkdir()
    (tmp_path / "full/note.txt").write_text("mine")
    sizes = tmp_path / "sizes"
    sizes.mkdir()
    for i, side in enumerate((16, 24)):
        Image.fromarray(scene(0, 1, side, side)[0]).save(sizes / f"{i}.png")
    good, out = str(tmp_path / "in.mkv"), str(tmp_path / "out.mp4")
    for words, args in (
            ("not readable", [str(tmp_path / "bad.mp4"), out]), ("no such file", [str(tmp_path / "none.mp4"), out]),
            ("no video in it", [str(tmp_path / "sound.mp4"), out]), ("is the input", [good, good]),
            ("one picture for 2 frames", [str(sizes), str(tmp_path / "a.png")]),
            ("ends in", [good, str(tmp_path / "out.txt")]), ("no videos", [str(tmp_path / "empty"), out]),
            ("not empty", [good, str(tmp_path / "full")]), ("differs from", [str(sizes), out]),
            ("name a folder", [good, str(tmp_path / "a.png")]), ("not writable", [good, "/proc/x/o.mp4"]),
            ("at least 1", [good, out, "--steps", "0"]), ("without 'ema'", [good, out, "--part", "ema"]),
            ("no such checkpoint", [good, out, "--ckpt", "none.pt"]), ("invalid choice", [good, out, "--scale", "5"]),
            ("4k . 1, such as 17", [good, out, "--chunk", "16"]), ("--chunk 1: ", [good, out, "--chunk", "1"]),
            ("4k", [good, out, "--overlap", "28"]),
            ("half of", [good, out, *"--chunk 17 --overlap 8".split()]), ("a number", [good, out, "--w", "nan"]),
            ("Wan's video code", [good, out, "--vae_tiles"]), ("Wan's", [good, out, "--vae_dtype", "bf16"]),
            ("32", [good, out, "--tile", "8"]), ("not available", [good, out, "--device", "cuda:7"])):
        with pytest.raises(SystemExit, match=words) as stop:
            infer.main([*args, *([] if "--ckpt" in args else ["--ckpt", checkpoint])])
        assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    assert not (tmp_path / "out.mp4").exists() and not list(tmp_path.glob(".*"))


def test_a_short_chunk_takes_an_overlap_that_fits():
    for chunk, overlap in (("5", 0), ("9", 0), ("13", 4), ("57", 4)):
        assert infer.arguments(["in", "out", "--chunk", chunk]).overlap == overlap


def test_a_folder_of_one_numbered_picture_becomes_a_picture(plain, tmp_path):
    (tmp_path / "one").mkdir()
    Image.fromarray(scene(0, 1, 16, 24)[0]).save(tmp_path / "one/img1.png")
    infer.main([str(tmp_path / "one"), str(tmp_path / "out.png")])
    assert Image.open(tmp_path / "out.png").size == (96, 64)


def test_what_can_be_read_of_a_damaged_file_is_kept(plain, tmp_path, capsys):
    media.write_video(tmp_path / "whole.mp4", np.random.default_rng(0).integers(0, 256, (30, 48, 48, 3), np.uint8), 24)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:-60000])
    infer.main([str(tmp_path / "cut.mp4"), str(tmp_path / "out.mkv")])
    said = re.search(r"damaged .*; (\d+) frames can be read", capsys.readouterr().err)
    assert 0 < int(said[1]) < 30 and media.survey(tmp_path / "out.mkv")["frames"] == int(said[1])


def test_out_of_memory_names_a_tile(monkeypatch, tmp_path):
    media.write_video(tmp_path / "in.mkv", scene(0, 2), 24)

    def too_big(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(infer, "load", lambda *a: too_big)

    def advice(*more):
        with pytest.raises(SystemExit) as stop:
            infer.main([str(tmp_path / "in.mkv"), str(tmp_path / "out.mp4"), *more])
        return stop.value.code.removeprefix("out of memory: ")
    assert advice() == "try --tile 48 --chunk 25"
    assert advice(*"--tile 48 --chunk 25".split()) == "try --tile 32 --chunk 17"
    assert advice(*"--tile 32 --chunk 17".split()) == "it takes a larger machine"
    monkeypatch.setattr(M, "read_checkpoint", lambda path: {"config": {"model": "wan1.3b"}})
    assert advice() == "try --vae_tiles" and advice("--vae_tiles") == "try --tile 320 --chunk 21"
