// A sheet of blocks, one under the other: headings, facts, notices, commands, tables, histograms, grids of these.

const BLOCKS = { heading, section, facts, notice, command, table, histogram, grid, prose, pager };

function blocks(root, list) {
  return list.map((block) => BLOCKS[block.kind](root, block));
}

function heading(root, block) {
  const crumbs = (block.crumbs || []).flatMap((crumb) => [
    crumb.href ? link(crumb.href, {}, crumb.text) : make("span", {}, crumb.text),
    make("span", { class: "slash", "aria-hidden": "true" }, "/"),
  ]);
  return make(
    "header",
    { class: "heading" },
    crumbs.length ? make("nav", { class: "crumbs", "aria-label": "where this is" }, crumbs.slice(0, -1)) : null,
    make("h1", { class: block.mono ? "mono" : "" }, block.title),
    block.note ? make("p", { class: "note" }, block.note) : null,
  );
}

function section(root, block) {
  return make("div", { class: "section" }, make("h2", {}, block.title), block.note ? make("span", { class: "note" }, block.note) : null);
}

function prose(root, block) {
  return make("p", { class: block.small ? "prose note" : "prose" }, parts(block.parts));
}

function facts(root, block) {
  return make(
    "dl",
    { class: "facts" },
    block.items.map((item) =>
      make(
        "div",
        { title: item.title },
        make("dt", {}, item.label),
        make("dd", {}, item.href ? link(item.href, {}, item.value) : item.value),
      ),
    ),
  );
}

function parts(list) {
  return list.map((part) => (part.code ? make("code", {}, part.code) : part.text));
}

function notice(root, block) {
  return make("div", { class: `notice ${block.tone}`, role: block.tone === "error" ? "alert" : "status" }, make("p", {}, parts(block.parts)));
}

function command(root, block) {
  return make("div", { class: "command" }, make("code", {}, block.text), copyButton(block.text), block.why ? make("span", { class: "note" }, block.why) : null);
}

function copyButton(text) {
  const copy = make("button", { type: "button", class: "copy", "aria-label": `copy the command ${text}` }, "copy");
  copy.addEventListener("click", async (event) => {
    event.stopPropagation();
    await navigator.clipboard.writeText(text);
    copy.textContent = "copied";
    setTimeout(() => (copy.textContent = "copy"), 1500);
  });
  return copy;
}

function grid(root, block) {
  return make(
    "div",
    { class: "grid", vars: { "--least": block.least } },
    block.cells.map((cell) => make("div", { class: "cell" }, blocks(root, cell))),
  );
}

function pager(root, block) {
  if (!block.pages.length) return make("div");
  return make(
    "nav",
    { class: "pager", "aria-label": "pages of the table" },
    make("span", { class: "muted" }, "page"),
    block.pages.map((page) =>
      page.current ? make("strong", { "aria-current": "page" }, page.text) : link(page.href, {}, page.text),
    ),
  );
}

// --- tables ----------------------------------------------------------------------------------------------------------

function table(root, block) {
  if (!block.rows.length) return make("p", { class: "empty" }, parts(block.empty || [{ text: "Nothing here." }]));
  const head = make(
    "tr",
    {},
    block.columns.map((column) => headCell(column)),
  );
  const body = block.rows.map((row) => {
    const cells = block.columns.map((column, i) => cell(root, column, row, row.cells[i], i));
    const line = make("tr", { class: row.href ? "linked" : "", "aria-current": row.current ? "true" : null }, cells);
    // The whole row is a target for the mouse; the keyboard has the link in its first cell.
    if (row.href) line.addEventListener("click", () => getSelection().isCollapsed && go(row.href));
    return line;
  });
  return make(
    "div",
    { class: "scroll", tabindex: "-1" },
    make(
      "table",
      { class: `${block.dense ? "dense" : ""} ${block.pinned ? "pinned" : ""}` },
      block.caption ? make("caption", {}, block.caption) : null,
      make("thead", {}, head),
      make("tbody", {}, body),
    ),
  );
}

function headCell(column) {
  const arrow = column.sorted ? (column.sorted === "ascending" ? " ↑" : " ↓") : "";
  const name = column.href ? link(column.href, { class: "sorter" }, column.label + arrow) : column.label;
  return make("th", { scope: "col", class: column.align || "", style: column.width ? `width: ${column.width}` : null, title: column.title, "aria-sort": column.sorted || null }, name);
}

// A strip's tooltips are as in strips.js; its keyboard is the row's link.
function stripCell(root, strip) {
  const line = lineOf(strip, strip.scale);
  const tip = () => tooltip(root);
  line.addEventListener("pointermove", (event) => {
    const span = event.target.closest(".t");
    if (span) tip().show(describe(strip, Number(span.dataset.i)), event.clientX, event.clientY);
    else tip().hide();
  });
  line.addEventListener("pointerleave", () => tip().hide());
  return line;
}

function contentOf(root, data) {
  if (data.strip) return stripCell(root, data.strip);
  if (data.parts) return parts(data.parts);
  if (data.code) return [make("code", {}, data.code), copyButton(data.code)];
  if (!data.tokens) return String(data.text ?? "");
  const before = data.before ? make("span", { class: "note" }, `${data.before} `) : null;
  return [before, ...data.tokens.map((token) => make("span", { class: "token", title: token }, token))];
}

function cell(root, column, row, value, position) {
  const data = value !== null && typeof value === "object" ? value : { text: value };
  const href = data.href || (position === 0 ? row.href : null);
  const classes = [column.align, column.mono || data.mono ? "mono" : "", column.muted ? "muted" : "", data.tone]
    .filter(Boolean)
    .join(" ");
  const content = contentOf(root, data);
  const tag = position === 0 ? "th" : "td";
  const node = make(
    tag,
    { class: classes, title: data.title, scope: position === 0 ? "row" : null },
    href ? link(href, {}, content) : content,
    data.aside ? make("span", { class: "aside" }, data.aside) : null,
    data.sub ? make("span", { class: "sub" }, data.sub) : null,
  );
  if (data.bar !== undefined) {
    node.classList.add("bar", data.bar < 0 ? "negative" : "positive");
    node.style.setProperty("--part", `${Math.min(100, Math.abs(data.bar) * 100)}%`);
  }
  return node;
}

// --- histograms ------------------------------------------------------------------------------------------------------

function histogram(root, block) {
  const width = 420;
  const height = block.height || 120;
  const [left, bottom, top] = [34, 18, 6];
  const beside = block.beside || [];
  const most = Math.max(1, ...block.counts, ...beside.flatMap((other) => other.counts));
  // Log counts with one added, so that a bin of one is seen next to a bin of a million.
  const scale = (count) => (Math.log10(count + 1) / Math.log10(most + 1)) * (height - bottom - top);
  const step = (width - left) / block.counts.length;
  const tip = tooltip(root);
  const bars = block.counts.map((count, i) => {
    const bar = make("rect", {
      class: count ? "bin" : "bin none",
      x: left + i * step + 0.5,
      y: height - bottom - scale(count),
      width: Math.max(1, step - 1),
      height: scale(count),
    });
    const target = make("rect", { class: "target", x: left + i * step, y: 0, width: step, height: height - bottom });
    target.addEventListener("pointermove", (event) =>
      tip.show(
        [
          `${count.toLocaleString("en")} ${block.unit}`,
          `${shortNumber(block.edges[i])} – ${shortNumber(block.edges[i + 1])}`,
          ...beside.map((other) => `${other.name}: ${other.counts[i].toLocaleString("en")}`),
        ],
        event.clientX,
        event.clientY,
      ),
    );
    target.addEventListener("pointerleave", () => tip.hide());
    return make("g", {}, bar, target);
  });
  const outlines = beside.map((other, number) => {
    const heights = other.counts.map((count) => (height - bottom - scale(count)).toFixed(1));
    const path = heights.map((y, i) => `${i ? "" : `M${left} ${height - bottom}`}V${y}H${(left + (i + 1) * step).toFixed(1)}`);
    return make("path", { class: `outline o${number}`, d: path.join("") });
  });
  const names = beside.map((other, number) =>
    make("span", { class: "named" }, make("svg", { viewBox: "0 0 18 8", "aria-hidden": "true" }, make("path", { class: `outline o${number}`, d: "M0 4H18" })), other.name),
  );
  const first = block.edges[0];
  const last = block.edges[block.edges.length - 1];
  const across = (value) => left + ((value - first) / (last - first || 1)) * (width - left);
  const labels = ticks(first, last, 5).map((value) =>
    make("text", { x: across(value), y: height - 4, class: "x" }, shortNumber(value)),
  );
  const powers = [];
  for (let power = 0; 10 ** power <= most; power += Math.max(1, Math.ceil(Math.log10(most) / 4))) {
    const y = height - bottom - scale(10 ** power);
    powers.push(make("line", { class: "rule", x1: left, x2: width, y1: y, y2: y }));
    powers.push(make("text", { class: "y", x: left - 4, y: y + 3.5 }, shortCount(10 ** power)));
  }
  return make(
    "figure",
    { class: "histogram" },
    make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": block.label }, powers, bars, outlines, labels),
    block.note || names.length ? make("figcaption", { class: "note" }, block.note, names) : null,
  );
}

function shortCount(count) {
  return count >= 1e6 ? `${count / 1e6}M` : count >= 1e3 ? `${count / 1e3}k` : String(count);
}

export default function (component) {
  const root = rootOf(component);
  root.tooltipBox = null;
  root.classList.add("sheet");
  root.replaceChildren(...blocks(root, component.data.blocks));
}
