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


def _check_positive(config: object, *fields: str) -> None:
    for field in fields:
        if getattr(config, field) < 1:
            raise UserError(f"{field} is {getattr(config, field)}; it must be at least 1.")


AnyDictionaryConfig = TopKConfig
"""Union of the built-in configs, for the typed edge (YAML, command line)."""
