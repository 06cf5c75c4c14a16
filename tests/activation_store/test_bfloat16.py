from __future__ import annotations

import numpy as np
import pytest

from activation_store.bfloat16 import from_float32, register, to_float32


def test_every_bit_pattern_reads_as_torch_reads_it():
    torch = pytest.importorskip("torch")
    bits = np.arange(2**16, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).to(torch.float32).numpy()
    assert np.array_equal(to_float32(bits).view(np.uint32), expected.view(np.uint32))


def test_rounding_is_that_of_torch():
    torch = pytest.importorskip("torch")
    stream = np.random.default_rng(0)
    anything = stream.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    halfway = (stream.integers(0, 2**16, 2000, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    values = np.concatenate([anything, halfway, np.array([0.0, -0.0, np.inf, -np.inf, 3.4e38], dtype=np.float32)])
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(from_float32(values), expected)


def test_not_a_number_stays_so():
    every_kind = np.array([0x7F800001, 0x7FFFFFFF, 0xFFC00000, 0x7FC00000], dtype=np.uint32).view(np.float32)
    assert np.isnan(to_float32(from_float32(every_kind))).all()


def test_zarr_keeps_telling_uint16_from_bfloat16(tmp_path):
    zarr = pytest.importorskip("zarr")
    register()
    plain = zarr.create_array(tmp_path / "plain", shape=(3,), dtype="uint16")
    assert plain.metadata.to_dict()["data_type"] == "uint16"


@pytest.mark.parametrize(("fill_value", "bits"), [(0.0, 0), (1.5, 0x3FC0), ("NaN", 0x7FC0), ("-Infinity", 0xFF80)])
def test_zarr_understands_fill_values_of_the_registered_type(fill_value, bits):
    pytest.importorskip("zarr")
    from zarr.core.dtype import data_type_registry

    register()
    stored = data_type_registry.get("bfloat16")()
    assert stored.from_json_scalar(fill_value, zarr_format=3) == bits
    back = stored.from_json_scalar(stored.to_json_scalar(np.uint16(bits), zarr_format=3), zarr_format=3)
    assert back == bits
