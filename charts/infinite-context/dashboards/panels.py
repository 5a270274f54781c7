"""What all dashboards share: variables, panels with one way to look, and their order on the page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from grafana_foundation_sdk.builders import common, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.common import (
    HeatmapCellLayout,
    LegendDisplayMode,
    LegendPlacement,
    ScaleDistribution,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")

# what selects the serving pods of the chosen release, and the GPUs that its pods use
TARGET = 'namespace="$namespace", job="$job"'
MODEL = f'{TARGET}, model_name=~"$model"'
GPU = 'exported_namespace="$namespace", exported_pod=~"$job-.+"'

Query = tuple[str, str]


def dashboard(uid: str, title: str, description: str) -> builders.Dashboard:
    """An empty dashboard with the choice of a Prometheus.

    Args:
        uid: its address in Grafana; links to it stay when the title changes.
        title: shown name.
        description: one sentence.
    """
    return (
        builders.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["infinite-context"])
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(builders.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )


def variable(name: str, label: str, query: str, *, several: bool = False) -> builders.QueryVariable:
    """A choice among the values that a query gives, read again whenever the time range changes."""
    choice = (
        builders.QueryVariable(name)
        .label(label)
        .query(query)
        .datasource(SOURCE)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
    )
    return choice.multi(True).include_all(True).all_value(".*") if several else choice


def release_variables(metric: str) -> list[builders.QueryVariable]:
    """Namespace, release and model, among those that report a metric of vLLM."""
    return [
        variable("namespace", "Namespace", f"label_values({metric}, namespace)"),
        variable("job", "Release", f'label_values({metric}{{namespace="$namespace"}}, job)'),
        variable("model", "Model", f"label_values({metric}{{{TARGET}}}, model_name)", several=True),
    ]


def _target(expr: str, legend: str, letter: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expr).legend_format(legend).ref_id(letter).datasource(SOURCE)


def graph(title: str, description: str, unit: str, *queries: Query, width: int = 12, **bounds: float) -> Any:
    """Lines over time.

    Args:
        title: says what is shown.
        description: says how to read it.
        unit: Grafana's id of the unit.
        queries: pairs of PromQL and legend.
        width: of the page's 24 columns.
        bounds: `min` and `max` of the axis.
    """
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.TABLE).placement(LegendPlacement.BOTTOM)
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .span(width)
        .height(8)
        .min(bounds.get("min", 0))
        .fill_opacity(10)
        .legend(legend.show_legend(True).calcs(["lastNotNull", "max"]))
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    if "max" in bounds:
        panel.max(bounds["max"])
    for index, (expr, text) in enumerate(queries):
        panel.with_target(_target(expr, text, chr(ord("A") + index)))
    return panel


def number(title: str, description: str, unit: str, expr: str, *, alarm: float | None = None) -> Any:
    """The latest value in large, red from a bound on."""
    steps = [models.Threshold(value=None, color="green")]
    if alarm is not None:
        steps.append(models.Threshold(value=alarm, color="red"))
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .span(4)
        .height(4)
        .thresholds(builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
        .with_target(_target(expr, "", "A").instant())
    )


def histogram_over_time(title: str, description: str, unit: str, metric: str, selector: str) -> Any:
    """A heat map of a histogram's buckets, on a logarithmic axis."""
    expr = f"sum by (le) (increase({metric}_bucket{{{selector}}}[$__rate_interval]))"
    scale = common.ScaleDistributionConfig().type(ScaleDistribution.LOG).log(2)
    return (
        heatmap.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .span(12)
        .height(8)
        .calculate(False)
        .rows_frame(heatmap.RowsHeatmapOptions().layout(HeatmapCellLayout.LE))
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .scale_distribution(scale)
        .with_target(_target(expr, "{{le}}", "A").format(PromQueryFormat.HEATMAP))
    )


def rows_of(
    title: str, description: str, *queries: Query, transformations: Iterable[dict[str, Any]] = ()
) -> Any:
    """A table of the latest values; the second half of a query's pair is its letter."""
    panel = table.Panel().title(title).description(description).datasource(SOURCE).span(24).height(7)
    for expr, letter in queries:
        panel.with_target(_target(expr, "", letter).instant().format(PromQueryFormat.TABLE))
    for entry in transformations:
        panel.with_transformation(models.DataTransformerConfig(id_val=entry["id"], options=entry["options"]))
    return panel


def quantiles(metric: str, selector: str) -> list[Query]:
    """Median, 95th and 99th percentile of a histogram of vLLM."""
    buckets = f"sum by (le) (rate({metric}_bucket{{{selector}}}[$__rate_interval]))"
    return [(f"histogram_quantile({share}, {buckets})", f"p{share * 100:g}") for share in (0.5, 0.95, 0.99)]


def add(board: builders.Dashboard, *, variables: Iterable[Any], panels: Iterable[Any]) -> builders.Dashboard:
    """The dashboard with its variables, panels and rows, in this order."""
    for choice in variables:
        board.with_variable(choice)
    for number_of_panel, panel in enumerate(panels, start=1):
        # links to a single panel name its id
        panel.id(number_of_panel)
        board.with_row(panel) if isinstance(panel, builders.Row) else board.with_panel(panel)
    return board
