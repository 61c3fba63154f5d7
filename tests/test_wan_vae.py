"""Wan's video code: its names in both layouts, what encode and decode add to diffusers' module, and its size in infer.

The original modules are described here once more, by hand: the names that the loader maps are not taken from it.
"""
import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
import torch.nn as nn
from safetensors.torch import save_file

import data
import infer
import model as M

TINY = 8            # base_dim; Wan's own is 96


# ---------------------------------------------------------------------------- Wan-Video/Wan2.1, wan/modules/vae.py


def parts(**children):
    """A module with these children, in this order."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def norm(dim, axes=3):
    module = nn.Module()
    module.gamma = nn.Parameter(torch.ones(dim, *[1] * axes))
    return module


def residual(a, b):
    return parts(residual=nn.Sequential(norm(a), nn.SiLU(), nn.Conv3d(a, b, 3), norm(b), nn.SiLU(), nn.Dropout(),
                                        nn.Conv3d(b, b, 3)),
                 shortcut=nn.Conv3d(a, b, 1) if a != b else nn.Identity())


def resample(a, b, time):
    """time: output channels of its temporal convolution, 0: has none."""
    children = {"time_conv": nn.Conv3d(a, time, (3, 1, 1))} if time else {}
    return parts(resample=nn.Sequential(nn.Identity(), nn.Conv2d(a, b, 3)), **children)


def middle(dim):
    attention = parts(norm=norm(dim, 2), to_qkv=nn.Conv2d(dim, 3 * dim, 1), proj=nn.Conv2d(dim, dim, 1))
    return nn.Sequential(residual(dim, dim), attention, residual(dim, dim))


def original(dim):
    """The modules of Wan2.1_VAE.pth, for their names, shapes and order alone."""
    down, width = [], dim
    for i, wide in enumerate((dim, 2 * dim, 4 * dim, 4 * dim)):
        down += [residual(width, wide), residual(wide, wide)]
        down += [resample(wide, wide, wide if i else 0)] if i < 3 else []
        width = wide
    up = []
    for i, wide in enumerate((4 * dim, 4 * dim, 2 * dim, dim)):
        up += [residual(width, wide), residual(wide, wide), residual(wide, wide)]
        up += [resample(wide, wide // 2, 2 * wide if i < 2 else 0)] if i < 3 else []
        width = wide // 2
    return parts(
        encoder=parts(conv1=nn.Conv3d(3, dim, 3), downsamples=nn.Sequential(*down), middle=middle(4 * dim),
                      head=nn.Sequential(norm(4 * dim), nn.SiLU(), nn.Conv3d(4 * dim, 32, 3))),
        conv1=nn.Conv3d(32, 32, 1), conv2=nn.Conv3d(16, 16, 1),
        decoder=parts(conv1=nn.Conv3d(16, 4 * dim, 3), middle=middle(4 * dim), upsamples=nn.Sequential(*up),
                      head=nn.Sequential(norm(dim), nn.SiLU(), nn.Conv3d(dim, 3, 3))))


def in_original_layout(code):
    """The tensors of diffusers' module under the original names. Both define their modules in the order of the forward
    pass; only in the middle diffusers lists its attention first."""
    keys = []
    for _, run in itertools.groupby(code.state_dict(), lambda key: ".mid_block." in key):
        keys += sorted(run, key=lambda key: (".attentions.0." in key) + 2 * (".mid_block.resnets.1." in key))
    with torch.device("meta"):
        names = original(TINY).state_dict()
    state = {name: code.state_dict()[key] for name, key in zip(names, keys, strict=True)}
    assert all(x.shape == names[name].shape for name, x in state.items())
    return state


# ---------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def reference():
    """diffusers' module at random, norms too."""
    torch.manual_seed(0)
    code = diffusers.AutoencoderKLWan(base_dim=TINY)
    for name, p in code.named_parameters():
        with torch.no_grad():
            p.copy_(1 + torch.randn_like(p) / 2 if name.endswith("gamma") else 1.5 * p)
    return code.requires_grad_(False)


def ours(reference, **options):
    vae = M.WanVAE(base_dim=TINY, **options)
    vae.code.load_state_dict(reference.state_dict())
    return vae


def clip(frames=5, h=16, w=24):
    torch.manual_seed(1)
    x = torch.rand(1, 3, 2, 3, 3) * 2 - 1
    return nn.functional.interpolate(x, (frames, h, w), mode="trilinear")


def error(found, want):
    return ((found - want).abs().max() / want.std()).item()


# ---------------------------------------------------------------------------- the weights


def test_all_194_original_names_load_at_the_real_size(tmp_path):
    with torch.device("meta"):
        state, vae = original(96).state_dict(), M.build_vae("wan1.3b")
    assert len(state) == 194 and sum(x.numel() for x in state.values()) == 126_892_531
    torch.save(state, tmp_path / "vae.pth")
    M.load_wan_vae(vae, tmp_path / "vae.pth")
    assert len(vae.state_dict()) == 194 and sum(p.numel() for p in vae.parameters()) == 126_892_531


def test_both_layouts_load(reference, tmp_path):
    state = in_original_layout(reference)
    for folder in ("diffusers", "wan"):
        (tmp_path / folder).mkdir()
    reference.save_pretrained(tmp_path / "diffusers" / "vae")
    torch.save(state, tmp_path / "wan" / "Wan2.1_VAE.pth")
    save_file({"patch_embedding.weight": torch.zeros(1)}, tmp_path / "wan" / "diffusion_pytorch_model.safetensors")
    save_file(state, tmp_path / "wan.safetensors")
    z = reference.encode(clip()).latent_dist.mean
    for path in ("diffusers", "diffusers/vae", "diffusers/vae/diffusion_pytorch_model.safetensors", "wan",
                 "wan/Wan2.1_VAE.pth", "wan.safetensors"):
        vae = M.WanVAE(base_dim=TINY)
        M.load_wan_vae(vae, tmp_path / path)
        assert error(vae.code.encode(clip()).latent_dist.mean, z) < 1e-4, path
        assert error(vae.code.decode(z).sample, reference.decode(z).sample) < 1e-4, path
    assert vae.code.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("a, b", [
    ("encoder.downsamples.0.residual.0.", "encoder.downsamples.0.residual.3."),
    ("encoder.downsamples.0.residual.2.", "encoder.downsamples.0.residual.6."),
    ("encoder.middle.0.residual.3.", "encoder.middle.2.residual.3."),
    ("decoder.upsamples.1.residual.2.", "decoder.upsamples.2.residual.2."),
    ("decoder.upsamples.3.time_conv.", "decoder.upsamples.7.time_conv.")])
def test_swapped_tensors_are_noticed(reference, tmp_path, a, b):
    state = in_original_layout(reference)
    swapped = {key.replace(a, "?").replace(b, a).replace("?", b): x for key, x in state.items()}
    assert swapped.keys() == state.keys()
    torch.save(swapped, tmp_path / "vae.pth")
    vae = M.WanVAE(base_dim=TINY)
    M.load_wan_vae(vae, tmp_path / "vae.pth")
    z = reference.encode(clip()).latent_dist.mean
    assert max(error(vae.code.encode(clip()).latent_dist.mean, z),
               error(vae.code.decode(z).sample, reference.decode(z).sample)) > 1e-2


def test_other_files_are_refused(reference, tmp_path):
    state, file = in_original_layout(reference), tmp_path / "vae.pth"

    def refused(words, content=None, path=file):
        if content is not None:
            torch.save(content, file)
        with pytest.raises(SystemExit, match=words) as stop:
            M.load_wan_vae(M.WanVAE(base_dim=TINY), path)
        assert "\n" not in stop.value.code
    refused("missing: decoder.up_blocks.0.upsamplers.0.time_conv.bias and 0 more",
            {k: x for k, x in state.items() if k != "decoder.upsamples.3.time_conv.bias"})
    refused("unexpected: extra and 0 more", state | {"extra": torch.zeros(1)})
    refused("another shape: post_quant_conv.bias and 0 more", state | {"conv2.bias": torch.zeros(3)})
    refused("missing: decoder.* and 193 more, unexpected: blocks.0.ffn.0.bias", {"blocks.0.ffn.0.bias": torch.zeros(1)})
    refused("not a plain state dict; it has state_dict", {"state_dict": state})
    refused("not readable as torch.save", [1, 2])
    refused("no weights there", path=tmp_path / "none.pth")
    file.write_bytes(b"not a file of weights")
    refused("not readable as torch.save")


# ---------------------------------------------------------------------------- encode and decode


def test_the_constants_are_those_of_the_published_config():
    with torch.device("meta"):
        config = diffusers.AutoencoderKLWan().config
    assert list(M.WanVAE.MEAN) == config.latents_mean and list(M.WanVAE.STD) == config.latents_std
    assert M.WanVAE.channels == config.z_dim and M.WanVAE.stride == config.scale_factor_spatial


@pytest.mark.parametrize("frames, latents, h, w", [(1, 1, 8, 16), (5, 2, 16, 24), (9, 3, 24, 8)])
def test_encode_normalises_and_decode_undoes_it(reference, frames, latents, h, w):
    vae, video = ours(reference), clip(frames, h, w)
    raw = reference.encode(video).latent_dist.mode()
    z = vae.encode(video)
    assert z.shape == (1, 16, latents, h // 8, w // 8)
    for i, (mean, std) in enumerate(zip(reference.config.latents_mean, reference.config.latents_std, strict=True)):
        torch.testing.assert_close(z[:, i], (raw[:, i] - mean) / std, rtol=1e-4, atol=1e-5)
    want = reference.decode(raw).sample
    assert vae.decode(z).shape == video.shape and error(vae.decode(z), want) < 1e-4
    assert torch.equal(vae.draw_onto(video, 0 * z, z), vae.decode(z)) and want.abs().max() <= 1 and want.std() > 0.1


@pytest.mark.parametrize("mean, std", [(0, 1), (-1, 1), (1, 0)])
def test_a_wrong_denormalisation_is_noticed(reference, mean, std):
    vae, video = ours(reference), clip()
    z, want = vae.encode(video), reference.decode(reference.encode(video).latent_dist.mode()).sample
    vae.mean, vae.std = mean * vae.mean, vae.std ** std
    assert error(vae.decode(z), want) > 0.1


def test_gradients_reach_the_video_and_not_the_weights(reference):
    vae, video = ours(reference), clip().requires_grad_()
    vae.decode(vae.encode(video)).square().sum().backward()
    assert video.grad.abs().sum() > 0 and not any(p.requires_grad for p in vae.parameters())


def test_threads_may_share_it(reference):
    """As in evaluate.py on a CPU. diffusers' module keeps the last frames of a clip in itself: two would mix."""
    vae, videos = ours(reference), [clip(9, 64, 64).flip(k) for k in ((), (2,), (3,), (4,))]
    want = [vae.decode(vae.encode(video)) for video in videos]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda video: vae.decode(vae.encode(video)), videos))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_wrong_sizes_are_refused(reference):
    vae = ours(reference)
    with pytest.raises(ValueError, match=r"4 n \+ 1"):
        vae.encode(torch.zeros(1, 3, 8, 16, 16))
    with pytest.raises(ValueError, match="multiples of 8"):
        vae.encode(torch.zeros(1, 3, 9, 16, 20))


def distance(found, want):
    """Root mean square of the difference, in standard deviations of `want`."""
    assert found.shape == want.shape and found.dtype == want.dtype == torch.float32
    return ((found - want).square().mean().sqrt() / want.std()).item()


def test_bf16_is_close_and_float32_outside(reference):
    full, half, video = ours(reference), ours(reference, dtype=torch.bfloat16), clip()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and half.std.dtype == torch.float32
    z = full.encode(video)
    assert 1e-3 < distance(half.encode(video), z) < 0.05
    assert 1e-3 < distance(half.decode(z), full.decode(z)) < 0.05
    with torch.autocast("cpu", torch.bfloat16):             # a stage's own precision does not change the code's
        inside = full.encode(video)
    assert torch.equal(inside, z)


def test_tiling_is_close(reference):
    """Random weights see farther than trained ones: the attention over the frame is silenced, and the decoder is
    compared where neither a tile nor a blend ends."""
    whole, tiles, video = ours(reference), ours(reference), clip(1, 160, 144)
    tiles.code.enable_tiling()
    assert tiles.code.use_tiling and not whole.code.use_tiling
    assert torch.equal(tiles.encode(video), whole.encode(video))                # smaller than one tile
    for half in (whole.code.encoder, whole.code.decoder, tiles.code.encoder, tiles.code.decoder):
        half.mid_block.attentions[0].proj.weight.zero_()
    tiles.code.enable_tiling(128, 128, 96, 96)
    z = whole.encode(video)
    assert 1e-4 < distance(tiles.encode(video), z) < 0.2
    found, want = tiles.decode(z), whole.decode(z)
    assert 1e-4 < distance(found, want) and distance(found[..., :64, :64], want[..., :64, :64]) < 0.03


# ---------------------------------------------------------------------------- with the rest


def test_a_checkpoint_gets_the_code_of_its_model(reference, tmp_path, monkeypatch):
    monkeypatch.setitem(M.MODELS, "wan1.3b", M.MODELS["tiny"])
    monkeypatch.setattr(M, "WanVAE", type("Small", (M.WanVAE,), {
        "__init__": functools.partialmethod(M.WanVAE.__init__, base_dim=TINY)}))
    state = {"stage": "stage1", "config": {"model": "wan1.3b"}, "step": 1, "total": 1,
             "student": M.build("tiny").state_dict(), "vae": ours(reference).state_dict()}
    torch.save(state, tmp_path / "student.pt")
    _, vae, _ = M.load_checkpoint(str(tmp_path / "student.pt"))
    assert vae.stride == 8 and torch.equal(vae.encode(clip()), ours(reference).encode(clip()))
    monkeypatch.setitem(data.CLIPS, "wan1.3b", data.CLIPS["wan1.3b"] | dict(crop=128, window=1))
    tiles = []
    monkeypatch.setattr(M, "tiled", lambda net, tile: tiles.append(tile) or net)
    upscaler = infer.load(str(tmp_path / "student.pt"), "student", torch.device("cpu"))
    assert upscaler(np.zeros((2, 9, 7, 3), np.uint8)).shape == (3, 2, 36, 28)
    infer.load(str(tmp_path / "student.pt"), "student", torch.device("cpu"), tile=40)
    assert tiles == [(1, 16, 16), (1, 4, 4)]                                    # latents, even, of 8 pixels
    torch.save(state | {"config": {"model": "tiny"}}, tmp_path / "student.pt")
    with pytest.raises(SystemExit, match="'vae': not the weights of this model, but of another preset"):
        M.load_checkpoint(str(tmp_path / "student.pt"))


@pytest.mark.parametrize("frames, h, w, latents", [(1, 5, 7, (1, 4, 4)), (6, 9, 8, (3, 6, 4))])
def test_infer_gives_odd_sizes_back_four_times_as_large(reference, frames, h, w, latents):
    seen = []

    def velocity(z, t, z_lr, text):             # that of z_0 = z_lr
        seen.append(tuple(z.shape))
        return z - z_lr
    lr = np.random.default_rng(0).integers(0, 256, (frames, h, w, 3), dtype=np.uint8)
    vae = ours(reference)
    out = infer.upscale(velocity, vae, 1, torch.device("cpu"), lr, color="none")
    assert out.shape == (3, frames, 4 * h, 4 * w) and seen == [(1, 16, *latents)]
    if h == 9:                                  # a side that is no multiple of 4 is continued, not squeezed
        padded = np.pad(lr, ((0, 3), (0, 3), (0, 0), (0, 0)), "edge")
        video = data.upsample(data.to_tensor(padded)[None], (48, 32))
        assert error(out, vae.decode(vae.encode(video))[0, :, :frames, :36, :32]) < 1e-4
