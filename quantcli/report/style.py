"""The style sheet and the script of a page. Colours are variables, with values for light and for dark."""

from __future__ import annotations

STYLE = (
    """
:root { color-scheme: light dark;
  --back: #fbfbfa; --card: #ffffff; --ink: #1c2126; --soft: #5d6670; --rule: #dfe3e7; --accent: #1f6fb5;
  --warn-back: #fff4dd; --warn-rule: #e0a93b; --good: #23785a; --mark: #ffe3b8;
  --shade: #1c21262e;
  --heat0: #fdf1e2; --heat1: #fbe0c0; --heat2: #f8c896; --heat3: #f2a968; --heat4: #e88841; --heat5: #d46a22;
  --heat6: #b44f14; --heat7: #8b3a10; --heat8: #5d260d; --empty: #ccd2d8;
  --part0: #2f74b8; --part1: #5fb3d9; --part2: #d98a2b; --part3: #8a63b8; --part4: #3d9a77; --part5: #98a1aa; }
@media (prefers-color-scheme: dark) { :root {
  --back: #14171a; --card: #1c2024; --ink: #e6e9ec; --soft: #9ba5af; --rule: #31373d; --accent: #6db1ee;
  --warn-back: #332a15; --warn-rule: #b98a2e; --good: #6cc7a2; --mark: #5a4216;
  --shade: #00000080;
  --heat0: #2b211a; --heat1: #3f2b1c; --heat2: #5a371d; --heat3: #7a461d; --heat4: #a05a20; --heat5: #c67530;
  --heat6: #e3954f; --heat7: #f3b985; --heat8: #fde0c3; --empty: #454c54;
  --part0: #4f94d9; --part1: #8acbe8; --part2: #e6a24e; --part3: #a787d1; --part4: #5dbb95; --part5: #88919a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 28px 20px 60px; }
header p, .note { color: var(--soft); margin: 4px 0 0; }
h1 { font-size: 26px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 4px; }
h3 { font-size: 15px; margin: 18px 0 6px; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 18px 20px;
  margin-top: 18px; }
section > .scroll, section > .panels { margin-top: 10px; }
.warnings { background: var(--warn-back); border-color: var(--warn-rule); }
.warnings ul { margin: 6px 0 0; padding-left: 20px; } .warnings li { overflow-wrap: anywhere; margin: 3px 0; }
.stage { color: var(--soft); font-size: 13px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 18px; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 12px 14px; }
.tile b { display: block; font-size: 22px; line-height: 1.25; font-weight: 650; letter-spacing: -0.01em; }
.tile span { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; background: linear-gradient(to right, var(--card) 40%, transparent) 0 / 36px 100% local,
  linear-gradient(to left, var(--card) 40%, transparent) 100% / 36px 100% local,
  linear-gradient(to right, transparent, var(--shade) 2px, transparent) 0 / 14px 100%,
  linear-gradient(to left, transparent, var(--shade) 2px, transparent) 100% / 14px 100%;
  background-repeat: no-repeat; }
table { border-collapse: collapse; font-size: 14px; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 5px 14px 5px 0; border-top: 1px solid var(--rule); }
thead th { border-top: 0; color: var(--soft); font-weight: 600; font-size: 13px; }
tbody tr:first-child > * { border-top: 0; } thead + tbody tr:first-child > * { border-top: 1px solid var(--rule); }
.facts th { color: var(--soft); font-weight: 400; width: 170px; } .facts td { overflow-wrap: anywhere; }
.whole { white-space: nowrap; }
.words { display: inline-block; max-width: 320px; white-space: normal; overflow-wrap: anywhere; }
.dense table { font-size: 13px; } .dense th, .dense td { padding-right: 9px; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
thead th { vertical-align: bottom; } thead .number { white-space: normal; }
.sortable th { cursor: pointer; } .sortable th:hover { color: var(--accent); }
.sortable th[aria-sort=ascending]::after { content: " \\2191"; }
.sortable th[aria-sort=descending]::after { content: " \\2193"; }
code, pre, .mono { font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
code { overflow-wrap: anywhere; }
td code { white-space: nowrap; } .facts td code { white-space: normal; }
pre { margin: 8px 0 0; padding: 10px 12px; background: var(--back); border: 1px solid var(--rule); border-radius: 8px;
  overflow-x: auto; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--accent); }
svg { display: block; width: 100%; height: auto; } .chart svg { min-width: 640px; }
.chart { max-width: 100%; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 12px 20px; }
.label { font-size: 12px; fill: var(--soft); }
.axis { font-size: 16px; } .strong { fill: var(--ink); font-weight: 600; }
.panel-title { font-size: 13px; font-weight: 600; fill: var(--ink); }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.grid { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.line.before { stroke: var(--part5); } .dot.before { fill: var(--part5); }
.line.after { stroke: var(--accent); } .dot.after { fill: var(--accent); }
.float, .unknown { fill: none; stroke: var(--empty); stroke-width: 1; } .unknown { stroke-dasharray: 3 2; }
.key { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 7px; vertical-align: -1px; }
.key.before { background: var(--part5); } .key.after { background: var(--accent); }
.front { stroke: var(--accent); stroke-width: 1.5; stroke-dasharray: 5 4; }
.point { fill: var(--card); stroke: var(--soft); stroke-width: 2; }
.point.best { fill: var(--accent); stroke: var(--accent); } .point.origin { fill: var(--ink); stroke: var(--ink); }
.whisker { stroke: var(--soft); stroke-width: 1.5; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 12px; }
.answer { border: 1px solid var(--rule); border-radius: 8px; padding: 8px 12px; background: var(--back); }
.answer span { color: var(--soft); font-size: 13px; }
.answer p, .prompt { margin: 2px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.prompt { font-weight: 600; margin: 16px 0 8px; }
mark { background: var(--mark); color: inherit; border-radius: 3px; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: 14px; margin-bottom: 4px; }
@media (max-width: 600px) { main { padding: 18px 12px 40px; } section { padding: 14px 12px; }
  .facts th { width: 110px; } h1 { font-size: 21px; }
  .scroll > table:not(.facts) { width: max-content; min-width: 100%; }
  table:not(.facts) td:not(.number, :has(code, .whole)) { max-width: 240px; overflow-wrap: break-word; } }
@media print { body { background: none; } main { max-width: none; padding: 0; }
  section, .tile { break-inside: avoid; } section.long { break-inside: auto; } .chart svg { min-width: 0; }
  .scroll { background: none; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
    + "".join(f".heat{i} {{ fill: var(--heat{i}); }} " for i in range(9))
    + "".join(f".part{i} {{ fill: var(--part{i}); background: var(--part{i}); }} " for i in range(6))
)

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => head.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.key ?? row.cells[column].textContent;
    const order = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b, "en", { numeric: true }) : a - b;
    const rows = [...body.rows].sort((a, b) => order(key(a), key(b)) * (down ? -1 : 1));
    body.append(...rows);
  }));
}
"""
