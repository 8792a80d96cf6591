"""Where the real data lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("sketchfast", deadline=None, max_examples=60)  # no test is timed
settings.load_profile("sketchfast")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real data sets; skips where there is none."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    root = Path(os.environ.get("SKETCHFAST_DATA", beside))
    if not root.is_dir():
        pytest.skip(f"no real data at {root} (set SKETCHFAST_DATA)")
    return root
