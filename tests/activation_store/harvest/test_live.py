"""A live model delivers what a following loader delivers from the store that the same harvest makes, bit for bit."""

from __future__ import annotations

import itertools
import os
import threading
from dataclasses import replace

import numpy as np
import pytest

import activation_store.harvest.live as live_module
import activation_store.loader as loader_module
from activation_store.errors import UserError
from activation_store.filters import RowFilter
from activation_store.harvest.live import LiveLoader
from activation_store.harvest.run import HarvestConfig, harvest
from activation_store.loader import Loader
from activation_store.read_ahead import THREAD_NAME
from activation_store.source import ActivationSource
from activation_store.store import open_store
from activation_store.testing import assert_resumes_everywhere
from tests.tiny_models import CORPUS_TEXT

torch = pytest.importorskip("torch")

HOOKS = ("blocks.1.hook_resid_post", "blocks.2.attn.hook_z")
FORWARD_ROWS = 8 * 32
ASKED = dict(batch_size=100, split="all", seed=3, buffer_rows=512)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> HarvestConfig:
    """The bundled model over some 3,000 rows: 13 forward passes, 6 windows, documents of 20 to 300 tokens."""
    folder = tmp_path_factory.mktemp("live")
    (folder / "corpus").mkdir()
    for number in range(30):
        text = CORPUS_TEXT[number:] * 8
        (folder / "corpus" / f"{number:02}.txt").write_text(text[: 80 + 60 * number] + f"# {number}\n")
    return HarvestConfig(
        hooks=HOOKS,
        corpus=str(folder / "corpus"),
        tokens=3000,
        context=32,
        batch_size=8,
        rows_per_chunk=32,
        rows_per_shard=256,
        store=folder / "store.zarr",
        device="cpu",
    )


@pytest.fixture(scope="module")
def store(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        return open_store(harvest(config))


@pytest.fixture(scope="module")
def shared(config):
    """One loader for tests that only read from it: loading the model takes seconds."""
    return LiveLoader(config, **ASKED)


@pytest.fixture
def live(shared, config, monkeypatch):
    """Makes live loaders that all use one model, and count its forward passes as ``passes``."""
    opened = shared._open()
    capture, passes = opened[0], []
    run = capture.run
    monkeypatch.setattr(capture, "run", lambda *a: passes.append(None) or run(*a))

    def make(config=config, **asked):
        loader = LiveLoader(config, **(ASKED | asked))
        loader._opened = opened
        return loader

    make.passes = passes
    return make


def same(batches, others):
    return len(batches) == len(others) and all(
        list(one) == list(other) and torch.equal(one[hook], other[hook])
        for one, other in zip(batches, others, strict=True)
        for hook in HOOKS
    )


# --- what is delivered ------------------------------------------------------------------------------------------------


def test_batches_are_those_of_the_harvested_store(config, store):
    """The whole way, without anything shared: another model in memory, other threads, the same bits."""
    found = list(LiveLoader(config, epochs=1, **ASKED))
    assert same(found, list(Loader(store, HOOKS, follow=True, epochs=1, **ASKED))) and len(found) == 30


@pytest.mark.parametrize(
    "asked",
    [
        dict(split="train"),
        dict(split="held-out", batch_size=7, drop_last=False),
        dict(rank=1, world_size=2),
        dict(rank=0, world_size=3, batch_size=33, split="train"),
        dict(buffer_rows=64),
        dict(buffer_rows=10_000, prefetch=0),
        dict(batch_size=900, buffer_rows=128),
        dict(row_filter=RowFilter(documents=("*1*",)), batch_size=16),
        dict(dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_so_they_are_with_other_splits_ranks_buffers_and_filters(live, store, asked):
    found = list(live(epochs=1, **asked))
    assert found and same(found, list(Loader(store, HOOKS, follow=True, epochs=1, **(ASKED | asked))))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_are_rounded_to_the_type_they_would_be_stored_in(config, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    config = replace(config, dtype=dtype, store=tmp_path / "store.zarr", tokens=600, hooks=HOOKS[:1])
    found = list(LiveLoader(config, epochs=1, **ASKED))
    wanted = list(Loader(open_store(harvest(config)), HOOKS[:1], follow=True, epochs=1, **ASKED))
    assert all(torch.equal(one[HOOKS[0]], other[HOOKS[0]]) for one, other in zip(found, wanted, strict=True))


def test_positions_can_be_filtered(live, store):
    """Which a following loader cannot; a plain one can, in another order."""
    asked = dict(row_filter=RowFilter(positions=(5, 9)), batch_size=1, epochs=1)
    loader, plain = live(**asked), Loader(store, HOOKS, **(ASKED | asked))
    rows = {tuple(batch[HOOKS[0]][0].tolist()) for batch in loader}
    assert rows == {tuple(batch[HOOKS[0]][0].tolist()) for batch in plain} and len(rows) > 100
    assert loader.rows == plain.rows and loader.left_out == plain.left_out


def test_later_epochs_deliver_the_same_rows_in_another_order(live):
    loader = live(epochs=2, drop_last=False)
    batches = [batch[HOOKS[0]] for batch in loader]
    first, second = torch.cat(batches[:30]), torch.cat(batches[30:])
    assert first.shape == second.shape and not torch.equal(first, second)
    assert torch.equal(torch.sort(first, dim=0)[0], torch.sort(second, dim=0)[0])


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer_rows", [64, 512, 10_000])
def test_every_batch_is_computed_once_in_an_epoch(live, buffer_rows):
    list(live(epochs=1, buffer_rows=buffer_rows))
    assert len(live.passes) == -(-3000 // (FORWARD_ROWS - 8)) == 13


def test_ranks_share_the_work(live):
    """Each computes its own windows; a batch that lies in two windows is computed for both."""
    counts = []
    for rank in (0, 1):
        live.passes.clear()
        list(live(epochs=1, rank=rank, world_size=2))
        counts.append(len(live.passes))
    assert sum(counts) <= 13 + 6 and max(counts) <= 10


def test_the_next_window_is_computed_at_the_pace_of_the_delivery(live):
    """No stop at the end of a window: after the first, no batch waits for more than two forward passes."""
    waits, batches = [], iter(live(prefetch=0))
    for _ in range(60):
        before = len(live.passes)
        next(batches)
        waits.append(len(live.passes) - before)
    assert waits[0] <= 4 and max(waits[1:]) <= 2


def test_no_more_than_two_windows_are_held(live):
    loader = live(prefetch=0)
    rows = 0
    for _ in itertools.islice(loader, 60):
        held = loader._windows.values()
        assert len(held) <= 2 and sum(len(window.rows) for window in held) <= 2 * 512
        rows = max(rows, sum(len(window.rows) for window in held))
    assert rows > 512


def test_a_resume_computes_the_window_it_is_in_and_nothing_before_it(live):
    loader = live()
    whole = list(itertools.islice(loader, 29))
    for position in (0, 3, 14, 28):
        before = live()
        list(itertools.islice(before, position))
        live.passes.clear()
        resumed = live(prefetch=0)
        resumed.load_state_dict(before.state_dict())
        first = next(iter(resumed))
        assert torch.equal(first[HOOKS[0]], whole[position][HOOKS[0]])
        # A window of 500 rows lies in 3 or 4 batches of 248; a delivered batch may lie in two windows, and the next
        # one is begun.
        assert len(live.passes) <= 7


# --- position ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [dict(epochs=2), dict(epochs=1, prefetch=0, buffer_rows=64, split="train")], ids=str)
def test_resumes_at_the_exact_next_batch_from_every_position(live, asked):
    assert_resumes_everywhere(lambda: live(batch_size=250, **asked))


def test_a_position_names_the_store_that_would_be_made(live, store):
    state = live().state_dict()
    assert state["order"]["store"] == store.fingerprint
    with pytest.raises(UserError, match="row_order was 'in every epoch' and is 'in the first epoch'"):
        Loader(store, HOOKS, follow=True, **ASKED).load_state_dict(state)
    with pytest.raises(UserError, match="seed was 3 and is 4"):
        live(seed=4).load_state_dict(state)


def test_reading_ends_with_the_iteration(live):
    iterator = iter(live())
    next(iterator)
    iterator.close()
    assert not [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


# --- what else a trainer asks -----------------------------------------------------------------------------------------


def test_a_store_and_a_live_model_are_told_apart_by_nothing_a_trainer_uses(live, store, monkeypatch):
    monkeypatch.setattr(live_module, "CALIBRATION_ROWS", 300)
    monkeypatch.setattr(loader_module, "CALIBRATION_ROWS", 300)
    sources: list[ActivationSource] = [live(), Loader(store, HOOKS, follow=True, **ASKED)]
    one, other = sources
    assert one.manifest.provenance == other.manifest.provenance
    assert one.manifest.batches == other.manifest.batches and one.manifest.fingerprint == other.manifest.fingerprint
    assert one.rows == other.rows and one.batches_in_epoch() == other.batches_in_epoch() and one.hooks == other.hooks
    for hook in HOOKS:
        assert one.d(hook) == other.d(hook) == store.d(hook)
        mine, theirs = one.statistics(hook), other.statistics(hook)
        assert mine.count == theirs.count == 300
        for name in ("mean", "mean_square", "second_moment"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name))
        assert (mine.mean_norm, mine.median_norm, mine.excluded) == (
            theirs.mean_norm,
            theirs.median_norm,
            theirs.excluded,
        )
    mixed, measured = one.mixing(), other.mixing()
    assert mixed.entropy == measured.entropy and mixed.buffer_rows_enough and mixed.neighbour_cosine is None


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_nothing_is_stored_and_no_room_is_asked_for(config, monkeypatch, tmp_path):
    monkeypatch.setattr("activation_store.harvest.disk_space.bytes_free", lambda place: 0)
    LiveLoader(replace(config, store=tmp_path / "none.zarr"), **ASKED)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "asked", "said"),
    [
        ({}, dict(split="test"), "There is no split 'test'; use train, held-out or all"),
        ({}, dict(batch_size=4000), "has 3,000 rows in split 'all': not enough for one batch of 4,000"),
        ({}, dict(row_filter=RowFilter(max_norm_ratio=10)), "live model cannot be filtered by norm"),
        (
            {},
            dict(row_filter=RowFilter(documents=("none",))),
            "No document .* of this harvest is called 'none'",
        ),
        (dict(hooks=("blocks.9.hook_resid_post",)), {}, "There is no hook 'blocks.9.hook_resid_post'"),
        (dict(context=0), {}, "--context is 0"),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_refused_before_the_model_is_loaded(config, changed, asked, said, monkeypatch):
    monkeypatch.setattr(live_module, "capture_of", None)
    with pytest.raises(UserError, match=said):
        LiveLoader(replace(config, **changed), **(ASKED | asked))
