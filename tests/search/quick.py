"""The `perjoule` command with measuring times cut short, for tests that interrupt it: python quick.py optimize ..."""

from __future__ import annotations

import functools
import os
import resource

import perjoule.search.optimize as job
from perjoule.cli.main import main
from perjoule.search import cost

job.Settings = functools.partial(job.Settings, rounds=3, window_s=0.02, repair_s=1.0, versions=4)  # type: ignore[misc]
cost.WINDOW_S = 0.002
if "LARGEST_FILE" in os.environ:  # a disk that is full beyond so many bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LARGEST_FILE"]), resource.RLIM_INFINITY))
main()
