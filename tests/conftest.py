import os
import sys

import numpy as np
import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ["OMP_NUM_THREADS"] = "1"         # for the processes that tests start
os.environ["CUDA_VISIBLE_DEVICES"] = ""     # the tests are of the CPU; several processes would share one GPU
torch.set_num_threads(1)                    # two busy threads on a shared machine are slower than one


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def scene(seed, frames=8, h=64, w=96, speed=2):
    """A smooth random picture that moves `speed` px per frame to the left, uint8 (F, h, w, 3)."""
    wide = w + speed * frames
    coarse = np.random.default_rng(seed).random((1, 3, h // 8, wide // 8), dtype=np.float32)
    coarse = 0.7 * coarse.mean(1, keepdims=True) + 0.3 * coarse              # video halves the resolution of colour
    coarse = 0.5 + 1.5 * (coarse - 0.5)
    wide = torch.nn.functional.interpolate(torch.from_numpy(coarse), size=(h, wide), mode="bicubic")[0].clamp(0, 1)
    wide = (wide * 255).byte().permute(1, 2, 0).numpy()
    return np.stack([wide[:, speed * i:speed * i + w] for i in range(frames)])
