"""The workspace: a folder that holds what belongs together. This file alone names what is in it.

    stores/<name>.zarr      activation stores
    runs/<name>/            config.yaml, metrics.jsonl, checkpoints/, dictionary/, evaluation.json, and when asked for
                            tensorboard/, wandb/ and wandb_id.txt
    sweeps/<name>/          sweep.yaml; checkpoints/, which cover all runs of the sweep
    indexes/<name>.zarr     feature indexes
    graphs/<name>.json      attribution graphs
    notes.sqlite            what a person wrote about features

Every command takes a name and finds the thing here; a path to something elsewhere works too.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activation_store.errors import UserError
from activation_store.location import is_url
from activation_store.ownership import is_owned

if TYPE_CHECKING:
    from activation_store.store import Store

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class RunFiles:
    """The files of one training run."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.folder / "tensorboard"

    @property
    def wandb_id(self) -> Path:
        """The id under which Weights & Biases knows the run; its own files are in wandb/ beside this."""
        return self.folder / "wandb_id.txt"

    @property
    def lock(self) -> Path:
        """Held by the process that trains the run; left behind, without its holder, by a kill."""
        return self.folder / "training.lock"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def dictionary(self) -> Path:
        return self.folder / "dictionary"

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation.json"

    def is_training(self) -> bool:
        """Whether a process is training the run at this moment."""
        return is_owned(self.lock)

    def refuse_unfinished(self) -> None:
        """Raises UserError for a run whose training has not ended; a dictionary that somebody put there is none."""
        if self.config.exists() and not self.dictionary.exists():
            raise UserError(
                f"The run {self.name!r} has not finished training; run `dictlearn train` on it again to continue."
            )

    def last_metrics(self) -> dict[str, Any]:
        """The last whole line of metrics.jsonl, without values that were not finite; empty before the first."""
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        for line in reversed(lines):
            try:
                return {name: value for name, value in json.loads(line).items() if value is not None}
            except ValueError:  # the line that a kill cut in half
                continue
        return {}


@dataclass(frozen=True)
class SweepFiles:
    """The files of a sweep; its runs have folders of their own."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "sweep.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


@dataclass(frozen=True)
class Workspace:
    """Paths by kind and name. Making one touches nothing on disk."""

    root: Path = Path("workspace")

    def store(self, name: str) -> Path:
        return self._path("stores", name, ".zarr")

    def store_location(self, name: str) -> str:
        """The folder of the store called ``name``; a URL is its own location."""
        return name if is_url(name) else str(self.store(name))

    def run(self, name: str) -> RunFiles:
        return RunFiles(self._path("runs", name, ""))

    def sweep(self, name: str) -> SweepFiles:
        return SweepFiles(self._path("sweeps", name, ""))

    def index(self, name: str) -> Path:
        return self._path("indexes", name, ".zarr")

    def graph(self, name: str) -> Path:
        return self._path("graphs", name, ".json")

    @property
    def notes(self) -> Path:
        return self.root / "notes.sqlite"

    def existing_store(self, name: str) -> str:
        """The folder of the store called ``name``, or the URL, which is looked at when it is opened.

        Raises:
            UserError: no such folder; the sentence names the stores there are.
        """
        if is_url(name):
            return name
        make = "Harvest one with `dictlearn harvest`."
        return str(self._existing(self.store(name), "store", name, self.stores(), make))

    def open_store(self, name: str, aligned: Sequence[str] = (), verify_reads: bool = False) -> Store:
        """The store called ``name``; with the hooks of stores ``aligned`` with it, which are called STORE:HOOK.

        Raises:
            UserError: no such store, or stores that do not hold the same rows.
        """
        from activation_store.aligned import AlignedStores
        from activation_store.store import open_store

        stores = [open_store(self.existing_store(each), verify_reads=verify_reads) for each in (name, *aligned)]
        return AlignedStores(stores) if aligned else stores[0]

    def existing_run(self, name: str) -> RunFiles:
        """Raises UserError naming the runs there are."""
        files = self.run(name)
        self._existing(files.folder, "run", name, self.runs(), "Train one with `dictlearn train`.")
        return files

    def existing_index(self, name: str) -> Path:
        """Raises UserError naming the indexes there are."""
        return self._existing(self.index(name), "index", name, self.indexes(), "Make one with `dictlearn index`.")

    def existing_graph(self, name: str) -> Path:
        """Raises UserError naming the graphs there are."""
        return self._existing(self.graph(name), "graph", name, self.graphs(), "Make one with `dictlearn circuit`.")

    def stores(self) -> list[str]:
        return self._names("stores", ".zarr")

    def runs(self) -> list[str]:
        return self._names("runs", "")

    def indexes(self) -> list[str]:
        return self._names("indexes", ".zarr")

    def graphs(self) -> list[str]:
        return self._names("graphs", ".json")

    def _path(self, kind: str, name: str, suffix: str) -> Path:
        if "/" in name or "\\" in name:
            return Path(name)
        if not NAME.fullmatch(name):
            raise UserError(f"{name!r} is no name for something in a workspace; use letters, digits, '.', '_' and '-'.")
        return self.root / kind / (name.removesuffix(suffix) + suffix if suffix else name)

    def _names(self, kind: str, suffix: str) -> list[str]:
        folder = self.root / kind
        if not folder.is_dir():
            return []
        return sorted(path.name.removesuffix(suffix) for path in folder.iterdir() if path.name.endswith(suffix))

    def _existing(self, path: Path, kind: str, name: str, there_are: list[str], make: str) -> Path:
        if path.exists():
            return path
        if there_are:
            near = difflib.get_close_matches(name, there_are, n=3) or there_are[:5]
            raise UserError(
                f"There is no {kind} {name!r} in {str(self.root)!r}; did you mean {', '.join(near)}? {make}"
            )
        raise UserError(f"There is no {kind} {name!r}: the workspace {str(self.root)!r} holds no {kind} yet. {make}")


def read_json(path: Path) -> Any:
    """A JSON file of ours; raises UserError naming it when it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read ({error}); restore it or make it again.") from error
