// Talks to the service this page came from, with the key of this tab.

const KEY = "megatrain.key";

/** What the service has answered that is no success. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** Return the address of a path, below wherever the page is. */
export function url(path) {
  return new URL(path, document.baseURI.replace(/[?#].*$/, ""));
}

/** Send a request; return the answer.  Throws Refused. */
export async function send(path, { method = "GET", body, headers = {}, signal } = {}) {
  const all = { ...headers };
  if (key.get()) all["X-API-Key"] = key.get();
  if (body !== undefined) all["Content-Type"] = "application/json";
  const answer = await fetch(url(path), {
    method,
    headers: all,
    body: body === undefined ? undefined : JSON.stringify(body),
    cache: "no-store",
    credentials: "omit",
    signal,
  });
  if (!answer.ok && answer.status !== 304) throw new Refused(answer.status, await said(answer));
  return answer;
}

async function said(answer) {
  try {
    const told = await answer.json();
    const detail = told.error?.message ?? told.detail;
    return typeof detail === "string" ? detail : (detail?.[0]?.msg ?? `HTTP ${answer.status}`);
  } catch {
    return `the service answered with HTTP ${answer.status}`;
  }
}

/** Return JSON. */
export async function read(path) {
  return (await send(path)).json();
}

/** Reads one path again and again; an answer that has not changed costs a line of headers. */
export class Watched {
  #etag = "";

  /** Return what is new, or null where nothing is. */
  async read(path) {
    const answer = await send(path, { headers: this.#etag ? { "If-None-Match": this.#etag } : {} });
    if (answer.status === 304) return null;
    this.#etag = answer.headers.get("etag") ?? "";
    return answer.json();
  }
}

/** Give the JSON of each server-sent event of a POST, while they come. */
export async function* events(path, body, signal) {
  const answer = await send(path, { method: "POST", body, signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const whole = held.split("\n\n");
    held = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}
