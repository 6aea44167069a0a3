"""For all tests: one thread per worker, since pytest-xdist has a worker for every core already."""

import torch

torch.set_num_threads(1)
