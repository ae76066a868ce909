// Tabs as ARIA describes them: one stop for the tab key, arrows between them, an address for each.

export class Tabs {
  constructor(list, changed) {
    this.tabs = [...list.querySelectorAll("[role=tab]")];
    this.#changed = changed;
    list.addEventListener("click", (event) => {
      const tab = event.target.closest("[role=tab]");
      if (tab) this.select(this.#name(tab));
    });
    list.addEventListener("keydown", (event) => this.#key(event));
    addEventListener("hashchange", () => this.fromAddress());
  }

  #changed;

  #name(tab) {
    return tab.getAttribute("aria-controls");
  }

  /** Show what the address says, or the first. */
  fromAddress() {
    const wanted = location.hash.slice(1);
    const known = this.tabs.map((tab) => this.#name(tab));
    if (wanted && !known.includes(wanted)) return;
    this.select(wanted || known[0], false);
  }

  select(name, note = true) {
    for (const tab of this.tabs) {
      const chosen = this.#name(tab) === name;
      tab.setAttribute("aria-selected", String(chosen));
      tab.tabIndex = chosen ? 0 : -1;
      document.getElementById(this.#name(tab)).hidden = !chosen;
    }
    if (note && location.hash.slice(1) !== name) history.replaceState(null, "", `#${name}`);
    this.#changed(name);
  }

  #key(event) {
    const at = this.tabs.indexOf(document.activeElement);
    const last = this.tabs.length - 1;
    const next = {
      ArrowRight: at === last ? 0 : at + 1,
      ArrowLeft: at === 0 ? last : at - 1,
      Home: 0,
      End: last,
    }[event.key];
    if (at < 0 || next === undefined) return;
    event.preventDefault();
    this.select(this.#name(this.tabs[next]));
    this.tabs[next].focus();
  }
}
