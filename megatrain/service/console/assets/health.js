// What serves the models: ranks, queues, samplers, versions, and how far sampler and trainer agree.

import { h, head, keyed, row, say, set } from "./dom.js";
import { bytes, count, number, rate, short, when } from "./format.js";

const TONES = {
  idle: "muted",
  busy: "good",
  failed: "bad",
  silent: "bad",
  live: "good",
  draining: "warn",
  kept: "muted",
  saved: "muted",
};

export class HealthPanel {
  constructor(element) {
    this.#element = element;
  }

  #element;

  show(state) {
    keyed(
      this.#element,
      state.models,
      (model) => model.name,
      (model) => new Model(model.name).element,
      (card, model) => card.model.show(model, state),
    );
  }
}

class Model {
  constructor(name) {
    this.#pill = h("span", { class: "pill" });
    this.#trouble = h("p", { class: "trouble", hidden: true });
    this.#facts = h("dl");
    this.#ranks = h("tbody");
    this.#versions = h("tbody");
    this.#mismatch = h("tbody");
    this.#tolerance = h("p", { class: "muted" });
    const table = (title, body, ...titles) =>
      h(
        "section",
        {},
        h("h3", {}, title),
        h("div", { class: "scroll" }, h("table", {}, head(...titles), body)),
      );
    this.element = h(
      "article",
      { class: "card model", "aria-label": name },
      h("div", { class: "title" }, h("h2", {}, name), this.#pill),
      this.#trouble,
      this.#facts,
      table("Ranks", this.#ranks, "Rank", "State", "Doing", ">For", ">Memory", ">Tokens", "Host"),
      table("Versions in the sampler", this.#versions, "Of", ">Step", "State", ">Users"),
      h(
        "div",
        { class: "against" },
        table(
          "Sampler against trainer",
          this.#mismatch,
          "Of",
          ">Step",
          ">Tokens",
          ">Mean",
          ">Greatest",
          ">KL (k3)",
          "When",
        ),
        this.#tolerance,
      ),
    );
    this.element.model = this;
  }

  #pill;
  #trouble;
  #facts;
  #ranks;
  #versions;
  #mismatch;
  #tolerance;

  show(model, state) {
    const labels = new Map(state.runs.map((run) => [run.id, run.label]));
    const source = (name) => labels.get(name) ?? short(name.replace("tinker://", ""), 40);
    say(this.#pill, model.ready ? "ready" : "not ready");
    set(this.#pill, "data-tone", model.ready ? "good" : "bad");
    const trouble = [model.error, model.sampler.error].filter(Boolean).join("; ");
    say(this.#trouble, trouble);
    this.#trouble.hidden = !trouble;
    this.#show(facts(model));
    this.#showRanks(model.ranks);
    this.#showVersions(model.versions, source);
    this.#showMismatch(model, source);
  }

  #show(pairs) {
    const make = ([name]) => {
      const line = h("div", {}, h("dt", {}, name), h("dd"));
      return line;
    };
    keyed(
      this.#facts,
      pairs,
      ([name]) => name,
      make,
      (line, [, value]) => say(line.lastChild, value),
    );
  }

  #showRanks(ranks) {
    const make = () =>
      withPill(row(["rank", "state", "doing", ">for", ">memory", ">tokens", "host"]), "state");
    keyed(
      this.#ranks,
      ranks,
      (rank) => rank.rank,
      make,
      ({ at, pill }, rank) => {
        say(at.rank, rank.rank);
        tone(pill, rank.state);
        say(
          at.doing,
          rank.state === "busy" ? [rank.command, rank.phase].filter(Boolean).join(", ") : "",
        );
        say(at.for, rank.running_s ? `${count(rank.running_s)} s` : "");
        say(at.memory, rank.resident_bytes ? bytes(rank.resident_bytes) : "");
        say(at.tokens, rank.tokens === undefined ? "" : count(rank.tokens));
        say(at.host, rank.host ?? "");
      },
    );
  }

  #showVersions(versions, source) {
    this.#versions.closest("section").hidden = !versions.length;
    const make = () => withPill(row(["of", ">step", "state", ">users"]), "state");
    keyed(
      this.#versions,
      versions,
      (each) => each.name,
      make,
      ({ at, pill }, each) => {
        say(at.of, source(each.source)).title = each.name;
        say(at.step, count(each.step));
        tone(pill, each.state);
        say(at.users, count(each.users));
      },
    );
  }

  #showMismatch({ mismatch, tolerance, can_sample: canSample }, source) {
    const make = () => row(["of", ">step", ">tokens", ">mean", ">max", ">k3", "when"]);
    this.#mismatch.closest("section").hidden = !mismatch.length;
    keyed(
      this.#mismatch,
      mismatch,
      (each) => each.version,
      make,
      ({ at }, each) => {
        say(at.of, source(each.source)).title = each.version;
        say(at.step, count(each.step));
        say(at.tokens, count(each.tokens));
        say(at.mean, number(each.mean));
        say(at.max, number(each.max));
        set(at.max, "data-tone", each.max > tolerance ? "bad" : "good");
        say(at.k3, number(each.k3));
        say(at.when, when(each.when));
      },
    );
    const allowed = `Differences of a token's log-probability; up to ${number(tolerance)} is allowed before a version goes live.`;
    const none = canSample
      ? "Nothing of this project was compared yet: a version is, before it goes live."
      : "Nothing is drawn here, so there is nothing to compare.";
    say(this.#tolerance, mismatch.length ? allowed : none);
  }
}

function withPill(line, name) {
  line.pill = h("span", { class: "pill" });
  line.at[name].append(line.pill);
  return line;
}

function tone(pill, state) {
  say(pill, state);
  set(pill, "data-tone", TONES[state] ?? "muted");
}

function facts(model) {
  const { sampler } = model;
  return [
    ["Architecture", model.arch],
    ["Context", `${count(model.max_context_length)} tokens`],
    ["Training", `${rate(model.trained_per_s)} tok/s`],
    ["Requests that wait", count(model.waiting)],
    ["Commands on the ranks", count(model.pending)],
    ["Restarts of ranks", count(model.restarts)],
    ["Sampler", `${sampler.engine}, ${sampler.ready ? "ready" : "not ready"}`],
    ["Sampling", `${rate(model.sampled_per_s)} tok/s`],
    ["Sequences", `${count(model.sampling)} drawn, ${count(model.sampling_waiting)} wait`],
    ["Adapters in the sampler", count(sampler.adapters)],
    ["Restarts of the sampler", count(sampler.restarts)],
  ];
}
