"""ablate.py on the networks and clips of test_stages.py: what arms share, what is written, what counts as better."""
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ablate
import common
import data
import degradation
import evaluate
import media
import metrics
import model as M
import stage1_pd as stage1
import stage2_dual as stage2
import stage3_dpo as stage3
from tests import test_stages
from tests.test_metrics import texture
from tests.test_stages import checkpoint, moved

STAGES = {1: stage1, 2: stage2, 3: stage3}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(M.MODELS, "tiny", test_stages.SMALL_MODEL)
    monkeypatch.setitem(data.CLIPS, "tiny", test_stages.SMALL_CLIP)
    monkeypatch.setattr(common, "panel", lambda *args: None)
    scale = dict(clips=3, batch=2, log_every=1, save_every=2)
    monkeypatch.setitem(stage1.PRESETS, "tiny", dict(scale, cfg_steps=2, steps_per_phase=2, pd_grid=(4, 2, 1)))
    monkeypatch.setitem(stage2.PRESETS, "tiny", dict(scale, steps=2, aux_warmup=1, lr=1e-3))
    monkeypatch.setitem(stage3.PRESETS, "tiny", dict(scale, steps=2, pairs=2, candidates=2, lr=1e-3))
    monkeypatch.setattr(metrics, "vmaf", lambda a, b: {"vmaf": 50.0, "vmaf_neg": 50.0 + float(a.mean()) / 255})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with training footage, two clips to measure on, and stages 0 and I of a toy run."""
    folder = tmp_path_factory.mktemp("ablate")
    kept = M.MODELS["tiny"], data.CLIPS["tiny"], common.panel
    test_stages.shrink()
    common.panel = lambda *args: None
    for name, count, side in (("train", 1, 64), ("val", 2, 64)):
        (folder / name).mkdir()
        for i in range(count):
            wide = texture(i, side, side + 16)
            media.write_video(folder / name / f"{'ab'[i]}.mkv", np.stack([wide[:, t:t + side] for t in range(16)]), 24)
    configs = test_stages.constants(folder / "run" / "tiny", folder / "train")
    for stage in (test_stages.stage0, stage1):
        stage.main(configs[stage])
    M.MODELS["tiny"], data.CLIPS["tiny"], common.panel = kept
    return folder


@pytest.fixture
def run(base, tmp_path, monkeypatch):
    """A function (name, options) that runs an ablation; it returns the ablation's folder and the stages it called."""
    out = tmp_path / "tiny"
    for name in ("stage0", "stage1"):
        shutil.copytree(base / "run" / "tiny" / name, out / name)
    shutil.copytree(base / "run" / "cache", tmp_path / "cache")
    mains, calls = {n: stage.main for n, stage in STAGES.items()}, []
    for n, stage in STAGES.items():
        monkeypatch.setattr(stage, "main", lambda cfg, n=n: (calls.append((n, cfg.out.split("/")[-1])), mains[n](cfg)))

    def start(name, *options):
        calls.clear()
        ablate.main([name, "--out", str(out), "--data", str(base / "train"), "--clips", str(base / "val"),
                     "--frames", "5", "--teacher_steps", "2", *options])
        return out / "ablate" / name, list(calls)
    return start


# ----------------------------------------------------------------------------
# the arms

DIFFER = {      # the fields that the arms of an ablation may differ in, and nothing else
    "stages": {2: set(), 3: set()}, "streams": {2: {"streams", "order"}, 3: set()},
    "streams-cfg": {2: {"streams", "order"}, 3: set()}, "features": {2: {"features"}, 3: set()},
    "ratio": {2: {"aux_per_student"}, 3: set()}, "init": {2: {"init", "lr"}, 3: set()},
    "dpo": {2: set(), 3: {"dpo_t", "anchor", "own_noise"}},
    "edits": {2: {"aux_warmup", "t_max", "w_fm", "gan_same_noise", "pooled", "lr_fake", "dmd_half", "real_score",
                  "fm_norm", "lr"}, 3: set()}}


@pytest.mark.parametrize("preset", ["tiny", "small"])
@pytest.mark.parametrize("name", list(ablate.ARMS))
def test_arms_differ_in_what_they_are_about_alone(name, preset):
    args = ablate.arguments([name, "--preset", preset, "--steps", "7"])
    found = {2: {}, 3: {}}
    for key, arm in ablate.arms_of(args).items():
        for n, cfg in ablate.configs(args, arm, f"{args.out}/x", 4).items():
            found[n][key] = asdict(cfg)
            assert (cfg.steps, cfg.seed, cfg.resume, cfg.out) == (7, 4, True, f"{args.out}/x") and cfg.model == preset
    for n, cfgs in found.items():
        differ = {k for c in cfgs.values() for k in c if len({repr(other[k]) for other in cfgs.values()}) > 1}
        assert differ == DIFFER[name][n], n
    trained = {key: ablate.needs(arm) for key, arm in ablate.ARMS[name].items()}
    if name in ("stages", "dpo"):
        assert len(found[2]) < len(trained) or name == "dpo"
    else:                                                       # the same later stages; no two arms are the same
        assert set(trained.values()) == {(2, 3)}
        assert len({repr(c) for c in found[2].values()}) == len(trained)
    assert set(DIFFER) == set(ablate.ARMS)


def test_arms_hold_what_their_names_say():
    two = {k: (arm.two.get("streams", stage2.Config.streams), arm.two.get("order", stage2.Config.order))
           for k, arm in ablate.ARMS["streams"].items()}
    both = ("dmd", "gan")
    assert two == {"dmd": (("dmd",), "joint"), "gan": (("gan",), "joint"), "sequential": (both, "sequential"),
                   "joint": (both, "joint"), "regression": (("mse",), "joint")}
    assert {k: arm.two for k, arm in ablate.ARMS["streams-cfg"].items()} == {
        k: arm.two | {"init": "cfg"} for k, arm in ablate.ARMS["streams"].items() if k != "regression"}
    assert [arm.two["aux_per_student"] for arm in ablate.ARMS["ratio"].values()] == [1, 3, 5]
    assert {k: arm.two.get("features", "both") for k, arm in ablate.ARMS["features"].items()} == {
        k: k for k in ("real", "fake", "both")}
    assert {k: (arm.two, arm.factors) for k, arm in ablate.ARMS["init"].items()} == {
        "stage1": ({}, {}), "cfg": ({"init": "cfg"}, {}), "stage1-slow": ({}, {"lr": 0.5}),
        "cfg-slow": ({"init": "cfg"}, {"lr": 0.5})}
    assert {k: arm.three for k, arm in ablate.ARMS["dpo"].items()} == {
        "none": {}, "uniform": {}, "uniform-free": {"anchor": 0.0}, "one": {"dpo_t": "one"},
        "one-free": {"dpo_t": "one", "anchor": 0.0}, "own-noise": {"dpo_t": "one", "own_noise": True}}
    rows = [arm.row for arm in ablate.ARMS["stages"].values()]
    assert rows == ["teacher50", "teacher1", "stage1", "stage2", "stage3", "stage3"]
    assert {key: ablate.needs(arm) for key, arm in ablate.ARMS["stages"].items() if ablate.needs(arm)} == {
        "I+II": (2,), "I+III": (3,), "I+II+III": (2, 3)}


@pytest.mark.parametrize("preset", ["tiny", "small", "wan1.3b"])
@pytest.mark.parametrize("name, key, field, factor", [
    ("init", "stage1-slow", "lr", 0.5), ("init", "cfg-slow", "lr", 0.5), ("edits", "fast-student", "lr", 2),
    ("edits", "fast-fake", "lr_fake", 5)])
def test_rates_are_multiples_of_the_presets(preset, name, key, field, factor):
    args = ablate.arguments([name, "--preset", preset])
    as_it_is, arm = (ablate.configs(args, x, "x", 0)[2] for x in (ablate.Arm("as it is"), ablate.ARMS[name][key]))
    assert vars(arm)[field] == pytest.approx(factor * vars(as_it_is)[field], rel=1e-9)


def test_a_factor_of_no_field_is_named():
    with pytest.raises(SystemExit, match="arm 'odd'.*'rate'"):
        ablate.configs(ablate.arguments(["init"]), ablate.Arm("odd", factors=dict(rate=2)), "x", 0)


def test_candidates_are_shared_by_arms_of_one_stage2_alone():
    judges = {name: {k: ablate.judge(arms, k) for k, arm in arms.items() if 3 in ablate.needs(arm)}
              for name, arms in ablate.ARMS.items()}
    assert set(judges.pop("dpo").values()) == {"uniform"}
    assert all(k == judge for shared in judges.values() for k, judge in shared.items())
    arms = {str(n): ablate.Arm("x", three=dict(candidates=n)) for n in (2, 3)}
    assert ablate.judge(arms, "3") == "3"                       # others are ranked
    assert ablate.judge(ablate.ARMS["init"], "cfg-slow") == "cfg-slow"


# ----------------------------------------------------------------------------
# a run


def table_rows(text):
    return [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line.startswith("| ")]


def test_streams_writes_table_numbers_and_pictures_and_resumes(run, capsys, monkeypatch):
    kept = {key: ablate.ARMS["streams"][key] for key in ("dmd", "gan", "regression")}
    monkeypatch.setitem(ablate.ARMS, "streams", kept)
    order, print_ = [], print
    monkeypatch.setattr("builtins.print", lambda *x, **how: (order.append(str(x[0])[:7]), print_(*x, **how)))
    for n in (2, 3):
        monkeypatch.setattr(STAGES[n], "main", lambda cfg, n=n, main=STAGES[n].main: (order.append(n), main(cfg)))
    folder, calls = run("streams", "--seeds", "2")
    order = [x for x in order if x in (2, 3, "streams")]
    assert order == ["streams", 2, 3] * 6                       # how long an arm will take is said before it starts
    arms = list(kept)
    assert calls == [(n, f"{key}-seed{k}") for k in range(2) for key in arms for n in (2, 3)]
    said = re.findall(r"^streams, seed (\d), (.+): about ([\d.]+) minutes", capsys.readouterr().out, re.M)
    assert [(int(k), t) for k, t, _ in said] == [(k, arm.title) for k in range(2) for arm in kept.values()]

    result = json.loads((folder / "results.json").read_text())
    assert list(result["arms"]) == arms and len(result["pairs"]) == len(arms) * (len(arms) - 1) // 2
    assert {"commit", "command", "versions"} <= set(result["stamp"])
    for key, about in result["arms"].items():
        assert about["configs"]["stage2"]["streams"] == list(kept[key].two["streams"])
        assert set(about["seeds"]) == {"0", "1"} and set(about["seeds"]["0"]) == {"a", "b"}
        assert about["seeds"]["0"] != about["seeds"]["1"]
        means = [np.mean([v["psnr"] for v in clips.values()]) for clips in about["seeds"].values()]
        assert about["mean"]["psnr"] == pytest.approx(np.mean(means), rel=1e-5)
        assert about["sd"]["psnr"] == pytest.approx(abs(means[0] - means[1]) / 2 ** 0.5, rel=1e-3)

    # the numbers are those of the student of the arm's last stage, on evaluate.py's path
    clip = evaluate.read_clips(evaluate.Config(clips=result["stamp"]["config"]["clips"], frames=5))[1]
    upscaler = evaluate.infer.load(folder / "gan-seed1" / "stage3" / "last.pt", "student", ablate.torch.device("cpu"))
    frames = data.to_uint8(upscaler(clip["lr"], steps=1, w=0.0, seed=1))
    assert result["arms"]["gan"]["seeds"]["1"]["b"]["psnr"] == pytest.approx(metrics.psnr(frames, clip["hr"]), abs=1e-2)

    text = (folder / "table.md").read_text()
    rows = table_rows(text)
    assert [row[0] for row in rows[1:]] == [arm.title for arm in kept.values()]
    assert rows[1][1] == "{:.2f} +- {:.2f}".format(*(result["arms"]["dmd"][k]["psnr"] for k in ("mean", "sd")))
    assert rows[1][-4:] == ["4.99", "61.46", "0.432", "87.38"] and rows[-1][-4:] == ["-"] * 4
    assert "paper's own metrics on its own data" in text
    lines = re.findall(r"^- (.*)", text, re.M)
    assert len(lines) == 3
    psnr = {key: np.array([[v["psnr"] for v in clips.values()] for clips in about["seeds"].values()])
            for key, about in result["arms"].items()}
    for pair, line in zip(result["pairs"], lines, strict=True):     # who is better, by how much, by hand
        a, b = pair["a"], pair["b"]
        mean = (psnr[a] - psnr[b]).mean()
        assert pair["gain"]["psnr"]["mean"] == pytest.approx(mean, rel=1e-4)
        grid = {k: np.array([[v["grid"] for v in clips.values()] for clips in result["arms"][k]["seeds"].values()])
                for k in (a, b)}
        off = {k: abs(grid[k] - result["ground_truth"]["grid"]).mean() for k in (a, b)}
        assert pair["gain"]["grid"]["mean"] == pytest.approx(off[b] - off[a], abs=1e-4)
        found = ablate.compare(*(numbers(psnr[k], "psnr") for k in (a, b)))["psnr"]
        if min(abs(x) for x in found) > 0.01 and found[1] * found[2] > 0:
            better, worse = (kept[k].title for k in ((a, b) if mean > 0 else (b, a)))
            assert re.search(rf"{better} beats {worse} in [^;]*PSNR: \+{abs(mean):.2f}", line), line
    assert result["stamp"]["trained"] == [common.commit()] and common.commit() in text
    for name in "ab":                                           # LR, the arms, HR: squares of 320 with 6 between them
        picture = np.asarray(Image.open(folder / f"{name}.png"))
        assert picture.shape[1] == (len(arms) + 2) * 326 - 6
        for k, key in enumerate(arms):                          # clips of 64 x 64, twice as large, below the titles
            frame = np.kron(media.read_video(folder / "clips" / f"{name}_{key}.mkv")[2], np.ones((2, 2, 1)))
            assert np.array_equal(picture[40:168, 326 * (k + 1):326 * (k + 1) + 128], frame), key

    # nothing is done over without --resume; with it nothing at all is done, and the table is the same
    with pytest.raises(SystemExit, match="--resume"):
        run("streams", "--seeds", "2")
    scored, score = [], evaluate.score
    monkeypatch.setattr(evaluate, "score", lambda *args, **kw: (scored.append(args[0]), score(*args, **kw))[1])
    assert run("streams", "--seeds", "2", "--resume") == (folder, [])
    assert set(scored) == {"HR"} and (folder / "table.md").read_text() == text

    # a half-done arm alone is gone on with; with other constants nothing is
    state = ablate.torch.load(folder / "gan-seed1/stage3/last.pt", weights_only=True)
    ablate.torch.save(state | {"step": 1}, folder / "gan-seed1/stage3/last.pt")
    assert run("streams", "--seeds", "2", "--resume")[1] == [(3, "gan-seed1")]
    with pytest.raises(SystemExit, match="made with another stage2.steps, stage3.steps; "):
        run("streams", "--seeds", "2", "--resume", "--steps", "5")


def test_dpo_arms_share_stage2_and_its_pairs(run, monkeypatch):
    made = test_stages.pairs_made(monkeypatch)
    folder, calls = run("dpo", "--seeds", "1")
    assert calls == [(2, "none-seed0")] + [(3, f"{key}-seed0") for key in list(ablate.ARMS["dpo"])[1:]]
    assert made == [0, 1]                                               # each pair once, for all arms
    result = json.loads((folder / "results.json").read_text())["arms"]
    assert result["none"]["sd"]["psnr"] is None
    assert [about["configs"].get("stage3", {}).get("anchor") for about in result.values()] == [None, 1, 0, 1, 0, 1]
    students = {k: test_stages.torch.load(folder / f"{k}-seed0/stage3/last.pt", weights_only=True)["student"]
                for k in list(result)[1:]}
    assert all(moved(students["one"], students[k]) for k in students if k != "one")


def test_stages_trains_once_and_takes_the_rows_of_the_teacher(run):
    folder, calls = run("stages", "--seeds", "1")
    assert calls == [(2, "I+II-seed0"), (3, "I+III-seed0"), (3, "I+II+III-seed0")]
    short, whole = (json.loads((folder / f"{key}-seed0/stage3/run.json").read_text())["config"] | {"out": ""}
                    for key in ("I+III", "I+II+III"))
    assert short == whole
    assert (folder / "I+III-seed0/stage2").samefile(folder.parent.parent / "stage1")    # whose student it starts from
    result = json.loads((folder / "results.json").read_text())
    sources = result["stamp"]["checkpoints"]
    assert [(s["part"], s["steps"], s["w"]) for s in sources.values()] == [("ema", 2, 0.5), ("ema", 1, 0.5)] + [
        ("student", 1, 0.0)] * 4
    assert [s["path"].split("/")[-2] for s in sources.values()] == [f"stage{n}" for n in (0, 0, 1, 2, 3, 3)]
    rows = table_rows((folder / "table.md").read_text())
    assert [row[0] for row in rows[1:3]] == ["teacher, 2 steps", "teacher, 1 step"] and rows[1][-1] == "87.98"
    assert len({repr(about["seeds"]["0"]["a"]["psnr"]) for about in result["arms"].values()}) == 6


def test_mistyped_data_leave_no_folder(run, tmp_path):
    with pytest.raises(SystemExit, match="--data"):
        run("init", "--data", "nope")
    assert not (tmp_path / "tiny/ablate").exists()


def test_what_two_ablations_share_is_trained_once(run, monkeypatch):
    run("stages", "--seeds", "1")
    folder, calls = run("dpo", "--seeds", "1")                  # uniform with the anchor is the default
    assert calls == [(3, f"{key}-seed0") for key in list(ablate.ARMS["dpo"])[2:]]
    assert (folder / "uniform-seed0/stage3").samefile(folder.parent / "stages/I+II+III-seed0/stage3")
    assert run("ratio", "--seeds", "2", "--no-stage3")[1] == [(2, f"aux{n}-seed{k}") for n, k in
                                                              ((1, 0), (5, 0), (1, 1), (3, 1), (5, 1))]
    shutil.rmtree(folder.parent / "stages")                     # what was shared is trained again, where it is needed
    assert run("ratio", "--seeds", "1", "--no-stage3", "--resume")[1] == [(2, "aux3-seed0")]
    arm = folder.parent / "ratio/aux3-seed0"                    # nothing is shared with arms of other code
    about, other = json.loads((arm / "arm.json").read_text()), folder.parent / "features/both-seed0"
    assert ablate.twin(other, about, 2) == arm / "stage2"
    assert ablate.twin(other, about | {"stage2.code": "edited"}, 2) is None
    assert ablate.twin(other, about | {"stage1": "another"}, 2) is None
    last = folder.parent.parent / "stage1/last.pt"
    whole, args = last.read_bytes(), ablate.arguments(["dpo", "--out", str(last.parent.parent)])
    args.data, arms = about["stage2.data"], ablate.arms_of(args)
    ablate.prepare(args, folder, arms, "one", 0)                # nor with arms from another stage I
    ablate.torch.save(ablate.torch.load(last, weights_only=True) | {"step": 7, "student": {}}, last)
    with pytest.raises(SystemExit, match="made with another stage1;"):
        ablate.prepare(args, folder, arms, "one", 0)
    last.write_bytes(whole)
    for module, what in ((M, "stage2.code"), (data, "stage2.clips"), (degradation, "stage2.clips"),
                         (stage3, "stage3.code"), (metrics, "stage3.code")):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match=f"made with another .*{what}"):
            patch.setattr(common, "parsed", lambda m, edited=module, of=common.parsed: of(m) + "edited" * (m is edited))
            ablate.prepare(args, folder, arms, "one", 0)
    code = common.code
    monkeypatch.setattr(common, "code", lambda *modules: code(*modules) + "edited" * (stage2 in modules))
    with pytest.raises(SystemExit, match="made with another stage2.code"):
        run("ratio", "--seeds", "1", "--no-stage3", "--resume")


def test_arms_that_saw_other_footage_are_not_gone_on_with_nor_shared(run, base, tmp_path, monkeypatch):
    """Under the same name: films were added to the folder of --data, or media.py reads them otherwise."""
    shutil.copytree(base / "train", tmp_path / "train")
    args = ablate.arguments(["init", "--no-stage3", "--out", str(tmp_path / "tiny"), "--data", str(tmp_path / "train")])

    def stage2_of(name):
        return ablate.prepare(args, tmp_path / "tiny/ablate" / name, ablate.arms_of(args), "stage1", 0)[0] / "stage2"
    monkeypatch.setattr(ablate, "finished", lambda path: Path(path).exists())
    first = stage2_of("init")
    first.mkdir()
    (first / "last.pt").touch()
    assert stage2_of("features").samefile(first)                # as long as nothing changed
    parsed = common.parsed
    monkeypatch.setattr(common, "parsed", lambda module: parsed(module) + "edited" * (module is media))
    with pytest.raises(SystemExit, match="made with another stage2.clips;"):
        stage2_of("init")
    monkeypatch.setattr(common, "parsed", parsed)
    assert stage2_of("init") == first
    shutil.copy(tmp_path / "train/a.mkv", tmp_path / "train/b.mkv")
    with pytest.raises(SystemExit, match="made with another stage2.clips;"):
        stage2_of("init")
    assert not stage2_of("ratio").exists()


def test_stage1_is_trained_first_and_stage3_can_be_left_out(run, tmp_path):
    shutil.rmtree(tmp_path / "tiny" / "stage1")
    folder, calls = run("init", "--seeds", "1", "--no-stage3", "--steps", "1")
    assert calls == [(1, "tiny"), *((2, f"{key}-seed0") for key in ablate.ARMS["init"])]
    assert checkpoint(stage1.Config(out=str(tmp_path / "tiny")), "stage1")["step"] == 6
    states = [checkpoint(stage2.Config(out=str(folder / f"{key}-seed0")), "stage2") for key in ("stage1", "cfg")]
    assert [s["step"] for s in states] == [1, 1] and moved(states[0]["net"], states[1]["net"])
    assert "paper" not in table_rows((folder / "table.md").read_text())[0][-1]


def test_numbers_of_another_output_truth_or_code_are_not_read(tmp_path, monkeypatch):
    frames, truth, scored = np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3), np.uint8), []
    (tmp_path / "last.pt").touch()
    monkeypatch.setattr(evaluate, "sources", lambda cfg: {"stage3": {"path": str(tmp_path / "last.pt")}})
    monkeypatch.setattr(evaluate, "outputs", lambda *args: [(frames, 0.0)])
    monkeypatch.setattr(evaluate, "score", lambda *args, **kw: (scored.append(1), ({"psnr": len(scored)}, {}))[1])

    def measured():
        return ablate.measure(evaluate.Config(), [{"name": "a", "hr": truth}], tmp_path, tmp_path, "x",
                              ablate.Arm("x"), 0, {}, ablate.torch.device("cpu"))[0]["a"]["psnr"]
    assert [measured(), measured()] == [1, 1]
    frames = frames + 1
    assert [measured(), measured()] == [2, 2]
    truth = truth + 1
    assert [measured(), measured()] == [3, 3]
    monkeypatch.setattr(common, "code", lambda *modules: "edited")
    assert [measured(), measured()] == [4, 4]


# ----------------------------------------------------------------------------
# numbers


def numbers(values, metric="niqe"):
    """{seed: {clip: {metric: value}}} of an array (seeds, clips); the other metrics have none."""
    return {k: {f"c{i}": dict.fromkeys(ablate.SHOWN) | {metric: float(v)} for i, v in enumerate(row)}
            for k, row in enumerate(values)}


def test_spread_is_that_of_seeds_of_the_mean_over_clips():
    found = ablate.spread(numbers([[1, 2, 9], [3, 4, 11]]))
    assert found["niqe"] == pytest.approx((5, 2 ** 0.5)) and all(np.isnan(found["psnr"]))


def test_paired_bootstrap_of_a_constant_difference_is_that_difference():
    x = np.random.default_rng(0).normal(5, 2, (3, 4))           # clips differ far more than arms do
    found = ablate.compare(numbers(x - 0.12), numbers(x))
    assert found["niqe"] == pytest.approx((0.12, 0.12, 0.12)) and all(np.isnan(found["psnr"]))
    assert ablate.sentence("A", "B", found) == "A beats B in NIQE: +0.12 (0.12 to 0.12)"
    assert ablate.sentence("B", "A", ablate.compare(numbers(x), numbers(x - 0.12))) == \
        "A beats B in NIQE: +0.12 (0.12 to 0.12)"
    better = ablate.compare(numbers(x + 0.5, "psnr"), numbers(x, "psnr"))
    assert better["psnr"] == pytest.approx((0.5, 0.5, 0.5))


def test_paired_bootstrap_of_symmetric_differences_holds_0():
    x, d = np.random.default_rng(0).normal(5, 2, (2, 6)), np.tile([0.3, -0.3], 6).reshape(2, 6)
    mean, lo, hi = ablate.compare(numbers(x + d), numbers(x))["niqe"]
    assert mean == pytest.approx(0, abs=1e-9) and lo == pytest.approx(-hi, abs=0.03)
    # both seeds have the same differences: as good as 6 draws of +-0.3, not 12, whose standard error is 0.12
    assert 0.19 < hi < 0.27
    assert ablate.sentence("A", "B", {"niqe": (mean, lo, hi)}).startswith("no difference shown between A and B in NIQE")


def test_a_gain_whose_interval_holds_0_beats_nobody():
    for mean in (0.1, -0.1):
        said = ablate.sentence("A", "B", {"niqe": (mean, mean - 0.2, mean + 0.2)})
        assert said == (f"no difference shown between A and B in NIQE: {mean:+.2f} "
                        f"({mean - 0.2:.2f} to {mean + 0.2:.2f})")
    assert ablate.sentence("A", "B", {"niqe": (-0.3, -0.5, -0.1)}) == "B beats A in NIQE: +0.30 (0.10 to 0.50)"


def test_an_interval_holds_95_percent():
    d = np.random.default_rng(0).normal(0, 1, (1, 400))
    _, lo, hi = ablate.compare(numbers(-d), numbers(0 * d))["niqe"]
    assert hi - lo == pytest.approx(2 * 1.96 * d.std() / 20, rel=0.06)


def test_what_a_seed_or_a_clip_shares_counts_once():
    """Differences that belong to three seeds alone: twelve pairs are no more than three draws."""
    x, d = np.zeros((3, 4)), np.array([[0.3], [0.1], [-0.1]])
    for gains in (x + d, (x + d[:1]) + np.array([[0.3, 0.1, -0.1, 0.5]])):
        _, lo, hi = ablate.compare(numbers(-gains), numbers(x))["niqe"]
        flat = np.random.default_rng(0).choice(gains.ravel(), (10_000, 12)).mean(1)
        assert hi - lo > 1.4 * np.diff(np.percentile(flat, (2.5, 97.5)))[0]


def test_what_is_better():
    """Up: PSNR, SSIM, VMAF-NEG. Down: NIQE, temporal error, lattice. A grid: the closer it is to that of HR."""
    assert ablate.gain("grid", 0.95, 1.10) == pytest.approx(0.05) == -ablate.gain("grid", 1.10, 0.95)
    assert ablate.gain("grid", 1.06, 1.04, 1.055) == pytest.approx(0.01)
    found = ablate.compare(numbers(np.full((1, 2), 1.06), "grid"), numbers(np.full((1, 2), 1.04), "grid"), 1.055)
    assert found["grid"][0] == pytest.approx(0.01)
    assert {m: ablate.gain(m, 2.0, 1.0) for m in ablate.SHOWN if m != "grid"} == {
        "psnr": 1, "ssim": 1, "vmaf_neg": 1, "niqe": -1, "temporal": -1, "lattice": -1}


@pytest.mark.parametrize("option, least", [("seeds", 1), ("steps", 1), ("frames", 1), ("max_clips", 1),
                                           ("teacher_steps", 2)])
def test_numbers_that_are_too_small_are_refused(option, least):
    with pytest.raises(SystemExit, match=f"{option}: at least {least}"):
        ablate.arguments(["streams", f"--{option}", str(least - 1)])


def test_a_mistyped_arm_is_told_before_any_is_trained(run, monkeypatch):
    monkeypatch.setitem(ablate.ARMS["streams"], "regression", ablate.Arm("regression", dict(w_dmdd=2.0)))
    monkeypatch.setattr(ablate, "train", lambda *args: pytest.fail("trained"))
    with pytest.raises(SystemExit, match="arm 'regression': .*w_dmdd"):
        run("streams", "--seeds", "1")


def test_a_broken_checkpoint_is_named(tmp_path):
    for content in (b"nothing", None):
        path = tmp_path / "last.pt"
        path.write_bytes(content) if content else ablate.torch.save({"a": 1}, path)
        with pytest.raises(SystemExit, match="last.pt: not a checkpoint"):
            ablate.finished(path)


def test_work_counts_the_passes_of_a_run():
    """A student update with its three others is 30 forwards' worth; a warm-up is 7: the student, HR and sample through
    real, HR through fake, 3 to train it. A candidate of 6 x 64 x 64 latents is 2 x 3 x 3 tiles of 5 x 32 x 32."""
    assert ablate.work(2, stage2.Config()) == 40 * 30 + 150 * 7
    assert ablate.work(2, stage2.Config(streams=("mse",))) == 40 * 3
    assert ablate.tiles("small", 21, 256, 256) == 18
    three = stage3.Config(model="small")
    assert ablate.work(3, three) == 2 * three.steps * 4 + three.pairs * three.candidates * 18 / three.batch
    clips = [{"hr": np.zeros((9, 256, 256, 3), np.uint8)}] * 2          # 3 latent frames
    base, todo = stage2.Config(model="small"), {2: stage2.Config()}
    pace = {2: 0.5, (2, "x"): 0.3, "score": 60}
    for key, seconds in (("x", 0.3), ("y", 0.5)):               # its own pace goes before the last arm's
        assert ablate.minutes(todo, key, 4, clips, base, pace, 0.1) == pytest.approx(
            (2250 * seconds + 4 * 18 / 4 * 0.1 + 60) / 60)
    assert ablate.minutes(todo, "x", 0, clips, base, {}, 0.1) == pytest.approx(2250 * 0.1 / 60)
