"use strict";
// Puts the lines of the heat map in the order of a column; a second click turns it round. Without it they stand by claim.
(() => {
  const body = document.querySelector("#heat tbody");
  const lines = [...body.rows];
  for (const button of document.querySelectorAll("#heat thead button")) {
    button.addEventListener("click", () => {
      const header = button.closest("th");
      const down = header.getAttribute("aria-sort") !== "descending";
      for (const other of document.querySelectorAll("#heat thead th")) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (line) => line.cells[header.cellIndex].dataset.order;
      const named = header.cellIndex === 0;
      const compared = (a, b) => (named ? value(b).localeCompare(value(a)) : Number(value(a)) - Number(value(b)));
      const sorted = [...lines].sort((a, b) => (down ? -1 : 1) * compared(a, b) || lines.indexOf(a) - lines.indexOf(b));
      for (const line of sorted) body.append(line);
    });
  }
})();
