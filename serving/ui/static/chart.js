// A line chart over the last two minutes. Colours come from the style sheet, so both themes fit.

import { element } from "./answer.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 300;
const HEIGHT = 100;
export const WINDOW_S = 120;

function shape(name, className) {
  const made = document.createElementNS(SVG, name);
  made.setAttribute("class", className);
  return made;
}

// The next of 1, 2, 5, 10, 20 ... from `value` on.
function roundUp(value) {
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((step) => step * unit >= value) * unit;
}

export class Chart {
  // series: [{name, tone, read(sample), digits, side, least, most, area}]; `read` gives null where there is nothing to
  // say. A scale ends at `most` where that is known, otherwise at a round number from `least` on.
  constructor(title, series, { reference = null } = {}) {
    this.title = title;
    this.series = series.map((one) => ({ side: "left", digits: 0, least: 1, ...one }));
    this.reference = reference;
    this.samples = [];
    this.#build();
  }

  #build() {
    this.root = element("figure", "chart");
    const caption = element("figcaption");
    this.values = element("span", "values");
    caption.append(element("span", "", this.title), this.values);
    this.frame = element("div", "frame");
    this.svg = shape("svg", "");
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("role", "img");
    this.guide = shape("line", "guide");
    this.guide.setAttribute("visibility", "hidden");
    this.rule = shape("line", "reference");
    this.svg.append(this.rule, this.guide);
    for (const one of this.series) {
      one.fill = shape("path", `area tone-${one.tone}`);
      one.line = shape("path", `line tone-${one.tone}`);
      if (one.area) this.svg.append(one.fill);
      this.svg.append(one.line);
    }
    this.scales = {};
    for (const one of this.series) this.frame.append((this.scales[one.side] ??= element("span", `scale ${one.side} tone-${one.tone}`)));
    this.frame.append(this.svg);
    const times = element("div", "times");
    times.append(element("span", "", "2 min ago"), element("span", "", "now"));
    this.root.append(caption, this.frame, times);
    this.svg.addEventListener("pointermove", (event) => this.#point(event));
    this.svg.addEventListener("pointerleave", () => this.#unpoint());
  }

  // samples: oldest first, each with `at` in seconds; now: the right edge.
  draw(samples, now) {
    this.samples = samples;
    this.now = now;
    for (const [side, label] of Object.entries(this.scales)) {
      const here = this.series.filter((one) => one.side === side);
      const seen = here.flatMap((one) => samples.map(one.read).filter((value) => value !== null));
      const top = here[0].most ?? roundUp(Math.max(...seen, ...here.map((one) => one.least)));
      for (const one of here) one.top = top;
      label.textContent = String(top);
    }
    for (const one of this.series) this.#drawSeries(one);
    if (this.reference !== null) {
      const y = HEIGHT * (1 - this.reference / this.series[0].top);
      for (const [name, value] of Object.entries({ x1: 0, x2: WIDTH, y1: y, y2: y })) this.rule.setAttribute(name, value);
    }
    if (!this.pointed) this.#tell(samples.at(-1));
  }

  #drawSeries(one) {
    const runs = [];
    let run = [];
    for (const sample of this.samples) {
      const value = one.read(sample);
      if (value === null) {
        if (run.length) runs.push(run);
        run = [];
      } else {
        run.push([this.#x(sample), HEIGHT * (1 - value / one.top)]);
      }
    }
    if (run.length) runs.push(run);
    const path = (points) => points.map(([x, y], index) => `${index ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
    // A single value is a dot: a line of no length with round ends.
    one.line.setAttribute("d", runs.map((points) => path(points.length > 1 ? points : [points[0], points[0]])).join(""));
    one.fill.setAttribute("d", runs.map((points) => `${path(points)}L${points.at(-1)[0].toFixed(1)} ${HEIGHT}L${points[0][0].toFixed(1)} ${HEIGHT}Z`).join(""));
  }

  #x(sample) {
    return WIDTH * (1 - (this.now - sample.at) / WINDOW_S);
  }

  #tell(sample) {
    this.values.replaceChildren();
    const words = [];
    for (const one of this.series) {
      const value = sample ? one.read(sample) : null;
      const text = value === null ? "–" : value.toFixed(one.digits);
      this.values.append(element("i", `key tone-${one.tone}`), `${one.name} `, element("b", "", text));
      words.push(`${one.name} ${value === null ? "unknown" : text}`);
    }
    this.svg.setAttribute("aria-label", `${this.title}: ${words.join(", ")}`);
  }

  #point(event) {
    const box = this.svg.getBoundingClientRect();
    const x = (WIDTH * (event.clientX - box.left)) / box.width;
    let nearest = null;
    for (const sample of this.samples) if (!nearest || Math.abs(this.#x(sample) - x) < Math.abs(this.#x(nearest) - x)) nearest = sample;
    if (!nearest) return;
    this.pointed = true;
    const at = this.#x(nearest);
    for (const [name, value] of Object.entries({ x1: at, x2: at, y1: 0, y2: HEIGHT, visibility: "visible" })) this.guide.setAttribute(name, value);
    this.#tell(nearest);
  }

  #unpoint() {
    this.pointed = false;
    this.guide.setAttribute("visibility", "hidden");
    this.#tell(this.samples.at(-1));
  }
}
