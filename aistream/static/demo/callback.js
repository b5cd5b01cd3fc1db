/** The panel "What n8n gets": waits for the callback, shows it, and says whether n8n got what the viewer saw. */
import { pollCallback } from "./service.js";
import { counted, number } from "./words.js";

export class CallbackPanel {
  #part;
  #received = null;

  /** @param {(name: string) => HTMLElement} part finds the panel's element of that name; `callback` holds the JSON and nothing else */
  constructor(part) {
    this.#part = part;
  }

  clear() {
    this.#received = null;
    this.#part("callback").replaceChildren();
    for (const name of ["callback", "callback-summary", "callback-headers-box", "callback-again"]) {
      this.#part(name).hidden = true;
    }
    this.#say("waiting", "Nothing yet. n8n is called when the answer has ended.");
  }

  /** Waits until the callback has arrived and shows it; gives up, and says so, when there is none to be had. */
  async wait(path, signal) {
    for (;;) {
      this.#say("waiting", "The answer has ended. Waiting for the callback…");
      this.#received = await pollCallback(path, signal);
      if (this.#received) break;
      this.#say("missing", "No callback within a minute. The service’s log says why, and it goes on trying.");
      await this.#pressedAgain(signal);
    }
    const { body, headers, received_at: receivedAt } = this.#received;
    this.#part("callback").replaceChildren(jsonNodes(body));
    this.#part("callback-headers").replaceChildren(jsonNodes(headers));
    this.#part("callback-summary").textContent =
      `${body.status}, ${counted(body.input_tokens, "token")} in, ${number(body.output_tokens)} out, at ${receivedAt}`;
    for (const name of ["callback", "callback-summary", "callback-headers-box"]) this.#part(name).hidden = false;
    this.#say("arrived", "Arrived.");
    return this.#received;
  }

  /** Says whether n8n got exactly the text that the viewer saw. */
  compare(seen) {
    const same = this.#received.body.answer === seen;
    this.#say(
      same ? "same" : "differs",
      `Arrived. Its answer ${same ? "is what you watched, character for character" : "differs from what you watched"}.`,
    );
  }

  #pressedAgain(signal) {
    const button = this.#part("callback-again");
    button.hidden = false;
    return new Promise((resolve) => {
      button.addEventListener("click", resolve, { once: true, signal });
    }).then(() => {
      button.hidden = true;
    });
  }

  #say(state, words) {
    this.#part("callback-state").dataset.state = state;
    this.#part("callback-state").textContent = words;
  }
}

/**
 * A value as indented JSON, with its parts marked for colour. Built from the value and not by a pattern over its text:
 * an answer may be megabytes long, which is more than a regular expression should be asked to walk.
 */
function jsonNodes(value, indent = "") {
  const nodes = document.createDocumentFragment();
  const inner = `${indent}  `;
  if (value === null || typeof value !== "object") {
    nodes.append(jsonPart(value === null ? "null" : typeof value, JSON.stringify(value)));
    return nodes;
  }
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const entries = Object.entries(value);
  nodes.append(open);
  entries.forEach(([key, member], i) => {
    nodes.append(i ? ",\n" : "\n", inner);
    if (!Array.isArray(value)) nodes.append(jsonPart("key", JSON.stringify(key)), ": ");
    nodes.append(jsonNodes(member, inner));
  });
  nodes.append(entries.length ? `\n${indent}${close}` : close);
  return nodes;
}

function jsonPart(kind, text) {
  const part = document.createElement("span");
  part.className = `json-${kind}`;
  part.textContent = text;
  return part;
}
