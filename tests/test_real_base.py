"""The preset wan1.3b from its files to an upscaled video, with every size shrunk: Wan's block, Wan's video code."""
import copy
import functools

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import common
import data
import infer
import media
import model as M
import stage0_teacher as stage0
import stage1_pd as stage1
import stage2_dual as stage2
import stage3_dpo as stage3

CODE = dict(base_dim=8, num_res_blocks=1)


@pytest.fixture
def shrunk(monkeypatch):
    row = dict(dim=32, layers=3, heads=2, ffn=64, text_dim=8, prompt_len=6, learned=False)
    monkeypatch.setitem(M.MODELS, "wan1.3b", row)
    monkeypatch.setitem(data.CLIPS, "wan1.3b", dict(frames=5, size=64, crop=64, window=2, strength="light"))
    monkeypatch.setitem(stage2.PRESETS, "wan1.3b", stage2.PRESETS["wan1.3b"] | {"head_channels": 8})
    monkeypatch.setattr(M, "WanVAE", functools.partial(M.WanVAE, **CODE))
    monkeypatch.setattr(common, "panel", lambda *args: None)
    M.WanVAE.stride, M.WanVAE.channels = 8, 16
    return row


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_all_stages_of_the_real_base(shrunk, tmp_path, monkeypatch, precision):
    """In fp32, and as on a GPU, under bf16 autocast with the real score in bf16."""
    monkeypatch.setattr(common, "precision", lambda device: precision)
    rng = np.random.default_rng(0)
    film = np.kron(rng.integers(0, 256, (12, 12, 3)), np.ones((6, 6, 1))).astype(np.uint8)
    media.write_video(tmp_path / "media.mkv", np.stack([np.roll(film, i, 1) for i in range(8)]), 24)

    # the files that a user has: both of Wan's in the original layout, the prompts
    net, vae = M.build("wan1.3b"), M.build_vae("wan1.3b")
    torch.nn.init.normal_(net.head.head.weight, std=0.05)
    narrow = {k: x for k, x in net.state_dict().items() if k != "prompts"}
    narrow["patch_embedding.weight"] = narrow["patch_embedding.weight"][:, :16].contiguous()
    save_file(narrow, tmp_path / "dit.safetensors")
    save_file({k: x.contiguous() for k, x in vae.code.state_dict().items()}, tmp_path / "vae.safetensors")
    prompts = torch.randn(3, 6, 8)
    save_file({"prompts": prompts}, tmp_path / "prompts.safetensors")

    data.main(["prepare", "--latents", str(tmp_path / "latents.bin"), "--data", str(tmp_path), "--clips", "3",
               "--vae", str(tmp_path / "vae.safetensors")])
    shared = ["--preset", "wan1.3b", "--out", str(tmp_path / "out" / "w"), "--data", str(tmp_path), "--clips", "3",
              "--accumulate", "2", "--log_every", "1", "--save_every", "1"]
    cached = ["--latents", str(tmp_path / "latents.bin")]
    files = ["--weights", "dit.safetensors", "--vae", "vae.safetensors", "--prompts", "prompts.safetensors"]
    files = [x if x.startswith("--") else str(tmp_path / x) for x in files]
    for stage, argv in ((stage0, [*files[:2], *files[4:], *cached, "--steps", "2"]),
                        (stage1, [*cached, "--cfg_steps", "1", "--pd_grid", "2", "1", "--steps_per_phase", "1"]),
                        (stage2, [*cached, "--steps", "1", "--aux_warmup", "1"]),
                        (stage3, ["--steps", "1", "--pairs", "3", "--keep", "1", "--candidates", "2", "--lora", "2"])):
        stage.main(common.parse_config(stage.Config, stage.PRESETS, [*shared, *argv]))
    assert common.read_log(str(tmp_path / "out" / "w" / "stage3"), "held.jsonl")[-1]["pairs"] == 1
    start = M.load_checkpoint(str(tmp_path / "out" / "w" / "stage0" / "last.pt"), "ema")[0].state_dict()
    torch.testing.assert_close(start["prompts"], prompts)
    assert (start["blocks.0.ffn.0.weight"] - narrow["blocks.0.ffn.0.weight"]).abs().max() < 1e-3    # two small steps on
    assert start["patch_embedding.weight"].shape[1] == 32

    student = str(tmp_path / "out" / "w" / "stage3" / "last.pt")
    media.write_video(tmp_path / "in.mkv", np.stack([film[:19, :22]] * 6), 24)
    made = []
    for i, options in enumerate(([], ["--vae_dtype", "bf16"], ["--tile", "64", "--vae_tiles"])):
        infer.main([str(tmp_path / "in.mkv"), str(tmp_path / f"up{i}.mkv"), "--ckpt", student, *options])
        made.append(media.read_video(tmp_path / f"up{i}.mkv").astype(int))
        assert made[i].shape == (6, 76, 88, 3)
    assert 0 < abs(made[1] - made[0]).mean() < 3
    monkeypatch.setattr(infer, "upscale", lambda *args, **options: (_ for _ in ()).throw(MemoryError))
    for options, advice in (([], "try --vae_tiles"), (["--vae_tiles"], "try --tile 32 ")):
        with pytest.raises(SystemExit, match=f"out of memory: {advice}"):
            infer.main([str(tmp_path / "in.mkv"), str(tmp_path / "no.mkv"), "--ckpt", student, *options])


def test_stage0_is_at_first_exactly_wan(shrunk, tmp_path):
    """Whatever z_lr is: its input columns start at zero."""
    net = M.build("wan1.3b")
    torch.nn.init.normal_(net.head.head.weight, std=0.05)
    torch.nn.init.normal_(net.patch_embedding.weight)
    narrow = {k: x for k, x in net.state_dict().items() if k != "prompts"}
    narrow["patch_embedding.weight"] = narrow["patch_embedding.weight"][:, :16].contiguous()
    save_file(narrow, tmp_path / "dit.safetensors")
    cfg = stage0.Config(model="wan1.3b", weights=str(tmp_path / "dit.safetensors"), vae="random", prompts="random")
    found, _ = stage0.start_networks(cfg, None, torch.device("cpu"))
    z, other = torch.randn(2, 2, 16, 1, 4, 4)
    t, text = torch.rand(2), torch.randn(2, 6, 8)
    want = copy.deepcopy(net)
    with torch.no_grad():
        want.patch_embedding.weight[:, 16:] = 0
        assert torch.equal(found(z, t, z, text), found(z, t, other, text))
        torch.testing.assert_close(found(z, t, z, text), want(z, t, z, text))
