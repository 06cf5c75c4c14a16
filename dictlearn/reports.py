"""What a finished step says in the terminal: each result as a few small tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from activation_store.spec import NORM_OUTLIER_RATIO
from dictlearn.hook_names import in_words
from dictlearn.terminal import bytes_in_words, print_facts, print_line, print_table

if TYPE_CHECKING:
    from activation_store.describe import HookDescription
    from dictlearn.circuits.graph_summary import Summary
    from dictlearn.feature_index.read import FeaturePage
    from dictlearn.feature_index.strips import TokenStrip
    from dictlearn.metrics.record import Evaluation
    from dictlearn.steering.experiment import Steering
    from dictlearn.store_commands import FileWritten, Removal, Sample, StoreInfo, StoreMade, Verified
    from dictlearn.workspace import RunFiles


def plan(planned: Any) -> None:
    """What a dry run found: any dataclass of numbers."""
    facts = {}
    for field in dataclasses.fields(planned):
        value = getattr(planned, field.name)
        if isinstance(value, dict):
            value = ", ".join(f"{key} {part if isinstance(part, int) else list(part)}" for key, part in value.items())
        elif value is None:
            value = "not known"
        elif field.name.startswith("bytes") or field.name.endswith("memory"):
            value = bytes_in_words(value)
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, int):
            value = f"{value:,}"
        facts[field.name.replace("_", " ")] = value
    print_facts("This would be done", facts)


def store(info: StoreInfo) -> None:
    """What is inside a store: where it comes from, rows by split, a line for each hook, and how its text begins."""
    described = info.description
    facts = {
        **_origin(described.provenance),
        "rows": f"{described.rows:,}"
        + ("" if described.complete else f" of {described.rows_planned:,}, still growing or interrupted"),
        "on disk": bytes_in_words(described.bytes)
        + ("" if described.compression == "none" else f", compressed by {described.compression}"),
        "in shards of": f"{described.rows_per_shard:,} rows, chunks of {described.rows_per_chunk:,}",
    }
    for split in described.splits:
        facts[f"{split.name} rows"] = f"{split.rows:,} of {split.documents:,} documents"
    for reason, count in described.excluded.items():
        facts[f"left out: {reason}"] = f"{count:,} tokens"
    if described.complete:
        facts[f"norm over {NORM_OUTLIER_RATIO:g} x the median"] = _outliers(described.hooks)
    print_facts(described.location, facts)
    print_table(
        "",
        ["hook", "row", "type", "on disk", "mean norm", "median"],
        [
            [
                hook.name,
                " x ".join(map(str, hook.shape)),
                hook.dtype,
                bytes_in_words(hook.bytes),
                *("not yet" if known is None else known for known in (hook.mean_norm, hook.median_norm)),
            ]
            for hook in described.hooks
        ],
    )
    if info.beginning is not None:
        print_line(f"It begins: {info.beginning}")


def _outliers(hooks: Sequence[HookDescription]) -> str:
    found = [f"{hook.norm_outliers:,} rows of {hook.name}" for hook in hooks if hook.norm_outliers]
    return ", ".join(found) if found else "no row"


def _origin(provenance: Mapping[str, Any]) -> dict[str, object]:
    """What a store was made from, in the words of whoever made it."""

    def name(what: str) -> str:
        return str((provenance.get(what) or {}).get("name", "unknown"))

    facts: dict[str, object] = {"model": name("model"), "corpus": name("corpus")}
    if imported := provenance.get("imported"):
        facts["imported from"] = f"{imported.get('file') or imported.get('folder')} ({imported.get('format')})"
    if merged := provenance.get("merged"):
        facts["merged from"] = ", ".join(f"{part['name']} ({part['rows']:,} rows)" for part in merged)
    return facts


def verified(result: Verified) -> None:
    print_line(f"{result.location}: every shard and every metadata file is as it was written.")


def sample(drawn: Sample) -> None:
    """Two lines for each row: its text with the token in brackets, and where it comes from."""
    hooks = list(drawn.rows[0].norms)
    if drawn.no_text:
        print_line(f"Tokens are shown as numbers: {drawn.no_text}.")
    for row in drawn.rows:
        print_line(f"{row.row:>11,}  {row.before}⟦{row.token}⟧{row.after}")
        norms = ", ".join(f"{norm:.4g}" for norm in row.norms.values())
        place = "" if row.position < 0 else f", position {row.position}"
        print_line(f"{'':11}  {row.document} ({row.split}){place}; {'norm' if len(hooks) == 1 else 'norms'} {norms}")
    print_line(f"{len(drawn.rows)} rows of {drawn.location}; norms at {', '.join(hooks)}.")


def store_made(made: StoreMade) -> None:
    print_line(f"{made.location}: {made.rows:,} rows of {', '.join(made.hooks)}.")


def file_written(written: FileWritten) -> None:
    print_line(f"{written.file}: {bytes_in_words(written.bytes)}.")


def removal_ahead(removal: Removal) -> None:
    """What would be lost."""
    print_line(f"{removal.lost.location} would be removed: {_loss(removal)}.")
    for kind, names in (("runs", removal.runs), ("indexes", removal.indexes)):
        if names:
            print_line(f"The {kind} {', '.join(names)} were made from it; they stay, and could not be made again.")


def removed(removal: Removal) -> None:
    print_line(f"{removal.lost.location} was removed: {_loss(removal)}.")


def _loss(removal: Removal) -> str:
    lost = removal.lost
    if lost.problem:
        return f"{bytes_in_words(lost.bytes)} ({lost.problem})"
    unfinished = "" if lost.complete else ", unfinished"
    return f"{bytes_in_words(lost.bytes)}, {lost.rows:,} rows of {', '.join(lost.hooks)}{unfinished}"


TRAINED = ("loss", "fvu", "l0", "dead_share")
"""The numbers of a run's last batch that are printed."""


@dataclass(frozen=True)
class Harvested:
    """A finished store."""

    store: str
    rows: int
    hooks: list[str]


def harvested(found: Harvested) -> None:
    print_line(f"{found.store}: {found.rows:,} rows of {', '.join(found.hooks)}.")


@dataclass(frozen=True)
class Indexed:
    """A finished index."""

    index: str


def indexed(found: Indexed) -> None:
    print_line(f"{found.index}: browse it with `dictlearn app`.")


@dataclass(frozen=True)
class Trained:
    """Runs that have ended: of each its name, the folder of its dictionary, and the last line of its metrics."""

    runs: list[dict[str, Any]]

    @classmethod
    def of(cls, runs: Sequence[RunFiles]) -> Trained:
        return cls([{"run": run.name, "dictionary": str(run.dictionary), **run.last_metrics()} for run in runs])


def trained(found: Trained) -> None:
    """One run in a line, several in a table."""
    if len(found.runs) == 1:
        (run,) = found.runs
        numbers = ", ".join(f"{name} {run[name]:.4g}" for name in TRAINED if name in run)
        print_line(f"{run['dictionary']}: step {run['step']:,}, {numbers}.")
        return
    rows = [
        [run["run"], f"{run['step']:,}{', stopped' * ('stopped' in run)}", *(run.get(name, "") for name in TRAINED)]
        for run in found.runs
    ]
    print_table("Runs of the sweep, at the last batch", ["run", "step", *TRAINED], rows)


OF_EACH_HOOK = ("fvu", "ce_clean", "ce_spliced", "kl_spliced", "loss_recovered")
"""What is printed of each of several hooks; evaluation.json has all."""


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
        print_line(f"  {evaluation.run}: {in_words(evaluation.hook_in, evaluation.hook_out)}")
        if evaluation.by_hook:
            shown = [name for name in OF_EACH_HOOK if any(name in numbers for numbers in evaluation.by_hook.values())]
            by_hook = [[hook, *(found.get(name, "") for name in shown)] for hook, found in evaluation.by_hook.items()]
            print_table(f"{evaluation.run}, each hook by itself", ["", *shown], by_hook)


def feature(page: FeaturePage) -> None:
    """Numbers, the strongest examples with the activating token in brackets, logits and neighbours."""
    print_line(
        f"Latent {page.latent} of {page.d_sae}: fires in {page.count:,} of {page.rows:,} rows ({page.density:.3%})."
    )
    if page.writes_to:
        print_line("writes to: " + ", ".join(f"{each.hook} {each.share:.0%}" for each in page.writes_to))
    if page.neurons:
        print_line("neurons: " + ", ".join(f"{each.neuron} {each.weight:+.2f}" for each in page.neurons))
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


def steering(found: Steering) -> None:
    """Strengths, what they make of the next token, and what is written with each."""
    print_line(f"Adding {found.direction} at {found.hook}, where activations have length {found.mean_length:.3g}.")
    print_table(
        "Strengths",
        ["KL asked for", "strength", "KL reached"],
        [
            [f"{each.target:g}", f"{each.alpha:+.3f}", each.kl]
            for each in (steered.strength for steered in found.steered)
        ],
    )
    for said in dict.fromkeys(steered.strength.said for steered in found.steered):
        if said:
            print_line(said)
    for steered in found.steered:
        title = f"{steered.strength.alpha:+.3f} (KL {steered.strength.kl:.3g})"
        for name, changes in (("raises", steered.changes.raised), ("lowers", steered.changes.lowered)):
            moved = (f"{c.token!r} {c.probability_before:.1%} → {c.probability_after:.1%}" for c in changes)
            print_line(f"{title} {name}: " + ", ".join(moved))
        for c in steered.changes.watched:
            before, after = c.log_probability_before, c.log_probability_after
            print_line(f"{title} log-probability of {c.token!r}: {before:.2f} → {after:.2f}")
    writers = {"unsteered": found.unsteered} | {
        f"{each.strength.alpha:+.3f}": each.continuations for each in found.steered
    }
    for name, continuations in writers.items():
        for written in continuations:
            text = (written.prompt + "⟦" + written.text + "⟧").replace("\n", "⏎")
            print_line(f"{name} ({written.log_probability:.2f} nats/token unsteered): {text}")
