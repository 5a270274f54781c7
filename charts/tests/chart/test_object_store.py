"""Batches in an object store: the rendered commands with the real rclone, on a remote that is a folder."""

import shutil
import signal
import subprocess
import time

import pytest
from chart_tools import CHART, one, render
from podman_tools import install_packages

SHELLS = ("dash", "bash", "busybox")


@pytest.fixture(scope="module")
def rclone():
    install_packages({"/usr/bin/rclone": "rclone", "/usr/bin/busybox": "busybox"})
    return "/usr/bin/rclone"


@pytest.fixture
def store(tmp_path):
    """A remote `store:` whose files are a folder, as rclone.conf of the Secret would define it."""
    bucket = tmp_path / "bucket"
    (bucket / "in").mkdir(parents=True)
    (tmp_path / "rclone.conf").write_text(f"[store]\ntype = alias\nremote = {bucket}\n")
    (tmp_path / "data").mkdir()
    return tmp_path


def containers():
    cron = one(render(["batch-only"], set={"batch.objectStore.remote": "store:"}), "CronJob")
    spec = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    return {item["name"]: item for item in spec["initContainers"]}


def command(name, store, shell="dash"):
    """A container's own command, with this machine's places."""
    places = {
        "/data": str(store / "data"),
        "/scripts/store_results.sh": str(CHART / "files/store_results.sh"),
    }
    words = [places.get(word, word) for word in containers()[name]["command"]]
    shells = {"busybox": ["busybox", "sh"]}.get(shell, [shell])
    return [*shells, *words[1:]] if words[0] == "sh" else words


def environment(store):
    return {"PATH": "/usr/bin:/bin", "HOME": str(store), "RCLONE_CONFIG": str(store / "rclone.conf")}


def test_files_are_fetched_with_what_an_earlier_job_finished(store, rclone):
    del rclone
    (store / "bucket" / "in" / "a.jsonl").write_text("request\n")
    (store / "bucket" / "out").mkdir()
    (store / "bucket" / "out" / "a.jsonl").write_text("answer\n")
    subprocess.run(command("fetch-batch", store), check=True, timeout=60, env=environment(store))
    assert (store / "data" / "in" / "a.jsonl").read_text() == "request\n"
    assert (store / "data" / "out" / "a.jsonl").read_text() == "answer\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_results_are_stored_while_the_batch_runs_and_once_more_at_its_end(store, rclone, shell):
    del rclone
    assert shutil.which(shell), shell
    results = store / "data" / "out"
    results.mkdir()
    (results / "a.jsonl").write_text("one\n")
    words = command("store-results", store, shell)
    assert words[-1] == "60"
    process = subprocess.Popen(words, env=environment(store))
    stored = store / "bucket" / "out" / "a.jsonl"
    try:
        deadline = time.monotonic() + 60
        # the file is there before its content is
        while not stored.is_file() or stored.read_text() != "one\n":
            assert time.monotonic() < deadline, "nothing was stored"
            time.sleep(0.05)
        # within its sleep: only the last copy can have it
        with (results / "a.jsonl").open("a") as file:
            file.write("two\n")
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert time.monotonic() - began < 30
    finally:
        process.kill()
        process.wait(10)
    assert stored.read_text() == "one\ntwo\n"


def test_a_store_that_is_away_does_not_end_the_batch(store, rclone):
    del rclone
    (store / "data" / "out").mkdir()
    (store / "data" / "out" / "a.jsonl").write_text("one\n")
    (store / "rclone.conf").write_text("[other]\ntype = local\n")
    process = subprocess.Popen(
        command("store-results", store), env=environment(store), stderr=subprocess.PIPE, text=True
    )
    time.sleep(2)
    assert process.poll() is None
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "copy of out failed" in errors


def test_the_sidecar_ends_after_the_batch_and_the_config_is_a_secret():
    items = containers()
    assert list(items) == ["fetch-batch", "store-results"]
    assert items["store-results"]["restartPolicy"] == "Always" and "restartPolicy" not in items["fetch-batch"]
    cron = one(render(["batch-only"]), "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (volume,) = [item for item in cron["volumes"] if item["name"] == "rclone"]
    assert volume["secret"] == {"secretName": "rclone"}
    script = one(render(["batch-only"]), "ConfigMap", "ic-infinite-context-batch")["data"]["store_results.sh"]
    assert script.rstrip() == (CHART / "files" / "store_results.sh").read_text().rstrip()
