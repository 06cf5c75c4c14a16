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


_WIDTHS = dict(vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
_GROUPED = {**_WIDTHS, "max_position_embeddings": 32, "num_key_value_heads": 2}
OTHER_LAYOUTS: dict[str, tuple[str, dict]] = {
    "mistral": ("MistralConfig", {**_GROUPED, "head_dim": 6}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 10}),
    "gemma": ("GemmaConfig", {**_GROUPED, "head_dim": 6}),
    "gemma2": ("Gemma2Config", {**_GROUPED, "head_dim": 6}),
    "gemma3_text": ("Gemma3TextConfig", {**_GROUPED, "head_dim": 6}),
    "stablelm": ("StableLmConfig", _GROUPED),
    "phi3": ("Phi3Config", {**_GROUPED, "pad_token_id": 0}),
    "olmo2": ("Olmo2Config", _GROUPED),
    "mixtral": ("MixtralConfig", {**_GROUPED, "num_local_experts": 2}),
    "phi": ("PhiConfig", {**_WIDTHS, "max_position_embeddings": 32}),
    "gpt_neox": ("GPTNeoXConfig", {**_WIDTHS, "max_position_embeddings": 32}),
    "gptj": ("GPTJConfig", dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=32, rotary_dim=4)),
    "gpt_neo": (
        "GPTNeoConfig",
        dict(
            vocab_size=97,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=32,
        ),
    ),
    "opt": (
        "OPTConfig",
        dict(
            vocab_size=97,
            hidden_size=32,
            ffn_dim=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            word_embed_proj_dim=32,
        ),
    ),
    "bloom": ("BloomConfig", dict(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)),
    "falcon": ("FalconConfig", dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)),
}
"""Config class and widths of two layers of every layout besides `save_tiny_model`'s two."""


def save_layout(folder: Path, layout: str, tokenizer_of: Path, seed: int = 1, **changes) -> Path:
    """A random model of one of OTHER_LAYOUTS, with the tokenizer of another folder."""
    import torch
    import transformers

    name, widths = OTHER_LAYOUTS[layout]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**widths, **changes}))
    with torch.no_grad():  # gains and biases away from 1 and 0, or a forgotten one would not show
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tokenizer_of / file).read_bytes())
    return folder
