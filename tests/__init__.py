"""Tests of ddpmctl."""

import os

# Before torch and numpy read them, and for the processes that tests start: small tensors on several threads spend most of it waiting.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
