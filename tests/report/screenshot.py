"""A picture of a report's first screen: `python tests/report/screenshot.py REPORT.html OUT.png [width height]`.

Give a height of 0 for the whole page. Options after the sizes: dark, noscript.
"""

from __future__ import annotations

import base64
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import browser


def shoot(
    report: Path, out: Path, width: int = 1400, height: int = 900, *, dark: bool = False, script: bool = True
) -> None:
    with browser.browser(width, height or 900, dark=dark, script=script) as driver:
        driver.get(report.resolve().as_uri())
        time.sleep(0.5)  # the marks glide to their places
        whole = {"captureBeyondViewport": True} if height == 0 else {}
        if whole:
            page = driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
            whole["clip"] = {"x": 0, "y": 0, "width": width, "height": page["height"], "scale": 1}
        picture = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", **whole})
    out.write_bytes(base64.b64decode(picture["data"]))


if __name__ == "__main__":
    words = sys.argv[1:]
    flags = {w for w in words if w in ("dark", "noscript")}
    report, out, *sizes = (w for w in words if w not in flags)
    shoot(Path(report), Path(out), *map(int, sizes), dark="dark" in flags, script="noscript" not in flags)
