// Elements, tokens, maps and charts. Every text goes in as text, never as markup. Nine bars, one curve and maps of a few
// thousand cells: SVG and canvas draw them in fewer lines than a chart library would need to be fed.
const el = (name, props = {}, ...children) => {
  const made = document.createElement(name);
  for (const [key, given] of Object.entries(props)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), given);
    else if (key === "class") made.className = given;
    else if (key in made && key !== "list") made[key] = given;
    else made.setAttribute(key, given);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
};
const svg = (name, props = {}, ...children) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, given] of Object.entries(props)) made.setAttribute(key, given);
  made.append(...children);
  return made;
};
// A token may hold any character: those that would steer the page are shown as escapes.
const visible = (text) =>
  text.replace(/[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g, (c) => {
    const code = c.charCodeAt(0);
    return c === "\n" ? "\\n" : c === "\t" ? "\\t" : `\\u${code.toString(16).padStart(4, "0")}`;
  });
const word = (text) => el("span", { class: "w" }, visible(text));
// Three figures; zeros at the end go, those of an exponent stay.
const number = (x) => {
  if (!Number.isFinite(x)) return "–";
  const [figures, exponent] = (Object.is(x, -0) ? 0 : x).toPrecision(3).split("e");
  const short_ = figures.includes(".") ? figures.replace(/\.?0+$/, "") : figures;
  return (exponent === undefined ? short_ : `${short_}e${exponent}`).replace(/^-/, "−");
};
const signed = (x) => el("span", { class: x < 0 ? "push" : "pull" }, (x > 0 ? "+" : "") + number(x));
const short = (text, most = 11) => {
  const shown = visible(text);
  return shown.length > most ? `${shown.slice(0, most - 1)}…` : shown;
};
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// A map of [n, n] numbers; negative ones in the other colour, hollow.
const heat = (canvas, values, { cell, labels, chosen, full }) => {
  const { about, n } = fra;
  const size = cell * n;
  const edge = labels ? 78 : 0;
  const ratio = Math.max(1, window.devicePixelRatio || 1);
  canvas.width = (size + edge) * ratio;
  canvas.height = (size + edge) * ratio;
  canvas.style.width = `${size + edge}px`;
  canvas.style.height = `${size + edge}px`;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  let most = full ?? 0;
  if (!full) for (const x of values) if (Math.abs(x) > most && x !== -Infinity) most = Math.abs(x);
  const [pull, push, ink, line, quiet] = ["--pull", "--push", "--ink", "--line", "--quiet"].map(colour);
  pen.strokeStyle = line;
  pen.strokeRect(edge + 0.5, edge + 0.5, size - 1, size - 1);
  for (let t = 0; t < n; t++)
    for (let s = 0; s <= t; s++) {
      const share = most ? Math.min(1, Math.abs(values[t * n + s]) / most) : 0;
      if (!(share > 0.01)) continue;
      pen.globalAlpha = share;
      const negative = values[t * n + s] < 0;
      const [x, y] = [edge + s * cell, edge + t * cell];
      if (negative && cell > 5) {
        pen.strokeStyle = push;
        pen.lineWidth = 1.5;
        pen.strokeRect(x + 1.25, y + 1.25, cell - 2.5, cell - 2.5);
      } else {
        pen.fillStyle = negative ? push : pull;
        pen.fillRect(x, y, cell, cell);
      }
    }
  pen.globalAlpha = 1;
  if (labels) {
    pen.font = `${Math.min(11, Math.max(7, cell + 1))}px ui-monospace, monospace`;
    const every = Math.ceil(7 / cell);
    for (let t = 0; t < n; t++) {
      if (t % every && t !== chosen?.[0] && t !== chosen?.[1]) continue;
      pen.fillStyle = t === chosen?.[0] ? ink : quiet;
      pen.textAlign = "right";
      pen.textBaseline = "middle";
      pen.fillText(short(about.tokens[t]), edge - 3, edge + (t + 0.5) * cell, edge - 4);
      pen.save();
      pen.translate(edge + (t + 0.5) * cell, edge - 3);
      pen.rotate(-Math.PI / 2);
      pen.textAlign = "left";
      pen.fillStyle = t === chosen?.[1] ? ink : quiet;
      pen.fillText(short(about.tokens[t]), 0, 0, edge - 4);
      pen.restore();
    }
  }
  if (chosen) {
    pen.strokeStyle = ink;
    pen.lineWidth = 1.5;
    pen.strokeRect(edge + chosen[1] * cell - 0.5, edge + chosen[0] * cell - 0.5, cell + 1, cell + 1);
  }
  return edge;
};
const tag = (name, title, rows, empty = "none") =>
  rows.length
    ? el("div", { class: "scroll", tabIndex: 0, role: "region", ariaLabel: title },
        el("table", {}, el("thead", {}, el("tr", {}, ...name.map((head) => el("th", { scope: "col" }, head)))),
          el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((cell) => el("td", { class: typeof cell === "string" || cell instanceof HTMLSpanElement && cell.matches(".pull, .push") ? "n" : "" }, cell)))))))
    : el("p", { class: "quiet" }, empty);
// Bars one after another, each beginning where the last has ended.
const waterfall = (parts, total, what) => {
  let [low, high, at] = [0, 0, 0];
  for (const { value } of parts) (at += value), (low = Math.min(low, at)), (high = Math.max(high, at));
  const [left, width, row] = [190, 430, 21];
  const x = (v) => left + ((v - low) / (high - low || 1)) * width;
  const picture = svg("svg", { viewBox: `0 0 ${left + width + 70} ${row * (parts.length + 1) + 6}`, width: left + width + 70, role: "img", "aria-label": `${what} ${number(total)} as a sum of ${parts.length} parts` });
  at = 0;
  [...parts, { name: what, value: total, whole: true }].forEach(({ name, value, whole }, line) => {
    const start = whole ? 0 : at;
    const y = line * row + 4;
    picture.append(
      svg("text", { x: left - 8, y: y + 12, "text-anchor": "end" }, name),
      svg("rect", { x: Math.min(x(start), x(start + value)), y, width: Math.max(1, Math.abs(x(value) - x(0))), height: row - 6, class: value < 0 ? "push" : "pull" }),
      svg("text", { x: Math.max(x(start), x(start + value)) + 5, y: y + 12 }, number(value)),
    );
    if (!whole) at += value;
  });
  picture.prepend(svg("line", { x1: x(0), x2: x(0), y1: 0, y2: row * (parts.length + 1), class: "axis" }));
  return picture;
};
const curve = (values, label) => {
  const [low, high] = [Math.min(0, ...values), Math.max(0, ...values)];
  const x = (i) => 50 + (i / Math.max(1, values.length - 1)) * 520;
  const y = (v) => 130 - ((v - low) / (high - low || 1)) * 115;
  return svg("svg", { viewBox: "0 0 600 155", width: 600, role: "img", "aria-label": label },
    svg("line", { x1: 50, x2: 570, y1: y(0), y2: y(0), class: "axis" }),
    svg("polyline", { points: values.map((v, i) => `${x(i)},${y(v)}`).join(" "), class: "curve" }),
    svg("text", { x: 45, y: y(high) + 4, "text-anchor": "end", class: "quiet" }, number(high)),
    svg("text", { x: 45, y: y(low) + 4, "text-anchor": "end", class: "quiet" }, number(low)),
    svg("text", { x: 50, y: 150, class: "quiet" }, "offset 0"),
    svg("text", { x: 570, y: 150, "text-anchor": "end", class: "quiet" }, String(values.length - 1)));
};
// Tokens as running text, shaded by value.
const strip = (tokens, values, marked) => {
  const most = Math.max(...Array.from(values, Math.abs), 0);
  const line = el("p", { class: "t" });
  tokens.forEach((token, at) => {
    const part = el(at === marked ? "b" : "span", { title: number(values[at]) }, visible(token));
    if (most && values[at]) part.style.backgroundColor = `color-mix(in srgb, var(${values[at] < 0 ? "--push" : "--pull"}) ${Math.round((45 * Math.abs(values[at])) / most)}%, transparent)`;
    line.append(part);
  });
  return line;
};
