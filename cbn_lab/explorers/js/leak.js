// LeakExplorer: the measured graph behind a buffer, a column of nodes for each training step.

const BOX = { height: 20, row: 34, gap: 8, letter: 6.2, pad: 12 };
const COLUMN = { top: 26, gap: 40 };
const BUFFER = { width: 94, above: 44 }; // right of the graph, or above it where it is narrow
const FOLD = { width: 84, height: 40 };
const narrow = (width) => width < 460;
const BAR = { height: 84, label: 18, foot: 34 };

/** "torch::autograd::CopySlices" -> "CopySlices", "AddBackward0" -> "Add". */
const shortName = (name) => name.replace(/^.*::/, "").replace(/Backward\d*$/, "");

const boxWidth = (name) => shortName(name).length * BOX.letter + BOX.pad;

/**
 * The nodes of a recording as [{ name, links, step, sink, level }], levels counted downwards from
 * the step's first node. Sinks, the weights' AccumulateGrad, belong to all steps.
 */
export function graphNodes(recording) {
  const nodes = recording.new.flatMap((found, k) =>
    found.map(([name, links]) => ({ name, links, step: k + 1, sink: links.length === 0, level: 0 })));
  let moved = true;
  while (moved) { // longest paths; a step has some twenty nodes
    moved = false;
    for (const node of nodes) {
      for (const link of node.links) {
        const next = nodes[link];
        if (next.step === node.step && !next.sink && next.level <= node.level) {
          next.level = node.level + 1;
          moved = true;
        }
      }
    }
  }
  return nodes;
}

/** The nodes of one step by level, those that lead to an earlier step on the left. */
function rowsOf(nodes, step) {
  const rows = [];
  for (const node of nodes) {
    if (node.step === step && !node.sink) (rows[node.level] ??= []).push(node);
  }
  const back = (node) => node.links.some((k) => nodes[k].step < step && !nodes[k].sink);
  return rows.map((row) => [...row.filter(back), ...row.filter((node) => !back(node))]);
}

const rowWidth = (row) =>
  row.reduce((sum, { name }) => sum + boxWidth(name) + BOX.gap, -BOX.gap);

/** What of a recording is drawn after `step` steps in this width: the rest is folded. */
export function leakLayout(nodes, step, width) {
  const columns = [];
  let left = narrow(width) ? width : width - BUFFER.width - COLUMN.gap;
  for (let k = step; k >= 1; k--) {
    const rows = rowsOf(nodes, k);
    if (rows.length === 0) break;
    const wide = Math.max(...rows.map(rowWidth));
    const spare = k > 1 ? FOLD.width + COLUMN.gap / 2 : 0;
    if (columns.length > 0 && left - wide < spare) break;
    left -= wide;
    columns.push({ step: k, rows, left, wide });
    left -= COLUMN.gap;
  }
  const levels = Math.max(0, ...nodes.filter((node) => !node.sink).map((node) => node.level + 1));
  const folded = columns.length ? columns[columns.length - 1].step - 1 : 0;
  return { columns, levels, folded, top: COLUMN.top + (narrow(width) ? BUFFER.above : 0) };
}

/** Give every drawn node its place; nodes of folded steps get that of the fold. */
function placeNodes(nodes, layout, sinksTop) {
  const places = new Map();
  for (const { rows, left, wide } of layout.columns) {
    rows.forEach((row, level) => {
      let x = left + (wide - rowWidth(row)) / 2;
      for (const node of row) {
        const w = boxWidth(node.name);
        places.set(node, { x, y: layout.top + level * BOX.row, w });
        x += w + BOX.gap;
      }
    });
  }
  nodes.filter((node) => node.sink).forEach((node, k) => {
    places.set(node, { x: 0, y: sinksTop + k * (BOX.height + 6), w: boxWidth(node.name) });
  });
  return places;
}

function box(place, text, mark, title) {
  const { x, y, w, h = BOX.height } = place;
  const lines = text.split("\n");
  const label = svg("text", { x: x + w / 2, "text-anchor": "middle" }, ...lines.map((line, k) =>
    svg("tspan", { x: x + w / 2, y: y + h / 2 + 4 + 15 * (k - (lines.length - 1) / 2) }, line)));
  const frame = svg("rect", { x, y, width: w, height: h, rx: 4 });
  return svg("g", { class: `cbn-node ${mark}` }, svg("title", {}, title), frame, label);
}

/** The way from a node to one that it leads to. */
function edge(from, to, node, next, fold) {
  if (next.sink) { // down to the line that all steps share
    const x = from.x + from.w / 2;
    return `M${x} ${from.y + BOX.height}V${to.y + BOX.height / 2}H${to.x + to.w}`;
  }
  if (to === undefined || next.step < node.step) {
    const [x, y] = [from.x, from.y + BOX.height / 2];
    const [u, v] = to === undefined
      ? [fold.x + fold.w, fold.y + fold.h / 2] : [to.x + to.w, to.y + BOX.height / 2];
    return `M${x} ${y}C${x - 22} ${y} ${u + 22} ${v} ${u} ${v}`;
  }
  return `M${from.x + from.w / 2} ${from.y + BOX.height}L${to.x + to.w / 2} ${to.y}`;
}

/** The buffer, its line to the newest node, and what is said where there is none. */
function bufferParts(layout, places, step, width) {
  const above = layout.top > COLUMN.top;
  const place = { x: width - BUFFER.width - 1, y: above ? 1 : layout.top, w: BUFFER.width };
  const parts = [box(place, "running_mean", "cbn-buffer", "the buffer")];
  const middle = place.y + BOX.height / 2;
  const [column] = layout.columns;
  if (column === undefined) {
    const text = step === 0 ? "no step yet" : "no grad_fn: nothing behind it";
    const x = place.x - 10;
    return [...parts, svg("text", { x, y: middle + 4, "text-anchor": "end" }, text)];
  }
  const root = places.get(column.rows[0][0]);
  const x = root.x + root.w / 2;
  const d = above
    ? `M${place.x} ${middle}H${x}V${root.y}` : `M${place.x} ${middle}L${root.x + root.w} ${middle}`;
  return [svg("path", { class: "cbn-edges", d }), ...parts];
}

function columnTitle(column, step, top) {
  const text = column.step === step ? `step ${step} (new)` : `step ${column.step}`;
  const x = column.left + column.wide / 2;
  return top > COLUMN.top // beside the line that comes down from the buffer
    ? svg("text", { x: x - 8, y: top - 12, "text-anchor": "end" }, text)
    : svg("text", { x, y: top - 12, "text-anchor": "middle" }, text);
}

/** The box of a node, made once and then moved: to lay out its text is what costs. */
function moved(node, { x, y, w }, mark) {
  node.box ??= box({ x: 0, y: 0, w }, shortName(node.name), "", node.name);
  return set(node.box, { class: `cbn-node ${mark}`, transform: `translate(${x} ${y})` });
}

/** Have a group hold just these children; those that it has already are not touched. */
function keep(group, children) {
  const wanted = new Set(children);
  for (const child of [...group.children]) wanted.has(child) || child.remove();
  for (const child of children) child.parentNode === group || group.append(child);
}

function graphPicture() {
  const parts = { edges: svg("path", { class: "cbn-edges" }), boxes: svg("g"), notes: svg("g") };
  return { ...parts, picture: svg("svg", { class: "cbn-picture", role: "img" }, ...Object.values(parts)) };
}

function drawGraph({ picture, edges: lines, boxes, notes }, nodes, { nodes: count, step }, width) {
  const layout = leakLayout(nodes, step, width);
  const height = layout.top + layout.levels * BOX.row;
  const places = placeNodes(nodes, layout, height);
  const fold = { x: 1, y: layout.top - 10, w: FOLD.width, h: FOLD.height };
  const drawn = nodes.filter((node) => node.step <= step && places.has(node));
  const said = layout.columns.map((column) => columnTitle(column, step, layout.top));
  said.push(...bufferParts(layout, places, step, width));
  const edges = [];
  for (const node of drawn) {
    const fresh = node.step === step && !node.sink;
    const mark = node.sink ? "cbn-sink" : fresh ? "cbn-new" : "cbn-old";
    moved(node, places.get(node), mark);
    for (const k of node.links) {
      edges.push(edge(places.get(node), places.get(nodes[k]), node, nodes[k], fold));
    }
  }
  if (layout.folded > 0) {
    const steps = layout.folded === 1 ? "step 1" : `steps 1–${layout.folded}`;
    said.push(box(fold, `${steps}\n${count - drawn.length} nodes`, "cbn-fold", "older steps"));
  }
  const sinks = drawn.filter((node) => node.sink).length;
  set(picture, { width, height: Math.max(height, 60) + sinks * (BOX.height + 6) });
  set(lines, { d: edges.join("") });
  keep(boxes, drawn.map((node) => node.box));
  notes.replaceChildren(...said);
}

function barPicture(steps) {
  const label = svg("text", { "text-anchor": "middle" });
  const parts = { axes: svg("g"), bars: svg("g"), label };
  parts.bars.append(...Array.from({ length: steps }, () => svg("rect")));
  return { ...parts, picture: svg("svg", { class: "cbn-picture", role: "img" }, ...Object.values(parts)) };
}

/** Both axes and their numbers; drawn again only where the width has changed. */
function drawBarAxes(group, x, y, steps, most, width) {
  if (group.dataset.key === String(width)) return;
  group.dataset.key = width;
  const bottom = BAR.label + BAR.height;
  const middle = { "text-anchor": "middle" };
  const parts = [svg("path", { class: "cbn-line", d: `M${x(0)} ${BAR.label}V${bottom}H${x(steps)}` })];
  for (const { value, text } of ticks(0, most, 3)) {
    parts.push(
      svg("path", { class: "cbn-line", d: `M${x(0)} ${y(value)}h-4` }),
      svg("text", { x: x(0) - 7, y: y(value) + 4, "text-anchor": "end" }, text),
    );
  }
  for (let k = 1; k <= steps; k += k === 1 ? 3 : 4) {
    parts.push(svg("text", { x: x(k - 0.5), y: bottom + 15, ...middle }, String(k)));
  }
  parts.push(svg("text", { x: x(steps / 2), y: bottom + 31, ...middle }, "training step"));
  group.replaceChildren(...parts);
}

/** Nodes after each step; the scale is the same for all forms, so that they can be compared. */
function drawBars({ picture, axes, bars, label }, recording, step, most, width) {
  const steps = recording.nodes.length;
  const bottom = BAR.label + BAR.height;
  const x = scale([0, steps], [34, Math.min(width, 520)]);
  const y = scale([0, most], [bottom, BAR.label]);
  drawBarAxes(axes, x, y, steps, most, width);
  recording.nodes.forEach((count, k) => {
    const shown = y(k < step ? count : 0);
    set(bars.children[k], {
      class: k + 1 === step ? "cbn-bar cbn-bar-now" : "cbn-bar",
      x: x(k) + 1.5, y: shown, width: x(1) - x(0) - 3, height: bottom - shown,
    });
  });
  const last = step === 0 ? "" : recording.nodes[step - 1];
  set(label, { x: x(step - 0.5), y: y(last || 0) - 4 });
  write(label, String(last));
  set(picture, { width, height: bottom + BAR.foot });
}

/** Python's f"{value:,}". */
const grouped = (value) => String(value).replace(/\B(?=(\d{3})+$)/g, ",");

function leakState(model) {
  const [update, step] = [model.get("update"), model.get("step")];
  const backward = model.get("backward");
  const recording = model.get("_recordings")[`${update} ${backward ? "backward" : "forward"}`];
  const at = (counts) => (step === 0 ? 0 : counts[step - 1]);
  return {
    update, step, backward, recording,
    leaks: model.get("_leaks").includes(update),
    nodes: at(recording.nodes), bytes: at(recording.bytes),
    fresh: at(recording.new.map((found) => found.length)),
  };
}

/** Word for word the summary of explorers/leak.py. */
function leakSummary({ update, leaks, step, nodes, fresh, bytes }) {
  const behind = nodes === 0
    ? "no node behind running_mean."
    : `${nodes} nodes behind running_mean, ${fresh} of them new; `
      + `they keep ${grouped(bytes)} bytes of tensors.`;
  return `Update ${update}, which ${leaks ? "leaks" : "does not leak"}: `
    + `after ${step} step${step === 1 ? "" : "s"} ${behind}`;
}

function choice(view, name, label, options) {
  const select = keepKeys(html("select", { class: "cbn-select" }));
  select.append(...options.map((option) => html("option", { value: option }, option)));
  view.listen(select, "change", () => view.change({ [name]: select.value }));
  view.follow(() => (select.value = view.model.get(name)));
  return html("label", { class: "cbn-control" }, html("span", {}, label), select);
}

function leakControls(view) {
  const { model } = view;
  const last = model.get("_steps");
  const next = button(view, "step", () =>
    view.change({ step: Math.min(model.get("step") + 1, last) }));
  const reset = button(view, "reset", () => view.change({ step: 0 }));
  // Not `disabled`: the button that was pressed last would lose the focus.
  view.follow(() => next.setAttribute("aria-disabled", model.get("step") === last));
  view.controls.append(
    choice(view, "update", "form of update", model.get("_updates")),
    slider(view, { name: "step", label: "steps done", limits: [0, last], step: 1 }),
    html("span", { class: "cbn-buttons" }, next, reset),
    checkbox(view, "each step calls loss.backward()", () => model.get("backward"),
      (on) => view.change({ backward: on })),
  );
}

function leakView({ model, el }) {
  const view = new View(model, el, ["update", "step", "backward"]);
  const graph = graphPicture();
  const bars = barPicture(model.get("_steps"));
  const code = html("code");
  const nodesOf = new Map(); // of each recording, found when it is first shown
  const all = Object.values(model.get("_recordings"));
  const most = Math.max(...all.flatMap((recording) => recording.nodes));
  leakControls(view);
  view.root.style.setProperty("--cbn-label", "7em");
  view.drawing.append(
    html("pre", { class: "cbn-code" }, code),
    graph.picture,
    html("p", { class: "cbn-hint" },
      "Each box is a node of the autograd graph; lines lead to what it was computed from. "
      + "Thick border: new in this step. Hover for a node's full name."),
    html("p", { class: "cbn-subtitle" }, "nodes behind running_mean"),
    bars.picture,
  );
  view.draw = (width) => {
    const state = leakState(model);
    const { recording, step } = state;
    if (!nodesOf.has(recording)) nodesOf.set(recording, graphNodes(recording));
    write(code, model.get("_code")[state.update]);
    drawGraph(graph, nodesOf.get(recording), state, width);
    drawBars(bars, recording, step, most, width);
    const summary = leakSummary(state);
    graph.picture.setAttribute("aria-label", `The graph behind the buffer. ${summary}`);
    bars.picture.setAttribute("aria-label",
      `Nodes after each step: ${recording.nodes.slice(0, step).join(", ") || "no step yet"}.`);
    const { update, backward, nodes, bytes } = state;
    return { summary, drawn: { update, step, backward, nodes, bytes } };
  };
  view.update();
  return () => view.close();
}

export default { render: leakView };
