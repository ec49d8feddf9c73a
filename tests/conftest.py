import os

import torch

torch.manual_seed(0)
if "PYTEST_XDIST_WORKER" in os.environ:
    # Worker processes share the cores: one thread each; tests of threading set their own number.
    torch.set_num_threads(1)
