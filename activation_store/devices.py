"""Whether the device that was asked for is there."""

from __future__ import annotations

from activation_store.errors import UserError


def refuse_missing(device: str) -> None:
    """Raise UserError for a device that torch does not know, or does not find here; loads no torch for the CPU."""
    if device == "cpu":
        return
    import torch

    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"There is no device {device!r}; use cpu, cuda, or cuda:1 for the second GPU.") from error
    if asked.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise UserError(f"The device {device!r} was asked for, but torch sees no GPU here; use --device cpu.")
    if asked.index is not None and asked.index >= torch.cuda.device_count():
        raise UserError(
            f"The device {device!r} was asked for, but torch sees {torch.cuda.device_count()} here, from cuda:0 on."
        )
