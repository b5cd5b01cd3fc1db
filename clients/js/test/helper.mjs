// A service that says what a test wants it to, over real HTTP, and a viewer that notes all it is told.
import { build } from "esbuild";
import assert from "node:assert/strict";
import http from "node:http";
import { fileURLToPath } from "node:url";
import { connectToStream } from "../dist/aistream.mjs";

const timer = setTimeout; // before a test puts something in its place

export const START = event("1-0", { type: "start", streamId: "s", model: "m", provider: "p" });
export const USAGE = {
  input_tokens: 4,
  output_tokens: 7,
  cached_input_tokens: 0,
  reasoning_tokens: 0,
  source: "provider",
  estimated_by: null,
};

/** One event as the service's JSON mode sends it. */
export function event(id, data, type) {
  const lines = [id !== undefined && `id: ${id}`, type && `event: ${type}`, `data: ${JSON.stringify(data)}`];
  return lines.filter(Boolean).join("\n") + "\n\n";
}
export const text = (id, said) => event(id, { type: "text", text: said });
export const done = (id, reason = "stop") => event(undefined, { type: "end", finish_reason: reason }) + `id: ${id}\ndata: [DONE]\n\n`;
export const failure = (code, retryable, id) => event(id, { type: "error", code, message: `It is ${code}.`, retryable }, "error");

/** Answers with an event stream of these bytes, and ends it; `open`: leaves it open. */
export function sse(response, bytes = "", { open = false } = {}) {
  response.writeHead(200, { "Content-Type": "text/event-stream; charset=utf-8" });
  response.write(bytes);
  if (!open) response.end();
}

/** Answers as the service does to what it refuses. */
export function refuse(response, status, code, headers = {}) {
  response.writeHead(status, { "Content-Type": "application/problem+json", ...headers });
  response.end(JSON.stringify({ ok: false, type: "about:blank", title: "No", status, code, detail: `It is ${code}.` }));
}

/**
 * A server for one test. `answers`: one function (response, request) per request, the last one for all that follow.
 * `asked`: what came, with the address taken apart.
 */
export async function serve(t, ...answers) {
  const asked = [];
  const server = http.createServer((request, response) => {
    const url = new URL(request.url, "http://here");
    const answer = answers[Math.min(asked.length, answers.length - 1)];
    const seen = { method: request.method, path: url.pathname, query: Object.fromEntries(url.searchParams), headers: request.headers };
    seen.left = new Promise((resolve) => response.on("close", resolve));
    asked.push(seen);
    answer(response, seen);
  });
  const listen = (port) => new Promise((resolve) => server.listen(port, "127.0.0.1", resolve));
  await listen(0);
  const { port } = server.address();
  const stop = () => {
    const stopped = new Promise((resolve) => server.close(resolve));
    server.closeAllConnections();
    return stopped;
  };
  t.after(stop);
  return { asked, url: `http://127.0.0.1:${port}/stream/s?access_token=t`, stop, again: () => listen(port) };
}

/** Watches, and notes each call as [name, ...arguments]. `react`: called with each of them. */
export function watch(url, options = {}, react = () => undefined) {
  const calls = [];
  const noted = Object.fromEntries(
    ["onMessage", "onReasoning", "onUsage", "onStart", "onOpen", "onReconnect", "onComplete", "onError"].map((name) => [
      name,
      (...told) => {
        calls.push([name, ...told]);
        react(name, connection);
      },
    ]),
  );
  const connection = connectToStream(url, { ...noted, ...options });
  const of = (name) => calls.filter((call) => call[0] === name).map((call) => call[1]);
  return { calls, connection, of, text: () => of("onMessage").join(""), done: connection.done };
}

/** A bounded poll. */
export async function until(holds, seconds = 10) {
  for (const end = performance.now() + seconds * 1000; !holds(); ) {
    assert.ok(performance.now() < end, `it did not come to that in ${seconds} s: ${holds}`);
    await new Promise((resolve) => timer(resolve, 2));
  }
}

/** Puts something in the place of a global, for one test. */
export function replace(t, name, value) {
  const before = Object.getOwnPropertyDescriptor(globalThis, name);
  Object.defineProperty(globalThis, name, { value, configurable: true, writable: true });
  t.after(() => (before ? Object.defineProperty(globalThis, name, before) : delete globalThis[name]));
}

/** The client's waits, noted and not waited for. `never`: they do not end by themselves. */
export function waits(t, { never = false } = {}) {
  const waited = [];
  replace(t, "setTimeout", (call, delay, ...rest) => {
    if (!new Error().stack.includes("/dist/aistream.")) return timer(call, delay, ...rest); // Node's own HTTP client has some too
    waited.push(delay);
    return timer(call, never ? 2 ** 30 : 0, ...rest).unref();
  });
  return waited;
}

/** A page around the client: what it listens to, and what it reads. */
export function page(t, { hidden = false, onLine = true } = {}) {
  const [window, document] = [new EventTarget(), new EventTarget()];
  document.hidden = hidden;
  document.baseURI = "https://page.test/chat/";
  let listening = 0;
  for (const target of [window, document]) {
    const [add, remove] = [target.addEventListener.bind(target), target.removeEventListener.bind(target)];
    target.addEventListener = (...told) => (listening++, add(...told));
    target.removeEventListener = (...told) => (listening--, remove(...told));
  }
  replace(t, "addEventListener", window.addEventListener);
  replace(t, "removeEventListener", window.removeEventListener);
  replace(t, "document", document);
  const navigator = { onLine };
  replace(t, "navigator", navigator);
  return { window, document, navigator, listening: () => listening };
}

/** A module of the source that the package does not export. */
export async function source(name) {
  const path = fileURLToPath(new URL(`../src/${name}.ts`, import.meta.url));
  const { outputFiles } = await build({ entryPoints: [path], bundle: true, write: false, format: "esm" });
  return import("data:text/javascript;base64," + Buffer.from(outputFiles[0].contents).toString("base64"));
}
