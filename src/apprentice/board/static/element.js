// Elements: element("p", {class: "note"}, "text", child) makes one; strings become text, never HTML.

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// A table in a box that scrolls by itself. `columns` are titles; a cell is text or an element, or {value, class}.
export function table(caption, columns, rows) {
  const cell = (content) => {
    const { value, class: kind } = content !== null && typeof content === "object" && !(content instanceof Node) ? content : { value: content };
    return element("td", { class: kind }, value ?? "–");
  };
  return element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    element("table", {},
      element("caption", { class: "unseen" }, caption),
      element("thead", {}, element("tr", {}, ...columns.map((title) => element("th", { scope: "col" }, title)))),
      element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map(cell))))));
}

export const figure = (value, digits = 4) =>
  value === null || value === undefined ? "–" : typeof value !== "number" ? String(value) : Number.isInteger(value) ? value.toLocaleString("en") : Number(value.toPrecision(digits)).toString();

export const bytes = (value) => (value === null || value === undefined ? "–" : `${(value / 2 ** 30).toFixed(2)} GiB`);
export const percent = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)}%`);
