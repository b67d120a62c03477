"""`python -m qvlm`: the command line of `run.py`, and a route for each page that `make` makes.

    python -m qvlm model=mini_moe_llava bits=w6a6     as run.py
    python -m qvlm table2 scale=paper launcher=slurm  runs what is missing, then makes the page
    python -m qvlm preflight scale=paper              what Table 2 would read, need and take
    python -m qvlm fit --budget 6                     which models fit 6 GiB

The Makefile calls the same routes, so that a system without `make` needs none.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from qvlm import cli
from qvlm.validation import expanded_path

# Experiments that each page needs the records of.
SWEEPS = {
    "table1": ("table1",),
    "table2": ("table2",),
    "table5": ("table5",),
    "table4": ("table4", "table4_exact"),
    "table-real": ("table_real", "table_real_first", "table_real_methods", "table_real_search"),
    "claims": ("table2", "table1", "table5", "draws"),
}
# Modules of the pages. Those without a sweep measure or compute by themselves.
PAGES = {
    **{name: f"qvlm.tables.{name}" for name in ("table1", "table2", "table5", "claims")},
    "table4": "qvlm.tables.table4.__main__",
    "table-real": "qvlm.tables.table_real",
    "table4-scale": "qvlm.tables.table4_scale.__main__",
    "gpu": "qvlm.tables.gpu.__main__",
    "fit": "qvlm.planning.footprint",
}
COMMAND = "--command="  # the command that a page names, if it is not the route


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a route or the command line, and returns the exit code.

    Args:
        arguments: Words of the command line, or None for those of this process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    name, words = (given[0], given[1:]) if given else ("", [])
    if name == "preflight":
        return cli.main(["-m", "experiment=table2", *words, "preflight=true"])
    if name in SWEEPS:
        return _sweep_and_page(name, words)
    if name in PAGES:
        return _page(name)(words)
    return cli.main(given)


def _sweep_and_page(name: str, words: Sequence[str]) -> int:
    """Runs what is missing of the experiments of a page, and makes it of what is recorded."""
    overrides = [word for word in words if not word.startswith("-")]
    options = [word for word in words if word.startswith("-")]
    if others := [option for option in options if not option.startswith(COMMAND)]:
        if {*others} <= {"-h", "--help"}:
            print(__doc__, end="")
            return 0
        print(
            f"error: {others[0]} is not an option of {name}. Give overrides such as scale=paper.",
            file=sys.stderr,
        )
        return 2
    for experiment in SWEEPS[name]:
        if code := cli.main(["-m", f"experiment={experiment}", *overrides]):
            return code
    results = _results_folder(overrides)
    said = options or [COMMAND + " ".join(["python -m qvlm", name, *overrides])]
    return _page(name)([f"--runs={results / 'runs'}", f"--out={results}", *said])


def _page(name: str) -> Callable[[Sequence[str]], int]:
    command: Callable[[Sequence[str]], int] = import_module(PAGES[name]).main
    return command


def _results_folder(overrides: Sequence[str]) -> Path:
    """The folder that the sweeps of these overrides write to."""
    from hydra import compose, initialize_config_dir

    from qvlm.config.compose import CONF, register

    place = [word for word in overrides if word.partition("=")[0] in ("scale", "results_dir")]
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", place, return_hydra_config=False)
    return Path(expanded_path("results_dir", config.results_dir))


if __name__ == "__main__":
    sys.exit(main())
