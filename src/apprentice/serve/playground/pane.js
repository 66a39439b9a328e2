// Pane of one model: its turns, its tokens per second, its error.

export class Pane {
  constructor(model) {
    this.model = model;
    this.element = document.getElementById("pane").content.firstElementChild.cloneNode(true);
    [this.thread, this.pace, this.error] = [".thread", ".pace", ".error"].map((part) => this.element.querySelector(part));
    this.clear();
  }

  set title(text) {
    this.element.querySelector("h2").textContent = text;
  }

  get isEmpty() {
    return this.thread.dataset.state === "empty";
  }

  clear() {
    this.turns = []; // of the conversation so far, as the endpoint takes them
    this.thread.textContent = "The reply appears here as it is written.";
    this.thread.dataset.state = "empty";
    this.pace.textContent = "";
    this.error.hidden = true;
    this.refused = false;
  }

  // A key has been accepted: removes the refusal for want of one.
  keyIsRight() {
    if (!this.refused) return;
    if (this.turns.length) [this.error.hidden, this.refused] = [true, false];
    else this.clear();
  }

  // Adds an empty reply; in a conversation earlier turns stay, and `said` is the user's message.
  begin(said) {
    if (said === undefined || this.thread.dataset.state === "empty") this.thread.textContent = "";
    this.error.hidden = true;
    this.pace.textContent = "waiting …";
    this.state = "writing";
    this.asked = said === undefined ? null : this.add("user", said);
    this.reply = this.add("reply", "");
    this.reply.scrollIntoView?.({ block: "nearest" });
    this.count = 0;
    this.began = null; // time of the first token; waiting and reading the prompt come before it
  }

  set state(value) {
    this.thread.dataset.state = value;
    this.thread.setAttribute("aria-busy", String(value === "writing"));
  }

  add(kind, text) {
    const turn = document.createElement("div");
    turn.className = kind;
    turn.textContent = text;
    this.thread.append(turn);
    return turn;
  }

  write(text, tokens) {
    this.began ??= performance.now();
    if (text) {
      this.reply.append(text);
      this.count += 1;
    }
    this.showPace(tokens ?? this.count, performance.now() - this.began);
  }

  showPace(tokens, milliseconds) {
    const rate = tokens > 1 && milliseconds > 0 ? ` · ${(((tokens - 1) / milliseconds) * 1000).toFixed(1)} tokens/s` : "";
    this.pace.textContent = `${tokens} ${tokens === 1 ? "token" : "tokens"}${rate}`;
  }

  // A task's choices, the most probable first.
  rank(choices, milliseconds) {
    const list = document.createElement("ol");
    for (const { choice, probability } of [...choices].sort((one, other) => other.probability - one.probability)) {
      const row = document.createElement("li");
      const share = `${(probability * 100).toFixed(1)} %`;
      for (const [kind, text] of [["choice", choice], ["share", share]]) {
        const part = document.createElement("span");
        part.className = kind;
        part.textContent = text;
        row.append(part);
      }
      row.style.setProperty("--share", `${probability * 100}%`);
      list.append(row);
    }
    this.reply.append(list);
    this.pace.textContent = `${choices.length} choices in ${milliseconds.toFixed(0)} ms`;
  }

  end() {
    if (this.asked) this.turns.push({ role: "user", content: this.asked.textContent }, { role: "assistant", content: this.reply.textContent });
    this.state = "done";
  }

  stopped() {
    this.pace.textContent = this.began === null ? "stopped" : `${this.pace.textContent} · stopped`;
    this.end();
  }

  // A message that got no reply at all is no part of the conversation.
  fail(message) {
    this.pace.textContent = "";
    this.error.textContent = message;
    this.error.hidden = false;
    if (!this.reply.textContent) {
      this.reply.remove();
      this.asked?.remove();
    }
    this.state = this.thread.textContent ? "done" : "none";
  }
}
