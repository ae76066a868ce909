// Where numbers stand on an axis, and which of them are written there.

/** Return about `most` round numbers from low to high. */
export function ticks(low, high, most) {
  if (!(high > low)) return [low];
  const rough = (high - low) / Math.max(1, most);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((each) => each * power >= rough) * power;
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at += 1) {
    found.push(Number((at * step).toPrecision(12)));
  }
  return found;
}

/** Return powers of ten from low to high, or round numbers where there are too few of them. */
export function logTicks(low, high, most) {
  const from = Math.floor(Math.log10(low));
  const to = Math.ceil(Math.log10(high));
  const every = Math.max(1, Math.ceil((to - from) / most));
  const found = [];
  for (let power = from; power <= to; power += every) found.push(10 ** power);
  const inside = found.filter((each) => each >= low && each <= high);
  return inside.length >= 2 ? inside : ticks(low, high, most);
}

/** Return a function from numbers in [low, high] to places in [from, to]. */
export function scale(low, high, from, to, isLog) {
  const [first, last] = isLog ? [Math.log(low), Math.log(high)] : [low, high];
  const span = last - first || 1;
  return (value) => from + (((isLog ? Math.log(value) : value) - first) / span) * (to - from);
}

/** Return the least and the greatest of numbers, with some room around them; null of none. */
export function extent(numbers, isLog) {
  let [low, high] = [Infinity, -Infinity];
  for (const each of numbers) {
    if (each === null || !Number.isFinite(each) || (isLog && each <= 0)) continue;
    low = Math.min(low, each);
    high = Math.max(high, each);
  }
  if (low > high) return null;
  if (isLog) return low === high ? [low / 2, high * 2] : [low / 1.1, high * 1.1];
  const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [low >= 0 && low < room * 4 ? 0 : low - room, high + room];
}

/** Return numbers, each mixed with those before it: an average that forgets, without a bias. */
export function smoothed(numbers, weight) {
  let [sum, total] = [0, 0];
  return numbers.map((each) => {
    if (each === null) return null;
    sum = sum * weight + each * (1 - weight);
    total = total * weight + (1 - weight);
    return sum / total;
  });
}

/** Return the place in sorted steps that is nearest to one. */
export function nearest(steps, wanted) {
  let [low, high] = [0, steps.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= wanted) low = middle;
    else high = middle;
  }
  return Math.abs(steps[high] - wanted) < Math.abs(steps[low] - wanted) ? high : low;
}
