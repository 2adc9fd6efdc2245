"""Tables of a report: any figures a stage wrote, nested as they are, with values and their intervals in one cell."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_jax.evaluation.memorization import MEMORIZED_DISTANCE


@dataclass(frozen=True)
class Table:
    caption: str
    columns: list[str]
    rows: list[list[str]]
    numeric: list[bool]  # by column: aligned right


def figure_tables(figures: Mapping) -> list[Table]:
    """The tables of a stage's figures: one of all plain values, then one for each nested entry.

    A list of dicts is a table with a row for each; a dict of dicts is one with the outer key in front; another dict
    is flattened to dotted names. Where `x_low` and `x_high` accompany `x` or `x_rate` they join its cell.

    Args:
        figures: name -> number, string, list or dict, as in the `figures` of a stage's `result.json`.
    """
    plain = {name: value for name, value in figures.items() if not _is_nested(value)}
    tables = [_name_value_table("figures", plain)] if plain else []
    for name, value in figures.items():
        caption = _words(name)
        if not value or not _is_nested(value):
            continue
        if isinstance(value, list):
            tables.append(_row_table(caption, value))
        elif all(isinstance(entry, dict) and not _has_nested(entry) for entry in value.values()):
            tables.append(_row_table(caption, [{"": key} | entry for key, entry in value.items()]))
        else:
            tables.append(_name_value_table(caption, _flatten(value)))
    return tables


def time_table(results: Mapping[str, Mapping], seconds: Mapping[str, float]) -> Table:
    """Stage, kind and wall time of every stage, in the order of the run."""
    rows = [[name, result.get("kind", ""), duration(seconds[name])] for name, result in results.items()]
    return Table("stages", ["stage", "kind", "wall time"], rows, [False, False, True])


def memorization_rates(rows: list[dict]) -> Table:
    """The rows of `evaluation.memorization_table`, each measure in one cell: count / n, rate and interval in %."""
    measures = {
        "included": ("included", "n_included"),
        "held-out": ("held_out", "n_held_out"),
        "difference (points)": ("difference", None),
        "counterfactual": ("counterfactual", "counterfactual_n"),
        "included, by distance": ("distance_included", "n_included"),
        "held-out, by distance": ("distance_held_out", "n_held_out"),
        "difference, by distance (points)": ("distance_difference", None),
        "counterfactual, by distance": ("distance_counterfactual", "distance_counterfactual_n"),
    }
    labels = ["subject", "control", "group", "duplicates"]
    cells = [
        [number(row.get(label)) for label in labels] + [_percent_cell(row, *measure) for measure in measures.values()]
        for row in rows
    ]
    caption = f"memorization: count / secrets, rate in % [95 % interval]; by distance: at most {MEMORIZED_DISTANCE}"
    return Table(caption, [*labels, *measures], cells, [False] * 3 + [True] * (1 + len(measures)))


def number(value) -> str:
    """A value as a cell shows it: four significant digits, thousands apart, a dash for what is missing or NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(number(entry) for entry in value)
    return str(value)


def duration(seconds: float) -> str:
    """Wall time in the two largest units: 4.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"


def _percent_cell(row: Mapping, stem: str, n_name: str | None) -> str:
    """`12 / 50  24.0 [14.3, 37.4]`, without the counts where there is no `n_name`; a dash if nothing was measured."""
    value = row.get(f"{stem}_rate" if n_name else stem)
    if value is None or math.isnan(value):
        return number(None)
    low, high = row[f"{stem}_low"], row[f"{stem}_high"]
    counts = f"{row[f'{stem}_count']} / {row[n_name]}\u2003" if n_name else ""
    return f"{counts}{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _name_value_table(caption: str, values: Mapping) -> Table:
    rows = [[_words(name), cell] for name, cell in _merge_intervals(values).items()]
    return Table(caption, ["figure", "value"], rows, [False, True])


def _row_table(caption: str, entries: list[dict]) -> Table:
    """One row for each entry, one column for each key that any of them has."""
    merged = [_merge_intervals(entry) for entry in entries]
    columns = list(dict.fromkeys(key for entry in merged for key in entry))
    rows = [[entry.get(column, "") for column in columns] for entry in merged]
    numeric = [
        all(not isinstance(entry.get(column), str | list) for entry in entries if entry.get(column) != "all")
        for column in columns
    ]
    return Table(caption, [_words(column) for column in columns], rows, numeric)


def _merge_intervals(values: Mapping) -> dict[str, str]:
    """Name -> cell, with the cells of `low` and `high` moved into that of the value they belong to."""
    cells = {name: number(value) for name, value in values.items()}
    for low_name in [name for name in values if name == "low" or name.endswith("_low")]:
        stem = low_name.removesuffix("low")
        high_name = stem + "high"
        value_name = next((name for name in (f"{stem}rate", stem.rstrip("_")) if name in values), None)
        if value_name is None or high_name not in values:
            continue
        low, high = cells.pop(low_name), cells.pop(high_name)
        if low != number(None):
            cells[value_name] += f" [{low}, {high}]"
    return cells


def _flatten(values: Mapping, prefix: str = "") -> dict:
    """Dotted name -> value of a nested dict."""
    flat: dict = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _is_nested(value) -> bool:
    """A dict, or a list of dicts; a list of plain values fits one cell."""
    return isinstance(value, dict) or (
        isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)
    )


def _has_nested(values: Mapping) -> bool:
    return any(_is_nested(value) for value in values.values())


def _words(name: str) -> str:
    return str(name).replace("_", " ")
