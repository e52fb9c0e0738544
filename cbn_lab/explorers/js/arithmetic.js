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

/** Mean [re, im] and biased covariance [rr, ii, ri] (kernels/reference.py, moments). */
export function moments(re, im) {
  const n = re.length;
  let [meanRe, meanIm, rr, ii, ri] = [0, 0, 0, 0, 0];
  for (let k = 0; k < n; k++) {
    meanRe += re[k];
    meanIm += im[k];
  }
  meanRe /= n;
  meanIm /= n;
  for (let k = 0; k < n; k++) {
    const [x, y] = [re[k] - meanRe, im[k] - meanIm];
    rr += x * x;
    ii += y * y;
    ri += x * y;
  }
  return { mean: [meanRe, meanIm], covar: [rr / n, ii / n, ri / n] };
}

/** R = (V + eps)^(−1/2) as [R00, R01, R10, R11] (whitening.py). */
export function whiteningMatrix([rr, ii, ri], eps) {
  const det = Math.max(rr * ii - ri * ri, 0) + eps * (rr + ii) + eps * eps;
  const s = Math.sqrt(det);
  const t = Math.sqrt(rr + ii + 2 * eps + 2 * s);
  return [ii + eps + s, -ri, -ri, rr + eps + s].map((entry) => entry / (s * t));
}

/** What the naive form does instead: each part by its own standard deviation. */
export function naiveMatrix([rr, ii], eps) {
  return [1 / Math.sqrt(rr + eps), 0, 0, 1 / Math.sqrt(ii + eps)];
}

/** V^(1/2) = (V + s)/t, with s and t as in the whitening matrix. */
export function rootMatrix([rr, ii, ri]) {
  const s = Math.sqrt(Math.max(rr * ii - ri * ri, 0));
  const t = Math.sqrt(rr + ii + 2 * s);
  return [rr + s, ri, ri, ii + s].map((entry) => entry / t);
}

export function product([a, b, c, d], [e, f, g, h]) {
  return [a * e + b * g, a * f + b * h, c * e + d * g, c * f + d * h];
}

/** matrix·(point − centre) + shift for all points. */
export function transformed([a, b, c, d], re, im, centre = [0, 0], shift = [0, 0]) {
  const [outRe, outIm] = [new Float64Array(re.length), new Float64Array(re.length)];
  for (let k = 0; k < re.length; k++) {
    const [x, y] = [re[k] - centre[0], im[k] - centre[1]];
    outRe[k] = a * x + b * y + shift[0];
    outIm[k] = c * x + d * y + shift[1];
  }
  return { re: outRe, im: outIm };
}

/** Variances along the axes of the ellipse, the larger first, and the angle of its long axis. */
export function principalAxes([rr, ii, ri]) {
  const [half, radius] = [(rr + ii) / 2, Math.hypot((rr - ii) / 2, ri)];
  return {
    variances: [half + radius, Math.max(half - radius, 0)],
    angle: Math.atan2(2 * ri, rr - ii) / 2,
  };
}

/** The covariance whose ellipse has these half axes (1σ), the first at this angle. */
export function covarianceOf(angle, [first, second]) {
  const [c, s, a, b] = [Math.cos(angle), Math.sin(angle), first * first, second * second];
  return [a * c * c + b * s * s, a * s * s + b * c * c, (a - b) * c * s];
}

export function axisRatio(covar) {
  const { variances: [long, short] } = principalAxes(covar);
  return Math.sqrt(long / short);
}
