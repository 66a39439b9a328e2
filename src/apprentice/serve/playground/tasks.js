// Task picker: the task, its template, and a box for each of its fields, filled with the task's sample row.

const element = (id) => document.getElementById(id);
let tasks = [];

function option(text, value = text) {
  const made = document.createElement("option");
  made.value = value;
  made.textContent = text;
  return made;
}

export function showTasks(found, changed) {
  tasks = found;
  const groups = Map.groupBy(tasks, (task) => task.cluster);
  element("task").replaceChildren(
    ...[...groups].sort().map(([cluster, members]) => {
      const group = document.createElement("optgroup");
      group.label = cluster.replaceAll("_", " ");
      group.append(...members.map((task) => option(task.id)));
      return group;
    }),
  );
  element("task").onchange = () => {
    showFields();
    changed();
  };
  showFields();
}

export const current = () => tasks.find((task) => task.id === element("task").value);

function showFields() {
  const task = current();
  if (!task) return;
  element("wording").replaceChildren(...task.templates.map((name) => option(name.replaceAll("_", " "), name)));
  element("summary").textContent = task.summary;
  element("fields").replaceChildren(
    ...task.fields.flatMap((name) => {
      const label = document.createElement("label");
      label.htmlFor = `field-${name}`;
      label.textContent = name;
      const box = document.createElement("textarea");
      box.id = `field-${name}`;
      const sample = task.sample?.[name];
      box.value = sample === undefined ? "" : typeof sample === "string" ? sample : JSON.stringify(sample);
      box.rows = Math.min(6, 1 + Math.floor(box.value.length / 60));
      return [label, box];
    }),
  );
}

// The boxes' values by field; a field whose sample is not text is parsed as JSON. Throws where that fails.
export function fields() {
  if (!current()) throw new Error("This endpoint knows no tasks, or wants a key before it lists them.");
  const { fields: names, sample } = current();
  return Object.fromEntries(
    names.map((name) => {
      const text = element(`field-${name}`).value;
      if (typeof (sample?.[name] ?? "") === "string") return [name, text];
      try {
        return [name, JSON.parse(text)];
      } catch {
        throw new Error(`Field ${name} is not text but JSON, such as ${JSON.stringify(sample[name])}.`);
      }
    }),
  );
}
