"""Tests of ddpmctl."""

import os

# Set before torch and numpy read them, and inherited by processes that tests start: for small tensors, several threads are slower than one.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
