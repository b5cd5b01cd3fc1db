/**
 * The demo page. It plays both parts around the service: n8n's (start a session, get the callback) and the front end's
 * (watch the answer, survive a cut line).
 *
 * This module is the page: its parts, the run of an answer through them, and the buttons. Each part has a module of its own.
 * Whatever comes from the service is shown as text, or as what `markdown.js` makes of it.
 */
import { CallbackPanel } from "./callback.js";
import { copy } from "./copy.js";
import { AskForm } from "./form.js";
import { Line } from "./line.js";
import { Problem, startSession, streamAddress } from "./service.js";
import { makeTabs } from "./tabs.js";
import { Viewer } from "./viewer.js";
import { WireLog } from "./wire.js";
import { counted, describe } from "./words.js";

const byId = (id) => document.getElementById(id);

class Page {
  #log = new WireLog(byId("wire-log"), byId("wire-empty"));
  #callback = new CallbackPanel(byId);
  #form = new AskForm(() => this.#start());
  #line = new Line();
  /** A second viewer's elements, as the first one's are before anything has happened. */
  #blank = byId("viewer-1").cloneNode(true);
  #first = new Viewer(byId("viewer-1"), { log: this.#log, announce: (words) => (byId("announcement").textContent = words) });
  /** `{viewer, root, controller}` while there is a second viewer. */
  #second = null;
  /** What is being watched, or was: `{address}` once there is a session. */
  #run = { controller: new AbortController(), address: null };

  constructor() {
    this.#first.onState = (state) => this.#fitControls(state);
    byId("cut").addEventListener("click", () => this.#setLine(!this.#line.isCut));
    byId("second").addEventListener("click", () => (this.#second ? this.#closeSecond() : this.#openSecond()));
    byId("stop").addEventListener("click", () => this.#stop());
    document.addEventListener("keydown", (event) => {
      // In a list of choices the key closes the list.
      if (event.key === "Escape" && event.target.tagName !== "SELECT" && !byId("stop").disabled) this.#stop();
    });
    for (const choice of document.querySelectorAll('[name="view"]')) choice.addEventListener("change", () => this.#fitView());
    for (const button of document.querySelectorAll("button[data-copies]")) {
      button.addEventListener("click", () => copy(copied(button.dataset.copies), button));
    }
    for (const list of document.querySelectorAll('[role="tablist"]')) makeTabs(list);
    for (const place of document.querySelectorAll("[data-client]")) {
      place.textContent = new URL("aistream.mjs", document.baseURI).href;
    }
    this.#fitView(); // a browser may remember the choice over a reload
  }

  /** Of two runs only the later one is shown; the earlier goes on in the service, as it would for n8n. */
  #start() {
    this.#run.controller.abort();
    this.#run = { controller: new AbortController(), address: null };
    this.#setLine(false);
    this.#go(this.#run);
  }

  /** One run from the question to the callback: the three steps drawn in the page's head. */
  async #go(run) {
    const { signal } = run.controller;
    const question = this.#form.question;
    step("ask", "active");
    step("watch", "idle");
    step("callback", "idle");
    this.#form.showProblems();
    this.#log.clear();
    this.#first.clear();
    this.#callback.clear();
    this.#form.isStarting = true;
    try {
      this.#log.note("out", "POST demo/start, as n8n would POST /init-stream");
      const session = await startSession(question, signal);
      this.#form.isStarting = false;
      this.#form.sayAgain();
      byId("curl").textContent = session.curl;
      document.querySelector('[data-copies="curl"]').disabled = false;
      step("ask", "done");
      this.#log.note("in", `session ${session.streamId}`);
      for (const warning of session.warnings ?? []) this.#log.note("bad", `warning: ${describe(warning)}`);

      step("watch", "active");
      run.address = streamAddress(session.streamUrl);
      byId("second").disabled = false;
      const watched = this.#first.watch(run.address, { signal, fetch: this.#line.fetch });
      if (this.#second) this.#watchSecond();
      const seen = await watched;
      if (!seen) return;
      this.#setLine(false); // there is none any more
      step("watch", seen.ending);

      step("callback", "active");
      const got = await this.#callback.wait(session.callbackPath, signal);
      step("callback", "done");
      this.#log.note("end", `callback arrived at n8n: ${got.body.status}`);
      this.#callback.compare(seen.text);
    } catch (problem) {
      if (signal.aborted) return;
      this.#form.isStarting = false;
      if (!(problem instanceof Problem)) throw problem;
      step("ask", "failed");
      this.#log.note("bad", `refused: ${problem.code}`);
      this.#first.refuse(problem);
      this.#form.showProblems(problem);
    }
  }

  #stop() {
    byId("stop").disabled = true;
    this.#first.stop();
  }

  /** Cuts the first viewer's line, or mends it. */
  #setLine(isCut) {
    if (isCut === this.#line.isCut) return;
    byId("cut").ariaChecked = String(isCut);
    if (isCut) {
      this.#first.cut();
      this.#line.cut();
    } else {
      if (this.#first.isLive) this.#log.note("out", `the line is mended after ${counted(this.#line.refused, "refused attempt")}`);
      this.#line.mend();
    }
    this.#fitNotice();
  }

  #openSecond() {
    const root = this.#blank.cloneNode(true);
    for (const name of ["id", "aria-labelledby"]) {
      for (const element of [root, ...root.querySelectorAll(`[${name}]`)]) {
        element.setAttribute(name, element.getAttribute(name).replaceAll("viewer-1", "viewer-2"));
      }
    }
    root.querySelector("h3").textContent = "Second viewer";
    byId("viewers").append(root);
    byId("viewers").dataset.count = "2";
    this.#second = { root, viewer: new Viewer(root, { name: "second viewer", log: this.#log }), controller: null };
    byId("second").ariaPressed = "true";
    this.#fitView();
    if (this.#run.address) this.#watchSecond();
    this.#fitNotice();
  }

  /** The second viewer watches the present run, from the beginning. */
  #watchSecond() {
    const second = this.#second;
    second.controller?.abort();
    second.controller = new AbortController();
    second.viewer.clear();
    second.viewer.watch(this.#run.address, { signal: AbortSignal.any([second.controller.signal, this.#run.controller.signal]) });
  }

  #closeSecond() {
    this.#second.controller?.abort();
    this.#second.root.remove();
    this.#second = null;
    byId("viewers").dataset.count = "1";
    byId("second").ariaPressed = "false";
    this.#fitNotice();
  }

  #fitControls(state) {
    byId("stop").disabled = !this.#first.isLive || !this.#run.address;
    byId("cut").disabled = !this.#line.isCut && !(state === "streaming" || state === "reconnecting");
    this.#fitNotice();
  }

  /** While the line is cut: what the person may want to see now. */
  #fitNotice() {
    const notice = byId("notice");
    notice.hidden = !(this.#line.isCut && this.#first.isLive);
    notice.textContent = this.#second
      ? "The line of the first viewer is cut. The answer goes on: the second viewer has it. Switch the cut off, and the first one catches up."
      : "The line is cut, and the answer goes on without you. Open a second viewer to see that, or switch the cut off and catch up.";
  }

  #fitView() {
    const { value } = document.querySelector('[name="view"]:checked');
    for (const viewer of [this.#first, this.#second?.viewer]) viewer?.show(value);
  }
}

/** The element with this id, or of several tabs the one that is shown. */
function copied(id) {
  return byId(id).querySelector('[role="tabpanel"]:not([hidden])') ?? byId(id);
}

/** Shows how far one of the three steps in the page's head is. */
function step(name, state) {
  byId(`step-${name}`).dataset.state = state;
}

new Page();
