"""The house rules that a machine can check: who imports whom, what stays unloaded, what nothing is called.

The contracts themselves are in pyproject.toml; here they are run, and shown to notice what they are there to notice.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("activation_store", "dictlearn", "app")
FOLDERS = (*PACKAGES, "scripts", "tests")
SLOW_IMPORTS = ("torch", "transformers", "transformer_lens", "datasets", "sklearn", "streamlit", "triton")
NO_SUBJECT = {"util", "utils", "utility", "utilities", "helper", "helpers", "common", "misc"}


def run_python(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(cwd), "COLUMNS": "250"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


# --- imports run one way ----------------------------------------------------------------------------------------------

RUN_CONTRACTS = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def test_the_import_contracts_are_kept() -> None:
    result = run_python(RUN_CONTRACTS)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("activation_store/seeds.py", "import dictlearn.codes", "activation_store knows no dictionary"),
        (
            "activation_store/errors.py",
            "import activation_store.harvest.corpus",
            "reading and writing < harvest",
        ),
        ("dictlearn/codes.py", "import dictlearn.ops", "codes < ops < dictionaries"),
        ("dictlearn/synthetic.py", "import dictlearn.dictionaries", "codes < ops < dictionaries"),
        ("dictlearn/dictionaries/__init__.py", "import dictlearn.training", "codes < ops < dictionaries"),
        ("dictlearn/metrics/__init__.py", "def f():\n    import dictlearn.training", "codes < ops < dictionaries"),
        ("dictlearn/dictionaries/__init__.py", "import dictlearn.circuits", "dictionaries < feature_index, circuits"),
        ("dictlearn/ops/__init__.py", "import zarr", "bare PyTorch image"),
        ("dictlearn/metrics/__init__.py", "import streamlit", "what draws it"),
    ],
)
def test_an_import_that_runs_backwards_is_noticed(tmp_path: Path, file: str, line: str, broken: str) -> None:
    for package in ("activation_store", "dictlearn"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("bundled", "__pycache__"))
    for room in ("ops", "dictionaries", "metrics", "training", "circuits"):
        (tmp_path / "dictlearn" / room).mkdir(exist_ok=True)
        (tmp_path / "dictlearn" / room / "__init__.py").touch()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as source:
        source.write(f"\n{line}\n")
    result = run_python(RUN_CONTRACTS, cwd=tmp_path)
    assert result.returncode == 1, result.stdout[-3000:] + result.stderr[-2000:]
    assert [line for line in result.stdout.splitlines() if broken in line and "BROKEN" in line]


def test_only_the_harvest_room_of_the_store_knows_language_models() -> None:
    """Reading rows needs numpy and zarr alone."""
    offenders = [
        str(file.relative_to(ROOT))
        for file in (ROOT / "activation_store").rglob("*.py")
        if "harvest" not in file.relative_to(ROOT).parts
        and any(f"{word} {library}" in file.read_text() for word in ("import", "from") for library in SLOW_IMPORTS[1:])
    ]
    assert offenders == []


# --- laziness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import activation_store",
        "import activation_store.harvest",
        "import activation_store.harvest.corpus",
        "import dictlearn",
        "import dictlearn.cli",
    ],
)
def test_importing_loads_nothing_slow(code: str) -> None:
    assert slow_modules_after(code) == []


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["harvest", "--help"], ["nonsense"]])
def test_help_and_refusals_load_nothing_slow(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['dictlearn', *{arguments!r}]\n"
        "from dictlearn.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
    )
    assert slow_modules_after(code) == []


def slow_modules_after(code: str) -> list[str]:
    """Which of SLOW_IMPORTS a fresh interpreter has loaded after running ``code``."""
    result = run_python(f"{code}\nimport sys\nprint('loaded:', *sys.modules)")
    assert result.returncode == 0, result.stderr[-3000:]
    loaded = result.stdout.rpartition("loaded:")[2].split()
    assert "sys" in loaded
    return sorted(set(SLOW_IMPORTS) & set(loaded))


def test_the_laziness_check_sees_torch() -> None:
    assert slow_modules_after("import torch") == ["torch"]


# --- names ------------------------------------------------------------------------------------------------------------


def nameless(paths: list[Path]) -> list[str]:
    return [str(path) for path in paths if NO_SUBJECT & set(path.stem.lower().split("_"))]


def test_every_file_and_folder_is_called_after_its_subject() -> None:
    paths = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    assert nameless([path for path in paths if "__pycache__" not in path.parts]) == []


def test_the_name_check_sees_a_dump() -> None:
    paths = [Path("dictlearn/utils.py"), Path("app/io_helpers.py"), Path("scripts/common"), Path("dictlearn/codes.py")]
    assert nameless(paths) == ["dictlearn/utils.py", "app/io_helpers.py", "scripts/common"]


def test_every_folder_of_source_is_a_package() -> None:
    """A folder without ``__init__.py`` works from a checkout and is missing from the wheel."""
    folders = {file.parent for package in PACKAGES for file in (ROOT / package).rglob("*.py")}
    assert [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()] == []
