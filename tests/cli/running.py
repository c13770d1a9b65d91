"""The command line in a process of its own."""

import subprocess
import sys

CALL = [sys.executable, "-c", "from perjoule.cli.main import main; main()"]


def run(folder, *arguments):
    return subprocess.run([*CALL, *arguments], cwd=folder, capture_output=True, text=True, timeout=120)
