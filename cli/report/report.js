"use strict";

// The page is complete without this script: it opens every section for printing and copies the plan file.

const details = () => Array.from(document.querySelectorAll("details:not(.source)"));
let opened = [];

addEventListener("beforeprint", () => {
  opened = details().filter((each) => !each.open);
  opened.forEach((each) => { each.open = true; });
});

addEventListener("afterprint", () => {
  opened.forEach((each) => { each.open = false; });
});

const button = document.getElementById("copy");
if (button && navigator.clipboard) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.getElementById("plan").textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
