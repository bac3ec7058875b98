"""The look of a page: system fonts, light and dark, from a phone's width up."""

STYLE = """
:root { --paper: #fdfdfc; --ink: #1d1f23; --soft: #646a73; --rule: #e4e3df; --mark: #2458c5; --warn: #b8460b;
  --card: #f6f5f2; --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, "DejaVu Sans Mono", monospace; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --ink: #e5e6e8; --soft: #9aa1ab; --rule: #2c3037;
  --mark: #82aaff; --warn: #ffa066; --card: #1b1e24; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 40px 24px 80px; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 10px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 52px 0 6px; padding-top: 14px; border-top: 1px solid var(--rule); }
p { margin: 0 0 12px; max-width: 46em; }
.kicker, dt, th, figcaption, .soft { color: var(--soft); }
.kicker { margin: 0 0 2px; font-size: 13px; }
.warning { margin: 18px 0 0; color: var(--warn); font-weight: 600; }
code, .mono { font-family: var(--mono); font-size: 0.88em; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 26px 0 0; }
.tile { background: var(--card); border-radius: 8px; padding: 12px 14px; }
.tile b { display: block; font-size: 24px; line-height: 1.25; font-weight: 600; }
.tile span { font-size: 13px; color: var(--soft); display: block; line-height: 1.35; }
.tile.alert b { color: var(--warn); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 28px 36px;
  margin-top: 18px; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 13px; line-height: 1.45; margin-top: 6px; }
svg { display: block; width: 100%; height: auto; overflow: visible; font-family: inherit; }
svg text { fill: var(--soft); font-size: 12.5px; }
svg text.note { fill: var(--ink); }
svg text.label { fill: var(--ink); font-size: 13px; }
svg text.here { font-weight: 700; }
svg text.number { font-size: 13px; fill: var(--ink); }
svg text.on { fill: var(--paper); }
.grid { stroke: var(--rule); }
.axis { stroke: var(--soft); }
.bound { stroke: var(--soft); stroke-dasharray: 4 4; }
.line { fill: none; stroke: var(--mark); stroke-width: 1.8; stroke-linejoin: round; }
.line.thin { stroke: var(--soft); stroke-width: 1; opacity: 0.55; }
.band { fill: var(--mark); opacity: 0.18; }
.dot, .bar, .cell { fill: var(--mark); }
.outlier { fill: var(--warn); }
.dead { fill: var(--paper); stroke: var(--warn); stroke-width: 1.8; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; margin-top: 10px; }
th { text-align: left; font-weight: 500; }
th, td { padding: 6px 26px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: baseline; white-space: nowrap; }
td.wide { white-space: normal; min-width: 15em; }
th:last-child, td:last-child { padding-right: 0; }
.right { text-align: right; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 3px 20px; margin: 14px 0 0;
  font-size: 14px; }
dd { margin: 0; overflow-wrap: anywhere; }
.row { margin: 22px 0 0; }
.row h3 { font-size: 13px; font-weight: 500; margin: 0 0 6px; color: var(--soft); }
.text { font: 13.5px/1.75 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; max-width: none;
  tab-size: 4; }
.text span { background: color-mix(in srgb, var(--mark) calc(var(--heat) * 55%), transparent); border-radius: 2px;
  padding: 1px 0; }
.text .changed { box-shadow: inset 0 -2px var(--warn); }
.text .space { color: var(--soft); opacity: 0.7; }
details { margin-top: 14px; }
summary { cursor: pointer; color: var(--soft); }
pre { font: 12.5px/1.5 var(--mono); background: var(--card); border-radius: 8px; padding: 14px; overflow-x: auto; }
@media (max-width: 560px) { body { padding: 24px 16px 56px; } h1 { font-size: 21px; } svg text { font-size: 15px; }
  svg text.label, svg text.number { font-size: 15.5px; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 8px; } .tiles { grid-template-columns: 1fr 1fr; } }
@media print { body { max-width: none; } .figures { break-inside: avoid; } }
"""
