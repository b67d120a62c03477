"""`qvlm workspace` makes a workspace and a report in a W&B account, over the runs that are there.

The workspace arranges what every cell logs: accuracy, progress while it runs, cost, the proof of
bits, and examples. The report is a page of the same charts with words, to share. Both are made with
the package wandb-workspaces, which the extra `workspace` brings.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from qvlm.command import program, run_command
from qvlm.config.schema import TrackingConfig
from qvlm.errors import RunError, UserError
from qvlm.evaluation.metrics import CLASSES

TITLE = "qvlm: what quantization costs"
STAGES = ("load", "calibrate", "quantize", "prove", "pack", "evaluate")


def sections(wr: Any) -> dict[str, list[Any]]:
    """Returns the charts by the title of their section.

    Args:
        wr: Module `wandb_workspaces.reports.v2`.
    """
    average, memory = (wr.SummaryMetric(name) for name in ("accuracy/Avg", "weights/mib"))
    classes = [name for name in CLASSES if name != "Avg"]
    return {
        "Accuracy": [
            wr.BarPlot(title="Accuracy, %", metrics=["accuracy/Avg"]),
            *(wr.BarPlot(title=f"Accuracy, {n}, %", metrics=[f"accuracy/{n}"]) for n in classes),
        ],
        "While it runs": [
            wr.LinePlot(
                title="Accuracy so far with its 95 % interval",
                x="progress/answered",
                y=["progress/accuracy", "progress/ci_low", "progress/ci_high"],
            ),
        ],
        "Cost": [
            wr.ScatterPlot(title="Accuracy against MiB of weights", x=memory, y=average),
            wr.ScatterPlot(
                title="Accuracy against seconds of the search",
                x=wr.SummaryMetric("search/seconds"),
                y=average,
            ),
            wr.BarPlot(title="Seconds by stage", metrics=[f"seconds/{name}" for name in STAGES]),
            wr.BarPlot(title="Peak MiB by stage", metrics=[f"peak_mib/{name}" for name in STAGES]),
        ],
        "Proof of bits": [
            wr.BarPlot(title="Layers that exceed their bits", metrics=["bits/exceeding"]),
            wr.BarPlot(
                title="Most values per scale",
                metrics=["bits/most_weight_levels", "bits/most_input_levels"],
            ),
        ],
        "Examples": [wr.WeavePanelSummaryTable(table_name="examples")],
    }


def create(project: str, entity: str | None) -> list[str]:
    """Makes the workspace and the report, and returns their addresses.

    Args:
        project: Project of the runs.
        entity: Account or team; None stands for the default of the account.

    Raises:
        UserError: If wandb-workspaces is not installed, or there is no account.
        RunError: If the server refuses.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise UserError(
            "wandb-workspaces is not installed. Give `pip install wandb-workspaces`."
        ) from error
    import wandb

    try:
        owner = entity or wandb.Api().default_entity
        if owner is None:
            raise UserError("--entity: the account has no default. Give an account or a team.")
        charts = sections(wr)
        workspace = ws.Workspace(
            entity=owner,
            project=project,
            name=TITLE,
            sections=[
                ws.Section(name=title, panels=panels, is_open=True)
                for title, panels in charts.items()
            ],
        ).save()
        runs = wr.Runset(entity=owner, project=project)
        report = wr.Report(
            entity=owner,
            project=project,
            title=TITLE,
            description="Made by `qvlm workspace` from the runs of the project.",
            blocks=[
                block
                for title, panels in charts.items()
                for block in (
                    wr.H2(text=title),
                    wr.PanelGrid(runsets=[runs], panels=panels),
                )
            ],
        )
        report.save()
    except UserError:
        raise
    except Exception as error:  # the exceptions of W&B have no common base class
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RunError(f"Weights & Biases refused: {lines[0]}") from error
    return [workspace.url, report.url]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog=f"{program()} workspace",
        description="Makes a workspace and a report in a W&B account, over the runs of a project.",
    )
    parser.add_argument("--project", default=TrackingConfig.project, help="default: %(default)s")
    parser.add_argument("--entity", help="account or team (default: that of the account)")

    def work(options: argparse.Namespace) -> None:
        for address in create(options.project, options.entity):
            print(address)

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
