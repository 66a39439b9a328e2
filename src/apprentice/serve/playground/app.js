// Playground page: asks one model or two, streams their replies, shows the prompt as the model reads it and the request as code.
// Typed texts are not stored; the key stays in this tab.

import { Pane } from "./pane.js";
import { curl, python } from "./snippets.js";
import { tabs } from "./tabs.js";
import { current as currentTask, fields, showTasks } from "./tasks.js";
import { Refusal, events, read, send, setKey, theKey } from "./wire.js";

const element = (id) => document.getElementById(id);
const MODES = ["instruct", "chat", "task"];
const BASE = new URL(".", location.href).href.replace(/\/$/, "");
let mode = "instruct";
let language = "curl";
let panes = [];
let models = [];
let running = null; // the AbortController of the replies being written

// ---- the form as a request ----

function settings() {
  const number = (id) => element(id).valueAsNumber;
  const stop = element("stop_texts").value.split("\n").filter(Boolean);
  const wanted = { max_tokens: number("max_tokens"), temperature: number("temperature"), top_p: number("top_p"), seed: number("seed"), stop };
  const usual = { temperature: 0, top_p: 1 };
  return Object.fromEntries(
    Object.entries(wanted).filter(([name, value]) => value !== usual[name] && !Number.isNaN(value) && value.length !== 0),
  );
}

function messages(pane, said) {
  const system = element("system").value;
  return [...(system ? [{ role: "system", content: system }] : []), ...pane.turns, { role: "user", content: said }];
}

function asked() {
  return mode === "instruct"
    ? { instruction: element("instruction").value, input: element("input").value }
    : { task: currentTask()?.id ?? "", template: element("wording").value, fields: fields() };
}

function request(pane) {
  const model = pane.model;
  if (mode === "chat") return ["v1/chat/completions", { model, messages: messages(pane, element("message").value), ...settings() }];
  if (mode === "instruct") return ["v1/instruct", { model, ...asked(), ...settings() }];
  const { task, ...rest } = asked();
  return [`v1/tasks/${encodeURIComponent(task)}`, { model, ...rest, max_tokens: settings().max_tokens }];
}

// ---- sending requests ----

async function stream(pane, path, body, signal) {
  const response = await send(path, { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  for await (const chunk of events(response)) {
    const choice = chunk.choices[0];
    pane.write(choice?.text ?? choice?.delta?.content ?? "", chunk.usage?.completion_tokens);
  }
}

async function answerTask(pane, path, body, signal) {
  const question = await (await send("v1/render", { model: pane.model, ...asked() }, signal)).json();
  if (!question.choices.length) {
    const { instruction, input } = question;
    return stream(pane, "v1/instruct", { model: pane.model, instruction, input, ...settings() }, signal);
  }
  const began = performance.now();
  const answer = await (await send(path, body, signal)).json();
  return pane.rank(answer.choices, performance.now() - began);
}

async function write(pane, path, body, signal) {
  try {
    await (mode === "task" ? answerTask : stream)(pane, path, body, signal);
    pane.end();
  } catch (problem) {
    if (problem.name === "AbortError") return pane.stopped();
    pane.fail(problem instanceof TypeError ? "The endpoint cannot be reached; is it still running?" : problem.message);
    pane.refused = problem instanceof Refusal && problem.status === 401;
    if (pane.refused) askForKey(problem.message);
  }
}

async function run(event) {
  event.preventDefault();
  if (running) return;
  let requests;
  try {
    requests = panes.map(request);
  } catch (problem) {
    panes[0].begin();
    panes[0].fail(problem.message);
    return;
  }
  const said = mode === "chat" ? element("message").value : undefined;
  running = new AbortController();
  setBusy(true);
  panes.forEach((pane) => pane.begin(said));
  if (mode === "chat") element("message").value = "";
  await Promise.all(panes.map((pane, at) => write(pane, ...requests[at], running.signal)));
  if (mode === "chat" && panes.some((pane) => !pane.error.hidden) && !element("message").value) element("message").value = said;
  running = null;
  setBusy(false);
  refresh();
}

function setBusy(busy) {
  element("run").disabled = busy || (mode === "task" && !currentTask());
  element("stop").disabled = !busy;
  document.body.dataset.busy = String(busy);
}

// ---- panels beside the reply: the prompt, the request as code ----

function refresh() {
  showChosen();
  if (element("code").open) showCode();
  clearTimeout(refresh.later);
  if (element("reads").open) refresh.later = setTimeout(showReads, 150);
}

function showChosen() {
  const { max_tokens, temperature, ...rest } = settings();
  const more = Object.keys(rest).map((name) => name.replace("_", "-"));
  element("chosen").textContent = [`at most ${max_tokens ?? "all"} tokens`, `temperature ${temperature ?? 0}`, ...more].join(" · ");
}

function showCode() {
  let text;
  try {
    text = (language === "curl" ? curl : python)(BASE, ...request(panes[0]), Boolean(theKey()));
  } catch (problem) {
    text = problem.message;
  }
  element("code-text").textContent = text;
  element("code-text").setAttribute("aria-labelledby", `tab-${language}`);
}

async function showReads() {
  const [text, count] = [element("reads-text"), element("reads-count")];
  try {
    const body = mode === "chat" ? { messages: messages(panes[0], element("message").value) } : asked();
    const rendered = await (await send("v1/render", { model: panes[0].model || undefined, ...body })).json();
    text.textContent = rendered.text;
    count.textContent = `${rendered.token_ids.length} tokens`;
  } catch (problem) {
    [text.textContent, count.textContent] = [problem.message, ""];
  }
}

async function copy() {
  const text = element("code-text");
  getSelection().selectAllChildren(text);
  try {
    await navigator.clipboard.writeText(text.textContent);
  } catch {
    document.execCommand("copy"); // a page without HTTPS has no navigator.clipboard
  }
  element("copy").textContent = "Copied";
  setTimeout(() => (element("copy").textContent = "Copy"), 1500);
}

// ---- modes, models, key, colours ----

function setMode(chosen) {
  mode = chosen;
  document.body.dataset.mode = mode;
  for (const name of MODES) {
    element(`panel-${name}`).hidden = name !== mode;
    element(`panel-${name}`).disabled = name !== mode;
  }
  element("run").disabled = Boolean(running) || (mode === "task" && !currentTask());
  element("run-key").textContent = mode === "chat" ? "⏎" : "Ctrl ⏎";
  setPanes();
}

function setPanes() {
  running?.abort();
  const second = element("second").value;
  const names = models.length > 1 ? [element("first").value, ...(second ? [second] : [])] : [models[0] ?? ""];
  panes = names.map((name) => new Pane(name));
  panes.forEach((pane) => (pane.title = panes.length > 1 ? pane.model : mode === "chat" ? "Conversation" : "Reply"));
  element("panes").replaceChildren(...panes.map((pane) => pane.element));
  document.body.dataset.panes = String(panes.length);
  refresh();
}

function showModels(names) {
  if (names.join("\n") === models.join("\n")) return;
  models = names;
  const options = (list) => list.map(([text, value]) => new Option(text, value));
  element("first").replaceChildren(...options(models.map((name) => [name, name])));
  element("second").replaceChildren(...options([["nothing", ""], ...models.map((name) => [name, name])]));
  element("models").hidden = models.length < 2;
  if (models.length === 2) element("second").value = models[1];
  if (panes.every((pane) => pane.isEmpty)) setPanes(); // replies on the screen stay
}

function askForKey(why) {
  element("key-wrong").textContent = why;
  element("key-wrong").hidden = !why || !theKey(); // without a key the box's own text is enough
  element("key-box").open = true;
  element("key").focus();
}

// The endpoint has accepted the key: closes the key box and clears refusals for want of a key.
function keyIsRight() {
  const asked = element("key-box").open;
  element("key-box").open = false;
  element("key-wrong").hidden = true;
  panes.forEach((pane) => pane.keyIsRight());
  if (asked) document.querySelector("fieldset:not([disabled]) textarea")?.focus();
}

// Without a key no tasks are listed, and the tab says why.
function showTaskTab(listed, anyTasks) {
  element("tab-task").hidden = listed && !anyTasks;
  element("no-tasks").hidden = listed;
  element("pick-task").hidden = !listed;
  if (mode === "task") element("run").disabled = !listed;
}

async function connect() {
  try {
    const { model, layout, context } = await read("health");
    element("model").textContent = `${model} · layout ${layout} · context ${context} tokens`;
    document.title = `${model} · apprentice`;
    showModels([model]);
  } catch {
    element("model").textContent = "the endpoint does not answer";
    return;
  }
  try {
    const [listed, tasks] = await Promise.all([read("v1/models"), read("v1/tasks")]);
    showModels(listed.data.map((each) => each.id));
    showTasks(tasks.data, refresh);
    showTaskTab(true, tasks.data.length > 0);
    keyIsRight();
  } catch (problem) {
    if (!(problem instanceof Refusal && problem.status === 401)) return;
    showTaskTab(false, false);
    askForKey(problem.message);
  }
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  element("theme").setAttribute("aria-label", `Colours: ${name === "auto" ? "as the system" : name}`);
}

const THEMES = { auto: "dark", dark: "light", light: "auto" };
element("theme").addEventListener("click", () => setTheme(THEMES[document.documentElement.dataset.theme ?? "auto"]));
element("ask").addEventListener("submit", run);
element("ask").addEventListener("input", refresh);
element("stop").addEventListener("click", () => running?.abort());
element("clear").addEventListener("click", setPanes);
element("copy").addEventListener("click", copy);
element("reads").addEventListener("toggle", refresh);
element("code").addEventListener("toggle", refresh);
for (const id of ["first", "second"]) element(id).addEventListener("change", setPanes);
element("key").value = theKey();
element("key").addEventListener("change", () => {
  setKey(element("key").value);
  connect();
});
element("give-key").addEventListener("click", (event) => {
  event.stopPropagation(); // otherwise the click counts as one outside the box, which closes it
  askForKey();
});
document.addEventListener("click", (event) => {
  if (!element("key-box").contains(event.target)) element("key-box").open = false;
});
tabs(document.querySelector(".tabs"), setMode);
tabs(document.querySelector(".tabs.small"), (name) => {
  language = name;
  refresh();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    running?.abort();
    element("key-box").open = false;
  }
  const sends = event.ctrlKey || event.metaKey || (event.target.id === "message" && !event.shiftKey && !event.isComposing);
  if (event.key === "Enter" && sends) {
    event.preventDefault();
    element("ask").requestSubmit();
  }
});
setPanes();
connect();
