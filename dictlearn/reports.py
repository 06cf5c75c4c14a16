"""What a finished step says in the terminal: each result as a few small tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dictlearn.terminal import bytes_in_words, print_facts, print_line, print_table

if TYPE_CHECKING:
    from activation_store.describe import StoreDescription
    from dictlearn.circuits.graph_summary import Summary
    from dictlearn.feature_index.read import FeaturePage
    from dictlearn.feature_index.strips import TokenStrip
    from dictlearn.metrics.command import Evaluation


def plan(planned: Any) -> None:
    """What a dry run found: any dataclass of numbers."""
    facts = {}
    for field in dataclasses.fields(planned):
        value = getattr(planned, field.name)
        if isinstance(value, dict):
            value = ", ".join(f"{key} {part if isinstance(part, int) else list(part)}" for key, part in value.items())
        elif field.name.startswith("bytes") or field.name.endswith("memory"):
            value = bytes_in_words(value)
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, int):
            value = f"{value:,}"
        facts[field.name.replace("_", " ")] = value
    print_facts("This would be done", facts)


def store(described: StoreDescription) -> None:
    made_from = described.provenance
    facts = {
        "model": made_from["model"]["name"],
        "corpus": made_from["corpus"]["name"],
        "rows": f"{described.rows:,}"
        + ("" if described.complete else f" of {described.rows_planned:,}, still growing"),
        "on disk": bytes_in_words(described.bytes),
    }
    for split in described.splits:
        facts[f"{split.name} rows"] = f"{split.rows:,} of {split.documents:,} documents"
    for reason, count in described.excluded.items():
        facts[f"left out: {reason}"] = f"{count:,}"
    print_facts(described.path, facts)
    print_table(
        "",
        ["hook", "shape", "type", "size", "mean norm"],
        [
            [
                hook.name,
                " x ".join(map(str, hook.shape)),
                hook.dtype,
                bytes_in_words(hook.bytes),
                "not yet" if hook.mean_norm is None else hook.mean_norm,
            ]
            for hook in described.hooks
        ],
    )


def evaluations(measured: Sequence[Evaluation]) -> None:
    """Runs side by side, a column each."""
    rows: list[list[object]] = []
    for section in ("reconstruction", "downstream"):
        columns = [getattr(evaluation, section) or {} for evaluation in measured]
        names = dict.fromkeys(name for column in columns for name in column)
        rows += [[name, *(column.get(name, "") for column in columns)] for name in names]
    title = "On held-out documents (cross-entropy and KL in nats per token)"
    print_table(title, ["", *(evaluation.run for evaluation in measured)], rows)
    for evaluation in measured:
        hooks = dict.fromkeys([evaluation.hook_in, evaluation.hook_out])
        print_line(f"  {evaluation.run}: {' -> '.join(hooks)}")


def feature(page: FeaturePage) -> None:
    """Numbers, the strongest examples with the activating token in brackets, logits and neighbours."""
    print_line(
        f"Latent {page.latent} of {page.d_sae}: fires in {page.count:,} of {page.rows:,} rows ({page.density:.3%})."
    )
    for band in page.bands[:1]:
        for strip in band.strips[:10]:
            print_line(f"{strip.value:10.3f}  {in_brackets(strip)}   {strip.document} ({strip.split})")
    for name, logits in (("raises", page.top_logits), ("lowers", page.bottom_logits)):
        if logits:
            print_line(f"{name}: " + ", ".join(f"{each.token!r} {each.logit:.2f}" for each in logits[:8]))
    near = ", ".join(f"{each.latent} ({each.cosine:.2f})" for each in page.neighbours[:5])
    print_line(f"nearest decoder rows: {near}")


def in_brackets(strip: TokenStrip) -> str:
    """A strip as one line of text, its peak in double brackets."""
    before, after = "".join(strip.tokens[: strip.peak]), "".join(strip.tokens[strip.peak + 1 :])
    return f"{before}⟦{strip.tokens[strip.peak]}⟧{after}".replace("\n", "⏎")


def circuit(found: Summary) -> None:
    """What stands behind a prediction, most influential first."""
    likely = ", ".join(f"{p.token!r} {p.probability:.0%}" for p in found.predictions[:5])
    print_line(f"After {found.prompt!r} the model expects {likely}.")
    nodes = [*found.features, *found.errors, *found.tokens]
    nodes.sort(key=lambda node: -node.influence)
    print_table(
        f"What it rests on: {found.nodes_kept} of {found.nodes} nodes kept",
        ["node", "at token", "influence", "effect on the first logit"],
        [[node.where, f"{node.token!r} @{node.position}", node.influence, node.direct_effect] for node in nodes[:12]],
    )
    print_table("", ["head", "influence"], [[f"{head.layer}.{head.head}", head.influence] for head in found.heads[:5]])
    scores = {"this graph": found.scores, **found.nulls}
    print_table(
        "Scores, beside transcoders that know nothing",
        ["", "replacement", "completeness"],
        [[name, score.replacement, score.completeness] for name, score in scores.items()],
    )
    residue = ", ".join(f"{name} {value:.3g}" for name, value in found.residue.items())
    print_line(
        f"Edges into the first logit sum to {found.edges_into_prediction:.4g}; left over: {residue}. "
        f"No node's terms miss its value by more than {found.gap:.1e} of it."
    )
