// One answer on the page: its tokens, what is known of each, and its figures.
// Text only ever enters by textContent: whatever a model says, it stays text.

import { tip } from "./tip.js";

const SVG = "http://www.w3.org/2000/svg";

export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

export class Answer {
  constructor() {
    this.root = element("article", "turn answer");
    this.words = element("div", "words waiting");
    this.words.tabIndex = 0;
    this.words.setAttribute("role", "group");
    this.words.setAttribute("aria-label", "Answer. Arrow keys walk through its tokens.");
    this.root.append(this.words);
    this.text = "";
    this.tokens = [];
    this.spans = [];
    this.current = -1;
    this.sentAt = performance.now();
    this.firstAt = this.lastAt = 0;
    this.numInFirst = 0; // tokens of the first chunk, whose time is the first token's
    this.statistics = null;
    this.#listen();
  }

  // Adds a chunk. Returns whether it brought text or tokens.
  take(chunk) {
    if (chunk.metrics) this.statistics = chunk.metrics.speculative_decoding;
    const content = chunk.choices[0]?.delta.content ?? "";
    const tokens = chunk.draftline?.tokens ?? [];
    if (!content && !tokens.length) return false;
    this.lastAt = performance.now();
    if (!this.firstAt) {
      this.firstAt = this.lastAt;
      this.numInFirst = tokens.length;
    }
    const known = tokens.map((token) => token.text).join("");
    for (const token of tokens) this.#add(token);
    // The last chunk may hold text that no token of its own brought along.
    if (content.length > known.length) this.words.append(content.slice(known.length));
    this.text += content;
    return true;
  }

  #add(token) {
    const span = element("span", `token ${token.origin}`, token.text);
    if (token.position === 0) span.classList.add("start");
    span.style.setProperty("--place", Math.min(token.position, 7));
    this.tokens.push(token);
    this.spans.push(span);
    this.words.append(span);
  }

  // Ends the answer. `note` says why, if there is something to say.
  finish(note = "") {
    this.words.classList.remove("waiting");
    if (!this.tokens.length) return;
    const list = element("dl", "figures");
    for (const [name, value, title] of this.figures()) {
      const row = element("div");
      if (title) row.title = title;
      row.append(element("dt", "", name), element("dd", "", value));
      list.append(row);
    }
    if (this.statistics?.num_spec_steps) list.append(histogram(this.statistics.acceptance_histogram));
    if (note) list.append(element("span", "note", note));
    list.append(this.#copyButton());
    this.root.append(list);
  }

  // [name, value, explanation] of everything worth knowing.
  figures() {
    const seconds = (this.lastAt - this.firstAt) / 1000;
    // The prompt's own step, which has no draft, emits the first token; decoding begins after it.
    const decoded = this.tokens.slice(this.tokens[0].num_drafted === 0 ? 1 : 0);
    const steps = decoded.filter((token) => token.position === 0).length;
    const rows = [];
    if (steps > 0) {
      const length = decoded.length / steps;
      rows.push(["accepted length", length.toFixed(2), "Tokens per step of the target, its own included"]);
    }
    if (this.statistics?.num_draft_tokens) {
      const rate = Math.round(100 * this.statistics.draft_acceptance_rate);
      rows.push(["drafts accepted", `${rate} %`, `${this.statistics.num_accepted_draft_tokens} of ${this.statistics.num_draft_tokens}`]);
    }
    if (seconds > 0) rows.push(["speed", `${((this.tokens.length - this.numInFirst) / seconds).toFixed(1)} tok/s`, "After the first token"]);
    rows.push(["first token", `${Math.round(this.firstAt - this.sentAt)} ms`, "From sending to the first token, as this page saw it"]);
    rows.push(["tokens", String(this.tokens.length), ""]);
    return rows;
  }

  fail(message, retry) {
    const box = element("div", "failure");
    box.setAttribute("role", "alert");
    box.append(element("span", "", message));
    const button = element("button", "", "Try again");
    button.type = "button";
    button.addEventListener("click", retry);
    box.append(button);
    this.root.append(box);
  }

  #copyButton() {
    const button = element("button", "", "Copy");
    button.type = "button";
    button.hidden = !navigator.clipboard;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(this.text);
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    });
    return button;
  }

  #listen() {
    this.words.addEventListener("pointerover", (event) => {
      const index = this.spans.indexOf(event.target);
      if (index >= 0) tip.show(event.target, describe(this.tokens[index]));
    });
    this.words.addEventListener("pointerleave", () => tip.hide());
    this.words.addEventListener("blur", () => this.#walkTo(-1));
    this.words.addEventListener("keydown", (event) => {
      const to = { ArrowRight: this.current + 1, ArrowLeft: this.current - 1, Home: 0, End: this.spans.length - 1 }[event.key];
      if (event.key === "Escape") this.#walkTo(-1);
      if (to === undefined || !this.spans.length) return;
      event.preventDefault();
      this.#walkTo(Math.max(0, Math.min(to, this.spans.length - 1)));
    });
  }

  #walkTo(index) {
    this.spans[this.current]?.classList.remove("current");
    this.current = index;
    const span = this.spans[index];
    if (!span) return tip.hide();
    span.classList.add("current");
    span.scrollIntoView({ block: "nearest" });
    tip.show(span, describe(this.tokens[index]));
  }
}

// [headline, detail, ...] of a token.
function describe(token) {
  const share = 100 * Math.exp(token.logprob);
  const percent = share >= 99.95 ? "100" : share.toPrecision(share < 1 ? 1 : 3);
  const likely = `target's log-probability ${token.logprob.toFixed(2).replace("-", "−")} (${percent} %)`;
  if (token.origin === "draft") {
    return ["Drafted and accepted", `place ${token.position + 1} of ${token.num_drafted} in the block`, likely];
  }
  if (token.num_drafted === 0) return ["The target's own", "this step had no draft to check", likely];
  if (token.position === token.num_drafted) return ["Bonus", `all ${token.num_drafted} drafts were accepted, and this came on top`, likely];
  return ["The target's own", `instead of the draft's guess at place ${token.position + 1} of ${token.num_drafted}`, likely];
}

// Bars: in how many steps none, one, two ... drafts were accepted.
function histogram(counts) {
  const svg = document.createElementNS(SVG, "svg");
  const most = Math.max(...counts, 1);
  svg.setAttribute("class", "histogram");
  svg.setAttribute("viewBox", `0 0 ${counts.length * 4 - 1} 12`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  const words = counts.map((count, accepted) => `${accepted}: ${count}`).join(", ");
  const title = document.createElementNS(SVG, "title");
  title.textContent = `Steps by accepted drafts: ${words}`;
  svg.append(title);
  counts.forEach((count, index) => {
    const bar = document.createElementNS(SVG, "rect");
    const height = Math.max(0.6, (12 * count) / most);
    for (const [name, value] of Object.entries({ x: index * 4, y: 12 - height, width: 3, height })) bar.setAttribute(name, value);
    svg.append(bar);
  });
  return svg;
}
