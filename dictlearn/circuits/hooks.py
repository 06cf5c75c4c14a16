"""Which hooks make a dictionary a transcoder of one MLP. No torch: the command line asks before anything loads."""

from __future__ import annotations

import re
from collections.abc import Sequence

from activation_store.errors import UserError

READS = re.compile(r"blocks\.(\d+)\.(mlp\.hook_in|ln2\.hook_out|ln2\.hook_normalized)", flags=re.ASCII)
"""The MLP's input, behind the norm's gain and bias, or in front of them."""
WRITES = re.compile(r"blocks\.(\d+)\.(hook_mlp_out|mlp\.hook_out)", flags=re.ASCII)


def layer_of(hook_in: str | Sequence[str], hook_out: str | Sequence[str], name: str | None = None) -> int:
    """The layer whose MLP a transcoder stands for; ``name`` is what errors call it.

    hook_resid_mid is not among the sites: in TransformerBridge it feeds the MLP branch alone, and is not its input but
    the norm's.

    Raises:
        UserError: for an autoencoder, for a dictionary of several hooks, and for hooks that are not one MLP's input and
            output.
    """
    called = "A dictionary" if name is None else f"The dictionary of {name!r}"
    wanted = "name transcoders from blocks.L.mlp.hook_in to blocks.L.hook_mlp_out"
    if not isinstance(hook_in, str) or not isinstance(hook_out, str):
        raise UserError(f"{called} is of several hooks, and a graph takes one transcoder for each layer; {wanted}.")
    if hook_in == hook_out:
        raise UserError(f"{called} is an autoencoder of {hook_in}, not a transcoder; {wanted}.")
    reads, writes = READS.fullmatch(hook_in), WRITES.fullmatch(hook_out)
    if not reads or not writes or reads[1] != writes[1]:
        raise UserError(f"{called} goes from {hook_in} to {hook_out} and does not stand for one MLP; {wanted}.")
    return int(reads[1])
