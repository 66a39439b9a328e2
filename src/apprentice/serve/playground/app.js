// The page's behaviour: send instruction and input, show the reply as it streams in, let it be stopped. Nothing is stored.

const element = (id) => document.getElementById(id);
const [form, reply, error, pace, run, stop] = ["ask", "reply", "error", "pace", "run", "stop"].map(element);
let current = null; // the AbortController of the reply being written

async function showModel() {
  try {
    const { model, layout, context } = await (await fetch("health")).json();
    element("model").textContent = `${model} · layout ${layout} · context ${context} tokens`;
    document.title = `${model} · apprentice`;
  } catch {
    element("model").textContent = "the endpoint does not answer";
  }
}

function request() {
  return {
    instruction: element("instruction").value,
    input: element("input").value,
    max_tokens: element("max_tokens").valueAsNumber,
    temperature: element("temperature").valueAsNumber,
    stream: true,
    stream_options: { include_usage: true },
  };
}

// Server-sent events of a response, each parsed.
async function* events(response) {
  let unread = "";
  for await (const text of texts(response.body.getReader())) {
    unread += text;
    const whole = unread.split("\n\n");
    unread = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function* texts(reader) {
  const decoder = new TextDecoder();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield decoder.decode(value, { stream: true });
  }
}

async function write(signal) {
  const response = await fetch("v1/instruct", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(request()),
    signal,
  });
  if (!response.ok) throw new Error(await refusal(response));
  let began = null; // the first token's time: what came before is waiting and reading the prompt
  let pieces = 0;
  for await (const chunk of events(response)) {
    if (chunk.error) throw new Error(chunk.error.message);
    began ??= performance.now();
    const text = chunk.choices[0]?.text ?? "";
    if (text) {
      reply.append(text);
      pieces += 1;
    }
    showPace(chunk.usage?.completion_tokens ?? pieces, performance.now() - began);
  }
}

async function refusal(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the endpoint answered with status ${response.status}.`;
  }
}

function showPace(tokens, milliseconds) {
  const rate = tokens > 1 && milliseconds > 0 ? ` · ${(((tokens - 1) / milliseconds) * 1000).toFixed(1)} tokens/s` : "";
  pace.textContent = `${tokens} ${tokens === 1 ? "token" : "tokens"}${rate}`;
}

function setBusy(busy) {
  run.disabled = busy;
  stop.disabled = !busy;
  reply.dataset.state = busy ? "writing" : "done";
  reply.setAttribute("aria-busy", String(busy));
}

async function ask(event) {
  event.preventDefault();
  if (current) return;
  current = new AbortController();
  reply.textContent = "";
  reply.hidden = false;
  pace.textContent = "waiting …";
  error.hidden = true;
  setBusy(true);
  try {
    await write(current.signal);
  } catch (problem) {
    if (problem.name === "AbortError") {
      pace.textContent += " · stopped";
    } else {
      pace.textContent = "";
      error.textContent = problem instanceof TypeError ? "The endpoint cannot be reached; is it still running?" : problem.message;
      error.hidden = false;
      reply.hidden = !reply.textContent;
    }
  } finally {
    current = null;
    setBusy(false);
  }
}

form.addEventListener("submit", ask);
stop.addEventListener("click", () => current?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") current?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    form.requestSubmit();
  }
});
showModel();
