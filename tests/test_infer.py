"""Tiles, colour and infer.py itself."""
import numpy as np
import pytest
import torch

import data
import infer
import model as M
from tests.test_maths import tiny_net


def identity(z, t, z_lr, text):
    """A 'network' whose one-step output is z_lr: v = eps - z_lr."""
    return z - z_lr


@pytest.mark.parametrize("size", [(3, 24, 24), (3, 26, 24), (1, 50, 64), (5, 24, 70), (7, 12, 44)])
def test_tiles_cover_everything_and_blend_to_one(size):                                 # T17
    z, z_lr = torch.randn(2, 1, 4, *size)
    constant = M.tiled(lambda z, *_: torch.ones_like(z), (3, 24, 24))
    torch.testing.assert_close(constant(z, torch.ones(1), z_lr, M.prompt(z)), torch.ones_like(z))
    blended = M.tiled(identity, (3, 24, 24))(z, torch.ones(1), z_lr, M.prompt(z))
    torch.testing.assert_close(blended, z - z_lr, atol=1e-6, rtol=0)     # one noise volume: tiled equals untiled


def test_tiles_are_the_size_that_was_trained_and_overlap():
    seen = []

    def net(z, t, z_lr, text):
        seen.append(z.shape)
        return z
    z = torch.randn(1, 4, 5, 60, 30)
    M.tiled(net, (3, 24, 24), at_once=4)(z, torch.ones(1), z, M.prompt(z))
    assert all(s[1:] == (4, 3, 24, 24) and s[0] <= 4 for s in seen) and sum(s[0] for s in seen) == 2 * 3 * 2
    assert M.tile_starts(60, 24, 4) == [0, 20, 36] and M.tile_starts(24, 24, 4) == [0]


def test_batch_of_tiles_keeps_samples_apart():
    z = torch.randn(2, 4, 3, 40, 24)
    t = torch.tensor([0.2, 0.9])

    def net(z, t, z_lr, text):
        return M.bcast(t, z) + torch.zeros_like(z)
    out = M.tiled(net, (3, 24, 24))(z, t, z, M.prompt(z))
    torch.testing.assert_close(out, M.bcast(t, z).expand_as(z))


def test_wavelet_colour():                                                              # T18
    x = torch.rand(1, 3, 2, 40, 48) * 2 - 1
    torch.testing.assert_close(infer.wavelet_color(x, x), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(infer.wavelet_color(x, x + 0.1), x + 0.1, atol=1e-5, rtol=0)
    fine = torch.zeros_like(x)
    fine[..., ::2] = 0.2                                    # the high frequencies come from the content
    flat = torch.zeros_like(x)
    assert infer.wavelet_color(fine, flat).std() > 0.09 and abs(infer.wavelet_color(fine, flat).mean()) < 0.01


@pytest.fixture
def checkpoint(tmp_path):
    vae = M.PatchVAE()
    vae.fit(torch.nn.functional.interpolate(torch.randn(2, 3, 3, 8, 8), (9, 32, 32), mode="trilinear"))
    net = M.build("tiny")
    state = {"stage": "stage1", "config": {"model": "tiny"}, "step": 1, "total": 1, "student": net.state_dict(),
             "vae": vae.state_dict()}
    torch.save(state, tmp_path / "student.pt")
    return str(tmp_path / "student.pt")


@pytest.mark.parametrize("frames, h, w", [(1, 12, 12), (5, 11, 14), (10, 12, 9)])
def test_upscale_keeps_frames_and_multiplies_the_size(frames, h, w):
    lr = np.random.default_rng(0).integers(0, 256, (frames, h, w, 3), dtype=np.uint8)
    net, vae = tiny_net(), M.PatchVAE()
    vae.fit(torch.randn(1, 3, 9, 16, 16))
    out = infer.upscale(net, vae, lr)
    assert out.shape == (frames, 4 * h, 4 * w, 3) and out.dtype == np.uint8
    assert np.array_equal(out, infer.upscale(net, vae, lr))
    assert not np.array_equal(out, infer.upscale(net, vae, lr, seed=1))


def test_infer_from_file_to_file(checkpoint, tmp_path):
    lr = np.random.default_rng(0).integers(0, 256, (7, 12, 16, 3), dtype=np.uint8)
    data.write_video(str(tmp_path / "in.mkv"), lr, data.Fraction(24000, 1001))
    infer.main([str(tmp_path / "in.mkv"), str(tmp_path / "out.mkv"), "--ckpt", checkpoint])
    info = data.video_info(str(tmp_path / "out.mkv"))
    assert (info["width"], info["height"], info["fps"]) == (64, 48, data.Fraction(24000, 1001))
    assert len(data.read_video(str(tmp_path / "out.mkv"))) == 7


def test_infer_errors_are_one_line(checkpoint, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    data.write_video(str(tmp_path / "in.mkv"), np.zeros((2, 8, 8, 3), np.uint8), data.Fraction(24))
    good, out = str(tmp_path / "in.mkv"), str(tmp_path / "out.mp4")
    for args in ([str(tmp_path / "bad.mp4"), out], [str(tmp_path / "none.mp4"), out], [good, good],
                 [good, str(tmp_path / "out.txt")], [good, str(tmp_path / "nowhere" / "out.mp4")],
                 [good, out, "--steps", "0"], [good, out, "--part", "ema"]):
        with pytest.raises(SystemExit) as stop:
            infer.main([*args, *(["--ckpt", checkpoint])])
        assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    assert not (tmp_path / "out.mp4").exists()
