from __future__ import annotations

import pytest

from dictlearn.workspace import Workspace
from tests.training.planted import make_store


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    """One store, called s."""
    workspace = Workspace(tmp_path / "workspace")
    (workspace.root / "stores").mkdir(parents=True)
    make_store(workspace.store("s"))
    return workspace
