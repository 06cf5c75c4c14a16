"""What a training step of TopK costs at least: its floating-point operations, its fewest bytes, and a bound from both.

Axes: B rows of a batch, D width, S latents, K active per row, A dead latents.

The operations are those of the encoder's product, 2 B S D, and of the four sums over selected pairs (decoding, the
gradients of the values, of the encoder, of the decoder), 2 B K D each. The fewest bytes are those of reading and
writing once what a step changes, the weights and both moments of Adam in float32, and of reading the batch.

No step reaches the larger of the two times, because the products and the update follow one another. The row-fused bound
adds up stages that do: the product at the matrix units' rate, then at the memory's rate what has to be gathered where
the pre-activations are never written, gradients are never stored, and a latent's row is updated where its gradient was
summed. Gathers are counted without a cache.
"""

from __future__ import annotations

from dataclasses import dataclass

ASSUMED_TFLOPS, ASSUMED_TB_PER_S = 790.0, 4.3
"""bfloat16 products and memory, bytes read and written: the rates that the goals were set with."""

BFLOAT16, FLOAT32 = 2, 4
BYTES_OF_A_SORTED_PAIR = 64
"""A radix sort of 4-byte latents with 4-byte places: four passes that read and write both."""


@dataclass(frozen=True)
class Size:
    d: int
    latents: int
    k: int
    batch: int = 8192

    @property
    def name(self) -> str:
        return f"{self.d}/{self.latents}/{self.k}"

    @property
    def weights(self) -> int:
        """Numbers in both matrices."""
        return 2 * self.latents * self.d

    @property
    def pairs(self) -> int:
        return self.batch * self.k

    @property
    def kept_bytes(self) -> int:
        """Weights, both moments, and one bfloat16 pre-activation for each row and latent."""
        return 3 * FLOAT32 * self.weights + BFLOAT16 * self.batch * self.latents


SIZES = (Size(768, 24_576, 32), Size(2304, 65_536, 64), Size(4096, 131_072, 64))


@dataclass(frozen=True)
class Rates:
    """Of a card: floating-point operations and bytes per second."""

    flops: float = ASSUMED_TFLOPS * 1e12
    bytes: float = ASSUMED_TB_PER_S * 1e12


def operations(size: Size) -> int:
    return 2 * size.batch * size.latents * size.d + 4 * 2 * size.pairs * size.d


def fewest_bytes(size: Size) -> int:
    return 6 * FLOAT32 * size.weights + FLOAT32 * size.batch * size.d


def stages(size: Size, rates: Rates) -> dict[str, float]:
    """Milliseconds of each stage of the row-fused bound."""
    gathered = BFLOAT16 * size.pairs * size.d  # one row of bfloat16 for each pair
    seconds = {
        "encoder product": 2 * size.batch * size.latents * size.d / rates.flops,
        "decoding": gathered / rates.bytes,
        "sums by latent": 2 * gathered / rates.bytes,
        "sorting pairs": BYTES_OF_A_SORTED_PAIR * size.pairs / rates.bytes,
        # reads and writes weights and moments, and writes the weights in bfloat16 for the next step
        "update": (6 * FLOAT32 + BFLOAT16) * size.weights / rates.bytes,
    }
    return {name: 1e3 * took for name, took in seconds.items()}


def bound(size: Size, rates: Rates) -> float:
    """Milliseconds: the row-fused bound."""
    return sum(stages(size, rates).values())


def auxk_ms(size: Size, dead_share: float, rates: Rates) -> float:
    """Milliseconds of AuxK's four dense products over the dead latents; their pre-activations are there already."""
    dead = int(dead_share * size.latents)
    return 1e3 * 4 * 2 * size.batch * dead * size.d / rates.flops


def pre_activations_ms(size: Size, rates: Rates) -> float:
    """Milliseconds of writing the pre-activations in bfloat16 and reading them once, where selection needs that."""
    return 1e3 * 2 * BFLOAT16 * size.batch * size.latents / rates.bytes


def table(sizes: tuple[Size, ...], rates: Rates) -> list[dict[str, object]]:
    """A row for each size: the two numbers, the two times, the larger, and the bound with its stages."""
    rows = []
    for size in sizes:
        by_operations = 1e3 * operations(size) / rates.flops
        by_bytes = 1e3 * fewest_bytes(size) / rates.bytes
        of = bound(size, rates)
        rows.append(
            {
                "size": size.name,
                "TFLOP": round(operations(size) / 1e12, 3),
                "fewest GB": round(fewest_bytes(size) / 1e9, 3),
                "ms by operations": round(by_operations, 2),
                "ms by bytes": round(by_bytes, 2),
                "floor ms": round(max(by_operations, by_bytes), 2),
                **{f"{stage} ms": round(took, 3) for stage, took in stages(size, rates).items()},
                "row-fused bound ms": round(of, 2),
                "of it 60 % ms": round(of / 0.6, 2),
                "AuxK, 10 % dead, ms": round(auxk_ms(size, 0.1, rates), 2),
                "pre-activations ms": round(pre_activations_ms(size, rates), 2),
            }
        )
    return rows
