"""The page's size, as measured where it counts: `large_page`. Its speed: fra/tests/bench/bench_explorer.py."""

from __future__ import annotations

from pathlib import Path

from fra.tests.explorer.large_page import D_HEAD, N_HEADS, large_page

MOST = 15e6


def test_a_page_of_nine_heads_can_be_sent_by_mail(tmp_path: Path) -> None:
    size = large_page(tmp_path).stat().st_size
    # Query maps of every head alone, in float16 as base64: no page is smaller than what it must carry.
    assert 1500 * D_HEAD * N_HEADS * 2 * 4 / 3 < size <= MOST
