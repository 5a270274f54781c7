"""Launch parameters: which entry wins, what a file must look like, and that every op's file has a last resort."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from ic_model.ops import launch
from ic_model.ops.aot import CHIPS
from ic_model.ops.launch import launch_parameters, overriding, read_entries

FILES = sorted(launch.TUNING.glob("*.json"))

MEASURED = {
    "gpu": "NVIDIA H200",
    "date": "2026-11-23",
    "triton": "3.6.0",
    "command": "tune",
    "median_us": 1.5,
}


def entry(capability, block, when=None, gpu=None, **changes):
    raw = {"capability": capability, "gpu": gpu, "when": when or {}, "parameters": {"block": block}}
    return {**raw, "provenance": MEASURED if gpu else "default, not measured", **changes}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write the file of the op "op", in a folder that stands in for the package's."""
    monkeypatch.setattr(launch, "TUNING", tmp_path)

    def write(*entries, text=None):
        content = json.dumps({"entries": list(entries)}) if text is None else text
        (tmp_path / "op.json").write_text(content)
        read_entries.cache_clear()
        launch._find.cache_clear()

    return write


def block(device, **shape):
    return launch_parameters("op", device, **shape)["block"]


def test_first_entry_that_fits_wins(write):
    write(
        entry(90, 1, {"row_dim": 576, "heads": [1, 16]}),
        entry(90, 2, {"row_dim": 576}),
        entry(90, 3, {"heads": [16, 32]}),
        entry(90, 4),
    )
    assert block(90, row_dim=576, heads=1) == block(90, row_dim=576, heads=16) == 1
    assert block(90, row_dim=576, heads=17) == 2
    assert block(90, row_dim=320, heads=16) == block(90, row_dim=320, heads=32) == 3
    assert block(90, row_dim=320, heads=33) == 4


def test_words_are_equal_or_not(write):
    write(entry(80, 1, {"kernel": "split"}), entry(80, 2, {"kernel": "combine"}))
    assert block(80, kernel="split") == 1 and block(80, kernel="combine") == 2
    with pytest.raises(ValueError, match=r"op\.json has no entry for capability 80 with kernel='other'"):
        block(80, kernel="other")


def test_a_lower_capability_stands_in_for_a_missing_one(write):
    write(entry(75, 1), entry(90, 2), entry(80, 3, {"heads": 8}), entry(80, 4, {"heads": [1, 16]}))
    assert block(86, heads=8) == block(89, heads=8) == 3
    assert block(89, heads=16) == 4
    # nothing for 80 fits, and what is for 90 must not be launched there
    assert block(89, heads=17) == 1
    assert block(100, heads=8) == 2
    with pytest.raises(ValueError, match="no entry for capability 70 with heads=8"):
        block(70, heads=8)


def test_device_name_wins_over_capability(write, monkeypatch):
    write(entry(90, 1), entry(90, 2, {"heads": 8}, gpu="NVIDIA H200"), entry(90, 3, gpu="NVIDIA H100"))
    assert block(90, heads=8) == 1
    monkeypatch.setattr(launch, "_cuda_chip", lambda index: (90, "NVIDIA H200"))
    assert block(torch.device("cuda", 0), heads=8) == 2
    assert block(torch.device("cuda", 0), heads=9) == 1


def test_cpu_counts_as_capability_80(write):
    write(entry(75, 1), entry(80, 2), entry(90, 3))
    assert block(torch.device("cpu")) == 2
    with pytest.raises(ValueError, match="device is meta; accepted: a CUDA device, the CPU or a compute"):
        block(torch.device("meta"))


def test_callers_may_change_the_answer(write):
    write(entry(80, 1))
    launch_parameters("op", 80)["block"] = 7
    assert block(80) == 1


def test_overriding(write):
    write(entry(80, 1))
    with overriding("op", {"block": 5}, kernel="split"), overriding("other", {"block": 6}):
        assert block(80, kernel="split") == 5 and block(80, kernel="combine") == 1
        with overriding("op", {"block": 7}):
            assert block(80, kernel="split") == 7
        with (
            overriding("op", {"blok": 7}),
            pytest.raises(
                ValueError, match="parameters has blok, which op is not launched with; accepted: b"
            ),
        ):
            block(80)
    assert block(80, kernel="split") == 1


def test_an_entry_that_asks_for_an_unknown_field(write):
    write(entry(80, 1, {"kernel": "split", "haeds": 8}), entry(80, 2))
    assert block(80, kernel="combine") == 2
    with pytest.raises(
        ValueError, match=r"op\.json, entries\[0\]: when asks for haeds; the launch has heads, k"
    ):
        block(80, kernel="split", heads=8)


def test_op_without_a_file(write):
    write(entry(80, 1))
    with pytest.raises(ValueError, match=r"op is 'opp', which has no file .*opp\.json; ops with one: op"):
        launch_parameters("opp", 80)


GOOD = entry(80, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capability": "80"}, r"entries\[1\]: capability is '80'; it must be a number such as 90"),
        ({"capability": 8}, r"entries\[1\]: capability is 8; "),
        ({"gpu": 5}, r"entries\[1\]: gpu is 5; it must be a device name or null"),
        ({"when": []}, r"entries\[1\]: when is \[\]; it must be an object"),
        (
            {"when": {"heads": [8, 1]}},
            r"when.heads is \[8, 1\]; it must be a number, a word or \[lowest, high",
        ),
        ({"when": {"heads": True}}, r"when.heads is True; "),
        ({"when": {"heads": 1.5}}, r"when.heads is 1.5; "),
        ({"parameters": {}}, r"entries\[1\]: parameters is empty; it must have at least one"),
        ({"parameters": {"block": "64"}}, r"parameters.block is '64'; it must be a number of at least 0"),
        ({"parameters": {"block": -1}}, r"parameters.block is -1; "),
        ({"provenance": ""}, r"provenance is ''; it must be a sentence such as 'default, not measured', or"),
        ({"provenance": {"gpu": "x", "date": "x"}}, r"provenance has no triton, command, median_us"),
        (
            {"provenance": MEASURED | {"date": "23.11."}},
            r"provenance.date is '23.11.'; it must be like 2026-",
        ),
        ({"note": "x"}, r"must have exactly capability, .*provenance; missing or unknown: \['note'\]"),
    ],
)
def test_a_malformed_entry_is_named(write, change, message):
    write(GOOD, GOOD | change)
    with pytest.raises(ValueError, match=r"op\.json, entries\[1\].*" + message.removeprefix(r"entries\[1\]")):
        block(80)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"op\.json is not JSON: "),
        ("[]", "must be an object with the one field 'entries'"),
        ('{"entries": [], "x": 1}', "must be an object with the one field 'entries'"),
        ('{"entries": []}', r"entries is \[\]; it must be a list of at least one entry"),
        ('{"entries": [5]}', r"entries\[0\] is 5; it must be an object with capability, gpu, when"),
    ],
)
def test_a_malformed_file_is_named(write, text, message):
    write(text=text)
    with pytest.raises(ValueError, match=message):
        block(80)


def test_an_entry_without_a_field(write):
    lacking = copy.deepcopy(GOOD)
    del lacking["provenance"]
    write(lacking)
    with pytest.raises(ValueError, match=r"missing or unknown: \['provenance'\]"):
        block(80)


# kernels written for one chip, which nothing launches on another
ONE_CHIP = {("mla_decode", "hopper"): 90, ("mla_decode", "turing"): 75}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_ends_in_entries_for_every_chip(path):
    entries = read_entries(path)
    for chip in CHIPS:
        kernels = {entry.when.get("kernel") for entry in entries}
        kernels -= {kernel for (op, kernel), only in ONE_CHIP.items() if op == path.stem and only != chip}
        last_resorts = [
            entry.when.get("kernel")
            for entry in entries
            if entry.capability == chip and entry.gpu is None and not set(entry.when) - {"kernel"}
        ]
        missing = kernels - set(last_resorts) - {None} if None not in last_resorts else set()
        assert last_resorts and not missing, f"{path.name}: sm{chip} has no entry for any shape of {missing}"
