"""A manifest that is wrong in any way, though its checksum is right: a sentence that names the file, or the true rows.

The checksum finds accidents. Behind it stands whoever wrote the manifest: another program, or one with a defect. What
such a manifest says is held against the format and against what is there, and never leads out of the store, to rows
that are not those of the store, or to memory for what is not there.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import resource
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activation_store.spec import COMPRESSIONS, MANIFEST_ATTRIBUTE, canonical_json, checksum, group_metadata
from activation_store.store import open_store
from activation_store.verify import verify
from tests.activation_store import small_store
from tests.activation_store.reading import read_everything, refusal_of, same_bits

IDENTITY = ("format_version", "compression", "hooks", "geometry", "plan", "provenance")

SHARED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

ODD_VALUES = st.one_of(
    st.sampled_from([0, 1, -1, 7, 16, 128, 384, 430, 431, 2**31, 2**40, 2**53, 2**59, 2**63, 2**64, -(2**63), 10**400]),
    st.sampled_from([True, False, None, 0.5, 16.0, 430.0, 1e300, [], {}, [1], ["x"], {"x": 1}, [[]]]),
    st.sampled_from(
        ["", "x", "..", "../../x", "/etc/passwd", "a/b", "\0", "none", "zstd", "float16", "int8", "é" * 300]
    ),
    st.text(max_size=5),
    st.integers(-(2**70), 2**70),
)


def body_of(path: Path) -> dict:
    return json.loads((path / "zarr.json").read_text())["attributes"][MANIFEST_ATTRIBUTE]


def write(path: Path, body: dict, fingerprint: bool = True) -> None:
    """Put a manifest there with the checksum (and the fingerprint) that belong to what it says."""
    body = {key: value for key, value in body.items() if key != "checksum"}
    if fingerprint and "fingerprint" in body:
        identity = {key: body[key] for key in IDENTITY if key in body}
        body["fingerprint"] = "sha256:" + hashlib.sha256(canonical_json(identity)).hexdigest()
    body["checksum"] = checksum(canonical_json(body))
    (path / "zarr.json").write_bytes(group_metadata({MANIFEST_ATTRIBUTE: body}))


def places(value, path=()):
    """The path of every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*path, key)
        yield from places(part, (*path, key))


def changed(body: dict, place: tuple, what: str, value: object) -> dict:
    """The manifest with one value replaced, removed, repeated, or put beside it under another name."""
    body = copy.deepcopy(body)
    parent = body
    for key in place[:-1]:
        parent = parent[key]
    if what == "replace":
        parent[place[-1]] = value
    elif what == "remove":
        del parent[place[-1]]
    elif isinstance(parent, list):
        parent.append(parent[place[-1]])
    else:
        parent[value if isinstance(value, str) else "more"] = parent[place[-1]]
    return body


@pytest.fixture(scope="module", params=sorted(COMPRESSIONS))
def store(request, tmp_path_factory):
    """(folder, its manifest, what is read from it)"""
    path = tmp_path_factory.mktemp("fuzzed") / "store"
    small_store.make(path, compression=request.param)
    return path, body_of(path), read_everything(open_store(path))


@pytest.fixture
def little_memory():
    """Half a GiB more than is taken now: who asks for much more gets a MemoryError, which is no UserError."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 29), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refused_or_right(path: Path, expected: dict, parts_of: str) -> str | None:
    found = {}
    refusal = refusal_of(lambda: found.update(read_everything(open_store(path))))
    if refusal is None:
        assert same_bits(found, expected), f"other rows after a change of {parts_of}"
    else:
        assert f"{path}/" in refusal, f"{refusal} does not name the file"
        assert "\n" not in refusal
    return refusal


@pytest.mark.usefixtures("little_memory")
@settings(SHARED, max_examples=100)
@given(data=st.data(), fingerprint=st.booleans())
def test_a_changed_manifest_is_refused_or_shows_the_same_rows(store, data, fingerprint):
    path, body, expected = store
    place = data.draw(st.sampled_from(sorted(places(body), key=str)))
    what = data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "repeat"]))
    try:
        write(path, changed(body, place, what, data.draw(ODD_VALUES)), fingerprint)
        refused_or_right(path, expected, f"{place} ({what})")
        assert all(damage.part.startswith("zarr.json") or (path / damage.part) for damage in verify(path))
    finally:
        write(path, body)


@pytest.mark.heavy
@pytest.mark.usefixtures("little_memory")
@settings(SHARED, max_examples=4000)
@given(data=st.data(), fingerprint=st.booleans(), changes=st.integers(1, 3))
def test_a_manifest_changed_in_several_places_is_refused_or_shows_the_same_rows(store, data, fingerprint, changes):
    path, body, expected = store
    altered = body
    try:
        for _ in range(changes):
            inside = sorted(places(altered), key=str)
            if inside:
                what = data.draw(st.sampled_from(["replace", "remove", "repeat"]))
                altered = changed(altered, data.draw(st.sampled_from(inside)), what, data.draw(ODD_VALUES))
        write(path, altered, fingerprint)
        refused_or_right(path, expected, "several places")
        verify(path)
    finally:
        write(path, body)


HOOK = "blocks.0.hook_resid_post"
WRONG = [
    (("hooks", 0, "name"), "../../outside", "'../../outside' cannot name an array"),
    (("hooks", 0, "name"), "a/b", "'a/b' cannot name an array"),
    (("hooks", 0, "name"), "..", "'..' cannot name an array"),
    (("hooks", 0, "name"), "a\0b", r"'a\\x00b' cannot name an array"),
    (("hooks", 0, "name"), 7, r"hooks\[0\].name is 7, where text should be"),
    (("hooks", 0, "name"), "blocks.1.hook_mlp_out", "its hooks are .*, where each should have a name of its own"),
    (("hooks", 0, "dtype"), "int8", "cannot be stored as 'int8'"),
    (("hooks", 0, "shape"), [8.0], r"hooks\[0\].shape is 8.0, where a whole number from 1 on"),
    (("hooks", 0, "shape"), [-8], r"hooks\[0\].shape is -8, where a whole number"),
    (("hooks", 0, "shape"), [], "it needs 1 to 8 axes"),
    (("hooks", 0, "shape"), [1] * 70, "it needs 1 to 8 axes"),
    (("hooks", 0, "shape"), [2**40, 2**40], "bytes is larger than any disk"),
    (("hooks", 0, "shape"), [16], "its index points to chunks that are not in the file|cannot be decoded"),
    (("hooks", 0, "shape"), [2**36], "index points to chunks|cannot be decoded|which this machine does not have"),
    (("hooks",), [], "its hooks are"),
    (("compression",), "lzma", "compression is 'lzma', where none or zstd should be"),
    (("compression",), ["none"], r"compression is \['none'\], where none or zstd should be"),
    (("geometry", "rows_per_chunk"), 0, "geometry.rows_per_chunk is 0"),
    (("geometry", "rows_per_chunk"), 17, "cannot be cut into chunks of 17 rows"),
    (("geometry", "rows_per_chunk"), True, "geometry.rows_per_chunk is True"),
    (("geometry", "rows_per_shard"), 64, "not a number of whole shards|has 4 checksums, and 430 rows are 7 shards"),
    (("geometry", "rows_per_shard"), 2**50, "larger than any disk|has 4 checksums, and 430 rows are 1 shards"),
    (("geometry",), {"rows_per_chunk": 16}, "geometry lacks 'rows_per_shard'"),
    (("plan", "rows"), 431, "rows is 430, which is not a number of whole shards of 128 rows up to the 431"),
    (("plan", "documents"), 2**40, "document_table/.* is damaged: it has .* bytes where 8796093022208 should be"),
    (("plan", "excluded"), {"bos": -1}, "plan.excluded.bos is -1"),
    (("plan", "batches"), [], r"plan.batches is \[\], where an object should be"),
    (("provenance",), None, "provenance is None, where an object should be"),
    (("rows",), -128, "rows is -128"),
    (("rows",), 384, "it is complete with 384 of 430 rows"),
    (("rows",), 10**30, "rows is 10000000000000.*, where a whole number"),
    (("complete",), 1, "complete is 1, where true or false should be"),
    (("complete",), False, "files has 'statistics/"),
    (("shards", "token_ids"), [], "shards.token_ids has 0 checksums, and 430 rows are 4 shards"),
    (("shards", "token_ids"), ["0" * 16] * 5, "shards.token_ids has 5 checksums"),
    (("shards", "token_ids"), ["x"] * 4, "shards.token_ids is 'x', where a checksum should be"),
    (("shards",), {}, "shards is about nothing"),
    (("files",), {}, "files lacks 'document_table/"),
    (("files", "../../etc/passwd"), "0" * 16, "files has '../../etc/passwd'"),
    (("files", "\n"), "0" * 16, r"files has '\\n'"),
    (("shards", "\n"), [], r"shards is about '\\n', "),
    (("files", f"statistics/{HOOK}/mean/c.0"), None, "a value of files is None, where a checksum should be"),
    (("files", f"statistics/{HOOK}/mean/c.0"), "0" * 16, "mean/c.0 is damaged: it does not match its checksum"),
    (("more",), 1, "it has 'more'"),
    (("format_version",), 2.0, "its fingerprint is that of another store"),
    (("format_version",), "2", "its fingerprint is that of another store"),
    (("format_version",), 4, "is of format version 4; this program reads version 3"),
]


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("store", ["zstd"], indirect=True)
@pytest.mark.parametrize(("place", "value", "said"), WRONG, ids=lambda part: str(part)[:40])
def test_what_cannot_be_right_is_refused_in_words(store, place, value, said):
    path, body, expected = store
    altered = copy.deepcopy(body)
    parent = altered
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    try:
        write(path, altered)
        refusal = refused_or_right(path, expected, str(place))
        assert refusal is not None and re.search(said, refusal), refusal
    finally:
        write(path, body)


def test_a_fingerprint_of_another_store_is_refused(store):
    path, body, expected = store
    try:
        write(path, body | {"provenance": {"model": "another"}}, fingerprint=False)
        assert "fingerprint is that of another store" in refused_or_right(path, expected, "provenance")
        write(path, body | {"provenance": {"model": "another"}})
        assert refused_or_right(path, expected, "provenance and fingerprint") is None
    finally:
        write(path, body)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"attributes":' * 2000,
        b'{"attributes": {"activation_store": ' + b"[" * 990 + b"]" * 990 + b"}}",
    ],
)
def test_json_nested_without_end_is_refused(store, content):
    path, body, expected = store
    try:
        (path / "zarr.json").write_bytes(content)
        assert re.search("is damaged|has no manifest", refused_or_right(path, expected, "everything"))
    finally:
        write(path, body)


@pytest.mark.parametrize("value", ["1e999", "NaN", "-Infinity", '"\\ud800"', "1" * 5000])
def test_what_python_takes_for_json_and_is_none_is_refused(store, value):
    path, body, expected = store
    content = (path / "zarr.json").read_text()
    try:
        (path / "zarr.json").write_text(content.replace('"rows": 430', f'"rows": {value}'))
        assert "zarr.json is damaged" in refused_or_right(path, expected, "rows")
    finally:
        write(path, body)
