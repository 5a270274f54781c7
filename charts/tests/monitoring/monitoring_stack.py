"""One running stack: `vllm serve`, Prometheus and Alertmanager, which run the chart's own monitors and rules.

All of it listens on the loopback interface, and ends with the tests even when those are killed. Kubernetes is not
there: what the operator would make of a PodMonitor is made here, and files of a documented exposition stand
for the exporters other than vLLM, see exposition/README.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import chart_tools
import psutil
import yaml
from ic_model import checkpoint_path
from monitoring_programs import Programs

from demo import guard
from demo.progress import Progress
from demo.server import HOST, Server, choose_port

EXPOSITION = Path(__file__).parent / "exposition"
NAMESPACE, RELEASE, MODEL = "default", "ic-infinite-context", "ic-nano"
POD = f"{RELEASE}-5d9c7b6f4-x2x7k"
# seconds instead of minutes, so that an alert can be waited for; everything else is as the chart has it
LIVE_VALUES = {
    "model.servedName": MODEL,
    "monitoring.scrape.intervalSeconds": 1,
    "monitoring.scrape.timeoutSeconds": 1,
    "monitoring.rules.evaluationSeconds": 1,
    "monitoring.rules.rateWindow": "8s",
    "monitoring.rules.for.ICTargetDown": "5s",
    "monitoring.rules.for.ICEngineStuck": "2s",
    "monitoring.rules.for.ICEngineSilent": "1s",
}
# `honor_labels` as each exporter's own chart has it; without it, Prometheus renames what it says of targets too
EXPORTERS = {
    "dcgm-exporter": {"honor": False, "labels": {"namespace": "gpu-operator", "pod": "dcgm-exporter-8x5mv"}},
    "node-exporter": {"honor": False, "labels": {"namespace": "monitoring", "pod": "node-exporter-2kq9d"}},
    "kube-state-metrics": {
        "honor": True,
        "labels": {"namespace": "monitoring", "pod": "kube-state-metrics-0"},
    },
    "kubelet": {"honor": True, "labels": {"node": "gpu-1"}},
    "traefik": {"honor": False, "labels": {"namespace": "kube-system", "pod": "traefik-6c8d5"}},
    "cert-manager": {"honor": False, "labels": {"namespace": "cert-manager", "pod": "cert-manager-5f8"}},
}
START_TIMEOUT_S = 300


def operators_scrape_config(monitor: dict[str, Any], *, address: str, pod: str) -> dict[str, Any]:
    """The part of Prometheus' configuration that the operator makes of a PodMonitor, with one pod found."""
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    name = f"podMonitor/{NAMESPACE}/{monitor['metadata']['name']}/0"
    found = {
        "__meta_kubernetes_namespace": NAMESPACE,
        "__meta_kubernetes_pod_name": pod,
        "__meta_kubernetes_pod_container_name": "vllm",
    }
    own = [
        {"source_labels": ["__meta_kubernetes_namespace"], "target_label": "namespace"},
        {"source_labels": ["__meta_kubernetes_pod_container_name"], "target_label": "container"},
        {"source_labels": ["__meta_kubernetes_pod_name"], "target_label": "pod"},
        {"target_label": "job", "replacement": f"{NAMESPACE}/{monitor['metadata']['name']}"},
        {"target_label": "endpoint", "replacement": endpoint["port"]},
    ]
    return {
        "job_name": name,
        "metrics_path": endpoint["path"],
        "scrape_interval": endpoint["interval"],
        "scrape_timeout": endpoint["scrapeTimeout"],
        "static_configs": [{"targets": [address], "labels": found}],
        "relabel_configs": own + [_snake(rule) for rule in endpoint["relabelings"]],
        "metric_relabel_configs": [_snake(rule) for rule in endpoint["metricRelabelings"]],
    }


def _snake(rule: dict[str, Any]) -> dict[str, Any]:
    names = {"sourceLabels": "source_labels", "targetLabel": "target_label"}
    return {names.get(key, key): value for key, value in rule.items()}


class _Files(BaseHTTPRequestHandler):
    """Serves exposition/NAME.prom at /NAME, and takes Alertmanager's messages."""

    def do_GET(self) -> None:
        body = (EXPOSITION / f"{self.path.strip('/')}.prom").read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.alerts.extend(message["alerts"])
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        """Silent."""


class Stack:
    """The running parts, as a context manager.

    Args:
        programs: Prometheus and Alertmanager.
        objects: of the chart, rendered with LIVE_VALUES.
        folder: for configuration, data and logs.
    """

    def __init__(self, programs: Programs, objects: list[dict[str, Any]], folder: Path) -> None:
        self.programs = programs
        self.objects = objects
        self.folder = folder
        self.vllm_port = choose_port(0)
        self.prometheus_url = f"http://{HOST}:{choose_port(0)}"
        self.alertmanager_url = f"http://{HOST}:{choose_port(0)}"
        self.vllm: Server | None = None
        self.started = time.time()
        self._parts = contextlib.ExitStack()

    def __enter__(self) -> Stack:
        with contextlib.ExitStack() as parts:
            # what vLLM takes for its cache by itself is most of the machine
            own = {"VLLM_CPU_KVCACHE_SPACE": "1", "TMPDIR": str(self.folder)}
            parts.callback(_restore, {name: os.environ.get(name) for name in own})
            # a server that is killed leaves its sockets behind: not in everybody's /tmp
            os.environ.update(own)
            self.http = ThreadingHTTPServer((HOST, 0), _Files)
            self.http.alerts = []
            parts.callback(self.http.server_close)
            parts.callback(self.http.shutdown)
            threading.Thread(target=self.http.serve_forever, daemon=True).start()
            self._write_configuration()
            parts.callback(self._stop_vllm)
            self.start_vllm(wait=False)
            self._spawn(parts, "alertmanager", self._alertmanager_command())
            self._spawn(parts, "prometheus", self._prometheus_command())
            self.wait_for(lambda: self._answers(f"{self.prometheus_url}/-/ready"), "Prometheus", 60)
            self.wait_for(lambda: self._answers(f"{self.alertmanager_url}/-/ready"), "Alertmanager", 60)
            self.vllm.wait_until_healthy(START_TIMEOUT_S, Progress(sys.stderr))
            self._parts = parts.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._parts.close()

    def start_vllm(self, *, wait: bool = True) -> None:
        """A new `vllm serve` at the same address; two requests run at a time, others wait."""
        self._stop_vllm()
        server = Server(checkpoint_path(MODEL), port=self.vllm_port)
        server.command += ["--served-model-name", MODEL, "--max-num-seqs", "2", "--max-model-len", "65536"]
        # steps far shorter than rateWindow, also on a machine that does several other things
        server.command += ["--max-num-batched-tokens", "128"]
        self.vllm = server.__enter__()
        if wait:
            server.wait_until_healthy(START_TIMEOUT_S, Progress(sys.stderr))

    def _stop_vllm(self) -> None:
        if self.vllm is not None:
            self.vllm.__exit__(None, None, None)
            self.vllm = None

    def processes(self) -> list[psutil.Process]:
        """Everything that runs under the server's guard."""
        return psutil.Process(self.vllm._process.pid).children(recursive=True)

    def engine(self) -> psutil.Process:
        """The process of the engine, which is not the API server's."""
        (engine,) = [process for process in self.processes() if "EngineCore" in " ".join(process.cmdline())]
        return engine

    def kill_vllm(self) -> None:
        """As the kernel does when memory runs out."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def complete(self, *, prompt: str = "hello there", tokens: int = 20, timeout_s: float = 120) -> int:
        """Status of a completion; 0 when the client gave up."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        request = urllib.request.Request(
            f"{self.vllm.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                answer.read()
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def complete_many(self, count: int, **options: Any) -> list[int]:
        """Completions at once."""
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(lambda _: self.complete(**options), range(count)))

    def exposition(self) -> str:
        """vLLM's /metrics."""
        with urllib.request.urlopen(f"{self.vllm.url}/metrics", timeout=10) as answer:
            return answer.read().decode()

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Instant query: the elements of the answer."""
        return self._api("query", query=expr)["result"]

    def query_range(
        self, expr: str, *, since: float | None = None, step_s: float = 1
    ) -> list[dict[str, Any]]:
        """Range query from a time (by default the stack's start) until now."""
        return self._api(
            "query_range", query=expr, start=since or self.started, end=time.time(), step=step_s
        )["result"]

    def series(self, selector: str) -> list[dict[str, str]]:
        """Label sets of a selector."""
        return self._api("series", **{"match[]": selector, "start": self.started})

    def alerts(self, name: str, status: str) -> list[dict[str, Any]]:
        """What Alertmanager has sent of an alert: status `firing` or `resolved`."""
        return [
            item
            for item in self.http.alerts
            if (item["labels"]["alertname"], item["status"]) == (name, status)
        ]

    def wait_for(self, condition: Callable[[], Any], what: str, timeout_s: float) -> Any:
        """The condition's first true value.

        Raises:
            AssertionError: it has none in time; the message ends with the logs of Prometheus and Alertmanager.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if value := condition():
                return value
            time.sleep(0.2)
        logs = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in self.folder.glob("*.log"))
        raise AssertionError(f"{what}: not within {timeout_s} s\n{logs}")

    def _api(self, path: str, **parameters: Any) -> Any:
        url = f"{self.prometheus_url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def _answers(self, url: str) -> bool:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def _write_configuration(self) -> None:
        monitors = chart_tools.of_kind(self.objects, "PodMonitor")
        address = f"{HOST}:{self.vllm_port}"
        scrapes = [
            # one server stands for both: a batch's engine exposes the same metrics
            operators_scrape_config(
                monitor,
                address=address,
                pod=f"{RELEASE}-batch-1-q7fzl" if monitor["metadata"]["name"].endswith("-batch") else POD,
            )
            for monitor in monitors
        ]
        for name, about in EXPORTERS.items():
            target = {"targets": [f"{HOST}:{self.http.server_port}"], "labels": about["labels"]}
            scrape = {"job_name": name, "metrics_path": f"/{name}", "honor_labels": about["honor"]}
            scrapes.append(
                {**scrape, "scrape_interval": "1s", "scrape_timeout": "1s", "static_configs": [target]}
            )
        rules = chart_tools.one(self.objects, "PrometheusRule")["spec"]
        configuration = {
            "rule_files": ["rules.yaml"],
            "scrape_configs": scrapes,
            "alerting": {
                "alertmanagers": [
                    {"static_configs": [{"targets": [self.alertmanager_url.removeprefix("http://")]}]}
                ]
            },
        }
        hook = {"url": f"http://{HOST}:{self.http.server_port}/hook", "send_resolved": True}
        route = {"receiver": "hook", "group_by": ["..."], "group_wait": "0s", "group_interval": "1s"}
        receivers = {"route": route, "receivers": [{"name": "hook", "webhook_configs": [hook]}]}
        for file, content in (("rules", rules), ("prometheus", configuration), ("alertmanager", receivers)):
            (self.folder / f"{file}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")

    def _prometheus_command(self) -> list[str]:
        return [
            str(self.programs.prometheus),
            f"--config.file={self.folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={self.folder / 'prometheus'}",
            f"--web.listen-address={self.prometheus_url.removeprefix('http://')}",
        ]

    def _alertmanager_command(self) -> list[str]:
        return [
            str(self.programs.alertmanager),
            f"--config.file={self.folder / 'alertmanager.yaml'}",
            f"--storage.path={self.folder / 'alertmanager'}",
            f"--web.listen-address={self.alertmanager_url.removeprefix('http://')}",
            # no cluster: its port would be open to all
            "--cluster.listen-address=",
        ]

    def _spawn(self, parts: contextlib.ExitStack, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, guard.__file__, "5", *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        parts.callback(process.wait, 20)
        parts.callback(process.stdin.close)


def _restore(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
