"""`qvlm`, or `python -m qvlm`: the command line of `run.py`, and a route for each command.

    qvlm method=awq bits=w4a4                   quantizes, evaluates and records one cell
    qvlm -m method=awq,qvlm bits=w6a6,w4a4      every combination
    qvlm table2 scale=paper launcher=slurm      runs what is missing, then makes the page
    qvlm fit --budget 6                         which models fit 6 GiB

The Makefile calls the same routes, so that a system without `make` needs none.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from qvlm import cli
from qvlm.command import program
from qvlm.errors import UserError
from qvlm.routes import ROUTES, Route

COMMAND = "--command="  # the command that a page names, if it is not the route
ADD = "add=true"  # keep what is committed beside the page, and run the other cells only
DEMO: tuple[str, list[str]] = ("demo", [])  # what no words stand for


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a route or the command line, and returns the exit code.

    Args:
        arguments: Words of the command line, or None for those of this process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["-sc"], ["--shell-completion"]) and given[1:] != ["install=bash"]:
        for command in _begun(os.environ.get("COMP_LINE", "")):  # Hydra adds groups and options
            print(command)
    name, words = (given[0], given[1:]) if given else DEMO
    route = ROUTES.get(name)
    if route is None:
        return cli.main(given)
    if route.keys:
        return _run(route, words)
    if route.experiments:
        return _sweep_and_page(name, route, words)
    if route.overrides:
        code = cli.main([*route.overrides, *words])
        if code or not route.closing or {"-h", "--help"} & {*words}:
            return code
        results = _results_folder([*route.overrides[1:], *words])
        said = COMMAND + " ".join([program(), name, *words])
        code = _page(ROUTES["report"])([f"--results={results}", said])
        print(route.closing)
        return code
    return _page(route)(words)


def _run(route: Route, words: Sequence[str]) -> int:
    """Runs a command that is the command line with short names of options."""
    if {"-h", "--help"} & {*words}:
        return cli.main(["--help"])
    try:
        return cli.main(route.expand(words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _begun(line: str) -> list[str]:
    """The commands that a line of the shell may be the beginning of, for completion."""
    _, blank, typed = line.partition(" ")
    return [name for name in ROUTES if blank and name.startswith(typed.lstrip())]


def _sweep_and_page(name: str, route: Route, words: Sequence[str]) -> int:
    """Runs what is missing of a page, makes it of what is recorded, and then the report."""
    given = [word for word in words if not word.startswith("-")]
    overrides = [word for word in given if word != ADD]
    options = [word for word in words if word.startswith("-")]
    if others := [option for option in options if not option.startswith(COMMAND)]:
        if {*others} <= {"-h", "--help"}:
            print(_help(name, route))
            return 0
        print(
            f"error: {others[0]} is not an option of {name}. Give overrides such as scale=paper.",
            file=sys.stderr,
        )
        return 2
    sweeps = [[f"experiment={experiment}"] for experiment in route.experiments]
    try:
        if ADD in given and not route.adds:
            raise UserError(f"{ADD} is not possible for {name}, whose page also holds times.")
        plan = import_module(route.design).plan(overrides) if route.design else None
        if plan is not None:
            sweeps, overrides = plan.sweeps, plan.others
        results = _results_folder([f"experiment={route.experiments[0]}", *overrides])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    committed = results / "answers" / name.replace("-", "_")
    adding = ADD in given and committed.is_dir()
    if plan is not None:
        print(plan.announcement, flush=True)
        if adding:
            print("Cells whose answers are committed do not run.", flush=True)
        if plan.estimate:
            return 0
    known = [f"committed={committed}"] if adding else []
    for sweep in sweeps:
        if code := cli.main(["-m", *sweep, *overrides, *known]):
            return code
    said = options or [COMMAND + " ".join([program(), name, *given])]
    kept = ["--add"] if adding else []
    if code := _page(route)([f"--runs={results / 'runs'}", f"--out={results}", *kept, *said]):
        return code
    if adding and not (results / "runs").is_dir():
        return 0  # all was committed, and the report shows records
    return _page(ROUTES["report"])([f"--results={results}", *said])


def _help(name: str, route: Route) -> str:
    """What `--help` says of a page that a sweep comes before."""
    does = f"{route.does[0].upper()}{route.does[1:]}."
    experiments = " and ".join(f"experiment={experiment}" for experiment in route.experiments)
    return (
        f"usage: {program()} {name} [OVERRIDE ...]\n\n{does}\n\nRuns the cells of {experiments} "
        "that are not recorded, and makes\nthe page and the report of all records. Overrides are "
        f"those of a run, such as scale=paper. {ADD} keeps the cells of the committed page, and\n"
        "runs the others only."
    )


def _page(route: Route) -> Callable[[Sequence[str]], int]:
    command: Callable[[Sequence[str]], int] = import_module(route.module).main
    return command


def _results_folder(overrides: Sequence[str]) -> Path:
    """The folder that the sweeps of these overrides write to."""
    from qvlm.config.compose import compose

    keys = ("experiment", "scale", "results_dir")
    place = [word for word in overrides if word.partition("=")[0] in keys]
    return Path(compose(place).results_dir)


if __name__ == "__main__":
    sys.exit(main())
