// Accessible tab lists: arrow keys move, Home and End go to the ends, one tab is in the tab order; hidden tabs are skipped.

export function tabs(list, chosen) {
  const all = [...list.querySelectorAll("[role=tab]")];

  function choose(tab) {
    for (const each of all) {
      each.setAttribute("aria-selected", String(each === tab));
      each.tabIndex = each === tab ? 0 : -1;
    }
    chosen(tab.id.replace("tab-", ""));
  }

  list.addEventListener("click", (event) => {
    const tab = event.target.closest("[role=tab]");
    if (tab) choose(tab);
  });
  list.addEventListener("keydown", (event) => {
    const shown = all.filter((tab) => !tab.hidden);
    const at = shown.indexOf(document.activeElement);
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: shown.length - 1 }[event.key];
    if (at < 0 || next === undefined) return;
    event.preventDefault();
    const tab = shown[(next + shown.length) % shown.length];
    tab.focus();
    choose(tab);
  });
}
