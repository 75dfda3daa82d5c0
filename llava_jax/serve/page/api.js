// Talks to the server: requests, streams, refusals.

/** Returns the URL of a path of the server. A key in the page's own URL is left out: fetch refuses it. */
export function url(path) {
  return new URL(path, location.href).href;
}

/** An error that the reader is told by a text of STRINGS. `told` is its key and its values. */
export class Told extends Error {
  constructor(...told) { super(told[0]); this.told = told; }
}

async function refusal(response) {
  const known = {401: "key", 413: "large", 503: "unready"}[response.status];
  const body = await response.json().catch(() => null);
  return known ? new Told(known)
    : new Told(response.status < 500 ? "refused" : "failed", body?.error?.message ?? `HTTP ${response.status}`);
}

function second(signal) {
  return new Promise((resolve, reject) => {
    setTimeout(resolve, 1000);
    signal.addEventListener("abort", () => reject(signal.reason), {once: true});
  });
}

/** Sends a request, and again after Retry-After while the server is busy. `wait` gets the seconds that are left. */
async function post(body, signal, wait) {
  const headers = {"Content-Type": "application/json"};
  const request = {method: "POST", headers, body: JSON.stringify(body), signal};
  for (;;) {
    const response = await fetch(url("v1/chat/completions"), request);
    if (response.ok) return response;
    if (response.status !== 429) throw await refusal(response);
    for (let left = Math.ceil(Number(response.headers.get("Retry-After"))) || 1; left > 0; left--) {
      wait(left);
      await second(signal);
    }
    wait(0);
  }
}

/** Yields the events of an answer until [DONE]. Throws Told if the stream ends before it. */
export async function* ask(body, signal, wait) {
  const response = await post({...body, stream: true, stream_options: {include_usage: true}}, signal, wait);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const {value, done} = await reader.read();
    if (done) throw new Told("lost");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data === "[DONE]") return;
      const event = data ? JSON.parse(data) : null;
      if (event?.error) throw new Told("failed", event.error.message);
      if (event) yield event;
    }
  }
}

/** Fetches a file of the server, or throws Told. */
export async function get(path) {
  const response = await fetch(url(path));
  if (!response.ok) throw await refusal(response);
  return response;
}
