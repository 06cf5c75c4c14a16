"""Directions have length 1 and come from where they say."""

from __future__ import annotations

import pytest
import torch

from activation_store.errors import UserError
from dictlearn.dictionaries.configs import CrosscoderConfig, TopKConfig
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.topk import TopK
from dictlearn.steering.directions import difference_of_means, direction, of_latent, random_directions


def filled(dictionary, **provenance):
    with torch.no_grad():
        dictionary.W_dec.copy_(torch.randn(dictionary.W_dec.shape, generator=torch.Generator().manual_seed(0)))
    dictionary.provenance = provenance
    return dictionary


def test_a_latent_s_direction_is_its_decoder_row_where_it_writes():
    transcoder = filled(TopK(TopKConfig(d_sae=6, k=2), 4, 3), hook_in="a", hook_out="b")
    found = of_latent(transcoder, 5)
    assert found.hook == "b" and found.name == "latent 5"
    torch.testing.assert_close(found.unit * transcoder.W_dec[5].norm(), transcoder.W_dec[5].detach())
    for latent in (6, -1):
        with pytest.raises(UserError, match=f"There is no latent {latent}; the dictionary has 6, numbered 0 to 5"):
            of_latent(transcoder, latent)


def test_of_several_hooks_one_is_chosen_and_its_part_of_the_row_taken():
    both = filled(Crosscoder(CrosscoderConfig(d_sae=6), (4, 3)), hook_in=["a", "b"], hook_out=["a", "b"])
    found = of_latent(both, 2, "b")
    torch.testing.assert_close(found.unit, both.W_dec[2, 4:].detach() / both.W_dec[2, 4:].norm())
    with pytest.raises(UserError, match="rebuilds a, b; choose one of them with --hook"):
        of_latent(both, 2)
    with pytest.raises(UserError, match="does not rebuild 'c' but a, b"):
        of_latent(both, 2, "c")


def test_a_difference_of_means_points_from_without_to_with():
    having, lacking = torch.tensor([[4.0, 1.0], [2.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, -7.0], [0.0, 6.0]])
    found = difference_of_means(having, lacking, "h")
    torch.testing.assert_close(found.unit, torch.tensor([3.0, 1.0]) / 10**0.5)
    with pytest.raises(UserError, match="has length 0, so it has no direction"):
        difference_of_means(having, having, "h")
    with pytest.raises(UserError, match="said to lack"):
        difference_of_means(having, lacking[:0], "h")


def test_a_vector_without_direction_is_refused():
    assert direction(torch.tensor([3.0, -4.0]), "h", "v").unit.tolist() == pytest.approx([0.6, -0.8])
    for vector in (torch.zeros(3), torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("inf")])):
        with pytest.raises(UserError, match="v at h has length"):
            direction(vector, "h", "v")


def test_random_directions_are_the_seed_s():
    first, again, other = (random_directions(2, 30, "h", seed) for seed in (0, 0, 1))
    assert torch.equal(first[0].unit, again[0].unit) and not torch.equal(first[0].unit, other[0].unit)
    assert abs(float(first[0].unit @ first[1].unit)) < 0.9
    assert [float(each.unit.norm()) for each in first] == pytest.approx([1.0, 1.0])
