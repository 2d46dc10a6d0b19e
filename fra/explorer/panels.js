// What stands beside the pattern. Each view makes its elements from the state and the head.
const SHOWN = 12;
const KIND = { feature: "features", bias: "bias", error: "error" };
const featureButton = (id, side = "in") => el("button", { type: "button", title: "what this feature fires on", onclick: () => go({ v: "feature", f: `${side}${id}` }) }, `${id}`);
const pairButton = (i, j) => el("button", { type: "button", title: "this channel", onclick: () => go({ v: "pair", c: `${i}-${j}` }) }, `${i} → ${j}`);
const example = ({ tokens, values, at }) => {
  const active = new Float64Array(tokens.length);
  for (const [place_, size] of values) active[place_] = size;
  return strip(tokens.map((id) => fra.about.words[id]), active, at);
};
const check = (name, label) => el("label", {}, el("input", { type: "checkbox", checked: state[name] === "1", onchange: (event) => go({ [name]: event.target.checked ? "1" : "" }) }), ` ${label}`);
const choice = (name, label, options) => el("label", {}, `${label} `, el("select", { onchange: (event) => go({ [name]: event.target.value }) }, ...options.map(([key, text]) => el("option", { value: key, selected: (state[name] || options[0][0]) === key }, text))));
const channels = () => (state.w ? state.w.split(",") : []).map((text) => text.match(/^(\d+)-(\d+)x(-?[\d.]+)$/)).filter(Boolean)
  .map(([, i, j, factor]) => ({ i: +i, j: +j, factor: +factor })).filter(({ i, j, factor }) => fra.slotOf.has(i) && fra.slotOf.has(j) && Number.isFinite(factor));
const written = (list) => list.map(({ i, j, factor }) => `${i}-${j}x${factor}`).join(",");
const switched = (i, j, factor) => go({ w: written([...channels().filter((c) => c.i !== i || c.j !== j), ...(factor === 1 ? [] : [{ i, j, factor }])]) });
const offButton = (i, j) => {
  const off = channels().find((c) => c.i === i && c.j === j);
  return el("button", { type: "button", ariaPressed: String(Boolean(off)), title: "switch this channel off, or on again", onclick: () => switched(i, j, off ? 1 : 0) }, off ? "back" : "off");
};
const opened = () => (state.o || "").split(",").filter(Boolean);
const chosenPair = () => {
  const [i, j] = (state.c || "").split("-").map(Number);
  return fra.slotOf.has(i) && fra.slotOf.has(j) ? [i, j] : null;
};
// Nine numbers by kind of term, as bars one after another.
const nine = (blocks, what = "score") => {
  const parts = fra.TERMS.flatMap((a, x) => fra.TERMS.map((b, y) => ({ name: `${KIND[a]} → ${KIND[b]}`, value: blocks[x][y] })));
  return el("div", { class: "scroll", tabIndex: 0, role: "region", ariaLabel: "waterfall" }, waterfall(parts, parts.reduce((sum, p) => sum + p.value, 0), what));
};
// The strongest pairs of features both ways, and how much of all they are.
const both = (head, t, s, less) => {
  const pairs = head.pairs(t, s, less, state.typical === "1");
  const [pull, push] = [1, -1].map((sign) => pairs.strongest(SHOWN, sign));
  const [shown, all] = [[...pull, ...push].map((p) => p.value), pairs.values];
  const sum = (list) => list.reduce((total, x) => total + x, 0);
  const size = (list) => list.reduce((total, x) => total + Math.abs(x), 0);
  const side = (list) => tag(["value", "query → key feature", ""], "pairs of features", list.map(({ i, j, value, here }) => [signed(value), el("span", {}, pairButton(i, j), here ? "" : " not at this key"), offButton(i, j)]));
  return [
    el("p", { class: "quiet" }, `${all.length} pairs add up to ${number(sum(all))}; shown are ${shown.length}, which bring ${number(sum(shown))}: ${number((100 * size(shown)) / (size(all) || 1))} % of all magnitudes.`),
    el("h3", {}, "Pull"), side(pull), el("h3", {}, "Push"), side(push),
  ];
};
const views = {
  cell: ["Cell", (head, t, s) => {
    const blocks = head.blocks(t, s);
    return [
      el("p", {}, "score ", el("b", {}, number(head.scores[t * fra.n + s])), ", attention ", el("b", {}, number(head.pattern[t * fra.n + s])), fra.about.softcap === null ? "" : `, capped at ${fra.about.softcap}`),
      el("h3", {}, "The score as nine sums: query side → key side"), nine(blocks),
      el("div", { class: "bar" }, check("raw", "raw (else less the row's mean, which softmax ignores)"), check("typical", "at mean activations")),
      ...both(head, t, s, state.raw === "1" ? "nothing" : "row"),
    ];
  }],
  row: ["Row", (head, t, s, now) => {
    const list = [];
    for (let k = 0; k <= t; k++) if (!fra.masked(t, k)) list.push(k);
    list.sort((a, b) => head.pattern[t * fra.n + b] - head.pattern[t * fra.n + a]);
    const changed = channels().length > 0;
    const others = list.filter((k) => k !== s);
    const other = others.includes(+state.a) && state.a !== "" ? +state.a : others[0];
    const [here, there] = [s, other].map((k) => (k === undefined ? null : head.blocks(t, k)));
    const against = other === undefined ? [] : [
      el("h3", {}, "Key against key"),
      el("div", { class: "bar" }, el("span", {}, `key ${s} `, word(fra.about.tokens[s])), choice("a", "against", others.map((k) => [String(k), `${k} ${visible(fra.about.tokens[k])}`])), check("typical", "at mean activations")),
      el("p", {}, "score less score ", el("b", {}, number(head.scores[t * fra.n + s] - head.scores[t * fra.n + other])), fra.about.softcap === null ? ": the log of attention over attention." : `, before the cap at ${fra.about.softcap}.`),
      nine(here.map((line, x) => line.map((value, y) => value - there[x][y])), "difference"),
      ...both(head, t, s, other),
    ];
    const later = [];
    const rows = state.all === "1" ? list : list.filter((k, rank) => rank < 2 * SHOWN || k === s || k === other);
    const made = [el("p", {}, `${rows.length === list.length ? "All" : `${rows.length} of ${list.length}`} keys of the query `, word(fra.about.tokens[t]), ` (${t}), most attended first. Strongest channel: less its mean over the row.`),
      tag(["key", "attention", ...(changed ? ["what if"] : []), "score", ...fra.TERMS.map((a) => `${KIND[a]} → features`), "others", "strongest channel", ""], "keys of the row", rows.map((k) => {
        const b = head.blocks(t, k);
        const own = b.map((line) => line[0]);
        const cell = t * fra.n + k;
        const strongest = el("div", {}, "…");
        later.push(() => {
          const pairs = head.pairs(t, k, "row", state.typical === "1", true);
          const top = [...pairs.strongest(1, 1), ...pairs.strongest(1, -1)].sort((x, y) => Math.abs(y.value) - Math.abs(x.value))[0];
          strongest.replaceChildren(...(top ? [pairButton(top.i, top.j), " ", signed(top.value)] : ["–"]));
        });
        return [el("div", {}, el("button", { type: "button", onclick: () => go({ k: String(k), v: "cell" }) }, `${k}`), " ", word(fra.about.tokens[k])), number(head.pattern[cell]), ...(changed ? [number(now[cell])] : []), number(head.scores[cell]), ...own.map(number), number(b.flat().reduce((x, y) => x + y, 0) - own.reduce((x, y) => x + y, 0)), strongest, k === other || k === s ? "" : el("button", { type: "button", title: "hold the chosen key against this one", onclick: () => go({ a: String(k) }) }, "against")];
      })), list.length > 2 * SHOWN ? el("div", { class: "bar" }, check("all", `all ${list.length} keys`)) : null, ...against];
    // The keys that matter at once, the others after the page has been drawn.
    for (const fill of later.splice(0, SHOWN)) fill();
    const rest = () => {
      const since = performance.now();
      while (later.length && performance.now() - since < STRETCH) later.shift()();
      if (later.length && made[0].isConnected) setTimeout(rest);
    };
    setTimeout(rest);
    return made;
  }],
  pair: ["Channel", (head, t, s) => {
    const pair = chosenPair();
    if (!pair) return [el("p", {}, "Choose a channel in the views Cell or Search.")];
    const [i, j] = pair;
    const map = head.channel(i, j);
    const without = head.attention(head.changed([{ i, j, factor: 0 }]));
    const cells = [];
    for (let c = 0; c < map.length; c++) if (map[c]) cells.push(c);
    cells.sort((a, b) => Math.abs(map[b]) - Math.abs(map[a]));
    const odds = (p) => Math.log(p / (1 - p));
    const canvas = el("canvas", { role: "img", ariaLabel: `what channel ${i} to ${j} brings to each score` });
    heat(canvas, map, { cell: Math.max(2, Math.min(9, Math.floor(360 / fra.n))), chosen: [t, s] });
    const g = head.coupling(i, j);
    const here = t * fra.n + s;
    return [
      el("p", {}, "Where ", featureButton(i), " is live at the query, look at where ", featureButton(j), " is live. ", offButton(i, j)),
      el("div", { class: "scroll" }, canvas),
      el("p", { class: "quiet" }, `Sum ${number(map.reduce((a, b) => a + b, 0))} over ${cells.length} cells; full colour: ${number(Math.abs(map[cells[0]] || 0))}; outlined cells are negative.`),
      el("h3", {}, "Live in this text"), el("p", { class: "quiet" }, `query feature ${i}`), strip(fra.about.tokens, fra.activity(i), t), el("p", { class: "quiet" }, `key feature ${j}`), strip(fra.about.tokens, fra.activity(j), s),
      el("h3", {}, "Removed, exactly"),
      el("p", {}, `At the chosen cell attention goes from ${number(head.pattern[here])} to ${number(without[here])} (${number(odds(without[here]) - odds(head.pattern[here]))} nat).`),
      tag(["term", "query", "key", "attention", "without", "nat"], "strongest cells of the channel", cells.slice(0, SHOWN).map((c) => {
        const [q, k] = [(c / fra.n) | 0, c % fra.n];
        return [signed(map[c]), el("div", {}, el("button", { type: "button", onclick: () => go({ q: String(q), k: String(k) }) }, `${q}`), " ", word(fra.about.tokens[q])), el("div", {}, `${k} `, word(fra.about.tokens[k])), number(head.pattern[c]), number(without[c]), number(odds(without[c]) - odds(head.pattern[c]))];
      })),
      el("h3", {}, "Coupling G"), g.length > 1 ? el("div", { class: "scroll", tabIndex: 0, role: "region", ariaLabel: "coupling by offset" }, curve(g, "coupling by offset of query and key")) : el("p", {}, `${number(g[0])} at every offset: this head does not rotate.`),
    ];
  }],
  search: ["Search", (head) => {
    const options = { by: state.by || "sum", least: Math.max(1, +state.least || 1), punctuation: state.punct === "1", bos: state.bos === "1", own: state.own === "1", typical: state.typical === "1" };
    const out = el("div", { ariaLive: "polite" }, el("p", { class: "quiet" }, "searching…"));
    const key = JSON.stringify([head.name, options]);
    const show = (found) => out.replaceChildren(tag(["", "value", "query → key feature", "cells", ""], "channels", found.map(({ i, j, value, count }, rank) => [String(rank + 1), signed(value), el("div", {}, pairButton(i, j)), String(count), offButton(i, j)])));
    searches.last = key; // what is no longer asked for is given up
    if (!searches.has(key)) searches.set(key, new Promise((done) => setTimeout(done)).then(() => search(head, options, () => searches.last === key)));
    searches.get(key).then((found) => found ? show(found) : (searches.delete(key), out.isConnected && draw()));
    return [
      el("div", { class: "bar" }, choice("by", "strongest by", [["sum", "sum over the text"], ["mean", "mean while live"], ["peak", "peak anywhere"]]),
        el("label", {}, "live in at least ", el("input", { type: "number", min: 1, max: 9999, value: options.least, onchange: (event) => go({ least: event.target.value }) }), " cells")),
      el("div", { class: "bar" }, check("punct", "without punctuation"), check("bos", "without BOS"), check("own", "without self channels"), check("typical", "at mean activations")),
      out,
    ];
  }],
  what: ["What if", (head, t, s, now) => {
    const list = channels();
    const rows = [];
    for (let k = 0; k <= t; k++) if (!fra.masked(t, k)) rows.push(k);
    const change = (k) => now[t * fra.n + k] - head.pattern[t * fra.n + k];
    rows.sort((a, b) => Math.abs(change(b)) - Math.abs(change(a)));
    return [
      list.length ? tag(["channel", "factor", ""], "changed channels", list.map(({ i, j, factor }) => [el("div", {}, pairButton(i, j)), el("div", {}, el("input", { type: "number", step: 0.1, value: factor, ariaLabel: `factor of ${i} to ${j}`, onchange: (event) => switched(i, j, Number(event.target.value)) })), el("button", { type: "button", onclick: () => switched(i, j, 1) }, "as it was")]))
        : el("p", {}, "Nothing is changed. “off” beside a channel (Cell, Channel, Search) switches it off here."),
      list.length ? el("p", {}, el("button", { type: "button", onclick: () => go({ w: "" }) }, "all as it was")) : null,
      el("h3", {}, "Attention of the query "), word(fra.about.tokens[t]), el("span", {}, ` (${t})`),
      tag(["key", "as it is", "what if", "change"], "attention of the row", rows.slice(0, 24).map((k) => [el("div", {}, `${k} `, word(fra.about.tokens[k])), number(head.pattern[t * fra.n + k]), number(now[t * fra.n + k]), signed(change(k))])),
    ];
  }],
  output: ["Output", (head, t, s, now) => {
    const z = fra.about.outputs;
    if (!z) return [el("p", {}, "The target has no dictionary of this layer's head outputs.")];
    const { z_pos, z_slot, z_value, z_heads } = fra.shared;
    const fires = [];
    for (let e = 0; e < z_pos.length; e++) if (z_pos[e] === t) fires.push(e);
    const own = (e) => z_heads[e * fra.about.n_heads + head.number];
    fires.sort((a, b) => Math.abs(own(b)) - Math.abs(own(a)));
    // What is open stands in the address, by feature, source and feature there.
    const level = (id, title, fill) => {
      const made = el("details", { open: opened().includes(id) }, el("summary", {}, ...title));
      const open = () => made.open && made.childElementCount === 1 && made.append(...fill());
      open();
      made.addEventListener("toggle", () => (open(), keep({ o: [...opened().filter((x) => x !== id), ...(made.open ? [id] : [])].join(",") })));
      return made;
    };
    const line = (name, value) => el("p", { class: "quiet" }, name, " ", signed(value));
    const components = (entry) => {
      const { parts, rest, constant, why } = fra.upstream(entry);
      return why ? [el("p", { class: "quiet" }, why)] : [...parts.map((p) => line(p.name, p.value)), line("everything else", rest), line("the encoder's constant", constant)];
    };
    const through = (f, source) => {
      const { features, bias, error } = head.through(f, t, source, now);
      return [...features.slice(0, SHOWN).map(({ entry, feature, value }) => level(`${z.features[f]}.${source}.${feature}`, [signed(value), ` feature ${feature} of the input there`], () => [el("p", {}, featureButton(feature)), ...components(entry)])),
        line(`${Math.max(0, features.length - SHOWN)} further features`, features.slice(SHOWN).reduce((sum, x) => sum + x.value, 0)), line("bias", bias), line("error", error)];
    };
    return [
      el("p", {}, "What fires among the layer's head outputs at ", word(fra.about.tokens[t]), ` (${t}), by what ${head.name} brings to it. Opened: its sources, the input's features there, and what wrote these.`),
      ...fires.slice(0, 24).map((e) => {
        const f = z_slot[e];
        const changed = channels().length ? head.sources(f, t, now).reduce((a, b) => a + b, 0) : null;
        return level(String(z.features[f]), [signed(own(e)), changed === null ? "" : ` (what if: ${number(changed)})`, ` feature ${z.features[f]}, active ${number(z_value[e])}: raises `, ...z.logits[f].raises.slice(0, 3).flatMap((x) => [word(x), " "])], () => {
          const sources = head.sources(f, t, now);
          const order = [...sources.keys()].sort((a, b) => Math.abs(sources[b]) - Math.abs(sources[a]));
          return [el("p", {}, featureButton(z.features[f], "out")), strip(fra.about.tokens.slice(0, t + 1), sources, t), ...order.slice(0, 6).map((k) => level(`${z.features[f]}.${k}`, [signed(sources[k]), ` from ${k} `, word(fra.about.tokens[k])], () => through(f, k)))];
        });
      }),
    ];
  }],
  feature: ["Feature", (head, t) => {
    const found = (state.f || "").match(/^(in|out)(\d+)$/);
    const z = fra.about.outputs;
    const book = found && (found[1] === "in" ? fra.about : z);
    const at = book ? book.features.indexOf(+found[2]) : -1;
    if (at < 0) return [el("p", {}, "Choose a feature in one of the other views.")];
    const id = +found[2];
    const own = new Float64Array(fra.n);
    if (found[1] === "out") for (let e = 0; e < fra.shared.z_pos.length; e++) if (fra.shared.z_slot[e] === at) own[fra.shared.z_pos[e]] = fra.shared.z_value[e];
    const parts = [el("p", {}, el("b", {}, `Feature ${id}`), ` of ${book.hook}`)];
    if (book.neuronpedia) parts.push(el("p", {}, el("a", { href: `${book.neuronpedia}/${id}`, rel: "noreferrer" }, "on Neuronpedia")));
    parts.push(el("h3", {}, "In this text"), strip(fra.about.tokens, found[1] === "in" ? fra.activity(id) : own, t));
    if (found[1] === "out") parts.push(el("h3", {}, "Logits"), el("p", {}, "raises ", ...z.logits[at].raises.flatMap((x) => [word(x), " "])), el("p", {}, "lowers ", ...z.logits[at].lowers.flatMap((x) => [word(x), " "])));
    parts.push(el("h3", {}, "In the target's documents"), ...(book.examples[at].length ? book.examples[at].map(example) : [el("p", { class: "quiet" }, "It does not fire there, or none were looked through.")]));
    return parts;
  }],
};
const searches = new Map();
