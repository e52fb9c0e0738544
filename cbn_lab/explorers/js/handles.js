// Handles that turn and stretch the axes of an ellipse, by pointer and by keyboard.

const TURN = Math.PI / 90; // 2° for a key press

/**
 * The axes of an ellipse as two handles see them: the first at `angle`, the second a quarter turn
 * on. Of the four ways to name them, the one nearest to the angle before, so that a handle stays
 * on its axis when that becomes the shorter one.
 */
function namedAxes(covar, before) {
  const { variances, angle } = principalAxes(covar);
  const [long, short] = variances.map(Math.sqrt);
  if (before === null) return { angle, lengths: [long, short] };
  if (long - short < 1e-9 * long) return { angle: before, lengths: [long, short] };
  const quarter = Math.PI / 2;
  const turns = Math.round((before - angle) / quarter);
  return {
    angle: angle + turns * quarter,
    lengths: turns % 2 === 0 ? [long, short] : [short, long],
  };
}

/** What a key does to the axis of a handle; null for keys that are not ours. */
function keyMove(key, angle, length, [shortest, longest]) {
  const moves = {
    ArrowLeft: [angle + TURN, length],
    ArrowRight: [angle - TURN, length],
    ArrowUp: [angle, length * 1.05],
    ArrowDown: [angle, length / 1.05],
    PageUp: [angle, length * 1.3],
    PageDown: [angle, length / 1.3],
    Home: [angle, shortest],
    End: [angle, longest],
  };
  return moves[key] ?? null;
}

/**
 * One handle. `move(angle, length)` is told where its end should go; `toData(event)` gives the
 * place of the pointer relative to the centre of the ellipse.
 */
function handle(view, { label, knob, limits, get, move, toData }) {
  const element = keepKeys(
    svg("g", { class: "cbn-handle", tabindex: 0, role: "slider", "aria-label": label },
      svg("circle", { class: "cbn-target", r: 16 }), knob),
  );
  const held = (event) => {
    const [x, y] = toData(event);
    move(Math.atan2(y, x), Math.hypot(x, y));
  };
  view.listen(element, "pointerdown", (event) => {
    element.setPointerCapture(event.pointerId);
    element.focus();
    event.preventDefault();
  });
  view.listen(element, "pointermove", (event) => {
    if (element.hasPointerCapture(event.pointerId)) held(event);
  });
  view.listen(element, "keydown", (event) => {
    const moved = keyMove(event.key, ...get(), limits);
    if (moved === null || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    move(...moved);
  });
  return element;
}

function placeHandle(element, [x, y], angle, length, limits) {
  const degrees = (((angle * 180) / Math.PI) % 360 + 360) % 360;
  set(element, {
    transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`,
    "aria-valuemin": limits[0].toFixed(2),
    "aria-valuemax": limits[1].toFixed(2),
    "aria-valuenow": length.toFixed(2),
    "aria-valuetext": `length ${length.toFixed(2)}, angle ${degrees.toFixed(0)}°`,
  });
}
