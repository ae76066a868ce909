// Runs: a list to choose from, and the curves of those that are chosen.

import { Chart, Cursor } from "./chart.js";
import { Curves, byInterest, csv, title } from "./curves.js";
import { h, note, say } from "./dom.js";
import { RunFacts } from "./run_facts.js";
import { RunList } from "./run_list.js";

const COLORS = 6; // as many runs are compared

export class RunsPanel {
  constructor(element, live, tryModel) {
    this.#live = live;
    this.#facts = new RunFacts(tryModel);
    this.#list = new RunList({
      choose: (id) => this.#choose(id),
      toggle: (id) => this.#toggle(id),
      more: () => live.more("num_runs", 100),
    });
    this.#empty = h("div", { class: "empty", hidden: true }, ...welcome());
    this.#charts = h("div", { class: "charts" });
    this.#hint = h("p", { class: "muted hint", hidden: true }, ...rewardHint());
    const main = [this.#facts.element, this.#tools(), this.#charts, this.#hint];
    this.#grid = h(
      "div",
      { class: "split" },
      this.#list.element,
      h("div", { class: "detail" }, main),
    );
    element.append(this.#empty, this.#grid);
  }

  #live;
  #facts;
  #list;
  #empty;
  #grid;
  #charts;
  #hint;
  #cursor = new Cursor();
  #shown = new Map(); // charts by the curve's name
  #chosen = new Map(); // by run: its color and curves; the first is the one that is looked at
  #view = { smooth: 0, log: false };
  #labels = new Map();

  #tools() {
    const shown = h("output", { for: "smooth" }, "off");
    const smooth = h("input", {
      type: "range",
      id: "smooth",
      min: 0,
      max: 0.98,
      step: 0.02,
      value: 0,
    });
    smooth.addEventListener("input", () => {
      this.#view.smooth = Number(smooth.value);
      say(shown, this.#view.smooth ? smooth.value : "off");
      this.#plot();
    });
    const log = h("input", { type: "checkbox", id: "log" });
    log.addEventListener("change", () => {
      this.#view.log = log.checked;
      this.#plot();
    });
    return h(
      "div",
      { class: "tools" },
      h("label", { for: "smooth" }, "Smooth"),
      smooth,
      shown,
      h("label", { class: "check" }, log, "Log scale"),
      h("span", { class: "spring" }),
      h("button", { type: "button", on: { click: () => this.#save() } }, "Save CSV"),
    );
  }

  show(state) {
    this.#labels = new Map(state.runs.map((run) => [run.id, run.label]));
    this.#empty.hidden = state.runs.length > 0;
    this.#grid.hidden = state.runs.length === 0;
    for (const id of this.#chosen.keys()) if (!this.#labels.has(id)) this.#chosen.delete(id);
    if (!this.#chosen.size && state.runs.length) this.#choose(state.runs[0].id);
    const colors = new Map([...this.#chosen].map(([id, { color }]) => [id, color]));
    this.#list.show(state.runs, state.num_runs, colors, COLORS);
    const first = state.runs.find((run) => run.id === this.#chosen.keys().next().value);
    if (first) this.#facts.show(first, state);
  }

  /** Look at one run alone. */
  #choose(id) {
    const before = this.#chosen.get(id);
    this.#chosen = new Map([[id, { color: 0, curves: before?.curves ?? new Curves(id) }]]);
    this.#changed();
  }

  #toggle(id) {
    if (this.#chosen.has(id)) {
      if (this.#chosen.size > 1) this.#chosen.delete(id);
    } else {
      const used = new Set([...this.#chosen.values()].map((each) => each.color));
      const color = [...Array(COLORS).keys()].find((each) => !used.has(each));
      this.#chosen.set(id, { color, curves: new Curves(id) });
    }
    this.#changed();
  }

  #changed() {
    this.#plot();
    this.#live.soon();
  }

  /** Fetch what was added to the chosen curves, and draw it. */
  async refresh() {
    const all = [...this.#chosen.values()];
    const fresh = await Promise.all(all.map(({ curves }) => curves.refresh()));
    if (fresh.some(Boolean)) this.#plot();
  }

  #plot() {
    const all = [...this.#chosen.values()];
    const names = [...new Set(all.flatMap(({ curves }) => [...curves.by.keys()]))].sort(byInterest);
    for (const [name, chart] of this.#shown) {
      if (names.includes(name)) continue;
      chart.remove();
      this.#shown.delete(name);
    }
    names.forEach((name, place) => {
      if (!this.#shown.has(name)) this.#shown.set(name, new Chart(title(name), this.#cursor));
      const { element } = this.#shown.get(name);
      element.dataset.curve = name;
      const there = this.#charts.children[place] ?? null;
      if (there !== element) this.#charts.insertBefore(element, there);
      this.#shown.get(name).update({ series: this.#series(all, name), ...this.#view });
    });
    this.#hint.hidden = names.length === 0 || names.some((name) => name.includes("reward"));
  }

  #series(all, name) {
    return all
      .filter(({ curves }) => curves.by.has(name))
      .map(({ color, curves }) => {
        const label = this.#labels.get(curves.run) ?? curves.run;
        return { label, color, ...curves.by.get(name) };
      });
  }

  #save() {
    const { curves } = this.#chosen.values().next().value;
    const file = new Blob([csv(curves)], { type: "text/csv" });
    const download = `${curves.run.replaceAll(":", "_")}.csv`;
    const link = h("a", { href: URL.createObjectURL(file), download });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    note("Saved the curves as CSV");
  }
}

function welcome() {
  const address = document.baseURI.replace(/[?#].*$/, "").replace(/\/$/, "");
  const code = [
    "import tinker",
    "",
    `client = tinker.ServiceClient(base_url="${address}", api_key=…)`,
    "training = client.create_lora_training_client(base_model=…, rank=16)",
  ];
  return [
    h("h2", {}, "No runs yet"),
    h("p", { class: "muted" }, "A run appears here as soon as a client has made it:"),
    h("pre", {}, code.join("\n")),
  ];
}

function rewardHint() {
  const call = 'megatrain.tinker.log_points(training.model_id, step, {"reward": reward})';
  return ["Rewards are known to your client alone. To see them here: ", h("code", {}, call)];
}
