// Text as its tokens. "lines": one line a strip, peaks under each other as in a concordance; a line opens into the
// whole passage. "blocks": passages with their line breaks. Colour says how strong and which sign; so do the thickness
// and the kind of the underline, and the tooltip in numbers.

function blockOf(strip, scale) {
  return make("div", { class: "block" }, strip.tokens.map((_, i) => tokenSpan(strip, i, scale, true)));
}

function stripNode(strip, scale, lines) {
  const label = `${strip.head ? `activation ${strip.head}` : "text"}${strip.source ? ` in ${strip.source}` : ""}: ${strip.tokens.join("")}`;
  const node = make("div", { class: "strip", role: "listitem", tabindex: "-1", "aria-label": label });
  const text = make("div", { class: "text" });
  if (strip.head) node.append(make("div", { class: "head" }, strip.head));
  node.append(text);
  if (strip.source)
    node.append(
      make("div", { class: "source", title: strip.source }, strip.href ? link(strip.href, { tabindex: "-1" }, strip.source) : strip.source),
    );
  node.strip = strip;
  node.open = !lines;
  node.draw = () => {
    text.replaceChildren(node.open ? blockOf(strip, scale) : lineOf(strip, scale));
    node.classList.toggle("open", node.open);
    if (lines) node.setAttribute("aria-expanded", String(node.open));
  };
  node.draw();
  return node;
}

// One tab stop for the list: arrows move between strips and between the tokens of a strip, Enter opens a strip.
function keyboard(root, nodes, tip) {
  let token = null;
  const leave = () => {
    token?.classList.remove("here");
    token = null;
    tip.hide();
  };
  const enter = (span) => {
    leave();
    token = span;
    span.classList.add("here");
    span.scrollIntoView({ block: "nearest", inline: "nearest" });
    const box = span.getBoundingClientRect();
    tip.show(describe(span.closest(".strip").strip, Number(span.dataset.i)), box.left, box.bottom - 14);
  };
  nodes.forEach((node, n) => {
    node.tabIndex = n ? -1 : 0;
    node.addEventListener("keydown", (event) => {
      const spans = [...node.querySelectorAll(".t")];
      const at = token ? spans.indexOf(token) : -1;
      const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      const along = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (move && nodes[n + move]) {
        leave();
        nodes.forEach((other) => (other.tabIndex = -1));
        nodes[n + move].tabIndex = 0;
        nodes[n + move].focus();
      } else if (along) {
        const first = node.strip.peak ?? 0;
        enter(spans[at < 0 ? first : Math.max(0, Math.min(spans.length - 1, at + along))]);
      } else if (event.key === "Enter" && node.hasAttribute("aria-expanded")) {
        leave();
        node.open = !node.open;
        node.draw();
      } else if (event.key === "Escape") {
        leave();
      } else return;
      event.preventDefault();
      event.stopPropagation();
    });
    node.addEventListener("blur", leave);
    node.addEventListener("click", (event) => {
      if (!node.hasAttribute("aria-expanded") || event.target.closest("a") || !getSelection().isCollapsed) return;
      node.open = !node.open;
      node.draw();
    });
  });
}

export default function (component) {
  const { groups, scale, lines, label } = component.data;
  const root = rootOf(component);
  root.tooltipBox = null;
  root.classList.add("strips");
  root.classList.toggle("lines", lines);
  const nodes = [];
  const content = groups.map((group) => {
    const list = group.strips.map((strip) => stripNode(strip, scale, lines));
    nodes.push(...list);
    return make(
      "section",
      { class: "group" },
      group.title
        ? make("div", { class: "title" }, make("h3", {}, group.title), group.note ? make("span", { class: "muted" }, group.note) : null)
        : null,
      make("div", { role: "list", "aria-label": group.title || label }, list),
    );
  });
  root.replaceChildren(...content);
  const tip = tooltip(root);
  if (!root.listening) {
    root.listening = true;
    root.addEventListener("pointermove", (event) => {
      const span = event.target.closest?.(".t");
      if (!span) return tooltip(root).hide();
      tooltip(root).show(describe(span.closest(".strip").strip, Number(span.dataset.i)), event.clientX, event.clientY);
    });
    root.addEventListener("pointerleave", () => tooltip(root).hide());
  }
  keyboard(root, nodes, tip);
}
