"""All latents of an index as one table, to be sorted and filtered in numpy."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from activation_store.errors import UserError


@dataclass(frozen=True)
class FeatureTable:
    """One row per latent, as columns of equal length. A latent that never fired has NaN, "" and -1.

    Attributes:
        latent: number of the latent.
        count, density, density_held_out: rows in which it fired, share of all rows, share of held-out rows.
        maximum, minimum, mean, median: of its non-zero activations.
        top_token, top_token_share: the token that carries most of its summed |activation|, and what part.
        top_logit, top_logit_value, bottom_logit, bottom_logit_value: the tokens it raises and lowers most.
        neighbour, neighbour_cosine: the nearest decoder row.
        coactive, coactive_jaccard: the latent that most nearly fires in the same rows.
        writes_to, writes_to_share: of several hooks that it is decoded into, the one with the largest share of the sum
            of its decoder norms, and that share; "" and NaN where there is one hook.
    """

    latent: np.ndarray
    count: np.ndarray
    density: np.ndarray
    density_held_out: np.ndarray
    maximum: np.ndarray
    minimum: np.ndarray
    mean: np.ndarray
    median: np.ndarray
    top_token: np.ndarray
    top_token_share: np.ndarray
    top_logit: np.ndarray
    top_logit_value: np.ndarray
    bottom_logit: np.ndarray
    bottom_logit_value: np.ndarray
    neighbour: np.ndarray
    neighbour_cosine: np.ndarray
    coactive: np.ndarray
    coactive_jaccard: np.ndarray
    writes_to: np.ndarray
    writes_to_share: np.ndarray

    def __len__(self) -> int:
        return len(self.latent)

    def columns(self) -> dict[str, np.ndarray]:
        """The columns by name, in order."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def take(self, positions: np.ndarray) -> FeatureTable:
        """The rows at ``positions`` (indices or a mask), in their order."""
        return FeatureTable(**{name: column[positions] for name, column in self.columns().items()})

    def sorted_by(self, column: str, descending: bool = True) -> FeatureTable:
        """By one column; NaN last, ties by latent.

        Raises:
            UserError: there is no such column.
        """
        values = self._column(column)
        if values.dtype == object:
            values = np.unique(values.astype(str), return_inverse=True)[1]
        keys = values.astype(np.float64)
        keys = np.where(np.isnan(keys), np.inf, -keys if descending else keys)
        return self.take(np.lexsort((self.latent, keys)))

    def where(
        self,
        *,
        text: str = "",
        fired: bool | None = None,
        at_least: dict[str, float] | None = None,
        at_most: dict[str, float] | None = None,
    ) -> FeatureTable:
        """The latents that match everything asked.

        Args:
            text: in the top token, the top logit or the bottom logit (case matters not), or a latent's number.
            fired: only those that fired at all, or only those that never did.
            at_least, at_most: bounds by column; NaN is within no bound.

        Raises:
            UserError: there is no such column.
        """
        mask = np.ones(len(self), dtype=bool)
        if fired is not None:
            mask &= (self.count > 0) == fired
        for name, bound in (at_least or {}).items():
            mask &= self._column(name) >= bound
        for name, bound in (at_most or {}).items():
            mask &= self._column(name) <= bound
        if wanted := text.casefold():
            found = self.latent.astype(str) == wanted.strip()
            for column in (self.top_token, self.top_logit, self.bottom_logit):
                found |= np.fromiter((wanted in token.casefold() for token in column), dtype=bool, count=len(self))
            mask &= found
        return self.take(mask)

    def _column(self, name: str) -> np.ndarray:
        columns = self.columns()
        if name not in columns:
            raise UserError(f"The table of features has no column {name!r}; it has {', '.join(columns)}.")
        return columns[name]
