// The page Reports: a run's report, and its questions row by row with base and tuned replies side by side: #/reports/NAME

import { element, figure, table } from "./element.js";

const PAGE = 20;

export async function render(container, api, [name]) {
  if (!name) {
    const scored = (await api.get("api/runs")).runs.filter((run) => run.score !== undefined);
    container.append(element("h2", {}, "Reports"));
    container.append(scored.length
      ? table("Scored runs", ["run", "score", "metrics"], scored.map((run) => [element("a", { href: `#/reports/${encodeURIComponent(run.name)}` }, run.name), { value: figure(run.score, 3), class: "number" }, run.score_metrics?.join(", ")]))
      : element("p", { class: "note" }, "No run has been scored yet; `apprentice evaluate RUN` scores one."));
    return;
  }
  const report = await api.get(api.path`api/reports/${name}`);
  const choose = (id, title, values) => {
    const select = element("select", { id, onchange: () => draw(0) }, element("option", { value: "" }, "all"), ...values.map((value) => element("option", { value }, value)));
    return [element("label", { for: id }, title), select];
  };
  const [taskLabel, task] = choose("task", "Task", report.tasks.map((each) => each.task));
  const wordings = [...new Set(report.tasks.flatMap((each) => Object.values(each.columns).flatMap((cell) => Object.keys(cell.wordings ?? {}))))];
  const [wordingLabel, wording] = choose("wording", "Wording", wordings);
  const [outcomeLabel, outcome] = choose("outcome", "Tuned against base", ["better", "worse", "same"]);
  const list = element("div");
  container.append(
    element("h2", {}, name), ...report.headline.map((line) => element("p", {}, line)),
    element("details", {}, element("summary", {}, "The whole report"), element("iframe", { src: api.path`api/reports/${name}/html`, sandbox: true, title: `Report of ${name}`, loading: "lazy" })),
    element("h3", {}, "Questions"),
    element("div", { class: "tools" }, taskLabel, task, ...(wordings.length ? [wordingLabel, wording] : []), outcomeLabel, outcome), list);

  async function draw(first) {
    const query = new URLSearchParams(Object.entries({ task: task.value, template: wording.value, outcome: outcome.value, first, count: PAGE }).filter(([, value]) => value !== ""));
    const { total, questions } = await api.get(`${api.path`api/reports/${name}/questions`}?${query}`);
    const turn = (title, to, possible) => element("button", { disabled: !possible, onclick: () => draw(to) }, title);
    list.replaceChildren(
      element("p", { class: "note", role: "status" }, total ? `${first + 1} to ${first + questions.length} of ${total} questions` : "No question fits."),
      ...questions.map(question),
      element("div", { class: "buttons" }, turn("Back", Math.max(0, first - PAGE), first > 0), turn("On", first + PAGE, first + PAGE < total)));
  }
  await draw(0);
}

function question(asked) {
  return element("article", { class: "pane" },
    element("h4", {}, `${asked.task}, row ${asked.row}, wording ${asked.template}${asked.shots ? `, ${asked.shots} shots` : ""}`),
    element("pre", {}, asked.prompt),
    element("p", { class: "note" }, `expected: ${asked.target}`),
    element("div", { class: "pair" }, ...asked.replies.map((reply) => element("section", {},
      element("h5", {}, `${reply.subject}: ${figure(reply.score, 3)}`), element("pre", {}, reply.prediction ?? "no reply")))));
}
