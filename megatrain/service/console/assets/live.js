// The newest state of the service, asked for again and again while somebody looks.

import { Refused, Watched } from "./api.js";

const EVERY_MS = 1500;
const SLOWEST_MS = 15000;

export class Live {
  /** `denied` hears of a key that will not do. */
  constructor(denied) {
    this.state = null;
    this.limits = { num_runs: 50, num_checkpoints: 100 };
    this.problem = "";
    this.#denied = denied;
    document.addEventListener("visibilitychange", () => document.hidden || this.soon());
  }

  #denied;
  #listeners = [];
  #ticks = [];
  #watched = new Watched();
  #timer = 0;
  #wait = EVERY_MS;
  #number = 0;

  /** Hear of every new state. */
  on(listener) {
    this.#listeners.push(listener);
  }

  /** Be called after every look, whether something has changed or not. */
  onTick(tick) {
    this.#ticks.push(tick);
  }

  /** Begin, from nothing. */
  start() {
    this.state = null;
    this.#watched = new Watched();
    this.soon();
  }

  stop() {
    clearTimeout(this.#timer);
    this.#number += 1;
  }

  /** Look now. */
  soon() {
    this.stop();
    this.#look(this.#number);
  }

  /** Show more of a kind. */
  more(limit, by) {
    this.limits[limit] = Math.min(1000, this.limits[limit] + by);
    this.#watched = new Watched();
    this.soon();
  }

  async #look(number) {
    try {
      const query = new URLSearchParams(this.limits);
      const fresh = await this.#watched.read(`api/console/state?${query}`);
      if (number !== this.#number) return;
      [this.problem, this.#wait] = ["", EVERY_MS];
      if (fresh !== null) this.state = fresh;
      this.#listeners.forEach((listener) => listener(this.state, fresh !== null));
      await Promise.all(this.#ticks.map((tick) => tick(this.state)));
    } catch (error) {
      if (number !== this.#number) return;
      if (error instanceof Refused && (error.status === 401 || error.status === 403)) {
        this.#denied(error.message);
        return;
      }
      this.problem = error instanceof Refused ? error.message : "the service does not answer";
      this.#wait = Math.min(SLOWEST_MS, this.#wait * 1.6);
      this.#listeners.forEach((listener) => listener(this.state, false));
    }
    if (number === this.#number && !document.hidden) {
      this.#timer = setTimeout(() => this.#look(number), this.#wait);
    }
  }
}
