// WhiteningExplorer: a cloud and its ellipse as it comes, naive, and whitened.

const STAGES = ["input", "naive", "whitened"];
const TITLES = { input: "input", naive: "naive", whitened: "Γ · whitened" };
const FRAME = { left: 40, top: 22, bottom: 34, right: 4 };
const MOST_DOTS = 600;

/** The three clouds with their covariances, from the traits. */
function whiteningState(model, white) {
  const get = (name) => model.get(name);
  const [rr, ii, correlation] = [get("rr"), get("ii"), get("correlation")];
  const set_ = [rr, ii, correlation * Math.sqrt(rr * ii)];
  const [mean, eps] = [get("_mean"), get("_eps")];
  const gamma = [get("gamma_rr"), get("gamma_ri"), get("gamma_ri"), get("gamma_ii")];
  const input = transformed(rootMatrix(set_), white.re, white.im, [0, 0], mean);
  const found = moments(input.re, input.im);
  const clouds = {
    input,
    naive: transformed(naiveMatrix(found.covar, eps), input.re, input.im, found.mean),
    whitened: transformed(
      product(gamma, whiteningMatrix(found.covar, eps)), input.re, input.im, found.mean),
  };
  const stages = {};
  for (const stage of STAGES) {
    const { re, im } = clouds[stage];
    stages[stage] = { re, im, ...moments(re, im) };
  }
  return { rr, ii, correlation, gamma, covar: set_, stages };
}

/** Word for word the summary of explorers/whitening.py. */
function whiteningSummary({ rr, ii, correlation, gamma, stages }, digits) {
  const two = (value) => value.toFixed(2);
  const ratios = STAGES.map((stage) => {
    const ratio = axisRatio(stages[stage].covar);
    return `${stage} ${Number.isFinite(ratio) ? two(ratio) : "inf"}`;
  });
  return `Covariance rr ${rr.toFixed(digits)}, ii ${ii.toFixed(digits)}, correlation ${two(correlation)}; `
    + `Γ rr ${two(gamma[0])}, ii ${two(gamma[3])}, ri ${two(gamma[1])}. `
    + `Long axis over short axis: ${ratios.join(", ")}.`;
}

/** One plane with a title, two axes, a cloud and its ellipses of 1σ and 2σ. */
class Panel {
  constructor(stage, half, middle = [0, 0]) {
    [this.stage, this.half, this.middle] = [stage, half, middle];
    this.axes = svg("g", { class: "cbn-axes" });
    this.cloud = svg("path", { class: "cbn-cloud" });
    this.ellipses = ["", " cbn-outer"].map((outer) =>
      svg("circle", { r: 1, class: `cbn-ellipse cbn-${stage}${outer}` }));
    this.plane = svg("svg", { class: "cbn-plane" }, this.cloud, ...this.ellipses);
    this.image = svg("g", { role: "img" }, this.axes, this.plane);
    this.picture = svg("svg", { class: "cbn-picture", role: "group" }, this.image);
  }

  resize(width) {
    if (this.width === width) return;
    this.width = width;
    this.side = width - FRAME.left - FRAME.right;
    this.height = this.side + FRAME.top + FRAME.bottom;
    [this.rangeX, this.rangeY] = this.middle.map((m) => [m - this.half, m + this.half]);
    this.x = scale(this.rangeX, [0, this.side]);
    this.y = scale(this.rangeY, [this.side, 0]);
    set(this.picture, { width, height: this.height });
    set(this.plane, { x: FRAME.left, y: FRAME.top, width: this.side, height: this.side });
    this.drawAxes();
  }

  drawAxes() {
    const { left, top } = FRAME;
    const [right, bottom] = [left + this.side, top + this.side];
    const [x0, y0] = [left + this.x(0), top + this.y(0)];
    const middle = { "text-anchor": "middle" };
    const turned = `translate(10 ${top + this.side / 2}) rotate(-90)`;
    this.axes.replaceChildren(
      svg("path", { d: `M${left} ${top}V${bottom}H${right}V${top}Z` }),
      svg("path", { d: `M${left} ${y0}H${right}M${x0} ${top}V${bottom}`, class: "cbn-zero" }),
      svg("text", { x: left, y: top - 8, class: "cbn-title" }, TITLES[this.stage]),
      svg("text", { x: left + this.side / 2, y: bottom + 30, ...middle }, "real part"),
      svg("text", { transform: turned, ...middle }, "imaginary part"),
    );
    for (const { value, text } of ticks(...this.rangeX, 5)) {
      const x = left + this.x(value);
      this.axes.append(
        svg("path", { d: `M${x} ${bottom}v4` }),
        svg("text", { x, y: bottom + 16, ...middle }, text),
      );
    }
    for (const { value, text } of ticks(...this.rangeY, 5)) {
      const y = top + this.y(value);
      this.axes.append(
        svg("path", { d: `M${left} ${y}h-4` }),
        svg("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, text),
      );
    }
  }

  draw({ re, im, mean, covar }) {
    const every = Math.ceil(re.length / MOST_DOTS);
    const points = [];
    for (let k = 0; k < re.length; k += every) points.push([this.x(re[k]), this.y(im[k])]);
    set(this.cloud, { d: dots(points) });
    const pixels = this.side / (2 * this.half);
    const [a, b, c, d] = rootMatrix(covar).map((entry) => entry * pixels);
    this.ellipses.forEach((ellipse, k) => {
      const m = [a, -c, b, -d].map((entry) => (entry * (k + 1)).toFixed(3));
      const centre = [this.x(mean[0]).toFixed(2), this.y(mean[1]).toFixed(2)];
      set(ellipse, { transform: `matrix(${[...m, ...centre].join(" ")})` });
    });
    const ratio = axisRatio(covar).toFixed(2);
    set(this.image, { "aria-label": `${TITLES[this.stage]}: long axis over short axis ${ratio}` });
  }
}

/** Two handles on the ellipse of the input. */
class Axes {
  constructor(view, panel) {
    [this.view, this.panel, this.angle] = [view, panel, null];
    const { rr, correlation } = view.model.get("_limits");
    [this.variance, this.correlation] = [rr, correlation];
    this.limits = rr.map(Math.sqrt);
    this.mean = view.model.get("_mean");
    const knobs = [
      svg("circle", { class: "cbn-knob", r: 7 }),
      svg("rect", { class: "cbn-knob", x: -6, y: -6, width: 12, height: 12 }),
    ];
    this.spokes = svg("path", { class: "cbn-axis", "aria-hidden": "true" });
    this.handles = knobs.map((knob, k) => handle(view, {
      knob,
      label: k === 0 ? "first axis of the input's ellipse" : "second axis of the input's ellipse",
      limits: this.limits,
      get: () => [this.angle + (k * Math.PI) / 2, this.lengths[k]],
      move: (angle, length) => this.move(k, angle, length),
      toData: (event) => this.toData(event),
    }));
    panel.plane.append(this.spokes, ...this.handles);
  }

  toData(event) {
    const { left, top } = this.panel.picture.getBoundingClientRect();
    const { side, rangeX, rangeY } = this.panel;
    return [
      scale([0, side], rangeX)(event.clientX - left - FRAME.left) - this.mean[0],
      scale([side, 0], rangeY)(event.clientY - top - FRAME.top) - this.mean[1],
    ];
  }

  /** Put the end of axis k there, as far as the limits of the sliders allow. */
  move(k, angle, length) {
    const within = (value, [least, most]) => Math.min(Math.max(value, least), most);
    const lengths = [...this.lengths];
    lengths[k] = within(length, this.limits);
    this.angle = angle - (k * Math.PI) / 2;
    const [rr, ii, ri] = covarianceOf(this.angle, lengths);
    this.view.change({
      rr: within(rr, this.variance),
      ii: within(ii, this.variance),
      correlation: within(ri / Math.sqrt(rr * ii), this.correlation),
    });
  }

  /** Back to the data as it came, with the first handle on the long axis. */
  reset() {
    this.angle = null;
    this.view.change(this.view.model.get("_home"));
  }

  draw(covar) {
    const { angle, lengths } = namedAxes(covar, this.angle);
    [this.angle, this.lengths] = [angle, lengths];
    const [x, y] = [this.panel.x, this.panel.y];
    const centre = `M${x(this.mean[0])} ${y(this.mean[1])}`;
    const ends = lengths.map((length, k) => {
      const turned = angle + (k * Math.PI) / 2;
      const end = [
        x(this.mean[0] + length * Math.cos(turned)), y(this.mean[1] + length * Math.sin(turned)),
      ];
      placeHandle(this.handles[k], end, turned, length, this.limits);
      return `${centre}L${end.join(" ")}`;
    });
    set(this.spokes, { d: ends.join("") });
  }
}

function whiteningControls(view, axes) {
  const limits = view.model.get("_limits");
  const digits = view.model.get("_digits");
  const unit = limits.rr[1] / 3;
  const add = (name, label, step, places = 2) => slider(view, {
    name, label, limits: limits[name], step, text: (value) => value.toFixed(places),
  });
  view.controls.append(
    add("rr", "variance rr", 0.05 * unit, digits),
    add("ii", "variance ii", 0.05 * unit, digits),
    add("correlation", "correlation", 0.01),
    add("gamma_rr", "Γ rr", 0.05),
    add("gamma_ii", "Γ ii", 0.05),
    add("gamma_ri", "Γ ri", 0.05),
    button(view, "reset", () => axes.reset()),
  );
}

/** Three in a row, or the input alone above the other two. */
function panelWidth(stage, width) {
  if (width >= 560) return Math.min(300, Math.floor((width - 24) / 3));
  return stage === "input" ? Math.min(300, width) : Math.floor((width - 12) / 2);
}

/** Wide enough for the largest cloud that the sliders allow, and for the origin. */
function inputPanel(model) {
  const middle = model.get("_mean").map((value) => value / 2);
  const reach = Math.max(...middle.map(Math.abs));
  return new Panel("input", reach + 2.1 * Math.sqrt(model.get("_limits").rr[1]), middle);
}

function whiteningView({ model, el }) {
  const traits = ["rr", "ii", "correlation", "gamma_rr", "gamma_ii", "gamma_ri"];
  const view = new View(model, el, traits);
  const values = float64s(model.get("_white"));
  const white = { re: values.slice(0, values.length / 2), im: values.slice(values.length / 2) };
  const panels = [inputPanel(model), new Panel("naive", 3.6), new Panel("whitened", 3.6)];
  const axes = new Axes(view, panels[0]);
  whiteningControls(view, axes);
  view.root.style.setProperty("--cbn-label", "5.8em");
  view.drawing.append(
    html("div", { class: "cbn-panels" }, ...panels.map((panel) => panel.picture)),
    html("p", { class: "cbn-hint" },
      "Drag ● or ■, or focus one: ← → turn the axis, ↑ ↓ stretch it. Thick lines 1σ, thin lines 2σ."),
  );
  view.draw = (width) => {
    const state = whiteningState(model, white);
    for (const panel of panels) {
      panel.resize(panelWidth(panel.stage, width));
      panel.draw(state.stages[panel.stage]);
    }
    axes.draw(state.covar);
    const drawn = Object.fromEntries(traits.map((name) => [name, model.get(name)]));
    for (const stage of STAGES) drawn[`${stage}_covar`] = state.stages[stage].covar;
    return { summary: whiteningSummary(state, model.get("_digits")), drawn };
  };
  view.update();
  return () => view.close();
}

export default { render: whiteningView };
