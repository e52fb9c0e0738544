"""Reports as text for a terminal and as HTML for a notebook, light or dark.

Colours are JupyterLab's own variables with ``currentColor`` to fall back on, so a table looks
right in either theme, and in a page that has none. What matters is said in words as well.
"""

import html
import textwrap
from collections.abc import Sequence
from itertools import count
from typing import Any

_ids = count()

STYLE = """
<style>
.cbn-report table {{border-collapse: collapse; color: var(--jp-content-font-color1, inherit)}}
.cbn-report th, .cbn-report td {{padding: 2px 10px; text-align: left !important;
  border-bottom: 1px solid var(--jp-border-color2, currentColor)}}
.cbn-report td:first-child {{white-space: nowrap}}
.cbn-report td:last-child {{overflow-wrap: anywhere}}
.cbn-report th button {{all: unset; cursor: pointer; font-weight: 600}}
.cbn-report th button:focus-visible {{outline: 2px solid currentColor}}
.cbn-report td.num, .cbn-report th.num {{text-align: right !important;
  font-variant-numeric: tabular-nums}}
.cbn-report tr.leak td {{font-weight: 600; background: rgba(213, 94, 0, 0.16)}}
.cbn-report tr.leak td:first-child {{border-left: 4px solid #d55e00}}
.cbn-report svg text {{fill: currentColor; font: 11px monospace}}
.cbn-report svg line, .cbn-report svg rect {{stroke: currentColor; fill: none}}
</style>
"""

# Numbers sort by value, words by alphabet; a second click turns the order round.
SORT = (
    "(b=>{const h=b.parentNode,t=b.closest('table').tBodies[0],k=h.cellIndex,"
    "up=h.getAttribute('aria-sort')==='descending';"
    "for(const o of h.parentNode.cells)o.removeAttribute('aria-sort');"
    "h.setAttribute('aria-sort',up?'ascending':'descending');"
    "const v=r=>r.cells[k].dataset.value??r.cells[k].textContent;"
    "[...t.rows].sort((p,q)=>{const x=v(p),y=v(q),"
    "c=isNaN(x)||isNaN(y)?x.localeCompare(y):x-y;return up?c:-c})"
    ".forEach(r=>t.append(r))})(this)"
)


def size(number: float) -> str:
    """Bytes in the unit that keeps the figure short: 740 B, 12.0 KiB, 3.1 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024 or unit == "GiB":
            break
        number /= 1024
    return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns padded with blanks: numbers to the right, words to the left."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    right = [all(row[k][:1] in "-0123456789" for row in cells[1:]) for k in range(len(header))]
    lines = (
        "  ".join(
            cell.rjust(width) if r else cell.ljust(width)
            for cell, width, r in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    )
    return "\n".join(lines)


def html_table(header: Sequence[str], rows: Sequence[Sequence[Any]], marked: Sequence[bool]) -> str:
    """A table that sorts by a click on a column's name. A cell may be a (value, text) pair."""
    numeric = [
        all(isinstance(_value(row[k]), (int, float)) for row in rows) for k in range(len(header))
    ]
    style = [' class="num"' if is_number and rows else "" for is_number in numeric]
    head = "".join(
        f'<th scope="col"{s}><button title="sort" onclick="{SORT}">{html.escape(name)}</button>'
        "</th>"
        for name, s in zip(header, style, strict=True)
    )
    body = "".join(
        f"<tr{' class=leak' if mark else ''}>"
        + "".join(
            f'<td{s} data-value="{html.escape(str(_value(cell)))}">{html.escape(_text(cell))}</td>'
            for cell, s in zip(row, style, strict=True)
        )
        + "</tr>"
        for row, mark in zip(rows, marked, strict=True)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _value(cell: Any) -> Any:
    return cell[0] if isinstance(cell, tuple) else cell


def _text(cell: Any) -> str:
    return str(cell[1] if isinstance(cell, tuple) else cell)


class Table:
    """Rows under a header: text when printed, a sortable table in a notebook.

    A cell is a value, or a (value, text) pair: sorted by the one and shown as the other.
    """

    def __init__(self, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.header, self.rows = list(header), rows

    def __str__(self) -> str:
        return text_table(self.header, [[_text(cell) for cell in row] for row in self.rows])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return report_html("", html_table(self.header, self.rows, [False] * len(self.rows)))


def report_html(summary: str, table: str, more: str = "") -> str:
    return (
        f'{STYLE.format()}<div class="cbn-report"><p>{html.escape(summary)}</p>{table}{more}</div>'
    )


def buffers_summary(report: Any) -> str:
    name, total, leaks = report.owner, len(report.rows), len(report.leaks)
    if not total:
        return f"{name}: no buffers"
    if not leaks:
        return f"{name}: {total} buffer{'s' * (total > 1)}, none holds history"
    return f"{name}: {leaks} of {total} buffer{'s' * (total > 1)} hold on to a graph"


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def buffers_as_text(report: Any) -> str:
    """The summary, then a table with LEAK before every buffer that should not be as it is."""
    header = ("", "buffer", "shape", "grad_fn", "nodes", "depth", "retained", "origin")
    rows = [
        (
            "LEAK" if row.problem else "ok",
            row.name,
            _shape(row.shape),
            row.grad_fn or ("leaf, requires grad" if row.requires_grad else "-"),
            row.nodes,
            row.depth,
            size(row.retained_bytes),
            row.origin or "-",
        )
        for row in report.rows
    ]
    table = "\n" + text_table(header, rows) if rows else ""
    return buffers_summary(report) + table


def buffers_as_html(report: Any) -> str:
    """The table, most retained bytes first, and under it a folded picture of each chain."""
    header = ("state", "buffer", "shape", "grad_fn", "nodes", "depth", "retained", "origin")
    ranked = sorted(report.rows, key=lambda row: (not row.problem, -row.retained_bytes, -row.nodes))
    rows = [
        (
            "▲ leak" if row.problem else "ok",
            row.name,
            _shape(row.shape),
            row.grad_fn or ("leaf, requires grad" if row.requires_grad else "–"),
            row.nodes,
            row.depth,
            (row.retained_bytes, size(row.retained_bytes)),
            row.origin or "–",
        )
        for row in ranked
    ]
    table = html_table(header, rows, [bool(row.problem) for row in ranked]) if rows else ""
    pictures = "".join(_folded_chain(row) for row in ranked if row.chain)
    return report_html(buffers_summary(report), table, pictures)


def _folded_chain(row: Any) -> str:
    return (
        f"<details><summary>the graph behind {html.escape(row.name)}, as far as its last step "
        f"({row.nodes} nodes in all)</summary>{chain_svg(row.name, row.chain)}</details>"
    )


def chain_svg(name: str, chain: Sequence[Any]) -> str:
    """Nodes in rows by their distance from the buffer, which stands on top."""
    places, filled = [], {}
    for link in chain:
        column = filled.get(link.level, 0)
        filled[link.level] = column + 1
        places.append((column, link.level + 1))
    wide, high, gap = 170, 20, 46
    arrow = f"cbn-arrow-{next(_ids)}"
    boxes = [(0, 0, name, ())] + [
        (column, level, link.name + (" …" if link.goes_on else ""), link.successors)
        for (column, level), link in zip(places, chain, strict=True)
    ]
    shapes = []
    for position, (column, level, text, successors) in enumerate(boxes):
        x, y = column * wide + 4, level * gap + 4
        shapes.append(f'<rect x="{x}" y="{y}" width="{wide - 14}" height="{high}" rx="3"/>')
        shapes.append(f'<text x="{x + 6}" y="{y + 14}">{html.escape(text[:24])}</text>')
        for target in [0] if position == 0 else successors:
            to_column, to_level = places[target]
            shapes.append(
                f'<line x1="{x + 30}" y1="{y + high}" x2="{to_column * wide + 34}" '
                f'y2="{to_level * gap + 4}" marker-end="url(#{arrow})"/>'
            )
    width = max(filled.values(), default=1) * wide + 8
    height = (max(level for _, level, *_ in boxes) + 1) * gap
    return (
        f'<svg role="img" aria-label="autograd nodes behind {html.escape(name)}" '
        f'width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f'<defs><marker id="{arrow}" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="currentColor"/></marker>'
        f"</defs>{''.join(shapes)}</svg>"
    )


def rate(number: float) -> str:
    """A growth per step, with its sign; without decimals where there are none."""
    return f"{number:+,.0f}" if number == round(number) else f"{number:+,.1f}"


def diagnosis_summary(diagnosis: Any) -> str:
    words = {
        "clean": "nothing keeps history",
        "bounded": "some history is kept, and does not grow",
        "growing": "memory grows at every step",
    }
    return f"{diagnosis.verdict}: {words[diagnosis.verdict]} ({diagnosis.steps} steps)"


def diagnosis_as_text(diagnosis: Any) -> str:
    """The verdict, then a paragraph for each finding."""
    lines = [diagnosis_summary(diagnosis)]
    for found in diagnosis.findings:
        growth = f"{rate(found.nodes_per_step)} nodes, {size(found.bytes_per_step)} a step"
        held = f"{found.nodes} nodes, {size(found.retained_bytes)} held"
        lines += [
            "",
            f"{found.verdict.upper()}  {found.path}",
            f"    {growth if found.verdict == 'growing' else held}",
            f"    made at {found.origin or 'an unknown line'}",
            *textwrap.wrap(found.advice, 96, initial_indent="    ", subsequent_indent="    "),
        ]
    lines += [f"note: {note}" for note in diagnosis.notes]
    return "\n".join(lines)


def diagnosis_as_html(diagnosis: Any) -> str:
    """A row for each finding, growing ones marked."""
    header = ("verdict", "path", "nodes a step", "bytes a step", "made at", "advice")
    rows = [
        (
            "▲ growing" if found.verdict == "growing" else found.verdict,
            found.path,
            (found.nodes_per_step, rate(found.nodes_per_step)),
            (found.bytes_per_step, size(found.bytes_per_step)),
            found.origin or "–",
            found.advice,
        )
        for found in diagnosis.findings
    ]
    marked = [found.verdict == "growing" for found in diagnosis.findings]
    table = html_table(header, rows, marked) if rows else ""
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in diagnosis.notes)
    return report_html(diagnosis_summary(diagnosis), table, notes)


def checklist_summary(checklist: Any) -> str:
    failed = len(checklist.failures)
    total = len(checklist.rows)
    return f"all {total} checks passed" if not failed else f"{failed} of {total} checks failed"


def checklist_as_text(checklist: Any) -> str:
    """A line for each property; what failed says what was expected, what came, where to read."""
    lines = [checklist_summary(checklist)]
    for row in checklist.rows:
        lines.append(f"{'pass' if row.passed else 'FAIL'}  {row.name}")
        if not row.passed:
            for key in ("expected", "found", "see"):
                text = f"{key + ':':10}{getattr(row, key)}"
                indent = " " * 6
                lines += textwrap.wrap(text, 96, initial_indent=indent, subsequent_indent=" " * 16)
    return "\n".join(lines)


def checklist_as_html(checklist: Any) -> str:
    """A row for each property, failed ones marked."""
    header = ("result", "property", "expected", "found", "read on")
    rows = [
        ("✓ pass" if row.passed else "✗ fail", row.name, row.expected, row.found, row.see)
        for row in checklist.rows
    ]
    table = html_table(header, rows, [not row.passed for row in checklist.rows])
    return report_html(checklist_summary(checklist), table)
