"""What holds for all tests.

A developer's own calibration against a wall meter does not change what they see. Property tests draw the same examples
every time, so that what fails on one machine fails on every other; `pytest -m hypothesis --hypothesis-profile=default`
draws others, and what that finds becomes a test of its own.
"""

import os

from hypothesis import settings

os.environ["PERJOULE_CALIBRATION"] = "off"
settings.register_profile("the same", derandomize=True, database=None)
settings.load_profile("the same")
