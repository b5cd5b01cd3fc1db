/**
 * An answer as Markdown, rendered while it grows.
 *
 * markdown-it makes the HTML, and its text is a stranger's: HTML in it is text, a link leads to http, https or mailto and tells
 * nobody where it was followed, an image becomes a link, since the page asks nobody else for anything.
 *
 * In Markdown a line that is complete never changes a block that an earlier line has closed. So a block is settled as soon as
 * another one begins on a complete line: it is rendered once, and stays. Only what comes after it is rendered anew. The exception
 * is a link's definition that stands behind its use; `finish` renders everything once more and replaces what differs, so that what
 * remains is always exactly one rendering of the whole.
 */
import markdownit from "../vendor/markdown-it.esm.min.mjs";
import { copyButton } from "./copy.js";

/** Stands where the text went on, while a block with such a place is rendered. A noncharacter: no text means anything by it. */
const SENTINEL = "\uFDD0";
const ALLOWED = /^(?:https?:|mailto:)/i;

export const markdown = markdownit({ html: false, linkify: true });
// Without a scheme a name is a name: "aistream.py" is a file.
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false, fuzzyIP: false });
markdown.validateLink = (url) => ALLOWED.test(url);
Object.assign(markdown.renderer.rules, {
  link_open(tokens, at, options, env, renderer) {
    tokens[at].attrSet("target", "_blank");
    tokens[at].attrSet("rel", "noopener noreferrer nofollow");
    return renderer.renderToken(tokens, at, options);
  },
  image(tokens, at, options, env, renderer) {
    const { escapeHtml } = markdown.utils;
    const alt = escapeHtml(renderer.renderInlineAsText(tokens[at].children, options, env) || "image");
    const depth = tokens.slice(0, at).reduce((sum, { type, nesting }) => (/^link_/.test(type) ? sum + nesting : sum), 0);
    if (depth) return alt; // a link in a link there is not
    return `<a href="${escapeHtml(tokens[at].attrGet("src"))}" target="_blank" rel="noopener noreferrer nofollow">${alt}</a>`;
  },
  // A wide table scrolls by itself, also by keyboard.
  table_open: () => '<div class="wide" role="group" aria-label="Table" tabindex="0"><table>\n',
  table_close: () => "</table></div>\n",
  // The page's own headings come first.
  heading_open: (tokens, at) => `<h${lower(tokens[at].tag)}>`,
  heading_close: (tokens, at) => `</h${lower(tokens[at].tag)}>\n`,
  th_open: (tokens, at) => cell("th", tokens[at]),
  td_open: (tokens, at) => cell("td", tokens[at]),
});

const lower = (tag) => Math.min(6, Number(tag[1]) + 3);

/** A cell's alignment as an attribute for the style sheet: the page's policy allows no style in HTML. */
function cell(tag, token) {
  const align = /^text-align:(left|center|right)$/.exec(token.attrGet("style") ?? "")?.[1];
  return align ? `<${tag} data-align="${align}">` : `<${tag}>`;
}

/** Shows one growing text in an element. `marks`: places in it, `{at, label}`, which are shown and are no part of it. */
export class MarkdownView {
  #element;
  #live = document.createElement("div");
  /** `{html, nodes}` of each settled block. */
  #blocks = [];
  /** How much of the text they are. */
  #settled = 0;
  /** The links that they define. */
  #references = {};

  constructor(element) {
    this.#element = element;
    this.#live.className = "live";
    this.clear();
  }

  clear() {
    this.#blocks = [];
    this.#settled = 0;
    this.#references = {};
    this.#live.replaceChildren();
    this.#element.replaceChildren(this.#live);
  }

  /** Shows the text so far: the one it showed before, and more. */
  update(text, marks = []) {
    this.#settle(text, marks);
    const rest = text.slice(this.#settled);
    const html = markdown.render(rest, { references: { ...this.#references } });
    this.#live.replaceChildren(this.#mark(html, rest, this.#settled, true, marks, this.#references));
  }

  /** Shows the whole text, of which there will be no more. */
  finish(text, marks = []) {
    const env = {};
    const tokens = markdown.parse(text, env);
    const lines = lineStarts(text);
    const blocks = blocksOf(tokens);
    let before = null;
    blocks.forEach(({ from, to, line }, i) => {
      const html = markdown.renderer.render(tokens.slice(from, to), markdown.options, env);
      let block = this.#blocks[i];
      if (block?.html !== html) {
        const end = blocks[i + 1] ? lines[blocks[i + 1].line] : text.length;
        const fragment = this.#mark(html, text.slice(lines[line], end), lines[line], !blocks[i + 1], marks, env.references);
        for (const node of block?.nodes ?? []) node.remove();
        block = this.#blocks[i] = { html, nodes: decorated(fragment) };
        if (before) before.after(...block.nodes);
        else this.#element.prepend(...block.nodes);
      }
      before = block.nodes.at(-1);
    });
    for (const { nodes } of this.#blocks.splice(blocks.length)) for (const node of nodes) node.remove();
    this.#settled = text.length;
    this.#live.replaceChildren();
  }

  #settle(text, marks) {
    const rest = text.slice(this.#settled);
    const complete = rest.slice(0, Math.max(rest.lastIndexOf("\n"), rest.lastIndexOf("\r")) + 1);
    const env = { references: { ...this.#references } };
    const tokens = markdown.parse(complete, env);
    const blocks = blocksOf(tokens);
    if (blocks.length < 2) return;
    const lines = lineStarts(complete);
    const start = this.#settled;
    for (const [i, { from, to, line }] of blocks.slice(0, -1).entries()) {
      const html = markdown.renderer.render(tokens.slice(from, to), markdown.options, env);
      const source = complete.slice(lines[line], lines[blocks[i + 1].line]);
      const nodes = decorated(this.#mark(html, source, start + lines[line], false, marks, env.references));
      this.#blocks.push({ html, nodes });
      this.#live.before(...nodes);
    }
    const length = lines[blocks.at(-1).line];
    // Only the definitions that no further line can change.
    if (Object.keys(env.references).length > Object.keys(this.#references).length) {
      const known = { references: this.#references };
      markdown.parse(complete.slice(0, length), known);
      this.#references = known.references;
    }
    this.#settled += length;
  }

  /**
   * The HTML of a piece as a fragment, with its marks where they belong: the piece is rendered once more with sentinels in it.
   * Where they would change what it is (in a link's address, between two asterisks), the marks stand beside the piece.
   */
  #mark(html, source, start, isLast, marks, references) {
    const fragment = fragmentOf(html);
    const end = start + source.length;
    const here = marks.filter(({ at }) => at >= start && (at < end || (isLast && at === end)));
    if (!here.length) return fragment;
    let marked = source;
    for (const { at } of here.toReversed()) marked = marked.slice(0, at - start) + SENTINEL + marked.slice(at - start);
    const candidate = markdown.render(marked, { references: { ...references } });
    const exact = fragmentOf(candidate);
    if (!html.includes(SENTINEL) && candidate.replaceAll(SENTINEL, "") === html && placeMarks(exact, here)) return exact;
    for (const mark of here) {
      if (source.slice(mark.at - start).trim()) fragment.prepend(markElement(mark));
      else fragment.append(markElement(mark));
    }
    return fragment;
  }
}

/** Puts the marks where the sentinels stand, if all of them stand in text; whether it did. */
function placeMarks(fragment, marks) {
  const walker = document.createTreeWalker(fragment, NodeFilter.SHOW_TEXT);
  const found = [];
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    for (let at = node.data.indexOf(SENTINEL); at >= 0; at = node.data.indexOf(SENTINEL, at + 1)) found.push([node, at]);
  }
  if (found.length !== marks.length) return false;
  // From the end, so that the earlier places stay where they were found.
  for (let i = marks.length - 1; i >= 0; i -= 1) {
    const [node, at] = found[i];
    const after = node.splitText(at);
    after.data = after.data.slice(SENTINEL.length);
    after.before(markElement(marks[i]));
  }
  return true;
}

/** A mark is drawn by the style sheet, so that it is in no copy of the text. */
export function markElement({ at, label }) {
  const element = document.createElement("span");
  element.className = "resumed";
  element.dataset.at = at;
  element.dataset.label = label;
  return element;
}

/** The top-level blocks among the tokens: `from` and `to` are places in them, `line` is where the block begins in the text. */
function blocksOf(tokens) {
  const blocks = [];
  for (let at = 0; at < tokens.length; at += 1) {
    const from = at;
    if (tokens[at].nesting === 1) while (tokens[at].nesting !== -1 || tokens[at].level !== 0) at += 1;
    blocks.push({ from, to: at + 1, line: tokens[from].map[0] });
  }
  return blocks;
}

/** Where each line begins, by what markdown-it takes for a line's end. */
function lineStarts(text) {
  return [0, ...Array.from(text.matchAll(/\r\n|\r|\n/g), ({ index, 0: end }) => index + end.length)];
}

/** HTML of markdown-it's as nodes. A template's content is inert: nothing in it loads or runs. */
function fragmentOf(html) {
  const template = document.createElement("template");
  template.innerHTML = html;
  for (const pre of template.content.querySelectorAll("pre")) {
    pre.tabIndex = 0; // long lines scroll, also by keyboard
    pre.role = "group";
    pre.ariaLabel = "Code";
  }
  return template.content;
}

/** The nodes of a block that stays, with a button at its code. */
function decorated(fragment) {
  for (const pre of fragment.querySelectorAll("pre")) {
    const box = document.createElement("div");
    box.className = "code-block";
    pre.replaceWith(box);
    box.append(copyButton(pre, "this code"), pre);
  }
  return [...fragment.childNodes];
}
