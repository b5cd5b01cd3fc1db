import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { test } from "node:test";
import { StreamError, connectToStream } from "../dist/aistream.mjs";
import { START, USAGE, done, event, failure, page, refuse, replace, serve, sse, text, until, waits, watch } from "./helper.mjs";

const ANSWER = START + text("1-1", "Hel") + text("1-2", "lo") + done("1-3");
const HERE = import.meta.url.replace("/test/connection.test.mjs", "/dist/aistream.mjs");

// ---- What it asks and tells ----

test("it asks for JSON mode in a way that needs no preflight", async (t) => {
  const service = await serve(t, (response) => sse(response, ANSWER));

  await watch(service.url + "&format=text").done;

  const [{ method, path, query, headers }] = service.asked;
  assert.deepEqual([method, path, query], ["GET", "/stream/s", { access_token: "t", format: "json" }]);
  assert.equal(headers.accept, "text/event-stream");
  // Node's own beside it; `cache: "no-store"` gives the last two.
  const own = ["host", "connection", "accept", "accept-language", "sec-fetch-mode", "user-agent", "accept-encoding"];
  assert.deepEqual(Object.keys(headers).filter((name) => !own.includes(name)), ["pragma", "cache-control"]);
});

test("a whole answer is told in its order, with everything that there is to know", async (t) => {
  const said = [
    "retry: 2000\n:\n",
    START,
    event("1-1", { type: "reasoning", text: "hm " }),
    text("1-2", " a\u0000\r\n"),
    ":\n",
    text("1-3", "[DONE]"),
    event("1-4", { type: "usage", ...USAGE }),
    done("1-5", "length"),
  ];
  const service = await serve(t, (response) => sse(response, said.join("")));

  const viewer = watch(service.url);
  await viewer.done;

  assert.deepEqual(viewer.calls, [
    ["onOpen", { reconnects: 0, lastEventId: "" }],
    ["onStart", { streamId: "s", model: "m", provider: "p" }],
    ["onReasoning", "hm "],
    ["onMessage", " a\u0000\r\n", "1-2"],
    ["onMessage", "[DONE]", "1-3"],
    ["onUsage", USAGE],
    ["onComplete", { status: "completed", finishReason: "length" }],
  ]);
  assert.equal(viewer.connection.lastEventId, "1-5");
});

test("a stopped answer ends as cancelled", async (t) => {
  const stopped = START + text("1-1", "a") + event(undefined, { type: "cancelled" }) + "id: 1-2\ndata: [DONE]\n\n";
  const service = await serve(t, (response) => sse(response, stopped));

  const viewer = watch(service.url);
  await viewer.done;

  assert.deepEqual(viewer.of("onComplete"), [{ status: "cancelled", finishReason: null }]);
});

test("the original's call works unchanged", async (t) => {
  const service = await serve(t, (response) => sse(response, ANSWER));
  const saved = [];
  const [updateUI, showErrorToUser, streamUrl] = [() => undefined, assert.fail, service.url];

  const cleanup = (() => {
    let fullResponse = "";
    const stream = connectToStream(streamUrl, {
      onMessage: (chunk) => {
        fullResponse += chunk;
        updateUI(chunk);
      },
      onError: (error) => {
        showErrorToUser("Connection lost");
      },
      onComplete: () => {
        saved.push(fullResponse);
      },
    });
    return () => stream.close();
  })();
  await until(() => saved.length);
  cleanup();

  assert.deepEqual(saved, ["Hello"]);
});

test("events that it does not know are passed over", async (t) => {
  const strange = event("1-1", { type: "weather" }) + event("1-2", "text", "hello") + text("1-3", "a");
  const service = await serve(t, (response) => sse(response, START + strange + done("1-4")));

  const viewer = watch(service.url);
  await viewer.done;

  assert.equal(viewer.text(), "a");
  assert.equal(viewer.of("onReconnect").length, 0);
});

test("a prefix, an URL object and a page's relative address are all addresses", async (t) => {
  const service = await serve(t, (response) => sse(response, ANSWER));
  const { document } = page(t);
  document.baseURI = new URL("/behind/a/page.html", service.url).href;

  await watch(service.url.replace("/stream", "/prefix/stream")).done;
  await watch(new URL(service.url)).done;
  await watch("stream/s?access_token=t").done;
  await watch("/stream/s?access_token=t").done;

  assert.deepEqual(
    service.asked.map((one) => one.path),
    ["/prefix/stream/s", "/stream/s", "/behind/a/stream/s", "/stream/s"],
  );
});

test("what is no address is refused at once", (t) => {
  for (const none of [undefined, "", "http://", "no-page-to-count-from"]) assert.throws(() => connectToStream(none), TypeError);
  page(t);
  for (const none of [undefined, null, "", "http://"]) assert.throws(() => connectToStream(none), TypeError);
});

test("the fetch that is given is called as a function, with what a page needs", async () => {
  const asked = [];
  const fake = async function (address, init) {
    asked.push([this, address, init.cache, init.credentials, Object.keys(init.headers)]);
    return new Response(ANSWER, { headers: { "Content-Type": "text/event-stream" } });
  };

  const viewer = watch("https://a.test/stream/s?access_token=t", { fetch: fake });
  await viewer.done;

  assert.equal(viewer.text(), "Hello");
  assert.deepEqual(asked, [[undefined, "https://a.test/stream/s?access_token=t&format=json", "no-store", "omit", ["Accept"]]]);
});

// ---- The line ----

/** Serves what comes after the cursor, as the service does. */
function after(id) {
  const events = [START, text("1-1", "grü\u{1F600}"), text("1-2", "ße\r\n"), event("1-3", { type: "usage", ...USAGE }), done("1-4")];
  const ids = ["1-0", "1-1", "1-2", "1-3", "1-4"];
  return Buffer.from("retry: 2000\n:\n" + events.slice(id ? ids.indexOf(id) + 1 : 0).join(""));
}

for (const [how, cut] of Object.entries({
  "the connection breaks": (response) => setImmediate(() => response.destroy()),
  "the answer just ends": (response) => response.end(),
})) {
  test(`no character is lost or doubled wherever it is that ${how}`, async (t) => {
    waits(t);
    const whole = after("");
    const seen = new Set();
    const service = await serve(t, (response, { query }) => {
      const at = Number(query.at);
      const first = !seen.has(at);
      seen.add(at);
      if (!first) return sse(response, after(query.last_event_id));
      sse(response, whole.subarray(0, at), { open: true });
      cut(response);
    });

    for (const at of whole.keys()) {
      const viewer = watch(`${service.url}&at=${at}`);
      await viewer.done;
      const told = viewer.calls.filter(([name]) => !["onOpen", "onReconnect"].includes(name));
      const [{ lastEventId, attempt }] = viewer.of("onReconnect");
      assert.deepEqual(viewer.of("onOpen")[1], { reconnects: 1, lastEventId });
      assert.equal(attempt, 1);
      assert.deepEqual(told, [
        ["onStart", { streamId: "s", model: "m", provider: "p" }],
        ["onMessage", "grü\u{1F600}", "1-1"],
        ["onMessage", "ße\r\n", "1-2"],
        ["onUsage", USAGE],
        ["onComplete", { status: "completed", finishReason: "stop" }],
      ]);
    }
    assert.equal(service.asked.length, 2 * whole.length);
  });
}

test("bytes may come in any pieces", async (t) => {
  const whole = after("");
  const service = await serve(t, async (response) => {
    sse(response, "", { open: true });
    response.socket.setNoDelay();
    for (const at of whole.keys()) {
      response.write(whole.subarray(at, at + 1));
      await new Promise((resolve) => setImmediate(resolve));
    }
    response.end();
  });

  const viewer = watch(service.url);
  await viewer.done;

  assert.equal(viewer.text(), "grü\u{1F600}ße\r\n");
  assert.equal(service.asked.length, 1);
});

const PASSING = {
  500: (response) => refuse(response, 500, "internal"),
  502: (response) => response.writeHead(502, { "Content-Type": "text/html" }).end("<h1>Bad gateway</h1>"),
  503: (response) => refuse(response, 503, "store_unavailable", { "Retry-After": "2" }),
  504: (response) => response.writeHead(504).end(),
  408: (response) => response.writeHead(408).end(),
  425: (response) => response.writeHead(425).end(),
  429: (response) => refuse(response, 429, "too_many_viewers", { "Retry-After": "2" }),
  "a page in place of a stream": (response) => response.writeHead(200, { "Content-Type": "text/html" }).end("<h1>\n" + ANSWER),
  "no type": (response) => response.writeHead(200).end(),
  "nothing, though no cursor was sent": (response) => response.writeHead(204).end(),
  "not modified": (response) => response.writeHead(304).end(),
  "a line that is cut before its answer": (response) => response.destroy(),
  "an answer that is no JSON": (response) => sse(response, "id: 1-1\ndata: hello\n\n"),
  "an answer that is no object": (response) => sse(response, "id: 1-1\ndata: null\n\n"),
};
for (const [what, answer] of Object.entries(PASSING)) {
  test(`tried again: ${what}`, async (t) => {
    waits(t);
    const service = await serve(t, answer, answer, (response) => sse(response, ANSWER));

    const viewer = watch(service.url);
    await viewer.done;

    assert.deepEqual([viewer.text(), service.asked.length, viewer.of("onError")], ["Hello", 3, []]);
    assert.equal(viewer.of("onOpen").length, what.startsWith("an answer that is no") ? 3 : 1);
    assert.deepEqual(
      viewer.of("onReconnect").map((lost) => lost.attempt),
      [1, 2],
    );
    assert.deepEqual(
      service.asked.map((one) => one.query.last_event_id),
      [undefined, undefined, undefined],
    );
  });
}

test("what is no stream is let go of, however long it would be", async (t) => {
  waits(t);
  const page = (response) => response.writeHead(200, { "Content-Type": "text/html" }).write("<h1>");
  const service = await serve(t, page, (response) => sse(response, ANSWER));

  await watch(service.url).done;

  await service.asked[0].left;
});

test("a service that is not there is waited for", async (t) => {
  const service = await serve(t, (response) => sse(response, ANSWER));
  await service.stop();

  const viewer = watch(service.url);
  await until(() => viewer.of("onReconnect").length === 2);
  await service.again();
  await viewer.done;

  assert.equal(viewer.text(), "Hello");
});

for (const [status, code] of [[400, "invalid_request"], [401, "token_expired"], [403, undefined], [404, "not_found"], [410, "replay_over"], [451, undefined]]) {
  test(`final: ${status}`, async (t) => {
    const service = await serve(t, (response) => (code ? refuse(response, status, code) : response.writeHead(status).end("No.")));

    const viewer = watch(service.url);
    await viewer.done;

    const [error, ...more] = viewer.of("onError");
    assert.ok(error instanceof StreamError && error instanceof Error);
    assert.deepEqual(
      [error.name, error.code, error.message, error.retryable, error.status, more],
      ["StreamError", code ?? `http_${status}`, code ? `It is ${code}.` : `HTTP ${status}`, false, status, []],
    );
    assert.equal(service.asked.length, 1);
    assert.deepEqual(viewer.calls.map((call) => call[0]), ["onError"]);
  });
}

test("each wait is at most twice the last one, never more than 10 s, and begins anew after progress", async (t) => {
  const waited = waits(t);
  const none = (response) => response.writeHead(502).end();
  const some = (response) => sse(response, START + text("1-1", "a"));
  const service = await serve(t, ...Array(8).fill(none), some, none, (response) => sse(response, text("1-2", "b") + done("1-3")));

  const viewer = watch(service.url);
  await viewer.done;

  const most = [500, 1000, 2000, 4000, 8000, 10_000, 10_000, 10_000, 500, 1000];
  assert.equal(waited.length, most.length);
  waited.forEach((delay, i) => assert.ok(most[i] / 2 <= delay && delay <= most[i], `${i}: ${delay}`));
  assert.ok(new Set(waited.map((delay, i) => delay / most[i])).size > 3); // by chance
  assert.deepEqual(
    viewer.of("onReconnect").map(({ attempt, delay }) => [attempt, delay]),
    waited.map((delay, i) => [(i % 8) + 1, delay]),
  );
  assert.equal(viewer.text(), "ab");
});

test("a stream that opens and says nothing is no progress", async (t) => {
  const waited = waits(t);
  const service = await serve(t, ...Array(4).fill((response) => sse(response, "retry: 2000\n:\n")), (response) => sse(response, ANSWER));

  await watch(service.url).done;

  assert.ok(waited[3] >= 2000);
});

test("Retry-After is waited for, 10 s at most, and never less than the back-off", async (t) => {
  const waited = waits(t);
  const soon = new Date(Date.now() + 6000).toUTCString();
  const told = ["2", "600", soon, "soon", "-5", "0"].map((after) => (response) => response.writeHead(503, { "Retry-After": after }).end());
  const service = await serve(t, ...told, (response) => sse(response, ANSWER));

  await watch(service.url).done;

  assert.deepEqual(waited.slice(0, 2), [2000, 10_000]);
  assert.ok(waited[2] > 3000 && waited[2] <= 6000);
  waited.slice(3).forEach((delay, i) => assert.ok(delay >= [2000, 4000, 5000][i] && delay <= 10_000));
});

test("a line that stood for ten seconds without an event is no failed try", async (t) => {
  const waited = waits(t);
  const [now, ahead] = [Date.now, { ms: 0 }];
  t.mock.method(Date, "now", () => now() + ahead.ms);
  const lines = [];
  const stands = (response) => {
    sse(response, ":\n", { open: true });
    lines.push(response);
  };
  const service = await serve(t, ...Array(4).fill(stands), (response) => sse(response, ANSWER));

  const viewer = watch(service.url);
  for (const count of [1, 2, 3, 4]) {
    await until(() => viewer.of("onOpen").length === count);
    ahead.ms += 11_000;
    lines.at(-1).end(":\n");
  }
  await viewer.done;

  assert.equal(viewer.text(), "Hello");
  assert.equal(waited.length, 4);
  assert.ok(waited.every((delay) => delay <= 500));
});

test("a line that is silent is given up, and heartbeats keep it", async (t) => {
  let beating = true;
  const service = await serve(
    t,
    (response) => {
      sse(response, START + text("1-1", "a"), { open: true });
      const beats = setInterval(() => response.write(":\n"), 20);
      setTimeout(() => {
        clearInterval(beats);
        beating = false;
      }, 1500);
    },
    (response) => sse(response, text("1-2", "b") + done("1-3")),
  );

  const given = [];
  const viewer = watch(service.url, { silence: 500 }, (name) => name === "onReconnect" && given.push(beating));
  await viewer.done;

  assert.deepEqual([viewer.text(), given], ["ab", [false]]);
  assert.deepEqual(
    viewer.of("onReconnect").map(({ reason, lastEventId }) => [reason, lastEventId]),
    [["silent", "1-1"]],
  );
  await service.asked[0].left;
});

test("an answer that does not begin is given up as well", async (t) => {
  const service = await serve(t, () => undefined, (response) => sse(response, ANSWER));

  const viewer = watch(service.url, { silence: 200 });
  await viewer.done;

  assert.equal(viewer.text(), "Hello");
});

test("a fetch that takes no notice of its signal is left all the same", async () => {
  const never = new ReadableStream({ start: (body) => body.enqueue(new TextEncoder().encode(START)) });
  const headers = { "Content-Type": "text/event-stream" };
  const answers = [new Response(never, { headers }), new Response(text("1-1", "a") + done("1-2"), { headers })];

  const viewer = watch("https://a.test/s", { silence: 200, fetch: async () => answers.shift() });
  await viewer.done;

  assert.equal(viewer.text(), "a");
});

test("after a sleep, in which timers stood still, the clock tells that the line was silent", async (t) => {
  const service = await serve(
    t,
    (response) => sse(response, START + text("1-1", "a"), { open: true }),
    (response) => sse(response, text("1-2", "b") + done("1-3")),
  );
  const interval = globalThis.setInterval;
  replace(t, "setInterval", (call) => interval(call, 5));

  const viewer = watch(service.url);
  await until(() => viewer.text());
  await new Promise((resolve) => setTimeout(resolve, 50)); // looks at the clock, and all is well
  const reconnects = viewer.of("onReconnect").length;
  const now = Date.now;
  t.mock.method(Date, "now", () => now() + 46_000);
  await viewer.done;

  assert.deepEqual([reconnects, viewer.text(), service.asked.length], [0, "ab", 2]);
});

test("a clock that is set back gives no line up, and hides no silence", async (t) => {
  const service = await serve(
    t,
    (response) => sse(response, START + text("1-1", "a"), { open: true }),
    (response) => sse(response, text("1-2", "b") + done("1-3")),
  );

  const viewer = watch(service.url, { silence: 300 });
  await until(() => viewer.text());
  const now = Date.now;
  t.mock.method(Date, "now", () => now() - 3_600_000);
  await viewer.done;

  assert.deepEqual([viewer.text(), service.asked.length], ["ab", 2]);
});

// ---- The page ----

for (const what of ["online", "pageshow", "visibilitychange"]) {
  test(`${what} ends a wait at once, and the next one is short again`, async (t) => {
    const waited = waits(t, { never: true });
    const { window, document, listening } = page(t);
    const none = (response) => response.writeHead(502).end();
    const service = await serve(t, none, none, (response) => sse(response, ANSWER));
    const target = what === "visibilitychange" ? document : window;

    const viewer = watch(service.url);
    for (const count of [1, 2]) {
      await until(() => viewer.of("onReconnect").length === count);
      target.dispatchEvent(new Event(what));
    }
    await viewer.done;

    assert.equal(viewer.text(), "Hello");
    assert.ok(waited.every((delay) => delay <= 500));
    assert.equal(listening(), 0);
  });

  test(`${what} finds a line that was silent for more than a heartbeat, and leaves another one alone`, async (t) => {
    const { window, document } = page(t);
    const service = await serve(
      t,
      (response) => sse(response, START + text("1-1", "a"), { open: true }),
      (response) => sse(response, text("1-2", "b") + done("1-3")),
    );
    const target = what === "visibilitychange" ? document : window;
    const [now, ahead] = [Date.now, { ms: 0 }];
    t.mock.method(Date, "now", () => now() + ahead.ms);

    const viewer = watch(service.url);
    await until(() => viewer.text());
    ahead.ms = 14_000;
    target.dispatchEvent(new Event(what));
    const reconnects = viewer.of("onReconnect").length;
    ahead.ms = 23_000;
    target.dispatchEvent(new Event(what));
    await viewer.done;

    assert.deepEqual([reconnects, viewer.text(), service.asked.length], [0, "ab", 2]);
  });
}

test("a page that is being hidden wakes nothing", async (t) => {
  waits(t, { never: true });
  const { document, window } = page(t, { hidden: true });
  const service = await serve(t, (response) => response.writeHead(502).end(), (response) => sse(response, ANSWER));

  const viewer = watch(service.url);
  await until(() => viewer.of("onReconnect").length);
  document.dispatchEvent(new Event("visibilitychange"));
  await new Promise((resolve) => setImmediate(resolve));
  const asked = service.asked.length;
  window.dispatchEvent(new Event("online")); // that is another thing
  await viewer.done;

  assert.equal(asked, 1);
});

test("offline it waits for as long as it may, and for online", async (t) => {
  const waited = waits(t, { never: true });
  const { window, navigator } = page(t, { onLine: false });
  const service = await serve(t, (response) => response.destroy(), (response) => sse(response, ANSWER));

  const viewer = watch(service.url);
  await until(() => waited.length);
  navigator.onLine = true;
  window.dispatchEvent(new Event("online"));
  await viewer.done;

  assert.deepEqual([waited, viewer.text()], [[10_000], "Hello"]);
});

// ---- Refusals and endings ----

const REFUSALS = [
  // code, retryable, its id, whether it is final; the cursor is 1-1
  ["too_many_viewers", true, undefined, false],
  ["store_unavailable", true, "1-1", false],
  ["overloaded", true, undefined, false],
  ["overloaded", true, "1-2", true],
  ["worker_lost", true, "2-1", true],
  ["provider_auth_failed", false, "1-2", true],
  ["replay_over", false, "1-9", true],
  ["session_lost", false, "1-1", true],
  ["log_lost", false, undefined, true],
];
for (const [code, retryable, id, final] of REFUSALS) {
  const what = `${code}, ${retryable ? "" : "not "}retryable, ${id ? `id ${id}` : "no id"}`;
  test(`event: error is ${final ? "final" : "tried again"}: ${what}`, async (t) => {
    waits(t);
    const service = await serve(
      t,
      (response) => sse(response, START + text("1-1", "a")),
      (response) => sse(response, failure(code, retryable, id)),
      (response) => sse(response, text("1-2", "b") + done("1-3")),
    );

    const viewer = watch(service.url);
    await viewer.done;

    assert.deepEqual(
      service.asked.map((one) => one.query.last_event_id),
      [undefined, "1-1", ...(final ? [] : ["1-1"])],
    );
    if (final) {
      const [error] = viewer.of("onError");
      assert.deepEqual([error.code, error.message, error.retryable, error.status], [code, `It is ${code}.`, retryable, undefined]);
      assert.deepEqual([viewer.text(), viewer.of("onComplete")], ["a", []]);
      assert.equal(viewer.connection.lastEventId, id ?? "1-1");
    } else {
      assert.deepEqual([viewer.text(), viewer.of("onError"), viewer.of("onReconnect")[1].reason], ["ab", [], code]);
    }
  });
}

test("refusals without a cursor are waited out, longer each time", async (t) => {
  const waited = waits(t);
  const refused = (response) => sse(response, "retry: 2000\n" + failure("overloaded", true));
  const service = await serve(t, refused, refused, refused, (response) => sse(response, ANSWER));

  const viewer = watch(service.url);
  await viewer.done;

  assert.equal(viewer.text(), "Hello");
  assert.ok(waited[2] >= 1000);
});

for (const [how, options, more] of [
  ["as an option", { lastEventId: "1-3" }, ""],
  ["in the address", {}, "&last_event_id=1-3"],
]) {
  test(`whoever has it all, and says so ${how}, is told that it is complete`, async (t) => {
    const service = await serve(t, (response) => response.writeHead(204).end());

    const viewer = watch(service.url + more, options);
    await viewer.done;

    assert.deepEqual(viewer.calls, [["onComplete", { status: "completed", finishReason: null }]]);
    assert.equal(service.asked[0].query.last_event_id, "1-3");
  });
}

test("an answer that begins anew is not mixed into what was seen", async (t) => {
  waits(t);
  for (const [cursor, again] of [["2-1", text("2-1", "x")], ["1-2", ANSWER], ["2-1", ANSWER], ["1-2", text("1-1", "x")]]) {
    const service = await serve(
      t,
      (response) => sse(response, text(cursor, "a")),
      (response) => sse(response, again),
    );

    const viewer = watch(service.url);
    await viewer.done;

    assert.deepEqual([viewer.text(), viewer.of("onError")[0].code, viewer.connection.lastEventId], ["a", "log_lost", cursor]);
  }
});

test("what is no cursor of the service's is sent, and then forgotten", async (t) => {
  const service = await serve(t, (response) => sse(response, ANSWER));

  const viewer = watch(service.url, { lastEventId: "hello" });
  await viewer.done;

  assert.deepEqual([service.asked[0].query.last_event_id, viewer.text(), viewer.of("onError")], ["hello", "Hello", []]);
});

test("ids count as numbers", async (t) => {
  const service = await serve(t, (response) => sse(response, START + text("1-9", "a") + text("1-10", "b") + text("2-1", "c") + done("10-1")));

  const viewer = watch(service.url);
  await viewer.done;

  assert.equal(viewer.text(), "abc");
});

// ---- What is not ours ----

test("a callback that throws breaks nothing, and what it threw is told", async (t) => {
  const reported = [];
  replace(t, "reportError", (error) => reported.push(error.message));
  waits(t);
  const all = START + event("1-1", { type: "reasoning", text: "r" }) + text("1-2", "a") + event("1-3", { type: "usage", ...USAGE });
  const service = await serve(t, (response) => sse(response, all), (response) => sse(response, done("1-4")));
  const lost = await serve(t, (response) => refuse(response, 404, "not_found"));
  const thrower = (name) => {
    throw new Error(name);
  };

  const viewer = watch(service.url, {}, thrower);
  await viewer.done;
  await watch(lost.url, {}, thrower).done;

  const names = ["onOpen", "onStart", "onReasoning", "onMessage", "onUsage", "onReconnect", "onOpen", "onComplete", "onError"];
  assert.deepEqual(reported, names);
  assert.equal(service.asked[1].query.last_event_id, "1-3");
});

test("where there is no reportError it is an uncaught error", async (t) => {
  const service = await serve(t, (response) => sse(response, ANSWER));
  const script = `
    import { connectToStream } from ${JSON.stringify(HERE)};
    process.on("uncaughtException", (error) => console.log(error.message));
    let text = "";
    await connectToStream(${JSON.stringify(service.url)}, {
      onMessage(chunk) { text += chunk; throw new Error("mine"); }, onComplete() { console.log(text); },
    }).done;`;

  const { promise, resolve, reject } = deferred();
  (await import("node:child_process")).execFile(process.execPath, ["--input-type=module", "-e", script], (error, out) => (error ? reject(error) : resolve(out)));

  assert.deepEqual((await promise).trim().split("\n").sort(), ["Hello", "mine", "mine"]);
});

function deferred() {
  let [resolve, reject] = [];
  const promise = new Promise((...both) => ([resolve, reject] = both));
  return { promise, resolve, reject };
}

test("nothing is called before connectToStream has returned", async () => {
  let returned = false;
  const early = [];
  const broken = () => {
    throw new Error("at once");
  };

  const connection = connectToStream("https://a.test/", { fetch: broken, onReconnect: () => (early.push(returned), connection.close()) });
  returned = true;
  await connection.done;

  assert.deepEqual(early, [true]);
});

for (const name of ["onOpen", "onStart", "onMessage", "onReasoning", "onUsage", "onReconnect", "onComplete"]) {
  test(`close() in ${name} is the last word`, async (t) => {
    const all = START + text("1-1", "a") + event("1-2", { type: "reasoning", text: "r" }) + event("1-3", { type: "usage", ...USAGE });
    const ending = name === "onReconnect" ? "" : done("1-4");
    const service = await serve(t, (response) => sse(response, all + ending));

    const viewer = watch(service.url, {}, (called, connection) => called === name && connection.close());
    await viewer.done;
    await service.asked[0].left;
    await new Promise((resolve) => setTimeout(resolve, 20));

    assert.equal(viewer.calls.at(-1)[0], name);
    assert.equal(service.asked.length, 1);
  });
}

test("what came with the last word, behind it, is not taken for seen", async (t) => {
  const all = START + text("1-1", "a") + text("1-2", "b") + done("1-3");
  const service = await serve(t, (response) => sse(response, all + text("1-4", "c") + failure("internal", true, "1-5")));

  const closed = watch(service.url, {}, (name, connection) => name === "onMessage" && connection.close());
  const whole = watch(service.url);
  await Promise.all([closed.done, whole.done]);
  await Promise.all(service.asked.map((one) => one.left));

  assert.deepEqual([closed.text(), closed.connection.lastEventId], ["a", "1-1"]);
  assert.deepEqual([whole.text(), whole.connection.lastEventId, whole.of("onError")], ["ab", "1-3", []]);
});

test("close() lets go of the line, of a wait and of the page, and says nothing", async (t) => {
  const { listening } = page(t);
  const service = await serve(t, (response) => sse(response, START + text("1-1", "a"), { open: true }));
  const away = await serve(t, (response) => response.writeHead(502).end());

  const [watching, waiting] = [watch(service.url), watch(away.url)];
  await until(() => watching.text() && waiting.of("onReconnect").length);
  const before = [watching.calls.length, waiting.calls.length];
  for (const one of [watching, waiting]) {
    one.connection.close();
    one.connection.close();
    await one.done;
  }
  await service.asked[0].left;

  assert.deepEqual([watching.calls.length, waiting.calls.length], before);
  assert.equal(listening(), 0);
  assert.equal(watching.connection.lastEventId, "1-1"); // to go on with later
});

test("what is closed at once asks nobody", async (t) => {
  const service = await serve(t, (response) => sse(response, ANSWER));

  const viewer = watch(service.url);
  viewer.connection.close();
  await viewer.done;
  await new Promise((resolve) => setTimeout(resolve, 20));

  assert.deepEqual([service.asked, viewer.calls], [[], []]);
});

test("a fetch that answers after close() is not listened to", async () => {
  let answer;

  const viewer = watch("https://a.test/s", { fetch: () => new Promise((resolve) => (answer = resolve)) });
  await until(() => answer);
  viewer.connection.close();
  answer(new Response(ANSWER, { headers: { "Content-Type": "text/event-stream" } }));
  await viewer.done;
  await new Promise((resolve) => setTimeout(resolve, 20));

  assert.deepEqual(viewer.calls, []);
});

test("close() leaves no timer", async (t) => {
  const waited = waits(t, { never: true });
  const cleared = [];
  const before = clearTimeout;
  replace(t, "clearTimeout", (timer) => {
    if (new Error().stack.includes("/dist/aistream.")) cleared.push(timer);
    before(timer);
  });
  const service = await serve(t, (response) => response.writeHead(502).end());

  const viewer = watch(service.url);
  await until(() => waited.length);
  viewer.connection.close();
  await viewer.done;
  await new Promise((resolve) => setImmediate(resolve));

  assert.deepEqual([waited.length, cleared.length], [1, 1]);
});

test("a signal that outlives the stream keeps nothing of it", async (t) => {
  const service = await serve(t, (response) => sse(response, ANSWER));
  const { signal } = new AbortController();
  const added = t.mock.method(signal, "addEventListener");
  const removed = t.mock.method(signal, "removeEventListener");

  await watch(service.url, { signal }).done;

  assert.deepEqual(removed.mock.calls[0].arguments, added.mock.calls[0].arguments);
});

test("a signal closes it, before, during and after", async (t) => {
  const service = await serve(t, (response) => sse(response, START + text("1-1", "a"), { open: true }));
  const controller = new AbortController();

  const during = watch(service.url, { signal: controller.signal });
  await until(() => during.text());
  controller.abort();
  await during.done;
  const before = watch(service.url, { signal: controller.signal });
  await before.done;

  assert.deepEqual([during.calls.length, before.calls, service.asked.length], [3, [], 1]);
  await service.asked[0].left;
});

test("without onError what is final is on the console", async (t) => {
  const logged = [];
  t.mock.method(console, "error", (...told) => logged.push(...told));
  const service = await serve(t, (response) => refuse(response, 404, "not_found"));

  await connectToStream(service.url).done;

  assert.deepEqual(logged.map((error) => error.code), ["not_found"]);
});

// ---- cancel() ----

test("cancel() stops the answer, whose ending then comes", async (t) => {
  let open;
  const service = await serve(t, (response, { method }) => {
    if (method === "GET") {
      open = response;
      return sse(response, START + text("1-1", "a"), { open: true });
    }
    response.writeHead(202, { "Content-Type": "application/json" }).end(JSON.stringify({ ok: true, streamId: "s", status: "cancelling" }));
    open.end(event(undefined, { type: "cancelled" }) + "id: 1-2\ndata: [DONE]\n\n");
  });

  const viewer = watch(service.url.replace("/stream/s", "/prefix/stream/s") + "&format=json&last_event_id=0-0");
  await until(() => viewer.text());
  const status = await viewer.connection.cancel();
  await viewer.done;

  const { method, path, query, headers } = service.asked[1];
  assert.deepEqual([status, method, path, query], ["cancelling", "POST", "/prefix/stream/s/cancel", { access_token: "t" }]);
  assert.deepEqual([headers["content-length"], headers["content-type"], headers.authorization], ["0", undefined, undefined]);
  assert.deepEqual(viewer.of("onComplete"), [{ status: "cancelled", finishReason: null }]);
});

test("cancel() that arrives ends a wait: the service is there", async (t) => {
  waits(t, { never: true });
  const service = await serve(
    t,
    (response) => response.writeHead(502).end(),
    (response) => response.writeHead(202, { "Content-Type": "application/json" }).end('{"status":"cancelling"}'),
    (response) => sse(response, ANSWER),
  );

  const viewer = watch(service.url);
  await until(() => viewer.of("onReconnect").length);
  await viewer.connection.cancel();
  await viewer.done;

  assert.equal(viewer.text(), "Hello");
});

test("cancel() that fails says why, and the stream goes on", async (t) => {
  const service = await serve(t, (response) => refuse(response, 404, "not_found"));
  const full = await serve(t, (response) => refuse(response, 503, "store_unavailable"));
  const viewers = [watch(service.url), watch(full.url)];
  viewers.forEach((one) => one.connection.close());

  await assert.rejects(viewers[0].connection.cancel(), { name: "StreamError", code: "not_found", status: 404, retryable: false });
  await assert.rejects(viewers[1].connection.cancel(), { code: "store_unavailable", status: 503, retryable: true });
  await service.stop();
  await assert.rejects(viewers[0].connection.cancel(), { name: "StreamError", code: "network", retryable: true });
});

test("a page may send a cancel while it is being left", async () => {
  const asked = [];
  const fake = async (address, init) => (asked.push([address, init]), Response.json({ status: "completed" }));
  const connection = connectToStream("https://a.test/stream/s?access_token=a%2Bb", { fetch: fake });
  connection.close();

  assert.equal(await connection.cancel(), "completed");
  assert.deepEqual(asked, [
    ["https://a.test/stream/s/cancel?access_token=a%2Bb", { method: "POST", keepalive: true, cache: "no-store", credentials: "omit" }],
  ]);
});
