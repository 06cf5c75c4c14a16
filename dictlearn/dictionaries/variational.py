"""vSAE: TopK of latents that are sampled from a Gaussian while training. SAE and transcoder alike.

Baker and Li 2025 (arXiv 2509.22994): the encoder gives the mean of a posterior, whose divergence from a standard normal
prior is a part of the loss; after training the mean is what is encoded.

    mu = W_enc (u - b_pre) + b_enc        z = mu + sigma eps, eps ~ N(0, I)        codes = ReLU(TopK(z))
    KL = 0.5 sum over latents of (sigma^2 + mu^2 - 1 - log sigma^2)        loss = (|y - output|^2 + beta KL) / O

It is `dictlearn.dictionaries.topk` with that, AuxK included. u and y are scaled, and output = codes W_dec + b_dec. Both
parts are divided by the width O of what is rebuilt, as the mean squared error is, so that a beta means the same at
every width: twice the variance per coordinate that the evidence lower bound gives the decoder. beta rises linearly from
0 over the first steps. sigma is one of

    none      0: nothing is sampled, and the KL is 0.5 mu^2, a penalty on the squares of all pre-activations
    fixed     one number; the KL is 0.5 mu^2 too, the rest of it being a constant
    learned   log sigma^2 = W_var (u - b_pre) + b_var, the same for all rows at first

With beta 0 and "none" it is TopK, bit for bit.

The noise of a row is a function of its raw values, of the step and of a key that the run begins with
(`dictlearn.dictionaries.noise`): equal rows of a batch share it.

What a loss reports of codes and output is without noise, as `encode` and `decode` give it, so that a latent which fires
by noise alone counts as dead; its "mse" is with noise. "kl" is of a row, and "collapsed" the share of latents whose KL
is below 0.01 on average over the batch: posteriors that are the prior, from which nothing can be told of the input.

Axes: B rows, D input width, O output width, S latents, K active per row, A latents looked at besides.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dictlearn import ops
from dictlearn.codes import Codes
from dictlearn.dictionaries.base import Loss, Remembers, Width, forget_moments
from dictlearn.dictionaries.configs import VariationalConfig
from dictlearn.dictionaries.noise import row_noise
from dictlearn.dictionaries.scaling import ControlStatistics
from dictlearn.dictionaries.topk import TopK
from dictlearn.ops import TopKCodes

COLLAPSED = 0.01
"""Nats of KL below which a latent's posterior counts as the prior."""


class Posterior(NamedTuple):
    """What is known of the latents of each row, in the units of the prior.

    Attributes:
        mean: (B, S).
        log_variance: (B, S) where it is learned, () where it is fixed, and None where nothing is sampled.
    """

    mean: Tensor
    log_variance: Tensor | None

    def divergence(self) -> Tensor:
        """(B, S) nats from the prior, but for the constant of a variance that is not learned."""
        of_mean_BS = 0.5 * self.mean.square()
        if self.log_variance is None or self.log_variance.ndim == 0:
            return of_mean_BS
        return of_mean_BS + 0.5 * (self.log_variance.exp() - 1 - self.log_variance)


class Variational(TopK):
    kind = "vsae"
    Config = VariationalConfig
    config: VariationalConfig
    latent_tensors = ()
    noise_key: Tensor
    """() int64, drawn as the run begins."""
    unit: Tensor
    """() what the prior's standard deviation is in the units of the codes: not 1 once folded."""

    def __init__(self, config: VariationalConfig, d_in: Width, d_out: Width | None = None) -> None:
        super().__init__(config, d_in, d_out)
        self.register_buffer("noise_key", torch.zeros((), dtype=torch.int64))
        self.register_buffer("unit", torch.ones(()))
        if config.variance == "learned":
            self.W_var = nn.Parameter(torch.zeros(self.d_sae, self.d_in))
            self.b_var = nn.Parameter(torch.full((self.d_sae,), 2 * math.log(config.sigma)))
        self.step = 0
        """Of the run, by `schedule`; noise differs from step to step."""
        self.warmed = 1.0
        """Share of beta that counts, by `schedule`."""

    def loss(self, x: Tensor, target: Tensor | None = None) -> Loss:
        """TopK's of sampled latents, and the KL term beside it."""
        found = super().loss(x, target)
        weight = self.config.beta * self.warmed
        x_BD = self.input_scaling(x)
        with nullcontext() if weight else torch.no_grad():
            divergence_S = self._posterior(x_BD).divergence().mean(dim=0)
            kl = divergence_S.sum()
        collapsed = (divergence_S.detach() < COLLAPSED).to(kl.dtype).mean()
        total = found.total + weight / self.d_out * kl if weight else found.total
        terms = found.terms | {"kl": kl.detach(), "collapsed": collapsed}
        if self.config.variance == "none":
            return Loss(total, terms, found.codes, found.output)
        with torch.no_grad():
            codes = self._active(x_BD)
            output_BO = ops.decode(codes.values, codes.indices, self.W_dec) + self._without_codes(x_BD)
        return Loss(total, terms, codes, self.target_scaling.undo(output_BO, x))

    def posterior(self, x: Tensor) -> Posterior:
        """Of raw activations (B, D)."""
        return self._posterior(self.input_scaling(x))

    def sample(self, x: Tensor) -> Codes:
        """Raw activations (B, D) to codes with noise, as in training; `encode` is without.

        For a folded dictionary: with a scaling by row, or with one that is not folded yet, they are in scaled units.
        """
        codes = self._select_to_learn(x, self.input_scaling(x), self.k, None)
        return Codes(codes.indices, codes.values, self.d_sae)

    def schedule(self, step: int, steps: int) -> None:
        """TopK's k; and beta rises linearly from 0 over the first ``kl_warm_up_share`` of the run."""
        super().schedule(step, steps)
        last = self.config.kl_warm_up_share * steps
        self.step, self.warmed = step, 1.0 if step >= last else step / last

    @torch.no_grad()
    def initialise(
        self, x: Tensor, target: Tensor | None, generator: torch.Generator, control: ControlStatistics
    ) -> None:
        """As TopK, and the key of the noise."""
        super().initialise(x, target, generator, control)
        if self.config.variance != "none":
            self.noise_key.copy_(torch.randint(2**62, (), generator=generator))

    @torch.no_grad()
    def fold(self) -> Self:
        """As every kind with two matrices; the posterior of a raw row stays what it was."""
        folded = super().fold()
        if self.config.variance == "learned":
            reads_SD, bias_S = self.W_var.double(), self.b_var.double()
            if self.subtracts_b_dec:
                bias_S = bias_S - reads_SD @ self.b_dec.double()
            raw_SD, raw_S = self.input_scaling.into_encoder(reads_SD, bias_S)
            folded.W_var.copy_(raw_SD)
            folded.b_var.copy_(raw_S)
        return folded

    def multiply_codes(self, factor: float) -> None:
        super().multiply_codes(factor)
        self.unit.mul_(factor)

    def _posterior(self, x_BD: Tensor) -> Posterior:
        centred_BD = x_BD - self.b_dec if self.subtracts_b_dec else x_BD
        mean_BS = F.linear(centred_BD, self.W_enc, self.b_enc).to(x_BD.dtype) / self.unit
        if self.config.variance == "none":
            return Posterior(mean_BS, None)
        if self.config.variance == "fixed":
            return Posterior(mean_BS, 2 * torch.full_like(self.unit, self.config.sigma).log())
        return Posterior(mean_BS, F.linear(centred_BD, self.W_var, self.b_var).to(x_BD.dtype))

    def _select_to_learn(self, x: Tensor, x_BD: Tensor, k: int, also_A: Tensor | None) -> TopKCodes:
        """The largest of what is sampled; scaled rows may differ in their last bits between parts of a batch."""
        if self.config.variance == "none":
            return self._select(x_BD, k, also_A)
        mean_BS, log_variance = self._posterior(x_BD)
        assert log_variance is not None
        noise_BS = row_noise(x, self.d_sae, self.noise_key, self.step).to(mean_BS.dtype)
        sampled_BS = self.unit * (mean_BS + (0.5 * log_variance).exp() * noise_BS)
        values_BK, indices_BK = sampled_BS.topk(min(k, self.d_sae), dim=1, sorted=False)
        return TopKCodes(values_BK.relu(), indices_BK, None if also_A is None else sampled_BS[:, also_A])

    def _reset(self, latents_A: Tensor, optimiser: Remembers) -> None:
        super()._reset(latents_A, optimiser)
        if self.config.variance == "learned":
            for parameter, start in ((self.W_var, 0.0), (self.b_var, 2 * math.log(self.config.sigma))):
                parameter[latents_A] = start
                forget_moments(optimiser, parameter, latents_A)
