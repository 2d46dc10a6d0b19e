// State and its address, the pattern, the keyboard. The address is the state: whoever opens it sees the same.
const DEFAULTS = { h: String(fra.about.heads[0]), v: "cell", q: String(fra.n - 1), k: "" };
let state = {};
const place = () => Math.max(0, fra.about.heads.indexOf(+state.h));
const clamp = (x, most) => Math.max(0, Math.min(most, Number.isFinite(+x) ? Math.floor(+x) : 0));
const parse = () => {
  let given = {};
  try {
    given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  } catch {
    given = {};
  }
  state = { ...DEFAULTS, ...given };
  if (!fra.about.heads.includes(+state.h)) state.h = DEFAULTS.h;
  if (!Object.hasOwn(views, state.v)) state.v = "cell";
};
const address = () => `#${new URLSearchParams(Object.entries(state).filter(([, value]) => value !== ""))}`;
// A change of the state that what is shown shows already.
const keep = (changes) => {
  Object.assign(state, changes);
  if (address() !== location.hash) history.replaceState(null, "", address());
};
const go = (changes) => {
  Object.assign(state, "q" in changes ? { o: "" } : {}, changes);
  const hash = address();
  if (hash === location.hash) return;
  history.pushState(null, "", hash);
  parse();
  draw();
};
const strongestKey = (head, t) => {
  let best = 0;
  for (let s = 0; s <= t; s++) if (head.pattern[t * fra.n + s] > head.pattern[t * fra.n + best]) best = s;
  return best;
};
const canvas = document.getElementById("pattern");
let [cell, edge] = [1, 0];
const draw = () => {
  const head = fra.head(place());
  const t = clamp(state.q, fra.n - 1);
  let s = state.k === "" ? strongestKey(head, t) : clamp(state.k, t);
  if (fra.masked(t, s)) s = t;
  [state.q, state.k] = [String(t), String(s)];
  const list = channels();
  const now = list.length ? head.attention(head.changed(list)) : head.pattern;
  for (const button of document.querySelectorAll("#heads button")) button.ariaPressed = String(button.dataset.head === state.h);
  document.getElementById("pattern-title").textContent = `Pattern of ${head.name}${list.length ? ", changed" : ""}`;
  const room = Math.min(document.querySelector(".left").clientWidth, 600) - 78;
  cell = Math.max(5, Math.min(22, Math.floor(room / fra.n)));
  edge = heat(canvas, now, { cell, labels: true, chosen: [t, s], full: 1 });
  canvas.ariaLabel = `attention pattern of ${head.name}: query ${t} ${visible(fra.about.tokens[t])}, key ${s} ${visible(fra.about.tokens[s])}, attention ${number(now[t * fra.n + s])}; arrow keys move the cell`;
  said(t, s, head, now);
  document.getElementById("query").value = String(t);
  const keys = document.getElementById("key");
  keys.replaceChildren(...Array.from({ length: t + 1 }, (_, k) => k).filter((k) => !fra.masked(t, k)).map((k) => el("option", { value: String(k), selected: k === s }, `${k} ${visible(fra.about.tokens[k])}`)));
  for (const button of document.querySelectorAll("#tabs button")) {
    if (button.dataset.view === state.v) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
  }
  const parts = [el("p", { class: "quiet" }, "query ", word(fra.about.tokens[t]), ` (${t}), key `, word(fra.about.tokens[s]), ` (${s}) in ${head.name}`), ...views[state.v][1](head, t, s, now)];
  document.getElementById("panel").replaceChildren(...parts.filter((part) => part !== null));
};
const said = (t, s, head, now) => {
  const c = t * fra.n + s;
  document.getElementById("hover").replaceChildren(word(fra.about.tokens[t]), ` (${t}) looks at `, word(fra.about.tokens[s]), ` (${s}): score ${number(head.scores[c])}, attention ${number(now[c])}${now === head.pattern ? "" : ` (as it is: ${number(head.pattern[c])})`}`);
};
const under = (event) => {
  const box = canvas.getBoundingClientRect();
  const [s, t] = [event.clientX - box.left - edge, event.clientY - box.top - edge].map((x) => Math.floor(x / cell));
  return t >= 0 && t < fra.n && s >= 0 && s <= t && !fra.masked(t, s) ? [t, s] : null;
};
canvas.addEventListener("mousemove", (event) => {
  const at = under(event);
  const head = fra.head(place());
  const list = channels();
  if (at) said(...at, head, list.length && drawn.key === state.w + state.h ? drawn.now : list.length ? remember(head, list) : head.pattern);
});
const drawn = { key: null, now: null };
const remember = (head, list) => ((drawn.key = state.w + state.h), (drawn.now = head.attention(head.changed(list))));
canvas.addEventListener("click", (event) => {
  const at = under(event);
  if (at) go({ q: String(at[0]), k: String(at[1]) });
});
canvas.addEventListener("keydown", (event) => {
  const [t, s] = [+state.q, +state.k];
  const to = { ArrowUp: [t - 1, Math.min(s, t - 1)], ArrowDown: [t + 1, s], ArrowLeft: [t, s - 1], ArrowRight: [t, s + 1] }[event.key];
  if (!to) return;
  event.preventDefault();
  if (to[0] >= 0 && to[0] < fra.n && to[1] >= 0 && !fra.masked(...to)) go({ q: String(to[0]), k: String(to[1]) });
});
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select")) return;
  const names = Object.keys(views);
  if (/^[1-9]$/.test(event.key) && names[event.key - 1]) go({ v: names[event.key - 1] });
  const step = { "[": -1, "]": 1 }[event.key];
  if (step) go({ h: String(fra.about.heads[(place() + step + fra.about.heads.length) % fra.about.heads.length]) });
});
const restore = () => (parse(), draw());
addEventListener("popstate", restore);
addEventListener("hashchange", restore);
addEventListener("resize", () => draw());
const thumbnails = () => {
  document.querySelectorAll("#heads canvas").forEach((small, at) => heat(small, fra.head(at).pattern, { cell: Math.max(1, Math.floor(112 / fra.n)), full: 1 }));
  for (const small of document.querySelectorAll("#heads canvas")) small.style.width = small.style.height = "56px";
};
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => (thumbnails(), draw()));
fra.about.heads.forEach((number_, at) => {
  const scores = fra.about.scores[at];
  document.getElementById("heads").append(
    el("button", { type: "button", "data-head": String(number_), onclick: () => go({ h: String(number_) }) },
      el("canvas", { "aria-hidden": "true" }), el("b", {}, `L${fra.about.layer}H${number_}`),
      ...(scores ? Object.entries(scores).map(([name, x]) => el("small", {}, `${name} ${x.toFixed(2)}`)) : [])),
  );
});
Object.entries(views).forEach(([view, [title]]) => document.getElementById("tabs").append(el("button", { type: "button", "data-view": view, onclick: () => go({ v: view }) }, title)));
const queries = document.getElementById("query");
fra.about.tokens.forEach((token, t) => queries.append(el("option", { value: String(t) }, `${t} ${visible(token)}`)));
queries.addEventListener("change", () => go({ q: queries.value, k: "" }));
document.getElementById("key").addEventListener("change", (event) => go({ k: event.target.value }));
// The head that the page opens with: the most induction-like one.
if (fra.about.scores.every(Boolean)) {
  const best = fra.about.scores.reduce((a, x, at) => (x.induction > fra.about.scores[a].induction ? at : a), 0);
  DEFAULTS.h = String(fra.about.heads[best]);
}
parse();
thumbnails();
draw();
// The other heads' entries while nobody asks for anything, where they are few enough to be kept.
const waiting = fra.about.heads.map((_, at) => at).flatMap((at) => ["q", "k"].map((side) => () => fra.head(at).entries(side)));
const warm = () => {
  const step = waiting.shift();
  if (step) step(), (window.requestIdleCallback ?? setTimeout)(warm);
};
if (fra.shared.slot.length * fra.width * waiting.length < 2 ** 24) setTimeout(warm, 300);
