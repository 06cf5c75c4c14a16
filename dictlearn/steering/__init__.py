"""Steering: add a direction to a hook's activation at every position, and see what the language model then says.

    from dictlearn.steering import match_kl, of_latent, padded, steer
    direction = of_latent(dictlearn.load("workspace/runs/sae"), 123)
    (strength,) = match_kl(model, padded([token_ids]), direction, targets=[0.25], signs=[1])
    with steer(model, direction, strength.alpha):
        logits = model(tokens)

`directions` says which way, `edit` adds it, `strength` finds how much of it moves the next token by a given KL,
`effects` says which tokens became likelier, `sampling` writes on, `detection` asks what the direction itself sees.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from activation_store.on_first_use import on_first_use

if TYPE_CHECKING:
    from dictlearn.steering.detection import Detection, concept_scores, detect
    from dictlearn.steering.directions import Direction, difference_of_means, direction, of_latent, random_directions
    from dictlearn.steering.edit import Padded, next_token_log_probs, padded, steer
    from dictlearn.steering.sampling import Sampling, continuations, fluency
    from dictlearn.steering.strength import Strength, match_kl

__all__ = [
    "Detection",
    "Direction",
    "Padded",
    "Sampling",
    "Strength",
    "concept_scores",
    "continuations",
    "detect",
    "difference_of_means",
    "direction",
    "fluency",
    "match_kl",
    "next_token_log_probs",
    "of_latent",
    "padded",
    "random_directions",
    "steer",
]

__getattr__, __dir__ = on_first_use(
    __name__,
    {
        "detection": "Detection concept_scores detect",
        "directions": "Direction difference_of_means direction of_latent random_directions",
        "edit": "Padded next_token_log_probs padded steer",
        "sampling": "Sampling continuations fluency",
        "strength": "Strength match_kl",
    },
)
