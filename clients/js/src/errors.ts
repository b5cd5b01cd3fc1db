/** A stream that has ended otherwise than with an answer: the service's `code`, its words as `message`. */
export class StreamError extends Error {
  /** One of the service's stable codes; `http_<status>` where an answer had none, `network` where there was no answer to a cancel. */
  readonly code: string;
  /** Whether the same question, asked anew, may succeed. */
  readonly retryable: boolean;
  /** The HTTP status, where it was one that told it. */
  readonly status?: number;

  constructor(code: string, message: string, retryable: boolean, status?: number) {
    super(message);
    this.name = "StreamError";
    this.code = code;
    this.retryable = retryable;
    if (status !== undefined) this.status = status;
  }
}

/** What an answer that is no success says of itself: RFC 9457 from the service, anything from whoever stands in between. */
export async function problem(response: Response): Promise<StreamError> {
  const status = response.status;
  const told = ((await response.json().catch(() => null)) ?? {}) as { code?: unknown; detail?: unknown };
  return new StreamError(String(told.code ?? "http_" + status), String(told.detail ?? "HTTP " + status), passes(status), status);
}

/** Whether an answer with this status may be another one in a moment. */
export const passes = (status: number): boolean => status >= 500 || [408, 425, 429].includes(status);
