"""For all tests: one thread per worker, since pytest-xdist has a worker for every core already."""

import os

import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and per process that tests start
