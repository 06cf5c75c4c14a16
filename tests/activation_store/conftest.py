from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from activation_store.store import Store, open_store
from tests.activation_store import small_store
from tests.activation_store.copies import KINDS, Copy
from tests.activation_store.cut_proxy import CutProxy
from tests.activation_store.object_servers import ObjectServer


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder in memory where the system has such: on a disk, each rename over a file waits for the disk."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="activation-store-", dir=memory))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def small_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small store. Not to be changed: copy it first."""
    path = tmp_path_factory.mktemp("stores") / "small"
    small_store.make(path)
    return path


@pytest.fixture(scope="session")
def small_zstd_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, compressed."""
    path = tmp_path_factory.mktemp("stores") / "small-zstd"
    small_store.make(path, compression="zstd")
    return path


@pytest.fixture
def small(small_path: Path) -> Store:
    return open_store(small_path)


@pytest.fixture
def copied(small_path: Path, fast_folder: Path) -> Path:
    """A copy of the small store, to be damaged."""
    return Path(shutil.copytree(small_path, fast_folder / "copied"))


@pytest.fixture(params=KINDS)
def copy(request: pytest.FixtureRequest, small_path: Path, small_zstd_path: Path, fast_folder: Path) -> Copy:
    """A copy of the small store of each kind, to be damaged."""
    if request.param.endswith("objects"):
        pytest.importorskip("obstore")
    source = small_zstd_path if request.param.startswith("zstd") else small_path
    return Copy(source, request.param, fast_folder / "copy")


# --- object stores ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def s3_server() -> Iterator[ObjectServer]:
    """An S3 server that holds its objects in memory. Not to be killed: the session shares it."""
    with ObjectServer() as server:
        yield server


@pytest.fixture
def durable_s3_server(tmp_path: Path) -> Iterator[ObjectServer]:
    """One of the test's own that keeps what it holds on disk, so that it can be killed and started again."""
    with ObjectServer(tmp_path / "journal of the S3 server") as server:
        yield server


@pytest.fixture
def s3_proxy(s3_server: ObjectServer) -> Iterator[CutProxy]:
    """A network to `s3_server` that can be cut."""
    with CutProxy(s3_server.port) as proxy:
        yield proxy
