"use strict";

// Draws once at load, and again for another width, another colour scheme, or paper.

drawCharts();
let resizing = 0;
addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(drawCharts, 120); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
addEventListener("beforeprint", () => { ROOT.classList.add("printing"); drawCharts(); });
addEventListener("afterprint", () => { ROOT.classList.remove("printing"); drawCharts(); });
