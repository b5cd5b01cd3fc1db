/**
 * The pane in which an answer grows: rendered as Markdown, or as its exact text.
 *
 * It paints once per frame, however many events arrive in one: a fast model sends hundreds a second, and each write costs a layout.
 * Of the two views only the one that is shown is painted. It follows the end unless the reader has scrolled away from it.
 */
import { MarkdownView, markElement } from "./markdown.js";

/** Rendering takes at most this part of the time: what is one huge block is rendered less often, the larger it grows. */
const SHARE = 0.2;

export class AnswerPane {
  #pane;
  #exact;
  #rendered;
  #markdown;
  /** What there is of the answer, and the places where it went on after a cut: `{at, label}`. */
  #text = "";
  #marks = [];
  #over = false;
  #isRendered = true;
  /** How much of the text the exact view has. */
  #written = 0;
  #asked = false;
  #restUntil = 0;

  /** @param {(name: string) => HTMLElement} part finds `answer`, the pane, and in it `rendered` and `exact` */
  constructor(part) {
    this.#pane = part("answer");
    this.#rendered = part("rendered");
    this.#exact = part("exact");
    this.#markdown = new MarkdownView(this.#rendered);
  }

  get text() {
    return this.#text;
  }

  clear() {
    this.#text = "";
    this.#marks = [];
    this.#over = false;
    this.#written = 0;
    this.#restUntil = 0;
    this.#markdown.clear();
    this.#exact.replaceChildren();
    this.#pane.dataset.empty = "yes";
  }

  append(text) {
    this.#text += text;
    this.#ask();
  }

  /** What follows came after a cut. A mark that stands at this very place already gets the new label. */
  mark(label) {
    let mark = this.#marks.at(-1);
    if (mark?.at !== this.#text.length) this.#marks.push((mark = { at: this.#text.length }));
    this.label(label);
  }

  /** Labels the last mark anew. */
  label(label) {
    const mark = this.#marks.at(-1);
    mark.label = label;
    // Both views are made of what they have, but for this.
    for (const view of [this.#rendered, this.#exact]) {
      for (const element of view.querySelectorAll(`.resumed[data-at="${mark.at}"]`)) element.dataset.label = label;
    }
    this.#ask();
  }

  /** The answer has ended: paints all of it now. A hidden tab paints no frames, and what has ended must stand there whole. */
  finish() {
    this.#over = true;
    this.#paint();
  }

  /** @param {"rendered"|"exact"} name the view to show */
  show(name) {
    this.#isRendered = name === "rendered";
    this.#rendered.hidden = !this.#isRendered;
    this.#exact.hidden = this.#isRendered;
    this.#paint();
  }

  #ask() {
    if (this.#asked) return;
    this.#asked = true;
    requestAnimationFrame(() => {
      this.#asked = false;
      if (performance.now() < this.#restUntil) this.#ask();
      else this.#paint();
    });
  }

  #paint() {
    const pane = this.#pane;
    const began = performance.now();
    const atEnd = pane.scrollHeight - pane.scrollTop - pane.clientHeight < 48;
    if (!this.#isRendered) this.#writeExact();
    else if (this.#over) this.#markdown.finish(this.#text, this.#marks);
    else this.#markdown.update(this.#text, this.#marks);
    pane.dataset.empty = this.#text ? "no" : "yes";
    if (atEnd) pane.scrollTop = pane.scrollHeight;
    this.#restUntil = performance.now() + (performance.now() - began) * (1 / SHARE - 1);
  }

  #writeExact() {
    while (this.#written < this.#text.length) {
      const next = this.#marks.find(({ at }) => at >= this.#written && !this.#exact.querySelector(`[data-at="${at}"]`));
      const end = next && next.at < this.#text.length ? next.at : this.#text.length;
      this.#exact.append(this.#text.slice(this.#written, end));
      this.#written = end;
      if (next?.at === end) this.#exact.append(markElement(next));
    }
  }
}
