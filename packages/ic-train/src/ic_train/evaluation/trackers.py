"""Reports in experiment trackers, behind `--report-to`: Weights & Biases and MLflow.

The report's folder is complete before a tracker hears of it; one that cannot be reached costs a message.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ic_train.evaluation.passkey import wilson_interval
from ic_train.evaluation.records import SETTINGS_FILE
from ic_train.evaluation.report import MIN_FOR_PERCENTAGE, REPORT_FILE, TABLE_FILE
from ic_train.tracking import MLFLOW_RUN_FILE, be_impatient

_EXPERIMENT = "ic-train"
_LONGEST_PARAMETER = 5000


def add_report_to(parser: argparse.ArgumentParser) -> None:
    """Add the option."""
    parser.add_argument(
        "--report-to",
        default="none",
        metavar="A,B",
        help=f"of {', '.join(_TRACKERS)}: send the report there; their own variables set them up (default: none)",
    )


def parse_report_to(text: str) -> list[str]:
    """The trackers of a list as `wandb,mlflow`; none for "none".

    Raises:
        ValueError: one is unknown, or its package is not there.
    """
    if text == "none":
        return []
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in _TRACKERS:
            raise ValueError(f"--report-to has {name!r}; accepted are {', '.join(_TRACKERS)}, or none")
        if find_spec(name) is None:
            raise ValueError(f"--report-to has {name}, which is not there: pip install 'ic-train[tracking]'")
    return names


def send_report(trackers: Sequence[str], folder: Path) -> None:
    """Send a finished report: numbers with the ends of their intervals, the table, heat maps, settings, commit.

    A folder that was sent before goes on in the same run of the tracker.

    Args:
        trackers: from `parse_report_to`.
        folder: of the report.
    """
    for name in trackers:
        be_impatient()
        try:
            _TRACKERS[name](folder, json.loads((folder / REPORT_FILE).read_text()))
        except Exception as error:
            # each tracker has its own kinds, and none is worth a report
            reason = str(error).strip().splitlines() or [""]
            print(
                f"error: {name} did not take the report: {type(error).__name__}: {reason[0]}. It is whole in "
                f"{folder}; the same command sends it again",
                file=sys.stderr,
            )


def scalars(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Numbers of a report by name, as `niah/4096/low`.

    A share of fewer than 200 questions is left out, as in the table: its interval's ends say what is known.

    Args:
        rows: of report.json.
    """
    found: dict[str, Any] = {}
    for row in rows:
        for name, count, total in _counts(row):
            found |= {f"{name}/correct": count, f"{name}/total": total}
            if total:
                found |= zip((f"{name}/low", f"{name}/high"), wilson_interval(count, total), strict=True)
            if total >= MIN_FOR_PERCENTAGE:
                found[f"{name}/share"] = count / total
        if row.get("task") == "perplexity":
            name = f"perplexity/{row['context_tokens']}/{row['from_tokens']}-{row['to_tokens']}"
            found |= {name: row["perplexity"], f"{name}/low": row["low"], f"{name}/high": row["high"]}
        if row.get("kind") == "calibration":
            found["calibration/passed"] = row["passed"]
        if row.get("kind") == "absolute":
            found["judge/mean"] = row["mean"]
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def _counts(row: dict[str, Any]) -> Iterator[tuple[str, float, int]]:
    """Name, count and total of every share in a row."""
    if row.get("kind") == "calibration":
        yield from ((f"calibration/{one['name']}", one["count"], one["total"]) for one in row["findings"])
    elif "kind" in row:
        parts = (
            ("good", "unparsable") if row["kind"] == "absolute" else ("first", "second", "flip", "unparsable")
        )
        yield from ((f"judge/{part}", row[part], row["total"]) for part in parts)
    elif row["task"] != "perplexity":
        yield f"{row['task']}/{row['context_tokens']}", row["correct"], row["total"]


def _facts(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    """What a run is to be found again by."""
    settings = json.loads((folder / SETTINGS_FILE).read_text())
    return {**{name: value for name, value in report.items() if name != "rows"}, **settings}


def _files(folder: Path) -> list[Path]:
    return [folder / REPORT_FILE, folder / TABLE_FILE, *sorted(folder.glob("*.png"))]


def _to_wandb(folder: Path, report: dict[str, Any]) -> None:
    wandb = import_module("wandb")
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or _EXPERIMENT,
        id=os.environ.get("WANDB_RUN_ID") or name,
        resume="allow",
        name=os.environ.get("WANDB_NAME") or folder.name,
        job_type=report["topic"],
        dir=str(folder),
        config=_facts(folder, report),
    )
    try:
        rows = report["rows"]
        flat = [key for row in rows for key, value in row.items() if not isinstance(value, (list, dict))]
        columns = list(dict.fromkeys(flat))
        table = wandb.Table(columns=columns, data=[[row.get(key) for key in columns] for row in rows])
        pictures = {path.stem: wandb.Image(str(path)) for path in folder.glob("*.png")}
        run.log({**scalars(rows), "report": table, **pictures})
        artifact = wandb.Artifact(f"{report['topic']}-{run.id}", type=report["topic"])
        for path in _files(folder):
            artifact.add_file(str(path))
        run.log_artifact(artifact)
    finally:
        run.finish()


def _to_mlflow(folder: Path, report: dict[str, Any]) -> None:
    mlflow = import_module("mlflow")
    held = folder / MLFLOW_RUN_FILE
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or _EXPERIMENT)
    run_id = held.read_text().strip() if held.is_file() else None
    if run_id:
        try:
            mlflow.get_run(run_id)
        except mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            # it was sent to another server before
            run_id = None
    with mlflow.start_run(run_id=run_id, run_name=None if run_id else folder.name) as run:
        held.write_text(run.info.run_id)
        facts = _facts(folder, report).items()
        mlflow.set_tags({f"ic.{name}": str(value)[:_LONGEST_PARAMETER] for name, value in facts})
        mlflow.log_metrics(scalars(report["rows"]))
        for path in _files(folder):
            mlflow.log_artifact(str(path))


_TRACKERS: dict[str, Callable[[Path, dict[str, Any]], None]] = {"wandb": _to_wandb, "mlflow": _to_mlflow}
