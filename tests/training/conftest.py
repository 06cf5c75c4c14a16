from __future__ import annotations

import pytest

from activation_store.spec import Geometry
from dictlearn.synthetic import CrossLayerFeatures, write_store
from dictlearn.workspace import Workspace
from tests.training.planted import LAYERS, make_store


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    """One store, called s."""
    workspace = Workspace(tmp_path / "workspace")
    (workspace.root / "stores").mkdir(parents=True)
    make_store(workspace.store("s"))
    return workspace


@pytest.fixture
def stores(workspace) -> Workspace:
    """Besides the store s: t, of the same tokens and another model, and the layers of a third."""
    make_store(workspace.store("t"), fingerprint="sha256:tuned", seed=1)
    planted = CrossLayerFeatures(layers=LAYERS, d=16, features=48, mean_l0=4.0)
    write_store(workspace.store("layered"), planted, 3000, Geometry(64, 512))
    return workspace
