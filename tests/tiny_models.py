"""Tiny random language models in Hugging Face layout, made on the spot."""

from __future__ import annotations

from pathlib import Path

CORPUS_TEXT = (
    "def first(x):\n    return x + 1\n\nclass Second:\n    '''A docstring of some words.'''\n    value = None\n"
)


def save_tiny_model(folder: Path, layout: str = "llama", n_layers: int = 3, n_ctx: int = 32, **changes) -> Path:
    """A random model of ``layout`` with a byte-level BPE tokenizer of 97 tokens, BOS first."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    transformers.utils.logging.disable_progress_bar()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([CORPUS_TEXT], trainer)
    size = tokenizer.get_vocab_size()
    if layout == "gpt2":
        widths = dict(n_embd=24, n_layer=n_layers, n_head=4, n_inner=80, n_positions=n_ctx)
        config = transformers.GPT2Config(vocab_size=size, bos_token_id=0, eos_token_id=0, **{**widths, **changes})
        model = transformers.GPT2LMHeadModel
    else:
        widths = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=n_layers, max_position_embeddings=n_ctx)
        heads = dict(num_attention_heads=4, num_key_value_heads=2)
        config = transformers.LlamaConfig(
            vocab_size=size, bos_token_id=0, eos_token_id=0, **{**widths, **heads, **changes}
        )
        model = transformers.LlamaForCausalLM
    torch.manual_seed(20)
    random = model(config)
    with torch.no_grad():  # gains and biases away from 1 and 0, or a forgotten one would not show
        for parameter in random.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    random.save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")
    fast.save_pretrained(folder)
    return folder
