"""Two evaluations are held against each other question by question, and only where they asked the same."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import binom, binomtest

from ic_train import cli
from ic_train.evaluation.report import Pairs, compare, difference_interval, paired, paired_interval
from ic_train.evaluation.thresholds import Threshold, check

SETTINGS = {"seed": 1000, "questions": 200, "keys_per_context": 8, "haystack_sha256": "a" * 64}
# of the repository's own distractors at 32,768 tokens: right in both, lost, won, wrong in both
TABLE = (170, 5, 15, 10)


def row(verdicts: list, *, task: str = "niah", asked: str = "who?", **fields) -> dict:
    samples = [
        {"id": f"{task}-4096-0-{number}", "question": asked, "reference": "1", "correct": verdict}
        for number, verdict in enumerate(verdicts)
    ]
    counts = {"correct": sum(verdicts), "total": len(verdicts)}
    return {"task": task, "context_tokens": 4096, **counts, "samples": samples, **fields}


def rows(both: int, lost: int, won: int, neither: int) -> tuple[dict, dict]:
    pairs = (
        [(True, True)] * both + [(True, False)] * lost + [(False, True)] * won + [(False, False)] * neither
    )
    before, after = zip(*pairs, strict=True)
    return row(list(before)), row(list(after))


def interval(both: int, lost: int, won: int, neither: int) -> tuple[float, float]:
    return paired_interval(Pairs(both=both, lost=lost, won=won, neither=neither))


def score_interval(lost: int, won: int, total: int) -> tuple[float, float]:
    """Tango's (Statistics in Medicine 17:891-908, 1998), which shares no step with Newcombe's."""

    def z(change: float) -> float:
        linear = -lost - won + (2 * total + lost - won) * change
        constant = -lost * change * (1 - change)
        likeliest = (math.sqrt(max(linear**2 - 8 * total * constant, 0)) - linear) / (4 * total)
        return (won - lost - total * change) / math.sqrt(total * (2 * likeliest + change * (1 - change)))

    found = (won - lost) / total
    ends = [
        brentq(lambda change, end=end: z(change) - end, *sorted((far, found - end * 1e-9)))
        for far, end in ((-1 + 1e-9, 1.959964), (1 - 1e-9, -1.959964))
    ]
    return ends[0], ends[1]


def test_the_paired_interval_is_the_published_one() -> None:
    # Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables, chapter 8, with the sign turned
    assert interval(59, 6, 16, 80) == pytest.approx((0.0046, 0.1186), abs=5e-5)
    # where all are right there is no correlation to see; 60 questions do not show that none can be lost
    assert interval(60, 0, 0, 0) == pytest.approx(difference_interval((60, 60), (60, 60)))
    assert interval(0, 0, 9, 0)[1] <= 1


def test_the_paired_interval_says_what_mcnemars_test_says() -> None:
    low, high = interval(*TABLE)
    assert (low, high) == pytest.approx(score_interval(5, 15, 200), abs=0.002)
    assert binomtest(5, 20).pvalue < 0.05
    assert low > 0 > difference_interval((175, 200), (185, 200))[0]
    # the runs change places
    assert interval(170, 15, 5, 10) == pytest.approx((-high, -low))


@pytest.mark.parametrize(
    ("shares", "least"),
    [((0.85, 0.025, 0.075, 0.05), 0.95), ((0.5, 0.05, 0.05, 0.4), 0.95), ((0.5, 0.02, 0.0, 0.48), 0.9)],
)
def test_the_paired_interval_holds_the_true_difference(shares: tuple[float, ...], least: float) -> None:
    """Every table of 60 questions that is not very rare, as often as it comes."""
    total, rare, held, seen = 60, 1e-6, 0.0, 0.0
    counts = np.arange(total + 1)
    for lost, first in zip(counts, binom.pmf(counts, total, shares[1]), strict=True):
        for won, second in enumerate(
            binom.pmf(counts[: total - lost + 1], total - lost, shares[2] / (1 - shares[1]))
        ):
            left = total - lost - won
            if first * second < rare:
                continue
            right = shares[0] / (shares[0] + shares[3])
            for both, third in enumerate(binom.pmf(counts[: left + 1], left, right)):
                if (weight := first * second * third) < rare:
                    continue
                low, high = interval(both, int(lost), won, left - both)
                seen += weight
                held += weight * (low <= shares[2] - shares[1] <= high)
    assert seen > 0.99
    assert held / seen >= least


def test_the_same_questions_are_compared_as_pairs() -> None:
    before, after = rows(*TABLE)
    assert paired(before, after) == Pairs(both=170, lost=5, won=15, neither=10)
    # in whatever order they were answered
    assert paired(before, {**after, "samples": after["samples"][::-1]}) == paired(before, after)
    table = compare({"a": [before], "b": [after]})
    assert "| +5.0 [+0.5, +9.8] points, 5 lost, 15 won |" in table
    assert "Lost and won are the questions that only" in table
    assert "independent" not in table
    loss = Threshold(task="niah", context_tokens=4096, limit="most_loss", value=0.005)
    (verdict,) = check([loss], [after], base=[before])
    assert verdict.passed
    assert verdict.found == pytest.approx(-0.0052, abs=1e-4)


@pytest.mark.parametrize("without", ["samples", "ids", "shares"])
def test_what_cannot_be_paired_is_compared_as_independent_and_says_so(without: str) -> None:
    before, after = rows(*TABLE)
    if without == "samples":
        del before["samples"]
    elif without == "ids":
        before["samples"] = [{"correct": one["correct"]} for one in before["samples"]]
    else:
        before["samples"][0]["correct"] = 0.25
    assert paired(before, after) is None
    table = compare({"a": [before], "b": [after]})
    assert "| +5.0 [-1.0, +11.0] points, independent |" in table
    assert "independent: the difference's interval is" in table
    assert "Lost and won" not in table


@pytest.mark.parametrize(
    ("other", "how"),
    [
        ({"keys_per_context": 50}, "keys_per_context 8 and 50"),
        ({"haystack_sha256": "b" * 64}, "haystack_sha256 aaaaaaaaaaaa and bbbbbbbbbbbb"),
        # settings that the questions of this task do not show are no difference of theirs
        ({"seed": 2000}, ""),
    ],
)
def test_other_settings_are_other_questions_though_they_read_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: dict, how: str
) -> None:
    for name, settings in (("base", SETTINGS), ("run", {**SETTINGS, **other})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps({"rows": [row([True] * 200)]}))
        (tmp_path / name / "run.json").write_text(json.dumps(settings))
    limits = tmp_path / "thresholds.yaml"
    limits.write_text("[{task: niah, context_tokens: 4096, most_loss: 0.1}]")
    base, run = str(tmp_path / "base"), str(tmp_path / "run")
    status = cli.main(["evaluate", "check", run, "--base", base, "--thresholds", str(limits)])
    assert status == (2 if how else 0)
    error = capsys.readouterr().err
    assert cli.main(["evaluate", "compare", base, run]) == 0
    table = capsys.readouterr().out
    if how:
        assert f"niah at 4096 tokens: the two runs asked different questions ({how}); evaluate both" in error
        assert f"| different questions: {how} |" in table
    else:
        assert "0 lost, 0 won |" in table


def test_other_questions_are_seen_without_settings_and_settings_are_named_where_they_are_there() -> None:
    before, after = row([True] * 200), row([True] * 200, asked="where?")
    assert "| different questions: 200 and 200 questions, 0 the same |" in compare(
        {"a": [before], "b": [after]}
    )
    assert "200 and 100 questions, 100 the same" in compare({"a": [before], "b": [row([True] * 100)]})
    before["settings"], after["settings"] = SETTINGS, {**SETTINGS, "seed": 1}
    assert "| different questions: seed 1000 and 1 |" in compare({"a": [before], "b": [after]})


def test_settings_count_where_they_change_what_is_read() -> None:
    def table(task: str, **other) -> str:
        first, second = (row([True] * 200, task=task, settings=one) for one in (SETTINGS, SETTINGS | other))
        if task == "ruler_vt":
            first["lm_eval"] = second["lm_eval"] = "0.4"
            first["haystack"] = second["haystack"] = "jargon"
        return compare({"a": [first], "b": [second]})

    assert "different" not in table("passkey", keys_per_context=50, haystack_sha256="b")
    assert "different" not in table("ruler_vt", keys_per_context=50)
    assert "different questions: haystack_sha256" in table("ruler_vt", haystack_sha256="b")
    read = {"task": "perplexity", "context_tokens": 4096, "from_tokens": 0, "to_tokens": 1024}
    read |= {"perplexity": 3.0, "low": 2.0, "high": 4.0}
    first, second = ({**read, "settings": {"seed": seed, "texts": 4}} for seed in (1, 2))
    assert "| different texts: seed 1 and 2 |" in compare({"a": [first], "b": [second]})
    assert "| +0 |" in compare({"a": [first], "b": [first]})


def test_broken_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"rows": [row([True])]}))
    (tmp_path / "run.json").write_text("{")
    assert cli.main(["evaluate", "compare", str(tmp_path)]) == 2
    assert "run.json holds no settings: JSONDecodeError" in capsys.readouterr().err
