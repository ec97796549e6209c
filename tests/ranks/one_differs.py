"""ddpmctl, but rank 1 differs from the others as the variable DIFFERS says, e.g. in its data, settings or code."""

from __future__ import annotations

import atexit
import os
import sys

if os.environ["RANK"] == "1":
    match os.environ["DIFFERS"]:
        case "data":
            sys.argv[sys.argv.index("--data") + 1] = "/nowhere/at/all"
        case "content":
            sys.argv[sys.argv.index("--data") + 1] = os.environ["OTHER_DATA"]
        case "settings":
            os.environ["DDPMCTL_LR"] = "0.5"
        case "code":
            sys.path.insert(0, os.environ["OTHER_CODE"])
        case "disk":
            os.chdir("/")  # where the run's relative path leads nowhere
        case "death":
            os.kill(os.getpid(), 9)
        case "teardown":  # as a thread of gloo may abort the process during Python's shutdown
            atexit.register(os.abort)

from ddpmctl.cli.app import main

main()
