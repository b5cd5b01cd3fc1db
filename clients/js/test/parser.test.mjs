import assert from "node:assert/strict";
import { test } from "node:test";
import { source } from "./helper.mjs";

const { eventParser } = await source("parser");

/** What comes of these bytes, handed over in pieces that end at `cuts`. */
function parsed(bytes, ...cuts) {
  const events = [];
  const feed = eventParser((type, data, id) => events.push([type, data, id]));
  const decoder = new TextDecoder();
  let from = 0;
  for (const to of [...cuts, bytes.length]) {
    feed(decoder.decode(bytes.subarray(from, to), { stream: true }));
    from = to;
  }
  return events;
}
const bytesOf = (text) => new TextEncoder().encode(text);

const CASES = {
  "an event with an id": ["id: 1-1\ndata: a\n\n", [["message", "a", "1-1"]]],
  "an id counts once": ["id: 1-1\ndata: a\n\ndata: b\n\n", [["message", "a", "1-1"], ["message", "b", undefined]]],
  "lines end with CR": ["id: 1\rdata: a\r\rdata: b\r\r", [["message", "a", "1"], ["message", "b", undefined]]],
  "lines end with CRLF": ["id: 1\r\ndata: a\r\n\r\ndata: b\r\n\r\n", [["message", "a", "1"], ["message", "b", undefined]]],
  "lines end with all three": ["data: a\rdata: b\r\ndata: c\n\r\ndata: d\n\r", [["message", "a\nb\nc", undefined], ["message", "d", undefined]]],
  "a LF CR is two ends": ["data: a\n\rdata: b\n\n", [["message", "a", undefined], ["message", "b", undefined]]],
  "a BOM in front, and no second one": ["\ufeffdata: a\n\n\ufeffdata: b\n\n", [["message", "a", undefined]]],
  "comments": [":\n: hello\n:data: x\ndata: a\n:\n\n", [["message", "a", undefined]]],
  "data of many lines": ["data: a\ndata:\ndata: c\n\n", [["message", "a\n\nc", undefined]]],
  "empty data": ["data\n\ndata:\n\ndata\ndata\n\n", [["message", "", undefined], ["message", "", undefined], ["message", "\n", undefined]]],
  "one space is taken, no more, no tab": ["data:a\n\ndata:  b\n\ndata:\tc\n\n", [["message", "a", undefined], ["message", " b", undefined], ["message", "\tc", undefined]]],
  "a colon in a value": ["data: a: b:c\n\n", [["message", "a: b:c", undefined]]],
  "names of events, which count once": ["event: error\ndata: a\n\ndata: b\n\nevent:\ndata: c\n\n", [["error", "a", undefined], ["message", "b", undefined], ["message", "c", undefined]]],
  "a name without data is forgotten": ["event: error\n\ndata: a\n\n", [["message", "a", undefined]]],
  "an id with NUL is none": ["id: 1\ndata: a\n\nid: 2\0\ndata: b\n\n", [["message", "a", "1"], ["message", "b", undefined]]],
  "an id without a value": ["id\ndata: a\n\n", [["message", "a", ""]]],
  "an id without data comes with the next event": ["id: 1\n\ndata: a\n\n", [["message", "a", "1"]]],
  "fields that nobody knows, and retry": ["retry: 5\nfoo: 1\nData: x\n data: y\nbar\ndata: a\n\n", [["message", "a", undefined]]],
  "text beyond ASCII": ["id: 1\ndata: grüße \u{1F600} \u2028 \u0085 \u0000 漢\n\n", [["message", "grüße \u{1F600} \u2028 \u0085 \u0000 漢", "1"]]],
  "an event without its blank line": ["data: a\n\nid: 2\ndata: b\n", [["message", "a", undefined]]],
  "an event without its last line's end": ["data: a\n\ndata: b", [["message", "a", undefined]]],
};

for (const [name, [said, expected]] of Object.entries(CASES)) {
  test(`however it is cut: ${name}`, () => {
    const bytes = bytesOf(said);

    assert.deepEqual(parsed(bytes), expected);
    assert.deepEqual(parsed(bytes, ...bytes.keys()), expected); // each byte by itself
    for (const cut of bytes.keys()) {
      assert.deepEqual(parsed(bytes, cut), expected, `cut at ${cut}`);
      for (const second of bytes.keys()) if (second > cut) assert.deepEqual(parsed(bytes, cut, second), expected);
    }
  });
}

test("an event is told as soon as its last CR is there", () => {
  const events = [];
  const feed = eventParser((...told) => events.push(told));

  feed("data: a\r\r");
  const soon = [...events];
  feed("\ndata: b\n\n");

  assert.deepEqual(soon, [["message", "a", undefined]]);
  assert.equal(events.length, 2);
});

test("a piece without text changes nothing", () => {
  const events = [];
  const feed = eventParser((...told) => events.push(told));

  for (const piece of ["data: a\r", "", "\n", "", "data: b\n", "", "\n"]) feed(piece);

  assert.deepEqual(events, [["message", "a\nb", undefined]]);
});

test("a line of many pieces costs as much as it is long", () => {
  const events = [];
  const feed = eventParser((...told) => events.push(told));
  const piece = "x".repeat(100);

  feed("data: ");
  for (let i = 0; i < 50_000; i++) feed(piece);
  feed("\n\n");

  assert.equal(events[0][1].length, 5_000_000);
});
