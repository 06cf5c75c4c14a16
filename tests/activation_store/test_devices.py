"""A device that is not there is refused in one sentence."""

from __future__ import annotations

import pytest
import torch

from activation_store.devices import refuse_missing
from activation_store.errors import UserError


def test_what_is_there_is_let_through():
    refuse_missing("cpu")


def test_an_unknown_device_is_named():
    with pytest.raises(UserError, match="There is no device 'tpu3'; use cpu, cuda, or cuda:1"):
        refuse_missing("tpu3")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="'cuda:1' was asked for, but torch sees no GPU here; use --device cpu"):
        refuse_missing("cuda:1")


def test_a_second_gpu_of_one_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refuse_missing("cuda")
    refuse_missing("cuda:0")
    with pytest.raises(UserError, match="'cuda:1' was asked for, but torch sees 1 here"):
        refuse_missing("cuda:1")
