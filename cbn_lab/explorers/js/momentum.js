// MomentumExplorer: batch means, running mean, true mean, and the memory 1/momentum.

const MARGIN = { left: 52, right: 14, top: 8, bottom: 34 };
const HEIGHT = { main: 240, weights: 64 };
const gapFor = (width) => (width < 520 ? 48 : 30); // two lines of text between the parts, or one

/** All the numbers of the picture, from the traits. */
function momentumState(model, noise) {
  const [momentum, size] = [model.get("momentum"), model.get("batch_size")];
  const steps = noise.length / model.get("_limits").batch_size[1];
  const truth = trueMeans(model.get("_start"), model.get("drift"), steps);
  const batches = batchMeans(noise, truth, size);
  const running = runningMeans(batches, momentum);
  const weights = batchWeights(momentum, steps);
  return {
    momentum, size, steps, truth, batches, running, weights,
    memory: momentum === null ? steps : 1 / momentum,
    lag: dot(weights, truth) - truth[steps - 1],
    noise: Math.sqrt(dot(weights, weights) / size),
    start: 1 - weights.reduce((a, b) => a + b, 0),
  };
}

/** Word for word the summary of explorers/momentum.py. */
function momentumSummary(s) {
  const name = s.momentum === null ? "None (cumulative average)" : s.momentum.toFixed(2);
  const left = s.start < 0.005
    ? "" : ` The initial 0 still counts for ${(100 * s.start).toFixed(0)} %.`;
  return `Momentum ${name}: memory of about ${s.memory.toFixed(0)} batches. `
    + `After ${s.steps} batches of ${s.size} the running mean is `
    + `${s.running[s.steps - 1].toFixed(2)}, the true mean ${s.truth[s.steps - 1].toFixed(2)}. `
    + `Expected: lag ${signed(s.lag)}, noise ±${s.noise.toFixed(2)}.${left}`;
}

function momentumElements() {
  const part = (name, mark, more = {}) => svg(name, { class: mark, ...more });
  return {
    window: part("rect", "cbn-band"),
    axes: part("g", "cbn-axes"),
    batches: part("path", "cbn-dots"),
    truth: part("path", "cbn-true"),
    running: part("path", "cbn-running"),
    weights: part("path", "cbn-weights"),
    memory: part("text", "cbn-text", { "text-anchor": "end" }),
    share: part("text", "cbn-text cbn-muted"),
  };
}

/** Frame, ticks and names of both axes; drawn again only where the scales have changed. */
function drawMomentumAxes(group, width, steps, y, [low, high]) {
  const key = [width, low, high].join();
  if (group.dataset.key === key) return;
  group.dataset.key = key;
  const [left, right] = [MARGIN.left, width - MARGIN.right];
  const bottom = MARGIN.top + HEIGHT.main;
  const x = scale([1, steps], [left, right]);
  group.replaceChildren(svg("path", { d: `M${left} ${MARGIN.top}V${bottom}H${right}` }));
  for (const { value, text } of ticks(low, high, 5)) {
    group.append(
      svg("path", { d: `M${left} ${y(value)}h-5` }),
      svg("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, text),
    );
  }
  const base = bottom + gapFor(width) + HEIGHT.weights;
  group.append(svg("path", { d: `M${left} ${base}H${right}` }));
  for (const value of [1, 50, 100, 150]) {
    group.append(
      svg("path", { d: `M${x(value)} ${base}v5` }),
      svg("text", { x: x(value), y: base + 18, "text-anchor": "middle" }, String(value)),
    );
  }
  const middle = { "text-anchor": "middle" };
  const turned = `translate(14 ${(MARGIN.top + bottom) / 2}) rotate(-90)`;
  group.append(
    svg("text", { x: (left + right) / 2, y: base + 31, ...middle }, "training step"),
    svg("text", { transform: turned, ...middle }, "mean"),
  );
}

function drawMomentum(parts, picture, s, width) {
  const all = [0, ...s.batches, ...s.running];
  const range = [Math.min(...all) - 0.1, Math.max(...all) + 0.1];
  const bottom = MARGIN.top + HEIGHT.main;
  const x = scale([1, s.steps], [MARGIN.left, width - MARGIN.right]);
  const y = scale(range, [bottom, MARGIN.top]);
  const curve = (values) => values.map((value, k) => [x(k + 1), y(value)]);
  const top = bottom + gapFor(width);
  const base = top + HEIGHT.weights;
  const largest = s.weights[s.steps - 1];
  const z = scale([0, largest], [base, top]);
  const half = (x(2) - x(1)) / 2;
  const profile = s.weights.map((w, k) => `H${x(k + 1) - half}V${z(w)}`).join("");
  const first = Math.max(x(s.steps + 1 - s.memory) - half, MARGIN.left);
  set(picture, { width, height: base + MARGIN.bottom });
  drawMomentumAxes(parts.axes, width, s.steps, y, range);
  set(parts.window, { x: first, y: MARGIN.top, width: x(s.steps) + half - first });
  set(parts.window, { height: base - MARGIN.top });
  set(parts.batches, { d: dots(curve(s.batches)) });
  set(parts.truth, { d: line(curve(s.truth)) });
  set(parts.running, { d: line(curve(s.running)) });
  set(parts.weights, { d: `M${x(1) - half} ${base}${profile}H${x(s.steps) + half}V${base}Z` });
  set(parts.memory, { x: width - MARGIN.right - 2, y: bottom + 21 });
  parts.memory.textContent = s.momentum === null
    ? `memory: all ${s.steps} batches` : `memory 1/momentum = ${s.memory.toFixed(0)} batches`;
  set(parts.share, { x: MARGIN.left + 4, y: top - 9 });
  parts.share.textContent = `weight of each batch (at most ${largest.toFixed(3)})`;
}

function momentumControls(view) {
  const limits = view.model.get("_limits");
  const two = (value) => value.toFixed(2);
  let last = view.model.get("momentum") ?? 0.1; // what comes back when the box is unticked
  view.follow(() => (last = view.model.get("momentum") ?? last));
  const momentum = slider(view, {
    name: "momentum", label: "momentum", limits: limits.momentum, step: 0.01, text: two,
  });
  const size = slider(view, {
    name: "batch_size", label: "batch size", limits: limits.batch_size, step: 1,
  });
  const drift = slider(view, {
    name: "drift", label: "drift per 100 steps", limits: limits.drift, step: 0.1,
    text: (value) => value.toFixed(1),
  });
  const cumulative = checkbox(
    view, "cumulative average (momentum=None)",
    () => view.model.get("momentum") === null,
    (on) => view.change({ momentum: on ? null : last }),
  );
  view.controls.append(momentum, size, drift, cumulative);
}

function momentumView({ model, el }) {
  const view = new View(model, el, ["momentum", "batch_size", "drift"]);
  const noise = float64s(model.get("_noise"));
  const parts = momentumElements();
  const picture = svg("svg", { class: "cbn-picture", role: "img" }, ...Object.values(parts));
  momentumControls(view);
  view.drawing.append(
    legend([
      { label: "mean of one batch", mark: "cbn-dots", shape: "dots" },
      { label: "running mean", mark: "cbn-running" },
      { label: "true mean", mark: "cbn-true" },
      { label: "effective memory", mark: "cbn-band", shape: "band" },
    ]),
    picture,
  );
  view.draw = (width) => {
    const state = momentumState(model, noise);
    const summary = momentumSummary(state);
    drawMomentum(parts, picture, state, width);
    picture.setAttribute("aria-label", summary);
    const drawn = {
      momentum: state.momentum, batch_size: state.size, drift: model.get("drift"),
      running_mean: state.running[state.steps - 1], true_mean: state.truth[state.steps - 1],
      lag: state.lag, noise: state.noise,
    };
    return { summary, drawn };
  };
  view.update();
  return () => view.close();
}

export default { render: momentumView };
