// Code for a request, to copy: a curl command, or Python with the package that fits.

const KEY = "APPRENTICE_API_KEY"; // the environment variable in which the examples look for a key

export function curl(base, path, body, keyed) {
  const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const key = keyed ? ` \\\n  -H "Authorization: Bearer $${KEY}"` : "";
  return `curl -s ${base}/${path} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d '${json}'`;
}

export function python(base, path, body, keyed) {
  return path === "v1/chat/completions" ? withOpenai(base, body, keyed) : withHttpx(base, path, body, keyed);
}

function withOpenai(base, body, keyed) {
  const fields = Object.entries(body).map(([name, value]) => `    ${name}=${literal(value, "    ")},`);
  return [
    ...(keyed ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${base}/v1", api_key=${keyed ? `os.environ["${KEY}"]` : '"none"'})`,
    "reply = client.chat.completions.create(",
    ...fields,
    ")",
    "print(reply.choices[0].message.content)",
  ].join("\n");
}

function withHttpx(base, path, body, keyed) {
  const headers = keyed ? `headers={"Authorization": f"Bearer {os.environ['${KEY}']}"}, ` : "";
  return [
    ...(keyed ? ["import os", ""] : []),
    "import httpx",
    "",
    `body = ${literal(body, "")}`,
    `reply = httpx.post("${base}/${path}", json=body, ${headers}timeout=600)`,
    "reply.raise_for_status()",
    path.startsWith("v1/tasks/") ? 'print(reply.json()["answer"])' : 'print(reply.json()["choices"][0]["text"])',
  ].join("\n");
}

// A value of JSON as Python writes it. A JSON string is a Python string too, but for its half surrogate pairs.
function literal(value, indent) {
  const inner = `${indent}    `;
  if (Array.isArray(value)) return value.length ? `[\n${value.map((item) => `${inner}${literal(item, inner)},\n`).join("")}${indent}]` : "[]";
  if (value === null) return "None";
  if (typeof value === "object") {
    const items = Object.entries(value).map(([name, item]) => `${inner}${JSON.stringify(name)}: ${literal(item, inner)},\n`);
    return items.length ? `{\n${items.join("")}${indent}}` : "{}";
  }
  return typeof value === "boolean" ? (value ? "True" : "False") : JSON.stringify(value);
}
