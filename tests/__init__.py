"""Tests of ddpmctl."""

import os
import sys

# Before torch and numpy read them, and for the processes that tests start: small tensors on several threads spend most of it waiting.
# Benchmarks, which are started without pytest, use all cores.
if "pytest" in sys.modules:
    for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(_name, "1")
