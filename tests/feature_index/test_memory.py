"""The index of a store is built in the memory it is given, however large the store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dictlearn.workspace import Workspace

from .conftest import make_run, make_store

ROOT = Path(__file__).resolve().parents[2]
MEASURE = """
import json, sys, threading, time
from pathlib import Path
import torch, scipy.sparse
import dictlearn.feature_index.build, dictlearn.dictionaries.topk
from dictlearn.feature_index.command import IndexConfig, run_index
from dictlearn.workspace import Workspace
torch.set_num_threads(1)
torch.randn(64, 16).matmul(torch.randn(16, 512)).topk(8)

def private():  # what is ours alone, in MB: mapped files can be dropped by the system at any time
    for line in open('/proc/self/status'):
        if line.startswith('RssAnon'):
            return int(line.split()[1]) / 1024

before, peak = private(), [0.0]
def watch():
    while True:
        peak[0] = max(peak[0], private())
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
run_index(IndexConfig('run', logits=False, memory_mb=128), Workspace(Path(sys.argv[1])))
print(json.dumps(peak[0] - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_a_store_whose_activations_exceed_the_memory(tmp_path) -> None:
    """120,000 rows of 32 activations are 3.8 million: sorted at once they would take 138 MB, and their pairs more."""
    workspace = Workspace(tmp_path)
    store = make_store(workspace, "store", [1000] * 120, per_shard=8192)
    make_run(workspace, "run", store, d_sae=512, k=32)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(workspace.root)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert json.loads(result.stdout) <= 128
