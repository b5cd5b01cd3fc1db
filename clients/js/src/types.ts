import type { StreamError } from "./errors.js";

/** The generation began. `model` is the one that is asked first. */
export interface Start {
  streamId: string;
  model: string;
  provider: string;
}

/** Tokens of the whole answer. `input_tokens` include the cached ones, `output_tokens` those of the reasoning. */
export interface Usage {
  input_tokens: number;
  output_tokens: number;
  cached_input_tokens: number;
  reasoning_tokens: number;
  /** `provider`: the figures are its own; `partial`: some of them; `estimated`: none. */
  source: "provider" | "partial" | "estimated";
  estimated_by: string | null;
}

/** How the answer ended. A failed one comes as a `StreamError` instead. */
export interface Ending {
  status: "completed" | "cancelled";
  /** `stop`, `length`, `content_filter`, `refusal`, `tool_calls`, or another one of the provider's; null where it is not known. */
  finishReason: string | null;
}

/** A connection stands: the first one (`reconnects` 0), or one that goes on behind `lastEventId`. */
export interface Opened {
  reconnects: number;
  lastEventId: string;
}

/** The line is gone, and is tried again in `delay` milliseconds, or before that when the page wakes up or is online again. */
export interface Lost {
  /** 1 for the first since the last progress. */
  attempt: number;
  delay: number;
  /** For a log, not for a person. */
  reason: string;
  lastEventId: string;
}

/** What both ways of watching take. */
export interface CommonOptions {
  /** What the model thinks aloud: never part of the answer. */
  onReasoning?(chunk: string): void;
  onUsage?(usage: Usage): void;
  onStart?(start: Start): void;
  onOpen?(opened: Opened): void;
  onReconnect?(lost: Lost): void;
  /** Closes the connection when it aborts. */
  signal?: AbortSignal;
  /** Goes on behind this event: a `lastEventId` that was kept. */
  lastEventId?: string;
  /** In place of the global one. */
  fetch?: typeof fetch;
  /** Milliseconds without a byte after which the line counts as dead. The service sends a heartbeat each 15 s. Default 45 000. */
  silence?: number;
}

/** All that `connectToStream` takes. Every one may be left out; none is called after `close()`. */
export interface Options extends CommonOptions {
  /** A piece of the answer, exactly as the model wrote it; `id` is what to keep if the page wants to go on behind it later. */
  onMessage?(chunk: string, id: string): void;
  /** The last call of an answer that did not fail. */
  onComplete?(ending: Ending): void;
  /** The last call otherwise: nothing is tried any more. Default: `console.error`. */
  onError?(error: StreamError): void;
}

/** A stream that is being watched. */
export interface Connection {
  /** The id of the last event that came, `""` before the first. */
  readonly lastEventId: string;
  /** Resolves when it is over, however it ended. Never rejects. */
  readonly done: Promise<void>;
  /**
   * Has the service stop the answer, and resolves to the status it tells: `cancelling` or `cancelled`, or what it had ended as before.
   * The stream goes on to its ending, which is `onComplete({status: "cancelled"})`. Rejects with a `StreamError`.
   */
  cancel(): Promise<string>;
  /** Stops watching, without a further call. The answer itself goes on. */
  close(): void;
}

/** The pieces of an answer, and afterwards what there is to know of it. To be iterated once. */
export interface TextStream extends AsyncIterable<string> {
  /** The id of the last event whose text was handed out. */
  readonly lastEventId: string;
  /** Null until it is told. */
  readonly usage: Usage | null;
  /** How it ended; null before, and for a stream that failed or was closed. */
  readonly ending: Ending | null;
  /** As `Connection` has it. */
  cancel(): Promise<string>;
  /** Ends the iteration, as `break` does. The answer itself goes on. */
  close(): void;
}
