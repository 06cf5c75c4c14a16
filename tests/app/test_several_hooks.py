"""A dictionary of several hooks on every page: its hooks read as one line, and each latent says where it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.app.conftest import Screen
from tests.app.tiny_workspace import HOOKS, D

Open = Callable[..., Screen]
HOOKS_READ = f"{HOOKS[0]} + {HOOKS[2]}"


@pytest.fixture
def crosscoder(own: Path) -> Path:
    """The tiny workspace with a run of two hooks and its index."""
    import torch

    from activation_store.store import open_store
    from dictlearn.dictionaries.configs import TopKConfig
    from dictlearn.dictionaries.files import save
    from dictlearn.dictionaries.topk import TopK
    from dictlearn.feature_index.command import IndexConfig, run_index
    from dictlearn.workspace import Workspace

    workspace = Workspace(own)
    store = open_store(workspace.store("stdlib"))
    dictionary = TopK(TopKConfig(d_sae=64, k=4), [D, D])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for matrix in (dictionary.W_enc, dictionary.W_dec):
            matrix.copy_(torch.randn(matrix.shape, generator=generator))
        dictionary.W_dec[:32, D:] *= 0.1  # the first half of the latents writes to the first hook
    hooks = [HOOKS[0], HOOKS[2]]
    made_from = {
        "hook_in": hooks,
        "hook_out": hooks,
        "model": store.manifest.provenance["model"],
        "bos_left_out": True,
        "store": {"name": "stdlib", "fingerprint": store.fingerprint},
        "seed": 0,
    }
    save(dictionary, workspace.run("cross").dictionary, made_from)
    config = {"name": "cross", "store": "stdlib", "hook": hooks, "dictionary": {"kind": "topk", "d_sae": 64, "k": 4}}
    workspace.run("cross").config.write_text(json.dumps(config))
    run_index(IndexConfig(run="cross", logits=False), workspace)
    return own


def test_every_page_names_the_hooks_and_where_a_latent_writes(screen: Open, crosscoder: Path) -> None:
    home = screen("home", workspace=crosscoder)
    assert {row[0]: row[1] for row in home.table(1)}["cross"].startswith(f"topk of {HOOKS_READ}")
    assert screen("runs", workspace=crosscoder, runs="cross").table()[0][2] == HOOKS_READ
    features = screen("features", workspace=crosscoder, index="cross", sort="writes_to_share")
    assert HOOKS_READ in features.blocks("heading")[0]["note"]
    block = features.blocks("table")[0]
    heads = [column["label"] for column in block["columns"]]
    cells = [row["cells"] for row in block["rows"]]
    assert all(len(line) == len(heads) for line in cells)
    written = {
        int(line[0]): line[heads.index("writes to")] for line in cells if len(line[heads.index("writes to")]) > 1
    }
    assert len(written) > 10
    assert all(one["text"] == HOOKS[0] for latent, one in written.items() if latent < 32)
    shares = [float(one["aside"].rstrip("%")) for one in written.values()]
    assert shares == sorted(shares, reverse=True) and min(shares) >= 50
    latent = next(latent for latent in written if latent < 32)
    feature = screen("feature", workspace=crosscoder, index="cross", latent=str(latent))
    assert HOOKS_READ in feature.blocks("heading")[0]["note"]
    (table,) = (one for one in feature.blocks("table") if one["columns"][0]["label"] == "hook")
    assert [row["cells"][0] for row in table["rows"]] == [HOOKS[0], HOOKS[2]]
    assert sum(row["cells"][1]["bar"] for row in table["rows"]) == pytest.approx(1)
    assert table["rows"][0]["cells"][1]["bar"] > 0.7
    compare = screen("compare", workspace=crosscoder, store="stdlib", hooks=HOOKS_READ)
    assert "No run of this input and target is evaluated yet" in compare.notices[0]


def test_pages_of_one_hook_say_nothing_of_where_latents_write(screen: Open) -> None:
    features = screen("features", index="sae", sort="writes_to_share").blocks("table")[0]
    assert "writes to" not in [column["label"] for column in features["columns"]]
    assert [column["label"] for column in features["columns"] if column.get("sorted")] == ["max"]
    feature = screen("feature", index="sae", latent="5")
    assert "hook" not in [table["columns"][0]["label"] for table in feature.blocks("table")]
