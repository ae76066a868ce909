// The line that is always there: how fast, how much waits, who is well.

import { h, s, say, set } from "./dom.js";
import { count, rate } from "./format.js";

const KEPT = 60; // looks that a spark line shows
const [WIDTH, HEIGHT] = [96, 28];

export class Glance {
  constructor(element) {
    this.#tiles = Object.fromEntries(
      ["Training", "Sampling", "Queue", "Ranks", "Sampler"].map((name) => [name, new Tile(name)]),
    );
    element.append(...Object.values(this.#tiles).map((tile) => tile.element));
  }

  #tiles;

  show({ models, service }) {
    const sum = (name) => models.reduce((total, model) => total + model[name], 0);
    const ranks = models.flatMap((model) =>
      model.ready ? model.ranks : model.ranks.map(() => ({ state: "silent" })),
    );
    const well = ranks.filter((rank) => rank.state === "busy" || rank.state === "idle").length;
    const drawing = models.filter((model) => model.can_sample);
    const ready = drawing.filter((model) => model.sampler.ready).length;
    this.#tiles.Training.rate(sum("trained_per_s"));
    this.#tiles.Sampling.rate(sum("sampled_per_s"));
    const waits = sum("waiting") + sum("sampling_waiting");
    this.#tiles.Queue.say(
      count(waits),
      `waiting, ${count(sum("waiting_mine"))} of ${service.project}`,
    );
    this.#tiles.Ranks.say(
      `${well}/${ranks.length}`,
      "healthy",
      well === ranks.length ? "good" : "bad",
    );
    const engines = [...new Set(drawing.map((model) => model.sampler.engine))].join(", ");
    if (!drawing.length) this.#tiles.Sampler.say("none", "the trainer scores", "muted");
    else
      this.#tiles.Sampler.say(
        `${ready}/${drawing.length}`,
        engines,
        ready === drawing.length ? "good" : "bad",
      );
  }
}

class Tile {
  constructor(name) {
    this.#value = h("strong");
    this.#unit = h("span", { class: "muted" });
    this.#path = s("path");
    this.#spark = s(
      "svg",
      { class: "spark", width: WIDTH, height: HEIGHT, "aria-hidden": "true" },
      this.#path,
    );
    this.element = h(
      "div",
      { class: "tile" },
      h("h2", {}, name),
      h("p", {}, this.#value, " ", this.#unit),
    );
  }

  #value;
  #unit;
  #spark;
  #path;
  #seen = [];

  say(value, unit, tone = "") {
    say(this.#value, value);
    say(this.#unit, unit);
    set(this.element, "data-tone", tone || null);
  }

  rate(value) {
    this.say(rate(value), "tok/s");
    this.#seen = [...this.#seen, value].slice(-KEPT);
    const most = Math.max(1, ...this.#seen);
    const points = this.#seen.map((each, at) => {
      const x = WIDTH - (this.#seen.length - 1 - at) * (WIDTH / KEPT);
      return `${x.toFixed(1)} ${(HEIGHT - 3 - (each / most) * (HEIGHT - 6)).toFixed(1)}`;
    });
    set(this.#path, "d", `M${points.join("L")}`);
    if (!this.#spark.isConnected) this.element.append(this.#spark);
  }
}
