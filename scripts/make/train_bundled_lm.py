"""Make the language model that dictlearn ships: train it on the Python standard library's source, then export it.

    python scripts/make/train_bundled_lm.py train  --folder build/bundled_lm
    python scripts/make/train_bundled_lm.py export --folder build/bundled_lm

``train`` writes a checkpoint every few minutes and a later run continues it with the same order of data. A continued
run may ask for another number of epochs; the record says from which step on which number set the schedule. It uses a
GPU when there is one. ``export`` writes the Hugging Face folder (half precision) into
activation_store/harvest/bundled/. The model card beside it is written by scripts/make/bundled_lm_card.py.

The network is a Llama-layout decoder (RMSNorm, rotary positions, gated MLP, tied embedding). Matrices are optimised by
Muon (Jordan et al. 2024, as in torch.optim.Muon), the embedding and the gains by AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from activation_store.harvest.corpus import open_corpus

BUNDLED = Path(__file__).resolve().parents[2] / "activation_store" / "harvest" / "bundled"
BOS = "<|bos|>"
VOCABULARY = 4096
CONTEXT = 512
SEED = 20261121

ARCHITECTURE: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=CONTEXT,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
    attention_dropout=0.0,
)


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenisation (which keeps runs of indentation together)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """One int32 array per text, the BOS token in front."""
    return [np.array([0, *encoding.ids], dtype=np.int32) for encoding in tokenizer.encode_batch(texts)]


def windows_of_epoch(documents: list[np.ndarray], epoch: int) -> np.ndarray:
    """(windows, CONTEXT + 1): the documents in a fresh order, packed, cut at a fresh offset, windows shuffled."""
    rng = np.random.default_rng([SEED, epoch])
    stream = np.concatenate([documents[i] for i in rng.permutation(len(documents))])
    stream = stream[rng.integers(CONTEXT) :]
    count = (len(stream) - 1) // CONTEXT
    starts = rng.permutation(count) * CONTEXT
    return stream[starts[:, None] + np.arange(CONTEXT + 1)]


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, documents: list[np.ndarray], device: str) -> float:
    """Mean nats per token over the held-out documents, packed into windows of CONTEXT."""
    stream = np.concatenate(documents)
    count = (len(stream) - 1) // CONTEXT
    total = 0.0
    for start in range(0, count, 16):
        rows = np.arange(start, min(start + 16, count))[:, None] * CONTEXT + np.arange(CONTEXT + 1)
        tokens = torch.from_numpy(stream[rows]).long().to(device)
        with torch.autocast(device, torch.bfloat16):
            logits = model(input_ids=tokens[:, :-1]).logits
        total += torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).item() * len(
            rows
        )
    return total / count


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over 2 %, constant, linear decay to 2 % over the last half."""
    warm_up, decay_from = 0.02 * steps, 0.5 * steps
    if step < warm_up:
        return (step + 1) / warm_up
    if step < decay_from:
        return 1.0
    return 0.02 + 0.98 * (steps - step) / (steps - decay_from)


def train(folder: Path, epochs: int, batch: int, compile_model: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    corpus = open_corpus("stdlib")
    texts = [document.text for document in corpus.split("train")]

    tokenizer_path = folder / "tokenizer.json"
    if not tokenizer_path.exists():
        make_tokenizer(texts).save(str(tokenizer_path))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    documents = encode(tokenizer, texts)
    held_out = encode(tokenizer, [document.text for document in corpus.split("held-out")])
    tokens_per_epoch = sum(map(len, documents))
    steps_per_epoch = tokens_per_epoch // (CONTEXT * batch) - 1
    steps = epochs * steps_per_epoch
    print(
        f"{len(documents)} documents, {tokens_per_epoch:,} tokens, {steps:,} steps of {CONTEXT * batch:,} tokens "
        f"on {device}"
    )

    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE, initializer_range=0.02))
    model.to(torch.device(device))  # type: ignore[arg-type]
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.1),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]
    peak_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]

    step, log, schedule = 0, [], [[0, epochs]]
    checkpoint_path = folder / "checkpoint.pt"
    if checkpoint_path.exists():
        state = torch.load(checkpoint_path, weights_only=True, map_location=device)
        if (state["batch"], state["corpus"]) != (batch, corpus.fingerprint):
            raise SystemExit(f"{checkpoint_path} was made with another batch or another Python's standard library.")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, log, schedule = state["step"], state["log"], state["schedule"]
        if schedule[-1][1] != epochs:
            schedule.append([step, epochs])
        print(f"continuing at step {step:,}")

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            logits = model(input_ids=tokens[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    if compile_model:
        loss_of = torch.compile(loss_of)
    started, saved_at = time.time(), time.time()
    first_step, windows, epoch_of_windows = step, np.empty((0, CONTEXT + 1), np.int32), -1
    while step < steps:
        epoch, position = divmod(step, steps_per_epoch)
        if epoch != epoch_of_windows:
            windows, epoch_of_windows = windows_of_epoch(documents, epoch), epoch
        tokens = torch.from_numpy(windows[position * batch : (position + 1) * batch]).long().to(device)
        loss = loss_of(tokens)
        loss.backward()
        for optimizer, peak in zip(optimizers, peak_rates, strict=True):
            optimizer.param_groups[0]["lr"] = peak * learning_rate_factor(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        step += 1

        if step % 50 == 0:
            rate = (step - first_step) * CONTEXT * batch / (time.time() - started)
            print(f"step {step:,}/{steps:,} loss {loss.item():.3f} {rate:,.0f} tok/s", flush=True)
        if step % steps_per_epoch == 0 or step == steps:
            log.append(
                {
                    "step": step,
                    "train_loss": round(loss.item(), 4),
                    "held_out_loss": round(held_out_loss(model, held_out, device), 4),
                }
            )
            print(json.dumps(log[-1]), flush=True)
        if time.time() - saved_at > 180 or step == steps:
            state = dict(
                model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers], step=step, log=log,
                schedule=schedule, batch=batch, corpus=corpus.fingerprint,
            )  # fmt: skip
            torch.save(state, folder / "checkpoint.tmp")
            os.replace(folder / "checkpoint.tmp", checkpoint_path)
            saved_at = time.time()


def export(folder: Path, destination: Path) -> None:
    """Write config.json, model.safetensors (float16) and the tokenizer as a Hugging Face folder, and training.json."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")
    model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE))
    model.load_state_dict(state["model"])
    if not all(math.isfinite(p.abs().max().item()) and p.abs().max() < 60000 for p in model.parameters()):
        raise SystemExit("A weight does not fit half precision.")
    destination.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(destination)
    (destination / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner alone
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token=BOS,
        eos_token=BOS,
        pad_token=BOS,
        model_max_length=CONTEXT,
    )
    tokenizer.save_pretrained(destination)
    (destination / "generation_config.json").unlink(missing_ok=True)
    shutil.rmtree(destination / ".cache", ignore_errors=True)
    corpus = open_corpus("stdlib")
    record = {
        "step": state["step"],
        "log": state["log"],
        "corpus": corpus.fingerprint,
        "origin": corpus.origin,
        "left_out": corpus.left_out,
        "seed": SEED,
        "epochs_from_step": state["schedule"],
        "batch": state["batch"],
    }
    (destination / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    size = sum(file.stat().st_size for file in destination.iterdir())
    print(f"wrote {destination}: {size / 1e6:.1f} MB, step {state['step']:,}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["train", "export"])
    parser.add_argument("--folder", type=Path, default=Path("build/bundled_lm"), help="checkpoints and the tokenizer")
    parser.add_argument("--destination", type=Path, default=BUNDLED, help="where export writes the Hugging Face folder")
    parser.add_argument("--epochs", type=int, default=8, help="sets the learning rate's schedule; see above")
    parser.add_argument("--batch", type=int, default=16, help="windows per step")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.command == "train":
        train(options.folder, options.epochs, options.batch, not options.no_compile)
    else:
        export(options.folder, options.destination)
