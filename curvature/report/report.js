"use strict";
// Tables sort by a click on a column's head: ascending, descending, then as they were.
for (const table of document.querySelectorAll("table.sorts")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];

  const compare = (a, b) =>
    typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });

  const sort = (column, order) => {
    const text = heads[column].classList.contains("text");
    const keyed = original.map((row) => {
      const key = row.cells[column].dataset.sort;
      return [key === undefined ? null : text ? key : Number(key), row];
    });
    const known = keyed.filter(([key]) => key !== null);
    const missing = keyed.filter(([key]) => key === null); // always last
    if (order !== "none") {
      const sign = order === "ascending" ? 1 : -1;
      known.sort(([a], [b]) => sign * compare(a, b));
      body.append(...[...known, ...missing].map(([, row]) => row));
    } else {
      body.append(...original);
    }
    heads.forEach((head, i) => head.setAttribute("aria-sort", i === column ? order : "none"));
  };

  const next = { none: "ascending", ascending: "descending", descending: "none" };
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      sort(column, next[head.getAttribute("aria-sort")]);
    });
  });
}
