"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const COLORS = ["#2f6fde", "#e07b1a", "#2c9a55", "#c8382e", "#8055c9", "#148f9b", "#b8487f", "#7a7f2a", "#555f70"];
const SVG = "http://www.w3.org/2000/svg";
const H = 230, LEFT = 58, RIGHT = 10, TOP = 12, BOTTOM = 24;
const hidden = new Set();
const plots = [];
let smoothing = 0, logScale = false;

DATA.runs.forEach((run, i) => { run.color = COLORS[i % COLORS.length]; });

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
function shape(parent, tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}
function show(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value;
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) return value.toExponential(2);
  return String(+value.toPrecision(5));
}
function time(seconds) {
  if (seconds === null) return "–";
  const h = Math.floor(seconds / 3600), m = Math.floor((seconds % 3600) / 60);
  return h ? `${h} h ${m} min` : m ? `${m} min ${Math.round(seconds % 60)} s` : `${seconds.toFixed(1)} s`;
}
function size(bytes) {
  for (const unit of ["B", "kB", "MB", "GB"]) { if (bytes < 1000) return `${+bytes.toPrecision(3)} ${unit}`; bytes /= 1000; }
  return `${+bytes.toPrecision(3)} TB`;
}
function ticks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= raw);
  const found = [];
  for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-9; t += step) found.push(+t.toPrecision(12));
  return found;
}
function smooth(values) {
  let mean = null, weight = 0;
  return values.map((v) => {
    if (typeof v !== "number") return v;
    mean = (mean || 0) * smoothing + v * (1 - smoothing);
    weight = weight * smoothing + (1 - smoothing);
    return mean / weight;
  });
}
function table(heads, rows) {
  const head = el("tr", {}, ...heads.map(([text, number]) => el("th", number ? { class: "number" } : {}, text)));
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)));
}
function cell(text, number) { return el("td", number ? { class: "number" } : {}, text); }

class Plot {
  constructor(name) {
    this.name = name;
    this.zoom = null;
    this.tip = el("div", { class: "tip soft" });
    this.svg = document.createElementNS(SVG, "svg");
    this.width = 640;
    this.node = el("div", { class: "plot" }, el("h3", {}, name), this.svg, this.tip);
    this.node.dataset.metric = name;
    this.svg.addEventListener("pointermove", (event) => this.moved(event));
    this.svg.addEventListener("pointerleave", () => { this.cursor.replaceChildren(); this.tip.replaceChildren(); });
    this.svg.addEventListener("pointerdown", (event) => { this.from = this.at(event); });
    this.svg.addEventListener("pointerup", (event) => this.released(event));
    this.svg.addEventListener("dblclick", () => { this.zoom = null; this.draw(); });
  }
  at(event) {
    const box = this.svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.width;
    return this.x0 + ((x - LEFT) / (this.width - LEFT - RIGHT)) * (this.x1 - this.x0);
  }
  x(step) { return LEFT + ((step - this.x0) / (this.x1 - this.x0 || 1)) * (this.width - LEFT - RIGHT); }
  y(value) {
    const v = this.log ? Math.log10(value) : value;
    return H - BOTTOM - ((v - this.y0) / (this.y1 - this.y0 || 1)) * (H - TOP - BOTTOM);
  }
  series() {
    return DATA.runs.filter((run) => !hidden.has(run.name) && run.metrics[this.name]).map((run) => {
      const { steps, values } = run.metrics[this.name];
      return { run, steps, values, smooth: smoothing ? smooth(values) : values };
    });
  }
  released(event) {
    const to = this.at(event), from = this.from;
    this.from = null;
    if (from === null || from === undefined || Math.abs(this.x(to) - this.x(from)) < 8) return;
    this.zoom = [Math.min(from, to), Math.max(from, to)];
    this.draw();
  }
  draw() {
    const all = this.series();
    this.width = this.svg.clientWidth || this.width;
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${H}`);
    this.svg.replaceChildren();
    const steps = all.flatMap((s) => s.steps);
    [this.x0, this.x1] = this.zoom || [Math.min(...extremes(steps)), Math.max(...extremes(steps))];
    const inside = all.flatMap((s) => s.values.filter((v, i) => typeof v === "number" && s.steps[i] >= this.x0 && s.steps[i] <= this.x1));
    this.log = logScale && inside.some((v) => v > 0);
    const shown = this.log ? inside.filter((v) => v > 0).map(Math.log10) : inside;
    let [low, high] = extremes(shown);
    const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    [this.y0, this.y1] = [low - pad, high + pad];
    if (!inside.length) { shape(this.svg, "text", { x: this.width / 2, y: H / 2, "text-anchor": "middle" }, "no finite values"); }
    this.axes();
    for (const s of all) this.line(s);
    this.cursor = shape(this.svg, "g", {});
  }
  axes() {
    for (const t of ticks(this.y0, this.y1, 5)) {
      const y = H - BOTTOM - ((t - this.y0) / (this.y1 - this.y0)) * (H - TOP - BOTTOM);
      shape(this.svg, "line", { class: "gridline", x1: LEFT, x2: this.width - RIGHT, y1: y, y2: y });
      shape(this.svg, "text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, show(this.log ? +(10 ** t).toPrecision(3) : t));
    }
    for (const t of ticks(this.x0, this.x1, 6).filter((t) => this.x(t) < this.width - 12)) {
      shape(this.svg, "text", { x: this.x(t), y: H - 7, "text-anchor": "middle" }, show(t));
    }
  }
  line({ run, steps, values, smooth: smoothed }) {
    const visible = (step) => step >= this.x0 && step <= this.x1;
    for (const step of run.restarts.filter(visible)) {
      const x = this.x(step);
      const mark = shape(this.svg, "line", { class: "restart", stroke: run.color, x1: x, x2: x, y1: TOP, y2: H - BOTTOM });
      shape(mark, "title", {}, `${run.name}: restarted at step ${step}`);
    }
    const paths = smoothing ? [[values, "series raw"], [smoothed, "series"]] : [[values, "series"]];
    for (const [numbers, name] of paths) {
      let d = "", pen = false, single = 0;
      numbers.forEach((v, i) => {
        const fits = typeof v === "number" && (!this.log || v > 0) && visible(steps[i]);
        if (fits) { d += `${pen ? "L" : "M"}${this.x(steps[i]).toFixed(1)},${this.y(v).toFixed(1)}`; single += 1; }
        pen = fits;
      });
      shape(this.svg, "path", { class: name, d, stroke: run.color, "vector-effect": "non-scaling-stroke" });
      if (single === 1) {
        const i = numbers.findIndex((v, k) => typeof v === "number" && visible(steps[k]));
        shape(this.svg, "circle", { cx: this.x(steps[i]), cy: this.y(numbers[i]), r: 3, fill: run.color });
      }
    }
    for (const { step, name } of run.checkpoints.filter((c) => visible(c.step))) {
      const x = this.x(step), y = H - BOTTOM;
      const mark = shape(this.svg, "path", { class: "checkpoint", d: `M${x},${y - 9}l5,9h-10z`, fill: run.color });
      shape(mark, "title", {}, `${run.name}: ${name}`);
    }
  }
  moved(event) {
    const step = this.at(event);
    this.cursor.replaceChildren();
    if (step < this.x0 || step > this.x1) return;
    const found = this.series().map((s) => {
      let best = 0;
      s.steps.forEach((other, i) => { if (Math.abs(other - step) < Math.abs(s.steps[best] - step)) best = i; });
      return { run: s.run, step: s.steps[best], value: s.smooth[best] };
    });
    if (!found.length) return;
    const x = this.x(found[0].step);
    shape(this.cursor, "line", { class: "gridline", x1: x, x2: x, y1: TOP, y2: H - BOTTOM });
    for (const f of found) {
      if (typeof f.value === "number" && (!this.log || f.value > 0)) shape(this.cursor, "circle", { cx: this.x(f.step), cy: this.y(f.value), r: 3, fill: f.run.color });
    }
    this.tip.replaceChildren(el("span", {}, `step ${found[0].step}`), ...found.map((f) => el("span", { style: `color:${f.run.color}` }, `${f.run.name}: ${show(f.value)}`)));
  }
}
function extremes(values) {
  let low = Infinity, high = -Infinity;
  for (const v of values) { if (v < low) low = v; if (v > high) high = v; }
  return low <= high ? [low, high] : [0, 1];
}

function runsTable() {
  const first = DATA.groups.length ? DATA.groups[0].metrics.slice(0, 5) : [];
  const heads = [["run"], ["status"], ["time", 1], ["rows", 1], ["restarts", 1], ["checkpoints", 1], ...first.map((n) => [`${n} (last; min; max)`, 1])];
  const rows = DATA.runs.map((run) => {
    const name = el("td", { class: "run" }, el("span", { class: "dot", style: `background:${run.color}` }), run.name);
    name.addEventListener("click", () => {
      hidden.has(run.name) ? hidden.delete(run.name) : hidden.add(run.name);
      name.classList.toggle("hidden", hidden.has(run.name));
      plots.forEach((plot) => plot.draw());
    });
    const status = cell(run.status + (run.error ? `: ${run.error}` : ""));
    if (run.status === "failed") status.className = "failed";
    const values = first.map((n) => run.metrics[n]).map((m) => cell(m ? `${show(m.last)}; ${show(m.min)}; ${show(m.max)}` : "–", 1));
    return el("tr", {}, name, status, cell(time(run.seconds), 1), cell(run.rows, 1), cell(run.num_restarts, 1), cell(run.checkpoints.length, 1), ...values);
  });
  document.getElementById("runs").append(el("h2", {}, "Runs"), table(heads, rows));
}
function checkpointsTable() {
  const all = DATA.runs.flatMap((run) => run.checkpoints.map((c) => ({ run, ...c })));
  if (!all.length) return;
  const rows = all.map((c) => el("tr", {}, cell(c.run.name), cell(c.name), cell(size(c.size_bytes), 1),
    cell(new Date(c.time * 1000).toISOString().slice(0, 19).replace("T", " ")), cell(Object.entries(c.metrics).map(([n, v]) => `${n} ${show(v)}`).join(", ") || "–")));
  document.getElementById("checkpoints").append(el("h2", {}, "Checkpoints"), table([["run"], ["name"], ["size", 1], ["saved (UTC)"], ["metrics"]], rows));
}
function hyperparamsTable() {
  const names = [...new Set(DATA.runs.flatMap((run) => Object.keys(run.hyperparams)))].sort();
  if (!names.length) return;
  const rows = names.map((n) => {
    const values = DATA.runs.map((run) => run.hyperparams[n]);
    const row = el("tr", {}, cell(n), ...values.map((v) => cell(v === undefined ? "–" : v)));
    if (new Set(values).size > 1) row.style.fontWeight = "600";
    return row;
  });
  document.getElementById("hyperparams").append(el("h2", {}, "Hyperparameters"), table([["name"], ...DATA.runs.map((r) => [r.name])], rows));
}

runsTable();
for (const group of DATA.groups) {
  const grid = el("div", { class: "grid" });
  for (const name of group.metrics) { const plot = new Plot(name); plots.push(plot); grid.append(plot.node); }
  document.getElementById("plots").append(el("h2", {}, group.title), grid);
}
checkpointsTable();
hyperparamsTable();
plots.forEach((plot) => plot.draw());
addEventListener("resize", () => plots.forEach((plot) => plot.draw()));
document.getElementById("smoothing").addEventListener("input", (event) => { smoothing = +event.target.value; plots.forEach((plot) => plot.draw()); });
document.getElementById("log").addEventListener("change", (event) => { logScale = event.target.checked; plots.forEach((plot) => plot.draw()); });
