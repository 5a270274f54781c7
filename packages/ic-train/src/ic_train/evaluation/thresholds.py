"""Thresholds in a file: whether a run is good enough, shown by the ends of its intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ic_train.evaluation.passkey import wilson_interval
from ic_train.evaluation.report import change_interval

JUDGE = "judge"
_LIMITS = ("least", "most_loss", "most")
_FIELDS = ("task", "context_tokens", *_LIMITS, "uncalibrated")


@dataclass(frozen=True, kw_only=True, slots=True)
class Threshold:
    """A limit on a task.

    Args:
        task: a suite's name, or "judge" for the share of scores of 4 and 5.
        context_tokens: the length; None for the judge.
        limit: "least": lower end of the share's interval. "most_loss": largest loss against the base run that
            the difference's interval leaves possible. "most": upper end of every perplexity's interval.
        value: of the limit, a share; of "most", a perplexity.
        uncalibrated: whether the judge may be one that calibration has not passed.
    """

    task: str
    context_tokens: int | None
    limit: str
    value: float
    uncalibrated: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether a run keeps to a threshold, with the number that decided."""

    threshold: Threshold
    found: float
    passed: bool

    def __str__(self) -> str:
        t = self.threshold
        length = f" at {t.context_tokens:,} tokens" if t.context_tokens else ""
        word = "passed" if self.passed else "FAILED"
        return f"{word}: {t.task}{length}: {t.limit} {t.value:g}, found {self.found:.4g}"


def load_thresholds(path: Path) -> list[Threshold]:
    """Thresholds from a YAML file: a list of mappings with `task`, `context_tokens` and at least one limit.

    One on "judge" has no length, and may have `uncalibrated`.

    Raises:
        ValueError: there is no such file, or an entry has other fields or values.
    """
    if not path.is_file():
        raise ValueError(f"--thresholds is {str(path)!r}, which does not exist")
    try:
        entries: Any = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--thresholds is {str(path)!r}, which is no YAML: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must be a list of thresholds with {', '.join(_FIELDS)}")
    return [threshold for number, entry in enumerate(entries, 1) for threshold in _read(path, number, entry)]


def require_measured(
    thresholds: Sequence[Threshold],
    planned: list[dict[str, Any]],
    *,
    base: list[dict[str, Any]] | None = None,
    judged: dict[str, Any] | None = None,
) -> None:
    """Refuse before a run what `check` would refuse after it.

    Args:
        thresholds: from `load_thresholds`.
        planned: rows of the run's report without its results, with the `settings` that decide their questions.
        base: of the report that the run will be compared with.
        judged: `kind` and `calibrated` of the judge's row.

    Raises:
        ValueError: a threshold is on something that will not be measured, or cannot be compared.
    """
    for threshold in thresholds:
        if threshold.task == JUDGE:
            _require_judged(threshold, judged)
            continue
        own = _matching(planned, threshold, "this run")[0]
        if threshold.limit == "most_loss":
            if base is None:
                raise ValueError("a threshold has most_loss; give the run to compare with as --base")
            before = _matching(base, threshold, "the base")[0].get("settings", {})
            for name, value in own["settings"].items():
                if before.get(name, value) != value:
                    raise ValueError(
                        f"a threshold has most_loss on {threshold.task}; this run has {name} {value!r}, the base "
                        f"{before[name]!r}: evaluate both with the same settings"
                    )


def check(
    thresholds: Sequence[Threshold],
    rows: list[dict[str, Any]],
    *,
    base: list[dict[str, Any]] | None = None,
    judged: dict[str, Any] | None = None,
) -> list[Verdict]:
    """A verdict per threshold.

    Args:
        thresholds: from `load_thresholds`.
        rows: of the run's report.
        base: of the report that it is compared with.
        judged: the row of the judge's report.

    Raises:
        ValueError: a threshold is on something that was not measured, which never passes unseen; or on the loss
            against a base that was asked different questions.
    """
    verdicts = []
    for threshold in thresholds:
        if threshold.task == JUDGE:
            scores = _require_judged(threshold, judged)
            low, _ = wilson_interval(scores["good"], scores["total"])
            verdicts.append(_verdict(threshold, low))
            continue
        own = _matching(rows, threshold, "this run")
        if threshold.limit == "most":
            # one block of text has no interval; then its own value has to do
            highest = max(row["high"] or row["perplexity"] for row in own)
            verdicts.append(Verdict(threshold=threshold, found=highest, passed=highest <= threshold.value))
        elif threshold.limit == "least":
            low, _ = wilson_interval(own[0]["correct"], own[0]["total"])
            verdicts.append(_verdict(threshold, low))
        else:
            if base is None:
                raise ValueError("a threshold has most_loss; give the run to compare with as --base")
            (before,) = _matching(base, threshold, "the base")
            low, _ = change_interval(before, own[0])
            verdicts.append(Verdict(threshold=threshold, found=-low, passed=-low <= threshold.value))
    return verdicts


def _read(path: Path, number: int, entry: Any) -> list[Threshold]:
    if not isinstance(entry, dict) or not set(entry) <= set(_FIELDS) or not entry.get("task"):
        raise ValueError(f"{path}, threshold {number} is {entry!r}; accepted are {', '.join(_FIELDS)}")
    task, tokens = str(entry["task"]), entry.get("context_tokens")
    if task != JUDGE and (not isinstance(tokens, int) or isinstance(tokens, bool)):
        raise ValueError(
            f"{path}, threshold {number}: context_tokens is {tokens!r}; it must be a number of tokens"
        )
    accepted = {"perplexity": ("most",), JUDGE: ("least",)}.get(task, ("least", "most_loss"))
    chosen = [name for name in _LIMITS if name in entry]
    if not chosen or not set(chosen) <= set(accepted):
        raise ValueError(
            f"{path}, threshold {number} has {', '.join(chosen) or 'no limit'}; {task} takes "
            f"{' and '.join(accepted)}"
        )
    for name in chosen:
        value = entry[name]
        number_like = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number_like or value < 0 or (name != "most" and value > 1):
            raise ValueError(
                f"{path}, threshold {number}: {name} is {value!r}; it must be a share from 0 to 1"
                if name != "most"
                else f"{path}, threshold {number}: most is {value!r}; it must be a perplexity"
            )
    uncalibrated = entry.get("uncalibrated", False)
    if not isinstance(uncalibrated, bool) or (uncalibrated and task != JUDGE):
        raise ValueError(
            f"{path}, threshold {number}: uncalibrated is {uncalibrated!r}; it must be true or false, and only "
            f"{JUDGE} takes true"
        )
    shared: dict[str, Any] = {"task": task, "context_tokens": tokens, "uncalibrated": uncalibrated}
    return [Threshold(**shared, limit=name, value=float(entry[name])) for name in chosen]


def _require_judged(threshold: Threshold, judged: dict[str, Any] | None) -> dict[str, Any]:
    """The judge's row, where a threshold may rely on it."""
    if judged is None or judged.get("kind") != "absolute":
        raise ValueError("a threshold is on judge; no scores of a judge are there")
    if judged.get("calibrated") is not True and not threshold.uncalibrated:
        why = "failed its calibration" if judged.get("calibrated") is False else "was not calibrated"
        raise ValueError(
            f"a threshold is on judge, which {why}: give `ic-train judge` the --calibration of one that passed, "
            "or the threshold uncalibrated: true"
        )
    return judged


def _matching(rows: list[dict[str, Any]], threshold: Threshold, where: str) -> list[dict[str, Any]]:
    key = (threshold.task, threshold.context_tokens)
    found = [row for row in rows if (row["task"], row["context_tokens"]) == key]
    if not found:
        measured = ", ".join(dict.fromkeys(f"{row['task']} at {row['context_tokens']}" for row in rows))
        raise ValueError(
            f"a threshold is on {key[0]} at {key[1]} tokens, which {where} does not measure; it has {measured}"
        )
    return found


def _verdict(threshold: Threshold, low: float) -> Verdict:
    return Verdict(threshold=threshold, found=low, passed=low >= threshold.value)
