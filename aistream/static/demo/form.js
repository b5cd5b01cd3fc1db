/** The form "Ask": the models to choose from, a first prompt that fits the model, and what is wrong beside its field. */
import { fetchModels } from "./service.js";

/** What to ask a model that does not say back what it is told; replaces the first text while nobody has edited it. */
const QUESTION =
  "Explain Server-Sent Events to a curious newcomer in three short paragraphs: what travels over the wire, " +
  "how a browser resumes after the line was cut, and when one would rather use a WebSocket.";

const HINTS = {
  echo: "Built in: says your prompt back, one word at a time. Needs no key.",
  openai: "OpenAI, with the key this service was started with.",
  anthropic: "Anthropic, with the key this service was started with.",
};
const FIELDS = ["prompt", "model"];

const byId = (id) => document.getElementById(id);

export class AskForm {
  #form = byId("ask-form");

  /** @param {() => void} onStart called when a person wants to start */
  constructor(onStart) {
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      onStart();
    });
    this.#form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.#form.requestSubmit();
    });
    byId("model").addEventListener("change", () => this.#fit());
    this.#fill();
  }

  /** What is asked: `{prompt, model}`. */
  get question() {
    return Object.fromEntries(new FormData(this.#form));
  }

  /** While a session is being started it cannot be started again. */
  set isStarting(starting) {
    byId("start").disabled = starting;
  }

  /** There has been a session: the next one is another. */
  sayAgain() {
    byId("start").textContent = "Start again";
  }

  /** Puts each of a problem's messages under its field, the rest under the form; without a problem, takes all away. */
  showProblems(problem) {
    const errors = problem?.errors ?? [];
    for (const name of FIELDS) {
      const messages = errors.filter(({ field }) => field === name).map(({ message }) => message);
      byId(`${name}-problem`).textContent = messages.join("\n");
      byId(`${name}-problem`).hidden = !messages.length;
      byId(name).ariaInvalid = messages.length ? "true" : null;
    }
    const left = errors.filter(({ field }) => !FIELDS.includes(field)).map(({ field, message }) => `${field}: ${message}`);
    if (problem && !errors.length) left.push(problem.message);
    byId("form-problem").textContent = left.join("\n");
    byId("form-problem").hidden = !left.length;
    this.#form.querySelector('[aria-invalid="true"]')?.focus();
  }

  /** Offers what this service can talk to; `echo`, which stands in the page already, is there without being asked for. */
  async #fill() {
    const told = await fetchModels();
    if (told) {
      const providers = [...new Set(told.models.map(({ provider }) => provider))];
      byId("model").replaceChildren(...providers.map((provider) => group(provider, told.models)));
      byId("model").value = told.default;
    }
    this.#fit();
  }

  /** Fits hint and first text to the chosen model; a prompt that somebody has edited is left alone. */
  #fit() {
    const prompt = byId("prompt");
    const provider = byId("model").selectedOptions[0]?.dataset.provider ?? "";
    byId("model-hint").textContent = HINTS[provider] ?? "";
    if (prompt.value === prompt.defaultValue || prompt.value === QUESTION) {
      prompt.value = provider === "echo" ? prompt.defaultValue : QUESTION;
    }
  }
}

function group(provider, models) {
  const group = document.createElement("optgroup");
  group.label = provider;
  for (const model of models.filter((model) => model.provider === provider)) {
    const option = new Option(model.id, model.id);
    option.dataset.provider = model.provider;
    group.append(option);
  }
  return group;
}
