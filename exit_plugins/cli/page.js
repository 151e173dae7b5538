"use strict";
// Everything shown comes from the JSON in the page. Text goes in as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const exits = data.exits.length;
const percent = (value, digits = 2) => (100 * value).toFixed(digits) + " %";
const exitColour = (k) => `hsl(${Math.round(190 + (120 * k) / Math.max(1, exits - 1))} 62% var(--exit-light))`;

function amount(value) {
  const steps = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""], [1e-3, "m"], [1e-6, "u"]];
  const [size, prefix] = steps.find(([size]) => value >= size) || [1e-6, "u"];
  return Number((value / size).toPrecision(4)) + " " + prefix + data.unit;
}

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function draw(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function stack(shares, labelled) {
  return shares.map((share, k) => {
    const part = make("i", { style: `width:${100 * share}%;background:${exitColour(k)}` });
    if (labelled && share > 0.08) part.textContent = k + 1;
    return part;
  });
}

function fillTable(table, head, rows) {
  const line = (cells, first) =>
    make("tr", {}, ...cells.map((cell, i) => make(first ? "th" : i ? "td" : "th", { scope: first ? "col" : "row" }, cell)));
  table.replaceChildren(make("thead", {}, line(head, true)), make("tbody", {}, ...rows.map((row) => line(row, false))));
}

// The slider and what it moves ----------------------------------------------------------------------------------------

const slider = byId("budget");
const last = data.exits[exits - 1];
slider.max = data.points.length - 1;

function show(step) {
  const point = data.points[step];
  slider.value = step;
  slider.setAttribute("aria-valuetext", `${amount(point.cost)} per image, accuracy ${percent(point.accuracy)}`);
  byId("cost").textContent = amount(point.cost);
  const tiles = [
    [percent(point.accuracy), `accuracy (95 %: ${(100 * point.low).toFixed(1)} to ${(100 * point.high).toFixed(1)})`],
    [percent(point.cost / last.cost), "of the last exit's cost"],
    [(last.cost / point.cost).toFixed(2) + "x", "fewer " + data.unit],
    [point.bound === null ? "none" : "≤ " + percent(point.bound), "answers that differ from the last exit's, certified"],
  ];
  byId("tiles").replaceChildren(...tiles.map(([number, what]) => make("div", {}, make("b", {}, number), make("span", {}, what))));
  byId("shares").replaceChildren(...stack(point.shares, true));
  byId("legend").replaceChildren(
    ...point.shares.map((share, k) => make("li", {}, make("i", { style: `background:${exitColour(k)}` }), `exit ${k + 1}: ${percent(share, 1)}`)),
  );
  byId("points").querySelectorAll("tbody tr").forEach((row, i) => {
    if (i === step) row.setAttribute("aria-current", "true");
    else row.removeAttribute("aria-current");
  });
  moveMarker(step);
}

slider.addEventListener("input", () => {
  show(Number(slider.value));
  history.replaceState(null, "", "#" + slider.value);
});
byId("bound-says").textContent = data.bound_says;

// The curve -----------------------------------------------------------------------------------------------------------

const curve = byId("curve");
const tip = make("div", { class: "tip", hidden: "" });
let chart = null;

function drawCurve() {
  const width = Math.max(300, curve.clientWidth);
  const height = Math.min(420, Math.max(260, width * 0.62));
  const margin = { left: 46, right: 14, top: 14, bottom: 42 };
  const values = [...data.points.flatMap((p) => [p.low, p.high]), ...data.exits.map((e) => e.accuracy)];
  const low = Math.max(0, Math.min(...values) - 0.01);
  const high = Math.min(1, Math.max(...values) + 0.01);
  const from = 0.9 * Math.min(data.points[0].cost, data.exits[0].cost);
  const x = (cost) => margin.left + ((cost - from) / (last.cost * 1.02 - from)) * (width - margin.left - margin.right);
  const y = (accuracy) => height - margin.bottom - ((accuracy - low) / (high - low)) * (height - margin.top - margin.bottom);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-labelledby": "curve-title" });
  const ends = `from ${percent(data.points[0].accuracy)} at ${amount(data.points[0].cost)} to ${percent(data.points.at(-1).accuracy)} at ${amount(data.points.at(-1).cost)}`;
  svg.append(draw("title", { id: "curve-title" }, `Accuracy over mean cost per image, ${ends}; the table below holds every point`));
  for (let i = 0; i <= 4; i++) {
    const accuracy = low + (i * (high - low)) / 4;
    svg.append(draw("line", { class: "axis", x1: margin.left, x2: width - margin.right, y1: y(accuracy), y2: y(accuracy) }));
    svg.append(draw("text", { x: margin.left - 6, y: y(accuracy) + 4, "text-anchor": "end" }, (100 * accuracy).toFixed(1)));
    if (width > 420 || i % 2 === 0) {
      const cost = from + (i * (last.cost - from)) / 4;
      const anchor = i === 4 ? "end" : i === 0 ? "start" : "middle";
      svg.append(draw("text", { x: x(cost), y: height - margin.bottom + 18, "text-anchor": anchor }, amount(Number(cost.toPrecision(3)))));
    }
  }
  svg.append(draw("text", { x: margin.left, y: height - 6 }, `mean cost per image; accuracy in %`));
  const upper = data.points.map((p) => `${x(p.cost)},${y(p.high)}`);
  const lower = data.points.map((p) => `${x(p.cost)},${y(p.low)}`).reverse();
  svg.append(draw("polygon", { class: "band", points: [...upper, ...lower].join(" ") }));
  svg.append(draw("polyline", { class: "curve", points: data.points.map((p) => `${x(p.cost)},${y(p.accuracy)}`).join(" ") }));
  for (const p of data.points) svg.append(draw("circle", { class: "dot", cx: x(p.cost), cy: y(p.accuracy), r: 2.5 }));
  data.exits.forEach((e, k) => {
    const [a, b] = [x(e.cost), y(e.accuracy)];
    const diamond = draw("path", { class: "alone", d: `M${a},${b - 6}L${a + 6},${b}L${a},${b + 6}L${a - 6},${b}Z` });
    diamond.append(draw("title", {}, `everybody at exit ${k + 1}: ${percent(e.accuracy)} at ${amount(e.cost)}`));
    svg.append(diamond);
  });
  const marker = draw("circle", { class: "here", r: 7 });
  svg.append(marker);
  const nearest = (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) * width) / box.width;
    let best = 0;
    data.points.forEach((p, i) => { if (Math.abs(x(p.cost) - at) < Math.abs(x(data.points[best].cost) - at)) best = i; });
    return best;
  };
  svg.addEventListener("pointermove", (event) => {
    const p = data.points[nearest(event)];
    tip.hidden = false;
    tip.textContent = `${percent(p.accuracy)} at ${amount(p.cost)} (${percent(p.cost / last.cost, 0)})`;
    const half = tip.offsetWidth / 2;
    tip.style.left = Math.min(curve.clientWidth - half, Math.max(half, (x(p.cost) * curve.clientWidth) / width)) + "px";
    tip.style.top = (y(p.accuracy) * svg.clientHeight) / height + "px";
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; });
  svg.addEventListener("click", (event) => { show(nearest(event)); });
  curve.querySelector("svg")?.remove();
  curve.prepend(svg, tip);
  chart = { x, y, marker };
}

function moveMarker(step) {
  const point = data.points[step];
  chart.marker.setAttribute("cx", chart.x(point.cost));
  chart.marker.setAttribute("cy", chart.y(point.accuracy));
}

// The rest ------------------------------------------------------------------------------------------------------------

function drawPictures() {
  const section = byId("pictures");
  if (!data.pictures.length) return section.remove();
  section.append(make("p", { class: "soft" }, `Under the policy that spends ${amount(data.policy.cost)} per image and is right on ${percent(data.policy.accuracy)}. ${data.pictures_say}`));
  for (const group of data.pictures) {
    section.append(make("h3", {}, `Exit ${group.exit + 1}: ${percent(group.share, 1)} of the images leave here, ${percent(group.accuracy, 1)} of them answered rightly`));
    const rows = make("div", { class: "rows" });
    section.append(rows);
    for (const [word, pictures] of [["surest", group.easiest], ["least sure", group.hardest]]) {
      if (!pictures.length) continue;
      rows.append(make("div", {}, make("p", { class: "soft" }, word), make("ul", { class: "pictures" }, ...pictures.map((p) => {
        const says = p.right ? p.truth : `${p.said}, is ${p.truth}`;
        const sure = p.confidence === null ? "confidence unknown" : p.confidence.toFixed(3);
        return make("li", {}, make("img", { src: p.source, alt: `image of ${p.truth}`, loading: "lazy" }), make("div", { class: p.right ? "" : "wrong" }, (p.right ? "" : "✗ ") + says), make("div", { class: "soft" }, sure));
      }))));
    }
  }
}

function drawReliability() {
  const side = 200;
  const at = (value) => 24 + value * (side - 34);
  byId("reliability").append(...data.reliability.map((bins, k) => {
    const svg = draw("svg", { viewBox: `0 0 ${side} ${side}`, role: "img" });
    const e = data.exits[k];
    svg.append(draw("title", {}, `Exit ${k + 1}: expected calibration error ${percent(e.ece)}`));
    svg.append(draw("rect", { class: "axis", x: 24, y: 10, width: side - 34, height: side - 34, fill: "none" }));
    svg.append(draw("line", { class: "ideal", x1: at(0), y1: side - at(0), x2: at(1), y2: side - at(1) }));
    for (const bin of bins)
      svg.append(draw("circle", { cx: at(bin.confidence), cy: side - at(bin.accuracy), r: 2 + 9 * Math.sqrt(bin.share), fill: exitColour(k), opacity: 0.85 }));
    svg.append(draw("text", { x: 24, y: side - 8 }, "0"), draw("text", { x: side - 10, y: side - 8, "text-anchor": "end" }, "confidence 1"), draw("text", { x: 4, y: 20 }, "1"));
    return make("figure", {}, svg, make("figcaption", {}, `exit ${k + 1}, ECE ${percent(e.ece)}`));
  }));
}

function drawTables() {
  const number = (value, digits) => (value === null ? "-" : value.toFixed(digits));
  const running = data.exits[0].ensemble !== null;
  fillTable(
    byId("exits"),
    ["exit", "cost", "accuracy", "95 %", ...(running ? ["running ensemble"] : []), "ECE", "AUROC", "AURC"],
    data.exits.map((e, k) => [`exit ${k + 1}`, amount(e.cost), percent(e.accuracy), `${(100 * e.low).toFixed(1)} to ${(100 * e.high).toFixed(1)}`, ...(running ? [percent(e.ensemble)] : []), percent(e.ece), number(e.auroc, 3), number(e.aurc, 3)]),
  );
  fillTable(
    byId("points"),
    ["cost", "of the last exit", "accuracy", "95 %", ...data.exits.map((_, k) => `exit ${k + 1}`), "differ at most"],
    data.points.map((p) => [amount(p.cost), percent(p.cost / last.cost), percent(p.accuracy), `${(100 * p.low).toFixed(1)} to ${(100 * p.high).toFixed(1)}`, ...p.shares.map((s) => percent(s)), p.bound === null ? "-" : percent(p.bound)]),
  );
  if (data.classes.length)
    fillTable(byId("class-table"), ["class", "leaves at", "accuracy", "images"], data.classes.map((c) => {
      const says = c.shares.map((s, k) => `exit ${k + 1} ${percent(s, 0)}`).join(", ");
      return [c.name, make("div", { class: "stack", role: "img", "aria-label": says, title: says }, ...stack(c.shares, false)), percent(c.accuracy, 1), String(c.count)];
    }));
  else byId("classes").remove();
  if (!data.similarity) return byId("similarity").remove();
  fillTable(byId("cka"), ["", ...data.similarity.names], data.similarity.matrix.map((row, i) => [data.similarity.names[i], ...row.map((v) => v.toFixed(2))]));
}

byId("copy").addEventListener("click", async () => {
  const text = [...byId("points").rows].map((row) => [...row.cells].map((cell) => cell.textContent).join("\t")).join("\n");
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Files opened from disk may not have the clipboard: the old way, through a selection.
    const area = make("textarea", { "aria-hidden": "true", style: "position:fixed;opacity:0" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    byId("copy").focus();
  }
  byId("copied").textContent = `${data.points.length} rows copied.`;
});

drawTables();
drawPictures();
drawReliability();
drawCurve();
const asked = location.hash ? Number(location.hash.slice(1)) : NaN;
show(Number.isInteger(asked) && asked >= 0 && asked < data.points.length ? asked : data.start);
new ResizeObserver(() => { drawCurve(); moveMarker(Number(slider.value)); }).observe(curve);
