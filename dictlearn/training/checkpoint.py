"""Checkpoints: everything that the next step of every member depends on, as safetensors and JSON. Nothing is unpickled.

    <folder>/step-000001500/state.json           step, position of the loader, members, parts
                            <member>.0.safetensors    weights, counters, moments, averages, the member's random stream
                            <member>.0.json           its checksum, and which rows of the latents it holds

A checkpoint is written under a temporary name and renamed, so one that has its name is whole. Should it be damaged
later, the checksums show it, and the one before takes its place. A member whose latents are spread over processes has a
file for each part; whoever continues, with as many processes or others, takes the rows it needs from all of them.

A member that stopped is not written again: its last files are linked into every later checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from activation_store.disk import sync_path
from activation_store.errors import UserError
from dictlearn.training.optimisers import Average
from dictlearn.training.step import Member

VERSION = 2
"""1 was one pickled file."""
STATE = "state.json"
TEMPORARY = ".tmp"


@dataclass
class Progressed:
    """A member, and how it stands.

    Attributes:
        rows: (first, past the last) of its latents that this process holds.
        stopped: the sentence that says why it does not go on, or None.
        stopped_at: steps it had taken then.
        parts: how many files its last checkpoint has; 0 when it stopped before the first.
    """

    member: Member
    rows: tuple[int, int]
    stopped: str | None = None
    stopped_at: int | None = None
    parts: int = 0

    def stop(self, why: str, step: int) -> None:
        self.stopped, self.stopped_at = why, step


@dataclass
class Checkpoints:
    """The checkpoints of one group of members, in one folder.

    Attributes:
        keep: how many of the newest stay.
        part, parts: which part of the latents this process holds, of how many.
        writes: whether this process writes its part; where rows are shared, one of those that hold the same part.
        leads: whether it writes what is not per part.
        wait: returns when all processes have called it.
    """

    folder: Path
    keep: int = 2
    part: int = 0
    parts: int = 1
    writes: bool = True
    leads: bool = True
    wait: Callable[[], None] = lambda: None

    def steps(self) -> list[int]:
        """Steps that there is a checkpoint of, ascending."""
        names = [path.name for path in self.folder.glob("step-*") if path.is_dir()]
        return sorted(int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdigit())

    def save(self, step: int, position: dict[str, Any], members: Sequence[Progressed]) -> None:
        """Write the state after ``step`` steps, and let go of the oldest beyond ``keep``."""
        before = self._folder(max(self.steps(), default=0))
        final = self._folder(step)
        temporary = final.with_name(final.name + TEMPORARY)
        if self.leads:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        self.wait()
        for one in members:
            if one.stopped is None and self.writes:
                self._write_part(temporary, one)
            elif one.stopped is not None and self.leads:
                one.parts = _link_parts(before, temporary, one.member.name)
        self.wait()
        if self.leads:
            about = {
                one.member.name: {
                    "stopped": one.stopped,
                    "stopped_at": one.stopped_at,
                    "parts": self.parts if one.stopped is None else one.parts,
                }
                for one in members
            }
            state = {"version": VERSION, "step": step, "loader": position, "members": about}
            _write_text(temporary / STATE, json.dumps(state, indent=1))
            _sync_folder(temporary)
            os.replace(temporary, final)
            _sync_folder(self.folder)
            for old in self.steps()[: -self.keep]:
                self._remove(old)
        self.wait()

    def restore(
        self,
        members: Sequence[Progressed],
        load_position: Callable[[dict[str, Any]], None],
        notify: Callable[[str], None],
    ) -> int:
        """Put the newest undamaged state back into the members; returns its step, 0 where there is none.

        ``notify`` is told which checkpoint was damaged, and which takes its place.

        Raises:
            UserError: there are checkpoints and none can be read, or they are of other members.
        """
        problems: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                state = self._read_state(step, members)
                for one in members:
                    about = state["members"][one.member.name]
                    one.stopped, one.stopped_at, one.parts = about["stopped"], about["stopped_at"], about["parts"]
                    if one.parts:
                        put_back(one.member, self._read_member(self._folder(step), one))
            except (OSError, ValueError, KeyError, TypeError, SafetensorError, Damaged) as problem:
                problems[step] = f"The checkpoint of step {step} in {str(self.folder)!r} is damaged ({problem})"
                continue
            load_position(state["loader"])
            for sentence in problems.values():
                notify(f"{sentence}; continuing from that of step {step}.")
            self._put_aside(list(problems))
            return step
        if problems:
            raise UserError(
                f"{next(iter(problems.values()))}, and there is no other to continue from; delete that folder to "
                "start the run again from its first step."
            )
        if (self.folder.parent / "checkpoint.pt").exists():
            raise UserError(
                f"{str(self.folder.parent)!r} holds the checkpoint of an unfinished run of an older dictlearn, which "
                "this one does not read; delete checkpoint.pt to start the run again from its first step."
            )
        return 0

    def read_newest(self, one: Progressed) -> dict[str, Tensor]:
        """The tensors of a member in the newest checkpoint, which this job has just written."""
        step = max(self.steps())
        one.parts = self._read_state(step, None)["members"][one.member.name]["parts"]
        return self._read_member(self._folder(step), one)

    def remove(self) -> None:
        """All of them: the members are finished."""
        self.wait()
        if self.leads:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _folder(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}"

    def _put_aside(self, damaged: Sequence[int]) -> None:
        """Under a name that no later checkpoint is made from; they go with the others in the end."""
        self.wait()  # all have looked at them
        if self.leads:
            for step in damaged:
                aside = self.folder / f"damaged-{step:09d}"
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(self._folder(step), aside)
        self.wait()

    def _remove(self, step: int) -> None:
        """Under another name first, so that a kill leaves no checkpoint with a file missing."""
        doomed = self._folder(step).with_suffix(TEMPORARY)
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(self._folder(step), doomed)
        shutil.rmtree(doomed)

    def _write_part(self, folder: Path, one: Progressed) -> None:
        path = folder / f"{one.member.name}.{self.part}.safetensors"
        save_file(
            {
                name: tensor
                for name, tensor in state_of(one.member).items()
                if self.part == 0 or is_split(one.member, name)
            },
            path,
        )
        sync_path(path)
        about = {"rows": one.rows, "xxh3_128": _checksum(path)}
        _write_text(path.with_suffix(".json"), json.dumps(about))

    def _read_state(self, step: int, members: Sequence[Progressed] | None) -> dict[str, Any]:
        state = json.loads((self._folder(step) / STATE).read_text())
        if state["version"] != VERSION:
            raise UserError(
                f"The checkpoints in {str(self.folder)!r} are of version {state['version']}; this dictlearn continues "
                f"version {VERSION}. Continue with the one that wrote them, or delete them to start again."
            )
        asked = [one.member.name for one in members or []]
        if members is not None and list(state["members"]) != asked:
            raise UserError(
                f"The checkpoints in {str(self.folder)!r} are of the runs {', '.join(state['members'])}, and asked "
                f"for are {', '.join(asked)}; use the same configuration as before, or another name."
            )
        if not (isinstance(state["loader"], dict) and isinstance(state["step"], int) and state["step"] == step):
            raise Damaged(f"{STATE} does not say where it stands")
        return state

    def _read_member(self, folder: Path, one: Progressed) -> dict[str, Tensor]:
        """The tensors of a member, with this process's rows of those that are split."""
        first, last = one.rows
        found: dict[str, list[Tensor]] = {}
        for part in range(one.parts):
            path = folder / f"{one.member.name}.{part}.safetensors"
            about = json.loads(path.with_suffix(".json").read_text())
            if _checksum(path) != about["xxh3_128"]:
                raise Damaged(f"{path.name} does not have its checksum")
            begin, end = about["rows"]
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    if not is_split(one.member, name):
                        found[name] = [file.get_tensor(name)]
                    elif max(first, begin) < min(last, end):
                        rows = slice(max(first, begin) - begin, min(last, end) - begin)
                        found.setdefault(name, []).append(file.get_slice(name)[rows])
        return {name: torch.cat(pieces) if len(pieces) > 1 else pieces[0] for name, pieces in found.items()}


class Damaged(Exception):
    """A checkpoint that does not hold what it says."""


# --- what a member's state is -----------------------------------------------------------------------------------------


def state_of(member: Member) -> dict[str, Tensor]:
    """Every tensor that the member's next step depends on, by name, copied to host memory."""
    tensors = {f"dictionary.{name}": tensor for name, tensor in member.dictionary.state_dict().items()}
    tensors |= {f"optimiser.{name}": tensor for name, tensor in member.optimiser.tensors().items()}
    if member.average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in member.average.weights.items()}
    tensors["generator"] = member.generator.get_state()
    bounds = member.dictionary.dead_latents.bounds()
    if len(bounds):
        tensors["dead_latents"] = bounds
    # copies: a scaling that input and target share must not be refused as one storage under two names
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def put_back(member: Member, tensors: dict[str, Tensor]) -> None:
    """The reverse of `state_of`. Raises Damaged where a tensor is missing or of another shape."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}

    try:
        member.dictionary.load_state_dict(part("dictionary."))
    except RuntimeError as error:
        raise Damaged(" ".join(str(error).split())) from error
    member.optimiser.load_tensors(part("optimiser."))
    if member.average is not None:
        device = next(member.dictionary.parameters()).device
        member.average = Average(member.average.decay, member.dictionary)
        member.average.weights = {name: tensor.to(device) for name, tensor in part("average.").items()}
    member.generator.set_state(tensors["generator"])
    if "dead_latents" in tensors:
        member.dictionary.dead_latents.set_bounds(tensors["dead_latents"], member.dictionary.rows_since_fired)


def is_split(member: Member, name: str) -> bool:
    """Whether a tensor of `state_of` has a row for each latent: the latents' own tensors, and their moments."""
    room, _, rest = name.partition(".")
    tensor, _, moment = rest.partition(".")
    if room == "generator" or tensor not in member.dictionary.latent_tensors:
        return False
    return room != "optimiser" or moment != "step"  # torch's Adam counts steps in a scalar of each parameter


# --- files ------------------------------------------------------------------------------------------------------------


def _link_parts(source: Path, target: Path, name: str) -> int:
    """Give a checkpoint the files that the one before has of a member; returns how many parts those are."""
    part = 0
    while (source / f"{name}.{part}.safetensors").exists():
        for suffix in (".safetensors", ".json"):
            file = f"{name}.{part}{suffix}"
            try:
                os.link(source / file, target / file)
            except OSError:  # a file system without links
                shutil.copyfile(source / file, target / file)
        part += 1
    return part


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
    sync_path(path)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some network file systems cannot
        sync_path(folder)
