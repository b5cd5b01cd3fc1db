import { StreamError, passes, problem } from "./errors.js";
import { eventParser } from "./parser.js";
import type { Connection, Ending, Options } from "./types.js";

/** Milliseconds before the first try again; doubled with each that brings nothing. */
const FIRST_DELAY = 500;
/** The longest of them; also the most that a `Retry-After` can ask for: a person waits. */
const LONGEST_DELAY = 10_000;
/** Milliseconds without a byte after which a line counts as dead: three of the service's heartbeats. */
const SILENCE = 45_000;
/** Milliseconds between two looks at the clock: timers stand still while a machine sleeps, the clock does not. */
const LOOK = 5_000;

/** A line that brought no ending. It is tried again; `wait`: not before that many milliseconds. */
class Cut extends Error {
  constructor(
    message: string,
    readonly wait = 0,
  ) {
    super(message);
  }
}

/**
 * Watches a stream to its end, whatever becomes of the line: each connection goes on behind the last event that came.
 *
 * Ends with one call of `onComplete` or `onError`, or with none after `close()` or an abort of the signal. Never calls back before
 * it has returned. Throws a TypeError for what is no address.
 */
export function connectToStream(streamUrl: string | URL, options: Options = {}): Connection {
  const url = absolute(streamUrl);
  const silence = options.silence ?? SILENCE;
  let cursor = options.lastEventId ?? url.searchParams.get("last_event_id") ?? "";
  let closed = false;
  /** Tries without progress. */
  let attempts = 0;
  let opened = 0;
  /** When the last byte came. */
  let heardAt = 0;
  /** Gives up the present line. */
  let cut: ((reason: string) => void) | undefined;
  /** Ends the present wait. */
  let goOn: (() => void) | undefined;

  let resolveDone: () => void;
  const done = new Promise<void>((resolve) => (resolveDone = resolve));

  const tell = <Name extends "onMessage" | "onReasoning" | "onUsage" | "onStart" | "onOpen" | "onReconnect">(
    name: Name,
    ...told: Parameters<NonNullable<Options[Name]>>
  ): void => {
    guarded(() => (options[name] as ((...all: unknown[]) => void) | undefined)?.(...told));
  };

  /** One connection. Throws a StreamError for what is final; whatever else it throws is a line that was lost. */
  const connect = async (signal: AbortSignal): Promise<Ending> => {
    // Whatever the streamUrl asks for: this mode is exact, and has reasoning and usage.
    url.searchParams.set("format", "json");
    // As a parameter: the header `Last-Event-ID` would need a CORS preflight.
    if (cursor) url.searchParams.set("last_event_id", cursor);
    else url.searchParams.delete("last_event_id");
    const response = await (options.fetch ?? fetch)(url.href, {
      headers: { Accept: "text/event-stream" },
      cache: "no-store",
      credentials: "omit",
      signal,
    });
    if (signal.aborted) throw new Cut(""); // not every fetch that may be given cares for its signal
    const status = response.status;
    // To a cursor that the service knows as the last one: there is nothing more. Without one somebody else has answered.
    if (status === 204 && cursor) return { status: "completed", finishReason: null };
    if (status >= 400 && !passes(status)) throw await problem(response);
    if (status >= 400) throw new Cut("HTTP " + status, retryAfter(response));
    const type = response.headers.get("Content-Type");
    // A captive portal, or a balancer's page.
    if (status !== 200 || !/^text\/event-stream\b/i.test(type ?? "")) throw new Cut(`no event stream: HTTP ${status}, ${type}`);

    heardAt = Date.now();
    tell("onOpen", { reconnects: opened++, lastEventId: cursor });
    let ending: Ending = { status: "completed", finishReason: null };
    let ended = false;
    const feed = eventParser((type, data, id) => {
      if (closed || ended) return;
      if (type === "error") {
        const { code, message, retryable } = JSON.parse(data);
        // A refusal that may pass has no id of its own. An ending has one: who came back with it would get a 204.
        if (retryable && (id === undefined || id === cursor)) throw new Cut(code);
        cursor = id ?? cursor;
        throw new StreamError(code, message, retryable);
      }
      if (type !== "message") return;
      const event = data === "[DONE]" ? { type: "done" } : JSON.parse(data);
      const kind = event.type; // before anything is taken for seen: what is no object throws here
      if (id !== undefined) {
        // Only a service that does not know the cursor begins anew: what was seen is lost, and this does not go with it.
        if (!isAfter(id, cursor)) throw new StreamError("log_lost", "The text that was seen so far is lost.", false);
        cursor = id;
      }
      attempts = 0;
      if (kind === "text") {
        tell("onMessage", event.text, cursor);
      } else if (kind === "reasoning") {
        tell("onReasoning", event.text);
      } else if (kind === "start") {
        const { streamId, model, provider } = event;
        tell("onStart", { streamId, model, provider });
      } else if (kind === "usage") {
        const { type: _, ...usage } = event;
        tell("onUsage", usage);
      } else if (kind === "end") {
        ending = { status: "completed", finishReason: event.finish_reason };
      } else if (kind === "cancelled") {
        ending = { status: "cancelled", finishReason: null };
      } else {
        ended = kind === "done";
      }
    });
    const reader = (response.body as ReadableStream<Uint8Array>).getReader();
    signal.addEventListener("abort", () => void reader.cancel().catch(() => undefined));
    const decoder = new TextDecoder();
    while (!ended) {
      const { done: over, value } = await reader.read();
      if (over) throw new Cut("the line ended without an ending");
      heardAt = Date.now();
      feed(decoder.decode(value, { stream: true }));
    }
    return ending;
  };

  /** One connection, given up when it is silent for too long. */
  const watchLine = async (): Promise<Ending> => {
    const controller = new AbortController();
    let reason: string | undefined;
    cut = (why) => {
      reason = why;
      controller.abort();
    };
    const startedAt = (heardAt = Date.now());
    const look = setInterval(
      () => {
        heardAt = Math.min(heardAt, Date.now()); // the clock may have been set back
        if (Date.now() - heardAt >= silence) cut?.("silent");
      },
      Math.min(LOOK, silence / 4),
    );
    try {
      return await connect(controller.signal);
    } catch (error) {
      if (heardAt - startedAt >= LONGEST_DELAY) attempts = 0; // it stood: that it brought nothing was the model's doing
      throw reason && !(error instanceof StreamError) ? new Cut(reason) : error;
    } finally {
      clearInterval(look);
      cut = undefined;
      controller.abort(); // lets go of a body that nobody reads
    }
  };

  const watch = async (): Promise<void> => {
    while (!closed) {
      try {
        const ending = await watchLine();
        finish(() => options.onComplete?.(ending));
      } catch (error) {
        if (error instanceof StreamError) finish(() => (options.onError ? options.onError(error) : console.error(error)));
        else if (!closed) await wait(error as Partial<Cut>);
      }
    }
  };

  const wait = async ({ message = "", wait: least = 0 }: Partial<Cut>): Promise<void> => {
    const longest = Math.min(LONGEST_DELAY, FIRST_DELAY * 2 ** attempts);
    // Half of it by chance: those whom one restart has cut off do not come back in one moment.
    let delay = Math.max(longest * (0.5 + Math.random() / 2), Math.min(LONGEST_DELAY, least));
    // `online` wakes it. Not waited for without end: what a browser says of being offline is not always so.
    if (globalThis.navigator?.onLine === false) delay = LONGEST_DELAY;
    delay = Math.round(delay);
    const waited = new Promise<void>((resolve) => (goOn = resolve));
    const timer = setTimeout(() => goOn?.(), delay);
    tell("onReconnect", { attempt: ++attempts, delay, reason: message, lastEventId: cursor });
    await waited;
    goOn = undefined;
    clearTimeout(timer);
  };

  const wake = (event?: Event): void => {
    if (closed || (event?.type === "visibilitychange" && document.hidden)) return;
    if (goOn) {
      attempts = 0;
      goOn();
    } else if (Date.now() - heardAt >= silence / 2) {
      cut?.("silent"); // more than one heartbeat is missing
    }
  };

  /** `last`: the last call, where there is to be one. */
  const finish = (last?: () => void): void => {
    if (closed) return;
    closed = true;
    listen("removeEventListener", wake);
    options.signal?.removeEventListener("abort", close);
    cut?.("closed");
    goOn?.();
    if (last) guarded(last);
    resolveDone();
  };
  const close = (): void => finish();

  listen("addEventListener", wake);
  if (options.signal?.aborted) close();
  options.signal?.addEventListener("abort", close);
  void Promise.resolve().then(watch);
  return {
    get lastEventId() {
      return cursor;
    },
    done,
    close,
    cancel: async () => {
      const status = await cancel(url, options.fetch ?? fetch);
      wake(); // the service is there
      return status;
    },
  };
}

/** POST …/cancel, which a page may send also while it is being left. */
async function cancel(streamUrl: URL, request: typeof fetch): Promise<string> {
  const url = new URL(streamUrl);
  url.pathname = url.pathname.replace(/\/?$/, "/cancel");
  const token = url.searchParams.get("access_token");
  url.search = token ? "?access_token=" + encodeURIComponent(token) : "";
  const response = await request(url.href, { method: "POST", keepalive: true, cache: "no-store", credentials: "omit" }).catch(
    (error) => {
      throw new StreamError("network", String(error.message), true);
    },
  );
  if (!response.ok) throw await problem(response);
  return (await response.json()).status;
}

/** The events by which a page learns that it is awake, or online again. Where there is no page there are none. */
function listen(how: "addEventListener" | "removeEventListener", wake: (event: Event) => void): void {
  globalThis[how]?.("online", wake);
  globalThis[how]?.("pageshow", wake);
  globalThis.document?.[how]("visibilitychange", wake);
}

/** Calls what is not ours. What it throws is told as what it is, an uncaught error, and breaks nothing here. */
function guarded(call: () => void): void {
  try {
    call();
  } catch (error) {
    if (typeof reportError === "function") reportError(error);
    else
      queueMicrotask(() => {
        throw error;
      });
  }
}

/** The address as it is asked. A page's relative ones count from it. */
function absolute(streamUrl: string | URL): URL {
  // Else `undefined` would become a path, which many a development server answers with a page.
  if (!streamUrl) throw new TypeError("streamUrl is " + streamUrl);
  return new URL(streamUrl, globalThis.document?.baseURI ?? globalThis.location?.href);
}

/** Whether an id, `<epoch>-<seq>`, comes after another; also where one of them is none. */
function isAfter(id: string, other: string): boolean {
  const [epoch, seq] = id.split("-").map(Number);
  const [otherEpoch, otherSeq] = other.split("-").map(Number);
  return !(epoch! < otherEpoch! || (epoch === otherEpoch && seq! <= otherSeq!));
}

/** Milliseconds: of seconds, or until a date. */
function retryAfter(response: Response): number {
  const told = response.headers.get("Retry-After") ?? "";
  return Number(told) * 1000 || Date.parse(told) - Date.now() || 0;
}
