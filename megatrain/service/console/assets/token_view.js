// An answer, token by token: how likely each was, by mouse or by arrow keys.

import { h } from "./dom.js";
import { number } from "./format.js";

const LEVELS = [0.5, 0.1, 0.01]; // probabilities below which a token is marked, more and more

export class TokenView {
  constructor() {
    this.#text = h("div", {
      class: "tokens",
      role: "group",
      tabindex: 0,
      "aria-label": "Answer; arrow keys go through its tokens",
      on: {
        pointerover: (event) => this.#point(event.target.closest?.("[data-at]")),
        click: (event) => this.#point(event.target.closest("[data-at]")),
        keydown: (event) => this.#key(event),
      },
    });
    this.#info = h("p", { class: "token-info", "aria-live": "polite" });
    this.element = h("div", { class: "answer" }, this.#text, this.#info);
  }

  #text;
  #info;
  #held = []; // tokens whose text has not come yet
  #spans = [];
  #at = -1;

  /** Add a chunk: what was drawn, and the text that it has settled. */
  add({ text, tokens }) {
    this.#held.push(...tokens);
    if (!text) return;
    const parts = this.#held.map((token) => token.text);
    if (parts.join("") === text) this.#held.forEach((token) => this.#append(token.text, [token]));
    else this.#append(text, this.#held);
    this.#held = [];
  }

  /** Show what is left: tokens without a text, as what ended the answer. */
  finish() {
    for (const token of this.#held) this.#append(token.text, [token], "ending");
    this.#held = [];
    if (!this.#spans.length) this.element.remove();
  }

  #append(text, tokens, more = "") {
    const least = Math.min(0, ...tokens.map((token) => token.logprob));
    const level = LEVELS.filter((each) => Math.exp(least) < each).length;
    const span = h(
      "span",
      { class: `token level${level} ${more}`, data: { at: this.#spans.length } },
      text,
    );
    this.#spans.push({ span, tokens });
    this.#text.append(span);
  }

  #point(span) {
    if (!span) return;
    this.#spans[this.#at]?.span.classList.remove("current");
    this.#at = Number(span.dataset.at);
    const { tokens } = this.#spans[this.#at];
    span.classList.add("current");
    this.#info.replaceChildren(...tokens.flatMap(described));
  }

  #key(event) {
    const last = this.#spans.length - 1;
    const next = { ArrowRight: this.#at + 1, ArrowLeft: this.#at - 1, Home: 0, End: last }[
      event.key
    ];
    if (next === undefined || last < 0) return;
    event.preventDefault();
    const { span } = this.#spans[Math.min(last, Math.max(0, next))];
    this.#point(span);
    span.scrollIntoView({ block: "nearest" });
  }
}

function described({ text, logprob, likely }) {
  const others = likely
    .filter(([other]) => other !== text)
    .map(([other, value]) => `${quoted(other)} ${percent(value)}`);
  return [
    h("code", {}, quoted(text)),
    ` log p ${number(logprob)}, ${percent(logprob)}`,
    others.length ? h("span", { class: "muted" }, ` instead of ${others.join(", ")}`) : "",
    " ",
  ];
}

function quoted(text) {
  return JSON.stringify(text);
}

function percent(logprob) {
  return `${number(100 * Math.exp(logprob))} %`;
}
