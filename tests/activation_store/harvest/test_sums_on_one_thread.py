"""The last bits of a matrix product depend on how many threads BLAS has shared it among.

A harvest computes its sums on one, whatever the machine; so must the run that computes them again, from the shards,
because the one before was killed between the last commit and the statistics.
"""

from __future__ import annotations

import pytest
from threadpoolctl import ThreadpoolController

from activation_store.harvest.run import HarvestConfig, harvest
from activation_store.moments import Moments
from activation_store.testing import assert_same_files
from activation_store.writer import StoreWriter


class Killed(Exception):
    pass


def test_sums_computed_again_after_a_kill_are_computed_on_one_thread(tiny_llama, corpus_folder, tmp_path, monkeypatch):
    config = HarvestConfig(
        model=str(tiny_llama),
        corpus=str(corpus_folder),
        hooks=("blocks.1.hook_resid_post",),
        tokens=1000,
        context=16,
        batch_size=5,
        rows_per_chunk=32,
        rows_per_shard=256,
        store=tmp_path / "store.zarr",
        device="cpu",
    )
    threads = set()
    settle = Moments.settle

    def watched(self: Moments) -> None:
        threads.update(pool["num_threads"] for pool in blas.info())
        settle(self)

    def killed(self: StoreWriter) -> None:
        raise Killed

    blas = ThreadpoolController().select(internal_api="openblas")
    if not blas.info():
        pytest.skip("numpy has another BLAS here, whose threads are not known")
    with blas.limit(limits=2):
        harvest(config)
        (tmp_path / "store.zarr").rename(tmp_path / "undisturbed.zarr")
        with monkeypatch.context() as patched:
            patched.setattr(StoreWriter, "_complete", killed)
            with pytest.raises(Killed):
                harvest(config)
        for sums in (tmp_path / "store.zarr" / ".staging").glob("sums-*"):
            sums.unlink()
        monkeypatch.setattr(Moments, "settle", watched)
        harvest(config)
    assert threads == {1}
    assert_same_files(tmp_path / "store.zarr", tmp_path / "undisturbed.zarr")
