"""The tools of the tests themselves."""

import subprocess

import chart_tools
import pytest


def test_both_helms_and_kubectl_run(helm: chart_tools.Tools):
    assert chart_tools.run_helm("version", "--short").startswith("v4.")
    assert chart_tools.run_helm("version", "--short", package=chart_tools.HELM3).startswith("v3.")
    version = subprocess.run(
        [helm.kubectl, "version", "--client"], capture_output=True, text=True, check=True
    )
    assert "v1.37" in version.stdout


def test_what_helm_refuses_is_an_error_with_its_words(helm):
    with pytest.raises(chart_tools.HelmError, match="unknown"):
        chart_tools.run_helm("no-such-command")
