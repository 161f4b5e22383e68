"use strict";

// The charts by name: data and palette in, ECharts option out.

function stackedBar(data, p, element, text, limit) {
  const whole = Math.max(limit || 0, data.rows.reduce((sum, row) => sum + row[1], 0));
  const option = {
    aria: { enabled: false }, grid: { left: 2, right: 2, top: limit ? 18 : 4, bottom: 22 },
    xAxis: axisOf(p, "value", { axis: { min: 0, max: whole, splitNumber: 4 }, label: { formatter: (v) => text(v), showMaxLabel: false } }),
    yAxis: axisOf(p, "category", { axis: { data: [""], show: false } }),
    tooltip: tooltip(p, (it) => [it.seriesName, data.rows[it.seriesIndex] ? data.rows[it.seriesIndex][2] : ""]),
    series: data.rows.map((row, i) => ({ type: "bar", stack: "all", name: row[0], data: [row[1]], barWidth: "80%",
      itemStyle: { color: p.colours[i % 8], borderColor: p.page, borderWidth: 1 } })),
  };
  if (limit) {
    option.series[0].markLine = { silent: true, symbol: "none", lineStyle: { color: p.bad, width: 2, type: "solid" }, data: [{ xAxis: limit }],
      label: { formatter: "limit", color: p.bad, fontSize: 11, position: "end", align: "right" } };
  }
  return option;
}

CHARTS.time = (data, p, element) => stackedBar(data, p, element, secondsText);
CHARTS.memory = (data, p, element) => stackedBar(data, p, element, bytesText, data.limit);

CHARTS.mesh = (data, p) => {
  const rows = [], fills = [], names = [...data.axes.map((axis) => `${axis.name} = ${axis.size}`), ...data.levels.map((l) => l.name)].reverse();
  const place = (i) => names.length - 1 - i;
  data.axes.forEach((axis, i) => {
    let from = 0;
    const at = (d) => Math.floor(d / axis.stride) % axis.size;
    for (let d = 1; d <= data.shown; d++) {
      if (d === data.shown || at(d) !== at(from)) {
        rows.push([from, d, place(i), `${axis.name} coordinate ${at(from)} of ${axis.size}`, `devices ${from} to ${d - 1}, over ${axis.link || "no link"}`]);
        fills.push(p.colours[at(from) % 8]);
        from = d;
      }
    }
  });
  data.levels.forEach((level, i) => {
    const span = Math.max(level.ranks, 1);
    for (let d = 0; d < data.shown; d += span) {
      rows.push([d, Math.min(d + span, data.shown), place(data.axes.length + i), level.name, `joins ${span} devices, ${level.text}`]);
      fills.push((d / span) % 2 ? p.pale : p.line);
    }
  });
  return {
    grid: { left: 110, right: 8, top: 4, bottom: 58 },
    xAxis: axisOf(p, "value", { axis: { min: 0, max: data.shown, minInterval: 1, name: "device", nameLocation: "middle", nameGap: 20, splitLine: { show: false } } }),
    yAxis: axisOf(p, "category", { axis: { data: names, axisLine: { show: false } }, label: { color: p.ink, width: 100, overflow: "truncate" } }),
    dataZoom: zoom(p), tooltip: tooltip(p, (it) => [it.value[3], it.value[4]]),
    series: [boxes(rows, (i) => fills[i])],
  };
};

function zoom(p, more) {
  const style = { height: 16, bottom: 4, borderColor: p.line, fillerColor: p.pale, handleStyle: { color: p.accent }, moveHandleSize: 0,
                  textStyle: { color: p.soft, fontSize: 10 }, showDataShadow: false, brushSelect: false, labelFormatter: "" };
  return [Object.assign({ type: "slider", xAxisIndex: 0, filterMode: "none" }, style, more), { type: "inside", xAxisIndex: 0, filterMode: "none", zoomOnMouseWheel: "ctrl" }];
}

CHARTS.regions = (data, p, element) => {
  const columns = Math.max(2, Math.floor(element.clientWidth / 130));
  const nodes = data.nodes.map((node, i) => ({ name: String(i), x: (i % columns) * 130, y: Math.floor(i / columns) * 90, symbol: "roundRect",
    symbolSize: [104, 46], itemStyle: { color: p.card, borderColor: p.accent, borderWidth: node.repeats > 1 ? 3 : 1.2 },
    label: { show: true, color: p.ink, fontSize: 12, fontFamily: FONT, width: 96, overflow: "truncate",
             formatter: () => `${node.name}${node.repeats > 1 ? ` × ${node.repeats}` : ""}\n${node.ops} ops` } }));
  return {
    tooltip: tooltip(p, (it) => it.dataType === "node"
      ? [data.nodes[it.dataIndex].name, `runs ${data.nodes[it.dataIndex].repeats} times, ${data.nodes[it.dataIndex].ops} ops each`, ...(data.nodes[it.dataIndex].more || [])]
      : ["runs before"]),
    series: [{ type: "graph", layout: "none", left: 60, right: 60, top: 30, bottom: 30, roam: false, data: nodes, edgeSymbol: ["none", "arrow"], edgeSymbolSize: 7,
      links: data.edges.map(([a, b]) => ({ source: a, target: b, lineStyle: { curveness: b === a + 1 ? 0 : 0.35 } })), lineStyle: { color: p.soft, width: 1.4, opacity: 1 } }],
  };
};

CHARTS.placements = (data, p) => {
  const rows = [], fills = [], names = [...data.axes, "region"].reverse(), count = data.ops.length;
  const colour = (index) => (data.words[index] === "whole" ? p.line : p.colours[index % 7]);
  const described = (op) => [`${op[0]} (${op[1]})`, data.regions[op[2]], ...data.axes.map((axis, k) => `${axis}: ${data.words[op[3][k]]} (${op[4][k]}${op[5][k] ? ` makes ${op[5][k]}` : ""})`),
    op[6] ? "runs again in the backward pass" : "", ...(op[7] || [])];
  let from = 0;
  data.ops.forEach((op, i) => {
    op[3].forEach((word, k) => { rows.push([i, i + 1, names.length - 1 - k, i]); fills.push(colour(word)); });
    if (i + 1 === count || data.ops[i + 1][2] !== op[2]) {
      rows.push([from, i + 1, 0, -1, data.regions[op[2]], `${i + 1 - from} ops`]); fills.push(op[2] % 2 ? p.pale : p.soft); from = i + 1;
    }
  });
  const legend = data.words.slice(0, 8);
  return {
    grid: { left: 74, right: 8, top: 34, bottom: 40 }, legend: legendOf(p, legend, { selectedMode: false }),
    xAxis: axisOf(p, "value", { axis: { min: 0, max: count, splitLine: { show: false } }, label: { show: false } }),
    yAxis: axisOf(p, "category", { axis: { data: names, axisLine: { show: false } }, label: { color: p.ink } }),
    dataZoom: zoom(p), tooltip: tooltip(p, (it) => (it.value[3] < 0 ? [it.value[4], it.value[5]] : described(data.ops[it.value[3]]))),
    series: [boxes(rows, (i) => fills[i]), ...legend.map((name, i) => ({ type: "bar", name, data: [], itemStyle: { color: colour(i) } }))],
  };
};

CHARTS.links = (data, p) => ({
  grid: { left: 120, right: 16, top: 34, bottom: 24 }, legend: legendOf(p, data.rows.map((row) => row[1])),
  xAxis: axisOf(p, "value", { axis: { splitNumber: 4 }, label: { formatter: bytesText } }),
  yAxis: axisOf(p, "category", { axis: { data: data.links }, label: { color: p.ink, width: 110, overflow: "truncate" } }),
  tooltip: tooltip(p, (it) => [it.seriesName, `over ${data.rows[it.seriesIndex][0]}`, data.rows[it.seriesIndex][3]]),
  series: data.rows.map((row, i) => ({ type: "bar", stack: "all", name: row[1], barMaxWidth: 30,
    data: data.links.map((link) => (link === row[0] ? row[2] : null)), itemStyle: { color: p.colours[i % 8] } })),
});

const STATUS_MARKS = { chosen: "diamond", solved: "circle" };

CHARTS.shapes = (data, p) => {
  const kinds = [...new Set(data.rows.map((row) => row[2]))].sort((a, b) => (a === "chosen" ? 1 : b === "chosen" ? -1 : 0));
  const colour = (kind, i) => (kind === "chosen" ? p.colours[3] : kind === "solved" ? p.colours[0] : p.colours[[7, 1, 4, 2][i % 4]]);
  return {
    grid: { left: 58, right: 16, top: 34, bottom: 36 }, legend: legendOf(p, kinds),
    xAxis: axisOf(p, "value", { axis: { min: 0, max: data.rows.length, minInterval: 1, name: "shapes, best first", nameLocation: "middle", nameGap: 20, splitLine: { show: false } } }),
    yAxis: axisOf(p, "value", { axis: { scale: true, splitNumber: 4 }, label: { formatter: secondsText } }),
    tooltip: tooltip(p, (it) => { const row = data.rows[it.value[0]];
      return [row[3], row[1] != null ? `step ${secondsText(row[1])}` : "", row[0] != null ? `no faster than ${secondsText(row[0])}` : "", row[4] ? `${row[2]}: ${row[4]}` : row[2]]; }),
    series: kinds.map((kind, i) => ({ type: "scatter", name: kind, symbol: STATUS_MARKS[kind] || "triangle", symbolSize: kind === "chosen" ? 16 : 7,
      itemStyle: { color: colour(kind, i) }, data: data.rows.map((row, n) => (row[2] === kind ? [n, row[1] != null ? row[1] : row[0]] : null)).filter(Boolean) })),
  };
};

CHARTS.frontier = (data, p) => {
  const sizes = [...new Set(data.rows.map((row) => row[2]))].sort((a, b) => a - b);
  const point = (row) => ({ value: [row[0], row[1]], text: row[4], symbol: row[3] === "best" ? "circle" : "emptyCircle", symbolSize: row[3] === "best" ? 11 : 8 });
  return {
    grid: { left: 64, right: 20, top: 34, bottom: 38 }, legend: legendOf(p, [...sizes.map((n) => `${n} devices`), "this plan"]),
    xAxis: axisOf(p, "value", { axis: { scale: true, splitNumber: 5, name: "seconds of a step", nameLocation: "middle", nameGap: 22 }, label: { formatter: secondsText } }),
    yAxis: axisOf(p, "value", { axis: { scale: true, splitNumber: 4 }, label: { formatter: bytesText } }),
    tooltip: tooltip(p, (it) => [it.data.text]),
    series: [...sizes.map((n, i) => ({ type: "scatter", name: `${n} devices`, itemStyle: { color: p.colours[i % 8] }, data: data.rows.filter((row) => row[2] === n).map(point) })),
      { type: "scatter", name: "this plan", symbol: "diamond", symbolSize: 18, itemStyle: { color: "transparent", borderColor: p.bad, borderWidth: 2 },
        data: [{ value: data.own, text: "this plan" }] }],
  };
};

CHARTS.measured = (data, p) => ({
  grid: { left: 58, right: 16, top: 34, bottom: 28 }, legend: legendOf(p, ["predicted", "measured"]),
  xAxis: axisOf(p, "category", { axis: { data: data.rows.map((row) => row[0]) } }),
  yAxis: axisOf(p, "value", { axis: { min: 0 }, label: { formatter: secondsText } }),
  tooltip: tooltip(p, (it) => [data.rows[it.dataIndex][0], `predicted ${secondsText(data.rows[it.dataIndex][1])}, nine of ten ${secondsText(data.rows[it.dataIndex][3])} to ${secondsText(data.rows[it.dataIndex][4])}`, `measured ${secondsText(data.rows[it.dataIndex][2])}`]),
  series: [
    { type: "bar", name: "predicted", barMaxWidth: 34, itemStyle: { color: p.pale }, data: data.rows.map((row) => row[1]) },
    { type: "custom", animation: false, itemStyle: { color: p.ink }, data: data.rows.map((row, i) => [i, row[3], row[4]]), encode: { x: 0, y: [1, 2] },
      renderItem: (params, api) => { const low = api.coord([api.value(0), api.value(1)]), high = api.coord([api.value(0), api.value(2)]), w = 6, style = { stroke: p.ink, lineWidth: 1.5 };
        return { type: "group", children: [[low[0], low[1], high[0], high[1]], [low[0] - w, low[1], low[0] + w, low[1]], [high[0] - w, high[1], high[0] + w, high[1]]]
          .map(([x1, y1, x2, y2]) => ({ type: "line", shape: { x1, y1, x2, y2 }, style })) }; } },
    { type: "scatter", name: "measured", symbolSize: 11, itemStyle: { color: p.colours[3] }, data: data.rows.map((row) => row[2]) },
  ],
});
