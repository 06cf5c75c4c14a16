"""What the tests find on a machine, and what they may not do without.

``DICTLEARN_SHARED`` names a folder of real models and data: tests that read it take the ``shared`` fixture.
``DICTLEARN_REQUIRE`` is a comma-separated list out of ``CAPABILITIES``: a test marked ``needs(name)`` whose name is in
the list fails where it would have skipped, so that continuous integration cannot pass by testing nothing.

torch is not imported here: most tests do not need it, and some check that nothing has.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported anywhere: one thread is the faster choice for tensors of test size and leaves the other
# cores alone; sums do not depend on how many cores a machine has.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Read when a kernel is defined: without the driver of a GPU the kernels run in Triton's interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

CAPABILITIES = {
    "browser": "a Chromium (Debian: apt install chromium) and the playwright package",
    "s3": "the packages obstore, moto[s3], flask and flask-cors: a client of object stores and a server",
    "distributed": "torch.distributed with the gloo backend",
    "interpreter": "triton, for its interpreter",
}

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")

collect_ignore = ["example_package"]
"""A package of its own: `test_third_party` installs it and runs its tests."""

heavy_tests_left_out = pytest.StashKey[int]()
LEFT_OUT = "heavy_tests_left_out"
"""Under which a process of several that share the tests hands its count over."""


# --- what is there ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data."""
    named = os.environ.get("DICTLEARN_SHARED")
    if not named:
        pytest.skip("DICTLEARN_SHARED does not name a folder of real models and data")
    folder = Path(named)
    if not folder.is_dir():
        pytest.skip(f"DICTLEARN_SHARED names {named!r}, which is not a folder")
    return folder


@pytest.fixture(scope="session")
def chromium() -> Path:
    """The browser's executable. A test that takes it is also marked ``needs("browser")``."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("the playwright package is not installed")
    found = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if found is None:
        pytest.skip("no Chromium on this machine")
    return Path(found)


@pytest.fixture(scope="session")
def interpreter() -> None:
    """Triton's, for kernels on a CPU's tensors. A test that takes it is also marked ``needs("interpreter")``."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled for the GPU here; TRITON_INTERPRET=1 runs them in the interpreter")


@pytest.fixture(scope="session")
def stories260k(shared: Path) -> Path:
    """A real model of somebody else's."""
    return shared / "models" / "stories260K"


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_models import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", "llama")


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_models import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "gpt2", "gpt2")


# --- what a run may not do without ------------------------------------------------------------------------------------


def required_capabilities() -> set[str]:
    return {name.strip() for name in os.environ.get("DICTLEARN_REQUIRE", "").split(",") if name.strip()}


def pytest_configure(config: pytest.Config) -> None:
    unknown = required_capabilities() - CAPABILITIES.keys()
    if unknown:
        raise pytest.UsageError(
            f"DICTLEARN_REQUIRE names {', '.join(sorted(unknown))}; it knows {', '.join(CAPABILITIES)}."
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        unknown = needs_of(item) - CAPABILITIES.keys()
        if unknown:
            raise pytest.UsageError(f"{item.nodeid} needs {', '.join(sorted(unknown))}: not in CAPABILITIES.")


def needs_of(item: pytest.Item) -> set[str]:
    return {name for marker in item.iter_markers("needs") for name in marker.args}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    insisted = needs_of(item) & required_capabilities()
    if report.skipped and insisted and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"DICTLEARN_REQUIRE={','.join(sorted(insisted))} forbids this skip: {reason}"
    return report


# --- what was not run -------------------------------------------------------------------------------------------------


def pytest_deselected(items: list[pytest.Item]) -> None:
    heavy = [item for item in items if item.get_closest_marker("heavy")]
    if heavy:
        stash = heavy[0].config.stash
        stash[heavy_tests_left_out] = stash.get(heavy_tests_left_out, 0) + len(heavy)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[LEFT_OUT] = session.config.stash.get(heavy_tests_left_out, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Of pytest-xdist: every process collects all tests, so that each knows how many are left out, unless it died."""
    known = node.config.stash.get(heavy_tests_left_out, 0)
    node.config.stash[heavy_tests_left_out] = max(known, getattr(node, "workeroutput", {}).get(LEFT_OUT, 0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = config.stash.get(heavy_tests_left_out, 0)
    if left_out:
        terminalreporter.write_line(f"NOT RUN {left_out} heavy tests: `make test-all` runs them.")
