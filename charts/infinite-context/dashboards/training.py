"""Dashboard: the machines under a training run. Loss, tokens per second and MFU are in the run's tracker."""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.builders.dashboard import Dashboard
from panels import add, dashboard, graph, number, variable

GPU = 'Hostname=~"$node"'
LEGEND = "{{Hostname}} GPU {{gpu}}"
# virtual interfaces carry the same bytes again
NETWORK = 'instance=~"$instance", device!~"lo|veth.*|cni.*|flannel.*|docker.*"'


def build() -> Dashboard:
    """GPUs, links, disks and memory of the nodes of a run."""
    board = dashboard(
        "ic-training",
        "InfiniteContext / Training",
        "Machines of a training run. Loss, tokens per second and MFU are in its tracker (W&B, MLflow).",
    )
    variables = [
        variable("node", "Node (DCGM)", "label_values(DCGM_FI_DEV_GPU_TEMP, Hostname)", several=True),
        variable("instance", "Node (node-exporter)", "label_values(node_uname_info, instance)", several=True),
    ]
    panels = [*_numbers(), *_gpus(), *_machines()]
    return add(board, variables=variables, panels=panels)


def _numbers() -> list[Any]:
    return [
        number("GPUs", "That report.", "short", f"count(DCGM_FI_DEV_GPU_TEMP{{{GPU}}})"),
        number(
            "Idle GPUs",
            "Below 5 % use: a rank that waits for the others, or for data.",
            "short",
            f"count(DCGM_FI_DEV_GPU_UTIL{{{GPU}}} < 5) or vector(0)",
            alarm=1,
        ),
        number("Power", "All of them.", "watt", f"sum(DCGM_FI_DEV_POWER_USAGE{{{GPU}}})"),
        number("Last Xid", "0: none.", "none", f"max(DCGM_FI_DEV_XID_ERRORS{{{GPU}}})", alarm=1),
        number(
            "Fullest GPU",
            "Memory.",
            "percentunit",
            f"max(DCGM_FI_DEV_FB_USED{{{GPU}}} / (DCGM_FI_DEV_FB_USED{{{GPU}}} + DCGM_FI_DEV_FB_FREE{{{GPU}}}))",
        ),
        number(
            "Free disk",
            "Fullest file system.",
            "percentunit",
            'min(node_filesystem_avail_bytes{instance=~"$instance", fstype!~"tmpfs|ramfs|overlay|squashfs"}'
            ' / node_filesystem_size_bytes{instance=~"$instance", fstype!~"tmpfs|ramfs|overlay|squashfs"})',
        ),
    ]


def _gpus() -> list[Any]:
    return [
        graph(
            "Use",
            "Steps show as teeth: gaps are data, checkpoints or a slow rank.",
            "percent",
            (f"DCGM_FI_DEV_GPU_UTIL{{{GPU}}}", LEGEND),
            max=100,
        ),
        graph(
            "Power",
            "The better measure of work: near the limit under dense matrix products.",
            "watt",
            (f"DCGM_FI_DEV_POWER_USAGE{{{GPU}}}", LEGEND),
        ),
        graph("Memory in use", "MiB.", "mbytes", (f"DCGM_FI_DEV_FB_USED{{{GPU}}}", LEGEND)),
        graph(
            "NVLink",
            "Traffic of all lanes, as dcgm-exporter counts it.",
            "short",
            (f"rate(DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL{{{GPU}}}[$__rate_interval])", LEGEND),
        ),
    ]


def _machines() -> list[Any]:
    disk = 'instance=~"$instance", device!~"loop.*|ram.*"'
    idle = 'instance=~"$instance", mode="idle"'
    return [
        graph(
            "Network",
            "Bytes per second.",
            "Bps",
            (
                f"rate(node_network_receive_bytes_total{{{NETWORK}}}[$__rate_interval])",
                "{{instance}} {{device}} in",
            ),
            (
                f"rate(node_network_transmit_bytes_total{{{NETWORK}}}[$__rate_interval])",
                "{{instance}} {{device}} out",
            ),
        ),
        graph(
            "Disks",
            "Bytes per second: data and checkpoints.",
            "Bps",
            (f"rate(node_disk_read_bytes_total{{{disk}}}[$__rate_interval])", "{{instance}} {{device}} read"),
            (
                f"rate(node_disk_written_bytes_total{{{disk}}}[$__rate_interval])",
                "{{instance}} {{device}} written",
            ),
        ),
        graph(
            "Memory",
            "Still available.",
            "bytes",
            ('node_memory_MemAvailable_bytes{instance=~"$instance"}', "{{instance}}"),
        ),
        graph(
            "CPU",
            "Share in use: loaders of data.",
            "percentunit",
            (
                f"1 - avg by (instance) (rate(node_cpu_seconds_total{{{idle}}}[$__rate_interval]))",
                "{{instance}}",
            ),
            max=1,
        ),
    ]
