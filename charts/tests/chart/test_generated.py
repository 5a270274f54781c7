"""Schema, README and sizing table are what the generator makes of their sources; the generator refuses gaps."""

import re

import generate
import jsonschema
import kubernetes_validate
import pytest
import yaml
from chart_tools import CHART, ROOT


def test_generated_files_are_up_to_date():
    stale = [
        path.name for path, text in generate.generate().items() if path.read_text(encoding="utf-8") != text
    ]
    assert not stale, "run python charts/tools/generate.py"


def test_the_schema_is_strict_and_accepts_the_defaults():
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    schema = generate.schema_of(generate.read_keys((CHART / "values.yaml").read_text(encoding="utf-8")))
    jsonschema.validate(values, schema)
    jsonschema.Draft7Validator.check_schema(schema)
    loose = [
        path
        for path, node in objects_of(schema)
        if "additionalProperties" not in node and path[-1] != "global"
    ]
    assert all("items" in path for path in loose), loose


def objects_of(node, path=()):
    """Every schema of an object, with where it is."""
    if isinstance(node, dict):
        if node.get("type") == "object":
            yield path, node
        for key, value in node.items():
            yield from objects_of(value, (*path, key))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\n", "a has no `# -- description`"),
        ("# -- x\na:\n", "a is null"),
        ("# -- x\na: {}\n", "a is {}"),
        ("# -- x\na: []\n", r"a is \[\]"),
        ("# -- x\n# @schema {nonsense\na: 1\n", "@schema of a is not JSON"),
    ],
)
def test_what_is_not_described_is_refused(text, message):
    with pytest.raises(generate.AnnotationError, match=message):
        generate.schema_of(generate.read_keys(text))


def names_of(values, path=()):
    """Dotted names of all keys."""
    for key, value in values.items():
        yield ".".join((*path, key))
        if isinstance(value, dict):
            yield from names_of(value, (*path, key))


@pytest.mark.parametrize("file", ["docs/deploy.md", "docs/monitoring.md", "docs/runbooks/alerts.md"])
def test_the_values_that_the_documents_name_are_there(file):
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    text = (ROOT / file).read_text(encoding="utf-8")
    sections = "|".join(key for key, value in values.items() if isinstance(value, dict))
    # in backquotes, or behind --set
    named = set(re.findall(rf"[`, ]((?:{sections})\.[A-Za-z.]*[A-Za-z])[`=]", text))
    assert len(named) > 2 and named <= set(names_of(values)), named - set(names_of(values))


def test_the_objects_in_the_deploy_page_are_kubernetes():
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    (manifest,) = re.findall(r"<<'EOF'\n(.+?)\nEOF", text, re.DOTALL)
    pod = yaml.safe_load(manifest)
    kubernetes_validate.validate(pod, "1.37", strict=True)
    assert (
        pod["spec"]["securityContext"]["runAsUser"]
        == yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))["runAs"]["user"]
    )
