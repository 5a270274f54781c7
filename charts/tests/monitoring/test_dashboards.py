"""Dashboards: made by their code, of the types of the pinned Grafana, and rendered whole. No Grafana is run."""

import enum
import inspect
import json
import subprocess
import sys
import typing
from importlib.metadata import version

import chart_tools
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models

BUILD = chart_tools.ROOT / "charts" / "infinite-context" / "dashboards" / "build.py"
GRAFANA = "11.6.0"


@pytest.fixture(scope="module")
def boards(monitored):
    found = {}
    for item in chart_tools.of_kind(monitored(), "ConfigMap"):
        if item["metadata"]["labels"].get("grafana_dashboard") == "1":
            ((name, text),) = item["data"].items()
            found[name] = json.loads(text)
    return found


def panels_of(board):
    for panel in board["panels"]:
        yield from panel.get("panels") or []
        yield panel


def problems(value, declared, where):
    """Where a value, as the SDK's classes read it, is not of its declared type."""
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if declared in (typing.Any, object) or (value is None and type(None) in arguments):
        return []
    if origin is typing.Union:
        options = [option for option in arguments if option is not type(None)]
        own = [option for option in options if inspect.isclass(option) and isinstance(value, option)]
        return min((problems(value, option, where) for option in own or options), key=len)
    if origin is typing.Literal:
        return [] if value in arguments else [f"{where} is {value!r}, not one of {arguments}"]
    if origin in (list, dict):
        if not isinstance(value, origin):
            return [f"{where} is no {origin.__name__}"]
        items = enumerate(value) if origin is list else value.items()
        return [text for key, item in items for text in problems(item, arguments[-1], f"{where}[{key}]")]
    return problems_of_class(value, declared, where)


def problems_of_class(value, declared, where):
    if issubclass(declared, enum.Enum):
        # read from JSON, members stay plain strings and numbers
        known = [member.value for member in declared]
        return [] if value in known else [f"{where} is {value!r}, not one of {known}"]
    if hasattr(declared, "from_json") and isinstance(value, dict):
        # the SDK leaves lists of some classes as they were in the JSON
        read = declared.from_json(value)
        lost = [] if json.loads(json.dumps(read, cls=JSONEncoder)) == value else [f"{where} has unknown keys"]
        return lost + problems(read, declared, where)
    numeric = (int, float) if declared is float else declared
    if not isinstance(value, numeric) or (isinstance(value, bool) and declared is not bool):
        return [f"{where} is {type(value).__name__}, not {declared.__name__}"]
    if not hasattr(type(value), "from_json"):
        return []
    hints = typing.get_type_hints(type(value))
    return [
        text
        for name, hint in hints.items()
        for text in problems(getattr(value, name), hint, f"{where}.{name}")
    ]


def test_the_pinned_types_are_those_of_the_grafana_that_the_docs_name():
    assert version("grafana_foundation_sdk").partition("!")[2] == GRAFANA
    text = (chart_tools.ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert f"Grafana {GRAFANA.removesuffix('.0')}" in text


def test_the_json_is_what_the_code_makes():
    done = subprocess.run(
        [sys.executable, BUILD, "--check"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_five_are_rendered_whole(boards):
    assert set(boards) == {"serving.json", "long-context.json", "gpus.json", "batch.json", "training.json"}
    for name, board in boards.items():
        assert board == json.loads((chart_tools.CHART / "files" / "grafana" / name).read_text())


def test_nothing_in_the_json_is_unknown_to_grafana_and_every_value_has_its_type(boards):
    for name, board in boards.items():
        read = models.Dashboard.from_json(board)
        # what the types do not know is lost here
        assert json.loads(json.dumps(read, cls=JSONEncoder)) == board
        assert not problems(read, models.Dashboard, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda board: board.update(panles=[]), "lost"),
        (lambda board: board.update(title=7), "title is int, not str"),
        (lambda board: board["panels"][0]["gridPos"].update(w="wide"), "w is str, not int"),
    ],
)
def test_the_check_finds_what_is_wrong(boards, change, message):
    board = json.loads(json.dumps(boards["gpus.json"]))
    change(board)
    read = models.Dashboard.from_json(board)
    if message == "lost":
        assert json.loads(json.dumps(read, cls=JSONEncoder)) != board
    else:
        assert any(message in text for text in problems(read, models.Dashboard, "gpus.json"))


def test_ids_are_unique_and_panels_do_not_overlap(boards):
    assert len({board["uid"] for board in boards.values()}) == len(boards)
    for name, board in boards.items():
        panels = list(panels_of(board))
        ids = [panel["id"] for panel in panels]
        assert len(set(ids)) == len(ids), name
        cells = set()
        for panel in panels:
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24, (name, panel["title"])
            own = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                   for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
            assert not cells & own, (name, panel["title"])
            cells |= own


def test_every_panel_says_how_to_read_it_and_asks_the_chosen_prometheus(boards):
    for name, board in boards.items():
        for panel in panels_of(board):
            if panel["type"] != "row":
                assert panel["description"], (name, panel["title"])
                for target in panel["targets"]:
                    assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_labels_for_another_sidecar(monitored):
    objects = monitored(
        set={"monitoring.dashboards.label": "dash", "monitoring.dashboards.labelValue": "yes"}
    )
    found = [
        item
        for item in chart_tools.of_kind(objects, "ConfigMap")
        if item["metadata"]["labels"].get("dash") == "yes"
    ]
    assert len(found) == 5
    assert {item["metadata"]["annotations"]["grafana_folder"] for item in found} == {"InfiniteContext"}


def test_none_without_them(monitored):
    objects = monitored(set={"monitoring.dashboards.enabled": False})
    assert not [
        item for item in chart_tools.of_kind(objects, "ConfigMap") if "dashboard" in item["metadata"]["name"]
    ]
