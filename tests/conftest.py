import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"         # before torch reads it; also for the processes that tests start

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
