// The shell: pages by the part of the address behind #, colours, and errors in place of a page.

import * as api from "./api.js";
import { element } from "./element.js";

// Name in the address, title in the menu (null: not in it), module with `render(container, api, path)`.
const PAGES = [
  ["runs", "Runs", "./runs.js"],
  ["run", null, "./run.js"],
  ["reports", "Reports", "./reports.js"],
];

let leave = null; // ends what the page has begun
let visit = 0;

async function show() {
  const [name = "runs", ...path] = location.hash.replace(/^#\/?/, "").split("/").filter(Boolean).map(decodeURIComponent);
  if (name === "page") return; // the link that skips to it
  const [, title, module] = PAGES.find(([each]) => each === name) ?? PAGES[0];
  const number = ++visit;
  leave?.();
  leave = null;
  const container = element("div", { class: "page" });
  document.getElementById("page").replaceChildren(container);
  document.title = `${path[0] ?? title ?? "Run"} · apprentice board`;
  for (const link of document.querySelectorAll("#pages a")) {
    const here = link.dataset.page === name || (name === "run" && link.dataset.page === "runs");
    here ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  }
  try {
    const end = await (await import(module)).render(container, api, path);
    if (number === visit) leave = end ?? null;
    else end?.();
  } catch (error) {
    if (!(error instanceof api.ApiError)) console.error(error);
    container.append(element("p", { class: "error", role: "alert" }, error.message));
  }
}

const COLOURS = { "": "as the system", light: "light", dark: "dark" };

function colour(choice) {
  if (choice) document.documentElement.dataset.theme = choice;
  else delete document.documentElement.dataset.theme;
  localStorage.setItem("board-theme", choice);
  document.getElementById("theme").setAttribute("aria-label", `Colours: ${COLOURS[choice]}`);
}

document.getElementById("theme").addEventListener("click", () => {
  const choices = Object.keys(COLOURS);
  colour(choices[(choices.indexOf(document.documentElement.dataset.theme ?? "") + 1) % choices.length]);
});
colour(localStorage.getItem("board-theme") ?? "");
document.getElementById("pages").append(
  ...PAGES.filter(([, title]) => title).map(([name, title]) => element("a", { href: `#/${name}`, "data-page": name }, title)),
);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  document.getElementById("page").focus();
});
addEventListener("hashchange", async () => {
  await show();
  document.getElementById("page").focus({ preventScroll: true });
  scrollTo(0, 0);
});
show();
