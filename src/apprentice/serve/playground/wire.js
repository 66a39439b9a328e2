// Client of the endpoint: requests with the key, errors in the endpoint's own words, server-sent events.

let key = sessionStorage.getItem("key") ?? "";

export const theKey = () => key;

export function setKey(value) {
  key = value.trim();
  sessionStorage.setItem("key", key);
}

// An error of the endpoint: its message and its status.
export class Refusal extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

// Advice for a refused key on this page; the endpoint's own message is for programs, which send a header.
const keySentence = () =>
  key ? "This endpoint does not know the key; correct it under “Key”." : "This endpoint wants an API key; enter it under “Key”.";

async function checked(response) {
  if (response.ok) return response;
  if (response.status === 401) throw new Refusal(keySentence(), 401);
  let message = `the endpoint answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not the endpoint's error body: a proxy's page
  }
  throw new Refusal(message, response.status);
}

const authorised = () => (key ? { Authorization: `Bearer ${key}` } : {});

export async function read(path) {
  return (await checked(await fetch(path, { headers: authorised() }))).json();
}

export async function send(path, body, signal) {
  const headers = { "Content-Type": "application/json", ...authorised() };
  return checked(await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal }));
}

// Parsed server-sent events of a response; an event that reports an error is thrown.
export async function* events(response) {
  let unread = "";
  for await (const text of texts(response.body.getReader())) {
    unread += text;
    const whole = unread.split("\n\n");
    unread = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refusal(chunk.error.message, 200);
      yield chunk;
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
