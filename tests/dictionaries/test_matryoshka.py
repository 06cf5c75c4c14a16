"""Matryoshka BatchTopK: what BatchTopK promises, and what the nested prefixes add."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from activation_store.errors import UserError
from dictlearn.dictionaries.base import Dictionary, Width
from dictlearn.dictionaries.batch_topk import BatchTopK
from dictlearn.dictionaries.configs import BatchTopKConfig, MatryoshkaConfig
from dictlearn.dictionaries.matryoshka import Matryoshka
from dictlearn.training.config_files import config_from_yaml
from tests.dictionaries import test_batch_topk


class TestMatryoshka(test_batch_topk.TestBatchTopK):
    def make(self, d_in: Width, d_out: Width | None, **numbers: Any) -> Matryoshka:
        defaults = {"d_sae": 24, "k": 4, "dead_after_rows": 1000, "group_sizes": (3, 5, 16)}
        return Matryoshka(MatryoshkaConfig(**defaults | numbers), d_in, d_out)

    def variants(self) -> dict[str, Callable[[Width, Width | None], Dictionary]]:
        versions: dict[str, dict[str, Any]] = {
            "mean_square": {},
            "per_token": {"scaling": "per_token"},
            "whiten": {"scaling": "whiten"},
            "one group": {"group_sizes": (24,)},
            "halved groups": {"group_sizes": None},
            "Multi-TopK, resampled, falling k": {
                "k": 2,
                "multi_topk_weight": 1 / 8,
                "k_start": 12,
                "k_anneal_share": 0.4,
                "resample_every": 2,
            },
        }
        return {name: partial(self.make, **numbers) for name, numbers in versions.items()}

    def reference_loss(self, dictionary: BatchTopK, x: Tensor, target: Tensor | None) -> Tensor:
        """Bussmann et al. 2025, dense: beside BatchTopK's loss, the prefixes' errors in place of the whole's alone."""
        p = dict(dictionary.named_parameters())
        y = dictionary.input_scaling(x) if target is None else dictionary.target_scaling(target)
        pre = self.pre_activations(dictionary, x)
        chosen = pre.flatten().topk(dictionary.config.k * len(x)).indices
        codes = (torch.zeros(pre.numel(), dtype=pre.dtype).scatter(0, chosen, 1.0).view_as(pre) * pre).relu()
        ends = [0, *torch.tensor(dictionary.config.groups()).cumsum(0).tolist()]
        errors = [(y - p["b_dec"] - codes[:, :end] @ p["W_dec"][:end]).square().mean() for end in ends]
        return super().reference_loss(dictionary, x, target) - errors[-1] + sum(errors) / len(errors)

    @pytest.mark.parametrize("seed", range(3))
    def test_the_first_latents_alone_rebuild_more_than_those_of_batchtopk(self, seed: int):
        """With 0.31 to 0.74 of the squared error, over 5 seeds."""
        for transcoder in self.modes():
            nested = self.trained(transcoder, seed=seed, updates=200)
            plain = self.trained(
                transcoder,
                seed=seed,
                updates=200,
                make=lambda d_in, d_out: BatchTopK(BatchTopKConfig(d_sae=24, k=4, dead_after_rows=1000), d_in, d_out),
            )
            x, target = self.data(transcoder, rows=256)
            y = x if target is None else target

            def error(dictionary: Dictionary, end: int, x: Tensor = x, y: Tensor = y) -> float:
                folded = dictionary.fold()
                output = folded.b_dec + folded.encode(x).dense()[:, :end] @ folded.W_dec[:end]
                return float((y - output).square().mean().detach())

            prefixes = [error(nested, end) for end in (0, 3, 8, 24)]
            assert prefixes == sorted(prefixes, reverse=True)
            for end in (3, 8):
                assert error(nested, end) < 0.9 * error(plain, end), (transcoder, end)


def test_groups_that_are_not_given_double_until_the_last_takes_the_rest():
    assert MatryoshkaConfig(d_sae=4096).groups() == (128, 256, 512, 1024, 2176)
    assert MatryoshkaConfig(d_sae=24).groups() == (1, 3, 6, 14)
    assert MatryoshkaConfig(d_sae=1, k=1).groups() == (1,)
    assert MatryoshkaConfig(d_sae=6, group_sizes=[2, 4]) == MatryoshkaConfig(d_sae=6, group_sizes=(2, 4))


def test_groups_are_read_from_a_file(tmp_path: Path):
    path = tmp_path / "config.yaml"
    numbers = "{kind: matryoshka, d_sae: 24, k: 4, group_sizes: [8, 16]}"
    path.write_text(f"name: a\nstore: s\nhook: h\ndictionary: {numbers}")
    assert config_from_yaml(path).dictionary == MatryoshkaConfig(d_sae=24, k=4, group_sizes=(8, 16))


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"d_sae": 24, "group_sizes": (8, 8)}, r"group_sizes \(8, 8\) add up to 16, and d_sae is 24"),
        ({"d_sae": 24, "group_sizes": (24, 0)}, r"group_sizes are \(24, 0\); each must be at least 1"),
        ({"d_sae": 24, "group_sizes": ()}, r"group_sizes \(\) add up to 0, and d_sae is 24"),
        ({"d_sae": 8, "k": 9}, "k is 9, more than the 8 latents"),
    ],
)
def test_impossible_numbers_are_refused_in_a_sentence(numbers, sentence):
    with pytest.raises(UserError, match=sentence):
        Matryoshka(MatryoshkaConfig(**{"k": 4} | numbers), 16)
