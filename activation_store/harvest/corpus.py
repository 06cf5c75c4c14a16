"""Where text comes from: the standard library's source, local files, or a hub data set, as documents.

A corpus is named by one string. ``stdlib`` is the default: the source of the Python that runs us, so it needs no
download. Anything that exists on disk is read as text, JSONL or Parquet; ``hub:owner/name`` is a Hugging Face data set.

A document is the unit of the train / held-out split. The split is a hash of the document's id and of nothing else, so
it is the same for every seed, every size of harvest, and every tool that asks.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from activation_store.errors import UserError

HELD_OUT_PER_MILLE = 100
"""One document in ten is held out: with about 500 standard-library files that leaves some 50 to evaluate on."""

SECTION_CHARS = 50_000
"""A longer plain-text file (a novel) is cut into sections of about this many characters, each a document of its own:
otherwise a corpus of one file could not be split into train and held-out."""

STDLIB_SKIPPED_FOLDERS = frozenset({"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"})
NEAR_DUPLICATE_JACCARD = 0.5
TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst", ".tex", ".html")


@dataclass(frozen=True)
class Document:
    """One text with an id that is stable across machines and runs (a relative path, a line number)."""

    id: str
    text: str


@dataclass
class Corpus:
    """Documents in a fixed order, with what was left out counted by reason.

    ``fingerprint`` hashes ids and texts: two corpora with the same fingerprint give the same tokens.
    """

    name: str
    documents: list[Document]
    left_out: dict[str, int] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for document in self.documents:
            for part in (document.id, document.text):
                encoded = part.encode()
                digest.update(len(encoded).to_bytes(8, "little"))
                digest.update(encoded)
        return "sha256:" + digest.hexdigest()

    def split(self, which: str) -> list[Document]:
        """Documents of ``which`` ("train", "held-out" or "all"), in corpus order."""
        if which == "all":
            return list(self.documents)
        if which not in ("train", "held-out"):
            raise UserError(f"There is no split {which!r}; use train, held-out or all.")
        return [document for document in self.documents if is_held_out(document.id) == (which == "held-out")]


def is_held_out(document_id: str) -> bool:
    """Whether a document belongs to the held-out tenth: a hash of its id, the same everywhere and always."""
    digest = hashlib.sha256(b"dictlearn held-out split\0" + document_id.encode()).digest()
    return int.from_bytes(digest[:8], "little") % 1000 < HELD_OUT_PER_MILLE


def open_corpus(name: str, text_field: str = "text", limit_chars: int | None = None) -> Corpus:
    """Read the corpus called ``name``.

    Args:
        name: ``stdlib``; a text, JSONL or Parquet file; a folder of them; or ``hub:owner/dataset[:config[:split]]``.
        text_field: the column or key that holds the text, for JSONL, Parquet and hub data sets.
        limit_chars: stop reading after about this many characters (a hub data set can be larger than memory).

    Raises:
        UserError: when there is no such corpus, or no text in it.
    """
    if name == "stdlib":
        corpus = _read_stdlib()
    elif name.startswith("hub:"):
        corpus = _read_hub(name, text_field, limit_chars)
    elif name and os.path.exists(name):  # false, not an error, for a name too long for the file system
        corpus = _read_path(Path(name), text_field, limit_chars)
    else:
        raise UserError(
            f"There is no corpus {name!r}: it is neither 'stdlib' nor an existing file or folder. "
            "Name a text, JSONL or Parquet file, a folder of them, or a hub data set as hub:owner/name."
        )
    if not corpus.documents:
        raise UserError(f"The corpus {name!r} holds no text{_left_out_sentence(corpus.left_out)}.")
    return corpus


def _left_out_sentence(left_out: dict[str, int]) -> str:
    if not left_out:
        return ""
    return " (left out: " + ", ".join(f"{count} {reason}" for reason, count in left_out.items()) + ")"


# --- the standard library -------------------------------------------------------------------------------------------


def _read_stdlib() -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    documents: list[Document] = []
    left_out = {"undecodable": 0, "empty": 0, "near-duplicate": 0}
    for path in _walk(root, suffixes=(".py",), skipped_folders=STDLIB_SKIPPED_FOLDERS):
        _append_text(documents, left_out, path, path.relative_to(root).as_posix())
    kept = _without_near_duplicates(documents)
    left_out["near-duplicate"] = len(documents) - len(kept)
    listing = "\n".join(f"{d.id} {hashlib.sha256(d.text.encode()).hexdigest()}" for d in kept)
    origin = {
        "python": platform.python_version(),
        "file_list": "sha256:" + hashlib.sha256(listing.encode()).hexdigest(),
        "licence": "Python Software Foundation License Version 2",
    }
    return Corpus("stdlib", kept, {k: v for k, v in left_out.items() if v}, origin)


def _without_near_duplicates(documents: list[Document]) -> list[Document]:
    """Keep the first of each pair of documents whose sets of three-line shingles have Jaccard similarity over 0.5.

    Exact, through an inverted index: the generated code pages in ``encodings`` are what it mostly removes, and a
    held-out one would otherwise be memorised from its sisters in the training set.
    """
    shingle_owners: dict[int, list[int]] = {}
    kept: list[Document] = []
    sizes: list[int] = []
    for document in documents:
        lines = [line.strip() for line in document.text.splitlines() if len(line.strip()) > 8]
        shingles = {
            int.from_bytes(hashlib.blake2b("\n".join(lines[i : i + 3]).encode(), digest_size=8).digest(), "little")
            for i in range(max(1, len(lines) - 2))
        }
        shared: dict[int, int] = {}
        for shingle in shingles:
            for owner in shingle_owners.get(shingle, ()):
                shared[owner] = shared.get(owner, 0) + 1
        if any(n / (len(shingles) + sizes[owner] - n) > NEAR_DUPLICATE_JACCARD for owner, n in shared.items()):
            continue
        for shingle in shingles:
            shingle_owners.setdefault(shingle, []).append(len(kept))
        kept.append(document)
        sizes.append(len(shingles))
    return kept


# --- files and folders ----------------------------------------------------------------------------------------------


def _walk(root: Path, suffixes: tuple[str, ...], skipped_folders: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Files below ``root`` in an order that does not depend on the file system."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in skipped_folders)
        for name in sorted(names):
            if name.endswith(suffixes):
                yield Path(folder) / name


def _append_text(documents: list[Document], left_out: dict[str, int], path: Path, document_id: str) -> None:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        _count(left_out, "undecodable")
        return
    except OSError as error:
        raise UserError(f"The file {str(path)!r} cannot be read: {error.strerror}.") from error
    if not text.strip():
        _count(left_out, "empty")
        return
    documents.append(Document(document_id, text))


def _count(left_out: dict[str, int], reason: str) -> None:
    left_out[reason] = left_out.get(reason, 0) + 1


def _read_path(path: Path, text_field: str, limit_chars: int | None) -> Corpus:
    root = path if path.is_dir() else path.parent
    known = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
    files = list(_walk(path, known)) if path.is_dir() else [path]
    if not files:
        raise UserError(f"The folder {str(path)!r} holds no file ending in {', '.join(known)}.")
    left_out: dict[str, int] = {}
    documents = (
        document
        for file in files
        for document in _file_documents(file, file.relative_to(root).as_posix(), text_field, left_out)
    )
    return _gathered(str(path), documents, left_out, limit_chars)


def _file_documents(file: Path, document_id: str, text_field: str, left_out: dict[str, int]) -> Iterator[Document]:
    if file.suffix == ".jsonl":
        yield from _jsonl_documents(file, document_id, text_field)
    elif file.suffix == ".parquet":
        yield from _parquet_documents(file, document_id, text_field)
    else:
        whole: list[Document] = []
        _append_text(whole, left_out, file, document_id)
        for document in whole:
            yield from _sections(document)


def _gathered(name: str, documents: Iterator[Document], left_out: dict[str, int], limit_chars: int | None) -> Corpus:
    """The documents that hold text, up to the limit; ``left_out`` counts the others by reason."""
    kept: list[Document] = []
    origin: dict[str, str] = {}
    chars = 0
    for document in documents:
        if not document.text.strip():
            _count(left_out, "empty")
            continue
        if not _is_encodable(document.text):
            _count(left_out, "undecodable")
            continue
        kept.append(document)
        chars += len(document.text)
        if limit_chars is not None and chars >= limit_chars:
            origin["read"] = f"the first {limit_chars:,} characters"
            break
    return Corpus(name, kept, left_out, origin)


def _is_encodable(text: str) -> bool:
    """False for text with half a surrogate pair: JSON can spell one, but it is no character and has no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _sections(document: Document) -> Iterator[Document]:
    """Cut a long text at line ends into documents of about ``SECTION_CHARS``; a short one stays whole."""
    if len(document.text) <= SECTION_CHARS * 3 // 2:
        yield document
        return
    start, number = 0, 0
    while start < len(document.text):
        end = start + SECTION_CHARS
        if len(document.text) - end < SECTION_CHARS // 2:
            end = len(document.text)
        else:
            newline = document.text.find("\n", end)
            end = newline + 1 if newline >= 0 else len(document.text)
        yield Document(f"{document.id}#{number}", document.text[start:end])
        start, number = end, number + 1


def _jsonl_documents(file: Path, document_id: str, text_field: str) -> Iterator[Document]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"Line {number} of {str(file)!r} is not JSON: {error}.") from error
            if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
                raise UserError(
                    f"Line {number} of {str(file)!r} has no text under {text_field!r}; "
                    f"name the key that holds it with --text-field."
                )
            yield Document(f"{document_id}#{number}", record[text_field])


def _parquet_documents(file: Path, document_id: str, text_field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        schema = table.schema_arrow
        if text_field not in schema.names:
            raise UserError(
                f"{str(file)!r} has no column {text_field!r}; its columns are {', '.join(schema.names)}. "
                "Name the one that holds the text with --text-field."
            )
        kind = schema.field(text_field).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise UserError(
                f"The column {text_field!r} of {str(file)!r} holds {kind}, not text; its columns are "
                f"{', '.join(schema.names)}. Name the one that holds the text with --text-field."
            )
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
            for text in batch.column(0).to_pylist():
                if text is not None:
                    yield Document(f"{document_id}#{number}", text)
                number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(file)!r} is damaged or no Parquet file: {str(error).splitlines()[0]}") from error


def _read_hub(name: str, text_field: str, limit_chars: int | None) -> Corpus:
    import datasets

    parts = name.removeprefix("hub:").split(":")
    config = parts[1] if len(parts) > 1 and parts[1] else None
    split = parts[2] if len(parts) > 2 else "train"
    try:
        stream = datasets.load_dataset(parts[0], config, split=split, streaming=True)
        return _gathered(name, _hub_documents(stream, parts[0], split, text_field), {}, limit_chars)
    except UserError:
        raise
    except Exception as error:  # the library raises a dozen unrelated kinds for "not there" and "no network"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"The hub data set {parts[0]!r} cannot be read: {reason} Check the name and the network, "
            "or name a local file."
        ) from error


def _hub_documents(stream: Iterable[dict], dataset: str, split: str, text_field: str) -> Iterator[Document]:
    for number, record in enumerate(stream):
        if not isinstance(record.get(text_field), str):
            raise UserError(
                f"The hub data set {dataset!r} has no text under {text_field!r}; its columns are "
                f"{', '.join(record)}. Name the one that holds the text with --text-field."
            )
        yield Document(f"{dataset}:{split}#{number}", record[text_field])
