/**
 * The demo page. It plays both parts around the service: n8n's (start a session, get the callback) and the front end's
 * (watch the answer, survive a cut line).
 *
 * Reads from the top: first what a run is, then the viewer and what it is made of (wire, pane, log), then the three
 * calls to the service, then the small parts of the page. Every address is relative, since the service may live under a
 * path prefix; whatever comes from the service is shown as text, never parsed as HTML.
 */

/** How often and for how long the callback is asked for. It is due when the answer ends, so a minute is a lot. */
const CALLBACK_POLL_MS = 500;
const CALLBACK_WAIT_MS = 60_000;

/** What to ask a model that does not say back what it is told; replaces the first text while nobody has edited it. */
const QUESTION =
  "Explain Server-Sent Events to a curious newcomer in three short paragraphs: what travels over the wire, " +
  "how a browser resumes after the line was cut, and when one would rather use a WebSocket.";

const HINTS = {
  echo: "Built in: says your prompt back, one word at a time. Needs no key.",
  openai: "OpenAI, with the key this service was started with.",
  anthropic: "Anthropic, with the key this service was started with.",
};

const byId = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

/** Connects the page's parts. The only function that runs by itself. */
function main() {
  const log = new WireLog(byId("wire-log"), byId("wire-empty"));
  const viewer = new Viewer(byId, log);
  const callback = new CallbackPanel(byId);
  let current = new AbortController();

  const start = () => {
    current.abort(); // of two runs only the later one is shown; the earlier goes on in the service, as it would for n8n
    current = new AbortController();
    run({ viewer, callback, log, signal: current.signal });
  };
  byId("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    start();
  });
  byId("ask-form").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask-form").requestSubmit();
  });
  byId("drop").addEventListener("click", () => viewer.drop());
  byId("stop").addEventListener("click", () => viewer.stop());
  byId("model").addEventListener("change", fitModel);
  byId("format").addEventListener("change", fitFormat);
  for (const button of document.querySelectorAll("button.copy")) {
    button.addEventListener("click", () => copy(byId(button.dataset.copies), button));
  }
  fitFormat();
  fillModels();
}

/** One run from the question to the callback: the three steps drawn in the page's head. */
async function run({ viewer, callback, log, signal }) {
  const question = Object.fromEntries(new FormData(byId("ask-form")));
  step("ask", "active");
  step("watch", "idle");
  step("callback", "idle");
  showProblems();
  log.clear();
  viewer.clear();
  callback.clear();
  byId("start").disabled = true;
  try {
    log.note("out", "POST demo/start, as n8n would POST /init-stream");
    const session = await startSession(question, signal);
    byId("start").disabled = false;
    byId("start").textContent = "Start again";
    byId("curl").textContent = session.curl;
    document.querySelector('[data-copies="curl"]').disabled = false;
    step("ask", "done");
    log.note("in", `session ${session.streamId}`);
    for (const warning of session.warnings ?? []) log.note("bad", `warning: ${describe(warning)}`);

    step("watch", "active");
    const seen = await viewer.watch(session, question.format, signal);
    step("watch", seen.ending);

    step("callback", "active");
    const got = await callback.wait(session.callbackPath, signal);
    step("callback", got ? "done" : "failed");
    if (!got) return;
    log.note("end", "callback arrived at n8n");
    callback.compare(seen.text, question.format);
    viewer.showTokens(got.body.output_tokens);
  } catch (problem) {
    if (signal.aborted) return;
    if (!(problem instanceof Problem)) throw problem;
    byId("start").disabled = false;
    step("ask", "failed");
    log.note("bad", `refused: ${problem.code}`);
    viewer.refuse(problem);
    showProblems(problem);
  }
}

/**
 * One viewer of one answer: the text, the status, the counters.
 *
 * Its elements are looked up through `part`, so that a second viewer beside the first needs only its own elements.
 */
class Viewer {
  #part;
  #log;
  #answer;
  #reasoning;
  #paint;
  #run = null;

  /** @param {(name: string) => HTMLElement} part finds this viewer's element of that name */
  constructor(part, log) {
    this.#part = part;
    this.#log = log;
    this.#paint = oncePerFrame(() => this.#render());
    this.#answer = new TextPane(part("answer"));
    this.#reasoning = new TextPane(part("reasoning"));
  }

  /** Shows an empty viewer again, and takes the time from which the first text is waited for. */
  clear() {
    this.#answer.clear();
    this.#reasoning.clear();
    this.#part("reasoning-box").hidden = true;
    this.#run = {
      startedAt: performance.now(), firstTextAt: null, lastTextAt: null, text: "",
      events: 0, chunks: 0, characters: 0, reconnects: 0, tokens: null, lastId: "", resuming: false,
    };
    this.#say("connecting", "connecting…");
    this.#render();
  }

  /** The session was refused, so there is nothing to watch. */
  refuse(problem) {
    this.#say("failed", `failed: ${problem.code}`);
  }

  /**
   * Watches a session to its end.
   * @returns {Promise<{ending: "done"|"failed"|"cancelled", text: string}>} also when the answer failed
   */
  watch(session, format, signal) {
    const run = this.#run;
    run.streamId = session.streamId;
    run.address = streamAddress(session.streamUrl);
    run.ending = "done";
    return new Promise((resolve) => {
      const end = (state, words) => {
        this.#answer.flush(); // a hidden tab paints no frames; what has ended must stand there whole
        this.#say(state, words);
        this.#render();
        resolve({ ending: state, text: run.text });
      };
      watchWire(run.address, {
        connect: () => this.#log.note("out", "GET stream/…, the first connection"),
        open: () => {
          this.#say("streaming", "waiting for the first text");
          this.#log.note("in", "connected");
        },
        event: (data, id) => this.#take(decode(data, format), id),
        lost: (id) => this.#lost(id),
        resume: (id) => this.#resumed(id),
        done: (id) => {
          run.lastId = id || run.lastId;
          this.#log.note("end", `[DONE] after ${number.format(run.characters)} characters`);
          end(run.ending, run.ending);
        },
        fail: ({ code, message, retryable }) => {
          this.#log.note("bad", `event: error (${code}${retryable ? ", may be tried again" : ""})`);
          end("failed", `failed: ${code}. ${message}`);
        },
        refused: () => {
          this.#log.note("bad", "the service refused the connection; an EventSource is not told why");
          end("failed", "failed: connection refused");
        },
      }, signal);
    });
  }

  /** Has the service end this viewer's connection, as a lost network would; the browser then comes back by itself. */
  async drop() {
    this.#part("drop").disabled = true;
    this.#log.note("out", "drop the connection, please");
    const response = await fetch(`demo/drop/${this.#run.streamId}`, { method: "POST" }).catch(() => null);
    const dropped = response?.ok ? (await response.json()).dropped : 0;
    if (!dropped) this.#log.note("bad", "there was no connection left to drop");
  }

  /** Stops the answer, as a front end's stop button would: the part that is written is what n8n gets. */
  async stop() {
    const run = this.#run;
    this.#part("stop").disabled = true;
    this.#log.note("out", "POST stream/…/cancel");
    run.ending = "cancelled"; // in text mode [DONE] does not say so, and it may be here before the answer to this
    const response = await fetch(run.address.replace("?", "/cancel?"), { method: "POST" }).catch(() => null);
    const state = response?.ok ? (await response.json()).status : "unreachable";
    this.#log.note(response?.ok ? "in" : "bad", state);
    if (state.startsWith("cancel")) return;
    run.ending = "done"; // it came too late
    if (this.#part("status").dataset.state === "cancelled") this.#say("done", "done");
  }

  /** Shows tokens instead of chunks once the provider's count is known: chunks are only what they came wrapped in. */
  showTokens(tokens) {
    if (!tokens) return;
    this.#run.tokens = tokens;
    this.#render();
  }

  #take(event, id) {
    const run = this.#run;
    if (run.resuming) this.#log.note("in", `goes on with id ${id}`);
    run.resuming = false;
    run.events += 1;
    run.lastId = id;
    switch (event.type) {
      case "start":
        this.#log.note("in", `start: ${event.model} by ${event.provider}`);
        break;
      case "text":
        this.#takeText(event.text, id);
        break;
      case "reasoning":
        this.#part("reasoning-box").hidden = false;
        this.#reasoning.append(event.text);
        break;
      case "usage":
        this.#log.note("in", `usage: ${describe(event, ["type"])}`);
        break;
      case "end":
        this.#log.note("in", `end: ${event.finish_reason}`);
        break;
      case "cancelled":
        run.ending = "cancelled";
        this.#log.note("bad", "cancelled");
        break;
    }
    this.#paint();
  }

  #takeText(text, id) {
    const run = this.#run;
    run.lastTextAt = performance.now();
    if (run.firstTextAt === null) {
      run.firstTextAt = run.lastTextAt;
      this.#log.note("in", `first text, id ${id}, after ${duration(run.firstTextAt - run.startedAt)}`);
      this.#say("streaming", "streaming");
    }
    run.chunks += 1;
    run.characters += codePoints(text);
    run.text += text;
    this.#answer.append(text);
  }

  #lost(id) {
    if (this.#part("status").dataset.state === "reconnecting") return; // one outage, however many attempts it takes
    this.#log.note("cut", id ? `connection lost after id ${id}` : "no connection; the browser tries again");
    this.#say("reconnecting", id ? `reconnecting… (has everything up to id ${id})` : "reconnecting…");
  }

  #resumed(id) {
    this.#run.reconnects += 1;
    this.#run.resuming = true;
    this.#log.note("in", id ? `connected again, Last-Event-ID: ${id}` : "connected");
    this.#say("streaming", id ? `resumed after id ${id}` : "streaming");
    this.#answer.mark(id ? `resumed after id ${id}` : "connected again");
    this.#paint();
  }

  #say(state, words) {
    const status = this.#part("status");
    status.dataset.state = state;
    status.textContent = words;
    this.#part("drop").disabled = state !== "streaming";
    const live = state === "streaming" || state === "reconnecting" || state === "connecting";
    this.#part("stop").disabled = !live;
    this.#part("answer").dataset.live = live ? "yes" : "no";
    // A screen reader gets the answer in one piece instead of word by word; the status tells it what goes on meanwhile.
    this.#part("answer").ariaBusy = String(live);
  }

  #render() {
    const run = this.#run;
    const seconds = (run.lastTextAt - run.firstTextAt) / 1000;
    const show = (name, value) => { this.#part(name).textContent = value; };
    show("first-text", run.firstTextAt === null ? "–" : duration(run.firstTextAt - run.startedAt));
    show("characters", number.format(run.characters));
    show("events", number.format(run.events));
    show("rate-label", run.tokens ? "Tokens per second" : "Chunks per second");
    show("rate", seconds > 0.2 ? number.format((run.tokens ?? run.chunks) / seconds) : "–");
    show("last-id", run.lastId || "–");
    show("reconnects", number.format(run.reconnects));
  }
}

/**
 * The wire: turns what an EventSource reports into verbs.
 *
 * `onerror` means three things. With data it is the service's own `event: error`: final. Without data the connection is
 * gone: either the browser comes back by itself (CONNECTING), naming the last id it saw, or it has given up (CLOSED).
 */
function watchWire(url, on, signal) {
  let lastId = "";
  let opened = 0;
  on.connect();
  const source = new EventSource(url);
  signal.addEventListener("abort", () => source.close());
  source.onopen = () => {
    opened += 1;
    if (opened === 1) on.open();
    else on.resume(lastId);
  };
  source.onmessage = ({ data, lastEventId }) => {
    lastId = lastEventId;
    if (data === "[DONE]") {
      source.close(); // otherwise the browser would take the end for a lost connection and come back
      on.done(lastEventId);
    } else {
      on.event(data, lastEventId);
    }
  };
  source.onerror = ({ data }) => {
    if (data !== undefined) {
      source.close();
      on.fail(JSON.parse(data));
    } else if (source.readyState === EventSource.CONNECTING) {
      on.lost(lastId);
    } else {
      on.refused();
    }
  };
}

/** A message's data as an event: text mode carries nothing but text, JSON mode says what each event is. */
function decode(data, format) {
  return format === "json" ? JSON.parse(data) : { type: "text", text: data };
}

/**
 * An element that grows by text. Writes once per frame, however many events arrive in it: a fast model sends hundreds a
 * second, and each write costs a layout. Follows the end unless the reader has scrolled away from it.
 */
class TextPane {
  #element;
  #pending = "";
  #paint = oncePerFrame(() => this.flush());

  constructor(element) {
    this.#element = element;
  }

  append(text) {
    this.#pending += text;
    this.#paint();
  }

  /** Writes what is pending now. */
  flush() {
    if (!this.#pending) return;
    const pane = this.#element;
    const atEnd = pane.scrollHeight - pane.scrollTop - pane.clientHeight < 32;
    const segment = pane.lastElementChild ?? pane.appendChild(document.createElement("span"));
    segment.append(this.#pending);
    this.#pending = "";
    if (atEnd) pane.scrollTop = pane.scrollHeight;
  }

  /** What follows stands in a segment of its own, which the style sheet marks; the text itself stays exact. */
  mark(title) {
    this.flush();
    const segment = document.createElement("span");
    segment.className = "resumed";
    segment.title = title;
    this.#element.append(segment);
  }

  clear() {
    this.#pending = "";
    this.#element.replaceChildren();
  }
}

/** What happened on the wire, each line with the seconds since the start. */
class WireLog {
  #list;
  #empty;
  #startedAt = 0;

  constructor(list, empty) {
    this.#list = list;
    this.#empty = empty;
  }

  clear() {
    this.#startedAt = performance.now();
    this.#list.replaceChildren();
  }

  /** @param {"out"|"in"|"cut"|"end"|"bad"} kind gives the line its mark */
  note(kind, text) {
    this.#empty.hidden = true;
    this.#list.hidden = false;
    const line = document.createElement("li");
    line.dataset.kind = kind;
    const time = document.createElement("time");
    time.textContent = `${((performance.now() - this.#startedAt) / 1000).toFixed(3)} s`;
    const words = document.createElement("span");
    words.textContent = text;
    line.append(time, " ", words);
    this.#list.append(line);
    this.#list.scrollTop = this.#list.scrollHeight;
  }
}

/** What n8n got, and whether it is what the viewer saw. `#callback` holds the JSON and nothing else. */
class CallbackPanel {
  #part;
  #received = null;

  constructor(part) {
    this.#part = part;
  }

  clear() {
    this.#received = null;
    this.#part("callback").replaceChildren();
    for (const name of ["callback", "callback-summary", "callback-headers-box", "callback-again"]) {
      this.#part(name).hidden = true;
    }
    this.#say("waiting", "Nothing yet. n8n is called when the answer has ended.");
  }

  /** Waits until the callback has arrived and shows it; gives up, and says so, when there is none to be had. */
  async wait(path, signal) {
    for (;;) {
      this.#say("waiting", "The answer has ended. Waiting for the callback…");
      this.#received = await pollCallback(path, signal);
      if (this.#received) break;
      this.#say("missing", "No callback within a minute. The service’s log says why, and it goes on trying.");
      await this.#pressedAgain(signal);
    }
    const { body, headers, received_at: receivedAt } = this.#received;
    this.#part("callback").replaceChildren(jsonNodes(body));
    this.#part("callback-headers").replaceChildren(jsonNodes(headers));
    this.#part("callback-summary").textContent =
      `${body.status}, ${number.format(body.input_tokens)} tokens in, ${number.format(body.output_tokens)} tokens out`;
    for (const name of ["callback", "callback-summary", "callback-headers-box"]) this.#part(name).hidden = false;
    this.#say("arrived", `Arrived ${receivedAt}.`);
    return this.#received;
  }

  /**
   * Says whether n8n got exactly what the viewer saw. In text mode an event stream cannot carry CR and NUL: the service
   * sends LF instead of the one and leaves the other out, so the comparison does the same.
   */
  compare(seen, format) {
    let answer = this.#received.body.answer;
    if (format === "text") answer = answer.replace(/\r\n?/g, "\n").replaceAll("\0", "");
    const same = answer === seen;
    this.#say(
      same ? "same" : "differs",
      `Arrived. Its answer ${same ? "is what you watched, character for character" : "differs from what you watched"}.`,
    );
  }

  #pressedAgain(signal) {
    const button = this.#part("callback-again");
    button.hidden = false;
    return new Promise((resolve) => {
      button.addEventListener("click", resolve, { once: true, signal });
    }).then(() => { button.hidden = true; });
  }

  #say(state, words) {
    this.#part("callback-state").dataset.state = state;
    this.#part("callback-state").textContent = words;
  }
}

/** Why the service refused, in the words of its problem+json. */
class Problem extends Error {
  constructor({ code = "unknown", title = "", detail = "", errors = [] }) {
    super(detail || title || code);
    this.code = code;
    this.errors = errors;
  }
}

/** Starts a session. @throws {Problem} when the service refuses it, or does not answer */
async function startSession(question, signal) {
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
async function pollCallback(path, signal) {
  const giveUpAt = performance.now() + CALLBACK_WAIT_MS;
  while (performance.now() < giveUpAt) {
    const response = await fetch(path, { signal, cache: "no-store" }).catch(() => null);
    signal.throwIfAborted();
    if (response?.status === 200) return response.json();
    await new Promise((resolve) => setTimeout(resolve, CALLBACK_POLL_MS));
  }
  return null;
}

/** Offers what this service can talk to; `echo`, which stands in the page already, is there without being asked for. */
async function fillModels() {
  const response = await fetch("demo/models").catch(() => null);
  if (response?.ok) {
    const { models, default: chosen } = await response.json();
    const providers = [...new Set(models.map((model) => model.provider))];
    byId("model").replaceChildren(...providers.map((provider) => modelGroup(provider, models)));
    byId("model").value = chosen;
  }
  fitModel();
}

function modelGroup(provider, models) {
  const group = document.createElement("optgroup");
  group.label = provider;
  for (const model of models.filter((model) => model.provider === provider)) {
    const option = new Option(model.id, model.id);
    option.dataset.provider = model.provider;
    group.append(option);
  }
  return group;
}

/** Fits hint and first text to the chosen model; a prompt that somebody has edited is left alone. */
function fitModel() {
  const prompt = byId("prompt");
  const provider = byId("model").selectedOptions[0]?.dataset.provider ?? "";
  byId("model-hint").textContent = HINTS[provider] ?? "";
  if (prompt.value === prompt.defaultValue || prompt.value === QUESTION) {
    prompt.value = provider === "echo" ? prompt.defaultValue : QUESTION;
  }
}

/** Shows the code that reads the chosen mode. */
function fitFormat() {
  for (const code of byId("client-code").children) code.hidden = code.dataset.format !== byId("format").value;
}

/** Puts each of a problem's messages under its field, the rest under the form; without a problem, takes all away. */
function showProblems(problem) {
  const left = [];
  for (const name of ["prompt", "model", "format"]) {
    showProblem(name, (problem?.errors ?? []).filter(({ field }) => field === name).map(({ message }) => message));
  }
  for (const { field, message } of problem?.errors ?? []) {
    if (!["prompt", "model", "format"].includes(field)) left.push(`${field}: ${message}`);
  }
  if (problem && !problem.errors.length) left.push(problem.message);
  byId("form-problem").textContent = left.join("\n");
  byId("form-problem").hidden = !left.length;
  document.querySelector('[aria-invalid="true"]')?.focus();
}

function showProblem(name, messages) {
  byId(`${name}-problem`).textContent = messages.join("\n");
  byId(`${name}-problem`).hidden = !messages.length;
  byId(name).ariaInvalid = messages.length ? "true" : null;
}

/** Shows how far one of the three steps in the page's head is. */
function step(name, state) {
  byId(`step-${name}`).dataset.state = state;
}

/** The part of the stream's address from `stream/` on: its origin is the name n8n and browsers use, maybe not ours. */
function streamAddress(streamUrl) {
  const { pathname, search } = new URL(streamUrl);
  return pathname.slice(pathname.lastIndexOf("/stream/") + 1) + search;
}

/**
 * A value as indented JSON, with its parts marked for colour. Built from the value and not by a pattern over its text:
 * an answer may be megabytes long, which is more than a regular expression should be asked to walk.
 */
function jsonNodes(value, indent = "") {
  const nodes = document.createDocumentFragment();
  const inner = `${indent}  `;
  if (value === null || typeof value !== "object") {
    nodes.append(jsonPart(value === null ? "null" : typeof value, JSON.stringify(value)));
    return nodes;
  }
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const entries = Object.entries(value);
  nodes.append(open);
  entries.forEach(([key, member], i) => {
    nodes.append(i ? ",\n" : "\n", inner);
    if (!Array.isArray(value)) nodes.append(jsonPart("key", JSON.stringify(key)), ": ");
    nodes.append(jsonNodes(member, inner));
  });
  nodes.append(entries.length ? `\n${indent}${close}` : close);
  return nodes;
}

function jsonPart(kind, text) {
  const part = document.createElement("span");
  part.className = `json-${kind}`;
  part.textContent = text;
  return part;
}

/** Copies what an element shows. Without a clipboard (plain http from another machine) it is selected instead. */
async function copy(element, button) {
  const shown = element.querySelector("pre:not([hidden])") ?? element;
  try {
    await navigator.clipboard.writeText(shown.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(shown);
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

/** A function that asks for `paint` to be called in the next frame, once, however often it is called before. */
function oncePerFrame(paint) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      paint();
    });
  };
}

/** Characters as people and Python count them, not as UTF-16 does. */
function codePoints(text) {
  let count = 0;
  for (const _ of text) count += 1;
  return count;
}

/** Milliseconds in the unit a reader would choose. */
function duration(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${number.format(ms / 1000)} s`;
}

/** A flat value in one line, without its `hidden` keys. */
function describe(value, hidden = []) {
  if (value === null || typeof value !== "object") return String(value);
  const shown = Object.entries(value).filter(([key]) => !hidden.includes(key));
  return shown.map(([key, member]) => `${key} ${member}`).join(", ");
}

main();
