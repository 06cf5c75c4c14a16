"""The README and the pages beside it do not lie: their commands parse, and the verbs and options exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
STORE_PAGE = README.parent / "docs" / "store.md"
TRAINING_PAGE = README.parent / "docs" / "training.md"
COMPARE_PAGE = README.parent / "docs" / "compare.md"
STEERING_PAGE = README.parent / "docs" / "steering.md"


def commands(page: Path) -> list[str]:
    """Every `dictlearn ...` command of a page's indented blocks, continuation lines joined."""
    text = page.read_text().replace("\\\n", " ")
    found = re.findall(r"^    (dictlearn .*?)(?:\s{2,}#.*)?$", text, flags=re.MULTILINE)
    return [" ".join(command.split()) for command in found]


def test_there_are_commands_to_check():
    assert len(commands(README)) > 8 and len(commands(STORE_PAGE)) > 8


@pytest.mark.parametrize(
    "command",
    [
        command
        for page in (README, STORE_PAGE, TRAINING_PAGE, COMPARE_PAGE, STEERING_PAGE)
        for command in commands(page)
    ],
)
def test_every_command_is_understood(command, monkeypatch, tmp_path):
    """Parsed to a configuration by the real command line; running it is stopped right after."""
    from dictlearn import cli

    class Understood(Exception):
        pass

    parse = cli._parse

    def parse_and_stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise Understood

    monkeypatch.setattr(cli, "_parse", parse_and_stop)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sae.yaml").write_text("name: sae\nstore: code\nhook: blocks.2.hook_resid_post\n")
    with pytest.raises(Understood):
        cli.main(shlex.split(command)[1:])


def test_every_verb_is_in_the_readme():
    from dictlearn.cli import VERBS

    text = README.read_text()
    missing = [verb for verb in VERBS if f"dictlearn {verb}" not in text and f"make {verb}" not in text]
    assert missing == []


def test_every_kind_of_dictionary_is_in_the_readme():
    from dictlearn.dictionaries import REGISTRY

    text = README.read_text()
    assert [kind for kind in REGISTRY if f"`{kind}`" not in text] == []


def test_every_verb_of_the_store_is_on_its_page():
    from dictlearn.store_commands import VERBS

    text = STORE_PAGE.read_text()
    assert [verb for verb in VERBS if f"dictlearn store {verb} " not in text] == []


@pytest.mark.parametrize("page", [README, *sorted((README.parent / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_files_it_points_at_exist(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
