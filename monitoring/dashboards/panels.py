"""Boards in Grafana's terms, by grafana-foundation-sdk."""

from __future__ import annotations

from collections.abc import Sequence

from grafana_foundation_sdk.builders import bargauge, common, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import prometheus as prometheus_models

from monitoring.dashboards.board import Board, Panel, Query, Steps, Variable

__all__ = ["build_dashboard"]

_DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
_TAG = "moonshard"
_GREEN: Steps = ((None, "green"),)
_HIDDEN_COLUMNS = ("Time", "__name__", "instance", "job")
_PanelBuilder = timeseries.Panel | stat.Panel | table.Panel | bargauge.Panel


def build_dashboard(board: Board) -> models.Dashboard:
    """The dashboard, its panels numbered in order from 1."""
    builder = (
        grafana.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags([_TAG])
        .editable()
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("30s")
        .link(_link_to_the_others())
        .with_variable(
            grafana.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
    )
    for variable in board.variables:
        builder.with_variable(_variable(variable))
    number = 0
    for row in board.rows:
        number += 1
        builder.with_row(grafana.Row(row.title).id(number))
        for panel in row.panels:
            number += 1
            builder.with_panel(_panel(panel).id(number))
    return builder.build()


def _link_to_the_others() -> grafana.DashboardLink:
    return (
        grafana.DashboardLink("Moonshard")
        .type(models.DashboardLinkType.DASHBOARDS)
        .tags([_TAG])
        .as_dropdown(True)
        .include_vars(True)
        .keep_time(True)
    )


def _variable(variable: Variable) -> grafana.QueryVariable:
    everything = models.VariableOption(selected=True, text=["All"], value=["$__all"])
    return (
        grafana.QueryVariable(variable.name)
        .label(variable.name.capitalize())
        .query(f"label_values({variable.metric}, {variable.name})")
        .datasource(_DATASOURCE)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(everything)
    )


def _panel(panel: Panel) -> _PanelBuilder:
    builder: _PanelBuilder
    match panel.kind:
        case "timeseries":
            builder = _time_series(panel)
        case "stat":
            builder = (
                stat.Panel()
                .color_mode(common_models.BigValueColorMode.VALUE)
                .graph_mode(common_models.BigValueGraphMode.NONE)
                .reduce_options(_last())
                .thresholds(_thresholds(panel.steps or _GREEN))
            )
        case "bargauge":
            builder = (
                bargauge.Panel()
                .orientation(common_models.VizOrientation.HORIZONTAL)
                .display_mode(common_models.BarGaugeDisplayMode.BASIC)
                .reduce_options(_last())
                .thresholds(_thresholds(panel.steps or _GREEN))
                .min(0)
            )
        case "table":
            builder = _table(panel)
    if panel.max is not None:
        builder.max(panel.max)
    for index, query in enumerate(panel.queries):
        builder.with_target(_target(panel, query, chr(ord("A") + index)))
    return (
        builder.title(panel.title)
        .description(panel.description)
        .datasource(_DATASOURCE)
        .unit(panel.unit)
        .height(panel.height)
        .span(panel.width)
    )


def _time_series(panel: Panel) -> timeseries.Panel:
    builder = (
        timeseries.Panel()
        .min(0)
        .line_width(1)
        .fill_opacity(25 if panel.is_stacked else 8)
        .show_points(common_models.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(common_models.TooltipDisplayMode.MULTI)
            .sort(common_models.SortOrder.DESCENDING)
        )
    )
    if panel.is_stacked:
        builder.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))
    if panel.steps:
        builder.thresholds(_thresholds(panel.steps)).thresholds_style(
            common.GraphThresholdsStyleConfig().mode(common_models.GraphThresholdsStyleMode.LINE)
        )
    return builder


def _table(panel: Panel) -> table.Panel:
    """One row for every set of labels, one column for every query."""
    builder = table.Panel().filterable(True)
    if len(panel.queries) > 1:
        builder.with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
    names = _column_names(panel.queries)
    builder.with_transformation(
        models.DataTransformerConfig(
            id_val="organize",
            options={
                "excludeByName": dict.fromkeys(_HIDDEN_COLUMNS, True),
                "renameByName": names,
                "indexByName": {},
            },
        )
    )
    if panel.steps:
        builder.thresholds(_thresholds(panel.steps))
        coloured = models.DynamicConfigValue("custom.cellOptions", {"type": "color-text"})
        builder.with_override(_column(panel.queries[-1].legend), [coloured])
    if panel.sort_by:
        builder.sort_by(
            [common.TableSortByFieldState().display_name(panel.sort_by).desc(True)],
        )
    return builder


def _column(name: str) -> models.MatcherConfig:
    # Not `byName`, whose option is a string: Grafana's schema takes objects only.
    return models.MatcherConfig("byNames", {"mode": "include", "names": [name]})


def _column_names(queries: Sequence[Query]) -> dict[str, str]:
    """Grafana calls the column of query A "Value" alone, else "Value #A", "Value #B", …"""
    if len(queries) == 1:
        return {"Value": queries[0].legend}
    return {f"Value #{chr(ord('A') + i)}": query.legend for i, query in enumerate(queries)}


def _target(panel: Panel, query: Query, ref_id: str) -> prometheus.Dataquery:
    target = (
        prometheus.Dataquery()
        .expr(query.expr)
        .ref_id(ref_id)
        .datasource(_DATASOURCE)
        .editor_mode(prometheus_models.QueryEditorMode.CODE)
    )
    if panel.kind == "table":
        return target.instant().format(prometheus_models.PromQueryFormat.TABLE)
    target.legend_format(query.legend)
    return target.range() if panel.kind == "timeseries" else target.instant()


def _last() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"]).values(False)


def _thresholds(steps: Steps) -> grafana.ThresholdsConfig:
    return (
        grafana.ThresholdsConfig()
        .mode(models.ThresholdsMode.ABSOLUTE)
        .steps([models.Threshold(value=value, color=color) for value, color in steps])
    )
