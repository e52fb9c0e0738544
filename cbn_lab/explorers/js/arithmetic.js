// The arithmetic of the explorers: pure functions, tested against torch.
// Whoever changes a formula here changes it in the Python module that it names, too.

/** Weight of the new batch (running_stats.py); momentum null asks for the cumulative average. */
export function averageFactor(momentum, batchesTracked) {
  return momentum === null ? 1 / batchesTracked : momentum;
}

/** The true mean at steps 1, 2, ...: drifts by `drift` in 100 steps (explorers/momentum.py). */
export function trueMeans(start, drift, steps) {
  return Array.from({ length: steps }, (_, k) => start + (drift * (k + 1)) / 100);
}

/** Mean of the first `size` values of each row of noise, plus the true mean of that step. */
export function batchMeans(noise, means, size) {
  const columns = noise.length / means.length;
  return means.map((mean, row) => {
    let sum = 0;
    for (let k = row * columns; k < row * columns + size; k++) sum += noise[k];
    return mean + sum / size;
  });
}

/** running = (1 − f)·running + f·batch, from 0 (running_stats.py). */
export function runningMeans(batches, momentum) {
  let running = 0;
  return batches.map((batch, k) => {
    const f = averageFactor(momentum, k + 1);
    running = running * (1 - f) + batch * f;
    return running;
  });
}

/** What each batch counts for in the last running mean. */
export function batchWeights(momentum, steps) {
  return Array.from({ length: steps }, (_, k) =>
    momentum === null ? 1 / steps : momentum * (1 - momentum) ** (steps - 1 - k),
  );
}

export function dot(a, b) {
  return a.reduce((sum, value, k) => sum + value * b[k], 0);
}
