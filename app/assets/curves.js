// Small panels of curves, one per metric, all runs in each; a pointer over one shows the same place in all.

const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [380, 168, 44, 8, 8, 20];

function scaleY(panel, values) {
  let low = Math.min(...values);
  let high = Math.max(...values);
  const log = panel.log && low > 0 && high / low > 3;
  if (log) [low, high] = [Math.log10(low), Math.log10(high)];
  if (!panel.log && low > 0 && low < high * 0.35) low = 0;
  if (high === low && low === 0) high = 1;
  if (high === low) [low, high] = [low - (Math.abs(low) * 0.1 || 0.5), high + (Math.abs(high) * 0.1 || 0.5)];
  const y = (value) => HEIGHT - BOTTOM - (((log ? Math.log10(value) : value) - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  let marks;
  if (log) {
    marks = [];
    for (let power = Math.floor(low); power <= Math.ceil(high); power++)
      for (const unit of high - low > 1.5 ? [1] : [1, 2, 5]) marks.push(unit * 10 ** power);
    marks = marks.filter((mark) => Math.log10(mark) >= low && Math.log10(mark) <= high);
  } else marks = ticks(low, high, 4);
  return { y, marks, log };
}

function panelNode(panel, range, bus) {
  const values = panel.series.flatMap((series) => series.y.filter((value) => value !== null));
  const { y, marks, log } = scaleY(panel, values);
  const [first, last] = range;
  const x = (value) => LEFT + ((value - first) / (last - first || 1)) * (WIDTH - LEFT - RIGHT);
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": panel.label });
  for (const mark of marks) {
    svg.append(make("line", { class: "rule", x1: LEFT, x2: WIDTH - RIGHT, y1: y(mark), y2: y(mark) }));
    svg.append(make("text", { class: "y", x: LEFT - 5, y: y(mark) + 3.5 }, shortTick(mark)));
  }
  for (const mark of ticks(first, last, 4)) svg.append(make("text", { class: "x", x: x(mark), y: HEIGHT - 5 }, shortTick(mark)));
  for (const series of panel.series) {
    let path = "";
    let pen = false;
    series.y.forEach((value, i) => {
      if (value === null || (log && value <= 0)) return (pen = false);
      path += `${pen ? "L" : "M"}${x(series.x[i]).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = true;
    });
    svg.append(make("path", { class: `curve c${series.run % 8} d${Math.floor(series.run / 8) % 3}`, d: path }));
  }
  const cursor = make("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, x1: -9, x2: -9 });
  svg.append(cursor);
  const readout = make("div", { class: "readout", "aria-hidden": "true" });
  const target = make("rect", { class: "target", x: LEFT, y: 0, width: WIDTH - LEFT - RIGHT, height: HEIGHT - BOTTOM });
  svg.append(target);
  target.addEventListener("pointermove", (event) => {
    const box = target.getBoundingClientRect();
    bus.show(first + ((event.clientX - box.left) / box.width) * (last - first));
  });
  target.addEventListener("pointerleave", () => bus.hide());
  bus.listeners.push((place) => {
    if (place === null) {
      cursor.setAttribute("x1", -9);
      cursor.setAttribute("x2", -9);
      readout.replaceChildren();
      return;
    }
    cursor.setAttribute("x1", x(place));
    cursor.setAttribute("x2", x(place));
    readout.replaceChildren(
      ...panel.series.map((series) =>
        make("span", { class: `c${series.run % 8}` }, make("i", { class: `swatch d${Math.floor(series.run / 8) % 3}` }), shortNumber(nearest(series, place))),
      ),
    );
  });
  return make("figure", {}, make("figcaption", {}, make("span", { class: "metric" }, panel.title), log ? make("span", { class: "muted" }, "log") : null, readout), svg);
}

function nearest(series, place) {
  let best = null;
  let distance = Infinity;
  series.x.forEach((value, i) => {
    const gap = Math.abs(value - place);
    if (gap < distance && series.y[i] !== null) [best, distance] = [series.y[i], gap];
  });
  return best;
}

function shortTick(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${+(value / 1e9).toPrecision(3)}G`;
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  if (size > 0 && size < 1e-3) return value.toExponential(0);
  return String(+value.toPrecision(3));
}

export default function (component) {
  const { panels, runs, x_label } = component.data;
  const root = rootOf(component);
  root.classList.add("curves");
  const all = panels.flatMap((panel) => panel.series.flatMap((series) => series.x));
  const range = [Math.min(...all), Math.max(...all)];
  const where = make("span", { class: "muted" });
  const bus = {
    listeners: [],
    show(place) {
      where.textContent = `at ${shortTick(place)} ${x_label}`;
      bus.listeners.forEach((listener) => listener(place));
    },
    hide() {
      where.textContent = `over ${x_label}`;
      bus.listeners.forEach((listener) => listener(null));
    },
  };
  const legend = make(
    "div",
    { class: "legend", role: "list", "aria-label": "runs" },
    runs.map((run, i) =>
      make(
        "span",
        { role: "listitem", class: `c${i % 8}` },
        make("i", { class: `swatch d${Math.floor(i / 8) % 3}` }),
        link(run.href, { class: "name", title: "this run alone" }, run.name),
        run.live ? make("span", { class: "live" }, "training") : null,
      ),
    ),
    where,
  );
  const figures = panels.map((panel) => panelNode(panel, range, bus));
  root.replaceChildren(legend, make("div", { class: "panels" }, figures));
  bus.hide();
}
