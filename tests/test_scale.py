"""What large models need: adapters, checkpointing, half a frozen net, and the costs that --dry-run prints."""
import copy

import pytest
import torch

import common
import cost
import data
import model as M
import stage0_teacher as stage0
import stage1_pd as stage1
import stage2_dual as stage2
import stage3_dpo as stage3
from tests.test_maths import tiny_net


def inputs(B=2):
    z, z_lr = torch.randn(2, B, 16, 2, 4, 4)
    return z, torch.rand(B), z_lr, M.prompt(z)


def test_adapters_start_at_nothing_and_merge():
    net = tiny_net()
    plain, before = copy.deepcopy(net), inputs()
    M.LoRA(net, 3)
    assert torch.equal(net(*before), plain(*before))
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    assert trained and all(name.startswith("lora.") for name in trained)
    for up in net.lora.up:
        torch.nn.init.normal_(up.weight, std=0.1)
    state = M.merged(net)
    assert set(state) == set(plain.state_dict())
    plain.load_state_dict(state)
    out = net(*before)
    torch.testing.assert_close(plain(*before), out, atol=1e-5, rtol=1e-4)
    out.square().mean().backward()
    assert all(p.grad is None for name, p in net.named_parameters() if not name.startswith("lora."))
    assert all(p.grad.abs().sum() > 0 for p in net.lora.parameters())


def test_checkpointing_gives_the_same_gradients():
    """To the weights, and through a frozen net to its input, features included: the reentrant kind would give none."""
    net, (z, t, z_lr, text) = tiny_net(), inputs()
    for frozen in (False, True):
        net.requires_grad_(not frozen)
        found = []
        for net.checkpointing in (False, True):
            net.zero_grad(set_to_none=True)
            x = z.clone().requires_grad_(frozen)
            v, features = net(x, t, z_lr, text, taps=(0, 1))
            (v.square().mean() + sum(f.square().mean() for f in features)).backward()
            found.append([x.grad] if frozen else [p.grad for p in net.parameters() if p.grad is not None])
        assert len(found[0]) == len(found[1]) > 0
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


def test_half_a_frozen_net_is_what_autocast_makes_of_it():
    net, x = tiny_net(), inputs()
    half = M.to_bf16(copy.deepcopy(net))
    assert half.blocks[0].ffn[0].weight.dtype == torch.bfloat16 and half.head.head.weight.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(*x), half(*x))


def test_a_forward_is_counted_in_closed_form():
    """Every matrix product of the tiny DiT, by hand: 2 FLOPs a multiplication."""
    row, N = M.MODELS["tiny"], 3 * 12 * 12
    D, P = row["dim"], row["prompt_len"]
    block = 2 * N * (4 * D * D + 2 * D * D + 2 * D * row["ffn"]) + 2 * P * 2 * D * D + 4 * N * N * D + 4 * N * P * D
    ends = 2 * N * D * (2 * 16 * 4) + 2 * N * D * 64 + 2 * P * (64 * D + D * D) + 2 * (256 * D + D * D + 6 * D * D)
    W = row["predictor"]
    ends += 2 * 4 * N * 9 * (16 * W + 6 * W * W + W * 16)               # 3 x 3 of 4 N latents: the first guess
    flops, attention = cost.forward_flops("tiny", (16, 3, 24, 24))
    assert flops == row["layers"] * block + ends
    assert attention == pytest.approx(row["layers"] * 4 * N * N * D / flops)


def said(capsys, stage, argv):
    total = stage.main(common.parse_config(stage.Config, stage.PRESETS, [*argv, "--dry-run"]))
    return total, capsys.readouterr().out


@pytest.mark.parametrize("side, window, forward, iteration, kept", [
    (640, 6, 42.1, 32.1, 40.9 + 2 * 21.3), (960, 6, 142.2, 33.1, 91.6 + 2 * 47.8)])     # 960 x 960: as many as 720p
def test_dry_run_of_stage2_at_the_real_size(capsys, monkeypatch, side, window, forward, iteration, kept):
    """Nominally 30 forwards' worth an iteration, 36 with checkpointing. TFLOP of a forward, forwards' worth of FLOPs of
    an iteration, GB kept without checkpointing: counted once on other code, diffusers' model of the same size."""
    monkeypatch.setitem(data.CLIPS, "wan1.3b", data.CLIPS["wan1.3b"] | dict(size=side, crop=side, window=window))
    one = ["--preset", "wan1.3b", "--accumulate", "1"]
    plain, text = said(capsys, stage2, [*one, "--no-checkpointing"])
    tokens = window * side * side // 256
    assert plain["forwards"] == 30 and "1419.10 M" in text and f"{tokens} tokens" in text
    assert float(text.split("F = ")[1].split()[0]) == pytest.approx(forward, rel=0.01)
    assert plain["flops"] / 1e12 == pytest.approx(iteration * forward, rel=0.02)
    states = 2 * 18 * 1.4191 + 2 * 1.4191 + 4 * 1.4191                  # student, fake; real; average
    assert plain["bytes"] / 1e9 - states == pytest.approx(kept, rel=0.05)
    again, text = said(capsys, stage2, one)
    assert again["forwards"] == 36 and again["flops"] / 1e12 == pytest.approx((iteration + 6) * forward, rel=0.02)
    inputs, block = tokens * 4 * 1536 * 30 / 1e9, tokens * 142e3 / 1e9          # of 30 blocks, in fp32; a whole one
    assert again["bytes"] / 1e9 - states == pytest.approx(3 * inputs + block, rel=0.05)
    rows = {line.split("  ")[0]: [int(x) for x in line.split()[-6:-3]] for line in text.splitlines()
            if line.startswith(("student", "real", "fake"))}
    assert rows == {"student": [3, 0, 1], "fake": [4, 1, 3], "real": [7, 1, 0]}       # alone, of the input, full
    if side == 640:
        eight = said(capsys, stage2, ["--preset", "wan1.3b"])[0]
        assert eight["flops"] == pytest.approx(8 * again["flops"]) and eight["bytes"] == again["bytes"]


def test_dry_run_of_the_other_stages(capsys):
    whole = said(capsys, stage3, ["--preset", "wan1.3b", "--lora", "0"])[0]
    adapters, text = said(capsys, stage3, ["--preset", "wan1.3b"])
    assert adapters["bytes"] < 0.6 * whole["bytes"] and "adapted" in text
    size, = (float(line.split()[-1]) for line in text.splitlines() if " adapted " in line)
    with torch.device("meta"):
        net = M.build("wan1.3b")
        count = sum(p.numel() for p in net.parameters())
        lora = sum(p.numel() for p in M.LoRA(net, stage3.PRESETS["wan1.3b"]["lora"]).parameters())
    # frozen fp32 weights; of the adapters weights, gradient, AdamW's two moments, and a bf16 copy
    assert size == pytest.approx((4 * count + 18 * lora) / 1e9, abs=0.01)
    for preset, tokens in (([], "720 tokens"), (["--preset", "wan1.3b"], "9600 tokens")):
        total, text = said(capsys, stage0, [*preset, "--accumulate", "1"])
        assert total["forwards"] == (4 if preset else 3) and tokens in text        # one more with checkpointing
        total, text = said(capsys, stage1, [*preset, "--accumulate", "1"])
        assert total["forwards"] == (6 if preset else 5) and tokens in text        # and the teacher's two
    frozen = [float(line.split()[-1]) for line in text.splitlines() if " frozen " in line]
    assert frozen == pytest.approx([4 * count / 1e9] * 2, abs=0.01)                # fp32: the next phase trains it
    with pytest.raises(SystemExit, match="batch 0: at least 1"):
        said(capsys, stage2, ["--batch", "0"])


def test_a_pass_over_two_samples_costs_twice_one(capsys):
    """Stage III passes a winner and a loser of each pair."""
    cfg = stage3.Config(**stage3.PRESETS["tiny"])
    one, two = (cost.report("x", cfg, stage3.passes(cfg), clips=n) for n in (1, 2))
    assert two["flops"] == 2 * one["flops"] and two["forwards"] == one["forwards"]
    asked = said(capsys, stage3, [])[0]
    assert asked == two and two["bytes"] > one["bytes"]


@pytest.mark.parametrize("kind", ["trained", "adapted"])
def test_saved_bytes_are_those_of_a_real_backward(kind):
    """All that autograd keeps of a whole tiny DiT, measured, against the estimate from one block."""
    net, kept = M.build("tiny"), {}
    if kind == "adapted":
        M.LoRA(net, 4)
    clip = data.CLIPS["tiny"]
    side = clip["crop"] // M.PatchVAE.stride
    z = torch.randn(2, 16, clip["window"], side, side)
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(), x
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        net(z, torch.rand(2), z, M.prompt(z))
    tokens = 2 * clip["window"] * side * side // 4
    measured = sum(n for n, _ in kept.values()) / tokens / len(net.blocks)
    assert cost.saved_bytes("tiny", kind, 4) == pytest.approx(measured, rel=0.15)
    assert cost.saved_bytes("tiny", "input") < 0.7 * measured


def test_the_real_base_asks_for_its_files(tmp_path, capsys):
    for argv, words in (([], "weights, --vae, --prompts"), (["--weights", "x", "--vae", "y"], "--prompts")):
        with pytest.raises(SystemExit, match=words):
            stage0.main(common.parse_config(stage0.Config, stage0.PRESETS, [
                "--preset", "wan1.3b", "--out", str(tmp_path / "w"), *argv]))
    film = ["--out", str(tmp_path / "t"), "--data", "samples/train"]
    for argv, words in ((["--vae", "y", "--weights", "x"], "--weights, --vae: not read here .tiny starts from scratch"),
                        (["--init", "z", "--prompts", "y"], "--prompts: not read here .--init has it"),
                        (["--preset", "wan1.3b", "--latents", "l", "--weights", "x", "--prompts", "y", "--vae", "z"],
                         "--vae: not read here .--latents has it")):
        with pytest.raises(SystemExit, match=words):
            stage0.main(common.parse_config(stage0.Config, stage0.PRESETS, [*argv, *film]))
    with pytest.raises(SystemExit, match="no such|not a|unknown|one of"):
        stage0.main(common.parse_config(stage0.Config, stage0.PRESETS, ["--model", "huge"]))
