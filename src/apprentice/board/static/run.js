// The page of one run, live, or of several over each other: #/run/NAME/…

import { chart } from "./chart.js";
import { bytes, element, figure, percent, table } from "./element.js";

const CHARTS = [
  ["Loss", ["loss", "validation_loss"]],
  ["Held-out score", ["held_out"]],
  ["Reward", ["reward"]],
  ["Gradient norm", ["grad_norm"]],
  ["Learning rate", ["learning_rate"]],
  ["Tokens a second and worker", ["tokens_per_s_worker"]],
  ["MFU", ["mfu"]],
  ["Share of a step that waits for data", ["data_wait"]],
  ["Goodput", ["goodput"]],
];
const MOST_POINTS = 4000; // of a line that grows live; then it is asked for again, thinned

export async function render(container, api, names) {
  const runs = await Promise.all(names.map((name) => api.get(api.path`api/runs/${name}`)));
  let window = [null, null];
  const smoothing = element("input", { id: "smoothing", type: "range", min: 0, max: 0.99, step: 0.01, value: 0, onchange: draw });
  const whole = element("button", { type: "button", hidden: true, onclick: () => zoom(null, null) }, "Whole run");
  const grid = element("div", { class: "charts" });
  const live = element("p", { class: "note", role: "status" });
  container.append(
    element("h2", {}, names.join(", ")), live, summary(runs),
    element("div", { class: "tools" }, element("label", { for: "smoothing" }, "Smoothing"), smoothing, whole,
      element("span", { class: "note" }, "Drag over a chart to zoom; Escape shows the whole.")),
    grid, ...(runs.length === 1 ? details(runs[0]) : []));
  const shown = CHARTS.map(([title, metrics]) => [title, metrics.filter((metric) => runs.some((run) => run.series.includes(metric)))]).filter(([, metrics]) => metrics.length);
  const metrics = shown.flatMap(([, each]) => each);
  let data = [];
  let charts = [];

  async function zoom(first, last) {
    window = [first, last];
    whole.hidden = first === null;
    await draw();
  }

  const lines = (wanted) => names.flatMap((name, at) => wanted.filter((metric) => data[at][metric]).map((metric) => ({
    name: [...(names.length > 1 ? [name] : []), ...(wanted.length > 1 || names.length === 1 ? [metric.replaceAll("_", " ")] : [])].join(" "), ...data[at][metric] })));

  async function draw() {
    const query = new URLSearchParams([...metrics.map((metric) => ["metric", metric]), ["smoothing", smoothing.value], ...(window[0] === null ? [] : [["first", window[0]], ["last", window[1]]])]);
    data = metrics.length ? await Promise.all(names.map((name) => api.get(`${api.path`api/runs/${name}/series`}?${query}`))) : names.map(() => ({}));
    const events = runs.length === 1 ? runs[0].events : [];
    charts = shown.map(([title, wanted]) => [chart(title, lines(wanted), { events, onzoom: zoom }), wanted]);
    grid.replaceChildren(...charts.map(([each]) => each.box));
    if (!charts.length) grid.append(element("p", { class: "note" }, "No step has been recorded yet."));
  }

  function take(at, records) {
    if (window[0] !== null || !charts.length) return void draw();
    const past = Number(smoothing.value);
    for (const record of records) {
      for (const metric of metrics.filter((each) => typeof record[each] === "number")) {
        const line = data[at][metric];
        while (line.steps.length && line.steps.at(-1) >= record.step) line.steps.pop(), line.values.pop();
        const before = line.values.at(-1);
        line.values.push(before === undefined || !past ? record[metric] : past * before + (1 - past) * record[metric]);
        line.steps.push(record.step);
      }
    }
    if (data[at].loss?.steps.length > MOST_POINTS) return void draw();
    for (const [each, wanted] of charts) each.update(lines(wanted));
    const last = records.findLast((record) => "loss" in record);
    if (last) live.textContent = `live: ${names[at]} at step ${figure(last.step)} of ${figure(last.steps)}, loss ${figure(last.loss)}`;
  }

  await draw();
  const ends = runs.map((run, at) => (run.holder ? api.stream(api.path`api/runs/${run.name}/records`, {
    records: (records) => take(at, records),
    end: () => (live.textContent = `${run.name} is not held by a process any more.`),
  }) : () => {}));
  return () => ends.forEach((end) => end());
}

function summary(runs) {
  const rows = [
    ["state", (run) => run.state],
    ["step", (run) => `${figure(run.step)} of ${figure(run.steps)}`],
    ["loss", (run) => figure(run.loss)],
    ["validation loss", (run) => figure(run.validation_loss)],
    ["score", (run) => figure(run.score, 3)],
    ["goodput", (run) => (run.time ? percent(run.goodput) : "–")],
    ["GPU-hours", (run) => figure(run.gpu_hours, 3)],
    ["memory expected and held", (run) => `${bytes(run.training?.expected_memory)} and ${bytes(run.training?.peak_memory ?? run.memory?.peak)}`],
    ["held by", (run) => run.holder ?? "nobody"],
  ];
  return table("Figures", ["", ...runs.map((run) => run.name)], rows.map(([title, value]) => [title, ...runs.map(value)]));
}

function details(run) {
  const parts = [];
  const section = (title, ...content) => parts.push(element("section", { class: "pane" }, element("h3", {}, title), ...content));
  if (run.has_report) parts.push(element("p", {}, element("a", { href: `#/reports/${encodeURIComponent(run.name)}` }, "The report of this run")));
  if (run.time) section("Where the time went", element("p", {}, `${run.sentence}.`), timeBars(run.time.seconds));
  if (run.events.length) section("Restarts, checkpoints and messages", table("Events", ["step", "what"], run.events.map((event) => [{ value: figure(event.step), class: "number" }, event.text])));
  if (run.checkpoints.length) section("Checkpoints", element("p", {}, run.checkpoints.join(", ")));
  if (run.ledger?.tasks) {
    section("The mixture: requested and realised", table("Mixture", ["task", "requested", "realised", "of target tokens", "examples", "passes"],
      Object.entries(run.ledger.tasks).map(([task, line]) => [task, ...[percent(line.requested_share), percent(line.share_of_examples), percent(line.share_of_target_tokens), figure(line.examples), figure(line.passes_over_its_rows)].map((value) => ({ value, class: "number" }))])));
  }
  if (run.samples.length) section("Replies to the same instructions over time", ...samples(run.samples));
  return parts;
}

function timeBars(seconds) {
  const total = Object.values(seconds).reduce((sum, each) => sum + each, 0) || 1;
  return element("ul", { class: "bars" }, ...Object.entries(seconds).filter(([, each]) => each > 0).map(([kind, each]) => element("li", {},
    element("span", {}, kind.replaceAll("_", " ")), element("meter", { min: 0, max: 1, value: each / total, "aria-label": kind.replaceAll("_", " ") }), element("span", { class: "number" }, `${figure(each, 3)} s`))));
}

function samples(all) {
  const at = element("input", { type: "range", min: 0, max: all.length - 1, value: all.length - 1, "aria-label": "Step of the replies" });
  const box = element("div");
  const draw = () => {
    const { step, samples: replies } = all[Number(at.value)];
    at.setAttribute("aria-valuetext", `step ${step}`);
    box.replaceChildren(element("p", { class: "note" }, `at step ${figure(step)}`), ...replies.flatMap((sample) => [element("p", {}, sample.instruction), element("pre", {}, sample.reply)]));
  };
  at.addEventListener("input", draw);
  draw();
  return [at, box];
}
