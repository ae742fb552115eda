"""The cost table as text: for a terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.cost.table import SLOW, CostRow, CostTable, speed_ratios

COLUMNS = {
    "system": "system",
    "parameters_m": "parameters",
    "trainable_m": "trainable",
    "live_parameters_m": "held",
    "live_trainable_m": "held, trainable",
    "gmac": "GMAC",
    "frames_per_s": "frames/s",
    "paper_parameters_m": "paper: parameters",
    "paper_trainable_m": "paper: trainable",
    "paper_gmac": "paper: G",
    "convention_gmac": "in the paper's convention",
}
_DECIMALS = {"gmac": 1, "paper_gmac": 1, "convention_gmac": 1, "paper_parameters_m": 1, "paper_trainable_m": 1}


def cells(row: CostRow) -> list[str]:
    """The row's text for each of the `COLUMNS`; a dash where there is no number."""
    return [row.system, *(_number(getattr(row, name), _DECIMALS.get(name, 2)) for name in list(COLUMNS)[1:])]


def short_table(table: CostTable) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for a terminal: pairs are parameters in all and those trained."""
    columns = ["system", "parameters", "GMAC", "frames/s", "paper", "paper: G", "in its convention"]
    rows = []
    for row in table.rows:
        whole = dict(zip(COLUMNS, cells(row), strict=True))
        pairs = [f"{whole[f'{start}parameters_m']} / {whole[f'{start}trainable_m']}" for start in ("", "paper_")]
        ours, paper = (pair if pair != "- / -" else "-" for pair in pairs)
        numbers = [whole[name] for name in ("gmac", "frames_per_s", "paper_gmac", "convention_gmac")]
        rows.append([row.system, ours, numbers[0], numbers[1], paper, numbers[2], numbers[3]])
    return columns, rows


def explanation(row: CostRow) -> list[str]:
    """How lexiseg's count becomes the paper's, line by line."""
    lines = [f"{row.system}: {row.convention}"] if row.convention else []
    lines += [f"  {step.macs / 1e9:+9.3f} G  {step.what}" for step in row.steps]
    if row.convention_gmac is not None:
        ends = [
            f"{what} {value:.1f} G" if what == "paper" else f"{what} {value:.2f} G"
            for what, value in (("authors' code", row.code_gmac), ("paper", row.paper_gmac))
            if value is not None
        ]
        lines.append(f"  {row.convention_gmac:9.3f} G  in all; {', '.join(ends)}")
    lines += [f"  {step.macs / 1e9:9.3f} G  {step.what}, every operation counted" for step in row.further]
    return lines


def speed_lines(rows: Sequence[CostRow]) -> list[str]:
    """How much faster the faster of each pair that the papers compare is; measured in one run."""
    return [f"{r.fast} against {r.slow}: {r.ratio:.2f} times as fast ({r.claim})." for r in speed_ratios(rows)]


def page(table: CostTable, command: str) -> str:
    """The table as Markdown."""
    machine = table.machine
    place = machine.get("device") or f"{machine['processor']}, {machine['threads']} threads"
    lines = [
        "# Cost",
        "",
        "Made by `lexiseg benchmark cost`; do not edit by hand. ViT-B/16 with random weights, one picture of "
        f"{table.side} x {table.side} pixels, {table.classes} classes, text embeddings cached.",
        "",
        f"- machine: {place}, torch {machine['torch']}, Python {machine['python']}",
        f"- load average when the run ended: {machine['load']}",
        f"- command: `{command}`",
        f"- speed: {_speed(table)}",
        "",
        "*parameters* and *trainable* (millions) are counted as the authors do, with weights in their modules that no "
        "output depends on; *held* is what lexiseg has. *GMAC* is every multiply-add of one prediction, attention "
        "products included, from a picture in memory to its label map. *paper: G* is what the papers call GFLOPs, and "
        "*in the paper's convention* is lexiseg's own count converted to that convention, term by term below.",
        "",
        f"| {' | '.join(COLUMNS.values())} |",
        f"|{'---|' * len(COLUMNS)}",
        *(f"| {' | '.join(cells(row))} |" for row in table.rows),
        "",
    ]
    ratios = speed_lines(table.rows)
    if table.repeats and machine["load"] and max(machine["load"][:2]) > machine["cores"]:
        lines += ["The machine did other work meanwhile: frames a second are too low and their ratios rough.", ""]
    if ratios:
        lines += ["Speed in this run:", "", *(f"- {line}" for line in ratios), ""]
    lines += ["## How the papers count", ""]
    for row in table.rows:
        lines += [f"### {row.system}", "", row.convention, ""]
        if row.steps:
            lines += ["| G | term |", "|---|---|"]
            lines += [f"| {step.macs / 1e9:+.3f} | {step.what} |" for step in row.steps]
            lines.append(f"| {row.convention_gmac:.3f} | in all |")
            if row.code_gmac is not None:
                lines.append(f"| {row.code_gmac:.2f} | the authors' code, counted in this convention |")
            if row.paper_gmac is not None:
                lines.append(f"| {row.paper_gmac:.1f} | printed ({row.paper_source}) |")
            lines.append("")
        if row.further:
            lines += ["| G | every operation counted |", "|---|---|"]
            lines += [*(f"| {step.macs / 1e9:.3f} | {step.what} |" for step in row.further), ""]
    return "\n".join(lines).rstrip() + "\n"


def _speed(table: CostTable) -> str:
    if not table.repeats:
        return "not measured"
    once = [row.system for row in table.rows if 0 < row.timed < table.repeats]
    rule = f"median of {table.repeats} runs of each system, in turn"
    return f"{rule}; one run of those that take more than {SLOW:.0f} seconds ({', '.join(once)})" if once else rule


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"
