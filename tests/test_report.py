"""report.html in headless Chromium: what a reader does with pointer and keys changes what is shown."""
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

import evaluate
import report
from tests.test_metrics import texture

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ROWS = {"bicubic": "bicubic", "stage3": "stage I + II + III", "HR": "ground truth"}

# runs in the page; leaves what it saw in <pre id=seen>
SCRIPT = """
addEventListener("load", async () => {
  const wait = () => new Promise(done => setTimeout(done, 250)), seen = {};
  await wait();
  const section = document.querySelector("section"), stage = section.querySelector(".stage");
  const box = stage.getBoundingClientRect(), frame = () => section.querySelector("output").textContent;
  const pixel = (canvas, x, y) => [...canvas.getContext("2d").getImageData(x, y, 1, 1).data].slice(0, 3);
  const point = (kind, x) => stage.dispatchEvent(new PointerEvent(kind, {clientX: box.left + x * box.width,
    clientY: box.top + box.height / 2, pointerId: 1, pointerType: "touch", bubbles: true}));
  const key = (name, shift) => document.dispatchEvent(
    new KeyboardEvent("keydown", {key: name, shiftKey: !!shift, bubbles: true}));
  stage.setPointerCapture = () => {};  stage.hasPointerCapture = () => true;      // there is no real pointer
  seen.start = [frame(), section.querySelector("input").value];
  seen.before = pixel(stage, 90, 8);
  point("pointerdown", 0.5); point("pointermove", 0.9); await wait();
  seen.dragged = section.querySelector("input").value;
  seen.after = pixel(stage, 90, 8);
  seen.loupe = pixel(section.querySelectorAll(".near")[0], 30, 30);
  seen.steps = [pixel(stage, 40, 8)];
  key("ArrowRight"); await wait(); seen.right = frame(); seen.steps.push(pixel(stage, 40, 8));
  section.querySelector(".next").click(); await wait(); seen.steps.push(pixel(stage, 40, 8));
  section.querySelector(".back").click(); await wait(); seen.steps.push(pixel(stage, 40, 8));
  key("ArrowLeft"); key("ArrowLeft"); await wait(); seen.left = frame();
  key("ArrowLeft", true); await wait(); seen.shifted = section.querySelector("input").value;
  const near = section.querySelectorAll(".near")[1], before = near.toDataURL();
  key("j"); await wait(); seen.moved = near.toDataURL() !== before;
  const left = near.toDataURL(); key("i"); await wait(); seen.up = near.toDataURL() !== left;
  key("k"); key("l"); await wait(); seen.back = near.toDataURL() === before;
  const sides = () => [".left", ".right"].map(s => section.querySelector(s).value);
  seen.chosen = [];
  for (const row of ["HR", "bicubic"]) {
    section.querySelector(".left").value = row;
    section.querySelector(".left").dispatchEvent(new Event("change")); await wait();
    seen.chosen.push(pixel(stage, 40, 8));
  }
  seen.sides = sides(); key("s"); seen.swapped = sides();
  key("p"); await new Promise(done => setTimeout(done, 400)); key("p"); seen.played = frame();
  seen.legend = section.querySelector(".legend").textContent;
  const curve = section.querySelector(".curve"), where = curve.getBoundingClientRect();
  curve.dispatchEvent(new MouseEvent("click", {clientX: where.right - 2, clientY: where.top + 5, bubbles: true}));
  await wait(); seen.clicked = frame();
  seen.xt = section.querySelectorAll(".xt img").length;
  seen.wide = document.documentElement.scrollWidth <= innerWidth;
  const out = document.createElement("pre"); out.id = "seen"; out.textContent = JSON.stringify(seen);
  document.body.append(out);
});
"""


def write_report(path, frames=5, titles=ROWS, lr=True):
    """Two clips of solid colours, brighter by 5 levels a frame: red, green and blue for the rows."""
    def clip(i):
        rows = {row: np.stack([texture(i, 128, 160) // 8 + np.uint8(5 * t) for t in range(frames)]) for row in titles}
        for channel, row in enumerate(titles):
            rows[row][..., channel] += 200
        return ({"LR": rows["bicubic"][:, ::4, ::4]} if lr else {}) | rows
    names = ["first clip", "second clip"]
    values = dict.fromkeys(evaluate.COLUMNS) | {"psnr": 20.0, "niqe": 5.0}
    result = {"rows": {row: values for row in titles}, "warnings": ["a </script> that warns"],
              "per_frame": {n: {row: {"psnr": [20.0 + t + k for t in range(frames)]} for k, row in enumerate(titles)}
                            for n in names},
              "stamp": {"commit": "abc", "device": "cpu"}}
    report.write_html(path, names, [clip(0), clip(1)], titles, evaluate.COLUMNS, result)


def drive(folder, script, size="1280,900"):
    """What a script that runs in folder/report.html leaves in <pre id=seen>."""
    page = (folder / "report.html").read_text()
    (folder / "driven.html").write_text(page.replace("</html>", f"<script>{script}</script></html>"))
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size}",
                           "--virtual-time-budget=10000", "--dump-dom", f"file://{folder}/driven.html"],
                          capture_output=True, text=True, timeout=120)
    return json.loads(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)[1])


browser = pytest.mark.skipif(not CHROMIUM, reason="needs chromium: apt-get install chromium")


@browser
def test_a_page_without_inputs(tmp_path):
    write_report(tmp_path / "report.html", titles={"pred": "output", "HR": "ground truth"}, lr=False)
    sides = """addEventListener("load", () => setTimeout(() => { const out = document.createElement("pre");
      out.id = "seen"; const pen = document.querySelector(".stage").getContext("2d");
      out.textContent = JSON.stringify([document.querySelector(".left").value, document.querySelector(".right").value,
        ...[40, 120].map(x => [...pen.getImageData(x, 8, 1, 1).data])]);
      document.body.append(out); }, 250));"""
    left, right, first, second = drive(tmp_path, sides)
    assert (left, right) == ("HR", "pred") and first[1] > first[0] + 100 and second[0] > second[1] + 100


@browser
@pytest.mark.parametrize("size", ["1280,900", "390,844"])
def test_what_a_reader_does(tmp_path, size):
    write_report(tmp_path / "report.html")
    seen = drive(tmp_path, SCRIPT, size)
    assert seen["start"] == ["frame 3 of 5", "500"]
    assert int(seen["dragged"]) == pytest.approx(900, abs=5)
    red, green = seen["after"], seen["before"]                  # bicubic left of the divider, stage III right of it
    assert green[1] > green[0] + 100 and red[0] > red[1] + 100 and seen["loupe"][0] > seen["loupe"][1] + 100
    assert (seen["right"], seen["left"]) == ("frame 4 of 5", "frame 2 of 5")
    assert int(seen["shifted"]) == int(seen["dragged"]) - 20
    brightness = [sum(p) for p in seen["steps"]]                # the pictures change, not the number alone
    assert brightness[0] + 6 < brightness[1] == brightness[3] < brightness[2] - 6
    assert seen["moved"] and seen["up"] and seen["back"]
    hr, bicubic = seen["chosen"]
    assert hr[2] > hr[0] + 100 and bicubic[0] > bicubic[2] + 100
    assert seen["sides"] == ["bicubic", "stage3"] and seen["swapped"] == ["stage3", "bicubic"]
    assert seen["played"] != seen["left"] and seen["clicked"] == "frame 5 of 5"
    assert "ground truth" in seen["legend"] and seen["xt"] == 4 and seen["wide"]


def test_page_needs_nothing_from_elsewhere(tmp_path):
    write_report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?://|src=|@import|url\(", page) and "{{" not in page
    assert "a &lt;/script&gt; that warns" in page and "MUSIQ" not in page       # columns without a number are left out


def test_names_end_no_script_and_curves_are_those_of_their_clip(tmp_path):
    frames = np.zeros((1, 32, 48, 3), np.uint8)
    values = dict.fromkeys(evaluate.COLUMNS) | {"psnr": 20.0}
    result = {"rows": {"x": values, "HR": values}, "warnings": [], "stamp": {"commit": "abc", "device": "cpu"},
              "per_frame": {"</script>": {"x": {"psnr": [1.0]}}, "b": {"x": {"psnr": [2.0]}}}}
    report.write_html(tmp_path / "a.html", ["</script>", "b"], [{"x": frames, "HR": frames}] * 2,
                      {"x": "</script>", "HR": "HR"}, evaluate.COLUMNS, result)
    write_report(tmp_path / "b.html")
    ends = [(tmp_path / name).read_text().count("</script>") for name in ("a.html", "b.html")]
    assert ends[0] == ends[1] > 0
    assert re.findall(r'"curves": (.*?}})', (tmp_path / "a.html").read_text()) == [
        '{"x": {"psnr": [1.0]}}', '{"x": {"psnr": [2.0]}}']


def test_what_is_best_where_hr_has_it_is_marked_there():
    rows = {"a": {"grid": 1.0}, "b": {"grid": 1.05}, "HR": {"grid": 1.06}}
    assert report.best_rows(rows, "grid", "hr", 3) == {"b"}
    assert report.best_rows({k: rows[k] for k in "ab"}, "grid", "hr", 3) == {"a"}
    rows = {"a": {"psnr": 20.0}, "b": {"psnr": 21.0}, "HR": {"psnr": None}}
    assert report.best_rows(rows, "psnr", "up", 2) == {"b"}


def test_a_niqe_below_that_of_hr_is_no_better_than_it():
    rows = {"blur": {"niqe": 7.7}, "grain": {"niqe": 4.4}, "near": {"niqe": 4.9}, "HR": {"niqe": 4.93}}
    assert report.best_rows(rows, "niqe", "down", 2) == {"grain", "near"}
    assert report.best_rows({k: rows[k] for k in ("blur", "grain", "near")}, "niqe", "down", 2) == {"grain"}


def test_what_reads_alike_is_equally_good_and_speed_is_no_merit():
    rows = {"a": {"psnr": 20.001, "calls": 1, "seconds": 1.0}, "b": {"psnr": 20.004, "calls": 2, "seconds": 2.0}}
    assert report.best_rows(rows, "psnr", "up", 2) == {"a", "b"} and report.best_rows(rows, "psnr", "up", 3) == {"b"}
    assert not any(report.best_rows(rows, k, "down", 1) for k in ("calls", "seconds"))


def test_what_reads_like_hr_is_as_good_as_it():
    rows = {"near": {"niqe": 4.931}, "grain": {"niqe": 4.4}, "HR": {"niqe": 4.926}}             # 4.93, 4.40, 4.93
    assert report.best_rows(rows, "niqe", "down", 2) == {"near", "grain"}
    rows = {"a": {"grid": 1.05}, "b": {"grid": 1.07}, "HR": {"grid": 1.06}}                     # as far on either side
    assert report.best_rows(rows, "grid", "hr", 3) == {"a", "b"}


def test_a_panel_shows_one_place_the_busiest_in_the_middle_frame(tmp_path):
    hr = np.zeros((3, 320, 480, 3), np.uint8)
    hr[1, 200:, 330:] = np.random.default_rng(0).integers(0, 256, (120, 150, 3))
    hr[:, 60] = np.array([0, 90, 180])[:, None, None]                   # changes most, and is flat
    lr = hr[:, ::4, ::4]
    assert report.busiest(hr, 160) == (156, 316)
    report.write_panel(tmp_path / "p.png", [{"LR": lr, "HR": hr}], {"HR": "x"})
    panel = np.asarray(Image.open(tmp_path / "p.png"))[40:]             # below the titles
    assert np.array_equal(panel[:, :320], lr[1, 39:79, 79:119].repeat(8, 0).repeat(8, 1))
    assert np.array_equal(panel[:, 326:], hr[1, 156:316, 316:476].repeat(2, 0).repeat(2, 1))


def test_a_profile_is_of_the_row_that_changes_most():
    hr = np.zeros((3, 64, 96, 3), np.uint8)
    hr[:, 40] = np.array([0, 90, 180])[:, None, None]
    y, pictures = report.profiles({"LR": hr[:, ::4, ::4], "HR": hr})
    assert y == 40 and pictures["LR"] == report.embed(hr[:, 40, ::4], "PNG")
