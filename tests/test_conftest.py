"""The rules of conftest.py, checked by running pytest on small test files beside a copy of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parent / "conftest.py"
MARKERS = "[pytest]\nmarkers =\n    heavy: h\n    needs(*names): n\n"


@pytest.fixture
def run_pytest(tmp_path: Path):
    def run(test_source: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
        (tmp_path / "pytest.ini").write_text(MARKERS)
        (tmp_path / "test_it.py").write_text("import pytest\n" + test_source)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("DICTLEARN_", "PYTEST_"))}
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", *arguments, "test_it.py"],
            cwd=tmp_path,
            env=inherited | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


SKIPS = "@pytest.mark.needs('browser')\ndef test_page():\n    pytest.skip('no browser here')\n"
SKIPS_IN_FIXTURE = (
    "@pytest.fixture\ndef window():\n    pytest.skip('no browser here')\n\n\n"
    "@pytest.mark.needs('browser')\ndef test_page(window):\n    pass\n"
)


@pytest.mark.parametrize("source", [SKIPS, SKIPS_IN_FIXTURE], ids=["in the test", "in a fixture"])
def test_a_skip_is_a_skip_until_it_is_forbidden(run_pytest, source: str) -> None:
    allowed = run_pytest(source)
    assert allowed.returncode == 0
    assert "1 skipped" in allowed.stdout and "no browser here" in allowed.stdout

    forbidden = run_pytest(source, DICTLEARN_REQUIRE="s3,browser")
    assert forbidden.returncode == 1
    assert "DICTLEARN_REQUIRE=browser forbids this skip" in forbidden.stdout
    assert "no browser here" in forbidden.stdout


def test_only_the_named_capability_is_insisted_on(run_pytest) -> None:
    assert run_pytest(SKIPS, DICTLEARN_REQUIRE="distributed").returncode == 0


def test_a_misspelt_requirement_is_refused(run_pytest) -> None:
    result = run_pytest(SKIPS, DICTLEARN_REQUIRE="brwser")
    assert result.returncode == 4
    assert "DICTLEARN_REQUIRE names brwser; it knows browser, s3, distributed, interpreter." in result.stderr


def test_a_misspelt_need_is_refused(run_pytest) -> None:
    result = run_pytest(SKIPS.replace("browser", "brwser"))
    assert result.returncode == 4
    assert "test_page needs brwser" in result.stderr


def test_a_missing_shared_folder_is_a_skip_with_its_reason(run_pytest, tmp_path: Path) -> None:
    source = "def test_real(shared):\n    assert shared.is_dir()\n"
    assert "DICTLEARN_SHARED does not name a folder" in run_pytest(source).stdout
    assert "which is not a folder" in run_pytest(source, DICTLEARN_SHARED=str(tmp_path / "nowhere")).stdout
    assert "1 passed" in run_pytest(source, DICTLEARN_SHARED=str(tmp_path)).stdout


def test_heavy_tests_left_out_are_counted_at_the_end(run_pytest) -> None:
    source = "@pytest.mark.heavy\ndef test_a():\n    pass\n\n\ndef test_b():\n    pass\n"
    assert "NOT RUN 1 heavy tests" in run_pytest(source, "-m", "not heavy").stdout
    assert "NOT RUN" not in run_pytest(source).stdout
    shared = run_pytest(source, "-m", "not heavy", "-p", "xdist.plugin", "-n", "2").stdout
    assert "NOT RUN 1 heavy tests" in shared and "1 passed" in shared


def test_the_hub_is_off() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
