"""The bench: what it counts is what closed forms say, and each command prints its lines."""
import gc
import re
import shutil
import statistics
import sys
from collections import Counter

import pytest
import torch

import bench
import data
import infer
import model as M
import stage2_dual

TOY = dict(dim=48, layers=2, heads=2, ffn=80, text_dim=24, prompt_len=5)


def dit_flops(N, dim, layers, heads, ffn, text_dim, prompt_len, predictor=0, backward=False, **other):
    """FLOPs of one sample of N tokens through the DiT. Backward: two products for each of a layer, five for the two of
    attention; inputs of the network get no gradient, so none is passed on to them (to the first guess it is)."""
    block = 2 * N * dim * (6 * dim + 2 * ffn) + 4 * prompt_len * dim * dim
    attention = 4 * N * (N + prompt_len) * dim
    guess = 2 * 4 * N * 9 * predictor                       # 3 x 3 latents; then 16 to the width, 6 of it, back to 16
    first = 2 * (prompt_len * text_dim * dim + 256 * dim) + guess * 16
    rest = 2 * (prompt_len * dim * dim + 7 * dim * dim + N * dim * 64) + guess * (6 * predictor + 16)
    embed = 2 * N * 128 * dim
    parts = first + (0 if predictor else embed), layers * block + rest + (embed if predictor else 0), layers * attention
    return sum(n * p for n, p in zip((2, 3, 3.5) if backward else (1, 1, 1), parts, strict=True))


@pytest.fixture
def rows(monkeypatch):
    """Toy sizes; {name of a line: (seconds, FLOPs, rate)} of what is shown."""
    seen, show = {}, bench.show

    def keep(name, *numbers):
        seen[name] = numbers
        show(name, *numbers)
    monkeypatch.setattr(bench, "show", keep)
    monkeypatch.setattr(bench, "YARDSTICK", TOY)
    monkeypatch.setattr(bench, "MATMUL", {"cpu": (384, torch.float32)})
    monkeypatch.setattr(bench, "SIZES", {"tiny": dict(dit=(1, 2, 8, 8), stage2=(2, 1, 8, 8), inference=(7, 8))})
    monkeypatch.setattr(bench, "span", lambda: None)
    return seen


def run(what, rows, capsys, *flags, repeats=2):
    """Run a command; checks its lines, as shown and as printed, and returns what was printed."""
    bench.main([what, "--device", "cpu", "--repeats", str(repeats), *flags])
    said = capsys.readouterr().out
    assert said.startswith(bench.machine(torch.device("cpu"))) and torch.__version__ in said.splitlines()[0]
    for name, (seconds, flops, rate) in rows.items():
        assert len(seconds) == (3 if name.startswith("matmul") else repeats) and min(seconds) > 0, name
        line = re.search(rf"^{re.escape(name)} +([\d.]+) s  \(([\d.]+) to ([\d.]+)\)  (.*)$", said, re.M)
        assert [float(x) for x in line.groups()[:3]] == pytest.approx(
            [statistics.median(seconds), min(seconds), max(seconds)], abs=1e-4)
        if flops:
            share = flops / statistics.median(seconds) / rate
            assert 0 < share <= 1.5, name
            speed, percent = re.fullmatch(r" *([\d.]+) GFLOP/s +([\d.]+)%", line[4]).groups()
            assert float(percent) == pytest.approx(100 * share, abs=0.1)
            assert float(speed) == pytest.approx(share * rate / 1e9, abs=0.1)
        else:
            assert line[4].strip() == "-"
    return said


@pytest.mark.parametrize("size", [TOY, TOY | dict(dim=64, heads=1, layers=3), TOY | dict(predictor=8)])
def test_flops_are_those_of_the_closed_form(size):
    net, flops = M.DiT(**size, learned=False), Counter()
    z, t = torch.randn(2, 16, 3, 4, 6), torch.rand(2)
    with bench.count(flops, "forward"), torch.no_grad():
        net(z, t, z, M.prompt(z))
    with bench.count(flops, "both"):
        net(z, t, z, M.prompt(z)).sum().backward()
    N = 3 * 2 * 3
    assert flops["forward"] == 2 * dit_flops(N, **size)
    assert flops["both"] == 2 * dit_flops(N, **size, backward=True)


def test_dit_compares_the_same_network(rows, capsys):
    said = run("dit", rows, capsys)
    assert float(re.search(r"differ by (\S+) of", said)[1]) < 1e-4
    for what, backward in (("forward", False), ("forward + backward", True)):
        ours, theirs = rows[f"ours, {what}"], rows[f"diffusers, {what}"]
        assert ours[1] == theirs[1] == dit_flops(2 * 4 * 4, **TOY, backward=backward)
        ratio = re.search(rf"^ours / diffusers, {re.escape(what)} +([\d.]+) ", said, re.M)[1]
        assert float(ratio) == pytest.approx(statistics.median(
            a / b for a, b in zip(ours[0], theirs[0], strict=True)), abs=1e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_compiled_networks_are_timed_beside_the_others(rows, capsys):
    said = run("dit", rows, capsys, "--compile")
    assert float(re.search(r"differ by (\S+) of", said)[1]) < 1e-4       # the largest of all four
    for what in ("forward", "forward + backward"):
        for label, a, b in (("both compiled", "ours, compiled", "diffusers, compiled"),
                            ("ours compiled / diffusers", "ours, compiled", "diffusers")):
            ratio = re.search(rf"^{label}, {re.escape(what)} +([\d.]+) ", said, re.M)[1]
            (seconds, flops, _), (others, same, _) = rows[f"{a}, {what}"], rows[f"{b}, {what}"]
            assert flops == same and float(ratio) == pytest.approx(statistics.median(
                x / y for x, y in zip(seconds, others, strict=True)), abs=1e-3)


def test_dit_without_diffusers_says_so(rows, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "diffusers is not installed" in run("dit", rows, capsys) and len(rows) == 1


def test_stage2_runs_the_iteration_of_stage2_dual(rows, capsys, monkeypatch):
    calls = Counter()

    def counted(name, loss):
        return lambda *args: calls.update([name]) or loss(*args)
    losses = "hinge_d", "hinge_g", "fm_loss", "dmd_loss", "dmd_gradient"
    for name in losses:
        monkeypatch.setattr(stage2_dual, name, counted(name, getattr(stage2_dual, name)))
    run("stage2", rows, capsys, repeats=1)
    assert calls == {name: 2 * n for name, n in zip(losses, (3, 1, 1, 1, 1), strict=True)}      # counted, then timed
    forward = 2 * dit_flops(1 * 4 * 4, **M.MODELS["tiny"])
    passes = {"student": 4, "real score": 8, "fake score": 8}                           # COST: 3 auxiliary, 1 student
    assert {k: rows[f"{k}, forward"][1] / forward for k in passes} == passes
    student, auxiliary = (rows[f"backward, {k}"][1] / forward for k in ("student update", "auxiliary updates"))
    guess = 1 - 2 * dit_flops(1 * 4 * 4, **M.MODELS["tiny"] | {"predictor": 0}) / forward   # no gradient goes to z_lr
    assert 4 < student + 2 * guess < 5 and 6 < auxiliary < 7    # 2 + 1 + 1, 3 x 2; the head, the weights of attention
    parts = [numbers[1] for name, numbers in rows.items() if name != "one iteration" and "matmul" not in name]
    assert rows["one iteration"][1] == sum(parts) and not rows["clipping and optimiser steps"][1]


def test_memory_of_a_gpu_is_told_by_part(capsys, monkeypatch):
    monkeypatch.setattr(bench, "PEAK", Counter(forward=51.2e9, backward=57.0e9))
    bench.show_all({"forward": ([1.0], 0), "backward": ([2.0], 0)}, "total", 1e12)
    assert capsys.readouterr().out.splitlines()[-1] == "peak memory 57.0 GB: forward 51.2, backward 57.0"


@pytest.mark.parametrize("flags", [(), pytest.param(("--compile",), marks=pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU"))])
def test_inference_runs_in_tiles_of_the_code_of_the_preset(rows, capsys, monkeypatch, flags):
    build, names = M.build_vae, []
    monkeypatch.setattr(M, "build_vae", lambda name: names.append(name) or build(name))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    said = run("inference", rows, capsys, *flags)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(flags) == ("compiled" in said)
    assert names == ["tiny"] and "21 frames, 32 x 32" in said                           # 28 rows: whole tokens
    stride = build("tiny").stride
    side = 32 // stride // 2                                                            # 6 latent frames, 5 at once
    assert rows["transformer, one step"][1] == 2 * dit_flops(5 * side * side, **M.MODELS["tiny"])
    parts = [rows[name] for name in ("upsample and encode", "transformer, one step", "decode")]
    assert rows["total"][1] == sum(part[1] for part in parts) and parts[0][1] > 0 and parts[2][1] > 0
    assert rows["total"][0] == pytest.approx([sum(x) for x in zip(*(part[0] for part in parts), strict=True)])


def test_student_times_a_chunk_per_kept_frame(rows, capsys, monkeypatch):
    frames, spent = [], []

    def upscaler(lr):
        frames.append(len(lr))
        return data.to_tensor(lr).repeat_interleave(4, 2).repeat_interleave(4, 3)
    measure = bench.measure

    def kept(work, *args):
        spent.append(measure(work, *args))
        return spent[-1]
    monkeypatch.setattr(infer, "load", lambda *args: upscaler)
    monkeypatch.setattr(bench, "measure", kept)
    assert "not installed" in run("student", rows, capsys)
    assert frames == [53] * 3                                                           # counted once, timed twice
    assert rows["student, chunks of 53, 4 shared"][0] == [s / 48 for s in spent[-1]["chunk"][0]]


def test_all_runs_all(monkeypatch, rows, capsys):
    order = []
    monkeypatch.setattr(bench, "BENCHES", {name: lambda *args, name=name: order.append((name, args[0], args[2]))
                                           for name in bench.BENCHES})
    bench.main(["--device", "cpu", "--repeats", "4"])
    assert order == [(name, "tiny", 4) for name in ("dit", "stage2", "inference", "student")]


def test_mistakes_get_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, args in (("needs a GPU", ["--preset", "wan1.3b"]), ("at least 1", ["--repeats", "0"]),
                        ("not available", ["--device", "cuda"]), ("--compile", ["student", "--compile"]),
                        ("invalid choice", ["teacher"])):
        with pytest.raises(SystemExit, match=words) as stop:
            bench.main(args)
        assert isinstance(stop.value.code, str) and "\n" not in stop.value.code


def test_every_preset_has_sizes_that_fit():
    assert set(bench.SIZES) == set(M.MODELS) and set(bench.YARDSTICK) <= set(M.MODELS["tiny"])
    for name, sizes in bench.SIZES.items():
        assert all(n % 2 == 0 for k in ("dit", "stage2") for n in sizes[k][2:]), name
        if name != "wan1.3b":                                           # that one is timed at the paper's sizes
            clip, stride = data.CLIPS[name], M.build_vae(name).stride
            assert sizes["stage2"][1:] == (clip["window"], clip["crop"] // stride, clip["crop"] // stride)


def test_counting_keeps_no_activations_alive():
    """What checkpointing computes again is freed while FLOPs are counted, too: at 1.3B it would fill a GPU."""
    def alive():
        gc.collect()
        found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in gc.get_objects()
                 if type(x) in (torch.Tensor, torch.nn.Parameter)}
        return sum(found.values())
    net = M.build("tiny").requires_grad_(True)
    net.checkpointing = True
    z = torch.randn(1, 16, 3, 16, 16)
    with bench.count(Counter(), "step"):
        net(z, torch.ones(1), z, M.prompt(z)).sum().backward()
        counting = alive()
    assert counting < 1.05 * alive()
