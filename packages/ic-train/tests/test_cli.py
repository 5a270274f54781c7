"""The `ic-train` command: what it lists, and that a command does not wait for what others need."""

import re
import subprocess
import sys

import pytest

from ic_train import cli


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name in (
        "convert",
        "convert-table",
        "data",
        "evaluate passkey",
        "evaluate pipeline",
        "judge calibrate",
    ):
        assert re.search(rf"\n    {name}\s", shown)


def test_what_is_no_command_is_refused_with_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["convrt"])
    assert ended.value.code == 2
    assert "invalid choice: 'convrt'" in capsys.readouterr().err


def test_conversion_starts_without_clients_and_trackers() -> None:
    program = (
        "import sys; from ic_train import cli\n"
        "try: cli.main(['convert-table', '--help'])\n"
        "except SystemExit: pass\n"
        "others = ('openai', 'ic_train.judge', 'ic_train.tracking')\n"
        "print('loaded:', [name for name in others if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown.endswith("loaded: []\n"), shown[-200:]
