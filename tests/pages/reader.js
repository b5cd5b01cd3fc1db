/**
 * Plain EventSources that note what they hear. `follow` is one of them, `readAll` is many, one batch after another: a
 * browser opens at most six connections to a host over HTTP/1.1, and a seventh waits for ever beside six open streams.
 */
"use strict";

/** What the page is following now, oldest first. */
const followed = [];

/**
 * Opens a stream and notes each event as [id, data], and at each loss of the connection the last id it had. With `closes`
 * it is closed at [DONE] and at an `event: error`, as a client should; without, it is left to the browser what becomes of it.
 */
function follow(url, { closes = true, onClosed = () => {} } = {}) {
  const source = new EventSource(url);
  const heard = { opened: 0, messages: [], failures: [], lost: [], get state() { return source.readyState; } };
  const close = () => {
    source.close();
    onClosed(heard);
  };
  source.onopen = () => { heard.opened += 1; };
  source.onmessage = ({ lastEventId, data }) => {
    heard.messages.push([lastEventId, data]);
    if (closes && data === "[DONE]") close();
  };
  source.onerror = ({ lastEventId, data }) => {
    if (data !== undefined) {
      heard.failures.push([lastEventId, data]);
      if (closes) close();
    } else {
      heard.lost.push(heard.messages.at(-1)?.[0] ?? null);
      if (source.readyState === EventSource.CLOSED) onClosed(heard);
    }
  };
  followed.push(heard);
  return heard;
}

/** Reads every stream to its end, at most `atOnce` at the same time; gives what each has heard, in the order of `urls`. */
async function readAll(urls, atOnce = 6) {
  const heard = new Array(urls.length);
  let next = 0;
  const work = async () => {
    while (next < urls.length) {
      const mine = next++;
      heard[mine] = await new Promise((resolve) => follow(urls[mine], { onClosed: resolve }));
    }
  };
  await Promise.all(Array.from({ length: atOnce }, work));
  return heard;
}
