"""The contract of a dictionary, as tests. Subclass, give a tiny instance and a slow reference, inherit the rest.

    class TestMine(DictionaryTests):
        def make(self, d_in, d_out): return Mine(MineConfig(...), d_in, d_out)
        def reference_loss(self, dictionary, x, target): ...   # float64, dense, plain autograd

The reference is the back door: it must not call the dictionary's own encode, decode or loss.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from activation_store.errors import UserError
from dictlearn.codes import Codes
from dictlearn.dictionaries.base import Dictionary, Update
from dictlearn.dictionaries.files import load, save


class DictionaryTests:
    """Inherit in a class whose name starts with Test."""

    transcodes = True
    """Whether the kind accepts another target than its input."""
    d_in, d_out, rows = 12, 10, 64

    # --- what a subclass gives -------------------------------------------------------------------------------------

    def make(self, d_in: int, d_out: int | None) -> Dictionary:
        """A tiny untrained dictionary; d_out None means an autoencoder."""
        raise NotImplementedError

    def reference_loss(self, dictionary: Dictionary, x: Tensor, target: Tensor | None) -> Tensor:
        """The total loss written as dense plain autograd, from the dictionary's parameters and buffers."""
        raise NotImplementedError

    # --- fixtures ----------------------------------------------------------------------------------------------------

    def modes(self) -> list[bool]:
        return [False, True] if self.transcodes else [False]

    def data(self, transcoder: bool, seed: int = 0, rows: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Correlated rows far from the origin with an odd scale: what hides a forgotten bias hides nothing here."""
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(self.d_in, self.d_in, generator=generator)
        x = 3 * torch.randn(rows or self.rows, self.d_in, generator=generator) @ mixing + 5
        target = torch.tanh(x @ torch.randn(self.d_in, self.d_out, generator=generator) / 10) * 7 - 2
        return x, target if transcoder else None

    def control(self) -> SimpleNamespace:
        """Statistics of the rows that `data` gives, as a store keeps them."""
        x = self.data(False, rows=4096)[0].double()
        return SimpleNamespace(mean=x.mean(dim=0).numpy(), second_moment=(x.T @ x / len(x)).numpy())

    def trained(self, transcoder: bool, seed: int = 0, updates: int = 5) -> Dictionary:
        """Initialised on data and moved a little, so that no parameter sits at a symmetric start."""
        dictionary = self.make(self.d_in, self.d_out if transcoder else None)
        x, target = self.data(transcoder, rows=256)
        generator = torch.Generator().manual_seed(seed)
        dictionary.initialise(x, target, generator, self.control())
        parameters = [p for p in dictionary.parameters() if p.requires_grad]
        optimiser = torch.optim.Adam(parameters, lr=1e-2)
        for step in range(updates):
            dictionary.schedule(step, updates)
            optimiser.zero_grad()
            loss = dictionary.loss(x, target)
            loss.total.backward()
            dictionary.project_gradients()
            optimiser.step()
            dictionary.after_update(Update(optimiser, step, updates, generator, x, target, loss))
            dictionary.observe(loss.codes)
        return dictionary

    # --- the contract ------------------------------------------------------------------------------------------------

    def test_shapes_and_dtypes(self):
        for transcoder in self.modes():
            dictionary = self.trained(transcoder)
            x, _ = self.data(transcoder)
            codes = dictionary.encode(x)
            assert isinstance(codes, Codes) and codes.d_sae == dictionary.d_sae
            assert codes.indices.dtype == torch.int64
            assert codes.indices.min() >= 0 and codes.indices.max() < dictionary.d_sae
            output = dictionary.decode(codes)
            assert output.shape == (len(x), dictionary.d_out) and output.dtype == x.dtype
            assert torch.equal(output, dictionary(x))

    def test_no_latent_stands_twice_in_a_row(self):
        codes = self.trained(False).encode(self.data(False)[0])
        for indices, active in zip(codes.indices, codes.active(), strict=True):
            chosen = indices[active]
            assert len(chosen.unique()) == len(chosen)

    def test_decoding_dense_codes_gives_the_same(self):
        for transcoder in self.modes():
            dictionary = self.trained(transcoder)
            codes = dictionary.encode(self.data(transcoder)[0])
            again = dictionary.decode(Codes.from_dense(codes.dense()))
            torch.testing.assert_close(dictionary.decode(codes), again, rtol=1e-5, atol=1e-5)

    def test_loss_and_every_gradient_equal_the_float64_reference(self):
        for transcoder in self.modes():
            dictionary = self.trained(transcoder).double()
            x, target = self.data(transcoder, seed=1)
            x, target = x.double(), None if target is None else target.double()
            for name, dead in (("live", False), ("half dead", True)):
                if dead:
                    dictionary.rows_since_fired[::2] = 10**12
                parameters = {n: p for n, p in dictionary.named_parameters() if p.requires_grad}
                ours = torch.autograd.grad(
                    dictionary.loss(x, target).total, list(parameters.values()), allow_unused=True
                )
                reference = self.reference_loss(dictionary, x, target)
                torch.testing.assert_close(dictionary.loss(x, target).total, reference, rtol=1e-10, atol=1e-12)
                theirs = torch.autograd.grad(reference, list(parameters.values()), allow_unused=True)
                for parameter, a, b in zip(parameters, ours, theirs, strict=True):
                    assert (a is None) == (b is None), f"{name}: {parameter}"
                    if a is not None:
                        torch.testing.assert_close(
                            a, b, rtol=1e-8, atol=1e-10, msg=lambda m, p=parameter, n=name: f"{n}: {p}: {m}"
                        )

    def test_training_lowers_the_loss(self):
        for transcoder in self.modes():
            x, target = self.data(transcoder, rows=256)
            before = self.trained(transcoder, updates=0).loss(x, target).total
            after = self.trained(transcoder, updates=100).loss(x, target).total
            assert after < before

    def test_folding_keeps_raw_outputs(self):
        for transcoder in self.modes():
            dictionary = self.trained(transcoder).double()
            x = self.data(transcoder, seed=2)[0].double()
            folded = dictionary.fold()
            assert float(folded.input_scale) == 1 and float(folded.target_scale) == 1
            torch.testing.assert_close(folded(x), dictionary(x), rtol=1e-9, atol=1e-9)
            assert folded is not dictionary

    def test_saves_and_loads_what_it_was(self, tmp_path: Path):
        for transcoder in self.modes():
            dictionary = self.trained(transcoder)
            dictionary.provenance = {"hook_in": "a", "hook_out": "b"}
            x, _ = self.data(transcoder, seed=3)
            folder = save(dictionary, tmp_path / str(transcoder))
            loaded = load(folder)
            assert torch.equal(loaded(x), dictionary.fold()(x))
            assert loaded.provenance == dictionary.provenance
            assert loaded.config == dictionary.config
            assert torch.equal(loaded.rows_since_fired, dictionary.rows_since_fired)
            assert not any(p.requires_grad for p in loaded.parameters())

    def test_the_same_seed_gives_the_same_bits(self):
        for transcoder in self.modes():
            first, second = self.trained(transcoder, seed=4), self.trained(transcoder, seed=4)
            for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
                assert torch.equal(a, b), name

    def test_counts_rows_since_each_latent_fired(self):
        dictionary = self.trained(False)
        codes = dictionary.encode(self.data(False)[0])
        before = dictionary.rows_since_fired.clone()
        dictionary.observe(codes)
        fired = codes.fired() > 0
        assert torch.equal(dictionary.rows_since_fired[fired], torch.zeros_like(before[fired]))
        assert torch.equal(dictionary.rows_since_fired[~fired], before[~fired] + len(codes))
        assert "rows_since_fired" in dictionary.state_dict()

    @pytest.mark.parametrize(
        "damage", ["truncated weights", "missing weights", "damaged description", "no description"]
    )
    def test_a_damaged_folder_is_refused_by_name(self, tmp_path: Path, damage: str):
        folder = save(self.trained(False), tmp_path / "dictionary")
        weights, description = folder / "dictionary.safetensors", folder / "dictionary.json"
        if damage == "truncated weights":
            weights.write_bytes(weights.read_bytes()[:-10])
        elif damage == "missing weights":
            weights.unlink()
        elif damage == "damaged description":
            description.write_text(description.read_text()[:20])
        else:
            description.unlink()
        with pytest.raises(UserError, match="dictionary"):
            load(folder)
