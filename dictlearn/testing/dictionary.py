"""The contract of a dictionary, as tests. Subclass, give a tiny instance and a slow reference, inherit the rest.

    class TestMine(DictionaryTests):
        def make(self, d_in, d_out): return Mine(MineConfig(...), d_in, d_out)
        def reference_loss(self, dictionary, x, target): ...   # float64, dense, plain autograd

The reference is the back door: it must not call the dictionary's own encode, decode or loss. A kind that comes in
several versions (of scaling, say) gives one instance of each in ``variants``, and each is held to the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from activation_store.errors import UserError
from dictlearn.codes import Codes
from dictlearn.dictionaries.base import Dictionary, Update, Width
from dictlearn.dictionaries.files import load, save


class DictionaryTests:
    """Inherit in a class whose name starts with Test."""

    transcodes = True
    """Whether the kind accepts another target than its input."""
    autoencodes = True
    """Whether the kind can do without another target."""
    several_hooks = False
    """Whether the kind accepts several hooks side by side; it is then held to the contract with two as well."""
    d_in, d_out, rows = 12, 10, 64

    # --- what a subclass gives -------------------------------------------------------------------------------------

    def make(self, d_in: Width, d_out: Width | None) -> Dictionary:
        """A tiny untrained dictionary; d_out None means an autoencoder. With `several_hooks` also of several widths."""
        raise NotImplementedError

    def reference_loss(self, dictionary: Dictionary, x: Tensor, target: Tensor | None) -> Tensor:
        """The total loss written as dense plain autograd, from the dictionary's parameters and buffers."""
        raise NotImplementedError

    def variants(self) -> dict[str, Callable[[Width, Width | None], Dictionary]]:
        """`make` for each version of the kind, by name."""
        return {"as made": self.make}

    def of_two_hooks(self, d_in: Width, d_out: Width | None) -> Dictionary:
        """`make` with the same widths, each cut into those of two hooks."""
        return self.make(_cut(d_in), None if d_out is None else _cut(d_out))

    # --- fixtures ----------------------------------------------------------------------------------------------------

    def modes(self) -> list[bool]:
        """Whether it transcodes, for each way of using the kind."""
        return [transcoder for transcoder in (False, True) if (self.transcodes if transcoder else self.autoencodes)]

    def cases(self, updates: int = 5) -> Iterator[tuple[str, bool, Dictionary]]:
        """``(words, whether it transcodes, dictionary)``: each variant as autoencoder and, where it can, transcoder."""
        for transcoder in self.modes():
            versions = self.variants() | ({"of two hooks": self.of_two_hooks} if self.several_hooks else {})
            for name, make in versions.items():
                words = f"{name}, {'transcoder' if transcoder else 'autoencoder'}"
                yield words, transcoder, self.trained(transcoder, updates=updates, make=make)

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

    def trained(
        self,
        transcoder: bool,
        seed: int = 0,
        updates: int = 5,
        make: Callable[[Width, Width | None], Dictionary] | None = None,
    ) -> Dictionary:
        """Initialised on data and moved a little, so that no parameter sits at a symmetric start."""
        dictionary = (make or self.make)(self.d_in, self.d_out if transcoder else None)
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
        for _, transcoder, dictionary in self.cases():
            x, _ = self.data(transcoder)
            codes = dictionary.encode(x)
            assert isinstance(codes, Codes) and codes.d_sae == dictionary.d_sae
            assert codes.indices.dtype == torch.int64
            assert codes.indices.min() >= 0 and codes.indices.max() < dictionary.d_sae
            output = dictionary.decode(codes)
            assert output.shape == (len(x), dictionary.d_out) and output.dtype == x.dtype
            assert torch.equal(output, dictionary(x))

    def test_no_latent_stands_twice_in_a_row(self):
        codes = self.trained(self.modes()[0]).encode(self.data(False)[0])
        for indices, active in zip(codes.indices, codes.active(), strict=True):
            chosen = indices[active]
            assert len(chosen.unique()) == len(chosen)

    def test_decoding_dense_codes_gives_the_same(self):
        for words, transcoder, dictionary in self.cases():
            codes = dictionary.double().encode(self.data(transcoder)[0].double())
            again = dictionary.decode(Codes.from_dense(codes.dense(), codes.offset))
            torch.testing.assert_close(dictionary.decode(codes), again, rtol=1e-10, atol=1e-10, msg=saying(words))

    def test_the_loss_reports_what_encode_and_decode_give(self):
        for words, transcoder, dictionary in self.cases():
            x, target = self.data(transcoder, seed=1)
            dictionary, x, target = dictionary.double(), x.double(), None if target is None else target.double()
            loss = dictionary.loss(x, target)
            torch.testing.assert_close(loss.output, dictionary(x), rtol=1e-10, atol=1e-10, msg=saying(words))
            assert torch.equal(loss.codes.fired(), dictionary.encode(x).fired()), words
            assert not loss.output.requires_grad and not loss.codes.values.requires_grad, words

    def test_loss_and_every_gradient_equal_the_float64_reference(self):
        for words, transcoder, dictionary in self.cases():
            dictionary = dictionary.double()
            x, target = self.data(transcoder, seed=1)
            x, target = x.double(), None if target is None else target.double()
            repeated = torch.arange(len(x)) // 3
            for dead in ("nothing", "half", "everything"):
                dictionary.rows_since_fired.zero_()
                if dead != "nothing":
                    dictionary.rows_since_fired[:: 2 if dead == "half" else 1] = 10**12
                self.assert_equals_reference(dictionary, x, target, f"{words}, {dead} dead")
            again = x[repeated], None if target is None else target[repeated]
            self.assert_equals_reference(dictionary, *again, f"{words}, repeated rows")
            alone = x[:1], None if target is None else target[:1]
            self.assert_equals_reference(dictionary, *alone, f"{words}, a single row")

    def assert_equals_reference(self, dictionary: Dictionary, x: Tensor, target: Tensor | None, words: str) -> None:
        """The loss, and its gradient in every parameter, as the reference gives them; ``words`` begin what fails."""
        parameters = {n: p for n, p in dictionary.named_parameters() if p.requires_grad}
        loss, reference = dictionary.loss(x, target).total, self.reference_loss(dictionary, x, target)
        torch.testing.assert_close(loss, reference, rtol=1e-10, atol=1e-12, msg=saying(words))
        ours = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        theirs = torch.autograd.grad(reference, list(parameters.values()), allow_unused=True)
        for parameter, a, b in zip(parameters, ours, theirs, strict=True):
            assert (a is None) == (b is None), f"{words}: {parameter}"
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=saying(f"{words}: {parameter}"))

    def test_gradients_of_two_halves_average_to_those_of_the_batch(self):
        """Accumulated gradients, and those of several processes, rest on it. Here nothing is dead: an auxiliary term
        may be relative to its own batch."""
        for words, transcoder, dictionary in self.cases():
            dictionary = dictionary.double()
            dictionary.rows_since_fired.zero_()
            x, target = self.data(transcoder, seed=1)
            x, targets = x.double(), [None, None] if target is None else target.double().chunk(2)
            parameters = [p for p in dictionary.parameters() if p.requires_grad]
            whole = torch.autograd.grad(
                dictionary.loss(x, None if target is None else target.double()).total, parameters
            )
            halves = [
                torch.autograd.grad(dictionary.loss(half, of_half).total, parameters)
                for half, of_half in zip(x.chunk(2), targets, strict=True)
            ]
            for a, first, second in zip(whole, *halves, strict=True):
                torch.testing.assert_close((first + second) / 2, a, rtol=1e-9, atol=1e-12, msg=saying(words))

    def test_the_schedule_depends_on_nothing_but_the_step(self):
        """A resumed run comes to a step by another way than one that was never stopped."""
        for words, transcoder, dictionary in self.cases():
            x, target = self.data(transcoder, seed=1)
            losses = []
            for path in ([1], [0, 1], [9, 1], [1, 1]):
                for step in path:
                    dictionary.schedule(step, 10)
                losses.append(float(dictionary.loss(x, target).total.detach()))
            assert len(set(losses)) == 1, words

    def test_training_lowers_the_error(self):
        for (words, transcoder, before), (_, _, after) in zip(self.cases(0), self.cases(100), strict=True):
            x, target = self.data(transcoder, rows=256)
            with torch.no_grad():
                first, last = ((d(x) - (x if target is None else target)).square().sum() for d in (before, after))
            assert last < first, words

    def test_in_bfloat16_the_loss_and_its_gradients_are_near_those_in_float32(self):
        """By autocast, as training on a GPU does: weights and their gradients stay float32."""
        for words, transcoder, dictionary in self.cases():
            x, target = self.data(transcoder, seed=1)
            parameters = [p for p in dictionary.parameters() if p.requires_grad]
            exact = dictionary.loss(x, target)
            with torch.autocast("cpu", torch.bfloat16):
                loss = dictionary.loss(x, target)
            torch.testing.assert_close(loss.total.float(), exact.total, rtol=0.1, atol=0, msg=saying(words))
            theirs = torch.cat([g.flatten() for g in torch.autograd.grad(exact.total, parameters)])
            ours = torch.cat([g.flatten() for g in torch.autograd.grad(loss.total, parameters)])
            assert ours.dtype == torch.float32 and torch.cosine_similarity(ours, theirs, dim=0) > 0.9, words

    def test_folding_keeps_raw_outputs(self):
        for words, transcoder, dictionary in self.cases():
            dictionary = dictionary.double()
            x = self.data(transcoder, seed=2)[0].double()
            folded = dictionary.fold()
            torch.testing.assert_close(folded(x), dictionary(x), rtol=1e-9, atol=1e-9, msg=saying(words))
            torch.testing.assert_close(folded.fold()(x), dictionary(x), rtol=1e-9, atol=1e-9, msg=saying(words))
            assert folded is not dictionary
            for scaling in (folded.input_scaling, folded.target_scaling):
                assert scaling.row_wise or torch.equal(scaling(x), x), words

    def test_saves_and_loads_what_it_was(self, tmp_path: Path):
        for words, transcoder, dictionary in self.cases():
            dictionary.provenance = {"hook_in": "a", "hook_out": "b"}
            x, _ = self.data(transcoder, seed=3)
            folder = save(dictionary, tmp_path / words)
            loaded = load(folder)
            assert torch.equal(loaded(x), dictionary.fold()(x)), words
            assert loaded.provenance == dictionary.provenance
            assert loaded.config == dictionary.config
            assert loaded.autoencoder != transcoder
            assert (loaded.input_parts, loaded.output_parts) == (dictionary.input_parts, dictionary.output_parts)
            assert torch.equal(loaded.rows_since_fired, dictionary.rows_since_fired)
            assert not any(p.requires_grad for p in loaded.parameters())

    def test_the_same_seed_gives_the_same_bits(self):
        for (words, _, first), (_, _, second) in zip(self.cases(), self.cases(), strict=True):
            for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
                assert torch.equal(a, b), f"{words}: {name}"

    def test_counts_rows_since_each_latent_fired(self):
        dictionary = self.trained(self.modes()[0])
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
        folder = save(self.trained(self.modes()[0]), tmp_path / "dictionary")
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


def _cut(width: Width) -> tuple[int, int]:
    """Of one hook into those of two."""
    assert isinstance(width, int)
    return width // 3, width - width // 3


def saying(words: str) -> Callable[[str], str]:
    """What failed, before torch says by how much."""
    return lambda message: f"{words}: {message}"
