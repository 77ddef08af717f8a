// Figures: metrics along the path, the plane of two directions, and the change of each layer, as SVG.
// Every function draws for `alphas`, the values of the sliders by name, from the program's `facts`.

const SVG = "http://www.w3.org/2000/svg";
export const short = v => String(+v.toPrecision(3));

function make(name, attributes, parent, text) {
  const element = document.createElementNS(SVG, name);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}
function canvas(parent, width, height, label) {
  parent.replaceChildren();
  return make("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label}, parent);
}
function scale(low, high, from, to) {
  return v => from + (v - low) / (high - low || 1) * (to - from);
}
function ticks(low, high, count) {
  const raw = (high - low || 1) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(k => k * power).find(s => s >= raw), values = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) values.push(+(k * step).toPrecision(12));
  return values;
}

// The colours of matplotlib's viridis.
const STOPS = [[68,1,84],[71,44,122],[59,81,139],[44,113,142],[33,144,141],[39,173,129],[92,200,99],[170,220,50],[253,231,37]];
function colour(t) {
  const x = Math.min(Math.max(t, 0), 1) * (STOPS.length - 1), i = Math.min(Math.floor(x), STOPS.length - 2);
  return `rgb(${STOPS[i].map((v, k) => Math.round(v + (x - i) * (STOPS[i + 1][k] - v))).join()})`;
}

// ---- metrics

export function drawMetrics(curves, facts, alphas) {
  const {metrics, varied} = facts.report;
  curves.className = metrics.length === 1 ? "one" : "";
  while (curves.children.length < metrics.length) curves.append(document.createElement("div"));
  metrics.forEach((m, i) => (varied.length === 1 ? drawCurve : drawMap)(curves.children[i], m, facts.report, alphas));
}

// The mean of a metric along one direction, with error bars, the chord between the ends, and the present point.
function drawCurve(parent, metric, report, alphas) {
  const name = report.varied[0], W = 320, H = 200, left = 46, right = 10, top = 24, bottom = 34;
  const points = report.points.map(p => ({x: p.at[name], y: p.mean[metric], e: p.se[metric] || 0}))
    .filter(p => p.y !== null).sort((a, b) => a.x - b.x);
  const svg = canvas(parent, W, H, `${metric} along ${name}`);
  make("text", {x: 4, y: 14, "class": "bold"}, svg, metric);
  if (!points.length) return;
  const now = alphas[name], xs = points.map(p => p.x), lows = points.map(p => p.y - p.e), highs = points.map(p => p.y + p.e);
  const x0 = Math.min(...xs), x1 = Math.max(...xs), y0 = Math.min(...lows), y1 = Math.max(...highs), pad = (y1 - y0 || 1) * 0.06;
  const X = scale(x0, x1, left + 6, W - right - 6), Y = scale(y0 - pad, y1 + pad, H - bottom, top);
  const a = Math.max(0, x0), b = Math.min(1, x1);
  if (a < b) make("rect", {x: X(a), y: top, width: X(b) - X(a), height: H - bottom - top, "class": "shade"}, svg);
  for (const t of ticks(y0 - pad, y1 + pad, 4)) {
    make("line", {x1: left, x2: W - right, y1: Y(t), y2: Y(t), "class": "grid"}, svg);
    make("text", {x: left - 5, y: Y(t) + 4, "text-anchor": "end"}, svg, short(t));
  }
  for (const t of ticks(x0, x1, 5)) make("text", {x: X(t), y: H - bottom + 15, "text-anchor": "middle"}, svg, short(t));
  make("text", {x: (left + W - right) / 2, y: H - 4, "text-anchor": "middle"}, svg, name);
  const ends = points.filter(p => p.x === 0 || p.x === 1);
  if (ends.length === 2) make("line", {x1: X(0), y1: Y(ends[0].y), x2: X(1), y2: Y(ends[1].y), "class": "chord"}, svg);
  for (const p of points) if (p.e) make("line", {x1: X(p.x), x2: X(p.x), y1: Y(p.y - p.e), y2: Y(p.y + p.e), "class": "curve"}, svg);
  make("polyline", {points: points.map(p => `${X(p.x)},${Y(p.y)}`).join(" "), "class": "curve"}, svg);
  for (const p of points) make("circle", {cx: X(p.x), cy: Y(p.y), r: 2.2, "class": "point"}, svg);
  for (const p of ends) make("path", {d: `M${X(p.x)} ${Y(p.y) - 5}l5 5l-5 5l-5-5z`, "class": "end"}, svg);
  if (now < x0 || now > x1) return;
  const i = Math.max(points.findIndex(p => p.x >= now), 1), p = points[i - 1], q = points[i] || p;
  const value = q.x === p.x ? p.y : p.y + (now - p.x) / (q.x - p.x) * (q.y - p.y);
  make("line", {x1: X(now), x2: X(now), y1: top, y2: H - bottom, "class": "cursor"}, svg);
  make("circle", {cx: X(now), cy: Y(value), r: 4.5, "class": "present"}, svg);
  make("text", {x: W - right, y: 14, "text-anchor": "end", "class": "now"}, svg, `${short(value)} at ${name} = ${short(now)}`);
}

// The mean of a metric over two directions, as a heat map with the present point.
function drawMap(parent, metric, report, alphas) {
  const [across, down] = report.varied, W = 320, H = 240, left = 50, right = 12, top = 24, bottom = 36;
  const sorted = name => [...new Set(report.points.map(p => p.at[name]))].sort((a, b) => a - b);
  const xs = sorted(across), ys = sorted(down), values = report.points.map(p => p.mean[metric]).filter(v => v !== null);
  const low = Math.min(...values), high = Math.max(...values), w = (W - left - right) / xs.length, h = (H - top - bottom) / ys.length;
  const svg = canvas(parent, W, H, `${metric} over ${across} and ${down}`);
  const range = `${metric}: ${short(low)} to ${short(high)}`, title = make("text", {x: 4, y: 14, "class": "bold"}, svg, range);
  for (const p of report.points) {
    const v = p.mean[metric], x = left + xs.indexOf(p.at[across]) * w, y = H - bottom - (ys.indexOf(p.at[down]) + 1) * h;
    if (v === null) continue;
    const cell = make("rect", {x, y, width: w - 1, height: h - 1, fill: colour((v - low) / (high - low || 1)), "class": "cell"}, svg);
    cell.addEventListener("pointerenter", () => { title.textContent = `${short(v)} at ${across} ${short(p.at[across])}, ${down} ${short(p.at[down])}`; });
    cell.addEventListener("pointerleave", () => { title.textContent = range; });
  }
  const every = Math.ceil(xs.length / 8);
  xs.forEach((x, i) => i % every || make("text", {x: left + (i + 0.5) * w, y: H - bottom + 14, "text-anchor": "middle"}, svg, short(x)));
  ys.forEach((y, i) => make("text", {x: left - 5, y: H - bottom - (i + 0.5) * h + 4, "text-anchor": "end"}, svg, short(y)));
  make("text", {x: (left + W - right) / 2, y: H - 4, "text-anchor": "middle"}, svg, across);
  make("text", {x: 0, y: 0, "text-anchor": "middle", transform: `translate(12 ${(top + H - bottom) / 2}) rotate(-90)`}, svg, down);
  const place = (list, v) => { // in cells, from the middle of the first
    if (v < list[0] || v > list[list.length - 1]) return null;
    const i = Math.max(list.findIndex(x => x >= v), 1);
    return list.length < 2 ? 0 : i - 1 + (v - list[i - 1]) / (list[i] - list[i - 1]);
  };
  const x = place(xs, alphas[across]), y = place(ys, alphas[down]);
  if (x === null || y === null) return;
  const at = {cx: left + (x + 0.5) * w, cy: H - bottom - (y + 0.5) * h, r: 7, "pointer-events": "none"};
  make("circle", {...at, "class": "ring"}, svg);
  make("circle", {...at, "class": "ring inner now"}, svg);
}

// ---- the plane of two directions: the point is dragged, or clicked

export function drawPlane(parent, facts, alphas, moved) {
  const [a, b] = facts.sliders, W = 310, H = 300, left = 50, right = 12, top = 12, bottom = 36;
  const svg = canvas(parent, W, H, `the plane of ${a.name} and ${b.name}`);
  const X = scale(a.low, a.high, left, W - right), Y = scale(b.low, b.high, H - bottom, top);
  make("rect", {x: left, y: top, width: W - left - right, height: H - top - bottom, "class": "shade"}, svg);
  for (const t of ticks(a.low, a.high, 5)) {
    make("line", {x1: X(t), x2: X(t), y1: top, y2: H - bottom, "class": t ? "grid" : "axis"}, svg);
    make("text", {x: X(t), y: H - bottom + 15, "text-anchor": "middle"}, svg, short(t));
  }
  for (const t of ticks(b.low, b.high, 5)) {
    make("line", {x1: left, x2: W - right, y1: Y(t), y2: Y(t), "class": t ? "grid" : "axis"}, svg);
    make("text", {x: left - 5, y: Y(t) + 4, "text-anchor": "end"}, svg, short(t));
  }
  make("text", {x: (left + W - right) / 2, y: H - 4, "text-anchor": "middle"}, svg, a.name);
  make("text", {x: 0, y: 0, "text-anchor": "middle", transform: `translate(12 ${(top + H - bottom) / 2}) rotate(-90)`}, svg, b.name);
  const within = (v, s) => v >= s.low && v <= s.high;
  for (const [x, y, text] of [[0, 0, "base"], [1, 0, a.name], [0, 1, b.name]]) {
    if (!within(x, a) || !within(y, b)) continue;
    make("path", {d: `M${X(x)} ${Y(y) - 5}l5 5l-5 5l-5-5z`, "class": "end"}, svg);
    make("text", {x: X(x) + 8, y: Y(y) - 6}, svg, text);
  }
  const clamp = (v, s) => Math.min(Math.max(v, s.low), s.high);
  make("circle", {cx: X(clamp(alphas[a.name], a)), cy: Y(clamp(alphas[b.name], b)), r: 7, "class": "present"}, svg);
  const place = event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) * W / box.width, y = (event.clientY - box.top) * H / box.height;
    const value = (s, t) => snapped(clamp(+(s.low + t * (s.high - s.low)).toFixed(2), s), s);
    moved({[a.name]: value(a, (x - left) / (W - right - left)), [b.name]: value(b, (H - bottom - y) / (H - bottom - top))});
  };
  parent.onpointerdown = event => { parent.setPointerCapture(event.pointerId); place(event); };
  parent.onpointermove = event => { if (event.buttons) place(event); };
}

// A value that a pointer drags, drawn to a mark nearby: 0, 0.5, 1.
export function snapped(value, slider) {
  const mark = [0, 0.5, 1].find(m => Math.abs(value - m) <= 0.012 * (slider.high - slider.low));
  return mark === undefined ? value : mark;
}

// ---- change by layer: |sum_i alpha_i d_i| / |base|, from the Gram matrices of the deltas

function sizeOf(gram, values) {
  let sum = 0;
  gram.forEach((row, i) => row.forEach((v, j) => { sum += values[i] * values[j] * v; }));
  return Math.sqrt(Math.max(sum, 0));
}
let range; // of the colours: fixed, so that moving a slider changes them

// Returns |change| / |base| of all tensors together. told: is called with the number of the cell that is pointed at.
export function drawChange(parent, facts, alphas, told) {
  const {layers, kinds, cells} = facts.change, values = facts.sliders.map(s => alphas[s.name]);
  const good = cells.filter(c => c.aa > 0);
  if (!range) {
    const whole = good.flatMap(c => facts.sliders.map((_, k) => Math.sqrt(c.gram[k][k] / c.aa))).filter(v => v > 0);
    range = whole.length ? [Math.log10(Math.min(...whole)) - 1, Math.log10(Math.max(...whole)) + 0.3] : [-4, 0];
  }
  const aa = good.reduce((sum, c) => sum + c.aa, 0), total = Math.sqrt(good.reduce((sum, c) => sum + sizeOf(c.gram, values) ** 2, 0) / (aa || 1));
  const W = Math.max(320, parent.clientWidth), left = Math.min(8 + 6.4 * Math.max(...kinds.map(k => k.length)), W * 0.45);
  const w = Math.min((W - left - 8) / layers.length, 44), row = 17, base = 8 + row * kinds.length, H = base + 82;
  const svg = canvas(parent, W, H, "relative change of each kind of tensor in each layer");
  for (const c of cells) {
    const change = c.gram ? sizeOf(c.gram, values) : NaN;
    const size = change === 0 ? 0 : c.aa > 0 ? change / Math.sqrt(c.aa) : null;
    const place = {x: left + c.layer * w, y: 8 + c.kind * row, width: Math.max(w - 1, 1), height: row - 1};
    const kind = size === null ? "cell none" : size === 0 ? "cell unchanged" : "cell";
    const cell = make("rect", {...place, "class": kind}, svg);
    if (kind === "cell") cell.setAttribute("fill", colour((Math.log10(size) - range[0]) / (range[1] - range[0])));
    const number = size !== null ? `${short(size)} of the base` : c.aa === 0 ? "the base is 0" : "no number";
    const told_of = `${kinds[c.kind]}${layers[c.layer] === "" ? "" : `, layer ${layers[c.layer]}`}: ${number}`;
    make("title", {}, cell, told_of);
    cell.addEventListener("pointerenter", () => told(told_of));
  }
  kinds.forEach((k, i) => {
    const most = Math.floor((left - 12) / 6.4), label = k.length > most ? `...${k.slice(3 - most)}` : k;
    make("text", {x: left - 6, y: 8 + i * row + 12.5, "text-anchor": "end"}, svg, label);
  });
  const every = Math.ceil(layers.length / Math.min(20, (W - left) / 24)), first = layers[0] === "" ? 1 : 0;
  layers.forEach((l, i) => l && (i - first) % every || make("text", {x: left + (i + 0.5) * w, y: base + 14, "text-anchor": "middle"}, svg, l || "-"));
  make("text", {x: left + layers.length * w / 2, y: base + 30, "text-anchor": "middle"}, svg, layers[0] === "" ? "layer (-: in none)" : "layer");
  const wide = Math.min(260, W - left - 8), x = scale(range[0], range[1], left, left + wide);
  for (let i = 0; i < 64; i++) make("rect", {x: left + i * wide / 64, y: base + 44, width: wide / 64 + 0.5, height: 10, fill: colour(i / 63)}, svg);
  for (let p = Math.ceil(range[0]); p <= range[1]; p++) make("text", {x: x(p), y: base + 68, "text-anchor": "middle"}, svg, p < -3 || p > 3 ? `1e${p}` : short(10 ** p));
  make("text", {x: left - 6, y: base + 53, "text-anchor": "end"}, svg, "|change| / |base|");
  const key = (y, kind, text) => {
    make("rect", {x: 8, y: base + y, width: 16, height: 11, "class": kind}, svg);
    make("text", {x: 29, y: base + y + 10}, svg, text);
  };
  key(2, "unchanged", "unchanged");
  if (cells.some(c => !(c.aa > 0) && !(c.gram && sizeOf(c.gram, values) === 0))) key(20, "none", "base 0 or NaN");
  return total;
}
