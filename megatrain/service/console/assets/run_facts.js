// What a run is: facts, its trouble if there is any, and where to go with it.

import { copy, h, say } from "./dom.js";
import { date, when } from "./format.js";

const FACTS = [
  "Base",
  "Adapter",
  "Created",
  "Last request",
  "Live in the sampler",
  "Queue",
  "Began from",
  "Metadata",
];

export class RunFacts {
  constructor(tryModel) {
    this.#name = h("h2");
    this.#id = h("button", {
      type: "button",
      class: "path",
      on: { click: () => copy(this.#run.id, "the run's id") },
    });
    this.#try = h(
      "button",
      { type: "button", on: { click: () => tryModel(`${this.#run.id}/latest`) } },
      "Try in playground",
    );
    this.#trouble = h("p", { class: "trouble", hidden: true });
    this.#cells = new Map(FACTS.map((name) => [name, h("dd")]));
    const facts = FACTS.map((name) => h("div", {}, h("dt", {}, name), this.#cells.get(name)));
    this.element = h(
      "section",
      { class: "card facts", "aria-label": "The run" },
      h("div", { class: "title" }, h("div", {}, this.#name, this.#id), this.#try),
      this.#trouble,
      h("dl", {}, facts),
    );
  }

  #name;
  #id;
  #try;
  #trouble;
  #cells;
  #run;

  show(run, state) {
    this.#run = run;
    say(this.#name, run.label);
    say(this.#id, run.id);
    this.#id.title = "Copy";
    const canSample = state.models.some(
      (model) => model.name === run.base_model && model.can_sample,
    );
    const isLive = run.live_step !== null && canSample;
    this.#try.disabled = !isLive;
    this.#try.title = isLive ? "" : "Nothing of this run is in a sampler yet";
    say(this.#trouble, run.error);
    this.#trouble.hidden = !run.error;
    const said = {
      Base: run.base_model,
      Adapter: `${run.rank ? `LoRA, rank ${run.rank}` : "all parameters"}, ${run.optimizer}`,
      Created: date(run.created),
      "Last request": when(run.last_request),
      "Live in the sampler": isLive
        ? run.live_step === run.step
          ? `step ${run.live_step}, the newest`
          : `step ${run.live_step} of ${run.step}`
        : "",
      Queue: run.waiting || run.running ? `${run.running} run, ${run.waiting} wait` : "",
      "Began from": run.source ?? "",
      Metadata: Object.entries(run.metadata)
        .map(([name, value]) => `${name}: ${value}`)
        .join(", "),
    };
    for (const [name, cell] of this.#cells) {
      say(cell, said[name]);
      cell.parentElement.hidden = !said[name];
    }
  }
}
