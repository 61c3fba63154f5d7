"""report.html in headless Chromium: what a reader does with pointer and keys changes what is shown."""
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

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
  key("ArrowRight"); await wait(); seen.right = frame();
  key("ArrowLeft"); key("ArrowLeft"); await wait(); seen.left = frame();
  key("ArrowLeft", true); await wait(); seen.shifted = section.querySelector("input").value;
  const sides = () => [".left", ".right"].map(s => section.querySelector(s).value);
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


def write_report(path, frames=5):
    """Two clips of solid colours: red, green and blue for the three rows."""
    def clip(i):
        rows = {row: np.stack([texture(i, 96, 160) // 8 + np.uint8(t) for t in range(frames)]) for row in ROWS}
        for channel, row in enumerate(ROWS):
            rows[row][..., channel] += 200
        return {"LR": rows["bicubic"][:, ::4, ::4]} | rows
    names = ["first clip", "second clip"]
    values = dict.fromkeys(evaluate.COLUMNS) | {"psnr": 20.0, "niqe": 5.0}
    result = {"rows": {row: values for row in ROWS}, "warnings": ["a </script> that warns"],
              "per_frame": {n: {row: {"psnr": [20.0 + t + k for t in range(frames)]} for k, row in enumerate(ROWS)}
                            for n in names},
              "stamp": {"commit": "abc", "device": "cpu"}}
    report.write_html(path, names, [clip(0), clip(1)], ROWS, evaluate.COLUMNS, result)


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium: apt-get install chromium")
@pytest.mark.parametrize("size", ["1280,900", "390,844"])
def test_what_a_reader_does(tmp_path, size):
    write_report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    (tmp_path / "driven.html").write_text(page.replace("</html>", f"<script>{SCRIPT}</script></html>"))
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size}",
                           "--virtual-time-budget=10000", "--dump-dom", f"file://{tmp_path}/driven.html"],
                          capture_output=True, text=True, timeout=120)
    seen = json.loads(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)[1])
    assert seen["start"] == ["frame 3 of 5", "500"]
    assert int(seen["dragged"]) == pytest.approx(900, abs=5)
    red, green = seen["after"], seen["before"]                  # bicubic left of the divider, stage III right of it
    assert green[1] > green[0] + 100 and red[0] > red[1] + 100 and seen["loupe"][0] > seen["loupe"][1] + 100
    assert (seen["right"], seen["left"]) == ("frame 4 of 5", "frame 2 of 5")
    assert int(seen["shifted"]) == int(seen["dragged"]) - 20
    assert seen["sides"] == ["bicubic", "stage3"] and seen["swapped"] == ["stage3", "bicubic"]
    assert seen["played"] != seen["left"] and seen["clicked"] == "frame 5 of 5"
    assert "ground truth" in seen["legend"] and seen["xt"] == 4 and seen["wide"]


def test_page_needs_nothing_from_elsewhere(tmp_path):
    write_report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?://|src=|@import|url\(", page) and "{{" not in page
    assert "a &lt;/script&gt; that warns" in page and "MUSIQ" not in page       # columns without a number are left out
