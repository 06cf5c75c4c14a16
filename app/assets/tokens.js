// Tokens with their activations: how strong and which sign is said by colour, by the underline's kind and thickness, and
// in numbers by the tooltip.

const LEVELS = [0.02, 0.25, 0.5, 0.75];

function strength(value, scale) {
  return scale > 0 && value ? Math.min(1, Math.abs(value) / scale) : 0;
}

function tokenSpan(strip, i, scale, blocks) {
  const value = strip.values ? strip.values[i] : 0;
  const part = strength(value, scale);
  const classes = ["t"];
  if (part > 0) classes.push(value < 0 ? "minus" : "plus", `u${LEVELS.filter((level) => part >= level).length}`);
  if (i === strip.peak) classes.push("peak");
  if (i < strip.seen_from) classes.push("unseen");
  const text = strip.tokens[i];
  const shown = blocks && text.includes("↵") ? text.replaceAll("↵", "↵\n") : text;
  const span = make("span", { class: classes.join(" "), "data-i": i }, shown);
  if (part > 0) span.style.setProperty("--a", `${Math.round(12 + 62 * part)}%`);
  if (text.includes("↵")) span.classList.add("pale");
  return span;
}

function describe(strip, i) {
  const lines = [`“${strip.tokens[i]}”`];
  if (strip.values) lines.push(`activation ${shortNumber(strip.values[i])}`);
  const where = [];
  if (strip.positions) where.push(`position ${strip.positions[i]}`);
  if (strip.first_row !== null && strip.first_row !== undefined) where.push(`row ${(strip.first_row + i).toLocaleString("en")}`);
  if (strip.token_ids) where.push(`token id ${strip.token_ids[i]}`);
  if (where.length) lines.push(where.join(" · "));
  if (i < strip.seen_from) lines.push("in an earlier window of the model");
  if (strip.source) lines.push(strip.source);
  return lines;
}

// One line, aligned at its peak as in a concordance.
function lineOf(strip, scale) {
  const peak = strip.peak ?? 0;
  const left = make("div", { class: "left" });
  const right = make("div", { class: "right" });
  strip.tokens.forEach((_, i) => (i < peak ? left : right).append(tokenSpan(strip, i, scale, false)));
  return make("div", { class: "kwic" }, left, right);
}
