from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tiny_medical writes the files that these tests read


@pytest.fixture(autouse=True)
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the samples of datalists are kept: a folder of each test's own."""
    monkeypatch.setenv("XUTRAIN_SAMPLES", str(tmp_path / "samples"))
    return tmp_path / "samples"
