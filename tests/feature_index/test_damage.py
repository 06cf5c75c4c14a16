"""A damaged index is one sentence that names the place, on opening or when it is verified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from activation_store.errors import UserError
from dictlearn.feature_index.index import open_index
from dictlearn.feature_index.spec import ARRAYS, MANIFEST_ATTRIBUTE

from .conftest import Made


@pytest.fixture
def copy(made: Made, tmp_path) -> Path:
    return Path(shutil.copytree(made.index.path, tmp_path / "run.zarr"))


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_index(path)
    return str(caught.value)


def change_manifest(index: Path, **changes) -> None:
    file = index / "zarr.json"
    record = json.loads(file.read_text())
    record["attributes"][MANIFEST_ATTRIBUTE].update(changes)
    file.write_text(json.dumps(record))


@pytest.mark.parametrize("array", [a for a in ARRAYS if not {"M", "W"} & set(a.axes)], ids=lambda array: array.path)
def test_a_file_of_values_that_is_missing_or_short(copy: Path, array) -> None:
    file = next((copy / array.path).glob("c.*"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    sentence = refusal(copy)
    assert f"{array.path}/c.0" in sentence and f"{len(whole) - 1:,} bytes instead of {len(whole):,}" in sentence
    assert "delete the index and run `dictlearn index` again" in sentence
    file.unlink()
    assert f"{array.path}/c.0" in refusal(copy) and "it is missing" in refusal(copy)


def test_a_flipped_bit_is_found_by_verify(copy: Path) -> None:
    file = copy / "activations/values/c.0"
    content = bytearray(file.read_bytes())
    content[17] ^= 4
    file.write_bytes(content)
    index = open_index(copy)
    with pytest.raises(UserError, match="activations/values/c.0': its contents do not match the checksum"):
        index.verify()


def test_a_file_that_disappears_after_opening(copy: Path) -> None:
    from dictlearn.feature_index.read import feature_page

    index = open_index(copy)
    (copy / "text/token_ids/c.0").unlink()
    with pytest.raises(UserError, match="damaged at .*text/token_ids/c.0"):
        feature_page(index, 3)


def test_another_version(copy: Path) -> None:
    change_manifest(copy, format_version=2)
    assert "is of format version 2; this dictlearn reads version 1" in refusal(copy)


def test_a_changed_manifest(copy: Path) -> None:
    change_manifest(copy, rows_held_out=3)
    assert "zarr.json': the manifest does not match its own checksum" in refusal(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"attributes": 3}'])
def test_what_is_no_manifest(copy: Path, content: bytes) -> None:
    (copy / "zarr.json").write_bytes(content)
    assert "zarr.json" in refusal(copy) or "no feature index" in refusal(copy)


def test_what_is_no_index(made: Made, tmp_path) -> None:
    assert "there is no such folder; make one with `dictlearn index`" in refusal(tmp_path / "none.zarr")
    assert "it has no zarr.json" in refusal(tmp_path)
    assert "is a Zarr group but no feature index" in refusal(made.store.path)
    file = tmp_path / "file"
    file.touch()
    assert "is a file, not the folder of a feature index" in refusal(file)
