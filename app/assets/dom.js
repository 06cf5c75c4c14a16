// What every component of this app begins with. Data becomes nodes here and nowhere else: strings are set as text, so
// a token that looks like markup stays a token, and only addresses of our own pages become links.

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "g", "line", "path", "rect", "circle", "polyline", "text", "title", "polygon"]);

function make(tag, attributes = {}, ...children) {
  const node = SVG_TAGS.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) throw new Error("handlers are added with addEventListener");
    if (name === "vars") for (const [key, inner] of Object.entries(value)) node.style.setProperty(key, inner);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(2)) {
    if (child === undefined || child === null || child === "") continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}

// The element a component draws in. It survives reruns, so what a component remembers lies on it.
function rootOf(component) {
  return component.parentElement.querySelector(".root");
}

const PAGE_ADDRESS = /^(\.|[a-z]+)(\?[\w.~%+=&*-]*)?$/;

// Opens a page of this app the way the browser's back button does: the address changes, and Streamlit, which listens for
// that, runs the page. One entry in the history, one run.
function go(href) {
  history.pushState({}, "", href);
  dispatchEvent(new PopStateEvent("popstate", { state: {} }));
}

// A link to a page of this app. A plain click stays in the open session; a click with a modifier opens a tab of its own.
function link(href, attributes, ...children) {
  if (!PAGE_ADDRESS.test(href)) return make("span", attributes, ...children);
  const anchor = make("a", { ...attributes, href }, ...children);
  anchor.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) return;
    event.preventDefault();
    event.stopPropagation();
    go(href);
  });
  return anchor;
}

// One tooltip per component, made when first needed. Lines are text.
function tooltip(root) {
  let box = root.tooltipBox;
  if (!box) {
    box = root.tooltipBox = make("div", { class: "tooltip", role: "tooltip", hidden: true });
  }
  if (!box.isConnected) root.append(box);
  return {
    show(lines, x, y) {
      box.replaceChildren(...lines.map((line, i) => make("div", { class: i ? "" : "first" }, line)));
      box.hidden = false;
      const width = box.offsetWidth;
      const height = box.offsetHeight;
      box.style.left = `${Math.max(4, Math.min(x + 12, document.documentElement.clientWidth - width - 8))}px`;
      box.style.top = `${y + 18 + height > document.documentElement.clientHeight ? y - height - 10 : y + 18}px`;
    },
    hide() {
      box.hidden = true;
    },
  };
}

function shortNumber(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2);
  return value.toLocaleString("en", { maximumSignificantDigits: digits });
}

// About `count` round numbers between two ends.
function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((unit) => unit * power >= rough) * power;
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(value);
  return found;
}
