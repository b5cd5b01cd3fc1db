/**
 * The line of one viewer, which a switch cuts: the client's `fetch` goes through it.
 *
 * Cut, the connection that stands is really closed, and every new one fails, as without a network. A POST goes through: stopping
 * an answer is not what is shown here.
 */
export class Line {
  #up = new AbortController();
  /** Refused since the line was cut. */
  refused = 0;

  get isCut() {
    return this.#up.signal.aborted;
  }

  /** `fetch`, while the line stands. */
  fetch = (url, options = {}) => {
    if (options.method === "POST") return fetch(url, options);
    if (this.isCut) {
      this.refused += 1;
      return Promise.reject(new TypeError("the line is cut"));
    }
    return fetch(url, { ...options, signal: AbortSignal.any([options.signal, this.#up.signal].filter(Boolean)) });
  };

  cut() {
    this.refused = 0;
    this.#up.abort(new TypeError("the line is cut"));
  }

  /** The line stands again. Clients are told by what a browser says when its network is back, and do not wait for their next try. */
  mend() {
    if (!this.isCut) return;
    this.#up = new AbortController();
    dispatchEvent(new Event("online"));
  }
}
