"""Scaling: what a dictionary does to raw rows before it encodes them, and undoes on what it has decoded.

    mean_square   x / c                c is the root of the mean squared deviation per coordinate of a first batch
    none          x
    per_token     x / r(x)             r(x) is the root mean square of the row itself, |x| / sqrt(D)
    layer_norm    (x - m(x)) / s(x)    m(x), s(x) are mean and standard deviation over the row's own coordinates
    whiten        (x - mu) T           mu and T are mean and shrunk PCA whitening of the control rows

The training loss is in scaled units. In all of them but "none" a coordinate has a variance or a mean square of about 1,
so that the squared error begins near the FVU's unit and the weights of other terms keep their meaning.

An autoencoder scales its target as its input. A transcoder scales its input as asked and its target by one number
("none": not at all): the mean and norm of a target row are not known where only the input is, so they could not be
put back.

Several hooks side by side are parts of a row: "mean_square" then has a number for each part, so that each hook has unit
variance, and "whiten" whitens each part by itself. A row's own scale is of one hook alone.

What is a constant of the data folds into the weights exactly, so that what is saved takes raw activations. Whitening,
and a number for each of several parts, fold into decoder rows that are raw directions, what one unit of a latent adds
to a raw activation; they are no longer of unit norm, and cannot be made so: that would change which latents are the k
largest. What depends on the
row (per_token, layer_norm) folds into no weight and stays a part of the saved dictionary's encode and decode.

Axes: B rows, D width, S latents.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from activation_store.errors import UserError

LEAST = 1e-12
"""Least scale that is divided by: rows that do not vary stay finite."""


class ControlStatistics(Protocol):
    """What centring and whitening need to know of the control rows (a store's statistics of one hook have it).

    Attributes:
        mean: (D,) float64.
        second_moment: (D, D) float64, the mean of outer products.
    """

    @property
    def mean(self) -> np.ndarray: ...

    @property
    def second_moment(self) -> np.ndarray: ...


class Scaling(nn.Module):
    """The interface, and the scaling "none"."""

    row_wise: ClassVar[bool] = False
    """Whether the scale is the row's own, so that weights cannot hold it."""

    def fit(self, rows: Tensor, control: ControlStatistics) -> None:
        """Set the constants from a first batch of raw rows (B, D) and the statistics of the control rows."""

    def forward(self, rows: Tensor) -> Tensor:
        """(B, D) raw rows in scaled units."""
        return rows

    def undo(self, scaled: Tensor, rows: Tensor | None = None) -> Tensor:
        """(B, D) scaled units made raw again; a row-wise scaling takes the scales that the raw ``rows`` have."""
        return scaled

    def into_encoder(self, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """(S, D) and (S,) that give of raw rows what ``W`` and ``b`` give of scaled ones."""
        return W, b

    def into_decoder(self, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """(S, D) and (D,) that rebuild raw rows where ``W`` and ``b`` rebuild scaled ones, from codes times `unit`."""
        return W, b

    def unit(self) -> float:
        """What codes are multiplied by on folding, so that decoder rows of unit norm can stay what they are."""
        return 1.0


class MeanSquare(Scaling):
    """One number for all rows and coordinates."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def fit(self, rows: Tensor, control: ControlStatistics) -> None:
        self.scale.copy_(spread(rows))

    def forward(self, rows: Tensor) -> Tensor:
        return rows / self.scale

    def undo(self, scaled: Tensor, rows: Tensor | None = None) -> Tensor:
        return scaled * self.scale

    def into_encoder(self, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return W / self.scale, b

    def into_decoder(self, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return W, b * self.scale

    def unit(self) -> float:
        return float(self.scale)


class MeanSquareByPart(MeanSquare):
    """One number for each part of a row; ``scale`` (D,) repeats it for each of the part's coordinates."""

    def __init__(self, parts: tuple[int, ...]) -> None:
        super().__init__()
        self.parts = parts
        self.scale = torch.ones(sum(parts))

    @torch.no_grad()
    def fit(self, rows: Tensor, control: ControlStatistics) -> None:
        for scale, part in zip(self.scale.split(self.parts), rows.split(self.parts, dim=1), strict=True):
            scale.fill_(spread(part))

    def into_decoder(self, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return W * self.scale, b * self.scale

    def unit(self) -> float:
        return 1.0


class RowWise(Scaling):
    """Each row by its own root mean square (``per_token``), or by its own mean and deviation (``layer_norm``)."""

    row_wise = True

    def __init__(self, centred: bool) -> None:
        super().__init__()
        self.centred = centred

    def of_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``(shift, scale)``, each (B, 1): what is subtracted from each raw row, and what it is then divided by."""
        shift_B1 = rows.mean(dim=1, keepdim=True) if self.centred else torch.zeros_like(rows[:, :1])
        return shift_B1, (rows - shift_B1).square().mean(dim=1, keepdim=True).sqrt().clamp_min(LEAST)

    def forward(self, rows: Tensor) -> Tensor:
        shift_B1, scale_B1 = self.of_rows(rows)
        return (rows - shift_B1) / scale_B1

    def undo(self, scaled: Tensor, rows: Tensor | None = None) -> Tensor:
        if rows is None:
            raise ValueError(
                "Each row was divided by a scale of its own, and these codes have no offset that says which: "
                "decode what encode returned."
            )
        shift_B1, scale_B1 = self.of_rows(rows)
        return scaled * scale_B1 + shift_B1


class Whiten(Scaling):
    """The control rows become uncorrelated coordinates of variance 1, around 0; each part of a row by itself."""

    mean: Tensor
    whiten: Tensor
    unwhiten: Tensor

    def __init__(self, parts: tuple[int, ...], shrinkage: float) -> None:
        super().__init__()
        self.parts = parts
        self.shrinkage = shrinkage
        width = sum(parts)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("whiten", torch.eye(width))
        self.register_buffer("unwhiten", torch.eye(width))

    @torch.no_grad()
    def fit(self, rows: Tensor, control: ControlStatistics) -> None:
        mean = torch.tensor(control.mean).flatten()
        second_moment = torch.tensor(control.second_moment)
        first, blocks = 0, []
        for width in self.parts:
            part = slice(first, first := first + width)
            blocks.append(whitening(mean[part], second_moment[part, part], self.shrinkage))
        whiten, unwhiten = (torch.block_diag(*of_parts) for of_parts in zip(*blocks, strict=True))
        self.mean.copy_(mean)
        self.whiten.copy_(whiten)
        self.unwhiten.copy_(unwhiten)

    def forward(self, rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):  # the target too is computed here
            return (rows - self.mean) @ self.whiten

    def undo(self, scaled: Tensor, rows: Tensor | None = None) -> Tensor:
        with torch.autocast(scaled.device.type, enabled=False):
            return scaled.to(self.mean.dtype) @ self.unwhiten + self.mean

    def into_encoder(self, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        raw_SD = W @ self.whiten.to(W).T
        return raw_SD, b - raw_SD @ self.mean.to(W)

    def into_decoder(self, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return W @ self.unwhiten.to(W), b @ self.unwhiten.to(W) + self.mean.to(W)


def scalings(
    name: str, input_parts: tuple[int, ...], output_parts: tuple[int, ...] | None, shrinkage: float = 0.0
) -> tuple[Scaling, Scaling]:
    """``(of the input, of the target)`` for one of the names above and the widths of the hooks.

    Without ``output_parts`` it is for an autoencoder, where both are the same object.
    """
    if name == "mean_square":
        of_input = _mean_square(input_parts)
    elif name == "whiten":
        of_input = Whiten(input_parts, shrinkage)
    elif name in ("per_token", "layer_norm"):
        of_input = RowWise(centred=name == "layer_norm")
    else:
        of_input = Scaling()
    if output_parts is None:
        return of_input, of_input
    return of_input, Scaling() if name == "none" else _mean_square(output_parts)


def _mean_square(parts: tuple[int, ...]) -> Scaling:
    return MeanSquare() if len(parts) == 1 else MeanSquareByPart(parts)


def spread(rows: Tensor) -> Tensor:
    """The root of the variance per coordinate of rows (B, D), all coordinates together."""
    return (rows - rows.mean(dim=0)).square().mean().sqrt().clamp_min(LEAST)


def whitening(mean: Tensor, second_moment: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    """PCA whitening ``(T, T^-1)``, each (D, D) for row vectors, in float64, from the mean and second moment of rows.

    Eigenvalues are shrunk, ``s + shrinkage * mean(s)``: directions in which few control rows vary are noise that
    dividing by a near-zero ``s`` would amplify.

    Raises:
        UserError: the control rows lie in a subspace, and no shrinkage makes up for it.
    """
    mean = mean.double()
    covariance = second_moment.double() - mean[:, None] * mean
    s, U = torch.linalg.eigh(covariance)
    s = s.clamp_min(0) + shrinkage * s.clamp_min(0).mean()
    if not s[0] > LEAST * s[-1]:
        raise UserError(
            f"The control rows do not vary in all {len(s)} directions, so nothing can be divided by their spread; "
            "set shrinkage above 0, or use a control store with more rows."
        )
    return U * s.rsqrt(), (U * s.sqrt()).T
