"""Runs tasks of lm-eval on a model in memory: those that lm-eval ships, and folders of YAML files.

The tasks are set up as lm-eval's own command line does, with its seeds, so that its numbers are the
same. What is left out are tasks that run code that a model wrote.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import pandas as pd
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from torch import nn

from qvlm.errors import UserError
from qvlm.evaluation.adapter import InMemoryModel
from qvlm.evaluation.answers import KeptAnswers
from qvlm.evaluation.evaluator import Evaluation
from qvlm.evaluation.harness import preserved, quiet_lm_eval
from qvlm.evaluation.vqa import questions
from qvlm.models.loaded import LoadedModel

# What of lm-eval's results a record keeps, under lm-eval's names.
RESULTS = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples")
# Resamples behind the standard error of a metric that has no closed form. lm-eval's command line
# draws 100,000 in several processes.
RESAMPLES = 1000
VQA = Path(questions.__file__).parent  # folder of the tasks that qvlm ships


def load_tasks(
    names: Sequence[str],
    include_path: str | None = None,
    shots: int | None = None,
    settings: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Loads tasks with their data.

    Args:
        names: Names of tasks, groups or tags.
        include_path: Folder with further tasks, which come before those of qvlm and lm-eval.
        shots: Number of examples in each prompt, unless a task fixes it to 0. None is the task's.
        settings: Settings of generation that take the place of the tasks' own.
        metadata: What functions of the tasks that load data are given.

    Returns:
        What `lm_eval.evaluator.evaluate` takes: `tasks`, `groups` and `group_map`.

    Raises:
        UserError: If there is no such task, or it or its data cannot be loaded.
    """
    with quiet_lm_eval():
        manager = _manager(names, include_path, metadata)
        try:
            loaded: dict[str, Any] = manager.load(list(names))
        except UserError:
            raise
        except Exception as error:  # a task's own code may raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UserError(
                f"task={','.join(names)} cannot be loaded ({reason}). Check its data and its YAML."
            ) from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError(
                    f"task={name} runs code that the model writes, which qvlm does not. Choose "
                    "another task."
                )
            _set_up(task, shots, settings or {})
    return loaded


def require_readable(loaded: LoadedModel, tasks: Mapping[str, Any]) -> None:
    """Makes sure that a model reads what tasks show.

    Raises:
        UserError: If a task has images and the model reads none.
    """
    shown = [name for name, task in tasks["tasks"].items() if getattr(task, "MULTIMODAL", False)]
    if shown and not loaded.reads_images:
        raise UserError(
            f"task={shown[0]} has images, and model {loaded.name} reads none. Choose a task of "
            "text alone, or a model with a vision tower."
        )


def evaluate_tasks(
    loaded: LoadedModel,
    tasks: Mapping[str, Any],
    batch_size: int,
    limit: int | None = None,
    seed: int = 0,
    chat_template: bool = False,
    answers: Path | None = None,
    observe: Callable[[nn.Module], Any] | None = None,
) -> Evaluation:
    """Runs tasks on all ranks.

    Args:
        loaded: Model with its tokenizer and image processor.
        tasks: Tasks, from `load_tasks`.
        batch_size: Number of requests per batch. It changes results through rounding only.
        limit: Number of questions of each task, from the first; None asks all.
        seed: Seed of sampling.
        chat_template: Whether prompts are put into the checkpoint's conversation template.
        answers: Folder that keeps generated answers while the evaluation runs; see `evaluate`.
        observe: Function that is called with the model at the end.

    Returns:
        Evaluation whose metrics have the one key `tasks`, with the entries `RESULTS` of lm-eval's
        results. Its predictions have a row per question and filter; see `_samples`.

    Raises:
        UserError: If a prompt and its images do not fit each other, or an image does not decode.
        RunError: If logits are not finite.
    """
    kept = KeptAnswers(answers) if answers else None
    model = InMemoryModel(loaded, batch_size, seed, kept)
    with quiet_lm_eval(), preserved(loaded.model.device):
        found = lm_eval.evaluator.evaluate(
            model,
            tasks,
            limit=limit,
            bootstrap_iters=RESAMPLES,
            apply_chat_template=chat_template,
        )
    plain = {name: found[name] for name in RESULTS if name in found}
    samples = _samples(found["samples"])
    return Evaluation(
        {"tasks": json.loads(_json(plain))},
        samples,
        sum(rank.resumed for rank in model.ranks),
        [sum(map(len, rank.answers.values())) for rank in model.ranks] or [len(samples)],
        [observe(loaded.model)] if observe else [],
    )


def _manager(
    names: Sequence[str], include_path: str | None, metadata: Mapping[str, Any] | None
) -> TaskManager:
    """Finds tasks. Those of lm-eval, which take ten seconds to list, only if they are needed."""
    folders = [str(VQA), *([include_path] if include_path else [])]
    given = {"include_path": folders, "metadata": dict(metadata or {})}
    own = TaskManager(**given, include_defaults=False)
    if set(names) <= set(own.all_tasks):
        return own
    manager = TaskManager(**given)
    for name in names:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks, cutoff=0.5)
            choices = f"Choose one of: {', '.join(near)}, ..." if near else "See lm-eval ls tasks"
            raise UserError(f"task={name} names no task of lm-eval or include_path. {choices}.")
    return manager


def _set_up(task: Any, shots: int | None, settings: Mapping[str, Any]) -> None:
    """Sets number of examples, their seed and the settings of generation, as lm-eval does."""
    own = task.get_config("num_fewshot")
    if own is None or (shots is not None and own != 0):
        task.set_config("num_fewshot", shots or 0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    if settings and task.get_config("output_type") == "generate_until":
        task.set_config("generation_kwargs", dict(settings), update=True)


def _samples(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """Makes a table of lm-eval's samples, without images.

    Returns:
        Columns `task`, `doc_id`, `filter`, and as JSON `requests` (texts of each
        request), `responses` (after the filter), `target`, and `metrics` (values by name).
    """
    rows = [
        {
            "task": task,
            "doc_id": sample["doc_id"],
            "filter": sample["filter"],
            "requests": _json([_texts(arguments) for arguments in sample["arguments"]]),
            "responses": _json(sample["filtered_resps"]),
            "target": _json(sample["target"]),
            "metrics": _json({name: sample[name] for name in sample["metrics"]}),
        }
        for task, own in samples.items()
        for sample in own
    ]
    return pd.DataFrame(rows)


def _texts(arguments: Sequence[Any]) -> list[str]:
    return [argument for argument in arguments if isinstance(argument, str)]


def _json(value: Any) -> str:
    return json.dumps(value, default=handle_non_serializable, ensure_ascii=False)
