// Elements without a framework: made, and kept in step with data by key.

const SVG = "http://www.w3.org/2000/svg";

/** Return an element: properties by name, `on` are listeners, `data` goes to dataset. */
export function h(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** Return an SVG element. */
export function s(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

function fill(element, { on = {}, data = {}, ...attributes }, children) {
  for (const [name, listener] of Object.entries(on)) element.addEventListener(name, listener);
  Object.assign(element.dataset, data);
  for (const [name, value] of Object.entries(attributes)) set(element, name, value);
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** Set an attribute only where it changes; null and false take it away. */
export function set(element, name, value) {
  if (value === null || value === undefined || value === false) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
    return;
  }
  const text = value === true ? "" : String(value);
  if (element.getAttribute(name) !== text) element.setAttribute(name, text);
}

/** Set a text only where it changes, so that selections and screen readers are left in peace. */
export function say(element, text) {
  const wanted = String(text);
  if (element.textContent !== wanted) element.textContent = wanted;
  return element;
}

/**
 * Make children of `parent` one for each item, in order.  What is there stays the same element, so
 * that focus is not lost: `make(item)` returns a new one, `update(element, item)` changes it.
 */
export function keyed(parent, items, key, make, update) {
  const before = parent.kept ?? new Map();
  const after = new Map();
  let place = parent.firstElementChild;
  for (const item of items) {
    const name = key(item);
    const element = before.get(name) ?? make(item);
    after.set(name, element);
    before.delete(name);
    update(element, item);
    if (element === place) place = place.nextElementSibling;
    else parent.insertBefore(element, place);
  }
  for (const element of before.values()) element.remove();
  parent.kept = after;
}

/** Return a table's head. */
export function head(...titles) {
  const cells = titles.map((title) =>
    h(
      "th",
      { scope: "col", class: title.startsWith(">") ? "number" : "" },
      title.replace(/^>/, ""),
    ),
  );
  return h("thead", {}, h("tr", {}, cells));
}

/** Return a row with empty cells, by name; a name that begins with ">" is of numbers. */
export function row(names, titles = {}) {
  const cells = Object.fromEntries(
    names.map((name) => {
      const plain = name.replace(/^>/, "");
      const cell = h("td", { class: name.startsWith(">") ? "number" : "" });
      if (titles[plain]) cell.dataset.title = titles[plain];
      return [plain, cell];
    }),
  );
  return Object.assign(h("tr", {}, Object.values(cells)), { at: cells });
}

/** Say something for a while, to eyes and to screen readers. */
export function note(text, tone = "") {
  const element = h("p", { data: { tone } }, text);
  document.getElementById("notes").append(element);
  setTimeout(() => element.remove(), 6000);
}

/** Copy a text, and say so. */
export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    note(`Copied ${what}`);
  } catch {
    note(`This browser does not let the page copy; here it is: ${text}`);
  }
}
