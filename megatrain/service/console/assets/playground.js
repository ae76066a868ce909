// A prompt for two models side by side.

import { h, set } from "./dom.js";
import { Side } from "./side.js";

const OPTIONS = [
  ["temperature", "Temperature", { type: "number", min: 0, max: 100, step: "any", value: 1 }],
  ["top_p", "Top p", { type: "number", min: 0.01, max: 1, step: "any", value: 1 }],
  ["max_tokens", "Max tokens", { type: "number", min: 1, max: 32768, step: 1, value: 64 }],
  ["seed", "Seed", { type: "number", min: 0, step: 1, placeholder: "any" }],
  ["stop", "Stop at", { type: "text", placeholder: "nothing more", maxlength: 1000 }],
];

export class PlaygroundPanel {
  constructor(element) {
    this.#sides = [new Side("Left"), new Side("Right")];
    this.#why = h("p", { class: "trouble", hidden: true });
    this.#system = area("system", "System", 2, "Optional");
    this.#prompt = area("prompt", "Prompt", 5, "Once upon a time");
    this.#same = h("p", { class: "muted", role: "status" });
    this.#run = h("button", { class: "primary", type: "submit" }, "Sample");
    this.#stop = h(
      "button",
      { type: "button", disabled: true, on: { click: () => this.#abort?.abort() } },
      "Stop",
    );
    this.#clear = h("button", { type: "button", on: { click: () => this.#reset() } }, "Clear");
    this.#form = h(
      "form",
      {
        class: "card ask",
        on: { submit: (event) => this.#submit(event), keydown: (event) => this.#key(event) },
      },
      h("h2", {}, "Playground"),
      this.#why,
      modes(() => this.#reset()),
      this.#system,
      this.#prompt,
      h(
        "div",
        { class: "options" },
        OPTIONS.map(([name, label, more]) => option(name, label, more)),
      ),
      h(
        "div",
        { class: "actions" },
        this.#run,
        this.#stop,
        this.#clear,
        h("kbd", {}, "Ctrl Enter"),
      ),
      this.#same,
      legend(),
    );
    element.append(
      h("div", { class: "play" }, this.#form, ...this.#sides.map((side) => side.element)),
    );
    this.#system.hidden = true;
  }

  #sides;
  #why;
  #system;
  #prompt;
  #same;
  #run;
  #stop;
  #clear;
  #form;
  #abort = null;
  #can = false;

  show(state) {
    const models = sampleable(state);
    const may = state.service.may.includes("sample");
    this.#can = may && models.length > 0;
    this.#why.hidden = this.#can;
    this.#why.textContent = may
      ? "No model is served with a sampler that draws tokens: megatrain serve --sampler transformers."
      : "This key has not the scope sample.";
    this.#run.disabled = !this.#can || this.#abort !== null;
    const newest = models.find((each) => each.group !== "Base models") ?? models[0];
    this.#sides[0].offer(models, models[0]?.id);
    this.#sides[1].offer(models, newest?.id);
  }

  /** Let the right side sample from a model. */
  choose(model) {
    this.#sides[1].choose(model);
  }

  get #isChat() {
    return this.#form.elements.mode.value === "chat";
  }

  #reset() {
    this.#system.hidden = !this.#isChat;
    this.#prompt.querySelector("label").textContent = this.#isChat ? "Message" : "Prompt";
    this.#clear.textContent = this.#isChat ? "New conversation" : "Clear";
    this.#same.textContent = "";
    for (const side of this.#sides) side.reset();
  }

  #key(event) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.#form.requestSubmit();
  }

  async #submit(event) {
    event.preventDefault();
    const prompt = this.#form.elements.prompt.value;
    if (this.#abort || !this.#can || !prompt) return;
    this.#abort = new AbortController();
    this.#busy(true);
    this.#same.textContent = "Sampling…";
    const asked = {
      ...this.#options(),
      isChat: this.#isChat,
      system: this.#form.elements.system.value,
      prompt,
    };
    await Promise.all(this.#sides.map((side) => side.ask(asked, this.#abort.signal)));
    this.#abort = null;
    this.#busy(false);
    this.#same.textContent = compared(...this.#sides.map((side) => side.tokens));
    if (asked.isChat) this.#form.elements.prompt.value = "";
  }

  #busy(is) {
    this.#run.disabled = is;
    this.#stop.disabled = !is;
    set(this.#form, "aria-busy", String(is));
  }

  #options() {
    const at = this.#form.elements;
    const body = {
      temperature: Number(at.temperature.value),
      top_p: Number(at.top_p.value),
      max_tokens: Number(at.max_tokens.value),
    };
    if (at.seed.value !== "") body.seed = Number(at.seed.value);
    if (at.stop.value !== "") body.stop = at.stop.value;
    return { body };
  }
}

/** Explain how tokens are marked. */
function legend() {
  const levels = ["50 % or more", "less", "less than 10 %", "less than 1 %"];
  const shown = levels.map((text, level) => h("span", { class: `token level${level}` }, text));
  return h("p", { class: "legend muted" }, "Tokens by probability: ", ...shown);
}

function modes(changed) {
  const mode = (value, text, checked) =>
    h(
      "label",
      {},
      h("input", { type: "radio", name: "mode", value, checked, on: { change: changed } }),
      h("span", {}, text),
    );
  return h(
    "fieldset",
    { class: "choice" },
    h("legend", { class: "hidden" }, "Kind of prompt"),
    mode("raw", "Raw text", true),
    mode("chat", "Chat", false),
  );
}

function area(name, label, rows, placeholder) {
  const box = h("textarea", { id: name, name, rows, placeholder });
  return h("div", { class: "field" }, h("label", { for: name }, label), box);
}

function option(name, label, more) {
  return h(
    "div",
    { class: "field" },
    h("label", { for: name }, label),
    h("input", { id: name, name, ...more }),
  );
}

/** Return what can be sampled: bases, runs that are live, checkpoints for samplers. */
function sampleable(state) {
  const drawing = new Set(
    state.models.filter((model) => model.can_sample).map((model) => model.name),
  );
  const labels = new Map(state.runs.map((run) => [run.id, run.label]));
  const live = state.runs.filter((run) => run.live_step !== null && drawing.has(run.base_model));
  const saved = state.checkpoints.filter(
    (each) => each.kind !== "training" && drawing.has(each.base_model),
  );
  return [
    ...[...drawing].map((id) => ({ id, label: id, group: "Base models" })),
    ...live.map((run) => ({
      id: `${run.id}/latest`,
      label: `${run.label}, step ${run.live_step}`,
      group: "Live runs",
    })),
    ...saved.map(({ path, run, name }) => ({
      id: path,
      label: `${name} of ${labels.get(run) ?? run.slice(0, 8)}`,
      group: "Checkpoints",
    })),
  ];
}

/** Say how long two answers go together. */
function compared(left, right) {
  if (!left.length || !right.length) return "";
  const at = left.findIndex((token, place) => token.text !== right[place]?.text);
  if (at === 0) return "The two differ from the first token on.";
  const together = at < 0 ? Math.min(left.length, right.length) : at;
  return together === left.length && together === right.length
    ? "Both gave the same tokens."
    : `The first ${together === 1 ? "token is" : `${together} tokens are`} the same.`;
}
