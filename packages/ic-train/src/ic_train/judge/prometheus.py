"""The published format of Prometheus judges: prompts, rubrics, and how a verdict is read.

The two prompts and their system prompts are those of Prometheus 2 (Kim et al., arXiv 2405.01535, appendix) as
released by prometheus-eval 0.1.20 under Apache-2.0, word for word, slips of grammar included: its judges were
trained on these words. The rest is written for this project; `docs/decisions` says why the library is not used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_ABSOLUTE_SYSTEM = (
    "You are a fair judge assistant tasked with providing clear, objective feedback based on specific criteria, "
    "ensuring each assessment reflects the absolute standards set for performance."
)
_RELATIVE_SYSTEM = (
    "You are a fair judge assistant assigned to deliver insightful feedback that compares individual "
    "performances, highlighting how each stands relative to others within the same cohort."
)
_ABSOLUTE = """###Task Description:
An instruction (might include an Input inside it), a response to evaluate, a reference answer that gets a score \
of 5, and a score rubric representing a evaluation criteria are given.
1. Write a detailed feedback that assess the quality of the response strictly based on the given score rubric, \
not evaluating in general.
2. After writing a feedback, write a score that is an integer between 1 and 5. \
You should refer to the score rubric.
3. The output format should look as follows: "(write a feedback for criteria) [RESULT] \
(an integer number between 1 and 5)"
4. Please do not generate any other opening, closing, and explanations.

###The instruction to evaluate:
{instruction}

###Response to evaluate:
{response}

###Reference Answer (Score 5):
{reference_answer}

###Score Rubrics:
{rubric}

###Feedback: """
_RELATIVE = """###Task Description:
An instruction (might include an Input inside it), a response to evaluate, a reference answer, and a score rubric \
representing a evaluation criteria are given.
1. Write a detailed feedback that assess the quality of two responses strictly based on the given score rubric, \
not evaluating in general.
2. After writing a feedback, choose a better response between Response A and Response B. \
You should refer to the score rubric.
3. The output format should look as follows: "(write a feedback for criteria) [RESULT] (A or B)"
4. Please do not generate any other opening, closing, and explanations.

###Instruction:
{instruction}

###Response A:
{response_A}

###Response B:
{response_B}

###Reference Answer:
{reference_answer}

###Score Rubric:
{rubric}

###Feedback: """

RUBRIC_FIELDS = ("criteria", *(f"score{score}" for score in range(1, 6)))
RETRIEVAL_RUBRIC = {
    "criteria": "Does the response answer the question with exactly what the quoted passage says?",
    "score1": "The response gives a wrong value, or a value where there is none, or no answer where there is one.",
    "score2": "The response gives only a part of the value, or mixes the value with wrong ones.",
    "score3": "The response gives the value but leaves open whether it is the answer.",
    "score4": "The response gives the right answer together with statements that the passage does not support.",
    "score5": "The response gives the right answer and nothing unsupported by the passage, however long it is.",
}

# a verdict ends the text: a judge that goes on, or that only repeats the prompt, has given none
_LABEL = r"(?:\[\s*(?:RESULT|SCORE)\s*(?::\s*|\]\s*:?\s*)|\b(?:result|score)\s*(?::|of)\s*)"
_SCORE = re.compile(
    _LABEL + r"[(\[]?\s*(\d+)\s*[)\]]*\s*(?:(?:/|out\s+of)\s*5)?\s*[)\]]*\s*\.?\s*\Z", re.IGNORECASE
)
_CHOICE = re.compile(_LABEL + r"[(\[]?\s*(?:Response\s+)?([AB])\s*[)\]]*\s*\.?\s*\Z", re.IGNORECASE)


def absolute_messages(
    *, instruction: str, response: str, reference: str, rubric: Mapping[str, str]
) -> list[dict[str, str]]:
    """Messages that ask for a score from 1 to 5 against a reference."""
    prompt = _ABSOLUTE.format(
        instruction=instruction, response=response, reference_answer=reference, rubric=_rubric_text(rubric)
    )
    return [{"role": "system", "content": _ABSOLUTE_SYSTEM}, {"role": "user", "content": prompt}]


def relative_messages(
    *, instruction: str, response_a: str, response_b: str, reference: str, rubric: Mapping[str, str]
) -> list[dict[str, str]]:
    """Messages that ask which of two responses is better."""
    prompt = _RELATIVE.format(
        instruction=instruction,
        response_A=response_a,
        response_B=response_b,
        reference_answer=reference,
        rubric=_rubric_text(rubric),
    )
    return [{"role": "system", "content": _RELATIVE_SYSTEM}, {"role": "user", "content": prompt}]


def merged(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same as one message of the user, for chat templates that know no system's.

    Prometheus 2 was trained on messages joined like this (`prepare_dataset.py` of its recipe in prometheus-eval).
    """
    return [{"role": "user", "content": "\n\n".join(message["content"] for message in messages)}]


def parse_score(text: str) -> int | None:
    """The score from 1 to 5 that a judge's text ends with, as `[RESULT] 4`; None where it does not."""
    match = _SCORE.search(text)
    return int(match[1]) if match and 1 <= int(match[1]) <= 5 else None


def parse_choice(text: str) -> str | None:
    """The "A" or "B" that a judge's text ends with, as `[RESULT] A`; None where it does not."""
    match = _CHOICE.search(text)
    return match[1].upper() if match else None


def load_rubric(path: Path | None) -> dict[str, str]:
    """A rubric from a YAML file with RUBRIC_FIELDS; None for the one of retrieval.

    Raises:
        ValueError: the file does not exist, or has other fields.
    """
    if path is None:
        return dict(RETRIEVAL_RUBRIC)
    if not path.is_file():
        raise ValueError(f"--rubric is {str(path)!r}, which does not exist")
    try:
        rubric: Any = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--rubric is {str(path)!r}, which is no YAML: {error}") from None
    if not isinstance(rubric, dict) or set(rubric) != set(RUBRIC_FIELDS):
        found = ", ".join(map(str, rubric)) if isinstance(rubric, dict) else type(rubric).__name__
        raise ValueError(f"--rubric {str(path)!r} has {found}; it must have {', '.join(RUBRIC_FIELDS)}")
    return {name: str(rubric[name]) for name in RUBRIC_FIELDS}


def _rubric_text(rubric: Mapping[str, str]) -> str:
    scores = [f"Score {score}: {rubric[f'score{score}']}" for score in range(1, 6)]
    return "\n".join([f"[{rubric['criteria']}]", *scores])
