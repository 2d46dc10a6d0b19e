"use strict";
// What the page does beyond HTML: search, filters, order. Without it every row is there and details open by hand.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const form = document.getElementById("find");
  const sections = all("section.claim");
  const units = [];
  let sorted = "head"; // as they come
  const collect = (section) => {
    const own = all(".unit", section).map((element, place) => ({ element, place, section, data: element.dataset }));
    for (const unit of own) units.push(unit);
    return own;
  };
  sections.forEach(collect);
  const verdicts = [...form.elements.verdict.options].map((option) => option.value);
  // Rows of a large page and their details travel packed: they are unpacked while nothing else happens, and laid out when
  // they come into sight or are opened.
  const packs = new Map(all("script[data-packed-in]").map((block) => [block.dataset.packedIn, block]));
  const unpacked = new Map();
  const unpacking = new Map();
  const unpack = (name) => {
    if (!unpacking.has(name)) {
      const bytes = Uint8Array.from(atob(packs.get(name).textContent), (c) => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      unpacking.set(name, new Response(stream).json().then((parts) => unpacked.set(name, parts)));
    }
    return unpacking.get(name);
  };
  const everything = () => Promise.all([...packs.keys()].map(unpack));
  const fill = (place) => {
    const parts = unpacked.get(place.dataset.in);
    if (!parts || !("packed" in place.dataset)) return;
    place.innerHTML = parts[place.dataset.packed];
    delete place.dataset.packed;
    if (place.dataset.in !== CLAIMS) return;
    const own = collect(place.parentNode);
    if (sorted !== "head") sort(own);
  };
  const CLAIMS = "claims";
  const bodies = all(`[data-in="${CLAIMS}"]`);
  const allRows = () => bodies.forEach(fill);
  const lay = async (place) => {
    await unpack(place.dataset.in);
    fill(place);
  };
  document.addEventListener(
    "toggle",
    (event) => {
      const place = event.target.open && event.target.querySelector(":scope > [data-packed]");
      if (place) lay(place);
    },
    true,
  );
  const plain = (html) =>
    html.replace(/<[^>]*>/g, " ").replace(/&(lt|gt|amp|#34|#39);/g, (_, name) => ({ lt: "<", gt: ">", amp: "&", "#34": '"', "#39": "'" })[name]);
  const texts = new Map();
  const textOf = (unit) => {
    if (!texts.has(unit)) {
      const heading = unit.section.querySelector("h2").textContent;
      const place = unit.element.querySelector("[data-packed]");
      const parts = place && unpacked.get(place.dataset.in);
      const details = parts ? plain(parts[place.dataset.packed]) : "";
      texts.set(unit, `${heading} ${unit.data.h} ${unit.data.v} ${unit.element.textContent} ${details}`.toLowerCase());
    }
    return texts.get(unit);
  };
  // What is filtered stands in the address, behind "#?": a link shows the same rows. A row's own address goes first.
  const remember = () => {
    const state = new URLSearchParams();
    for (const field of form.elements) {
      const fresh = field.name === "order" ? "head" : "";
      if (field.name && field.value !== fresh) state.set(field.name, field.value);
    }
    const text = state.toString();
    const filtered = location.hash.startsWith("#?");
    if (text && (filtered || !location.hash)) history.replaceState(null, "", `#?${text}`);
    else if (!text && filtered) history.replaceState(null, "", "#");
  };
  const recall = () => {
    if (!location.hash.startsWith("#?")) return;
    for (const [name, value] of new URLSearchParams(location.hash.slice(2))) {
      const field = form.elements[name];
      if (!field || !field.name) continue;
      if (field.tagName !== "SELECT" || [...field.options].some((option) => option.value === value)) field.value = value;
    }
  };
  const filter = () => {
    const { words, verdict, kind, head, chapter } = form.elements;
    const sought = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = document.getElementById("found");
    if (packs.size && unpacked.size < packs.size) {
      found.textContent = "reading the details…";
      everything().then(filter);
      return;
    }
    allRows();
    let shown = 0;
    for (const unit of units) {
      const fits =
        (!verdict.value || unit.data.v === verdict.value) &&
        (!kind.value || unit.section.dataset.kind === kind.value) &&
        (!chapter || !chapter.value || unit.section.id.startsWith(chapter.value)) &&
        (!head.value || unit.data.h.split(" ").includes(head.value)) &&
        sought.every((word) => textOf(unit).includes(word));
      unit.element.hidden = !fits;
      shown += fits;
    }
    for (const section of sections) {
      section.hidden = !section.querySelector(".unit:not([hidden])");
      for (const table of all("table.rows", section)) table.hidden = !table.querySelector(".unit:not([hidden])");
    }
    for (const row of all(".index tbody tr")) {
      row.hidden = document.getElementById(decodeURIComponent(row.querySelector("a").hash.slice(1))).hidden;
    }
    remember();
    found.textContent = shown === units.length ? "" : `${shown} of ${units.length} shown`;
  };
  const known = (text, sign) => (text ? sign * Number(text) : Infinity); // what has no number comes last
  const less = (x, y) => (x === y ? 0 : x - y);
  const orders = {
    head: () => 0,
    verdict: (a, b) => verdicts.indexOf(a.data.v) - verdicts.indexOf(b.data.v),
    effect: (a, b) => less(known(a.data.e, -1), known(b.data.e, -1)),
    p: (a, b) => less(known(a.data.p, 1), known(b.data.p, 1)),
  };
  const sort = (some = units) => {
    if (some === units && form.elements.order.value === sorted) return;
    sorted = form.elements.order.value;
    const order = orders[sorted];
    const tables = new Map();
    for (const unit of some) {
      const table = unit.element.parentNode;
      if (!tables.has(table)) tables.set(table, []);
      tables.get(table).push(unit);
    }
    for (const [table, own] of tables) {
      if (table.matches("table.rows"))
        own.sort((a, b) => order(a, b) || a.place - b.place).forEach((unit) => table.append(unit.element));
    }
  };
  const open = () => {
    let name;
    try {
      name = decodeURIComponent(location.hash.slice(1));
    } catch {
      return;
    }
    const own = name && document.getElementById(`rows of ${name.split(":")[0]}`);
    if (own && "packed" in own.dataset) {
      lay(own).then(open);
      return;
    }
    const target = name && document.getElementById(name);
    if (!target) return;
    const unit = target.closest(".unit");
    if (target.closest("[hidden]") || (unit && unit.hidden)) {
      form.reset();
      filter();
      sort();
    }
    for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    (unit || target).scrollIntoView();
  };
  let closed = [];
  addEventListener("beforeprint", () => {
    allRows();
    all("[data-packed]").forEach(fill);
    closed = all("details:not([open])");
    for (const details of closed) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of closed) details.open = false;
  });
  form.addEventListener("input", () => {
    if (!location.hash.startsWith("#?")) history.replaceState(null, "", "#?");
    filter();
  });
  form.elements.order.addEventListener("change", () => sort());
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => (filter(), sort())));
  addEventListener("hashchange", () => {
    if (location.hash.startsWith("#?")) {
      recall();
      filter();
      sort();
    }
    open();
  });
  const wall = document.getElementById("wall");
  if (wall) {
    const claims = wall.dataset.claims.split(" ");
    const heads = wall.dataset.heads.trim().split(" ").map((text) => [text.split("@")[0], Number(text.split("@")[1])]);
    const rowAt = (event) => {
      const box = wall.getBoundingClientRect();
      const scale = wall.viewBox.baseVal.width / box.width;
      const x = (event.clientX - box.left) * scale;
      const line = ((event.clientY - box.top) * scale - Number(wall.dataset.top)) / Number(wall.dataset.row);
      const claim = claims[Math.floor(line)];
      const head = heads.filter((entry) => entry[1] <= x).pop();
      const name = claim && head && `${claim}:${head[0]}`;
      const own = document.getElementById(`rows of ${claim}`);
      if (own) fill(own);
      return name && document.getElementById(name) ? name : "";
    };
    wall.addEventListener("mousemove", (event) => {
      const name = rowAt(event);
      const unit = name && document.getElementById(name).closest(".unit");
      document.getElementById("pointed").textContent = name ? `${name.replace(":", " ")} ${unit.dataset.v}` : "";
    });
    wall.addEventListener("click", (event) => {
      const name = event.target.closest("a") ? "" : rowAt(event);
      if (name) location.hash = encodeURIComponent(name).replace("%3A", ":");
    });
  }
  form.hidden = false;
  recall();
  if (location.hash.startsWith("#?") || [...form.elements].some((field) => field.value && field.name && field.name !== "order")) filter(); // what a browser kept in the form from before
  sort();
  open();
  // So that a search and a print find the details there.
  const names = [...packs.keys()];
  const sight = new IntersectionObserver((seen) => {
    for (const { isIntersecting, target } of seen) if (isIntersecting) sight.unobserve(target), lay(target);
  }, { rootMargin: "100%" });
  bodies.forEach((body) => sight.observe(body));
  const next = () => names.length && unpack(names.shift()).then(() => (window.requestIdleCallback ?? setTimeout)(next));
  setTimeout(next, 500);
  window.fraUnpacked = () => unpacked.size;
})();
