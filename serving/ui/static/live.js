// Live figures: one look a second at the server's counters, rates from their differences.

import { readLoad } from "./api.js";
import { Chart, WINDOW_S } from "./chart.js";

const PERIOD_MS = 1000;
const PERIOD_AFTER_FAILURE_MS = 3000;
const FORGET_REPLICA_S = 15;

// Counters of several replicas, of which each look sees one.
export class Rates {
  constructor() {
    this.replicas = new Map();
  }

  // Adds a look, and sums up what is known of all replicas. `at` is the page's clock in seconds.
  take(load, at) {
    const before = this.replicas.get(load.replica);
    const grown = {};
    const seconds = before ? load.clock_s - before.load.clock_s : 0;
    for (const name of Object.keys(load.totals)) grown[name] = before ? load.totals[name] - before.load.totals[name] : 0;
    this.replicas.set(load.replica, { load, grown, seconds, at });
    for (const [name, one] of this.replicas) if (at - one.at > FORGET_REPLICA_S) this.replicas.delete(name);
    return this.#sum(at);
  }

  #sum(at) {
    const sum = { at, running: 0, waiting: 0, speed: 0, cache: 0, budget: null, length: null };
    const all = [...this.replicas.values()];
    const total = (name) => all.reduce((so_far, one) => so_far + one.grown[name], 0);
    for (const one of all) {
      sum.running += one.load.num_running;
      sum.waiting += one.load.num_waiting;
      sum.cache += one.load.kv_cache_usage / all.length;
      if (one.seconds > 0) sum.speed += one.grown.num_output_tokens / one.seconds;
    }
    const steps = total("num_steps");
    if (steps > 0) {
      sum.budget = total("num_draft_tokens") / steps;
      sum.length = total("num_output_tokens") / steps;
    }
    return sum;
  }
}

const charts = [
  new Chart("Load and budget", [
    { name: "requests", tone: "load", read: (sample) => sample.running + sample.waiting, area: true, least: 2 },
    { name: "budget", tone: "target", read: (sample) => sample.budget, digits: 1, side: "right" },
  ]),
  new Chart("Accepted length", [{ name: "tokens a step", tone: "draft", read: (sample) => sample.length, digits: 2, area: true }], { reference: 1 }),
  new Chart("Throughput", [{ name: "tokens/s", tone: "draft", read: (sample) => sample.speed, area: true, least: 10 }]),
];

// Starts looking. onLoad gets each answer of the server, onFailure each error.
export function startLive({ onLoad, onFailure }) {
  const rates = new Rates();
  let samples = [];
  document.getElementById("charts").append(...charts.map((chart) => chart.root));

  async function look() {
    let wait = PERIOD_MS;
    // A page that nobody sees asks nothing.
    if (!document.hidden) {
      try {
        const load = await readLoad();
        const now = performance.now() / 1000;
        samples = [...samples, rates.take(load, now)].filter((sample) => now - sample.at <= WINDOW_S);
        show(load, samples, now);
        onLoad(load);
      } catch (error) {
        onFailure(error);
        wait = PERIOD_AFTER_FAILURE_MS;
      }
    }
    setTimeout(look, wait);
  }
  look();
}

function show(load, samples, now) {
  const last = samples.at(-1);
  const tiles = { running: last.running, waiting: last.waiting, speed: last.speed.toFixed(0), cache: `${Math.round(100 * last.cache)} %` };
  for (const [name, value] of Object.entries(tiles)) document.getElementById(`tile-${name}`).textContent = value;
  charts[0].series[1].most = Math.max(load.num_spec_tokens, 1);
  charts[1].series[0].most = load.num_spec_tokens + 1;
  for (const chart of charts) chart.draw(samples, now);
}
