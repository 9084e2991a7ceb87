// The table of cases: sorting by a heading, filters, and how many rows are left.
"use strict";

const table = document.getElementById("table");
const rows = [...table.tBodies[0].rows];
const filters = [...document.querySelectorAll("#filters select")];
const find = document.getElementById("find");

function matches(row) {
  const text = row.cells[0].textContent.toLowerCase();
  return find.value.toLowerCase().split(/\s+/).every((word) => text.includes(word))
    && filters.every((f) => !f.value || row.dataset[f.dataset.axis] === f.value);
}

function filterRows() {
  let left = 0;
  for (const row of rows) {
    row.hidden = !matches(row);
    if (!row.hidden) left += 1;
  }
  const all = `${rows.length} case${rows.length === 1 ? "" : "s"}`;
  document.getElementById("shown").textContent = left === rows.length ? all : `${left} of ${all}`;
}

function sortValue(row, column) {
  const cell = row.cells[column];
  if (cell.dataset.sort !== undefined) return Number(cell.dataset.sort);
  return cell.classList.contains("right") ? null : cell.textContent.trim();
}

// What was not measured comes last, whichever way the rest is sorted.
function compareRows(column, sign) {
  return (a, b) => {
    const x = sortValue(a, column), y = sortValue(b, column);
    if (x === null || y === null) return (x === null) - (y === null);
    if (typeof x === "number" && typeof y === "number") return sign * (x - y);
    return sign * String(x).localeCompare(String(y), "en", { numeric: true });
  };
}

function sortBy(button) {
  const heading = button.closest("th");
  const down = heading.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const sorted = [...rows].sort(compareRows(Number(button.dataset.column), down ? -1 : 1));
  table.tBodies[0].append(...sorted);
}

for (const button of table.querySelectorAll("thead button")) {
  button.addEventListener("click", () => sortBy(button));
}
for (const control of [find, ...filters]) control.addEventListener("input", filterRows);
document.getElementById("reset").addEventListener("click", () => {
  find.value = "";
  for (const filter of filters) filter.value = "";
  filterRows();
});
filterRows(); // a reloaded page keeps what its controls held
