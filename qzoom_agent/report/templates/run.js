"use strict";
(() => {
  const table = document.querySelector("#samples");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.querySelectorAll("tr[data-verdict]")];
  const groups = [...body.querySelectorAll("tr.group")];
  const filters = document.querySelector("#filters");
  const count = document.querySelector("#count");
  const search = document.querySelector("#search");
  const selects = [...filters.querySelectorAll("select")];
  const texts = new Map();
  const text = (row) => {
    if (!texts.has(row)) texts.set(row, row.textContent.toLowerCase());
    return texts.get(row);
  };

  let sorted = null;
  let up = true;
  const narrow = () => {
    const words = search.value.toLowerCase().trim();
    const wanted = selects.filter((each) => each.value).map((each) => [each.dataset.filter, each.value]);
    let shown = 0;
    for (const group of groups) group.hidden = Boolean(words || wanted.length || sorted);
    for (const row of rows) {
      const fits = wanted.every(([name, value]) =>
        name === "end" ? (row.dataset.end || "").split(" ").includes(value) : row.dataset[name] === value);
      row.hidden = !(fits && (!words || text(row).includes(words)));
      shown += !row.hidden;
    }
    count.textContent = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
  };

  const sort = (head) => {
    const at = head.cellIndex;
    const numbers = head.dataset.sort === "n";
    if (sorted === head) up = !up;
    else up = !numbers;
    sorted = head;
    for (const each of head.parentNode.cells) {
      each.classList.remove("up", "down");
      each.removeAttribute("aria-sort");
    }
    head.classList.add(up ? "up" : "down");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => {
      const cell = row.cells[at];
      const value = cell.dataset.v ?? cell.textContent;
      return numbers ? Number(value.replaceAll(",", "")) || 0 : value.toLowerCase();
    };
    const keyed = rows.map((row, place) => [key(row), place, row]);
    keyed.sort((a, b) => (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : 0) * (up ? 1 : -1) || a[1] - b[1]);
    for (const group of groups) group.hidden = true;
    const all = document.createDocumentFragment();
    for (const [, , row] of keyed) all.append(row);
    body.append(all);
  };

  for (const head of table.tHead.rows[0].cells) {
    if (!head.dataset.sort) continue;
    head.tabIndex = 0;
    head.addEventListener("click", () => sort(head));
    head.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      sort(head);
    });
  }
  let waiting = 0;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(narrow, 120);
  });
  for (const each of selects) each.addEventListener("change", narrow);
  filters.addEventListener("submit", (event) => event.preventDefault());
  table.classList.add("sorts");
  filters.hidden = false;
  narrow();
})();
