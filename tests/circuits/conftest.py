"""Small language models with nothing folded and no bias at zero, and transcoders for them, in float64.

They are made from a config, saved, and loaded through TransformerBridge as a user's model is. Hugging Face's RMSNorm
computes in float32 in a float64 model; the fixtures keep that, so that "rounding in the model" is not zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dictlearn.circuits.frozen import FrozenModel, freeze
from dictlearn.circuits.replacement import LocalReplacement, replace_mlps
from dictlearn.dictionaries.configs import TopKConfig
from dictlearn.dictionaries.topk import TopK

VOCABULARY, WIDTH, LATENTS, K = 31, 24, 40, 5
PROMPT = [1, 5, 7, 2, 9, 7, 11]


def gpt2() -> GPT2LMHeadModel:
    """LayerNorm with gain and bias, attention biases, learned positions, gelu."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=WIDTH, n_layer=3, n_head=3))


def llama() -> LlamaForCausalLM:
    """RMSNorm, rotary positions, two query heads to a key/value head, gated MLP; biases switched on."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
            bos_token_id=1,
        )
    )


def gpt_neox() -> GPTNeoXForCausalLM:
    """Attention and MLP read the same residual stream."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=3,
            max_position_embeddings=16,
        )
    )


LAYOUTS: dict[str, Callable[[], Any]] = {"gpt2": gpt2, "llama": llama, "gpt_neox": gpt_neox}


def save_model(layout: str, folder: Path, seed: int = 0) -> Path:
    """A Hugging Face folder with random weights, biases and gains, and a tokenizer of numbered words."""
    torch.manual_seed(seed)
    network = LAYOUTS[layout]().double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    words = {"<unk>": 0, "<bos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<bos>", pad_token="<bos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def make_transcoder(
    layer: int, seed: int, hook_in: str = "mlp.hook_in", d_sae: int = LATENTS, k: int = K, scaling: Any = "none"
) -> TopK:
    """A random transcoder with non-zero biases whose activations are of the model's size, as if loaded from a run."""
    generator = torch.Generator().manual_seed(1000 * seed + layer)
    transcoder = TopK(TopKConfig(d_sae=d_sae, k=k, scaling=scaling), WIDTH, WIDTH).double()
    with torch.no_grad():
        for name, scale in {"W_enc": 0.3, "b_enc": 0.2, "W_dec": 0.2, "b_dec": 0.1}.items():
            weight = getattr(transcoder, name)
            weight.copy_(scale * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    transcoder.provenance = {"hook_in": f"blocks.{layer}.{hook_in}", "hook_out": f"blocks.{layer}.hook_mlp_out"}
    return transcoder.eval().requires_grad_(False)


@dataclass(frozen=True)
class Case:
    """One model, and transcoders for some of its layers."""

    layout: str
    folder: Path
    model: TransformerBridge
    transcoders: dict[int, TopK]

    def freeze(self, prompt: list[int] = PROMPT) -> tuple[FrozenModel, dict[str, torch.Tensor]]:
        return freeze(self.model, prompt)

    def replace(self, dropped: tuple[int, ...] = (0,), prompt: list[int] = PROMPT) -> LocalReplacement:
        frozen, activations = self.freeze(prompt)
        return replace_mlps(frozen, activations, self.transcoders, dropped)


@pytest.fixture(scope="session", params=list(LAYOUTS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Every layout: transcoders for layers 0 and 2, layer 1's MLP without one."""
    folder = save_model(request.param, tmp_path_factory.mktemp(request.param))
    model = TransformerBridge.boot_transformers(str(folder), dtype=torch.float64, device="cpu")
    return Case(request.param, folder, model, {layer: make_transcoder(layer, seed=1) for layer in (0, 2)})
