// Runs as points over their L0: the first panel large, the others small beside it. A line joins the sparsities of a kind
// through the means of their seeds; a cross shows how far the seeds lie apart. A pointer picks the nearest run in all.

const LARGE = { width: 640, height: 366, left: 46, right: 10, top: 10, bottom: 34 };
const SMALL = { width: 340, height: 166, left: 44, right: 8, top: 8, bottom: 20 };
const REACH = 28;
const NARROW = 560; // the width from which the first panel is large: as in tradeoffs.css

const SHAPES = [
  (r) => `M${-r} 0A${r} ${r} 0 1 0 ${r} 0A${r} ${r} 0 1 0 ${-r} 0Z`,
  (r) => `M${-0.88 * r} ${-0.88 * r}H${0.88 * r}V${0.88 * r}H${-0.88 * r}Z`,
  (r) => `M0 ${-1.2 * r}L${1.1 * r} ${0.8 * r}H${-1.1 * r}Z`,
  (r) => `M0 ${-1.3 * r}L${1.3 * r} 0L0 ${1.3 * r}L${-1.3 * r} 0Z`,
  (r) => `M0 ${1.2 * r}L${1.1 * r} ${-0.8 * r}H${-1.1 * r}Z`,
  (r) => `M${-1.1 * r} ${-0.4 * r}H${-0.4 * r}V${-1.1 * r}H${0.4 * r}V${-0.4 * r}H${1.1 * r}V${0.4 * r}H${0.4 * r}V${1.1 * r}H${-0.4 * r}V${0.4 * r}H${-1.1 * r}Z`,
];

function marker(line, r = 3.4) {
  return SHAPES[line % SHAPES.length](r);
}

function panelNode(panel, size, lines, range, bus) {
  const { width, height, left, right, top, bottom } = size;
  const points = panel.series.flatMap((series) => series.points);
  const seeds = points.flatMap((point) => point.seeds);
  const across = axisOf(range, true, left, width - right, { pad: 0.05, base: 2, ratio: 4, apart: 1 });
  const up = axisOf(seeds.map((seed) => seed.y), panel.log, height - bottom, top, { pad: 0.06, most: panel.most, apart: 1.5 });
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": panel.label });
  for (const mark of up.marks) {
    svg.append(make("line", { class: "rule", x1: left, x2: width - right, y1: up.at(mark), y2: up.at(mark) }));
    svg.append(make("text", { class: "y", x: left - 5, y: up.at(mark) + 3.5 }, up.write(mark)));
  }
  const floor = height - bottom;
  for (const mark of across.marks) {
    svg.append(make("line", { class: "rule", x1: across.at(mark), x2: across.at(mark), y1: floor, y2: floor + 3 }));
    svg.append(make("text", { class: "x", x: across.at(mark), y: floor + 14 }, across.write(mark)));
  }
  if (size === LARGE) svg.append(make("text", { class: "x", x: (left + width - right) / 2, y: height - 3 }, "L0, latents active per row"));
  const places = [];
  for (const series of panel.series) {
    const group = make("g", { class: "curve", vars: { "--hue": lines[series.line].hue } });
    const path = series.points.map((point, i) => `${i ? "L" : "M"}${across.at(point.x).toFixed(1)} ${up.at(point.y).toFixed(1)}`);
    group.append(make("path", { class: "line", d: path.join("") }));
    for (const point of series.points) {
      if (point.spread) {
        const [least, most, low, high] = point.spread;
        group.append(make("path", { class: "spread", d: `M${across.at(least)} ${up.at(point.y)}H${across.at(most)}M${across.at(point.x)} ${up.at(low)}V${up.at(high)}` }));
      }
      for (const seed of point.seeds) {
        const [x, y] = [across.at(seed.x), up.at(seed.y)];
        const mark = make("path", { class: "mark", d: marker(series.line), transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})` });
        group.append(mark);
        places.push({ x, y, seed, line: series.line });
        bus.marks.push({ name: seed.name, mark });
      }
    }
    svg.append(group);
    bus.curves.push({ line: series.line, group });
  }
  const target = make("rect", { class: "target", x: 0, y: 0, width, height });
  svg.append(target);
  const nearest = (event) => {
    const box = target.getBoundingClientRect();
    const scale = box.width / width;
    const [x, y] = [(event.clientX - box.left) / scale, (event.clientY - box.top) / scale];
    const gaps = places.map((place) => Math.hypot(place.x - x, place.y - y));
    const best = gaps.indexOf(Math.min(...gaps));
    return gaps[best] <= REACH ? places[best] : null;
  };
  target.addEventListener("pointermove", (event) => {
    const place = nearest(event);
    target.classList.toggle("over", place !== null);
    if (!place) return bus.hide();
    const { name, x, y } = place.seed;
    bus.pick(place.line, name);
    bus.tip().show([name, lines[place.line].label, `L0 ${shortNumber(x)}, ${panel.title} ${shortNumber(y)}`], event.clientX, event.clientY);
  });
  target.addEventListener("pointerleave", () => bus.hide());
  target.addEventListener("click", (event) => {
    const place = nearest(event);
    if (place && PAGE_ADDRESS.test(place.seed.href)) go(place.seed.href);
  });
  const title = make("figcaption", {}, make("span", { class: "metric" }, panel.title), make("span", { class: "muted" }, up.log ? `${panel.note}, log` : panel.note));
  return make("figure", { class: size === LARGE ? "large" : "" }, title, svg);
}

export default function (component) {
  const { panels } = component.data;
  const lines = component.data.lines.map((label, i) => ({ label, hue: `var(--c${i % 8})` }));
  const root = rootOf(component);
  root.classList.add("tradeoffs");
  root.tooltipBox = null;
  const bus = {
    curves: [],
    marks: [],
    tip: () => tooltip(root),
    pick(line, name) {
      for (const { line: own, group } of bus.curves) group.classList.toggle("other", line !== null && own !== line);
      for (const { name: own, mark } of bus.marks) mark.classList.toggle("picked", own === name);
      entries.forEach((entry, own) => entry.classList.toggle("picked", own === line));
    },
    hide() {
      bus.pick(null, null);
      bus.tip().hide();
    },
  };
  const entries = lines.map((line, i) => {
    const swatch = make("svg", { class: "swatch", viewBox: "0 0 22 12", "aria-hidden": "true" }, make("path", { class: "line", d: "M0 6H22" }), make("path", { class: "mark", d: marker(i, 4), transform: "translate(11 6)" }));
    const entry = make("span", { role: "listitem", vars: { "--hue": line.hue } }, swatch, make("span", { class: "name" }, line.label));
    entry.addEventListener("pointerenter", () => bus.pick(i, null));
    entry.addEventListener("pointerleave", () => bus.pick(null, null));
    return entry;
  });
  const range = panels.flatMap((panel) => panel.series.flatMap((series) => series.points.flatMap((point) => point.seeds.map((seed) => seed.x))));
  const grid = make("div", { class: "panels" });
  root.replaceChildren(make("div", { class: "legend", role: "list", "aria-label": "kinds" }, entries), grid);
  root.drawPanels = () => {
    [bus.curves, bus.marks] = [[], []];
    root.wide = root.clientWidth > NARROW;
    grid.replaceChildren(...panels.map((panel, i) => panelNode(panel, i || !root.wide ? SMALL : LARGE, lines, range, bus)));
  };
  root.drawPanels();
  if (!root.watcher) {
    root.watcher = new ResizeObserver(() => root.clientWidth > NARROW !== root.wide && root.drawPanels());
    root.watcher.observe(root);
  }
}
