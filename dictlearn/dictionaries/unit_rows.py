"""Rows of unit norm through training: their gradient loses its component along them, and the norm is restored after."""

from __future__ import annotations

import torch
from torch import Tensor

from dictlearn.dictionaries.scaling import LEAST
from dictlearn.ops import row_gradients


@torch.no_grad()
def drop_gradient_along(rows_SD: Tensor) -> None:
    """What an update along a row would do is undone by `restore_norms`, but Adam's moments would remember it."""
    gradient = row_gradients.of(rows_SD)
    if gradient is not None:
        gradient.unit_rows = True
    elif rows_SD.grad is not None:
        along_S = torch.linalg.vecdot(rows_SD.grad, rows_SD)
        rows_SD.grad.addcmul_(rows_SD, along_S[:, None], value=-1)


@torch.no_grad()
def restore_norms(rows_SD: Tensor) -> None:
    if not row_gradients.has_unit_rows(rows_SD):
        rows_SD.div_(torch.linalg.vector_norm(rows_SD, dim=1, keepdim=True).clamp_min(LEAST))
