"""The style sheet of `report.html`: light and dark, from a phone's width to a desk's."""

STYLE = """
:root { --ink:#1b1f24; --soft:#656d76; --line:#d8dee4; --back:#f6f8fa; --card:#fff;
  --c0:#2563eb; --c1:#d9480f; --c2:#0d8a6f; --c3:#8b3fd1; --bad:#cf222e; --good:#1a7f37;
  --l0:#1b1f24; --l1:#4b3f9e; --l2:#8f86d6; --l3:#cfcaf2; --l4:#f1efe8; --l5:#fbd0a8;
  --l6:#f08c3a; --l7:#b3370a }
@media (prefers-color-scheme: dark) { :root { --ink:#e6edf3; --soft:#9198a1; --line:#30363d;
  --back:#0d1117; --card:#161b22; --c0:#6ea8fe; --c1:#ff9b6a; --c2:#4fd1b0; --c3:#c69cff;
  --bad:#ff7b72; --good:#56d364;
  --l0:#f0f6fc; --l1:#a59bff; --l2:#7a70d0; --l3:#4a4480; --l4:#2b2f36; --l5:#6b4526;
  --l6:#c76a1f; --l7:#ff9b52 } }
* { box-sizing:border-box }
body { margin:0; background:var(--back); color:var(--ink);
  font:15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
header, main { max-width:84rem; margin:0 auto; padding:0 1.25rem }
header { padding-top:1.5rem }
h1 { font-size:1.5rem; line-height:1.25; margin:0; display:flex; flex-wrap:wrap; gap:.3rem .75rem;
  align-items:center; overflow-wrap:anywhere }
h2 { font-size:1.15rem; margin:0 0 .75rem }
h3 { font-size:.95rem; margin:0 }
h4 { font-size:.8rem; margin:0 0 .2rem; color:var(--soft); display:flex; gap:.5rem;
  justify-content:space-between }
p { margin:.25rem 0 } small, header p { color:var(--soft) }
.state { font-size:.75rem; font-weight:600; padding:.1rem .6rem; border-radius:1rem;
  border:1px solid } .done { color:var(--good) } .open { color:var(--c1) }
.warn { color:var(--bad) }
.progress { height:4px; border-radius:2px; background:var(--line); margin:.75rem 0 0;
  overflow:hidden } .progress i { display:block; height:100%; background:var(--c0) }
section { margin:1.5rem 0; background:var(--card); border:1px solid var(--line);
  border-radius:10px; padding:1.1rem 1.25rem }
.cards, .plots { background:none; border:0; padding:0; display:grid; gap:.75rem }
.cards { --one:calc((100% + .75rem)/var(--all) - .76rem);
  --two:calc((100% + .75rem)/var(--half) - .76rem);
  --wanted:calc((var(--all)*9.4rem - .75rem - 100%)*999);
  grid-template-columns:repeat(auto-fit,
    minmax(max(7.5rem, clamp(var(--one), var(--wanted), var(--two))), 1fr)) }
.cards div, figure { background:var(--card); border:1px solid var(--line); border-radius:10px }
.cards div { padding:.6rem .9rem; display:flex; flex-direction:column }
.cards span, .cards small { font-size:.8rem; color:var(--soft) }
.cards b { font-size:1.25rem; font-variant-numeric:tabular-nums; line-height:1.3 }
.plots { grid-template-columns:repeat(auto-fit, minmax(min(100%, 23rem), 1fr)) }
figure { margin:0; padding:.8rem .9rem .4rem; min-width:0 }
figcaption { display:flex; flex-wrap:wrap; gap:.1rem 1rem; align-items:baseline;
  font-size:.82rem; min-height:1.6rem }
figcaption h3 { margin-right:auto } figcaption b { font-variant-numeric:tabular-nums }
figcaption span { white-space:nowrap }
figcaption span::before { content:""; display:inline-block; width:.9em; height:3px;
  border-radius:2px; background:currentColor; vertical-align:middle; margin-right:.4em }
span.c0 { color:var(--c0) } span.c1 { color:var(--c1) }
span.c2 { color:var(--c2) } span.c3 { color:var(--c3) }
svg { display:block; width:100%; height:auto }
svg text { font-size:11.5px; fill:var(--soft); font-variant-numeric:tabular-nums }
.y { text-anchor:end } .x { text-anchor:middle }
.grid { stroke:var(--line); stroke-width:1; fill:none }
.mark { stroke:var(--bad); stroke-width:1.5; stroke-dasharray:3 3; fill:none }
polyline { fill:none; stroke-width:1.8; stroke-linejoin:round; stroke-linecap:round }
polyline.c0 { stroke:var(--c0) } polyline.c1 { stroke:var(--c1) }
polyline.c2 { stroke:var(--c2) } polyline.c3 { stroke:var(--c3) }
polyline.faint { stroke-width:1; opacity:.35 }
circle.c0 { fill:var(--c0) } circle.c1 { fill:var(--c1) }
circle.c2 { fill:var(--c2) } circle.c3 { fill:var(--c3) }
path.l0 { fill:var(--l0) } path.l1 { fill:var(--l1) } path.l2 { fill:var(--l2) }
path.l3 { fill:var(--l3) } path.l4 { fill:var(--l4) } path.l5 { fill:var(--l5) }
path.l6 { fill:var(--l6) } path.l7 { fill:var(--l7) }
.l0 { --c:var(--l0) } .l1 { --c:var(--l1) } .l2 { --c:var(--l2) } .l3 { --c:var(--l3) }
.l4 { --c:var(--l4) } .l5 { --c:var(--l5) } .l6 { --c:var(--l6) } .l7 { --c:var(--l7) }
.levels { display:flex; flex-wrap:wrap; gap:.15rem .9rem; font-size:.8rem }
.levels span::before { content:""; display:inline-block; width:.9em; height:.9em;
  border-radius:2px; background:var(--c); vertical-align:-.1em; margin-right:.35em }
.maps { display:grid; gap:.75rem; grid-template-columns:repeat(auto-fit, minmax(min(100%, 21rem),
  1fr)) }
.tip { fill:transparent } .tip:hover { fill:var(--ink); fill-opacity:.15 }
article { padding:.9rem 0; border-top:1px solid var(--line) }
article:first-of-type { border-top:0; padding-top:0 }
.question { font-weight:600; white-space:pre-wrap; overflow-wrap:anywhere }
.pictures { display:flex; flex-wrap:wrap; gap:.5rem; align-items:end }
.pictures img { border-radius:6px; border:1px solid var(--line) }
.where { overflow-wrap:anywhere }
.answers { display:grid; gap:.75rem; margin-top:.6rem;
  grid-template-columns:repeat(auto-fit, minmax(min(100%, 17rem), 1fr)) }
.answers div { background:var(--back); border-radius:8px; padding:.6rem .8rem; min-width:0 }
.answers p, details p { white-space:pre-wrap; overflow-wrap:anywhere; unicode-bidi:isolate }
h4 small { font-weight:400; white-space:nowrap }
details { margin-top:.75rem } summary { cursor:pointer; color:var(--soft) }
.scroll { overflow-x:auto }
table { border-collapse:collapse; font-size:.87rem; width:100%; margin:.3rem 0 }
td, th { text-align:left; padding:.28rem 1rem .28rem 0; border-bottom:1px solid var(--line);
  vertical-align:top; font-variant-numeric:tabular-nums }
td:first-child { color:var(--soft); min-width:6rem } td:last-child { overflow-wrap:anywhere;
  min-width:8rem; padding-right:0 } th { font-weight:600 }
pre { background:var(--back); border-radius:8px; padding:.7rem .9rem; overflow-x:auto;
  font-size:.84rem; white-space:pre-wrap; overflow-wrap:anywhere }
section h3 ~ h3 { margin-top:1rem } ul { margin:.4rem 0 1rem; padding-left:1.2rem }
@media print { body { background:none } section, figure { break-inside:avoid } }
"""
