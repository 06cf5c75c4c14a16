// Small panels of curves, one per metric, all runs in each; a pointer over one shows the same place in all. Many runs are
// coloured by rank, and the pointer picks the run whose curve is nearest.

const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [380, 168, 44, 8, 8, 20];

function panelNode(panel, range, bus, runs, many) {
  const values = panel.series.flatMap((series) => series.y.filter((value) => value !== null));
  const { at: y, marks, log, write } = axisOf(values, panel.log, HEIGHT - BOTTOM, TOP, { zero: true });
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const digits = Math.min(6, 3 + Math.ceil(Math.max(0, Math.log10(most / (most - least)) || 0)));
  const [first, last] = range;
  const x = (value) => LEFT + ((value - first) / (last - first || 1)) * (WIDTH - LEFT - RIGHT);
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": panel.label });
  for (const mark of marks) {
    svg.append(make("line", { class: "rule", x1: LEFT, x2: WIDTH - RIGHT, y1: y(mark), y2: y(mark) }));
    svg.append(make("text", { class: "y", x: LEFT - 5, y: y(mark) + 3.5 }, write(mark)));
  }
  for (const mark of ticks(first, last, 6)) svg.append(make("text", { class: "x", x: x(mark), y: HEIGHT - 5 }, shortTick(mark)));
  const curves = make("g");
  svg.append(curves);
  for (const series of panel.series) {
    const points = series.y.map((value, i) => (value === null || (log && value <= 0) ? null : [x(series.x[i]), y(value)]));
    const path = points.map((point, i) => point && `${points[i - 1] ? "L" : "M"}${point[0].toFixed(1)} ${point[1].toFixed(1)}`);
    const alone = points.filter((point, i) => point && !points[i - 1] && !points[i + 1]);
    const dots = alone.map(([cx, cy]) => make("circle", { cx, cy, r: 2 }));
    const curve = make("g", { class: "curve", vars: { "--hue": runs[series.run].hue } }, make("path", { d: path.join("") }), dots);
    curves.append(curve);
    bus.curves.push({ run: series.run, curve });
  }
  const cursor = make("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, x1: -9, x2: -9 });
  svg.append(cursor);
  const readout = make("div", { class: "readout", "aria-hidden": "true" });
  const target = make("rect", { class: "target", x: LEFT, y: 0, width: WIDTH - LEFT - RIGHT, height: HEIGHT - BOTTOM });
  svg.append(target);
  target.addEventListener("pointermove", (event) => {
    const box = target.getBoundingClientRect();
    const place = first + ((event.clientX - box.left) / box.width) * (last - first);
    const height = ((event.clientY - box.top) / box.height) * (HEIGHT - BOTTOM);
    bus.show(place, many ? nearestRun(place, height) : null);
  });
  target.addEventListener("pointerleave", () => bus.hide());
  function nearestRun(place, height) {
    const drawn = panel.series.map((series) => [series.run, nearest(series, place)]);
    const seen = drawn.filter(([, value]) => value !== null && !(log && value <= 0));
    const gaps = seen.map(([run, value]) => [run, Math.abs(y(value) - height)]);
    return gaps.length ? gaps.reduce((best, other) => (other[1] < best[1] ? other : best))[0] : null;
  }
  bus.listeners.push((place, picked) => {
    cursor.setAttribute("x1", place === null ? -9 : x(place));
    cursor.setAttribute("x2", place === null ? -9 : x(place));
    const shown = place === null ? [] : many ? panel.series.filter((series) => series.run === picked) : panel.series;
    readout.replaceChildren(
      ...shown.map((series) =>
        make(
          "span",
          { vars: { "--hue": runs[series.run].hue } },
          make("i", { class: "swatch" }),
          shortNumber(nearest(series, place), digits),
        ),
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

// A colour of its own for each of a few runs; of many, the place in the order, from blue over green to red.
function hueOf(rank, runs, many) {
  if (!many) return `var(--c${rank})`;
  const part = rank / (runs - 1);
  return `oklch(0.64 ${(0.12 + 0.04 * part).toFixed(3)} ${(262 - 236 * part).toFixed(1)})`;
}

export default function (component) {
  const { panels, x_label, ranked_by } = component.data;
  const many = component.data.runs.length > 8;
  const runs = component.data.runs.map((run, i, all) => ({ ...run, hue: hueOf(i, all.length, many) }));
  const root = rootOf(component);
  root.classList.add("curves");
  const all = panels.flatMap((panel) => panel.series.flatMap((series) => series.x));
  const range = [Math.min(...all), Math.max(...all)];
  const where = make("span", { class: "muted" });
  const bus = {
    listeners: [],
    curves: [],
    pick(picked) {
      for (const { run, curve } of bus.curves) {
        if (run === picked && !curve.classList.contains("picked")) curve.parentNode.append(curve); // over the others
        curve.classList.toggle("picked", run === picked);
        curve.classList.toggle("other", picked !== null && run !== picked);
      }
      entries.forEach((entry, run) => entry.classList.toggle("picked", run === picked));
    },
    show(place, picked) {
      root.pointed = [place, picked];
      where.textContent = `at ${shortTick(place)} ${x_label}`;
      bus.listeners.forEach((listener) => listener(place, picked));
      bus.pick(picked);
    },
    hide() {
      root.pointed = null;
      where.textContent = `over ${x_label}`;
      bus.listeners.forEach((listener) => listener(null, null));
      bus.pick(null);
    },
  };
  const entries = runs.map((run) =>
    make(
      "span",
      { role: "listitem", vars: { "--hue": run.hue } },
      make("i", { class: "swatch" }),
      link(run.href, { class: "name", title: `${run.name} alone` }, run.short),
      run.last === null ? null : make("span", { class: "last" }, shortNumber(run.last)),
      run.state ? make("span", { class: `state ${run.state.replace(" ", "-")}` }, run.state) : null,
    ),
  );
  entries.forEach((entry, run) => {
    entry.addEventListener("pointerenter", () => bus.pick(run));
    entry.addEventListener("pointerleave", () => bus.pick(null));
  });
  const order = ranked_by ? make("span", { class: "muted" }, `lowest ${ranked_by} first`) : null;
  const legend = make("div", { class: many ? "legend many" : "legend", role: "list", "aria-label": "runs" }, order, entries, where);
  const figures = panels.map((panel) => panelNode(panel, range, bus, runs, many));
  root.replaceChildren(legend, make("div", { class: "panels" }, figures));
  root.hidePointed = () => bus.hide();
  if (!root.watched) {
    root.watched = true;
    root.addEventListener("pointerleave", () => root.hidePointed());
  }
  // A run that trains is drawn anew every few seconds, also under a pointer that rests.
  if (root.pointed && runs.length > (root.pointed[1] ?? 0)) bus.show(...root.pointed);
  else bus.hide();
}
