import os
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ["OMP_NUM_THREADS"] = "1"         # for the processes that tests start
torch.set_num_threads(1)                    # two busy threads on a shared machine are slower than one


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
