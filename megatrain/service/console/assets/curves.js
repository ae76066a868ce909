// Curves of runs, kept here and brought up to date by what was added since.

import { Watched, read } from "./api.js";

const TITLES = {
  reward: "Reward",
  loss: "Loss per token",
  "loss:sum": "Loss of a step, summed",
  grad_norm: "Gradient norm",
  lr: "Learning rate",
  tokens: "Tokens of a step",
  tokens_per_s: "Tokens per second",
};
const LAST = ["grad_norm", "tokens_per_s", "lr", "tokens", "loss:sum"];

/** Return how a curve is called. */
export function title(name) {
  return TITLES[name] ?? name;
}

/** Order names of curves: loss and rewards, what clients add, then the rest. */
export function byInterest(one, other) {
  const place = (name) =>
    name === "loss" ? -2 : name.includes("reward") ? -1 : LAST.indexOf(name) + 1;
  return place(one) - place(other) || one.localeCompare(other);
}

export class Curves {
  #until = 0;
  #next = 0; // when to ask again: no more than a tenth of the time is spent on answers
  #watched = new Watched();
  by = new Map();

  constructor(run) {
    this.run = run;
  }

  /** Fetch what is new; return whether there was anything. */
  async refresh() {
    const began = performance.now();
    if (began < this.#next) return false;
    const path = `api/console/runs/${encodeURIComponent(this.run)}?since=${this.#until}`;
    const said = this.#until ? await this.#watched.read(path) : await read(path);
    this.#next = performance.now() + 9 * (performance.now() - began);
    if (said === null) return false;
    this.#until = said.until;
    let isNew = false;
    for (const [name, { steps, values }] of Object.entries(said.curves)) {
      if (!this.by.has(name)) this.by.set(name, { steps: [], values: [] });
      const curve = this.by.get(name);
      steps.forEach((step, at) => {
        isNew = merged(curve, step, values[at]) || isNew;
      });
    }
    return isNew;
  }
}

/** Put a point in its place; a step that is there already gets the new value. */
function merged({ steps, values }, step, value) {
  let at = steps.length;
  while (at > 0 && steps[at - 1] > step) at -= 1;
  if (at > 0 && steps[at - 1] === step) {
    if (values[at - 1] === value) return false;
    values[at - 1] = value;
    return true;
  }
  steps.splice(at, 0, step);
  values.splice(at, 0, value);
  return true;
}

/** Return curves as a table of comma-separated values, a line for each step. */
export function csv(curves) {
  const names = [...curves.by.keys()].sort(byInterest);
  const lines = new Map();
  names.forEach((name, column) => {
    const { steps, values } = curves.by.get(name);
    steps.forEach((step, at) => {
      if (!lines.has(step)) lines.set(step, Array(names.length).fill(""));
      lines.get(step)[column] = values[at] ?? "nan";
    });
  });
  const sorted = [...lines].sort(([one], [other]) => one - other);
  return [["step", ...names], ...sorted.map(([step, cells]) => [step, ...cells])]
    .map((cells) => cells.join(","))
    .join("\n");
}
