/** The list "On the wire": what happened between the viewers and the service, each line with the seconds since the start. */
export class WireLog {
  #list;
  #empty;
  #startedAt = 0;

  /** `empty`: what stands there in place of an empty list. */
  constructor(list, empty) {
    this.#list = list;
    this.#empty = empty;
  }

  clear() {
    this.#startedAt = performance.now();
    this.#list.replaceChildren();
  }

  /** @param {"out"|"in"|"cut"|"end"|"bad"} kind gives the line its mark */
  note(kind, text) {
    const list = this.#list;
    this.#empty.hidden = true;
    list.hidden = false;
    const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 32;
    const line = document.createElement("li");
    line.dataset.kind = kind;
    const time = document.createElement("time");
    time.textContent = `${((performance.now() - this.#startedAt) / 1000).toFixed(3)} s`;
    const words = document.createElement("span");
    words.textContent = text;
    line.append(time, " ", words);
    list.append(line);
    if (atEnd) list.scrollTop = list.scrollHeight;
  }
}
