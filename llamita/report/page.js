"use strict";
// Charts: the read-out follows the pointer or the arrow keys, and returns to the last values.
for (const figure of document.querySelectorAll("figure.chart")) {
  const series = JSON.parse(figure.querySelector("script").textContent);
  const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor");
  const where = figure.querySelector(".where"), values = figure.querySelectorAll(".key b");
  const first = series[0].points;
  let place = first.length - 1;

  const nearest = (points, x) => {
    let low = 0, high = points.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (points[middle][0] + points[middle + 1][0] < 2 * x) low = middle + 1; else high = middle;
    }
    return low;
  };
  const show = (index, drawn) => {
    place = Math.max(0, Math.min(first.length - 1, index));
    const x = first[place][0];
    where.textContent = series[0].where[place];
    series.forEach((one, i) => { values[i].textContent = one.points[nearest(one.points, x)][2]; });
    cursor.setAttribute("d", drawn ? `M${x},0V1000` : "");
  };
  const rest = () => show(first.length - 1, false);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    show(nearest(first, (event.clientX - box.left) / box.width * 1000), true);
  });
  svg.addEventListener("pointerleave", rest);
  svg.addEventListener("blur", rest);
  svg.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) { event.preventDefault(); show(place + by * (event.shiftKey ? 10 : 1), true); }
  });
}

const filter = document.querySelector("input[type=search]");
if (filter) {
  filter.hidden = false;
  filter.addEventListener("input", () => {
    const wanted = filter.value.toLowerCase().split(/\s+/);
    for (const row of document.querySelectorAll(".settings tbody tr")) {
      const text = row.textContent.toLowerCase();
      row.hidden = !wanted.every((word) => text.includes(word));
    }
  });
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
