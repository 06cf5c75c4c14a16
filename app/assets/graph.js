// One attribution graph. Columns are token positions, rows are layers: inputs at the bottom, logits at the top. Edges lie
// on a canvas, nodes are SVG. Pointing at a node shows what goes into it and out of it; a click pins it.

const NODE = 15;
const ROW_GAP = 20;
const GUTTER = 64;
const EMPTY_ROW = 17;
const FOOT = 34;
const LOGIT_WIDTH = 76;
const LOGIT_HEIGHT = 31;

// --- layout: numbers only ----------------------------------------------------------------------------------------------

function rowOf(node, n_layers) {
  if (node.kind === "logit") return n_layers + 1;
  return node.layer === null ? 0 : node.layer + 1;
}

function layOut(data, shown, width) {
  const n_rows = data.n_layers + 2;
  const cells = new Map();
  for (const i of shown) {
    const node = data.nodes[i];
    const key = `${node.position}/${rowOf(node, data.n_layers)}`;
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(i);
  }
  const most = data.tokens.map((_, position) => {
    let count = 1;
    for (let row = 1; row < n_rows; row++) count = Math.max(count, (cells.get(`${position}/${row}`) || []).length);
    return count;
  });
  // Side by side while there is room; in a long prompt nodes stand in lines under one another instead.
  let wanted;
  let total;
  for (const abreast of [7, 5, 4, 3, 2]) {
    wanted = most.map((count) => Math.min(count, abreast) * NODE + 12);
    total = wanted.reduce((a, b) => a + b, 0);
    if (total <= width - GUTTER) break;
  }
  const spare = Math.max(0, width - GUTTER - total - 8);
  const least = data.tokens.map((token) => Math.min(90, token.length * 7 + 14));
  const missing = least.map((need, i) => Math.max(0, need - wanted[i]));
  const missed = missing.reduce((a, b) => a + b, 0) || 1;
  const text = Math.min(spare, missed);
  const widths = wanted.map((want, i) => want + (missing[i] / missed) * text + (spare - text) / wanted.length);
  const lefts = [];
  let x = GUTTER;
  for (const column of widths) {
    lefts.push(x);
    x += column;
  }
  const perLine = widths.map((column) => Math.max(1, Math.floor((column - 8) / NODE)));
  // Logits all belong to the last position, so they have their row to themselves: side by side, ending above it.
  const logits = [...cells.entries()].find(([key]) => key.endsWith(`/${n_rows - 1}`))?.[1] || [];
  const logitsPerLine = Math.max(1, Math.floor((x - GUTTER) / LOGIT_WIDTH));
  const heights = [];
  for (let row = 0; row < n_rows - 1; row++) {
    let lines = 0;
    for (let position = 0; position < widths.length; position++)
      lines = Math.max(lines, Math.ceil((cells.get(`${position}/${row}`) || []).length / perLine[position]));
    heights.push(lines ? lines * NODE + ROW_GAP : EMPTY_ROW);
  }
  heights.push(Math.ceil(logits.length / logitsPerLine) * LOGIT_HEIGHT + 10);
  // A small graph is spread out: edges between rows that touch cannot be told apart.
  const rows = heights.reduce((a, b) => a + b, 0);
  const full = heights.map((height, row) => height > EMPTY_ROW && row && row < n_rows - 1);
  const stretch = Math.max(0, 470 - rows) / (full.filter(Boolean).length || 1);
  heights.forEach((height, row) => (heights[row] = full[row] ? height + stretch : height));
  const tops = [];
  let y = 6;
  for (let row = n_rows - 1; row >= 0; row--) {
    tops[row] = y;
    y += heights[row];
  }
  const places = new Map();
  for (const [key, list] of cells) {
    const [position, row] = key.split("/").map(Number);
    const middle = lefts[position] + widths[position] / 2;
    if (row === n_rows - 1) {
      list.forEach((i, n) => {
        const line = Math.floor(n / logitsPerLine);
        const inLine = Math.min(logitsPerLine, list.length - line * logitsPerLine);
        places.set(i, {
          x: x - (inLine - (n % logitsPerLine) - 0.5) * LOGIT_WIDTH,
          y: tops[row] + 5 + (line + 0.5) * LOGIT_HEIGHT,
        });
      });
      continue;
    }
    const per = perLine[position];
    const lines = Math.ceil(list.length / per);
    list.forEach((i, n) => {
      const line = Math.floor(n / per);
      const inLine = Math.min(per, list.length - line * per);
      places.set(i, {
        x: middle + ((n % per) - (inLine - 1) / 2) * NODE,
        y: tops[row] + heights[row] / 2 + (line - (lines - 1) / 2) * NODE,
      });
    });
  }
  return { width: Math.max(x + 8, width), height: y + FOOT, lefts, widths, tops, heights, places, n_rows };
}

// --- the component -------------------------------------------------------------------------------------------------------

class Graph {
  constructor(component, root) {
    this.root = root;
    this.canvas = make("canvas", { "aria-hidden": "true" });
    this.rest = make("canvas");
    this.svg = make("svg", { role: "group", "aria-label": "attribution graph" });
    this.stage = make("div", { class: "stage" }, this.canvas, this.svg);
    this.frame = make("div", { class: "frame" }, this.stage);
    this.panel = make("aside", { class: "panel", "aria-live": "polite" });
    this.least = this.slider("Nodes", "least influence of a node that is shown");
    this.edge = this.slider("Edges", "least share of its target's inputs that an edge must have to be drawn");
    this.count = make("span", { class: "muted" });
    this.controls = make("div", { class: "controls" }, this.least.label, this.edge.label, this.count, legend());
    root.replaceChildren(make("div", { class: "main" }, this.controls, this.frame), this.panel);
    this.hovered = null;
    this.pinned = null;
    this.frame.addEventListener("scroll", () => this.keepLayers());
    new ResizeObserver(() => this.draw()).observe(this.frame);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTimeout(() => this.paintRest(), 300));
    this.take(component);
  }

  slider(name, why) {
    const input = make("input", { type: "range", min: 0, max: 100, value: 0, step: 1, "aria-label": why });
    const output = make("output", {});
    input.addEventListener("input", () => this.draw());
    return { input, output, label: make("label", { title: why }, name, input, output) };
  }

  take(component) {
    const fresh = !this.data || this.data.name !== component.data.name || this.data.nodes.length !== component.data.nodes.length;
    this.data = component.data;
    const { nodes, edges } = this.data;
    this.number = new Map(nodes.map((node, i) => [node.id, i]));
    this.into = nodes.map(() => []);
    this.out = nodes.map(() => []);
    edges.source.forEach((source, e) => {
      this.into[edges.target[e]].push(e);
      this.out[source].push(e);
    });
    const order = (list) => list.sort((a, b) => Math.abs(edges.weight[b]) - Math.abs(edges.weight[a]));
    this.into.forEach(order);
    this.out.forEach(order);
    this.pinned = this.number.has(this.data.pinned) ? this.number.get(this.data.pinned) : null;
    if (fresh) {
      this.hovered = null;
      this.largest = Math.max(1e-12, ...nodes.filter((node) => node.kind === "feature" || node.kind === "error").map((node) => node.influence));
      this.influences = nodes.map((node) => node.influence).sort((a, b) => a - b);
      this.least.input.value = nodes.length > 400 ? 60 : 0;
      this.edge.input.value = edges.source.length > 1500 ? 35 : 15;
    }
    this.draw();
    if (fresh) this.frame.scrollLeft = this.frame.scrollWidth; // to the prediction
  }

  // The slider's place is a rank: every step hides as many nodes as the last, whatever the scale of influence is.
  leastInfluence() {
    const place = Number(this.least.input.value) / 100;
    return place ? this.influences[Math.min(this.influences.length - 1, Math.floor(place * this.influences.length))] : 0;
  }

  leastShare() {
    return (Number(this.edge.input.value) / 100) ** 2 * 0.5;
  }

  draw() {
    const width = this.frame.clientWidth;
    if (!width || !this.data) return;
    const { nodes, edges } = this.data;
    const least = this.leastInfluence();
    const share = this.leastShare();
    const always = new Set(["token", "logit"]);
    this.shown = new Set(nodes.map((_, i) => i).filter((i) => always.has(nodes[i].kind) || nodes[i].influence >= least || i === this.pinned));
    this.drawn = edges.source
      .map((_, e) => e)
      .filter((e) => this.shown.has(edges.source[e]) && this.shown.has(edges.target[e]) && edges.share[e] >= share);
    this.least.output.textContent = least ? `influence ≥ ${shortNumber(least)}` : "all";
    this.edge.output.textContent = share ? `share ≥ ${shortNumber(share * 100)}%` : "all";
    this.count.textContent = `${this.shown.size} of ${nodes.length} nodes, ${this.drawn.length} of ${edges.source.length} edges`;
    this.place = layOut(this.data, this.shown, width - 2);
    this.buildNodes();
    this.paintRest();
  }

  buildNodes() {
    const { tokens, n_layers } = this.data;
    const { width, height, lefts, widths, tops, heights, places, n_rows } = this.place;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    for (const side of [this.svg, this.canvas]) {
      side.style.width = `${width}px`;
      side.style.height = `${height}px`;
    }
    this.stage.style.width = `${width}px`;
    const focused = this.root.getRootNode().activeElement?.dataset?.node;
    const parts = [];
    const names = [];
    for (let row = 0; row < n_rows; row++) {
      const y = tops[row];
      const name = row === 0 ? "input" : row === n_rows - 1 ? "logits" : String(row - 1);
      names.push(make("text", { class: "layer", x: 8, y: y + heights[row] / 2 + 4 }, row && row < n_rows - 1 ? `layer ${name}` : name));
    }
    tokens.forEach((token, position) => {
      const middle = lefts[position] + widths[position] / 2;
      const room = Math.max(1, Math.floor((widths[position] - 4) / 6.6));
      const text = token.length > room ? `${token.slice(0, Math.max(1, room - 1))}…` : token;
      parts.push(make("line", { class: "column", x1: lefts[position], x2: lefts[position], y1: 0, y2: height - FOOT + 4 }));
      const label = make("text", { class: "token", x: middle, y: height - 16 }, text);
      label.append(make("title", {}, `${token} (position ${position})`));
      parts.push(label, make("text", { class: "position", x: middle, y: height - 3 }, String(position)));
    });
    this.groups = new Map();
    for (const i of [...this.shown].sort((a, b) => this.orderKey(a) - this.orderKey(b))) {
      const group = this.nodeNode(i, places.get(i));
      this.groups.set(i, group);
      parts.push(group);
    }
    this.labels = make("g", { class: "labels", "aria-hidden": "true" });
    this.layers = make("g", { class: "layers" }, names);
    this.svg.replaceChildren(...parts, this.layers, this.labels);
    this.keepLayers();
    const first = this.pinned ?? this.groups.keys().next().value;
    this.groups.get(first)?.setAttribute("tabindex", "0");
    if (focused !== undefined) this.groups.get(Number(focused))?.focus();
  }

  // The names of the layers stay in sight when a wide graph is scrolled.
  keepLayers() {
    this.layers.setAttribute("transform", `translate(${this.frame.scrollLeft} 0)`);
  }

  orderKey(i) {
    const place = this.place.places.get(i);
    return -place.y * 10000 + place.x;
  }

  nodeNode(i, { x, y }) {
    const node = this.data.nodes[i];
    const size = 3 + 3.4 * Math.sqrt(Math.min(1, Math.max(0, node.influence) / this.largest));
    const shape = {
      feature: () => make("circle", { cx: x, cy: y, r: size }),
      error: () => make("polygon", { points: `${x - size},${y} ${x},${y - size} ${x + size},${y} ${x},${y + size}` }),
      token: () => make("rect", { x: x - size, y: y - size, width: 2 * size, height: 2 * size }),
      position: () => make("rect", { x: x - 3, y: y - 3, width: 6, height: 6 }),
      logit: () => make("rect", { x: x - 35, y: y - 13, width: 70, height: 27, rx: 2 }),
    }[node.kind]();
    const group = make(
      "g",
      {
        class: `node ${node.kind}`,
        tabindex: "-1",
        role: "button",
        "data-node": i,
        "aria-label": `${node.title}, value ${shortNumber(node.value)}, influence ${shortNumber(node.influence)}`,
      },
      shape,
    );
    if (node.kind === "logit") {
      const room = node.label.length > 9 ? `${node.label.slice(0, 8)}…` : node.label;
      group.append(make("text", { x, y: y - 1 }, room), make("text", { class: "probability", x, y: y + 10 }, node.share));
    }
    group.addEventListener("pointerenter", () => this.hover(i));
    group.addEventListener("pointerleave", () => this.hover(null));
    group.addEventListener("focus", () => this.hover(i));
    group.addEventListener("blur", () => this.hover(null));
    group.addEventListener("click", (event) => this.click(i, event));
    group.addEventListener("keydown", (event) => this.key(i, event));
    return group;
  }

  click(i, event) {
    const node = this.data.nodes[i];
    if (node.page && (event.ctrlKey || event.metaKey)) return void window.open(node.page, "_blank");
    if (node.page && this.pinned === i) return go(node.page);
    go(this.pinned === i ? this.data.unpin : node.here);
    this.pinned = this.pinned === i ? null : i;
    this.paint();
  }

  key(i, event) {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === "Enter" || event.key === " ") this.click(i, event);
    else if (event.key === "Escape" && this.pinned !== null) go(this.data.unpin);
    else if (way) this.groups.get(this.towards(i, way))?.focus();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  // The nearest node that way; sideways distance counts double, so that rows and columns are kept.
  towards(i, [dx, dy]) {
    const from = this.place.places.get(i);
    let best = i;
    let least = Infinity;
    for (const [other, to] of this.place.places) {
      const along = (to.x - from.x) * dx + (to.y - from.y) * dy;
      const aside = Math.abs(dx ? to.y - from.y : to.x - from.x);
      if (other !== i && along > 1 && along + 2 * aside < least) [best, least] = [other, along + 2 * aside];
    }
    this.groups.get(i).setAttribute("tabindex", "-1");
    this.groups.get(best).setAttribute("tabindex", "0");
    return best;
  }

  hover(i) {
    this.hovered = i;
    this.paint();
  }

  // Everything at rest, drawn once for each layout and colour scheme: pointing at a node then costs one copy of it and
  // the node's own edges, however many there are.
  paintRest() {
    const { width, height, tops, heights } = this.place;
    const scale = devicePixelRatio || 1;
    for (const side of [this.canvas, this.rest]) {
      side.width = Math.round(width * scale);
      side.height = Math.round(height * scale);
    }
    const style = getComputedStyle(this.root);
    this.colours = { plus: style.getPropertyValue("--positive"), minus: style.getPropertyValue("--negative") };
    const stripes = this.canvas.getContext("2d");
    stripes.setTransform(scale, 0, 0, scale, 0, 0);
    this.stripes = () => {
      stripes.globalAlpha = 0.55;
      stripes.fillStyle = style.getPropertyValue("--panel");
      for (let row = 1; row < heights.length; row += 2) stripes.fillRect(0, tops[row], width, heights[row]);
    };
    const pen = this.rest.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    for (const e of this.drawn) this.stroke(pen, e, 0.2 + 0.55 * Math.min(1, this.data.edges.share[e] * 1.5));
    this.paint();
  }

  stroke(pen, e, alpha) {
    const { edges, nodes } = this.data;
    const from = this.place.places.get(edges.source[e]);
    const to = this.place.places.get(edges.target[e]);
    const minus = edges.weight[e] < 0;
    const bend = Math.max(14, Math.abs(from.y - to.y) * 0.45);
    const low = to.y + (nodes[edges.target[e]].kind === "logit" ? 14 : 4);
    pen.globalAlpha = alpha;
    pen.strokeStyle = minus ? this.colours.minus : this.colours.plus;
    pen.lineWidth = 0.7 + 4 * Math.min(1, edges.share[e]);
    pen.setLineDash(minus ? [5, 3] : []);
    pen.beginPath();
    pen.moveTo(from.x, from.y - 4);
    pen.bezierCurveTo(from.x, from.y - bend, to.x, low + bend, to.x, low);
    pen.stroke();
  }

  paint() {
    const focus = this.hovered ?? this.pinned;
    const { edges, nodes } = this.data;
    const { width, height, places } = this.place;
    const pen = this.canvas.getContext("2d");
    pen.clearRect(0, 0, width, height);
    this.stripes();
    pen.globalAlpha = focus === null ? 1 : 0.12;
    pen.drawImage(this.rest, 0, 0, width, height);
    const near = new Set([focus]);
    for (const e of focus === null ? [] : [...this.into[focus], ...this.out[focus]]) {
      if (!this.shown.has(edges.source[e]) || !this.shown.has(edges.target[e])) continue;
      this.stroke(pen, e, 0.35 + 0.6 * Math.min(1, edges.share[e] * 2));
      near.add(edges.source[e]).add(edges.target[e]);
    }
    for (const [i, group] of this.groups) {
      group.classList.toggle("far", focus !== null && !near.has(i));
      group.classList.toggle("focus", i === focus);
      group.classList.toggle("pinned", i === this.pinned);
    }
    this.writeLabels(focus, places);
    this.panel.replaceChildren(...(focus === null ? this.summary() : this.details(focus, nodes[focus])));
  }

  // The strongest neighbours of what is pointed at, named where they are.
  writeLabels(focus, places) {
    if (focus === null) return this.labels.replaceChildren();
    const { edges, nodes } = this.data;
    const named = [focus, ...this.into[focus].slice(0, 5).map((e) => edges.source[e]), ...this.out[focus].slice(0, 3).map((e) => edges.target[e])];
    const texts = [...new Set(named)]
      .filter((i) => places.has(i) && nodes[i].kind !== "logit")
      .map((i) => {
        const { x, y } = places.get(i);
        const right = x < this.place.width - 130;
        return make("text", { x: right ? x + 9 : x - 9, y: y + 4, class: right ? "" : "end" }, nodes[i].label);
      });
    this.labels.replaceChildren(...texts);
  }

  summary() {
    const { nodes } = this.data;
    const features = nodes
      .map((node, i) => [node, i])
      .filter(([node]) => node.kind === "feature")
      .sort((a, b) => b[0].influence - a[0].influence)
      .slice(0, 12);
    return [
      make("p", { class: "muted help" }, "Point at a node to see what goes into it and out of it. Click to pin it; click it again to open its feature page. Arrow keys move, Enter pins, Escape lets go."),
      make("h3", {}, "Most influential features"),
      this.list(features.map(([node, i]) => ({ i, value: node.influence, part: node.influence / this.largest }))),
    ];
  }

  details(i, node) {
    const { edges } = this.data;
    const terms = (list) => list.map(([name, value]) => make("div", { class: "term" }, make("span", {}, name), make("span", {}, shortNumber(value))));
    const side = (title, list, end) =>
      list.length
        ? [
            make("h3", {}, title, make("span", { class: "muted" }, ` ${list.length}`)),
            this.list(list.slice(0, 10).map((e) => ({ i: edges[end][e], value: edges.weight[e], part: Math.sign(edges.weight[e]) * edges.share[e] }))),
          ]
        : [];
    return [
      make("div", { class: "kind muted" }, node.where),
      make("h2", {}, node.page ? link(node.page, { title: "open its feature page" }, node.title) : node.title),
      node.about ? make("div", { class: "about" }, node.about) : null,
      make("div", { class: "terms" }, ...terms([["value", node.value], ["influence", node.influence], ...node.numbers])),
      ...side("Inputs", this.into[i], "source"),
      ...side("Outputs", this.out[i], "target"),
      ...(node.residue.length ? [make("h3", {}, "Residue"), make("div", { class: "terms" }, ...terms(node.residue))] : []),
      ...(node.heads.length ? [make("h3", {}, "Heads"), make("div", { class: "terms" }, ...terms(node.heads))] : []),
      ...(node.direct.length ? [make("h3", {}, "Beside the heads"), make("div", { class: "terms" }, ...terms(node.direct))] : []),
    ].filter(Boolean);
  }

  list(items) {
    return make(
      "ol",
      {},
      items.map(({ i, value, part }) => {
        const node = this.data.nodes[i];
        const button = make("button", { type: "button" }, make("span", { class: "name" }, node.label), make("span", { class: "where" }, node.short));
        button.addEventListener("click", (event) => this.click(i, event));
        const item = make("li", { class: part < 0 ? "minus" : "plus", vars: { "--part": `${Math.min(100, Math.abs(part) * 100)}%` } }, button, make("span", { class: "value" }, shortNumber(value)));
        return item;
      }),
    );
  }
}

function legend() {
  const item = (className, text) => make("span", { class: `key ${className}` }, text);
  return make(
    "span",
    { class: "keys" },
    item("circle", "feature"),
    item("diamond", "MLP error"),
    item("square", "token"),
    item("raises", "raises"),
    item("lowers", "lowers"),
  );
}

export default function (component) {
  const root = rootOf(component);
  root.classList.add("graph");
  if (root.graph) root.graph.take(component);
  else root.graph = new Graph(component, root);
}
