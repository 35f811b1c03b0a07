"""The Jinja template and the style sheet of a report. Every value is escaped but the SVG that `plots` made."""

STYLE = """
:root{color-scheme:light dark;--page:#f5f6f8;--line:#dfe3e8;--mark:#fff3cd;/*light*/}
@media screen and (prefers-color-scheme:dark){:root{--page:#12161b;--line:#303741;--mark:#463a17;/*dark*/}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1320px;padding:2rem 1.5rem 4rem;background:var(--page);color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .3rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.6rem 0 .8rem;padding-bottom:.3rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:0;line-height:1.3}
h4{font-size:.85rem;margin:.7rem 0 0;overflow-wrap:anywhere}
p{margin:.4rem 0}a{color:inherit}
nav a{margin-right:1rem;color:var(--muted);font-size:.9rem}
.grid{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,520px),1fr))}
.panels{display:grid;gap:0 1.5rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr))}
.card{margin:0;padding:.9rem 1.1rem 1rem;background:var(--card);border:1px solid var(--line);border-radius:8px;
 min-width:0}
.wide{grid-column:1/-1}
figcaption p,.note{font-size:.85rem;color:var(--muted);max-width:100ch}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-family:inherit!important}
.key{display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:.3rem 0;padding:0;list-style:none;font-size:.85rem}
.key li{overflow-wrap:anywhere}
.swatch{display:inline-block;width:22px;height:10px;margin-right:.4rem;vertical-align:baseline}
.empty{display:grid;place-items:center;min-height:9rem;color:var(--muted);border:1px dashed var(--line);
 border-radius:6px;padding:1rem;text-align:center}
.notice{background:var(--mark);border-radius:8px;padding:.6rem 1rem;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:.32rem .9rem .32rem 0;border-top:1px solid var(--line)}
thead th{color:var(--muted);font-weight:600;border-top:0}
tbody th{font-weight:500}
td{overflow-wrap:anywhere}td.score,td.run{overflow-wrap:normal;min-width:8rem}
td.value,.code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.82rem}
tr.differs>*{background:var(--mark)}tr.differs>th{padding-left:.4rem;border-left:3px solid var(--run4)}
caption{text-align:left;font-weight:600;padding-bottom:.3rem}
summary{cursor:pointer;font-weight:600}
.columns{columns:2 420px;column-gap:2.5rem}
.sample{border-top:1px solid var(--line);padding:.5rem 0}
.sample dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.2rem .8rem;margin:.3rem 0}
.sample dt{font-size:.85rem;padding-top:.3rem}.sample dd{margin:0}
pre{margin:0;padding:.45rem .6rem;background:var(--page);border-radius:5px;white-space:pre-wrap;
 overflow-wrap:anywhere;max-height:20rem;overflow-y:auto;font:.8rem/1.45 ui-monospace,SFMono-Regular,Menlo,monospace}
.right{color:var(--run2)}.wrong{color:var(--run1)}
@media print{body{max-width:none;padding:0;font-size:10pt;background:none}nav{display:none}
 .card,.sample,tr{break-inside:avoid}h2,h3{break-after:avoid}.grid,.panels{grid-template-columns:1fr 1fr}
 .card:not(.wide) .panels{grid-template-columns:1fr}.scroll{overflow:visible}td.score,td.run{min-width:0}
 .card.long{break-inside:auto}pre{max-height:none}
 *{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""

TEMPLATE = """\
{% macro swatch(color, dash="solid", patch=False) %}
<svg class="swatch" viewBox="0 0 22 10" aria-hidden="true">
{%- if patch %}<rect width="22" height="10" rx="2" fill="var(--{{ color }})"/>
{%- else %}<path d="M0 5H22" fill="none" stroke="var(--{{ color }})" stroke-width="2.4"
 {%- if dashes[dash] %} stroke-dasharray="{{ dashes[dash] }}"{% endif %}/>
{%- endif %}</svg>
{%- endmacro %}
{% macro run_heads() %}
{% for run in runs %}
<th scope="col">{{ swatch(run_color(loop.index0)) }}{{ run.name }}</th>
{% endfor %}
{% endmacro %}
{% macro figure(chart) %}
<figure class="card{{ ' wide' if chart.panels|length > 1 }}">
<h3>{{ chart.title }}</h3>
{% if chart.legend %}
<ul class="key">
{% for key in chart.legend %}<li>{{ swatch(key.color, key.dash, key.patch) }}{{ key.label }}</li>
{% endfor %}
</ul>
{% endif %}
<div class="panels">
{% for panel in chart.panels %}
<div>
{% if panel.title %}<h4>{{ panel.title }}</h4>{% endif %}
{% if panel.svg %}
<svg viewBox="{{ panel.svg.view_box }}" role="img" aria-label="{{ chart.title }}. {{ panel.alt }}">
{{ panel.svg.body|safe }}</svg>
{% else %}
<p class="empty">{{ panel.alt }}</p>
{% endif %}
</div>
{% endfor %}
</div>
<figcaption><p>{{ chart.caption }}</p></figcaption>
</figure>
{% endmacro %}
{% macro sample(row, verdict) %}
<div class="sample">
<p class="note"><b class="{{ verdict }}">{{ verdict }}</b> &middot; prompt {{ row.prompt_id }} &middot; reward
{{ row.reward }} &middot; {{ row.length }} tokens &middot;
{{ {"true": "ended", "false": "cut off at the limit"}.get(row.ended, "end unknown") }}</p>
<dl>
{% for label, text in [("Prompt", row.prompt), ("Output", row.text), ("Reference", row.answer)] %}
<dt>{{ label }}</dt><dd><pre>
{{ text }}</pre></dd>
{% endfor %}
</dl>
</div>
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ runs|map(attribute="name")|join(", ") }} - dynamo_jax report</title>
<style>{{ style|safe }}</style>
</head>
<body>
<header>
<h1>{{ runs|map(attribute="name")|join(" / ") }}</h1>
<p class="note">dynamo_jax training report, {{ runs|length }} run{{ "s" if runs|length > 1 }}.</p>
<nav aria-label="Sections">
<a href="#summary">Summary</a>
{% for section in sections %}<a href="#section-{{ loop.index }}">{{ section.title }}</a>
{% endfor %}
{% if samples %}<a href="#samples">Samples</a>{% endif %}
<a href="#config">Config</a>
</nav>
</header>
<main>
{% for name in waiting %}
<p class="notice" role="status"><b>{{ name }}</b> has no metrics yet: the run has only just started, or stopped
before its first line. Make the report again when a step is done.</p>
{% endfor %}
<section aria-labelledby="summary">
<h2 id="summary">Summary</h2>
<div class="grid">
{% if scores %}
<div class="card wide scroll">
<table>
<caption>Held-out scores, with 95% intervals</caption>
<thead><tr><th scope="col">Benchmark</th><th scope="col">Run</th><th scope="col">First</th><th scope="col">Last</th>
<th scope="col">Best</th><th scope="col">Last - first</th></tr></thead>
<tbody>
{% for name, entries in scores %}
{% for score in entries %}
<tr>{% if loop.first %}<th scope="rowgroup" rowspan="{{ entries|length }}">{{ name }}</th>{% endif %}
<td class="run">{{ swatch(run_color(score.color)) }}{{ score.run }}</td><td class="score">{{ score.first }}</td>
<td class="score">{{ score.last }}</td>
<td class="score">{% if score.ahead %}<b>{{ score.best }}</b>{% else %}{{ score.best }}{% endif %}</td>
<td class="run">{{ score.change }}</td></tr>
{% endfor %}
{% endfor %}
</tbody>
</table>
<p class="note">The best of many evaluations is a little too good: it was picked for being high.
{% if runs|length > 1 %}Bold: the highest best. Runs whose intervals overlap widely have not been told
apart.{% endif %}</p>
</div>
{% endif %}
<div class="card wide scroll">
<table>
<caption>Runs</caption>
<thead><tr><th scope="col">Quantity</th>{{ run_heads() }}</tr></thead>
<tbody>
{% for name, values in summary %}
<tr><th scope="row">{{ name }}</th>{% for value in values %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
</div>
</section>
{% for section in sections %}
<section aria-labelledby="section-{{ loop.index }}">
<h2 id="section-{{ loop.index }}">{{ section.title }}</h2>
<div class="grid">
{% for chart in section.charts %}
{{ figure(chart) }}
{% endfor %}
</div>
</section>
{% endfor %}
{% if samples %}
<section aria-labelledby="samples">
<h2 id="samples">Sample rollouts</h2>
<div class="grid">
{% for group in samples %}
<div class="card long">
<h3>{{ group.run }}, step {{ group.step }}</h3>
<p class="note">{{ group.counts }}</p>
{% for row in group.right %}{{ sample(row, "right") }}{% endfor %}
{% for row in group.wrong %}{{ sample(row, "wrong") }}{% endfor %}
</div>
{% endfor %}
</div>
</section>
{% endif %}
<section aria-labelledby="config">
<h2 id="config">Config</h2>
<div class="card long scroll">
{% if runs|length > 1 %}
<p class="note">Marked rows differ between the runs.</p>
{% endif %}
<div class="{{ 'columns' if runs|length == 1 }}">
<table>
<thead><tr><th scope="col">Key</th>{{ run_heads() }}</tr></thead>
<tbody>
{% for setting in settings %}
<tr{% if setting.differs %} class="differs"{% endif %}><th scope="row" class="code">{{ setting.key }}</th>
{%- for value in setting["values"] %}<td class="value">{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
</div>
{% if leftovers %}
<h2>Everything else</h2>
<details class="card long scroll">
<summary>Last value of {{ leftovers|length }} other metrics</summary>
<table>
<thead><tr><th scope="col">Metric</th>{{ run_heads() }}</tr></thead>
<tbody>
{% for name, values in leftovers %}
<tr><th scope="row" class="code">{{ name }}</th>
{%- for value in values %}<td class="value">{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</details>
{% endif %}
</section>
</main>
</body>
</html>
"""
