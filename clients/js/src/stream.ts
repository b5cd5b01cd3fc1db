import { connectToStream } from "./connection.js";
import type { StreamError } from "./errors.js";
import type { CommonOptions, Ending, TextStream, Usage } from "./types.js";

/**
 * The answer as an async iterable of its pieces: `for await (const chunk of stream(url))`. Connects at once.
 *
 * What has come while the loop was busy comes as one piece. `break` closes the connection; what is final is thrown as a `StreamError`.
 */
export function stream(streamUrl: string | URL, options: CommonOptions = {}): TextStream {
  let text = "";
  let over = false;
  let failed: StreamError | undefined;
  let usage: Usage | null = null;
  let ending: Ending | null = null;
  let textId = options.lastEventId ?? "";
  let handedId = textId;
  let wake = (): void => undefined;

  const { cancel, close, done } = connectToStream(streamUrl, {
    ...options,
    onMessage(chunk, id) {
      text += chunk;
      textId = id;
      wake();
    },
    onUsage(told) {
      usage = told;
      options.onUsage?.(told);
    },
    onComplete(told) {
      ending = told;
    },
    onError(error) {
      failed = error;
    },
  });
  void done.then(() => {
    over = true;
    wake();
  });

  async function* pieces(): AsyncGenerator<string, void, undefined> {
    try {
      for (;;) {
        if (text) {
          const piece = text;
          text = "";
          handedId = textId;
          yield piece;
        } else if (over) {
          if (failed) throw failed;
          return;
        } else {
          await new Promise<void>((resolve) => (wake = resolve));
        }
      }
    } finally {
      close();
    }
  }

  const iterator = pieces();
  return {
    [Symbol.asyncIterator]: () => iterator,
    cancel,
    close() {
      text = "";
      close();
    },
    get lastEventId() {
      return handedId;
    },
    get usage() {
      return usage;
    },
    get ending() {
      return ending;
    },
  };
}
