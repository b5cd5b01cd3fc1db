import assert from "node:assert/strict";
import { test } from "node:test";
import { StreamError, stream } from "../dist/aistream.mjs";
import { START, USAGE, done, event, failure, serve, sse, text, until, waits } from "./helper.mjs";

test("an answer is iterated to its end, over a cut, and afterwards tells what there is to know", async (t) => {
  waits(t);
  const service = await serve(
    t,
    (response) => sse(response, START + text("1-1", "Hel")),
    (response) => sse(response, text("1-2", "lo") + event("1-3", { type: "usage", ...USAGE }) + done("1-4")),
  );
  const told = [];

  const answer = stream(service.url, { onUsage: () => told.push("usage"), onReconnect: () => told.push("lost") });
  const before = [answer.usage, answer.ending, answer.lastEventId];
  let all = "";
  for await (const chunk of answer) all += chunk;

  assert.equal(all, "Hello");
  assert.deepEqual(before, [null, null, ""]);
  assert.deepEqual([answer.usage, answer.ending], [USAGE, { status: "completed", finishReason: "stop" }]);
  assert.equal(answer.lastEventId, "1-2");
  assert.deepEqual(told, ["lost", "usage"]);
});

test("a slow loop gets what has come meanwhile in one piece", async (t) => {
  const pieces = Array.from({ length: 500 }, (_, i) => text(`1-${i + 2}`, `${i} `));
  let more;
  const service = await serve(t, (response) => {
    sse(response, START + text("1-1", "first "), { open: true });
    more = () => response.end(pieces.join("") + done("1-502"));
  });

  const answer = stream(service.url);
  const chunks = [];
  for await (const chunk of answer) {
    chunks.push(chunk);
    if (chunks.length === 1) {
      assert.equal(answer.lastEventId, "1-1");
      more();
      await until(() => answer.ending);
      assert.equal(answer.lastEventId, "1-1"); // what was handed out, not what has come
    }
  }

  assert.deepEqual(chunks, ["first ", Array.from({ length: 500 }, (_, i) => `${i} `).join("")]);
  assert.equal(answer.lastEventId, "1-501");
});

for (const [how, leave] of [
  ["break", undefined],
  ["close()", (answer) => answer.close()],
]) {
  test(`${how} lets go of the line`, async (t) => {
    const service = await serve(t, (response) => sse(response, START + text("1-1", "a") + text("1-2", "b"), { open: true }));

    const answer = stream(service.url);
    const chunks = [];
    for await (const chunk of answer) {
      chunks.push(chunk);
      if (!leave) break;
      leave(answer);
    }
    await service.asked[0].left;

    assert.deepEqual([chunks, answer.ending], [["ab"], null]);
  });
}

test("after close() nothing more is handed out", async (t) => {
  let more;
  const service = await serve(t, (response) => {
    sse(response, START + text("1-1", "first "), { open: true });
    more = () => response.end(text("1-2", "more") + done("1-3"));
  });

  const answer = stream(service.url);
  const chunks = [];
  for await (const chunk of answer) {
    chunks.push(chunk);
    more();
    await until(() => answer.ending);
    answer.close();
  }

  assert.deepEqual(chunks, ["first "]);
});

test("close() from elsewhere ends a loop that waits, and so does a signal", async (t) => {
  const service = await serve(t, (response) => sse(response, START + text("1-1", "a"), { open: true }));
  const controller = new AbortController();
  const loop = async (answer) => {
    const chunks = [];
    for await (const chunk of answer) chunks.push(chunk);
    return chunks;
  };

  const [one, other] = [stream(service.url), stream(service.url, { signal: controller.signal })];
  const loops = [loop(one), loop(other)];
  await until(() => one.lastEventId && other.lastEventId);
  one.close();
  controller.abort();

  assert.deepEqual(await Promise.all(loops), [["a"], ["a"]]);
});

test("what is final is thrown, after all that was said before it", async (t) => {
  const service = await serve(t, (response) => sse(response, START + text("1-1", "a") + failure("provider_timeout", true, "1-2")));
  const answer = stream(service.url);
  const chunks = [];

  await assert.rejects(
    async () => {
      for await (const chunk of answer) chunks.push(chunk);
    },
    (error) => error instanceof StreamError && error.code === "provider_timeout" && error.retryable,
  );

  assert.deepEqual([chunks, answer.ending], [["a"], null]);
});

test("cancel() ends the loop with what the service says", async (t) => {
  let open;
  const service = await serve(t, (response, { method }) => {
    if (method === "GET") {
      open = response;
      return sse(response, START + text("1-1", "a"), { open: true });
    }
    response.writeHead(202, { "Content-Type": "application/json" }).end('{"status":"cancelling"}');
    open.end(event(undefined, { type: "cancelled" }) + "id: 1-2\ndata: [DONE]\n\n");
  });

  const answer = stream(service.url);
  const told = [];
  for await (const chunk of answer) told.push(chunk, await answer.cancel());

  assert.deepEqual([told, answer.ending], [["a", "cancelling"], { status: "cancelled", finishReason: null }]);
});

test("an answer goes on behind a cursor that was kept", async (t) => {
  const service = await serve(t, (response) => sse(response, text("1-2", "b") + done("1-3")));

  const answer = stream(service.url, { lastEventId: "1-1" });
  let all = "";
  for await (const chunk of answer) all += chunk;

  assert.deepEqual([all, service.asked[0].query.last_event_id, answer.lastEventId], ["b", "1-1", "1-2"]);
});
