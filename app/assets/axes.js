// Axes of charts: where values lie between two ends, and the round numbers marked there.

// `log` is a wish: granted where all values are positive and `apart` times apart. `pad` is the share of the axis left free
// at either end; `base` 2 marks powers of two; beyond `most` nothing is marked; `ratio` is the least of the two ends.
function axisOf(values, log, from, to, { pad = 0, base = 10, zero = false, most = null, ratio = 1, apart = 3 } = {}) {
  let low = Math.min(...values);
  let high = Math.max(...values);
  if (low > 0 && high / low < ratio) {
    const more = Math.sqrt((ratio * low) / high);
    [low, high] = [low / more, high * more];
  }
  const far = log && low > 0 && high / low > apart;
  if (far) [low, high] = [Math.log10(low), Math.log10(high)];
  if (!log && zero && low > 0 && low < high * 0.35) low = 0;
  if (high === low && low === 0) high = 1;
  if (high === low) [low, high] = [low - (Math.abs(low) * 0.1 || 0.5), high + (Math.abs(high) * 0.1 || 0.5)];
  [low, high] = [low - pad * (high - low), high + pad * (high - low)];
  const at = (value) => from + (((far ? Math.log10(value) : value) - low) / (high - low)) * (to - from);
  const marks = (far ? logMarks(10 ** low, 10 ** high, base) : ticks(low, high, 4)).filter((mark) => most === null || mark <= most);
  return { at, marks, log: far, write: (mark) => shortTick(mark, far ? mark : marks[1] - marks[0]) };
}

// Powers, where there are three of them; else 1, 2, 5; else whatever is round.
function logMarks(low, high, base) {
  const [first, last] = [low, high].map((value) => Math.log(value) / Math.log(base));
  const powers = [];
  for (let power = Math.floor(first); power <= Math.ceil(last); power++) powers.push(base ** power);
  const within = (mark) => mark >= low && mark <= high;
  const found = powers.filter(within);
  if (base === 2) return found.length > 7 ? found.filter((_, i) => i % 2 === 0) : found;
  if (found.length >= 3) return found;
  const finer = powers.flatMap((power) => [power, 2 * power, 5 * power]).filter(within);
  return finer.length >= 3 ? finer : ticks(low, high, 6);
}

// With as many digits as marks that are `step` apart need.
function shortTick(value, step) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${+(value / 1e9).toPrecision(3)}G`;
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  if (size > 0 && size < 1e-3) return value.toExponential(0);
  const digits = step > 0 ? Math.ceil(Math.log10(size / step)) + 1 : 3;
  return String(+value.toPrecision(Math.min(6, Math.max(3, digits))));
}
