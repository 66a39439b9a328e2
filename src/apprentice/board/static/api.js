// The board's API. `get` reads; `change` shows what the server says would happen, and sends the request again after a yes.

export class ApiError extends Error {}

const parts = (strings, values) => strings.reduce((path, text, at) => path + text + (at < values.length ? encodeURIComponent(values[at]) : ""), "");
export const path = (strings, ...values) => parts(strings, values); // path`api/runs/${name}`

async function ask(address, options = {}) {
  let response;
  try {
    response = await fetch(address, options);
  } catch {
    throw new ApiError("The board does not answer; is it still running?");
  }
  if (response.status === 401) {
    await enterKey();
    return ask(address, options);
  }
  const body = await response.json().catch(() => ({}));
  if (response.ok || response.status === 428) return { status: response.status, body };
  const detail = Array.isArray(body.detail) ? body.detail.map((each) => `${each.loc.join(".")}: ${each.msg}`).join("; ") : body.detail;
  throw new ApiError(body.error?.message ?? detail ?? `The board answers with status ${response.status}.`);
}

export const get = async (address) => (await ask(address)).body;

// Returns the answer, or null where the user says no.
export async function change(method, address, body) {
  const options = { method, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body ?? {}) };
  let answer = await ask(address, options);
  if (answer.status === 428) {
    if (!(await confirmed(answer.body.confirm.sentence))) return null;
    options.headers["X-Confirm"] = answer.body.confirm.token;
    answer = await ask(address, options);
    if (answer.status === 428) throw new ApiError("What would happen has changed meanwhile; try again.");
  }
  say("Done.");
  return answer.body;
}

// Events of a server-sent stream; returns a function that ends it.
export function stream(address, handlers) {
  const source = new EventSource(address);
  for (const [name, handle] of Object.entries(handlers)) source.addEventListener(name, (event) => handle(JSON.parse(event.data)));
  source.addEventListener("end", () => source.close());
  return () => source.close();
}

export function say(text) {
  document.getElementById("status").textContent = text;
}

function confirmed(sentence) {
  const box = document.getElementById("confirm");
  document.getElementById("confirm-text").textContent = sentence;
  box.returnValue = "no";
  box.showModal();
  return new Promise((resolve) => box.addEventListener("close", () => resolve(box.returnValue === "yes"), { once: true }));
}

let entering = null; // one box for all requests that wait for a key

function enterKey() {
  entering ??= askForKey().finally(() => (entering = null));
  return entering;
}

async function askForKey() {
  const box = document.getElementById("key-box");
  const input = document.getElementById("key");
  const wrong = document.getElementById("key-wrong");
  for (;;) {
    box.showModal();
    await new Promise((resolve) => box.addEventListener("close", resolve, { once: true }));
    const response = await fetch("api/session", { method: "POST", headers: { Authorization: `Bearer ${input.value}` } });
    input.value = "";
    if (response.ok) return;
    wrong.textContent = "That is not the board's key.";
    wrong.hidden = false;
  }
}
