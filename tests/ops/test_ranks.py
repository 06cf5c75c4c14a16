"""A dictionary over several processes is the dictionary on one: loss, terms, codes, counters, every gradient.

The processes are real and speak gloo; what each compares is in rank_worker.py.
"""

from __future__ import annotations

import pytest
import torch.multiprocessing as multiprocessing

from tests.ops.rank_worker import compare


@pytest.mark.parametrize(
    ("size", "data_parts"),
    [pytest.param(2, 1, marks=pytest.mark.heavy), (2, 2), pytest.param(4, 2, marks=pytest.mark.heavy)],
)
def test_a_split_dictionary_equals_the_whole_one(tmp_path, size, data_parts):
    multiprocessing.spawn(compare, (size, data_parts, str(tmp_path / "rendezvous")), nprocs=size)


def test_the_comparison_sees_a_part_that_is_missing(tmp_path):
    """Two processes that do not add up what their latents decode to."""
    with pytest.raises(multiprocessing.ProcessRaisedException, match="total: topk, seed 0"):
        multiprocessing.spawn(_without_summing, (2, 1, str(tmp_path / "rendezvous")), nprocs=2)


def _without_summing(rank: int, *arguments) -> None:
    from dictlearn.ops.ranks import ProcessMesh

    ProcessMesh.total = lambda self, part: part
    compare(rank, *arguments)
