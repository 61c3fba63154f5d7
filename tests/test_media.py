"""media.py: frames, times and colours survive the way into a file and back. All files are made on the spot."""
import subprocess
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image, ImageCms

import media
from tests.conftest import scene

NTSC = Fraction(24000, 1001)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_round_trip(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    frames = scene(0, 15)
    media.write_video(path, iter(frames), NTSC)               # any iterable will do
    back = media.read_video(path)
    assert media.video_info(path) == dict(width=96, height=64, fps=NTSC, aspect="1:1")
    assert media.survey(path)["frames"] == 15
    assert back.shape == frames.shape and back.dtype == np.uint8
    assert abs(back.astype(int) - frames).mean() <= (0 if suffix == ".mkv" else 3)
    for start, count in (0, 2), (1, 1), (7, 3), (14, 1):     # the seek is exact
        assert np.array_equal(media.read_video(path, start, count), back[start:start + count])
    assert np.array_equal(media.read_video(path, 9), back[9:])
    small = media.read_video(path, 3, 1, size=(48, 32))
    area = back[3:4].reshape(1, 32, 2, 48, 2, 3).mean((2, 4))
    assert abs(small - area).mean() < 1.5


@pytest.mark.parametrize("late", [False, True])
def test_the_seek_is_exact_at_a_varying_rate_and_behind_sound(tmp_path, late):
    """Sound begins at 0 and the film, late, at 0.07 s: FFmpeg counts a seek from the first of all streams."""
    frames = scene(0, 12)
    times = 0.07 * late + np.cumsum([0, 40, 40, 15, 15, 15, 90, 90, 20, 40, 40, 40]) / 1000
    media.encode(tmp_path / "film.mp4", frames, 24, times=times)
    path = tmp_path / "x.mp4"
    media.ffmpeg(["-f", "lavfi", "-i", "sine=d=0.6", "-itsoffset", f"{times[0]}", "-i", tmp_path / "film.mp4",
                  "-map", "0:a", "-map", "1:v", "-c:v", "copy", path])
    back = media.read_video(path)
    assert len(back) == 12
    for start in range(12):
        assert np.array_equal(media.read_video(path, start, 1), back[start:start + 1])
    with pytest.raises(ValueError, match="no frame at 12"):
        media.read_video(path, 12)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_colours(tmp_path, suffix):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40), (17, 99, 180)]
    frames = np.stack([np.full((32, 48, 3), c, np.uint8) for c in colours])
    media.write_video(tmp_path / f"c{suffix}", frames, 24, crf=4)
    worst = abs(media.read_video(tmp_path / f"c{suffix}").astype(int) - frames).max()
    assert worst <= (0 if suffix == ".mkv" else 2)           # bt601 read as bt709 would be off by tens


def test_tagged_bt709(tmp_path):
    """Other players must see the same colours: the file says bt709, and its samples are bt709."""
    media.write_video(tmp_path / "x.mp4", np.full((2, 32, 32, 3), (0, 255, 0), np.uint8), 24, crf=1)
    raw = media.ffmpeg(["-i", tmp_path / "x.mp4", "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "yuv420p", "-"])
    assert abs(raw[0] - 173) <= 1                            # luma of green: 16 + 219 * 0.7152; bt601 gives 145
    said = subprocess.run([media.imageio_ffmpeg.get_ffmpeg_exe(), "-i", tmp_path / "x.mp4"], capture_output=True).stderr
    assert b"yuv420p(tv, bt709, progressive" in said         # matrix, primaries and transfer, all three


@pytest.mark.parametrize("h, w", [(33, 48), (32, 47), (35, 51)])
def test_odd_sizes_are_kept(tmp_path, h, w):
    frames = scene(0, 3, 64, 64)[:, :h, :w]
    media.write_video(tmp_path / "odd.mp4", frames, 30)
    back = media.read_video(tmp_path / "odd.mp4")
    assert back.shape == frames.shape and abs(back.astype(int) - frames).mean() < 3


def test_rotation_is_applied(tmp_path):
    media.write_video(tmp_path / "x.mp4", scene(0, 3), 24)
    media.ffmpeg(["-display_rotation", "90", "-i", tmp_path / "x.mp4", "-c", "copy", tmp_path / "r.mp4"])
    info = media.video_info(tmp_path / "r.mp4")
    assert (info["width"], info["height"]) == (64, 96)
    turned = np.rot90(media.read_video(tmp_path / "x.mp4"), 1, (1, 2)).astype(int)
    assert abs(media.read_video(tmp_path / "r.mp4") - turned).mean() < 2


def test_nothing_is_left_of_a_failed_write(tmp_path):
    def broken():
        yield from scene(0, 100)                             # enough that the encoder has begun to write
        raise RuntimeError("the network failed")
    path = tmp_path / "x.mkv"
    media.write_video(path, scene(1, 2), 24)
    whole = path.read_bytes()
    with pytest.raises(RuntimeError, match="the network failed"):
        media.write_video(path, broken(), 24)
    with pytest.raises(ValueError, match="the first is"):
        media.write_video(path, [np.zeros((32, 32, 3), np.uint8), np.zeros((16, 32, 3), np.uint8)], 24)
    with pytest.raises(ValueError, match="uint8"):
        media.write_video(path, np.zeros((2, 32, 32, 3), np.float32), 24)
    with pytest.raises(ValueError, match="not written"):
        media.write_video(tmp_path / "x.nonsense", scene(1, 2), 24)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


def test_unreadable_is_one_line(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"this is not a video" * 50)
    (tmp_path / "bad.png").write_bytes(b"this is not a picture")
    for read, name in ((media.video_info, "bad.mp4"), (media.survey, "bad.mp4"), (media.read_video, "none.mp4"),
                       (media.read_image, "bad.png")):
        with pytest.raises(ValueError) as e:
            read(tmp_path / name)
        assert str(tmp_path / name) in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ValueError, match="no frame at 9"):
        media.write_video(tmp_path / "x.mkv", scene(0, 3), 24)
        media.read_video(tmp_path / "x.mkv", 9)


def test_survey_finds_frames_cuts_times_and_damage(tmp_path):
    path = tmp_path / "cut.mp4"
    media.write_video(path, np.concatenate([scene(1, 10), 255 - scene(2, 12)]), NTSC)
    seen = media.survey(path)
    assert seen["frames"] == 22 and seen["cuts"] == [10] and seen["problem"] == ""
    np.testing.assert_allclose(seen["times"], np.arange(22) / float(NTSC), atol=1e-4)
    assert media.steady(seen["times"], NTSC)
    assert not media.steady([0, 1 / 24, 3 / 24], Fraction(24)) and media.steady([0.5, 0.542, 0.583], Fraction(24))
    assert not media.steady([0, 1.5 / 24, 2 / 24], Fraction(24)) and media.steady([0, 1.2 / 24, 2 / 24], Fraction(24))
    (tmp_path / "short.mp4").write_bytes(path.read_bytes()[:-3000])            # the index is in front
    seen = media.survey(tmp_path / "short.mp4")
    assert 0 < seen["frames"] <= 22 and seen["problem"]


def test_ffmpeg_never_reads_the_users_stdin(tmp_path, monkeypatch):
    """It would eat the list of a shell loop and the keys of the terminal, and stop in the background."""
    given, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **kw: given.append(kw.get("stdin")) or popen(*a, **kw))
    media.write_video(tmp_path / "x.mkv", scene(0, 3), 24)
    media.read_video(tmp_path / "x.mkv", 1), media.survey(tmp_path / "x.mkv"), media.header(tmp_path / "x.mkv")
    assert len(given) >= 4 and all(x in (subprocess.DEVNULL, subprocess.PIPE) for x in given)


@pytest.mark.parametrize("name, options", [("x.avi", ["-c:v", "mpeg4", "-bf", "2"]), ("x.ts", ["-c:v", "libx264"]),
                                           ("x.mkv", ["-c:v", "libx264"]), ("x.webm", ["-c:v", "libvpx"])])
def test_frames_are_where_they_are_in_every_container(tmp_path, name, options):
    media.write_video(tmp_path / "in.mkv", scene(0, 30), 24)
    media.ffmpeg(["-i", tmp_path / "in.mkv", *options, "-g", "12", "-pix_fmt", "yuv420p", tmp_path / name])
    path = tmp_path / name
    if name == "x.ts":                                       # FFmpeg tells a container by what is in it
        path = path.rename(tmp_path / "x.mp4")
    back = media.read_video(path)
    assert len(back) == 30
    for start in range(0, 30, 3):
        assert np.array_equal(media.read_video(path, start, 2), back[start:start + 2]), start


@pytest.mark.parametrize("h, w, matrix", [(32, 1280, "bt709"), (592, 592, "bt709"), (64, 64, "smpte170m"),
                                          (576, 720, "smpte170m")])
def test_untagged_video_is_read_as_players_read_it(tmp_path, h, w, matrix):
    frame = np.full((2, h, w, 3), (200, 60, 40), np.uint8)
    filters = f"scale=out_color_matrix={matrix}:out_range=tv,setparams=colorspace=unknown:range=tv,format=yuv420p"
    media.write_video(tmp_path / "in.mkv", frame, 24)
    media.ffmpeg(["-i", tmp_path / "in.mkv", "-vf", filters, "-c:v", "libx264", "-crf", "1", tmp_path / "x.mp4"])
    assert not media.header(tmp_path / "x.mp4")["matrix"] and media.header(tmp_path / "in.mkv")["matrix"]
    assert abs(media.read_video(tmp_path / "x.mp4").astype(int) - frame).max() <= 2       # the other one: 10 to 20


@pytest.mark.parametrize("h, w, matrix", [(64, 1280, "smpte170m"), (64, 1280, "bt470bg"), (64, 64, "bt709")])
def test_tags_go_before_what_players_guess(tmp_path, h, w, matrix):
    frame = np.full((2, h, w, 3), (200, 60, 40), np.uint8)
    filters = f"scale=out_color_matrix={matrix}:out_range=tv,setparams=colorspace={matrix}:range=tv,format=yuv420p"
    media.write_video(tmp_path / "in.mkv", frame, 24)
    media.ffmpeg(["-i", tmp_path / "in.mkv", "-vf", filters, "-c:v", "libx264", "-crf", "1", tmp_path / "x.mp4"])
    assert media.header(tmp_path / "x.mp4")["matrix"]
    assert abs(media.read_video(tmp_path / "x.mp4").astype(int) - frame).max() <= 2


def test_a_file_that_was_replaced_is_looked_at_again(tmp_path):
    for frames, side in ((3, 64), (5, 32)):
        media.write_video(tmp_path / "x.mkv", scene(0, frames, side, side), 24)
        info, seen = (look(tmp_path / "x.mkv") for look in (media.video_info, media.survey))
        assert (info["width"], seen["frames"]) == (side, frames)


def test_hidden_files_are_no_pictures_and_numbers_are_in_their_order(tmp_path):
    for name in ("f10.png", "f9.png", "._f9.png", "f9.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in media.files_in(tmp_path, media.IMAGES)] == ["f9.png", "f10.png"]


def test_sixteen_bits_of_grey_become_the_nearest_of_eight(tmp_path):
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(media.read_image(tmp_path / "deep.png")[..., 0].ravel(), np.arange(256))


@pytest.mark.parametrize("curve", ["smpte2084", "arib-std-b67"])
def test_hdr_is_tone_mapped(tmp_path, curve):
    """What is dark enough comes back as it was, 203 cd/m2 being white; what is brighter is compressed, in order."""
    grey = np.array([16, 64, 100, 140, 180, 220, 250], np.uint8)
    media.write_video(tmp_path / "sdr.mkv", np.broadcast_to(grey[:, None, None, None], (7, 64, 64, 3)).copy(), 24)
    filters = ("setparams=colorspace=gbr:color_primaries=bt709:color_trc=bt709:range=pc,zscale=t=linear:npl=203,"
               f"format=gbrpf32le,zscale=p=bt2020,zscale=t={curve}:m=bt2020nc:r=tv:npl=203,format=yuv420p10le")
    media.ffmpeg(["-i", tmp_path / "sdr.mkv", "-vf", filters, "-c:v", "libx264", "-crf", "1", "-color_trc", curve,
                  "-color_primaries", "bt2020", "-colorspace", "bt2020nc", tmp_path / "hdr.mp4"])
    assert media.header(tmp_path / "hdr.mp4")["hdr"] == curve
    back = media.read_video(tmp_path / "hdr.mp4").mean((1, 2, 3))
    np.testing.assert_allclose(back[:4], grey[:4], atol=2)
    assert (np.diff(back) > 5).all() and 190 < back[-1] < 225


def test_a_title_does_not_hide_what_the_file_says(tmp_path):
    media.write_video(tmp_path / "x.mp4", scene(0, 2), 24)
    media.ffmpeg(["-i", tmp_path / "x.mp4", "-c", "copy", "-metadata", "title=Music Video: ffv1, x",
                  tmp_path / "Video: x.mp4"])
    assert media.header(tmp_path / "Video: x.mp4") == dict(seeks=True, lossless=False, matrix=True, hdr="")


def test_a_cover_is_no_video(tmp_path):
    Image.fromarray(scene(0, 1)[0]).save(tmp_path / "cover.png")
    media.ffmpeg(["-f", "lavfi", "-i", "sine=d=0.3", "-i", tmp_path / "cover.png", "-map", "0", "-map", "1",
                  "-c:v", "copy", "-disposition:v", "attached_pic", tmp_path / "song.mp4"])
    with pytest.raises(ValueError, match="song.mp4: not readable as a video.*no video in it"):
        media.video_info(tmp_path / "song.mp4")


def test_healthy_video_of_a_varying_rate_is_not_called_damaged(tmp_path):
    times = np.cumsum([0, *[7, 11, 40] * 12]) / 1000
    media.encode(tmp_path / "film.mp4", scene(0, 37), 24, times=times)
    media.ffmpeg(["-i", tmp_path / "film.mp4", "-c", "copy", tmp_path / "x.mkv"])
    assert media.survey(tmp_path / "x.mkv")["problem"] == ""
    np.testing.assert_allclose(media.survey(tmp_path / "x.mkv")["times"], times, atol=1e-3)


def test_pictures_come_in_srgb_and_animations_are_refused(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"XXXX").replace(b"bXYZ", b"rXYZ").replace(b"XXXX", b"bXYZ")
    picture = Image.fromarray(np.full((16, 16, 3), (200, 60, 40), np.uint8))
    for name, profile, want in (("plain", srgb, (200, 60, 40)), ("swapped", swapped, (40, 60, 200)),
                                ("broken", b"no profile", (200, 60, 40))):
        picture.save(tmp_path / f"{name}.png", icc_profile=profile)
        assert abs(media.read_image(tmp_path / f"{name}.png").astype(int) - want).max() <= 1, name
        for other in (picture.convert("RGBA"), picture.quantize()):
            other.save(tmp_path / "other.png", icc_profile=profile)
            assert abs(media.read_image(tmp_path / "other.png").astype(int) - want).max() <= 1, (name, other.mode)
    picture.save(tmp_path / "moves.webp", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    with pytest.raises(ValueError, match="moves.webp: .*an animation: make it a video first"):
        media.read_image(tmp_path / "moves.webp")
