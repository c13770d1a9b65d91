"""What holds for all tests: a developer's own calibration against a wall meter does not change what they see."""

import os

os.environ["PERJOULE_CALIBRATION"] = "off"
