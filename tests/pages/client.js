/** A front end that watches with aistream-client, and notes what it is told. */
"use strict";

/** What `watch` has begun, oldest first. */
const watched = [];
/** What the call of the original README has brought about. */
const seed = { shown: "", errors: [], saved: [], cleanup: null };

/** Loads the client as a module, or as a plain script, of this origin or another one. */
async function load(base, { plain = false } = {}) {
  if (!plain) {
    window.client = await import(`${base}/aistream.mjs`);
  } else {
    await new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = `${base}/aistream.js`;
      script.onload = resolve;
      script.onerror = () => reject(new Error("the script did not load"));
      document.head.append(script);
    });
    window.client = window.aistream;
  }
  return Object.keys(window.client).sort();
}

/** Watches a stream with every callback, and notes each call. */
function watch(url, options = {}) {
  const heard = { url, text: "", ids: [], reasoning: "", usage: [], started: [], opened: [], lost: [], completed: [], failed: [], over: false };
  heard.controller = new AbortController();
  heard.connection = client.connectToStream(url, {
    onMessage: (chunk, id) => { heard.text += chunk; heard.ids.push(id); },
    onReasoning: (chunk) => { heard.reasoning += chunk; },
    onUsage: (usage) => heard.usage.push(usage),
    onStart: (start) => heard.started.push(start),
    onOpen: (opened) => heard.opened.push(opened),
    onReconnect: (lost) => heard.lost.push(lost),
    onComplete: (ending) => heard.completed.push(ending),
    onError: ({ code, message, retryable, status }) => heard.failed.push({ code, message, retryable, status }),
    signal: heard.controller.signal,
    ...options,
  });
  heard.connection.done.then(() => { heard.over = true; });
  watched.push(heard);
  return heard;
}

/** Watches them all, a few at a time: over HTTP/1.1 a browser opens six connections to a host. */
async function watchAll(urls) {
  const left = [...urls];
  const lane = async () => {
    while (left.length) await watch(left.shift()).connection.done;
  };
  await Promise.all([lane(), lane(), lane(), lane(), lane()]);
}

/** What was heard, as a value. */
const told = (number = 0) => ({ ...watched[number], controller: null, connection: null });

/** The pieces that `for await` gives, at most `most` of them. */
async function iterate(url, most = Infinity) {
  const chunks = [];
  const answer = client.stream(url);
  for await (const chunk of answer) {
    chunks.push(chunk);
    if (chunks.length >= most) break;
  }
  return { text: chunks.join(""), ending: answer.ending, usage: answer.usage };
}

/** A plain EventSource, and what becomes of it. */
function plain(url) {
  const source = new EventSource(url);
  watched.push({ get state() { return source.readyState; } });
}

const updateUI = (chunk) => { document.getElementById("chat").append(chunk); seed.shown += chunk; };
const showErrorToUser = (words) => { seed.errors.push(words); };
const saveToHistory = (answer) => { seed.saved.push(answer); };

/** The usage example of the service's first README, unchanged but for where streamUrl comes from. */
function chat(streamUrl) {
  const { connectToStream } = client;
  // Initialize streaming
  let fullResponse = '';
  const stream = connectToStream(streamUrl, {
    onMessage: (chunk) => {
      fullResponse += chunk;
      // Update UI with incoming chunks
      updateUI(chunk);
    },
    onError: (error) => {
      showErrorToUser("Connection lost");
    },
    onComplete: () => {
      // Handle completion
      saveToHistory(fullResponse);
    }
  });

  // Optional: Cleanup on component unmount
  return () => stream.close();
}
