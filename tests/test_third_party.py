"""A dictionary from somebody else's package: listed, trained, evaluated and loaded as our own; its mistakes are named.

`tests/example_package` is such a package, for people to copy.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from activation_store.errors import UserError
from dictlearn import cli
from dictlearn.dictionaries import config_class, dictionary_class, kinds
from dictlearn.dictionaries.third_party import GROUP

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "tests" / "example_package"

DICTIONARY = """
from dataclasses import dataclass
from typing import ClassVar
from dictlearn import Dictionary

@dataclass
class MineConfig:
    kind: ClassVar[str] = "mine"
    d_sae: int = 8
    def check(self, d_in, d_out): pass

class Mine(Dictionary):
    kind = "mine"
    Config = MineConfig
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """``install(package, kind, value)``: what an installed package leaves for Python to find."""

    def install(package: str, kind: str, value: str, source: str | None = None) -> None:
        site = tmp_path / package
        facts = site / f"{package.replace('-', '_')}-1.0.dist-info"
        facts.mkdir(parents=True)
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (facts / "entry_points.txt").write_text(f"[{GROUP}]\n{kind} = {value}\n")
        if source is not None:
            module = value.partition(":")[0]
            monkeypatch.delitem(sys.modules, module, raising=False)
            (site / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(site)

    return install


def help_of_train(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help", *args])
    assert not stop.value.code
    return " ".join(capsys.readouterr().out.split())


def test_its_kind_stands_among_the_kinds_and_its_options_in_the_help(install, monkeypatch, capsys):
    assert "softtopk" not in kinds()
    install("dictlearn-soft-topk", "softtopk", "soft_topk:SoftTopK")
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.delitem(sys.modules, "soft_topk", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    assert kinds()[-1] == "softtopk" and kinds()[0] == "topk"
    assert "softtopk (topk when not given)" in help_of_train(capsys)
    assert "soft_topk" not in sys.modules, "help names a kind without importing it"
    assert "Most latents active per row. (default: 32)" in help_of_train(capsys, "--kind", "softtopk")
    assert dictionary_class("softtopk").Config is config_class("softtopk")


BROKEN = {
    "raises": (
        "bad:Mine",
        "raise RuntimeError('no such thing\\nas this')",
        r"imported \(RuntimeError: no such thing\)",
    ),
    "no module": ("nowhere_to_be_found:Mine", None, "imported .ModuleNotFoundError: No module named 'nowhere"),
    "no attribute": ("bad:Mine", "", "which cannot be imported .AttributeError: module 'bad' has no attribute 'Mine'"),
    "no class": ("bad", "", "bad, which is not a subclass of dictlearn.Dictionary"),
    "another class": ("bad:Mine", "class Mine: pass", "bad:Mine, which is not a subclass of dictlearn.Dictionary"),
    "no config": ("bad:Mine", DICTIONARY.replace("Config = MineConfig", ""), "whose Config is not a dataclass with"),
    "no check": ("bad:Mine", DICTIONARY.replace("check", "refuse"), "a method check.d_in, d_out."),
    "another kind": ("bad:Mine", DICTIONARY.replace('    kind = "mine"', '    kind = "ours"'), "Mine.kind is 'ours'"),
    "a config of another kind": ("bad:Mine", DICTIONARY.replace('] = "mine"', '] = "ours"'), "MineConfig.kind is 'ou"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_package_is_named_in_one_sentence(broken, install, capsys):
    value, source, said = BROKEN[broken]
    install("somebodys-package", "mine", value, source)
    with pytest.raises(UserError, match=f"^The package 'somebodys-package' brings the kind 'mine' as .*{said}") as info:
        config_class("mine")
    assert str(info.value).endswith("; repair the package, or uninstall it.") and "\n" not in str(info.value)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--kind", "mine", "--name", "a", "--store", "s", "--hook", "h"])
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err
    assert dictionary_class("topk").kind == "topk", "who does not ask for it is not disturbed"
    assert "mine (topk when not given)" in help_of_train(capsys)


def test_the_package_that_the_broken_ones_are_made_from_works(install):
    install("somebodys-package", "mine", "good:Mine", DICTIONARY)
    assert dictionary_class("mine").Config is config_class("mine")


def test_two_packages_with_one_kind_are_refused_by_name(install):
    install("one-package", "mine", "one:Mine", DICTIONARY)
    install("another-package", "mine", "another:Mine", DICTIONARY)
    with pytest.raises(UserError, match="kind 'mine' are brought by 'another-package' and 'one-package', and only one"):
        dictionary_class("mine")


@pytest.mark.parametrize("ask", [config_class, dictionary_class])
def test_a_package_cannot_take_the_name_of_a_built_in_kind(install, ask):
    install("greedy-package", "topk", "one:Mine", DICTIONARY)
    with pytest.raises(
        UserError, match="The package 'greedy-package' brings a dictionary of kind 'topk', which is one"
    ):
        ask("topk")
    assert ask("relu") is not None and kinds().count("topk") == 1


def test_a_kind_whose_package_is_not_there_is_refused(install):
    with pytest.raises(UserError, match="no dictionary of kind 'softtopk'; the kinds are .* brings it, install that."):
        dictionary_class("softtopk")


def test_the_published_contract_needs_nothing_that_is_not_installed():
    for file in (ROOT / "dictlearn" / "testing").rglob("*.py"):
        tree = ast.walk(ast.parse(file.read_text()))
        names = [
            name
            for node in tree
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names])
        ]
        assert not any(name.split(".")[0] in ("tests", "scripts", "app") for name in names), file


# --- the example, installed for real ----------------------------------------------------------------------------------


@pytest.mark.heavy
def test_the_example_is_installed_trained_evaluated_loaded_and_indexed(tmp_path):
    pytest.importorskip("pip", reason="the environment has no pip")
    from dictlearn.workspace import Workspace
    from tests.feature_index.conftest import HOOK, make_store

    source, site = shutil.copytree(EXAMPLE, tmp_path / "source"), tmp_path / "site"
    environment = os.environ | {"PYTHONPATH": str(site), "COLUMNS": "200"}

    def run(*command: str | Path) -> str:
        result = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run("-m", "pip", "install", *offline, "--target", site, source)
    assert (site / "soft_topk.py").exists() and not (site / "dictlearn").exists()

    assert "softtopk (topk" in (said := run("-m", "dictlearn.cli", "train", "--help", "--kind", "softtopk"))
    assert "Most latents active per row" in said and "AuxK" not in said
    make_store(Workspace(tmp_path / "workspace"), "s", [400] * 9)
    sizes = ("--d-sae=64", "--k=4", "--batch-size=128", "--buffer-rows=1024", "--steps=150", "--learning-rate=3e-3")
    of = ("--kind", "softtopk", "--name", "mine", "--store", "s", "--hook", HOOK)
    run("-m", "dictlearn.cli", "train", *of, *sizes)
    evaluated = run("-m", "dictlearn.cli", "evaluate", "mine", "--tokens", "0", "--json")
    found = json.loads(evaluated[evaluated.index("{") :])["reconstruction"]
    assert found["fvu"] < 0.5 and 0 < found["l0"] <= 4
    load = "import dictlearn; d = dictlearn.load('workspace/runs/mine'); print(d.kind, type(d).__module__, d.d_sae)"
    assert run("-c", load).split() == ["softtopk", "soft_topk", "64"]
    run("-m", "dictlearn.cli", "index", "mine", "--no-logits")
    page = json.loads(run("-m", "dictlearn.cli", "show", "mine", "3", "--json"))
    assert page["provenance"]["kind"] == "softtopk" and page["rows"] == 3600
    assert " passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", source)
