// API page: shows each route of openapi.json with its fields.

const made = (name, text = "", kind = "") => {
  const element = document.createElement(name);
  element.textContent = text;
  element.className = kind;
  return element;
};

const named = (schemas, schema) => (schema.$ref ? schemas[schema.$ref.split("/").pop()] : schema);

// A schema's type in a few words: `string`, `array of integer`, `Message`, `"a" or "b"`.
function kind(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.filter((each) => each.type !== "null").map(kind).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.type === "array") return `array of ${schema.items ? kind(schema.items) : "anything"}`;
  return schema.type ?? "anything";
}

function bounds(schema) {
  const of = [schema, ...(schema.anyOf ?? [])];
  const found = (name) => of.map((each) => each[name]).find((value) => value !== undefined);
  const [least, most, above] = [found("minimum"), found("maximum"), found("exclusiveMinimum")];
  return [
    ...(least !== undefined ? [`from ${least}`] : above !== undefined ? [`above ${above}`] : []),
    ...(most !== undefined ? [`to ${most}`] : []),
  ].join(" ");
}

function table(schema) {
  const rows = made("table");
  const head = made("tr");
  head.append(...["field", "type", "default", ""].map((text) => made("th", text)));
  rows.append(head);
  for (const [name, field] of Object.entries(schema.properties ?? {})) {
    const row = made("tr");
    const required = schema.required?.includes(name);
    const usual = required ? "required" : field.default === undefined || field.default === null ? "" : JSON.stringify(field.default);
    row.append(made("td", name, "code"), made("td", kind(field)), made("td", usual), made("td", [bounds(field), field.description].filter(Boolean).join(". "), "note"));
    rows.append(row);
  }
  return rows;
}

function section(title, id) {
  const block = made("section", "", "pane");
  block.id = id;
  block.append(title);
  return block;
}

async function show() {
  const routes = document.getElementById("routes");
  let description;
  try {
    description = await (await fetch("openapi.json")).json();
  } catch {
    routes.replaceChildren(made("p", "The endpoint does not answer.", "error"));
    return;
  }
  const schemas = description.components?.schemas ?? {};
  const shown = new Set();
  const sections = Object.entries(description.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, route]) => {
      const title = made("h2");
      title.append(made("span", method.toUpperCase(), "method"), made("code", path));
      const block = section(title, `${method}-${path.replace(/\W+/g, "-")}`);
      const ref = route.requestBody?.content?.["application/json"]?.schema;
      if (ref) {
        const schema = named(schemas, ref);
        if (ref.$ref) shown.add(ref.$ref.split("/").pop());
        block.append(made("p", schema.description ?? "", "note"), table(schema));
      }
      return block;
    }),
  );
  const parts = Object.entries(schemas).filter(([name, schema]) => schema.properties && !shown.has(name) && !/ValidationError$/.test(name));
  const others = parts.map(([name, schema]) => {
    const block = section(made("h2", name), name);
    block.append(made("p", schema.description ?? "", "note"), table(schema));
    return block;
  });
  routes.replaceChildren(...sections, ...(others.length ? [made("h2", "Parts of requests")] : []), ...others);
}

show();
