// Tables sort by a click on a heading: figures by value, text by letters; what is missing stays last.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const left = head.classList.contains("left");
      const body = table.tBodies[0];
      const key = (row) => {
        const text = row.cells[column].textContent;
        if (left) return text;
        const value = parseFloat(text.replaceAll(",", ""));
        return Number.isNaN(value) ? null : value;
      };
      const compare = (a, b) => {
        const [one, other] = [key(a), key(b)];
        if (one === null || other === null) return (one === null) - (other === null);
        const order = left ? one.localeCompare(other) : one - other;
        return down ? -order : order;
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}
