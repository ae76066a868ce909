// A line chart in SVG, read with the mouse, by touch, or with the arrow keys.

import { h, s, say, set } from "./dom.js";
import { number } from "./format.js";
import { extent, logTicks, nearest, scale, smoothed, ticks } from "./scale.js";

const ROOM = { left: 54, right: 14, top: 10, bottom: 26 };
const HEIGHT = 190;
const FEW = 40; // so few points are dots, too

/** Charts that show the same step. */
export class Cursor {
  charts = new Set();

  move(step) {
    for (const chart of this.charts) chart.point(step);
  }
}

export class Chart {
  constructor(title, cursor) {
    this.title = title;
    this.#cursor = cursor;
    this.#value = h("span", { class: "value" });
    this.#tip = h("div", { class: "tip", hidden: true });
    this.#svg = s("svg", { "aria-hidden": "true", height: HEIGHT });
    this.#plot = h(
      "div",
      {
        class: "plot",
        role: "slider",
        tabindex: 0,
        "aria-label": `${title}, by step`,
        "aria-orientation": "horizontal",
        on: {
          pointermove: (event) => this.#hover(event),
          pointerdown: (event) => this.#hover(event),
          pointerleave: () => cursor.move(null),
          blur: () => cursor.move(null),
          keydown: (event) => this.#key(event),
        },
      },
      this.#svg,
      this.#tip,
    );
    const caption = h("figcaption", {}, h("h3", {}, title), this.#value);
    this.element = h("figure", { class: "chart" }, caption, this.#plot);
    this.#observer = new ResizeObserver(() => this.#draw());
    this.#observer.observe(this.#plot);
    cursor.charts.add(this);
  }

  #cursor;
  #value;
  #tip;
  #svg;
  #plot;
  #observer;
  #given = { series: [], smooth: 0, log: false };
  #at = null; // the step that is pointed at
  #overlay = s("g");

  /** Show series, {label, color, steps, values} each. */
  update(given) {
    this.#given = given;
    for (const each of given.series) {
      each.line = given.smooth ? smoothed(each.values, given.smooth) : each.values;
    }
    this.#draw();
  }

  remove() {
    this.#observer.disconnect();
    this.#cursor.charts.delete(this);
    this.element.remove();
  }

  #draw() {
    const width = this.#plot.clientWidth;
    const { series, log } = this.#given;
    const values = extent(
      series.flatMap((each) => [...each.values, ...each.line]),
      log,
    );
    const steps = series
      .flatMap((each) => [each.steps[0], each.steps.at(-1)])
      .filter(Number.isFinite);
    if (!width || !values || !steps.length) return;
    set(this.#svg, "width", width);
    set(this.#svg, "viewBox", `0 0 ${width} ${HEIGHT}`);
    const [from, to] = [Math.min(...steps), Math.max(...steps)];
    this.range = [from, to];
    this.x = scale(from, to, ROOM.left, width - ROOM.right);
    if (from === to) this.x = () => (ROOM.left + width - ROOM.right) / 2;
    this.y = scale(...values, HEIGHT - ROOM.bottom, ROOM.top, log);
    const lines = series.flatMap((each) => this.#lines(each));
    this.#svg.replaceChildren(this.#axes(width, values), ...lines, this.#overlay);
    set(this.#plot, "aria-valuemin", from);
    set(this.#plot, "aria-valuemax", to);
    this.point(this.#at);
  }

  #axes(width, [low, high]) {
    const group = s("g", { class: "axes" });
    const bottom = HEIGHT - ROOM.bottom;
    for (const tick of (this.#given.log ? logTicks : ticks)(low, high, 5)) {
      const y = this.y(tick);
      group.append(
        s("line", { x1: ROOM.left, x2: width - ROOM.right, y1: y, y2: y }),
        s("text", { x: ROOM.left - 8, y: y + 4, "text-anchor": "end" }, number(tick)),
      );
    }
    const marks = ticks(...this.range, Math.max(2, width / 90)).filter(Number.isInteger);
    for (const tick of marks) {
      const x = this.x(tick);
      group.append(
        s("line", { class: "tick", x1: x, x2: x, y1: bottom, y2: bottom + 4 }),
        s("text", { x, y: HEIGHT - 7, "text-anchor": "middle" }, number(tick)),
      );
    }
    return group;
  }

  #lines({ steps, values, line, color }) {
    const found = [];
    if (this.#given.smooth)
      found.push(s("path", { class: `line raw s${color}`, d: this.#path(steps, values) }));
    found.push(s("path", { class: `line s${color}`, d: this.#path(steps, line) }));
    if (steps.length <= FEW) {
      steps.forEach((step, at) => {
        if (!this.#drawn(line[at])) return;
        found.push(
          s("circle", { class: `dot s${color}`, cx: this.x(step), cy: this.y(line[at]), r: 2.5 }),
        );
      });
    }
    return found;
  }

  #drawn(value) {
    return value !== null && (!this.#given.log || value > 0);
  }

  #path(steps, values) {
    let [d, pen] = ["", "M"];
    values.forEach((value, at) => {
      if (!this.#drawn(value)) {
        pen = "M";
        return;
      }
      d += `${pen}${this.x(steps[at]).toFixed(1)} ${this.y(value).toFixed(1)}`;
      pen = "L";
    });
    return d;
  }

  /** Point at a step, or at the last one of each series for null. */
  point(step) {
    this.#at = step;
    if (!this.x) return;
    const found = this.#given.series.map((each) => this.#found(each, step)).filter(Boolean);
    this.#overlay.replaceChildren();
    this.#say(found);
    this.#tip.hidden = step === null || !found.length;
    if (step === null || !found.length) return;
    const x = this.x(found[0].step);
    this.#overlay.append(
      s("line", { class: "rule", x1: x, x2: x, y1: ROOM.top, y2: HEIGHT - ROOM.bottom }),
    );
    for (const each of found) {
      if (!this.#drawn(each.line)) continue;
      const place = { cx: this.x(each.step), cy: this.y(each.line), r: 4 };
      this.#overlay.append(s("circle", { class: `mark s${each.color}`, ...place }));
    }
    this.#tell(found, x);
  }

  #found({ label, color, steps, values, line }, step) {
    if (!steps.length) return null;
    const at = step === null ? steps.length - 1 : nearest(steps, step);
    return { label, color, step: steps[at], value: values[at], line: line[at] };
  }

  #say(found) {
    const one = found.length === 1;
    say(this.#value, one ? number(found[0].value) : "");
    if (!found.length) return;
    const each = found.map((one_) => `${one ? "" : `${one_.label} `}${number(one_.value)}`);
    set(this.#plot, "aria-valuenow", found[0].step);
    set(this.#plot, "aria-valuetext", `step ${found[0].step}: ${each.join(", ")}`);
  }

  #tell(found, x) {
    this.#tip.replaceChildren(
      h("strong", {}, `step ${found[0].step}`),
      ...found.map(({ label, color, value, line }) => {
        const more = this.#given.smooth ? ` (smooth ${number(line)})` : "";
        const name = found.length > 1 ? label : "";
        return h("span", { class: `entry s${color}` }, name, h("b", {}, number(value)), more);
      }),
    );
    const width = this.#plot.clientWidth;
    const left = x > width / 2 ? x - this.#tip.offsetWidth - 12 : x + 12;
    this.#tip.style.transform = `translate(${Math.max(0, left)}px, 8px)`;
  }

  #hover(event) {
    if (!this.x) return;
    const [from, to] = this.range;
    const { left, width } = this.#plot.getBoundingClientRect();
    const share = (event.clientX - left - ROOM.left) / (width - ROOM.left - ROOM.right);
    this.#cursor.move(from + Math.min(1, Math.max(0, share)) * (to - from));
  }

  #key(event) {
    const steps = this.#given.series[0]?.steps ?? [];
    if (!steps.length) return;
    const at = this.#at === null ? steps.length - 1 : nearest(steps, this.#at);
    const next = {
      ArrowLeft: at - 1,
      ArrowDown: at - 1,
      ArrowRight: at + 1,
      ArrowUp: at + 1,
      PageDown: at - Math.ceil(steps.length / 10),
      PageUp: at + Math.ceil(steps.length / 10),
      Home: 0,
      End: steps.length - 1,
      Escape: null,
    }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    this.#cursor.move(next === null ? null : steps[Math.min(steps.length - 1, Math.max(0, next))]);
  }
}
