// Numbers, sizes and times as people read them.

const four = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const dates = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
const ago = new Intl.RelativeTimeFormat("en", { numeric: "auto", style: "short" });
const UNITS = [
  ["day", 86400],
  ["hour", 3600],
  ["minute", 60],
  ["second", 1],
];

/** Return a number in four digits; "–" for none. */
export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) {
    return value
      .toExponential(2)
      .replace(/\.?0+e/, "e")
      .replace("e+", "e");
  }
  return four.format(value);
}

/** Return a count. */
export function count(value) {
  return whole.format(value);
}

/** Return tokens a second. */
export function rate(value) {
  return value >= 10000 ? `${four.format(value / 1000)}k` : four.format(value);
}

/** Return a size in bytes. */
export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  while (value >= 1000 && at < units.length - 1) [value, at] = [value / 1000, at + 1];
  return `${value < 10 && at ? value.toFixed(1) : Math.round(value)} ${units[at]}`;
}

/** Return how long ago, or how soon, a time in seconds is. */
export function when(seconds) {
  const from = seconds - Date.now() / 1000;
  const [unit, size] = UNITS.find(([, each]) => Math.abs(from) >= each) ?? UNITS[3];
  return ago.format(Math.round(from / size), unit);
}

/** Return a time in full. */
export function date(seconds) {
  return dates.format(new Date(seconds * 1000));
}

/** Return a short form of a long name: what tells it apart is at its ends. */
export function short(name, most = 28) {
  if (name.length <= most) return name;
  const half = Math.floor((most - 1) / 2);
  return `${name.slice(0, half)}…${name.slice(-half)}`;
}
