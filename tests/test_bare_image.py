"""On an image with torch alone every kind of dictionary can be imported, and a step of TopK be taken.

The contract "bare-image" in pyproject.toml sees the imports that are written at the top of files; here everything that
such an image lacks is kept from being imported at all, at any time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

BARE = """
import sys

OURS = {"activation_store", "dictlearn"}
IMAGE = {"torch", "torchgen", "functorch", "numpy", "safetensors", "triton"}
NEEDS_OF_TORCH = {
    "filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "setuptools", "sympy", "typing_extensions",
}

kept = OURS | IMAGE | NEEDS_OF_TORCH | sys.stdlib_module_names

def is_there(name):
    root = name.partition(".")[0]
    return root in kept or root.startswith("_")

class BareImage:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return self.finder.find_spec(name, path, target) if is_there(name) else None

for name in [name for name in sys.modules if not is_there(name)]:
    del sys.modules[name]  # what a .pth file of this environment has imported already
sys.meta_path[:] = [BareImage(finder) for finder in sys.meta_path]
"""

STEP = """
import torch

from dictlearn import ops
from dictlearn.dictionaries import REGISTRY, dictionary_class
from dictlearn.training.optimiser_config import OptimiserConfig
from dictlearn.training.optimisers import Optimiser
from dictlearn.training.step import Member, take_step

for kind in REGISTRY:
    dictionary_class(kind)
made = dictionary_class("topk")
dictionary, generator = made(made.Config(d_sae=32, k=2, dead_after_rows=4), 8), torch.Generator().manual_seed(0)
rows = torch.randn(6, 8, generator=generator)
dictionary.initialise(rows, None, generator, None)
member = Member("bare", dictionary, Optimiser(OptimiserConfig(), dictionary), generator)
ops.set_backend(BACKEND)
for step in range(2):  # in the second latents are dead
    print(float(take_step(member, rows, None, step, 2).loss.total) > 0)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BARE + code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("backend", ["portable", pytest.param("triton", marks=pytest.mark.needs("interpreter"))])
def test_a_step_is_taken_where_there_is_torch_alone(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    result = run(STEP.replace("BACKEND", repr(backend)))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines() == ["True"] * 2


@pytest.mark.parametrize("name", ["pydantic", "zarr", "transformers", "pytest"])
def test_what_such_an_image_lacks_is_not_found(name: str) -> None:
    result = run(f"import {name}")
    assert result.returncode == 1 and f"No module named '{name}'" in result.stderr
