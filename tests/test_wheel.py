"""What is built and installed is what is in the folders: nothing works from a checkout alone."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INSTALLED_AS = {"activation_store": "activation_store", "dictlearn": "dictlearn", "app": "dictlearn_app"}
BUNDLED_MODEL = {
    f"activation_store/harvest/bundled/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")
}

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a build/ folder beside the sources, and takes stale files from it."""
    source, destination = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in INSTALLED_AS:
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                copy = source / file.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", destination, source)
    (built,) = destination.glob("*.whl")
    return built


def run(*command: str | Path, **environment: str) -> str:
    result = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def test_the_wheel_holds_every_file_under_its_installed_name(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    files = {
        f"{INSTALLED_AS[folder]}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder in INSTALLED_AS
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert files - inside == set()
    assert not any(name.startswith(("app/", "tests/", "scripts/")) for name in inside)
    assert wheel.name.startswith("dictlearn_lab-")


def test_the_wheel_holds_the_bundled_language_model(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert BUNDLED_MODEL - set(archive.namelist()) == set()
        on_disk = {path.name for path in (ROOT / "activation_store/harvest/bundled").iterdir() if path.is_file()}
        inside = {name.rpartition("/")[2] for name in archive.namelist() if "/bundled/" in name}
        assert on_disk == inside
        assert sum(archive.getinfo(f"activation_store/harvest/bundled/{name}").file_size for name in inside) < 12e6


def test_the_wheel_installed_alone_runs(wheel: Path, tmp_path: Path) -> None:
    """In a new environment that sees this one's libraries, far from the checkout."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    new_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    # A line of a .pth file is a folder to search. The .pth files in that folder itself are not read, so the editable
    # install of this checkout stays out of sight.
    (new_packages / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    home = tmp_path / "home"
    home.mkdir()

    def from_the_wheel(*command: str | Path) -> str:
        isolated = {"HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        return run("env", "-C", tmp_path, *command, **isolated)

    where = from_the_wheel(
        python, "-c", "import dictlearn, activation_store as a; print(dictlearn.__file__, a.__file__)"
    )
    assert where.count(str(new_packages)) == 2
    assert "harvest" in from_the_wheel(environment / "bin" / "dictlearn", "--help")
    load = (
        "from activation_store.harvest.language_model import load_language_model, resolve_model\n"
        "model = load_language_model(resolve_model('bundled'))\n"
        "print('layers:', model.cfg.n_layers)"
    )
    assert "layers: 4" in from_the_wheel(python, "-c", load)
