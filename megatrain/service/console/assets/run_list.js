// The list of runs: one is looked at, several may be plotted.

import { h, head, keyed, row, say, set } from "./dom.js";
import { count, date, number, when } from "./format.js";

export class RunList {
  /** `choose` hears of a run to look at, `toggle` of one to plot or not, `more` that more are wanted. */
  constructor({ choose, toggle, more }) {
    [this.#choose, this.#toggle] = [choose, toggle];
    this.#body = h("tbody");
    this.#more = h("button", { type: "button", hidden: true, on: { click: more } });
    const table = h(
      "table",
      { class: "runs" },
      head("Plot", "Run", ">Step", ">Loss", "State"),
      this.#body,
    );
    this.element = h(
      "div",
      { class: "card list" },
      h("h2", {}, "Runs"),
      h("div", { class: "scroll" }, table),
      this.#more,
    );
  }

  #choose;
  #toggle;
  #body;
  #more;

  /** Show runs; `plotted` are colors by run, the first is looked at; no more than `most` are plotted. */
  show(runs, total, plotted, most) {
    this.#more.hidden = total <= runs.length;
    say(this.#more, `Show more (${count(total - runs.length)} left)`);
    const make = (run) => this.#make(run);
    keyed(
      this.#body,
      runs,
      (run) => run.id,
      make,
      (line, run) => update(line, run, plotted, most),
    );
  }

  #make(run) {
    const line = row(["plot", "run", ">step", ">loss", "state"]);
    line.box = h("input", { type: "checkbox", on: { change: () => this.#toggle(run.id) } });
    line.name = h("button", {
      type: "button",
      class: "link",
      on: { click: () => this.#choose(run.id) },
    });
    line.base = h("span", { class: "base" });
    line.when = h("span");
    line.pill = h("span", { class: "pill" });
    line.at.plot.append(h("label", { class: "swatch" }, line.box));
    line.at.run.append(line.name, h("small", { class: "muted" }, line.base, line.when));
    line.at.state.append(line.pill);
    return line;
  }
}

function update(line, run, plotted, most) {
  const color = plotted.get(run.id);
  const isFirst = run.id === plotted.keys().next().value;
  line.box.checked = color !== undefined;
  line.box.disabled = color === undefined && plotted.size >= most;
  line.box.parentElement.className = `swatch s${color ?? "none"}`;
  set(line.box, "aria-label", `Plot ${run.label}`);
  set(line.name, "aria-current", isFirst ? "true" : null);
  set(line, "data-current", isFirst);
  say(line.name, run.label);
  set(line.name, "title", run.id);
  say(line.base, `${run.base_model.split("/").at(-1)} · `);
  set(line.base, "title", run.base_model);
  say(line.when, when(run.last_request));
  set(line.when, "title", date(run.last_request));
  say(line.at.step, count(run.step));
  say(line.at.loss, number(run.loss));
  const [text, tone] = stateOf(run);
  say(line.pill, text);
  set(line.pill, "data-tone", tone);
}

/** Return a run's state in a word, and how it is to be taken. */
function stateOf(run) {
  if (run.corrupted || run.state === "failed") return ["failed", "bad"];
  if (run.running) return ["training", "good"];
  if (run.waiting) return ["waiting", "warn"];
  if (run.state === "live") return ["idle", "muted"];
  return [run.state === "creating" ? "starting" : "ended", "muted"];
}
