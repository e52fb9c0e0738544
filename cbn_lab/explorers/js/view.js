// What all explorers share: elements, axes, controls, and the life of one view.

const REST = 100; // ms without a change after which Python is told
const SVG = "http://www.w3.org/2000/svg";

/** Only what differs is written: the whitened cloud, say, hardly ever moves. */
function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    const text = String(value);
    if (element.getAttribute(name) !== text) element.setAttribute(name, text);
  }
  return element;
}

function svg(name, attributes = {}, ...children) {
  const element = set(document.createElementNS(SVG, name), attributes);
  element.append(...children);
  return element;
}

function html(name, attributes = {}, ...children) {
  const element = set(document.createElement(name), attributes);
  element.append(...children);
  return element;
}

/** The text of an element, which is laid out again only where it is another one. */
function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Maps the interval [from0, from1] to [to0, to1]. */
function scale([from0, from1], [to0, to1]) {
  const slope = (to1 - to0) / (from1 - from0);
  return (value) => to0 + (value - from0) * slope;
}

/** Round numbers from low to high, about `count` of them. */
function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const length = Math.floor(high / step + 1e-9) - first + 1;
  const digits = Math.max(0, -Math.floor(Math.log10(step)));
  return Array.from({ length }, (_, k) => ({
    value: (first + k) * step,
    text: minus(((first + k) * step).toFixed(digits)),
  }));
}

/** A number as it stands in a picture: with a real minus sign, and never "−0". */
function minus(text) {
  return /^-[0.]*$/.test(text) ? text.slice(1) : text.replace("-", "−");
}

/** Two digits with a sign, and never minus zero. */
function signed(value) {
  const text = value.toFixed(2);
  return text === "-0.00" ? "+0.00" : text.startsWith("-") ? text : `+${text}`;
}

const tenth = (value) => Math.round(10 * value) / 10; // several times as quick as toFixed(1)
const line = (points) => `M${points.map(([x, y]) => `${tenth(x)} ${tenth(y)}`).join("L")}`;

/** One path for many points: drawn with round caps, each piece of length 0 is a dot. */
const dots = (points) => points.map(([x, y]) => `M${tenth(x)} ${tenth(y)}h0`).join("");

/** A row that explains the marks: [{ label, mark }], mark being the class of a line or of dots. */
function legend(entries) {
  const items = entries.map(({ label, mark, shape }) => {
    const d = shape === "dots" ? "M5 6h0M14 6h0M23 6h0" : shape === "band" ? "M0 6H28" : "M1 6H27";
    const sample = svg("svg", { width: 28, height: 12, "aria-hidden": "true" });
    sample.append(svg("path", { d, class: `${mark} ${shape === "band" ? "cbn-band-sample" : ""}` }));
    return html("span", { class: "cbn-legend-item" }, sample, label);
  });
  return html("div", { class: "cbn-legend" }, ...items);
}

/** The numbers of a Bytes trait, copied: its buffer need not be aligned. */
function float64s(view) {
  return new Float64Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

/** Keys belong to the control that has the focus, not to JupyterLab's shortcuts. */
function keepKeys(element) {
  element.dataset.lmSuppressShortcuts = "true";
  return element;
}

/**
 * A labelled slider for a trait, with its value beside it.
 * The browser brings the keys: arrows, PageUp and PageDown, Home and End.
 */
function slider(view, { name, label, limits: [min, max], step, text = String }) {
  const input = keepKeys(html("input", { type: "range", min, max, step }));
  input.dataset.trait = name;
  const readout = html("span", { class: "cbn-readout", "aria-hidden": "true" });
  const element = html("label", { class: "cbn-control" }, html("span", {}, label), input, readout);
  view.listen(input, "input", () => view.change({ [name]: input.valueAsNumber }));
  view.follow(() => {
    const value = view.model.get(name);
    input.disabled = value === null;
    if (value !== null) input.value = value;
    readout.textContent = value === null ? "–" : minus(text(value));
    input.setAttribute("aria-valuetext", readout.textContent);
  });
  return element;
}

function button(view, label, onClick) {
  const element = keepKeys(html("button", { type: "button", class: "cbn-button" }, label));
  view.listen(element, "click", onClick);
  return element;
}

/** A labelled box to tick; `get` says whether it is ticked, `onChange` is told of a click. */
function checkbox(view, label, get, onChange) {
  const input = keepKeys(html("input", { type: "checkbox" }));
  view.listen(input, "change", () => onChange(input.checked));
  view.follow(() => (input.checked = get()));
  return html("label", { class: "cbn-check" }, input, label);
}

/** One view of a model. All that it listens to ends with it. */
class View {
  constructor(model, el, traits) {
    this.model = model;
    this.controller = new AbortController();
    this.followers = [];
    this.changing = false;
    this.root = html("div", { class: "cbn-explorer" });
    for (const [name, colour] of Object.entries(model.get("_palette"))) {
      this.root.style.setProperty(`--cbn-${name}`, colour);
    }
    this.controls = html("div", { class: "cbn-controls" });
    this.drawing = html("div", { class: "cbn-drawing" });
    this.caption = html("p", { class: "cbn-caption", role: "status", "aria-live": "polite" });
    this.root.append(this.controls, this.drawing, this.caption);
    el.append(this.root);
    this.listenToModel(traits);
    this.listenToWidth();
  }

  listen(target, event, callback, options = {}) {
    target.addEventListener(event, callback, { signal: this.controller.signal, ...options });
  }

  listenToModel(traits) {
    const onChange = () => this.changing || this.update();
    for (const name of traits) this.model.on(`change:${name}`, onChange);
    this.listen(this.controller.signal, "abort", () => {
      for (const name of traits) this.model.off(`change:${name}`, onChange);
    }, { signal: undefined });
  }

  listenToWidth() {
    const observer = new ResizeObserver(() => {
      if (!this.root.isConnected || this.drawing.clientWidth === this.width) return;
      this.width = this.drawing.clientWidth;
      this.update();
    });
    observer.observe(this.drawing);
    this.listen(this.controller.signal, "abort", () => observer.disconnect(), { signal: undefined });
  }

  /** Have `callback` called with every update, before the picture is drawn. */
  follow(callback) {
    this.followers.push(callback);
  }

  /** Set traits from a control: draw first, then tell Python. */
  change(values) {
    this.changing = true;
    for (const [name, value] of Object.entries(values)) this.model.set(name, value);
    this.changing = false;
    this.update();
  }

  update() {
    for (const callback of this.followers) callback();
    const { summary, drawn } = this.draw(Math.max(300, this.width || 640));
    write(this.caption, summary);
    this.model.set("drawn", drawn);
    this.tellPython();
  }

  /** Once the hand rests: at each message JupyterLab draws the kernel's state, twice. */
  tellPython() {
    clearTimeout(this.timer);
    this.untold = true;
    this.timer = setTimeout(() => this.tellNow(), REST);
  }

  tellNow() {
    clearTimeout(this.timer);
    if (this.untold) this.model.save_changes();
    this.untold = false;
  }

  close() {
    this.controller.abort();
    this.root.remove();
    this.tellNow();
  }
}
