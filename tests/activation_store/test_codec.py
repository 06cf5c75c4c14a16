"""Chunks to stored bytes and back: exactly, or a ValueError that says why, and never more memory than a chunk."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numcodecs.zstd import Zstd

from activation_store.codec import check_compression, decoder, encoder
from activation_store.errors import UserError
from activation_store.spec import COMPRESSIONS

LENGTHS = st.sampled_from([1, 2, 255, 256, 257, 65_535, 65_536, 65_791, 65_792, 70_000])
"""Where a zstd frame changes the width of the number by which it says how long it is."""


def decoded(compression, stored, length):
    chunk = np.full(length, 7, dtype=np.uint8)
    decoder(compression)(stored, chunk)
    return chunk.tobytes()


def encoded(compression, chunk):
    encode = encoder(compression)
    return chunk if encode is None else encode(chunk)


@given(length=LENGTHS, kinds=st.integers(1, 256), seed=st.integers(0, 9), compression=st.sampled_from([*COMPRESSIONS]))
def test_what_was_encoded_is_decoded(length, kinds, seed, compression):
    chunk = np.random.default_rng(seed).integers(0, kinds, length, dtype=np.uint8).tobytes()
    stored = encoded(compression, chunk)
    assert decoded(compression, stored, length) == chunk
    assert decoded(compression, memoryview(stored), length) == chunk
    for other in (length - 1, length + 1, 2 * length):
        with pytest.raises(ValueError, match=rf"{length} bytes where {other} should be"):
            decoded(compression, stored, other)


def test_the_bytes_are_those_of_zarrs_own_compressor():
    chunk = bytes(range(256)) * 40
    settings = COMPRESSIONS["zstd"][0]["configuration"]
    assert encoded("zstd", chunk) == Zstd(level=settings["level"], checksum=settings["checksum"]).encode(chunk)
    assert settings["checksum"], "nothing else would find a flipped bit"


@given(seed=st.integers(0, 30), place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found_or_changes_nothing(seed, place, bit):
    chunk = np.random.default_rng(seed).integers(0, 1 + seed, 3000, dtype=np.uint8).tobytes()
    stored = bytearray(encoded("zstd", chunk))
    stored[place % len(stored)] ^= 1 << bit
    try:
        found = decoded("zstd", bytes(stored), len(chunk))
    except ValueError:
        return
    assert found == chunk


@given(stored=st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(lambda rest: b"\x28\xb5\x2f\xfd" + rest)))
def test_rubbish_is_refused(stored):
    with pytest.raises(ValueError):
        decoded("zstd", stored, 5000)


def test_frames_by_others_are_decoded():
    """Without a checksum, at another level, and without saying how long they are."""
    chunk = bytes(range(200)) * 30
    assert decoded("zstd", Zstd(level=19, checksum=False).encode(chunk), len(chunk)) == chunk
    assert decoded("zstd", unsized(chunk), len(chunk)) == chunk
    for other in (len(chunk) - 1, len(chunk) + 1):
        with pytest.raises(ValueError):
            decoded("zstd", unsized(chunk), other)


def unsized(content):
    """A frame that does not say how long its content is."""
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


EXABYTE = bytes.fromhex("28b52ffde4") + (1 << 60).to_bytes(8, "little")
"""The header of a frame in one segment, with a checksum and a length of 8 bytes."""


@pytest.mark.parametrize("stored", [EXABYTE + bytes(20), unsized(bytes(1 << 26)), Zstd().encode(bytes(1 << 26))])
def test_a_frame_that_would_become_much_more_than_a_chunk_takes_no_memory(stored):
    tracemalloc.start()
    with pytest.raises(ValueError):
        decoded("zstd", stored, 4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("name", ["lzma", "", None, 3, ["zstd"]])
def test_an_unknown_compression_is_refused(name):
    with pytest.raises(UserError, match="There is no compression .*; use none or zstd"):
        check_compression(name)
