/**
 * One viewer of one answer, through the browser's client: the answer, the status, the counters, the plot.
 *
 * Its elements are looked up in its own root by `data-part`, so that a second viewer is a second root.
 */
import { connectToStream } from "../../aistream.mjs";
import { AnswerPane } from "./answer.js";
import { Rate } from "./rate.js";
import { codePoints, counted, describe, duration, number } from "./words.js";

/** What comes so soon after the first text of a connection had been written before it stood. */
const BURST_MS = 30;
/** States in which there is something to wait for. */
const LIVE = ["connecting", "streaming", "reconnecting"];

export class Viewer {
  #root;
  #name;
  #log;
  #announce;
  #answer;
  #reasoning;
  #rate;
  #run = null;
  #connection = null;
  #asked = false;

  /**
   * @param {HTMLElement} root
   * @param {{name: string, log: WireLog, announce: (words: string) => void}} around `name` stands before its lines in the log;
   *   `announce` tells a screen reader what has changed
   */
  constructor(root, { name = "", log, announce = () => undefined }) {
    this.#root = root;
    this.#name = name;
    this.#log = log;
    this.#announce = announce;
    const part = (wanted) => this.#part(wanted);
    this.#answer = new AnswerPane(part);
    this.#rate = new Rate(part);
    this.#reasoning = part("reasoning");
    this.#answer.clear();
  }

  get isLive() {
    return LIVE.includes(this.#part("status").dataset.state);
  }

  /** Called with the state, whenever it has changed. */
  onState = () => undefined;

  /** @param {"rendered"|"exact"} view how the answer is shown */
  show(view) {
    this.#answer.show(view);
  }

  /** Shows an empty viewer again, and takes the time from which the first text is waited for. */
  clear() {
    this.#answer.clear();
    this.#rate.clear();
    this.#reasoning.textContent = "";
    this.#part("reasoning-box").hidden = true;
    this.#run = {
      startedAt: performance.now(), firstTextAt: null, events: 0, characters: 0, reconnects: 0, lastId: "",
      /** What came in a burst behind an opening: `{count, kind}` while it lasts. */
      burst: null, usage: null,
    };
    this.#say("connecting", "connecting…");
    this.#render();
  }

  /** The session was refused, so there is nothing to watch. */
  refuse(problem) {
    this.#say("failed", `failed: ${problem.code}`);
  }

  /**
   * Watches a stream to its end, from its beginning.
   * @param {{signal: AbortSignal, fetch?: typeof fetch}} options
   * @returns {Promise<{ending: "done"|"failed"|"cancelled", text: string}>} also when the answer failed; null after an abort
   */
  async watch(address, { signal, fetch }) {
    const run = this.#run;
    let ending = null;
    const end = (state, words) => {
      ending = state;
      this.#endBurst();
      this.#answer.finish();
      this.#rate.end();
      this.#say(state, words);
      this.#render();
    };
    this.#note("out", "GET stream/…, from the beginning");
    this.#connection = connectToStream(address, {
      signal,
      ...(fetch && { fetch }),
      onOpen: (opened) => this.#opened(opened),
      onReconnect: (lost) => this.#lost(lost),
      onStart: ({ model, provider }) => {
        this.#count();
        this.#note("in", `start: ${model} by ${provider}`);
      },
      onMessage: (text) => this.#take(text),
      onReasoning: (text) => {
        this.#count();
        this.#part("reasoning-box").hidden = false;
        this.#reasoning.append(text);
      },
      onUsage: (usage) => {
        this.#count();
        run.usage = usage;
        this.#note("in", `usage: ${describe(usage)}`);
      },
      onComplete: ({ status, finishReason }) => {
        this.#count();
        const cancelled = status === "cancelled";
        this.#correct();
        end(cancelled ? "cancelled" : "done", cancelled ? "stopped" : "complete");
        const reason = finishReason ? `, ${finishReason}` : "";
        this.#note(cancelled ? "bad" : "end", `${status}${reason}: ${counted(run.characters, "character")}`);
        this.#announce(`Answer ${cancelled ? "stopped" : "complete"}: ${counted(run.characters, "character")}.`);
      },
      onError: ({ code, message, retryable }) => {
        end("failed", `failed: ${code}`);
        this.#note("bad", `error ${code}: ${message} (${retryable ? "may be tried again" : "final"})`);
        this.#announce(`Answer failed: ${message}`);
      },
    });
    await this.#connection.done;
    clearTimeout(run.burst?.timer);
    if (ending === null) this.#rate.stop();
    return ending && { ending, text: this.#answer.text };
  }

  /** Stops the answer, as a front end's stop button would: the part that is written is what n8n gets. */
  async stop() {
    this.#note("out", "POST stream/…/cancel");
    try {
      this.#note("in", await this.#connection.cancel());
    } catch (error) {
      this.#note("bad", `could not be stopped: ${error.message}`);
    }
  }

  /** The line was cut on purpose: says so before the client has noticed. */
  cut() {
    this.#note("cut", `the line is cut after id ${this.#connection?.lastEventId || "–"}`);
  }

  #part(name) {
    return this.#root.querySelector(`[data-part="${name}"]`);
  }

  #note(kind, text) {
    this.#log.note(kind, this.#name ? `${this.#name}: ${text}` : text);
  }

  #opened({ reconnects, lastEventId }) {
    const run = this.#run;
    run.reconnects = reconnects;
    if (!reconnects) {
      run.burst = { count: 0, kind: "old" };
      this.#say("streaming", "waiting for the first text");
      this.#note("in", "connected");
    } else {
      run.burst = { count: 0, kind: "late" };
      this.#say("streaming", "streaming again");
      this.#note("in", lastEventId ? `connected again, behind id ${lastEventId}` : "connected again");
      this.#answer.mark("resumed here");
    }
    this.#render();
  }

  #lost({ delay, reason, lastEventId }) {
    const run = this.#run;
    const next = `next try in ${duration(delay)}`;
    if (this.#part("status").dataset.state !== "reconnecting") {
      this.#endBurst();
      run.attempts = 0;
      this.#note("cut", `${lastEventId ? `connection lost after id ${lastEventId}` : "no connection"} (${reason}), ${next}`);
      this.#announce("Connection lost. The text so far stays; it is tried again.");
    } else {
      run.attempts += 1; // the client's own count begins anew when it is woken
      this.#note("cut", `attempt ${run.attempts} failed (${reason}), ${next}`);
    }
    this.#say("reconnecting", `line lost, ${next}`);
  }

  #take(text) {
    const run = this.#run;
    const now = performance.now();
    const characters = codePoints(text);
    this.#count();
    if (run.firstTextAt === null) {
      run.firstTextAt = now;
      this.#note("in", `first text after ${duration(now - run.startedAt)}`);
      this.#say("streaming", "streaming");
    }
    run.characters += characters;
    if (run.burst) {
      run.burst.count += characters;
      run.burst.timer ??= setTimeout(() => this.#endBurst(), BURST_MS);
    }
    this.#rate.add(characters, run.burst?.kind);
    this.#answer.append(text);
  }

  /** What came at once behind an opening has come: says how much had been missed. */
  #endBurst() {
    const burst = this.#run.burst;
    this.#run.burst = null;
    if (!burst) return;
    clearTimeout(burst.timer);
    if (burst.kind !== "late") return;
    const missed = counted(burst.count, "character");
    this.#answer.label(`resumed here, ${missed} caught up`);
    this.#note("in", `goes on at the exact character: ${missed} caught up`);
    this.#announce(`Connected again, ${missed} caught up.`);
  }

  #count() {
    const run = this.#run;
    run.events += 1;
    run.lastId = this.#connection.lastEventId;
    this.#ask();
  }

  /** Shows the provider's count once it is known. What the model thought aloud is no text. */
  #correct() {
    const { usage, characters } = this.#run;
    if (usage && usage.source !== "estimated") this.#rate.correct(usage.output_tokens - usage.reasoning_tokens, characters);
  }

  #say(state, words) {
    const status = this.#part("status");
    status.dataset.state = state;
    status.textContent = words;
    this.#part("answer").dataset.live = this.isLive ? "yes" : "no";
    this.#part("answer").ariaBusy = String(this.isLive);
    this.onState(state);
  }

  /** Asks for the counters to be written in the next frame, once. */
  #ask() {
    if (this.#asked) return;
    this.#asked = true;
    requestAnimationFrame(() => {
      this.#asked = false;
      this.#render();
    });
  }

  #render() {
    const run = this.#run;
    const show = (name, value) => {
      this.#part(name).textContent = value;
    };
    show("first-text", run.firstTextAt === null ? "–" : duration(run.firstTextAt - run.startedAt));
    show("characters", number(run.characters));
    show("events", number(run.events));
    show("last-id", run.lastId || "–");
    show("reconnects", number(run.reconnects));
  }
}
