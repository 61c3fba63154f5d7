"""The networks: shapes, sizes, token order, taps, the discriminator head, the video code, loading."""
import math
import shutil

import pytest
import torch
from einops import rearrange

import data
import media
import metrics
import model as M
from tests.conftest import ROOT
from tests.test_maths import tiny_net


@pytest.mark.parametrize("name, count", [("tiny", 1.93), ("small", 53.48), ("wan1.3b", 1419.10)])
def test_parameter_counts_in_the_comments(name, count):
    with torch.device("meta"):
        net = M.build(name)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(count, abs=0.005)
    line = next(x for x in open(M.__file__) if x.lstrip().startswith(f'"{name}":'))
    assert f"# {count:.2f} M" in line


def test_wan_has_its_825_tensors():
    with torch.device("meta"):
        net = M.build("wan1.3b")
    keys = dict(net.named_parameters())
    assert len(keys) == 825 and sum(p.numel() for p in keys.values()) == 1_418_996_800 + 98_304
    assert keys["patch_embedding.weight"].shape == (1536, 32, 1, 2, 2)
    for key in ("blocks.29.self_attn.norm_q.weight", "blocks.0.norm3.bias", "blocks.7.ffn.2.weight",
                "time_projection.1.weight", "text_embedding.2.bias", "head.modulation", "blocks.3.modulation"):
        assert key in keys


def test_fresh_model_outputs_zero_and_ignores_the_lr():
    net = M.DiT(**M.MODELS["tiny"] | {"predictor": 0})
    z, z_lr = torch.randn(2, 2, 16, 1, 4, 4)
    assert net(z, torch.rand(2), z_lr, M.prompt(z)).abs().max() == 0
    torch.nn.init.normal_(net.head.head.weight)
    out = [net(z, torch.full((2,), 0.5), lr, M.prompt(z)) for lr in (z_lr, -z_lr)]
    assert torch.equal(*out)                                # the columns of z_lr start at zero
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        (net(z, torch.full((2,), 0.5), z_lr, M.prompt(z)) - z_lr).square().mean().backward()
        optimiser.step()
    out = [net(z, torch.full((2,), 0.5), lr, M.prompt(z)) for lr in (z_lr, -z_lr)]
    assert (out[0] - out[1]).abs().max() > 1e-3             # and learn


def test_linear_velocity_is_the_regression_of_v():
    """Its slope is what least squares finds; at t = 1 the one step is z_lr, at t = 0 the velocity is -z_t."""
    z_lr, r, eps = torch.randn(3, 1, 4, 8, 64, 64, dtype=torch.float64)
    z_0 = z_lr + r * 0.5 ** 0.5
    for t in (0.1, 0.5, 0.8):
        times = torch.full((1,), t, dtype=torch.float64)
        z_t = M.add_noise(z_0, eps, times)
        error = (eps - z_0) - M.linear_velocity(z_t, times, z_lr, torch.full((4,), 0.5))
        assert abs((error * (z_t - (1 - t) * z_lr)).mean()) < 0.02 and abs((error * z_lr).mean()) < 0.02
    ends = torch.tensor([1.0, 0.0])
    z, z_lr = torch.randn(2, 2, 16, 1, 4, 4)
    linear = M.linear_velocity(z, ends, z_lr, torch.rand(16))
    torch.testing.assert_close(linear[0], z[0] - z_lr[0])
    torch.testing.assert_close(linear[1], -z[1])
    torch.testing.assert_close(M.one_step(M.build("tiny"), z, z_lr), z_lr)
    with torch.device("meta"):
        wan = M.build("wan1.3b")
    assert wan.residual is None and wan.predictor is None   # the real weights know nothing of them


def test_the_transformer_goes_on_from_the_first_guess():
    """z_lr + R(z_lr), frame by frame, R by hand here: the latent to the right. It is what the transformer is given, and
    the one step of a fresh one; a fresh R is 0, and learns from the velocity alone."""
    net, (z, z_lr) = M.build("tiny"), torch.randn(2, 2, 16, 3, 4, 6)
    guess = net.predictor
    assert torch.equal(guess(z_lr), z_lr)
    for p in guess.parameters():
        torch.nn.init.zeros_(p)
    with torch.no_grad():
        for c in range(16):
            guess.first.weight[c, c, 1, 1] = guess.last.weight[c, c, 1, 2] = 1
    right = torch.nn.functional.pad(z_lr[..., 1:], (0, 1))
    torch.testing.assert_close(guess(z_lr), z_lr + right)
    with torch.no_grad():
        guess.blocks[1][0].weight[0, 0, 1, 1], guess.blocks[1][2].weight[0, 0, 1, 1] = -1, 2       # 2 relu(-x) is added
    grown = right.clone()
    grown[:, 0] += 2 * (-right[:, 0]).relu()
    torch.testing.assert_close(guess(z_lr), z_lr + grown)
    torch.testing.assert_close(M.one_step(net, z, z_lr), z_lr + grown)
    seen = []
    net.patch_embedding.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    net(z, torch.full((2,), 0.5), z_lr, M.prompt(z)).square().mean().backward()
    torch.testing.assert_close(seen[0], torch.cat([z, z_lr + grown], dim=1))
    assert all(p.grad.abs().max() > 0 for p in (guess.first.weight, guess.last.weight))


def test_forward_shapes_and_taps():
    net = tiny_net(layers=4)
    z, z_lr = torch.randn(2, 2, 16, 3, 6, 4)
    t = torch.rand(2)
    v, features = net(z, t, z_lr, M.prompt(z), taps=(1, 3))
    assert v.shape == z.shape and [f.shape for f in features] == [(2, 3 * 3 * 2, 32)] * 2
    assert torch.equal(v, net(z, t, z_lr, M.prompt(z)))     # tapping changes nothing
    seen = []
    net.blocks[1].register_forward_hook(lambda m, i, o: seen.append(o))
    net(z, t, z_lr, M.prompt(z))
    assert torch.equal(seen[0], features[0])                # the tap is the block's output


def test_network_is_fed_a_thousand_t():
    net = tiny_net()
    seen = []
    net.time_embedding.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    z = torch.randn(1, 16, 1, 2, 2)
    net(z, torch.tensor([0.25]), z, M.prompt(z))
    angle = 250 * 10000 ** (-torch.arange(128.0) / 128)
    torch.testing.assert_close(seen[0][0], torch.cat([angle.cos(), angle.sin()]), atol=2e-4, rtol=0)


def test_batch_samples_do_not_mix():
    net = tiny_net()
    z, z_lr = torch.randn(2, 3, 16, 2, 4, 4)
    t, text = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 1, 2])
    whole = net(z, t, z_lr, text)
    for i in range(3):
        torch.testing.assert_close(net(z[i:i + 1], t[i:i + 1], z_lr[i:i + 1], text[i:i + 1]), whole[i:i + 1],
                                   atol=1e-4, rtol=1e-4)


def test_rope_is_relative_and_per_axis():
    table = M.rope_table(3, 4, 5, 32, 10000, torch.device("cpu")).view(3, 4, 5, 16)
    angle = table.angle()
    torch.testing.assert_close(angle[1, 0, 0, :6], 10000 ** (-torch.arange(6) * 2 / 12))        # time: 12 of 32
    torch.testing.assert_close(angle[0, 1, 0, 6:11], 10000 ** (-torch.arange(5) * 2 / 10))      # height: 10
    torch.testing.assert_close(angle[0, 0, 1, 11:], 10000 ** (-torch.arange(5) * 2 / 10))       # width: 10
    assert angle[1, 0, 0, 6:].abs().max() == 0
    q, k = torch.randn(2, 1, 1, 1, 32)
    a, b = (M.rotate(x.expand(1, 60, 1, 32), table.flatten(0, 2)) for x in (q, k))
    scores = torch.einsum("bnhk,bmhk->nm", a, b).view(3, 4, 5, 3, 4, 5)
    torch.testing.assert_close(scores[0, 0, 0, 1, 1, 1], scores[1, 2, 3, 2, 3, 4])              # same offset
    pair = M.rotate(torch.tensor([1.0, 0.0] + [0.0] * 30).view(1, 1, 1, 32), table[1, 0, 0][None])
    assert pair[0, 0, 0, :2].tolist() == pytest.approx([0.5403, 0.8415], abs=1e-4)              # interleaved pairs


def test_token_grid_round_trip():
    """Tokens run t slowest, x fastest, and the head's grid is the patchifier's."""
    net = M.build("tiny")
    torch.nn.init.zeros_(net.patch_embedding.weight)
    net.patch_embedding.weight.data[0, 0] = 0.25            # channel 0 of a token: mean of its 2 x 2 patch
    net.patch_embedding.bias.data.zero_()
    z = torch.randn(1, 16, 2, 6, 4)
    tokens = rearrange(net.patch_embedding(torch.cat([z, z], 1)), "B D T H W -> B (T H W) D")
    grid = tokens[0, :, 0].view(2, 3, 2)
    assert grid[1, 2, 1].item() == pytest.approx(z[0, 0, 1, 4:6, 2:4].mean().item(), abs=1e-6)

    head = M.RFSHead(8, taps=1, channels=16, grid=(2, 16, 16))
    torch.nn.init.normal_(head.layers[-1].weight)
    features = [torch.randn(1, 2 * 16 * 16, 8) for _ in range(2)]
    before = head(features)
    assert before.shape == (1, 2, 4, 4)
    features[0] = features[0].clone()
    features[0][0, (1 * 16 + 15) * 16 + 0] = torch.randn(8)      # token t = 1, y = 15, x = 0
    changed = (head(features) - before).abs() > 1e-6
    assert changed[0, 1, 3, 0] and not changed[0, :, :2].any() and not changed[0, :, :, 2:].any()


@pytest.mark.parametrize("dim, channels, count", [(128, 64, 442_625), (256, 128, 1_769_985), (1536, 512, 29_886_465)])
def test_head_sizes(dim, channels, count):
    with torch.device("meta"):
        head = M.RFSHead(dim, taps=3, channels=channels, grid=(3, 16, 16))
    assert sum(p.numel() for p in head.parameters()) == count


@pytest.mark.parametrize("grid, out", [((3, 16, 16), (3, 4, 4)), ((3, 8, 8), (3, 2, 2)), ((1, 4, 4), (1, 2, 2))])
def test_head_starts_at_zero_logits(grid, out):
    head = M.RFSHead(16, taps=3, channels=16, grid=grid)
    logits = head([torch.randn(2, grid[0] * grid[1] * grid[2], 16) for _ in range(6)])
    assert logits.shape == (2, *out) and logits.abs().max() == 0


def test_tap_blocks():
    assert {n: M.tap_blocks(n) for n in (4, 6, 8, 10, 30, 36)} == {
        4: (1, 2, 3), 6: (2, 3, 5), 8: (3, 5, 7), 10: (4, 6, 9), 30: (13, 21, 29), 36: (15, 25, 35)}


# ----------------------------------------------------------------------------
# the video code


def smooth_video(B=2, F=9, size=32):
    """Random moving gradients: something a linear code can hold."""
    coarse = 0.3 * torch.randn(B, 3, 3, 4, 4)
    return torch.nn.functional.interpolate(coarse, (F, size, size), mode="trilinear", align_corners=True)


def test_patch_code_round_trip():
    video = smooth_video()
    vae = M.PatchVAE()
    vae.fit(video)
    z = vae.encode(video)
    assert z.shape == (2, 16, 3, 8, 8)
    assert z.flatten(2).square().mean().item() == pytest.approx(1, abs=0.15)            # unit variance overall
    back = vae.decode(z)
    assert back.shape == video.shape and (back - video).square().mean() < 1e-3
    still = vae.decode(vae.encode(video[:, :, :1]))         # an image is a clip of one frame
    assert (still - video[:, :, :1]).square().mean() < 1e-3


def test_patch_code_is_the_best_linear_one():
    video = smooth_video()
    vae = M.PatchVAE()
    vae.fit(video)
    patches = torch.stack(list(vae.patches(video)), dim=1).flatten(0, 3)
    x = patches - patches.mean(0)
    best = torch.linalg.svdvals(x.double())[16:].square().sum() / x.numel()             # Eckart-Young
    z = rearrange(vae.encode(video), "B C T H W -> (B T H W) C")
    error = (z * vae.scale @ vae.basis.T + vae.mean - patches).square().mean()
    assert error.item() == pytest.approx(best.item(), rel=2e-2, abs=1e-7)
    assert (vae.basis.gather(0, vae.basis.abs().argmax(0, keepdim=True)) > 0).all()     # the same signs on every rank


def test_channels_are_scaled_by_the_root_of_their_deviation():
    """Which decides how much a loss of latents counts each of them."""
    vae, video = M.PatchVAE(), smooth_video()
    vae.fit(video)
    ratio = (vae.encode(video).transpose(0, 1).flatten(1).std(1) / vae.scale)[:8]      # both go as it does
    torch.testing.assert_close(ratio, ratio[:1].expand(8), rtol=0.02, atol=0)


def test_patch_code_overlaps():
    vae = M.PatchVAE()
    video = torch.randn(1, 3, 5, 24, 32)
    lapped = vae.lap(video.clone(), 0.5)
    torch.testing.assert_close(vae.lap(lapped.clone(), -0.5), video)
    torch.testing.assert_close(lapped.square().sum(), video.square().sum())                     # orthogonal
    torch.testing.assert_close(vae.lap(torch.ones_like(video), 0.5), torch.ones_like(video))
    row = vae.lap(torch.tensor([0, 0, 1, 0, 0, 0, 0, 0.0]).expand(1, 3, 1, 8, 8).clone(), math.pi / 2)
    torch.testing.assert_close(row[0, 0, 0, 0], torch.tensor([0, 0, 0.5, 0.5, -0.5, 0.5, 0, 0]))  # (u, v) -> (-v, u)
    vae.fit(smooth_video())
    z = torch.zeros(1, 16, 2, 6, 6)
    z[0, :, 1, 2, 3] = 1
    drawn = (vae.decode(z) - vae.decode(0 * z)).abs().amax(dim=(0, 1, 2))
    rows, columns = (drawn > 1e-6).nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (6, 13, 10, 17)    # 8 x 8 px for one latent


def test_what_has_no_latent_stays():
    vae = M.PatchVAE()
    vae.fit(smooth_video())
    fine = torch.rand(1, 3, 9, 16, 16)                          # noise, of which 16 numbers a patch hold little
    z = vae.encode(fine)
    torch.testing.assert_close(vae.draw_onto(fine, z, z), fine)
    change = torch.randn_like(z)
    drawn, want = vae.draw_onto(fine, z, z + change) - fine, vae.decode(change) - vae.decode(0 * change)
    for k in range(0, fine.shape[2] - 1, 4):                    # where latents meet half of the jump is left
        quarter = (want[:, :, k + 1] - want[:, :, k]) / 4
        want[:, :, k] += quarter
        want[:, :, k + 1] -= quarter
    torch.testing.assert_close(drawn, want, atol=1e-5, rtol=0)


def test_patches_that_do_not_agree_show_no_grid():
    """On a real clip: what a 4x enlargement lacks, with a random sign for each token, so that no two of them agree."""
    hr = media.read_video(f"{ROOT}/samples/val/bbb_108.mp4")[:5, :320, :480]
    hr = data.to_tensor(hr)[None]
    low = data.upsample(torch.nn.functional.interpolate(hr[0].transpose(0, 1), scale_factor=0.25, mode="area")
                        .transpose(0, 1)[None], (320, 480))
    grid = {}
    for angles in ((0.0, 0.0), M.PatchVAE.angles):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(M.PatchVAE, "angles", angles)
            vae = M.PatchVAE()
            vae.fit(hr)
            z_lr, z = vae.encode(low), vae.encode(hr)
            sign = 2.0 * torch.randint(0, 2, (1, 1, 2, 40, 60)).repeat_interleave(2, 3).repeat_interleave(2, 4) - 1
            grid[angles] = [metrics.grid(data.to_uint8(vae.draw_onto(low, z_lr, x)))
                            for x in (z, z_lr + sign * (z - z_lr))]
    apart, lapped = grid.values()
    assert apart[1] > 1.5 and 0.85 < lapped[0] < 1.05 and 0.95 < lapped[1] < 1.12


def test_patch_code_refuses_wrong_sizes():
    with pytest.raises(ValueError, match=r"4 n \+ 1"):
        M.PatchVAE().encode(torch.zeros(1, 3, 8, 16, 16))
    with pytest.raises(ValueError, match="multiples of 4"):
        M.PatchVAE().encode(torch.zeros(1, 3, 9, 16, 18))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_compiled_blocks_are_one_piece_of_code_and_the_same_network():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net, z, t = tiny_net(layers=3).requires_grad_(False), torch.randn(1, 16, 2, 4, 4), torch.rand(1)
    want = net(z, t, z, M.prompt(z))
    M.compile_blocks(net)
    assert (net(z, t, z, M.prompt(z)) - want).abs().max() < 1e-4 * want.std()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_velocity_is_not_rounded_under_autocast():
    """As in Wan's own code the last linear layer is fp32, like the sum of blocks that it reads."""
    net = tiny_net()
    seen = []
    net.head.head.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    z = torch.randn(1, 16, 2, 4, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        v = net(z, torch.ones(1), z, M.prompt(z))
    assert v.dtype == torch.float32 and seen == [(torch.float32, torch.float32)]


# ----------------------------------------------------------------------------
# loading


def test_checkpoint_errors_are_one_clear_line(tmp_path):
    with pytest.raises(SystemExit, match="no such checkpoint"):
        M.load_checkpoint(str(tmp_path / "none.pt"))
    (tmp_path / "noise.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(SystemExit, match="run stage1_pd.py first, or name another --out"):
        M.load_checkpoint(str(tmp_path / "stage1/last.pt"))
    with pytest.raises(SystemExit, match="not a checkpoint of this project"):
        M.load_checkpoint(str(tmp_path / "noise.pt"))
    torch.save({"config": {"model": "tiny"}}, tmp_path / "else.pt")
    with pytest.raises(SystemExit, match="it has no 'stage'"):
        M.load_checkpoint(str(tmp_path / "else.pt"))
    net, vae = M.build("tiny"), M.PatchVAE()
    good = {"stage": "stage1", "config": {"model": "tiny"}, "step": 3, "total": 9, "student": net.state_dict(),
            "vae": vae.state_dict()}
    torch.save(good, tmp_path / "good.pt")
    loaded, _, config = M.load_checkpoint(str(tmp_path / "good.pt"))
    assert config == good["config"] and torch.equal(loaded.prompts, net.prompts)
    with pytest.raises(SystemExit, match="unfinished, step 3 of 9"):
        M.load_checkpoint(str(tmp_path / "good.pt"), finished=True)
    M.export(str(tmp_path / "good.pt"), "student", str(tmp_path / "small.pt"))
    small, _, _ = M.load_checkpoint(str(tmp_path / "small.pt"))
    assert small.prompts.dtype == torch.float32 and (small.prompts - net.prompts).abs().max() < 2e-3
    with pytest.raises(SystemExit, match="without 'step'"):
        M.load_checkpoint(str(tmp_path / "good.pt"), "step")
    with pytest.raises(SystemExit, match="without 'ema'; it has student"):
        M.load_checkpoint(str(tmp_path / "good.pt"), "ema")
    torch.save(good | {"student": tiny_net().state_dict()}, tmp_path / "other.pt")
    with pytest.raises(SystemExit, match="another preset"):
        M.load_checkpoint(str(tmp_path / "other.pt"))
    with pytest.raises(SystemExit, match="tiny, small, wan1.3b"):
        M.build("large")
