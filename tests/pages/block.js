/**
 * What stands around a block of the documentation in its page: the functions and elements that it takes for given, and all that
 * came to be seen by them. `streamUrl` and `webhookUrl` are set by the test.
 */
"use strict";

/** Texts that the block has handed over to be shown. */
const shown = [];
/** What went wrong before anybody caught it. */
const broken = [];
const [prompt, model, max_tokens, userId, chatId] = ["What is AI?", "gpt-4o-mini", 2000, "user_123", "chat_456"];

const append = (text) => { shown.push(text); };
const done = () => {};
const failed = (error) => { console.error("failed", error); };

/** Everything that a person could see by now, in the page and in its console. */
const seen = () => document.body.textContent + shown.join("");

for (const kind of ["log", "info"]) {
  const say = console[kind];
  console[kind] = (...words) => {
    shown.push(words.join(" "));
    say.apply(console, words);
  };
}
addEventListener("error", (event) => { broken.push(String(event.message)); });
addEventListener("unhandledrejection", (event) => { broken.push(String(event.reason)); });
Object.defineProperty(globalThis, "stopButton", { get: () => document.getElementById("stop") });
