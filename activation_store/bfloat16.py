"""bfloat16 where numpy has none: its bits as uint16, and the data type by which zarr-python opens such arrays.

On disk the arrays carry the registered name "bfloat16", which TensorStore and zarrs read natively. zarr-python knows no
such type, so `register` teaches it one. It presents the values as uint16 bits whether or not ml_dtypes is installed:
what a program reads should not depend on which packages happen to be there. `bits.view(ml_dtypes.bfloat16)` or
`to_float32(bits)` gives the numbers.
"""

from __future__ import annotations

import numpy as np


def to_float32(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits (uint16, any shape). Exact: a bfloat16 is the upper half of a float32."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def as_float32(rows: np.ndarray) -> np.ndarray:
    """Rows as read from a store, float16, float32 or bfloat16 bits, as float32."""
    return to_float32(rows) if rows.dtype == np.uint16 else rows.astype(np.float32, copy=False)


def from_float32(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) of float32 values, rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # Adding 0x7FFF plus the lowest kept bit carries into the upper half exactly when nearest-even rounds up.
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def register() -> None:
    """Teach zarr-python the data type "bfloat16" (idempotent; imports zarr)."""
    from zarr.core.dtype import data_type_registry

    if "bfloat16" not in data_type_registry.contents:
        data_type_registry.register("bfloat16", _zarr_data_type())


def _zarr_data_type() -> type:
    from dataclasses import dataclass

    from zarr.core.dtype import UInt16
    from zarr.core.dtype.common import DataTypeValidationError

    @dataclass(frozen=True, kw_only=True)
    class BFloat16(UInt16):
        """The zarr-extensions type "bfloat16", presented as uint16 bits."""

        _zarr_v3_name = "bfloat16"  # type: ignore[assignment]
        _zarr_v2_names = ()  # type: ignore[assignment]

        @classmethod
        def from_native_dtype(cls, dtype):  # type: ignore[no-untyped-def]
            # A plain uint16 array stays uint16: bfloat16 is only ever chosen by its name.
            raise DataTypeValidationError(f"{dtype} does not stand for bfloat16; ask for it by name.")

        def from_json_scalar(self, data, *, zarr_format):  # type: ignore[no-untyped-def]
            if isinstance(data, str) and data.startswith("0x"):
                return np.uint16(int(data, 16))
            return np.uint16(from_float32(np.array([data], dtype=np.float32))[0])

        def to_json_scalar(self, data, *, zarr_format):  # type: ignore[no-untyped-def]
            value = float(to_float32(np.array([data], dtype=np.uint16))[0])
            return value if np.isfinite(value) else f"0x{int(data):04x}"

    return BFloat16
