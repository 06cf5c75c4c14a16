"""Trace one next-token prediction through transcoders: which features, heads and tokens made it.

    python scripts/circuits/attribution_graph.py --prompt "def f(self):\\n    return self." \\
        --transcoder workspace/runs/transcoder-0 --transcoder workspace/runs/transcoder-2 --out graph.json

The same as `dictlearn circuit`, step by step on top of dictlearn.circuits, for reading and changing. Without any
transcoder the MLPs are error nodes, and the graph shows heads and tokens alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import dictlearn
from activation_store.harvest.language_model import load_language_model, load_tokenizer, resolve_model
from dictlearn.circuits import attribute, summary, write
from dictlearn.circuits.graph import AttributionGraph
from dictlearn.circuits.hooks import layer_of
from dictlearn.token_text import text_of


def trace(prompt: str, runs: list[Path], model_name: str) -> AttributionGraph:
    spec = resolve_model(model_name)
    tokenizer = load_tokenizer(spec)
    bos = [] if spec.bos_token_id is None else [spec.bos_token_id]
    token_ids = bos + tokenizer.encode(prompt, add_special_tokens=False).ids

    # A transcoder stands for the MLP between its hooks. Each says in its provenance which those are.
    transcoders = {}
    for run in runs:
        transcoder = dictlearn.load(run)
        transcoders[layer_of(transcoder.provenance["hook_in"], transcoder.provenance["hook_out"])] = transcoder

    model = load_language_model(spec)
    # Stores leave BOS out, so no transcoder has seen it: what the MLPs write there is one residue.
    dropped = (0,) if bos else ()
    return attribute(
        model, transcoders, token_ids, prompt=prompt, text_of=text_of(tokenizer), dropped_positions=dropped
    )


def show(graph: AttributionGraph) -> None:
    found = summary(graph, rows=8)
    for prediction in found.predictions[:3]:
        print(f"{prediction.token!r:>14}  p {prediction.probability:.3f}  logit {prediction.logit:+.2f} above the mean")

    print(
        f"\nThe logit of {found.predictions[0].token!r} is {found.edges_into_prediction:+.3f} from the nodes kept, and"
    )
    for name, value in found.residue.items():
        print(f"  {value:+9.3f}  {name}")

    for title, rows in (("Features", found.features), ("Tokens", found.tokens), ("Errors", found.errors)):
        print(f"\n{title}: influence, effect on the logit")
        for row in rows:
            print(f"  {row.influence:6.3f} {row.direct_effect:+8.3f}  {row.where:24} at {row.position:3} {row.token!r}")

    print("\nHeads: influence, and their largest contribution to a node")
    for head in found.heads:
        line = f"  {head.influence:6.3f}  {head.layer}.{head.head}"
        if head.largest is not None:
            source = graph.tokens[head.largest.source_position]
            line += f"  {head.largest.contribution:+.3f} from {source!r} to {head.to}"
        print(line)

    # A score means little without what a dictionary that knows nothing gets.
    print(f"\n{'':24}  replacement  completeness")
    for name, scores in {"these transcoders": found.scores, **found.nulls}.items():
        print(f"{name:24}  {scores.replacement:11.3f}  {scores.completeness:12.3f}")
    print(f"{found.nodes_kept} of {found.nodes} nodes kept; every sum holds to {found.gap:.0e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--transcoder", type=Path, action="append", default=[], help="folder of a run; may be repeated")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--out", type=Path, help="where to write the graph")
    options = parser.parse_args()
    graph = trace(options.prompt, options.transcoder, options.model)
    show(graph)
    if options.out:
        print(f"wrote {write(graph, options.out)}")
