"""How a report in HTML looks: on a desk, on a phone, in the dark and on paper."""

# The pictures have blue and vermilion of Okabe and Ito, which people with any kind of colour vision tell apart: the
# darker ones on white, vermilion at 86 % so that it has the contrast of text, and sky blue and orange in the dark.
STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #f4f6f8; --line: #d0d7de;
  --text: #1b1f23; --soft: #57606a; --mean: #0072b2; --seed: #b75000;
  --third: #00735a; --fourth: #a3487c; --fifth: #7a5f00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --panel: #1f2429; --line: #3d454d;
    --text: #e6e9ec; --soft: #a8b1ba; --mean: #56b4e9; --seed: #e69f00;
    --third: #2cc295; --fourth: #e08fbe; --fifth: #f0e442;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 120rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2, h3, h4 { line-height: 1.25; margin: 1.5rem 0 0.5rem; }
h1 { margin-top: 0; }
h2 { border-bottom: 1px solid var(--line); padding-bottom: 0.25rem; }
h2 code { font-size: 0.7em; font-weight: normal; color: var(--soft); }
p { max-width: 50rem; }
a { color: var(--mean); }
:focus-visible { outline: 3px solid var(--mean); outline-offset: 2px; }
.skip { position: absolute; left: -100vw; background: var(--page); padding: 0.5rem; }
.skip:focus { left: 1rem; }
.side-by-side { display: grid; gap: 0 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 36rem), 1fr)); }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.side-by-side > *, .pictures > * { min-width: 0; }
figure { margin: 0; max-width: 44rem; }
figcaption { margin-bottom: 0.25rem; }
figcaption strong { display: block; }
svg { display: block; width: 100%; height: auto; }
img { max-width: 100%; height: auto; background: #ffffff; }
dl { display: flex; flex-wrap: wrap; gap: 0.25rem 1.5rem; margin: 0.5rem 0; }
dt { color: var(--soft); font-size: 0.875rem; }
dd { margin: 0; }
.box { border: 2px solid var(--seed); border-radius: 4px; background: var(--panel); padding: 0.5rem 1rem; }
.box, .scroll { margin: 1rem 0; }
.box ul { margin: 0; padding-left: 1.25rem; }
.legend { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; font-weight: bold; padding: 0.25rem 0; }
th, td { padding: 0.25rem 0.75rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { vertical-align: bottom; }
th[scope=colgroup] { text-align: center; }
th[scope=row], thead tr:first-child > th:first-child { text-align: left; white-space: normal; }
th[scope=row] { min-width: 8rem; max-width: 20rem; }
th[scope=row] { font-weight: normal; position: sticky; left: 0; background: var(--page); overflow-wrap: anywhere; }
text { fill: var(--text); font-size: 12px; paint-order: stroke; stroke: var(--page); stroke-width: 4px; }
text.missing { fill: var(--seed); }
text.tick { fill: var(--soft); font-size: 11px; }
.grid { stroke: var(--line); }
.zero { stroke: var(--text); stroke-width: 1.5; }
.interval { stroke: var(--mean); stroke-width: 2.5; }
.curve { fill: none; stroke-width: 2; }
.band { opacity: 0.13; }
.line-0 { --colour: var(--mean); }
.line-1 { --colour: var(--seed); }
.line-2 { --colour: var(--third); }
.line-3 { --colour: var(--fourth); }
.line-4 { --colour: var(--text); }
.line-5 { --colour: var(--fifth); }
.curve { stroke: var(--colour); }
.band, .point { fill: var(--colour); }
.cells { shape-rendering: crispEdges; }
.frame { fill: none; stroke: var(--text); }
.model { fill: #ffffff; stroke: #000000; stroke-width: 1.5; }
.mean { fill: var(--mean); }
.seed { fill: none; stroke: var(--seed); stroke-width: 1.5; }
@media print {
  :root { color-scheme: light; --page: #ffffff; --panel: #ffffff; --line: #999999;
    --text: #000000; --soft: #000000; --mean: #000000; --seed: #000000;
    --third: #00735a; --fourth: #a3487c; --fifth: #7a5f00; }
  .line-0 { --colour: #0072b2; }
  .line-1 { --colour: #b75000; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  a { text-decoration: none; }
  nav, .skip { display: none; }
  h2, h3, h4, caption { break-after: avoid; }
  table, figure, .box { break-inside: avoid; }
  .side-by-side { display: block; }
  .pictures { grid-template-columns: 1fr 1fr; }
  .scroll { overflow: visible; }
  details { display: none; }
  table { font-size: 7pt; width: 100%; }
  th, td { white-space: normal; padding: 1pt 3pt; }
  th[scope=row] { position: static; min-width: 0; }
}
"""
