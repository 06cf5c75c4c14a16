"""Cross-layer transcoders: the dictionary contract, and that latents write to their own layer and later ones alone."""

from __future__ import annotations

import pytest
import torch

from activation_store.errors import UserError
from dictlearn.dictionaries.configs import CrossLayerConfig
from dictlearn.dictionaries.cross_layer import CrossLayer
from dictlearn.testing.dictionary import DictionaryTests


class TestCrossLayer(DictionaryTests):
    autoencodes = False
    layers = 2

    def make(self, d_in, d_out, **options):
        config = CrossLayerConfig(d_sae=20, k=3, k_aux=4, dead_after_rows=100, **options)
        return CrossLayer(config, [d_in // self.layers] * self.layers, [d_out // self.layers] * self.layers)

    def variants(self):
        return {
            "two layers": self.make,
            "raw": lambda d_in, d_out: self.make(d_in, d_out, scaling="none"),
            "two outputs of different widths": lambda d_in, d_out: CrossLayer(
                CrossLayerConfig(d_sae=20, k=3, k_aux=4, dead_after_rows=100), [d_in // 2] * 2, [d_out - 3, 3]
            ),
        }

    def reference_loss(self, dictionary, x, target):
        """Every latent of every layer, densely, layer by layer."""
        u, y = dictionary.input_scaling(x), dictionary.target_scaling(target)
        layers, latents = dictionary.layers, dictionary.latents_of_layer
        dead = dictionary.rows_since_fired > dictionary.config.dead_after_rows
        codes, revived = [], []
        for layer in range(layers):
            own = slice(layer * latents, (layer + 1) * latents)
            pre = u.split(dictionary.input_parts, dim=1)[layer] @ dictionary.W_enc[own].T + dictionary.b_enc[own]
            codes.append(kept(pre, dictionary.config.k).relu())
            k_aux = min(dictionary.config.k_aux, int(dead[own].sum()))
            revived.append(kept(pre.masked_fill(~dead[own], -torch.inf), k_aux).nan_to_num(0, neginf=0).relu())
        outputs, of_dead = [], []
        for target_layer, decoder in enumerate(dictionary.decoders):
            rows = decoder.split(latents)
            outputs.append(sum(codes[layer] @ rows[layer] for layer in range(target_layer + 1)))
            of_dead.append(sum(revived[layer] @ rows[layer] for layer in range(target_layer + 1)))
        error = y - torch.cat(outputs, dim=1) - dictionary.b_dec
        mse = error.square().mean()
        if not dead.any():
            return mse
        left_over = (error.detach() - torch.cat(of_dead, dim=1)).square().mean()
        return mse + dictionary.config.auxk_weight * left_over / mse.detach()

    def test_no_output_depends_on_a_later_input(self):
        dictionary = self.trained(True).double()
        x = self.data(True)[0].double().requires_grad_()
        first, second = dictionary(x).split(dictionary.output_parts, dim=1)
        of_first, of_second = (torch.autograd.grad(part.sum(), x, retain_graph=True)[0] for part in (first, second))
        width = dictionary.input_parts[0]
        assert torch.equal(of_first[:, width:], torch.zeros_like(of_first[:, width:])) and of_first[:, :width].any()
        assert of_second[:, :width].any() and of_second[:, width:].any()

    def test_one_output_from_the_inputs_up_to_it_is_that_of_all(self):
        for folded in (False, True):
            dictionary = self.trained(True).double()
            dictionary = dictionary.fold() if folded else dictionary
            x = self.data(True)[0].double()
            parts = x.split(dictionary.input_parts, dim=1)
            for part, whole in enumerate(dictionary(x).split(dictionary.output_parts, dim=1)):
                torch.testing.assert_close(dictionary.rebuild_part(parts[: part + 1], part), whole)

    def test_every_layer_has_k_active_and_its_own_latents(self):
        dictionary = self.trained(True)
        codes = dictionary.encode(self.data(True)[0])
        per_layer = dictionary.layer_of(codes.indices).view(-1, dictionary.layers, dictionary.config.k)
        assert torch.equal(per_layer.unique(dim=2).squeeze(2), torch.arange(2).expand(len(per_layer), 2))

    def test_the_decoder_as_one_matrix_decodes_the_same(self):
        dictionary = self.trained(True).double().fold()
        codes = dictionary.encode(self.data(True)[0].double())
        torch.testing.assert_close(codes.dense() @ dictionary.W_dec + dictionary.b_dec, dictionary.decode(codes))
        before = torch.arange(dictionary.d_sae) >= dictionary.latents_of_layer
        assert not dictionary.W_dec[before, : dictionary.output_parts[0]].any()

    def test_decoder_rows_of_all_layers_together_keep_unit_norm(self):
        for seed in range(3):
            norms = self.trained(True, seed).W_dec.norm(dim=1)
            torch.testing.assert_close(norms, torch.ones_like(norms))

    def test_training_begins_with_a_transcoder_of_each_layer_by_itself(self):
        dictionary = self.trained(True, updates=0)
        assert not dictionary.decoders[1][: dictionary.latents_of_layer].any()
        assert dictionary.decoders[1][dictionary.latents_of_layer :].any()

    @pytest.mark.parametrize(
        ("options", "inputs", "outputs", "sentence"),
        [
            ({}, [6], [6], "hook names 1 and target_hook 1"),
            ({}, [6, 6], [6], "hook names 2 and target_hook 1"),
            ({}, [6, 4], [6, 6], "have the widths 6, 4; they must be equal"),
            ({"d_sae": 21}, [6, 6], [6, 6], "2 layers cannot share evenly; make it a multiple of 2"),
            ({"k": 11}, [6, 6], [6, 6], "k is 11, more than the 10 latents of each of 2 layers"),
            ({"k_aux": 0}, [6, 6], [6, 6], "k_aux is 0"),
            ({"auxk_weight": -1.0}, [6, 6], [6, 6], "auxk_weight is -1"),
        ],
    )
    def test_refuses_what_cannot_be(self, options, inputs, outputs, sentence):
        with pytest.raises(UserError, match=sentence):
            CrossLayer(CrossLayerConfig(**{"d_sae": 20, "k": 2} | options), inputs, outputs)

    def test_the_plan_counts_what_is_learned(self):
        dictionary = self.make(12, 10)
        counted = dictionary.config.parameters(dictionary.input_parts, dictionary.output_parts)
        assert counted == sum(parameter.numel() for parameter in dictionary.parameters())


def kept(pre: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of each row, zeros elsewhere."""
    places = pre.topk(k, dim=1).indices
    return torch.zeros_like(pre).scatter(1, places, pre.gather(1, places))
