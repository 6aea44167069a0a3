"""For all tests: one thread per worker, since pytest-xdist has a worker for every core; interrupts that arrive."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more are processes that import PyTorch each

import torch

torch.set_num_threads(1)
# What a script starts in the background (`make test &`) ignores interrupts, and so would all that tests start and stop.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
