// What every figure shares: the data, the tip, which adapters are hidden, and how text is made harmless.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const models = [...new Set(data.cases.map((c) => c.model))];
const methods = [...new Set(data.cases.map((c) => c.method))];
const marks = Object.fromEntries(data.adapters.map((a) => [a.name, a]));
const hidden = new Set(); // adapters switched off in the legends
const redraws = []; // each section's own function, called when `hidden` changes

// Plotly reads some tags in its texts: a name from a file must stay a name.
function plotText(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function shownNumber(value, unit) {
  const size = Math.abs(value);
  const text = size >= 1000
    ? Math.round(value).toLocaleString("en-US")
    : String(Number(value.toPrecision(4)));
  return unit ? `${text} ${unit}` : text;
}

// One tip for everything that has data-tip: on hover, on focus, and on a tap.
const tip = document.getElementById("tip");
function showTip(target) {
  tip.textContent = target.dataset.tip;
  tip.hidden = false;
  const at = target.getBoundingClientRect();
  const size = tip.getBoundingClientRect();
  const left = Math.min(Math.max(at.left, 8), document.documentElement.clientWidth - size.width - 8);
  const below = at.bottom + 6;
  const top = below + size.height < window.innerHeight ? below : at.top - size.height - 6;
  tip.style.left = `${Math.max(left, 8)}px`;
  tip.style.top = `${Math.max(top, 8)}px`;
}
for (const event of ["mouseover", "focusin", "click"]) {
  document.addEventListener(event, (e) => {
    const target = e.target instanceof Element ? e.target.closest("[data-tip]") : null;
    if (target) showTip(target);
    else if (event !== "focusin") tip.hidden = true;
  });
}
document.addEventListener("focusout", () => { tip.hidden = true; });
document.addEventListener("scroll", () => { tip.hidden = true; }, true);
document.addEventListener("keydown", (e) => { if (e.key === "Escape") tip.hidden = true; });

for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    const name = button.dataset.adapter;
    if (hidden.has(name)) hidden.delete(name); else hidden.add(name);
    for (const other of document.querySelectorAll(".legend button")) {
      other.setAttribute("aria-pressed", String(!hidden.has(other.dataset.adapter)));
    }
    for (const redraw of redraws) redraw();
  });
}

// A panel a method: its heading, and the plot below it. Figures are drawn when they come into view.
function panel(parent, title) {
  const box = document.createElement("div");
  box.className = "panel";
  const heading = document.createElement("h4");
  heading.textContent = title;
  const plot = document.createElement("div");
  plot.className = "plot";
  box.append(heading, plot);
  parent.append(box);
  return plot;
}

function draw(plot, traces, xaxis, yaxis, extras) {
  const axis = { linecolor: "#8a939d", gridcolor: "#e8ebee", zeroline: false, automargin: true, ticks: "outside", tickcolor: "#8a939d" };
  const layout = {
    margin: { l: 56, r: 14, t: 10, b: 46 },
    font: { family: "system-ui, sans-serif", size: 12, color: "#1b1f24" },
    paper_bgcolor: "#fff", plot_bgcolor: "#fff",
    showlegend: false, dragmode: false, hovermode: "closest",
    hoverlabel: { align: "left", bgcolor: "#1b1f24", font: { color: "#fff", size: 13 } },
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...extras,
  };
  if (traces.every((trace) => trace.x.length === 0)) {
    layout.annotations = [{ text: "not measured", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5, font: { size: 14, color: "#57606a" } }];
    for (const unused of [layout.xaxis, layout.yaxis]) Object.assign(unused, { showticklabels: false, showgrid: false, ticks: "" });
  }
  Plotly.react(plot, traces, layout, { displayModeBar: false, responsive: true });
}

function whenSeen(section, first) {
  const watcher = new IntersectionObserver((entries) => {
    if (entries.some((e) => e.isIntersecting)) {
      watcher.disconnect();
      first();
      redraws.push(first);
    }
  }, { rootMargin: "400px" });
  watcher.observe(section);
}
