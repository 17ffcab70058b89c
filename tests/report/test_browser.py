"""The page in a real browser: no error, no request, no overflow, light and dark."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from compressor.report.render import write_report
from tests.report import example

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--v=0",
)

# Appended to a copy of the page; leaves what it measured in the title.
PROBE = """
<script>
const shown = [...document.querySelectorAll("figure svg")].filter(s => s.getClientRects().length);
const out = [];
for (const svg of shown) {
  const frame = svg.getBoundingClientRect();
  for (const text of svg.querySelectorAll("text")) {
    const box = text.getBoundingClientRect();
    const inside = box.left >= frame.left - 2 && box.right <= frame.right + 2;
    if (!inside) out.push(svg.id + ": " + text.textContent);
  }
}
const room = document.documentElement;
const cut = [...document.querySelectorAll(".scroll")].filter(s => s.scrollWidth > s.clientWidth);
document.title = JSON.stringify({
  figures: shown.map(s => s.id), out, cut: cut.map(s => s.ariaLabel),
  wide: room.scrollWidth - room.clientWidth,
  width: room.clientWidth, ground: getComputedStyle(document.body).backgroundColor });
</script>
"""

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="no Chromium: `make` installs it"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(example.report(), folder)
    return folder / "report.html"


def browse(page: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None, "Chromium is missing in CI"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


@pytest.mark.parametrize(
    ("width", "suffix", "scheme", "ground"),
    [(1200, "wide", 1, "rgb(255, 255, 255)"), (360, "narrow", 0, "rgb(19, 21, 25)")],
)
def test_layout(
    page: Path, tmp_path: Path, width: int, suffix: str, scheme: int, ground: str
) -> None:
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text("utf-8") + PROBE, "utf-8")
    flags = (f"--window-size={width},1000", f"--blink-settings=preferredColorScheme={scheme}")
    found = browse(probed, tmp_path / "profile", *flags, "--dump-dom")
    assert "CONSOLE" not in found.stderr
    title = re.search(r"<title>(\{.*?\})</title>", found.stdout)
    assert title
    seen = json.loads(title[1].replace("&gt;", ">").replace("&amp;", "&"))
    assert len(seen["figures"]) == 9
    assert all(name.endswith(suffix) for name in seen["figures"])
    assert seen["out"] == []
    assert seen["wide"] <= 0
    assert bool(seen["cut"]) == (width == 360)  # where tables do not fit, they scroll
    assert seen["ground"] == ground


def test_screenshots_and_no_request(page: Path, tmp_path: Path) -> None:
    shots = {}
    for name, scheme in (("dark", 0), ("light", 1)):
        shot, log = tmp_path / f"{name}.png", tmp_path / f"{name}.json"
        flags = (f"--screenshot={shot}", f"--log-net-log={log}", "--window-size=1280,3000")
        scheme_flag = f"--blink-settings=preferredColorScheme={scheme}"
        found = browse(page, tmp_path / name, *flags, scheme_flag)
        assert "CONSOLE" not in found.stderr
        shots[name] = shot.read_bytes()
        assert requests(log) == set()
    assert all(data.startswith(b"\x89PNG") and len(data) > 60_000 for data in shots.values())
    assert shots["dark"] != shots["light"]


def requests(log: Path) -> set[str]:
    """Addresses that the page asked for, without those of the browser's own services."""
    return set(re.findall(r'site=file://[^}]*\}","url":"(https?://[^"]+)"', log.read_text()))


def test_the_checks_notice_a_bad_page(tmp_path: Path) -> None:
    page, log = tmp_path / "bad.html", tmp_path / "log.json"
    wanted = "http://127.0.0.1:9/x.png"
    page.write_text(f"<title>t</title><img src={wanted}><script>console.error('no')</script>")
    flags = (f"--screenshot={tmp_path / 'bad.png'}", f"--log-net-log={log}")
    found = browse(page, tmp_path / "profile", *flags)
    assert "CONSOLE" in found.stderr
    assert requests(log) == {wanted}
