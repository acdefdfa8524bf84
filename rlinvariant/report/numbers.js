// What the charts of a page compute and say of numbers. It is computed as report/stats.py does: running means of each seed, then
// mean and 95 % interval over seeds.
const numbers = (() => {
  const isNumber = (x) => typeof x === "number";
  const runningMean = (values, window) => values.map((value, i) => {
    if (!isNumber(value)) return value;
    let sum = 0, count = 0;
    for (let k = Math.max(0, i - (window >> 1)); k <= Math.min(values.length - 1, i + (window >> 1)); k++)
      if (isNumber(values[k])) { sum += values[k]; count++; }
    return sum / count;
  });
  const curve = (seeds, t) => {  // of [seeds][steps], with quantiles of t: null is a row that is not there, "-" is no number and leaves a gap
    const mean = [], low = [], high = [];
    for (let i = 0; i < seeds[0].length; i++) {
      const values = seeds.map((seed) => seed[i]).filter((x) => x !== null);
      if (!values.length || !values.every(isNumber)) { mean.push(null); low.push(null); high.push(null); continue; }
      const equal = values.every((x) => x === values[0]), n = values.length;
      const centre = equal ? values[0] : values.reduce((a, b) => a + b) / n;
      const squares = equal ? 0 : values.reduce((sum, x) => sum + (x - centre) ** 2, 0);
      const half = n > 1 ? t[n] * Math.sqrt(squares / (n - 1) / n) : null;
      mean.push(centre);
      low.push(half === null ? null : centre - half);
      high.push(half === null ? null : centre + half);
    }
    return {mean, low, high};
  };
  const before = (sorted, x) => {  // the index of the last that is at most x
    let low = 0, high = sorted.length - 1;
    while (low < high) { const middle = (low + high + 1) >> 1; if (sorted[middle] <= x) low = middle; else high = middle - 1; }
    return low;
  };
  const between = (from, to, x) => {
    const i = Math.min(before(from, x), from.length - 2);
    return from.length < 2 ? to[0] : to[i] + (to[i + 1] - to[i]) * (x - from[i]) / (from[i + 1] - from[i]);
  };
  const nearest = (sorted, x) => {
    const i = before(sorted, x);
    return i + 1 < sorted.length && sorted[i + 1] - x < x - sorted[i] ? i + 1 : i;
  };

  // what is said of numbers

  const number = (x) => x === null ? "no number"
    : x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e6) ? (+x.toPrecision(4)).toExponential()
    : Math.abs(x - 1) < 1e-4 && x !== 1 ? "1 " + (x < 1 ? "− " : "+ ") + Math.abs(x - 1).toExponential(1)
    : String(+x.toPrecision(4));
  const ticks = (values) => values.map((x) => {  // multiples of one step, of which `number` would show the nearest as equal
    const digits = +x.toPrecision(12), small = x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e6);
    return (small ? digits.toExponential() : String(digits)).replaceAll("-", "−");
  });
  const large = (x) => x >= 1e9 ? +(x / 1e9).toPrecision(3) + "G" : x >= 1e6 ? +(x / 1e6).toPrecision(3) + "M"
    : x >= 1e4 ? +(x / 1e3).toPrecision(3) + "k" : x.toLocaleString("en-US");
  const duration = (s) => s >= 7200 ? +(s / 3600).toPrecision(3) + " h" : s >= 120 ? +(s / 60).toPrecision(3) + " min" : +s.toPrecision(3) + " s";

  return {isNumber, runningMean, curve, between, nearest, number, ticks, large, duration};
})();
