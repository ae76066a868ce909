// One of the two models: what it answers while it answers, and how fast.

import { events } from "./api.js";
import { h, keyed, say, set } from "./dom.js";
import { number } from "./format.js";
import { TokenView } from "./token_view.js";

const LIKELY = 3; // tokens that are told beside each that was drawn

export class Side {
  constructor(name) {
    const id = `model-${name.toLowerCase()}`;
    this.#select = h("select", { id, on: { change: () => this.reset() } });
    this.#talk = h("div", { class: "talk" });
    this.#stats = h("p", { class: "stats muted" });
    this.#error = h("p", { class: "trouble", role: "alert", hidden: true });
    this.element = h(
      "section",
      { class: "card side", "aria-label": `${name} model` },
      h("div", { class: "field" }, h("label", { for: id }, `${name} model`), this.#select),
      this.#talk,
      this.#error,
      this.#stats,
    );
    this.reset();
  }

  #select;
  #talk;
  #stats;
  #error;
  #known = "";
  #wanted = null;
  #messages = [];
  tokens = [];

  /** Offer models, and choose one where nothing was chosen. */
  offer(models, first) {
    const known = JSON.stringify(models);
    if (known === this.#known) return;
    this.#known = known;
    const chosen = this.#wanted ?? (this.#select.value || first);
    const groups = [...new Set(models.map((each) => each.group))];
    keyed(
      this.#select,
      groups,
      (group) => group,
      (label) => h("optgroup", { label }),
      (element, group) => {
        const mine = models.filter((each) => each.group === group);
        keyed(
          element,
          mine,
          (each) => each.id,
          (each) => h("option", { value: each.id }),
          (one, each) => say(one, each.label),
        );
      },
    );
    this.choose(chosen);
    if (!this.#select.value && models.length) this.choose(first);
  }

  /** Choose a model; one that is not offered yet is taken when it is. */
  choose(model) {
    const before = this.#select.value;
    this.#select.value = model;
    this.#wanted = this.#select.value === model ? null : model;
    if (!this.#select.value) this.#select.value = before;
    if (this.#select.value !== before) this.reset();
  }

  reset() {
    this.#messages = [];
    this.tokens = [];
    this.#talk.replaceChildren(
      h("p", { class: "muted" }, "What it says appears here, each token with its log-probability."),
    );
    this.#error.hidden = true;
    say(this.#stats, "");
  }

  /** Ask, and show the answer while it comes. */
  async ask({ body, isChat, system, prompt }, signal) {
    this.tokens = [];
    this.#error.hidden = true;
    if (!isChat || !this.#messages.length) this.#talk.replaceChildren();
    const request = { ...body, model: this.#select.value, stream: true };
    const asked = { role: "user", content: prompt };
    if (isChat) {
      const first = system ? [{ role: "system", content: system }] : [];
      Object.assign(request, {
        messages: [...first, ...this.#messages, asked],
        logprobs: true,
        top_logprobs: LIKELY,
      });
      this.#talk.append(h("p", { class: "said" }, prompt));
    } else {
      Object.assign(request, { prompt, logprobs: LIKELY });
    }
    const view = new TokenView();
    this.#talk.append(view.element);
    set(this.element, "aria-busy", "true");
    try {
      const text = await this.#take(
        isChat ? "v1/chat/completions" : "v1/completions",
        request,
        view,
        signal,
      );
      this.#messages.push(asked, { role: "assistant", content: text });
    } catch (error) {
      if (error.name !== "AbortError") this.#fail(error.message);
    }
    view.finish();
    set(this.element, "aria-busy", null);
  }

  async #take(path, request, view, signal) {
    const began = performance.now();
    let [first, text, reason] = [0, "", ""];
    for await (const chunk of events(path, request, signal)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const told = toldBy(chunk.choices[0]);
      first ||= told.tokens.length ? performance.now() : 0;
      this.tokens.push(...told.tokens);
      text += told.text;
      reason = told.reason ?? reason;
      view.add(told);
      this.#measure(began, first, reason);
    }
    return text;
  }

  #measure(began, first, reason) {
    const [now, size] = [performance.now(), this.tokens.length];
    if (!size) return;
    const speed =
      size > 1 && now > first ? `${number(((size - 1) / (now - first)) * 1000)} tok/s` : "";
    const mean = this.tokens.reduce((sum, token) => sum + token.logprob, 0) / size;
    const said = [
      `${size} token${size > 1 ? "s" : ""}`,
      speed,
      `first after ${Math.round(first - began)} ms`,
      `mean log p ${number(mean)}`,
      { stop: "ended by itself", length: "cut at max tokens" }[reason] ?? reason,
    ];
    say(this.#stats, said.filter(Boolean).join(" · "));
  }

  #fail(message) {
    say(this.#error, message);
    this.#error.hidden = false;
  }
}

/** Return text, tokens and end of a chunk, of either endpoint. */
function toldBy(choice) {
  const { delta, text, logprobs, finish_reason: reason } = choice;
  if (delta) {
    const tokens = (logprobs?.content ?? []).map((each) => ({
      text: each.token,
      logprob: each.logprob,
      likely: each.top_logprobs.map((other) => [other.token, other.logprob]),
    }));
    return { text: delta.content ?? "", tokens, reason };
  }
  const tokens = (logprobs?.tokens ?? []).map((token, at) => ({
    text: token,
    logprob: logprobs.token_logprobs[at],
    likely: Object.entries(logprobs.top_logprobs?.[at] ?? {}),
  }));
  return { text, tokens, reason };
}
