"""The scales that colours and bars on a feature page are relative to."""

from __future__ import annotations

from dictlearn.feature_index.read import FeaturePage


def strip_scale(page: FeaturePage) -> float:
    """The largest magnitude that the latent ever reaches: colours mean the same in every band."""
    return max(abs(page.maximum or 0.0), abs(page.minimum or 0.0))


def logit_scale(page: FeaturePage) -> float:
    """The largest magnitude among the logits listed; 1 when all are 0."""
    return max((abs(one.logit) for one in (*page.top_logits, *page.bottom_logits)), default=0.0) or 1.0
