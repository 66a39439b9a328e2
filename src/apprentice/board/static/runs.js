// The page Runs: all runs of the storage, searched, tagged, archived; marked ones over each other.

import { element, figure, table } from "./element.js";

const STATES = { training: "live", exporting: "live", failed: "wrong" };

export async function render(container, api) {
  const { runs, storage, read_only } = await api.get("api/runs");
  const marked = new Set();
  const search = element("input", { id: "search", type: "search", placeholder: "name, state or tag", oninput: draw });
  const archived = element("input", { id: "archived", type: "checkbox", onchange: draw });
  const overlay = element("a", { class: "button", hidden: true }, "");
  const list = element("div");
  const count = element("p", { class: "note", role: "status" });
  container.append(
    element("h2", {}, "Runs"),
    element("div", { class: "tools" },
      element("label", { for: "search" }, "Search"), search,
      element("label", { class: "check" }, archived, "archived too"),
      overlay),
    count, list);

  async function change(method, address, body, name) {
    try {
      const changed = await api.change(method, address, body);
      if (changed) Object.assign(runs.find((run) => run.name === name), changed);
      draw();
    } catch (error) {
      list.prepend(element("p", { class: "error", role: "alert" }, error.message));
    }
  }

  function editTags(run, cell) {
    const input = element("input", { value: run.tags.join(", "), "aria-label": `Tags of ${run.name}, with commas between` });
    const form = element("form", { class: "inline", onsubmit: (event) => {
      event.preventDefault();
      change("PUT", api.path`api/runs/${run.name}/tags`, { tags: input.value.split(",").map((tag) => tag.trim()).filter(Boolean) }, run.name);
    } }, input, element("button", {}, "Set"));
    cell.replaceChildren(form);
    input.focus();
  }

  function row(run) {
    const mark = element("input", { type: "checkbox", "aria-label": `Mark ${run.name}`, onchange: () => {
      mark.checked ? marked.add(run.name) : marked.delete(run.name);
      drawOverlay();
    } });
    mark.checked = marked.has(run.name);
    const tags = element("span", { class: "tags" }, ...run.tags.map((tag) => element("span", { class: "tag" }, tag)));
    if (!read_only) tags.append(element("button", { class: "plain small", "aria-label": `Edit the tags of ${run.name}`, onclick: () => editTags(run, tags) }, "✎"));
    const archive = read_only ? "" : element("button", { class: "plain small", onclick: () =>
      change("PUT", api.path`api/runs/${run.name}/archive`, { archived: !run.archived }, run.name) }, run.archived ? "Take out" : "Archive");
    return [
      mark,
      element("a", { href: `#/run/${encodeURIComponent(run.name)}` }, run.name),
      element("span", { class: `state ${STATES[run.state] ?? ""}` }, run.state),
      { value: run.step === undefined ? "–" : `${figure(run.step)} of ${figure(run.steps)}`, class: "number" },
      { value: figure(run.loss), class: "number" },
      { value: figure(run.validation_loss), class: "number" },
      { value: run.score === undefined ? "–" : `${figure(run.score, 3)}${run.score_metrics ? ` (${run.score_metrics.join(", ")})` : ""}`, class: "number" },
      { value: figure(run.gpu_hours, 3), class: "number" },
      ...(runs.some((each) => each.cost !== null) ? [{ value: run.cost === null ? "–" : run.cost.toFixed(2), class: "number" }] : []),
      element("span", { class: "note" }, run.holder ?? "nobody"),
      tags,
      archive,
    ];
  }

  function drawOverlay() {
    overlay.hidden = marked.size === 0;
    overlay.textContent = marked.size === 1 ? "Open the marked run" : `Lay ${marked.size} runs over each other`;
    overlay.setAttribute("href", `#/run/${[...marked].map(encodeURIComponent).join("/")}`);
  }

  function draw() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = runs.filter((run) => (archived.checked || !run.archived) && words.every((word) => [run.name, run.state, ...run.tags].some((text) => text.toLowerCase().includes(word))));
    count.textContent = runs.length ? `${shown.length} of ${runs.length} runs in ${storage}` : `There is no run in ${storage} yet; \`apprentice train RECIPE\` begins one.`;
    const cost = runs.some((run) => run.cost !== null) ? ["cost"] : [];
    list.replaceChildren(table("Runs", ["", "name", "state", "step", "loss", "validation", "score", "GPU-hours", ...cost, "who holds it", "tags", ""], shown.map(row)));
  }

  draw();
}
