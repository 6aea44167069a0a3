"""For all tests: one thread per worker, since pytest-xdist has a worker for every core already."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more are processes that import PyTorch each

import torch

torch.set_num_threads(1)
