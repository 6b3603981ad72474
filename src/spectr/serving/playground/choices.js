// The settings: which model, which experts, compared with what, how long, how random, with which key.

import { labelled } from "./badge.js";
import { find, make } from "./dom.js";
import { sorted } from "./models.js";
import { ensign } from "./palette.js";

const KEY = "spectr-playground-key";
const MANY = 12; // experts from which on a search field helps

export class Choices {
  #models = sorted([]);

  constructor({ onKey }) {
    find("key").value = sessionStorage.getItem(KEY) ?? "";
    find("key").addEventListener("change", () => {
      sessionStorage.setItem(KEY, this.key);
      onKey();
    });
    find("choices").addEventListener("submit", event => event.preventDefault());
    find("choices").addEventListener("change", () => this.#update());
    find("all").addEventListener("click", () => this.#tick(true));
    find("none").addEventListener("click", () => this.#tick(false));
    find("find").addEventListener("input", () => this.#filter());
  }

  get key() {
    return find("key").value.trim();
  }

  get system() {
    return find("system").value.trim();
  }

  /** Models to ask: the chosen one, and the one to compare with. */
  get asked() {
    return [find("model").value, find("beside").value].filter(Boolean);
  }

  /** Why nothing can be asked, or "". */
  get obstacle() {
    if (!find("model").value) return "There is no model to ask.";
    const nobody = this.#routes && !this.#ticked.length;
    return nobody ? "Tick at least one expert, or choose the base model." : "";
  }

  /** Show the models of the server; what was chosen stays where it is still there. */
  show(models) {
    this.#models = sorted(models);
    const { experts, routers } = this.#models;
    if (experts.length <= 10)
      experts
        .map(({ name }) => name)
        .sort()
        .forEach(ensign);
    this.#fill(find("model"), []);
    this.#fill(find("beside"), [make("option", { value: "" }, "Nothing")]);
    this.#fillBoxes(experts);
    this.#fillRouters(routers);
    this.#update();
  }

  /** Say what is wrong with the server or the key, where the key is; "" takes it back. */
  complain(words) {
    find("trouble").textContent = words;
    find("trouble").hidden = !words;
    if (words) find("settings").open = true;
  }

  /** The fields of a request for one of the models, but for its messages. */
  request(model) {
    const base = this.#models.routed !== null && this.#models.others.includes(model);
    return {
      model,
      ...number("tokens", "max_tokens"),
      ...number("temperature", "temperature"),
      ...(model === this.#models.routed && this.#routing()),
      ...(!base && { return_routing: find("layers").checked ? "layers" : true }),
    };
  }

  /** Options for the routed model alone; none where they are as the server has them. */
  #routing() {
    const router = find("router").value;
    return { ...(!this.#allTicked && { experts: this.#ticked }), ...(router && { router }) };
  }

  get #routes() {
    return this.#models.routed !== null && this.asked.includes(this.#models.routed);
  }

  get #boxes() {
    return [...find("boxes").querySelectorAll("input")];
  }

  get #ticked() {
    return this.#boxes.filter(box => box.checked).map(box => box.value);
  }

  get #allTicked() {
    return this.#boxes.every(box => box.checked);
  }

  #fill(select, first) {
    const { routed, experts, others } = this.#models;
    const before = select.value;
    select.replaceChildren(
      ...first,
      ...group("Routed among experts", routed === null ? [] : [{ id: routed, name: routed }]),
      ...group(
        routed === null ? "Models" : "Base model",
        others.map(id => ({ id, name: id })),
      ),
      ...group("A single expert", experts),
    );
    if ([...select.options].some(option => option.value === before)) select.value = before;
  }

  #fillBoxes(experts) {
    const off = new Set(this.#boxes.filter(box => !box.checked).map(box => box.value));
    find("boxes").replaceChildren(
      ...experts.map(({ name, outlierScore }) => {
        const box = make("input", { type: "checkbox", value: name, checked: !off.has(name) });
        return make("label", { className: "check" }, box, labelled(name), ...(outlierScore ? [warning(outlierScore)] : []));
      }),
    );
    find("experts").hidden = !experts.length;
    find("find").hidden = experts.length < MANY;
  }

  #fillRouters([byDefault, ...others]) {
    const options = others.map(name => make("option", { value: name }, name));
    find("router").replaceChildren(make("option", { value: "" }, byDefault ?? ""), ...options);
    find("routers").hidden = !others.length;
  }

  #tick(checked) {
    for (const box of this.#boxes) if (!box.closest("label").hidden) box.checked = checked;
    this.#update();
  }

  #filter() {
    const words = find("find").value.toLowerCase();
    for (const box of this.#boxes) box.closest("label").hidden = !box.value.toLowerCase().includes(words);
  }

  #update() {
    find("experts").disabled = find("router").disabled = !this.#routes;
    find("count").textContent = `${this.#ticked.length} of ${this.#boxes.length}`;
    const routed = "Only the routed model chooses among experts.";
    find("advice").textContent = this.#routes ? this.obstacle : routed;
    find("advice").hidden = !find("advice").textContent;
    const experts = this.#routes ? `, ${find("count").textContent} experts` : "";
    find("summary").textContent = this.asked.join(" compared with ") + experts;
  }
}

/** Why an expert stands out: visible, as a tooltip, and for screen readers. */
function warning(outlierScore) {
  const why = `Far larger updates than the other experts' (robust z-score ${outlierScore}). It is served anyway.`;
  return make("span", { className: "warning", title: why }, make("span", { className: "unseen" }, why));
}

function group(label, models) {
  const options = models.map(({ id, name }) => make("option", { value: id }, name));
  return options.length ? [make("optgroup", { label }, ...options)] : [];
}

/** A number field's value under a name, or nothing where it is empty: the server's own default. */
function number(id, name) {
  const { value, valueAsNumber } = find(id);
  return value === "" ? {} : { [name]: valueAsNumber };
}
