// The figures: cost against quality, memory by phase, training curves; one panel a method.
"use strict";

const FILLS = ["", "-open", "-dot", "-open-dot"]; // of a shape, by model

// --- which cost, which quality, which model

function choices(fieldset, options) {
  const first = options.find((o) => !o.missing) || options[0];
  for (const option of options) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    Object.assign(input, { type: "radio", name: fieldset.id, value: option.key });
    input.disabled = Boolean(option.missing);
    input.checked = option === first;
    label.append(input, option.title);
    label.dataset.tip = option.missing ? `not measured: ${option.missing}` : option.what;
    if (option.missing) { label.className = "off"; label.tabIndex = 0; }
    fieldset.append(label);
  }
  const mark = () => {
    for (const label of fieldset.querySelectorAll("label")) {
      label.classList.toggle("chosen", label.firstChild.checked);
    }
  };
  fieldset.addEventListener("change", mark);
  mark();
}

function chosen(fieldset, options) {
  const input = document.querySelector(`#${fieldset} input:checked`);
  return options.find((o) => o.key === input.value);
}

const chosenModel = (id) => models[Number(document.getElementById(id).value)];

// --- cost against quality

// Cases that no other beats on both axes, from the cheapest on.
function front(cases, cost, quality, sign) {
  const sorted = [...cases].sort((a, b) => a[cost] - b[cost] || sign * (a[quality] - b[quality]));
  let best = Infinity;
  return sorted.filter((c) => {
    const isBetter = sign * c[quality] < best;
    if (isBetter) best = sign * c[quality];
    return isBetter;
  });
}

// A logarithmic axis where the values span more than a factor of 20.
function axisType(values) {
  const low = Math.min(...values), high = Math.max(...values);
  return low > 0 && high / low > 20 ? "log" : "linear";
}

// Plotly's own ticks of a short logarithmic axis are bare digits: ours are 1, 2 and 5 of each power.
function logTicks(values) {
  const low = Math.min(...values) / 1.5, high = Math.max(...values) * 1.5;
  const wide = high / low > 1000;
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const digit of wide ? [1] : [1, 2, 5]) {
      const value = digit * 10 ** power;
      if (value >= low && value <= high) ticks.push(value);
    }
  }
  const text = (v) => (v >= 1e6 ? `${v / 1e6}M` : v >= 1e3 ? `${v / 1e3}k` : String(Number(v.toPrecision(2))));
  return { type: "log", tickmode: "array", tickvals: ticks, ticktext: ticks.map(text),
    range: [Math.log10(low), Math.log10(high)] };
}

function axisOf(values, title) {
  const found = values.length && axisType(values) === "log" ? logTicks(values) : { type: "linear" };
  return { ...found, title: { text: title, standoff: 6 } };
}

function hoverText(c, cost, quality) {
  const error = c[`${quality.key}_se`];
  const before = c[`${quality.key}_base`];
  const lines = [
    `<b>${plotText(c.id)}</b>`,
    `${quality.title} ${shownNumber(c[quality.key], quality.unit)}${error === null || error === undefined ? "" : ` ± ${shownNumber(error, quality.unit)}`}`,
  ];
  if (before !== null && before !== undefined) lines.push(`before training ${shownNumber(before, quality.unit)}`);
  lines.push(`${cost.title} ${shownNumber(c[cost.key], cost.unit)}`);
  return lines.join("<br>");
}

function pointTrace(name, model, cases, cost, quality) {
  const mark = marks[name];
  const fill = FILLS[models.indexOf(model) % FILLS.length];
  return {
    type: "scatter", mode: "markers", name: plotText(name),
    x: cases.map((c) => c[cost.key]), y: cases.map((c) => c[quality.key]),
    marker: { symbol: mark.symbol + fill, color: mark.colour, size: 12, line: { color: fill.startsWith("-open") ? mark.colour : "#fff", width: fill ? 2 : 1 } },
    ...(cases.some((c) => c[`${quality.key}_se`]) ? {
      error_y: { type: "data", array: cases.map((c) => c[`${quality.key}_se`] || 0), thickness: 1, width: 3, color: mark.colour },
    } : {}),
    text: cases.map((c) => hoverText(c, cost, quality)), hovertemplate: "%{text}<extra></extra>",
  };
}

// What the model was before training, as most cases say: a 4-bit base has a value of its own.
function baseLine(cases, quality) {
  const counts = new Map();
  for (const c of cases) {
    const base = c[`${quality.key}_base`];
    if (base !== null && base !== undefined) counts.set(base, (counts.get(base) || 0) + 1);
  }
  const [most] = [...counts].sort((a, b) => b[1] - a[1]);
  return most ? most[0] : null;
}

// A line over the whole panel, named where the axis begins: there no case is.
function baseMark(base, isLog) {
  const at = isLog ? Math.log10(base) : base;
  return {
    shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: base, y1: base, layer: "below", line: { color: "#8a939d", width: 1, dash: "dash" } }],
    annotations: [{ text: "before training", xref: "paper", x: 0, xanchor: "left", y: at, yanchor: "bottom", showarrow: false, font: { color: "#57606a", size: 11 } }],
  };
}

function paretoPanel(plot, cases, cost, quality, names, isAcross) {
  const known = cases.filter((c) => c[cost.key] !== null && c[quality.key] !== null && !hidden.has(c.adapter));
  const sign = quality.better === "lower" ? 1 : -1;
  const line = front(known, cost.key, quality.key, sign);
  const traces = [{
    type: "scatter", mode: "lines", hoverinfo: "skip", x: line.map((c) => c[cost.key]), y: line.map((c) => c[quality.key]),
    line: { color: "#57606a", width: 1.5, dash: "dot", shape: "hv" },
  }];
  for (const name of Object.keys(marks)) {
    for (const model of names) {
      const own = known.filter((c) => c.adapter === name && c.model === model);
      if (own.length) traces.push(pointTrace(name, model, own, cost, quality));
    }
  }
  const unit = (o) => (o.unit ? `, ${o.unit}` : "");
  const x = axisOf(known.map((c) => c[cost.key]), `${cost.title}${unit(cost)}  ← better`);
  if (x.type === "linear") x.rangemode = "tozero";
  const base = isAcross ? null : baseLine(known, quality);
  const y = axisOf([...known.map((c) => c[quality.key]), ...(base === null ? [] : [base])], `${quality.title}${unit(quality)} ${quality.better === "lower" ? "←" : "→"} better`);
  const extras = base === null ? {} : baseMark(base, y.type === "log");
  if (base !== null) traces.push({ x: [traces[1].x[0]], y: [base], mode: "markers", marker: { opacity: 0 }, hoverinfo: "skip" }); // the axis reaches to it
  draw(plot, traces, x, y, extras);
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", `${quality.title} against ${cost.title}: ${known.length} cases${isAcross ? " of all models" : ""}`);
}

// --- sections: each makes its panels once and redraws them

function panelsOf(id) {
  const parent = document.getElementById(id);
  return parent === null ? {} : Object.fromEntries(methods.map((m) => [m, panel(parent, m)]));
}

// Panels of methods without any case of the model are not shown.
function each(panels, cases, drawOne) {
  for (const method of methods) {
    const own = cases.filter((c) => c.method === method);
    panels[method].parentElement.hidden = own.length === 0;
    if (own.length) drawOne(panels[method], own, method);
  }
}

choices(document.getElementById("cost"), data.costs);
choices(document.getElementById("quality"), data.qualities);
const paretoPanels = panelsOf("pareto-panels");
const acrossPanels = panelsOf("across-panels");

function drawPareto() {
  const cost = chosen("cost", data.costs), quality = chosen("quality", data.qualities);
  const model = chosenModel("pareto-model");
  each(paretoPanels, data.cases.filter((c) => c.model === model), (plot, cases) =>
    paretoPanel(plot, cases, cost, quality, [model], false));
  if (models.length > 1) {
    const bits = data.qualities.find((q) => q.key === "bits_per_byte");
    each(acrossPanels, data.cases, (plot, cases) => paretoPanel(plot, cases, cost, bits, models, true));
  }
}

// `axesOf` gives the titles of both axes, of a panel's first case.
function drawLines(panels, model, traceOf, axesOf, extras) {
  each(panels, data.cases.filter((c) => c.model === model && !hidden.has(c.adapter)), (plot, cases) => {
    const traces = cases.map((c) => {
      const mark = marks[c.adapter];
      return { type: "scatter", name: plotText(c.id), line: { color: mark.colour, width: 2, dash: mark.dash },
        text: plotText(c.id), ...traceOf(c, mark) };
    });
    draw(plot, traces, ...axesOf(cases[0]), extras);
  });
}

const memoryPanels = panelsOf("memory-panels");
function drawMemory() {
  const model = chosenModel("memory-model");
  const phases = data.phases.filter((p) => data.cases.some((c) => c.model === model && p in c.phases));
  const inside = data.headline.map((p) => phases.indexOf(p)).filter((i) => i >= 0);
  const shade = inside.length
    ? [{ type: "rect", xref: "x", yref: "paper", x0: Math.min(...inside) - 0.5, x1: Math.max(...inside) + 0.5, y0: 0, y1: 1, fillcolor: "#eef2f6", line: { width: 0 }, layer: "below" }]
    : [];
  const sources = new Set(data.cases.filter((c) => c.model === model && c.memory_source).map((c) => c.memory_source));
  document.getElementById("memory-source").textContent = sources.size
    ? `Read from: ${[...sources].join("; ")}.` : "No phase of this model has a reading.";
  drawLines(memoryPanels, model, (c, mark) => ({
    mode: "lines+markers", x: phases.filter((p) => p in c.phases).map(plotText), y: phases.filter((p) => p in c.phases).map((p) => c.phases[p]),
    marker: { symbol: mark.symbol, color: mark.colour, size: 9 },
    hovertemplate: "<b>%{text}</b><br>%{x}: %{y:,.1f} MiB<extra></extra>",
  }), () => [{ type: "category", categoryorder: "array", categoryarray: phases.map(plotText), tickangle: -45 },
  { title: { text: "highest memory, MiB", standoff: 6 }, rangemode: "tozero" }], { shapes: shade });
}

const trainingPanels = panelsOf("training-panels");
function drawTraining() {
  drawLines(trainingPanels, chosenModel("training-model"), (c, mark) => {
    const [steps, losses] = c.curve;
    const every = Math.max(Math.ceil(steps.length / 6), 1); // a shape now and then names the line
    return {
      mode: "lines+markers", x: steps, y: losses,
      marker: { symbol: mark.symbol, color: mark.colour, opacity: 1, size: steps.map((_, i) => (i % every === every - 1 || i === steps.length - 1 ? 9 : 0.01)) },
      hovertemplate: "<b>%{text}</b><br>%{x}: %{y:.4~g}<extra></extra>",
    };
  }, (c) => c.curve_axes.map((text) => ({ title: { text, standoff: 6 } })));
}

const key = document.getElementById("model-key");
if (key) key.textContent = `${models.map((m, i) => `${m} ${["filled", "open", "filled with a dot", "open with a dot"][i % 4]}`).join(", ")}.`;

for (const [section, redraw] of [["pareto", drawPareto], ["memory", drawMemory], ["training", drawTraining]]) {
  const element = document.getElementById(section);
  for (const control of element.querySelectorAll("select, fieldset")) control.addEventListener("change", redraw);
  whenSeen(element, redraw);
}
