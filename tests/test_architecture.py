"""ARCHITECTURE.md names files: they are there."""

from __future__ import annotations

import re

import pytest

from .scripts import ROOT

PAGE = ROOT / "ARCHITECTURE.md"
NAMED = (
    sorted(set(re.findall(r"`([a-z_]+(?:/[a-z_0-9]+)*(?:\.py|/))`", PAGE.read_text())))
    if PAGE.exists()
    else []
)


@pytest.mark.skipif(not PAGE.exists(), reason="an installed package comes without it")
def test_every_file_that_the_page_names_is_there():
    assert len(NAMED) > 20
    assert [name for name in NAMED if not (ROOT / name).exists()] == []
