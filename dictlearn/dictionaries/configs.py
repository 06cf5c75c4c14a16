"""What can be asked of each kind of dictionary. No torch here, so that a wrong number is refused before anything loads.

The width of the activations is not asked for: it comes from the store. The sentence under a field is its help text on
the command line. `check` is called with the widths and raises UserError, and so is ``check_parts`` of the kinds that
have it, with the widths of each hook. Kinds that rebuild nothing but their own input say so by ``transcodes = False``,
those that need a target hook by ``autoencodes = False``, those of one hook alone by ``several_hooks = False``.
`check_hooks` asks all of it. ``k_is_free = True`` says that k may be another number after training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, get_args, get_origin, get_type_hints

from activation_store.errors import UserError


class CheckedConfig(Protocol):
    """What every config has, besides what it says only where it differs from other kinds."""

    kind: ClassVar[str]

    def check(self, d_in: int, d_out: int) -> None: ...


def check_hooks(config: CheckedConfig, input_parts: Sequence[int], output_parts: Sequence[int] | None) -> None:
    """Raise UserError when no such dictionary can exist of hooks of these widths; an autoencoder has no outputs."""
    if output_parts is not None and not getattr(config, "transcodes", True):
        raise UserError(
            f"A dictionary of kind {config.kind!r} rebuilds its own input and has no target hook; leave target_hook "
            "out, or use topk."
        )
    if output_parts is None and not getattr(config, "autoencodes", True):
        raise UserError(
            f"A dictionary of kind {config.kind!r} predicts one hook from another, and there is no target hook; name "
            "one in target_hook, or use topk."
        )
    rebuilt = input_parts if output_parts is None else output_parts
    if max(len(input_parts), len(rebuilt)) > 1 and not getattr(config, "several_hooks", True):
        raise UserError(f"A dictionary of kind {config.kind!r} is of one hook alone; name one, or use topk.")
    config.check(sum(input_parts), sum(rebuilt))
    if hasattr(config, "check_parts"):
        config.check_parts(input_parts, rebuilt)


@dataclass(frozen=True)
class TopKConfig:
    """k-sparse dictionary with a learned encoder (Gao et al. 2024, arXiv 2406.04093)."""

    kind: ClassVar[str] = "topk"
    k_is_free: ClassVar[bool] = True

    d_sae: int = 4096
    """Number of latents."""
    k: int = 32
    """Latents active per row."""
    auxk_weight: float = 1 / 32
    """Weight of the AuxK loss, which lets dead latents reconstruct what the live ones leave over; 0 turns it off."""
    k_aux: int | None = None
    """Dead latents active per row in the AuxK loss; half the activation's width when not given."""
    dead_after_rows: int = 10_000_000
    """A latent counts as dead when it has not fired for this many rows (tokens)."""
    multi_topk_weight: float = 0.0
    """Weight of the squared error with 4 k latents active, so that more than k stay meaningful; 0 turns it off."""
    k_start: int | None = None
    """Latents active per row at the first step, from where the number falls linearly to k; k when not given."""
    k_anneal_share: float = 0.5
    """Share of the run over which the number of active latents falls from k_start to k."""
    resample_every: int = 0
    """Steps between two redrawings of dead latents towards rows that are rebuilt badly; 0 turns it off."""
    scaling: Literal["mean_square", "none", "per_token", "layer_norm", "whiten"] = "mean_square"
    """Units of training: data of unit variance, raw, rows of unit mean square, standardised rows, or PCA-whitened."""
    shrinkage: float = 0.01
    """Added to every eigenvalue of the control rows' covariance when whitening, as a share of their mean."""
    initial_decoder: Literal["random", "data"] | None = None
    """Where decoder rows begin: random directions or data points; when not given, data for a transcoder only."""
    initial_b_dec: Literal["geometric_median", "mean", "zero"] = "geometric_median"
    """Where the decoder's bias begins."""

    def check(self, d_in: int, d_out: int) -> None:
        """Raise UserError when no such dictionary can exist on activations of these widths."""
        _check_choices(self)
        _check_positive(self, "d_sae", "k", "dead_after_rows")
        _check_k(self)
        _check_weight(self, "auxk_weight")
        if self.k_aux is not None and not 0 < self.k_aux <= self.d_sae:
            raise UserError(f"k_aux is {self.k_aux}; it must lie between 1 and d_sae ({self.d_sae}).")
        _check_weight(self, "multi_topk_weight")
        _check_redrawing_and_shrinkage(self)

    def check_parts(self, input_parts: Sequence[int], output_parts: Sequence[int]) -> None:
        """Raise UserError when no such dictionary can exist on several hooks of these widths."""
        _check_scaling_of_parts(self.scaling, input_parts)

    def parameters(self, input_parts: Sequence[int], output_parts: Sequence[int]) -> int:
        """Numbers that such a dictionary learns."""
        return _in_two_matrices(self.d_sae, input_parts, output_parts)


@dataclass(frozen=True)
class BatchTopKConfig(TopKConfig):
    """TopK with the active latents shared out over the batch (Bussmann et al. 2024, arXiv 2412.06410)."""

    kind: ClassVar[str] = "batchtopk"
    k_is_free: ClassVar[bool] = False

    k: int = 32
    """Latents active per row, on average over a batch."""
    threshold_rate: float = 0.01
    """How far each step moves the threshold used after training towards the least value selected in its batch."""

    def check(self, d_in: int, d_out: int) -> None:
        """Raise UserError when no such dictionary can exist on activations of these widths."""
        super().check(d_in, d_out)
        if not 0 < self.threshold_rate <= 1:
            raise UserError(f"threshold_rate is {self.threshold_rate}; it must lie above 0 and at most at 1.")


@dataclass(frozen=True)
class MatryoshkaConfig(BatchTopKConfig):
    """BatchTopK whose first latents must also rebuild alone (Bussmann et al. 2025, arXiv 2503.17547)."""

    kind: ClassVar[str] = "matryoshka"

    group_sizes: tuple[int, ...] | None = None
    """Latents in each group, which add up to d_sae; when not given 1/32, 1/16, 1/8 and 1/4 of them, and the rest."""

    def __post_init__(self) -> None:
        if self.group_sizes is not None:  # a list, where it was read from a file
            object.__setattr__(self, "group_sizes", tuple(self.group_sizes))

    def groups(self) -> tuple[int, ...]:
        """Latents in each group, from the first; ``group_sizes`` if given."""
        if self.group_sizes is not None:
            return self.group_sizes
        shares = [self.d_sae // part for part in (32, 16, 8, 4) if part <= self.d_sae]
        return (*shares, self.d_sae - sum(shares))

    def check(self, d_in: int, d_out: int) -> None:
        """Raise UserError when no such dictionary can exist on activations of these widths."""
        super().check(d_in, d_out)
        if self.group_sizes is not None and any(size < 1 for size in self.group_sizes):
            raise UserError(f"group_sizes are {self.group_sizes}; each must be at least 1.")
        if sum(self.groups()) != self.d_sae:
            raise UserError(
                f"group_sizes {self.group_sizes} add up to {sum(self.groups())}, and d_sae is {self.d_sae}; they must "
                "be equal."
            )


@dataclass(frozen=True)
class AbsTopKConfig(TopKConfig):
    """TopK by absolute value, with signed codes (Zhu et al. 2025, arXiv 2510.00404)."""

    kind: ClassVar[str] = "abstopk"

    k: int = 32
    """Latents active per row: those with the pre-activations of largest absolute value."""


@dataclass(frozen=True)
class VariationalConfig(TopKConfig):
    """TopK of latents sampled from a Gaussian posterior, with a KL term (Baker and Li 2025, arXiv 2509.22994)."""

    kind: ClassVar[str] = "vsae"

    beta: float = 0.01
    """Weight of the KL divergence from the prior, N(0, 1) for every latent, beside a row's summed squared error."""
    variance: Literal["none", "fixed", "learned"] = "fixed"
    """Of the posterior: none (nothing is sampled, the KL penalises squared means), sigma squared, or learned."""
    sigma: float = 1.0
    """Standard deviation of the noise in training, in scaled units; where it is learned, that of the first step."""
    kl_warm_up_share: float = 0.05
    """Share of the run, from its start, over which beta rises linearly from 0 to its value."""

    def check(self, d_in: int, d_out: int) -> None:
        """Raise UserError when no such dictionary can exist on activations of these widths."""
        super().check(d_in, d_out)
        _check_weight(self, "beta")
        if not 0 < self.sigma < math.inf:
            raise UserError(f"sigma is {self.sigma}; it must be above 0 (variance none samples nothing).")
        if not 0 <= self.kl_warm_up_share <= 1:
            raise UserError(f"kl_warm_up_share is {self.kl_warm_up_share}; it must lie between 0 (no warm-up) and 1.")

    def parameters(self, input_parts: Sequence[int], output_parts: Sequence[int]) -> int:
        """Numbers that such a dictionary learns."""
        of_variance = self.d_sae * (sum(input_parts) + 1) if self.variance == "learned" else 0
        return super().parameters(input_parts, output_parts) + of_variance


@dataclass(frozen=True)
class SkipConfig(TopKConfig):
    """TopK transcoder with a linear path from input to output beside its latents (Paulo et al. 2025)."""

    kind: ClassVar[str] = "skip"
    autoencodes: ClassVar[bool] = False

    def parameters(self, input_parts: Sequence[int], output_parts: Sequence[int]) -> int:
        """Numbers that such a dictionary learns."""
        return _in_two_matrices(self.d_sae, input_parts, output_parts) + sum(input_parts) * sum(output_parts)


@dataclass(frozen=True)
class KSparseConfig:
    """k-sparse autoencoder with tied weights and linear activations (Makhzani and Frey 2013, arXiv 1312.5663)."""

    kind: ClassVar[str] = "ksparse"
    transcodes: ClassVar[bool] = False
    several_hooks: ClassVar[bool] = False

    d_sae: int = 4096
    """Number of latents."""
    k: int = 32
    """Latents active per row in training."""
    alpha: float = 1.0
    """Times k: latents active per row after training. More than 1 gives richer features that rebuild worse."""
    k_start: int | None = None
    """Latents active per row at the first step, from where the number falls linearly to k; k when not given."""
    k_anneal_share: float = 0.5
    """Share of the run over which the number of active latents falls from k_start to k."""
    dead_after_rows: int = 10_000_000
    """A latent counts as dead when it has not fired for this many rows (tokens)."""
    scaling: Literal["mean_square", "none"] = "mean_square"
    """Units of training: data of unit variance, or raw."""

    def check(self, d_in: int, d_out: int) -> None:
        """Raise UserError when no such dictionary can exist on activations of these widths."""
        _check_choices(self)
        _check_positive(self, "d_sae", "k", "dead_after_rows", "alpha")
        _check_k(self)
        after = round(self.alpha * self.k)
        if after > self.d_sae:
            raise UserError(f"alpha * k is {after}, more than the {self.d_sae} latents of d_sae; lower alpha or k.")

    def parameters(self, input_parts: Sequence[int], output_parts: Sequence[int]) -> int:
        """Numbers that such a dictionary learns."""
        return self.d_sae * (sum(input_parts) + 1) + sum(input_parts)


@dataclass(frozen=True)
class PenalisedConfig:
    """What is asked of every kind whose sparsity comes from a penalty."""

    d_sae: int = 4096
    """Number of latents."""
    warm_up_share: float = 0.05
    """Share of the run, from its start, over which the sparsity penalty rises linearly from 0 to its weight."""
    dead_after_rows: int = 10_000_000
    """A latent counts as dead when it has not fired for this many rows (tokens)."""
    resample_every: int = 0
    """Steps between two redrawings of dead latents towards rows that are rebuilt badly; 0 turns it off."""
    scaling: Literal["mean_square", "none", "per_token", "layer_norm", "whiten"] = "mean_square"
    """Units of training: data of unit variance, raw, rows of unit mean square, standardised rows, or PCA-whitened."""
    shrinkage: float = 0.01
    """Added to every eigenvalue of the control rows' covariance when whitening, as a share of their mean."""

    def check(self, d_in: int, d_out: int) -> None:
        """Raise UserError when no such dictionary can exist on activations of these widths."""
        _check_choices(self)
        _check_positive(self, "d_sae", "dead_after_rows")
        if not 0 <= self.warm_up_share <= 1:
            raise UserError(f"warm_up_share is {self.warm_up_share}; it must lie between 0 (no warm-up) and 1.")
        _check_redrawing_and_shrinkage(self)

    def check_parts(self, input_parts: Sequence[int], output_parts: Sequence[int]) -> None:
        """Raise UserError when no such dictionary can exist on several hooks of these widths."""
        _check_scaling_of_parts(self.scaling, input_parts)

    def parameters(self, input_parts: Sequence[int], output_parts: Sequence[int]) -> int:
        """Numbers that such a dictionary learns."""
        return _in_two_matrices(self.d_sae, input_parts, output_parts)


@dataclass(frozen=True)
class ReLUConfig(PenalisedConfig):
    """ReLU with an L1 penalty on the codes (Bricken et al. 2023)."""

    kind: ClassVar[str] = "relu"

    l1_weight: float = 0.1
    """Weight of the mean sum of a row's codes, in lengths of a typical row, beside the mean squared error."""

    def check(self, d_in: int, d_out: int) -> None:
        """Raise UserError when no such dictionary can exist on activations of these widths."""
        super().check(d_in, d_out)
        _check_weight(self, "l1_weight")


@dataclass(frozen=True)
class CrosscoderConfig(ReLUConfig):
    """Latents that several hooks share, with an L1 penalty by the norms of their decoders (Lindsey et al. 2024)."""

    kind: ClassVar[str] = "crosscoder"
    transcodes: ClassVar[bool] = False

    l1_weight: float = 0.1
    """Weight of the mean sum of a row's codes, each times its decoder norms in all hooks, beside the squared error."""

    def check_parts(self, input_parts: Sequence[int], output_parts: Sequence[int]) -> None:
        """Raise UserError when no such dictionary can exist on several hooks of these widths."""
        super().check_parts(input_parts, output_parts)
        if len(input_parts) < 2:
            raise UserError(
                "A crosscoder relates several hooks, and hook names one; name two or more, of several layers or of "
                "several models, or use relu."
            )


@dataclass(frozen=True)
class JumpReLUConfig(PenalisedConfig):
    """A threshold per latent and a penalty on how many fire (Rajamanoharan et al. 2024, arXiv 2407.14435)."""

    kind: ClassVar[str] = "jumprelu"

    l0_weight: float | None = None
    """Weight of the penalty beside the mean squared error; when not given 0.001, or 1 where there is a target_l0."""
    target_l0: int | None = None
    """Latents that should be active per row: the penalty is then (L0 / target_l0 - 1)^2 of each row instead of L0."""
    bandwidth: float = 0.03
    """Width of the kernel that estimates the thresholds' gradients, in lengths of a typical row; 0.001 in the paper."""
    initial_threshold: float = 0.03
    """Where thresholds begin, in lengths of a typical row; 0.001 in the paper, whose runs are long enough for it."""

    @property
    def penalty_weight(self) -> float:
        """l0_weight, or its default."""
        if self.l0_weight is not None:
            return self.l0_weight
        return 0.001 if self.target_l0 is None else 1.0

    def check(self, d_in: int, d_out: int) -> None:
        """Raise UserError when no such dictionary can exist on activations of these widths."""
        super().check(d_in, d_out)
        if self.l0_weight is not None:
            _check_weight(self, "l0_weight")
        if self.target_l0 is not None and not 1 <= self.target_l0 <= self.d_sae:
            raise UserError(f"target_l0 is {self.target_l0}; it must lie between 1 and d_sae ({self.d_sae}).")
        for field in ("bandwidth", "initial_threshold"):
            if not 0 < getattr(self, field) < math.inf:
                raise UserError(f"{field} is {getattr(self, field)}; it must be above 0.")

    def parameters(self, input_parts: Sequence[int], output_parts: Sequence[int]) -> int:
        """Numbers that such a dictionary learns."""
        return _in_two_matrices(self.d_sae, input_parts, output_parts) + self.d_sae


@dataclass(frozen=True)
class GatedConfig(PenalisedConfig):
    """A gate decides what fires, a magnitude path how strongly (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

    kind: ClassVar[str] = "gated"

    l1_weight: float = 0.1
    """Weight of the mean sum of a row's gate activations, in lengths of a typical row, beside the squared error."""
    auxiliary_weight: float = 1.0
    """Weight of the squared error of what the gate alone rebuilds through a frozen decoder (the paper's is 1)."""

    def check(self, d_in: int, d_out: int) -> None:
        """Raise UserError when no such dictionary can exist on activations of these widths."""
        super().check(d_in, d_out)
        _check_weight(self, "l1_weight")
        _check_weight(self, "auxiliary_weight")
        if self.auxiliary_weight == 0:
            raise UserError("auxiliary_weight is 0; the gate would learn from the penalty alone and close for good.")

    def parameters(self, input_parts: Sequence[int], output_parts: Sequence[int]) -> int:
        """Numbers that such a dictionary learns."""
        return _in_two_matrices(self.d_sae, input_parts, output_parts) + 2 * self.d_sae


@dataclass(frozen=True)
class ICFLConfig:
    """Iterative codebook feature learning: codes by matching pursuit, no learned encoder (arXiv 2412.16247)."""

    kind: ClassVar[str] = "icfl"
    transcodes: ClassVar[bool] = False
    several_hooks: ClassVar[bool] = False

    d_sae: int = 2048
    """Number of atoms."""
    rounds: int = 8
    """Pursuit rounds (J)."""
    width: int = 4
    """Atoms chosen per round (L); a row has at most rounds * width active."""
    whiten: bool = True
    """Whether activations are PCA-whitened by the control rows' covariance."""
    shrinkage: float = 0.01
    """Added to every eigenvalue of that covariance, as a share of their mean."""
    select_by_cosine: bool = True
    """Whether atoms are chosen by cosine with the residual; otherwise by inner product."""
    reset_every: int = 100
    """Steps between two searches for atoms that point the same way."""
    reset_cosine: float = 0.9
    """Of two atoms closer than this, one is drawn anew."""
    dead_after_rows: int = 10_000_000
    """An atom counts as dead when it has not fired for this many rows (tokens)."""

    @property
    def k(self) -> int:
        """Most atoms active per row."""
        return self.rounds * self.width

    def check(self, d_in: int, d_out: int) -> None:
        """Raise UserError when no such dictionary can exist on activations of these widths."""
        _check_positive(self, "d_sae", "rounds", "width", "reset_every", "dead_after_rows")
        if self.width > self.d_sae:
            raise UserError(f"width is {self.width}, more than the {self.d_sae} atoms of d_sae; lower it.")
        if self.k > d_in:
            raise UserError(
                f"rounds * width is {self.k}, more than the activation's width {d_in}: the residual would vanish and "
                "nothing would be learned; lower rounds or width."
            )
        _check_shrinkage(self.shrinkage)
        if not 0 < self.reset_cosine <= 1:
            raise UserError(f"reset_cosine is {self.reset_cosine}; it must lie above 0 and at most at 1.")

    def parameters(self, input_parts: Sequence[int], output_parts: Sequence[int]) -> int:
        """Numbers that such a dictionary learns."""
        return self.d_sae * sum(input_parts)


@dataclass(frozen=True)
class CrossLayerConfig:
    """Latents of each layer's MLP input that write to its output and all later ones (Ameisen et al. 2025)."""

    kind: ClassVar[str] = "clt"
    autoencodes: ClassVar[bool] = False

    d_sae: int = 4096
    """Number of latents, of all layers together; each layer has the same share."""
    k: int = 16
    """Latents active per row in each layer."""
    auxk_weight: float = 1 / 32
    """Weight of the AuxK loss, which lets dead latents reconstruct what the live ones leave over; 0 turns it off."""
    k_aux: int | None = None
    """Dead latents active per row and layer in the AuxK loss; half a layer's width when not given."""
    dead_after_rows: int = 10_000_000
    """A latent counts as dead when it has not fired for this many rows (tokens)."""
    scaling: Literal["mean_square", "none"] = "mean_square"
    """Units of training: every hook of unit variance, or raw."""

    def check(self, d_in: int, d_out: int) -> None:
        """Raise UserError when no such dictionary can exist on activations of these widths."""
        _check_choices(self)
        _check_positive(self, "d_sae", "k", "dead_after_rows")
        _check_weight(self, "auxk_weight")
        if self.k_aux is not None and not 0 < self.k_aux <= self.d_sae:
            raise UserError(f"k_aux is {self.k_aux}; it must lie between 1 and d_sae ({self.d_sae}).")

    def check_parts(self, input_parts: Sequence[int], output_parts: Sequence[int]) -> None:
        """Raise UserError when no such dictionary can exist on hooks of these widths."""
        layers = len(input_parts)
        if layers < 2 or len(output_parts) != layers:
            raise UserError(
                f"A cross-layer transcoder reads two layers or more and predicts as many; hook names {layers} and "
                f"target_hook {len(output_parts)}. Name the MLP input and the MLP output of each layer, in their order."
            )
        if len(set(input_parts)) > 1:
            raise UserError(
                f"The hooks that are encoded have the widths {', '.join(map(str, input_parts))}; they must be equal."
            )
        if self.d_sae % layers:
            raise UserError(
                f"d_sae is {self.d_sae}, which {layers} layers cannot share evenly; make it a multiple of {layers}."
            )
        if self.k > self.d_sae // layers:
            raise UserError(
                f"k is {self.k}, more than the {self.d_sae // layers} latents of each of {layers} layers; lower k or "
                "raise d_sae."
            )

    def parameters(self, input_parts: Sequence[int], output_parts: Sequence[int]) -> int:
        """Numbers that such a dictionary learns."""
        of_layer = self.d_sae // len(input_parts)
        decoders = sum((layer + 1) * of_layer * width for layer, width in enumerate(output_parts))
        return self.d_sae * (input_parts[0] + 1) + decoders + sum(output_parts)


@dataclass(frozen=True)
class MatchingPursuitConfig:
    """MP-SAE: codes by matching pursuit with the decoder's atoms, no encoder (Costa et al. 2025, arXiv 2506.03093)."""

    kind: ClassVar[str] = "mp"
    k_is_free: ClassVar[bool] = True
    transcodes: ClassVar[bool] = False
    several_hooks: ClassVar[bool] = False

    d_sae: int = 4096
    """Number of atoms."""
    k: int = 32
    """Most steps of the pursuit, and so most atoms active per row; may be another number after training."""
    tolerance: float = 0.0
    """A row stops when what is left of it is shorter than this many typical rows; 0 for never."""
    stops_on_repeat: bool = False
    """Whether a row stops when it would choose an atom that it has chosen before."""
    revive_weight: float = 0.0
    """Weight of the revive term, which moves dead atoms to what the live ones leave over; 0 turns it off."""
    dead_after_rows: int = 10_000_000
    """An atom counts as dead when it has not fired for this many rows (tokens)."""
    scaling: Literal["mean_square", "none"] = "mean_square"
    """Units of training: data of unit variance, or raw."""
    initial_decoder: Literal["random", "data"] = "random"
    """Where atoms begin: along random directions, or mostly along data points."""
    bias: Literal["learned", "none"] = "learned"
    """What the pursuit begins from: learned, from the rows' geometric median on; or none, where 0 means nothing."""

    def check(self, d_in: int, d_out: int) -> None:
        """Raise UserError when no such dictionary can exist on activations of these widths."""
        _check_choices(self)
        _check_positive(self, "d_sae", "k", "dead_after_rows")
        if self.k > self.d_sae:
            raise UserError(f"k is {self.k}, more than the {self.d_sae} atoms of d_sae; lower k or raise d_sae.")
        if not 0 <= self.tolerance < 1:
            raise UserError(f"tolerance is {self.tolerance}; it must lie between 0 (never stop early) and below 1.")
        _check_weight(self, "revive_weight")

    def parameters(self, input_parts: Sequence[int], output_parts: Sequence[int]) -> int:
        """Numbers that such a dictionary learns."""
        return self.d_sae * sum(input_parts) + (sum(input_parts) if self.bias == "learned" else 0)


@dataclass(frozen=True)
class SemiNMFConfig:
    """SNMF: non-negative codes of signed features, each of few neurons (Shafran et al. 2025, arXiv 2506.10920)."""

    kind: ClassVar[str] = "snmf"
    transcodes: ClassVar[bool] = False
    several_hooks: ClassVar[bool] = False

    d_sae: int = 100
    """Number of features; the paper has 100 to 400 of an MLP."""
    winners: float = 0.05
    """Share of the neurons that a feature has, those of largest weight; 1 for all (the paper: 0.01; 0.05 for GPT-2)."""
    features: Literal["signed", "non_negative"] = "signed"
    """Whether weights of neurons may be negative; if not, activations must not be either."""
    rows: int = 4096
    """Rows that are factorised before the first step; the steps after it refine the features on all rows."""
    iterations: int = 300
    """Most iterations of that factorisation (the authors' runs: 2000)."""
    patience: int = 100
    """Iterations without a lower error after which it stops."""
    start: Literal["random", "svd"] = "random"
    """Where its codes begin: random numbers, or the rows' principal axes."""
    sweeps: int = 100
    """Most sweeps over all features that find the codes of a row."""
    tolerance: float = 1e-2
    """A row's codes are found when a sweep changes none by more than this share of its best product with a feature."""
    dead_after_rows: int = 10_000_000
    """A feature counts as dead when it has not been used for this many rows (tokens)."""

    def check(self, d_in: int, d_out: int) -> None:
        """Raise UserError when no such dictionary can exist on activations of these widths."""
        _check_choices(self)
        _check_positive(self, "d_sae", "rows", "iterations", "patience", "sweeps", "dead_after_rows")
        if not 0 < self.winners <= 1:
            raise UserError(f"winners is {self.winners}; it must lie above 0 and at most at 1 (all neurons).")
        if not 0 < self.tolerance < 1:
            raise UserError(f"tolerance is {self.tolerance}; it must lie between 0 and 1.")
        if self.rows < self.d_sae:
            raise UserError(f"rows is {self.rows}, fewer than the {self.d_sae} features of d_sae; raise it.")

    def parameters(self, input_parts: Sequence[int], output_parts: Sequence[int]) -> int:
        """Numbers that such a dictionary learns."""
        return self.d_sae * sum(input_parts)


def _in_two_matrices(d_sae: int, input_parts: Sequence[int], output_parts: Sequence[int]) -> int:
    """Numbers in an encoder and a decoder with a bias each."""
    return d_sae * (sum(input_parts) + sum(output_parts) + 1) + sum(output_parts)


def _check_positive(config: object, *fields: str) -> None:
    for field in fields:
        if getattr(config, field) < 1:
            raise UserError(f"{field} is {getattr(config, field)}; it must be at least 1.")


def _check_weight(config: object, field: str) -> None:
    weight = getattr(config, field)
    if not 0 <= weight < math.inf:
        raise UserError(f"{field} is {weight}; it must be 0 (off) or positive.")


def _check_k(config: TopKConfig | KSparseConfig) -> None:
    if config.k > config.d_sae:
        raise UserError(f"k is {config.k}, more than the {config.d_sae} latents of d_sae; lower k or raise d_sae.")
    if config.k_start is not None and not config.k <= config.k_start <= config.d_sae:
        raise UserError(
            f"k_start is {config.k_start}; it must lie between k ({config.k}), to which the number of active latents "
            f"falls, and d_sae ({config.d_sae})."
        )
    if not 0 < config.k_anneal_share <= 1:
        raise UserError(f"k_anneal_share is {config.k_anneal_share}; it must lie above 0 and at most at 1.")


def _check_redrawing_and_shrinkage(config: TopKConfig | PenalisedConfig) -> None:
    if config.resample_every < 0:
        raise UserError(f"resample_every is {config.resample_every}; it must be 0 (off) or positive.")
    _check_shrinkage(config.shrinkage)


def _check_scaling_of_parts(scaling: str, input_parts: Sequence[int]) -> None:
    if scaling in ("per_token", "layer_norm") and len(input_parts) > 1:
        raise UserError(
            f"scaling is {scaling!r}, a row's own scale, and there are {len(input_parts)} hooks side by side with rows "
            "of their own; use mean_square, whiten or none."
        )


def _check_shrinkage(shrinkage: float) -> None:
    if not 0 <= shrinkage <= 1:
        raise UserError(f"shrinkage is {shrinkage}; it must lie between 0 and 1.")


def _check_choices(config: object) -> None:
    """Refuse what is none of a field's words; the command line and YAML have done so, Python has not."""
    for field, hint in get_type_hints(type(config)).items():
        choices = [value for part in (hint, *get_args(hint)) if get_origin(part) is Literal for value in get_args(part)]
        value = getattr(config, field)
        if choices and value is not None and value not in choices:
            raise UserError(f"{field} is {value!r}; choose one of {', '.join(choices)}.")
