"""One direction at several strengths beside none: what the model expects next, and what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from activation_store.progress import NoProgress, Progress
from dictlearn.steering.directions import Direction
from dictlearn.steering.edit import next_token_log_probs, padded
from dictlearn.steering.effects import TokenChanges, token_changes
from dictlearn.steering.sampling import Sampling, continuations, fluency
from dictlearn.steering.strength import Strength, match_kl, mean_length
from dictlearn.token_text import text_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Continuation:
    """What was written after a prompt, and the mean natural log-probability the unsteered model gives its tokens."""

    prompt: str
    text: str
    log_probability: float


@dataclass(frozen=True)
class Steered:
    """One strength, the tokens it makes likelier and less likely after the prompts, and what is written with it."""

    strength: Strength
    changes: TokenChanges
    continuations: list[Continuation]


@dataclass(frozen=True)
class Steering:
    """What `dictlearn steer` finds.

    Attributes:
        direction, hook: what was added, and where.
        mean_length: of the hook's activations at the prompts' tokens after the first, to compare strengths with.
        unsteered: continuations drawn by the same random numbers, without steering.
    """

    direction: str
    hook: str
    mean_length: float
    unsteered: list[Continuation]
    steered: list[Steered]


def experiment(
    model: TransformerBridge,
    direction: Direction,
    prompts: dict[str, list[int]],
    targets: Sequence[float],
    signs: Sequence[int],
    sampling: Sampling,
    tokenizer: Tokenizer,
    watched: Sequence[int] = (),
    progress: Progress | None = None,
) -> Steering:
    """Find the strength for each KL and each sign, and say what it does.

    Args:
        prompts: text -> its token ids, BOS included.
        targets, signs: as for `match_kl`.
        watched: ids of tokens whose log-probability is told in any case.
    """
    rows = padded(list(prompts.values()))
    strengths = match_kl(model, rows, direction, targets, signs)
    base = next_token_log_probs(model, rows)
    total = (len(strengths) + 1) * sampling.samples * len(rows) * sampling.tokens
    with (progress or NoProgress()).task("Writing on", total=total, unit="tokens") as task:

        def written(alpha: float = 0.0) -> list[Continuation]:
            if not sampling.samples:
                return []
            new_SBN = continuations(model, rows, sampling, direction if alpha else None, alpha)
            likely_SB = fluency(model, rows, new_SBN)
            task.advance(new_SBN.numel())
            return [
                Continuation(prompt, tokenizer.decode(new.tolist(), skip_special_tokens=False), float(likely))
                for b, prompt in enumerate(prompts)
                for new, likely in zip(new_SBN[:, b], likely_SB[:, b], strict=True)
            ]

        def steered(strength: Strength) -> Steered:
            moved = next_token_log_probs(model, rows, direction, strength.alpha)
            changes = token_changes(base, moved, text_of(tokenizer), watched)
            return Steered(strength, changes, written(strength.alpha))

        unsteered = written()
        found = [steered(strength) for strength in strengths]
    return Steering(direction.name, direction.hook, mean_length(model, rows, direction.hook), unsteered, found)
