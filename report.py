"""The two pictures of an evaluation: panel.png, and report.html, one file that needs no network and no server.

Called by evaluate.py. shown: one dict per clip, {"LR": (F, h, w, 3), row: (F, H, W, 3), ...}, uint8.
titles: {row: what to call it}. The page itself is report_page.html next to this file.
"""
import base64
import html
import io
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import common
import metrics

PAGE_BYTES = 10_000_000         # a page that still opens fast and can be mailed; it decides how many frames it holds
MEANING = {                     # what a reader of the table needs to know about each column
    "psnr": "Peak signal-to-noise ratio on RGB, dB. Rewards blur: the average of all plausible pictures wins.",
    "psnr_y": "The same on luma only.",
    "ssim": "Structural similarity on luma, 1 is equal. Kinder to structure than PSNR, still kind to blur.",
    "niqe": "No reference: distance from the statistics of photographs. Grain can beat the ground truth.",
    "vmaf": "Netflix's learned score against the ground truth, 0 to 100. Can be raised by over-sharpening.",
    "vmaf_neg": "VMAF without credit for sharpening beyond the ground truth.",
    "temporal": "Error of the change from frame to frame, grey levels. Sees flicker and wrong motion.",
    "temporal_ratio": "That error over the ground truth's own change from frame to frame; as large as it at 1.",
    "flicker": "No reference: change over time that no straight motion explains, grey levels. Blur has too little.",
    "grid": "No reference: jumps across borders of 4 and 8 pixel blocks over jumps inside. 1 is no grid.",
    "lattice": "No reference: a fine pattern with the period of the network's tokens, as a share of the detail of "
               "smooth areas, percent. 1 to 2 is none.",
    "lr_consistency": "PSNR of the output, shrunk again, against the input. Low: it shows something else. "
                      "Very high: it repeats the input's noise. The ground truth's own value is the mark.",
    "seam": "No reference: jumps across the borders of the network's tiles over those 8 pixels away. 1 is no seam.",
    "chunk": "Change into the first frame of a chunk over the change into all others. 1 is no jump.",
    "shift": "How far the output lies from the ground truth, pixels, by phase correlation. 0.1 and less is none.",
    "psnr_aligned": "PSNR after that shift is undone.",
    "ssim_aligned": "SSIM after that shift is undone.",
    "musiq": "No reference, learned from ratings of pictures, 0 to 100 (pyiqa).",
    "clipiqa": "No reference: how close CLIP finds a frame to the words 'good photo', 0 to 1 (pyiqa).",
    "lpips": "Distance from the ground truth in the features of a classifier (pyiqa).",
    "dists": "The same, kinder to texture that differs in detail (pyiqa).",
    "dover": "No reference, learned from ratings of videos, 0 to 100, by the formula of evaluate_one_video.py.",
    "calls": "Evaluations of the network for each window of the video.",
    "seconds": "To upscale a clip (maybe in an earlier run), video code included; on a CPU a clip per core.",
}


def truth(clip):
    """What a clip's other pictures are compared with: the ground truth, or without one the output."""
    return clip.get("HR", clip.get("pred"))


# ----------------------------------------------------------------------------
# panel.png


def busiest(frames, size):
    """(y, x), multiples of 4, of the size x size crop with the most detail in the middle frame."""
    y = metrics.luma(frames[len(frames) // 2][None])[0]
    detail = np.abs(np.diff(y, axis=0))[:, :-1] + np.abs(np.diff(y, axis=1))[:-1]
    total, s = np.pad(detail.cumsum(0).cumsum(1), ((1, 0), (1, 0))), min(size, *detail.shape)
    box = total[s:, s:] - total[:-s, s:] - total[s:, :-s] + total[:-s, :-s]     # sums over boxes from their corners
    y, x = np.unravel_index(np.argmax(box[::4, ::4]), box[::4, ::4].shape)
    return int(y) * 4, int(x) * 4


def write_panel(path, shown, titles, size=160, zoom=2):
    """One line per clip, one column per row of the table: the busiest crop of the middle frame, pixels enlarged."""
    columns = {"LR": "low resolution"} | titles                         # a row without output stays an empty column
    font, side, head = ImageFont.load_default(20), size * zoom, 40
    panel = Image.new("RGB", (len(columns) * (side + 6) - 6, head + len(shown) * (side + 6) - 6), "white")
    draw = ImageDraw.Draw(panel)
    for column, (row, title) in enumerate(columns.items()):
        draw.text((column * (side + 6) + side / 2, head / 2), title, "black", font, anchor="mm")
        for line, clip in enumerate(shown):
            corner = (column * (side + 6), head + line * (side + 6))
            y, x = busiest(truth(clip), size)
            if row not in clip:
                draw.rectangle((*corner, corner[0] + side - 1, corner[1] + side - 1), "#eeeeee")
                draw.text((corner[0] + side / 2, corner[1] + side / 2), "not run", "#777777", font, anchor="mm")
                continue
            frame = clip[row][len(clip[row]) // 2]
            k = truth(clip).shape[1] // frame.shape[0]                   # 4 for the LR, else 1
            crop = Image.fromarray(frame[y // k:(y + size) // k, x // k:(x + size) // k])
            panel.paste(crop.resize((crop.width * k * zoom, crop.height * k * zoom), Image.NEAREST), corner)
    panel.save(path)


# ----------------------------------------------------------------------------
# report.html


def embed(frame, kind="JPEG"):
    """A frame (H, W, 3) as a data: address."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame)).save(file, kind, quality=92)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def profiles(clip):
    """(y, {row: address}): the pixel line y that changes most in the truth, and its x-t profile, one line a frame."""
    hr = truth(clip)
    y = int(np.abs(np.diff(metrics.luma(hr), axis=0)).sum(axis=(0, 2)).argmax()) if len(hr) > 1 else 0
    return y, {row: embed(v[:, y * v.shape[1] // hr.shape[1]], "PNG") for row, v in clip.items()}


def page_clips(names, shown, budget):
    """What the page's script needs of each clip. As many frames, around the middle, as fit into budget bytes."""
    clips, steps = [], []
    for name, clip in zip(names, shown, strict=True):
        hr = truth(clip)
        count = len(hr)
        order = sorted(range(count), key=lambda t: abs(t - count // 2))         # middle first
        frames = {row: {t: embed(v[t], "PNG" if row == "LR" else "JPEG") for t in order} for row, v in clip.items()}
        (y, xt), (cy, cx) = profiles(clip), busiest(hr, 96)
        budget -= sum(map(len, xt.values()))
        steps.append([sum(len(v[t]) for v in frames.values()) for t in order])
        clips.append(dict(name=name, size=hr.shape[2:0:-1], order=order, frames=frames, xt=xt, y=y,
                          spot=(cx + 48, cy + 48), count=count))
    fits = 1
    while fits < max(map(len, steps)) and sum(sum(s[:fits + 1]) for s in steps) <= budget:
        fits += 1
    for clip in clips:
        clip["numbers"] = sorted(clip.pop("order")[:fits])
        clip["frames"] = {row: [v[t] for t in clip["numbers"]] for row, v in clip["frames"].items()}
    return clips


def best_rows(rows, metric, direction, digits):
    """Rows (the ground truth is no competitor) that share the best value, to the digits that are shown."""
    values = {row: round(v[metric], digits) for row, v in rows.items() if v[metric] is not None}
    mark = values.pop("HR", None)
    floor = -math.inf if mark is None else mark                 # less than HR has is no better: NIQE rewards grain
    goal = mark or 1                                            # without HR: no jump at borders at all
    better = {"up": lambda v: -v, "down": lambda v: max(v, floor),
              "hr": lambda v: round(abs(v - goal), digits)}.get(direction)
    if better is None or metric in ("calls", "seconds") or len(values) < 2:
        return set()
    top = min(map(better, values.values()))
    return {row for row, v in values.items() if better(v) == top}


def html_table(rows, titles, columns):
    arrow = {"up": " \N{UPWARDS ARROW}", "down": " \N{DOWNWARDS ARROW}", "": "",
             "hr": f" \N{RIGHTWARDS ARROW}{'HR' if 'HR' in rows else 1}"}
    best = {k: best_rows(rows, k, *rule) for k, (_, *rule) in columns.items()}
    head = "".join(f'<th scope="col" title="{html.escape(MEANING[k])}">{heading}{arrow[direction]}</th>'
                   for k, (heading, direction, _) in columns.items())
    lines = [f'<tr><td></td>{head}</tr>']
    for row, values in rows.items():
        if "reason" in values:
            cells = f'<td class="none" colspan="{len(columns)}">&ndash; {html.escape(values["reason"])}</td>'
        else:
            cells = "".join(
                "<td>&ndash;</td>" if values[k] is None else
                f'<td{" class=best" if row in best[k] else ""}>{values[k]:.{digits}f}</td>'
                for k, (_, _, digits) in columns.items())
        lines.append(f'<tr class="{row}"><th scope="row">{html.escape(titles[row])}</th>{cells}</tr>')
    return "\n".join(lines)


def write_html(path, names, shown, titles, columns, result):
    """result: what metrics.json holds. Everything the page needs is in the one file."""
    stamp = result["stamp"]
    columns = {k: v for k, v in columns.items() if any(x[k] is not None for x in result["rows"].values())}
    meaning = "".join(f"<dt>{columns[k][0]}</dt><dd>{html.escape(MEANING[k])}</dd>" for k in columns)
    clips = page_clips(names, shown, PAGE_BYTES - 100_000)
    for clip in clips:
        clip["curves"] = result["per_frame"][clip["name"]]
    degraded = f"Degraded ({stamp['degradation']['strength']}), then upscaled 4x. " if "degradation" in stamp else ""
    warnings = "".join(f'<li>{html.escape(w)}</li>' for w in result["warnings"])
    fill = {
        "ABOUT": f"{len(names)} clips, {max(len(truth(c)) for c in shown)} frames each. {degraded}"
                 f"Commit {html.escape(stamp['commit'])}, {html.escape(stamp['device'])}.",
        "WARNINGS": f"<ul>{warnings}</ul>" if warnings else "",
        "TABLE": html_table(result["rows"], titles, columns),
        "MEANING": meaning,
        "STAMP": html.escape(json.dumps(stamp, indent=2)),
        # a script ends at the first "</", wherever it stands
        "DATA": json.dumps({"titles": {"LR": "low resolution"} | titles, "clips": clips,
                            "headings": {k: heading for k, (heading, _, _) in columns.items()}}).replace("</", "<\\/"),
    }
    page = (Path(__file__).parent / "report_page.html").read_text()
    for key, text in fill.items():
        page = page.replace("{{" + key + "}}", text)
    common.put(path, page)
