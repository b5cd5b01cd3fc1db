/**
 * What the page asks of the service in n8n's place: a session, the callback that came, the models to choose from.
 *
 * Every address is relative, since the service may live under a path prefix. Watching is the client's part, `viewer.js`.
 */

/** How often and for how long the callback is asked for. It is due when the answer ends, so a minute is a lot. */
const CALLBACK_POLL_MS = 500;
const CALLBACK_WAIT_MS = 60_000;

/** Why the service refused, in the words of its problem+json. */
export class Problem extends Error {
  constructor({ code = "unknown", title = "", detail = "", errors = [] }) {
    super(detail || title || code);
    this.code = code;
    this.errors = errors;
  }
}

/** Starts a session. @throws {Problem} when the service refuses it, or does not answer */
export async function startSession(question, signal) {
  let response;
  try {
    response = await fetch("demo/start", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(question),
      signal,
    });
  } catch {
    throw new Problem({ code: "unreachable", detail: "The service does not answer. Is it still running?" });
  }
  const answer = await response.json().catch(() => ({ title: `The service answered ${response.status}.` }));
  if (!response.ok) throw new Problem({ code: `http_${response.status}`, ...answer });
  return answer;
}

/** The callback once it has arrived, or null when a minute has passed without. A service that restarts is asked again. */
export async function pollCallback(path, signal) {
  const giveUpAt = performance.now() + CALLBACK_WAIT_MS;
  while (performance.now() < giveUpAt) {
    const response = await fetch(path, { signal, cache: "no-store" }).catch(() => null);
    signal.throwIfAborted();
    if (response?.status === 200) return response.json();
    await new Promise((resolve) => setTimeout(resolve, CALLBACK_POLL_MS));
  }
  return null;
}

/** `{models: [{id, provider}], default}`, or null where the service does not say. */
export async function fetchModels() {
  const response = await fetch("demo/models").catch(() => null);
  return response?.ok ? response.json() : null;
}

/** The stream's address for this page: `streamUrl` has the name that n8n and browsers use, and the page may be open by another. */
export function streamAddress(streamUrl) {
  const { pathname, search } = new URL(streamUrl);
  return pathname.slice(pathname.lastIndexOf("/stream/") + 1) + search;
}
