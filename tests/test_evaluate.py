"""evaluate.py on two small clips; the networks are stand-ins that cost nothing."""
import json
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import data
import degradation
import evaluate
import media
import metrics
from tests.conftest import ROOT
from tests.test_metrics import texture

SIZE, FRAMES = 64, 5


def write_clips(folder):
    folder.mkdir()
    for i, name in enumerate(("a", "b")):
        wide = texture(i, 70, 90)                               # 70 rows: six are cut off
        media.write_video(folder / f"{name}.mkv", np.stack([wide[:, t:t + SIZE] for t in range(FRAMES)]), 24)


def fake(step):
    """As much of a checkpoint as evaluate.py itself reads."""
    return {"stage": "stage1", "config": {"model": "tiny", "cfg_w": 0.7}, "step": step, "total": step, "vae": {},
            "source": ""}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder with clips and stages 0, 1 and 3; the calls of the stand-in for infer.upscale."""
    monkeypatch.chdir(tmp_path)
    write_clips(tmp_path / "val")
    for n in (0, 1, 3):
        (tmp_path / f"out/stage{n}").mkdir(parents=True)
        made_from = {"source": common.contents("out/stage0/last.pt")} if n == 1 else {}
        torch.save(fake(n) | made_from, tmp_path / f"out/stage{n}/last.pt")
    calls = []

    def load(path, part, device):
        def upscaler(lr, steps=1, w=0.0, temperature=1.0, seed=0):
            calls.append((str(path), part, steps, w, temperature, seed))
            frames = np.clip(evaluate.upscale_bicubic(lr).astype(int) + steps + 2 * seed, 0, 255).astype(np.uint8)
            return data.to_tensor(frames)
        return upscaler

    monkeypatch.setattr(evaluate.infer, "load", load)
    cfg = evaluate.Config(out="out", clips="val", frames=FRAMES, teacher_steps=6, teacher="", student="")
    return cfg, calls


def test_unfinished_and_older_stages_are_named(run, tmp_path):
    cfg, _ = run
    (tmp_path / "out/stage2").mkdir()
    torch.save(fake(2) | {"total": 9}, "out/stage2/last.pt")
    torch.save(fake(3) | {"source": repr([common.contents("out/stage2/last.pt"), "bank"])}, "out/stage3/last.pt")

    def said():
        evaluate.main(cfg)
        return json.loads((tmp_path / "out/report/metrics.json").read_text())["warnings"]
    first, second = said()
    assert first == "out/stage2/last.pt: unfinished, step 2 of 9"
    assert second == "out/stage2/last.pt: made from another out/stage1/last.pt than the one that is there"
    torch.save(fake(2) | {"source": common.contents("out/stage1/last.pt")}, "out/stage2/last.pt")
    assert said() == ["out/stage3/last.pt: made from another out/stage2/last.pt than the one that is there"]
    cfg.student = "out/stage3/last.pt"                                  # the run's own, not one that stands in
    torch.save(fake(1) | {"source": common.contents("out/stage2/last.pt")}, "out/stage1/last.pt")       # no teacher's
    torch.save(fake(2) | {"source": common.contents("out/stage1/last.pt")}, "out/stage2/last.pt")
    assert "out/stage1/last.pt: made from another out/stage0/last.pt than the one that is there" in said()
    torch.save(fake(1) | {"source": common.contents("out/stage0/last.pt")}, "out/stage1/last.pt")
    assert not any("stage1/last.pt: made" in warning for warning in said())
    torch.save({k: v for k, v in fake(2).items() if k != "source"} | {"config": {"model": "tiny"}},     # as exported
               "out/stage2/last.pt")
    shutil.copy("out/stage2/last.pt", "out/stage1/last.pt")             # nor has it a cfg_w
    assert said() == ["out/stage3/last.pt: made from another out/stage2/last.pt than the one that is there"]


def test_an_unfinished_teacher_of_two_rows_is_named_once(run, tmp_path):
    cfg, _ = run
    torch.save(fake(0) | {"total": 5}, "out/stage0/last.pt")
    torch.save(fake(1) | {"source": common.contents("out/stage0/last.pt")}, "out/stage1/last.pt")
    evaluate.main(cfg)
    warnings = json.loads((tmp_path / "out/report/metrics.json").read_text())["warnings"]
    assert warnings == ["out/stage0/last.pt: unfinished, step 0 of 5"]


@pytest.mark.parametrize("preset", ["tiny", "small", "wan1.3b"])
def test_seams_are_looked_for_where_the_tiles_meet(preset):
    cfg = evaluate.Config(**evaluate.PRESETS[preset])
    assert cfg.seam == data.CLIPS[preset]["crop"] - 4 * evaluate.M.vae_class(preset).stride     # tiled: 4 shared


def test_clips_that_would_be_mixed_up_are_refused(run, tmp_path):
    cfg, _ = run
    cfg.frames = -3
    with pytest.raises(SystemExit, match="take 4k . 1, such as 1"):
        evaluate.read_clips(cfg)
    cfg.frames = FRAMES
    shutil.copy(tmp_path / "val/a.mkv", tmp_path / "val/a.mp4")
    with pytest.raises(SystemExit, match="videos of one name and two endings"):
        evaluate.read_clips(cfg)


def test_numbers_pages_and_cache(run, tmp_path, capsys):
    cfg, calls = run
    evaluate.main(cfg)
    result = json.loads((tmp_path / "out/report/metrics.json").read_text())

    # every row has every metric; what was not run is null, with the reason
    assert list(result["rows"]) == list(evaluate.ROWS)
    assert all(set(evaluate.COLUMNS) <= set(values) for values in result["rows"].values())
    assert all(result["rows"]["stage2"][k] is None for k in evaluate.COLUMNS)
    assert "stage2_dual.py" in result["rows"]["stage2"]["reason"]
    assert "stage2" not in result["per_clip"]["a"]
    assert result["rows"]["HR"]["psnr"] is None and result["rows"]["HR"]["flicker"] is not None
    assert [result["rows"][r]["calls"] for r in ("bicubic", "teacher50", "teacher1", "stage1")] == [None, 12, 2, 1]

    # each row used its own checkpoint, part and steps
    w = 0.7                                                     # that of stage I
    assert [c[2:5] for c in calls] == [(6, w, 1)] * 2 + [(1, w, 1)] * 2 + [(1, 0.0, 1)] * 4 + [(1, 0.0, 0.9)] * 2
    assert [c[:2] for c in calls[::2]] == [("out/stage0/last.pt", "ema")] * 2 + [
        ("out/stage1/last.pt", "student"), *[("out/stage3/last.pt", "student")] * 2]

    # the numbers belong to the names they stand under
    for i, name in enumerate("ab"):
        hr = media.read_video(tmp_path / f"val/{name}.mkv")[:, :64]
        lr = degradation.degrade(hr / np.float32(255), np.random.default_rng([0, i]), degradation.LIGHT)
        got = result["per_clip"][name]["teacher50"]
        out = np.clip(evaluate.upscale_bicubic(lr).astype(int) + 6, 0, 255).astype(np.uint8)
        assert got["psnr"] == pytest.approx(metrics.psnr(out, hr), abs=1e-3)
        assert got["grid"] == pytest.approx(metrics.grid(out), abs=1e-3)
    per_clip = [result["per_clip"][name]["bicubic"]["ssim"] for name in "ab"]
    assert result["rows"]["bicubic"]["ssim"] == pytest.approx(np.mean(per_clip), abs=1e-5)

    stamp = result["stamp"]
    assert [c["name"] for c in stamp["clips"]] == ["a.mkv", "b.mkv"] and stamp["clips"][0]["size"] == [64, 64]
    assert len(stamp["clips"][0]["lr_sha256"]) == 64
    assert set(stamp["checkpoints"]) == {"teacher50", "teacher1", "stage1", "stage3", "infer"}
    assert all(len(s["sha256"]) == 64 for s in [*stamp["checkpoints"].values(), *stamp["clips"]])
    assert {"crop", "channel", "degradation", "versions", "commit", "command"} <= set(stamp)

    printed = capsys.readouterr().out
    assert "stage I + II " in printed and "run stage2_dual.py" in printed and "nan" not in printed

    # one page, nothing from elsewhere, with all clips and rows
    page = (tmp_path / "out/report/report.html").read_text()
    assert not re.search(r"https?://|src=|@import|url\(", page) and "{{" not in page
    embedded = json.loads(re.search(r"const DATA = (.*);\n", page)[1].replace("<\\/", "</"))
    assert [c["name"] for c in embedded["clips"]] == ["a", "b"]
    assert list(embedded["clips"][0]["frames"]) == [
        "LR", "bicubic", "teacher50", "teacher1", "stage1", "stage3", "infer", "HR"]
    assert embedded["clips"][0]["numbers"] == list(range(FRAMES))
    assert (tmp_path / "out/report/panel.png").stat().st_size > 1000

    # again: nothing is computed twice, and the numbers are the same
    calls.clear()
    evaluate.main(cfg)
    again = json.loads((tmp_path / "out/report/metrics.json").read_text())
    assert calls == [] and again["rows"] == result["rows"]
    # another checkpoint, another number of steps: only what depends on it
    torch.save(fake(10), "out/stage1/last.pt")
    cfg.teacher_steps = 7
    evaluate.main(cfg)
    assert [c[2] for c in calls] == [7, 7, 1, 1] and calls[2][0] == "out/stage1/last.pt"
    # another input: no old output is used
    cfg.seed = 1
    evaluate.main(cfg)
    other = json.loads((tmp_path / "out/report/metrics.json").read_text())
    assert all(other["rows"][row]["psnr"] != result["rows"][row]["psnr"] for row in ("bicubic", "stage3"))


def test_real_networks(tmp_path, monkeypatch):
    """The same path with a DiT and a video code that were never trained, from a checkpoint on disk."""
    monkeypatch.chdir(tmp_path)
    write_clips(tmp_path / "val")
    net, vae = evaluate.M.build("tiny"), evaluate.M.PatchVAE()
    torch.save({"stage": "stage 3", "config": {"model": "tiny"}, "step": 0, "total": 0, "ema": net.state_dict(),
                "student": net.state_dict(), "vae": vae.state_dict()}, "both.pt")
    evaluate.main(evaluate.Config(out="out", clips="val", frames=FRAMES, max_clips=1, teacher_steps=2,
                                  teacher="both.pt", student="both.pt"))
    result = json.loads((tmp_path / "out/report/metrics.json").read_text())
    rows = result["rows"]
    assert result["warnings"] == ["out holds no stage: the row stage I + II + III is of both.pt"]
    assert all(rows[row]["psnr"] > 0 for row in ("teacher50", "teacher1", "stage3")) and "reason" in rows["stage1"]
    kept = media.read_video(tmp_path / "out/report/clips/a_stage3.mkv")
    assert kept.shape == (FRAMES, 64, 64, 3)


def test_what_an_output_depends_on_makes_it_again(run, tmp_path, monkeypatch):
    clip, calls = dict(name="x", fps=24, lr=np.zeros((1, 16, 16, 3), np.uint8)), run[1]
    source = dict(path="last.pt", part="student", steps=1, w=0.0, temperature=1.0, sha256="a")

    def made(seed=0, **changes):
        calls.clear()
        evaluate.outputs("stage1", source | changes, [clip], tmp_path, seed, torch.device("cpu"))
        return len(calls)
    assert (made(), made()) == (1, 0)
    for change in (dict(part="cfg"), dict(steps=2), dict(w=0.5), dict(temperature=0.9), dict(sha256="b")):
        assert (made(**change), made()) == (1, 1)
    assert (made(seed=1), made()) == (1, 0)                             # kept beside each other
    clip["lr"] = clip["lr"] + np.uint8(1)
    assert made() == 1
    monkeypatch.setattr(common, "code", lambda *modules: "edited")
    assert made() == 1


def test_stopped_while_writing_is_made_again(tmp_path, monkeypatch):
    path, stamp = tmp_path / "x.mkv", {"a": 1}
    frames = np.zeros((1, 16, 16, 3), np.uint8)
    evaluate.keep(path, stamp, frames, 2.5, 24)
    assert evaluate.kept(path, stamp)[1] == 2.5 and np.array_equal(evaluate.kept(path, stamp)[0], frames)
    assert evaluate.kept(path, {"a": 2}) is None
    media.write_video(path, frames.repeat(2, 0), 24)                    # other frames under the same note
    assert evaluate.kept(path, stamp) is None
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):  # between the video and its note
        m.setattr(common, "put", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        evaluate.keep(path, {"a": 2}, frames + np.uint8(9), 2.5, 24)
    assert evaluate.kept(path, stamp) is None
    evaluate.keep(path, stamp, frames, 2.5, 24)
    for broken in ("", "{}", "null", "[]"):
        path.with_suffix(".json").write_text(broken)
        assert evaluate.kept(path, stamp) is None
    path.with_suffix(".json").unlink()
    assert evaluate.kept(path, stamp) is None
    with pytest.raises(SystemExit, match="x.mkv: not written"):
        evaluate.keep(tmp_path / "none/x.mkv", stamp, frames, 2.5, 24)


@pytest.mark.parametrize("changes, words", [
    (dict(gt="set"), "--gt and --lr belong to outputs: name these with --pred"), (dict(lr="set"), "--pred"),
    (dict(student="nope.pt"), "nope.pt: no such checkpoint"), (dict(seed=-1), "seed -1: at least 0")])
def test_options_that_would_be_ignored_are_refused(tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=words):
        evaluate.main(evaluate.Config(**changes))


def test_shipped_weights_stand_in_only_for_what_was_never_run(run, tmp_path):
    cfg, _ = run
    (tmp_path / "teacher.pt").write_bytes(b"t")
    (tmp_path / "student.pt").write_bytes(b"s")
    cfg.teacher, cfg.student = "teacher.pt", "student.pt"
    rows = evaluate.sources(cfg)
    assert rows["teacher50"]["path"] == "out/stage0/last.pt" and rows["teacher50"]["w"] == 0.7      # stage I's
    cfg.cfg_w = 0.0
    assert evaluate.sources(cfg)["teacher50"]["w"] == 0
    (tmp_path / "out/stage3/last.pt").unlink()
    assert isinstance(evaluate.sources(cfg)["stage3"], str)     # a run without stage III is not given another's
    cfg.out = "elsewhere"
    rows = evaluate.sources(cfg)
    assert rows["teacher1"]["path"] == "teacher.pt" and rows["stage3"]["path"] == "student.pt"
    assert isinstance(rows["stage1"], str)


@pytest.mark.parametrize("field, value, words", [
    ("frames", 6, "take 4k . 1, such as 5"), ("frames", 9, "5 frames"), ("clips", "nowhere", "--clips"),
    ("strength", "x", "light"), ("max_clips", 0, "1 at least"), ("teacher_steps", 1, "2 at least"),
    ("out", "/proc/x", "cannot be made")])
def test_mistakes_get_one_line(run, field, value, words):
    cfg, _ = run
    setattr(cfg, field, value)
    with pytest.raises(SystemExit, match=words):
        evaluate.main(cfg)


def test_page_keeps_as_many_frames_as_fit(run):
    clip = {row: np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), np.uint8) for row in ("LR", "HR")}
    whole = evaluate.report.page_clips(["a"], [clip], 10**9)[0]
    assert whole["numbers"] == list(range(9))
    one = sum(len(v[0]) for v in whole["frames"].values())
    some = evaluate.report.page_clips(["a"], [clip], int(3.5 * one) + sum(map(len, whole["xt"].values())))[0]
    assert some["numbers"] == [3, 4, 5] and some["frames"]["HR"] == whole["frames"]["HR"][3:6]


# ---------------------------------------------------------------------------- outputs of somebody else


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Two outputs, lossless, that differ from their ground truth by 3 and by 6 levels; DOVE's folders; the inputs."""
    monkeypatch.chdir(tmp_path)
    for folder in ("up", "set/GT-Video", "set/GT", "set/LQ/a", "set/LQ/b"):
        (tmp_path / folder).mkdir(parents=True)
    for i, name in enumerate("ab"):
        wide = texture(i, 96, 140) // 2 + 60
        hr = np.stack([wide[:, t:t + 128] for t in range(FRAMES)])
        media.write_video(tmp_path / f"set/GT-Video/{name}.mkv", hr, 24)
        media.write_video(tmp_path / f"up/{name}.mkv", hr + np.uint8(3 * i + 3), 24)
        for t, frame in enumerate(hr):
            media.write_image(tmp_path / f"set/LQ/{name}/{t}.png", frame[::4, ::4])
    return evaluate.Config(out="out", pred="up", gt="set", lr="set", seam=16, chunk=2)


def read(folder="out"):
    return json.loads(open(f"{folder}/report/metrics.json").read())


def test_outputs_in_doves_folders(outside, tmp_path, capsys):
    evaluate.main(outside)
    result = read()
    assert list(result["rows"]) == ["bicubic", "pred", "HR"] and result["warnings"] == []
    for i, name in enumerate("ab"):                             # each number stands under its own clip's name
        assert result["per_clip"][name]["pred"]["psnr"] == pytest.approx(20 * np.log10(255 / (3 * i + 3)), abs=1e-3)
        out = media.read_video(tmp_path / f"up/{name}.mkv")
        assert result["per_clip"][name]["pred"]["seam"] == pytest.approx(metrics.seam(out, 16), rel=1e-4)
        assert result["per_clip"][name]["pred"]["chunk"] == pytest.approx(metrics.chunk_jump(out, 2), rel=1e-4)
        assert len(result["per_frame"][name]["pred"]["psnr"]) == FRAMES
        assert len(result["per_frame"][name]["pred"]["temporal"]) == FRAMES - 1
    low, high = result["intervals"]["pred"]["psnr"]
    assert low < result["rows"]["pred"]["psnr"] < high
    values = result["rows"]["pred"]
    assert values["shift"] == pytest.approx(0, abs=0.05) and values["psnr_aligned"] == values["psnr"]
    assert values["lr_consistency"] > 10
    assert values["musiq"] is None and "--extra" in result["absent"]["musiq"]
    assert {"crop", "channel", "range", "alignment", "versions", "commit", "command"} <= set(result["stamp"])
    first = result["stamp"]["clips"][0]
    assert (first["name"], first["hr_file"], first["lr_file"]) == ("a.mkv", "set/GT-Video/a.mkv", "set/LQ/a")
    assert first["size"] == [128, 96] and first["frames"] == "0..4"
    assert first["shift"]["pred"] == result["per_clip"]["a"]["pred"]["shift"]
    channel = result["stamp"]["channel"]
    rgb = {"psnr", "psnr_aligned", "lr_consistency", *evaluate.EXTRA}
    assert {k for k, v in channel.items() if v == "RGB"} == rgb and channel["vmaf"] == "Y of BT.709"
    assert channel["psnr_y"] == channel["ssim"] == channel["niqe"] == "Y of BT.601"
    assert "musiq" not in capsys.readouterr().out.lower()       # no empty columns
    page = (tmp_path / "out/report/report.html").read_text()
    assert '"pred": "output"' in page and "{{" not in page


def test_outputs_of_twice_the_size_stand_beside_bicubic_of_that_size(outside, tmp_path):
    for name in "ab":
        hr = media.read_video(tmp_path / f"set/GT-Video/{name}.mkv")
        media.write_video(tmp_path / f"up/{name}.mkv", hr[:, ::2, ::2], 24)
    outside.gt = ""
    _, made, *_ = evaluate.make(outside, torch.device("cpu"))
    sizes = {row: seeds[0][0][0].shape[1:3] for row, seeds in made.items()}
    assert sizes == {"bicubic": (48, 64), "pred": (48, 64)}


def test_commands_of_the_readme(run, outside, tmp_path, monkeypatch):
    """Each command of "Measure" runs, on small clips and with stand-ins for the networks."""
    cfg, _ = run
    section = open(f"{ROOT}/README.md").read().split("## Measure")[1].split("\n## ")[0]
    commands = re.findall(r"^    python evaluate\.py ?(.*?)(?:\s+#.*)?$", section, re.M)
    assert len(commands) >= 3
    for folder, name in (("upscaled", "up"), ("truth", "set/GT-Video"), ("inputs", "set/LQ")):
        shutil.copytree(tmp_path / name, tmp_path / folder)
    small = {"tiny": {k: getattr(cfg, k) for k in ("out", "clips", "frames", "teacher_steps", "teacher", "student")}}
    for command in commands:
        settings = evaluate.common.parse_config(evaluate.Config, small, command.split())
        evaluate.main(settings)
        rows = read(settings.out)["rows"]
        assert rows["pred" if settings.pred else "stage3"]["psnr"] > 10


class Stranger:
    """A stand-in for a metric of pyiqa: the mean error in grey levels, or the brightness without a reference."""
    def __init__(self, name):
        full = name in ("lpips", "dists")
        self.metric_mode, self.lower_better = "FR" if full else "NR", full

    def __call__(self, x, y=None):
        assert x.shape[:2] == (1, 3) and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
        return ((x - y).abs() if y is not None else x).mean() * 255


def test_extra_metrics_that_are_installed(outside, monkeypatch):
    def create_metric(name):
        if name == "dists":
            raise RuntimeError("cannot download\nfor many reasons")
        return Stranger(name)
    monkeypatch.setitem(sys.modules, "pyiqa", SimpleNamespace(create_metric=create_metric))
    monkeypatch.setitem(sys.modules, "dover_scorer", SimpleNamespace(raw=lambda frames: (0.1107, -0.08285)))
    outside.extra = True
    evaluate.main(outside)
    result = read()
    assert [result["per_clip"][name]["pred"]["lpips"] for name in "ab"] == pytest.approx([3, 6], abs=1e-3)
    hr = media.read_video("set/GT-Video/a.mkv")
    assert result["per_clip"]["a"]["HR"]["musiq"] == pytest.approx(hr.mean(), abs=1e-2)
    assert result["rows"]["pred"]["dover"] == pytest.approx(50) and result["rows"]["pred"]["dists"] is None
    assert result["absent"] == {"dists": "cannot download"}
    outside.gt, outside.lr = "", ""
    evaluate.main(outside)
    assert read()["rows"]["pred"]["lpips"] is None and read()["rows"]["pred"]["musiq"] > 0


def test_an_extra_metric_that_fails_while_it_measures(outside, monkeypatch, capsys):
    def fails(*frames):
        raise RuntimeError("frames are too small")
    fails.metric_mode, fails.lower_better = "NR", False
    monkeypatch.setitem(sys.modules, "pyiqa", SimpleNamespace(create_metric=lambda name: fails))
    outside.extra = True
    evaluate.main(outside)
    assert read()["absent"]["musiq"] == "frames are too small" and read()["rows"]["pred"]["psnr"] > 0
    assert "no MUSIQ: frames are too small" in capsys.readouterr().out


def test_extra_metrics_that_are_absent(outside, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    monkeypatch.setitem(sys.modules, "dover_scorer", None)
    outside.extra = True
    evaluate.main(outside)
    absent = read()["absent"]
    assert "pip install pyiqa" in absent["musiq"] and "dover_scorer.py" in absent["dover"]
    assert all(read()["rows"]["pred"][name] is None for name in evaluate.EXTRA)
    for where in (capsys.readouterr().out, open("out/report/report.html").read()):
        assert "no MUSIQ: pyiqa is not installed: pip install pyiqa" in where and "no DOVER: " in where


def test_one_file_without_truth_or_input(outside, tmp_path):
    outside.pred, outside.gt, outside.lr = "up/a.mkv", "", ""
    evaluate.main(outside)
    values = read()["rows"]["pred"]
    assert values["psnr"] is None and values["flicker"] is not None
    media.write_image(tmp_path / "one.png", texture(0, 64, 64))                 # too small for every number
    outside.pred = "one.png"
    evaluate.main(outside)
    assert (tmp_path / "out/report/report.html").exists()


def test_numbered_pictures_are_one_clip(outside, tmp_path):
    for folder, offset in (("pngs", 5), ("truth", 0)):
        for t, frame in enumerate(media.read_video("set/GT-Video/a.mkv")):
            (tmp_path / folder).mkdir(exist_ok=True)
            media.write_image(tmp_path / folder / f"{t:06d}.png", frame + np.uint8(offset))
    outside.pred, outside.lr = "pngs", ""
    for outside.gt in ("truth", "set/GT-Video/a.mkv"):          # as infer.py writes them; against pictures, and a video
        evaluate.main(outside)
        assert list(read()["per_clip"]) == ["pngs"] and len(read()["per_frame"]["pngs"]["pred"]["psnr"]) == FRAMES
        assert read()["rows"]["pred"]["psnr"] == pytest.approx(20 * np.log10(255 / 5), abs=1e-3)


def test_a_frame_that_equals_its_truth_has_a_number(outside, tmp_path):
    hr = media.read_video("set/GT-Video/a.mkv")
    out = hr + np.uint8(3)
    out[0] = hr[0]
    media.write_video(tmp_path / "up/a.mkv", out, 24)
    evaluate.main(outside)
    assert read()["per_frame"]["a"]["pred"]["psnr"][0] == 100 and "at most 100 dB" in read()["stamp"]["range"]
    assert read()["rows"]["pred"]["psnr"] > 40


def test_what_misleads_is_named(outside, tmp_path):
    media.write_video(tmp_path / "up/a.mkv", np.stack([texture(7, 96, 128)] * FRAMES), 24)      # another clip
    (tmp_path / "up/b.mkv").unlink()
    evaluate.main(outside)
    warnings = " ".join(read()["warnings"])
    assert "nothing was made of b" in warnings and "is it the same clip?" in warnings
    assert "px right" not in warnings and "video range" not in warnings
    assert read()["rows"]["pred"]["temporal_ratio"] == pytest.approx(1)         # a still picture misses all change


def test_shift_is_named_and_undone(outside, tmp_path):
    for name in "ab":
        hr = media.read_video(tmp_path / f"set/GT-Video/{name}.mkv")
        noise = np.random.default_rng(0).integers(0, 3, hr.shape, dtype=np.uint8)
        media.write_video(tmp_path / f"up/{name}.mkv", np.roll(hr, (2, -1), (1, 2)) + noise, 24)
    evaluate.main(outside)
    result = read()
    assert not any("range" in w for w in result["warnings"])
    assert any("-1.0 px right, +2.0 px down" in w for w in result["warnings"])
    values = result["rows"]["pred"]
    assert values["shift"] == pytest.approx(5 ** 0.5, abs=0.1) and values["psnr_aligned"] > values["psnr"] + 10


def test_lossy_files_and_wrong_ranges_are_named(outside, tmp_path):
    for name in "ab":
        hr = media.read_video(tmp_path / f"set/GT-Video/{name}.mkv")
        (tmp_path / f"up/{name}.mkv").unlink()
        media.write_video(tmp_path / f"up/{name}.mp4", (hr * (219 / 255) + 16).round().astype(np.uint8), 24)
    evaluate.main(outside)
    warnings = " ".join(read()["warnings"])
    assert "up/a.mp4: a lossy file" in warnings and "video range" in warnings and "GT-Video" not in warnings
    assert evaluate.differences((0.85 * hr - 5).astype(np.uint8), hr) == []     # darker, and no range
    flat = np.full((FRAMES, 32, 32, 3), 7, np.uint8)
    assert evaluate.differences(flat, flat) == []
    media.write_image(tmp_path / "one.jpg", hr[0])
    assert evaluate.read_frames(tmp_path / "one.jpg")[1]


def test_what_cannot_be_compared_is_refused(outside, tmp_path):
    hr = media.read_video(tmp_path / "set/GT-Video/a.mkv")

    def refused(words):
        with pytest.raises(SystemExit, match=words) as stop:
            evaluate.main(outside)
        assert "\n" not in str(stop.value)
    media.write_video(tmp_path / "up/a.mkv", hr[:-1], 24)
    refused("4 frames, its ground truth has 5")
    media.write_video(tmp_path / "up/a.mkv", hr[:, :-2], 24)
    refused("128x94, its ground truth 128x96")
    (tmp_path / "up/a.mkv").rename(tmp_path / "up/c.mkv")
    refused("nothing named c")
    (tmp_path / "up/c.mkv").rename(tmp_path / "up/a.mkv")
    media.write_video(tmp_path / "up/a.mkv", hr, 24)
    media.write_video(tmp_path / "up/a.mp4", hr, 24)
    refused("a.mp4: a.mkv has the same name")
    (tmp_path / "up/a.mp4").unlink()
    for side in (20, 200):
        for t in range(FRAMES):
            media.write_image(tmp_path / f"set/LQ/a/{t}.png", texture(0, side, side))
        refused("no multiple of its input")
    outside.seam = 15
    refused("--seam: 16")
    outside.seam = 16
    (tmp_path / "out/stage1").mkdir()
    (tmp_path / "out/stage1/last.pt").touch()
    refused("out holds stages, whose report this one would replace: name another --out")
    (tmp_path / "out/stage1/last.pt").unlink()
    outside.pred = "nowhere"
    refused("nowhere: no such")
    outside.pred, outside.gt, outside.lr = "up/b.mkv", "", ""
    (tmp_path / "up/b.mkv").write_bytes(b"not a video")
    refused("b.mkv: not readable")
    outside.pred = "set/LQ/a"
    media.write_image(tmp_path / "set/LQ/a/4.png", hr[0])
    outside.pred = "set/LQ"
    refused("a: frames of several sizes")
    assert not (tmp_path / "out/report/metrics.json").exists()


def test_seeds_give_a_mean_and_a_spread(run):
    cfg, calls = run
    cfg.seeds = 2
    evaluate.main(cfg)
    result = read()
    assert len(calls) == 2 * 10 and [c[5] for c in calls] == [0, 0, 1, 1] * 5
    hr = [media.read_video(f"val/{name}.mkv")[:, :64] for name in "ab"]
    made = [[metrics.psnr(media.read_video(f"out/report/clips/{name}_stage1{seed}.mkv"), x)
             for name, x in zip("ab", hr, strict=True)] for seed in ("", "_seed1")]
    assert result["over_seeds"]["stage1"]["psnr"] == pytest.approx(np.std(np.mean(made, 1), ddof=1), rel=1e-4) != 0
    assert result["rows"]["stage1"]["psnr"] == pytest.approx(np.mean(made), rel=1e-5)
    assert result["over_seeds"]["bicubic"]["psnr"] is None
