/**
 * Tokens per second of one viewer, as a number and as a small plot.
 *
 * A stream brings text and not tokens, so while it flows they are estimated: four characters are one, which is about right for
 * English. The provider's own count replaces that when it comes. Text that was there before (what a viewer gets that comes late,
 * or comes back) came at the line's speed and not at the model's: the plot leaves it out.
 */
import { number } from "./words.js";

const CHARACTERS_PER_TOKEN = 4;
/** The plot's points: one each STEP_MS, of the text of the last WINDOW_MS. It shows at most the last SPAN_MS. */
const STEP_MS = 250;
const WINDOW_MS = 1_000;
const SPAN_MS = 40_000;
/** What a plot shows at least, so that its first second is no cliff. */
const LEAST_SPAN_MS = 8_000;
/** The plot's own units; the style sheet gives it its size. */
const [WIDTH, HEIGHT] = [240, 48];

export class Rate {
  #part;
  #timer;
  /** `[at, characters]` of the last window's text. */
  #recent;
  /** `[milliseconds since the first text, characters per second]`. */
  #points;
  #characters;
  #firstAt;
  #lastAt;
  #tokens;
  #perCharacter;
  #over;

  /** @param {(name: string) => Element} part finds the viewer's element of that name */
  constructor(part) {
    this.#part = part;
    this.clear();
  }

  clear() {
    this.stop();
    this.#recent = [];
    this.#points = [];
    this.#characters = 0;
    this.#firstAt = this.#lastAt = null;
    this.#tokens = null;
    this.#perCharacter = 1 / CHARACTERS_PER_TOKEN;
    this.#over = false;
    this.#paint();
  }

  /** So many characters came now. `kind`: `live`; `late`, what was missed while the line was cut; `old`, what was there before the viewer. */
  add(characters, kind = "live") {
    const at = performance.now();
    this.#firstAt ??= at;
    this.#lastAt = at;
    if (kind !== "old") this.#characters += characters;
    if (kind === "live") this.#recent.push([at, characters]);
    this.#timer ??= setInterval(() => this.#step(), STEP_MS);
  }

  /** The provider's count of the answer's tokens, for so many characters of text. */
  correct(tokens, characters) {
    if (!tokens || !characters) return;
    this.#tokens = tokens;
    this.#perCharacter = tokens / characters;
    this.#paint();
  }

  /** The answer has ended: from now on the number is that of all of it. */
  end() {
    if (!this.#over && this.#firstAt !== null) this.#step();
    this.#over = true;
    this.stop();
    this.#paint();
  }

  stop() {
    clearInterval(this.#timer);
    this.#timer = undefined;
  }

  #step() {
    const now = performance.now();
    this.#recent = this.#recent.filter(([at]) => at > now - WINDOW_MS);
    const characters = this.#recent.reduce((sum, [, count]) => sum + count, 0);
    // The first second is as long as it has lasted, but not so short that two words make a record.
    const seconds = Math.min(WINDOW_MS, Math.max(now - this.#firstAt, 2 * STEP_MS)) / 1000;
    this.#points.push([now - this.#firstAt, characters / seconds]);
    if (this.#points.length > SPAN_MS / STEP_MS + 1) this.#points.shift();
    this.#paint();
  }

  #paint() {
    const points = this.#points.map(([at, characters]) => [at, characters * this.#perCharacter]);
    const seconds = (this.#lastAt - this.#firstAt) / 1000;
    const overall = seconds > 0.2 && this.#characters ? (this.#characters * this.#perCharacter) / seconds : null;
    const current = this.#over ? overall : (points.at(-1)?.[1] ?? null);
    const most = Math.max(0, ...points.map(([, rate]) => rate));
    const about = this.#tokens === null ? "≈ " : "";
    this.#part("rate").textContent = current === null ? "–" : about + number(current < 10 ? current : Math.round(current));
    this.#part("rate-note").textContent =
      this.#tokens === null ? `estimated: ${CHARACTERS_PER_TOKEN} characters a token` : `of ${number(this.#tokens)} that the provider counted`;
    this.#draw(points, most);
    this.#part("plot").setAttribute(
      "aria-label",
      points.length ? `Plot of tokens per second: ${about}${number(Math.round(most))} at most` : "Plot of tokens per second, empty yet",
    );
  }

  #draw(points, most) {
    const [line, area] = [this.#part("plot-line"), this.#part("plot-area")];
    if (points.length < 2) {
      line.setAttribute("d", "");
      area.setAttribute("d", "");
      return;
    }
    const [[from], [to]] = [points[0], points.at(-1)];
    const span = Math.max(to - from, LEAST_SPAN_MS);
    const x = (at) => (((at - from) / span) * WIDTH).toFixed(1);
    const y = (rate) => (HEIGHT - 1.5 - (rate / (most * 1.15 || 1)) * (HEIGHT - 3)).toFixed(1);
    const path = points.map(([at, rate], i) => `${i ? "L" : "M"}${x(at)} ${y(rate)}`).join("");
    line.setAttribute("d", path);
    area.setAttribute("d", `${path}L${x(to)} ${HEIGHT}L${x(from)} ${HEIGHT}Z`);
  }
}
