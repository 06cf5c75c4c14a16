"""The command line: a table from verb to the function that parses, runs and shows it.

Nothing here imports torch: help and refusals answer at once. A mistake of the user's is one sentence and exit code 2;
`--debug` shows where it was raised. Ctrl-C is 130, and what was finished stays.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, OmitSubcommandPrefixes

from activation_store.errors import UserError
from activation_store.progress import NoProgress, Progress
from dictlearn import reports, terminal
from dictlearn.workspace import Workspace

Config = TypeVar("Config")


@dataclass(frozen=True)
class Call(Generic[Config]):
    """What every verb takes besides its own configuration."""

    config: OmitArgPrefixes[Config]
    """What this verb takes."""
    workspace: Path = Path("workspace")
    """Folder that holds stores, runs, indexes and graphs."""
    debug: bool = False
    """Show the traceback of a refusal."""


@dataclass(frozen=True)
class CallWithResult(Call[Config]):
    """What a verb takes that ends with a result to print."""

    json: bool = False
    """Print the result as JSON, and nothing else."""

    @property
    def progress(self) -> Progress:
        return NoProgress() if self.json else terminal.TerminalProgress()

    def tell(self, sentence: str) -> None:
        """What a person should know meanwhile."""
        (terminal.print_error if self.json else terminal.print_line)(sentence)


@dataclass(frozen=True)
class LongCall(CallWithResult[Config]):
    """What a verb takes that may be long at work."""

    dry_run: bool = False
    """Say what would be done (rows, bytes, memory, time) and do nothing."""


def parse(verb: str, config: Any, args: list[str], default: Any = None, about: str | None = None) -> LongCall[Any]:
    """The command line of one verb as a `LongCall` of its configuration class."""
    return _parse(LongCall, verb, config, args, default, about)


def parse_short(verb: str, config: Any, args: list[str]) -> CallWithResult[Any]:
    """The command line of a verb that has no dry run."""
    refuse_dry_run(args, verb)
    return _parse(CallWithResult, verb, config, args)


def parse_plain(verb: str, config: Any, args: list[str]) -> Call[Any]:
    """The command line of a verb that has no dry run, and no result but what it shows."""
    refuse_dry_run(args, verb)
    return _parse(Call, verb, config, args)


def _parse(call: Any, verb: str, config: Any, args: list[str], default: Any = None, about: str | None = None) -> Any:
    marked: Any = Annotated[call[config], OmitArgPrefixes, OmitSubcommandPrefixes, FlagCreatePairsOff]
    about = about or inspect.cleandoc(config.__doc__ or "")
    if default is None:
        return tyro.cli(marked, prog=f"dictlearn {verb}", description=about, args=args)
    return tyro.cli(marked, prog=f"dictlearn {verb}", description=about, args=args, default=call(config=default))


def refuse_dry_run(args: list[str], verb: str) -> None:
    """In words of its own: whoever asks for one wants nothing to be done."""
    if "--dry-run" in args:
        raise UserError(f"`dictlearn {verb}` has no dry run; harvest, train and index, the long steps, have one.")


def leads() -> bool:
    """Whether this process speaks: under torchrun, rank 0 does for all."""
    return os.environ.get("RANK", "0") == "0"


def say(call: CallWithResult[Any], result: Any, show: Callable[[Any], None]) -> None:
    """A dataclass as JSON, or drawn by ``show``."""
    if call.json:
        terminal.print_line(json.dumps(dataclasses.asdict(result), default=str))
    else:
        show(result)


# --- the verbs --------------------------------------------------------------------------------------------------------


def harvest(args: list[str]) -> None:
    from activation_store.harvest.run import HarvestConfig, describe
    from activation_store.harvest.run import harvest as run

    call = parse("harvest", HarvestConfig, args)
    workspace = Workspace(call.workspace)
    config = dataclasses.replace(call.config, store=workspace.store_location(str(call.config.store)))
    if call.dry_run:
        say(call, describe(config), reports.plan)
        return
    location = run(config, call.progress)
    if leads():
        from activation_store.store import open_store

        store = open_store(location)
        say(call, reports.Harvested(str(location), store.rows, list(store.hooks)), reports.harvested)


def train(args: list[str]) -> None:
    from dictlearn.dictionaries import config_class, kinds
    from dictlearn.sweep import is_sweep
    from dictlearn.training.command import check, run_train
    from dictlearn.training.config_files import config_from_yaml
    from dictlearn.training.configs import TrainConfig

    default = None
    if args and not args[0].startswith("-"):
        if is_sweep(args[0]):
            return train_sweep(args[0], args[1:])
        default, args = config_from_yaml(args[0]), args[1:]
    kind, args = take_option(args, "--kind", default.dictionary.kind if default else "topk")
    if default is not None and kind != default.dictionary.kind:
        raise UserError(
            f"The file configures a dictionary of kind {default.dictionary.kind!r}, and --kind asks for {kind!r}: "
            "change dictionary in the file, whose settings are of its kind, or give everything by options."
        )
    about = (
        "Fit one dictionary to a store's training documents, or many that read each batch once. Name a CONFIG.yaml "
        "first, options after it override; or give everything by options, beginning with --kind, one of "
        f"{', '.join(kinds())} (topk when not given). A SWEEP.yaml, which has a grid or a list, trains all its runs "
        "together (docs/training.md)."
    )
    call = parse("train", TrainConfig[config_class(kind)], args, default, about)  # type: ignore[misc]
    workspace = Workspace(call.workspace)
    if call.dry_run:
        say(call, check([call.config], workspace).plan, reports.plan)
        return
    files = run_train(call.config, workspace, call.progress, call.tell)
    if leads():
        say(call, reports.Trained.of([files]), reports.trained)


def train_sweep(path: str, args: list[str]) -> None:
    from dictlearn.sweep import plan, read_sweep, run_sweep

    call = parse("train SWEEP.yaml", SweepConfig, args)
    workspace, sweep = Workspace(call.workspace), read_sweep(path)
    if call.dry_run:
        say(call, plan(sweep, workspace), reports.plan)
        return
    run_sweep(sweep, workspace, call.progress, call.tell)
    if leads():
        found = reports.Trained.of([workspace.run(config.name) for config in sweep.configs])
        say(call, found, reports.trained)
        if any("stopped" in run for run in found.runs):
            raise SystemExit(1)


def evaluate(args: list[str]) -> None:
    from dictlearn.metrics.command import run_evaluate
    from dictlearn.metrics.record import EvaluateConfig

    call = parse_short("evaluate", EvaluateConfig, args)
    evaluation = run_evaluate(call.config, Workspace(call.workspace), call.progress)
    say(call, evaluation, lambda result: reports.evaluations([result]))


def store(args: list[str]) -> None:
    from dictlearn import store_commands

    name, rest = (args[0], args[1:]) if args else ("--help", [])
    if name in ("-h", "--help"):
        terminal.print_line(store_commands.usage())
        raise SystemExit(0)
    if name not in store_commands.VERBS:
        raise UserError(f"There is no verb {name!r} of `dictlearn store`; there are {', '.join(store_commands.VERBS)}.")
    verb = store_commands.VERBS[name]
    call = parse_short(f"store {name}", verb.config, rest)
    say(call, verb.run(call.config, Workspace(call.workspace), call.progress), verb.show)


def index(args: list[str]) -> None:
    from dictlearn.feature_index.command import IndexConfig, dry_run, run_index

    call = parse("index", IndexConfig, args)
    if call.dry_run:
        say(call, dry_run(call.config, Workspace(call.workspace)), reports.plan)
        return
    path = run_index(call.config, Workspace(call.workspace), call.progress)
    say(call, reports.Indexed(str(path)), reports.indexed)


def show(args: list[str]) -> None:
    from dictlearn.feature_index.index import open_index
    from dictlearn.feature_index.read import feature_page

    call = parse_short("show", ShowConfig, args)
    opened = open_index(Workspace(call.workspace).existing_index(call.config.index))
    say(call, feature_page(opened, call.config.latent), reports.feature)


def circuit(args: list[str]) -> None:
    from dictlearn.circuits import read, summary
    from dictlearn.circuits.command import CircuitConfig, run_circuit

    call = parse_short("circuit", CircuitConfig, args)
    path = run_circuit(call.config, Workspace(call.workspace), call.progress)
    say(call, summary(read(path)), reports.circuit)
    if not call.json:
        terminal.print_line(f"{path}: see it with `dictlearn app`.")


def steer(args: list[str]) -> None:
    from dictlearn.steering.command import SteerConfig, run_steer

    call = parse_short("steer", SteerConfig, args)
    say(call, run_steer(call.config, Workspace(call.workspace), call.progress), reports.steering)


def app(args: list[str]) -> None:
    from dictlearn.app_command import AppConfig, run_app

    call = parse_plain("app", AppConfig, args)
    run_app(call.config, Workspace(call.workspace))


def demo(args: list[str]) -> None:
    from dictlearn.demo import DemoConfig, run_demo

    call = parse_plain("demo", DemoConfig, args)
    run_demo(call.config, Workspace(call.workspace), terminal.TerminalProgress())


VERBS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "demo": (demo, "run the whole line on the bundled language model"),
    "harvest": (harvest, "cache a language model's activations in a store"),
    "train": (train, "fit a dictionary to a store, or many at once"),
    "evaluate": (evaluate, "measure a trained dictionary on held-out documents"),
    "index": (index, "index every activation of a dictionary's features"),
    "show": (show, "print one feature's page: numbers, examples, logits, neighbours"),
    "circuit": (circuit, "trace a next-token prediction through transcoder features and heads"),
    "steer": (steer, "add a latent's direction to the model's activations and see what it writes"),
    "app": (app, "browse the workspace"),
    "store": (store, "look into activation stores, verify, copy, merge and remove them"),
}


# --- parsing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepConfig:
    """Train all runs that a file describes, each batch read once; what is in the file cannot be given by options."""


@dataclass(frozen=True)
class ShowConfig:
    """Print one feature's page, as the app shows it."""

    index: Annotated[str, tyro.conf.Positional]
    """Name of the index (its run's name, unless it was given another)."""
    latent: Annotated[int, tyro.conf.Positional]
    """Number of the latent."""


def take_option(args: list[str], flag: str, default: str) -> tuple[str, list[str]]:
    """Take ``flag VALUE`` or ``flag=VALUE`` out of ``args``: the kind decides which options there are at all."""
    for position, arg in enumerate(args):
        if arg == flag and position + 1 < len(args):
            return args[position + 1], args[:position] + args[position + 2 :]
        if arg.startswith(flag + "="):
            return arg.removeprefix(flag + "="), args[:position] + args[position + 1 :]
    return default, args


def usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {words}" for verb, (_, words) in VERBS.items())
    return (
        "dictlearn: a local workbench for sparse dictionaries of neural-network activations\n\n"
        f"usage: dictlearn VERB [OPTIONS]\n\n{verbs}\n\n"
        "`dictlearn VERB --help` explains a verb. Things live in ./workspace unless --workspace names another folder."
    )


def main(args: list[str] | None = None) -> None:
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        terminal.print_line(usage())
        raise SystemExit(0)
    if args[0] == "--version":
        from dictlearn import __version__

        terminal.print_line(__version__)
        raise SystemExit(0)
    try:
        if args[0] not in VERBS:
            raise UserError(f"There is no verb {args[0]!r}; the verbs are {', '.join(VERBS)}.")
        VERBS[args[0]][0](args[1:])
    except UserError as error:
        if "--debug" in args:
            raise
        terminal.print_error(str(error))
        raise SystemExit(2) from None
    except KeyboardInterrupt as interruption:
        kept = "Interrupted. What was finished is kept; the same command continues from there."
        terminal.print_error(str(interruption) or kept)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
