"""Dashboard: the GPUs, whoever uses them, by dcgm-exporter's default counters."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard
from panels import add, dashboard, graph, number, variable

SELECTOR = 'Hostname=~"$node", gpu=~"$gpu"'
LEGEND = "{{Hostname}} GPU {{gpu}}"


def build() -> Dashboard:
    """Use, memory, power, temperature and errors by GPU."""
    board = dashboard("ic-gpus", "InfiniteContext / GPUs", "Use, memory, power, temperature and errors.")
    variables = [
        variable("node", "Node", "label_values(DCGM_FI_DEV_GPU_TEMP, Hostname)", several=True),
        variable("gpu", "GPU", 'label_values(DCGM_FI_DEV_GPU_TEMP{Hostname=~"$node"}, gpu)', several=True),
    ]
    used = f"DCGM_FI_DEV_FB_USED{{{SELECTOR}}}"
    free = f"DCGM_FI_DEV_FB_FREE{{{SELECTOR}}}"
    panels = [
        number("GPUs", "That report.", "short", f"count(DCGM_FI_DEV_GPU_TEMP{{{SELECTOR}}})"),
        number("Power", "All of them.", "watt", f"sum(DCGM_FI_DEV_POWER_USAGE{{{SELECTOR}}})"),
        number("Hottest", "Of them.", "celsius", f"max(DCGM_FI_DEV_GPU_TEMP{{{SELECTOR}}})", alarm=85),
        number("Memory", "Fullest.", "percentunit", f"max({used} / ({used} + {free}))", alarm=0.98),
        number("Last Xid", "0: none.", "none", f"max(DCGM_FI_DEV_XID_ERRORS{{{SELECTOR}}})", alarm=1),
        number(
            "Energy",
            "Of the last 24 hours.",
            "joule",
            f"sum(increase(DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{{{SELECTOR}}}[1d])) / 1000",
        ),
        graph(
            "Use",
            "Share of time in which some kernel ran: it says little of how well.",
            "percent",
            (f"DCGM_FI_DEV_GPU_UTIL{{{SELECTOR}}}", LEGEND),
            max=100,
        ),
        graph("Memory in use", "MiB. vLLM takes its share at start and keeps it.", "mbytes", (used, LEGEND)),
        graph("Power", "Watts.", "watt", (f"DCGM_FI_DEV_POWER_USAGE{{{SELECTOR}}}", LEGEND)),
        graph(
            "Temperature",
            "Of chip and memory.",
            "celsius",
            (f"DCGM_FI_DEV_GPU_TEMP{{{SELECTOR}}}", LEGEND),
            (f"DCGM_FI_DEV_MEMORY_TEMP{{{SELECTOR}}}", f"{LEGEND} memory"),
        ),
        graph(
            "Clock",
            "Falling under load means heat or a limit of power.",
            "rotmhz",
            (f"DCGM_FI_DEV_SM_CLOCK{{{SELECTOR}}}", LEGEND),
        ),
        graph(
            "Errors",
            "Code of the last Xid, and PCIe replays.",
            "none",
            (f"DCGM_FI_DEV_XID_ERRORS{{{SELECTOR}}}", f"{LEGEND} Xid"),
            (
                f"increase(DCGM_FI_DEV_PCIE_REPLAY_COUNTER{{{SELECTOR}}}[$__rate_interval])",
                f"{LEGEND} replays",
            ),
        ),
    ]
    return add(board, variables=variables, panels=panels)
