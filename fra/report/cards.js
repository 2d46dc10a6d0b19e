"use strict";
// The index jumps to a feature by its number, and to a channel by its two; without this every link is there.
(() => {
  const form = document.getElementById("jump");
  const pages = JSON.parse(form.dataset.pages);
  const channels = new Set(JSON.parse(form.dataset.channels));
  const pageOf = new Map();
  for (const [page, features] of Object.entries(pages)) for (const feature of features) pageOf.set(feature, page);
  form.hidden = false;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const ids = (form.elements.number.value.match(/\d+/g) || []).map(Number);
    const said = document.getElementById("said");
    said.textContent = "";
    if (ids.length === 1 && pageOf.has(ids[0])) location.href = `${pageOf.get(ids[0])}#f${ids[0]}`;
    else if (ids.length === 2 && channels.has(`${ids[0]}-${ids[1]}`)) location.href = `c${ids[0]}-${ids[1]}.html`;
    else if (ids.length === 1) said.textContent = `Feature ${ids[0]} does not fire on these documents.`;
    else if (ids.length === 2) said.textContent = `Channel ${ids[0]} -> ${ids[1]} has no page: see the cards of its two features.`;
    else said.textContent = form.dataset.hint;
  });
})();
