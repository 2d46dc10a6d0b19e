"use strict";
// What the page does beyond HTML: search, filters, order. Without it every row is there and details open by hand.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const form = document.getElementById("find");
  const units = all(".unit").map((element, place) => ({ element, place, data: element.dataset }));
  const sections = all("section.claim");
  const verdicts = [...form.elements.verdict.options].map((option) => option.value);
  const texts = new Map();
  const textOf = (unit) => {
    if (!texts.has(unit)) {
      const heading = unit.element.closest("section").querySelector("h2").textContent;
      texts.set(unit, `${heading} ${unit.data.h} ${unit.data.v} ${unit.element.textContent}`.toLowerCase());
    }
    return texts.get(unit);
  };
  const filter = () => {
    const { words, verdict, kind, head } = form.elements;
    const sought = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const unit of units) {
      const fits =
        (!verdict.value || unit.data.v === verdict.value) &&
        (!kind.value || unit.element.closest("section").dataset.kind === kind.value) &&
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
    document.getElementById("found").textContent = shown === units.length ? "" : `${shown} of ${units.length} shown`;
  };
  const known = (text, sign) => (text ? sign * Number(text) : Infinity); // what has no number comes last
  const less = (x, y) => (x === y ? 0 : x - y);
  const orders = {
    head: () => 0,
    verdict: (a, b) => verdicts.indexOf(a.data.v) - verdicts.indexOf(b.data.v),
    effect: (a, b) => less(known(a.data.e, -1), known(b.data.e, -1)),
    p: (a, b) => less(known(a.data.p, 1), known(b.data.p, 1)),
  };
  const sort = () => {
    const order = orders[form.elements.order.value];
    for (const table of all("table.rows")) {
      const own = units.filter((unit) => unit.element.parentNode === table);
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
    closed = all("details:not([open])");
    for (const details of closed) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of closed) details.open = false;
  });
  form.addEventListener("input", filter);
  form.elements.order.addEventListener("change", sort);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => (filter(), sort())));
  addEventListener("hashchange", open);
  form.hidden = false;
  filter(); // what a browser kept in the form from before
  sort();
  open();
})();
