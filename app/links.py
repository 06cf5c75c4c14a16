"""The URL is the state: what each page can be asked to show, and the only place that spells a URL parameter.

A link is a frozen dataclass; its fields are the parameters of that page's address. A value equal to its default stays
out of the address, and a value that does not fit (``latent=abc``) becomes the default, so any pasted address opens its
page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlencode


@dataclass(frozen=True)
class Link:
    """A page and what it shows."""

    path: ClassVar[str] = ""


@dataclass(frozen=True)
class HomeLink(Link):
    path: ClassVar[str] = ""


@dataclass(frozen=True)
class StoreLink(Link):
    """A store, at the page of tokens that holds ``row``."""

    path: ClassVar[str] = "store"
    store: str = ""
    row: int = 0


@dataclass(frozen=True)
class RunsLink(Link):
    """``runs``: names separated by commas; none means all of the ``sweep``, or of the workspace. ``x``: of X_AXES."""

    path: ClassVar[str] = "runs"
    sweep: str = ""
    runs: str = ""
    x: str = ""


@dataclass(frozen=True)
class CompareLink(Link):
    """Runs on one ``store`` and ``hooks`` (as `run_comparison.Group` spells them), and two of them by their latents.

    ``runs`` are names separated by commas; none means all that are evaluated. ``at`` is one of several hooks that are
    rebuilt, to show the numbers of alone. ``sort`` and ``ascending`` order the table of runs. The latents of ``a`` and
    ``b`` are matched; ``show`` and ``page`` say which of them are listed.
    """

    path: ClassVar[str] = "compare"
    store: str = ""
    hooks: str = ""
    runs: str = ""
    at: str = ""
    sort: str = ""
    ascending: int = 0
    a: str = ""
    b: str = ""
    show: str = ""
    page: int = 1


@dataclass(frozen=True)
class FeaturesLink(Link):
    """The table of one index: what is kept, in which order, and which page of it."""

    path: ClassVar[str] = "features"
    index: str = ""
    search: str = ""
    show: str = ""
    least: float = 0.0
    most: float = 1.0
    sort: str = ""
    ascending: int = 0
    page: int = 1


@dataclass(frozen=True)
class FeatureLink(Link):
    path: ClassVar[str] = "feature"
    index: str = ""
    latent: int = -1
    wrapped: int = 0


@dataclass(frozen=True)
class CircuitLink(Link):
    path: ClassVar[str] = "circuit"
    graph: str = ""
    node: str = ""


AnyLink = TypeVar("AnyLink", bound=Link)


def query(link: Link) -> dict[str, str]:
    """The parameters of a link that differ from their defaults."""
    return {field.name: str(value) for field in fields(link) if (value := getattr(link, field.name)) != field.default}


def address(link: Link) -> str:
    """The link as a relative reference: pages are siblings, wherever the app is mounted."""
    parameters = urlencode(query(link))
    return (link.path or ".") + ("?" + parameters if parameters else "")


def changed(asked: Mapping[str, str], wanted: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """``now`` with what ``wanted`` changes in ``asked``, all three being parameters of one page's address."""
    ours = {name for name in {*asked, *wanted} if asked.get(name) != wanted.get(name)}
    kept = {name: value for name, value in now.items() if name not in ours}
    return kept | {name: value for name, value in wanted.items() if name in ours}


def from_query(kind: type[AnyLink], parameters: Mapping[str, str]) -> AnyLink:
    """What a page was asked to show; a missing or unreadable value becomes the default."""
    values: dict[str, Any] = {}
    for field in fields(kind):
        if field.name in parameters:
            read: type = type(field.default)
            try:
                value = read(parameters[field.name])
            except (TypeError, ValueError):
                continue
            if value == value:  # not a number that is none
                values[field.name] = value
    return kind(**values)
