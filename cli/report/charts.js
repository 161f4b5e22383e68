"use strict";

// Draws every element with data-chart at load, from the data of the page. Texts come as data and enter the page as text only.

const DATA = JSON.parse(document.getElementById("chart-data").textContent);
const ROOT = document.documentElement;

const inkOf = (name) => getComputedStyle(ROOT).getPropertyValue(`--${name}`).trim();

function paletteNow() {
  const colours = [];
  for (let i = 0; i < 8; i++) colours.push(inkOf(`colour-${i}`));
  return { colours, ink: inkOf("ink"), soft: inkOf("soft"), line: inkOf("line"), card: inkOf("card"), page: inkOf("page"),
           bad: inkOf("bad"), accent: inkOf("accent"), pale: inkOf("colour-pale") };
}

const FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif";

function secondsText(value) {
  for (const [limit, scale, unit] of [[1e-3, 1e6, "µs"], [1, 1e3, "ms"], [120, 1, "s"], [7200, 1 / 60, "min"], [Infinity, 1 / 3600, "h"]]) {
    if (Math.abs(value) < limit) return value === 0 ? "0" : `${+(value * scale).toPrecision(3)} ${unit}`;
  }
  return "";
}

function bytesText(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let size = value, unit = 0;
  while (Math.abs(size) >= 1024 && unit < units.length - 1) { size /= 1024; unit++; }
  return `${+size.toPrecision(3)} ${units[unit]}`;
}

// What ticks of bytes up to `most` stand apart: a round number of a unit.
function byteStep(most, parts) {
  const least = Math.max(most, 1) / parts, unit = 1024 ** Math.floor(Math.log(least) / Math.log(1024) + 1e-9);
  return unit * [1, 2, 4, 5, 8, 10, 16, 20, 32, 40, 50, 64, 80, 100, 128, 160, 200, 256, 320, 400, 512, 640, 800, 1024].find((n) => n * unit >= least);
}

// A tooltip made of text nodes: no string of the data is ever parsed as HTML.
function tip(lines) {
  const box = document.createElement("div");
  lines.filter((line) => line !== "" && line != null).forEach((line, i) => {
    const row = document.createElement("div");
    row.textContent = String(line);
    if (i === 0) row.style.fontWeight = "600";
    box.append(row);
  });
  return box;
}

function tooltip(p, lines) {
  return { trigger: "item", confine: true, backgroundColor: p.card, borderColor: p.line, padding: [6, 10],
           textStyle: { color: p.ink, fontSize: 12, fontFamily: FONT }, extraCssText: "max-width:22rem;white-space:normal;",
           formatter: (it) => tip(lines(it)) };
}

const wider = (element) => element.clientWidth >= 560;

function axisOf(p, type, more) {
  return Object.assign({ type, axisLine: { lineStyle: { color: p.line } }, axisTick: { show: false },
    axisLabel: Object.assign({ color: p.soft, fontSize: 11, fontFamily: FONT, hideOverlap: true }, (more || {}).label),
    nameTextStyle: { color: p.soft, fontSize: 11, fontFamily: FONT },
    splitLine: { show: type === "value" || type === "log", lineStyle: { color: p.line } } }, (more || {}).axis);
}

function legendOf(p, names, more) {
  return Object.assign({ data: names, top: 0, left: 0, type: "scroll", icon: "roundRect", itemWidth: 11, itemHeight: 11, itemGap: 14,
    pageTextStyle: { color: p.soft }, pageIconColor: p.accent,
    textStyle: { color: p.soft, fontSize: 12, fontFamily: FONT } }, more);
}

// Rectangles given as [from, to, row, ...] on a category axis; `high` is their share of a row.
function boxes(data, fill, more) {
  return Object.assign({ type: "custom", animation: false, encode: { x: [0, 1], y: 2 }, data, clip: true,
    renderItem: (params, api) => {
      const a = api.coord([api.value(0), api.value(2)]), b = api.coord([api.value(1), api.value(2)]);
      const high = api.size([0, 1])[1] * 0.78, area = params.coordSys;
      const left = Math.max(a[0], area.x), right = Math.min(b[0], area.x + area.width);
      if (right < area.x || left > area.x + area.width) return null;
      const width = Math.max(right - left, 0.5), gap = width > 4 ? 0.5 : 0;
      return { type: "rect", shape: { x: left + gap, y: a[1] - high / 2, width: width - 2 * gap, height: high, r: width > 8 ? 2 : 0 },
               style: { fill: fill(params.dataIndex) } };
    } }, more);
}

const CHARTS = {};

function drawCharts() {
  const palette = paletteNow();
  for (const element of document.querySelectorAll("[data-chart]")) {
    const name = element.dataset.chart;
    const chart = echarts.getInstanceByDom(element) || echarts.init(element, null, { renderer: "svg" });
    chart.resize();
    chart.setOption(Object.assign({ animation: false }, CHARTS[name](DATA[name], palette, element)), true);
    chart.getZr().flush();
  }
  ROOT.dataset.drawnAfter = performance.now().toFixed(1);
}
