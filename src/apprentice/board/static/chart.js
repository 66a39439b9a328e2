// A chart of lines over the steps, as SVG: drag to zoom, double click or Escape for the whole; arrow keys move the reading line.

import { element, figure } from "./element.js";

const WIDTH = 560, HEIGHT = 220, LEFT = 58, RIGHT = 12, TOP = 12, BOTTOM = 26;

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Three to six round numbers within the bounds.
export function ticks(least, most) {
  const rough = (most - least) / 4 || Math.abs(most) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
  const marks = [];
  for (let at = Math.ceil(least / step) * step; at <= most + step * 1e-9; at += step) marks.push(Number(at.toPrecision(12)));
  return marks;
}

// `lines` are {name, steps, values}; `events` are {step, kind, text}; `onzoom(first, last)` is called with steps, or nulls.
export function chart(title, lines, { events = [], onzoom = () => {} } = {}) {
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: 0 });
  const reading = element("p", { class: "note reading", "aria-live": "polite" });
  const names = lines.length > 1 ? lines.map((line, at) => element("span", { class: `key line-${at % 6}` }, line.name)) : [];
  const legend = element("p", { class: "legend", hidden: !names.length }, ...names);
  const box = element("figure", { class: "chart pane" }, element("figcaption", {}, title), legend, drawing, reading);
  let bounds = null;
  let cursor = null;

  function draw() {
    const full = lines.filter((line) => line.steps.length);
    drawing.replaceChildren();
    if (!full.length) {
      drawing.append(svg("text", { x: WIDTH / 2, y: HEIGHT / 2, "text-anchor": "middle", class: "axis" }, "nothing yet"));
      return;
    }
    const low = (lists) => Math.min(...lists.map((list) => list.reduce((a, b) => Math.min(a, b), Infinity)));
    const high = (lists) => Math.max(...lists.map((list) => list.reduce((a, b) => Math.max(a, b), -Infinity)));
    const steps = full.map((line) => line.steps), values = full.map((line) => line.values);
    const [x0, x1] = [low(steps), Math.max(high(steps), low(steps) + 1)];
    let [y0, y1] = [low(values), high(values)];
    if (y0 === y1) [y0, y1] = [y0 - (Math.abs(y0) / 10 || 1), y1 + (Math.abs(y1) / 10 || 1)];
    const x = (step) => LEFT + ((step - x0) / (x1 - x0)) * (WIDTH - LEFT - RIGHT);
    const y = (value) => HEIGHT - BOTTOM - ((value - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
    bounds = { x0, x1, x };
    drawing.setAttribute("aria-label", `${title}, steps ${x0} to ${x1}: ${full.map((line) => `${line.name} ends at ${figure(line.values.at(-1))}`).join(", ")}`);
    for (const mark of ticks(y0, y1)) {
      drawing.append(svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(mark), y2: y(mark), class: "grid-line" }), svg("text", { x: LEFT - 6, y: y(mark) + 4, "text-anchor": "end", class: "axis" }, figure(mark, 3)));
    }
    for (const mark of ticks(x0, x1)) drawing.append(svg("text", { x: x(mark), y: HEIGHT - 8, "text-anchor": "middle", class: "axis" }, figure(mark)));
    for (const event of events.filter((each) => each.step >= x0 && each.step <= x1)) {
      drawing.append(svg("line", { x1: x(event.step), x2: x(event.step), y1: TOP, y2: HEIGHT - BOTTOM, class: `event ${event.kind}` }, svg("title", {}, `step ${event.step}: ${event.text}`)));
    }
    full.forEach((line) => {
      const at = lines.indexOf(line);
      const points = line.steps.map((step, index) => `${x(step).toFixed(1)},${y(line.values[index]).toFixed(1)}`);
      drawing.append(points.length === 1 ? svg("circle", { cx: points[0].split(",")[0], cy: points[0].split(",")[1], r: 3, class: `dot line-${at % 6}` }) : svg("polyline", { points: points.join(" "), class: `line line-${at % 6}` }));
    });
    if (cursor !== null) drawing.append(svg("line", { x1: x(cursor), x2: x(cursor), y1: TOP, y2: HEIGHT - BOTTOM, class: "cursor" }));
  }

  function read(step) {
    if (!bounds) return;
    cursor = Math.min(bounds.x1, Math.max(bounds.x0, step));
    const near = (line) => line.steps.reduce((best, each, at) => (Math.abs(each - cursor) < Math.abs(line.steps[best] - cursor) ? at : best), 0);
    reading.textContent = lines.filter((line) => line.steps.length).map((line) => `${line.name}: ${figure(line.values[near(line)])} at step ${figure(line.steps[near(line)])}`).join(" · ");
    draw();
  }

  const stepAt = (event) => {
    const frame = drawing.getBoundingClientRect();
    const inside = ((event.clientX - frame.left) / frame.width) * WIDTH;
    return Math.round(bounds.x0 + ((inside - LEFT) / (WIDTH - LEFT - RIGHT)) * (bounds.x1 - bounds.x0));
  };
  let from = null;
  drawing.addEventListener("pointerdown", (event) => (from = bounds && stepAt(event)));
  drawing.addEventListener("pointermove", (event) => bounds && read(stepAt(event)));
  drawing.addEventListener("pointerup", (event) => {
    if (from === null || !bounds) return;
    const [first, last] = [from, stepAt(event)].sort((a, b) => a - b);
    from = null;
    if (last - first > (bounds.x1 - bounds.x0) / 50) onzoom(Math.max(first, bounds.x0), Math.min(last, bounds.x1));
  });
  drawing.addEventListener("dblclick", () => onzoom(null, null));
  drawing.addEventListener("keydown", (event) => {
    if (event.key === "Escape") onzoom(null, null);
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !bounds) return;
    event.preventDefault();
    read((cursor ?? bounds.x1) + move * Math.max(1, Math.round((bounds.x1 - bounds.x0) / 50)));
  });
  draw();
  return { box, update: (changed) => { lines = changed; draw(); } };
}
