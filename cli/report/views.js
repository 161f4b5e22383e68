"use strict";

// The charts by name: data and palette in, ECharts option out.

function stackedBar(data, p, element, text, limit) {
  const whole = Math.max(limit || 0, data.rows.reduce((sum, row) => sum + row[1], 0));
  const option = {
    aria: { enabled: false }, grid: { left: 2, right: 2, top: limit ? 18 : 4, bottom: 22 },
    xAxis: axisOf(p, "value", { axis: { min: 0, max: whole, splitNumber: 4, interval: limit ? byteStep(whole, 4) : undefined }, label: { formatter: (v) => text(v), showMaxLabel: false } }),
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

// Boxes in reading order with a strip for every mesh axis; lines go from a box to what runs after it.
CHARTS.regions = (data, p, element) => {
  const high = 62, strips = data.axes.length, columns = Math.max(1, Math.min(data.nodes.length, Math.floor(element.clientWidth / 150)));
  element.style.height = `${8 + 92 * Math.ceil(data.nodes.length / columns)}px`;
  echarts.getInstanceByDom(element).resize();
  const across = element.clientWidth / columns, wide = Math.min(across - 34, 190);
  const at = (i) => [1 + (i % columns) * across, 6 + Math.floor(i / columns) * 92];
  const box = (i) => {
    const node = data.nodes[i], [x, y] = at(i), own = Math.max(3, Math.min(6, 18 / Math.max(strips, 1)));
    const words = (text, top, fill, size) => ({ type: "text", style: { text, x: x + 10, y: y + top, fill, font: `${size}px ${FONT}`, width: wide - 20, overflow: "truncate" } });
    return { type: "group", children: [
      { type: "rect", shape: { x, y, width: wide, height: high, r: 6 }, style: { fill: p.card, stroke: node.repeats > 1 ? p.accent : p.soft, lineWidth: node.repeats > 1 ? 2 : 1 } },
      words(`${node.name}${node.repeats > 1 ? ` × ${node.repeats}` : ""}`, 8, p.ink, 13), words(node.modules || `${node.ops} ops`, 25, p.soft, 11),
      ...node.words.map((word, k) => ({ type: "rect", shape: { x: x + 10, y: y + high - 6 - own * (strips - k), width: wide - 20, height: own - 1 }, style: { fill: wordColour(p, data.words, word) } })),
    ] };
  };
  const line = ([a, b]) => {
    const from = at(a), to = at(b), next = b === a + 1 && from[1] === to[1], y = from[1] + high / 2;
    const shape = next ? { x1: from[0] + wide, y1: y, x2: to[0] - 2, y2: y, cpx1: from[0] + wide, cpy1: y, cpx2: to[0] - 2, cpy2: y }
      : { x1: from[0] + wide / 2, y1: from[1] + high, x2: to[0] + wide / 2, y2: to[1] + (to[1] > from[1] ? 0 : high),
          cpx1: from[0] + wide / 2, cpy1: from[1] + high + 24, cpx2: to[0] + wide / 2, cpy2: to[1] + (to[1] > from[1] ? -24 : high + 24) };
    const style = { fill: "none", stroke: p.soft, lineWidth: 1.3 }, head = next ? [[shape.x2 - 6, y - 4], [shape.x2, y], [shape.x2 - 6, y + 4]]
      : [[shape.x2 - 4, shape.y2 + (to[1] > from[1] ? -6 : 6)], [shape.x2, shape.y2], [shape.x2 + 4, shape.y2 + (to[1] > from[1] ? -6 : 6)]];
    return { type: "group", children: [{ type: "bezierCurve", shape, style }, { type: "polyline", shape: { points: head }, style }] };
  };
  const series = (rows, draw, more) => Object.assign({ type: "custom", coordinateSystem: "none", data: rows, renderItem: (params) => draw(params.dataIndex) }, more);
  return {
    tooltip: tooltip(p, (it) => { const node = data.nodes[it.dataIndex];
      return [node.name, node.modules, node.repeats > 1 ? `runs ${node.repeats} times, ${node.ops} ops each` : `runs once, ${node.ops} ops`, ...data.axes.map((axis, k) => `${axis}: mostly ${data.words[node.words[k]]}`)]; }),
    series: [series(data.edges.map(() => 0), (i) => line(data.edges[i]), { silent: true }), series(data.nodes.map(() => 0), box)],
  };
};

const wordColour = (p, words, index) => (words[index] === "whole" ? p.line : p.colours[index % 8]);

CHARTS.placements = (data, p) => {
  const rows = [], fills = [], names = [...data.axes, "region"].reverse(), count = data.ops.length;
  const colour = (index) => wordColour(p, data.words, index);
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
  const sizes = [...new Set(data.rows.map((row) => row[2]))].sort((a, b) => a - b), named = (n) => (n === 1 ? "1 device" : `${n} devices`);
  const heights = [...data.rows.map((row) => row[1]), data.own[1]];
  const point = (row) => ({ value: [row[0], row[1]], text: row[4], symbol: row[3] === "best" ? "circle" : "emptyCircle", symbolSize: row[3] === "best" ? 11 : 8 });
  return {
    grid: { left: 64, right: 20, top: 34, bottom: 38 }, legend: legendOf(p, [...sizes.map(named), "this plan"]),
    xAxis: axisOf(p, "value", { axis: { scale: true, splitNumber: 5, name: "seconds of a step", nameLocation: "middle", nameGap: 22 }, label: { formatter: secondsText } }),
    yAxis: axisOf(p, "value", { axis: { scale: true, interval: byteStep(Math.max(...heights) - Math.min(...heights), 4) }, label: { formatter: bytesText } }),
    tooltip: tooltip(p, (it) => [it.data.text]),
    series: [...sizes.map((n, i) => ({ type: "scatter", name: named(n), itemStyle: { color: p.colours[i % 8] }, data: data.rows.filter((row) => row[2] === n).map(point) })),
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

CHARTS.timeline = (data, p) => {
  const rows = data.tasks.map((task) => [task[0], task[1], data.rows.length - 1 - task[2], task[3], task[4]]);
  const order = ["forward", "end of the step", "backward", "handing on", "copy to the host", "copy from the host", "backward of inputs", "backward of weights"];
  const colour = (kind) => { if (data.kinds[kind] === "many, in turn") return p.pale; const at = order.indexOf(data.kinds[kind]); return at < 0 ? p.colours[(3 + kind) % 8] : p.colours[[0, 6, 1, 5, 4, 7, 2, 3][at]]; };
  return {
    grid: { left: 118, right: 10, top: 34, bottom: 62 }, legend: legendOf(p, data.kinds, { selectedMode: false }),
    xAxis: axisOf(p, "value", { axis: { min: 0, max: data.seconds, name: "time in the step", nameLocation: "middle", nameGap: 20 }, label: { formatter: secondsText } }),
    yAxis: axisOf(p, "category", { axis: { data: [...data.rows].reverse(), axisLine: { show: false } }, label: { color: p.ink, width: 108, overflow: "truncate", interval: 0 } }),
    dataZoom: zoom(p), tooltip: tooltip(p, (it) => [`${data.kinds[it.value[3]]}${it.value[4] > 1 ? ` × ${it.value[4]}` : ""}`, data.rows[data.rows.length - 1 - it.value[2]],
      `${secondsText(it.value[1] - it.value[0])}, from ${secondsText(it.value[0])}`]),
    series: [boxes(rows, (i) => colour(rows[i][3])), ...data.kinds.map((name, i) => ({ type: "bar", name, data: [], itemStyle: { color: colour(i) } }))],
  };
};

CHARTS.memory_time = (data, p, element) => {
  const columns = element.clientWidth >= 720 && data.curves.length > 1 ? 2 : 1, lines = Math.ceil(data.curves.length / columns);
  const names = [...new Set(data.curves.flatMap((curve) => curve.causes.map((cause) => cause[0])))];
  const high = (element.clientHeight - 40) / lines, grid = [], xAxis = [], yAxis = [], series = [], title = [];
  data.curves.forEach((curve, i) => {
    const left = `${(i % columns) * 100 / columns}%`, top = 34 + Math.floor(i / columns) * high;
    const x = (i % columns) * element.clientWidth / columns;
    grid.push({ left: x + 62, width: element.clientWidth / columns - 86, top: top + 26, height: high - 62 });
    title.push({ text: `${curve.name}: ${curve.peakText}`, left: x + 62, top: top + 2, textStyle: { fontSize: 12, fontWeight: 600, color: p.ink, fontFamily: FONT } });
    const last = curve.seconds[curve.seconds.length - 1] || 1, most = Math.max(data.limit, ...curve.seconds.map((_, k) => curve.causes.reduce((sum, cause) => sum + cause[1][k], 0)));
    xAxis.push(axisOf(p, "value", { axis: { gridIndex: i, min: 0, max: last, splitNumber: 4 }, label: { formatter: secondsText } }));
    yAxis.push(axisOf(p, "value", { axis: { gridIndex: i, max: most * 1.04, interval: byteStep(most, 3) }, label: { formatter: bytesText, showMaxLabel: false } }));
    curve.causes.forEach((cause, k) => series.push({ type: "line", name: cause[0], xAxisIndex: i, yAxisIndex: i, stack: `all ${i}`, step: "end", symbol: "none", lineStyle: { width: 0 },
      areaStyle: { opacity: 1 }, itemStyle: { color: p.colours[names.indexOf(cause[0]) % 8] }, data: curve.seconds.map((at, m) => [at, cause[1][m]]),
      markLine: k ? undefined : { silent: true, symbol: "none", lineStyle: { color: p.bad, width: 1.5, type: "solid" }, data: [{ yAxis: data.limit }], label: { formatter: "limit", color: p.bad, fontSize: 11, position: "insideEndTop" } } }));
  });
  return { grid, xAxis, yAxis, series, title, legend: legendOf(p, names),
    tooltip: Object.assign(tooltip(p, () => []), { trigger: "axis", formatter: (items) => tip([items.length ? secondsText(items[0].value[0]) : "", ...items.filter((it) => it.value[1]).map((it) => `${it.seriesName}: ${bytesText(it.value[1])}`)]) }) };
};

// Bars as wide as an op's seconds: from the bottom the share of them that each part takes.
CHARTS.waterline = (data, p) => {
  const colours = [p.colours[0], p.colours[1], p.colours[7], p.pale], rows = [], fills = [];
  let from = 0;
  data.moments.forEach((moment, i) => {
    let low = 0;
    moment[2].forEach((part, k) => { const share = 100 * part / moment[1]; if (share > 0.05) { rows.push([from, from + moment[1], low, low + share, i]); fills.push(colours[k]); } low += share; });
    from += moment[1];
  });
  return {
    grid: { left: 48, right: 10, top: 34, bottom: 62 }, legend: legendOf(p, data.parts, { selectedMode: false }),
    xAxis: axisOf(p, "value", { axis: { min: 0, max: from, name: "seconds of the ops of one device, unsplit", nameLocation: "middle", nameGap: 20, splitLine: { show: false } }, label: { formatter: secondsText } }),
    yAxis: axisOf(p, "value", { axis: { min: 0, max: 100 }, label: { formatter: "{value} %" } }), dataZoom: zoom(p),
    tooltip: tooltip(p, (it) => { const moment = data.moments[it.value[4]]; return [moment[0], ...moment[3]]; }),
    series: [{ type: "custom", animation: false, clip: true, data: rows, encode: { x: [0, 1], y: [2, 3] }, renderItem: (params, api) => {
      const a = api.coord([api.value(0), api.value(3)]), b = api.coord([api.value(1), api.value(2)]), area = params.coordSys;
      const left = Math.max(a[0], area.x), right = Math.min(b[0], area.x + area.width);
      return right <= left ? null : { type: "rect", shape: { x: left, y: a[1], width: Math.max(right - left - 0.3, 0.3), height: b[1] - a[1] }, style: { fill: fills[params.dataIndex] } };
    } }, ...data.parts.map((name, i) => ({ type: "bar", name, data: [], itemStyle: { color: colours[i] } }))],
  };
};

CHARTS.worth = (data, p) => ({
  grid: { left: 160, right: 40, top: 8, bottom: 24 },
  xAxis: axisOf(p, "value", { axis: { splitNumber: 4 }, label: { formatter: (v) => `${v > 0 ? "+" : ""}${v} %` } }),
  yAxis: axisOf(p, "category", { axis: { data: data.rows.map((row) => row[0]).reverse() }, label: { color: p.ink, width: 150, overflow: "truncate" } }),
  tooltip: tooltip(p, (it) => data.rows[data.rows.length - 1 - it.dataIndex].filter((part, i) => i !== 1)),
  series: [{ type: "bar", barMaxWidth: 20, data: data.rows.map((row) => ({ value: row[1], itemStyle: { color: row[1] < 0 ? p.colours[3] : p.colours[2] } })).reverse() }],
});

// A line for each setting over the values of the last key; `marks` says how a point's low and high are drawn.
function sweep(data, p, text, marks, bytes) {
  const most = Math.max(...data.lines.flatMap(([, points]) => points.map((point) => (point ? Math.max(point[0], point[2] || 0) : 0))));
  const names = data.lines.map((line) => line[0]), many = names.length > 1;
  const value = (i, k) => (data.lines[i][1][k] ? data.lines[i][1][k][0] : null);
  const series = data.lines.map(([name, points], i) => ({ type: "line", name, symbol: "circle", symbolSize: 9, connectNulls: false,
    itemStyle: { color: p.colours[i % 8] }, lineStyle: { color: p.colours[i % 8], width: 2 }, data: points.map((_, k) => value(i, k)) }));
  data.lines.forEach(([, points], i) => series.push({ type: "custom", animation: false, silent: true, encode: { x: 0, y: [1, 2] },
    data: points.flatMap((point, k) => (point && point[2] != null ? [[k, point[1] != null ? point[1] : point[2], point[2]]] : [])),
    renderItem: (params, api) => marks(api.coord([api.value(0), api.value(1)]), api.coord([api.value(0), api.value(2)]), p.colours[i % 8], p) }));
  return {
    grid: { left: 70, right: 20, top: many ? 34 : 12, bottom: 40 }, legend: many ? legendOf(p, names) : { show: false },
    xAxis: axisOf(p, "category", { axis: { data: data.along, name: data.key, nameLocation: "middle", nameGap: 22 } }),
    yAxis: axisOf(p, "value", { axis: { min: 0, splitNumber: 4, interval: bytes ? byteStep(most, 4) : undefined }, label: { formatter: text } }),
    tooltip: tooltip(p, (it) => { const point = data.lines[it.seriesIndex][1][it.dataIndex]; return [many ? it.seriesName : "", `${data.key} = ${data.along[it.dataIndex]}: ${text(point[0])}`, point[3]]; }),
    series,
  };
}

const stroke = (colour, width, dash) => ({ stroke: colour, lineWidth: width, lineDash: dash });
const lineFrom = (a, b, style) => ({ type: "line", shape: { x1: a[0], y1: a[1], x2: b[0], y2: b[1] }, style });

const whisker = (low, high, colour) => ({ type: "group", children: [lineFrom(low, high, stroke(colour, 1.5)),
  ...[low, high].map(([x, y]) => lineFrom([x - 5, y], [x + 5, y], stroke(colour, 1.5)))] });

const limitDash = (low, high, colour, p) => lineFrom([high[0] - 26, high[1]], [high[0] + 26, high[1]], stroke(p.bad, 1.5, [5, 4]));

CHARTS.sweep_step = (data, p) => sweep(data, p, secondsText, whisker);
CHARTS.sweep_rate = (data, p) => sweep(data, p, (v) => String(+v.toPrecision(3)), whisker);
CHARTS.sweep_peak = (data, p) => sweep(data, p, bytesText, limitDash, true);
