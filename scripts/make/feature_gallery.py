"""Write docs/features.md: ten features of the demo's autoencoder with their strongest examples.

    python scripts/make/feature_gallery.py workspace/indexes/sae.zarr docs/features.md

Which ten is not a matter of taste: `dictlearn.feature_index.selectivity` ranks all latents by how well one token, here
or just before, explains them on training documents; the first ten different patterns are shown, with precision and
recall on held-out documents (which only drop latents that do far worse there). After them come latents drawn at
random, so that a reader sees what most features are like.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from activation_store.seeds import numpy_stream
from dictlearn.feature_index.index import FeatureIndex, open_index
from dictlearn.feature_index.read import feature_page
from dictlearn.feature_index.selectivity import recognisable
from dictlearn.reports import in_brackets

TEN, RANDOM, EXAMPLES = 10, 5, 5


def strips(index: FeatureIndex, latent: int) -> str:
    page = feature_page(index, latent, examples=EXAMPLES)
    lines = [f"{strip.value:8.2f}  {in_brackets(strip)}" for strip in page.bands[0].strips]
    raises = ", ".join(repr(each.token) for each in page.top_logits[:6])
    return "\n".join(["```text", *lines, "```", "", f"Raises the logits of {raises}." if raises else ""])


def gallery(index: FeatureIndex) -> str:
    parts = [
        "# Ten features a reader recognises\n\n"
        f"From the index of `{index.path.stem}` on the bundled language model, written by\n"
        "`scripts/make/feature_gallery.py` (which says how they were chosen). Each example's token is in ⟦brackets⟧.\n"
        "Precision: the share of the latent's summed activation that falls on the pattern. Recall: the share of\n"
        "the pattern's occurrences in which it fired. Both on held-out documents.\n"
    ]
    chosen = recognisable(index, limit=TEN)
    for found in chosen:
        parts.append(
            f"## Latent {found.latent}: fires {found.pattern}\n\n"
            f"{found.count:,} rows; precision {found.precision:.0%}, recall {found.recall:.0%}.\n\n"
            f"{strips(index, found.latent)}\n"
        )
    count = index.array("latents/count")
    alive = [latent for latent in range(len(count)) if count[latent] >= EXAMPLES]
    drawn = sorted(numpy_stream(0, "gallery of random latents").choice(alive, RANDOM, replace=False).tolist())
    parts.append(
        f"# {RANDOM} drawn at random\n\nFrom the {len(alive):,} latents that fired at least {EXAMPLES} times.\n"
    )
    parts += [f"## Latent {latent}\n\n{count[latent]:,} rows.\n\n{strips(index, latent)}\n" for latent in drawn]
    return "\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path)
    parser.add_argument("page", type=Path)
    options = parser.parse_args()
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(gallery(open_index(options.index)))
