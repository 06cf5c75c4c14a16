"""What can be asked of each kind of dictionary. No torch here, so that a wrong number is refused before anything loads.

The width of the activations is not asked for: it comes from the store. The sentence under a field is its help text on
the command line. `check` is called with the widths and raises UserError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from activation_store.errors import UserError


@dataclass(frozen=True)
class TopKConfig:
    """k-sparse dictionary with a learned encoder (Gao et al. 2024, arXiv 2406.04093)."""

    kind: ClassVar[str] = "topk"

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

    def check(self, d_in: int, d_out: int) -> None:
        """Raise UserError when no such dictionary can exist on activations of these widths."""
        _check_positive(self, "d_sae", "k", "dead_after_rows")
        if self.k > self.d_sae:
            raise UserError(f"k is {self.k}, more than the {self.d_sae} latents of d_sae; lower k or raise d_sae.")
        if self.auxk_weight < 0:
            raise UserError(f"auxk_weight is {self.auxk_weight}; it must be 0 (off) or positive.")
        if self.k_aux is not None and not 0 < self.k_aux <= self.d_sae:
            raise UserError(f"k_aux is {self.k_aux}; it must lie between 1 and d_sae ({self.d_sae}).")


@dataclass(frozen=True)
class ICFLConfig:
    """Iterative codebook feature learning: codes by matching pursuit, no learned encoder (arXiv 2412.16247)."""

    kind: ClassVar[str] = "icfl"

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
        if d_in != d_out:
            raise UserError("ICFL rebuilds its own input and has no target hook; leave target_hook out, or use topk.")
        if self.width > self.d_sae:
            raise UserError(f"width is {self.width}, more than the {self.d_sae} atoms of d_sae; lower it.")
        if self.k > d_in:
            raise UserError(
                f"rounds * width is {self.k}, more than the activation's width {d_in}: the residual would vanish and "
                "nothing would be learned; lower rounds or width."
            )
        if not 0 <= self.shrinkage <= 1:
            raise UserError(f"shrinkage is {self.shrinkage}; it must lie between 0 and 1.")
        if not 0 < self.reset_cosine <= 1:
            raise UserError(f"reset_cosine is {self.reset_cosine}; it must lie above 0 and at most at 1.")


def _check_positive(config: object, *fields: str) -> None:
    for field in fields:
        if getattr(config, field) < 1:
            raise UserError(f"{field} is {getattr(config, field)}; it must be at least 1.")
