"""Configuration, shared noise, and the precision that small updates need."""
import contextlib
import os
import resource
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import ablate
import bench
import common
import evaluate
import infer
import model as M


@dataclass
class Config:
    out: str = "out"                # a folder
    steps: int = 10                 # how many
    rate: float = 0.5               # 50 % of something
    batch: int = 1                  # of clips
    accumulate: int = 1             # of batches
    resume: bool = False            # go on
    grid: tuple = (4, 2)            # numbers
    log_every: int = 100            # steps


PRESETS = {"tiny": dict(steps=3), "small": dict(steps=5, rate=1.0)}


def test_later_wins():
    assert common.parse_config(Config, PRESETS, []) == Config(steps=3)
    assert common.parse_config(Config, PRESETS, ["--preset", "small", "--rate", "2"]) == Config(steps=5, rate=2.0)
    given = ["--steps", "7", "--resume", "--grid", "8", "4", "2"]
    assert common.parse_config(Config, PRESETS, given) == Config(steps=7, resume=True, grid=(8, 4, 2))
    assert common.parse_config(Config, PRESETS, ["--no-resume"]).resume is False
    for name in ("--log-every", "--log_every"):
        assert common.parse_config(Config, PRESETS, [name, "7"]).log_every == 7


@pytest.mark.parametrize("argv", [["--stepz", "3"], ["--step", "3"], ["--steps", "many"], ["--preset", "huge"], ["x"]])
def test_bad_flags_are_one_line(argv):
    with pytest.raises(SystemExit) as stop:
        common.parse_config(Config, PRESETS, argv)
    assert "\n" not in stop.value.code and "--help" in stop.value.code


def test_help_is_the_comment(capsys):
    with pytest.raises(SystemExit):
        common.parse_config(Config, PRESETS, ["--help"])
    assert "50 % of something" in capsys.readouterr().out


def test_ranks_share_one_draw():
    draws = []
    for rank, world, batch in ((0, 1, 6), (0, 2, 3), (1, 2, 3)):
        common.reseed(1, "stage", 5)
        draws.append(common.draw(torch.randn, (batch, 2), rank, world, "cpu"))
    assert torch.equal(draws[0], torch.cat(draws[1:])) and not torch.equal(draws[1], draws[2])
    common.reseed(1, "stage", 6)
    assert not torch.equal(draws[0], common.draw(torch.randn, (6, 2), 0, 1, "cpu"))


def test_gradients_are_averaged_in_the_last_part_alone():
    """Over processes: in DDP's no_sync() but for a process's last part; all parts belong to one process each."""
    quiet = []

    class Wrapped:
        @contextlib.contextmanager
        def no_sync(self):
            quiet.append(self)
            yield
    assert common.my_parts(0, 6, 2) == [(0, False), (2, False), (4, True)]
    assert common.my_parts(1, 6, 2) == [(1, False), (3, False), (5, True)]
    for last, count in ((False, 1), (True, 1)):
        with common.accumulating(last, Wrapped(), torch.nn.Identity()):
            assert len(quiet) == count


def test_save_is_atomic(tmp_path):
    path = str(tmp_path / "last.pt")
    common.save(path, Config(), "stage1", 1, 2, x={"a": torch.ones(1)})

    class Broken:
        def state_dict(self):
            raise RuntimeError("disk full")
    with pytest.raises(RuntimeError):
        common.save(path, Config(), "stage1", 2, 2, x=Broken())
    assert torch.load(path, weights_only=True)["step"] == 1


def test_an_error_of_the_gpu_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def failing(*args):
        raise RuntimeError("CUDA error: device-side assert triggered")
    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(RuntimeError, match="device-side"):
        common.put_state(tmp_path / "last.pt", {})


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(tmp_path):
    """A limit on the size of files stands in for the disk."""
    path, before = tmp_path / "last.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    common.put_state(path, {"x": torch.zeros(4)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(SystemExit, match="last.pt: cannot be written, is the disk full?") as e:
            common.put_state(path, {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(e.value) and os.listdir(tmp_path) == ["last.pt"]
    assert len(torch.load(path, weights_only=True)["x"]) == 4


def test_a_kill_while_a_log_is_rewritten_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    common.put(path, '{"step": 1}\n')
    monkeypatch.setattr(common.os, "replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        common.put(path, "")
    assert common.read_log(tmp_path) == [{"step": 1}]
    with open(path, "a") as f:
        f.write('{"step": 2, "lo')                                      # cut short: skipped
    assert common.read_log(tmp_path) == [{"step": 1}]


def test_weights_are_fp32_because_bf16_would_not_move():
    assert {p.dtype for p in M.build("tiny").parameters()} == {torch.float32}
    w = (0.02 * torch.randn(1_000_000)).bfloat16()
    moved = ((w.float() + 2e-6 * torch.randn(1_000_000).sign()).bfloat16() != w).float().mean().item()
    assert moved == pytest.approx(0.039, abs=0.004)
    w = w.float()
    assert (w + 2e-6 != w).float().mean() > 0.99


def test_a_step_is_as_long_as_the_norm_allows_and_left_out_where_it_is_not_finite():
    net = torch.nn.Linear(2, 1, bias=False)
    sgd, before = torch.optim.SGD(net.parameters(), lr=1.0), net.weight.detach().clone()
    for gradient, norm, moved in (([3.0, 4.0], 5, [0.6, 0.8]), ([3.0, torch.inf], torch.inf, [0.6, 0.8]),
                                  ([torch.nan, 4.0], torch.nan, [0.6, 0.8]), ([0.0, 0.5], 0.5, [0.6, 1.3])):
        net.weight.grad = torch.tensor([gradient])
        assert common.clip_and_step(sgd, net, 1.0).item() == pytest.approx(norm, nan_ok=True)
        torch.testing.assert_close(before - net.weight.detach(), torch.tensor([moved]))


def test_average_of_weights():
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    want = 0.9 * a.weight.detach() + 0.1 * b.weight.detach()
    common.ema_update(a, b, 0.9)
    torch.testing.assert_close(a.weight, want)


def test_contents_tell_checkpoints_apart(tmp_path):
    state = {"a": torch.arange(4.0), "step": 1}
    torch.save(state, tmp_path / "one.pt")
    torch.save(state, tmp_path / "copy.pt")
    seen = {common.contents(tmp_path / name) for name in ("one.pt", "copy.pt")}
    assert len(seen) == 1
    for state in {"a": torch.arange(4.0).mul_(1 + 1e-6), "step": 1}, {"a": torch.arange(4.0), "step": 2}:
        torch.save(state, tmp_path / "other.pt")
        seen.add(common.contents(tmp_path / "other.pt"))
    assert len(seen) == 3


def test_an_edit_during_a_run_does_not_change_its_code(monkeypatch):
    now = common.code(M)
    monkeypatch.setattr(common.inspect, "getsource", lambda module: "edited = True")
    assert common.code(M) == now
    common.parsed.cache_clear()
    assert common.code(M) != now
    common.parsed.cache_clear()


def test_more_processes_than_gpus_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit, match="--nproc_per_node=1; or CUDA_VISIBLE_DEVICES= for CPUs"):
        common.setup()


@pytest.mark.parametrize("main", [lambda: evaluate.main(evaluate.Config()), lambda: ablate.main(["streams"]),
                                  lambda: infer.main(["in.mp4", "out.mp4"]), lambda: bench.main([])])
def test_what_shares_no_work_refuses_torchrun(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="leave out torchrun"):
        main()
    assert not list(tmp_path.iterdir())


def test_a_line_of_the_log_has_the_peak_memory_of_its_steps(monkeypatch, tmp_path):
    """On a GPU; that of a panel, which decodes, is no step's."""
    peak, bar = [0], tqdm(disable=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 0))
    for step, (work, picture) in enumerate(((66_280_000_000, 80e9), (65e9, 0)), 1):
        peak[0] = max(peak[0], work)
        common.log(tmp_path, bar, step, loss=0.5)
        peak[0] = picture
        common.panel(f"{tmp_path}/panel.png", {"HR": torch.zeros(1, 3, 1, 8, 8)})
    assert [line["memory_gb"] for line in common.read_log(tmp_path)] == [66.28, 65]


def test_pictures_before_the_first_step_plot_no_log(tmp_path):
    common.panel(f"{tmp_path}/pairs.png", {"LR": torch.zeros(1, 3, 1, 8, 8)})
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.png"]


LEAVE = """
import sys, torch, common
rank, world, device = common.setup()
ddp = common.parallel(torch.nn.Linear(8, 8), world)
ddp(torch.randn(2, 8)).sum().backward()
sys.setswitchinterval(100)          # gloo's thread waits for Python as long as it would on a busy machine
for i in range(100):
    common.mean(i)
common.cleanup()
"""


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(3))
def test_leaving_the_process_group_does_not_abort(attempt):
    """Without the pause in cleanup each attempt fails about every second time."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(s.getsockname()[1])}
    ranks = [subprocess.Popen([sys.executable, "-c", LEAVE], cwd=Path(common.__file__).parent, stderr=subprocess.PIPE,
                              text=True, env=os.environ | group | {"RANK": str(k)}) for k in range(2)]
    for process in ranks:
        err = process.communicate()[1]
        assert process.returncode == 0, err
