"""A harvest into a bucket, killed and cut off from it, makes the store that a disk would hold."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from activation_store.disk import KILL_VARIABLE
from activation_store.harvest.run import HarvestConfig, harvest
from tests.activation_store.object_servers import assert_same_objects, new_url
from tests.activation_store.trouble import cuts

pytestmark = pytest.mark.needs("s3")


def test_a_harvest_through_a_network_that_is_cut(tiny_llama, corpus_folder, tmp_path, s3_server, s3_proxy, monkeypatch):
    from activation_store.harvest.capture import Capture

    passes, original = [], Capture.run
    monkeypatch.setattr(Capture, "run", lambda *arguments: passes.append(1) or original(*arguments))
    config = HarvestConfig(
        model=str(tiny_llama),
        corpus=str(corpus_folder),
        hooks=("blocks.1.hook_resid_post", "blocks.1.attn.hook_z"),
        tokens=2000,
        context=16,
        batch_size=5,
        rows_per_chunk=32,
        rows_per_shard=256,
        store=tmp_path / "store.zarr",
        device="cpu",
    )
    harvest(config)
    needed = len(passes)
    s3_server.use(monkeypatch, s3_proxy.port)
    url = new_url("store.zarr")
    with cuts(s3_proxy, [3000, -2000, 20_000, -500], seconds=0.3) as trouble:
        harvest(replace(config, store=url))
    assert trouble.times >= 3
    assert len(passes) == 2 * needed  # nothing was computed again
    assert_same_objects(url, tmp_path / "store.zarr")


@pytest.mark.heavy
def test_the_real_command_killed_and_run_again(tmp_path, s3_server, s3_proxy, monkeypatch):
    command = shutil.which("dictlearn", path=Path(sys.executable).parent)
    assert command is not None

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([command, *arguments], capture_output=True, text=True, env=os.environ | environment)

    def harvest_into(store: str, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
        sizes = ["--tokens", "3000", "--rows-per-shard", "512", "--rows-per-chunk", "64"]
        return run("harvest", "--store", store, "--hooks", "blocks.1.hook_resid_post", *sizes, *more, **environment)

    assert harvest_into(str(tmp_path / "store.zarr")).returncode == 0
    s3_server.use(monkeypatch, s3_proxy.port)
    url = new_url("store.zarr")
    assert harvest_into(url, **{KILL_VARIABLE: "manifest.put:4"}).returncode == -signal.SIGKILL
    assert "1,024 of 3,000" in run("store", "info", url).stdout
    with cuts(s3_proxy, [300_000, -20_000], seconds=2) as trouble:
        again = harvest_into(url)
    assert again.returncode == 0, again.stderr
    assert trouble.times == 2
    assert "Harvesting from row 1,024: 1,976 rows" in again.stdout + again.stderr
    assert_same_objects(url, tmp_path / "store.zarr")

    info, verified = run("store", "info", url), run("store", "verify", url)
    assert info.returncode == 0 and re.search(r"rows +│ +3,000\n?", info.stdout), info.stdout
    assert verified.returncode == 0 and "every shard and every metadata file is as it was written" in verified.stdout
    planned = harvest_into(new_url(), "--dry-run")
    assert planned.returncode == 0 and re.search(r"bytes free +│ +not known", planned.stdout), planned.stderr
