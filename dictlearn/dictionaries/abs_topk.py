"""AbsTopK: keep the k pre-activations of largest absolute value, with their sign. SAE and transcoder alike.

Zhu et al. 2025, "AbsTopK: rethinking sparse autoencoders for bidirectional features" (arXiv 2510.00404): hard
thresholding, so that one latent can stand for a direction and its opposite.

    codes = HardThreshold_k(W_enc (u - b_pre) + b_enc)        output = codes W_dec + b_dec

It is `dictlearn.dictionaries.topk` with another selection and no ReLU: codes are signed, and so are those that dead
latents have in the AuxK loss. The Multi-TopK term decodes the 4 k of largest absolute value.
"""

from __future__ import annotations

from typing import ClassVar

from dictlearn.dictionaries.configs import AbsTopKConfig
from dictlearn.dictionaries.topk import TopK
from dictlearn.ops import Rule


class AbsTopK(TopK):
    kind = "abstopk"
    Config = AbsTopKConfig
    config: AbsTopKConfig
    rule: ClassVar[Rule] = "magnitude"
