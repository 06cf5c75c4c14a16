"""SNMF: semi-non-negative matrix factorisation. Codes are non-negative, features signed and sparse; no encoder.

Shafran, Geiger, Geva 2025, "Decomposing MLP activations into interpretable features via semi-nonnegative matrix
factorization" (arXiv 2506.10920), for what an MLP computes before it is written out (``mlp.hook_post``): rows A ~ G F
with G >= 0, where a feature is a few neurons that act together. An iteration of theirs, here `alternation`:

    F = (G^T G + ridge)^-1 G^T A                                  the features that fit best
    F = winner_take_all(F)                                        the largest |.| of each feature stay, the rest is 0
    G = G * sqrt((P+ + G Q-) / (P- + G Q+))                       P = A F^T, Q = F F^T, X+ = (|X| + X) / 2, X- = X+ - X
    each column of G is divided by its length, which goes to F    it is the product that is determined

The step in G is that of Ding, Li, Jordan 2010 ("Convex and semi-nonnegative matrix factorizations"): without
winner-take-all the error falls in every iteration. With it, it may rise, so the best iterate is kept.

What is not theirs: they factorise one set of rows. A dictionary begins with that, and has two things besides:

- Codes of rows that it has not seen: argmin_(g >= 0) |x - g F|^2, by coordinate descent on the Gram matrix.
- Training, a step for each batch: the gradient of |x - g F|^2 in F at these codes. Winner-take-all stays in force, with
  the gradient passed straight through to the losers too, or else the first winners would be the last. A term of the
  loss, ``losers``, is sum |g_s|^2 v^2 over their values v, with g_s the codes of feature s of all rows: so the gradient
  leads v to where it would be if that loser alone were put back, and it replaces a winner if that lowers the error.
  Features have unit norm; at these codes the gradient is orthogonal to them.

With ``features`` non-negative it is NMF: F is then the non-negative best fit, found as codes are.

Axes: B rows, D width, S features.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from activation_store.errors import UserError
from dictlearn import ops
from dictlearn.codes import Codes
from dictlearn.dictionaries.base import Dictionary, Loss, Width
from dictlearn.dictionaries.configs import SemiNMFConfig
from dictlearn.dictionaries.scaling import LEAST, ControlStatistics, scalings

RIDGE = 1e-6
"""Added to the diagonal of G^T G, whose columns have unit norm (the authors' code has the same)."""
LEAST_CODE = 1e-6
"""Codes of a start are at least this, as a share of the largest: a multiplicative step never leaves 0."""
PRODUCTS = 2**20
"""Products of rows and features in memory at once, 4 MiB: a sweep passes over them once for each feature."""


class SemiNMF(Dictionary):
    kind = "snmf"
    Config = SemiNMFConfig
    config: SemiNMFConfig
    b_dec: Tensor

    def __init__(self, config: SemiNMFConfig, d_in: Width, d_out: Width | None = None) -> None:
        super().__init__(config, d_in, d_out)
        self.features = nn.Parameter(torch.zeros(self.d_sae, self.d_in))
        self.register_buffer("b_dec", torch.zeros(self.d_in))
        self.input_scaling, self.target_scaling = scalings("mean_square", self.input_parts, None)

    @property
    def W_dec(self) -> Tensor:  # type: ignore[override]
        """(S, D) winners of each feature, unit rows."""
        return winner_take_all(self.features, self.config.winners)

    def encode(self, x: Tensor) -> Codes:
        """Raw activations (B, D) to codes, of all features if need be; in raw units once folded, scaled before."""
        return self._solve(self.input_scaling(x), self.W_dec.detach())

    def decode(self, codes: Codes) -> Tensor:
        return self.target_scaling.undo(ops.decode(codes.values, codes.indices, self.W_dec))

    def loss(self, x: Tensor, target: Tensor | None = None) -> Loss:
        """Squared error; the codes are constants, only the features learn.

        Autocast is off: codes follow from differences of products, and bfloat16 has no digits left for them.
        """
        with torch.autocast(x.device.type, enabled=False):
            x_BD = self.input_scaling(x)
            winners_SD = self.W_dec.detach()
            codes = self._solve(x_BD, winners_SD)
            features_SD = self.features + (winners_SD - self.features).detach()
            output_BD = ops.decode(codes.values, codes.indices, features_SD)
            mse = (x_BD - output_BD).square().mean()
            # without this term losers wander, and training can raise the error
            squares_S = codes.dense().square().mean(dim=0)
            losers = (squares_S @ (self.features - winners_SD).square()).sum() / self.d_in
            terms = {"mse": mse.detach(), "losers": losers.detach()}
        return Loss(mse + losers, terms, codes, self.target_scaling.undo(output_BD.detach()))

    @torch.no_grad()
    def initialise(
        self, x: Tensor, target: Tensor | None, generator: torch.Generator, control: ControlStatistics
    ) -> None:
        """The paper's factorisation of the first ``rows`` rows.

        Raises:
            UserError: there are fewer rows than features, or negative activations for non-negative features.
        """
        self.input_scaling.fit(x, control)
        x_BD = self.input_scaling(x[: self.config.rows])
        refuse_rows(x_BD, self.d_sae, self.non_negative)
        start = svd_codes if self.config.start == "svd" else random_codes
        found = factorise(
            x_BD,
            start(x_BD, self.d_sae, generator),
            winners=self.config.winners,
            iterations=self.config.iterations,
            patience=self.config.patience,
            non_negative=self.non_negative,
        )
        self.features.copy_(found.features)
        self.constrain()

    @torch.no_grad()
    def constrain(self) -> None:
        """Unit norm of the winners; the losers are scaled with them."""
        if self.non_negative:
            self.features.clamp_(min=0)
        self.features.div_(torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True).clamp_min(LEAST))

    @torch.no_grad()
    def fold(self) -> Self:
        """A copy that takes raw activations: codes grow with what they rebuild, and losers are dropped."""
        folded = self.copy()
        folded.features.copy_(self.W_dec)
        folded.drop_scaling()
        return folded

    @property
    def non_negative(self) -> bool:
        return self.config.features == "non_negative"

    @torch.no_grad()
    def _solve(self, x_BD: Tensor, features_SD: Tensor) -> Codes:
        gram_SS = features_SD @ features_SD.T
        dense_BS = non_negative_codes(x_BD @ features_SD.T, gram_SS, self.config.sweeps, self.config.tolerance)
        return Codes.from_dense(dense_BS)


# --- the factorisation ------------------------------------------------------------------------------------------------


class Factorisation(NamedTuple):
    """Rows (B, D) as codes times features.

    Attributes:
        features: (S, D) of the best iterate; their lengths are what the columns of ``codes``, of unit norm, lack.
        codes: (B, S), non-negative.
        errors: after each iteration, the squared error as a share of the rows' sum of squares.
        best: number of the best iterate, from 0.
    """

    features: Tensor
    codes: Tensor
    errors: list[float]
    best: int


@torch.no_grad()
def factorise(
    rows_BD: Tensor,
    codes_BS: Tensor,
    *,
    winners: float = 1.0,
    iterations: int,
    patience: int,
    non_negative: bool = False,
) -> Factorisation:
    """Alternate from the non-negative codes of a start, until ``patience`` iterations have brought nothing better.

    Args:
        winners: the share of a feature's coordinates that winner-take-all keeps; 1 for all.
        non_negative: whether features are, and not the codes alone.
    """
    scale = rows_BD.square().mean().sqrt().clamp_min(LEAST)
    rows_BD = rows_BD / scale
    whole = rows_BD.square().sum().clamp_min(LEAST)
    codes_BS = _unit_columns(codes_BS.clamp_min(LEAST_CODE * float(codes_BS.max())))[0]
    features_SD = codes_BS.new_zeros(codes_BS.shape[1], rows_BD.shape[1])
    best = Factorisation(features_SD, codes_BS, [], 0)
    errors: list[float] = []
    for iteration in range(iterations):
        features_SD, codes_BS = alternation(rows_BD, codes_BS, winners, non_negative)
        errors.append(float((rows_BD - codes_BS @ features_SD).square().sum() / whole))
        if iteration == 0 or errors[-1] < errors[best.best]:
            best = Factorisation(features_SD, codes_BS, errors, iteration)
        elif iteration - best.best >= patience:
            break
    return best._replace(features=best.features * scale)


def alternation(rows_BD: Tensor, codes_BS: Tensor, winners: float, non_negative: bool = False) -> tuple[Tensor, Tensor]:
    """One iteration from codes (B, S): ``(features (S, D), codes (B, S) with columns of unit norm)``."""
    gram_SS = codes_BS.T @ codes_BS
    right_SD = codes_BS.T @ rows_BD
    if non_negative:
        features_SD = non_negative_codes(right_SD.T, gram_SS, sweeps=100, tolerance=1e-4).T
    else:
        ridge_SS = RIDGE * torch.eye(len(gram_SS), dtype=torch.float64, device=gram_SS.device)
        features_SD = torch.linalg.solve(gram_SS.double() + ridge_SS, right_SD.double()).to(rows_BD.dtype)
    features_SD = winner_take_all(features_SD, winners)
    products_BS = rows_BD @ features_SD.T
    gram_SS = features_SD @ features_SD.T
    up_BS = products_BS.clamp_min(0) + codes_BS @ (-gram_SS).clamp_min(0)
    down_BS = (-products_BS).clamp_min(0) + codes_BS @ gram_SS.clamp_min(0)
    codes_BS = codes_BS * (up_BS / (down_BS + RIDGE)).sqrt()
    codes_BS, lengths_S = _unit_columns(codes_BS)
    return features_SD * lengths_S[:, None], codes_BS


def winner_take_all(features_SD: Tensor, winners: float) -> Tensor:
    """Each row with its ceil(winners * D) largest coordinates by absolute value, exactly so many, and 0 elsewhere."""
    kept = winners_of(winners, features_SD.shape[1])
    if kept == features_SD.shape[1]:
        return features_SD
    places_SK = features_SD.abs().topk(kept, dim=1).indices
    return torch.zeros_like(features_SD).scatter(1, places_SK, features_SD.gather(1, places_SK))


def winners_of(share: float, width: int) -> int:
    """Coordinates that a share of ``width`` comes to, rounded up; a hair above a whole number is rounding."""
    return math.ceil(share * width - 1e-9)


def _unit_columns(codes_BS: Tensor) -> tuple[Tensor, Tensor]:
    """``(the same with columns of unit norm, their lengths (S,))``; a column of zeros stays, with length 1."""
    lengths_S = torch.linalg.vector_norm(codes_BS, dim=0)
    lengths_S = torch.where(lengths_S > LEAST, lengths_S, 1.0)
    return codes_BS / lengths_S, lengths_S


def random_codes(rows_BD: Tensor, features: int, generator: torch.Generator) -> Tensor:
    """(B, S) uniform between 0 and 1: the paper's usual start."""
    return torch.rand(len(rows_BD), features, generator=generator, dtype=rows_BD.dtype).to(rows_BD.device)


def svd_codes(rows_BD: Tensor, features: int, generator: torch.Generator) -> Tensor:
    """(B, S) from the principal axes of the rows, the larger of each one's two signs; random beyond as many as D.

    As in Boutsidis and Gallopoulos 2008 ("SVD based initialization"), for the codes alone.
    """
    _, axes_DD = torch.linalg.eigh(rows_BD.T @ rows_BD)
    projected_BS = rows_BD @ axes_DD.flip(1)[:, :features]
    positive_BS, negative_BS = projected_BS.clamp_min(0), (-projected_BS).clamp_min(0)
    codes_BS = torch.where(positive_BS.norm(dim=0) >= negative_BS.norm(dim=0), positive_BS, negative_BS)
    beyond = random_codes(rows_BD, features - codes_BS.shape[1], generator)
    return torch.cat([codes_BS, beyond * codes_BS.mean()], dim=1)


def refuse_rows(rows_BD: Tensor, features: int, non_negative: bool) -> None:
    """Raise UserError when rows (B, D) cannot be factorised."""
    if len(rows_BD) < features:
        raise UserError(
            f"There are {len(rows_BD)} rows for {features} features; give at least as many rows, or lower the number "
            "of features."
        )
    if not torch.isfinite(rows_BD).all():
        raise UserError("There are activations that are not finite; mend the data first.")
    if non_negative and (rows_BD < 0).any():
        raise UserError(
            f"Non-negative features rebuild no negative activation, and there are some (the least is "
            f"{float(rows_BD.min()):.3g}, in units of the rows' spread); use signed features."
        )


# --- codes of given features ------------------------------------------------------------------------------------------


@torch.no_grad()
def non_negative_codes(products_BS: Tensor, gram_SS: Tensor, sweeps: int, tolerance: float) -> Tensor:
    """argmin over g >= 0 of |x - g F|^2 for each row x, by coordinate descent, block by block of rows.

    Args:
        products_BS: x F^T, rows by features.
        gram_SS: F F^T. A feature of zeros is given no code.
        sweeps: most passes over all features.
        tolerance: a row is finished when a pass changes none of its codes by more than this share of its largest
            product; codes that are no larger are 0. What a row is given does not depend on the other rows.

    Returns:
        (B, S) codes.
    """
    blocks = products_BS.split(max(1, PRODUCTS // products_BS.shape[1]))
    return torch.cat([_descend(block_BS, gram_SS, sweeps, tolerance) for block_BS in blocks])


def _descend(products_BS: Tensor, gram_SS: Tensor, sweeps: int, tolerance: float) -> Tensor:
    found_BS = torch.zeros_like(products_BS)
    rows_R = torch.arange(len(products_BS), device=products_BS.device)  # those that are not finished
    least_B = max(tolerance, 2 * torch.finfo(products_BS.dtype).eps) * products_BS.amax(dim=1).clamp_min(0)
    slopes_SR = products_BS.T.contiguous()  # (x - g F) F^T at the codes g
    codes_SR = torch.zeros_like(slopes_SR)
    inverses = [1 / square if square > LEAST else 0.0 for square in gram_SS.diagonal().tolist()]
    for _ in range(sweeps):
        before_SR = codes_SR.clone()
        for slope_R, code_R, gram_S, inverse in zip(slopes_SR, codes_SR, gram_SS, inverses, strict=True):
            step_R = torch.maximum(slope_R * inverse, -code_R)
            code_R += step_R
            slopes_SR.addr_(gram_S, step_R, alpha=-1)
        moves_R = (codes_SR - before_SR).abs().amax(dim=0) > least_B[rows_R]
        if not moves_R.all():
            found_BS[rows_R[~moves_R]] = codes_SR[:, ~moves_R].T
            rows_R, codes_SR, slopes_SR = rows_R[moves_R], codes_SR[:, moves_R], slopes_SR[:, moves_R]
        if not len(rows_R):
            break
    found_BS[rows_R] = codes_SR.T
    return torch.where(found_BS > least_B[:, None], found_BS, 0.0)
